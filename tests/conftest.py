"""A tiny model, a tokenizer of bytes, and rows: all that the tests need, made in memory."""

import json
import os
import subprocess
import sys
import tempfile

CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # nothing that an earlier run has tokenised
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it once

from functools import partial
from pathlib import Path

import pytest
import references
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from srd_lightning.losses import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from srd_lightning.templates import PromptTemplate
from srd_lightning.tokenised import tokenize

torch.set_num_threads(1)  # tiny models only lose by more


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a trainer that only trains."""


LOSSES = {
    "forward_kl": (ForwardKL, references.forward_kl),
    "reverse_kl": (ReverseKL, references.reverse_kl),
    "jensen_shannon": (partial(JensenShannon, beta=0.3), partial(references.jensen_shannon, beta=0.3)),
    "total_variation": (TotalVariation, references.total_variation),
    "skew_forward_kl": (partial(SkewForwardKL, alpha=0.2), partial(references.skew_forward_kl, alpha=0.2)),
    "skew_reverse_kl": (partial(SkewReverseKL, alpha=0.2), partial(references.skew_reverse_kl, alpha=0.2)),
}
"""Each loss with the reference of its divergence."""


PROJECTS = Path(__file__).parent / "projects"


def of_project(name, *arguments, **environment):
    """Return what `subprocess` takes to run a project in a process of its own."""
    command = [sys.executable, str(PROJECTS / f"{name}.py"), *map(str, arguments)]
    surroundings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PROJECTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return {"args": command, "env": surroundings, "text": True}


def run_project(name, *arguments, code=0, timeout=300, **environment):
    """Run a project to its end, with the exit code that is expected."""
    running = of_project(name, *arguments, **environment)
    done = subprocess.run(**running, capture_output=True, timeout=timeout, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def records_of(folder, devices):
    """Return what each process of a project wrote down."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]


def train_equally(folder, devices, strategy, settings, accelerator="cpu", **environment):
    """Run `projects/equal.py`; return what each process recorded, and the weights that were exported."""
    folder.mkdir()
    run_project("equal", folder, devices, strategy, json.dumps(settings), accelerator, **environment)
    return records_of(folder, devices), load_file(folder / "student" / "model.safetensors")


def remembered(train, folder):
    """Return a function that trains on one device under some settings, once, in a folder, and remembers what came."""
    known = {}

    def of(**settings):
        key = json.dumps(settings)
        if key not in known:
            known[key] = train(folder / str(len(known)), 1, "auto", **settings)
        return known[key]

    return of


def tiny_model(seed=0, **options):
    torch.manual_seed(seed)
    config = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(**config))


def lively_model(seed=0, **options):
    """A model with large weights, which does not say the same to every prompt."""
    return tiny_model(seed, initializer_range=0.3, **options)


PLAIN = PromptTemplate("{instruction} {input}", "{instruction}")


def tokenised(tokenizer, rows):
    return tokenize(Dataset.from_list(rows), tokenizer, PLAIN)[0]


def in_other_order(data):
    return data.select([(7 * row) % len(data) for row in range(len(data))])


def make_rows(number):
    return [{"instruction": f"Say {row}.", "output": "ab" * (1 + row % 5) + str(row)} for row in range(number)]


@pytest.fixture
def student():
    return tiny_model(seed=0)


@pytest.fixture
def teacher():
    return tiny_model(seed=1)


@pytest.fixture
def tokenizer():
    return ByT5Tokenizer()


@pytest.fixture
def rows():
    return make_rows(16)


@pytest.fixture
def model():
    return lively_model()


@pytest.fixture
def data(tokenizer):
    return tokenised(tokenizer, make_rows(20))
