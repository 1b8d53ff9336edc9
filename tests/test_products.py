"""A frozen teacher whose weights are cast once says what it says where autocast casts them at every call."""

import copy

import lightning as L
import pytest
import torch
from tiny import QUIET, lively_model, make_rows, tiny_model
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from srd_lightning import CacheSettings, KDLightningModule, Pretrained, SRDDataModule
from srd_lightning.errors import NonFiniteError
from srd_lightning.teacher.products import cast_products

BF16 = torch.bfloat16


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, initializer_range=0.3, **sizes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: lively_model(num_hidden_layers=1),
        lambda: lively_model(num_hidden_layers=1, tie_word_embeddings=True),
        gpt2,
    ],
    ids=["untied", "tied", "gpt2"],
)
def test_no_bit_changes_under_autocast(make):
    model = make().eval().requires_grad_(False)
    cast = copy.deepcopy(model)
    cast_products(cast, BF16)
    batch = {"input_ids": torch.randint(2, 64, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    with torch.autocast("cpu", BF16):
        assert torch.equal(cast(**batch).logits, model(**batch).logits)
    types = {name: weight.dtype for name, weight in cast.named_parameters()}
    assert types["lm_head.weight"] == BF16
    assert {dtype for name, dtype in types.items() if "norm" in name or "ln_" in name or "embed" in name} == {
        torch.float32
    }
    assert cast.get_input_embeddings().weight.dtype == torch.float32
    assert len({*types.values()}) == 2
    assert not any(weight.requires_grad for weight in cast.parameters())


@pytest.fixture
def named(tmp_path):
    """A teacher by its name, in fp32."""
    lively_model(1).save_pretrained(tmp_path / "teacher")
    ByT5Tokenizer().save_pretrained(tmp_path / "teacher")
    return Pretrained(str(tmp_path / "teacher"))


def fit(module, folder, precision):
    """Train two steps; return the type of the teacher's head within them."""
    data = SRDDataModule(make_rows(4), ByT5Tokenizer(), schedule={0: 1.0}, batch_size=2)
    trainer = L.Trainer(max_epochs=1, default_root_dir=folder, precision=precision, **QUIET)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    return module.teacher.lm_head.weight.dtype


def test_a_teacher_that_is_loaded_is_cast_where_there_is_autocast_and_loaded_anew_where_there_is_none(named, tmp_path):
    module = KDLightningModule(tiny_model(0), named)
    found = [fit(module, tmp_path / str(run), precision) for run, precision in enumerate(["32-true", "bf16-mixed"] * 2)]
    assert found == [torch.float32, BF16] * 2


def test_a_step_that_is_not_finite_still_says_which_model_is_to_blame(named, tmp_path):
    student = tiny_model(0)
    student.lm_head.weight.data[3] = torch.nan
    module = KDLightningModule(student, named)
    module.preflight = lambda trainer: None  # which has seen it
    with pytest.raises(NonFiniteError, match="the student's logits are NaN or infinite before its first step"):
        fit(module, tmp_path, "bf16-mixed")


def test_a_cache_is_filled_by_the_teacher_as_it_is_loaded(named, tmp_path):
    """Also where it was cast before, for an evaluation, which has no cache."""
    found = []
    for evaluated in (False, True):
        module = KDLightningModule(tiny_model(0), named, teacher_cache=CacheSettings("hidden", dtype="float32"))
        splits = {"train": make_rows(4), "validation": make_rows(4)}
        data = SRDDataModule(splits, ByT5Tokenizer(), schedule={0: 1.0}, batch_size=2)
        folder = tmp_path / str(evaluated)
        trainer = L.Trainer(max_epochs=1, default_root_dir=folder, precision="bf16-mixed", **QUIET)
        if evaluated:
            trainer.validate(module, datamodule=data, verbose=False)
            assert module.teacher.lm_head.weight.dtype == BF16
        trainer.fit(module, datamodule=data)
        found.append([path.read_bytes() for path in sorted((folder / "teacher").rglob("*.arrow"))])
    assert found[0]
    assert found[0] == found[1]


def test_a_teacher_that_was_given_is_left_as_it_is(tmp_path):
    teacher = lively_model(1)
    assert fit(KDLightningModule(tiny_model(0), teacher), tmp_path, "bf16-mixed") == torch.float32
    assert {weight.dtype for weight in teacher.parameters()} == {torch.float32}
