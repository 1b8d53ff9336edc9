import errno
import json
import shutil

import pyarrow as pa
import pytest
import torch
from tiny import LOSSES, in_other_order, lively_model, make_rows, tokenised
from transformers import ByT5Tokenizer

from srd_lightning.data.batches import collate
from srd_lightning.digests import weights_digest
from srd_lightning.errors import ModelError, StorageError
from srd_lightning.losses import response_mask
from srd_lightning.models.pretrained import Pretrained
from srd_lightning.teacher import cache as teacher_cache
from srd_lightning.teacher import precompute as caching
from srd_lightning.teacher.cache import TeacherCache
from srd_lightning.teacher.live import HiddenStates, LiveTeacher, TopK
from srd_lightning.teacher.precompute import cache_teacher

MADE_OF = {"teacher": "a", "kind": "b"}
EXACT = HiddenStates(torch.float32)


class Loaded:
    """Gives the teacher, and counts how often."""

    def __init__(self):
        self.times = 0
        self.model = lively_model(1).requires_grad_(False).eval()

    def __call__(self):
        self.times += 1
        return self.model


@pytest.fixture
def load():
    return Loaded()


def fill(data, folder, load, kind=EXACT, made_of=MADE_OF):
    return cache_teacher(data, folder, kind, made_of, load, lambda model: None)


def logits(teacher, batch):
    return teacher.logits(batch, None)(slice(None))


def cached_batch(cache, rows):
    return {**collate(rows, pad_token_id=0), **cache.batch(rows)}


def test_what_is_cached_is_what_the_teacher_says(data, load, tmp_path):
    cache, teacher = fill(data, tmp_path, load)
    rows = data.to_list()[3:8]
    batch = collate(rows, pad_token_id=0)
    with torch.no_grad():
        expected = load.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = expected[:, :-1][response_mask(batch["labels"])]
    torch.testing.assert_close(logits(teacher, cached_batch(cache, rows)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(LiveTeacher(load.model, None), batch), expected)


def test_bf16_is_the_rounded_state(data, load, tmp_path):
    exact, _ = fill(data, tmp_path / "exact", load)
    rounded, _ = fill(data, tmp_path / "rounded", load, HiddenStates(torch.bfloat16))
    rows = data.to_list()[:4]
    found = rounded.batch(rows)["teacher_hidden"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.batch(rows)["teacher_hidden"].bfloat16())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_the_likeliest_tokens_and_the_mass_of_the_rest(temperature, data, load, tmp_path):
    cache, teacher = fill(data, tmp_path, load, TopK(5))
    rows = data.to_list()[:4]
    batch = cached_batch(cache, rows)
    expected = (logits(LiveTeacher(load.model, None), batch) / temperature).log_softmax(-1)
    student = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = logits(teacher, batch).at(temperature, student)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)))
    for p, q, values in zip(expected, student, found, strict=True):
        best = p.topk(5).indices
        assert values[best].tolist() == pytest.approx(p[best].tolist(), rel=1e-4, abs=1e-4)
        others = torch.ones(384, dtype=torch.bool)
        others[best] = False
        assert values[others].exp().sum().item() == pytest.approx(p[others].exp().sum().item(), rel=1e-3)
        assert torch.allclose(
            values[others] - values[others].logsumexp(-1), q[others] - q[others].logsumexp(-1), atol=1e-4
        )


def test_between_two_temperatures_the_mass_of_the_rest_is_near(data, load, tmp_path):
    cache, teacher = fill(data, tmp_path, load, TopK(5))
    batch = cached_batch(cache, data.to_list()[:4])
    exact = (logits(LiveTeacher(load.model, None), batch) / 1.75).log_softmax(-1)
    found = logits(teacher, batch).at(1.75, torch.zeros_like(exact).log_softmax(-1))
    best = exact.topk(5).indices
    torch.testing.assert_close(found.gather(1, best).exp(), exact.gather(1, best).exp(), rtol=0.02, atol=0.0)
    with pytest.raises(ValueError, match=r"temperatures from 0\.5 to 4, but the loss is at 5"):
        logits(teacher, batch).at(5, exact)


