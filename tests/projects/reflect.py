"""Curates only, on some processes, with some trouble: ``reflect.py FOLDER DEVICES [STRATEGY] [TROUBLE]``."""

import os
import signal
import sys
import time
from pathlib import Path

import distil
import drive
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from srd_lightning import Decoding, Pretrained, results_folder
from srd_lightning.cli import SRDTrainer
from srd_lightning.curation import reflection
from srd_lightning.distributed.fsdp2 import is_sharded

STRATEGIES = {"ddp": "ddp", "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


batches = iter(range(2))


def killed_in_the_third_batch(scores):
    if next(batches, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)


def failing_in_the_second_process(scores):
    if rank() == 1:
        raise OSError("no space left on the disk")
    time.sleep(0.5)


def failing_in_the_first_process(scores):
    if rank() == 0:
        raise OSError("no space left on the disk")
    time.sleep(0.5)


def killed_in_the_first_process(scores):
    time.sleep(0.2)
    if rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def writes(scores):
    reflected, _ = scores
    Path(sys.argv[1], f"sharded{rank()}").write_text(str(is_sharded(reflected.model)))


def slow_in_the_second_process(scores):
    time.sleep(0.1 * rank())


def waiting_for_a_sign(scores):
    while not Path(sys.argv[1], "go").exists():
        time.sleep(0.1)


def main(folder, devices, strategy="ddp", trouble=""):
    if trouble in globals():
        score_batch = reflection.score_batch
        reflection.score_batch = lambda *given: globals()[trouble](given) or score_batch(*given)
    module, data = distil.parts(folder)
    if trouble == "another_student" and int(os.environ.get("LOCAL_RANK", 0)) == 1:
        module.student.lm_head.weight.data[0, 0] += 1
    if trouble == "impatient":
        results_folder.PATIENCE = 0.1
    options = {"devices": int(devices), "strategy": STRATEGIES[strategy] if int(devices) > 1 else "auto"}
    trainer = SRDTrainer(accelerator="cpu", default_root_dir=folder, logger=False, **options)
    if trouble == "writes":
        writer = Pretrained(str(Path(folder).parent / "writer"))
        options = {"split": "test", "writer": writer, "decoding": Decoding(max_new_tokens=12)}
        trainer.generate(module, data, f"{folder}/written.jsonl", **options)
        return
    try:
        trainer.curate(module, data)
    except Exception as error:
        Path(folder, f"error{os.environ.get('LOCAL_RANK', 0)}.txt").write_text(str(error))
        raise
    Path(folder, f"order{trainer.global_rank}.json").write_text(str(data.curriculum.order.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
    drive.end_together()
