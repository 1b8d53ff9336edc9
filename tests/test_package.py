import re
import subprocess
import sys
from pathlib import Path

import srd_lightning

README = Path(__file__).parents[1] / "README.md"

IMPORT_THE_CORE_ALONE = """
import sys

BLOCKED = {"lightning", "pytorch_lightning", "transformers", "datasets"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())

import srd_lightning.templates
import srd_lightning.ranking
import srd_lightning.arrangement
import srd_lightning.curriculum
import srd_lightning.divergences
import srd_lightning.losses
import srd_lightning.objective
"""


def test_pure_core_imports_without_lightning_and_transformers():
    result = subprocess.run([sys.executable, "-c", IMPORT_THE_CORE_ALONE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_readme_lists_the_public_names():
    table = re.search(r"<!-- public names -->(.*)<!-- /public names -->", README.read_text(), re.DOTALL)
    assert table, "README.md has no table of public names"
    names = re.findall(r"^\| *`(\w+)", table[1], re.MULTILINE)
    assert sorted(names) == sorted(srd_lightning.__all__)


def test_every_public_name_can_be_imported():
    missing = [name for name in srd_lightning.__all__ if not hasattr(srd_lightning, name)]
    assert not missing
