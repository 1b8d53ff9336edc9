"""No checkpoint, template, row or model runs code, unless the user says that it may; see SECURITY.md."""

import json
import pickle
import shutil

import lightning as L
import pytest
import torch
from tiny import QUIET, make_rows, tiny_model
from transformers import ByT5Tokenizer

from srd_lightning import ChatTemplate, KDLightningModule, Pretrained, PromptTemplate, ResumeCheckpoint, SRDDataModule
from srd_lightning.cli import SRDTrainer
from srd_lightning.errors import DataError, ModelError, ResumeError
from srd_lightning.models.pretrained import load_tokenizer


class Own:
    """What a callback of the user's may keep; as a class it is code."""

    def __reduce__(self):
        return shutil.copyfile, (__file__, "written")  # what loads it leaves a file


class Keeps(L.Callback):
    def state_dict(self):
        return {"own": Own()}


def parts():
    module = KDLightningModule(tiny_model(0), tiny_model(1), tokenizer=ByT5Tokenizer())
    rows = {split: make_rows(4) for split in ("train", "validation", "test")}
    return module, SRDDataModule(rows, ByT5Tokenizer(), schedule={0: 1.0}, batch_size=2)


def trainer_of(kind, folder, **options):
    return kind(**{"max_epochs": 2, "default_root_dir": folder, **QUIET, **options})


@pytest.fixture(scope="module")
def with_code(tmp_path_factory):
    """A checkpoint of one epoch, sound but for an object in it."""
    folder = tmp_path_factory.mktemp("saved")
    trainer, (module, data) = trainer_of(L.Trainer, folder, max_epochs=1, callbacks=[Keeps()]), parts()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "checkpoints" / "epoch=0-step=2.ckpt")
    return folder / "checkpoints" / "epoch=0-step=2.ckpt"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_object_is_code(with_code, tmp_path):
    torch.load(with_code, weights_only=False)
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_with_code_is_refused_by_name_before_work(method, with_code, tmp_path, monkeypatch):
    monkeypatch.setattr(SRDDataModule, "setup", lambda *_: pytest.fail("rows were read"))
    module, data = parts()
    with pytest.raises(
        ResumeError, match=rf"^ckpt_path: {with_code} holds shutil.copyfile beside .* --weights_only false"
    ):
        getattr(trainer_of(SRDTrainer, tmp_path), method)(module, datamodule=data, ckpt_path=str(with_code))
    assert not (tmp_path / "written").exists()


def test_a_checkpoint_with_code_is_not_evaluated(with_code, tmp_path):
    module, data = parts()
    with pytest.raises(ResumeError, match=r"holds shutil.copyfile beside .* export the student with HuggingFaceExport"):
        trainer_of(SRDTrainer, tmp_path).evaluate(module, data, ckpt_path=str(with_code))
    assert not (tmp_path / "written").exists()


def test_a_checkpoint_with_code_that_is_trusted_is_gone_on_with(with_code, tmp_path):
    trainer, (module, data) = trainer_of(SRDTrainer, tmp_path), parts()
    trainer.fit(module, datamodule=data, ckpt_path=with_code, weights_only=False)
    assert trainer.global_step == 4
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize("found", [True, False], ids=["last", "path"])
def test_lightnings_own_trainer_runs_none_either(found, with_code, tmp_path):
    options = {"callbacks": [ResumeCheckpoint(with_code.parent)], "enable_checkpointing": True}
    trainer, (module, data) = trainer_of(L.Trainer, tmp_path, **options), parts()
    with pytest.raises(pickle.UnpicklingError, match=r"shutil\.copyfile"):
        trainer.fit(module, datamodule=data, ckpt_path="last" if found else with_code)
    assert not (tmp_path / "written").exists()


def test_pickle_of_another_protocol_is_refused(tmp_path):
    torch.save({"optimizer_states": [], "own": Own()}, tmp_path / "a.ckpt", pickle_protocol=4)
    module, data = parts()
    with pytest.raises(ResumeError, match="holds objects beside tensors"):
        trainer_of(SRDTrainer, tmp_path).fit(module, datamodule=data, ckpt_path="a.ckpt")
    assert not (tmp_path / "written").exists()


@pytest.fixture
def model_with_code(tmp_path):
    """A folder whose configuration names classes in a file beside it, which leaves a file where it is imported."""
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text("open('written', 'w')\nConfig = Model = Tokenizer = None\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    for name, kind in {"config.json": "model_type", "tokenizer_config.json": "tokenizer_class"}.items():
        saved = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**saved, kind: "own", "auto_map": own}))
    return str(folder)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_beside_a_model_is_run_only_where_that_is_set(trusted, model_with_code, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    model = Pretrained(model_with_code, trust_remote_code=trusted)
    for load in (model.config, model.model, model.tokenizer):
        with pytest.raises(ModelError):  # also where it is trusted: it has none of the classes that it promises
            load()
    assert (tmp_path / "written").exists() == trusted


def test_code_beside_a_tokenizer_is_never_run(model_with_code, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load_tokenizer(model_with_code)
    assert not (tmp_path / "written").exists()


def test_weights_in_a_pickle_are_read_without_running_it(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Own()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Pretrained(str(tmp_path / "model")).model()
    assert not (tmp_path / "written").exists()


def test_adapters_in_a_pickle_are_read_without_running_it(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "model")
    adapted = peft.get_peft_model(Pretrained(str(tmp_path / "model")).model(), peft.LoraConfig(r=1))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"lora": Own()}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Pretrained(str(tmp_path / "adapter")).model()
    assert not (tmp_path / "written").exists()


def test_a_template_is_text():
    row = {"instruction": "{input.__class__} {{ 7 * 7 }}", "input": "{instruction}", "output": "{input}"}
    example = PromptTemplate("{instruction}|{input}|{input.__class__}", "{instruction}")(row)
    assert example.prompt == "{input.__class__} {{ 7 * 7 }}|{instruction}|{input.__class__}"
    assert example.response == "{input}"


def test_a_chat_template_reaches_nothing_beyond_the_row():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="unsafe"):
        ChatTemplate().bind(tokenizer)({"instruction": "Hi", "output": "Hello"})
