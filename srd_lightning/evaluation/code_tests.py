"""`PassAtK`: whether code in answers passes its tests, which runs it: in a process of its own, under limits.

The limits are against accidents, endless loops and all memory taken, and are no security boundary: code that means harm
can do what the user can who started the run. Whoever runs code of a model that is not trusted does so in a container or
a virtual machine.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from lightning.pytorch.utilities import rank_zero_warn

from srd_lightning.errors import DataError, SettingError
from srd_lightning.evaluation.answer_scores import AnswerScore, Row
from srd_lightning.progress import progress_bar

RUNNER = """
import os, resource, sys

def run():
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 2**20)):
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sign, code = sys.stdin.read().split("\\n", 1)
    sys.stdin, said = open(os.devnull), os.dup(1)
    os.dup2(sys.stdin.fileno(), 0)
    os.dup2(2, 1)
    try:
        exec(compile(code, "answer", "exec"), {"__name__": "__main__"})
    except BaseException:  # SystemExit too: the tests may not have been reached
        os._exit(1)
    os.write(said, sign.encode())
    os._exit(0)

run()
"""
"""What the process runs, with a sign and the code on its standard input; the sign is all that it says, at the end."""
TEST = re.compile(r"^assert .*$", re.MULTILINE)
FENCED = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
GRACE = 5
"""Seconds more than those of the CPU that a process may take: it may sleep, and has to start."""


class PassAtK(AnswerScore):
    r"""How often one of k answers would pass the tests that stand in its prompt, in [0, 1]; for MBPP and the like.

    The tests are the lines of the prompt that begin with ``assert``, as in MBPP's own prompt. The code of an answer is
    its first block between ```` ``` ````, else all of it. Several answers to a prompt are test rows that repeat it,
    with a ``decoding`` that samples: the estimate is unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1).

    It runs the code that the student has written, each answer in a process with limits on time and memory, in an empty
    folder, and without a network where ``unshare`` may cut it off. That is no security boundary.

    Args:
        k: Answers to choose from.
        seconds: Of a CPU that the code of an answer may take.
        memory_mb: Memory that it may take, in MiB.
        processes: That run at a time.

    Raises:
        SettingError: A limit below 1, or a system without limits for processes.

    Example:
        >>> prompt = "Write a function that adds.\nassert add(1, 2) == 3"
        >>> rows = [{"prompt": prompt, "answer": f"def add(a, b):\n    return a {sign} b"} for sign in "+-"]
        >>> PassAtK().score(rows)
        0.5
    """

    def __init__(self, k: int = 1, seconds: int = 10, memory_mb: int = 1024, processes: int = 2) -> None:
        sizes = {"k": k, "seconds": seconds, "memory_mb": memory_mb, "processes": processes}
        if wrong := [f"{name}={size!r}" for name, size in sizes.items() if not isinstance(size, int) or size < 1]:
            raise SettingError(f"PassAtK needs whole numbers of at least 1, but has {', '.join(wrong)}")
        if os.name != "posix":
            raise SettingError("PassAtK needs a system that can limit processes, such as Linux; leave it out here")
        self.name = f"pass_at_{k}"
        self.k = k
        self.seconds = seconds
        self.memory_mb = memory_mb
        self.processes = processes

    def check(self, prompts: Sequence[str]) -> None:
        """See that every prompt has tests, and is there k times.

        Raises:
            DataError: A prompt has no tests, or one that is no Python, or is there too seldom.
        """
        for prompt, count in Counter(prompts).items():
            if not TEST.search(prompt):
                raise DataError(
                    f"PassAtK takes the lines of a prompt that begin with assert for its tests, but {_short(prompt)} "
                    "has none; write them into it, as MBPP's prompt has them"
                )
            for test in TEST.findall(prompt):
                _check_test(test)
            if count < self.k:
                raise DataError(
                    f"PassAtK(k={self.k}) needs {self.k} answers to every prompt, but {_short(prompt)} stands in "
                    f"{count} test rows; repeat the rows and let decoding sample, or lower k"
                )
        if not without_network():
            rank_zero_warn(
                "PassAtK runs the code of answers with the network within its reach, for unshare cannot cut it off "
                "here; run in a container without one"
            )

    def score(self, rows: Sequence[Row]) -> float:
        """See `AnswerScore.score`."""
        progress, passed = progress_bar(len(rows), "tests of answers"), defaultdict(list)

        def passes(row: Row) -> bool:
            found = self.passes(code_of(row["answer"]), TEST.findall(row["prompt"]))
            progress.update()
            return found

        with ThreadPoolExecutor(self.processes) as threads:
            for row, found in zip(rows, threads.map(passes, rows), strict=True):
                passed[row["prompt"]].append(found)
        progress.close()
        return sum(pass_at_k(len(found), sum(found), self.k) for found in passed.values()) / len(passed)

    def passes(self, code: str, tests: Sequence[str]) -> bool:
        """Return whether code runs to the end with its tests behind it, within the limits."""
        command = [
            *without_network(),
            sys.executable,
            "-I",
            "-c",
            RUNNER,
            str(self.seconds),
            str(self.memory_mb * 2**20),
        ]
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder},
                start_new_session=True,
            ) as running,
        ):
            sign, said = secrets.token_hex(), b""  # that the end was reached: a process may end without an error before
            program = "\n".join([sign, code, *tests]).encode(errors="backslashreplace")
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = running.communicate(program, timeout=self.seconds + GRACE)
            with contextlib.suppress(ProcessLookupError):  # where it has ended, and left none that it started
                os.killpg(running.pid, signal.SIGKILL)
        return said == sign.encode()


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Return the chance that one of k of some answers is right.

    Args:
        answers: How many there are, at least k.
        right: How many of them pass.
        k: How many are drawn, without putting back.

    Example:
        >>> pass_at_k(answers=4, right=1, k=2)
        0.5
    """
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def code_of(answer: str) -> str:
    r"""Return the first block between fences, else the whole.

    Example:
        >>> code_of("Like this:\n```python\nx = 1\n```\nIt is 1.")
        'x = 1\n'
    """
    found = FENCED.search(answer)
    return found[1] if found else answer


@cache
def without_network() -> tuple[str, ...]:
    """Return what to put before a command so that it has no network, or nothing where that cannot be."""
    command = ("unshare", "--user", "--map-root-user", "--net")
    if shutil.which(command[0]) is None:
        return ()
    works = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if works else ()


def _check_test(test: str) -> None:
    try:
        compile(test, "test", "exec")
    except SyntaxError as error:
        raise DataError(
            f"the test {_short(test)} is no Python ({error.msg}); each stands on a line of its own, with another line "
            "behind the last, or it ends with what a chat template puts there"
        ) from error


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:60]}...")
