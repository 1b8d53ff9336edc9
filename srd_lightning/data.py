"""`SRDDataModule`: rows, reflected on by the student, ranked, and let into training in stages."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from srd_lightning.curriculum import PAPER_SCHEDULE, Curriculum, check_fractions
from srd_lightning.evaluation import Decoding
from srd_lightning.models import Pretrained
from srd_lightning.ranking import reciprocal_rank_fusion
from srd_lightning.reflection import fingerprint, reflect
from srd_lightning.rows import Report, collate, load_splits, tokenize
from srd_lightning.store import ScoreStore
from srd_lightning.templates import ALPACA, ChatTemplate, PromptTemplate


@dataclass(frozen=True)
class Curation:
    """What the curation did: rows that were ranked, rows in the last stage, seconds it took."""

    rows: int
    kept: int
    seconds: float


class SRDDataModule(LightningDataModule):
    """Data that the student has reflected on: the hardest rows dropped, the rest entering easy to hard.

    ``setup("fit")`` reads, tokenises, lets the student answer every prompt unless valid scores exist, ranks and stages;
    ``train_dataloader`` then holds the rows of the current epoch. It works with any LightningModule.

    Args:
        data: Training data, or ``{"train": …, "validation": …, "test": …}``; a source is a jsonl, json, csv or parquet
            file, a list of files, a ``save_to_disk`` folder, a hub id, a `datasets.Dataset` or a list of rows. Rows
            have ``instruction`` (and ``input``) and ``output``, or ``prompt`` and ``response``, or ``messages``.
        tokenizer: Name, folder or object; by default the student's.
        student: Who reflects; by default the student of the module that is trained.
        template: How a row becomes a prompt: `PromptTemplate` or `ChatTemplate`.
        schedule: ``{first epoch: share of the rows}``; the last share is what is kept. ``{0: 1.0}`` is all rows from
            the start, without reflection.
        scores: Folder of the scores; by default one in the trainer's ``default_root_dir``, named after what the scores
            depend on.
        batch_size: Rows per process and training step.
        eval_batch_size: Rows per process and batch of evaluation; by default ``batch_size``.
        max_length: Tokens of prompt and response; longer responses are cut, counted and reported.
        max_prompt_length: Tokens of the prompt; rows with longer ones are dropped, counted and reported.
        decoding: How the student answers when it reflects; greedy by default.
        reflection_batch_size: Rows per batch of the reflection.
        ties: How equal scores are ranked; see `reciprocal_rank_fusion`.
        num_workers: Processes that load batches.
        seed: Of the order within an epoch.

    Raises:
        ValueError: A schedule without epoch 0, or lengths that leave no room for a response.

    Example:
        >>> rows = [{"instruction": "Add 1 and 1.", "output": "2"}]
        >>> SRDDataModule(rows, tokenizer="gpt2", schedule={8: 0.75, 0: 0.5}).schedule
        {0: 0.5, 8: 0.75}
    """

    def __init__(
        self,
        data: str | list[Any] | dict[str, Any],
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        student: Pretrained | nn.Module | None = None,
        template: PromptTemplate | ChatTemplate = ALPACA,
        schedule: dict[int, float] = dict(PAPER_SCHEDULE),  # noqa: B006 (never changed)
        scores: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        max_prompt_length: int = 256,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        reflection_batch_size: int = 16,
        ties: Literal["average", "order"] = "average",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_prompt_length >= max_length:
            raise ValueError(
                f"max_prompt_length must be smaller than max_length, or no response fits, but they are "
                f"{max_prompt_length} and {max_length}"
            )
        sizes = {"batch_size": batch_size, "reflection_batch_size": reflection_batch_size}
        if wrong := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
            raise ValueError(f"batches must hold at least one row, but {', '.join(wrong)}")
        self.data = data
        self.tokenizer: Any = tokenizer
        self.student = student
        self.template = template
        self.schedule = check_fractions(schedule)
        self.scores = scores
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.decoding = decoding
        self.reflection_batch_size = reflection_batch_size
        self.ties = ties
        self.num_workers = num_workers
        self.seed = seed
        self.rows: dict[str, Dataset] = {}
        self.reports: dict[str, Report] = {}
        self.curriculum: Curriculum | None = None
        self.curation: Curation | None = None

    def setup(self, stage: str) -> None:
        """Read and tokenise once; for ``fit`` also reflect, rank and stage."""
        if not self.rows:
            self._read()
        if stage == "fit":
            if self.trainer is not None:
                # A loader is as long as it was when it was built: the pool can only grow in a new one.
                self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
            if self.curriculum is None:
                self.curate()

    def _read(self) -> None:
        self.tokenizer = self._find_tokenizer()
        template = self.template.bind(self.tokenizer)
        for split, rows in load_splits(self.data).items():
            self.rows[split], self.reports[split] = tokenize(
                rows, self.tokenizer, template, self.max_length, self.max_prompt_length, split
            )
            rank_zero_info(f"{split}: {self.reports[split]}")

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.tokenizer, str):
            return AutoTokenizer.from_pretrained(self.tokenizer)
        if self.tokenizer is not None:
            return self.tokenizer
        if isinstance(self.student, Pretrained):
            return self.student.tokenizer()
        found = getattr(self.trainer and self.trainer.lightning_module, "tokenizer", None)
        if found is None:
            raise ValueError("SRDDataModule needs a tokenizer: pass tokenizer=, or a student that is a Pretrained")
        return found

    def curate(self) -> Curriculum:
        """Let the student reflect where scores are missing, rank the rows and stage them.

        Returns:
            The curriculum, also kept as ``self.curriculum``.
        """
        start = time.perf_counter()
        if "train" not in self.rows:
            raise ValueError(f"training needs the split 'train', but `data` has {', '.join(self.rows)}")
        rows = self.rows["train"]
        everything = set(self.schedule.values()) == {1.0}
        order = torch.arange(len(rows)) if everything else self._rank(rows)
        self.curriculum = Curriculum(order, self.schedule)
        last = max(self.schedule)
        self.curation = Curation(len(rows), self.curriculum.size(last), time.perf_counter() - start)
        for first in self.schedule:
            size = self.curriculum.size(first)
            rank_zero_info(f"from epoch {first}: {size} of {len(rows)} rows, the easiest {size / len(rows):.0%}")
        return self.curriculum

    def _rank(self, rows: Dataset) -> Tensor:
        scores = self._reflect(rows)
        ids = list(rows["id"])
        by_id = np.argsort(np.array(ids))  # rows that no score can tell apart stand in the order of their ids
        rouge_l = np.array([scores[ids[row]]["rouge_l"] for row in by_id])
        nll = np.array([scores[ids[row]]["nll"] for row in by_id])
        return torch.from_numpy(by_id)[reciprocal_rank_fusion(rouge_l, -nll, ties=self.ties)]

    def _reflect(self, rows: Dataset) -> dict[str, dict[str, Any]]:
        model = self._find_student()
        made_of = fingerprint(rows, model, self.tokenizer, self.template, self.decoding)
        store = ScoreStore(self.scores or self._default_folder(made_of), made_of)
        home = next(model.parameters()).device
        model.to(home if self.trainer is None else self.trainer.strategy.root_device)
        rank, world_size = self._share()
        scores = reflect(
            model, self.tokenizer, rows, store, self.decoding, self.reflection_batch_size, rank, world_size
        )
        model.to(home)
        return scores

    def _find_student(self) -> nn.Module:
        if isinstance(self.student, Pretrained):
            return self.student.model()
        if self.student is not None:
            return self.student
        module: Any = self.trainer and self.trainer.lightning_module
        if hasattr(module, "build_student"):
            return cast(nn.Module, module.build_student())
        if isinstance(getattr(module, "student", None), nn.Module):
            return cast(nn.Module, module.student)
        raise ValueError(
            "SRDDataModule needs a student that reflects: pass student=, or train a module whose `student` is a model; "
            "schedule={0: 1.0} trains on all rows without reflection"
        )

    def _default_folder(self, made_of: Mapping[str, str]) -> Path:
        root = Path.cwd() if self.trainer is None else Path(self.trainer.default_root_dir)
        name = hashlib.sha256(repr(sorted(made_of.items())).encode()).hexdigest()[:16]
        return root / "scores" / name

    def _share(self) -> tuple[int, int]:
        """Return this process's number and how many see different data."""
        kwargs = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"rank": 0, "num_replicas": 1}
        return kwargs["rank"], kwargs["num_replicas"]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the rows of the current epoch, shuffled by seed and epoch."""
        assert self.curriculum is not None, 'setup("fit") comes first'
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        pool = self.curriculum.subset(self.rows["train"], epoch)
        rank, world_size = self._share()
        sampler: DistributedSampler[Any] = DistributedSampler(pool, world_size, rank, shuffle=True, seed=self.seed)
        sampler.set_epoch(epoch)  # Lightning calls it too late where workers prefetch
        return self._loader(pool, sampler, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the ``validation`` rows, or nothing if there are none."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the ``test`` rows, or nothing if there are none."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the rows to answer: ``predict``, else ``test``."""
        return self._eval_loader("predict" if "predict" in self.rows else "test")

    def _eval_loader(self, split: str) -> DataLoader[Any] | list[Any]:
        if split not in self.rows:
            return []
        rows: Any = self.rows[split]
        rank, world_size = self._share()
        # Every process gets as many rows; the ones that fill up have no response, so nothing is counted twice.
        blanks: Any = [{**rows[0], "prompt_length": len(rows[0]["input_ids"])}] * (-len(rows) % world_size)
        full: ConcatDataset[Any] = ConcatDataset([rows, blanks])
        return self._loader(full, DistributedSampler(full, world_size, rank, shuffle=False), self.eval_batch_size)

    def _loader(self, rows: Any, sampler: DistributedSampler[Any], batch_size: int) -> DataLoader[Any]:
        pad = self.tokenizer.pad_token_id
        return DataLoader(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=functools.partial(collate, pad_token_id=self.tokenizer.eos_token_id if pad is None else pad),
            pin_memory=torch.cuda.is_available(),
        )
