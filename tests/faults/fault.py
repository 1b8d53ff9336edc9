"""One thing that a user may do wrong: what was done, the sentence that comes, and what is left behind."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROWS = [
    {"instruction": f"Say {row}.", "output": answer}
    for row, answer in enumerate(["one", "two", "three", "four", "five", "six", "seven", "eight"])
]
TINY = {
    "class_path": "transformers.LlamaForCausalLM",
    "init_args": {
        "config": {
            "class_path": "transformers.LlamaConfig",
            "init_args": {
                "vocab_size": 384,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "eos_token_id": 1,
                "pad_token_id": 0,
            },
        }
    },
}
RECIPE = {
    "model": {"student": TINY, "teacher": TINY},
    "data": {
        "tokenizer": {"class_path": "transformers.ByT5Tokenizer"},
        "data": ROWS,
        "schedule": {0: 0.5, 1: 1.0},
        "batch_size": 2,
        "decoding": {"max_new_tokens": 2},
    },
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": "run",
    },
}
"""What a fault's own settings are laid over: eight rows, two tiny models, half a second of work."""
LOG = "run/srd-error.log"


@dataclass(frozen=True)
class Fault:
    """A row of the table; it is run as ``srd {argv[0]} --config recipe.yaml {argv[1:]}`` in a new folder.

    Args:
        id: Unique; what pytest shows.
        done: What the user did, in plain words; the left column of `docs/reliability.md`.
        says: The exact paragraph on stderr after ``srd fit: error: ``, or, with code 0, one of its lines as it stands;
            ``{folder}`` is the folder of the run.
        settings: Over `RECIPE`, key by key; a value that is a ``dict`` is laid over, anything else replaces.
        files: Files that lie in the folder beforehand: ``{name: text, bytes or rows of jsonl}``.
        prepare: Makes what cannot be said as files, in the folder.
        argv: Subcommand, and options behind the recipe.
        bare: Leave out ``--config recipe.yaml``.
        environment: Variables of the run.
        code: Exit code: 2 is refused, 0 is a run that goes on.
        left: Glob patterns, relative to the folder, of the files that are new afterwards; each matches at least one, and
            there are no others but the traceback's.
        changed: Names of earlier files that are not as they were.
    """

    id: str
    done: str
    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str | bytes | list[Any]] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    argv: tuple[str, ...] = ("fit",)
    bare: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    code: int = 2
    left: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def lay_out(self, folder: Path) -> list[str]:
        """Write what must lie in the folder; return the arguments of the command line."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(as_bytes(content))
        if self.bare:
            arguments = list(self.argv)
        else:
            (folder / "recipe.yaml").write_text(yaml.safe_dump(laid_over(RECIPE, self.settings)))
            arguments = [self.argv[0], "--config", "recipe.yaml", *self.argv[1:]]
        if self.prepare is not None:
            self.prepare(folder)
        return arguments

    def sentence(self, folder: Path | str) -> str:
        """Return what is said in a folder."""
        return self.says.replace("{folder}", str(folder))


def as_bytes(content: str | bytes | list[Any]) -> bytes:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    return content.encode() if isinstance(content, str) else content


def laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return one tree of settings over another.

    Example:
        >>> laid_over({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
        {'a': {'b': 3, 'c': 2}}
    """
    result = copy.deepcopy(dict(base))
    for key, value in own.items():
        below = result.get(key)
        both = isinstance(value, dict) and isinstance(below, dict) and "class_path" not in value and key != "schedule"
        result[key] = laid_over(below, value) if both else copy.deepcopy(value)
    return result
