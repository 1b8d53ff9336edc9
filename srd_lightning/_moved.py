"""Modules are also found where they once were: saved settings, checkpoints and code of others still say so.

Under its old name a module is the same one, not a copy. What is new needs no line here.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, cast

PACKAGE = "srd_lightning"
MOVED = {
    "arrangement": "curriculum.ranking",
    "checkpoint": "checkpoints.resume_checkpoint",
    "consolidate": "checkpoints.consolidate",
    "fetch": "quickstart.fetch",
    "checkpoints.compatibility": "checkpoints.refusals",
    "checkpoints.resume": "checkpoints.resume_state",
    "criteria.answers": "criteria.standard",
    "criteria.batch": "criteria.base",
    "criteria.likelihood": "criteria.standard",
    "criteria.teacher": "criteria.standard",
    "curation.fingerprint": "curation.reflection",
    "curation.refresh": "curation.curator",
    "curation.order": "curation.curator",
    "curriculum.arrangement": "curriculum.ranking",
    "data.fields": "data.templates",
    "data.formats": "data.readers",
    "data.rows": "data.tokenization",
    "data.splits": "data.row_reader",
    "evaluation.response_logits": "criteria.base",
    "fingerprint": "curation.reflection",
    "generation": "models.generation",
    "losses.triton_choice": "losses.triton.choice",
    "losses.triton_kernel": "losses.triton.kernel",
    "losses.triton_top_k": "losses.triton.top_k",
    "objective": "losses.chunked",
    "ranking": "curriculum.ranking",
    "reflection": "curation.reflection",
    "rows": "data.tokenization",
    "runtime": "callbacks.runtime",
    "sampling": "data.samplers",
    "store": "curation.score_store",
    "strategy": "distributed.fsdp2",
    "templates": "data.templates",
}
"""Where each is now."""
NOW = {f"{PACKAGE}.{was}": f"{PACKAGE}.{now}" for was, now in MOVED.items()}


class Moved(MetaPathFinder, InspectLoader):
    """Finds them, after all others have looked."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a module is now, if it has moved."""
        if fullname not in NOW:
            return None
        now = _now(fullname)
        return ModuleSpec(fullname, self, origin=now.origin, loader_state=now)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return importlib.import_module(spec.loader_state.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it as it is, but for what Python has just noted in it: its old name."""
        module.__spec__ = cast(ModuleSpec, module.__spec__).loader_state

    def get_code(self, fullname: str) -> CodeType | None:
        """Return its code, for ``python -m``."""
        now = _now(fullname)
        return cast(InspectLoader, now.loader).get_code(now.name)

    def get_source(self, fullname: str) -> str | None:
        """Return its text, for tracebacks."""
        now = _now(fullname)
        return cast(InspectLoader, now.loader).get_source(now.name)


def _now(fullname: str) -> ModuleSpec:
    return cast(ModuleSpec, importlib.util.find_spec(NOW[fullname]))
