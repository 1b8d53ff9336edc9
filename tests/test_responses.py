"""Responses that a model writes to prompts, as a data file: `srd generate`."""

import hashlib
import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from tiny import PLAIN, make_rows, tiny_model

from srd_lightning import cli
from srd_lightning.criteria import base as criteria_base
from srd_lightning.curation.responses import ResponseWriter, check_path
from srd_lightning.data.row_reader import load_rows
from srd_lightning.errors import DataError, SettingError, StorageError
from srd_lightning.models.generation import Decoding, generate_ids

ROWS = [
    {"id": "a", "instruction": "Name a colour.", "output": "Blue."},
    {"id": "b", "instruction": "Name a fruit.", "response": "An apple.", "topic": "food"},
    {"id": "c", "instruction": "Name a planet."},
    {"id": "d", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]
LIMIT = 12
GREEDY = Decoding(max_new_tokens=LIMIT)


def greedy(model, tokenizer, prompt):
    """Return the answer to one prompt, whose next token is the likeliest one, and whether it ended by itself."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = []
    while len(answer) < LIMIT:
        with torch.no_grad():
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        if answer[-1] == tokenizer.eos_token_id:
            return tokenizer.decode(answer[:-1], skip_special_tokens=True).strip(), True
    return tokenizer.decode(answer, skip_special_tokens=True).strip(), False


@pytest.fixture
def model(tokenizer):
    """A model that ends half of its answers by itself."""
    model = tiny_model(2)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    return model


@pytest.fixture
def write(model, tokenizer, tmp_path):
    def run(rows=ROWS, name="out.jsonl", decoding=GREEDY, tokens=64, template=PLAIN):
        writer = ResponseWriter(model, "tiny", tokenizer, template, 64, decoding, tokens, 1)
        left_out = writer.write(load_rows(rows), tmp_path / name, tmp_path)
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()], left_out

    return run


def test_each_response_is_the_models_own_to_that_prompt_alone(write, model, tokenizer):
    rows = make_rows(24)
    written, left_out = write(rows)
    expected = {}
    cut = 0
    for row in load_rows(rows):
        answer, ended = greedy(model, tokenizer, PLAIN(row).prompt)
        cut += not ended
        if ended and answer:
            expected[row["instruction"], row.get("input")] = answer
    assert 0 < len(expected) < len(rows)
    assert {(row["instruction"], row.get("input")): row["output"] for row in written} == expected
    assert left_out[f"cut at decoding.max_new_tokens {LIMIT}"] == cut
    assert sum(left_out.values()) == len(rows) - len(expected)


def test_rows_keep_all_but_the_response(write, monkeypatch):
    monkeypatch.setattr(
        criteria_base, "generate_ids", lambda model, tokenizer, prompts, *_: [[74, 75, 1] for _ in prompts]
    )
    written, _ = write(ROWS[:3])
    assert written == [
        {"id": "a", "instruction": "Name a colour.", "output": "GH", "written_by": "tiny"},
        {"id": "b", "instruction": "Name a fruit.", "topic": "food", "output": "GH", "written_by": "tiny"},
        {"id": "c", "instruction": "Name a planet.", "output": "GH", "written_by": "tiny"},
    ]
    (turns,), _ = write(ROWS[3:], name="turns.jsonl")
    assert turns["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "GH"}]


def test_digests_of_the_content_are_made_once(write, monkeypatch):
    made = []
    monkeypatch.setattr(hashlib, "sha256", lambda content=b"": made.append(bytes(content)) or sha256(content))
    write(make_rows(8))
    assert sum(b"instruction" in content and b"('output'" in content for content in made) == 8


def test_goes_on_where_it_stopped_and_writes_the_same_bytes(write, tmp_path, monkeypatch):
    rows = make_rows(24)
    write(rows)
    whole = (tmp_path / "out.jsonl").read_bytes()
    calls = []

    def answer(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate_ids(*arguments, **options)

    (store,) = (tmp_path / "responses").iterdir()
    store.rename(tmp_path / "first")
    monkeypatch.setattr(criteria_base, "generate_ids", answer)
    with pytest.raises(KeyboardInterrupt):
        write(rows, name="again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()
    before = len(calls)
    write(rows, name="again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    in_all = len(calls) - 1  # the third was interrupted
    write(rows, name="again.jsonl")
    assert len(calls) - 1 == in_all > before - 1


def test_what_cannot_be_is_refused_before_models_are_loaded(write, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(StorageError, match=r"path would replace .*train.jsonl, which does not hold what an earlier"):
        check_path(tmp_path / "train.jsonl")
    with pytest.raises(SettingError, match=r"path must name a .jsonl file, but is .*out.csv"):
        check_path(tmp_path / "out.csv")
    with pytest.raises(SettingError, match="max_length_ratio bounds an answer by the reference response"):
        write(decoding=Decoding(max_length_ratio=2.0))
    with pytest.raises(
        DataError, match=r"tiny has written no response that is whole: 1 cut at decoding.max_new_tokens 1$"
    ):
        write(ROWS[:1], decoding=Decoding(max_new_tokens=1))


def test_command_writes_rows_that_fit_trains_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(cli.find_config("debug.yaml").read_text())
    Path("base.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--config", "base.yaml", "--seed_everything=1", "--data.max_prompt_length=400"]
    monkeypatch.setattr(
        criteria_base, "generate_ids", lambda model, tokenizer, prompts, *_: [[74, 75, 1] for _ in prompts]
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["--path=~/written.jsonl", "--split=validation", "--decoding.max_new_tokens=3"]
    cli.run(["generate", *options, *arguments])
    cli.run(["generate", *options, *arguments])  # what an earlier run has written is replaced
    assert len(Path("written.jsonl").read_text().splitlines()) == 8
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    trained = cli.run(["fit", *options, "--data.data.train=written.jsonl"])
    assert set(trained.datamodule.rows["train"]["response"]) == {"GH"}
    with pytest.raises(DataError, match="there is no split 'predict', but `data` has test, train, validation"):
        cli.run(["generate", *options, "--path=other.jsonl", "--split=predict"])
    with pytest.raises(SettingError, match=r"there is no teacher; name one: --writer.name"):
        cli.run(
            [
                "generate",
                *options,
                "--path=other.jsonl",
                "--model.teacher=null",
                "--model.kd_weight=0",
                "--model.teacher_cache=none",
            ]
        )
