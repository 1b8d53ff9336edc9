"""`docs/reliability.md`, made from the table."""

from collections.abc import Mapping
from pathlib import Path

from faults.fault import Fault

MANUAL = Path(__file__).parents[2] / "docs" / "reliability.md"
INTRODUCTION = """\
# What goes wrong, and what is said

A user who does something wrong is told so in one sentence that names the thing and the remedy, before any long work; nothing is
silently trained on. The tables below are the proof: each row is run as a test, through the real command line, and compared with
the exact sentence and the files that are left. This page is made of them (`python tests/faults`).

## How a command ends

| exit code | what happened | what is said |
|---|---|---|
| 0 | all went well | results; warnings only of what a user can act on, each once, naming the setting |
| 2 | something that you can put right: rows, settings, models, files, a full disk, too little memory | one paragraph: what was expected, what came, where, what to do |
| 130 | Ctrl-C | one line |
| 143 | SIGTERM, with `ResumeCheckpoint` | where the run was saved; it goes on with `--ckpt_path last` |
| 1 | a bug, of this library or of one that it uses | its traceback |

The traceback of what you can put right is not shown but written to `srd-error.log` in `default_root_dir` (or, if that cannot be
written, in the folder for temporary files); the second line says where. `--traceback`, anywhere on the line, or `SRD_TRACEBACK=1`
shows it instead. A line that cannot be understood, such as one with a misspelt setting, leaves no file. On several ranks the same
paragraph is printed once; each rank that fails has a log of its own, `srd-error-rank1.log` and so on.

## In Python

The same exceptions, all of them `srd_lightning.errors.SRDError`, and each also the built-in exception that fits:

"""
LAST = """
Anything else that is raised is a bug.

## The table

`{folder}` stands for the folder in which the command was run. Where nothing else is said, only the traceback's file is left, or not
even that.
"""


def manual(areas: Mapping[str, list[Fault]], errors: str) -> str:
    """Return the page.

    Args:
        areas: Faults by area.
        errors: The docstring of `srd_lightning.errors`, which has a table of the classes.
    """
    parts = [INTRODUCTION, table_of_classes(errors), LAST]
    for area, faults in areas.items():
        if faults:
            parts += [
                f"\n### {area}\n\n",
                "| what was done | what is said | exit code | what is left |\n|---|---|---|---|\n",
            ]
            parts += [row(fault) for fault in faults]
    return "".join(parts)


def row(fault: Fault) -> str:
    cells = [fault.done, fault.says.replace("\n", " "), str(fault.code), left_by(fault)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def left_by(fault: Fault) -> str:
    new = ", ".join(f"`{pattern}`" for pattern in fault.left)
    changed = ", ".join(f"`{name}` changed" for name in fault.changed)
    return "; ".join(part for part in (new, changed) if part) or "nothing"


def table_of_classes(errors: str) -> str:
    """Return the table of a docstring in reStructuredText as one in Markdown."""
    lines = errors.splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("====")]
    columns = [slice(start, end) for start, end in spans(lines[rules[0]])]
    head, *body = [
        [line[column].strip() for column in columns]
        for number, line in enumerate(lines)
        if rules[0] < number < rules[-1] and number not in rules
    ]
    rows = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def spans(rule: str) -> list[tuple[int, int | None]]:
    """Return where the columns of a rule like ``==== ===`` begin and end; the last one is as long as its lines."""
    starts = [place for place, sign in enumerate(rule) if sign == "=" and (place == 0 or rule[place - 1] == " ")]
    return list(zip(starts, [*starts[1:], None], strict=True))
