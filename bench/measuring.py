"""What all measurements share: a row of the table, the other Pythons, and how to give up.

What is compared with something else is measured in turns with it, and the ratio is the median of those of each turn,
for a machine has its moods. Where only the processor matters, it is seconds of CPU time, of which other programs take
none.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
HERE = f"{platform.python_implementation()} {platform.python_version()}"
NO_PYPY = "no PyPy here: make bench PYTHON=pypy3 sets it up"

# What the figures should be is said for CPython. PyPy's compiler does so well on plain Python that there is no use in
# comparing with that.
JUDGED = platform.python_implementation() == "CPython"


@dataclass(frozen=True)
class Row:
    """A figure, what it should be (nothing: it is only told), or in a few words why there is none."""

    work: str
    measure: str
    figure: float | None = None
    digits: int = 2
    unit: str = ""
    most: float | None = None
    least: float | None = None
    missing: str = ""

    @property
    def text(self) -> str:
        return self.missing if self.figure is None else f"{self.figure:,.{self.digits}f} {self.unit}".rstrip()

    @property
    def target(self) -> str:
        if self.most is not None:
            return f"at most {self.most:g}"
        return f"at least {self.least:g}" if self.least is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the figure is what it should be; None if there is none, or if it may be anything."""
        if self.figure is None or (self.most is None and self.least is None):
            return None
        return (self.most is None or self.figure <= self.most) and (self.least is None or self.figure >= self.least)


def give_up(sentence: str) -> NoReturn:
    sys.exit(f"bench: {sentence}")


def median_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    """The median of the ratios of each turn."""
    return statistics.median(a / b for a, b in zip(numerators, denominators))


@functools.cache
def pythons() -> dict[str, Path]:
    """The Pythons with a virtual environment in which a VM can run, by what they call themselves; ours is the first."""
    found = {HERE: Path(sys.executable)}
    code = "import capstone, elftools, platform; print(platform.python_implementation(), platform.python_version())"
    for python in sorted(ROOT.glob(".venv*/bin/python")):
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found.setdefault(answer.stdout.strip(), python)
    return found


def pypy() -> str | None:
    """What PyPy calls itself, if it is there beside the CPython that this is."""
    return next((name for name in pythons() if name.startswith("PyPy") and JUDGED), None)


def in_process(python: str, script: str, *arguments: str) -> dict[str, Any]:
    """What a script of this directory prints, as JSON, in a process of its own, which begins with nothing compiled."""
    command: list[str | Path] = [pythons()[python], Path(__file__).with_name(script), *arguments]
    answer = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=False)
    if answer.returncode:
        give_up(f"{script} {' '.join(arguments)} failed under {python}")
    return json.loads(answer.stdout)
