"""The picture of the README is what its program draws, and lies within its frame."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parents[2] / "docs"
# Of the size of the font, a letter on the mean of a line; Verdana, a wide one, has 0.51 and 0.59.
WIDEST = {"400": 0.56, "700": 0.65}


def drawn() -> str:
    return runpy.run_path(str(DOCS / "picture.py"))["picture"]()


def test_the_committed_picture_is_what_the_program_draws() -> None:
    assert (DOCS / "picture.svg").read_text() == drawn()


def test_every_line_of_text_lies_within_the_picture_in_any_font() -> None:
    root = ElementTree.fromstring(drawn())
    lines = root.findall("{http://www.w3.org/2000/svg}text")
    assert len(lines) > 20
    for line in lines:
        letters = len(line.text or "")
        width = letters * float(line.attrib["font-size"]) * WIDEST[line.get("font-weight", "400")]
        left = (
            float(line.attrib["x"])
            - width * {"start": 0, "middle": 0.5, "end": 1}[line.attrib["text-anchor"]]
        )
        assert left >= 0, line.text
        assert left + width <= float(root.attrib["width"]), line.text
