"""Collect the wheels that a machine with a GPU lacks, where that machine reaches no package index.

    python3 -m pip list --format freeze > have.txt      # there
    python benchmarks/gpu/pack.py --have have.txt       # here: .wheels/part-1, part-2, …

and there, from this folder:

    python3 -m pip install --no-index --no-deps --target /tmp/site .wheels/*/*.whl
    PYTHONPATH=/tmp/site python3 benchmarks/gpu/run.py

Beginning with what this library needs, and ``--also``, each package that is not there, or in no version that is
allowed, is downloaded for ``--python`` on Linux x86-64, in the version of constraints.txt; what it needs comes next.
torch, Triton and CUDA's libraries are taken to be there. Parts hold at most ``--limit`` MiB each, for where little can
be carried at a time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from email.parser import HeaderParser
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
ALSO = ("pytest", "pytest-xdist", "hypothesis", "peft", "liger-kernel", "trl")
COMES_WITH_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12)] + ["manylinux2014_x86_64"]


def installed(lines: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of packages from ``name==version`` or plain names, one a line."""
    found: dict[str, str | None] = {}
    for line in lines:
        name, _, version = line.partition("#")[0].strip().partition("==")
        if name and " " not in name:  # not `name @ path`: such a one is taken along
            found[canonicalize_name(name)] = version or None
    return found


def is_there(wanted: Requirement, have: Mapping[str, str | None]) -> bool:
    """Return whether a requirement is met, a version that is not known being taken for a good one."""
    name = canonicalize_name(wanted.name)
    if COMES_WITH_TORCH.fullmatch(name):
        return True
    return name in have and ((version := have[name]) is None or wanted.specifier.contains(version, prereleases=True))


def applies(wanted: Requirement, python: str, extras: Iterable[str] = ()) -> bool:
    """Return whether a requirement is one on Linux x86-64, for some extras or none."""
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    where |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    marker = wanted.marker
    return marker is None or any(marker.evaluate({**where, "extra": extra}) for extra in ("", *extras))


def needs(wheel: Path, python: str, extras: Iterable[str]) -> Iterator[Requirement]:
    """Yield what a wheel says that it requires."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        texts = HeaderParser().parsestr(files.read(name).decode()).get_all("Requires-Dist") or ()
    yield from (wanted for wanted in map(Requirement, texts) if applies(wanted, python, extras))


def download(wanted: Requirement, folder: Path, python: str) -> Path:
    """Download one wheel, or make it of sources where there is none; return where it is."""
    pip, text = [sys.executable, "-m", "pip"], f"{wanted.name}{wanted.specifier}"
    how = ["--no-deps", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    where = ["--python-version", python, "--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS)]
    with tempfile.TemporaryDirectory(dir=folder) as own:
        there = [*pip, "download", *how, *where, "--only-binary=:all:", "--dest", own, text]
        if subprocess.run(there, capture_output=True, check=False).returncode:
            subprocess.run([*pip, "wheel", *how, "--wheel-dir", own, text], check=True)
        (wheel,) = Path(own).glob("*.whl")
        return wheel.rename(folder / wheel.name)


def collect(first: Iterable[str], have: Mapping[str, str | None], folder: Path, python: str) -> list[Path]:
    """Download what is not there, and what that needs."""
    left = [wanted for wanted in map(Requirement, first) if applies(wanted, python)]
    known, wheels = dict[str, set[str]](), dict[str, Path]()
    while left:
        wanted = left.pop(0)
        name = canonicalize_name(wanted.name)
        extras = wanted.extras - known.get(name, set())
        if is_there(wanted, have) or (name in known and not extras):
            continue
        if name not in known:
            wheels[name] = download(wanted, folder, python)
        known[name] = known.get(name, set()) | extras
        left += needs(wheels[name], python, extras)
    return list(wheels.values())


def into_parts(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return names in parts whose sizes add up to the limit at most, the largest first.

    Raises:
        SystemExit: One alone is larger.
    """
    parts: list[list[str]] = []
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size > limit:
            raise SystemExit(f"{name} has {size / 2**20:.0f} MiB, more than --limit; give a larger one, or --have it")
        room = (part for part in parts if sum(map(sizes.__getitem__, part)) + size <= limit)
        if (part := next(room, None)) is None:
            parts.append(part := [])
        part.append(name)
    return parts


def main() -> None:
    """Collect, divide and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--have", type=Path, help="file with what is installed there; by default only torch is")
    parser.add_argument("--also", nargs="*", default=ALSO, help="packages besides what this library needs")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--limit", type=float, default=56, help="MiB of a part")
    parser.add_argument("--into", type=Path, default=ROOT / ".wheels", help="folder, which must not be there yet")
    options = parser.parse_args()
    have = {} if options.have is None else installed(options.have.read_text().splitlines())
    options.into.mkdir(parents=True)
    wheels = collect([*(requires("srd-lightning") or ()), *options.also], have, options.into, options.python)
    sizes = {wheel.name: wheel.stat().st_size for wheel in wheels}
    for number, part in enumerate(into_parts(sizes, round(options.limit * 2**20)), 1):
        folder = options.into / f"part-{number}"
        folder.mkdir()
        for name in part:
            (options.into / name).rename(folder / name)
        print(f"{folder}: {sum(map(sizes.__getitem__, part)) / 2**20:.1f} MiB,", *sorted(part))


if __name__ == "__main__":
    main()
