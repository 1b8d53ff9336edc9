import importlib
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from public_api import GOLDEN, public_api

import srd_lightning
from srd_lightning import ALPACA

ROOT = Path(__file__).parents[1]
PUBLIC_NAMES = ROOT / "docs/api/index.md"

IMPORT_THE_CORE_ALONE = """
import sys

BLOCKED = {"lightning", "pytorch_lightning", "transformers", "datasets"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())

import importlib
import pkgutil

import srd_lightning.curriculum
import srd_lightning.data.templates
import srd_lightning.losses

for room in (srd_lightning.curriculum, srd_lightning.losses):
    for module in pkgutil.iter_modules(room.__path__, f"{room.__name__}."):
        if ".triton_" not in module.name:  # these are for GPUs, where torch brings Triton
            importlib.import_module(module.name)
"""
FORMER_PATHS = """
arrangement: Arrangement EasyToHard HardToEasy RandomOrder RandomSubset
callbacks: AnswerWriter CurriculumCallback HuggingFaceExport HyperparameterScheduler
checkpoint: ResumeCheckpoint
consolidate: consolidate
criteria: AnswerLength Bleu ChrF Column Criterion ExactMatch InstructionFollowingDifficulty NegativeLogLikelihood
criteria: NumericAnswer Perplexity RankSurprisalRatio ResponseLength RougeL TeacherKL
criteria.answers: AnswerLength Bleu ChrF ExactMatch NumericAnswer ResponseLength RougeL
criteria.batch: Reflected
criteria.likelihood: InstructionFollowingDifficulty NegativeLogLikelihood Perplexity RankSurprisalRatio
criteria.teacher: TeacherKL
curation.fingerprint: fingerprint
curation.order: rank
curriculum: PAPER_SCHEDULE Curriculum
curriculum.arrangement: Arrangement EasyToHard HardToEasy RandomOrder RandomSubset
data: SRDDataModule
data.fields: text_of
data.formats: form_of
data.rows: ids_of response_lengths
data.splits: load_rows
evaluation.response_logits: response_logits
fetch: smollm2
fingerprint: fingerprint
generation: PAPER_DECODING Decoding
losses: DistillationLoss ForwardKL JensenShannon ReverseKL SkewForwardKL SkewReverseKL TotalVariation
losses: IGNORE_INDEX cross_entropy log_probabilities response_mask
models: Pretrained
module: KDLightningModule
objective: Head chunked_objective
ranking: reciprocal_rank_fusion
reflection: SCORING_VERSION
rows: ids_of
runtime: RuntimeBenchmark
sampling: LengthGrouped
store: ScoreStore write_atomically
strategy: FSDP2
templates: ALPACA ChatTemplate Example PromptTemplate
"""
"""Where settings, checkpoints and code that were written once may look for a name."""


def test_pure_core_imports_without_lightning_and_transformers():
    result = subprocess.run([sys.executable, "-c", IMPORT_THE_CORE_ALONE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


STRANGERS_COMMAND_LINE = """
from lightning.pytorch.cli import LightningCLI

from srd_lightning import KDLightningModule

options = {"subclass_mode_model": True, "run": False, "auto_configure_optimizers": False}
line = ["--model", "srd_lightning.KDLightningModule", "--model.student", "no/such", "--model.kd_weight", "0"]
cli = LightningCLI(KDLightningModule, args=line, **options)
print(cli.config.model.init_args.student)
"""


def test_a_command_line_that_is_not_ours_takes_the_name_of_a_model(tmp_path):
    command = [sys.executable, "-c", STRANGERS_COMMAND_LINE]  # a process of its own: `srd` was never imported there
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "class_path='srd_lightning.Pretrained'" in result.stdout, result.stderr
    assert "name='no/such'" in result.stdout


def test_manual_lists_the_public_names():
    names = re.findall(r"^\| \[`(\w+)`\]", PUBLIC_NAMES.read_text(), re.MULTILINE)
    assert sorted(names) == sorted(srd_lightning.__all__)


def test_every_public_name_can_be_imported():
    missing = [name for name in srd_lightning.__all__ if not hasattr(srd_lightning, name)]
    assert not missing


def test_the_public_interface_is_what_was_written_down():
    assert public_api() == GOLDEN.read_text(), "if this change is meant: python tests/public_api.py, and the changelog"


@pytest.mark.parametrize("line", FORMER_PATHS.split("\n")[1:-1])
def test_what_has_moved_is_found_where_it_was(line):
    module, _, names = line.partition(": ")
    for name in names.split():
        found = getattr(importlib.import_module(f"srd_lightning.{module}"), name)
        if name == "RougeL":  # in the package that is a metric
            assert issubclass(found, srd_lightning.criteria.Criterion)
        else:
            assert name not in srd_lightning.__all__ or found is getattr(srd_lightning, name)


def test_under_its_former_name_a_module_is_the_same_one():
    former = importlib.import_module("srd_lightning.templates")
    assert former is importlib.import_module("srd_lightning.data.templates")
    assert former.__spec__.name == former.__name__ == "srd_lightning.data.templates"


def test_what_was_pickled_under_a_former_name_is_loaded():
    saved = pickle.dumps(ALPACA, protocol=0)
    assert pickle.loads(saved.replace(b"srd_lightning.data.templates", b"srd_lightning.templates")) == ALPACA


@pytest.mark.parametrize("program", ["quickstart", "fetch", "consolidate"])
def test_programs_are_found_where_they_were(program, monkeypatch):
    monkeypatch.delitem(sys.modules, f"srd_lightning.{program}", raising=False)  # a program is the first to ask for it
    found = runpy.run_module(f"srd_lightning.{program}", run_name="found")
    assert found["__doc__"]


def files_of(kind):
    """Return the files that go into a wheel or an sdist, without building it."""
    builders = pytest.importorskip(f"hatchling.builders.{kind}")
    builder = getattr(builders, f"{kind.capitalize()}Builder")(str(ROOT))
    return {file.distribution_path for file in builder.recurse_included_files()}


def test_the_wheel_holds_the_package_and_its_recipes_and_nothing_else():
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "srd_lightning").rglob("*.*")}
    package = {name for name in package if name.endswith((".py", "/py.typed", "/report.html"))}
    recipes = {f"srd_lightning/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert files_of("wheel") == package | recipes
    assert {"srd_lightning/py.typed", "srd_lightning/configs/debug.yaml"} <= package | recipes


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git, which knows what a run leaves")
def test_the_sdist_holds_what_git_does_not_ignore():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())
    found = files_of("sdist")
    assert found >= {"LICENSE", "README.md", "configs/debug.yaml", "pyproject.toml", "tests/test_package.py"}
    assert found <= known
