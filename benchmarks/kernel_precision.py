"""How far the gradients of the objective are from float64 in half precision: by the kernel and by operations of torch.

    PYTHONPATH=.venv/triton TRITON_INTERPRET=1 python benchmarks/kernel_precision.py --json kernel_precision.json

Hidden states and heads are random numbers of the type that is named; what differs is only the way. The kernel is run on
a CPU by Triton's interpreter, which rounds to bf16 towards zero; a GPU rounds to the nearest, so this is the worse
case. Printed is the norm of the difference over the norm, of the gradients of the hidden states and of the head,
and how far the loss is off.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from loss import LOSSES, make_inputs
from record import record
from torch import Tensor

from srd_lightning import losses
from srd_lightning.losses import chunked
from srd_lightning.losses.chunked import chunked_objective
from srd_lightning.losses.head import Head

SHAPES = ((24, 2000, 64), (12, 5003, 128))
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(inputs: Any, loss: Any) -> Sequence[Tensor]:
    """Return the loss, and the gradients of the hidden states and of the head, in float64."""
    teacher = inputs.teacher_hidden @ inputs.teacher_head.T
    found = chunked_objective(inputs.hidden, Head(inputs.head), inputs.targets, loss, teacher.__getitem__, 0.5, chunk=8)
    gradients = torch.autograd.grad(found.loss, (inputs.hidden, inputs.head))
    return [value.detach().double() for value in (found.loss, *gradients)]


def compare(name: str, kind: str, tokens: int, vocabulary: int, width: int) -> dict[str, Any]:
    """Measure one loss both ways."""
    loss = getattr(losses, name)(temperature=1.5)
    inputs = make_inputs(tokens, vocabulary, width, KINDS[kind])
    exact = run(inputs.first(tokens, torch.float64), loss)
    result: dict[str, Any] = {"loss": name, "dtype": kind, "tokens": tokens, "vocabulary": vocabulary, "width": width}
    for way in ("torch", "kernel"):
        with patch.object(chunked, "has_kernel", lambda device, way=way: way == "kernel"):
            found = run(inputs.first(tokens), loss)
        off = [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]
        result[way] = dict(zip(("loss", "hidden", "head"), off, strict=True))
    return result


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    results = [compare(name, kind, *shape) for kind, shape, name in itertools.product(KINDS, SHAPES, LOSSES)]
    for one in results:
        numbers = [f"{way} " + " ".join(f"{off:.1e}" for off in one[way].values()) for way in ("torch", "kernel")]
        print(one["loss"], one["dtype"], one["vocabulary"], *numbers, sep="  ")
    record({"results": results}, options.json)


if __name__ == "__main__":
    main()
