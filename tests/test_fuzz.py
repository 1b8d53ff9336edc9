"""Whatever stands in a file or a setting: it is read, or refused in a paragraph, or what is damaged is named.

``FUZZ=100000 pytest tests/test_fuzz.py`` tries about so many cases; `make fuzz` a million, in slices (`fuzz.py`).
"""

import gzip
import json
import os
import shutil
import signal
import warnings
from functools import cache

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import HANGS
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from srd_lightning.checkpoints.files import read_outline
from srd_lightning.checkpoints.refusals import check_no_code
from srd_lightning.command.commandline import SRDCLI
from srd_lightning.command.console import explain
from srd_lightning.criteria import NegativeLogLikelihood, RougeL
from srd_lightning.curation.external_scores import read_scores
from srd_lightning.curation.score_store import ScoreStore
from srd_lightning.data.readers import FORMATS, from_files, from_rows, read
from srd_lightning.errors import SRDError
from srd_lightning.losses.head import Head
from srd_lightning.teacher.cache import TeacherCache
from srd_lightning.teacher.live import HiddenStates

CASES = int(os.environ.get("FUZZ", "1000"))


def cases(share):
    """Return the settings of a test that has a share of all cases."""
    return settings(max_examples=max(1, int(CASES * share)), suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(autouse=True)
def _without_traces(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path_factory):
    """A folder that all cases of a test share, for files that each writes anew."""
    return tmp_path_factory.mktemp("cases")


class HangError(BaseException):
    """A call has not ended."""


@pytest.fixture(autouse=True)
def _alarm():
    def ring(*_):
        raise HangError(f"no end after {HANGS} s")

    former = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def tried(function, *arguments, refusal=SRDError):
    """Return what comes, or nothing where it is refused, as the command says it."""
    signal.alarm(HANGS)
    try:
        return function(*arguments)
    except refusal as error:
        said, refused = explain(error), error
    assert said, repr(refused)
    assert "\n\n" not in said
    return None


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "insert", "remove", "repeat"]), st.integers(0, 2**20), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=3,
)
"""What happens to a file: how, about where, with what."""


def edited(content, edits):
    for kind, place, some in edits:
        place %= len(content) + 1
        head, tail = content[:place], content[place:]
        content = {
            "cut": head,
            "flip": head + bytes(byte ^ 1 << len(some) % 8 for byte in tail[:1]) + tail[1:],
            "insert": head + some + tail,
            "remove": head + tail[1 + len(some) :],
            "repeat": head + head[-9:] + tail,
        }[kind]
    return content


def written(path, content):
    path.write_bytes(content)
    return path


# Rows.

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # halves of surrogate pairs too
NAMES = st.sampled_from(["instruction", "input", "output", "id", "messages", "data", "role", "content"]) | TEXT
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
ROWS = [
    {"id": "a", "instruction": 'Say é, then "b".', "input": "x\ny", "output": "1.50"},
    {"id": "b", "instruction": "Add.", "input": None, "output": "2020-01-01, or later"},
]
TURNS = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
JSON = [
    "".join(json.dumps(row) + "\n" for row in [*ROWS, TURNS]),
    json.dumps({"data": ROWS}, indent=1),
    "\n".join(json.dumps(row, indent=1) for row in ROWS),
]
TABLES = ['id,instruction,output\na,"Say ""b"".",1\nb,"x\ny",2\n', "id\tinstruction\toutput\na\tb\tc\n"]


@st.composite
def files(draw):
    """Draw the ending of a file, and what is in it: bytes, values of JSON, or about what should be there."""
    form = draw(st.sampled_from([form for form in FORMATS if form != ".parquet"]))
    values = st.lists(VALUES, max_size=3).map(lambda some: "\n".join(map(json.dumps, some)).encode())
    right = st.sampled_from([sample.encode() for sample in (JSON if "json" in form else TABLES)])
    content = draw(st.binary(max_size=60) | values | st.builds(edited, right, EDITS))
    if form.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
        content = edited(content, draw(EDITS)) if draw(st.booleans()) else content
    return form, content


@cases(0.35)
@given(file=files())
def test_a_file_of_rows(file, folder):
    path = written(folder / f"rows{file[0]}", file[1])
    for _, row in tried(lambda: list(read(path))) or ():
        assert isinstance(row, dict)


