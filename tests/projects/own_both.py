"""A stranger's project: their own module and data module; the curriculum comes with one changed line and a callback."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from srd_lightning import Curriculum, CurriculumCallback, reciprocal_rank_fusion


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) - 2 * batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Numbers(L.LightningDataModule):
    def __init__(self, curriculum):
        super().__init__()
        self.dataset = [torch.tensor([float(number)]) for number in range(20)]
        self.curriculum = curriculum

    def train_dataloader(self):
        dataset = self.curriculum.subset(self.dataset, self.trainer.current_epoch)  # was: self.dataset
        return DataLoader(dataset, batch_size=3, shuffle=True)


def main(callbacks=(), **trainer_options):
    L.seed_everything(0)
    small_is_easy = torch.arange(20.0).neg()
    curriculum = Curriculum(reciprocal_rank_fusion(small_is_easy), {0: 0.25, 1: 0.5, 3: 0.9})
    trainer = L.Trainer(max_epochs=4, callbacks=[*callbacks, CurriculumCallback()], **trainer_options)
    trainer.fit(Regression(), datamodule=Numbers(curriculum))
    return trainer


if __name__ == "__main__":
    main()
