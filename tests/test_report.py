import io
import itertools
import json
import random
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from rich.console import Console

from srd_lightning.curation.report import (
    _draw_histogram,
    _draw_ranks,
    extremes,
    plot,
    rows_as_text,
    summarize,
    tables,
    write,
)
from srd_lightning.curation.result import CurationResult
from srd_lightning.curriculum import Curriculum
from srd_lightning.curriculum.ranking import reciprocal_rank_fusion

# Eight rows whose final order is given: row 5 is the easiest, row 3 the hardest, rows 6 and 3 are never trained on.
ORDER = [5, 2, 7, 0, 4, 1, 6, 3]
ROUGE_L = [0.4, 0.0, 0.8, 0.0, 0.0, 1.0, 0.0, 0.6]
NLL = [2.0, 3.0, 1.0, 20.0, 2.5, 0.5, 4.0, 1.5]
EXPECTED_TEXT = """\
## Easiest rows

### `id-5`: place 1 of 8, trained on from epoch 0

- rouge_l 1 (rank 1 of 8)
- nll 0.5 (rank 1 of 8)

Prompt:

    Prompt 5?

Reference response:

    Truth 5.

Student's answer:

    Right.

## Hardest rows

### `id-3`: place 8 of 8, dropped

- rouge_l 0 (rank 6.5 of 8, shared by 4 rows)
- nll 20 (rank 8 of 8)

Prompt:

    Prompt 3?

Reference response:

    Truth 3.

Student's answer:

*(empty)*
"""


def small(**changes):
    parts = {
        "ids": [f"id-{row}" for row in range(8)],
        "columns": {"rouge_l": np.array(ROUGE_L), "nll": np.array(NLL)},
        "higher_is_easier": {"rouge_l": True, "nll": False},
        "curriculum": Curriculum(torch.tensor(ORDER), {0: 0.25, 8: 0.5, 16: 0.75}),
        "dropped": {"empty response": 3, "prompt of test": 16},
        "seconds": 4.0,
        "scored": 6,
    }
    parts |= changes
    return CurationResult(order=parts["curriculum"].order, **parts)


def one_criterion(values, higher_is_easier=True, schedule=None):
    values = np.array(values, dtype=np.float64)
    order = reciprocal_rank_fusion(values if higher_is_easier else -values)
    return small(
        ids=[str(row) for row in range(len(values))],
        columns={"score": values},
        higher_is_easier={"score": higher_is_easier},
        curriculum=Curriculum(order, schedule or {0: 0.5}),
    )


def tokenised(number=8, **texts):
    return Dataset.from_dict(
        {
            "id": [f"id-{row}" for row in range(number)],
            "prompt": [f"Prompt {row}?" for row in range(number)],
            "response": [f"Truth {row}." for row in range(number)],
            "input_ids": [[1, 2]] * number,
            "prompt_length": [1] * number,
            **texts,
        }
    )


def loop_ranks(ease):
    return [sum(other > value for other in ease) + (sum(other == value for other in ease) + 1) / 2 for value in ease]


def loop_spearman(first, second):
    x, y = loop_ranks(first), loop_ranks(second)
    mean = (len(x) + 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    return covariance / (sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y)) ** 0.5


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_each_row_has_the_stage_in_which_it_enters():
    stages = small().stages
    assert stages.tolist() == [1, 2, 0, -1, 2, 0, -1, 1]
    assert stages.dtype == np.int64


def test_stages_are_the_rows_that_the_curriculum_adds():
    generator = np.random.default_rng(0)
    curriculum = Curriculum(torch.from_numpy(generator.permutation(97)), {0: 0.1, 3: 0.4, 5: 0.4, 9: 0.83})
    expected = [-1] * 97
    for number, first_epoch in reversed(list(enumerate([0, 3, 5, 9]))):
        for row in curriculum.rows(first_epoch).tolist():
            expected[row] = number
    assert small(curriculum=curriculum).stages.tolist() == expected


def test_nothing_is_dropped_when_the_last_stage_has_all_rows():
    curated = small(curriculum=Curriculum(torch.tensor(ORDER), {0: 0.5, 4: 1.0}))
    assert curated.stages.tolist() == [0, 1, 0, 1, 1, 0, 1, 0]
    assert summarize(curated)["left_out"] == 0


def test_counts_speed_and_stages():
    summary = summarize(small())
    del summary["criteria"]
    assert summary == {
        "rows": 8,
        "kept": 6,
        "left_out": 2,
        "dropped": {"empty response": 3, "prompt of test": 16},
        "seconds": 4.0,
        "scored": 6,
        "rows_per_second": 1.5,
        "stages": [{"first_epoch": 0, "rows": 2}, {"first_epoch": 8, "rows": 4}, {"first_epoch": 16, "rows": 6}],
    }


