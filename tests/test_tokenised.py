import threading
import warnings

import datasets
import pytest
from datasets import Dataset
from tiny import in_other_order, make_rows
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from srd_lightning.data import tokenization as tokenised_module
from srd_lightning.data.batches import collate
from srd_lightning.data.templates import ChatTemplate, PromptTemplate
from srd_lightning.data.tokenization import tokenize

PLAIN = PromptTemplate(with_input="{instruction} {input}: ", without_input="{instruction}: ")
ROWS = make_rows(6)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "srd_lightning"


def tokenised(tokenizer, rows, template=PLAIN, **lengths):
    return tokenize(Dataset.from_list(rows), tokenizer, template, **lengths)


def merging_tokenizer(bos=False, normalizer=None):
    """Byte pairs with one merge, "a" and "b" to "ab"; puts ``<s>`` in front if asked."""
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    fast = Tokenizer(models.BPE(vocab, [("a", "b")]))
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    fast.add_special_tokens(["<s>", "</s>"])
    if bos:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


class TestTokenize:
    def test_labels_are_the_response_and_the_end(self, tokenizer):
        rows, _ = tokenised(tokenizer, ROWS)
        labels = collate(rows.to_list(), pad_token_id=0)["labels"]
        for row, given in zip(labels.tolist(), ROWS, strict=True):
            assert tokenizer.decode([label for label in row if label != -100]) == given["output"] + tokenizer.eos_token

    def test_input_ids_are_prompt_response_and_end(self, tokenizer):
        rows, _ = tokenised(tokenizer, [{"instruction": "Hi", "output": "é"}])
        bytes_of = [byte + 3 for byte in "Hi: é".encode()]
        assert rows[0]["input_ids"] == [*bytes_of, 1]
        assert rows[0]["prompt_length"] == 4

    def test_texts_and_ids_are_kept(self, tokenizer):
        rows, _ = tokenised(tokenizer, [{"id": 7, "instruction": "Add", "input": "1", "output": "2"}])
        assert (rows[0]["id"], rows[0]["prompt"], rows[0]["response"]) == ("7", "Add 1: ", "2")

    def test_columns(self, tokenizer):
        rows, _ = tokenised(tokenizer, [{"prompt": "Hi", "response": "a", "cut": 1, "drop": "x", "input_ids": [0]}])
        assert rows.column_names == ["id", "prompt", "response", "input_ids", "prompt_length", "length"]
        assert rows[0]["prompt"] == "Hi: "
        assert rows[0]["length"] == len(rows[0]["input_ids"]) == len("Hi: a") + 1

    def test_a_prompt_without_tokens_is_dropped_and_counted(self, tokenizer):
        template = PromptTemplate("{instruction}{input}", "{instruction}")
        texts = [{"instruction": "", "output": "a"}, {"instruction": "b", "output": "a"}]
        rows, report = tokenised(tokenizer, texts, template)
        assert rows["prompt"][:] == ["b"]
        assert dict(report.dropped) == {"empty prompt": 1}

    def test_no_token_spans_the_border(self):
        tokenizer = merging_tokenizer()
        assert tokenizer("aab")["input_ids"] == [2, 4]
        template = PromptTemplate("{instruction}{input}", "{instruction}")
        rows, _ = tokenised(tokenizer, [{"instruction": "aa", "output": "bab"}], template)
        assert rows[0]["input_ids"] == [2, 2, 3, 4, 1]
        assert rows[0]["prompt_length"] == 2

    @pytest.mark.parametrize(
        ("tokenizer", "prompt", "ids"),
        [
            (merging_tokenizer(bos=True), "ab", [0, 4, 2, 1]),
            (merging_tokenizer(bos=True), "<s>ab", [0, 4, 2, 1]),
            (merging_tokenizer(bos=False), "ab", [4, 2, 1]),
        ],
        ids=["put_in_front", "not_doubled", "not_the_tokenizers_habit"],
    )
    def test_beginning_token(self, tokenizer, prompt, ids):
        template = PromptTemplate("{instruction}{input}", "{instruction}")
        rows, _ = tokenised(tokenizer, [{"instruction": prompt, "output": "a"}], template)
        assert rows[0]["input_ids"] == ids
        assert rows[0]["prompt_length"] == len(ids) - 2

    def test_chat_prompt_equals_the_tokenizers_own(self):
        tokenizer = merging_tokenizer(bos=True)
        tokenizer.chat_template = "<s>{% for turn in messages %}{{ turn.content }}{% endfor %}"
        turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "b"}]
        rows, _ = tokenised(tokenizer, [{"messages": turns}], ChatTemplate().bind(tokenizer))
        own = tokenizer.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert rows[0]["input_ids"] == [*own, 3, 1]

    @pytest.mark.parametrize("silent", ["user", "assistant"])
    def test_a_message_without_content_is_named(self, tokenizer, silent):
        turns = [{"role": role, "content": None if role == silent else "Hi"} for role in ("user", "assistant")]
        with pytest.raises(ValueError, match=r"^train row 0 \(id a\): .*content"):
            tokenised(tokenizer, [{"id": "a", "messages": turns}])

    def test_long_responses_are_cut_and_counted(self, tokenizer):
        given = [{"instruction": "Hi", "output": output} for output in ("ab", "abc", "abcdef")]
        rows, report = tokenised(tokenizer, given, max_length=7, max_prompt_length=4)
        assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["Hi: ab</s>", "Hi: abc", "Hi: abc"]
        assert (report.rows, report.cut, report.dropped.total()) == (3, 2, 0)

    def test_long_prompts_are_dropped_and_counted(self, tokenizer):
        given = [{"instruction": instruction, "output": "a"} for instruction in ("ab", "abc", "abcd")]
        rows, report = tokenised(tokenizer, given, max_prompt_length=5)
        assert list(rows["prompt"]) == ["ab: ", "abc: "]
        assert report.dropped == {"prompt over 5 tokens": 1}

    @pytest.mark.parametrize("output", ["", " \n"], ids=["empty", "blank"])
    def test_empty_responses_are_dropped_and_counted(self, tokenizer, output):
        rows, report = tokenised(
            tokenizer, [{"instruction": "a", "output": output}, {"instruction": "b", "output": "c"}]
        )
        assert list(rows["prompt"]) == ["b: "]
        assert report.dropped == {"empty response": 1}

    def test_a_dropped_row_is_not_counted_as_cut(self, tokenizer):
        given = [{"instruction": "abcdef", "output": "abcdef"}, {"instruction": "a", "output": "b"}]
        _, report = tokenised(tokenizer, given, max_length=6, max_prompt_length=5)
        assert (report.rows, report.cut, report.dropped.total()) == (2, 0, 1)

    def test_report_in_one_line(self, tokenizer):
        given = [{"instruction": "a", "output": ""}, {"instruction": "a", "output": "bcd"}]
        _, report = tokenised(tokenizer, given, max_length=5, max_prompt_length=4)
        assert str(report) == "2 rows; dropped: 1 empty response; responses cut to max_length: 1"


