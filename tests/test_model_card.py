"""The model card of an export, the generation settings beside it, and its way to the hub."""

import json
import re
import types

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from lightning.pytorch.callbacks import StochasticWeightAveraging
from test_export import data, fit, module, refused
from tiny import tiny_model
from torch.optim import SGD
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from srd_lightning import (
    ChatTemplate,
    Decoding,
    HubTarget,
    HuggingFaceExport,
    HyperparameterScheduler,
    KDLightningModule,
    SRDDataModule,
    cli,
)
from srd_lightning.callbacks import export_folder, hub_target
from srd_lightning.callbacks.model_card import model_card
from srd_lightning.callbacks.run_facts import _license, run_facts
from srd_lightning.errors import SettingError, StorageError

HEAD = re.compile(r"\A---\n(.*?)\n---\n\n(.*)\Z", re.DOTALL)


def parts_of(text):
    head, body = HEAD.match(text).groups()
    return yaml.safe_load(head), body


class TestCard:
    def test_the_least(self):
        head, body = parts_of(model_card({"name": "student", "student": {"name": "LlamaForCausalLM"}}).content)
        assert head == {"library_name": "transformers", "tags": ["distillation", "srd"]}
        assert re.findall(r"(?m)^#+ .*$", body) == ["# `student`", "## How to load it", "## Citation"]
        assert "2508.06135" in body

    def test_all(self):
        card = model_card(
            {
                "name": "me/small",
                "student": {"name": "org/base", "revision": "abc", "on_hub": True, "settings": {"keep_layers": [0]}},
                "teacher": {"name": "teacher", "revision": None, "on_hub": False, "settings": {}},
                "license": {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
                "datasets": ["org/rows"],
                "data": {"train": {"sources": ["org/rows", "b.jsonl"], "rows": 1200}, "test": {"sources": []}},
                "training": {"loss": "ForwardKL()", "rollouts": None},
                "decoding": {"of answers": Decoding(temperature=0.5)},
                "measures": {"values": {"val_nll": 1.25}, "rows": 3, "step": 4, "of_steps": 6, "before": "SWA"},
                "prompts": {"without": "Q: {instruction}"},
            }
        )
        head, body = parts_of(card.content)
        assert head == {
            "base_model": "org/base",
            "datasets": ["org/rows"],
            "library_name": "transformers",
            "license": "other",
            "license_name": "mine",
            "license_link": "LICENSE",
            "tags": ["distillation", "srd"],
        }
        for line in (
            "- base model: `org/base`, revision `abc`, keep_layers `[0]`",
            "- teacher: `teacher`",
            'model = AutoModelForCausalLM.from_pretrained("me/small")',
            "- `train`, from `org/rows`, `b.jsonl`: 1,200 rows",
            "- `test`, given in Python",
            "- loss: `ForwardKL()`",
            "The last validation of the run on 3 rows, after step 4 of 6, before `SWA` averaged the weights:",
            "| `val_nll` | 1.25 |",
            "```\nQ: {instruction}\n```",
        ):
            assert f"\n{line}\n" in body, line
        assert "temperature=0.5" in body
        assert "rollouts" not in body

    def test_what_users_write_is_no_markup(self):
        evil = "a`b\n---\n</code><script>|x"
        facts = {
            "name": evil,
            "student": {"name": evil, "on_hub": False},
            "data": {evil: {"sources": [evil, "`", ""]}},
            "prompts": {"without": "```\n# no heading\n````\n"},
        }
        head, body = parts_of(model_card(facts).content)
        assert set(head) == {"library_name", "tags"}
        shown = "``a`b --- </code><script>|x``"
        assert body.count("<script>") == body.count(shown) + 2  # and as a string of Python, twice
        assert f"\n- {shown}, from {shown}, `` ` ``, ` `" in body
        assert "`````\n```\n# no heading\n````\n\n`````" in body
        assert 'from_pretrained("a`b\\n---\\n</code><script>|x")' in body

    def test_adapters_and_encoder_decoders(self):
        facts = {"name": "s", "student": {"name": "b"}, "adapters": True, "encoder_decoder": True}
        head, body = parts_of(model_card(facts).content)
        assert head["library_name"] == "peft"
        assert "model = AutoModelForSeq2SeqLM.from_pretrained" in body
        assert "pip install peft" in body


class TestOfARun:
    def test_what_was_used_and_measured(self, rows, tmp_path):
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\nBase.\n")
        student = tiny_model(0)
        student.config._name_or_path = str(tmp_path / "base")
        teacher = tiny_model(1)
        teacher.config._name_or_path, teacher.config._commit_hash = "org/big", "f00"
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"train": str(tmp_path / "train.jsonl"), "validation": rows[:5]}
        tokenizer = ByT5Tokenizer()
        tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
        datamodule = SRDDataModule(
            files,
            tokenizer,
            template=ChatTemplate(system="Be brief."),
            schedule={0: 0.5, 1: 0.75},
            decoding=Decoding(max_new_tokens=1),
            batch_size=4,
        )
        model = KDLightningModule(student, teacher, kd_weight=0.5, optimizer=lambda params: SGD(params, lr=0.25))
        callbacks = [
            HuggingFaceExport(str(tmp_path / "out")),
            HyperparameterScheduler({"kd_weight": {0: 0.5, 1: 0.75}}),
            StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1, annealing_epochs=1),
        ]
        fit(datamodule, tmp_path, *callbacks, model=model, max_epochs=2, limit_train_batches=1.0, limit_val_batches=1)
        trainer = model.trainer
        found = run_facts(trainer, model.student, "out", {"values": {}})
        head, body = parts_of((tmp_path / "out" / "README.md").read_text())
        assert head == {"library_name": "transformers", "license": "mit", "tags": ["distillation", "srd"]}
        # 8 rows make 2 steps of 4, then 12 make 3; one batch of 4 rows is validated on.
        for line in (
            "- base model: `base`",
            "- teacher: `org/big`, revision `f00`",
            "- `train`, from `train.jsonl`: 16 rows",
            "- `validation`, given in Python: 5 rows",
            "- rows: `12 kept of 16 that were ranked`",
            "- share of the rows by first epoch: `{0: 0.5, 1: 0.75}`",
            "- loss: `ForwardKL(temperature=1.0, scale_by_temperature=True, ignore_index=-100)`",
            "- share of the distillation loss (kd_weight) at the end: `0.75`",
            "- kd_weight by first epoch: `{0: 0.5, 1: 0.75}`",
            "- epochs: `2`",
            "- optimizer steps: `5`",
            "- rows per step: `4`",
            "system message:\n\n```\nBe brief.\n```",
            "The last validation of the run on 4 rows, after step 5 of 5, before `StochasticWeightAveraging` averaged"
            " the weights:",
            f"| `val_nll` | {trainer.callback_metrics['val_nll']:.6g} |\n"
            f"| `val_kl` | {trainer.callback_metrics['val_kl']:.6g} |\n",
        ):
            assert f"\n{line}\n" in body, line
        assert str(tmp_path) not in body
        assert found["measures"] == {"values": {}, "of_steps": 5, "before": "StochasticWeightAveraging"}
        assert "README.md" in json.loads((tmp_path / "out" / "srd_export.json").read_text())["files"]

    def test_a_base_model_of_the_hub_and_rows_of_the_hub(self, tokenizer, rows, tmp_path, monkeypatch):
        student = tiny_model(0)
        student.config._name_or_path, student.config._commit_hash = "org/base", "abc"
        monkeypatch.setattr("srd_lightning.callbacks.run_facts._license", lambda base: {})
        datamodule = data(tokenizer, rows)
        out = tmp_path / "out"
        model = fit(datamodule, tmp_path, HuggingFaceExport(str(out)), model=module(student))
        assert ModelCard.load(out / "README.md").data.base_model == "org/base"
        named = types.SimpleNamespace(data={"train": ["org/rows", "train.jsonl"], "test": "org/rows"})
        model.trainer.datamodule = named
        assert run_facts(model.trainer, student, "out", {})["datasets"] == ["org/rows"]

    def test_a_license_that_is_not_said(self, tmp_path):
        (tmp_path / "README.md").write_text("---\ntags: [x]\n---\nBase.\n")
        assert _license({"on_hub": False, "folder": str(tmp_path)}) == {}
        assert _license({"on_hub": False, "folder": str(tmp_path / "none")}) == {}
        assert _license({"on_hub": True, "name": "org/base", "revision": None, "folder": None}) == {}

    def test_a_card_that_cannot_be_made_costs_no_student(self, tokenizer, rows, tmp_path, monkeypatch):
        def fails(*_):
            raise RuntimeError("no facts")

        monkeypatch.setattr("srd_lightning.callbacks.export.run_facts", fails)
        with pytest.warns(UserWarning, match=r"no model card \(RuntimeError: no facts\)"):
            fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(tmp_path / "out")))
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert not (tmp_path / "out" / "README.md").exists()

    def test_a_readme_of_the_users_stays(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "README.md").write_text("mine")
        with pytest.raises(StorageError, match=r"out holds README\.md, which no export has written"):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "out")))
        assert (tmp_path / "out" / "README.md").read_text() == "mine"


