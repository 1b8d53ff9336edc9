"""A million cases of `test_fuzz.py`, in slices of ten thousand, each with a seed of its own: ``python tests/fuzz.py``.

It goes on where it stopped; ``FUZZ`` is the number of cases. What a slice finds is found again by what it prints last.
"""

import os
import subprocess
import sys
from pathlib import Path

from srd_lightning.storage import write_atomically

ROOT = Path(__file__).parents[1]
DONE = ROOT / ".cache" / "fuzz.txt"
"""How many cases were tried without a finding."""
SLICE = 10_000


def main(wanted):
    done = int(DONE.read_text()) if DONE.exists() else 0
    while done < wanted:
        options = ["-q", "-n", "0", f"--hypothesis-seed={done // SLICE}"]
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_fuzz.py"), *options]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, "FUZZ": str(SLICE)}, check=False).returncode:
            sys.exit(f"after {done} cases: FUZZ={SLICE} {' '.join(command)}")
        done += SLICE
        write_atomically(DONE, str(done).encode())
        print(f"{done} of {wanted} cases, nothing found", flush=True)


if __name__ == "__main__":
    main(int(os.environ.get("FUZZ", "1000000")))
