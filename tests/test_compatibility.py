"""What cannot be trained is refused before anything is read or loaded, in one sentence."""

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import QUIET, make_rows, tiny_model
from torch import nn
from torch.optim import SGD, AdamW
from transformers import ByT5Tokenizer, MixtralConfig, MixtralForCausalLM

from srd_lightning import (
    DistillationLoss,
    ForwardKL,
    HyperparameterScheduler,
    KDLightningModule,
    Pretrained,
    SRDDataModule,
)
from srd_lightning.errors import ModelError, SettingError, SRDError
from srd_lightning.training.compatibility import check_parts, check_precision


class NoSuper(DistillationLoss):
    def __init__(self):
        nn.Module.__init__(self)


MODEL = tiny_model(2)


def tied_to(student):
    other = tiny_model(1)
    other.model.embed_tokens = student.model.embed_tokens
    return other


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_cache": "hiden"}, "teacher_cache must be none, hidden or topk, but is 'hiden'"),
        ({"teacher_placement": "cpu"}, "teacher_placement must be replicate, shard or offload, but is 'cpu'"),
        ({"teacher_cache": None}, "teacher_cache must be .*, but is None"),
        ({"student": None}, "student must be a Pretrained or a torch.nn.Module, but is None"),
        ({"loss": ForwardKL}, r"loss must be an object, but is the class ForwardKL; give ForwardKL\(\)"),
        ({"loss": nn.KLDivLoss()}, r"loss must be a DistillationLoss, such as ForwardKL\(\), but is KLDivLoss\(\)"),
        ({"loss": NoSuper()}, r"NoSuper.__init__ must call super\(\).__init__\(\)"),
        ({"tokenizer": "gpt2"}, "tokenizer must be a tokenizer of transformers, but is 'gpt2'"),
        ({"optimizer": SGD(MODEL.parameters(), lr=0.1)}, "optimizer must be a function that makes one, .* is a SGD"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler must be a function that makes one, .* is a str"),
        ({"chunk": 2.5}, "sizes must be whole numbers, but chunk=2.5"),
        ({"micro_batch_tokens": True}, "but micro_batch_tokens=True"),
        ({"chunk": 0}, "sizes must be at least 1, but chunk=0"),
        ({"kd_weight": float("nan")}, r"kd_weight must lie in \[0, 1\], but is nan"),
        ({"kd_weight": -0.5}, r"kd_weight must lie in \[0, 1\], but is -0.5"),
    ],
    ids=str,
)
def test_arguments_of_another_kind(options, said):
    with pytest.raises(SettingError, match=said):
        KDLightningModule(**{"student": tiny_model(0), "teacher": tiny_model(1), **options})


def test_student_and_teacher_are_two_models():
    student = tiny_model(0)
    with pytest.raises(ModelError, match=r"student and teacher are one object, .* copy\.deepcopy\(student\)"):
        KDLightningModule(student, student)
    with pytest.raises(ModelError, match=r"share 1 weights, such as model\.embed_tokens\.weight, which"):
        KDLightningModule(student, tied_to(student))
    assert all(weight.requires_grad for weight in student.parameters())
    KDLightningModule(student, copy.deepcopy(student))


class Reads(SRDDataModule):
    """Tells whether it came to read its rows."""

    has_read = False

    def read_rows(self):
        self.has_read = True
        super().read_rows()


def refused(module, said, error=SettingError, callbacks=(), **trainer_options):
    data = Reads(make_rows(8), ByT5Tokenizer(), schedule={0: 1.0})
    trainer = L.Trainer(max_epochs=2, callbacks=list(callbacks), **QUIET, **trainer_options)
    with pytest.raises(error, match=said) as caught:
        trainer.fit(module, datamodule=data)
    assert "\n" not in str(caught.value)
    assert not data.has_read


class Mean(DistillationLoss):
    def divergence(self, teacher_logp, student_logp):
        return (teacher_logp - student_logp).square().mean()


class Empty(DistillationLoss):
    pass


class WholeBatch(ForwardKL):
    def forward(self, student_logits, teacher_logits, labels):
        return super().forward(student_logits, teacher_logits, labels)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"micro_batch_tokens": 50, "loss": WholeBatch()}, r"in parts, but WholeBatch\.forward is made for whole ones"),
        ({"teacher": tiny_model(1, vocab_size=448)}, "student and teacher give logits of 384 and 448 tokens"),
        ({"loss": Mean()}, "Mean.divergence must return one floating-point value per token"),
        ({"loss": Empty()}, r"Empty must define divergence\(teacher_logp, student_logp\)"),
        ({"teacher_placement": "shard"}, "teacher_placement shard needs a strategy of several ranks"),
        ({"optimizer": lambda params: SGD(params, lr=-1)}, "optimizer cannot be made: Invalid learning rate: -1"),
        ({"teacher_cache": "topk", "loss": ForwardKL(5)}, "topk knows temperatures from 0.5 to 4, .* comes to 5"),
        ({"teacher_cache": "topk", "chunk": None}, "topk keeps no logits, but chunk null needs all of them; use"),
        ({"teacher_cache": "topk", "loss": ForwardKL(ignore_index=-1)}, "topk keeps no logits, but the loss ForwardKL"),
    ],
    ids=[
        "parts",
        "vocabularies",
        "scalar",
        "no divergence",
        "placement",
        "learning rate",
        "topk",
        "topk whole",
        "topk mask",
    ],
)
def test_settings_that_cannot_be_trained_are_refused_before_rows_are_read(options, said):
    refused(KDLightningModule(**{"student": tiny_model(0), "teacher": tiny_model(1), **options}), said, SRDError)


