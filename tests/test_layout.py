"""What is known of a batch before it leaves the host: against plain loops, and only while it is true."""

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import QUIET, lively_model, make_rows, tiny_model, tokenised
from transformers import ByT5Tokenizer

from srd_lightning import KDLightningModule, SRDDataModule
from srd_lightning.data.batches import collate
from srd_lightning.data.layout import Inspected, LaidOut, lay_out
from srd_lightning.errors import DataError
from srd_lightning.evaluation.weighted_mean import WeightedMean
from srd_lightning.training.step import DistillationStep


def batch_of(number=5):
    return collate(tokenised(ByT5Tokenizer(), make_rows(number)).to_list(), pad_token_id=0)


rows = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=6)


@given(rows, st.booleans())
def test_positions_and_targets_are_those_of_a_loop(lengths, pads_left):
    width = max(map(sum, lengths))
    ids, mask, labels = (torch.zeros(len(lengths), width, dtype=torch.int64) for _ in range(3))
    labels -= 100
    expected, packed, place = [], [], 0
    for row, (prompt, response) in enumerate(lengths):
        start = width - prompt - response if pads_left else 0
        for column in range(start, start + prompt + response):
            ids[row, column], mask[row, column] = 10 * row + column, 1
            if column >= start + prompt:
                labels[row, column] = ids[row, column]
                expected.append((row * width + column - 1, int(ids[row, column])))
                packed.append(place - 1)
            place += 1
    layout = lay_out({"input_ids": ids, "attention_mask": mask, "labels": labels}, packing=True)
    assert list(zip(layout.positions.tolist(), layout.targets.tolist(), strict=True)) == expected
    assert layout.packed.positions.tolist() == packed
    assert layout.packed.position_ids.tolist() == [column for pair in lengths for column in range(sum(pair))]
    assert ids.flatten()[layout.packed.tokens].tolist() == ids[mask == 1].tolist()
    assert layout.right_padded == (not pads_left or len(set(map(sum, lengths))) == 1)


def test_to_a_model_it_is_the_batch():
    batch, model = batch_of(), tiny_model()
    assert torch.equal(model(**LaidOut(batch, lay_out(batch))).logits, model(**batch).logits)


CHANGES = {
    "another tensor": lambda batch: {**batch, "labels": batch["labels"].clone()},
    "in place": lambda batch: (batch["labels"][0].fill_(-100), batch)[1],
    "other ids": lambda batch: {**batch, "input_ids": batch["input_ids"].flip(0)},
    "no field": lambda batch: {name: values for name, values in batch.items() if name != "labels"},
    "a tuple": lambda batch: tuple(batch.values()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_batch_that_was_changed_is_looked_at_again(change):
    batch = batch_of()
    inspected = Inspected.of(batch, lay_out(batch))
    assert inspected.is_of(dict(batch.items()))  # as DDP makes it anew
    assert not inspected.is_of(change(batch))


def test_labels_that_are_changed_late_are_those_that_are_learnt():
    batch = batch_of()
    step = DistillationStep().attach(tiny_model(), None)
    step.expect(batch, step.inspect(batch))
    batch["labels"][1:] = -100
    found = step.laid_out(batch, "batch").layout
    assert found.targets.tolist() == batch["labels"][0][batch["labels"][0] != -100].tolist()


def test_every_batch_is_looked_at_before_it_leaves_the_host():
    """Also where another device would have to be asked for what is in it."""
    step, batch = DistillationStep().attach(tiny_model(), None), batch_of()
    assert step.inspect({**batch, "input_ids": batch["input_ids"] + 300}) is None
    with pytest.raises(DataError, match="batch 7: input_ids holds"):
        step.laid_out({**batch, "input_ids": batch["input_ids"] + 300}, "batch 7")


@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.integers(0, 5)), min_size=1))
def test_a_mean_counts_each_token_once(parts):
    mean = WeightedMean()
    for value, weight in parts:
        mean.update(torch.tensor(value), weight)
    every = [value for value, weight in parts for _ in range(weight)]
    if every:
        torch.testing.assert_close(float(mean.compute()), sum(every) / len(every), rtol=1e-4, atol=1e-4)
        mean.update(torch.nan, 1)
    assert mean.compute().isnan()


def test_a_mean_stays_exact_in_a_module_of_half_precision():
    module = torch.nn.ModuleList([WeightedMean()]).to(torch.bfloat16)
    for value in (2.0, 3.0):
        for _ in range(300):
            module[0].update(torch.tensor(value), 300)
    assert module[0].compute() == 2.5


class MovesInPlace(dict):
    """As `transformers.BatchEncoding` does."""

    def to(self, device, **_):
        self["moved"] = torch.ones(())
        return self


def test_a_batch_that_moves_in_place_is_looked_at_before(monkeypatch):
    module, batch = KDLightningModule(tiny_model(0), lively_model(1)), MovesInPlace(batch_of())
    module.configure_model()
    seen = []
    monkeypatch.setattr(module.step, "inspect", lambda batch: seen.append("moved" in batch))
    module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert (seen, "moved" in batch) == ([False], True)


def test_memory_is_pinned_for_the_accelerator_of_the_trainer(monkeypatch, tmp_path):
    """Not because there happens to be a GPU, which would be woken up."""
    data = SRDDataModule({"train": make_rows(6), "validation": make_rows(2)}, ByT5Tokenizer(), schedule={0: 1.0})
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(KDLightningModule(tiny_model(0), lively_model(1)), datamodule=data)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not data.train_dataloader().pin_memory
