"""The examples, run as their readers would."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HANGS, of_program
from datasets import Dataset, DatasetDict
from tiny import QUIET, tiny_model
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from srd_lightning import (
    ALPACA,
    GKD,
    ChatTemplate,
    Decoding,
    JensenShannon,
    KDLightningModule,
    Pretrained,
    SRDDataModule,
)
from srd_lightning.curation.score_store import ScoreStore

ROOT = Path(__file__).parents[1]
LENGTHS = {"max_length": 230, "max_prompt_length": 200}
OPTIONS = ["--max-length=230", "--max-prompt-length=200", "--max-new-tokens=12", "--dtype=float32"]
END = ord("z") + 3
"""A token that ends answers by the model's own settings, and is none of the tokenizer's special ones."""


def make_rows():
    """Return 25 rows to keep, one of them twice, some of which are cut, and two to drop."""
    outputs = [("a b " if n % 2 else "b ") * (1 + 3 * n) for n in range(24)]
    rows = [{"instruction": f"{chr(97 + n) * (1 + n % 3)}:", "output": output} for n, output in enumerate(outputs)]
    return [*rows, rows[3], {"instruction": "long " * 60, "output": "a"}, {"instruction": "Nothing.", "output": " "}]


def make_student():
    """Return a model that answers different prompts with different words, some of which end before the limit."""
    model = tiny_model(seed=7, initializer_range=0.6)
    head, likely = model.lm_head.weight.data, [1, END, *(ord(letter) + 3 for letter in "ab ")]
    head[[token for token in range(len(head)) if token not in likely]] *= 0.1
    model.generation_config.eos_token_id = [1, END]
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, a student and a module that is called vllm."""
    folder = tmp_path_factory.mktemp("examples")
    make_student().save_pretrained(folder / "student")
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(folder / "student")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    (folder / "modules").mkdir()
    shutil.copy(ROOT / "tests" / "stand_ins" / "vllm_on_cpu.py", folder / "modules" / "vllm.py")
    return folder


def score(home, output, *options, killed_at=0):
    """Run the example; return the process and the rows of each call of vLLM by all runs for this output."""
    calls = home / f"{output}.calls"
    arguments = [
        *OPTIONS,
        "--rows-per-part=10",
        "--model=student",
        "--data=train.jsonl",
        f"--output={output}",
        *options,
    ]
    environment = {"PYTHONPATH": str(home / "modules"), "VLLM_CALLS": str(calls), "VLLM_KILLED_AT": str(killed_at)}
    running = of_program(ROOT / "examples" / "scores_from_vllm.py", *arguments, **environment)
    done = subprocess.run(**running, cwd=home, capture_output=True, timeout=HANGS, check=False)
    return done, [int(line) for line in calls.read_text().split()] if calls.exists() else []


@pytest.fixture(scope="module")
def scored(home):
    done, _ = score(home, "scores.parquet", '--engine={"tensor_parallel_size": 2}')
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "scores.parquet"


@pytest.fixture(scope="module")
def chat_scored(home):
    done, _ = score(home, "chat.parquet", "--template=chat")
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "chat.parquet"


each_template = pytest.mark.parametrize(("file", "template"), [("scored", ALPACA), ("chat_scored", ChatTemplate())])


def curated(home, template, scores, student=None):
    """Return the data module with its rows in order."""
    data = SRDDataModule(
        str(home / "train.jsonl"),
        tokenizer=str(home / "student"),
        template=template,
        student=student,
        decoding=Decoding(max_new_tokens=12),
        scores=str(scores),
        **LENGTHS,
    )
    data.setup("fit")
    return data


@each_template
def test_rows_are_ordered_as_if_the_data_module_had_reflected(home, file, template, request, tmp_path):
    path = request.getfixturevalue(file)
    student = AutoModelForCausalLM.from_pretrained(home / "student")
    expected = curated(home, template, tmp_path / "own", student)
    data = curated(home, template, path)
    assert data.curation.order.tolist() == expected.curation.order.tolist()
    assert data.curation.columns["nll"] == pytest.approx(expected.curation.columns["nll"], abs=1e-4)
    table = pq.read_table(path).to_pydict()
    assert list(table) == ["id", "answer", "nll"]
    assert table["id"] == list(data.rows["train"]["id"])
    answers = ScoreStore.reopen(tmp_path / "own").answers(data.curation.ids)
    assert dict(zip(table["id"], table["answer"], strict=True)) == answers


