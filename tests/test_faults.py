"""The table of faults, run through the command line; see `faults.fault`."""

import re
from fnmatch import fnmatch

import pytest
from conftest import run_cli
from faults import AREAS
from faults.fault import LOG
from faults.manual import MANUAL, manual

from srd_lightning import errors

FAULTS = [fault for faults in AREAS.values() for fault in faults]
KEPT = re.compile(r"\n\(The traceback is in (.+); --traceback shows it\.\)$")


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def paragraph(error):
    """Return what was said of an error, and where its traceback is."""
    said = re.split(r"(?m)^srd(?: [a-z-]+)?: error: ", error.rstrip("\n"))[-1]
    log = KEPT.search(said)
    return KEPT.sub("", said), log and log.group(1)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_fault(fault, tmp_path):
    arguments = fault.lay_out(tmp_path)
    before = files_in(tmp_path)
    code, out, error = run_cli(arguments, tmp_path, dict(fault.environment))
    assert code == fault.code, error[-3000:]
    assert "Traceback" not in error
    new = files_in(tmp_path)
    if code == 0:
        assert fault.sentence(tmp_path) in [*error.splitlines(), *out.splitlines()]
    else:
        said, log = paragraph(error)
        assert said == fault.sentence(tmp_path)
        assert log in (None, LOG)
        if log is not None:
            assert new.pop(LOG).decode().count("Traceback (most recent call last)") >= 1
    left = new.keys() - before.keys()
    assert {name for name in left if not any(fnmatch(name, pattern) for pattern in fault.left)} == set()
    assert [pattern for pattern in fault.left if not any(fnmatch(name, pattern) for name in left)] == []
    assert {name for name, content in before.items() if new.get(name) != content} == set(fault.changed)


def test_the_table_is_large_and_has_no_row_twice():
    assert len({fault.id for fault in FAULTS}) == len(FAULTS) >= 90


def test_the_manual_is_made_of_the_table():
    assert MANUAL.read_text() == manual(AREAS, errors.__doc__), "run: python tests/faults"