def test_quantiles_worked_by_hand():
    values = [40.0, 0.0, 10.0, 20.0, 30.0]  # sorted, the q-quantile is at 40 q
    criterion = summarize(one_criterion(values, higher_is_easier=False))["criteria"]["score"]
    expected = {"min": 0, "5 %": 2, "25 %": 10, "50 %": 20, "75 %": 30, "95 %": 38, "max": 40}
    assert criterion["quantiles"] == pytest.approx(expected)
    assert criterion["mean"] == 20
    assert criterion["easier"] == "lower"


def test_largest_group_of_equal_values():
    criteria = summarize(small())["criteria"]
    assert criteria["rouge_l"]["largest_tie"] == {"value": 0.0, "share": 0.5}
    assert criteria["nll"]["largest_tie"]["share"] == 1 / 8
    assert criteria["rouge_l"]["easier"] == "higher"


def test_agreement_equals_a_loop_on_tied_cases():
    for seed in range(50):
        generator = random.Random(seed)
        columns = {
            name: np.array([generator.randint(0, 5) / 5 for _ in range(8)] + [0.0, 1.0])  # never constant
            for name in ("a", "b", "c")
        }
        ease = {"a": columns["a"].tolist(), "b": (-columns["b"]).tolist(), "c": columns["c"].tolist()}
        order = list(range(10))
        generator.shuffle(order)
        directions = {"a": True, "b": False, "c": True}
        curated = small(columns=columns, higher_is_easier=directions, curriculum=Curriculum(torch.tensor(order)))
        criteria = summarize(curated)["criteria"]
        for first, second in itertools.permutations("abc", 2):
            expected = loop_spearman(ease[first], ease[second])
            assert criteria[first]["agreement"][second] == pytest.approx(expected), f"seed {seed}"
        for name in "abc":
            in_order = loop_spearman(ease[name], [-order.index(row) for row in range(10)])
            assert criteria[name]["agreement_with_order"] == pytest.approx(in_order), f"seed {seed}"
            assert name not in criteria[name]["agreement"]


def test_criteria_that_agree_about_ease_have_plus_one_whatever_their_direction():
    values = np.arange(8.0)
    curated = small(columns={"rouge_l": values, "nll": -values})
    assert summarize(curated)["criteria"]["nll"]["agreement"]["rouge_l"] == pytest.approx(1)


def test_a_constant_criterion_has_no_agreement():
    curated = small(columns={"rouge_l": np.zeros(8), "nll": np.array(NLL)})
    criteria = summarize(curated)["criteria"]
    assert criteria["nll"]["agreement"] == {"rouge_l": None}
    assert criteria["rouge_l"]["agreement_with_order"] is None
    assert criteria["nll"]["agreement_with_order"] is not None


def test_tables_show_the_numbers_within_100_columns():
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(*tables(summarize(small())))
    shown = console.file.getvalue()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    assert ["trained on from epoch 8", "4", "50%"] in cells
    assert ["dropped", "2", "25%"] in cells
    assert ["not ranked: prompt of test", "16", ""] in cells
    assert ["max", "1", "20"] in cells
    assert ["easier", "higher", "lower"] in cells
    assert ["most frequent", "0 (50.0%)", "0.5 (12.5%)"] in cells
    agreement = f"{loop_spearman(ROUGE_L, [-value for value in NLL]):.2f}"
    assert ["agreement, nll", agreement, "1.00"] in cells
    assert "6 of 8 ranked rows kept" in shown
    assert "4.0 s; 6 rows scored, 1.5 per second" in shown


def test_a_table_says_that_an_agreement_is_undefined():
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(*tables(summarize(one_criterion([1.0] * 4))))
    assert "undefined" in console.file.getvalue()


@pytest.mark.parametrize(("criteria", "panels"), [(1, (1, 1)), (2, (3, 1)), (3, (3, 2)), (4, (4, 2))])
def test_plot_is_a_png_that_grows_with_the_criteria(tmp_path, criteria, panels):
    generator = np.random.default_rng(0)
    columns = {f"criterion_{number}": generator.random(40) for number in range(criteria)}
    order = torch.from_numpy(generator.permutation(40))
    curated = small(columns=columns, higher_is_easier=dict.fromkeys(columns, True), curriculum=Curriculum(order))
    plot(curated, tmp_path / "plot.png")
    width, height = png_size(tmp_path / "plot.png")
    across, down = panels
    assert 450 * across < width < 800 * across
    assert 400 * down < height < 700 * down


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[0.5] * 8, [0.0] * 7 + [1.0], [1.0, 2.0]], ids=["constant", "almost", "two rows"])
def test_plot_of_degenerate_scores_warns_of_nothing(tmp_path, values):
    plot(one_criterion(values, schedule={0: 0.5, 3: 1.0}), tmp_path / "plot.png")
    assert png_size(tmp_path / "plot.png")


