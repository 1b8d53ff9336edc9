"""Every way to compute a step gives the same training."""

import copy
import logging
import shutil
import warnings

import lightning as L
import pytest
import torch
from tiny import QUIET, lively_model, make_rows, tiny_model, tokenised
from torch.optim import SGD
from transformers import ByT5Tokenizer

from srd_lightning import (
    CacheSettings,
    Decoding,
    DistillationLoss,
    ForwardKL,
    KDLightningModule,
    Pretrained,
    SRDDataModule,
)
from srd_lightning.data.batches import collate
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import NonFiniteError, SettingError
from srd_lightning.training.step import DistillationStep

ROWS = make_rows(24)


class Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def train(folder, precision="32-true", student=None, teacher=None, settings=None, pad_to_multiple_of=1, **options):
    """Train 30 steps; return every loss, the weights, and the last measures.

    Args:
        folder: Of the run.
        precision: Of the trainer.
        student: By default a small one of two layers; so is the teacher.
        teacher: By default one with large weights.
        settings: More of the trainer's.
        pad_to_multiple_of: Of the data.
        options: Of the module.
    """
    losses = Losses()
    student = student or tiny_model(0)
    module = KDLightningModule(
        student, teacher or lively_model(1), kd_weight=0.7, optimizer=lambda p: SGD(p, lr=0.05), **options
    )
    data = SRDDataModule(
        {"train": ROWS, "validation": ROWS[:5]},
        ByT5Tokenizer(),
        schedule={0: 0.25, 3: 1.0},
        batch_size=3,
        pad_to_multiple_of=pad_to_multiple_of,
        decoding=Decoding(max_new_tokens=4),
    )
    settings = {"max_epochs": 6, **QUIET, **(settings or {})}
    trainer = L.Trainer(callbacks=[losses], default_root_dir=folder, precision=precision, **settings)
    trainer.fit(module, datamodule=data)
    return torch.tensor(losses.losses), list(module.student.parameters()), trainer.callback_metrics


@pytest.fixture(scope="module")
def as_usual(tmp_path_factory):
    return train(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": None},
        {"chunk": 3},
        {"teacher_cache": CacheSettings("hidden", dtype="float32")},
        {"teacher_cache": CacheSettings("hidden", dtype="float32"), "chunk": None},
        {"teacher_cache": CacheSettings("topk", k=384)},
        {"micro_batch_tokens": 40},
        {"micro_batch_tokens": 40, "teacher_cache": CacheSettings("hidden", dtype="float32")},
        {"packing": True},
        {"packing": True, "micro_batch_tokens": 40},
    ],
    ids=str,
)
def test_thirty_steps_are_the_same_however_they_are_computed(options, as_usual, tmp_path):
    losses, weights, measures = train(tmp_path, **options)
    expected, expected_weights, expected_measures = as_usual
    assert len(losses) == 30
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for weight, other in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)
    for name in ("val_nll", "val_kl"):
        torch.testing.assert_close(measures[name], expected_measures[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"teacher_cache": "hidden"}, {"micro_batch_tokens": 40}], ids=str)
