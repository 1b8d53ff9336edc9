"""Prompts of the quickstart: five short tasks about everyday things; its teacher writes the responses.

The tasks about the last things are held out, so nothing that the student is asked at the end was ever trained on.
"""

from __future__ import annotations

import json
from pathlib import Path

from srd_lightning.storage import write_atomically

TASKS = (
    "What is {}? Answer in one short sentence.",
    "Write a short sentence about {}.",
    "Describe {} in one sentence.",
    "What is {} used for? Answer in one sentence.",
    "Write a question about {}.",
)
_THINGS = (
    "an apple, an umbrella, a bicycle, a blanket, a boat, a bottle, bread, a bridge, a broom, a bus, butter, a "
    "candle, a carpet, a chair, cheese, a clock, coffee, a compass, a cup, a door, a drum, an engine, a fence, a "
    "fire, a flag, a flower, a fork, a garden, a guitar, a hammer, a hat, honey, an island, a kettle, a key, a "
    "kite, a ladder, a lamp, a letter, a library, a market, a mirror, a mountain, a newspaper, a pencil, a piano, "
    "rain, a river, salt, a school, snow, a spoon, sugar, a train, a window"
)
THINGS = tuple(_THINGS.split(", "))
HELDOUT = 5
"""Things of which none is trained on."""


def prompts() -> dict[str, list[str]]:
    """Return the prompts of each split.

    Example:
        >>> {split: len(found) for split, found in prompts().items()}, prompts()["test"][-1]
        ({'train': 250, 'test': 25}, 'Write a question about a window.')
    """
    things = {"train": THINGS[:-HELDOUT], "test": THINGS[-HELDOUT:]}
    return {split: [task.format(thing) for thing in some for task in TASKS] for split, some in things.items()}


def write_prompts(folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl``, rows of ``instruction`` alone, to a folder.

    Raises:
        StorageError: The folder cannot be written.
    """
    for split, found in prompts().items():
        lines = [json.dumps({"instruction": prompt}) + "\n" for prompt in found]
        write_atomically(folder / f"{split}.jsonl", "".join(lines).encode())
