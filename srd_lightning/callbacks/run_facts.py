"""`run_facts`: what a run has used and measured, as plain values for its model card.

Of paths only the last part is said, since a card may be published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache
from lightning import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from srd_lightning.callbacks.curriculum_check import rows_of_loaders
from srd_lightning.callbacks.hub_target import is_repo
from srd_lightning.callbacks.hyperparameters import HyperparameterScheduler
from srd_lightning.checkpoints.refusals import description_of
from srd_lightning.data.readers import form_of
from srd_lightning.data.templates import PromptTemplate
from srd_lightning.models.family import is_encoder_decoder
from srd_lightning.models.files import CONFIG
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.preflight import callbacks_of

LICENSE = ("license", "license_name", "license_link")
MEASURED = ("val", "test")
"""How names of measures begin that are no training's."""
OF_MODELS = ("dtype", "keep_layers", "lora", "gguf_file")
"""Settings of a `Pretrained` that make another model of it."""
PACKAGES = ("srd-lightning", "torch", "transformers", "lightning")


def run_facts(trainer: Trainer, student: Any, name: str, measures: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `model_card` takes.

    Args:
        trainer: Of a run that has ended.
        student: As it is saved.
        name: Folder or repository from which it will be loaded.
        measures: Of the last validation, as `measures_of` gave them; nothing where there was none.
    """
    module: Any = trainer.lightning_module
    data = getattr(trainer, "datamodule", None)
    models = dict(module.models_by_name()) if hasattr(module, "models_by_name") else {}
    base = _model(models.get("student") or module.student)
    facts = {
        "name": name,
        "student": base,
        "license": _license(base),
        "adapters": hasattr(student, "get_base_model"),
        "encoder_decoder": is_encoder_decoder(student),
        "training": _training(trainer, module),
        "decoding": _decodings(module, data),
        "measures": _with_the_end(measures, trainer),
    }
    if models.get("teacher") is not None:
        facts["teacher"] = _model(models["teacher"])
    return facts | _of_data(data)


def _model(model: Any) -> dict[str, Any]:
    if isinstance(model, Pretrained):
        name, revision = model.name, model.revision
        settings = {field: getattr(model, field) for field in OF_MODELS if getattr(model, field) is not None}
        found = _commit(name, revision) or revision
        on_hub = not Path(name).is_dir()
    else:
        config = getattr(model, "config", None)
        name, settings = getattr(config, "_name_or_path", "") or type(model).__name__, {}
        found = getattr(config, "_commit_hash", None)
        on_hub = found is not None
    return {
        "name": name if on_hub and is_repo(name) else Path(name).name,
        "revision": found,
        "on_hub": on_hub and is_repo(name),
        "settings": settings,
        "folder": None if on_hub else name,
    }


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model of the hub that was fetched."""
    fetched = None if Path(name).is_dir() else try_to_load_from_cache(name, CONFIG, revision=revision)
    return Path(fetched).parent.name if isinstance(fetched, str) else None


def _license(base: Mapping[str, Any]) -> dict[str, str]:
    """Return what the card of the base model says of its license; nothing where it says nothing."""
    with suppress(Exception):  # there may be no card, none that can be read, and no network
        card = Path(base["folder"] or "", "README.md")
        if base["on_hub"]:
            card = Path(hf_hub_download(base["name"], "README.md", revision=base["revision"]))
        said = ModelCard.load(card).data.to_dict()
        return {field: said[field] for field in LICENSE if isinstance(said.get(field), str)}
    return {}


def _training(trainer: Trainer, module: Any) -> dict[str, Any]:
    rollouts = getattr(getattr(module, "rollouts_handle", None), "rollouts", None)
    cache = getattr(getattr(module, "teacher_handle", None), "cache", None)
    schedulers = [one for one in callbacks_of(trainer) if isinstance(one, HyperparameterScheduler)]
    batch = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    found = {
        "loss": _described(getattr(module, "loss", None)),
        "share of the distillation loss (kd_weight) at the end": getattr(module, "kd_weight", None),
        **{
            f"{name} by first epoch": schedule
            for scheduler in schedulers
            for name, schedule in scheduler.schedules.items()
        },
        "auxiliary losses": ", ".join(map(str, map(_described, getattr(module, "auxiliary", None) or ()))) or None,
        "rollouts": _described(rollouts),
        "teacher's cache": None if cache is None else cache.format,
        "optimizer": ", ".join(map(_optimizer, trainer.optimizers)) or None,
        "learning rate schedule": ", ".join(type(one.scheduler).__name__ for one in trainer.lr_scheduler_configs)
        or None,
        "epochs": trainer.current_epoch,
        "optimizer steps": trainer.global_step,
        "rows per step": batch * trainer.world_size * trainer.accumulate_grad_batches
        if isinstance(batch, int)
        else None,
        "gradient clipping": trainer.gradient_clip_val,
        "precision": trainer.precision,
        "devices": f"{trainer.world_size} ({type(trainer.accelerator).__name__})",
        "versions": ", ".join(f"{package} {known}" for package, known in _versions()),
    }
    return {name: value for name, value in found.items() if value is not None}


def _described(setting: Any) -> str | None:
    """Return a class and its settings; of a loss also those of the losses in it."""
    if not isinstance(setting, nn.Module):
        return None if setting is None else repr(setting) if is_dataclass(setting) else description_of(setting)
    own = {name.lstrip("_"): value for name, value in vars(setting).items() if name not in vars(nn.Module())}
    plain = {name: repr(value) for name, value in own.items() if isinstance(value, (bool, int, float, str))}
    inner = {name: _described(module) for name, module in setting.named_children()}
    return f"{type(setting).__name__}({', '.join(f'{name}={value}' for name, value in {**plain, **inner}.items())})"


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with suppress(Exception):
            yield package, version(package)


def _optimizer(optimizer: Any) -> str:
    settings = {name: optimizer.defaults.get(name) for name in ("lr", "weight_decay", "betas", "momentum")}
    shown = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    return f"{type(optimizer).__name__}({shown})"


def _decodings(module: Any, data: Any) -> dict[str, Any]:
    curated = data if getattr(getattr(data, "curation", None), "columns", None) else None  # else none were asked for
    found = {"of the answers that were curated": curated, "of answers in test and predict": module}
    decodings = {name: getattr(holder, "decoding", None) for name, holder in found.items()}
    return {name: one for name, one in decodings.items() if is_dataclass(one)}


def measures_of(trainer: Trainer) -> dict[str, Any]:
    """Return what a validation that has just ended has measured (``values`` by name), on how many rows, and when."""
    named = {name: value for name, value in trainer.callback_metrics.items() if name.startswith(MEASURED)}
    values = {name: float(value) for name, value in named.items()}
    return {"values": values, "rows": _validation_rows(trainer), "step": trainer.global_step}


def _with_the_end(measures: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """Add what came after a validation: steps, and an average over weights that it has not seen."""
    averages = [type(one).__name__ for one in callbacks_of(trainer) if isinstance(one, StochasticWeightAveraging)]
    return {**measures, "of_steps": trainer.global_step, "before": averages[0] if averages else None}


def _validation_rows(trainer: Trainer) -> int | None:
    """Return how many rows a validation has seen, which a limit may have cut; nothing where that is not known."""
    loaders, batches = trainer.val_dataloaders, trainer.num_val_batches
    if loaders is None:
        return None
    listed = loaders if isinstance(loaders, Sequence) else [loaders]
    total = 0
    for rows, loader, number in zip(rows_of_loaders(listed), listed, batches, strict=False):
        if rows is None:
            return None
        per_batch = getattr(loader, "batch_size", None)
        total += rows if per_batch is None else min(rows, int(min(number, rows)) * per_batch * trainer.world_size)
    return total


def _of_data(data: Any) -> dict[str, Any]:
    """Return what is known of the rows, and of their curation, if there was one."""
    given = getattr(data, "data", None)
    rows, reader, curation = (getattr(data, name, None) for name in ("rows", "reader", "curation"))
    rows = rows if isinstance(rows, Mapping) else {}
    sources = given if isinstance(given, Mapping) else {} if given is None else dict.fromkeys(rows or ["train"], given)
    names = dict.fromkeys(name for source in sources.values() for name in _names(source))
    facts: dict[str, Any] = {
        "datasets": [name for name in names if _on_hub(name)],
        "data": {
            str(split): {
                "sources": [name if _on_hub(name) else Path(name).name for name in _names(source)],
                "rows": len(rows[split]) if split in rows else None,
            }
            for split, source in sources.items()
        },
        "prompts": _prompts(getattr(reader, "template", None)),
    }
    if curation is not None:
        criteria = ", ".join(map(description_of, data.curator.criteria))
        facts["curriculum"] = {
            "rows": f"{curation.kept} kept of {curation.rows} that were ranked",
            "dropped before, by reason": dict(curation.dropped) or None,
            "share of the rows by first epoch": data.schedule,
            "criteria": criteria if curation.columns else None,
            "arrangement": description_of(data.curator.arrangement),
            "reflected again at epochs": data.curator.refresh or None,
        }
    return facts


def _names(source: Any) -> list[str]:
    """Return the files, folders and names of which a source consists; none of one that is rows."""
    found = [source] if isinstance(source, (str, Path)) else source if isinstance(source, (list, tuple)) else []
    return [str(name) for name in found if isinstance(name, (str, Path))]


def _on_hub(name: str) -> bool:
    return form_of(name) is None and not Path(name).expanduser().exists() and is_repo(name)


def _prompts(template: Any) -> dict[str, str]:
    if isinstance(template, PromptTemplate):
        return {"with an input": template.with_input, "without": template.without_input}
    if template is None:
        return {}
    system = getattr(template, "system", None)
    said = {} if system is None else {"system message": str(system)}
    kind = type(template).__name__
    return {**said, "template": "that of the tokenizer: apply_chat_template" if kind == "ChatTemplate" else kind}
