"""What a GPU may do otherwise: the same training on a CPU, on one GPU, and on all of them under every strategy.

``SRD_TEST_DEVICE=cpu`` runs these tests on CPUs, with two ranks for all GPUs, to try the tests themselves.
"""

import copy
import json
import os
import shutil
import signal

import lightning as L
import pytest
import torch
from conftest import remembered, run_project, train_equally
from test_objective import Case, each_loss, relative
from test_step import Losses
from tiny import PLAIN, QUIET, lively_model, make_rows, tiny_model
from torch.optim import SGD, AdamW
from transformers import ByT5Tokenizer
from transformers.utils import is_flash_attn_2_available

from srd_lightning import CacheSettings, ForwardKL, KDLightningModule, SRDDataModule
from srd_lightning.criteria import NegativeLogLikelihood, RougeL
from srd_lightning.curation.curator import rank
from srd_lightning.curation.reflection import Reflector
from srd_lightning.curation.student_source import ReflectingStudent
from srd_lightning.data.tokenization import ids_of
from srd_lightning.models.generation import Decoding

DEVICE = torch.device(os.environ.get("SRD_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
ACCELERATOR = "gpu" if ON_GPU else "cpu"
WORLD = max((size for size in (1, 2, 4) if size <= torch.cuda.device_count()), default=1) if ON_GPU else 2
"""Processes, which share a batch of 4 rows."""
SAME, SAME_ON_OTHER_DEVICE, NEAR = 1e-4, 1e-3, 1e-2
"""How far losses, of about 3, may differ in fp32 on one kind of device, on two kinds, and in bf16-mixed."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON_GPU and not torch.cuda.is_available(),
        reason="torch finds no GPU; SRD_TEST_DEVICE=cpu tries these tests on CPUs",
    ),
]


SURROUNDINGS = {
    "NVIDIA_TF32_OVERRIDE": "0",  # products in fp32 are in fp32
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the same sums each time
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a parent that forks does not touch the GPU
}


def train(folder, devices, strategy, precision="32-true", **settings):
    trainer = {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "precision": precision}
    return train_equally(folder, devices, strategy, {"trainer": trainer, **settings}, ACCELERATOR, **SURROUNDINGS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device does under some settings."""
    return remembered(train, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    ("strategy", "settings", "model"),
    [
        ("ddp", {"teacher_placement": "offload"}, {}),
        ("fsdp1", {"teacher_placement": "replicate"}, {}),
        ("fsdp1", {"teacher_placement": "shard", "activation_checkpointing": True}, {"tied": True}),
        ("fsdp2", {"teacher_placement": "shard", "activation_checkpointing": True}, {"tied": True}),
        ("fsdp2", {"teacher_placement": "offload"}, {"lora": True}),
        ("ddp", {"teacher_placement": "shard"}, {"precision": "bf16-mixed"}),
        ("fsdp1", {"teacher_placement": "offload"}, {"precision": "bf16-mixed"}),
        ("fsdp2", {"teacher_placement": "replicate"}, {"precision": "bf16-mixed"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain",
)
def test_all_devices_train_as_one_does(strategy, settings, model, alone, tmp_path):
    """Each a process of its own, with clipping, accumulation and growing stages."""
    tolerance = NEAR if "precision" in model else SAME
    (one,), weights = alone(**model)
    records, found = train(tmp_path / "all", WORLD, strategy, **settings, **model)
    for record in records:
        assert record["losses"] == pytest.approx(one["losses"], abs=tolerance)
    assert one["losses"][-1] < 0.5 * one["losses"][0]
    assert found.keys() == weights.keys()
    for name, weight in weights.items():  # which AdamW has moved by some 5e-3
        assert (found[name] - weight).abs().mean() <= tolerance / 20, name


def resume(folder, *runs):
    """Run one after the other; return how each ended, and what its rank 0 saw."""
    folder.mkdir()
    run_project("resume", folder, json.dumps(runs), **SURROUNDINGS)
    seen = []
    for line in map(json.loads, (folder / "seen-0.jsonl").read_text().splitlines()):
        seen.append([]) if "run" in line else seen[-1].append(line)
    return json.loads((folder / "ends.json").read_text()), seen


def by(kind, value, seen):
    return {line[kind]: line[value] for line in seen if kind in line}


@pytest.mark.parametrize(("strategy", "devices"), [("auto", 1), ("fsdp2", WORLD)])
def test_a_run_that_is_killed_goes_on(strategy, devices, tmp_path):
    """Bit by bit where a run that begins anew gives the same bits: some sums on a GPU are made in no order."""
    options = {"devices": devices, "strategy": strategy, "accelerator": ACCELERATOR, "deterministic": "warn"}
    _, (whole,) = resume(tmp_path / "whole", options)
    _, (again,) = resume(tmp_path / "again", options)
    ends, (_, resumed) = resume(tmp_path / "killed", {**options, "stop": {"at": {"step": 3}}}, options)
    assert [-signal.SIGKILL in processes for processes in ends] == [True, False]
    rows, left = (by("batch", "ids", seen) for seen in (whole, resumed))
    assert 0 < min(left) < max(left) == max(rows)
    assert left == {batch: rows[batch] for batch in left}
    losses, found = (by("validated", "val_nll", seen) for seen in (whole, resumed))
    assert found == pytest.approx({epoch: losses[epoch] for epoch in found}, abs=SAME)
    assert resumed[-1]["size"] == pytest.approx(whole[-1]["size"], rel=1e-5)
    if whole[-1]["weights"] == again[-1]["weights"]:  # where the device repeats itself bit by bit
        assert resumed[-1] == whole[-1]


@each_loss
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("chunk", [4, 64])
def test_the_chunked_objective_equals_the_float64_reference(make_loss, reference, dtype, bound, chunk):
    case = Case(dtype, bias=dtype == torch.float32)
    expected, _, _, gradients = case.expected(reference, 0.6, 1.5)
    check_objective(here(case).chunked(make_loss(temperature=1.5), 0.6, chunk=chunk), expected, gradients, bound)


def test_the_chunked_objective_under_autocast():
    case = Case(bias=False)
    exact, gradients = case.chunked(ForwardKL(1.5), 0.6)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = here(case).chunked(ForwardKL(1.5), 0.6, chunk=4)
    assert [gradient.dtype for gradient in found[1]] == [torch.float32] * 2
    check_objective(found, exact.loss.detach(), gradients, 3e-2)


def here(case):
    """Return a case on the device."""
    moved = copy.copy(case)
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(moved, name, value.to(DEVICE))
    return moved


def check_objective(found, loss, gradients, bound):
    objective, found_gradients = found
    assert {gradient.device.type for gradient in found_gradients} == {DEVICE.type}
    assert relative(objective.loss.detach().cpu(), loss) < bound
    pairs = zip(found_gradients, gradients, strict=True)
    assert max(relative(gradient.cpu(), expected) for gradient, expected in pairs) < bound


GROWING, ALL = {0: 0.5, 1: 1.0}, {0: 1.0}


def fit(folder, accelerator=ACCELERATOR, precision="32-true", callbacks=(), clip=None, schedule=GROWING, **options):
    """Train in this process; return every loss."""
    losses, rows = Losses(), make_rows(24)
    options = {"student": tiny_model(0), "teacher": lively_model(1), "optimizer": lambda p: SGD(p, lr=0.05), **options}
    trainer = L.Trainer(
        max_epochs=4,
        callbacks=[losses, *callbacks],
        default_root_dir=folder,
        precision=precision,
        gradient_clip_val=clip,
        **{**QUIET, "accelerator": accelerator, "devices": 1},
    )
    data = SRDDataModule({"train": rows, "validation": rows[:5]}, ByT5Tokenizer(), schedule=schedule, batch_size=4)
    trainer.fit(KDLightningModule(**{"kd_weight": 0.7, **options}), datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["val_kl"])
    return torch.tensor(losses.losses)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("cpu"), accelerator="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": None},
        {"teacher_cache": CacheSettings("hidden", dtype="float32")},
        {"teacher_cache": CacheSettings("topk", k=384)},
        {"micro_batch_tokens": 90},
        {"packing": True},
        {"activation_checkpointing": True},
        pytest.param(
            {"compile": True},
            marks=pytest.mark.skipif(
                not any(map(shutil.which, ("g++", "gcc", "cc"))), reason="torch.compile needs a compiler of C"
            ),
        ),
    ],
    ids=str,
)
def test_the_device_trains_as_a_cpu_does(options, on_cpu, tmp_path):
    losses = fit(tmp_path, **options)
    assert len(losses) == 21
    assert losses[-1] < 0.95 * losses[0]
    torch.testing.assert_close(losses, on_cpu, rtol=0, atol=SAME_ON_OTHER_DEVICE)


class Norms(L.Callback):
    """Keeps the norms of the gradients with which steps were made."""

    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_a_fused_optimizer_clips_in_half_precision(tmp_path):
    runs = []
    for fused in (True, False):
        norms = Norms()
        optimizer = lambda params, fused=fused: AdamW(params, lr=1e-3, fused=fused)  # noqa: E731
        folder = tmp_path / str(fused)
        runs.append(fit(folder, precision="bf16-mixed", callbacks=[norms], clip=0.1, optimizer=optimizer))
        assert norms.norms == pytest.approx([0.1] * len(runs[-1]), rel=1e-3)
    torch.testing.assert_close(*runs, rtol=0, atol=NEAR)


@pytest.mark.parametrize(
    "attention",
    [
        "sdpa",
        pytest.param(
            "flash_attention_2",
            marks=pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed, or no GPU"),
        ),
    ],
)
def test_packed_rows_do_not_see_each_other(attention, tmp_path):
    runs = []
    for packing in (True, False):
        models = {
            "student": tiny_model(0, attn_implementation=attention),
            "teacher": lively_model(1, attn_implementation=attention),
        }
        runs.append(fit(tmp_path / str(packing), precision="bf16-mixed", schedule=ALL, packing=packing, **models))
    torch.testing.assert_close(*runs, rtol=0, atol=NEAR)


def test_curation_ranks_rows_as_on_a_cpu(model, tokenizer, data, tmp_path):
    criteria = [RougeL(), NegativeLogLikelihood()]
    orders, columns = [], []
    for number, device in enumerate((torch.device("cpu"), DEVICE)):
        student = ReflectingStudent(model, None, tokenizer, PLAIN, device)
        reflector = Reflector(criteria, Decoding(max_new_tokens=6), 500, threads=1)
        fingerprint = reflector.fingerprint(data, model, student)
        columns.append(reflector.scores(data, model, student, tmp_path / str(number), fingerprint).columns)
        orders.append(rank(columns[-1], criteria, ids_of(data), "average").argsort().tolist())
    assert columns[1]["nll"] == pytest.approx(columns[0]["nll"], abs=1e-4)
    assert (columns[1]["rouge_l"] == columns[0]["rouge_l"]).mean() >= 0.9
    moved = [abs(place - other) for place, other in zip(*orders, strict=True)]
    assert max(moved) <= 2, "an answer that ends otherwise may move its row a little"
