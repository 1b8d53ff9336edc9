"""What something was made of, in a few hexadecimal digits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def bytes_digest(parts: Iterable[bytes]) -> str:
    """Return a digest of bytes that are given in parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def digest(made_of: Mapping[str, str]) -> str:
    """Return a short name for what scores were made of."""
    return bytes_digest([repr(sorted(made_of.items())).encode()])


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's weights: about a second per GB. Of one that is sharded all ranks must ask."""
    return bytes_digest(_weights(model))


def _weights(model: nn.Module) -> Iterator[bytes]:
    for name, tensor in sorted(model.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def file_digest(path: Path, salt: str) -> str:
    """Return a digest of the bytes of a file, and of what they belong to: 0.8 s per GB of one core, where measured."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            content.update(block)
    return hashlib.sha256(salt.encode() + content.digest()).hexdigest()


def uniform(*of: object) -> float:
    """Return a number in [0, 1) that follows from some things, and looks as if drawn at random.

    Example:
        >>> uniform(0, 3)
        0.12146621579554195
    """
    number = int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:8], "big")
    return (number >> 11) / 2**53
