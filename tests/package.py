"""Builds sdist and wheel into ``dist``, and uses the wheel as a user would: ``python tests/package.py``.

The wheel is made of the sdist, and must hold what one of the working tree holds; it is installed into an empty
environment outside the repository, where the command line, a recipe and the import must work.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
RECIPE = "from srd_lightning.cli import find_config; print(find_config('debug.yaml'))"


def run(*command, cwd=ROOT):
    print("+", *command, flush=True)
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # else it is ours again
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=without, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def built():
    """Return the wheel that is made of the sdist, once it is seen that the tree makes the same one."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST)
    (wheel,) = DIST.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder)
        if contents(wheel) != contents(Path(folder, wheel.name)):
            sys.exit("the sdist makes another wheel than the working tree; see [tool.hatch.build] in pyproject.toml")
    return wheel


def contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def use(wheel, folder):
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    install = [programs / "python", "-m", "pip", "install", "-q", "--constraint", ROOT / "constraints.txt"]
    run(*install, "torch", cwd=folder)  # first and alone, as in the Makefile
    run(*install, wheel, cwd=folder)
    print(run(programs / "python", "-c", "import srd_lightning; print(srd_lightning.__file__)", cwd=folder))
    print(run(programs / "srd", "--help", cwd=folder))
    recipe = run(programs / "python", "-c", RECIPE, cwd=folder).strip()
    run(programs / "srd", "fit", "--config", recipe, cwd=folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        use(built(), Path(folder))
    print("the wheel works:", *sorted(path.name for path in DIST.iterdir()))
