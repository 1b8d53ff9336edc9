"""What is put on top of a recipe, through the real command line, on two ranks."""

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import HANGS, python, run_cli, surroundings
from safetensors.torch import load_file

from srd_lightning import cli

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = sorted(
    path for path in CONFIGS.glob("*.yaml") if "data" not in yaml.safe_load(path.read_text()).get("data", {})
)
OVERLAYS.remove(CONFIGS / "paper_evaluation.yaml")  # which is for another subcommand (tests/test_assessment.py)
SRD = str(CONFIGS.parent / "cli.py")
ON_CPU = ["--trainer.accelerator=cpu", "--trainer.max_epochs=3", "--model.teacher_cache=none"]


def arguments(*overlays):
    """Return the arguments of a fit of the debug recipe with overlays."""
    return ["fit", *(f"--config={CONFIGS / name}.yaml" for name in ("debug", *overlays))]


def launch(folder, *commands):
    """Run commands at the same time; return what they wrote."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, cwd=folder, env=surroundings(), **pipes) for command in commands]
    said = "".join(process.communicate(timeout=HANGS)[0] for process in running)
    assert [process.returncode for process in running] == [0] * len(commands), said
    return said


def run(folder, *arguments, devices=2):
    """Run the command line; return what it wrote."""
    code, out, error = run_cli([*arguments, *ON_CPU, f"--trainer.devices={devices}"], folder, ranks=devices)
    assert code == 0, error
    return out + error


def trained(folder):
    """Return the exported weights, and the steps of each stage."""
    report = json.loads((folder / "runs/debug/runtime.json").read_text())
    weights = load_file(folder / "runs/debug/student/model.safetensors")
    return weights, [stage["steps"] for stage in report["stages"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one rank makes of the same rows per step."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *arguments(), "--data.batch_size=4", devices=1)
    return trained(folder)


def check(folder, alone, tolerance):
    weights, steps = trained(folder)
    assert steps == alone[1] == [1, 1, 2]
    assert max((weight - alone[0][name]).abs().max() for name, weight in weights.items()) <= tolerance


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", ["debug", "quickstart", "gpt2_dolly"])
def test_an_overlay_fits_each_recipe(recipe, overlay, capsys):
    """Read, not run: FSDP1 needs GPUs, and several nodes a launcher."""
    recipe = CONFIGS / f"{recipe}.yaml"
    with pytest.raises(SystemExit, match="0"):
        cli.run(["fit", f"--config={recipe}", f"--config={overlay}", "--print_config"])
    merged = yaml.safe_load(capsys.readouterr().out)
    assert holds(merged, yaml.safe_load(overlay.read_text()))
    assert not overlay.stem.startswith("fsdp") or merged["model"]["micro_batch_tokens"] is None  # as it must be there
    assert merged["trainer"]["max_epochs"] == yaml.safe_load(recipe.read_text())["trainer"]["max_epochs"]


def holds(values, some):
    """Return whether some values are among others, with what a name with a plus adds to a list."""
    if not isinstance(some, dict):
        return values == some
    if "class_path" in some:
        return values["class_path"].endswith(some["class_path"].rpartition(".")[2]) and holds(
            values.get("init_args", {}), some.get("init_args", {})
        )
    values = {str(key): value for key, value in values.items()}
    added = {key: part for key, part in some.items() if str(key).endswith("+")}
    return all(holds(values[str(key)], part) for key, part in some.items() if key not in added) and all(
        any(holds(value, one) for value in values[key[:-1]]) for key, part in added.items() for one in part
    )


@pytest.mark.parametrize(
    ("overlays", "tolerance"),
    [(["ddp"], 1e-5), (["fsdp2"], 1e-5), (["fsdp2", "bf16"], 5e-3)],
    ids=["ddp", "fsdp2", "fsdp2-bf16"],
)
def test_an_overlay_trains_on_two_processes_as_one_does(overlays, tolerance, alone, tmp_path):
    if overlays == ["ddp"]:  # once as Lightning starts the second process
        said = launch(tmp_path, [python(), SRD, *arguments(*overlays), *ON_CPU, "--trainer.devices=2"])
    else:
        said = run(tmp_path, *arguments(*overlays))
    assert "2 processes" in said
    check(tmp_path, alone, tolerance)


@pytest.mark.parametrize(("command", "says"), [("test", "test_rouge_l"), ("curate", "ranking.parquet")])
def test_the_other_commands_work_where_weights_are_sharded(command, says, tmp_path):
    assert says in run(tmp_path, command, *arguments("fsdp2")[1:])


def test_two_nodes_train_as_one_process_does(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [python(), "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [[*torchrun, f"--node-rank={rank}", SRD, *arguments("ddp", "multinode"), *ON_CPU] for rank in (0, 1)]
    assert re.search(r"MEMBER: 2/2", launch(tmp_path, *nodes))
    check(tmp_path, alone, 1e-5)
