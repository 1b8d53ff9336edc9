"""Memory of one rank of eight where FSDP2 shards student and teacher: is any model there larger than its shard?

    python benchmarks/shards.py --json benchmarks/results/shards-cpu.json

One process is the first of a world that is simulated (torch's fake process group: what others would send is a copy of
its own shard), and does what `srd` does; each command has a process of its own. The models are random, in fp32, and
begin in memory of numpy, as in that of a host; what torch's allocator hands out at most, here on a CPU, is what would
be on the device: shards, what is gathered, activations, and the model itself where a command runs it as it was given.
For ``export``, the copy for the file is in the memory of the first rank's host, and is not counted; loading is not
either. Nothing is said about time, nor about what NCCL takes. ``--before`` takes a folder with an earlier version, and
runs that as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from record import record
from torch import nn
from torch.profiler import profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from srd_lightning import FSDP2, CacheSettings, Decoding, KDLightningModule, PromptTemplate, SRDDataModule
from srd_lightning.cli import SRDTrainer
from srd_lightning.distributed.fsdp2 import is_sharded
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import DataError

COMMANDS = ["curate", "cache-teacher", "test", "predict", "fit", "export"]


class Letters(ByT5Tokenizer):
    """Decodes nothing: the models know more tokens than there are bytes."""

    def decode(self, *_: Any, **__: Any) -> str:
        """Return no text."""
        return ""


class Export(Callback):
    """Has the whole student gathered when training has ended, and says how much that held."""

    held = 0

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather as `HuggingFaceExport` does."""
        with profile(profile_memory=True) as seen:
            pl_module.whole_student(only_first=True)
        shards = [getattr(weight, "_local_tensor", weight) for weight in pl_module.student.parameters()]
        copy = sum(weight.nbytes for weight in pl_module.student.parameters())
        self.held = sum(shard.nbytes for shard in shards) + peak(seen) - copy


def in_numpy(model: nn.Module) -> nn.Module:
    """Return a model whose weights torch's allocator does not know of."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.from_numpy(weight.detach().numpy().copy())))
    model.tie_weights()
    return model


def make_model(width: int, layers: int, vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        eos_token_id=1,
    )
    return in_numpy(LlamaForCausalLM(config))


def parts_of(model: nn.Module) -> dict[str, int]:
    """Return the bytes of a model, of a block, and of what is no block."""
    whole = sum(weight.nbytes for weight in model.parameters())
    (layers,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    in_blocks = sum(weight.nbytes for weight in layers.parameters())
    return {"whole": whole, "block": in_blocks // len(layers), "rest": whole - in_blocks}


@contextlib.contextmanager
def alone(self: Ranks) -> Iterator[Any]:
    """Wait for nobody: the others are simulated, and would never come."""
    yield lambda: None


def peak(seen: Any) -> int:
    """Return the most bytes that torch's allocator had handed out at one time, without those from before."""
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run a command as the first rank; return what it held at most, and how large the models are."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(options.world), "NODE_RANK": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.world)
    Ranks.work_then_wait = lambda self, *_: alone(self)  # type: ignore[method-assign, misc, assignment]
    student = make_model(*options.student, options.vocabulary, 0)
    teacher = make_model(*options.teacher, options.vocabulary, 1)
    sizes = {"student": parts_of(student), "teacher": parts_of(teacher)}
    caches = options.command == "cache-teacher"
    module = KDLightningModule(
        student,
        teacher if caches else None,
        kd_weight=0.5 if caches else 0.0,
        tokenizer=Letters(),
        decoding=Decoding(max_new_tokens=4),
        optimizer=lambda weights: torch.optim.SGD(weights, lr=1e-6),
        teacher_cache=CacheSettings("hidden") if caches else "none",
        teacher_placement="shard" if caches else "replicate",
    )
    rows = [{"instruction": f"Say {n}.", "output": "ab" * (n % 5) + str(n)} for n in range(2 * options.world)]
    data = SRDDataModule(
        {"train": rows, "test": rows[: options.world]},
        schedule={0: 0.5, 1: 1.0} if options.command == "curate" else {0: 1.0},
        template=PromptTemplate("{instruction} {input}", "{instruction}"),
        batch_size=1,
        decoding=Decoding(max_new_tokens=4),
        reflection_tokens=256,
    )
    export = Export()
    trainer = SRDTrainer(
        max_epochs=1,
        accelerator="cpu",
        devices=options.world,
        strategy=FSDP2(),
        callbacks=[export] if options.command == "export" else [],
        default_root_dir=options.folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if options.command == "export":
        trainer.fit(module, datamodule=data)
        return {"bytes": export.held, **sizes}
    with profile(profile_memory=True) as seen, contextlib.suppress(DataError):  # what other ranks score is missing
        getattr(trainer, options.command)(module, datamodule=data)
    run_whole = [] if is_sharded(asked := teacher if caches else student) else [asked]
    return {"bytes": peak(seen) + sum(parts_of(model)["whole"] for model in run_whole), **sizes}


def measure(options: argparse.Namespace, path: Path | None) -> dict[str, Any]:
    """Run all commands, each in a process of its own, with the version in a folder."""
    found: dict[str, Any] = {}
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path.resolve())})
    for command in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            call = [sys.executable, __file__, *sys.argv[1:], "--command", command, "--folder", folder]
            subprocess.run(call, check=True, stdout=subprocess.DEVNULL, env=environment)
            result = json.loads(Path(folder, "result.json").read_text())
        found[command] = result.pop("bytes")
        found.update(result)
        print(f"{command}: {found[command] / 1e6:.1f} MB", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=8, help="ranks that are simulated")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--student", type=int, nargs=2, default=[512, 24], help="width and layers")
    parser.add_argument("--teacher", type=int, nargs=2, default=[512, 24], help="width and layers")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--before", type=Path, help="folder with an earlier version of this library")
    parser.add_argument("--command", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command:
        warnings.simplefilter("ignore")
        Path(options.folder, "result.json").write_text(json.dumps(run(options)))
        return
    result: dict[str, Any] = {"world": options.world, "now": measure(options, None)}
    if options.before is not None:
        result["before"] = measure(options, options.before)
    print(record(result, options.json))


if __name__ == "__main__":
    main()