def chain(**settings):
    """A model that says 6 after 5, the end token 1 after 6, and 6 after 1: each token shows the next one's head row."""
    model = tiny_model(0, **settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        for norm in (model.model.norm, *(n for b in model.model.layers for n in (b.input_layernorm,))):
            norm.weight.fill_(1.0)
        for place, (token, following) in enumerate([(5, 6), (6, 1), (1, 6)]):
            model.model.embed_tokens.weight[token, place] = 1.0
            model.lm_head.weight[following, place] = 1.0
    return model


def greedy(model, **options):
    return model.generate(torch.tensor([[5]]), attention_mask=torch.ones(1, 1), max_new_tokens=6, **options)[0].tolist()


class TestGenerationSettings:
    def test_the_export_stops_at_the_end_of_training(self, tokenizer, tmp_path):
        """Of a base model that knows no end token."""
        student = chain(eos_token_id=None, pad_token_id=None)
        assert greedy(student) == [5, 6, 1, 6, 1, 6, 1]
        export_folder.replace(tmp_path / "out", student, tokenizer)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert greedy(loaded) == [5, 6, 1]
        assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (1, 0)
        assert student.generation_config.eos_token_id is None

    def test_rows_of_a_batch_are_padded_as_the_tokenizer_does(self, tokenizer, tmp_path):
        export_folder.replace(tmp_path / "out", chain(eos_token_id=None, pad_token_id=None), tokenizer)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        said = loaded.generate(torch.tensor([[5], [6]]), attention_mask=torch.ones(2, 1), max_new_tokens=6)
        assert said.tolist() == [[5, 6, 1], [6, 1, 0]]

    def test_its_own_settings_stay(self, tokenizer, tmp_path):
        student = chain(eos_token_id=7)
        settings = {"do_sample": True, "temperature": 0.5, "top_k": 3}
        student.generation_config.update(**settings)
        export_folder.replace(tmp_path / "out", student, tokenizer)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert {name: getattr(loaded.generation_config, name) for name in settings} == settings
        assert loaded.generation_config.eos_token_id == [1, 7]
        assert greedy(loaded, do_sample=False, temperature=None, top_k=None) == [5, 6, 1]

    def test_without_a_tokenizer(self, tmp_path):
        export_folder.replace(tmp_path / "out", chain(eos_token_id=6), None)
        assert greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == [5, 6]

    def test_decoding_of_the_run_does_not_come_in(self, tokenizer, rows, tmp_path):
        sampling = Decoding(temperature=0.9, top_k=5, max_new_tokens=3)
        model = KDLightningModule(
            chain(eos_token_id=None), tiny_model(1), optimizer=lambda params: SGD(params, lr=0.0), decoding=sampling
        )
        datamodule = SRDDataModule({"train": rows}, tokenizer, schedule={0: 0.5}, decoding=sampling)
        fit(datamodule, tmp_path, HuggingFaceExport(str(tmp_path / "out")), model=model)
        saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert not saved.get("do_sample")
        assert not saved.keys() & {"temperature", "top_k", "max_new_tokens"}
        assert greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == [5, 6, 1]


class Hub:
    """Stands in for the hub's client: says who it is, and keeps what is uploaded."""

    def __init__(self, role="write", private=None, fails=None):
        self.role, self.private, self.fails, self.calls = role, private, fails or {}, []

    def __call__(self):
        return self

    def _called(self, name, **arguments):
        self.calls.append((name, arguments))
        if name in self.fails:
            raise self.fails[name]

    def whoami(self):
        self._called("whoami")
        return {"name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": self.role}}}

    def repo_info(self, repo):
        self._called("repo_info", repo=repo)
        if self.private is None:
            raise RepositoryNotFoundError("404", response=types.SimpleNamespace(headers={}, request=None))
        return types.SimpleNamespace(private=self.private)

    def create_repo(self, repo, private, exist_ok):
        self._called("create_repo", repo=repo, private=private, exist_ok=exist_ok)
        return types.SimpleNamespace(repo_id=repo if "/" in repo else f"me/{repo}")

    def upload_folder(self, folder_path, ignore_patterns, **arguments):
        self.files = {path.name for path in folder_path.iterdir()} - set(ignore_patterns)
        self._called("upload_folder", **arguments)


