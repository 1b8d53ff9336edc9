"""Losses of hidden states are added to the objective, and train what they bring along."""

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import references
import torch
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file
from tiny import QUIET, lively_model, make_rows, tiny_model, tokenised
from torch.optim import SGD
from transformers import ByT5Tokenizer

from srd_lightning import (
    AuxiliaryLoss,
    CacheSettings,
    ForwardKL,
    HiddenStateCosine,
    HiddenStateMSE,
    HuggingFaceExport,
    KDLightningModule,
    LayerMapMSE,
    SRDDataModule,
)
from srd_lightning.data.batches import collate
from srd_lightning.errors import ModelError, SettingError
from srd_lightning.losses.base import response_mask
from srd_lightning.training.compatibility import check_hidden_states
from srd_lightning.training.step import DistillationStep

ROWS = make_rows(8)
WIDTH = 32


def batch_of(number=5):
    return collate(tokenised(ByT5Tokenizer(), make_rows(number)).to_list(), pad_token_id=0)


def states(model, batch, layer=-1):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states[
        layer
    ]


class Between(AuxiliaryLoss):
    """Layers of unlike depth, two of them, and no weights of its own."""

    def __init__(self):
        super().__init__(0.5, student_layers=(1, -1), teacher_layers=(0, 2))

    def token_losses(self, student, teacher):
        return sum((own - other).abs().mean(-1) for own, other in zip(student, teacher, strict=True))


def test_value_and_gradients_are_those_of_plain_loops():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[-100, 3, 4], [-100, -100, 5]])
    loss = HiddenStateMSE(4, 5, weight=0.25).double()
    mask = torch.nn.functional.pad(response_mask(labels), (0, 1))
    own = student.clone().requires_grad_()
    value = loss({-1: own[mask]}, {-1: teacher[mask]}) / mask.sum()
    value.backward()
    expected, *gradients = references.hidden_state_mse(student, teacher, labels, loss.projection.weight.detach())
    assert value.item() == pytest.approx(0.25 * expected, rel=1e-12)
    torch.testing.assert_close((own.grad, loss.projection.weight.grad), tuple(0.25 * grad for grad in gradients))


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_adds_the_mean_over_response_tokens(packing):
    batch, student, teacher = batch_of(), lively_model(0).double(), lively_model(1).double()
    loss = HiddenStateMSE(WIDTH, WIDTH, weight=2.0).double()
    step = DistillationStep(packing=packing).attach(student, teacher)
    plain = step.objective(batch, ForwardKL(), 0.5)
    found = step.objective(batch, ForwardKL(), 0.5, auxiliary=[loss])
    with torch.no_grad():
        expected, _, _ = references.hidden_state_mse(
            states(student, batch), states(teacher, batch), batch["labels"], loss.projection.weight
        )
    torch.testing.assert_close(found.loss, plain.loss + 2 * expected)
    assert (found.ce, found.kd) == (plain.ce, plain.kd)


def test_other_layers_are_those_of_the_model():
    batch, student, teacher = batch_of(), lively_model(0), lively_model(1)
    step = DistillationStep().attach(student, teacher)
    found = step.objective(batch, ForwardKL(), 0.0, auxiliary=[Between()]).loss
    mask = torch.nn.functional.pad(response_mask(batch["labels"]), (0, 1))
    pairs = [
        (states(student, batch, own)[mask], states(teacher, batch, other)[mask]) for own, other in ((1, 0), (-1, 2))
    ]
    added = 0.5 * sum((own - other).abs().mean(-1) for own, other in pairs).mean()
    torch.testing.assert_close(found, step.objective(batch, ForwardKL(), 0.0).loss + added)


