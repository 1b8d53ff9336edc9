"""Memory of each process and time of a step, by where the teacher is: whole everywhere, spread, offloaded, or cached.

    python benchmarks/placement.py --json benchmarks/results/placement-cpu.json

Random models in fp32; of each process, the most memory within a step (of the GPU where there is one, else the resident
set), and the time of a step. Loading and caching, which come before the steps, are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from loss import high_water_mark, reset_peak
from record import record
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from srd_lightning import FSDP2, KDLightningModule, Pretrained, SRDDataModule

PLACEMENTS = ["replicate", "shard", "offload", "cached"]
STRATEGIES = ["ddp", "fsdp2"]


class Meter(Callback):
    """Time of each step, and the most memory that is held within it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.held: list[int] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock, and forget the memory of loading and caching."""
        reset_peak()
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it, and look at the memory."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.held.append(high_water_mark())


def make_model(vocabulary: int, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            eos_token_id=1,
        )
    )


def train(options: argparse.Namespace) -> None:
    """Train some steps, in each process, and write down what it took."""
    strategy, placement = options.arm
    meter = Meter()
    module = KDLightningModule(
        Pretrained(f"{options.folder}/student"),
        Pretrained(f"{options.folder}/teacher"),
        kd_weight=0.5,
        teacher_cache="hidden" if placement == "cached" else "none",
        teacher_placement="replicate" if placement == "cached" else placement,
    )
    rows = [{"instruction": "say " * 8, "output": "word " * 24} for _ in range(options.batch * options.steps * 2)]
    trainer = Trainer(
        max_epochs=1,
        devices=options.processes,
        strategy=FSDP2() if strategy == "fsdp2" else strategy,
        callbacks=[meter],
        default_root_dir=options.folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=SRDDataModule(rows, schedule={0: 1.0}, batch_size=options.batch))
    result = {"seconds_per_step": statistics.median(meter.seconds[1:]), "gb": max(meter.held[1:]) / 1e9}
    Path(options.folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


def measure(options: argparse.Namespace, folder: str, strategy: str, placement: str) -> dict[str, Any]:
    """Run an arm in processes of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", strategy, placement, "--folder", folder]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed goes back, and is not counted
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    ranks = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(options.processes)]
    found = {name: max(rank[name] for rank in ranks) for name in ("gb", "seconds_per_step")}
    print(f"{strategy}, teacher {placement}: {found}", file=sys.stderr)
    return {"strategy": strategy, "teacher": placement, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 2), help="one per GPU")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--student", type=int, nargs=2, default=[512, 4], help="width and layers")
    parser.add_argument("--teacher", type=int, nargs=2, default=[1024, 16], help="width and layers")
    parser.add_argument("--batch", type=int, default=2, help="rows per process and step")
    parser.add_argument("--steps", type=int, default=6, help="the first is not counted")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        train(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for seed, name in enumerate(("student", "teacher")):
            model = make_model(options.vocabulary, *getattr(options, name), seed)
            model.save_pretrained(f"{folder}/{name}")
            ByT5Tokenizer().save_pretrained(f"{folder}/{name}")
            sizes[name] = sum(weight.nbytes for weight in model.parameters()) / 1e9
        arms = [measure(options, folder, strategy, placement) for strategy in STRATEGIES for placement in PLACEMENTS]
    print(record({"processes": options.processes, "weights_gb": sizes, "arms": arms}, options.json))


if __name__ == "__main__":
    main()
