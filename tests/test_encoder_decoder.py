"""Encoder-decoders: their rows and batches, what is refused, LoRA, two ranks; whole runs are in `test_families.py`."""

import pytest
import torch
from families import Numbers, said_alone, tiny
from lightning import Trainer
from tiny import PLAIN, QUIET, make_rows, tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, ByT5Tokenizer, DataCollatorForSeq2Seq, T5Config

from srd_lightning import (
    GKD,
    DistillationLoss,
    ForwardKL,
    HiddenStateMSE,
    HuggingFaceExport,
    KDLightningModule,
    Pretrained,
    RuntimeBenchmark,
    SRDDataModule,
)
from srd_lightning.criteria import InstructionFollowingDifficulty, TeacherKL
from srd_lightning.criteria.base import ReflectionBatch, response_logits
from srd_lightning.data.families import DECODER, EncoderDecoder
from srd_lightning.data.layout import FIRST, lay_out
from srd_lightning.errors import DataError, ModelError, SettingError
from srd_lightning.evaluation.answers import answers
from srd_lightning.models import generation
from srd_lightning.models.calling import logits_of
from srd_lightning.models.family import family_of
from srd_lightning.models.generation import Decoding, generate
from srd_lightning.models.soundness import check_causal
from srd_lightning.models.split import split
from srd_lightning.training.step import DistillationStep

T5 = EncoderDecoder(decoder_start_token_id=0)


def rows_of(number=4, student=None):
    data = SRDDataModule(
        make_rows(number), ByT5Tokenizer(), student=student or tiny("t5"), schedule={0: 1.0}, template=PLAIN
    )
    data.setup("fit")
    return data, data.rows["train"].to_list()


def same(found, expected):
    """Compare with what rounding may change: of sums in another order, relative to the largest value."""
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=1e-4 * float(expected.detach().abs().max())
    )


@pytest.fixture(scope="module")
def model():
    return tiny("t5")


@pytest.fixture(scope="module")
def rows():
    return rows_of(4)[1]


@pytest.fixture
def batch(rows):
    return T5.collate(rows, pad_token_id=0)


class TestRows:
    def test_prompt_and_response_are_framed_as_the_tokenizer_does_it(self, rows):
        tokenizer = ByT5Tokenizer()
        for row, given in zip(rows, make_rows(4), strict=True):
            ids, start = row["input_ids"], row["prompt_length"]
            assert ids[:start] == tokenizer(given["instruction"])["input_ids"]
            assert ids[start:] == tokenizer(given["output"])["input_ids"]
            assert ids[start - 1] == ids[-1] == tokenizer.eos_token_id

    def test_the_end_is_put_where_the_tokenizer_puts_none(self):
        class Endless(ByT5Tokenizer):
            def build_inputs_with_special_tokens(self, first, second=None):
                return first

        tokenizer = Endless()
        assert T5.tokens(tokenizer, ["a"], ["b"]) == ([[100]], [[101, 1]])

    def test_another_family_is_tokenised_anew(self):
        data, before = rows_of(3)
        data.student = tiny_model()
        data.setup("fit")
        after = data.rows["train"].to_list()
        assert [len(row["input_ids"]) for row in after] == [len(row["input_ids"]) - 1 for row in before]


class TestBatches:
    def test_it_is_what_transformers_make_of_the_same_rows(self, rows, batch, model):
        features = [
            {"input_ids": row["input_ids"][: row["prompt_length"]], "labels": row["input_ids"][row["prompt_length"] :]}
            for row in rows
        ]
        theirs = DataCollatorForSeq2Seq(ByT5Tokenizer(), model=model)(features)
        assert theirs.keys() == batch.keys()
        for name, values in batch.items():
            assert torch.equal(theirs[name], values), name

    def test_loaders_make_it(self):
        data, _ = rows_of(4)
        assert set(next(iter(data.train_dataloader()))) == {*T5.collate(rows_of(1)[1], 0)}

    def test_padding_to_a_multiple(self, rows):
        wide = T5.collate(rows, pad_token_id=0, pad_to_multiple_of=16)
        assert {values.shape[1] % 16 for values in wide.values()} == {0}
        assert (wide["labels"] >= 0).sum() == (T5.collate(rows, 0)["labels"] >= 0).sum()

    def test_each_label_is_predicted_where_it_stands(self, batch, rows):
        layout = lay_out(batch)
        width = batch["labels"].shape[1]
        expected = [(place, token) for place, row in enumerate(rows) for token in range(len(response(row)))]
        assert [divmod(position, width) for position in layout.positions.tolist()] == expected
        assert layout.targets.tolist() == [token for row in rows for token in response(row)]

    def test_what_is_cached_is_found_by_its_row(self, batch, rows):
        lengths = torch.tensor([len(response(row)) for row in rows])
        first = lengths.cumsum(0) - lengths - torch.tensor([row["prompt_length"] for row in rows])
        assert lay_out({**batch, FIRST: first}).tokens.tolist() == list(range(int(lengths.sum())))