@pytest.mark.parametrize("loss", [make_loss(temperature=1.5) for make_loss, _ in LOSSES.values()], ids=LOSSES)
def test_all_others_are_one_token(loss, data, load, tmp_path):
    """Value and gradient are those of distributions over the likeliest tokens and one more."""
    cache, teacher = fill(data, tmp_path, load, TopK(5))
    batch = cached_batch(cache, data.to_list()[:3])
    exact = (logits(LiveTeacher(load.model, None), batch) / 1.5).log_softmax(-1)
    student = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    best = exact.topk(5).indices

    def binned(logp):
        rest = logp.scatter(1, best, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logp.gather(1, best), rest], dim=1)

    student_logp = (student / 1.5).log_softmax(-1)
    expected = loss.divergence(binned(exact), binned(student_logp))
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    logp = student_logp.detach()
    values, found = loss.value_and_gradient(logits(teacher, batch).at(1.5, logp), logp)
    torch.testing.assert_close(values, expected.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found / 1.5, gradient, rtol=1e-3, atol=1e-5)


def test_all_tokens_kept_are_the_teacher_itself(data, load, tmp_path):
    cache, teacher = fill(data, tmp_path, load, TopK(384))
    batch = cached_batch(cache, data.to_list()[:4])
    expected = logits(LiveTeacher(load.model, None), batch).log_softmax(-1)
    found = logits(teacher, batch).at(1.0, torch.zeros_like(expected).log_softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_complete_cache_needs_no_teacher_whatever_the_order_of_rows(data, load, tmp_path):
    fill(data, tmp_path, load)
    cache, teacher = fill(in_other_order(data), tmp_path, load)
    assert load.times == 1
    assert torch.equal(teacher.head.weight, load.model.lm_head.weight)
    assert len(cache.missing(data)) == 0


def test_only_new_and_changed_rows_are_asked_for(data, tokenizer, load, tmp_path, monkeypatch):
    fill(data, tmp_path, load)
    rows = make_rows(22)
    rows[0]["output"] = "Something else."
    changed = tokenised(tokenizer, [{"id": str(place), **row} for place, row in enumerate(rows)])
    first = tokenised(tokenizer, [{"id": str(place), **row} for place, row in enumerate(make_rows(20))])
    fill(first, tmp_path, load)
    asked = []
    append = TeacherCache.append
    monkeypatch.setattr(TeacherCache, "append", lambda self, some, kept: (asked.extend(some), append(self, some, kept)))
    fill(changed, tmp_path, load)
    assert sorted(int(row["id"]) for row in asked) == [0, 20, 21]


@pytest.mark.parametrize("part", MADE_OF)
def test_a_cache_of_something_else_is_refused_by_name(part, data, load, tmp_path):
    fill(data, tmp_path, load)
    with pytest.raises(StorageError, match=f"made with another {part};"):
        fill(data, tmp_path, load, made_of={**MADE_OF, part: "other"})


def damaged(file, change):
    """Change a file, and return where it is put when that is noticed."""
    content = bytearray(file.read_bytes())
    file.write_bytes(change(content))
    return file.with_name(f"{file.name}.damaged")


def with_a_flipped_byte(content):
    content[len(content) // 2] ^= 0xFF
    return content


DAMAGES = {"flipped": with_a_flipped_byte, "cut": lambda content: content[:-100], "empty": lambda content: b""}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["part-*.arrow", "head.safetensors", "head.json"])
def test_what_is_damaged_is_put_aside_and_made_again(pattern, damage, data, load, tmp_path):
    cache, teacher = fill(data, tmp_path, load)
    rows = data.to_list()
    expected, head = cache.batch(rows)["teacher_hidden"].clone(), teacher.head.weight.clone()
    (file,) = tmp_path.glob(pattern)
    aside = damaged(file, DAMAGES[damage])
    with pytest.warns(UserWarning, match=rf"^in the teacher cache in {tmp_path}, .* is damaged"):
        cache, teacher = fill(data, tmp_path, load)
    assert aside.exists()
    assert load.times == 2
    torch.testing.assert_close(cache.batch(rows)["teacher_hidden"], expected)
    assert torch.equal(teacher.head.weight, head)
    fill(data, tmp_path, load)
    assert load.times == 2


def test_a_changed_scale_of_the_head_is_noticed(data, load, tmp_path):
    fill(data, tmp_path, load)
    file = tmp_path / "head.json"
    file.write_text(file.read_text().replace('"scale": 1.0', '"scale": 2.0'))
    with pytest.warns(UserWarning, match="is damaged"):
        _, teacher = fill(data, tmp_path, load)
    assert teacher.head.scale == 1.0


def test_a_shard_of_another_cache_is_not_read(data, load, tmp_path):
    fill(data, tmp_path / "one", load)
    fill(data, tmp_path / "two", load, made_of={**MADE_OF, "teacher": "other"})
    (shard,) = (tmp_path / "two").glob("part-*")
    shutil.copy(shard, tmp_path / "one")
    with pytest.warns(UserWarning, match=f"{shard.name} is damaged"):
        cache, _ = fill(data, tmp_path / "one", load)
    assert not (tmp_path / "one" / shard.name).exists()
    assert len(cache.missing(data)) == 0


def test_a_cache_of_an_earlier_version_is_made_again(data, load, tmp_path):
    """It had other names for shards, and nothing that says whether a head is whole."""
    fill(data, tmp_path, load)
    (shard,) = tmp_path.glob("part-*.arrow")
    shard.rename(tmp_path / "part-0123456789abcdef0123456789abcdef.arrow")
    (tmp_path / "head.json").write_text('{"scale": 1.0, "soft_cap": null}')
    with pytest.warns(UserWarning, match=r" and 2 more is damaged or of an earlier version"):
        fill(data, tmp_path, load)
    assert load.times == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"teacher": "a"', "\xff"], ids=["empty", "list", "no", "cut", "odd"]
)
def test_a_damaged_manifest_is_named(content, data, load, tmp_path):
    fill(data, tmp_path, load)
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        StorageError, match=r"manifest\.json cannot be read .*; delete the folder, or point `teacher_cache.dir`"
    ):
        fill(data, tmp_path, load)


