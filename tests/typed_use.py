"""A stranger's code, as mypy is to see it: never run, checked with the package's own settings (``mypy``)."""

from __future__ import annotations

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import assert_type

from srd_lightning import (
    ALPACA,
    GKD,
    CacheSettings,
    Curriculum,
    CurriculumCallback,
    Decoding,
    DistillationLoss,
    Example,
    ForwardKL,
    Head,
    KDLightningModule,
    Pretrained,
    ResumeCheckpoint,
    SRDDataModule,
    chunked_objective,
    reciprocal_rank_fusion,
)


class SquaredError(DistillationLoss):
    """A loss of one's own."""

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """Return a value per token."""
        return (teacher_logp - student_logp).square().mean(-1)


class OwnModule(KDLightningModule):
    """A module of one's own."""

    def on_train_start(self) -> None:
        """Say what is trained."""
        assert_type(self.kd_weight, float)


def grown(dataset: Dataset[int], rouge_l: Tensor, nll: Tensor, epoch: int) -> DataLoader[int]:
    """Return the loader of an epoch of a project of one's own."""
    order = reciprocal_rank_fusion(rouge_l, -nll)
    curriculum = Curriculum(order, {0: 0.25, 8: 0.5, 16: 0.75})
    assert_type(curriculum.num_steps(batch_size=8, max_epochs=24), int)
    return DataLoader(curriculum.subset(dataset, epoch), batch_size=8, shuffle=True)


def distilled() -> SRDDataModule:
    """Return the data that a student was distilled on."""
    data = SRDDataModule("train.jsonl", tokenizer="gpt2", schedule={0: 1.0}, decoding=Decoding(max_new_tokens=8))
    module = OwnModule(
        Pretrained("gpt2"),
        Pretrained("gpt2-xl"),
        loss=SquaredError(temperature=2.0),
        teacher_cache=CacheSettings("topk", k=16),
        rollouts=GKD(share=0.5),
    )
    callbacks: list[L.Callback] = [CurriculumCallback(), ResumeCheckpoint(dirpath="checkpoints")]
    L.Trainer(callbacks=callbacks).fit(module, datamodule=data)
    return data


def objective(hidden: Tensor, targets: Tensor, student: Head, teacher_logits: Tensor) -> Tensor:
    """Return the objective of a module of one's own."""
    assert_type(ALPACA({"instruction": "Why?", "output": "So."}), Example)
    found = chunked_objective(hidden, student, targets, ForwardKL(), lambda part: teacher_logits[part], kd_weight=0.5)
    return found.loss