def response(row):
    return row["input_ids"][row["prompt_length"] :]


WRONG = {
    "no_decoder_input": (lambda batch: batch.pop("decoder_input_ids"), r"no decoder_input_ids.*DataCollatorForSeq2Seq"),
    "other_rows": (lambda batch: batch.update(labels=batch["labels"][:2]), r"labels is \[2, 10\]"),
    "other_width": (
        lambda batch: batch.update(labels=batch["labels"][:, :-1]),
        r"labels is \[4, 9\], decoder_input_ids is \[4, 10\]",
    ),
    "not_shifted": (
        lambda batch: batch.update(decoder_input_ids=batch["labels"].clamp(min=0)),
        "are the labels themselves, so the decoder would see each token",
    ),
    "no_token": (lambda batch: batch["decoder_input_ids"].fill_(400), "decoder_input_ids holds 400, which is no token"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_batches_of_ones_own_that_are_none(change, said, batch, model):
    change(batch)
    step = DistillationStep().attach(model, None)
    assert step.inspect(batch) is None
    with pytest.raises(DataError, match=said):
        step.laid_out(batch, "batch 0")


def test_a_batch_of_the_other_family(batch, model):
    step = DistillationStep().attach(tiny_model(), None)
    with pytest.raises(DataError, match="has decoder_input_ids, which only an encoder-decoder takes"):
        step.laid_out(batch, "batch 0")
    with pytest.raises(ModelError, match="made for an encoder-decoder, but LlamaForCausalLM is a decoder"):
        logits_of(tiny_model(), batch)
    with pytest.raises(ModelError, match="made for a decoder, but T5ForConditionalGeneration is an encoder-decoder"):
        logits_of(model, {name: batch[name] for name in ("input_ids", "attention_mask", "labels")})


class TestRefused:
    """Before rows are read: there are none."""

    def fit(self, student, teacher, tmp_path, **settings):
        module = KDLightningModule(student, teacher, **settings)
        data = SRDDataModule(str(tmp_path / "no_such.jsonl"), tokenizer=ByT5Tokenizer(), schedule={0: 1.0})
        Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=1).fit(module, data)

    @pytest.mark.parametrize(
        "settings",
        [{"packing": True}, {"compile": True}, {"micro_batch_tokens": 64}, {"rollouts": GKD()}],
        ids=lambda given: next(iter(given)),
    )
    def test_settings_for_decoders(self, settings, tmp_path):
        said = f"{next(iter(settings))} is for decoders, but the student is an encoder-decoder; leave it out"
        with pytest.raises(SettingError, match=said):
            self.fit(tiny("t5"), tiny("t5", 1), tmp_path, **settings)

    def test_one_of_each(self, tmp_path):
        one, other = "an encoder-decoder whose decoder begins with token", "a decoder"
        for student, teacher, said in (
            (tiny("t5"), tiny_model(), f"{one} 0 and the teacher {other},"),
            (tiny_model(), tiny("bart"), f"{other} and the teacher {one} 1,"),
            (tiny("t5"), tiny("bart"), f"{one} 0 and the teacher {one} 1,"),
        ):
            with pytest.raises(ModelError, match=f"^the student is {said} so no batch is made for both"):
                self.fit(student, teacher, tmp_path)

    def test_no_token_to_begin_with(self, tmp_path):
        student = tiny("t5")
        student.config.decoder_start_token_id = None
        with pytest.raises(ModelError, match="does not say with which token its decoder begins; set its decoder_start"):
            self.fit(student, None, tmp_path, kd_weight=0.0)

    def test_a_cut(self, tmp_path):
        tiny("t5").save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="keep_layers cuts decoders, but T5Config is of an encoder-decoder"):
            Pretrained(str(tmp_path), keep_layers=[0]).check()

    def test_one_whose_decoder_looks_ahead(self):
        model = tiny("bart")
        forward = model.forward

        def looking_ahead(decoder_input_ids, **given):
            return forward(decoder_input_ids=decoder_input_ids.flip(1), **given)

        model.forward = looking_ahead
        with pytest.raises(ModelError, match="the last token changes what it says"):
            check_causal(model, "the student")
        check_causal(tiny("bart"), "the student")


