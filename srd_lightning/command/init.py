"""``srd init``: a few questions, and a recipe that says what can be changed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from srd_lightning.command.subcommands import TOOLS
from srd_lightning.command.tool import ToolParser
from srd_lightning.errors import SettingError

QUESTIONS = {
    "student": ("The student, a folder or a name on the hub", None),
    "teacher": ("The teacher, likewise", None),
    "data": ("Training rows: a file, a folder or a name on the hub", None),
    "devices": ("Devices: a number, or auto for all", "auto"),
    "epochs": ("Epochs", "24"),
}
"""What is asked, with the answer that is taken where there is none."""
RECIPE = """\
# {student} learns from {teacher} on {data}.
#   srd curate --config {file}    # only lets the student answer every prompt, and ranks the rows
#   srd fit --config {file}       # all of it; the same line again goes on where it has stopped
# What is not said here is the paper's; srd fit --help names what can be said, docs/training.md explains it.
seed_everything: 0
model:
  student:
    name: {student_name}
    # lora: {{r: 16, lora_alpha: 64}}    # train adapters only; needs srd-lightning[lora]
  teacher:
    name: {teacher_name}
    # dtype: bfloat16    # half of its memory, on a GPU
  teacher_cache: hidden    # it sees every row once, and what it says is kept on disk; none: it is asked at every step
  # loss: ReverseKL    # ForwardKL by default
  # micro_batch_tokens: 4096    # large batches in parts: less memory, the same result
  optimizer:
    class_path: AdamW
    init_args: {{lr: 1e-4, weight_decay: 0.01, fused: true}}
data:
  data:
    train: {data_name}
    # validation: dev.jsonl    # measured after every epoch
    # test: test.jsonl    # for srd test
  # template: ChatTemplate    # the chat format of the tokenizer; by default the paper's plain text
  batch_size: 16    # rows of a step, on each device
  max_length: 512    # tokens of prompt and response
  max_prompt_length: 256
  decoding: {{max_new_tokens: 256}}    # of the answers by which rows are ranked
trainer:
  max_epochs: {epochs}    # a third on 25 % of the rows, one on 50 %, one on 75 %; data.schedule says it otherwise
  devices: {devices}
  # default_root_dir: mine    # by default a folder in runs/ that is named after these settings
"""


def main(arguments: list[str]) -> None:
    """Ask what was not said, and write the recipe.

    Args:
        arguments: Of the command line, without the subcommand.

    Raises:
        SettingError: Something is missing that nobody can be asked for, or is not what it should be.
        FileExistsError: There is a file of that name.
    """
    given = _parser().parse_args(arguments)
    file = Path(given.file)
    if file.exists():
        raise SettingError(f"{file} is there already; name another file, or move it away")
    answers = {name: getattr(given, name) or _ask(name) for name in QUESTIONS}
    devices, epochs = answers["devices"], answers["epochs"]
    if devices != "auto":
        _check_number("devices", devices)
    _check_number("epochs", epochs)
    texts = {f"{name}_name": json.dumps(answers[name], ensure_ascii=False) for name in ("student", "teacher", "data")}
    with file.open("x") as recipe:
        recipe.write(RECIPE.format(file=file, **answers, **texts))
    print(f"{file} is written; srd fit --config {file}")


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser("init", TOOLS["init"])
    parser.add_argument("file", nargs="?", default="recipe.yaml", help="where the recipe goes (recipe.yaml)")
    for name, (question, _) in QUESTIONS.items():
        parser.add_argument(f"--{name}", help=question)
    return parser


def _ask(name: str) -> str:
    """Return an answer, or what is taken without one."""
    question, otherwise = QUESTIONS[name]
    if not sys.stdin.isatty():
        if otherwise is None:
            raise SettingError(f"say --{name}, for there is no terminal to ask at; srd init --help shows what there is")
        return otherwise
    hint = "" if otherwise is None else f" [{otherwise}]"
    while not (answer := input(f"{question}{hint}: ").strip() or otherwise):
        pass
    return answer


def _check_number(name: str, answer: str) -> None:
    if not answer.isdecimal() or int(answer) < 1:
        raise SettingError(f"{name} must be a whole number from 1, but is {answer}")
