"""A stranger's project: their own data module, with batches as Hugging Face models take them, and KDLightningModule."""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from srd_lightning import KDLightningModule, ReverseKL


class Palindromes(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(range(2, 12), batch_size=2, collate_fn=self.collate)

    def val_dataloader(self):
        return DataLoader(range(20, 24), batch_size=2, collate_fn=self.collate)

    def collate(self, numbers):
        input_ids = torch.tensor([[number, number + 1, number + 2, number + 1, number] for number in numbers])
        labels = input_ids.clone()
        labels[:, :3] = -100
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def tiny(num_layers):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=num_layers, num_attention_heads=2
        )
    )


def main(**trainer_options):
    L.seed_everything(0)
    module = KDLightningModule(tiny(1), tiny(2), loss=ReverseKL(), kd_weight=0.5)
    trainer = L.Trainer(max_epochs=2, **trainer_options)
    trainer.fit(module, datamodule=Palindromes())
    return trainer


if __name__ == "__main__":
    main()