def test_a_decoder_is_what_has_no_configuration():
    assert family_of(None) is DECODER
    assert family_of(T5Config(decoder_start_token_id=7)) == EncoderDecoder(7)


class TestSplit:
    @pytest.mark.parametrize("name", ["t5", "mt5", "bart"])
    def test_layers_are_the_decoders(self, name, batch):
        model = tiny(name)
        parts = split(model, batch)
        found = parts.layers(batch, (-1, 1, 0))
        states = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
            output_hidden_states=True,
        )
        for layer in (0, 1):
            expected = states.decoder_hidden_states[layer][batch["labels"] >= 0]
            same(found[layer], expected)
        same(parts.head()(found[-1]), states.logits[batch["labels"] >= 0])

    def test_no_position_goes_through_the_head(self, batch):
        model, shapes = tiny("bart"), []
        parts = split(model, batch)
        model.lm_head.register_forward_hook(lambda head, given, logits: shapes.append(list(logits.shape)))
        assert len(parts.hidden(batch)) == (batch["labels"] >= 0).sum()
        assert shapes == [[4, 0, 384]]

    def test_no_hook_is_left(self, model, batch):
        split(model, batch).hidden(batch)
        assert not model.get_output_embeddings()._forward_pre_hooks

    def test_logits_at_responses(self, model, batch, rows):
        expected = torch.cat([said_alone(model, row) for row in rows])
        same(response_logits(model, batch), expected)


class Mean(DistillationLoss):
    """A loss of all logits, which are shifted against the labels as those of decoders are."""

    def divergence(self, teacher_logp, student_logp):
        return ForwardKL().divergence(teacher_logp, student_logp)

    def forward(self, student_logits, teacher_logits, labels):
        return super().forward(student_logits, teacher_logits, labels)


def test_a_loss_of_all_logits_is_given_what_it_expects(model, batch):
    teacher = tiny("t5", 1)
    found, expected = (
        DistillationStep(chunk=chunk).attach(model, teacher).objective(batch, loss, 0.5)
        for chunk, loss in (("auto", Mean()), (2, ForwardKL()))
    )
    assert found.kd.item() == pytest.approx(expected.kd.item(), rel=1e-5)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_criteria_of_two_models(model, rows):
    reflected = ReflectionBatch(model, ByT5Tokenizer(), rows, Decoding(max_new_tokens=2))
    teacher = tiny("t5", 1)
    own, theirs = ([said_alone(one, row).log_softmax(-1) for row in rows] for one in (model, teacher))
    expected = [(t.exp() * (t - s)).sum(-1).mean().item() for s, t in zip(own, theirs, strict=True)]
    with torch.no_grad():
        assert TeacherKL(teacher).scores(reflected) == pytest.approx(expected, rel=1e-4)
        assert all(score > 0 for score in InstructionFollowingDifficulty().scores(reflected))


@torch.no_grad()
def argmax_loop(model, prompt, steps):
    ids = [model.config.decoder_start_token_id]
    while len(ids) <= steps:
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([ids])).logits
        if (best := int(logits[0, -1].argmax())) == 1:
            break
        ids.append(best)
    return " ".join(map(str, ids[1:]))


