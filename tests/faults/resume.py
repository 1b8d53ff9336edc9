"""Checkpoints that a run cannot go on from, and what is not as it was when it was saved."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
import yaml

from faults.fault import RECIPE, ROWS, Fault, laid_over

SAVED = {
    "trainer": {
        "enable_checkpointing": True,
        "callbacks": [{"class_path": "ResumeCheckpoint", "init_args": {"dirpath": "run/checkpoints"}}],
    }
}
CHECKPOINT = "run/checkpoints/epoch=0-step=2.ckpt"
LAST = ("fit", "--ckpt_path=last")
BEFORE = "this run would not see the rows that the one in the checkpoint had to see:\n- "
BEHIND = "\nTo train on other rows from the same weights, begin a new run with them, without ckpt_path"


@cache
def finished():
    """Return a folder in which the recipe was run once."""
    from conftest import run_cli

    folder = Path(tempfile.mkdtemp())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(laid_over(RECIPE, SAVED)))
    code, _, error = run_cli(["fit", "--config", "recipe.yaml"], folder)
    assert code == 0, error
    return folder


def saved(folder):
    shutil.copytree(finished() / "run", folder / "run")


def damaged(folder):
    saved(folder)
    content = bytearray((folder / CHECKPOINT).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / CHECKPOINT).write_bytes(content)


def cut_off(folder):
    saved(folder)
    (folder / CHECKPOINT).write_bytes((folder / CHECKPOINT).read_bytes()[:1000])


def sharded(folder):
    saved(folder)
    (folder / CHECKPOINT).unlink()
    (folder / CHECKPOINT).mkdir()
    (folder / CHECKPOINT / ".metadata").touch()
    torch.save({}, folder / CHECKPOINT / "meta.pt")


class Code:
    """Leaves a file where it is loaded."""

    def __reduce__(self):
        return shutil.copyfile, (__file__, "written")


def resumed(id, done, says, settings=SAVED, prepare=saved, argv=LAST, **more):
    return Fault(id=f"resume_{id}", done=done, says=says, settings=settings, prepare=prepare, argv=argv, **more)


def other(id, done, says, settings):
    """A run that goes on with other rows to come."""
    return resumed(id, f"`--ckpt_path last` with {done}", f"{BEFORE}{says}{BEHIND}", laid_over(SAVED, settings))


FAULTS = [
    other("seed", "another `seed`", "seed was 0 and is 1 (set `seed` as it was)", {"data": {"seed": 1}}),
    other(
        "batch_size",
        "another `batch_size`",
        "global_batch was 2 and is 4 (rows of a batch, of all ranks: set `batch_size` so that it is as it was)",
        {"data": {"batch_size": 4}},
    ),
    other(
        "schedule",
        "another `schedule`",
        "schedule was {0: 0.5, 1: 1.0} and is {0: 0.5, 1: 0.75} (set `schedule` as it was)",
        {"data": {"schedule": {0: 0.5, 1: 0.75}}},
    ),
    other(
        "arrangement",
        "another `arrangement`",
        "arrangement was 'EasyToHard()' and is 'HardToEasy()' (set `arrangement` as it was)",
        {"data": {"arrangement": {"class_path": "HardToEasy"}}},
    ),
    other(
        "accumulation",
        "another `accumulate_grad_batches`",
        "accumulate_grad_batches was {0: 1} and is {0: 2} (set `trainer.accumulate_grad_batches` as it was)",
        {"trainer": {"accumulate_grad_batches": 2}},
    ),
    other(
        "grouping",
        "`group_by_length` turned off",
        "group_by_length was True and is False (set `group_by_length` as it was)",
        {"data": {"group_by_length": False}},
    ),
    other(
        "rows",
        "one row fewer",
        "other rows (or in another order of the file: use the same `data`)\n- other tokens (of the same rows: use the "
        "same `template`, `tokenizer`, `max_length` and `max_prompt_length`)",
        {"data": {"data": ROWS[:7]}},
    ),
    other(
        "tokens",
        "another `template`",
        "other tokens (of the same rows: use the same `template`, `tokenizer`, `max_length` and `max_prompt_length`)",
        {
            "data": {
                "template": {
                    "class_path": "srd_lightning.PromptTemplate",
                    "init_args": {"with_input": "{instruction} {input}", "without_input": "{instruction}"},
                }
            }
        },
    ),
    resumed(
        "damaged",
        "`--ckpt_path last` where a byte of the checkpoint has changed",
        f"ckpt_path: {{folder}}/{CHECKPOINT} is damaged: data/15 in it is not what was written; give "
        "another checkpoint, or a copy of it",
        prepare=damaged,
    ),
    resumed(
        "cut_off",
        "`--ckpt_path last` where the only checkpoint was cut off",
        f"no checkpoint can be read: {{folder}}/{CHECKPOINT} was cut off while it was written or copied; put a sound copy "
        "in its place, or remove it to begin anew",
        prepare=cut_off,
    ),
    resumed(
        "sharded",
        "`--ckpt_path last` on one device where FSDP2 has saved",
        f"{{folder}}/{CHECKPOINT} is sharded, which SingleDeviceStrategy cannot read; make a file of it, python -m "
        f"srd_lightning.consolidate {{folder}}/{CHECKPOINT} FILE, and give that as ckpt_path, or resume with FSDP2",
        prepare=sharded,
    ),
    resumed(
        "no_file",
        "`--ckpt_path` with a file that is not there",
        "ckpt_path: there is no checkpoint none.ckpt; check the path, or leave it out to begin anew",
        prepare=None,
        argv=("fit", "--ckpt_path=none.ckpt"),
    ),
    resumed(
        "rows_as_checkpoint",
        "`--ckpt_path` with a file of rows",
        "ckpt_path: rows.jsonl (43 bytes) is no checkpoint, or was cut off while it was written or copied; give another "
        "one",
        prepare=None,
        files={"rows.jsonl": ROWS[:1]},
        argv=("fit", "--ckpt_path=rows.jsonl"),
    ),
    resumed(
        "empty_checkpoint",
        "`--ckpt_path` with an empty file",
        "ckpt_path: a.ckpt (0 bytes) is no checkpoint, or was cut off while it was written or copied; give another one",
        prepare=None,
        files={"a.ckpt": b""},
        argv=("fit", "--ckpt_path=a.ckpt"),
    ),
    resumed(
        "weights_as_checkpoint",
        "`--ckpt_path` with weights that no Trainer has saved",
        "ckpt_path: a.ckpt is not a checkpoint of Lightning; give one that a Trainer has saved",
        prepare=lambda folder: torch.save({"weight": torch.ones(1)}, folder / "a.ckpt"),
        argv=("fit", "--ckpt_path=a.ckpt"),
    ),
    resumed(
        "code_in_checkpoint",
        "`--ckpt_path` with a checkpoint that holds code",
        "ckpt_path: a.ckpt holds shutil.copyfile beside tensors and plain values, and to load that runs code; where you trust who "
        "wrote it, set --weights_only false (in Python: SRDTrainer.fit(..., weights_only=False))",
        prepare=lambda folder: torch.save({"state_dict": {}, "own": Code()}, folder / "a.ckpt"),
        argv=("fit", "--ckpt_path=a.ckpt"),
    ),
    resumed(
        "optimizer",
        "`--ckpt_path last` with another optimizer",
        "the checkpoint was saved by another optimizer: settings amsgrad, betas, dampening, decoupled_weight_decay, eps, "
        "momentum, nesterov are of one of the two only; set `optimizer` as it was, or begin a new run, without ckpt_path",
        settings=laid_over(SAVED, {"model": {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.001}}}}),
    ),
]
