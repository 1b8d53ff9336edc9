"""The figures of `docs`, as SVG: ``python docs/figures/draw.py`` draws them anew.

Each stands on a light ground of its own, so it can be read on light and dark pages. Positions are pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from srd_lightning.curriculum import PAPER_SCHEDULE, value_at  # noqa: E402 (found by the line above)

INK, MUTED, LINE, GROUND = "#1f2937", "#566072", "#8a94a6", "#f6f7fb"
BLUE, GREEN, AMBER, GREY = (
    ("#dfe4fb", "#3949ab"),
    ("#d3efe8", "#0f766e"),
    ("#fdebc4", "#b45309"),
    ("#e6e8ed", "#6b7280"),
)
EPOCHS = 24


class Figure:
    """Shapes on a ground.

    Args:
        width: Of the ground.
        height: Of the ground.
        title: What is seen, for those who do not see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
        )
        self.parts = [
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="{GROUND}"/>',
        ]

    def text(self, x: float, y: float, words: str, *, size: int = 14, ink: str = INK, anchor: str = "middle") -> None:
        """Write a line whose foot is at y; ``*words*`` are bold."""
        weight = ' font-weight="600"' if words.startswith("*") else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{ink}" text-anchor="{anchor}"{weight} '
            f'font-family="system-ui, sans-serif">{escape(words.strip("*"))}</text>'
        )

    def area(
        self, x: float, y: float, w: float, h: float, colours: tuple[str, str] = GREY, dashed: bool = False
    ) -> None:
        """Draw a rectangle in a pair of colours, of which the second is its border."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{colours[0]}" '
            f'stroke="{colours[1]}"{dashes}/>'
        )

    def box(self, x: float, y: float, w: float, h: float, lines: list[str], colours: tuple[str, str] = GREY) -> None:
        """Draw a rectangle with lines of text in its middle, the first of them bold."""
        self.area(x, y, w, h, colours)
        for number, line in enumerate(lines):
            foot = y + h / 2 + 5 + 19 * (number - (len(lines) - 1) / 2)
            if number == 0:
                self.text(x + w / 2, foot, f"*{line}", size=13)
            else:
                self.text(x + w / 2, foot, line, size=13, ink=MUTED)

    def arrow(self, *places: tuple[float, float]) -> None:
        """Draw a line through places, with a tip at its end."""
        path = "L".join(f"{x:g} {y:g}" for x, y in places)
        self.parts.append(f'<path d="M{path}" fill="none" stroke="{MUTED}" stroke-width="1.6" marker-end="url(#tip)"/>')

    def svg(self) -> str:
        """Return the file."""
        return "\n".join([self.head, *self.parts, "</svg>", ""])


def run() -> Figure:
    """From rows to a student."""
    figure = Figure(760, 330, "Rows are answered by the student, scored, ranked, staged and trained on")
    figure.box(20, 30, 150, 80, ["rows", "prompt, response"])
    figure.box(205, 30, 160, 80, ["reflection", "the student", "answers each prompt"], BLUE)
    figure.box(400, 30, 160, 80, ["scores", "ROUGE-L and loss,", "by row, on disk"], GREEN)
    figure.box(595, 30, 145, 80, ["order", "reciprocal", "rank fusion"], GREEN)
    for x, end in ((170, 205), (365, 400), (560, 595)):
        figure.arrow((x, 70), (end, 70))
    figure.box(
        535, 190, 205, 110, ["curriculum", "easiest quarter, half,", "three quarters;", "the rest is left out"], GREEN
    )
    figure.arrow((667, 110), (667, 190))
    figure.box(
        215, 190, 290, 110, ["training", "(1 − w) CE + w T² D(teacher ‖ student),", "w and T staged by epoch"], BLUE
    )
    figure.arrow((535, 245), (505, 245))
    figure.box(20, 190, 165, 110, ["student", "a Hugging Face", "folder"], BLUE)
    figure.arrow((215, 245), (185, 245))
    figure.box(275, 132, 170, 36, ["teacher, or its cache"], AMBER)
    figure.arrow((360, 168), (360, 190))
    return figure


def curriculum() -> Figure:
    """Which rows an epoch has, under the paper's schedule."""
    figure = Figure(760, 302, "The share of rows that each of 24 epochs trains on: 25, 50 and 75 percent")
    left, foot, wide, high = 130, 222, 25, 200
    quarters = ["easiest quarter", "second", "third", "hardest quarter"]
    for number, name in enumerate(quarters):
        figure.text(left - 10, foot - high * (number + 0.5) / 4 + 5, name, size=13, ink=MUTED, anchor="end")
    figure.area(left, foot - high, EPOCHS * wide - 3, high / 4 - 3, ("none", LINE), dashed=True)
    figure.text(left + EPOCHS * wide / 2, foot - high * 7 / 8 + 4, "left out", size=13, ink=MUTED)
    for epoch in range(EPOCHS):
        for quarter in range(round(4 * value_at(PAPER_SCHEDULE, epoch))):
            colours = (BLUE, GREEN, AMBER)[quarter]
            figure.area(left + epoch * wide, foot - high * (quarter + 1) / 4, wide - 3, high / 4 - 3, colours)
        figure.text(left + (epoch + 0.5) * wide, foot + 18, str(epoch), size=12, ink=MUTED)
    figure.text(left - 10, foot + 18, "epoch", size=13, ink=MUTED, anchor="end")
    figure.text(left - 10, foot + 46, "paper's T, w", size=13, ink=MUTED, anchor="end")
    for stage, values in enumerate(("T 1.0, w 0.8", "T 1.5, w 0.9", "T 2.0, w 1.0")):
        figure.area(left + stage * 8 * wide, foot + 30, 8 * wide - 3, 24, GREY)
        figure.text(left + (stage + 0.5) * 8 * wide, foot + 47, values, size=13)
    return figure


