from dataclasses import replace

import pytest
import torch
from tiny import PLAIN, in_other_order, make_rows, tiny_model, tokenised
from transformers import ByT5Tokenizer

from srd_lightning.curation.reflection import fingerprint
from srd_lightning.data.templates import ALPACA
from srd_lightning.models.generation import Decoding

GREEDY = Decoding(max_new_tokens=6)


class TestFingerprint:
    @pytest.fixture
    def made_of(self, model, tokenizer, data):
        def make(rows=data, model=model, tokenizer=tokenizer, template=ALPACA, decoding=GREEDY):
            return fingerprint(rows, model, tokenizer, template, decoding, "1")

        return make

    def test_is_the_same_for_the_rows_in_any_order(self, made_of, data):
        assert made_of(rows=in_other_order(data)) == made_of()

    def test_is_the_same_for_models_of_the_same_weights(self, made_of, model):
        assert made_of(model=tiny_model(initializer_range=0.3)) == made_of(model=model)

    def test_does_not_depend_on_the_mode(self, made_of, model):
        before = made_of()
        model.train()
        assert made_of() == before

    @pytest.mark.parametrize("part", ["rows", "student", "tokenizer", "template", "decoding"])
    def test_changes_in_the_part_that_changed(self, made_of, part):
        before = made_of()
        after = made_of(**CHANGES[part]())
        assert [name for name in before if before[name] != after[name]] == [part]

    @pytest.mark.parametrize("field", ["id", "instruction", "output"])
    def test_sees_one_field_of_one_row(self, made_of, tokenizer, field):
        rows = [{"id": str(number), **row} for number, row in enumerate(make_rows(5))]
        before = made_of(rows=tokenised(tokenizer, rows))
        rows[3][field] += "!"
        after = made_of(rows=tokenised(tokenizer, rows))
        assert [name for name in before if before[name] != after[name]] == ["rows"]

    @pytest.mark.parametrize("row", [0, 4])
    def test_sees_a_row_that_is_left_out(self, made_of, data, row):
        fewer = data.select([other for other in range(len(data)) if other != row])
        assert made_of(rows=fewer)["rows"] != made_of()["rows"]

    @pytest.mark.parametrize(
        "change",
        [
            {"max_new_tokens": 7},
            {"temperature": 0.5},
            {"top_p": 0.5},
            {"top_k": 5},
            {"no_repeat_ngram_size": 6},
            {"seed": 1},
            {"max_length_ratio": 2.0},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_sees_every_setting_of_the_decoding(self, made_of, change):
        assert made_of(decoding=replace(GREEDY, **change))["decoding"] != made_of()["decoding"]

    def test_sees_the_type_of_the_weights(self, made_of, model):
        before = made_of()
        assert made_of(model=model.bfloat16())["student"] != before["student"]

    def test_sees_one_bfloat16_weight(self, made_of, model):
        before = made_of(model=model.bfloat16())
        with torch.no_grad():
            model.lm_head.weight[3, 5] += 1
        assert made_of()["student"] != before["student"]

    def test_sees_the_chat_template(self, made_of, tokenizer):
        before = made_of()
        tokenizer.chat_template = "{{ messages }}"
        assert made_of()["template"] != before["template"]


def changed_weight():
    model = tiny_model(initializer_range=0.3)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-4
    return {"model": model}


def changed_tokenizer():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens(["<new>"])
    return {"tokenizer": tokenizer}


CHANGES = {
    "rows": lambda: {"rows": tokenised(ByT5Tokenizer(), make_rows(19))},
    "student": changed_weight,
    "tokenizer": changed_tokenizer,
    "template": lambda: {"template": PLAIN},
    "decoding": lambda: {"decoding": replace(GREEDY, temperature=1.0)},
}