@cases(0.1)
@given(file=files())
def test_a_file_of_rows_as_a_data_set(file, folder):
    rows = tried(from_files, [written(folder / f"rows{file[0]}", file[1])])
    for row in [] if rows is None else rows.to_list():
        assert all(value is None or isinstance(value, str) or name == "messages" for name, value in row.items())


@cases(0.1)
@given(rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=4) | VALUES, max_size=4))
def test_rows_in_memory(rows):
    found = tried(from_rows, rows)
    assert found is None or len(found) == (len(rows) if any(rows) else 0)  # without any field there is no row


# Scores from elsewhere.

GIVEN = {"id": ["a", "b"], "nll": [0.5, 1.5], "answer": ["1.50", "later"]}


@cache
def file_of_scores(form):
    if form == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(GIVEN), sink)
        return sink.getvalue().to_pybytes()
    rows = [dict(zip(GIVEN, row, strict=True)) for row in zip(*GIVEN.values(), strict=True)]
    if form == ".csv":
        return "\n".join(",".join(map(str, row)) for row in [GIVEN, *(row.values() for row in rows)]).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@cases(0.08)
@given(form=st.sampled_from([".jsonl", ".csv", ".parquet"]), edits=EDITS)
def test_scores_from_elsewhere(form, edits, folder):
    rows = Dataset.from_list([{"id": row["id"], "response": row["output"]} for row in ROWS])
    path = written(folder / f"scores{form}", edited(file_of_scores(form), edits))
    scores = tried(read_scores, path, rows, [NegativeLogLikelihood(), RougeL()], ByT5Tokenizer())
    assert scores is None or not any(np.isnan(values).any() for values in scores.columns.values())


# Folders that runs have written.

DAMAGES = st.lists(
    st.tuples(st.sampled_from(["edit", "exchange", "remove", "rename"]), st.integers(0, 9), st.integers(0, 9), EDITS),
    max_size=3,
)
"""What happens to the files of a folder: how, to which, with which."""


