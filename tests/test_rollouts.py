"""Training with the student's own text: what stands in its batches, what is learnt of them, and that runs go on."""

import copy
import itertools
import logging
import re
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import references
import torch
from tiny import QUIET, lively_model, make_rows, tiny_model, tokenised
from torch.optim import SGD
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from srd_lightning import (
    ALPACA,
    GKD,
    CacheSettings,
    ContrastivePair,
    Decoding,
    DistiLLM,
    ForwardKL,
    HiddenStateMSE,
    KDLightningModule,
    MiniLLM,
    ReflectionReplay,
    RuntimeBenchmark,
    SRDDataModule,
)
from srd_lightning.command.trainer import SRDTrainer
from srd_lightning.criteria import NegativeLogLikelihood
from srd_lightning.curation.score_store import ScoreStore
from srd_lightning.data.tokenization import with_answers
from srd_lightning.errors import DataError, ResumeError, SettingError
from srd_lightning.rollouts.base import Models, Moment, Text
from srd_lightning.rollouts.minillm import TeacherMix
from srd_lightning.rollouts.replay import ReplayedBatches

GREEDY = Decoding(max_new_tokens=6)
SAMPLED = Decoding(max_new_tokens=6, temperature=1.0)
EOS = 1


class Seen(L.Callback):
    """Keeps every batch, whether it was the student's own, and its loss; saves a checkpoint in the middle."""

    def __init__(self, save=None, look=lambda module, batch, own: None):
        self.save, self.look = save, look
        self.batches, self.own, self.losses = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append({name: values.clone() for name, values in batch.items()})
        self.own.append(pl_module.rollouts_handle.objective(ForwardKL(), 0.25)[1] == 1.0)
        self.look(pl_module, batch, self.own[-1])

    def on_validation_end(self, trainer, pl_module):
        self.val_nll = float(trainer.callback_metrics["val_nll"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if self.save and trainer.fit_loop.epoch_loop.total_batch_idx == 4:
            trainer.save_checkpoint(self.save)


def data(rows=None, **options):
    rows = make_rows(12) if rows is None else rows
    options = {"schedule": {0: 1.0}, "batch_size": 4, "decoding": GREEDY, **options}
    return SRDDataModule({"train": rows, "validation": rows[:4]}, ByT5Tokenizer(), **options)


def fit(rollouts, folder, rows=None, seen=None, lr=0.1, ckpt_path=None, student=None, trainer=None, **options):
    """Train a student; return what was seen, and the module."""
    seen, student = seen or Seen(), student or lively_model(0, attention_dropout=0.5)
    options = {"optimizer": lambda weights: SGD(weights, lr=lr), **options}
    module = KDLightningModule(student, lively_model(1), rollouts=rollouts, **options)
    settings = {"max_epochs": 2, "default_root_dir": folder, "callbacks": [seen], **QUIET, **(trainer or {})}
    L.seed_everything(3, verbose=False)
    L.Trainer(**settings).fit(module, datamodule=rows or data(), ckpt_path=ckpt_path)
    return seen, module


def greedy_by_hand(model, prompt, tokens=6):
    """Take the likeliest token again and again, each from the whole text before it."""
    text, model = list(prompt), copy.deepcopy(model).eval()
    with torch.no_grad():
        for _ in range(tokens):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
            if text[-1] == EOS:
                break
    return text[len(prompt) :]


def read_off(batch):
    """Return prompt and response of each row, and see that mask and labels are those of the two."""
    rows = []
    fields = (batch[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
    for ids, mask, labels in zip(*fields, strict=True):
        real = sum(mask)
        first = next(place for place, label in enumerate(labels) if label != -100)
        assert mask == [1] * real + [0] * (len(mask) - real)
        assert labels == [-100] * first + ids[first:real] + [-100] * (len(ids) - real)
        rows.append((ids[:first], ids[first:real]))
    return rows


def that_ends(model, prompt):
    """Let a model say the end token where it would have said its third token."""
    third = greedy_by_hand(model, prompt)[2]
    model.lm_head.weight.data[EOS] = 1.01 * model.lm_head.weight.data[third]
    return model


def divergences(module, batch):
    """Return the mean forward KL and the mean cross-entropy of a batch, token by token in float64."""
    kl, ce, tokens = 0.0, 0.0, 0
    with torch.no_grad():
        q, p = (
            copy.deepcopy(model).eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for model in (module.student, module.teacher)
        )
    for row, place in (batch["labels"] != -100).nonzero().tolist():
        theirs, own = references.softmax(p[row, place - 1]), references.softmax(q[row, place - 1])
        kl += float(references.forward_kl(theirs, own))
        ce -= float(own[batch["labels"][row, place]].log())
        tokens += 1
    return kl / tokens, ce / tokens


def test_texts_are_what_the_student_says_now_to_the_same_prompts(tmp_path):
    """They end with an end token that is learnt, or without one where they were cut; padding is the end token too."""
    tokenizer = ByT5Tokenizer(pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    rows = SRDDataModule(make_rows(12), tokenizer, schedule={0: 1.0}, batch_size=4)
    answers = {}

    def look(module, batch, own):
        assert all(part.training for part in module.student.modules())
        for prompt, response in read_off(batch):
            if own:
                assert response == greedy_by_hand(module.student, prompt)
                answers.setdefault(tuple(prompt), set()).add(tuple(response))
            else:
                assert response[-1] == EOS

    prompt = tokenizer(ALPACA(make_rows(12)[3]).prompt, add_special_tokens=False).input_ids
    student = that_ends(lively_model(0, attention_dropout=0.5), prompt)
    seen, _ = fit(GKD(0.5, GREEDY), tmp_path, rows, Seen(look=look), student=student, trainer={"max_epochs": 4})
    assert 3 <= sum(seen.own) <= 9
    assert answers.keys() <= {tuple(row["input_ids"][: row["prompt_length"]]) for row in rows.rows["train"]}
    texts = set().union(*answers.values())
    assert {text[-1] == EOS for text in texts} == {True, False}
    assert all(EOS not in text[:-1] and (len(text) == 6 or text[-1] == EOS) for text in texts)
    assert any(len(found) > 1 for found in answers.values())  # it has learnt, and answers otherwise


def test_of_own_text_only_the_divergence_is_learnt(tmp_path):
    wanted = []

    def look(module, batch, own):
        kl, ce = divergences(module, batch)
        wanted.append(kl if own else 0.7 * ce + 0.3 * kl)

    seen, _ = fit(GKD(0.5, SAMPLED), tmp_path, seen=Seen(look=look), kd_weight=0.3, student=lively_model(0))
    assert set(seen.own) == {True, False}
    assert seen.losses == pytest.approx(wanted, rel=1e-4)


def test_own_text_stays_own_where_a_hook_makes_another_batch_of_it(tmp_path, monkeypatch):
    def copied(module, batch, dataloader_idx):
        return {name: values.clone() for name, values in batch.items()}

    monkeypatch.setattr(KDLightningModule, "on_after_batch_transfer", copied)
    _, module = fit(GKD(1.0, SAMPLED), tmp_path, kd_weight=0.3)
    assert "train_ce" not in module.trainer.callback_metrics


def test_batches_of_own_text_are_padded_as_all_are(tmp_path):
    options = {"student": lively_model(0), "lr": 1.0}
    seen, _ = fit(GKD(0.5, SAMPLED), tmp_path, data(pad_to_multiple_of=32), **options)
    expected, _ = fit(GKD(0.5, SAMPLED), tmp_path, data(), **{**options, "student": lively_model(0)})
    assert set(seen.own) == {True, False}
    assert {batch["input_ids"].shape[1] % 32 for batch in seen.batches} == {0}
    assert {batch["input_ids"].shape[1] % 32 for batch in expected.batches} != {0}
    assert [read_off(batch) for batch in seen.batches] == [read_off(batch) for batch in expected.batches]


def test_a_buffer_that_is_less_than_a_batch_of_ones_own_loader():
    models = Models(None, None, None, ByT5Tokenizer(), Moment(0, 0, 0, 0, lambda: 0.0))
    with pytest.raises(SettingError, match="draws batches of 3 rows from the texts that it keeps, but capacity is 2"):
        DistiLLM(capacity=2).texts([Text([1], [2])] * 3, models)


def test_rows_without_a_prompt_are_refused(tmp_path):
    ids = torch.full((2, 4), 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    module = KDLightningModule(tiny_model(0), tiny_model(1), rollouts=GKD(1.0, GREEDY), tokenizer=ByT5Tokenizer())
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    with pytest.raises(DataError, match=r"training batch 0 has a row without a prompt, .* give GKD rows whose labels"):
        L.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET).fit(module, loader)


def test_a_loss_can_have_another_divergence_for_own_text(tmp_path):
    wanted = []

    def look(module, batch, own):
        kl, _ = divergences(module, batch)
        wanted.append(1.25 * kl if own else 0.75 * kl)

    loss = ContrastivePair(ForwardKL(), ForwardKL(), b=1.25)
    seen, _ = fit(GKD(0.5, GREEDY), tmp_path, seen=Seen(look=look), loss=loss, student=lively_model(0))
    assert set(seen.own) == {True, False}
    assert seen.losses == pytest.approx(wanted, rel=1e-4)


def test_validation_is_by_the_references(tmp_path):
    own, _ = fit(GKD(1.0, SAMPLED), tmp_path, lr=0.0)
    plain, _ = fit(None, tmp_path, lr=0.0)
    assert own.losses != plain.losses
    assert own.val_nll == plain.val_nll


def test_sampled_texts_follow_from_seed_batch_and_rank():
    student, teacher, rows = lively_model(0), lively_model(1), [Text([9, 8], [7])] * 3

    def texts(batch, rank, decoding=SAMPLED):
        moment = Moment(0, batch, batch, rank, lambda: 0.0)
        models = Models(lambda: student, teacher, None, ByT5Tokenizer(), moment)
        return GKD(1.0, decoding).texts(rows, models)

    torch.manual_seed(0)
    before, first = torch.get_rng_state(), texts(0, 0)
    assert torch.equal(torch.get_rng_state(), before)  # the run's own randomness is left as it was
    torch.manual_seed(5)
    assert texts(0, 0) == first
    others = [texts(1, 0), texts(0, 1), texts(0, 0, Decoding(max_new_tokens=6, temperature=1.0, seed=11))]
    assert all(found != first for found in others)


def test_the_share_of_own_batches_and_that_it_is_the_same_on_all_ranks():
    draws = [[GKD(0.3).is_own(Moment(0, n, n, rank, lambda: 0.0)) for n in range(2000)] for rank in (0, 1)]
    assert draws[0] == draws[1]
    assert sum(draws[0]) / 2000 == pytest.approx(0.3, abs=0.04)  # four standard deviations
    replayed = [ReplayedBatches(0.3, 0)(epoch, batch) for epoch in range(20) for batch in range(100)]
    assert sum(replayed) / 2000 == pytest.approx(0.3, abs=0.04)


def test_the_share_of_distillm_rises_at_the_end_of_every_validation_that_is_worse(tmp_path):
    phis = []

    class Phi(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            phis.append(distillm.phi)

    distillm = DistiLLM(tolerance=-100.0, rise=0.4, decoding=GREEDY)
    trainer = {"max_epochs": 5, "num_sanity_val_steps": 2, "callbacks": [Phi(), seen := Seen()]}
    fit(distillm, tmp_path, seen=seen, trainer=trainer)
    assert phis == pytest.approx([0.0, 0.0, 0.4, 0.8, 1.0])
    assert seen.own[:6] == [False] * 6
    assert seen.own[12:] == [True] * 3

    distillm = DistiLLM(rise=0.4)
    for loss, phi in [(2.0, 0.0), (2.09, 0.0), (2.1, 0.0), (2.3, 0.4), (1.0, 0.4), (1.2, 0.8), (9.0, 1.0), (9.9, 1.0)]:
        distillm.validated({"val_nll": torch.tensor(loss)})
        assert distillm.phi == pytest.approx(phi)


@pytest.mark.parametrize(
    ("ratio", "share"),
    [("decreasing", lambda t: 0.8 * (1 - t)), ("increasing", lambda t: 0.8 * t), ("constant", lambda t: 0.4)],
)
def test_what_a_batch_of_distillm_is(ratio, share):
    """Written anew until the buffer is full; then by the share of planned steps; the oldest texts make room."""
    written = []

    class Writer:
        def __init__(self, batch):
            self.moment = Moment(0, batch, batch, 0, lambda: batch / 200)

        def answer(self, rows, decoding, engine):
            written.append([Text(row.prompt, [self.moment.batch, number]) for number, row in enumerate(rows)])
            return written[-1]

    distillm, rows = DistiLLM(0.8, replay_ratio=ratio, capacity=6), [Text([1], [2])] * 4
    kinds = {"anew": 0, "again": 0, "as it came": 0}
    for batch in range(200):
        moment, before = Moment(0, batch, batch, 0, lambda: 0.0), len(written)
        kept = [text for texts in written for text in texts][-6:]
        u = moment.draw(distillm.decoding.seed)
        assert distillm.is_own(moment) == (u < 0.8)
        if u >= 0.8:
            kinds["as it came"] += 1
            continue
        texts = distillm.texts(rows, Writer(batch))
        if len(kept) < 6 or u < share(batch / 200):
            assert texts == written[-1]
            assert len(written) == before + 1
            kinds["anew"] += 1
        else:
            assert len(written) == before
            assert len({id(text) for text in texts}) == 4
            assert all(text in kept for text in texts)
            kinds["again"] += 1
    assert min(kinds.values()) > 15


def test_progress_is_in_optimizer_steps_of_the_whole_curriculum(tmp_path):
    found = []

    def look(module, batch, own):
        moment = module.rollouts_handle.moment(module.trainer)
        found.append((moment.epoch, moment.batch_idx - 1, moment.batch - 1, moment.progress()))

    rows = data(schedule={0: 0.5, 1: 1.0}, batch_size=2, scores=str(tmp_path / "scores"))
    fit(DistiLLM(0.5, decoding=GREEDY), tmp_path, rows, Seen(look=look), trainer={"accumulate_grad_batches": 2})
    steps = [0, 0, 1, 2, 2, 3, 3, 4, 4]  # of 5: three batches make two, six make three
    expected = [(0, n, n, steps[n] / 5) for n in range(3)] + [(1, n, n + 3, steps[n + 3] / 5) for n in range(6)]
    assert found == expected


METHODS = {
    "distillm": (lambda: DistiLLM(0.9, rise=0.02, tolerance=-100.0, capacity=6, decoding=SAMPLED), {}),
    "replay": (lambda: ReflectionReplay(0.5), {"schedule": {0: 0.5, 1: 1.0}, "refresh": [1], "batch_size": 2}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_been_interrupted(method, tmp_path):
    make, options = METHODS[method]
    options = {**options, "scores": str(tmp_path / "scores")}
    middle, three = tmp_path / "middle.ckpt", {"trainer": {"max_epochs": 3}}
    whole, module = fit(make(), tmp_path, data(**options), Seen(save=middle), **three)
    again, resumed = fit(make(), tmp_path, data(**options), ckpt_path=middle, **three)
    assert sum(again.own) > 0
    assert again.own == whole.own[5:]
    for ours, theirs in zip(again.batches, whole.batches[5:], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for ours, theirs in zip(resumed.student.parameters(), module.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    if method == "distillm":
        ours, theirs = resumed.rollouts_handle.rollouts, module.rollouts_handle.rollouts
        assert (ours.phi, list(ours.kept)) == (theirs.phi, list(theirs.kept))
        assert len(ours.kept) == 6


def test_other_batches_than_were_replayed_are_no_resume(tmp_path):
    options = {"schedule": {0: 0.5}, "scores": str(tmp_path / "scores")}
    fit(ReflectionReplay(0.5), tmp_path, data(batch_size=1, **options), Seen(save=tmp_path / "middle.ckpt"))
    for other in (ReflectionReplay(0.25), ReflectionReplay(0.5, seed=1), None):
        with pytest.raises(ResumeError, match=r"replay was 'ReplayedBatches\(seed=0, share=0.5\)' and is .*`rollouts`"):
            fit(other, tmp_path, data(batch_size=1, **options), ckpt_path=tmp_path / "middle.ckpt")


def test_another_number_of_ranks_shares_the_texts_of_all():
    def text(number):
        return Text([number, 5], [number])

    states = []
    for rank in (0, 1):
        one = DistiLLM(capacity=3)
        one.kept.extend([text(10 * rank + number) for number in range(3)])
        one.phi = 0.4
        states.append(one.state())
    found = []
    for rank in range(3):
        distillm = DistiLLM(capacity=3)
        distillm.load(states, rank, 3)
        assert distillm.phi == 0.4
        found += distillm.kept
    assert sorted(found) == sorted(text(10 * rank + number) for rank in (0, 1) for number in range(3))
    alone = DistiLLM(capacity=3)
    alone.load(states, 0, 1)
    assert list(alone.kept) == [text(11), text(2), text(12)]  # the newest of both


class TestReflectionReplay:
    def options(self, tmp_path, **options):
        staged = {"schedule": {0: 0.5, 1: 0.75}, "batch_size": 2, "scores": str(tmp_path / "scores")}
        return {**staged, "decoding": Decoding(max_new_tokens=5), **options}

    def test_batches_hold_the_answers_of_the_reflection(self, tmp_path):
        """Those that were cut then have no end token, whatever their texts are tokenised to now."""
        rows = data(**self.options(tmp_path))
        student = lively_model(7)
        student.lm_head.weight.data[EOS] *= 4  # some answers end
        before = copy.deepcopy(student)
        seen, module = fit(ReflectionReplay(0.5), tmp_path, rows, lr=1.0, student=student)
        texts = rows.curation.scores.answers(rows.curation.ids)
        by_prompt = {
            tuple(row["input_ids"][: row["prompt_length"]]): (
                row["input_ids"][row["prompt_length"] :],
                texts[row["id"]],
            )
            for row in rows.rows["train"]
        }
        replayed = []
        for own, batch in zip(seen.own, seen.batches, strict=True):
            for prompt, response in read_off(batch):
                reference, answer = by_prompt[tuple(prompt)]
                ids = ByT5Tokenizer()(answer, add_special_tokens=False).input_ids
                if not own or not ids:
                    assert response == reference
                else:
                    ended = greedy_by_hand(before, prompt, 5)[-1] == EOS
                    assert response == ([*ids, EOS] if ended else ids)
                    replayed.append((ended, len(ids)))
        assert set(seen.own) == {True, False}
        assert {ended for ended, _ in replayed} == {True, False}
        assert any(not ended and length < 5 for ended, length in replayed), "some are cut that would not look so"
        assert module.generation_seconds == 0

    def test_answers_are_tokenised_as_responses(self):
        """Those that were cut, when they were generated or now, have no end token."""
        rows = tokenised(ByT5Tokenizer(), [{"instruction": "S", "output": word} for word in ("one", "two", "six")])
        prompt = rows[0]["input_ids"][: rows[0]["prompt_length"]]
        found = with_answers(rows, ["abc", "ab", "abcde"], ByT5Tokenizer(), len(prompt) + 4, [3, 3, 9])
        a, b, c, d = ByT5Tokenizer()("abcd", add_special_tokens=False).input_ids
        assert [ids[len(prompt) :] for ids in found["input_ids"]] == [[a, b, c], [a, b, EOS], [a, b, c, d]]
        assert [ids[: len(prompt)] for ids in found["input_ids"]] == [prompt] * 3
        assert list(found["length"]) == [len(ids) for ids in found["input_ids"]]
        assert (list(found["id"]), found["response"][1]) == (list(rows["id"]), "ab")

    def test_a_row_without_an_answer_keeps_its_response(self, tmp_path):
        rows = data(**self.options(tmp_path))
        fit(ReflectionReplay(1.0), tmp_path, rows)
        staged = rows.staged
        ids = list(rows.rows["train"]["id"])
        answers = dict.fromkeys(ids, "a b")
        answers[ids[1]] = "  "
        del answers[ids[2]]
        answered = staged.answered
        answered.renew(np.arange(12), staged.rows, answers, [np.inf] * 12)
        pool, _ = staged.of_epoch(1)
        every = answered.in_place(pool, np.ones(len(pool), dtype=bool))
        places = list(range(len(every)))[::-1]
        assert every.__getitems__(places) == [every[place] for place in places]
        kept = {row["id"]: row["response"] for row in every.__getitems__(places)}
        own = {row["id"]: row["response"] for row in rows.rows["train"]}
        assert kept == {row: own[row] if row in ids[1:3] else "a b" for row in kept}

    @pytest.mark.parametrize("kept", ["nothing", "file", "file_says"])
    def test_answers_of_which_it_is_not_kept_whether_they_were_cut(self, tmp_path, kept):
        """Those of an older folder are taken to be cut where they are as long as they may be; those of a file never,
        unless it says so."""
        data(**self.options(tmp_path), student=lively_model(0)).setup("fit")
        table = pa.concat_tables(pq.read_table(part) for part in (tmp_path / "scores").glob("part-*"))
        answers = ["a b c", "a b"] * 6
        table = table.set_column(table.column_names.index("answer"), "answer", pa.array(answers))
        table = table.drop_columns(["cut"])
        if kept == "file_says":
            table = table.append_column("cut", pa.array([False, True] * 6))
        path = tmp_path / "scores.parquet"
        pq.write_table(table, path)
        if kept == "nothing":
            store = ScoreStore.reopen(tmp_path / "scores")
            for part in store.folder.glob("part-*"):
                part.unlink()
            store.append(table.to_pylist())
            path = store.folder
        rows = data(**self.options(tmp_path, scores=str(path)), student=lively_model(0))
        rows.setup("fit")
        rows.staged.replay(512)
        ends = {(row["response"], row["input_ids"][-1] == EOS) for row in rows.staged.answered.rows}
        wanted = {"nothing": (False, True), "file": (True, True), "file_says": (True, False)}
        assert ends == set(zip(("a b c", "a b"), wanted[kept], strict=True))

    def test_with_a_cached_teacher_the_losses_are_those_of_a_live_one(self, tmp_path, monkeypatch):
        options = self.options(tmp_path)
        live, _ = fit(ReflectionReplay(0.5), tmp_path, data(**options), student=lively_model(0))
        cache = CacheSettings("hidden", dtype="float32")
        module = KDLightningModule(
            lively_model(0), lively_model(1), rollouts=ReflectionReplay(0.5), teacher_cache=cache
        )
        trainer = SRDTrainer(default_root_dir=tmp_path, **QUIET)
        trainer.cache_teacher(module, data(**options))
        monkeypatch.setattr("srd_lightning.teacher.precompute._fill", None)  # it is complete already
        cached, module = fit(
            ReflectionReplay(0.5), tmp_path, data(**options), student=lively_model(0), teacher_cache=cache
        )
        assert module.teacher_handle.cached is not None
        assert cached.losses == pytest.approx(live.losses, rel=1e-4)

    def test_a_refresh_renews_the_answers_to_rows_still_to_come(self, tmp_path):
        rows = data(**self.options(tmp_path, refresh=[1]))
        seen, _ = fit(ReflectionReplay(1.0), tmp_path, rows, lr=1.0, student=lively_model(0))
        assert all(seen.own)
        first = rows.curation.scores
        ids = list(rows.rows["train"]["id"])
        folder = first.folder / rows.staged.generations[1]
        entered = {ids[row] for row in rows.staged.curriculum.order[:6].tolist()}
        before, after = first.answers(pa.array(ids)), ScoreStore.reopen(folder).answers(pa.array(ids))
        assert any(after[row] != before[row] for row in ids if row not in entered)
        tokenizer = ByT5Tokenizer()
        for prompt, response in itertools.chain(*map(read_off, seen.batches[3:])):
            row = next(row for row in rows.rows["train"] if row["input_ids"][: row["prompt_length"]] == prompt)
            answer = (before if row["id"] in entered else after)[row["id"]]
            found = tokenizer(answer, add_special_tokens=False).input_ids
            assert response[: len(found)] == found or not found


def gpt2():
    """A model whose positions are learnt, so that those of padding would show; with more rows than the student."""
    torch.manual_seed(1)
    config = {"vocab_size": 400, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**config))


class TestMiniLLM:
    @pytest.mark.parametrize(
        ("alpha", "normalized", "clip"), [(0.0, False, 100.0), (0.2, True, 100.0), (0.5, True, 0.3)]
    )
    def test_value_and_gradient_against_loops(self, alpha, normalized, clip):
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(3, 7, 5, generator=generator) * 2 for _ in range(2))
        labels = torch.randint(5, (3, 7), generator=generator)
        labels[0, :3] = labels[1, :1] = labels[1, 5:] = labels[2, :6] = -100
        student.requires_grad_()
        found = MiniLLM(1.0, alpha, normalized, clip).loss(ForwardKL())(student, teacher, labels)
        (gradient,) = torch.autograd.grad(found, student)
        exact = student.detach().double().requires_grad_()
        expected = references.sequence_reverse_kl(exact, teacher, labels, alpha, normalized, clip)
        (wanted,) = torch.autograd.grad(expected, exact)
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)
        first = references.sequence_reverse_kl(exact, teacher, labels, alpha, normalized, clip=1e-12)
        assert found.item() == pytest.approx(first.item(), rel=1e-4)  # the value is the exact term alone

    @pytest.mark.parametrize(("length", "alpha"), [(1, 0.0), (1, 0.2), (1, 0.9), (2, 0.0)])
    def test_the_expected_gradient_is_that_of_the_sequences_reverse_kl(self, length, alpha):
        """All texts of three tokens are listed. With mixed sampling, weights of single steps are exact for one only."""
        tokens = range(3)
        torch.manual_seed(0)
        heads = [torch.randn(3**place, 3, dtype=torch.float64, requires_grad=True) for place in range(length)]
        theirs = [torch.randn(3**place, 3, dtype=torch.float64) for place in range(length)]
        loss, estimate, exact = MiniLLM(1.0, alpha, length_normalized=False).loss(ForwardKL()), 0.0, 0.0
        for text in itertools.product(tokens, repeat=length):
            before = [sum(token * 3**place for place, token in enumerate(text[:n])) for n in range(length)]
            q, p = (
                [head[row].softmax(-1)[token] for head, row, token in zip(models, before, text, strict=True)]
                for models in (heads, theirs)
            )
            sampled = torch.stack([(1 - alpha) * a + alpha * b for a, b in zip(q, p, strict=True)]).prod().detach()
            logits, teacher = (
                torch.stack([*(head[row] for head, row in zip(models, before, strict=True)), torch.zeros(3)])[None]
                for models in (heads, theirs)
            )
            estimate = estimate + sampled * length * loss(logits, teacher, torch.tensor([[-100, *text]]))
            q, p = torch.stack(q).prod(), torch.stack(p).prod()
            exact = exact + q * (q / p).log()
        for found, wanted in zip(torch.autograd.grad(estimate, heads), torch.autograd.grad(exact, heads), strict=True):
            torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("make", [lambda: lively_model(1, vocab_size=400), gpt2])
    def test_tokens_are_sampled_from_the_mixture(self, make):
        """Whatever stands before them: padding on the left, texts that were begun, another round of generation."""
        student, teacher = lively_model(0), make().eval()
        prompts = [[5, 6, 7, 8], [9, 4]]
        ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 4]])
        mixed = TeacherMix(teacher, 0.25, 384, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))
        texts = [list(prompt) for prompt in prompts]
        for step in range(3):
            with torch.no_grad():
                scores = torch.stack([student(torch.tensor([text])).logits[0, -1] for text in texts])
                theirs = torch.stack([teacher(torch.tensor([text])).logits[0, -1, :384] for text in texts])
                found = mixed(ids, scores)
            expected = 0.75 * scores.softmax(-1) + 0.25 * theirs.softmax(-1)
            torch.testing.assert_close(found.exp(), expected, rtol=1e-4, atol=1e-7)
            token = torch.tensor([[11 + step], [21 + step]])
            ids = torch.cat([ids, token], dim=1)
            texts = [[*text, int(new)] for text, new in zip(texts, token, strict=True)]

    def test_a_teacher_alone_writes_what_it_says(self, tmp_path):
        seen, module = fit(MiniLLM(teacher_mix=1.0, max_new_tokens=20), tmp_path, student=lively_model(0))
        likely = []
        for batch in seen.batches:
            with torch.no_grad():
                for model in (module.teacher, module.student):
                    logp = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(
                        -1
                    )
                    learnt = batch["labels"][:, 1:] != -100
                    likely.append(logp[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0][learnt].mean())
        assert all(seen.own)
        assert min(likely[::2]) > max(likely[1::2])

    def test_the_objective_of_a_step_is_this_loss(self, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        wanted = []

        def look(module, batch, own):
            with torch.no_grad():
                q, p = (
                    copy.deepcopy(model).eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                    for model in (module.student, module.teacher)
                )
            wanted.append(float(references.sequence_reverse_kl(q, p, batch["labels"], 0.2, True, clip=1e-12)))

        seen, _ = fit(MiniLLM(max_new_tokens=5), tmp_path, seen=Seen(look=look), student=lively_model(0), kd_weight=0.5)
        assert seen.losses == pytest.approx(wanted, rel=1e-3)
        (said,) = [record.message for record in caplog.records if "all logits are made" in record.message]
        assert "because of MiniLLM: the rewards of a token are those of the text behind it; where memory" in said
        assert "chunk" not in said


def test_an_engine_of_ones_own_writes(tmp_path):
    asked = []

    def engine(prompts, decoding, seed):
        asked.append((prompts, decoding, seed))
        return [[40 + len(prompts), EOS] for _ in prompts]

    seen, _ = fit(GKD(0.5, SAMPLED, engine), tmp_path)
    assert len(asked) == sum(seen.own) > 0
    assert len({seed for *_, seed in asked}) == len(asked)
    for own, batch in zip(seen.own, seen.batches, strict=True):
        assert not own or all(response == [44, EOS] for _, response in read_off(batch))


@pytest.mark.parametrize(
    ("answers", "said"),
    [([[5]], "returned 1 for 4"), ("text", "returned str"), ([[]] * 4, r"returned \[\] for one"), ([["a"]] * 4, "'a'")],
)
def test_an_engine_that_returns_something_else(answers, said, tmp_path):
    with pytest.raises(DataError, match=f"must return a list of 1 to 6 token ids for each prompt, but .*{said}"):
        fit(GKD(1.0, SAMPLED, lambda *_: answers), tmp_path)


@pytest.mark.parametrize("method", [GKD(1.0, SAMPLED), MiniLLM(max_new_tokens=6), MiniLLM(1.0, 0.0, max_new_tokens=6)])
def test_no_token_is_written_that_the_teacher_does_not_know(method):
    student, teacher = tiny_model(0, vocab_size=1024), tiny_model(1).eval()
    models = Models(lambda: student, teacher, 384, ByT5Tokenizer(), Moment(0, 0, 0, 0, lambda: 0.0))
    written = method.texts([Text([5, 6, 7], [8]), Text([9], [4])], models)
    assert max(token for text in written for token in text.response) < 384


def test_rows_of_which_nothing_is_learnt_stay_as_they_are():
    student = lively_model(0)
    models = Models(lambda: student, student, None, ByT5Tokenizer(), Moment(0, 0, 0, 0, lambda: 0.0))
    written = GKD(1.0, GREEDY).texts([Text([5, 6], []), Text([7, 8], [9])], models)
    assert written == [Text([5, 6], []), Text([7, 8], greedy_by_hand(student, [7, 8]))]
    assert GKD(1.0, GREEDY).texts([Text([5, 6], [])], models) == [Text([5, 6], [])]


def test_a_method_of_ones_own_is_that_of_the_manual(tmp_path):
    manual = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    (code,) = re.findall(r"```python\n(.*?class Alternating.*?)```", manual, re.DOTALL)
    exec(code, made := {})
    own = made["Alternating"]()
    own.decoding = GREEDY
    assert fit(own, tmp_path)[0].own == [False, True] * 3


def test_the_time_of_writing_is_no_waiting(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def engine(prompts, decoding, seed):
        clock[0] += 10.0
        return [[EOS]] * len(prompts)

    benchmark = RuntimeBenchmark()
    fit(GKD(1.0, SAMPLED, engine), tmp_path, trainer={"callbacks": [benchmark]})
    (stage,) = benchmark.report["stages"]
    assert (stage["generation_seconds"], stage["seconds"], stage["waiting_seconds"]) == (60.0, 60.0, 0.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GKD(1.5), r"share must lie in \[0, 1\], but is 1.5"),
        (lambda: GKD(decoding=Decoding(bf16=True)), "decoding.bf16 would copy the student for every batch"),
        (lambda: GKD(decoding=Decoding(max_length_ratio=1.5)), "max_length_ratio is for the reflection"),
        (lambda: DistiLLM(replay_ratio="more"), "replay_ratio must be decreasing, .* but is 'more'"),
        (lambda: DistiLLM(capacity=0), "capacity must be a whole number of at least 1, but is 0"),
        (lambda: DistiLLM(rise=-0.1), r"rise must lie in \[0, 1\]"),
        (lambda: MiniLLM(teacher_mix=2), r"teacher_mix must lie in \[0, 1\], but is 2"),
        (lambda: MiniLLM(reward_clip=0), "reward_clip must be positive"),
        (lambda: KDLightningModule(tiny_model(), tiny_model(1), rollouts=GKD), "rollouts must be an object such as"),
        (lambda: KDLightningModule(tiny_model(), kd_weight=0.0, rollouts=GKD()), "rollouts learn from what a teacher"),
    ],
)
def test_settings_that_cannot_be(make, said):
    with pytest.raises(SettingError, match=said):
        make()


@pytest.mark.parametrize(
    ("rollouts", "options", "rows", "trainer", "said"),
    [
        (
            GKD(),
            {"teacher_cache": "hidden"},
            {},
            {},
            "teacher_cache knows .* but GKD trains on texts that nobody knows",
        ),
        (MiniLLM(), {"teacher_cache": "topk"}, {}, {}, "but MiniLLM trains on texts"),
        (GKD(), {}, {"tokenizer": None}, {}, r"GKD writes texts and needs a tokenizer: give KDLightningModule"),
        (
            GKD(),
            {},
            {"max_prompt_length": 2000, "max_length": 2040},
            {},
            "max_prompt_length with decoding.max_new_tokens of GKD .* 2256",
        ),
        (DistiLLM(), {}, {}, {"limit_val_batches": 0}, "raises its share .* but nothing is validated"),
        (DistiLLM(), {}, {}, {"max_epochs": -1}, "replay_ratio decreasing needs the length of the run"),
        (DistiLLM(capacity=7), {}, {"batch_size": 8}, {}, "batches of 8 rows from .*, but capacity is 7; raise it"),
        (MiniLLM(), {"micro_batch_tokens": 64}, {}, {}, "MiniLLM needs the logits of whole sequences"),
        (MiniLLM(), {"auxiliary": [HiddenStateMSE(32, 32)]}, {}, {}, "MiniLLM takes all logits"),
        (ReflectionReplay(), {}, {}, {}, r"schedule \{0: 1.0\} trains on all rows from the start"),
        (ReflectionReplay(), {}, {"schedule": {0: 0.5}}, {"overfit_batches": 1}, "which overfit_batches takes apart"),
        (
            ReflectionReplay(),
            {"teacher_cache": "hidden"},
            {"schedule": {0: 0.5, 1: 1.0}, "refresh": [1]},
            {},
            r"which refresh \[1\] renews when the teacher's cache is complete",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_go_together_is_refused_before_rows_are_read(
    rollouts, options, rows, trainer, said, tmp_path, monkeypatch
):
    monkeypatch.setattr("srd_lightning.data.row_reader.load_splits", None)
    tokenizer = rows.pop("tokenizer", ByT5Tokenizer())
    module = KDLightningModule(tiny_model(), tiny_model(1), rollouts=rollouts, **options)
    settings = {"max_epochs": 2, "default_root_dir": tmp_path, **QUIET, **trainer}
    with pytest.raises(SettingError, match=said):
        L.Trainer(**settings).fit(
            module, datamodule=SRDDataModule(make_rows(4), tokenizer, **{"schedule": {0: 1.0}, **rows})
        )


def test_a_teacher_that_is_spread_over_ranks_does_not_mix():
    module = KDLightningModule(tiny_model(), tiny_model(1), teacher_placement="shard")
    with pytest.raises(SettingError, match=r"teacher_placement shard .* MiniLLM asks it for every token"):
        MiniLLM().check(module, None, None)
    MiniLLM(teacher_mix=0.0).check(module, None, None)


def test_a_share_that_rises_needs_validation(tmp_path):
    rows = SRDDataModule(make_rows(4), ByT5Tokenizer(), schedule={0: 1.0})
    with pytest.raises(SettingError, match="but nothing is validated; give validation data"):
        fit(DistiLLM(decoding=GREEDY), tmp_path, rows)
    fit(DistiLLM(0.5, rise=0.0, decoding=GREEDY), tmp_path, rows)


def test_a_replay_needs_answers(tmp_path):
    scored = {"schedule": {0: 0.5}, "criteria": [NegativeLogLikelihood()]}
    with pytest.raises(SettingError, match=r"but criteria nll have asked for none, .* add a criterion .* RougeL"):
        fit(ReflectionReplay(), tmp_path, data(**scored))
    (tmp_path / "scores.csv").write_text("id,nll\n0,1.0\n")
    with pytest.raises(SettingError, match=r"scores.csv has no column answer"):
        fit(ReflectionReplay(), tmp_path, data(scores=str(tmp_path / "scores.csv"), **scored))

    class Own(L.LightningDataModule):
        def train_dataloader(self):
            return []

    with pytest.raises(SettingError, match="which an SRDDataModule has, but the data are a Own"):
        fit(ReflectionReplay(), tmp_path, Own())
