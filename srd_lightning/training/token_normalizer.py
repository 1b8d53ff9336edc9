"""One optimizer step is the mean over the response tokens of all its batches and all ranks, whoever holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srd_lightning.errors import DataError


class TokenNormalizer:
    """What sums over tokens are divided by.

    Strategies average gradients over processes, and Lightning divides the loss by the number of accumulated batches;
    both would give tokens in batches with few of them a larger weight.

    Args:
        group: Ranks that see different rows; by default all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.processes = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._tokens: _Tokens | None = None
        self._learnt: Tensor | None = None

    def divisor(self, tokens: Tensor, accumulated: int = 1) -> Tensor:
        """Return what to divide the sum of a batch by: mean tokens per rank, of the first batch of the step.

        Args:
            tokens: Response tokens of this rank's batch.
            accumulated: Batches of a step, by which Lightning divides the loss.
        """
        total = self._over_processes(tokens)
        self._learnt = total if self._learnt is None else self._learnt + total
        if self._tokens is None or 1 in (accumulated, self._tokens.accumulated):
            self._tokens = _Tokens(accumulated, first=total.clamp(min=1), last=total, all=torch.zeros_like(total))
        self._tokens.last = total
        self._tokens.all = self._tokens.all + total
        return self._tokens.first / self.processes

    @property
    def tokens_of_batch(self) -> Tensor:
        """Response tokens of the last batch, of all ranks."""
        assert self._tokens is not None, "divisor() comes first"
        return self._tokens.last

    def of_batch(self, values: Tensor) -> Tensor:
        """Return the means over the tokens of the last batch, of all ranks, from this rank's values."""
        assert self._tokens is not None, "divisor() comes first"
        factor = self._tokens.first / self._tokens.last.clamp(min=1)
        return self._over_processes(values) / self.processes * factor

    def correct(self, parameters: Iterable[nn.Parameter]) -> None:
        """Turn gradients, of which each batch has added its share, into those of the mean over all tokens of the step.

        Args:
            parameters: Whose gradients are complete.
        """
        tokens, self._tokens = self._tokens, None
        if tokens is None or tokens.accumulated == 1:
            return
        factor = tokens.accumulated * tokens.first / tokens.all.clamp(min=1)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        if own:
            torch._foreach_mul_(own, factor)

    def check_learnt(self) -> None:
        """Check that some batch had a token to learn.

        Raises:
            DataError: None had: nothing was trained.
        """
        if self._learnt is not None and not bool(self._learnt):
            raise DataError(
                "no batch of this epoch had a token to learn, so nothing was trained: all labels are -100; they must "
                "hold the tokens of the responses"
            )

    def _over_processes(self, values: Tensor) -> Tensor:
        total = values.to(torch.float32, copy=True)
        if self.processes > 1:
            dist.all_reduce(total, group=self.group)
        return total


@dataclass
class _Tokens:
    """Response tokens of all ranks: in the first batch of a step, in the last so far, and in all."""

    accumulated: int
    first: Tensor
    last: Tensor
    all: Tensor
