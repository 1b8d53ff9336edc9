"""Gradient clipping under every strategy and precision, also where Lightning refuses it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer


def clip(
    module: LightningModule, optimizer: Optimizer, value: float | None = None, algorithm: str | None = None
) -> Tensor | None:
    """Clip gradients by their norm, or each by its value.

    Args:
        module: Which is trained.
        optimizer: Of its parameters.
        value: Largest norm or value; nothing is clipped without.
        algorithm: ``norm``, the default, or ``value``.

    Returns:
        The norm before clipping; nothing where a scaler has left infinities in it that it will deal with, where only
        FSDP1 could tell it, and where nothing has a gradient.
    """
    plugin = module.trainer.precision_plugin
    scaled = getattr(plugin, "scaler", None) is not None
    root = module.trainer.strategy.model
    if value and algorithm != "value" and isinstance(root, FullyShardedDataParallel):  # only it knows it of all shards
        norm = root.clip_grad_norm_(value)
        return None if scaled else norm
    if scaled:
        if value:
            module.clip_gradients(optimizer, value, algorithm)
        return None
    if value and algorithm != "value":
        return torch.nn.utils.clip_grad_norm_(plugin.main_params(optimizer), value)
    unclipped = None if isinstance(root, FullyShardedDataParallel) else _norm(plugin.main_params(optimizer))
    if value:
        Precision.clip_gradients(plugin, optimizer, value, GradClipAlgorithmType.VALUE)
    return unclipped


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Return the norm of all gradients: one that is NaN or infinite is seen though nothing is clipped by it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None
