"""Make `docs/reliability.md` of the table: ``python tests/faults``."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from faults import AREAS
from faults.manual import MANUAL, manual
from srd_lightning import errors

MANUAL.write_text(manual(AREAS, errors.__doc__ or ""))