class OwnTemplate(PromptTemplate):
    """May be edited between two runs."""


def with_token(tokenizer):
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def with_chat_template(tokenizer, text):
    tokenizer.chat_template = text
    return tokenizer


TEXTS = Dataset.from_list([{"instruction": f"{'ab' * row}", "output": "Ab" * (7 - row)} for row in range(1, 6)])
CHAT = "{% for turn in messages %}{{ turn.content }}{% endfor %}"


def basis():
    """What tokens are made of; every test begins with objects of its own."""
    tokenizer = with_chat_template(merging_tokenizer(), CHAT)
    template = PromptTemplate("{instruction}{input}", "{instruction}")
    return {"rows": TEXTS, "tokenizer": tokenizer, "template": template, "max_length": 7, "max_prompt_length": 4}


CHANGES = {
    "text": lambda: {"rows": TEXTS.map(lambda row: {"output": row["output"] + "b"})},
    "order": lambda: {"rows": in_other_order(TEXTS)},
    "a_row_less": lambda: {"rows": TEXTS.select(range(4))},
    "ids": lambda: {"rows": TEXTS.add_column("id", list("abcde"))},
    "max_length": lambda: {"max_length": 8},
    "max_prompt_length": lambda: {"max_prompt_length": 3},
    "template": lambda: {"template": PromptTemplate("{instruction}{input}", "a{instruction}")},
    "kind_of_template": lambda: {"template": ChatTemplate().bind(with_chat_template(merging_tokenizer(), CHAT))},
    "vocabulary": lambda: {"tokenizer": with_chat_template(with_token(merging_tokenizer()), CHAT)},
    "rules": lambda: {"tokenizer": with_chat_template(merging_tokenizer(normalizer=normalizers.Lowercase()), CHAT)},
    "beginning": lambda: {"tokenizer": with_chat_template(merging_tokenizer(bos=True), CHAT)},
    "chat_template": lambda: {"tokenizer": with_chat_template(merging_tokenizer(), "b" + CHAT)},
}


