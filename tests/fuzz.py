"""A million cases of `test_fuzz.py`, in slices of ten thousand, one on each core: ``python tests/fuzz.py``.

Each slice has a seed of its own. It goes on where it stopped; ``FUZZ`` is the number of cases. What a slice finds is
found again by what is printed last.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from srd_lightning.storage import write_atomically

ROOT = Path(__file__).parents[1]
DONE = ROOT / ".cache" / "fuzz.txt"
"""How many cases were tried without a finding."""
SLICE = 10_000


def run(number):
    """Try a slice; return its command, and whether it found something."""
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", f"--hypothesis-seed={number}"]
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_fuzz.py"), *options]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "FUZZ": str(SLICE)}, check=False, capture_output=True)
    if ended.returncode:
        print(ended.stdout.decode(), ended.stderr.decode(), sep="\n", file=sys.stderr)
    return shlex.join(command), ended.returncode != 0


def main(wanted):
    done = int(DONE.read_text()) if DONE.exists() else 0
    cores = os.cpu_count() or 1
    while done < wanted:
        numbers = range(done // SLICE, min(done // SLICE + cores, -(-wanted // SLICE)))
        with ThreadPoolExecutor(cores) as pool:
            for command, found in pool.map(run, numbers):
                if found:
                    sys.exit(f"after {done} cases: FUZZ={SLICE} {command}")
                done += SLICE
                write_atomically(DONE, str(done).encode())
        print(f"{done} of {wanted} cases, nothing found", flush=True)


if __name__ == "__main__":
    main(int(os.environ.get("FUZZ", "1000000")))
