"""``srd doctor``: what this machine has, which settings suit it, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub.constants import ENDPOINT
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from srd_lightning.command.subcommands import TOOLS
from srd_lightning.command.tool import ToolParser
from srd_lightning.training.hardware import CPUINFO, has_bf16_units

PACKAGE = "srd-lightning"
SHOWN = (PACKAGE, "torch", "lightning", "transformers", "datasets", "jsonargparse")
"""Packages whose versions are shown."""
SECONDS = 5.0
"""How long the hub may take to answer."""
Line = tuple[str, str]


def main(arguments: list[str]) -> None:
    """Show it.

    Args:
        arguments: Of the command line, without the subcommand.
    """
    parser = ToolParser("doctor", TOOLS["doctor"])
    parser.add_argument("--hub", action="store_true", help="also see whether the model hub can be reached")
    given = parser.parse_args(arguments)
    table = Table("", "", show_header=False)
    for title, lines in (
        ("machine", machine()),
        ("software", software()),
        ("extras", extras()),
        ("model hub", [(ENDPOINT, hub() if given.hub else "not asked: srd doctor --hub")]),
        ("settings that suit it", advice()),
    ):
        table.add_row(f"[bold]{title}", "")
        for name, text in lines:
            table.add_row(name, escape(text))
        table.add_section()
    Console().print(table)


def machine() -> Iterator[Line]:
    """Yield what there is to compute with, and to keep things in."""
    units = {True: "yes", False: "no", None: "unknown"}[has_bf16_units(CPUINFO)]
    yield "CPU", f"{_processor()}, {os.cpu_count()} threads; bfloat16 units: {units}"
    pages = {name: os.sysconf(f"SC_{name}") for name in ("PAGE_SIZE", "PHYS_PAGES", "AVPHYS_PAGES")}
    free, whole = (pages[name] * pages["PAGE_SIZE"] for name in ("AVPHYS_PAGES", "PHYS_PAGES"))
    yield "memory", f"{_gib(whole)}, {_gib(free)} free"
    yield "disk of this folder", f"{_gib(shutil.disk_usage(Path.cwd()).free)} free"
    for number in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(number)
        yield f"GPU {number}", f"{of.name}, {_gib(of.total_memory)}, compute capability {of.major}.{of.minor}"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use" + ("" if torch.version.cuda else ": this torch is one for CPUs")


def software() -> Iterator[Line]:
    """Yield versions."""
    yield "Python", platform.python_version()
    for name in SHOWN:
        yield name, _version(name) or "not installed as a package"


def extras() -> Iterator[Line]:
    """Yield the extras of the package, and what each lacks."""
    if _version(PACKAGE) is None:
        return
    needed = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or ():
        wanted = [one.name for one in needed if one.marker and one.marker.evaluate({"extra": extra})]
        lacking = [name for name in wanted if name != PACKAGE and _version(name) is None]
        remedy = f"lacks {', '.join(lacking)}: pip install '{PACKAGE}[{extra}]'"
        yield extra, remedy if lacking else "installed"


def hub() -> str:
    """Return whether the model hub answers."""
    try:
        urllib.request.urlopen(ENDPOINT, timeout=SECONDS).close()
    except (urllib.error.URLError, OSError) as error:
        return f"cannot be reached ({error}): name models by their folders"
    return "can be reached"


def advice() -> Iterator[Line]:
    """Yield settings with what speaks for them."""
    yield "model.teacher_cache", "hidden: the teacher sees every row once, if the disk has room for it"
    number = torch.cuda.device_count()
    if number == 0:
        yield "trainer.precision", _precision_of_cpu()
        yield (
            "data.reflection_threads",
            f"{torch.get_num_threads()}: faster; with 1 the last digits of scores are any machine's",
        )
        return
    if torch.cuda.is_bf16_supported(False):
        yield "trainer.precision", "bf16-mixed, which srd takes by itself"
        yield "model.teacher.dtype", "bfloat16: half of its memory"
    else:
        yield "trainer.precision", "32-true, which srd takes by itself: this GPU has no bfloat16 units"
    if number > 1:
        yield "trainer.strategy", "ddp, which Lightning takes by itself; --config fsdp2.yaml where models are too large"
    yield "model.micro_batch_tokens", "4096, should a step need more memory than there is; the result is the same"


def _precision_of_cpu() -> str:
    if has_bf16_units(CPUINFO):
        return "32-true, which is taken by itself; bf16-mixed may be faster"
    return "32-true, which is taken by itself; bfloat16 would be over thirty times slower on this CPU"


def _processor() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gib(number: int) -> str:
    return f"{number / 2**30:.0f} GiB"
