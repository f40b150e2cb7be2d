"""A picture of guest memory: a cell for so many pages, the darker the more of them are marked.

The same in a terminal and as an SVG file. Addresses grow to the right and then downwards:

    00000000  █░······▒▒··                a row is 64 cells;
    00400000  ············                each begins with the address of its first byte
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable

from mini_bhyve.memory import PAGE_SIZE

COLUMNS = 64
MAX_CELLS = 16 * COLUMNS  # what a terminal has room for

# How dark a cell is: 0 for none of its pages, then a step for each quarter.
SHADES = "·░▒▓█"
ASCII_SHADES = ".-+*#"
COLOURS = ("#e8e8e8", "#fdd49e", "#fc8d59", "#d7301f", "#7f0000")
STEPS = len(SHADES) - 1
MEANINGS = ("no page", "up to 1/4", "up to 1/2", "up to 3/4", "more")

# The SVG's measures, in pixels.
SIDE = 11  # a cell
GAP = 1  # between two
LEFT, TOP, RIGHT, BOTTOM = 80, 70, 20, 50  # room for addresses; title and axis; nothing; the legend
ADDRESS = {"text-anchor": "end", "font-family": "monospace"}
TICK = 16  # cells from one number on the axis to the next


class MemoryPicture:
    """The first `pages` pages of memory, of which those in the ranges `marked` are to be seen."""

    def __init__(self, pages: int, marked: Iterable[range]):
        self.pages = pages
        self.pages_a_cell = 1
        while pages > MAX_CELLS * self.pages_a_cell:
            self.pages_a_cell *= 2
        self.counts = [0] * -(-pages // self.pages_a_cell)  # marked pages, by cell
        for span in marked:
            for cell in range(span.start // self.pages_a_cell, -(-span.stop // self.pages_a_cell)):
                here = self.pages_of(cell)
                self.counts[cell] += min(span.stop, here.stop) - max(span.start, here.start)

    def pages_of(self, cell: int) -> range:
        """The pages that a cell stands for: the last one may have fewer."""
        return range(cell * self.pages_a_cell, min((cell + 1) * self.pages_a_cell, self.pages))

    def step(self, cell: int) -> int:
        """How dark a cell is."""
        return -(-self.counts[cell] * STEPS // len(self.pages_of(cell)))

    @property
    def cell_size(self) -> str:
        """How much memory a cell is, in words."""
        kilobytes = self.pages_a_cell * PAGE_SIZE >> 10
        return f"{kilobytes} KB" if kilobytes < 1024 else f"{kilobytes >> 10} MB"

    def rows(self) -> list[range]:
        """The cells of each row."""
        return [range(start, min(start + COLUMNS, len(self.counts))) for start in range(0, len(self.counts), COLUMNS)]

    def address(self, cell: int) -> int:
        """The first byte that a cell stands for."""
        return cell * self.pages_a_cell * PAGE_SIZE

    def lines(self, shades: str = SHADES) -> list[str]:
        """The picture in characters."""
        return [
            f"{self.address(row.start):08x}  " + "".join(shades[self.step(cell)] for cell in row) for row in self.rows()
        ]

    def legend(self, shades: str = SHADES) -> str:
        """What the characters mean, and how much memory each is."""
        return f"of each {self.cell_size}: " + ", ".join(f"{shade} {what}" for shade, what in zip(shades, MEANINGS))

    # --- SVG --------------------------------------------------------------------------------------------------------

    def svg(self, title: str, subtitle: str) -> str:
        """The picture as a file of its own, with title, addresses on two axes, and legend."""
        rows = self.rows()
        width, height = LEFT + COLUMNS * SIDE + RIGHT, TOP + len(rows) * SIDE + BOTTOM
        picture = ET.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "viewBox": f"0 0 {width} {height}",
                "width": str(width),
                "height": str(height),
                "font-family": "sans-serif",
                "font-size": "11",
                "role": "img",
            },
        )
        title = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in title)
        ET.SubElement(picture, "title").text = title
        ET.SubElement(picture, "rect", width="100%", height="100%", fill="white")
        _text(picture, LEFT, 20, title, {"font-size": "14"})
        _text(picture, LEFT, 37, subtitle)
        for column in range(0, COLUMNS, TICK):
            _text(picture, LEFT + column * SIDE, TOP - 8, f"+{self.address(column):x}")
        for number, row in enumerate(rows):
            y = TOP + number * SIDE
            _text(picture, LEFT - 6, y + SIDE - 2, f"{self.address(row.start):08x}", ADDRESS)
            _rect(picture, LEFT, y, len(row) * SIDE - GAP, COLOURS[0])
            for cell in row:
                if self.counts[cell]:
                    self._draw(picture, cell, LEFT + (cell - row.start) * SIDE, y)
        self._draw_legend(picture, height - BOTTOM + 20)
        ET.indent(picture)
        return ET.tostring(picture, encoding="unicode") + "\n"

    def _draw(self, picture: ET.Element, cell: int, x: int, y: int) -> None:
        """A cell that has marked pages; a viewer tells more when it is pointed at."""
        pages = self.pages_of(cell)
        hint = ET.SubElement(_rect(picture, x, y, SIDE - GAP, COLOURS[self.step(cell)]), "title")
        hint.text = f"{self.address(cell):08x}: {self.counts[cell]} of {len(pages)} pages"

    def _draw_legend(self, picture: ET.Element, y: int) -> None:
        _text(picture, LEFT, y + SIDE - 2, f"Of each {self.cell_size}:")
        for number, label in enumerate(MEANINGS):
            x = LEFT + 100 + number * 110
            _rect(picture, x, y, SIDE - GAP, COLOURS[number])
            _text(picture, x + SIDE + 4, y + SIDE - 2, label)


def _text(picture: ET.Element, x: int, y: int, text: str, how: dict[str, str] | None = None) -> None:
    ET.SubElement(picture, "text", {"x": str(x), "y": str(y), **(how or {})}).text = text


def _rect(picture: ET.Element, x: int, y: int, width: int, colour: str) -> ET.Element:
    return ET.SubElement(picture, "rect", x=str(x), y=str(y), width=str(width), height=str(SIDE - GAP), fill=colour)