@pytest.mark.parametrize(
    ("options", "schedules", "said"),
    [
        (
            {"kd_weight": 0.0},
            {"kd_weight": {0: 0.0, 1: 0.5}},
            "kd_weight cannot begin 0.5 at epoch 1: kd_weight 0.5 needs a teacher",
        ),
        (
            {"teacher": tiny_model(1), "teacher_cache": "topk"},
            {"loss.temperature": {0: 1.0, 1: 4.5}},
            "topk knows temperatures from 0.5 to 4, but the loss comes to 4.5",
        ),
    ],
    ids=["weight without teacher", "temperature beyond topk"],
)
def test_values_of_later_epochs_are_looked_at_first(options, schedules, said):
    module = KDLightningModule(tiny_model(0), **options)
    refused(module, said, callbacks=[HyperparameterScheduler(schedules)])


def test_a_student_that_is_frozen_trains_nothing():
    said = "nothing of the student LlamaForCausalLM can be trained: .* student.requires_grad_"
    refused(KDLightningModule(tiny_model(0).requires_grad_(False), tiny_model(1)), said, ModelError)


def test_a_student_that_cannot_make_activations_again():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model(0)

    said = "activation_checkpointing needs a model of transformers that supports it, which Plain does not"
    refused(KDLightningModule(Plain(), tiny_model(1), activation_checkpointing=True), said, ModelError)


def test_compiling_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    module = KDLightningModule(tiny_model(0), tiny_model(1), compile=True)
    refused(module, "compile needs the compiler no-such-compiler on a CPU, which is not there; install it")


def test_weights_in_fp16_are_refused():
    refused(
        KDLightningModule(tiny_model(0), tiny_model(1)),
        "precision 16-true keeps the weights in fp16",
        precision="16-true",
    )


def on_a_gpu(**options):
    """A trainer with the scaler of 16-mixed, which a CPU does not get."""
    trainer = L.Trainer(**QUIET, **options)
    trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")
    return trainer


def test_16_mixed_and_what_it_cannot_do():
    with pytest.raises(SettingError, match=r"micro_batch_tokens does not go with precision 16-mixed: .* bf16-mixed"):
        check_parts(on_a_gpu(), 100, ForwardKL(), "replicate")
    check_parts(on_a_gpu(), None, ForwardKL(), "replicate")
    fused = KDLightningModule(tiny_model(0), tiny_model(1)).optimizer
    with pytest.raises(SettingError, match=r"gradient_clip_val 1.0 .* a fused AdamW does not; set fused to false"):
        check_precision(on_a_gpu(gradient_clip_val=1.0), fused)
    check_precision(on_a_gpu(), fused)
    check_precision(on_a_gpu(gradient_clip_val=1.0), lambda params: AdamW(params))
    check_precision(L.Trainer(gradient_clip_val=1.0, precision="bf16-mixed", **QUIET), fused)


def test_optimizers_of_certain_weights_are_left_to_be_made_later():
    check_precision(L.Trainer(**QUIET), lambda params: SGD(params[5:], lr=0.1))


@pytest.mark.parametrize("placement", ["shard", "offload"])
def test_parts_and_a_teacher_that_is_gathered_do_not_go_together_on_several_ranks(placement):
    trainer = SimpleNamespace(strategy=None, world_size=2, precision_plugin=None)
    with pytest.raises(SettingError, match=f"micro_batch_tokens and teacher_placement {placement} do not go together"):
        check_parts(trainer, 100, ForwardKL(), placement)
    check_parts(trainer, 100, ForwardKL(), "replicate")
    check_parts(SimpleNamespace(**{**vars(trainer), "world_size": 1}), 100, ForwardKL(), placement)


def test_a_mixture_that_asks_for_its_auxiliary_loss_is_told():
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    student = MixtralForCausalLM(MixtralConfig(**sizes, **heads, output_router_logits=True))
    data = SRDDataModule(make_rows(4), ByT5Tokenizer(), schedule={0: 1.0})
    with pytest.warns(UserWarning, match="router's auxiliary loss .* set output_router_logits to false"):
        L.Trainer(max_epochs=1, **QUIET).fit(KDLightningModule(student, tiny_model(1)), datamodule=data)


def test_named_models_are_checked_when_they_are_there(tmp_path):
    tiny_model(0).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    module = KDLightningModule(Pretrained(str(tmp_path)), tiny_model(1))
    module.build_student().requires_grad_(False)
    refused(module, "nothing of the student", ModelError)


def test_what_goes_together_is_trained():
    data = SRDDataModule(make_rows(8), ByT5Tokenizer(), schedule={0: 1.0})
    trainer = L.Trainer(max_epochs=1, precision="bf16-mixed", gradient_clip_val=1.0, **QUIET)
    trainer.fit(KDLightningModule(tiny_model(0), tiny_model(1), micro_batch_tokens=50), datamodule=data)
    assert trainer.global_step == 1
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


def test_a_module_is_not_compiled_as_a_whole():
    """The students are compiled alone."""
    module = torch.compile(KDLightningModule(tiny_model(0), tiny_model(1)))
    refused(module, r"torch\.compile\(KDLightningModule\) would compile what is counted .* student\.compile\(\)")