def test_parts_give_the_gradient_of_the_whole():
    gradients = []
    for max_tokens in (None, 40):
        student, loss = lively_model(0), HiddenStateMSE(WIDTH, WIDTH)
        torch.nn.init.eye_(loss.projection.weight)
        step = DistillationStep(micro_batch_tokens=max_tokens).attach(student, lively_model(1))
        step.objective(batch_of(7), ForwardKL(), 0.5, auxiliary=[loss]).loss.backward()
        gradients.append([parameter.grad for parameter in (*loss.parameters(), *student.parameters())])
    for gradient, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def train(folder, **options):
    torch.manual_seed(0)
    loss = HiddenStateMSE(WIDTH, WIDTH, weight=0.5)
    module = KDLightningModule(
        tiny_model(0), lively_model(1), kd_weight=0.5, optimizer=lambda p: SGD(p, lr=0.05), auxiliary=[loss], **options
    )
    data = SRDDataModule(ROWS, ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
    trainer = L.Trainer(max_epochs=2, default_root_dir=folder, gradient_clip_val=1.0, **QUIET)
    before = copy.deepcopy(loss.projection.weight)
    trainer.fit(module, datamodule=data)
    assert not torch.equal(loss.projection.weight, before)
    trainer.save_checkpoint(folder / "run.ckpt")
    return module, trainer


def test_its_weights_are_trained_logged_and_saved(tmp_path):
    module, trainer = train(tmp_path)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    added = logged["train_loss"] - 0.5 * logged["train_ce"] - 0.5 * logged["train_kd"]
    assert added > 0
    assert logged["train_auxiliary"] == pytest.approx(added, abs=1e-5)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=False)["state_dict"]
    torch.testing.assert_close(saved["auxiliary.0.projection.weight"], module.auxiliary[0].projection.weight)
    assert {name.partition(".")[0] for name in saved} == {"auxiliary", "student"}
    for options in ({"micro_batch_tokens": 60}, {"teacher_cache": CacheSettings("hidden", dtype="float32")}):
        other, _ = train(tmp_path, **options)
        for weight, expected in zip(other.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)


def test_a_model_that_shows_no_hidden_states_is_refused():
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = lively_model(1)

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    step = DistillationStep().attach(lively_model(0), Whole())
    with pytest.warns(UserWarning, match="all logits"), pytest.raises(ModelError, match="both models, but the teacher"):
        step.objective(batch_of(), ForwardKL(), 0.5, auxiliary=[Between()])
    step = DistillationStep().attach(lively_model(0), lively_model(1))
    with pytest.raises(ModelError, match="both models, but the student is not used as body and head"):
        step.objective(batch_of(), ForwardKL(ignore_index=-1), 0.5, auxiliary=[Between()])


