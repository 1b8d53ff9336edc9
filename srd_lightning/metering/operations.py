"""How many operations a model needs, and how many the machine makes in a second."""

from __future__ import annotations

import functools
from time import perf_counter
from typing import NamedTuple

import torch
from torch import nn

SMALLEST, LARGEST = 256, 8192
"""Rows and columns of the matrices that are multiplied, as far as time allows."""
BUDGET = 0.5
"""Seconds."""
REPEATS, AT_LEAST = 3, 0.02
"""How often each product is made, and for how many seconds."""


class Parameters(NamedTuple):
    r"""How many parameters a token passes, embeddings left out, and what that costs.

    A token that is trained on needs :math:`6 N_\text{trained} + 2 N_\text{frozen} + 2 N_\text{teacher}` operations, the
    last where the teacher is run for it: a product and a sum for each parameter in the forward pass, and twice that in
    the backward pass (Kaplan et al., arXiv 2001.08361, section 2.1). Attention over the tokens before it is not
    counted, nor is what a gradient costs on its way through frozen parameters, nor what is computed again by
    activation checkpointing: it is what the model needs at least, not what was done.

    Args:
        trained: Of the module, those that require a gradient.
        frozen: Of the module, those that do not.
        teacher: Of a teacher that is no part of the module.

    Example:
        >>> Parameters(trained=10, frozen=3, teacher=100).operations(tokens=2, taught=1)
        332
    """

    trained: int
    frozen: int = 0
    teacher: int = 0

    @classmethod
    def of(cls, module: nn.Module, teacher: nn.Module | None = None) -> Parameters:
        """Count them.

        Args:
            module: That is trained. A head that is tied to an embedding is an embedding.
            teacher: That is run beside it; what the module has as well is not counted twice.
        """
        own = _beside_embeddings(module)
        registered = {id(parameter) for parameter in module.parameters()}
        theirs = [] if teacher is None else _beside_embeddings(teacher)
        return cls(
            trained=sum(parameter.numel() for parameter in own if parameter.requires_grad),
            frozen=sum(parameter.numel() for parameter in own if not parameter.requires_grad),
            teacher=sum(parameter.numel() for parameter in theirs if id(parameter) not in registered),
        )

    def operations(self, tokens: int, taught: int) -> int:
        """Return the operations that training on tokens needs.

        Args:
            tokens: That were trained on, without padding.
            taught: How many of them the teacher has seen.
        """
        return (6 * self.trained + 2 * self.frozen) * tokens + 2 * self.teacher * taught


def _beside_embeddings(model: nn.Module) -> list[nn.Parameter]:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(parameter) for table in tables for parameter in table.parameters(recurse=False)}
    return [parameter for parameter in model.parameters() if id(parameter) not in looked_up]


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations per second of the fastest of some products of square matrices, once per process.

    Takes less than a second, and draws no random number of the run. Whatever else the machine does at the time makes
    it smaller.

    Args:
        device: A CPU or a GPU; of others nothing is returned.
        dtype: Of the matrices.
    """
    if device.type not in ("cpu", "cuda") or not dtype.is_floating_point:
        return None
    fastest, size, left = 0.0, SMALLEST, BUDGET
    try:
        while size <= LARGEST and left > 0:
            start = perf_counter()
            seconds = _seconds_of_product(size, device, dtype)
            fastest = max(fastest, 2 * size**3 / seconds)
            size *= 2
            left -= perf_counter() - start
            if 8 * seconds * (REPEATS + 1) > left:  # what the next would take
                break
    except RuntimeError:  # out of memory, or a type of which the device makes no products
        pass
    return fastest or None


@torch.no_grad()
def _seconds_of_product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return what the fastest of some products takes, after one that is not timed."""
    own = torch.Generator(device).manual_seed(0)
    left, right = (torch.rand(size, size, generator=own, device=device).to(dtype) for _ in range(2))
    product = left @ right
    fastest, begun, made = float("inf"), perf_counter(), 0
    while made < REPEATS or perf_counter() - begun < AT_LEAST:
        _wait(device)
        start = perf_counter()
        torch.mm(left, right, out=product)
        _wait(device)
        fastest, made = min(fastest, perf_counter() - start), made + 1
    return fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
