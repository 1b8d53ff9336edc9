"""A stranger's loop with Accelerate, which deals batches to the ranks by itself: the rows come from a curriculum."""

import sys

import torch
from accelerate import Accelerator
from strangers import EPOCHS, Numbers, curriculum, write
from torch import nn
from torch.utils.data import DataLoader

from srd_lightning import CurriculumSampler


def main(folder, first=0):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    sampler = CurriculumSampler(curriculum())
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.001), DataLoader(Numbers(), batch_size=3, sampler=sampler)
    )
    seen, steps = {}, 0
    for epoch in range(int(first), EPOCHS):
        sampler.epoch = epoch
        for batch in loader:
            seen.setdefault(epoch, []).extend(batch.tolist())
            accelerator.backward((model(batch) - 2 * batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    write(folder, seen, steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
