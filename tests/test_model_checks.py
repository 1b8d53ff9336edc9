"""What is wrong with a model is said by name, before its weights are loaded where that can be known."""

import json
import shutil

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file, save_file
from tiny import QUIET, tiny_model
from transformers import AutoModelForCausalLM, BertConfig, ByT5Tokenizer, LlavaConfig, WhisperConfig

from srd_lightning import CacheSettings, KDLightningModule, Pretrained, SRDDataModule
from srd_lightning.command.trainer import SRDTrainer
from srd_lightning.errors import MissingDataError, ModelError, SettingError, SRDError, StorageError
from srd_lightning.models.soundness import check_weights
from srd_lightning.models.vocabulary import check_tokens


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(num_hidden_layers=4).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A folder of a model, to be damaged."""
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever reads weights fails."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def cut_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_header(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[9] ^= 0xFF
    file.write_bytes(content)


def lose_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_index(folder):
    lose_shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def set_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "none_such"}))


FOLDERS = {
    "no_config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json, so it holds no model"),
    "config_cut": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json cannot be used .*not a valid JSON",
    ),
    "unknown_type": (set_type, r"config\.json cannot be used .* model type `none_such`"),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), r"but no weights \(\*\.safetensors\)"),
    "cut": (cut_file, r"model\.safetensors is damaged or was cut off"),
    "flipped": (flip_header, r"model\.safetensors is damaged or was cut off"),
    "shard_lost": (lose_shard, r"index\.json names model-00001-of-00002\.safetensors, which is not there"),
    "index_broken": (break_index, r"index\.json is damaged \(KeyError"),
}


@pytest.mark.parametrize(("damage", "said"), FOLDERS.values(), ids=FOLDERS)
def test_damaged_folders(damage, said, folder, no_weights):
    damage(folder)
    with pytest.raises(ModelError, match=said) as error:
        Pretrained(str(folder)).check()
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sound_one_is_not_loaded_to_be_checked(folder, no_weights):
    Pretrained(str(folder), keep_layers=[0, 3]).check(ByT5Tokenizer())


@pytest.mark.parametrize("name", ["runs/no/student", "./student", "/no/such", "~/student", "C:\\student", " "])
def test_no_such_folder(name, no_weights):
    with pytest.raises(MissingDataError, match=r"^there is no folder '"):
        Pretrained(name).check()


@pytest.mark.parametrize("name", ["gpt2", "someone/gpt2", "no such name"])
def test_a_hub_id_that_cannot_be_reached(name, no_weights):
    for load in (Pretrained(name).check, Pretrained(name).model, Pretrained(name).tokenizer):
        with pytest.raises(MissingDataError, match=f"^'{name}' is no folder here .* as a hub id it cannot be loaded: "):
            load()


def test_the_folder_above_names_the_one_below(folder):
    with pytest.raises(ModelError, match=rf"perhaps {folder} is meant"):
        Pretrained(str(folder.parent)).check()


def test_a_file_instead_of_its_folder(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelError, match=r"is a file, .* name its folder, with gguf_file: model\.gguf"):
        Pretrained(str(tmp_path / "model.gguf")).check()
    with pytest.raises(MissingDataError, match=r"has no gguf_file 'q4\.gguf', but model\.gguf"):
        Pretrained(str(tmp_path), gguf_file="q4.gguf").check()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlavaConfig(), "is of type llava, which .* image-text model can be loaded with its own class"),
        (WhisperConfig(), "is of type whisper, which transformers have no language model of text for"),
    ],
    ids=["llava", "whisper"],
)
def test_other_kinds_of_models(config, said, folder, no_weights):
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=said):
        Pretrained(str(folder)).check()


def test_settings_that_do_not_fit_the_model(folder, no_weights):
    with pytest.raises(SettingError, match=r"keep_layers must be rising numbers from 0 to 3, but is .0, 4.$"):
        Pretrained(str(folder), keep_layers=[0, 4]).check()
    with pytest.raises(SettingError, match=r"lora has settings that peft.LoraConfig does not take: .*'rank'"):
        Pretrained(str(folder), lora={"rank": 2}).check()


@pytest.mark.parametrize(
    ("settings", "package", "said"),
    [({"liger": True}, "liger_kernel.transformers", "liger"), ({"lora": {"r": 2}}, "peft", "lora")],
    ids=["liger", "lora"],
)
def test_packages_that_are_not_installed(settings, package, said, folder, no_weights, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
        SettingError, match=rf"setting {said} .* needs a package: pip install 'srd-lightning\[{said}\]'"
    ):
        Pretrained(str(folder), **settings).check()


def test_adapters_that_fit_no_layer(folder):
    with pytest.raises(SettingError, match=f"^lora does not fit {folder}: .*no_such_layer"):
        Pretrained(str(folder), lora={"target_modules": ["no_such_layer"]}).model()


def test_an_attention_that_there_is_not(folder):
    for settings in ({}, {"keep_layers": [0, 1]}):
        with pytest.raises(SRDError, match="none_such"):
            Pretrained(str(folder), attn_implementation="none_such", **settings).model()


def test_weights_that_are_missing_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "layers.3." not in name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack 9 tensors of LlamaForCausalLM, model\.layers\.3\..* random numbers"):
        Pretrained(str(folder)).model()


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(ModelError, match="cannot be loaded: "):
        Pretrained(str(folder)).model()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers(value, dtype, folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = rf"^{folder} has weights that are NaN or inf, model\.layers\.2\.mlp\.up_proj\.weight among 1 of 39 tensors"
    with pytest.raises(ModelError, match=said):
        Pretrained(str(folder), dtype=dtype).model()


def test_largest_numbers_are_numbers():
    model = torch.nn.Linear(2, 2).half()
    model.weight.data.fill_(torch.finfo(torch.float16).max)
    model.bias.data[0] = -torch.inf  # forbids a token
    check_weights(model, "the student")


def test_an_encoder_is_refused_when_loaded(tmp_path):
    config = BertConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    Pretrained(str(tmp_path)).check()  # its configuration does not say
    with pytest.raises(ModelError, match="BertLMHeadModel is no causal language model"):
        Pretrained(str(tmp_path)).model()


class TestTokens:
    def test_more_than_the_model_knows(self):
        with pytest.raises(ModelError, match=r"^the student knows 200 tokens, but the tokenizer goes up to 258 "):
            check_tokens(200, ByT5Tokenizer(), "the student")

    @pytest.mark.parametrize("use", ["pad", "template"])
    def test_one_that_was_added_and_is_used(self, use):
        tokenizer = ByT5Tokenizer()
        tokenizer.add_tokens(["<new>"])
        check_tokens(384, tokenizer, "the student")  # such as Gemma 3's for images
        if use == "pad":
            tokenizer.pad_token = "<new>"
        else:
            tokenizer.chat_template = "{{ '<new>' + messages[0]['content'] }}"
        with pytest.raises(ModelError, match=r"knows 384 tokens, but the tokenizer goes up to 384 .'<new>'."):
            check_tokens(384, tokenizer, "the student")

    def test_lists_of_special_tokens_say_of_none_that_it_is_used(self, monkeypatch):
        tokenizer = ByT5Tokenizer()
        tokenizer.add_tokens(["<new>"])
        listed = {"pad_token": "<pad>", "additional_special_tokens": ["<new>"]}  # as in transformers 4
        monkeypatch.setattr(ByT5Tokenizer, "special_tokens_map", property(lambda self: listed))
        check_tokens(384, tokenizer, "the student")

    def test_before_weights_are_loaded(self, folder, no_weights):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
        with pytest.raises(ModelError, match=f"^{folder} knows 200 tokens"):
            Pretrained(str(folder)).check(ByT5Tokenizer())

    def test_no_end_token(self, folder):
        tokenizer = ByT5Tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
        with pytest.raises(ModelError, match=f"the tokenizer {folder} has no eos_token, so no response would end"):
            Pretrained(str(folder)).tokenizer()

    def test_no_tokenizer(self, folder):
        for file in folder.iterdir():
            if "token" in file.name:
                file.unlink()
        with pytest.raises(ModelError, match=f"^no tokenizer can be loaded from {folder} "):
            Pretrained(str(folder)).tokenizer()


class TestBeforeRowsAreRead:
    """The data does not exist: whoever gets to it raises another error."""

    def fit(self, student, teacher, tmp_path, **settings):
        module = KDLightningModule(student, teacher, **settings)
        data = SRDDataModule(str(tmp_path / "no_such.jsonl"), tokenizer=ByT5Tokenizer(), schedule={0: 1.0})
        Trainer(**QUIET, default_root_dir=tmp_path, max_epochs=1).fit(module, data)

    def test_the_files_of_the_teacher(self, whole, folder, tmp_path):
        cut_file(folder)
        with pytest.raises(ModelError, match=f"{folder}/model.safetensors is damaged"):
            self.fit(Pretrained(str(whole)), Pretrained(str(folder)), tmp_path)

    @pytest.mark.parametrize("subcommand", ["curate", "cache_teacher"])
    def test_also_where_nothing_is_trained(self, subcommand, whole, folder, tmp_path):
        cut_file(folder)
        module = KDLightningModule(Pretrained(str(whole)), Pretrained(str(folder)))
        data = SRDDataModule(str(tmp_path / "no_such.jsonl"), schedule={0: 1.0})
        with pytest.raises(ModelError, match=f"{folder}/model.safetensors is damaged"):
            getattr(SRDTrainer(**QUIET, default_root_dir=tmp_path), subcommand)(module, data)

    def test_tokenizers_that_differ(self, whole, folder, tmp_path):
        tokenizer = ByT5Tokenizer()
        tokenizer.add_tokens(["<a>"])
        tokenizer.save_pretrained(folder)
        with pytest.raises(ModelError, match="student and teacher have different tokenizers"):
            self.fit(Pretrained(str(whole)), Pretrained(str(folder)), tmp_path)

    @pytest.mark.parametrize("role", ["student", "teacher"])
    def test_weights_of_a_module(self, role, tmp_path):
        models = {"student": tiny_model(0), "teacher": tiny_model(1)}
        models[role].lm_head.weight.data[7, 7] = torch.nan
        with pytest.raises(ModelError, match=rf"^the {role} has weights that are NaN or inf, lm_head\.weight among 1"):
            self.fit(models["student"], models["teacher"], tmp_path)

    def test_tokens_of_a_module(self, tmp_path):
        with pytest.raises(ModelError, match=r"^the student knows 100 tokens, but the tokenizer goes up to 258"):
            self.fit(tiny_model(0, vocab_size=100), tiny_model(1, vocab_size=100), tmp_path)

    def test_the_folder_of_the_cache(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SRDError, match=r"teacher_cache.dir needs the folder .*file/cache, but .*file is a file"):
            self.fit(
                *(tiny_model(0), tiny_model(1), tmp_path),
                teacher_cache=CacheSettings("hidden", dir=str(tmp_path / "file" / "cache")),
            )

    @pytest.mark.parametrize("run", ["fit", "cache_teacher"])
    def test_the_cache_of_another_teacher(self, run, whole, tmp_path):
        (tmp_path / "manifest.json").write_text('{"teacher": "another", "kind": "HiddenStates(dtype=torch.bfloat16)"}')
        settings = {"teacher_cache": CacheSettings("hidden", dir=str(tmp_path))}
        module = KDLightningModule(tiny_model(0), Pretrained(str(whole)), **settings)
        data = SRDDataModule(str(tmp_path / "no_such.jsonl"), tokenizer=ByT5Tokenizer(), schedule={0: 1.0})
        start = getattr(SRDTrainer(**QUIET, default_root_dir=tmp_path, max_epochs=1), run)
        with pytest.raises(StorageError, match="were made with another teacher; point"):
            start(module, datamodule=data)

    def test_one_model_twice_is_said(self, whole, tmp_path):
        source = Pretrained(str(whole))
        said = pytest.warns(UserWarning, match=f"student and teacher are the same model {whole}: ")
        with said, pytest.raises(FileNotFoundError, match="no_such"):
            self.fit(source, source, tmp_path)
