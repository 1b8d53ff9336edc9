"""A stranger's loop of torch alone, on any number of ranks: the rows now come from a curriculum."""

import sys

import torch
from strangers import EPOCHS, RANK, RANKS, Numbers, curriculum, write
from torch import nn
from torch.utils.data import DataLoader

from srd_lightning import CurriculumSampler


def main(folder, first=0):
    if RANKS > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    layer = nn.Linear(1, 1)
    model = layer if RANKS == 1 else nn.parallel.DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    sampler = CurriculumSampler(curriculum(), RANKS, RANK)  # was: shuffle=True
    loader = DataLoader(Numbers(), batch_size=3, sampler=sampler)
    seen, steps = {}, 0
    for epoch in range(int(first), EPOCHS):
        sampler.epoch = epoch
        for batch in loader:
            seen.setdefault(epoch, []).extend(batch.tolist())
            (model(batch) - 2 * batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    write(folder, seen, steps)
    if RANKS > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