@pytest.mark.parametrize("steps_per_round", [2, 5, 16])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_answers_are_those_of_a_loop(name, steps_per_round, monkeypatch):
    """Each prompt alone, though together they are padded, leave when they have ended, and have limits of their own."""
    monkeypatch.setattr(generation, "ROUND", steps_per_round)
    model, limits = tiny(name, 5), [12, 3, 12, 9]
    prompts = [[70, 71, 72, 1], [80, 1], [90, 91, 92, 93, 94, 95, 1], [100, 101, 102, 1]]
    expected = [argmax_loop(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert len(set(expected)) > 2
    assert generate(model, Numbers(), prompts, Decoding(max_new_tokens=12), limits=limits) == expected


def test_answers_beside_their_prompts(model, batch):
    found = answers(model, ByT5Tokenizer(), batch, Decoding(max_new_tokens=3))
    assert [row["prompt"] for row in found] == [row["instruction"] for row in make_rows(4)]
    assert [row["response"] for row in found] == [row["output"] for row in make_rows(4)]


class TestPretrained:
    @pytest.fixture
    def folder(self, tmp_path):
        tiny("t5").save_pretrained(tmp_path / "model")
        ByT5Tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def fit(self, student, folder, **settings):
        module = KDLightningModule(student, Pretrained(str(folder)), kd_weight=0.5, **settings)
        data = SRDDataModule(make_rows(8), str(folder), schedule={0: 0.5}, decoding=Decoding(max_new_tokens=2))
        export = HuggingFaceExport(str(folder.parent / "out"))
        Trainer(**QUIET, default_root_dir=folder.parent, max_epochs=1, callbacks=[export]).fit(module, data)
        return module, data

    def test_adapters_train_and_are_merged(self, folder):
        module, data = self.fit(Pretrained(str(folder), lora={"r": 2, "init_lora_weights": False}), folder)
        assert type(module.student).__name__ == "PeftModelForSeq2SeqLM"
        assert module.step.parts is not None
        loaded, row = AutoModelForSeq2SeqLM.from_pretrained(folder.parent / "out"), data.rows["train"][0]
        expected = said_alone(module.student.eval(), row)
        same(said_alone(loaded.eval(), row), expected)
        assert (said_alone(tiny("t5"), row) - expected).abs().max() > 0.1

    def test_an_adapter_alone_names_its_model(self, folder, tmp_path):
        student = Pretrained(str(folder), lora={"r": 2}).model()
        student.save_pretrained(tmp_path / "adapter")
        source = Pretrained(str(tmp_path / "adapter"))
        source.check()
        assert family_of(source.config()) == T5
        assert source.model().config.is_encoder_decoder


def test_losses_of_hidden_states(batch):
    student, teacher, loss = tiny("bart"), tiny("bart", 1), HiddenStateMSE(32, 32, weight=0.1)
    step = DistillationStep().attach(student, teacher)
    found = step.objective(step.laid_out(batch, "batch"), ForwardKL(), 0.0, auxiliary=[loss])
    given = {name: values for name, values in batch.items() if name != "labels"}
    states = [model.model(**given).last_hidden_state[batch["labels"] >= 0] for model in (student, teacher)]
    expected = (loss.projection(states[0]) - states[1]).square().mean()
    assert (found.loss - found.ce).item() == pytest.approx(0.1 * expected.item(), rel=1e-4)


def test_a_loop_of_ones_own_with_batches_of_transformers(model, rows):
    features = [{"input_ids": row["input_ids"][: row["prompt_length"]], "labels": response(row)} for row in rows]
    loader = DataLoader(features, 2, collate_fn=DataCollatorForSeq2Seq(ByT5Tokenizer(), model=model))
    module = KDLightningModule(tiny("t5"), tiny("t5", 1), kd_weight=0.5)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module, loader)
    assert trainer.global_step == 2


def test_tokens_of_both_texts_are_counted(rows, batch, tmp_path):
    benchmark = RuntimeBenchmark()
    loader = DataLoader(rows, 4, collate_fn=lambda some: T5.collate(some, pad_token_id=0))
    module = KDLightningModule(tiny("t5"), kd_weight=0.0)
    Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path, callbacks=[benchmark]).fit(module, loader)
    (stage,) = benchmark.report["stages"]
    assert stage["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert stage["positions"] == batch["input_ids"].numel() + batch["labels"].numel()
