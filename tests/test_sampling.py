import math
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import PLAIN
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from srd_lightning import SRDDataModule, cli
from srd_lightning.data.samplers import LengthGrouped, Shuffled, batches_by_token_budget, length_grouped_order
from srd_lightning.errors import SettingError

sizes = {"number": st.integers(1, 300), "batch_size": st.integers(1, 9), "world_size": st.integers(1, 5)}


def skewed(number, seed=0):
    """Lengths of which few are large, as those of instructions are."""
    return np.random.default_rng(seed).lognormal(4, 1, number).clip(1, 1024).astype(np.int32)


def samplers(number, batch_size, world_size, epoch=0, seed=0, start=0):
    made = [
        LengthGrouped(range(number), skewed(number), batch_size, world_size, rank, seed, start)
        for rank in range(world_size)
    ]
    for sampler in made:
        sampler.set_epoch(epoch)
    return made


class TestOrder:
    @given(
        lengths=st.lists(st.integers(1, 50), max_size=300),
        group=st.integers(1, 20),
        window=st.integers(1, 6),
        seed=st.integers(-2, 2**40),
    )
    def test_is_windows_of_sorted_groups(self, lengths, group, window, seed):
        """Groups can be put back together to windows in which no length of one lies within another."""
        lengths = np.array(lengths, dtype=np.int32)
        order = length_grouped_order(lengths, group, seed, epoch=3, window=window)
        assert sorted(order.tolist()) == list(range(len(lengths)))
        groups = [lengths[order[first : first + group]] for first in range(0, len(order), group)]
        assert all((np.diff(rows) >= 0).all() for rows in groups)
        if len(groups) <= window:
            whole = sorted((rows for rows in groups if len(rows) == group), key=lambda rows: (rows[0], rows[-1]))
            assert all(shorter[-1] <= longer[0] for shorter, longer in pairwise(whole))

    @pytest.mark.parametrize(("number", "group"), [(40, 4), (43, 4), (3, 4)])
    def test_every_row_may_stand_in_any_group(self, number, group):
        """Also in the short one, and whatever its length is."""
        places = np.zeros((number, math.ceil(number / group)), dtype=int)
        for epoch in range(2000):
            order = length_grouped_order(np.arange(number), group, seed=0, epoch=epoch, window=3)
            places[order, np.arange(number) // group] += 1
        assert (places > 0).all()

    def test_lengths_do_not_drift_within_an_epoch(self):
        lengths = skewed(20_000)
        quarters = lengths[length_grouped_order(lengths, 8, seed=0, epoch=0)].reshape(4, -1).mean(axis=1)
        assert quarters == pytest.approx([lengths.mean()] * 4, rel=0.1)

    def test_other_rows_meet_in_another_epoch(self):
        pairs = []
        for epoch in (0, 1):
            order = length_grouped_order(skewed(4000), 8, seed=0, epoch=epoch)
            pairs.append({frozenset((a, b)) for rows in order.reshape(-1, 8).tolist() for a in rows for b in rows})
        assert len(pairs[0] & pairs[1]) < 4000 + 0.05 * len(pairs[0])  # of a row with itself, and by chance

    def test_rows_of_one_length_are_as_well_shuffled_as_without(self):
        order = length_grouped_order(np.ones(1000, dtype=np.int32), 4, seed=0, epoch=0)
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


class TestLengthGrouped:
    @given(**sizes)
    def test_rows_are_dealt(self, number, batch_size, world_size):
        order = length_grouped_order(skewed(number), batch_size * world_size, seed=0, epoch=0)
        found = [
            list(DataLoader(range(number), batch_size, sampler=sampler, collate_fn=list))
            for sampler in samplers(number, batch_size, world_size)
        ]
        assert found == references.deal(order.tolist(), batch_size, world_size)

    @given(**sizes)
    def test_rows_and_batches_are_those_of_a_plain_shuffle(self, number, batch_size, world_size):
        plain = [DistributedSampler(range(number), world_size, rank) for rank in range(world_size)]
        grouped = samplers(number, batch_size, world_size)
        assert [len(list(sampler)) for sampler in grouped] == [len(list(sampler)) for sampler in plain]
        assert [len(sampler) for sampler in grouped] == [len(sampler) for sampler in plain]
        seen, plainly_seen = (Counter(chain(*some)) for some in (grouped, plain))
        assert set(seen) == set(plainly_seen) == set(range(number))
        assert sorted(seen.values()) == sorted(plainly_seen.values())

    @given(**sizes, share=st.floats(0, 1))
    def test_goes_on_within_an_epoch(self, number, batch_size, world_size, share):
        for whole in samplers(number, batch_size, world_size):
            start = int(share * len(whole))
            rest = LengthGrouped(range(number), skewed(number), batch_size, world_size, whole.rank, start=start)
            assert list(rest) == list(whole)[start:]
            assert len(rest) == len(whole)

    @pytest.mark.parametrize("world_size", [1, 4])
    def test_pads_less(self, world_size):
        lengths, padding = skewed(5000), []
        for kind in (samplers(5000, 8, world_size), [Shuffled(range(5000), world_size, r) for r in range(world_size)]):
            batches = [lengths[rows].tolist() for s in kind for rows in DataLoader(range(5000), 8, sampler=s)]
            padding.append(references.share_of_padding(batches))
        grouped, plain = padding
        assert grouped < 0.15 < 0.5 < plain

    def test_all_processes_have_rows_of_like_length_at_a_time(self):
        longest = np.array([skewed(4096)[list(sampler)].reshape(-1, 8).max(axis=1) for sampler in samplers(4096, 8, 4)])
        assert np.median(longest.max(axis=0) / longest.min(axis=0)) < 1.05

    def test_depends_on_seed_and_epoch_only(self):
        (first,), (again,), (other_epoch,), (other_seed,) = (
            samplers(100, 4, 1, epoch, seed) for epoch, seed in ((1, 0), (1, 0), (2, 0), (1, 5))
        )
        np.random.seed(1)  # must not matter
        assert list(first) == list(again) == list(first)
        assert list(other_epoch) != list(first) != list(other_seed)


class TestShuffled:
    @given(number=sizes["number"], world_size=sizes["world_size"], epoch=st.integers(0, 5), seed=st.integers(-2, 9))
    def test_is_the_sampler_of_torch(self, number, world_size, epoch, seed):
        for rank in range(world_size):
            ours = Shuffled(range(number), world_size, rank, seed)
            theirs = DistributedSampler(range(number), world_size, rank, seed=seed)
            for sampler in (ours, theirs):
                sampler.set_epoch(epoch)
            assert list(ours) == list(theirs)

    def test_more_rows_than_a_piece(self, monkeypatch):
        monkeypatch.setattr("srd_lightning.data.samplers.PIECE", 7)
        assert list(Shuffled(range(40), 3, 1)) == list(DistributedSampler(range(40), 3, 1))
        assert list(Shuffled(range(40), 3, 1, start=9)) == list(DistributedSampler(range(40), 3, 1))[9:]


def test_batches_are_of_like_length():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    batches = list(batches_by_token_budget(lengths, 120))
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all(len(batch) * lengths[batch].max() <= 120 for batch in batches)


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([2, 2], 4, [[0, 1]]),  # exactly as many as may be
        ([2, 2, 2], 4, [[0, 1], [2]]),
        ([5], 4, [[0]]),  # a row that is longer goes alone
        ([5, 5], 4, [[0], [1]]),
        ([3, 1, 1], 3, [[1, 2], [0]]),
    ],
    ids=str,
)
def test_a_batch_holds_as_many_rows_as_fit(lengths, tokens, expected):
    assert [batch.tolist() for batch in batches_by_token_budget(np.array(lengths), tokens)] == expected


