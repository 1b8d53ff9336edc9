"""`SRDDataModule`: rows, reflected on by the student, ranked, and let into training in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from srd_lightning.checkpoints.compatibility import (
    check_same_rows,
    description_of,
    digest_of_order,
    digest_of_rows,
    digest_of_tokens,
    saved_rows,
)
from srd_lightning.criteria.base import Criterion
from srd_lightning.curation.curator import CuratedRows
from srd_lightning.curriculum.arrangement import Arrangement
from srd_lightning.curriculum.curriculum import PAPER_SCHEDULE
from srd_lightning.data.loaders import Loaders, RebuiltEveryEpoch
from srd_lightning.data.rows import ids_of, lengths_of
from srd_lightning.data.templates import ALPACA, ChatTemplate, PromptTemplate
from srd_lightning.errors import SettingError
from srd_lightning.models.generation import Decoding
from srd_lightning.models.pretrained import Pretrained, load_tokenizer
from srd_lightning.preflight import run_preflight
from srd_lightning.protocols import BatchColumns
from srd_lightning.training.arguments import check_sizes
from srd_lightning.training.lr_plan import accumulation_of

OF_TUNERS = (".scale_batch_size_", ".lr_find_")
"""How Lightning (tested with 2.6.6) names the checkpoints that its tuners go back to after trying other batches."""


class SRDDataModule(CuratedRows):
    """Data that the student has reflected on: the hardest rows dropped, the rest entering easy to hard.

    ``setup("fit")`` reads, tokenises unless an earlier run has done so, lets the student answer every prompt unless
    valid scores exist, ranks and stages; ``train_dataloader`` then holds the rows of the current epoch. It works with
    any LightningModule.

    Args:
        data: Training data, or ``{"train": …, "validation": …, "test": …, "predict": …}``; a source is a jsonl, json,
            csv, tsv or parquet file, a list of files, a folder of files or of ``save_to_disk``, a hub id, a
            `datasets.Dataset`, a pandas DataFrame, or any iterable of rows. Rows have ``instruction`` (and ``input``)
            and ``output``, or ``prompt`` and ``response``, or ``messages``, …: docs/data.md has all forms.
        tokenizer: Name, folder or object; by default the student's.
        student: Who reflects; by default the student of the module that is trained.
        template: How a row becomes a prompt: `PromptTemplate` or `ChatTemplate`.
        schedule: ``{first epoch: share of the rows}``, epochs being whole numbers; the last share is what is kept.
            ``{0: 1.0}`` is all rows from the start, without reflection.
        criteria: What makes a row hard; by default the paper's, `RougeL` and `NegativeLogLikelihood`.
        arrangement: How the ranked rows enter; `EasyToHard` by default, the others are controls.
        refresh: First epochs of stages at which the student, as trained so far, reflects again on the rows still to
            come; by default never, as in the paper.
        scores: Folder of the scores, which all processes see; by default one in the trainer's ``default_root_dir``,
            named after what the scores depend on. Or a file of ``id`` and columns that something else made.
        decontaminate: Drop training rows whose prompt stands in another split; without it they are only reported.
        near_duplicates: Similarity in (0, 1] from which prompts of other splits count as the same; by default only
            equal ones do. Needs the ``near-duplicates`` extra.
        batch_size: Rows per process and training step.
        eval_batch_size: Rows per process and batch of evaluation; by default ``batch_size``.
        max_length: Tokens of prompt and response; longer responses are cut, counted and reported.
        max_prompt_length: Tokens of the prompt; rows with longer ones are dropped, counted and reported.
        decoding: How the student answers when it reflects; greedy by default.
        reflection_tokens: Most tokens in a batch of the reflection: prompts, answers and padding.
        reflection_threads: Of a CPU while it reflects. With one, scores are the same on any number of processes.
        ties: How equal scores are ranked; see `reciprocal_rank_fusion`.
        group_by_length: Whether the rows of a training step are of like length, which pads less; the steps come in
            random order, and other rows meet in every epoch. Without, a plain shuffle.
        pad_to_multiple_of: Batches are as long as their longest row, rounded up to a multiple of this, which
            may be more than ``max_length``; 8 or 64 suits tensor cores.
        num_workers: Processes that load batches.
        seed: Of the order within an epoch.

    Raises:
        SettingError: A schedule without epoch 0, lengths that leave no room for a response, or settings that do not go
            together. At set-up also `DataError`, `StorageError` and what the student raises.

    Example:
        >>> rows = [{"instruction": "Add 1 and 1.", "output": "2"}]
        >>> SRDDataModule(rows, tokenizer="gpt2", schedule={8: 0.75, 0: 0.5}).schedule
        {0: 0.5, 8: 0.75}
    """

    def __init__(
        self,
        data: str | dict[str, Any] | list[Any],
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        student: Pretrained | nn.Module | None = None,
        template: PromptTemplate | ChatTemplate = ALPACA,
        schedule: dict[Any, float] = dict(PAPER_SCHEDULE),  # noqa: B006 (never changed)
        criteria: list[Criterion] | None = None,
        arrangement: Arrangement | None = None,
        refresh: list[int] | None = None,
        scores: str | None = None,
        decontaminate: bool = False,
        near_duplicates: float | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        max_prompt_length: int = 256,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
        reflection_tokens: int = 32768,
        reflection_threads: int = 1,
        ties: Literal["average", "order"] = "average",
        group_by_length: bool = True,
        pad_to_multiple_of: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if max_prompt_length >= max_length:
            raise SettingError(
                f"max_prompt_length must be smaller than max_length, or no response fits, but they are "
                f"{max_prompt_length} and {max_length}"
            )
        sizes = {"batch_size": batch_size, "reflection_tokens": reflection_tokens}
        sizes |= {"reflection_threads": reflection_threads, "pad_to_multiple_of": pad_to_multiple_of}
        sizes |= {"max_prompt_length": max_prompt_length, "eval_batch_size": eval_batch_size or batch_size}
        check_sizes(**sizes)
        if num_workers < 0:
            raise SettingError(f"num_workers must be 0 or more, but is {num_workers}")
        super().__init__(
            data=data,
            tokenizer=tokenizer,
            student=student,
            template=template,
            schedule=schedule,
            criteria=criteria,
            arrangement=arrangement,
            refresh=refresh,
            scores=scores,
            decontaminate=decontaminate,
            near_duplicates=near_duplicates,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            decoding=decoding,
            reflection_tokens=reflection_tokens,
            reflection_threads=reflection_threads,
            ties=ties,
        )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.group_by_length = group_by_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_workers = num_workers
        self.seed = seed
        self._every_epoch = RebuiltEveryEpoch()
        self._as_read: Dataset | None = None
        self._digests: dict[str, Any] | None = None
        self._batch_columns: BatchColumns | None = None

    def setup(self, stage: str) -> None:
        """Check what can be known; read and tokenise once; for ``fit`` also reflect, rank and stage."""
        if self.trainer is not None:
            run_preflight(self.trainer)
        self._check_settings(stage)
        saved = saved_rows(self.trainer, self)
        check_same_rows(saved, self._settings())
        if not self.rows:
            self.read_rows(stage)
        if stage == "fit":
            self._as_read = self.rows["train"] if self._as_read is None else self._as_read
            if saved:
                check_same_rows(saved, self._read())
            if self.trainer is not None:
                self._every_epoch.begin(self.trainer)
            if self.curation is None or self._curated_for is not self._module():  # another module, another student
                self.curate()
            check_same_rows(saved, self._ranked())
            assert self.curation is not None
            self.curriculum = self.curation.curriculum
            self.refresher.begin()

    def teardown(self, stage: str) -> None:
        """Let the trainer build its loaders as it did before."""
        if self.trainer is not None:
            self._every_epoch.end(self.trainer)

    def rows_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of the rows, if it is not left to the module."""
        return load_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer

    def use_batch_columns(self, columns: BatchColumns | None) -> None:
        """Let the batches of loaders made from now on carry what these make of their rows."""
        self._batch_columns = columns

    def rows_to_cache(self) -> Dataset:
        """Return the rows to which a teacher is asked in ``fit``: those that are kept, and the validation's."""
        assert self.curriculum is not None, 'setup("fit") comes first'
        train = self.rows["train"]
        if not self.refresher.first_epochs:  # a new order may let in what was dropped
            train = train.select(self.curriculum.order[: self.curriculum.kept].sort().values.numpy())
        return concatenate_datasets([train, self.rows["validation"]]) if "validation" in self.rows else train

    def state_dict(self) -> dict[str, Any]:
        """Return what decides which rows come when, for checkpoints."""
        return {"generations": self.refresher.generations, "rows": self._rows_to_come()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the refreshments of the run that is resumed.

        Raises:
            ResumeError: Its rows, or their order, are not those of this run.
        """
        self.refresher.generations = state_dict["generations"]
        path = self.trainer and self.trainer.state.fn == "fit" and self.trainer.ckpt_path
        if path and not Path(path).name.startswith(OF_TUNERS):
            check_same_rows(state_dict.get("rows", {}), self._rows_to_come())

    def _rows_to_come(self) -> dict[str, Any]:
        """Return all that decides which rows come when; nothing before they are ranked."""
        return {} if self.curation is None else {**self._settings(), **self._read(), **self._ranked()}

    def _settings(self) -> dict[str, Any]:
        """Return what decides which rows come when, as far as it is known before rows are read."""
        accumulation = {0: 1} if self.trainer is None else accumulation_of(self.trainer)
        return {
            "schedule": self.schedule,
            "arrangement": description_of(self.arrangement),
            "refresh": self.refresher.first_epochs,
            "seed": self.seed,
            "decontaminate": self.decontaminate and (self.near_duplicates or True),
            "group_by_length": self.group_by_length,
            "global_batch": self.batch_size * self._place()["num_replicas"],
            "accumulate_grad_batches": accumulation,
        }

    def _read(self) -> dict[str, Any]:
        """Return digests of the training rows as they were read and tokenised, before leaks were dropped."""
        if self._digests is None:
            rows = self._as_read
            assert rows is not None, 'setup("fit") comes first'
            self._digests = {"rows": digest_of_rows(ids_of(rows)), "tokens": digest_of_tokens(rows)}
        return self._digests

    def _ranked(self) -> dict[str, Any]:
        """Return digests of their ranking, and of the order in which they enter before the student reflects again."""
        assert self.curation is not None
        order = self.curation.curriculum.order
        return {"ranking": digest_of_order(self.curation.order), "order": digest_of_order(order)}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the rows of the current epoch, shuffled by seed and epoch."""
        assert self.curriculum is not None, 'setup("fit") comes first'
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        self.refresh_rows(epoch)
        rows = self.rows["train"]
        lengths = lengths_of(rows)[self.curriculum.rows(epoch).numpy()] if self.group_by_length else None
        return self._loaders().train(self.curriculum.subset(rows, epoch), epoch, self.batch_size, lengths)

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
        if split in self.rows:
            return self._loaders().evaluation(self.rows[split], self.eval_batch_size)
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            self._check_splits(self.rows, self.trainer.state.fn.value)
        return []

    def _loaders(self) -> Loaders:
        place = self._place()
        return Loaders(
            self.tokenizer,
            self.num_workers,
            self.seed,
            place["rank"],
            place["num_replicas"],
            self._batch_columns,
            self.pad_to_multiple_of,
        )

    def _place(self) -> dict[str, int]:
        return (self.trainer and self.trainer.distributed_sampler_kwargs) or {"rank": 0, "num_replicas": 1}
