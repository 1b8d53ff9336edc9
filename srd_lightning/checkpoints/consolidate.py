"""Makes one ordinary checkpoint file of a sharded one: ``python -m srd_lightning.consolidate SHARDED FILE``."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from srd_lightning.storage import put_in_place


def consolidate(sharded: Path, file: Path) -> None:
    """Write a checkpoint file that any number of ranks resume from, and that ``load_from_checkpoint`` takes.

    Args:
        sharded: Folder that `FSDP2`, or another ``ModelParallelStrategy``, has written.
        file: To write. It is there when it is complete.

    Raises:
        FileNotFoundError: The folder is none of these.
        FileExistsError: There is something at the place of the file.
    """
    if missing := [name for name in (".metadata", "meta.pt") if not (sharded / name).is_file()]:
        raise FileNotFoundError(
            f"{sharded} is no sharded checkpoint: it has no {' and no '.join(missing)}; give the folder *.ckpt that "
            "a run with FSDP2 has written"
        )
    if file.exists():
        raise FileExistsError(f"{file} is there already; delete it, or choose another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    raw, temporary = (file.with_name(f".{file.name}.{name}") for name in ("raw", "partial"))
    try:
        dcp_to_torch_save(sharded, raw)
        shards = torch.load(raw, map_location="cpu", mmap=True, weights_only=True)
        rest = torch.load(sharded / "meta.pt", map_location="cpu", weights_only=True)
        torch.save(_merge(shards, rest, sharded), temporary)
        put_in_place(temporary, file)
    finally:
        raw.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)


def _merge(shards: dict[str, Any], rest: dict[str, Any], sharded: Path) -> dict[str, Any]:
    if "state_dict" not in shards:
        raise ValueError(
            f"{sharded} was not written by a ModelParallelStrategy: it holds {', '.join(sorted(shards))}, and no "
            "state_dict; of FSDPStrategy, lightning.pytorch.utilities.consolidate_checkpoint makes a file"
        )
    optimizers = [shards[f"optimizer_{number}"] for number in range(len(shards) - 1)]
    return {**rest, "state_dict": shards["state_dict"], "optimizer_states": [by_number(state) for state in optimizers]}


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer with numbers for the names of parameters, as PyTorch's optimizers have it.

    Args:
        state: ``{"state": {name: …}, "param_groups": [{"params": [name, …], …}]}``

    Example:
        >>> by_number({"state": {"b": {"step": 3}}, "param_groups": [{"params": ["a"]}, {"params": ["b"]}]})
        {'state': {1: {'step': 3}}, 'param_groups': [{'params': [0]}, {'params': [1]}]}
    """
    groups = state["param_groups"]
    numbers = {name: number for number, name in enumerate(chain.from_iterable(group["params"] for group in groups))}
    return {
        "state": {numbers[name]: of_parameter for name, of_parameter in state["state"].items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: By default those of the process.
    """
    parser = argparse.ArgumentParser("python -m srd_lightning.consolidate", description=__doc__)
    parser.add_argument("sharded", type=Path, help="folder that FSDP2 has written")
    parser.add_argument("file", type=Path, help="checkpoint file to write")
    given = parser.parse_args(arguments)
    try:
        consolidate(given.sharded, given.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
