import unicodedata

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from srd_lightning.data.contamination import Contamination, find_contamination, normalize


def plain(text):
    letters = [c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text.lower()]
    return " ".join("".join(letters).split())


def found(**splits):
    return find_contamination({split: Dataset.from_dict({"prompt": prompts}) for split, prompts in splits.items()})


class TestNormalize:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("What IS it?", "what is it"),
            (" a,b--c\n\td_e ", "a b c d e"),
            ("1.5 + x²", "1 5 x²"),
            ("ÉTÉ, Straße; Ωμέγα: 東京。٣", "été straße ωμέγα 東京 ٣"),
            ("की, का?", "की का"),
            ("e\u0301!", "e\u0301"),
            ("?!", ""),
            ("", ""),
        ],
        ids=["case", "runs", "digits", "scripts", "vowel_signs", "accents", "symbols_only", "empty"],
    )
    def test_by_hand(self, text, expected):
        assert normalize(text) == expected

    @given(st.text())
    def test_equals_the_plain_loop(self, text):
        assert normalize(text) == plain(text)


class TestEqualPrompts:
    PROMPTS = st.lists(st.sampled_from(["Why?", "why", "WHY not", "why, not!", "Où?", "où", "ou", "?"]), max_size=8)

    @given(PROMPTS, PROMPTS, PROMPTS)
    def test_equals_the_double_loop(self, train, dev, test):
        hygiene = found(train=train, dev=dev, test=test)
        same = [[plain(one) == plain(other) for other in train] for one in train]
        assert hygiene.duplicates == [row for row in range(len(train)) if any(same[row][:row])]
        for split, prompts in {"dev": dev, "test": test}.items():
            pairs = [
                (r, s) for r, one in enumerate(train) for s, other in enumerate(prompts) if plain(one) == plain(other)
            ]
            assert hygiene.leaks[split] == sorted({row for row, _ in pairs})
            assert hygiene.leaked_prompts[split] == len({row for _, row in pairs})

    def test_every_row_of_a_repeated_held_out_prompt_is_hit(self):
        hygiene = found(train=["Why?", "How?", "why"], test=["WHY", "why!", "Who?"])
        assert (hygiene.leaks, hygiene.leaked_prompts) == ({"test": [0, 2]}, {"test": 2})

    def test_without_held_out_rows(self):
        assert found(train=["Why?"], test=[]) == Contamination({"train": 1, "test": 0}, [], {"test": []}, {"test": 0})

    def test_without_held_out_splits(self):
        assert found(train=["Why?", "why"]) == Contamination({"train": 2}, [1], {}, {})

    def test_rows_count_as_they_were_selected(self):
        rows = Dataset.from_dict({"prompt": ["a", "b", "c", "b"], "response": ["", "", "", ""]})
        hygiene = find_contamination({"train": rows.select([3, 2, 1]), "test": rows.select([2])})
        assert (hygiene.duplicates, hygiene.leaks, hygiene.leaked_prompts) == ([2], {"test": [1]}, {"test": 1})

    def test_rows_count_on_over_batches(self):
        prompts = [f"Say {row}." for row in range(2500)]
        hygiene = found(train=[*prompts, "say 1999"], test=["Say 2100"])
        assert (hygiene.duplicates, hygiene.leaks) == ([2500], {"test": [2100]})

    def test_training_data_must_be_named(self):
        with pytest.raises(ValueError, match="'train' among them, but are dev, test;"):
            found(dev=["a"], test=["a"])


class TestContamination:
    FOUND = Contamination(
        rows={"train": 9, "dev": 3, "test": 4},
        duplicates=[1, 8],
        leaks={"dev": [5], "test": [2, 5]},
        leaked_prompts={"dev": 1, "test": 3},
    )

    def test_reasons(self):
        assert self.FOUND.reasons() == {2: "prompt of test", 5: "prompt of dev"}

    def test_in_lines(self):
        assert str(self.FOUND).splitlines() == [
            "train: 2 of 9 prompts repeat that of an earlier row",
            "dev: 1 of its 3 prompts also in train, in 1 of 9 rows",
            "test: 3 of its 4 prompts also in train, in 2 of 9 rows",
        ]
