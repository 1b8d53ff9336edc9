"""What `srd evaluate` does on every rank: read the rows, measure the student on each set of them, write the files."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.assessment.evaluator import Evaluated, Evaluator
from srd_lightning.assessment.protocol import EvaluationProtocol
from srd_lightning.assessment.summary import answer_lines, numbers, row_lines
from srd_lightning.checkpoints.files import read_outline
from srd_lightning.checkpoints.refusals import check_no_code
from srd_lightning.curation.student_source import ReflectingStudent, find_family, find_tokenizer
from srd_lightning.data.row_reader import load_rows
from srd_lightning.data.tokenization import check_first_rows, tokenize
from srd_lightning.datamodule import SRDDataModule
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import MissingDataError, ResumeError, SettingError
from srd_lightning.evaluation.result_files import write_results
from srd_lightning.models.positions import check_positions
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.module import KDLightningModule
from srd_lightning.preflight import run_preflight
from srd_lightning.storage import check_folder

KEPT = "kept"
"""Folder, beside the results, of what was measured batch by batch."""


def evaluate_student(
    module: KDLightningModule,
    data: SRDDataModule,
    trainer: Trainer,
    sources: Mapping[str, Any],
    protocol: EvaluationProtocol,
    folder: Path,
    checkpoint: Path | None,
) -> dict[str, dict[str, Any]]:
    """Measure the student of a module on sets of rows.

    Args:
        module: Whose student is measured, beside its teacher if it has one.
        data: Says how rows become prompts, and how large batches are.
        trainer: Gives the device and, under FSDP2, shards the student.
        sources: Of the rows, by set; see `load_rows`.
        protocol: How it answers.
        folder: Of the results: of one set its files, of several a folder for each.
        checkpoint: From which the student's weights are taken.

    Returns:
        What ``evaluation.json`` holds, by set, the same on all ranks.

    Raises:
        SRDError: Models, rows or settings do not go together, or a file cannot be read or written.
    """
    check_folder(folder, "path")
    run_preflight(trainer, module)
    models, reader, reflector = module.models_by_name(), data.reader, data.curator.reflector
    weights = {**{name: _name(model) for name, model in models.items()}, "checkpoint": checkpoint and str(checkpoint)}
    tokens = reader.max_prompt_length + protocol.decoding.max_new_tokens
    asked = {"data.max_length": reader.max_length, "data.max_prompt_length with protocol.decoding": tokens}
    check_positions(models, asked)
    if checkpoint is not None:
        take_weights(module, checkpoint)
    tokenizer, device = find_tokenizer(data.rows_tokenizer(), None, module), trainer.strategy.root_device
    rows = {
        name: _tokenised(data, module, load_rows(source, name), name, tokenizer) for name, source in sources.items()
    }
    student = ReflectingStudent(None, module, tokenizer, reader.template, device, trainer)
    model = student.untrained().to(device)
    budget = (reflector.tokens_per_batch, reflector.threads)
    evaluator = Evaluator(protocol, *budget, models["teacher"], module.shared_vocabulary)
    lengths = {"max_length": reader.max_length, "max_prompt_length": reader.max_prompt_length}
    results = {}
    for name, of_set in rows.items():
        found = evaluator.evaluate(of_set, model, student, folder / KEPT, name)
        settings = {"set": name, **weights, **lengths, "protocol": asdict(protocol)}
        own = folder if len(rows) == 1 else folder / name
        results[name] = Ranks().rank0_result(functools.partial(_write, found, settings, own))
    rank_zero_info(f"the evaluation is in {folder}")
    return results


def _write(found: Evaluated, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    of_set = numbers(found, settings)
    write_results(folder, of_set, answer_lines(found), row_lines(found))
    return of_set


def check_sets(sets: Mapping[str, Any]) -> None:
    """Check the names of sets of rows, which become those of folders.

    Raises:
        SettingError: There is none, or a name cannot be that of a folder.
    """
    if wrong := [name for name in sets if Path(name).name != name or name == KEPT] or ([] if sets else ["nothing"]):
        raise SettingError(f"sets needs rows by name, {{name: file}}, where a name becomes a folder's, but has {wrong}")


def take_weights(module: KDLightningModule, checkpoint: Path) -> None:
    """Load the student's weights from a checkpoint file that a run of the same module has written.

    Raises:
        MissingDataError: There is none.
        ResumeError: It is no file, one of another module, or holds more than tensors and plain values.
    """
    if not checkpoint.exists():
        raise MissingDataError(f"ckpt_path {checkpoint} is not there")
    if checkpoint.is_dir():
        raise ResumeError(
            f"ckpt_path must be a file, but {checkpoint} is a sharded checkpoint; make one file of it: "
            f"python -m srd_lightning.consolidate {checkpoint} FILE"
        )
    check_no_code(checkpoint, "export the student with HuggingFaceExport, and name its folder as model.student")
    module.build_student()
    try:
        module.load_state_dict(read_outline(checkpoint)["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise ResumeError(
            f"ckpt_path {checkpoint} does not hold the weights of this module's student; give the settings of the run "
            "that wrote it"
        ) from error


def _tokenised(
    data: SRDDataModule, module: KDLightningModule, rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    reader, template = data.reader, data.reader.template.bind(tokenizer)
    check_first_rows(rows, template, name)
    lengths = {"max_length": reader.max_length, "max_prompt_length": reader.max_prompt_length}
    tokenised, report = tokenize(rows, tokenizer, template, **lengths, split=name, family=find_family(None, module))
    rank_zero_info(f"{name}: {report}")
    return tokenised


def _name(model: Pretrained | nn.Module | None) -> str | None:
    if model is None:
        return None
    return model.name if isinstance(model, Pretrained) else type(model).__name__
