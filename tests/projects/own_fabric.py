"""A stranger's loop with Fabric: the rows now come from a curriculum."""

import sys

import torch
from lightning.fabric import Fabric
from strangers import EPOCHS, RANK, RANKS, Numbers, curriculum, write
from torch import nn
from torch.utils.data import DataLoader

from srd_lightning import CurriculumSampler


def main(folder, first=0):
    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp" if RANKS > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0)
    layer = nn.Linear(1, 1)
    model, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=0.001))
    sampler = CurriculumSampler(curriculum(), fabric.world_size, fabric.global_rank)
    loader = DataLoader(Numbers(), batch_size=3, sampler=sampler)
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)  # ours deals to the ranks
    seen, steps = {}, 0
    for epoch in range(int(first), EPOCHS):
        sampler.epoch = epoch
        for batch in loader:
            seen.setdefault(epoch, []).extend(batch.tolist())
            fabric.backward((model(batch) - 2 * batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    assert fabric.global_rank == RANK
    write(folder, seen, steps)
    fabric.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    if RANKS > 1:
        torch.distributed.destroy_process_group()
