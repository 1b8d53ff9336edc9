import random
import sys
import unicodedata

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from srd_lightning.data.contamination import Hygiene, inspect, normalize
from srd_lightning.data.templates import ALPACA
from srd_lightning.errors import SettingError


def plain(text):
    letters = [c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text.lower()]
    return " ".join("".join(letters).split())


def jaccard(one, other):
    def shingles(text):
        words = plain(text).split()
        return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}

    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def found(near=None, **splits):
    return inspect({split: Dataset.from_dict({"prompt": prompts}) for split, prompts in splits.items()}, near=near)


def ask(question, context=""):
    return ALPACA({"instruction": question, "input": context, "output": ""}).prompt


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
        assert hygiene.near_leaks == {}

    def test_every_row_of_a_repeated_held_out_prompt_is_hit(self):
        hygiene = found(train=["Why?", "How?", "why"], test=["WHY", "why!", "Who?"])
        assert (hygiene.leaks, hygiene.leaked_prompts) == ({"test": [0, 2]}, {"test": 2})

    def test_without_held_out_rows(self):
        assert found(train=["Why?"], test=[]) == Hygiene({"train": 1, "test": 0}, [], {"test": []}, {"test": 0}, {})

    def test_without_held_out_splits(self):
        assert found(train=["Why?", "why"]) == Hygiene({"train": 2}, [1], {}, {}, {})

    def test_rows_count_as_they_were_selected(self):
        rows = Dataset.from_dict({"prompt": ["a", "b", "c", "b"], "response": ["", "", "", ""]})
        hygiene = inspect({"train": rows.select([3, 2, 1]), "test": rows.select([2])})
        assert (hygiene.duplicates, hygiene.leaks, hygiene.leaked_prompts) == ([2], {"test": [1]}, {"test": 1})

    def test_rows_count_on_over_batches(self):
        prompts = [f"Say {row}." for row in range(2500)]
        hygiene = found(train=[*prompts, "say 1999"], test=["Say 2100"])
        assert (hygiene.duplicates, hygiene.leaks) == ([2500], {"test": [2100]})

    def test_training_data_must_be_named(self):
        with pytest.raises(ValueError, match="'train' among them, but are dev, test;"):
            found(dev=["a"], test=["a"])


