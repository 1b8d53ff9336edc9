import json

import pytest
from datasets import Dataset
from tiny import make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import ChatTemplate, Decoding, KDLightningModule, Pretrained, SRDDataModule
from srd_lightning.errors import StorageError

ROWS = make_rows(8)
NO_OUTPUT = {"instruction": "Say nothing."}
NO_INSTRUCTION = {"output": "Nothing."}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def set_up(tmp_path, student, tokenizer):
    """Set a data module up for training, with every part that it needs unless another is given."""

    def run(data, **options):
        parts = {
            "student": student,
            "tokenizer": tokenizer,
            "scores": str(tmp_path / "scores"),
            "decoding": Decoding(max_new_tokens=2),
        }
        module = SRDDataModule(data, **{**parts, **options})
        module.setup("fit")
        return module

    return run


def refused(message, function, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=message) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, text):
    path.write_text(text)
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


class TestFiles:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
    def test_missing(self, set_up, tmp_path, name):
        message = refused("there is no file", set_up, str(tmp_path / name), error=FileNotFoundError)
        assert str(tmp_path / name) in message

    def test_one_missing_of_several(self, set_up, tmp_path):
        files = [write(tmp_path / "a.jsonl", jsonl(ROWS)), str(tmp_path / "b.jsonl")]
        assert files[1] in refused("there is no file", set_up, files, error=FileNotFoundError)

    def test_missing_folder(self, set_up, tmp_path):
        message = refused("neither a .*jsonl.* nor a folder", set_up, str(tmp_path / "rows"), error=FileNotFoundError)
        assert str(tmp_path / "rows") in message

    def test_folder_of_several_configurations(self, set_up, tmp_path):
        write(tmp_path / "a.jsonl", jsonl(ROWS))
        write(tmp_path / "b.jsonl", jsonl(ROWS))
        configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("a", "b"))
        write(tmp_path / "README.md", f"---\nconfigs:\n{configs}---\n")
        refused(r"\['a', 'b'\]", set_up, str(tmp_path), error=FileNotFoundError)

    @pytest.mark.parametrize(
        ("name", "text"),
        [("rows.jsonl", ""), ("rows.csv", ""), ("rows.csv", "instruction,output\n")],
        ids=["jsonl", "csv", "csv_with_header"],
    )
    def test_empty(self, set_up, tmp_path, name, text):
        refused(f"{name}.* holds no rows", set_up, write(tmp_path / name, text))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("rows.jsonl", jsonl(ROWS).encode() + b'{"instruction": "Hi", "out'),
            ("rows.csv", "instruction,output\nHi,Olé\n".encode("latin-1")),
        ],
        ids=["jsonl_cut", "csv_not_utf8"],
    )
    def test_broken(self, set_up, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in refused(".", set_up, str(tmp_path / name))


class TestSplits:
    def test_without_rows(self, set_up):
        refused("holds no rows", set_up, [])

    def test_without_rows_in_a_dataset(self, set_up):
        refused("holds no rows", set_up, Dataset.from_list(ROWS).select([]))

    def test_without_rows_in_a_saved_folder(self, set_up, tmp_path):
        Dataset.from_list(ROWS).select([]).save_to_disk(tmp_path / "saved")
        refused("train.*no rows", set_up, str(tmp_path / "saved"))

    def test_without_rows_among_others(self, set_up):
        refused("validation.*no rows", set_up, {"train": ROWS, "validation": []})

    def test_no_training_data(self, set_up):
        refused("train.*validation", set_up, {"validation": ROWS})


class TestFields:
    @pytest.mark.parametrize("place", [0, 5, 8], ids=["first", "middle", "last"])
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (NO_OUTPUT, "output or response or completion or answer, but the row has instruction$"),
            (NO_INSTRUCTION, "instruction or prompt or question or query, but the row has output$"),
            ({**NO_OUTPUT, "output": None}, "output or response or completion or answer, but the row has instruction$"),
            (
                {**NO_INSTRUCTION, "instruction": None},
                "instruction or prompt or question or query, but the row has output$",
            ),
        ],
        ids=["no_output", "no_instruction", "null_output", "null_instruction"],
    )
    def test_missing_in_one_row(self, set_up, place, row, message):
        refused(rf"^train row {place}: .*{message}", set_up, [*ROWS[:place], row, *ROWS[place:]])

    def test_missing_in_one_row_of_a_file(self, set_up, tmp_path):
        path = write(tmp_path / "rows.jsonl", jsonl([*ROWS[:5], NO_OUTPUT]))
        refused(r"^train row 5: .* but the row has instruction$", set_up, path)

    def test_missing_in_all_rows(self, set_up):
        refused("instruction or prompt .*, but the row has ask, say", set_up, [{"ask": "a", "say": "b"}])

    def test_the_split_and_the_id_are_named(self, set_up):
        data = {"train": ROWS, "test": [{"id": "x7", **NO_OUTPUT}]}
        refused(r"^test row 0 \(id x7\): expected a field output", set_up, data)

    def test_repeated_id(self, set_up):
        rows = [{"id": min(number, 6), **row} for number, row in enumerate(ROWS)]
        refused("row ids must be unique, .* '6' among them; give every row its own, or remove", set_up, rows)