@pytest.fixture
def hub(monkeypatch):
    def use(token="secret", **settings):
        there = Hub(**settings)
        monkeypatch.setattr(hub_target, "HfApi", there)
        monkeypatch.setattr(hub_target, "get_token", lambda: token)
        return there

    return use


class TestHub:
    def test_it_is_uploaded_when_training_has_ended(self, hub, tokenizer, rows, tmp_path):
        there = hub()
        fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(tmp_path / "out"), HubTarget("org/small")))
        assert [name for name, _ in there.calls] == ["whoami", "repo_info", "create_repo", "upload_folder"]
        assert there.calls[2][1] == {"repo": "org/small", "private": True, "exist_ok": True}
        assert there.calls[3][1]["repo_id"] == "org/small"
        assert there.files == {path.name for path in (tmp_path / "out").iterdir()} - {"srd_export.json"}
        assert 'from_pretrained("org/small")' in (tmp_path / "out" / "README.md").read_text()

    def test_an_upload_that_fails_costs_no_student(self, hub, tokenizer, rows, tmp_path):
        hub(fails={"upload_folder": OSError("line\ncut")})
        out = tmp_path / "my out"
        with pytest.warns(UserWarning, match=r"could not be uploaded \(line cut\); to do so later: ") as caught:
            fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(str(out), HubTarget("small")))
        said = [str(one.message) for one in caught if "later: " in str(one.message)]
        assert said[0].endswith(f"hf upload small '{out}' . --exclude srd_export.json --private")
        assert (out / "model.safetensors").is_file()

    @pytest.mark.parametrize(
        ("settings", "target", "said"),
        [
            (
                {"token": None},
                HubTarget("org/small"),
                "needs a token of the hub to write to org/small, but there is none",
            ),
            ({"fails": {"whoami": OfflineModeIsEnabled("off")}}, HubTarget("small"), "HF_HUB_OFFLINE is set; unset it"),
            ({"fails": {"whoami": OSError("no route")}}, HubTarget("small"), r"cannot be reached \(no route\); run"),
            ({}, HubTarget("other/small"), "belongs to other, but the token may write for me, org; name me/small"),
            ({"role": "read"}, HubTarget("small"), "this one may only read; make one with the role write"),
            ({"private": False}, HubTarget("small"), "small is there and public; set push_to.private to false"),
        ],
    )
    def test_what_the_hub_would_not_take_is_known_before_rows_are_read(self, settings, target, said, hub, tmp_path):
        there = hub(**settings)
        with pytest.raises(SettingError, match=said):
            refused(tmp_path, HuggingFaceExport(str(tmp_path / "out"), target))
        assert not {name for name, _ in there.calls} & {"create_repo", "upload_folder"}

    @pytest.mark.parametrize("settings", [{"private": True}, {"private": False}, {}])
    def test_what_it_takes(self, settings, hub):
        hub(**settings)
        HubTarget("org/small", private=settings.get("private", False)).check()

    @pytest.mark.parametrize("repo", ["a/b/c", "", "with space", "-x"])
    def test_names_that_cannot_be(self, repo):
        with pytest.raises(SettingError, match=r"push_to\.repo must be the name of a repository"):
            HubTarget(repo)

    def test_a_dry_run_asks_nobody(self, hub, tokenizer, rows, tmp_path):
        there = hub()
        fit(data(tokenizer, rows), tmp_path, HuggingFaceExport(push_to=HubTarget("small")), fast_dev_run=True)
        assert there.calls == []

    def test_from_a_recipe(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        recipe = {
            "model": {"student": "small", "teacher": "big"},
            "data": {"data": "rows.jsonl"},
            "trainer": {
                "accelerator": "cpu",
                "callbacks": [{"class_path": "HuggingFaceExport", "init_args": {"push_to": {"repo": "org/small"}}}],
            },
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        made = cli.parse(["--config", "recipe.yaml"]).trainer.callbacks
        (saves,) = (callback for callback in made if isinstance(callback, HuggingFaceExport))
        assert saves.push_to == HubTarget("org/small", private=True)
