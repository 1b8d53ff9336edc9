import html
import json
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_studies import QUICK, STAND_IN, write

from srd_lightning.errors import DataError, MissingDataError, SettingError, StorageError
from srd_lightning.studies import commands
from srd_lightning.studies.report import time_parts, times
from srd_lightning.studies.runs import Run, read_runs

SECTIONS = [
    "Runs compared",
    "Quality against time",
    "Training",
    "Where the time went",
    "Memory",
    "Curation",
    "Answers side by side",
    "Settings",
    "Versions and hardware",
]
EVIL = "<script>alert('x')</script> & \"quoted\""
RUNTIME = {
    "curation": {"rows": 40, "kept": 30, "scored": 40, "seconds": 5.0},
    "stages": [
        {"first_epoch": 0, "rows": 10, "steps": 2, "tokens": 99, "seconds": 4.0, "waiting_seconds": 1.0},
        {"first_epoch": 1, "rows": 30, "steps": 6, "tokens": 300, "seconds": 8.0, "waiting_seconds": 2.0},
    ],
    "validation_seconds": 2.5,
    "peak_memory_bytes": 3 * 2**30,
}
VOID = {"meta", "link", "br", "hr", "img", "input"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a page holds; tags must be closed in the order in which they were opened."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.headings, self.texts = [], [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        self.texts.append(data)

    def values(self, name):
        return [value for _, attribute, value in self.attributes if attribute == name]


def complete(run):
    """Leave in a run's folder what the stand-in does not."""
    (run / "runtime.json").write_text(json.dumps(RUNTIME))
    (run / "lightning_logs" / "version_0" / "config.yaml").write_text(
        yaml.safe_dump({"model": {"loss": run.parent.name, "note": EVIL}, "trainer": {"path": f"{run}/x"}})
    )
    scores = run / "scores" / "0123"
    scores.mkdir(parents=True)
    numbers = np.linspace(0, 1, 40)
    columns = {"id": list(map(str, range(40))), "position": range(40), "nll": numbers}
    table = pa.table({**columns, "stage": [0] * 30 + [-1] * 10})
    pq.write_table(table, scores / "ranking.parquet")
    pq.write_table(table.select(["id", "nll"]), scores / "part-1.parquet")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write({**QUICK, "seeds": [0]}, folder / "quick.yaml")
        commands.study(["quick.yaml", "--folder=quick"], STAND_IN)
        for run in (folder / "quick").glob("cells/*/*"):
            complete(run)
        commands.report(["quick", "--path=page.html"])
    return folder


@pytest.fixture(scope="module")
def page(study):
    return Page(study / "page.html")


class TestPage:
    def test_it_has_all_sections_and_links_to_them(self, page):
        assert page.headings == SECTIONS
        ids = page.values("id")
        assert len(set(ids)) == len(ids)
        assert page.values("href") == [f"#{title.lower().replace(' ', '-')}" for title in SECTIONS]
        assert {link[1:] for link in page.values("xlink:href")} <= set(ids)

    def test_it_needs_nothing_else(self, study, page):
        text = (study / "page.html").read_text()
        assert "://" not in text
        assert "@import" not in text
        assert {"src", "srcset", "action", "onload"}.isdisjoint(name for _, name, _ in page.attributes)
        assert all("#" in part[:2] for part in text.split("url(")[1:])
        assert {"script", "iframe", "object", "link", "img"}.isdisjoint(page.tags)

    def test_what_models_and_settings_say_is_text(self, page):
        assert page.texts.count("<script>alert(0)</script>") == 2 * 3
        assert EVIL in page.texts

    def test_pictures_say_what_they_show(self, page):
        labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
        assert len(labels) == page.tags.count("svg") == page.tags.count("figure") == page.tags.count("figcaption")
        assert "val_nll over seconds of training" in labels
        assert [label for label in labels if "nll of 40 rows" in label]
        assert [label for label in labels if label.startswith("nll against seconds of training")]

    def test_tables_have_their_numbers(self, page):
        texts = " ".join(page.texts).replace("  ", " ")
        assert "-0.6667 (-1.667 – 0.3333)" in texts  # nll of fast: of 3 rows with 1, 2 and 3 tokens -2, -1 and 0
        for cell in ("-1 to -1", "9.0", "3.00", "30"):  # paired difference, steps, GiB, rows kept
            assert cell in page.texts
        assert "{run}/x" in page.texts

    def test_what_is_lacking_is_said(self, study, tmp_path):
        run = tmp_path / "bare"
        run.mkdir()
        (run / "runtime.json").write_text("{}")
        commands.report([str(run), str(study / "quick"), f"--path={tmp_path / 'page.html'}"])
        page = Page(tmp_path / "page.html")
        assert page.headings == SECTIONS
        said = [text for text in page.texts if text.startswith("Without ")]
        assert len(said) == 9
        assert all("bare" in text for text in said)

    def test_only_a_report_is_replaced(self, tmp_path):
        (tmp_path / "runtime.json").write_text("{}")
        path = tmp_path / "page.html"
        for _ in range(2):
            commands.report([str(tmp_path), f"--path={path}"])
        path.write_text("<title>mine</title>")
        with pytest.raises(StorageError, match="does not hold an earlier report"):
            commands.report([str(tmp_path), f"--path={path}"])


class TestRuns:
    def test_what_is_no_run_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="is no run: it has neither logs"):
            read_runs([tmp_path])
        with pytest.raises(MissingDataError, match="there is no folder"):
            read_runs([tmp_path / "none"])
        with pytest.raises(SettingError, match=r"required: RUN; srd report --help explains it"):
            commands.report([])

    def test_of_a_study_runs_are_shown_that_have_begun(self, tmp_path):
        for arm in ("waits", "runs"):
            (tmp_path / "cells" / arm / "seed-3").mkdir(parents=True)
        (tmp_path / "cells" / "runs" / "seed-3" / "runtime.json").write_text("{}")
        assert read_runs([tmp_path]) == [Run("runs, seed 3", "runs", tmp_path / "cells" / "runs" / "seed-3")]

    def test_runs_of_one_name_are_called_by_their_paths(self, tmp_path):
        for name in ("a/run", "b/run", "c"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "runtime.json").write_text("{}")
        names = [run.name for run in read_runs([tmp_path / name for name in ("a/run", "b/run", "c")])]
        assert names == [f"{tmp_path}/a/run", f"{tmp_path}/b/run", "c"]

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / "runtime.json").write_text("{")
        with pytest.raises(StorageError, match=r"runtime\.json cannot be read"):
            commands.report([str(tmp_path), f"--path={tmp_path / 'page.html'}"])

    def test_the_parts_of_the_time_are_the_whole(self, tmp_path):
        (tmp_path / "runtime.json").write_text(json.dumps(RUNTIME))
        parts = time_parts(Run("a", "a", tmp_path))
        assert parts == {"curation": 5, "waiting": 3, "steps": 9, "validation": 2.5}

    def test_parts_are_those_that_were_measured(self, tmp_path):
        parts = {"teacher_cache": 4.0, "forward": 6.0, "refresh": 0.001}
        (tmp_path / "runtime.json").write_text(
            json.dumps({**RUNTIME, "parts": parts, "energy_joules": {"gpu": 1234.0}})
        )
        run = Run("a", "a", tmp_path)
        assert time_parts(run) == {"teacher cache": 4.0, "forward": 6.0}
        assert ["a", "gpu", "1,234"] in [row for table in times([run]).tables for row in table.rows]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make browser installs it")
def test_it_fits_a_phone_and_a_laptop(study, tmp_path):
    """Opens the page in frames as wide as screens: only tables are wider, within their own scroll bars."""
    measure = (
        "const root = page.documentElement, all = selector => [...page.querySelectorAll(selector)];"
        "const boxes = all('body *:not(.scrolls *)').map(element => element.getBoundingClientRect());"
        "const pictures = all('svg').map(svg => svg.getBoundingClientRect().height);"
        "return [root.scrollWidth <= root.clientWidth, boxes.every(box => box.right <= root.clientWidth),"
        "pictures.length > 9, pictures.every(height => height > 100)]"
    )
    inner = html.escape((study / "page.html").read_text())
    around = tmp_path / "around.html"
    around.write_text(
        "".join(
            f'<iframe style="border: 0" width={width} height=900 srcdoc="{inner}"></iframe>' for width in (390, 1280)
        )
        + f"<script>onload = () => {{ const measure = page => {{ {measure} }};"
        "document.title = [0, 1].map(place => measure(frames[place].document)).join() }</script>"
    )
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, "--headless", *flags, f"--user-data-dir={profile}", "--dump-dom", f"file://{around}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "<title>true,true,true,true,true,true,true,true</title>" in done.stdout
