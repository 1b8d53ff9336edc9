"""Gradient clipping under every strategy and precision, also where Lightning refuses it."""

from __future__ import annotations

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
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
        The norm before clipping, if it was needed and no scaler has left infinities in it that it will deal with.
    """
    plugin = module.trainer.precision_plugin
    if not value:
        return None
    scaled = getattr(plugin, "scaler", None) is not None
    root = module.trainer.strategy.model
    if algorithm != "value" and isinstance(root, FullyShardedDataParallel):  # only it knows the norm of all shards
        norm = root.clip_grad_norm_(value)
        return None if scaled else norm
    if scaled:
        module.clip_gradients(optimizer, value, algorithm)
        return None
    if algorithm == "value":
        Precision.clip_gradients(plugin, optimizer, value, GradClipAlgorithmType.VALUE)
        return None
    return torch.nn.utils.clip_grad_norm_(plugin.main_params(optimizer), value)