class ShortFirst(LengthGrouped):
    def order(self):
        return np.argsort(self.lengths, kind="stable")


class Rotated(DistributedSampler):
    """One of another library, which knows nothing of ours."""

    def __init__(self, dataset, lengths, batch_size, num_replicas, rank, seed):
        super().__init__(dataset, num_replicas, rank, seed=seed)

    def __iter__(self):
        size = self.num_replicas * self.num_samples
        return iter([(self.epoch + place) % len(self.dataset) for place in range(self.rank, size, self.num_replicas)])


def unseeded(dataset, lengths, batch_size, num_replicas, rank, seed):
    return Shuffled(dataset, num_replicas, rank, int(torch.randint(10**9, ())))


def to_one_rank(dataset, *_):
    return DistributedSampler(dataset, 1, 0)


def the_same_half(dataset, lengths, batch_size, num_replicas, *_):
    return DistributedSampler(dataset, num_replicas, 0)


class TestASamplerOfOnesOwn:
    @pytest.fixture
    def make(self, tokenizer, tmp_path):
        rows = [{"instruction": "Say.", "output": "a" * (1 + 7 * row % 10)} for row in range(10)]

        def make(sampler):
            return SRDDataModule(rows, tokenizer, template=PLAIN, schedule={0: 1.0}, batch_size=2, sampler=sampler)

        return make

    @pytest.mark.parametrize("kind", [ShortFirst, Rotated, lambda *what: Rotated(*what)])
    def test_decides_what_a_batch_is_and_is_resumed(self, make, kind):
        data = make(kind)
        data.setup("fit")
        lengths = np.array(data.rows["train"]["length"])
        order = np.roll(np.arange(10), -1) if kind is not ShortFirst else np.argsort(lengths, kind="stable")
        for start in (0, 3):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(1)
            loader.load_state_dict({"epoch": 1, "delivered": start})
            found = [batch["attention_mask"].sum(dim=1).tolist() for batch in loader]
            assert found == lengths[order].reshape(5, 2)[start:].tolist()
            assert loader.ids(2) == data.rows["train"].select(order[4:6])["id"][:]
            assert len(loader) == 5

    @pytest.mark.parametrize(
        ("sampler", "said"),
        [
            (lambda rows: rows, "^sampler must take what `MakeSampler` says, in its order: "),
            (lambda *what: RandomSampler(what[0]), "must return a DistributedSampler, .* a RandomSampler$"),
            (to_one_rank, "^sampler must give each of 2 ranks 5 of 10 rows, but gives 10$"),
            (the_same_half, "^sampler must let the ranks see each row of an epoch once, but gives rows"),
            (unseeded, "must give the same rows for the same seed and epoch, or no run can be resumed"),
        ],
    )
    def test_that_cannot_work_is_refused_when_it_is_given(self, make, sampler, said):
        with pytest.raises(SettingError, match=said):
            make(sampler)

    @pytest.mark.parametrize("name", ["LengthGrouped", "srd_lightning.data.samplers.plain_shuffle"])
    def test_on_the_command_line(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = ["--config", str(Path(__file__).parents[1] / "configs" / "debug.yaml")]
        data = cli.parse([*config, f"--data.sampler={name}"]).datamodule
        sampler = data.sampler(range(4), np.arange(4), 2, 2, 1, 0)
        assert len(list(sampler)) == 2
