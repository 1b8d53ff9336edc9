"""The whole job as a user writes it: reflection, curriculum, distillation, a planned learning rate."""

import lightning as L
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from srd_lightning import Decoding, HyperparameterScheduler, KDLightningModule, SRDDataModule

SCHEDULE = {0: 0.25, 1: 0.5, 3: 0.75}


def tiny(seed, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=1,
            **options,
        )
    )


def make_rows():
    return [{"id": n, "instruction": f"Say {n}.", "output": "ab" * (1 + n % 5) + str(n)} for n in range(41)]


def parts(folder, **options):
    """Return the module and its data."""
    L.seed_everything(0)
    module = KDLightningModule(
        tiny(0),
        tiny(1),
        tokenizer=ByT5Tokenizer(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
        **options,
    )
    data = SRDDataModule(
        {"train": make_rows(), "validation": make_rows()[:5], "test": make_rows()[:5]},
        schedule=SCHEDULE,
        batch_size=3,
        scores=f"{folder}/scores",
        decoding=Decoding(max_new_tokens=5),
        reflection_tokens=300,
    )
    return module, data


def main(callbacks=(), module_options=None, **trainer_options):
    module, data = parts(trainer_options["default_root_dir"], **(module_options or {}))
    staged = HyperparameterScheduler({"kd_weight": {0: 0.5, 1: 1.0}})
    trainer = L.Trainer(max_epochs=5, callbacks=[*callbacks, staged], accumulate_grad_batches=2, **trainer_options)
    trainer.fit(module, datamodule=data)
    return trainer


if __name__ == "__main__":
    main()
