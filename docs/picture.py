"""Draws ``docs/picture.svg``, the two wires and the two optimizers: ``python docs/picture.py``."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 960, 560
INK, FAINT, PAPER, LINE = "#1f2430", "#5b6270", "#ffffff", "#9ca3af"
WEIGHT, GRAD, ZERO, WIRE = "#2563eb", "#c2410c", "#e5e7eb", "#f3f4f6"


class Drawing:
    """Collects the elements of a picture. Lengths are pixels; text may be as wide as Verdana's."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str) -> None:
        """A box whose upper left corner is (x, y)."""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'fill="{fill}" stroke="{line}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 13,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """One line of text that stands on ``y``."""
        weight = ' font-weight="700"' if bold else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], colour: str) -> None:
        """An arrow along the lines between ``points``, the last of which is level or upright."""
        (x, y), (to_x, to_y) = points[-2:]
        step = 1 if to_x + to_y > x + y else -1
        if y == to_y:
            sides = [(to_x - 9 * step, to_y - 5), (to_x - 9 * step, to_y + 5)]
        else:
            sides = [(to_x - 5, to_y - 9 * step), (to_x + 5, to_y - 9 * step)]
        line, head = (
            " ".join(f"{x:g},{y:g}" for x, y in corners)
            for corners in (points, [(to_x, to_y), *sides])
        )
        self.elements.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<polygon points="{head}" fill="{colour}"/>'
        )

    def values(self, x: float, y: float, kept: str, colour: str) -> None:
        """A row of values; a ``.`` in ``kept`` is one that is zero."""
        self.elements.extend(
            f'<rect x="{x + 13 * i:g}" y="{y:g}" width="11" height="16" '
            f'fill="{ZERO if value == "." else colour}"/>'
            for i, value in enumerate(kept)
        )

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">'
        )
        return "\n".join([head, *self.elements, "</svg>", ""])


def draw_wires(drawing: Drawing) -> None:
    """What a rank keeps, on the left; what it computes with, on the right; the network between."""
    drawing.text(30, 42, "each rank keeps a shard", size=15, bold=True)
    drawing.text(30, 62, "1/N of all weights, gradients, moments", size=12, fill=FAINT)
    drawing.text(930, 42, "and computes with a block", size=15, bold=True, anchor="end")
    drawing.text(930, 62, "whole, for as long as it is needed", size=12, fill=FAINT, anchor="end")
    drawing.box(360, 24, 240, 240, WIRE, "#d1d5db")
    drawing.text(480, 46, "network: 2 to 8 bits a value", bold=True, anchor="middle")
    for top, colour, name in ((84, WEIGHT, "weights"), (180, GRAD, "gradients")):
        drawing.box(30, top, 200, 62, PAPER, colour)
        drawing.text(130, top + 26, f"shard of the {name}", bold=True, anchor="middle")
        drawing.values(66, top + 36, "##########", colour)
        drawing.box(730, top, 200, 62, PAPER, colour)
        drawing.text(830, top + 26, f"{name} of the block", bold=True, anchor="middle")
        drawing.values(740, top + 36, "##############", colour)
    drawing.arrow((234, 116), (726, 116), colour=WEIGHT)
    drawing.arrow((726, 212), (234, 212), colour=GRAD)
    drawing.arrow((830, 148), (830, 177), colour=INK)
    for x, y, words in (
        (295, 106, "encode"),
        (665, 106, "decode"),
        (665, 202, "encode"),
        (295, 202, "decode, add"),
    ):
        drawing.text(x, y, words, anchor="middle")
    drawing.text(820, 167, "forward, backward", size=12, anchor="end")
    for y, colour, name, words in (
        (106, WEIGHT, "all-gather", "twice a step, or once"),
        (202, GRAD, "reduce-scatter", "flat, or inside each node first"),
    ):
        drawing.text(480, y, name, fill=colour, bold=True, anchor="middle")
        drawing.text(480, y + 28, words, size=12, fill=FAINT, anchor="middle")
    drawing.text(480, 252, "pruned weights are not sent", size=12, fill=FAINT, anchor="middle")


def draw_optimizers(drawing: Drawing) -> None:
    """The step on the shard, from gradients to weights: two ways to a model that compresses."""
    drawing.arrow((130, 244), (130, 313), colour=GRAD)
    drawing.arrow((130, 292), (710, 292), (710, 313), colour=GRAD)
    drawing.text(142, 283, "the step on the shard: AdamW or another, alone or inside one of")
    drawing.arrow((710, 532), (710, 544), (14, 544), (14, 116), (28, 116), colour=WEIGHT)
    drawing.arrow((250, 532), (250, 543), colour=WEIGHT)
    drawing.box(30, 316, 440, 216, PAPER, LINE)
    drawing.text(48, 342, "CrAM+: a dense model, to be pruned later", size=15, bold=True)
    drawing.text(48, 362, "two passes a step over the same batch", size=12, fill=FAINT)
    for y, kept, words in (
        (380, "##########", "gradient g at the weights w"),
        (416, "#..##.#..#", "gradient h at w + rho g, compressed"),
        (452, "##########", "w again, and a step with g + h"),
    ):
        drawing.values(48, y, kept, WEIGHT)
        drawing.text(194, y + 13, words)
    drawing.text(48, 500, "Afterwards, in one shot, without retraining: 70 to 90 % of")
    drawing.text(48, 518, "the weights pruned, or N:M patterns.")
    drawing.box(490, 316, 440, 216, PAPER, LINE)
    drawing.text(508, 342, "AC/DC: a sparse model and its dense twin", size=15, bold=True)
    drawing.text(508, 362, "phases in turns, at the cost of plain training", size=12, fill=FAINT)
    x = 508.0
    for name, width in (
        ("dense", 96),
        ("sparse", 62),
        ("dense", 62),
        ("sparse", 62),
        ("dense", 62),
        ("sparse", 60),
    ):
        fill, ink = (WEIGHT, PAPER) if name == "dense" else (ZERO, INK)
        drawing.box(x, 380, width, 40, fill, PAPER)
        drawing.text(x + width / 2, 405, name, fill=ink, anchor="middle")
        x += width
    drawing.text(821, 436, "the twin", size=12, fill=FAINT, anchor="middle")
    drawing.text(882, 436, "the result", size=12, fill=FAINT, anchor="middle")
    drawing.text(508, 468, "A sparse phase keeps the largest weights; the others stay")
    drawing.text(508, 486, "zero until the next dense phase, and do not travel: 0.8 bits")
    drawing.text(508, 504, "a prunable weight at 90 % and 8 bits.")


def picture() -> str:
    """The text of the file."""
    drawing = Drawing()
    drawing.box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, PAPER, ZERO)
    draw_wires(drawing)
    draw_optimizers(drawing)
    return drawing.svg()


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture())