class TestReuse:
    @pytest.fixture
    def made(self, monkeypatch):
        """The numbers of the rows that were tokenised, run after run."""
        rows, make = [], tokenised_module._tokenize_batch

        def count(batch, indices, **options):
            rows.extend(indices)
            return make(batch, indices, **options)

        monkeypatch.setattr(tokenised_module, "_tokenize_batch", count)
        return rows

    def test_a_second_run_tokenises_nothing_and_gives_the_same(self, made):
        first, report = tokenize(**basis())
        again, same_report = tokenize(**basis() | {"rows": Dataset.from_list(TEXTS.to_list())})
        assert made == list(range(5))
        assert again.to_list() == first.to_list()
        assert again.features == first.features
        assert same_report == report
        assert (report.rows, report.cut, report.dropped) == (5, 4, {"prompt over 4 tokens": 1})

    @pytest.mark.parametrize("change", CHANGES)
    def test_what_changed_is_tokenised_anew(self, made, change, tmp_path, monkeypatch):
        tokenize(**basis())
        changed = basis() | CHANGES[change]()
        found, report = tokenize(**changed)
        assert len(made) == 5 + len(changed["rows"])
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "empty")
        expected, expected_report = tokenize(**changed)
        assert (found.to_list(), report) == (expected.to_list(), expected_report)

    def test_a_new_version_of_the_code_tokenises_anew(self, made, monkeypatch):
        tokenize(**basis())
        monkeypatch.setattr(tokenised_module, "VERSION", tokenised_module.VERSION + 1)
        tokenize(**basis())
        assert len(made) == 10

    def test_a_tokenizer_that_was_used_is_the_same(self, made):
        tokenize(**basis())
        again = basis()
        again["tokenizer"](["ab", "a"], truncation=True, max_length=1)
        tokenize(**again)
        assert len(made) == 5

    def test_a_template_of_ones_own_is_code_and_never_reused(self, made):
        own = OwnTemplate("{instruction}{input}", "{instruction}")
        for _ in range(2):
            tokenize(**basis() | {"template": own})
        assert len(made) == 10

    def test_a_format_of_ones_own_is_code_and_never_reused(self, made):
        for add in ("a", "b"):
            rows = TEXTS.with_transform(lambda batch, add=add: {n: [text + add for text in batch[n]] for n in batch})
            found, _ = tokenize(**basis() | {"rows": rows})
            assert all(text.endswith(add) for text in found["prompt"])

    def test_can_be_turned_off(self, made):
        datasets.disable_caching()
        try:
            for _ in range(2):
                tokenize(**basis())
        finally:
            datasets.enable_caching()
        assert len(made) == 10

    @pytest.mark.parametrize("left", [0.0, 0.3, 0.6, 0.95])
    def test_a_file_that_was_cut_is_noticed(self, made, cache, left):
        expected, _ = tokenize(**basis())
        expected = expected.to_list()
        (file,) = cache.glob("*.arrow")
        content = file.read_bytes()
        file.unlink()  # the rows above are mapped
        file.write_bytes(content[: int(left * len(content))])
        with pytest.warns(UserWarning, match=f"{file.name} is damaged; its rows are tokenised again"):
            assert tokenize(**basis())[0].to_list() == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tokenize(**basis())[0].to_list() == expected
        assert len(made) == 10

    def test_a_file_with_fewer_whole_batches_is_noticed(self, made, cache):
        tokenize(**basis())
        fewer, _ = tokenize(**basis() | {"rows": TEXTS.select(range(3))})
        small, large = sorted(cache.glob("*.arrow"), key=lambda file: file.stat().st_size)
        small.replace(large)
        with pytest.warns(UserWarning, match="is damaged"):
            assert len(tokenize(**basis())[0]) == 4 > len(fewer)

    @pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, MemoryError])
    def test_what_a_run_left_that_ended_in_the_middle_is_not_used(self, cache, monkeypatch, end):
        """SystemExit leaves the half-written file where it is, as kill -9 does."""
        texts = Dataset.from_list([{"instruction": "a", "output": f"b{row}"} for row in range(1001)])
        make = tokenised_module._tokenize_batch

        def stop(batch, indices, **options):
            if indices[0] > 0:
                raise end
            return make(batch, indices, **options)

        with monkeypatch.context() as patch:
            patch.setattr(tokenised_module, "_tokenize_batch", stop)
            with pytest.raises(end):
                tokenize(**basis() | {"rows": texts})
        assert not list(cache.glob("*.arrow"))
        assert len(tokenize(**basis() | {"rows": texts})[0]) == 1001

    def test_of_two_at_a_time_one_tokenises_and_the_other_reads(self, made):
        together, found = threading.Barrier(2), []

        def run():
            parts = basis()
            together.wait()
            found.append(tokenize(**parts)[0].to_list())

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made == list(range(5))
        assert found[0] == found[1]
