"""`SRDTrainer`: Lightning's Trainer that can also curate only, cache the teacher, let it write, evaluate, or plan."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from srd_lightning.assessment.protocol import EvaluationProtocol
from srd_lightning.assessment.summary import table
from srd_lightning.checkpoints.refusals import check_no_code
from srd_lightning.command.evaluation import check_sets, evaluate_student
from srd_lightning.curation.responses import ResponseWriter, check_path
from srd_lightning.curation.student_source import find_tokenizer
from srd_lightning.datamodule import SRDDataModule
from srd_lightning.errors import SettingError
from srd_lightning.models.generation import Decoding
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.module import KDLightningModule
from srd_lightning.planning.clock import Calibrate, ClockName, Throughput
from srd_lightning.planning.make import make_plan
from srd_lightning.planning.plan import Plan
from srd_lightning.planning.table import tables


class SRDTrainer(Trainer):
    """Lightning's Trainer that can also curate, and runs no code from checkpoints unless ``weights_only`` is false."""

    def fit(self, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Train; the path of a checkpoint is known from now on, so that what differs from it shows early."""
        if ckpt_path in (None, "", "best", "last", "hpc") or str(ckpt_path).startswith("registry"):
            super().fit(*args, **kwargs, ckpt_path=ckpt_path)  # type: ignore[misc]
            return
        self.ckpt_path = ckpt_path
        try:
            super().fit(*args, **kwargs)
        finally:
            self.ckpt_path = None  # or what comes after would begin with it as well

    def _run(self, model: LightningModule, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        """Do what all methods end in, once it is seen that the checkpoint holds no code."""
        if ckpt_path and weights_only is not False and "://" not in str(ckpt_path):
            check_no_code(Path(ckpt_path))
        return super()._run(model, ckpt_path, weights_only is not False)

    def curate(self, model: LightningModule, datamodule: SRDDataModule, export: str | None = None) -> None:
        """Reflect and rank only: let the student answer every prompt, save the scores, show what came of it.

        Args:
            model: Whose student reflects, if the data module has none of its own.
            datamodule: Has the rows.
            export: A .jsonl or .parquet file for the rows with scores, ranks, stages and answers, in place of what an
                earlier curation has written.
        """
        file = None if export is None else Path(export).expanduser()
        if file is not None:
            datamodule.check_export(file)
        self._on_all_ranks(functools.partial(datamodule.set_up_for, model, self))
        if self.is_global_zero:
            console = Console()
            datamodule.report(console)
            if file is not None:
                datamodule.export(file)
                console.print(f"The rows, with scores, ranks and stages: {file}")

    def cache_teacher(self, model: KDLightningModule, datamodule: SRDDataModule) -> None:
        """Curate, and let the teacher see every row that is kept, so that ``fit`` need not load it."""

        def work() -> None:
            model.check_cache(self)
            model.rollouts_handle.check(model, self, datamodule)
            datamodule.set_up_for(model, self)
            model.cache(datamodule, self)

        self._on_all_ranks(work)

    def generate(
        self,
        model: KDLightningModule,
        datamodule: SRDDataModule,
        path: str,
        split: str = "train",
        writer: Pretrained | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    ) -> None:
        """Let a model write the responses of a split, as a data file to train on; see `ResponseWriter`.

        Args:
            model: Whose teacher writes.
            datamodule: Has the rows and their template.
            path: The file, .jsonl; what an earlier run has written is replaced.
            split: Whose prompts are answered.
            writer: Who writes; by default the teacher.
            decoding: How it writes.
        """
        file = Path(path).expanduser()
        check_path(file)
        source = writer or model.models_by_name()["teacher"]
        if source is None:
            raise SettingError("generate needs somebody who writes, but there is no teacher; name one: --writer.name")

        reader, reflector = datamodule.reader, datamodule.curator.reflector
        of_data = None if isinstance(source, Pretrained) else datamodule.rows_tokenizer()
        writes = ResponseWriter(
            source,
            source.name if isinstance(source, Pretrained) else type(source).__name__,
            find_tokenizer(of_data, source, model),
            reader.template,
            reader.max_prompt_length,
            decoding,
            reflector.tokens_per_batch,
            reflector.threads,
        )
        root = Path(self.default_root_dir)
        self._on_all_ranks(functools.partial(writes.write, reader.rows(split), file, root, self))

    def evaluate(
        self,
        model: KDLightningModule,
        datamodule: SRDDataModule,
        split: str = "test",
        sets: dict[str, Any] | None = None,
        protocol: EvaluationProtocol = EvaluationProtocol(),  # noqa: B008 (frozen)
        path: str | None = None,
        ckpt_path: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Measure the student on held-out rows, greedily and sampling over seeds, beside the teacher.

        Args:
            model: Whose student is measured.
            datamodule: Has the rows and their template.
            split: On whose rows.
            sets: Other rows instead, ``{name: file}``, each measured for itself.
            protocol: How the student answers.
            path: Folder of the results; by default ``evaluation`` in ``default_root_dir``.
            ckpt_path: Checkpoint file with the student's weights; by default they are those of ``model.student``.

        Returns:
            What ``evaluation.json`` holds, by split or set.

        Raises:
            SettingError: This trainer has run something with data before; and as for `evaluate_student`.
        """
        if self.datamodule is not None:  # type: ignore[attr-defined]
            raise SettingError("evaluate needs a trainer that has run nothing before; make a new one for it")
        sources = {split: datamodule.reader.rows(split)} if sets is None else sets
        check_sets(sources)
        folder = Path(self.default_root_dir, "evaluation") if path is None else Path(path).expanduser()
        checkpoint, found = None if ckpt_path is None else Path(ckpt_path), dict[str, dict[str, Any]]()
        arguments = (model, datamodule, self, sources, protocol, folder, checkpoint)
        self._on_all_ranks(lambda: found.update(evaluate_student(*arguments)))
        if self.is_global_zero:
            Console().print(table(found, f"the student, in {folder}"))
        return found

    def plan(
        self,
        model: KDLightningModule,
        datamodule: SRDDataModule,
        calibrate: Calibrate = Calibrate(),  # noqa: B008 (frozen)
        throughput: Throughput | None = None,
        clock: ClockName = "wall",
        json: str | None = None,
    ) -> Plan:
        """Say what ``fit`` with the same settings will do and cost; a few batches are tried, and nothing is kept.

        Args:
            model: That would be trained; a calibration trains it, so use it for nothing else.
            datamodule: Has the rows.
            calibrate: How long may be measured.
            throughput: What a device does in a second, where it is known; then nothing is measured.
            clock: By which is measured: ``wall``, or ``processor``, which a busy machine does not change.
            json: File to write the plan to.

        Returns:
            The plan, on the first rank also shown.

        Raises:
            SettingError: The run is none that can be planned.
        """
        file = None if json is None else Path(json).expanduser()
        made = make_plan(self, model, datamodule, calibrate, throughput, clock, file)
        if self.is_global_zero:
            Console().print(tables(made))
        return made

    def _on_all_ranks(self, work: Callable[[], object]) -> None:
        """Do something on every rank, on its device: as the set-up of a prediction that has no batches."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Total length of")  # there is nothing to predict
            self.predict(_SetUpOnly(work))


setattr(SRDTrainer, "cache-teacher", SRDTrainer.cache_teacher)  # LightningCLI looks for the name of the subcommand


class _SetUpOnly(LightningModule):
    """Does something in its set-up, when ranks and devices are there, and predicts nothing."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self.work = work

    def setup(self, stage: str) -> None:
        self.work()

    def configure_model(self) -> None:
        """Nothing to shard; strategies that shard ask for it."""

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader([])  # type: ignore[arg-type]

    def predict_step(self, *_: Any) -> None: ...