class TestDroppedRows:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"instruction": "Say nothing.", "output": ""}, "empty response"),
            ({"instruction": "Say nothing.", "output": " \n"}, "empty response"),
            ({"instruction": "x" * 300, "output": "Yes."}, "prompt over 256 tokens"),
        ],
        ids=["empty_response", "blank_response", "long_prompt"],
    )
    def test_are_counted(self, set_up, row, reason):
        module = set_up([*ROWS[:3], row, *ROWS[3:]])
        assert (module.reports["train"].rows, module.reports["train"].dropped) == (9, {reason: 1})
        assert list(module.rows["train"]["response"]) == [row["output"] for row in ROWS]

    def test_no_row_left(self, set_up):
        rows = [{"instruction": "Hi", "output": ""}, {"instruction": "x" * 300, "output": "Yes."}]
        refused("^train: no row is left of 2 rows; .*1 empty response, 1 prompt over 256 tokens", set_up, rows)


class TestSettings:
    @pytest.mark.parametrize(
        ("schedule", "message"),
        [
            ({1: 0.5}, r"must begin at epoch 0, but its epochs are \[1\]"),
            ({}, r"must begin at epoch 0, but its epochs are \[\]"),
            ({-1: 0.5, 0: 0.5}, r"must begin at epoch 0, but its epochs are \[-1, 0\]"),
            ({0: 0.5, 2: 0.25}, r"must not shrink, but its fractions are \[0.5, 0.25\]"),
            ({0: 0.0}, r"must lie in \(0, 1\], but they are \[0.0\]"),
            ({0: 0.5, 2: 1.5}, r"must lie in \(0, 1\], but they are \[0.5, 1.5\]"),
            ({0: 0.1}, "the first stage holds no row: 0.1 of 8 rows; use a larger fraction or more data"),
        ],
        ids=["no_epoch_0", "empty", "negative_epoch", "shrinks", "fraction_0", "fraction_over_1", "no_row"],
    )
    def test_schedule(self, set_up, schedule, message):
        refused(message, set_up, ROWS, schedule=schedule)

    @pytest.mark.parametrize(("prompt", "whole"), [(64, 64), (65, 64)], ids=["equal", "longer"])
    def test_no_room_for_a_response(self, set_up, prompt, whole):
        lengths = {"max_prompt_length": prompt, "max_length": whole}
        refused(f"max_prompt_length must be smaller .* {prompt} and {whole}$", set_up, ROWS, **lengths)

    def test_no_student(self, set_up):
        refused(r"needs a student .*: pass student=, .*schedule=\{0: 1.0\}", set_up, ROWS, student=None)

    def test_no_tokenizer(self, set_up):
        refused("needs a tokenizer: pass tokenizer=", set_up, ROWS, tokenizer=None)

    def test_no_chat_template(self, set_up):
        refused("no chat template; use a PromptTemplate", set_up, ROWS, template=ChatTemplate())

    def test_ties(self, set_up):
        refused("ties must be 'average' or 'order', but is 'random'", set_up, ROWS, ties="random")

    @pytest.mark.parametrize("setting", ["batch_size", "reflection_tokens"])
    @pytest.mark.parametrize("size", [0, -1])
    def test_batch_size(self, set_up, setting, size):
        refused(f"{setting}.*{size}", set_up, ROWS, **{setting: size})


class TestScoresOfAnotherRun:
    @pytest.mark.parametrize(
        ("data", "options", "part"),
        [
            (ROWS[:7], {}, "rows"),
            (ROWS, {"student": tiny_model(seed=1)}, "student"),
            (ROWS, {"decoding": Decoding(max_new_tokens=3)}, "decoding"),
        ],
        ids=["data", "student", "decoding"],
    )
    def test_are_refused(self, set_up, tmp_path, data, options, part):
        set_up(ROWS)
        message = refused(
            f"made with another {part}; point `scores` to a new folder", set_up, data, error=StorageError, **options
        )
        assert str(tmp_path / "scores") in message


class TestModule:
    def test_two_tokenizers(self, tmp_path):
        tokenizers = {"student": ByT5Tokenizer(), "teacher": ByT5Tokenizer()}
        tokenizers["teacher"].add_tokens(["<new>"])
        for name, tokenizer in tokenizers.items():
            tiny_model().save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
        module = KDLightningModule(*(Pretrained(str(tmp_path / name)) for name in tokenizers))
        refused("different tokenizers .*choose two models of one family", module.configure_model)

    @pytest.mark.parametrize("weight", [-0.1, 1.2])
    def test_weight_out_of_range(self, student, teacher, weight):
        refused(
            rf"kd_weight must lie in \[0, 1\], but is {weight}$", KDLightningModule, student, teacher, kd_weight=weight
        )

    def test_no_teacher(self, student):
        refused(
            "kd_weight 0.5 needs a teacher; give one, or set kd_weight to 0", KDLightningModule, student, kd_weight=0.5
        )
