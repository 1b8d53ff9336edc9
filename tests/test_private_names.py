"""What the package uses of other libraries that they have promised nobody: each test says where, once it is gone."""

import argparse
import inspect
import signal

import lightning as L
import pytest
import torch
from datasets import Dataset
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies.launchers import subprocess_script
from tiny import QUIET, tiny_model


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("_find_last_checkpoints", ["self", "trainer"]),
        ("_should_remove_checkpoint", ["self", "trainer", "previous", "current"]),
        ("_save_checkpoint", ["self", "trainer", "filepath"]),
        ("_should_skip_saving_checkpoint", ["self", "trainer"]),
        ("_monitor_candidates", ["self", "trainer"]),
        ("_save_topk_checkpoint", ["self", "trainer", "monitor_candidates"]),
    ],
)
def test_methods_of_model_checkpoint_that_resume_checkpoint_replaces_or_calls(name, takes):
    assert parameters(getattr(ModelCheckpoint, name)) == takes


@pytest.mark.parametrize("name", ["_last_global_step_saved", "_last_checkpoint_saved"])
def test_what_model_checkpoint_remembers_and_resume_checkpoint_sets(name):
    assert name in vars(ModelCheckpoint())


@pytest.fixture
def stepped(tmp_path):
    """The progress in the checkpoint of a run of two batches."""
    trainer = L.Trainer(max_steps=2, limit_val_batches=0, default_root_dir=tmp_path, **QUIET)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    return torch.load(tmp_path / "kept.ckpt", weights_only=False)["loops"]["fit_loop"]


def test_lightning_counts_batches_that_stepped_in_its_checkpoints(stepped):
    """`resume` corrects it."""
    assert stepped["epoch_loop.state_dict"]["_batches_that_stepped"] == 2


@pytest.mark.parametrize("name", ["epoch_progress", "epoch_loop.batch_progress"])
def test_counters_in_checkpoints_of_lightning_are_those_that_resume_corrects(stepped, name):
    for kind in ("total", "current"):
        assert stepped[name][kind].keys() >= {"ready", "started", "processed", "completed"}
    assert stepped["epoch_loop.val_loop.batch_progress"][kind].keys() == {"ready", "started", "processed", "completed"}


def test_the_launcher_that_failures_look_for_is_what_starts_other_processes(tmp_path):
    trainer = L.Trainer(devices=2, strategy="ddp", default_root_dir=tmp_path, **QUIET)
    trainer.strategy.setup_environment = lambda: None
    trainer.strategy._configure_launcher()
    assert isinstance(trainer.strategy.launcher, subprocess_script._SubprocessScriptLauncher)
    assert trainer.strategy.launcher.procs == []
    assert hasattr(trainer.strategy.launcher, "kill")
    assert parameters(subprocess_script._SubprocessScriptLauncher.kill) == ["self", "signum"]
    trainer.strategy.launcher.kill(signal.SIGTERM)  # nobody


def test_all_that_a_trainer_runs_goes_through_one_method_with_the_checkpoint_that_was_found():
    """`SRDTrainer` looks into it there."""
    assert parameters(L.Trainer._run) == ["self", "model", "ckpt_path", "weights_only"]


def test_a_module_knows_its_trainer_privately():
    """`failures` asks for it where the public name raises."""
    assert BoringModel()._trainer is None


def test_datasets_keep_a_selection_as_indices():
    """`rows.lengths_of` reads them as they are."""
    rows = Dataset.from_dict({"length": [5, 6, 7]})
    assert rows._indices is None
    assert rows.select([2, 0])._indices.column(0).to_pylist() == [2, 0]


def test_a_selection_is_applied_to_columns_in_its_order():
    from srd_lightning.data.tokenization import lengths_of

    rows = Dataset.from_dict({"length": [5, 6, 7]}).select([2, 0])
    assert lengths_of(rows).tolist() == rows["length"][:] == [7, 5]


def test_transformers_keep_how_attention_is_computed_in_the_configuration():
    """`split` and `depth_cut` read it."""
    assert tiny_model(attn_implementation="eager").config._attn_implementation == "eager"


def test_liger_patches_one_model(monkeypatch):
    """`models.Pretrained` calls it; GPUs only, so that is all there is to see here."""
    transformers = pytest.importorskip("liger_kernel.transformers")
    assert parameters(transformers._apply_liger_kernel_to_instance)[0] == "model"


def test_a_compiled_module_keeps_the_original():
    """`calling` looks for it."""
    model = torch.nn.Linear(1, 1)
    assert torch.compile(model)._orig_mod is model


def test_a_fused_optimizer_says_that_it_unscales_gradients_itself():
    """`compatibility` refuses it together with clipping."""
    weight = [torch.nn.Parameter(torch.zeros(1))]
    assert torch.optim.AdamW(weight, fused=True)._step_supports_amp_scaling
    assert not getattr(torch.optim.AdamW(weight), "_step_supports_amp_scaling", False)


def test_the_parser_applies_trees_of_settings_by_a_method_that_ours_replaces():
    assert parameters(ArgumentParser._apply_actions)[:3] == ["self", "cfg", "parent_key"]


def test_the_parser_lists_its_settings():
    """`parser` and `settings_help` read them, and the types that values were checked against."""
    parser = LightningArgumentParser()
    parser.add_argument("--data.batch_size", type=int | None)
    assert "--data.batch_size" in parser._option_string_actions
    (action,) = [action for action in parser._actions if action.dest == "data.batch_size"]
    assert isinstance(action, argparse.Action)
    assert action._typehint == int | None


def test_the_command_line_sets_its_seed_by_a_method_that_ours_replaces():
    assert parameters(LightningCLI._set_seed) == ["self"]


def test_a_module_that_torch_compiles_says_so_privately():
    """`compatibility` refuses it."""
    from lightning.pytorch.utilities.compile import from_compiled

    assert BoringModel()._compiler_ctx is None
    assert from_compiled(torch.compile(BoringModel()))._compiler_ctx is not None


def test_the_trainer_of_transformers_asks_one_method_for_its_sampler():
    """The manual has it return a `WholeRunSampler`."""
    from transformers import Trainer

    assert parameters(Trainer._get_train_sampler) == ["self", "train_dataset"]
