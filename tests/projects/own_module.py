"""A stranger's project: their own LightningModule, fine-tuning a causal model; the data now come from SRDDataModule."""

import lightning as L
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from srd_lightning import SRDDataModule


class FineTuner(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(**trainer_options):
    L.seed_everything(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=1,
        )
    )
    questions = [{"prompt": f"Count to {n}.", "response": " ".join(map(str, range(n)))} for n in range(1, 13)]
    data = SRDDataModule(
        {"train": questions, "validation": questions[:3]},
        tokenizer=ByT5Tokenizer(),
        student=model,
        schedule={0: 0.5, 2: 0.75},
        batch_size=2,
    )
    trainer = L.Trainer(max_epochs=4, **trainer_options)
    trainer.fit(FineTuner(model), datamodule=data)
    return trainer


if __name__ == "__main__":
    main()