def test_leftovers_of_killed_processes_go(data, load, tmp_path):
    fill(data, tmp_path, load)
    left = [tmp_path / f".{name}.0123" for name in ("part-1.arrow", "head.json", "head.safetensors", "manifest.json")]
    for file in left:
        file.write_text("half")
    fill(data, tmp_path, load)
    assert not any(file.exists() for file in left)
    assert load.times == 1


def test_a_second_run_in_the_folder_is_told(data, load, tmp_path, monkeypatch):
    monkeypatch.setattr("srd_lightning.results_folder.PATIENCE", 0.0)
    told = pytest.raises(StorageError, match=f"another run is writing outputs of a teacher to {tmp_path}")
    with TeacherCache.locked(tmp_path, EXACT, MADE_OF), told:
        fill(data, tmp_path, load)
    fill(data, tmp_path, load)
    fill(data, tmp_path, load)  # the lock is let go


@pytest.mark.parametrize("kind", [EXACT, TopK(5)], ids=["hidden", "topk"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_that_says_nan_is_refused_with_the_row(kind, value, data, load, tmp_path):
    """Only the token Z has the broken embedding, and only one row has the token."""
    rows = make_rows(6)
    rows[4]["instruction"] = "Say Z."
    data = tokenised(ByT5Tokenizer(), [{"id": f"row {place}", **row} for place, row in enumerate(rows)])
    load.model.model.embed_tokens.weight.data[ord("Z") + 3] = value
    with pytest.raises(ModelError, match="the teacher LlamaForCausalLM gives NaN or inf for row row 4;"):
        fill(data, tmp_path, load, kind)
    found = TeacherCache(tmp_path, kind, MADE_OF)
    assert 4 in found.missing(data)
    assert found.head() is None


def test_states_too_large_for_the_type_of_the_cache_are_refused(data, load, tmp_path):
    load.model.model.norm.weight.data *= 1e6
    with pytest.raises(ModelError, match=r"for row .* are too large for teacher_cache.dtype float16; take bfloat16"):
        fill(data, tmp_path, load, HiddenStates(torch.float16))


def test_a_full_disk_loses_nothing(data, load, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 1)  # a shard per batch
    monkeypatch.setattr(caching, "TOKENS_AT_ONCE", 60)
    write, written = teacher_cache.write_atomically, []

    def until_full(path, content):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        if path.suffix == ".arrow":
            written.append(path)
        write(path, content)

    monkeypatch.setattr(teacher_cache, "write_atomically", until_full)
    with pytest.raises(OSError, match="No space left"):
        fill(data, tmp_path, load)
    monkeypatch.setattr(teacher_cache, "write_atomically", write)
    left = len(TeacherCache(tmp_path, EXACT, MADE_OF).missing(data))
    assert 0 < left < len(data)
    cache, _ = fill(data, tmp_path, load)
    assert len(cache.missing(data)) == 0
    rows = data.to_list()
    assert len(cache.batch(rows)["teacher_hidden"]) == sum(row["length"] - row["prompt_length"] for row in rows)


def test_an_interrupt_keeps_what_there_is(data, load, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "TOKENS_AT_ONCE", 60)
    append, calls = TeacherCache.append, []

    def interrupted(self, rows, kept):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(rows))
        append(self, rows, kept)

    monkeypatch.setattr(TeacherCache, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(data, tmp_path, load)
    assert len(TeacherCache(tmp_path, EXACT, MADE_OF).missing(data)) == len(data) - sum(calls)


@pytest.mark.parametrize(("width", "loaded"), [(None, 1), (32, 0)], ids=["after_loading", "before_loading"])
def test_a_disk_that_is_too_small_is_refused_before_it_starts(width, loaded, data, load, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    tokens = sum(row["length"] - row["prompt_length"] for row in data)
    wanted = f"needs {4 * 32 * tokens / 1000:.3g} kB in .*, where 1 kB are free; point `teacher_cache.dir`"
    with pytest.raises(StorageError, match=wanted):
        cache_teacher(data, tmp_path, EXACT, MADE_OF, load, lambda model: None, width)
    assert load.times == loaded
    assert not list(tmp_path.glob("part-*"))


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (21_760, "21.8 kB"), (3e6, "3 MB"), (2.5e12, "2,500.0 GB")]
)
def test_sizes_are_said_as_they_are_read(size, said):
    assert caching._readable(size) == said


def test_a_folder_that_cannot_be_made(data, load, tmp_path):
    (tmp_path / "file").write_text("")
    said = f"outputs of a teacher cannot be written to {tmp_path}/file/cache: Not a directory; point"
    with pytest.raises(StorageError, match=said):
        fill(data, tmp_path / "file" / "cache", load)
    assert load.times == 0


def test_the_width_of_a_teacher_is_known_from_its_configuration(tmp_path):
    lively_model().save_pretrained(tmp_path)
    assert caching.width_of(Pretrained(str(tmp_path))) == caching.width_of(lively_model()) == 32
    assert caching.width_of(torch.nn.Linear(1, 1)) is None


def test_the_estimate_is_what_it_takes(data, load, tmp_path):
    fill(data, tmp_path, load)
    tokens = sum(row["length"] - row["prompt_length"] for row in data)
    table = pa.ipc.open_file(next(tmp_path.glob("part-*"))).read_all()
    stored = sum(len(value.as_py()) for value in table["teacher_hidden"])
    assert EXACT.bytes_per_token(32) * tokens == stored == 4 * 32 * tokens
    assert TopK(5).bytes_per_token(32) == 4 * (5 + 7) + 4 * 5


def test_a_row_that_is_not_there_is_named(data, load, tmp_path):
    cache, _ = fill(data.select(range(5)), tmp_path, load)
    with pytest.raises(KeyError, match=data[7]["id"]):
        cache.batch([data[7]])


def test_rows_that_only_fill_up_need_nothing(data, load, tmp_path):
    cache, teacher = fill(data, tmp_path, load)
    blank = {**data[0], "prompt_length": data[0]["length"]}
    batch = cached_batch(cache, [blank, data[1]])
    assert torch.equal(logits(teacher, batch), logits(teacher, cached_batch(cache, [data[1]])))
    assert cached_batch(cache, [blank])["teacher_hidden"].shape == (0, 1)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_head_comes_back_as_it_was(scale, tmp_path):
    cache = TeacherCache(tmp_path, EXACT, MADE_OF)
    assert cache.head() is None
    head = teacher_cache.Head(torch.randn(5, 3).bfloat16(), torch.randn(5), scale, 30.0)
    cache.save_head(head)
    found = TeacherCache(tmp_path, EXACT, MADE_OF).head()
    assert torch.equal(found.weight, head.weight)
    assert torch.equal(found.bias, head.bias)
    assert (found.scale, found.soft_cap) == (scale, 30.0)


def test_digests_tell_teachers_apart_without_loading_them(tmp_path, monkeypatch):
    for name, seed in (("one", 0), ("two", 1)):
        lively_model(seed).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    monkeypatch.setattr(Pretrained, "model", None)
    digests = {name: Pretrained(str(tmp_path / name)).digest() for name in ("one", "two", "copy")}
    assert digests["one"] == digests["copy"] != digests["two"]
    assert Pretrained(str(tmp_path / "one"), dtype="bfloat16").digest() != digests["one"]
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert Pretrained(str(tmp_path / "copy")).digest() != digests["one"]
    assert weights_digest(lively_model(0)) == weights_digest(lively_model(0)) != weights_digest(lively_model(1))


def test_a_teacher_of_a_hub_is_the_commit_to_which_its_branch_points(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(Pretrained, "config", lambda self: None)
    digests = []
    for commit in ("1" * 40, "2" * 40, "1" * 40):
        snapshot = tmp_path / "models--someone--model" / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "models--someone--model" / "refs").mkdir(exist_ok=True)
        (tmp_path / "models--someone--model" / "refs" / "main").write_text(commit)
        digests.append(Pretrained("someone/model").digest())
    assert digests[0] == digests[2] != digests[1]
