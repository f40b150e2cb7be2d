"""A Sphinx extension: what `make bench` has measured, from bench/results.json.

    figures         all rows, beside each what it should be
    boot-times      how long xv6 and Linux take to boot, here and on QEMU
    growth-plot     time against the number of instructions, as a picture (SVG, by matplotlib)
    measured-on     on what

The file is that of a run on a quiet machine; another `make bench` and `make docs` show what is measured then.
"""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path

import matplotlib
from docutils import nodes
from docutils.parsers.rst import Directive
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results.json"
GUESTS = {"xv6": "xv6", "linux": "Linux"}
MARKERS = {"CPython, translated": "o", "CPython, interpreted": "s", "PyPy, translated": "^"}
# A picture that is the same each time it is drawn, with its text as text.
STYLE = {"svg.hashsalt": "mini-bhyve", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}


class Results(Directive):
    """What all of them begin with."""

    def run(self) -> list[nodes.Node]:
        self.state.document.settings.record_dependencies.add(str(RESULTS))
        self.state.document.settings.env.note_dependency(str(RESULTS))
        return [self.show(json.loads(RESULTS.read_text()))]


class MeasuredOn(Results):
    def show(self, results: dict) -> nodes.Node:
        return nodes.paragraph("", f"{results['python']}, {results['system']}.")


class FiguresTable(Results):
    def show(self, results: dict) -> nodes.Node:
        rows, before = [], ""
        for row in results["rows"]:
            target = row["target"] + ("" if row["met"] in (True, None) else " (it is not)")
            rows.append([row["work"] if row["work"] != before else "", row["measure"], row["text"], target])
            before = row["work"]
        return table(["work", "measure", "figure", "should be"], [40, 30, 15, 15], rows)


class BootTimes(Results):
    def show(self, results: dict) -> nodes.Node:
        rows = []
        for key, guest in GUESTS.items():
            boots = results["measured"]["boots"][key]
            if "missing" in boots:
                rows.append([guest, boots["missing"], "", "", "", "", ""])
                continue
            for where, found in boots.items():
                figures = [f"{found[0]['instructions']:,}" if "instructions" in found[0] else ""]
                for what in ("wall", "cpu", "decoding", "translating"):
                    known = what in found[0]
                    figures.append(f"{statistics.median(boot[what] for boot in found):.1f}" if known else "")
                rows.append([guest, where, *figures])
        titles = ["guest", "on", "instructions", "seconds", "of CPU time", "decoding", "translating"]
        return table(titles, [10, 24, 16, 12, 14, 12, 12], rows)


class GrowthPlot(Results):
    def show(self, results: dict) -> nodes.Node:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(6.4, 4))
            axes = figure.subplots()
            for name, seconds in results["measured"]["growth"].items():
                counts = [int(count) for count in seconds]
                middle = [statistics.median(turns) for turns in seconds.values()]
                axes.loglog(counts, middle, marker=MARKERS.get(name, "x"), label=name)
            axes.set(xlabel="instructions of the guest", ylabel="seconds of CPU time")
            axes.grid(True, which="major", color="#dddddd")
            axes.legend()
            picture = io.StringIO()
            figure.savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = picture.getvalue()
        return nodes.raw("", svg[svg.index("<svg") :], format="html")


def table(titles: list[str], widths: list[int], rows: list[list[str]]) -> nodes.table:
    """A table of plain text, its first row the titles."""
    head, body = nodes.thead(), nodes.tbody()
    for part, lines in ((head, [titles]), (body, rows)):
        for line in lines:
            entries = [nodes.entry("", nodes.paragraph("", text)) for text in line]
            part += nodes.row("", *entries)
    columns = [nodes.colspec(colwidth=width) for width in widths]
    return nodes.table("", nodes.tgroup("", *columns, head, body, cols=len(titles)))


def setup(app):
    app.add_directive("figures", FiguresTable)
    app.add_directive("boot-times", BootTimes)
    app.add_directive("growth-plot", GrowthPlot)
    app.add_directive("measured-on", MeasuredOn)
    return {"parallel_read_safe": True}
