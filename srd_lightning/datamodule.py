"""`SRDDataModule`: rows, reflected on by the student, ranked, and let into training in stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from srd_lightning.checkpoints.refusals import (
    check_rows,
    description_of,
    outline_to_resume,
)
from srd_lightning.checkpoints.resume_state import ResumeState
from srd_lightning.criteria.base import Criterion
from srd_lightning.curation.curated_rows import check_path, curated_rows, write
from srd_lightning.curation.curator import Curator, StagedRows
from srd_lightning.curation.result import CurationResult
from srd_lightning.curation.student_source import ReflectingStudent, find_family, find_tokenizer
from srd_lightning.curriculum.curriculum import PAPER_SCHEDULE, Curriculum, never_reached, paper_schedule
from srd_lightning.curriculum.ranking import Arrangement, digest_of_order
from srd_lightning.data.batches import padding_of
from srd_lightning.data.loaders import Collate, Loaders, RebuiltEveryEpoch
from srd_lightning.data.row_reader import ReadRows, RowReader, check_splits
from srd_lightning.data.samplers import LengthGrouped, check_sampler, plain_shuffle
from srd_lightning.data.templates import ALPACA, ChatTemplate, PromptTemplate
from srd_lightning.data.tokenization import Report, ids_of
from srd_lightning.errors import SettingError
from srd_lightning.models.generation import Decoding
from srd_lightning.models.positions import check_positions
from srd_lightning.models.pretrained import ModelName, Pretrained, load_tokenizer, named
from srd_lightning.preflight import check_no_twin, run_preflight, warn_of_twin
from srd_lightning.protocols import Around, BatchColumns, HasStudent, IsReplayed, unwatched
from srd_lightning.training.arguments import check_sizes
from srd_lightning.training.lr_plan import accumulation_of


class SRDDataModule(LightningDataModule):
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
        student: Who reflects, or its name; by default the student of the module that is trained.
        template: How a row becomes a prompt: `PromptTemplate` or `ChatTemplate`.
        schedule: ``{first epoch: share of the rows}``, epochs being whole numbers; the last share is what is kept. By
            default the paper's 25, 50 and 75 %, each for a third of the trainer's ``max_epochs``: ``{0: 0.25, 8: 0.5,
            16: 0.75}`` in 24. ``{0: 1.0}`` is all rows from the start, without reflection.
        criteria: What makes a row hard; by default the paper's, `RougeL` and `NegativeLogLikelihood`.
        arrangement: How the ranked rows enter; `EasyToHard` by default, the others are controls.
        refresh: First epochs of stages at which the student, as trained so far, reflects again on the rows still to
            come; by default never, as in the paper.
        scores: Folder of the scores, which all ranks see; by default one in the trainer's ``default_root_dir``,
            named after what the scores depend on. Or a file of ``id`` and columns that something else made.
        decontaminate: Drop training rows whose prompt stands in another split; without it they are only reported.
        batch_size: Rows per rank and training step.
        eval_batch_size: Rows per rank and batch of evaluation; by default ``batch_size``.
        max_length: Tokens of prompt and response; longer responses are cut, counted and reported.
        max_prompt_length: Tokens of the prompt; rows with longer ones are dropped, counted and reported.
        decoding: How the student answers when it reflects; greedy by default.
        reflection_tokens: Most tokens in a batch of the reflection: prompts, answers and padding.
        reflection_threads: Of a CPU while it reflects. With one, scores are the same on any number of ranks.
        ties: How equal scores are ranked; see `reciprocal_rank_fusion`.
        group_by_length: Whether the rows of a training step are of similar length, which pads less; the steps come in
            random order, and other rows meet in every epoch (length bucketing). Without, a plain shuffle.
        sampler: Another grouping of the rows into batches: a `MakeSampler`, such as a subclass of `LengthGrouped`; by
            default that of ``group_by_length``. docs/training.md has an example.
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
        student: Pretrained | nn.Module | ModelName | None = None,
        template: PromptTemplate | ChatTemplate = ALPACA,
        schedule: dict[Any, float] | None = None,
        criteria: list[Criterion] | None = None,
        arrangement: Arrangement | None = None,
        refresh: list[int] | None = None,
        scores: str | None = None,
        decontaminate: bool = False,
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
        sampler: Callable[[Any, Any, int, int, int, int], DistributedSampler[Any]] | None = None,
    ) -> None:
        super().__init__()
        warn_of_twin(self)
        sizes = {"batch_size": batch_size, "reflection_tokens": reflection_tokens}
        sizes |= {"reflection_threads": reflection_threads, "pad_to_multiple_of": pad_to_multiple_of}
        sizes |= {"max_prompt_length": max_prompt_length, "eval_batch_size": eval_batch_size or batch_size}
        check_sizes(**sizes)
        if num_workers < 0:
            raise SettingError(f"num_workers must be 0 or more, but is {num_workers}")
        if sampler is not None:
            check_sampler(sampler)
        self.reader = RowReader(data, template, max_length, max_prompt_length)
        self._curator_of = functools.partial(
            Curator,
            criteria=criteria,
            arrangement=arrangement,
            scores=scores,
            ties=ties,
            decoding=decoding,
            reflection_tokens=reflection_tokens,
            reflection_threads=reflection_threads,
        )
        self._refresh = refresh or ()
        self._follows_epochs = schedule is None
        if schedule is None:  # until the epochs are known, and with them what may be refreshed
            self.curator = self._curator_of(PAPER_SCHEDULE)
        else:
            self.curator = self._curator_of(schedule, refresh=self._refresh)
        self.loaders = Loaders(num_workers, seed, sampler or (LengthGrouped if group_by_length else plain_shuffle))
        self.student = None if student is None else named(student)
        self.decontaminate = decontaminate
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.group_by_length = group_by_length
        self.sampler = sampler
        self.pad_to_multiple_of = pad_to_multiple_of
        self._tokenizer = tokenizer
        self._read_rows: ReadRows | None = None
        self.staged: StagedRows | None = None
        """The training rows of the run that `setup` was last called for."""
        self._batch_columns: BatchColumns | None = None
        self._is_replayed: IsReplayed | None = None
        self._every_epoch = RebuiltEveryEpoch()
        self._around: Around = unwatched

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a trainer of the other package, where it comes to know this data module."""
        if name == "trainer":
            check_no_twin(value, self)
        super().__setattr__(name, value)

    @property
    def schedule(self) -> dict[int, float]:
        """Share of the rows by first epoch; where none was given, that of the run that `setup` was last called for."""
        return self.curator.schedule

    @property
    def scores(self) -> Path | None:
        """Where scores are kept or read, if it was given."""
        return self.curator.scores

    @property
    def decoding(self) -> Decoding:
        """How the student answers when it reflects."""
        return self.curator.reflector.decoding

    @property
    def data(self) -> Any:
        """What the rows are read from."""
        return self.reader.data

    @property
    def tokenizer(self) -> Any:
        """That of the rows; before they are read, what was given, if anything."""
        return self._tokenizer if self._read_rows is None else self._read_rows.tokenizer

    @property
    def rows(self) -> dict[str, Dataset]:
        """Tokenised rows by split; none before they are read."""
        return {} if self._read_rows is None else self._read_rows.splits

    @property
    def reports(self) -> dict[str, Report]:
        """What happened to the rows, by split."""
        return {} if self._read_rows is None else self._read_rows.reports

    @property
    def curation(self) -> CurationResult | None:
        """What came of the curation, after ``setup("fit")``."""
        return None if self.staged is None else self.staged.result

    @property
    def curriculum(self) -> Curriculum | None:
        """Which rows come when, as it is now, after ``setup("fit")``."""
        return None if self.staged is None else self.staged.curriculum

    @property
    def refresh_seconds(self) -> float:
        """Time that the student has reflected again in this run."""
        return 0.0 if self.staged is None else self.staged.seconds

    def setup(self, stage: str) -> None:
        """Check what can be known; read and tokenise once; for ``fit`` also reflect, rank and stage."""
        self._batch_columns = self._is_replayed = None  # of a run that failed
        self.set_up_for(self.trainer and self.trainer.lightning_module, self.trainer, stage)
        if stage == "fit" and self.trainer is not None:
            self._every_epoch.begin(self.trainer)
            ResumeState.attach_to(self.trainer)

    def set_up_for(self, module: Any, trainer: Trainer | None, stage: str = "fit") -> None:
        """Do what `setup` does, for a module that need not be the one that the trainer runs.

        Args:
            module: Whose student reflects, if this data module was given none.
            trainer: Of the run; without, the rank is the only one and the folder the current one.
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        refuse_others = functools.partial(check_rows, outline_to_resume(trainer), self)
        root = self.read_for(module, trainer, stage)
        if stage == "fit":
            self._stage_rows(self.reflecting(module, trainer), root, refuse_others)

    def read_for(self, module: Any, trainer: Trainer | None, stage: str = "fit") -> Path:
        """Do what comes before the curation: check what can be known, read and tokenise once.

        Args:
            module: As for `set_up_for`.
            trainer: As for `set_up_for`.
            stage: As for `set_up_for`.

        Returns:
            The folder of the run.
        """
        root = Path.cwd()
        if trainer is not None:
            root = Path(trainer.default_root_dir)
            run_preflight(trainer, module)
        if self._follows_epochs:
            self.curator = self._curator_of(
                paper_schedule(None if trainer is None else trainer.max_epochs), refresh=self._refresh
            )
        self._check_settings(stage, module, trainer, root)
        check_rows(outline_to_resume(trainer), self, self._settings)
        if self._read_rows is None or self._made_for_another(module):
            self.read_rows(stage, module)
        if stage == "fit":
            check_splits(self.rows, "fit")
        return root

    def reflecting(self, module: Any, trainer: Trainer | None) -> ReflectingStudent:
        """Return who reflects; arguments are those of `set_up_for`."""
        device = None if trainer is None else trainer.strategy.root_device
        return ReflectingStudent(self.student, module, self.tokenizer, self.reader.template, device, trainer)

    def find_leaks(self) -> None:
        """Report training rows that stand twice or in another split; leave the latter out under ``decontaminate``."""
        assert self._read_rows is not None, "the rows are read first"
        self._read_rows.find_leaks(drop=self.decontaminate)

    def _stage_rows(self, student: ReflectingStudent, root: Path, refuse_others: Callable[[Any], None]) -> None:
        """Curate, unless that was done for the same module and root, and begin with the first stage."""
        refuse_others(self._digests_of_rows)
        last = self.staged
        if last is not None and last.student.module is student.module and last.root == root:
            result = last.result
            if result.curriculum.schedule != self.curator.schedule:  # other epochs
                result = replace(result, curriculum=self.curator.staged(result.order))
        else:  # another student, or another run
            self.find_leaks()
            with self._around("curation"):
                result = self.curator.curate(self.rows["train"], student, root, self.reports["train"].dropped)
        self.staged = StagedRows(self.curator, self.rows["train"], student, root, result)
        refuse_others(self._digests_of_order)

    def _made_for_another(self, module: Any) -> bool:
        """Return whether the rows were tokenised for a module with another tokenizer, or of another family."""
        of_module = self._tokenizer is None and not isinstance(self.student, Pretrained)
        if of_module and find_tokenizer(None, None, module) is not self.tokenizer:
            return True
        return self._read_rows is not None and find_family(self.student, module) != self._read_rows.family

    def _check_settings(self, stage: str, module: Any, trainer: Trainer | None, root: Path) -> None:
        """Check what can be known before rows are read."""
        if not self.rows:  # later runs may bring loaders of their own
            self.reader.check(stage)
        models = dict(module.models_by_name()) if isinstance(module, HasStudent) else {}
        if self.student is not None:
            models["student"] = self.student
        check_positions(models, {"max_length": self.reader.max_length})
        if stage != "fit":
            return
        if trainer is not None and (late := never_reached(self.schedule, trainer.max_epochs)):
            rank_zero_warn(
                f"schedule has a stage from epoch {late[0]} on, but the run ends with trainer.max_epochs "
                f"{trainer.max_epochs}, so its rows are never trained on; raise max_epochs, or leave the stage out"
            )
        if self.curator.reflects:
            tokens = self.reader.max_prompt_length + self.decoding.max_new_tokens
            asked = {"max_prompt_length with decoding.max_new_tokens": tokens}
            check_positions({"student": models.get("student")}, asked)
        self.curator.check(root)

    def read_rows(self, stage: str, module: Any = None) -> None:
        """Read and tokenise all splits, once it is seen that a stage can do with them.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            module: Whose tokenizer it is, if this data module was given none.
        """
        tokenizer = find_tokenizer(self._tokenizer, self.student, module)
        self._read_rows = self.reader.read(tokenizer, stage, find_family(self.student, module))
        self.staged = None

    def report(self, console: Console) -> None:
        """Show what came of the curation, and write it, with plots, into the folder of the scores."""
        from srd_lightning.curation.report import extremes, present  # matplotlib, which training does not need

        result, rows = self._staged.result, self._staged.rows
        if result.scores is None:
            console.print(f"all {result.rows:,} rows are trained on from the start; nothing was ranked")
            return
        answers = result.scores.answers(ids_of(rows.select(np.concatenate(extremes(result)))))
        present(result, rows, answers, result.scores.folder, console)

    def check_export(self, path: Path) -> None:
        """Refuse a file to which `export` could not write, and rows that can be read only once; before they are read.

        Raises:
            SettingError: Its name has another ending than .jsonl and .parquet, or the rows are an iterator.
            StorageError: It cannot be written, or holds something else.
        """
        check_path(path)
        source = self.data.get("train") if isinstance(self.data, Mapping) else self.data
        if isinstance(source, Iterator):
            raise SettingError(
                f"export needs rows that can be read again, but `data` is a {type(source).__name__}; give a list"
            )

    def export(self, path: Path) -> None:
        """Write the rows that were ranked, with all that the curation has found, as a data set; see `curated_rows`.

        Args:
            path: A .jsonl or .parquet file; what an earlier curation has written is replaced.
        """
        result, rows = self._staged.result, self._staged.rows
        answers = {} if result.scores is None else result.scores.answers(ids_of(rows))
        write(curated_rows(result, rows, self.reader.rows("train"), answers), path)

    def teardown(self, stage: str) -> None:
        """Let the trainer build its loaders as it did before, and batches be without a teacher's columns."""
        self._batch_columns = None
        if self.trainer is not None:
            self._every_epoch.end(self.trainer)

    def watch(self, around: Around) -> None:
        """Tell when the student reflects, and reflects again; see `TellsParts`."""
        self._around = around

    def rows_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer of the rows, if it is not left to the module."""
        return load_tokenizer(self._tokenizer) if isinstance(self._tokenizer, str) else self._tokenizer

    def use_batch_columns(self, columns: BatchColumns | None) -> None:
        """Let the batches of loaders made from now on carry what these make of their rows."""
        self._batch_columns = columns

    def longest_prompt(self) -> int:
        """Return ``max_prompt_length``."""
        return self.reader.max_prompt_length

    def rows_per_batch(self) -> int:
        """Return ``batch_size``."""
        return self.batch_size

    def padded_to(self) -> int:
        """Return ``pad_to_multiple_of``."""
        return self.pad_to_multiple_of

    def check_replay(self, cached: bool) -> None:
        """Refuse where there will be no answers, see `Curator.check_replay`."""
        self.curator.check_replay(cached)

    def replay(self, steps: IsReplayed | None) -> None:
        """Let rows of epochs to come have the student's answer in place of the response."""
        self._is_replayed = steps
        if steps is not None:
            self._staged.replay(self.reader.max_length)

    def rows_to_cache(self) -> Dataset:
        """Return the rows to which a teacher is asked in ``fit``: those that are kept, and the validation's."""
        train = self._staged.ever_trained_on()
        return concatenate_datasets([train, self.rows["validation"]]) if "validation" in self.rows else train

    @property
    def _staged(self) -> StagedRows:
        if self.staged is None:
            raise SettingError(
                f'the rows of {type(self).__name__} are not there yet: call setup("fit"), or, in a setup of your own, '
                "super().setup(stage)"
            )
        return self.staged

    def resume_state(self) -> dict[str, Any]:
        """Return the refreshes, and all that decides which rows come when; nothing before they are staged."""
        if self.staged is None:
            return {"generations": {}, "rows": {}}
        replay = {"replay": self._is_replayed and description_of(self._is_replayed)}
        rows = {**self._settings(), **self._digests_of_rows(), **self._digests_of_order(), **replay}
        return {"generations": dict(self.staged.generations), "rows": rows}

    def go_on_with(self, refreshments: Mapping[int, str]) -> None:
        """Go on with the refreshes of the run that is resumed."""
        if self.staged is not None:
            self.staged.resume(refreshments)

    def _settings(self) -> dict[str, Any]:
        """Return what decides which rows come when, as far as it is known before rows are read."""
        sampler: Any = self.sampler
        accumulation = {0: 1} if self.trainer is None else accumulation_of(self.trainer)
        return {
            "schedule": self.schedule,
            "arrangement": description_of(self.curator.arrangement),
            "refresh": self.curator.refresh,
            "seed": self.loaders.seed,
            "decontaminate": self.decontaminate,
            "group_by_length": self.group_by_length,
            "sampler": sampler and getattr(sampler, "__qualname__", description_of(sampler)),
            "global_batch": self.batch_size * self.ranks["num_replicas"],
            "accumulate_grad_batches": accumulation,
        }

    def _digests_of_rows(self) -> dict[str, Any]:
        """Return digests of the training rows as they were read and tokenised, before leaks were dropped."""
        assert self._read_rows is not None
        return {"rows": self._read_rows.digest_of_rows, "tokens": self._read_rows.digest_of_tokens}

    def _digests_of_order(self) -> dict[str, Any]:
        """Return digests of their ranking, and of the order in which they enter before the student reflects again."""
        result = self._staged.result
        return {"ranking": digest_of_order(result.order), "order": digest_of_order(result.curriculum.order)}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the rows of the current epoch, shuffled by seed and epoch, after the refreshes that are due."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        with self._around("refresh"):
            self._staged.refresh(epoch)
        pool: Any
        pool, lengths = self._staged.of_epoch(epoch)
        if self._is_replayed is not None and self._staged.answered is not None:
            batches, ranks = functools.partial(self._is_replayed, epoch), self.ranks["num_replicas"]
            replaced = self.loaders.only_in(batches, pool, lengths, epoch, self.batch_size, ranks)
            pool = self._staged.answered.in_place(pool, replaced)
        return self.loaders.train(pool, lengths, epoch, self.batch_size, self.ranks, self.collate, self._on_gpu)

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
            rows = self.rows[split]
            return self.loaders.evaluation(rows, self.eval_batch_size, self.ranks, self.collate, self._on_gpu)
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            check_splits(self.rows, self.trainer.state.fn.value)
        return []

    @property
    def collate(self) -> Collate:
        """What makes batches of rows, once these are read."""
        assert self._read_rows is not None
        pad = padding_of(self.tokenizer)
        return Collate(pad, self.pad_to_multiple_of, self._batch_columns, self._read_rows.family)

    @property
    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    @property
    def ranks(self) -> dict[str, int]:
        """Of this process: ``rank``, and ``num_replicas`` that see different rows."""
        return (self.trainer and self.trainer.distributed_sampler_kwargs) or {"rank": 0, "num_replicas": 1}