class TestNearPrompts:
    @pytest.mark.parametrize("near", [0.6, 0.8, 1.0])
    def test_equals_the_double_loop(self, near):
        draw = random.Random(0)
        held_out = {split: [" ".join(draw.choices("abcde", k=8)) for _ in range(60)] for split in ("dev", "test")}
        prompts = held_out["dev"] + held_out["test"]
        train = prompts[::7] + [f"{draw.choice('abc')} {prompt}" for prompt in prompts]
        train += [prompt[:-6] + " ".join(draw.choices("abcde", k=4)) for prompt in prompts]
        train += ["d e a b c d e a", "a b c a b c", "b c a b c a b"]
        held_out["dev"].append("d e a b c d e a b c")
        held_out["test"].append("a b c a b c a b c")
        expected = {
            split: [
                row
                for row, one in enumerate(train)
                if one not in others and any(jaccard(one, other) >= near for other in others)
            ]
            for split, others in held_out.items()
        }
        assert all(expected.values())
        assert found(near, train=train, **held_out).near_leaks == expected

    @pytest.mark.parametrize(("near", "rows"), [(0.8, [0]), (0.81, [])], ids=["as_similar", "less_similar"])
    def test_the_threshold_is_included(self, near, rows):
        """Of the five sequences in "a b c d e f g", four stand in "a b c d e f"."""
        assert found(near, train=["A b c, d e f?"], test=["a b c d e f g"]).near_leaks == {"test": rows}

    def test_an_equal_prompt_is_not_a_near_one(self):
        hygiene = found(0.7, train=["a b c d e f"], test=["a b c d e f", "a b c d e f g"], dev=["b c d e f"])
        assert (hygiene.leaks, hygiene.near_leaks) == ({"test": [0], "dev": []}, {"test": [], "dev": [0]})

    def test_rows_count_as_they_were_selected(self):
        rows = Dataset.from_dict({"prompt": ["a b c d e f", "x", "a b c d e f g", "y"]})
        hygiene = inspect({"train": rows.select([3, 1, 0]), "test": rows.select([1, 2])}, near=0.8)
        assert hygiene.near_leaks == {"test": [2]}

    def test_prompts_of_few_words(self):
        hygiene = found(0.1, train=["hi", "hi you", "?", "hi you there"], test=["hi", "you", "!"])
        assert (hygiene.leaks, hygiene.near_leaks) == ({"test": [0, 2]}, {"test": []})

    def test_the_words_of_the_template_do_not_count(self):
        train = [ask(f"Name {row}.", f"Some {row}" * (row % 4 == 0)) for row in range(60)]
        train += [ask("Who was the first man on the moon, and when?"), ask("Add these numbers up.", "1 2 3 4 5 6 7")]
        test = [ask("Who was the first man on the moon?"), ask("Add these numbers.", "1 2 3 4 5 6 7")]
        unrelated = [ask("Now sing."), ask("Now sing.", "So.")]
        assert min(jaccard(train[1], unrelated[0]), jaccard(train[4], unrelated[1])) > 0.6
        assert found(0.4, train=train, test=test, dev=unrelated).near_leaks == {"test": [60, 61], "dev": []}

    def test_every_template_counts_wherever_its_rows_stand(self):
        train = [ask(f"Name {row}.", "It." * (row >= 1500)) for row in range(2000)]
        assert found(0.4, train=train, test=[ask("Now sing.", "So.")]).near_leaks == {"test": []}

    def test_a_prompt_of_the_template_alone(self):
        train = [*(f"please answer this question {row}" for row in range(20)), "please answer this question"]
        hygiene = found(0.1, train=train, test=["Please answer this question!"])
        assert (hygiene.leaks, hygiene.near_leaks) == ({"test": [20]}, {"test": []})

    def test_a_repeated_prompt_is_no_template(self):
        assert found(0.8, train=["a b c d e f"] * 20, test=["a b c d e f g"]).near_leaks == {"test": [*range(20)]}

    @pytest.mark.parametrize("near", [0, -0.5, 1.01])
    def test_no_similarity(self, near):
        with pytest.raises(ValueError, match=rf"in \(0, 1\], such as 0.8, but is {near}$"):
            found(near, train=["a"])

    def test_the_missing_library_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasketch", None)
        found(train=["a"], test=["a"])
        with pytest.raises(SettingError, match=r'pip install "srd-lightning\[near-duplicates\]"$'):
            found(0.8, train=["a"], test=["a"])


class TestHygiene:
    HYGIENE = Hygiene(
        rows={"train": 9, "dev": 3, "test": 4},
        duplicates=[1, 8],
        leaks={"dev": [5], "test": [2, 5]},
        leaked_prompts={"dev": 1, "test": 3},
        near_leaks={"dev": [2, 4, 7], "test": [4]},
    )

    def test_reasons(self):
        assert self.HYGIENE.reasons() == {
            2: "prompt of test",
            4: "nearly a prompt of dev",
            5: "prompt of dev",
            7: "nearly a prompt of dev",
        }

    def test_contaminated_rows_stand_once_and_in_order(self):
        assert self.HYGIENE.contaminated() == [2, 4, 5, 7]

    def test_in_lines(self):
        assert str(self.HYGIENE).splitlines() == [
            "train: 2 of 9 prompts repeat that of an earlier row",
            "dev: 1 of its 3 prompts also in train, in 1 of 9 rows",
            "test: 3 of its 4 prompts also in train, in 2 of 9 rows",
            "dev: 3 of 9 train rows nearly equal one of its prompts",
            "test: 1 of 9 train rows nearly equal one of its prompts",
        ]
