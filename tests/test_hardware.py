"""What is said of a machine that is slow at what is asked of it."""

import warnings

import lightning as L
import pytest
from tiny import QUIET, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import Decoding, KDLightningModule, Pretrained, SRDDataModule
from srd_lightning.training.hardware import has_bf16_units

X86 = "processor\t: 0\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nflags\t\t: fpu avx2 {}\n"


def cpuinfo(folder, flags):
    (folder / "cpuinfo").write_text(X86.format(flags, flags))
    return folder / "cpuinfo"


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (X86.format("fma", "fma"), False),
        (X86.format("avx512_bf16", "avx512_bf16"), True),
        (X86.format("amx_bf16 amx_tile", "amx_bf16 amx_tile"), True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("model name\t: of a kind that lists nothing\n", None),
    ],
)
def test_units_of_a_processor(text, has, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert has_bf16_units(tmp_path / "cpuinfo") is has


def test_a_system_without_a_list(tmp_path):
    assert has_bf16_units(tmp_path / "cpuinfo") is None


def warned(folder, monkeypatch, flags="", precision="32-true", teacher=None, **data):
    """Return what is said of bfloat16 before a run."""
    monkeypatch.setattr("srd_lightning.training.hardware.CPUINFO", cpuinfo(folder, flags))
    module = KDLightningModule(tiny_model(), teacher or tiny_model(1))
    rows = SRDDataModule(make_rows(4), tokenizer=ByT5Tokenizer(), schedule={0: 1.0}, **data)
    trainer = L.Trainer(**QUIET, precision=precision, max_epochs=0, default_root_dir=folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=rows)
    return [str(warning.message).partition(":")[0] for warning in caught if "bfloat16 units" in str(warning.message)]


def test_what_is_asked_for_is_named_once(tmp_path, monkeypatch):
    said = warned(tmp_path, monkeypatch, precision="bf16-mixed", decoding=Decoding(max_new_tokens=2, bf16=True))
    assert said == ["trainer.precision and data.decoding.bf16"]


def test_the_type_of_a_model(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "teacher")
    ByT5Tokenizer().save_pretrained(tmp_path / "teacher")
    said = warned(tmp_path, monkeypatch, teacher=Pretrained(str(tmp_path / "teacher"), dtype="bfloat16"))
    assert said == ["model.teacher.dtype"]


@pytest.mark.parametrize(("flags", "precision"), [("amx_bf16", "bf16-mixed"), ("", "32-true")])
def test_nothing_is_said_of_what_is_fast(flags, precision, tmp_path, monkeypatch):
    assert warned(tmp_path, monkeypatch, flags, precision) == []
