"""Quantised models: with stand-ins, for what quantises them is not installed with the tests."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import QUIET, lively_model, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import HuggingFaceExport, KDLightningModule, Pretrained, SRDDataModule
from srd_lightning.command.trainer import SRDTrainer
from srd_lightning.errors import ModelError, SettingError
from srd_lightning.models.quantised import check_trainable, is_quantised, method_of

FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture
def folder(tmp_path):
    """A model that says of itself that it is quantised."""
    lively_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": FOUR_BITS}))
    return tmp_path / "model"


def with_adapters(model):
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    model.get_base_model().is_quantized = True
    return model


def fit(student, folder, *callbacks):
    module = KDLightningModule(student, tiny_model(1), kd_weight=0.5)
    data = SRDDataModule(make_rows(4), ByT5Tokenizer(), schedule={0: 1.0})
    SRDTrainer(**QUIET, max_epochs=1, default_root_dir=folder, callbacks=list(callbacks)).fit(module, data)


def test_what_is_not_installed_is_named(folder, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    said = rf"^{folder} is quantised \(bitsandbytes\), which cannot be used here: .*bitsandbytes"
    with pytest.raises(SettingError, match=said):
        Pretrained(str(folder)).check()


def test_a_cut(folder):
    from transformers import AutoConfig

    from srd_lightning.models.depth_cut import check_layers

    with pytest.raises(ModelError, match=r"keep_layers cannot be used with weights that are quantised .bitsandbytes."):
        check_layers(AutoConfig.from_pretrained(folder), [0])


def test_students_that_cannot_be_trained(tmp_path):
    student = tiny_model()
    student.is_quantized = True
    with pytest.raises(ModelError, match="weights of the student LlamaForCausalLM are quantised, so they cannot be"):
        fit(student, tmp_path)
    student = with_adapters(tiny_model())
    student.config.quantization_config = FOUR_BITS
    with pytest.raises(SettingError, match="quantised by bitsandbytes cannot be trained on a CPU"):
        fit(student, tmp_path)
    check_trainable(student, on_cpu=False)


def test_only_adapters_are_saved(tmp_path):
    lively_model().save_pretrained(tmp_path / "base")
    student = with_adapters(Pretrained(str(tmp_path / "base")).model())
    assert is_quantised(student)
    fit(student, tmp_path, HuggingFaceExport(str(tmp_path / "out")))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded, ids = Pretrained(str(tmp_path / "out")).model(), torch.arange(70, 77)[None]
    torch.testing.assert_close(loaded(ids).logits, student.eval()(ids).logits)


def test_what_says_nothing_is_not_quantised():
    assert method_of(None) is method_of(tiny_model().config) is None
    assert not is_quantised(tiny_model())
    check_trainable(tiny_model(), on_cpu=True)