def test_bf16_stays_near(options, as_usual, tmp_path):
    losses, weights, _ = train(tmp_path, precision="bf16-mixed", **options)
    assert weights[0].dtype == torch.float32
    torch.testing.assert_close(losses, as_usual[0], rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(shutil.which("g++") is None and not torch.cuda.is_available(), reason="torch.compile needs g++")
def test_compiled_steps_are_the_same(tmp_path, monkeypatch):
    """What is ours is compiled; of the models, whose kernels take a second each, only the graphs are made."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    found = []
    for compile in (False, True):
        options = {
            "student": tiny_model(0, num_hidden_layers=1),
            "teacher": lively_model(1, num_hidden_layers=1),
            "settings": {"max_epochs": 2, "limit_val_batches": 0},
            "pad_to_multiple_of": 256,
        }
        losses, weights, _ = train(tmp_path / str(compile), compile=compile, **options)
        found.append((losses, weights))
    torch.testing.assert_close(*(losses for losses, _ in found), rtol=1e-4, atol=1e-5)
    for weight, other in zip(*(weights for _, weights in found), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)


def test_a_teacher_whose_cache_is_complete_is_not_loaded(as_usual, tmp_path, monkeypatch):
    tokenizer = ByT5Tokenizer()
    for name, model in (("student", tiny_model(0)), ("teacher", lively_model(1))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    teacher = Pretrained(str(tmp_path / "teacher"))
    options = {"teacher_cache": CacheSettings("hidden", dtype="float32")}
    first, _, _ = train(tmp_path, student=Pretrained(str(tmp_path / "student")), teacher=teacher, **options)
    load, loaded = Pretrained.model, []
    monkeypatch.setattr(Pretrained, "model", lambda self: (loaded.append(self.name), load(self))[1])
    second, _, measures = train(tmp_path, student=Pretrained(str(tmp_path / "student")), teacher=teacher, **options)
    assert loaded == [str(tmp_path / "student")]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, as_usual[0], rtol=1e-4, atol=1e-5)
    assert measures["val_kl"] > 0


def test_after_a_cached_run_the_module_evaluates_with_the_teacher_itself(tokenizer, tmp_path):
    data = SRDDataModule({"train": ROWS, "test": ROWS[:4]}, tokenizer, schedule={0: 1.0})
    module = KDLightningModule(tiny_model(0), lively_model(1), teacher_cache="hidden", kd_weight=0.5)
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, datamodule=data)
    (cached,) = trainer.validate(module, data.test_dataloader(), verbose=False)
    plain = KDLightningModule(module.student, lively_model(1), chunk=None)
    (expected,) = L.Trainer(**QUIET).validate(plain, data.test_dataloader(), verbose=False)
    assert cached == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None, "kd_weight": 0.0, "teacher_cache": "hidden"}, "teacher_cache hidden needs a teacher"),
        ({"chunk": 0}, "sizes must be at least 1, but chunk=0"),
        ({"micro_batch_tokens": -1, "chunk": 0}, "at least 1, but micro_batch_tokens=-1, chunk=0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        KDLightningModule(**{"student": tiny_model(0), "teacher": lively_model(1), **options})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "top"}, "teacher_cache.kind must be hidden or topk, but is 'top'"),
        ({"kind": "topk", "k": 0}, "sizes must be at least 1, but teacher_cache.k=0"),
        ({"kind": "topk", "k": "64"}, "must be whole numbers, but teacher_cache.k='64'"),
        ({"kind": "hidden", "dtype": "bf16"}, "must name a floating-point type of torch, .* but is 'bf16'"),
        ({"kind": "hidden", "k": 8}, "teacher_cache.k 8 does not belong to kind hidden; leave it out"),
        ({"kind": "topk", "dtype": "float32"}, "teacher_cache.dtype float32 does not belong to kind topk"),
    ],
    ids=str,
)
def test_settings_of_a_cache_that_cannot_be(settings, said):
    with pytest.raises(SettingError, match=said):
        KDLightningModule(tiny_model(0), tiny_model(1), teacher_cache=CacheSettings(**settings))


def test_a_student_that_was_not_prepared_is_not_trained(tokenizer):
    """Its optimizer would have the weights of the other one."""
    module = KDLightningModule(tiny_model(0), kd_weight=0.0)
    with pytest.raises(RuntimeError, match="not the one that configure_model"):
        module.training_step(batch_of(), 0)
    module.configure_model()
    module.student = tiny_model(1)
    with pytest.raises(RuntimeError, match="not the one that configure_model"):
        module.training_step(batch_of(), 0)


def test_a_cache_needs_a_data_module_that_brings_it_along(tokenizer, tmp_path):
    module = KDLightningModule(tiny_model(0), lively_model(1), teacher_cache="hidden")
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(ValueError, match="teacher_cache needs an SRDDataModule"):
        L.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(module, loader)


def batch_of(number=5):
    return collate(tokenised(ByT5Tokenizer(), make_rows(number)).to_list(), pad_token_id=0)


def objective(module, batch):
    module.log = lambda *_, **__: None
    if module.step.student is None:
        module.configure_model()
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in module.student.parameters()]


def test_heads_that_differ_by_padding_are_compared_on_what_they_share(tmp_path):
    """The rows that are added say nothing: as if both had them not."""
    tokenizer, batch = ByT5Tokenizer(), batch_of()
    small, large = lively_model(0), lively_model(1)
    large.resize_token_embeddings(448, mean_resizing=False)
    with torch.no_grad():
        large.lm_head.weight[384:] = 5.0
    for name, model in (("small", small), ("large", large)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    cut = lively_model(1)
    cut.load_state_dict({name: weight[:384] if "embed" in name or "head" in name else weight
                         for name, weight in large.state_dict().items()})  # fmt: skip
    for student, teacher, pair in (("small", "large", (small, cut)), ("large", "small", (cut, small))):
        for chunk in (7, None):
            module = KDLightningModule(
                Pretrained(str(tmp_path / student)), Pretrained(str(tmp_path / teacher)), kd_weight=0.5, chunk=chunk
            )
            found, gradients = objective(module, batch)
            alone = KDLightningModule(*(copy.deepcopy(model) for model in pair), kd_weight=0.5)
            expected, others = objective(alone, batch)
            torch.testing.assert_close(found, expected)
            for gradient, other in zip(gradients, others, strict=True):
                torch.testing.assert_close(gradient[: len(other)], other, rtol=1e-3, atol=1e-5)


def test_other_differences_of_vocabulary_are_refused(tmp_path):
    module = KDLightningModule(tiny_model(0), tiny_model(1, vocab_size=448))
    with pytest.raises(ValueError, match="of 384 and 448 tokens, and their tokenizers are not known to be the same"):
        module.configure_model()
    for name, size in (("small", 300), ("large", 384)):
        tiny_model(0, vocab_size=size).save_pretrained(tmp_path / name)
        ByT5Tokenizer().save_pretrained(tmp_path / name)
    module = KDLightningModule(Pretrained(str(tmp_path / "small")), Pretrained(str(tmp_path / "large")))
    with pytest.raises(ValueError, match="of 300 and 384 tokens, but their tokenizer uses 384"):
        module.configure_model()


def test_a_weight_without_a_teacher_is_refused_when_it_rises():
    module = KDLightningModule(tiny_model(0), kd_weight=0.0)
    objective(module, batch_of())
    with pytest.raises(ValueError, match=r"kd_weight 0\.5 needs a teacher"):
        module.kd_weight = 0.5


class WholeBatch(DistillationLoss):
    """Needs more than the divergence of each token."""

    def forward(self, student_logits, teacher_logits, labels):
        assert student_logits.shape == teacher_logits.shape == (*labels.shape, 384)
        return ForwardKL()(student_logits, teacher_logits, labels)


class Learnt(ForwardKL):
    """Has a weight of its own."""

    def __init__(self):
        super().__init__()
        self.share = torch.nn.Parameter(torch.ones(()))

    def divergence(self, teacher_logp, student_logp):
        return self.share * super().divergence(teacher_logp, student_logp)


@pytest.mark.parametrize("make_loss", [WholeBatch, Learnt])
def test_losses_that_need_all_logits_get_them(make_loss):
    loss = make_loss()
    found = objective(KDLightningModule(lively_model(0), lively_model(1), loss, kd_weight=0.5), batch_of())
    expected = objective(KDLightningModule(lively_model(0), lively_model(1), kd_weight=0.5), batch_of())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not isinstance(loss, Learnt) or loss.share.grad != 0


class Unusual(torch.nn.Module):
    """A model with logits, and nothing that is known of transformers."""

    def __init__(self, seed):
        super().__init__()
        self.inner = lively_model(seed)

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("unusual", [(True, True), (True, False), (False, True)])
def test_models_that_cannot_be_taken_apart_make_all_logits_and_say_so_once(unusual):
    models = [Unusual(seed) if odd else lively_model(seed) for seed, odd in enumerate(unusual)]
    module = KDLightningModule(*models, kd_weight=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = objective(module, batch_of())
        module.training_step(batch_of(), 0)
    expected = objective(KDLightningModule(lively_model(0), lively_model(1), kd_weight=0.5), batch_of())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    said = [str(warning.message) for warning in caught if "all logits are made" in str(warning.message)]
    assert len(said) == sum(unusual)
    assert all("because of Unusual: Unusual has no output head" in text for text in said)


@pytest.mark.parametrize(("make_loss", "times"), [(WholeBatch, 1), (Learnt, 1), (ForwardKL, 0)])
def test_losses_that_need_all_logits_say_so_once(make_loss, times, caplog):
    caplog.set_level(logging.INFO)
    module = KDLightningModule(lively_model(0), lively_model(1), make_loss(), kd_weight=0.5)
    for _ in range(2):
        objective(module, batch_of())
    said = [record.message for record in caplog.records if "all logits are made" in record.message]
    assert len(said) == times
    assert all(f"because of {make_loss.__name__}: it defines forward" in text for text in said)


def test_one_rank_that_cannot_take_a_model_apart_decides_for_all(monkeypatch):
    """Else ranks would gather sharded weights at unlike times."""
    monkeypatch.setattr(Ranks, "all_results", lambda self, work: [work(), "body and head give other logits"])
    step = DistillationStep().attach(lively_model(0), lively_model(1))
    with pytest.warns(UserWarning, match="because of LlamaForCausalLM: body and head give other logits"):
        step.objective(batch_of(), ForwardKL(), 0.5)
    assert step.parts is None


@pytest.mark.parametrize("make", [lambda *_: None, lambda *_: torch.zeros(3), lambda *_: 0.5])
def test_a_forward_that_is_no_number_is_named(make):
    class Own(WholeBatch):
        forward = make

    with pytest.raises(SettingError, match=r"Own\.forward must return one floating-point number"):
        objective(KDLightningModule(lively_model(0), lively_model(1), Own()), batch_of())


@pytest.mark.parametrize("chunk", [7, None])
def test_a_teacher_is_not_run_where_it_has_no_weight(chunk):
    teacher, times = lively_model(1), []
    step = DistillationStep(chunk).attach(lively_model(0), teacher)
    step.objective(batch_of(), ForwardKL(), 0.5)  # looks at the models first
    teacher.model.register_forward_hook(lambda *_: times.append(1))
    assert step.objective(batch_of(), ForwardKL(), 0.0).kd == 0
    assert not times
    assert step.objective(batch_of(), ForwardKL(), 1.0).ce == 0
    assert len(times) == 1


def nan(model):
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    return model


def forbids_all_but(model, token):
    """A head with a bias, which no token but one survives."""
    model.lm_head.bias = torch.nn.Parameter(torch.full((384,), -torch.inf))
    with torch.no_grad():
        model.lm_head.bias[token] = 0
    return model


@pytest.mark.parametrize("options", [{}, {"chunk": None}, {"micro_batch_tokens": 40}], ids=str)
@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (
            lambda: nan(lively_model(0)),
            lambda: lively_model(1),
            "the student's logits are NaN or infinite before",
        ),
        (
            lambda: lively_model(0),
            lambda: nan(lively_model(1)),
            "the teacher's logits are NaN or infinite: check",
        ),
        (lambda: forbids_all_but(lively_model(0), 9), lambda: lively_model(1), "the student can never say token"),
    ],
    ids=["student", "teacher", "forbidden"],
)
def test_a_loss_that_is_no_number_names_the_model_that_is_to_blame(
    student, teacher, said, options, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "srd_lightning.training.compatibility.check_module", lambda *_: None
    )  # which says so before the run, where it is so by then
    data = SRDDataModule(ROWS, ByT5Tokenizer(), schedule={0: 1.0}, batch_size=3)
    module = KDLightningModule(student(), teacher(), kd_weight=0.5, **options)
    with pytest.raises(NonFiniteError, match=f"in batch 0 of epoch 0; its rows: .*: {said}"):
        L.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(module, datamodule=data)