def objective() -> Figure:
    """All logits, and a chunk of them."""
    figure = Figure(760, 300, "Logits of all tokens against logits of one chunk of tokens at a time")
    figure.text(185, 30, "*all logits")
    for x, name, colours in ((30, "student", BLUE), (140, "teacher", AMBER), (250, "gradient", GREEN)):
        figure.area(x, 50, 95, 180, colours)
        figure.text(x + 47, 145, name)
    figure.text(185, 252, "each tokens × vocabulary (V),", size=13, ink=MUTED)
    figure.text(185, 270, "padding and prompts included", size=13, ink=MUTED)
    figure.parts.append(f'<path d="M378 20V280" stroke="{LINE}" stroke-dasharray="3 4"/>')
    figure.text(565, 30, "*in chunks")
    for x, colours in ((400, BLUE), (440, AMBER), (700, GREEN)):
        for chunk in range(6):
            figure.area(x, 50 + 30 * chunk, 28, 27, colours if chunk != 2 else (colours[1], colours[1]))
    figure.text(395, 252, "hidden states of", size=13, ink=MUTED, anchor="start")
    figure.text(395, 270, "response tokens, N × d", size=13, ink=MUTED, anchor="start")
    figure.box(520, 95, 130, 57, ["256 tokens × V", "overwritten"], GREY)
    figure.arrow((470, 123), (520, 123))
    figure.arrow((650, 123), (698, 123))
    figure.text(585, 85, "output heads", size=13, ink=MUTED)
    figure.text(585, 178, "the next chunk", size=13, ink=MUTED)
    figure.text(585, 196, "takes its place", size=13, ink=MUTED)
    figure.text(690, 252, "their gradient,", size=13, ink=MUTED)
    figure.text(690, 270, "N × d", size=13, ink=MUTED)
    return figure


def teacher() -> Figure:
    """Where a teacher is, on two devices."""
    figure = Figure(760, 290, "A teacher whole on each device, spread over devices or their hosts, or only its cache")
    places = ["replicate", "shard", "offload", "teacher_cache"]
    for number, name in enumerate(places):
        left = 22 + 184 * number
        figure.text(left + 82, 32, f"*{name}")
        for device in (0, 1):
            x = left + 86 * device
            figure.area(x, 48, 78, 120, ("#ffffff", LINE))
            figure.text(x + 39, 185, f"device {device}", size=12, ink=MUTED)
            figure.box(x + 8, 58, 62, 30, ["student"], BLUE)
            if name == "replicate":
                figure.box(x + 8, 96, 62, 62, ["teacher"], AMBER)
            elif name == "shard":
                figure.box(x + 8, 127, 62, 31, [f"half {device}"], AMBER)
            elif name == "teacher_cache":
                figure.box(x + 8, 136, 62, 22, ["head"], AMBER)
            else:
                figure.box(x + 8, 198, 62, 31, [f"half {device}"], AMBER)
        if name == "offload":
            figure.text(left + 82, 248, "memory of the host", size=12, ink=MUTED)
        if name == "teacher_cache":
            figure.box(left + 18, 198, 128, 31, ["hidden states"], AMBER)
            figure.text(left + 82, 248, "on disk", size=12, ink=MUTED)
    figure.text(
        380, 275, "Blocks of a teacher that is spread are gathered when they are used, and let go.", size=13, ink=MUTED
    )
    return figure


FIGURES = {"run": run, "curriculum": curriculum, "objective": objective, "teacher": teacher}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / f"{name}.svg").write_text(draw().svg())
