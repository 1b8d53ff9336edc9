"""The table of faults, run through the command line; see `faults.fault`."""

import logging
import os
import re
import sys
import traceback
from fnmatch import fnmatch

import pytest
from faults import AREAS
from faults.fault import LOG
from faults.manual import MANUAL, manual

import srd_lightning.commandline  # noqa: F401 (once for all forks)
from srd_lightning import cli, errors

FAULTS = [fault for faults in AREAS.values() for fault in faults]
KEPT = re.compile(r"\n\(The traceback is in (.+); --traceback shows it\.\)$")


def run_cli(args, cwd, env=None):
    """Run the command line in a forked process; return the exit code, and what was written."""
    out, error = cwd.parent / f"{cwd.name}.out", cwd.parent / f"{cwd.name}.err"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(cwd)
            os.environ |= env or {}
            for number, path in ((1, out), (2, error)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
                for handler in logging.getLogger(name).handlers:
                    if type(handler) is logging.StreamHandler:  # and not pytest's
                        handler.stream = sys.stderr
            sys.argv = ["srd", *args]
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), out.read_text(), error.read_text()


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
    assert len({fault.id for fault in FAULTS}) == len(FAULTS)


def test_the_manual_is_made_of_the_table():
    assert MANUAL.read_text() == manual(AREAS, errors.__doc__), "run: python tests/faults"
