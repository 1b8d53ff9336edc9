"""What the command line can do."""

from __future__ import annotations

SUBCOMMANDS = {
    "fit": "Curate, let the teacher be cached where that is asked for, and train the student.",
    "validate": "Measure the student on the validation rows.",
    "test": "Measure the student on the test rows, answers included.",
    "evaluate": "Measure the student on held-out rows, greedily and sampling over seeds, beside the teacher.",
    "predict": "Let the student answer the rows of the split predict, else test.",
    "plan": "Say what fit would do and what that would cost: rows, steps, tokens, disk, memory, time.",
    "curate": "Reflect and rank only: let the student answer every prompt, save the scores, show what came of it.",
    "cache-teacher": "Curate, and let the teacher see every row that is kept, so that fit need not load it.",
    "generate": "Let the teacher, or another model, write the responses of a split, as a data file to train on.",
}
"""What the command line can do; `SRDTrainer` has a method for each."""

OF_RUNS = {
    "study": "Run every arm of a study with every seed, in processes of their own, and compare them.",
    "report": "Show what runs have written, side by side, as one HTML page.",
}
"""What is about many runs: `srd_lightning.studies.commands` has a program for each."""
TOOLS = {
    "init": "Ask for models, data and devices, and write a recipe for them.",
    "doctor": "Say what this machine has, which settings suit it, and what is missing.",
}
"""What it can do besides, without a parser of Lightning's: each is a module of this room, with ``main(arguments)``."""