def test_histogram_counts_each_row_in_its_stage_and_is_not_squashed_by_an_outlier():
    values = np.append(np.arange(999.0), 1e6)
    curated = one_criterion(values, higher_is_easier=False, schedule={0: 0.25, 8: 0.75})
    axis = Figure().add_subplot()
    _draw_histogram(axis, curated, "score")
    assert axis.get_xlim()[1] < 1100
    assert axis.get_xlabel() == "← easier   (clipped to 0.5 – 99.5 % quantile)"
    labels = ["stage 0 (epoch 0): 250 rows", "stage 1 (epoch 8): 500 rows", "dropped: 250 rows"]
    assert axis.get_legend_handles_labels()[1] == labels
    drawn = [sum(bar.get_height() for bar in bars) for bars in axis.containers]
    assert drawn == [250, 500, 250]
    lower, upper, _ = axis.containers
    assert [bar.get_y() for bar in upper] == [bar.get_height() for bar in lower]


def test_scatter_shows_ranks_in_the_colour_of_the_stage():
    axis = Figure().add_subplot()
    _draw_ranks(axis, small(), "rouge_l", "nll")
    (points,) = axis.collections
    x, y = loop_ranks(ROUGE_L), loop_ranks([-value for value in NLL])
    assert sorted(map(tuple, points.get_offsets().tolist())) == sorted(zip(x, y, strict=True))
    colours = {tuple(point): tuple(c) for point, c in zip(points.get_offsets(), points.get_facecolors(), strict=True)}
    stages = small().stages.tolist()
    by_stage = [{colours[x[row], y[row]] for row in range(8) if stages[row] == stage} for stage in (0, 1, 2, -1)]
    assert all(len(group) == 1 for group in by_stage)
    assert len(set.union(*by_stage)) == 4
    assert axis.get_title() == f"Spearman {loop_spearman(ROUGE_L, [-value for value in NLL]):.2f} (rank 1 = easiest)"


def test_scatter_shows_a_sample_of_many_rows():
    values = np.arange(20_001.0)
    curated = small(columns={"rouge_l": values, "nll": -values}, curriculum=Curriculum(torch.arange(20_001)))
    axis = Figure().add_subplot()
    _draw_ranks(axis, curated, "rouge_l", "nll")
    assert len(axis.collections[0].get_offsets()) == 20_000


def test_extremes_of_the_final_order():
    easiest, hardest = extremes(small(), count=2)
    assert easiest.tolist() == [5, 2]
    assert hardest.tolist() == [3, 6]


def test_text_names_the_right_rows_with_their_values_and_ranks():
    text = rows_as_text(small(), tokenised(), {"id-5": "Right.", "id-3": ""}, count=1)
    assert text == EXPECTED_TEXT


def test_text_without_answers_and_with_every_stage():
    text = rows_as_text(small(), tokenised(), {}, count=8)
    headings = [line for line in text.splitlines() if line.startswith("### ")]
    epochs = ["trained on from epoch 0"] * 2 + ["trained on from epoch 8"] * 2 + ["trained on from epoch 16"] * 2
    fates = [*epochs, "dropped", "dropped"]
    expected = [f"### `id-{row}`: place {ORDER.index(row) + 1} of 8, {fates[ORDER.index(row)]}" for row in ORDER]
    assert headings == [*expected, *reversed(expected)]
    assert "answer" not in text


def test_long_and_unruly_texts_stay_in_their_block():
    middle = "MIDDLE" * 100
    prompt = f"\n  # no heading\n\n```\n{middle}</s> the end\n"
    text = rows_as_text(small(), tokenised(prompt=[prompt] * 8), {}, count=1)
    block = text.split("Prompt:\n\n")[1].split("\n\nReference response:")[0]
    assert block.startswith("      # no heading\n\n    ```\n    MIDDLE")
    assert block.endswith("</s> the end")
    assert "[…]" in block
    assert len(block) < 400
    assert all(line.startswith("    ") for line in block.splitlines() if line)


def test_large_numbers_are_grouped():
    curated = one_criterion(-np.arange(2000.0))
    text = rows_as_text(curated, tokenised(2000), {}, count=1)
    assert "### `id-1999`: place 2,000 of 2,000, dropped" in text
    assert "- score -1999 (rank 2,000 of 2,000)" in text


@pytest.mark.parametrize("as_ids", [list, pa.array, lambda ids: pa.chunked_array([ids[:3], ids[3:]])])
def test_write_leaves_four_files(tmp_path, as_ids):
    ids = [f"id-{row}" for row in range(8)]
    curated = small(ids=as_ids(ids))
    write(curated, tokenised(), {"id-5": "Right."}, tmp_path / "new")
    names = ["curation.json", "curation.md", "curation.png", "ranking.parquet"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert json.loads((tmp_path / "new" / "curation.json").read_text()) == summarize(curated)
    assert pq.read_table(tmp_path / "new" / "ranking.parquet").to_pydict() == {
        "id": ids,
        "stage": [1, 2, 0, -1, 2, 0, -1, 1],
        "position": [3, 5, 1, 7, 4, 0, 6, 2],
        "rouge_l": ROUGE_L,
        "nll": NLL,
    }
    text = (tmp_path / "new" / "curation.md").read_text()
    assert "![](curation.png)" in text
    assert text.endswith(rows_as_text(curated, tokenised(), {"id-5": "Right."}))