class Mean(AuxiliaryLoss):
    def token_losses(self, student, teacher):
        return student[0].mean()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"auxiliary": HiddenStateMSE(4, 4)}, "auxiliary must be a list of losses"),
        ({"auxiliary": [HiddenStateMSE]}, "but one is <class .*; one of your own derives from AuxiliaryLoss"),
        ({"teacher": None, "kd_weight": 0.0}, "auxiliary losses need a teacher, but none is given"),
        ({"chunk": None}, "not looked at where chunk is null; set it to auto"),
        ({"loss": ForwardKL(ignore_index=-1)}, "the loss ForwardKL takes all logits instead"),
        ({"teacher_cache": "topk"}, "which teacher_cache topk does not keep; use teacher_cache hidden"),
        ({"teacher_cache": "hidden", "auxiliary": [Between()]}, r"teacher_layers \[0, 2\] are not in a cache"),
        ({"auxiliary": [AuxiliaryLoss(teacher_layers=(3,))]}, r"teacher_layers \[3\] go beyond the 2 blocks"),
        ({"auxiliary": [HiddenStateMSE(16, WIDTH)]}, r"HiddenStateMSE does not take .* widths 32 \(student\) and 32"),
        ({"auxiliary": [Mean()]}, r"Mean.token_losses must return one .* of shape \[2\], but returned shape \[\]"),
        ({"auxiliary": [AuxiliaryLoss()]}, r"AuxiliaryLoss must define token_losses\(student, teacher\)"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_what_cannot_be_is_refused_before_rows_are_read(options, said, tmp_path):
    options = {"teacher": tiny_model(1), "auxiliary": [HiddenStateMSE(WIDTH, WIDTH)], **options}
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(SettingError, match=said):
        trainer.fit(
            KDLightningModule(tiny_model(0), **options), datamodule=SRDDataModule("none.jsonl", ByT5Tokenizer())
        )


def test_layers_that_are_none():
    with pytest.raises(SettingError, match="student_layers must name layers by whole numbers"):
        AuxiliaryLoss(student_layers=())


def test_fsdp1_is_refused():
    module = KDLightningModule(tiny_model(0), tiny_model(1), auxiliary=[Between()])
    with pytest.raises(SettingError, match="FSDP1 does not shard by themselves; use FSDP2 or ddp"):
        check_hidden_states(SimpleNamespace(strategy=FSDPStrategy()), module)


def sums(loss, own, other):
    """Return the mean over tokens and its gradients by states and weights."""
    own = {layer: states.clone().requires_grad_() for layer, states in own.items()}
    value = loss(own, other) / len(next(iter(own.values())))
    value.backward()
    return value.detach(), [states.grad for states in own.values()] + [weight.grad for weight in loss.parameters()]


@pytest.mark.parametrize("name", ["cosine", "layers"])
def test_other_losses_of_hidden_states_are_those_of_plain_loops(name):
    torch.manual_seed(0)
    layers = {1: 2, -1: -1}
    own = {layer: torch.randn(3, 4, dtype=torch.float64) for layer in layers}
    other = {layer: torch.randn(3, 5, dtype=torch.float64) for layer in layers.values()}
    loss = HiddenStateCosine(4, 5, weight=0.5) if name == "cosine" else LayerMapMSE(4, 5, layers, weight=0.5)
    if name == "cosine":
        own, other = {-1: own[-1]}, {-1: other[-1]}
    leaves = [states.clone().requires_grad_() for states in own.values()]
    weights = [weight.detach().double().requires_grad_() for weight in loss.parameters()]
    if name == "cosine":
        expected = 0.5 * references.hidden_state_cosine(leaves[0], other[-1], weights[0])
    else:
        expected = 0.5 * references.mapped_layers_mse(leaves, [other[2], other[-1]], weights)
    expected.backward()
    found, gradients = sums(loss.double(), own, other)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, [leaf.grad for leaf in (*leaves, *weights)], rtol=1e-10, atol=1e-12)


def test_projections_are_trained_and_saved_but_never_exported(tmp_path):
    losses = [LayerMapMSE(WIDTH, WIDTH, {1: 2, 2: -1}), HiddenStateCosine(WIDTH, WIDTH)]
    before = [weight.detach().clone() for loss in losses for weight in loss.parameters()]
    module = KDLightningModule(
        tiny_model(0), lively_model(1), optimizer=lambda p: SGD(p, lr=0.05), auxiliary=losses, tokenizer=ByT5Tokenizer()
    )
    data = SRDDataModule(ROWS, ByT5Tokenizer(), schedule={0: 1.0}, batch_size=4)
    export = HuggingFaceExport(str(tmp_path / "student"))
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[export], **QUIET)
    trainer.fit(module, datamodule=data)
    assert not any(map(torch.equal, before, (weight for loss in losses for weight in loss.parameters())))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=False)["state_dict"]
    added = sorted(name.removeprefix("auxiliary.") for name in saved if name.startswith("auxiliary"))
    assert added == ["0.projections.0.weight", "0.projections.1.weight", "1.projection.weight"]
    assert load_file(tmp_path / "student" / "model.safetensors").keys() == tiny_model(0).state_dict().keys()


def test_layers_that_are_no_map_are_refused():
    with pytest.raises(SettingError, match=r"layers must be \{layer of the student: of the teacher\}, but is \[1\]"):
        LayerMapMSE(4, 4, [1])
    with pytest.raises(SettingError, match="student_layers must name layers"):
        LayerMapMSE(4, 4, {})
