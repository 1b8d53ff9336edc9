"""Whether the files of a model are there and whole, as far as that is seen without reading the weights."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from srd_lightning.errors import MissingDataError, ModelError

CONFIG, ADAPTER, INDEX = "config.json", "adapter_config.json", "model.safetensors.index.json"


def check_files(name: str, gguf_file: str | None) -> None:
    """Check the folder of a model; names of a hub are left to the hub.

    Args:
        name: Folder or hub id.
        gguf_file: In which the weights are, if they are in one.

    Raises:
        MissingDataError: There is no such folder, and it cannot be a hub id.
        ModelError: Something is missing in the folder, or a file of weights is damaged.
    """
    folder = Path(name)
    if folder.is_file():
        remedy = f"name its folder, with gguf_file: {folder.name}" if folder.suffix == ".gguf" else "name its folder"
        raise ModelError(f"the model {name} is a file, where a folder or a hub id is expected; {remedy}")
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name.strip():
            raise MissingDataError(
                f"there is no folder {name!r} to load a model from (seen from {Path.cwd()}); name one that an "
                "export has written, or a model on the Hugging Face hub"
            )
        return
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise MissingDataError(f"the folder {name} has no gguf_file {gguf_file!r}{_instead(folder, '.gguf')}")
    elif (folder / CONFIG).is_file():
        _check_weights(folder)
    elif not (folder / ADAPTER).is_file():
        raise ModelError(
            f"the folder {name} has no {CONFIG}, so it holds no model of transformers{_within(folder)}; a folder that "
            "HuggingFaceExport or save_pretrained has written has one"
        )


def model_of_adapter(name: str) -> str | None:
    """Return the name of the model that the adapter in a folder belongs to, if that is all that there is in it."""
    folder = Path(name)
    if not (folder / ADAPTER).is_file() or (folder / CONFIG).is_file():
        return None
    try:
        base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ADAPTER} is damaged ({type(error).__name__}: {error}); copy it again") from error
    if not isinstance(base, str):
        raise ModelError(f"{folder / ADAPTER} names no base_model_name_or_path; write there which model it belongs to")
    return base


def _instead(folder: Path, suffix: str) -> str:
    found = sorted(path.name for path in folder.glob(f"*{suffix}"))
    return f", but {', '.join(found[:5])}; name one of these" if found else "; copy it there, or name another folder"


def _within(folder: Path) -> str:
    found = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))
    return f" (perhaps {found[0]} is meant)" if found else ""


def _check_weights(folder: Path) -> None:
    shards = _shards(folder)
    if not shards and not any(folder.glob("*.bin")):
        raise ModelError(f"the folder {folder} has a {CONFIG}, but no weights (*.safetensors); copy them there")
    for shard in shards:
        if not shard.is_file():
            raise ModelError(f"{folder / INDEX} names {shard.name}, which is not there; copy all files of the model")
        try:
            with safe_open(shard, framework="pt"):  # reads the header, and compares it with the length
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{shard} is damaged or was cut off ({error}); copy it again") from error


def _shards(folder: Path) -> list[Path]:
    """Return the files that transformers would read."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        return []
    try:
        return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error}); copy it again") from error