def damaged_copy(original, folder, damages):
    """Return a copy of a folder to whose files something has happened, and the names of those that have changed."""
    place = folder / "copy"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(original, place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    for kind, number, other, edits in damages:
        there = sorted(path for path in place.iterdir() if path.name != ".lock")
        one, two = there[number % len(there)], there[other % len(there)]
        if kind == "edit":
            one.write_bytes(edited(one.read_bytes(), edits))
        elif kind == "exchange":
            first = one.read_bytes()
            one.write_bytes(two.read_bytes())
            two.write_bytes(first)
        elif kind == "rename":
            one.rename(one.with_name(f"part-{number:032x}{one.suffix}"))
        elif len(there) > 1:
            one.unlink()
    after = {path.name: path.read_bytes() for path in place.iterdir()}
    return place, {name for name, content in before.items() if after.get(name) != content}


SCORES = {str(row): row / 7 for row in range(6)}
MADE_OF = {"rows": "r", "student": "s"}


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    store = ScoreStore(tmp_path_factory.mktemp("kept") / "scores", MADE_OF, {"nll": "NLL"})
    for row, value in SCORES.items():
        store.append([{"id": row, "nll": value, "answer": row}])
    return store.folder


@cases(0.12)
@given(damages=DAMAGES)
def test_a_score_is_what_was_written_or_its_shard_is_named(damages, scores, folder):
    place, changed = damaged_copy(scores, folder, damages)
    gone = [name for name in changed if not (place / name).exists()]
    store = tried(ScoreStore, place, MADE_OF, {"nll": "NLL"})
    if store is None:
        assert "manifest.json" in changed
        return
    ids = pa.array(list(SCORES))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = dict(zip(SCORES, store.columns(ids, ["nll"])["nll"].tolist(), strict=True))
    lost = {row for row, value in found.items() if value != value}
    kept = {row: value for row, value in SCORES.items() if row not in lost}
    assert {row: found[row] for row in kept} == kept
    assert store.answers(ids) == {row: row for row in kept}
    assert len(lost) <= len(said) + len(gone)


STATES = [{"id": f"{row}", "input_ids": [1, 2, 3, row], "prompt_length": 1} for row in range(4)]
KIND = HiddenStates(torch.float32)


def states_of(row):
    return torch.arange(6.0).view(3, 2) + int(row["id"])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "teacher"
    with TeacherCache.locked(folder, KIND, {"teacher": "t", "kind": "k"}) as cache:
        for row in STATES:
            cache.append([row], {"teacher_hidden": states_of(row)})
            cache.flush()
        cache.save_head(Head(torch.ones(5, 2)))
    return folder


def look(place):
    with warnings.catch_warnings(), TeacherCache.locked(place, KIND, {"teacher": "t", "kind": "k"}) as cache:
        missing = set(cache.missing(Dataset.from_list(STATES)).tolist())
        there = [row for number, row in enumerate(STATES) if number not in missing]
        return there, cache.batch(there)["teacher_hidden"], cache.head()


@cases(0.12)
@pytest.mark.filterwarnings("ignore:in the teacher cache")
@given(damages=DAMAGES)
def test_what_a_teacher_said_is_what_was_written_or_asked_for_again(damages, outputs, folder):
    place, changed = damaged_copy(outputs, folder, damages)
    found = tried(look, place)
    if found is None:
        assert "manifest.json" in changed
        return
    there, states, head = found
    assert states.flatten().tolist() == [value for row in there for value in states_of(row).flatten().tolist()]
    assert len(STATES) - len(there) <= len(changed)
    assert changed if head is None else torch.equal(head.weight, torch.ones(5, 2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "a.ckpt"
    torch.save({"state_dict": {"w": torch.arange(64.0)}, "pytorch-lightning_version": "2.6.0"}, path)
    return path.read_bytes()


@cases(0.05)
@given(edits=EDITS)
def test_a_checkpoint_is_what_was_written_or_refused(edits, checkpoint, folder):
    path = written(folder / "a.ckpt", edited(checkpoint, edits))
    if tried(lambda: check_no_code(path) or "sound"):
        assert torch.equal(read_outline(path)["state_dict"]["w"], torch.arange(64.0))


# Settings.

SMALL = {"model": {"student": {"class_path": "Pretrained", "init_args": {"name": "a"}}}, "data": {"data": "a.jsonl"}}
KEYS = st.sampled_from(["class_path", "init_args", "0"]) | st.text(max_size=8)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


class Made(Exception):
    """Brings a parser out of `SRDCLI` before it parses anything."""


@cache
def parser():
    class OnlyParser(SRDCLI):
        def parse_arguments(self, parser, args):
            raise Made(parser)

    with pytest.raises(Made) as made:
        OnlyParser(["fit"])
    return made.value.args[0]


@st.composite
def names(draw):
    """Draw the name of a setting or of a group of settings, or nearly one."""
    name = draw(st.sampled_from(sorted(parser()._subcommands_action.choices["fit"].names_of_settings())))
    return ".".join(name.split(".")[: draw(st.integers(1, 4))]) + draw(st.sampled_from(["", "", "", "s", "+", ".x"]))


def parsed(*arguments):
    """Parse, and see that what is refused is said in a paragraph, whoever refuses it."""
    try:
        tried(parser().parse_args, ["fit", *arguments], refusal=Exception)
    except SystemExit as done:  # --help and the like
        code = done.code
    else:
        code = 0
    assert not code


@cases(0.02)
@given(name=st.deferred(names), value=TREES)
def test_a_setting_of_a_recipe(name, value, folder):
    for part in reversed(name.split(".")):
        value = {part: value}
    parsed("--config", str(written(folder / "recipe.yaml", yaml.safe_dump(value).encode())))


@cases(0.02)
@given(edits=EDITS)
def test_a_damaged_recipe(edits, folder):
    parsed("--config", str(written(folder / "recipe.yaml", edited(yaml.safe_dump(SMALL).encode(), edits))))


@cases(0.02)
@given(name=st.deferred(names), value=TREES)
def test_a_setting_on_the_command_line(name, value):
    text = value if isinstance(value, str) else json.dumps(value)
    parsed(f"--{name}", text.replace("\0", ""))  # which no argument of a process can hold
