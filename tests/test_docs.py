"""The manual, as a reader uses it: commands are understood, Python runs, links lead somewhere."""

import contextlib
import inspect
import io
import json
import re
import runpy
import shlex
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model
from torch.optim import AdamW
from transformers import ByT5Tokenizer

from srd_lightning.command.commandline import SRDCLI
from srd_lightning.command.subcommands import OF_RUNS
from srd_lightning.studies.commands import PROGRAMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/gpu/README.md", *ROOT.glob("docs/**/*.md")]
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)]*))?\)")


def blocks(*languages):
    """Return page and text of all fenced blocks in one of some languages; "" is none."""
    found = [(page, *block) for page in PAGES for block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text())]
    return [(page, code) for page, language, code in found if language in languages]


def name_of(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else value[:60]


LINES = dict.fromkeys(
    " ".join(line.split()).partition(" # ")[0].removeprefix("# ")
    for _, block in blocks("", "bash", "sh", "console")
    for line in block.replace("\\\n", " ").splitlines()
)
"""What may be typed, each line once, without the comment behind it; and what is printed, in the same blocks."""
COMMAND = re.compile(r'(?:.* )?(?:srd|"\$\(which srd\)"|python cli\.py) (\w.*)')
SRD = list(dict.fromkeys(found[1] for line in LINES if (found := COMMAND.match(line))))
SCRIPTS = [line for line in LINES if re.match(r"(?:\S+=\S+ )*python3? [^-]", line)]
TARGETS = [line for line in LINES if line.startswith("make ")]
PYTHON = blocks("python")
SETTINGS = [(page, block) for page, block in blocks("yaml") if page.name != "studies.md"]
"""Those of studies are run by test_studies.py."""
OTHERS = ("trl", "vllm")
"""Packages that no test needs: what uses them runs only where they are installed."""


class Stopped(Exception):
    """The parser is made."""


class Parser(SRDCLI):
    """Gives its parser away instead of running anything."""

    def parse_arguments(self, parser, args):
        raise Stopped(parser)


@pytest.fixture(scope="module")
def parser():
    with pytest.raises(Stopped) as stopped:
        Parser([])
    return stopped.value.args[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which commands make sense: recipes, what they name, and blocks that begin with a file's name."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "recipe.yaml").symlink_to(ROOT / "configs/quickstart.yaml")
    for package in ("bitsandbytes", "torchao"):
        optim = types.ModuleType(f"{package}.optim")
        optim.AdamW8bit = type("AdamW8bit", (AdamW,), {"__module__": optim.__name__})
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, optim.__name__, optim)
        monkeypatch.setattr(sys.modules[package], "optim", optim, raising=False)
    for _, block in blocks("python", "yaml"):
        if file := re.match(r"# ((\w+)\.\w+)\n", block):
            (tmp_path / file[1]).write_text(block)
            monkeypatch.delitem(sys.modules, file[2], raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands():
    assert len(SRD) > 20
    assert len(SCRIPTS) > 10
    assert len(TARGETS) > 3


@pytest.mark.parametrize("arguments", SRD)
def test_commands_are_understood(arguments, parser, folder):
    name, *settings = shlex.split(arguments)
    if name in OF_RUNS:
        assert not unknown(settings, inspect.getsource(PROGRAMS[name]))
    else:
        parser.parse_args([name, *settings], defaults=False)


def unknown(arguments, source):
    """Return the options that do not stand in the source of a program."""
    return [option for option in arguments if option.startswith("--") and f'"{option}"' not in source]


@pytest.mark.parametrize(("page", "block"), SETTINGS, ids=name_of)
def test_settings_are_understood(page, block, parser, folder):
    (folder / "block.yaml").write_text(block)
    recipe = [] if "student" in yaml.safe_load(block).get("model", {}) else ["--config", "recipe.yaml"]
    parser.parse_args(["fit", *recipe, "--config", "block.yaml"], defaults=False)


@pytest.mark.parametrize("line", SCRIPTS)
def test_scripts_have_these_options(line):
    script, *arguments = shlex.split(line.partition("python")[2].removeprefix("3"))
    source = "".join(path.read_text() for path in [ROOT / script, *(ROOT / script).parent.glob("*.py")])
    assert not unknown(arguments, source)


@pytest.mark.parametrize("line", TARGETS)
def test_targets_are_there(line):
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=name_of)
def test_python_runs_or_is_python(page, code, folder):
    compiled = compile(code, str(page), "exec")
    if any(f"from {package} " in code and not find_spec(package) for package in OTHERS):
        return
    if page.name in ("README.md", "projects.md") or not re.search(r"^(?:from|import) ", code, re.MULTILINE):
        return  # tests of their own run the former; the latter is a part of something
    write_runs(folder / "runs")
    expected = printed_in(code)
    assert prints(compiled, {"__name__": "pasted"}) == expected or not expected


def printed_in(code):
    """Return what a block says that it prints."""
    return re.findall(r"^print\(.*  # (.*)$", code, re.MULTILINE)


def prints(code, names):
    """Return the lines that code prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, names)
    return said.getvalue().splitlines()


def test_projects_are_one_program(folder):
    names, page = {"__name__": "pasted"}, ROOT / "docs/projects.md"
    for _, code in [block for block in PYTHON if block[0] == page]:
        if "accelerate" in code or "import Trainer" in code:
            pytest.importorskip("accelerate", reason="accelerate is not installed")
        lines = prints(compile(code, str(page), "exec"), names)
        assert [line for line in lines if not line.startswith("{'")] == printed_in(code), code


def write_runs(folder):
    """Write what runs of the manual would have written: a student, two evaluations, and curated rows."""
    tiny_model().save_pretrained(folder / "first/student")
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(folder / "first/student")
    for run in ("srd", "all_data"):
        (folder / run / "evaluation").mkdir(parents=True)
        rows = ({"id": str(row), "greedy_rouge_l": row / len(run)} for row in range(3))
        (folder / run / "evaluation/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {"prompt": "Add 1 and 1.", "response": "2"}
    kept = ({**texts, "id": str(row), "kept": row < 2, "stage": row % 2, "position": 2 - row} for row in range(3))
    (folder.parent / "curated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (folder.parent / "kept.jsonl").write_text(json.dumps({"prompt": "Add.", "completion": "2"}) + "\n")


def test_settings_of_another_trainer_name_columns_that_are_there(folder):
    """Of Axolotl, by the file that the block before has written."""
    (rows,) = (code for page, code in PYTHON if page.name == "export.md" and ".to_json(" in code)
    write_runs(folder / "runs")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(rows, {"__name__": "pasted"})
    ((_, block),) = blocks("yml")
    (source,) = yaml.safe_load(block)["datasets"]
    first = json.loads((folder / source["path"]).read_text().splitlines()[0])
    assert {source["type"][field] for field in ("field_instruction", "field_output")} == first.keys()
    assert first == {"prompt": "Add 1 and 1.", "completion": "2"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def anchors(page):
    """Return what a link to a page may end with: its headings, written as in addresses, and what it documents."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    headings = [re.sub(r"[^\w -]", "", heading).strip().lower() for heading in re.findall(r"(?m)^#+ (.*)$", text)]
    return {re.sub(r" +", "-", heading) for heading in headings} | set(re.findall(r"(?m)^::: (\S+)$", text))


def test_figures_are_as_they_are_drawn():
    drawn = runpy.run_path(str(ROOT / "docs/figures/draw.py"))["FIGURES"]
    files = {path.stem: path.read_text() for path in (ROOT / "docs/figures").glob("*.svg")}
    assert files == {name: draw().svg() for name, draw in drawn.items()}


def test_everything_that_is_documented_is_there():
    named = [name for page in ROOT.glob("docs/api/*.md") for name in re.findall(r"(?m)^::: (\S+)$", page.read_text())]
    assert named
    for name in named:
        module, _, thing = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[thing]), thing), name
