import lightning as L
import pytest
import torch
from tiny import QUIET, lively_model, make_rows, tiny_model, tokenised
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer

from srd_lightning import KDLightningModule
from srd_lightning.data.batches import check_batch, collate
from srd_lightning.errors import DataError


def batch_of(number=3):
    return collate(tokenised(ByT5Tokenizer(), make_rows(number)).to_list(), pad_token_id=0)


def without(*names):
    return lambda batch: {name: values for name, values in batch.items() if name not in names}


def with_(**changed):
    return lambda batch: {**batch, **{name: change(batch[name]) for name, change in changed.items()}}


def shifted(batch):
    labels = torch.full_like(batch["labels"], -100)
    labels[:, :-1] = batch["labels"][:, 1:]
    return {**batch, "labels": labels}


WRONG = {
    "tuple": (lambda batch: tuple(batch.values()), "must be a mapping with .*, but is a tuple; let the collate"),
    "no mask": (without("attention_mask"), r"has no attention_mask, only input_ids, labels; .* torch\.ones_like"),
    "no labels": (without("labels"), "has no labels, only input_ids, attention_mask"),
    "nothing": (without("labels", "input_ids"), "has no input_ids and no labels, only attention_mask"),
    "float": (with_(input_ids=torch.Tensor.float), r"but input_ids is torch\.float32 \[3, \d+\]"),
    "list": (with_(labels=torch.Tensor.tolist), "but labels is list"),
    "one row": (with_(labels=lambda values: values[0]), r"but labels is torch\.int64 \[\d+\]"),
    "shorter": (with_(labels=lambda values: values[:, 1:]), r"but input_ids is \[3, (\d+)\], .*labels is \[3, \d+\]"),
    "mask of -inf": (
        with_(attention_mask=lambda mask: mask * 5),
        "attention_mask must be 1 at tokens and 0 at padding",
    ),
    "-1 masks": (
        with_(labels=lambda labels: labels.where(labels != -100, -1)),
        "labels holds -1, which is no token: the model knows 0 to 383, and -100 marks what is not learnt",
    ),
    "beyond": (
        with_(input_ids=lambda ids: ids + 300),
        r"input_ids holds \d+, which is no token: the model knows 0 to 383",
    ),
    "shifted": (shifted, "labels are shifted already: each is the token after its position"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_what_is_no_batch_is_refused_by_what_it_lacks(change, said):
    with pytest.raises(DataError, match=f"training batch 7: .*{said}") as caught:
        check_batch(change(batch_of()), 384, "training batch 7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch,
        with_(attention_mask=torch.Tensor.bool, input_ids=torch.Tensor.int),
        with_(labels=lambda labels: torch.full_like(labels, -100)),
        with_(input_ids=lambda ids: torch.full_like(ids, 7), labels=lambda labels: torch.full_like(labels, 7)),
        lambda batch: {name: values.flip(1) for name, values in batch.items()},
        lambda batch: {**batch, "teacher_hidden": torch.zeros(3)},
        lambda batch: {name: values[:, :1] for name, values in batch.items()},
    ],
    ids=["ours", "other types", "nothing learnt", "one token repeated", "padded left", "more", "one position"],
)
def test_what_is_a_batch_is_left_as_it_is(change):
    batch = change(batch_of())
    assert check_batch(batch, 384) is batch


def own_loader(change):
    rows = tokenised(ByT5Tokenizer(), make_rows(6)).to_list()
    return DataLoader(rows, 3, collate_fn=lambda rows: change(collate(rows, pad_token_id=0)))


@pytest.mark.parametrize("name", ["no mask", "-1 masks", "tuple"])
def test_own_data_of_another_kind_are_refused_by_the_batch_they_come_in(name):
    change, said = WRONG[name]
    trainer = L.Trainer(max_epochs=1, **QUIET)
    with pytest.raises(DataError, match=f"training batch 0: .*{said}"):
        trainer.fit(KDLightningModule(tiny_model(0), tiny_model(1)), own_loader(change))
    with pytest.raises(DataError, match=f"val batch 0: .*{said}"):
        trainer.validate(KDLightningModule(tiny_model(0), tiny_model(1)), own_loader(change), verbose=False)


def test_an_epoch_without_anything_to_learn_is_no_training():
    change = with_(labels=lambda labels: torch.full_like(labels, -100))
    with pytest.raises(DataError, match=r"no batch of this epoch had a token to learn, .* all labels are -100"):
        L.Trainer(max_epochs=5, **QUIET).fit(KDLightningModule(tiny_model(0), tiny_model(1)), own_loader(change))


@pytest.mark.parametrize("chunk", [8, None])
def test_numbers_may_be_of_any_whole_type(chunk):
    found = []
    for change in (lambda batch: batch, with_(labels=torch.Tensor.int, attention_mask=torch.Tensor.bool)):
        module = KDLightningModule(lively_model(0), lively_model(1), kd_weight=0.5, chunk=chunk, micro_batch_tokens=50)
        trainer = L.Trainer(max_epochs=1, **QUIET)
        trainer.fit(module, own_loader(change))
        found.append(trainer.callback_metrics["train_loss"])
    assert found[0] == found[1] > 0


def test_models_that_say_nothing_of_their_vocabulary_know_any_token():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = lively_model()

        def forward(self, **inputs):
            return self.inner(**inputs)

    L.Trainer(max_epochs=1, **QUIET).fit(
        KDLightningModule(Model(), kd_weight=0.0, chunk=None), own_loader(lambda batch: batch)
    )
