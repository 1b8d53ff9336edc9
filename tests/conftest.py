"""Programs that tests run in processes of their own, and fixtures; what they are made of is in `tiny.py`.

Nothing is imported here that takes long: with pytest-xdist, the process that reads this only hands out the tests. Its
workers, and the programs, are forks of one process that has imported everything (`forked.py`).
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

collect_ignore = ["projects"]  # programs; one imports pytorch_lightning, of which ours would warn ever after

CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # nothing that an earlier run has tokenised
if "datasets" in sys.modules:  # in a fork, which has imported it
    sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(CACHE.name)
os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it once
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models only lose by more
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


TESTS = Path(__file__).parent
PROJECTS = TESTS / "projects"
FORKS = "SRD_TEST_FORKS"
HANGS = 600
"""Seconds after which something hangs: no machine is that slow."""


def pytest_configure(config):
    if getattr(config.option, "tx", None):  # of pytest-xdist: how each of its workers is started
        config.option.tx = [f"popen//python={shlex.join(asking(forks()))}" for _ in config.option.tx]


def pytest_unconfigure():
    for process in STARTED:
        process.communicate()  # its time is a part of ours


def forks():
    """Return the socket of the process that programs are forked from (`forked.py`); start it if there is none yet."""
    if FORKS not in os.environ:
        path = Path(CACHE.name) / "forks"
        with socket.socket(socket.AF_UNIX) as listener, path.with_suffix(".txt").open("w") as said:
            listener.bind(str(path))
            listener.listen(128)  # who comes while it imports waits
            STARTED.append(
                subprocess.Popen(
                    [sys.executable, TESTS / "forked.py", str(listener.fileno())],
                    env=surroundings(
                        JE_ARROW_MALLOC_CONF="background_thread:false",  # pyarrow's only thread
                        PYTORCH_NVML_BASED_CUDA_CHECK="1",  # a parent that forks does not touch the GPU
                    ),
                    stdin=subprocess.PIPE,  # whose end is the other one's end
                    stdout=said,
                    stderr=said,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,
                )
            )
        python = path.with_name("python")
        fork = shlex.join(asking(path))
        python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nexec {fork} "$@"\n')
        python.chmod(0o700)
        os.environ |= {FORKS: str(path), "SRD_TEST_PYTHON": str(python)}
    return os.environ[FORKS]


def asking(path, ranks=1):
    """Return the command that has a program run in forks; its own arguments come after."""
    return list(map(str, [sys.executable, "-I", "-S", TESTS / "ask.py", path, ranks]))


def python():
    """Return the path of an interpreter that has imported everything: it runs files and modules (``-m``) in forks."""
    forks()
    return os.environ["SRD_TEST_PYTHON"]


STARTED = []


def surroundings(**environment):
    """Return the environment of a process that tests start: what can be imported here can be imported there."""
    path = os.pathsep.join([str(PROJECTS), *sys.path])
    own = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}  # seeds of earlier tests
    return {**own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}


def of_program(program, *arguments, ranks=1, **environment):
    """Return what `subprocess` takes to run a Python file in forks of a process that has imported everything.

    What differs from `python program`: some milliseconds until it begins, and with several ranks one command is all of
    them, each a process with its rank in the environment, as launchers start them; it ends when all have, with the
    first exit code that is not 0. Variables that libraries read when they are imported come too late.
    """
    command = [*asking(forks(), ranks), str(program), *map(str, arguments)]
    return {"args": command, "env": surroundings(**environment), "text": True}


def of_project(name, *arguments, ranks=1, **environment):
    """Return what `subprocess` takes to run a project, of as many processes as there are ranks (see `of_program`)."""
    return of_program(PROJECTS / f"{name}.py", *arguments, ranks=ranks, **environment)


def of_launcher(name, *arguments, **environment):
    """Return what `subprocess` takes to run a project as its first process; Lightning's launcher starts the others."""
    command = [python(), str(PROJECTS / f"{name}.py"), *map(str, arguments)]
    return {"args": command, "env": surroundings(**environment), "text": True}


def run_project(name, *arguments, ranks=1, code=0, timeout=HANGS, **environment):
    """Run a project to its end, with the exit code that is expected."""
    running = of_project(name, *arguments, ranks=ranks, **environment)
    done = subprocess.run(**running, capture_output=True, timeout=timeout, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def run_cli(args, cwd, env=None, ranks=1):
    """Run the command line, `srd_lightning.cli.main`, in forked processes.

    Args:
        args: Arguments, subcommand first.
        cwd: Folder to run in.
        env: Variables on top of those of the tests.
        ranks: Number of processes.

    Returns:
        The exit code (-9 if it was killed so), and what was written to stdout and stderr.
    """
    running = of_project("srd", *args, ranks=ranks, **(env or {}))
    done = subprocess.run(**running, cwd=cwd, capture_output=True, timeout=HANGS, check=False)
    return done.returncode, done.stdout, done.stderr


def records_of(folder, devices):
    """Return what each process of a project wrote down."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]


def train_equally(folder, devices, strategy, settings, accelerator="cpu", **environment):
    """Run `projects/equal.py`; return what each process recorded, and the weights that were exported."""
    from safetensors.torch import load_file

    folder.mkdir()
    run_project("equal", folder, devices, strategy, json.dumps(settings), accelerator, ranks=devices, **environment)
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


@pytest.fixture
def student():
    from tiny import tiny_model

    return tiny_model(seed=0)


@pytest.fixture
def teacher():
    from tiny import tiny_model

    return tiny_model(seed=1)


@pytest.fixture
def tokenizer():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@pytest.fixture
def rows():
    from tiny import make_rows

    return make_rows(16)


@pytest.fixture
def model():
    from tiny import lively_model

    return lively_model()


@pytest.fixture
def data(tokenizer):
    from tiny import make_rows, tokenised

    return tokenised(tokenizer, make_rows(20))