@each_template
def test_the_rows_of_these_tests_tell_mistakes_apart(home, file, template, request):
    """Answers end at different places, ROUGE-L sees a difference, responses are cut and rows are dropped."""
    path = request.getfixturevalue(file)
    data = curated(home, template, path)
    assert len({len(answer) for answer in pq.read_table(path)["answer"].to_pylist()}) > 3
    assert len(set(data.curation.columns["rouge_l"])) > 10
    assert data.reports["train"].cut > 0
    assert sum(data.reports["train"].dropped.values()) == 2


def test_nothing_but_the_file_is_left(home, scored):
    assert [path.name for path in home.glob("*scores.parquet*")] == ["scores.parquet", "scores.parquet.calls"]


def test_a_file_that_is_there_is_not_made_again(home, scored):
    before = scored.read_bytes()
    done, _ = score(home, "scores.parquet")
    assert done.returncode != 0
    assert "scores.parquet is there already; move it away" in done.stderr
    assert scored.read_bytes() == before


def test_what_cannot_be_trained_on_is_refused(home):
    DatasetDict(test=Dataset.from_list(make_rows())).save_to_disk(home / "no_train")
    for output, data, message in [
        ("scores.csv", "train.jsonl", "--output must end in .parquet, but is scores.csv"),
        ("none.parquet", "no_train", "training needs the split 'train', but `data` has test"),
    ]:
        done, calls = score(home, output, f"--data={data}")
        assert done.returncode != 0
        assert message in done.stderr
        assert calls == []


def test_a_killed_run_goes_on_where_it_was(home, scored):
    done, calls = score(home, "killed.parquet", killed_at=4)
    assert done.returncode == -signal.SIGKILL
    assert calls == [10, 10, 10]
    assert not (home / "killed.parquet").exists()

    done, calls = score(home, "killed.parquet", "--max-new-tokens=3")
    assert "were made with another decoding" in done.stderr
    assert calls == [10, 10, 10]

    done, calls = score(home, "killed.parquet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert calls == [10, 10, 10, 10, 10, 5, 5]  # the part that was not stored is answered and read again, no other
    assert pq.read_table(home / "killed.parquet").equals(pq.read_table(scored))


class TestRollouts:
    """vLLM writes the student's own text in training; greedily, so that it is known what."""

    def expected(self, home):
        """Return a student that has written for itself."""
        module = KDLightningModule(
            Pretrained(str(home / "student")),
            Pretrained(str(home / "teacher")),
            JensenShannon(),
            rollouts=GKD(0.5, Decoding(max_new_tokens=12)),
        )
        rows = SRDDataModule(str(home / "train.jsonl"), str(home / "student"), schedule={0: 1.0}, **LENGTHS)
        L.seed_everything(0, verbose=False)
        L.Trainer(max_epochs=2, default_root_dir=home, **QUIET).fit(module, datamodule=rows)
        return module.student

    def test_the_student_is_the_one_that_has_written_for_itself(self, home):
        tiny_model(seed=1, initializer_range=0.6).save_pretrained(home / "teacher")
        ByT5Tokenizer().save_pretrained(home / "teacher")
        calls = home / "rollouts.calls"
        running = of_program(
            ROOT / "examples" / "rollouts_with_vllm.py",
            *("--model=student", "--teacher=teacher", "--data=train.jsonl", "--output=trained", "--engine={}"),
            *("--max-length=230", "--max-prompt-length=200", "--max-new-tokens=12", "--temperature=0", "--epochs=2"),
            PYTHONPATH=str(home / "modules"),
            VLLM_CALLS=str(calls),
        )
        done = subprocess.run(**running, cwd=home, capture_output=True, timeout=HANGS, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        asked = [int(line) for line in calls.read_text().split()]
        assert 1 < len(asked) < 8
        found, before = (AutoModelForCausalLM.from_pretrained(home / name) for name in ("trained", "student"))
        expected = self.expected(home).state_dict()
        for name, weight in found.state_dict().items():
            torch.testing.assert_close(weight, expected[name], msg=name)
        assert any(not torch.equal(weight, before.state_dict()[name]) for name, weight in expected.items())
