"""`make bench` measures what it says, and copes with what is not there. The figures themselves are not tested."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import boots
import by_hand
import growth
import measuring
import moves
import speed
from measuring import Row
from rich.console import Console

import bench

CPYTHON = sys.implementation.name == "cpython"


def printed(rows: list[Row]) -> str:
    """The table as a terminal with colours gets it."""
    console = Console(width=140, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(bench.make_table(rows, "a Python"))
    return capture.get()


@pytest.mark.parametrize(
    "row, target, met",
    [
        (Row("a", "b", 3.9, most=4), "at most 4", True),
        (Row("a", "b", 4.1, most=4), "at most 4", False),
        (Row("a", "b", 0.4, least=0.5), "at least 0.5", False),
        (Row("a", "b", 0.5, least=0.5), "at least 0.5", True),
        (Row("a", "b", 7), "", None),
        (Row("a", "b", missing="nobody here", most=4), "at most 4", None),
    ],
)
def test_a_row_says_what_it_should_be_and_whether_it_is(row, target, met):
    assert (row.target, row.met) == (target, met)


def test_the_table_is_green_where_all_is_well_and_red_where_not():
    assert "\x1b[32m" in printed([Row("a", "b", 1, most=4)])
    assert "\x1b[31m" in printed([Row("a", "b", 5, most=4)])
    plain = printed([Row("a", "b", 5), Row("c", "d", missing="there is no d")])
    assert "\x1b[32m" not in plain and "\x1b[31m" not in plain and "there is no d" in plain


def test_a_ratio_is_the_median_of_those_of_each_turn():
    assert measuring.median_ratio([2, 30, 8], [1, 10, 2]) == 3


def test_guests_that_are_not_there_say_so_in_their_row(monkeypatch, tmp_path):
    monkeypatch.setenv("XV6_DIR", str(tmp_path))
    monkeypatch.setenv("LINUX_GUEST_DIR", str(tmp_path))
    rows = list(boots.rows(boots.measure()))
    assert [(row.figure, row.text) for row in rows] == [
        (None, "there is no xv6.img (docs/guests.rst)"),
        (None, "there is no vmlinux (docs/guests.rst)"),
    ]


def test_without_qemu_only_our_own_boots_are_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XV6_DIR", str(tmp_path))
    for name in ("xv6.img", "fs.img"):
        (tmp_path / name).touch()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(boots, "pypy", lambda: None)
    monkeypatch.setattr(boots, "in_process", lambda *_: {"wall": 2.0, "cpu": 1.0})
    found = boots.measure_guest("xv6")
    assert list(found) == [measuring.HERE] and len(found[measuring.HERE]) == boots.TURNS
    texts = [row.text for row in boots.rows({"xv6": found})]
    assert texts[0] == "qemu-system-i386 is not installed"
    assert texts[1:] == ([measuring.NO_PYPY] if CPYTHON else []) + ["2.00"]


def test_without_pypy_time_grows_all_the_same(monkeypatch):
    monkeypatch.setattr(growth, "pypy", lambda: None)
    monkeypatch.setattr(growth, "in_process", lambda *_: {"1000000": 0.1, "10000000": 1.1})
    rows = list(growth.rows(growth.measure()))
    assert [row.figure for row in rows if row.measure.startswith("the last")] == [pytest.approx(1.1)] * 2
    assert (rows[-1].text == measuring.NO_PYPY) == CPYTHON


def test_without_unicorn_guests_are_compared_with_python_only(monkeypatch):
    monkeypatch.setattr(speed, "unicorn", None)
    monkeypatch.setattr(speed, "TURNS", 1)
    monkeypatch.setattr(speed, "GUESTS", {"compute": "loops"})
    texts = [row.text for row in speed.rows(speed.measure())]
    assert texts[1] == "unicorn is not installed" and len(texts) == 4


@pytest.mark.parametrize("guest", ["compute", "calls"])
def test_unicorn_comes_to_the_end_of_the_work_with_the_number_of_plain_python(guest):
    pytest.importorskip("unicorn")
    assert speed.run_on_unicorn(guest)[0] == speed.run_by_hand(guest)[0]


def test_a_guest_goes_round_for_as_many_instructions_as_are_measured():
    seconds = growth.run("translated", (10_000, 5_000_000))
    assert 0 < seconds["10000"] < seconds["5000000"]
    rounds = 3_471_982 / by_hand.ROUNDS["compute"]
    assert growth.MANY_ROUNDS * rounds > max(growth.COUNTS)


@pytest.mark.parametrize("name", [*moves.FILLS, *moves.COPIES])
def test_the_guest_of_a_move_moves_what_it_should(name, monkeypatch):
    monkeypatch.setattr(moves, "ROUNDS", 2)
    machine = moves.machine_that(*{**moves.FILLS, **moves.COPIES}[name])
    machine.memory.load(moves.TARGET, b"before" * (moves.SIZE // 6))
    machine.run()
    moved = moves.CONTENTS if name in moves.COPIES else bytes(moves.SIZE)
    assert machine.memory.bytes8[moves.TARGET : moves.TARGET + moves.SIZE] == moved
    assert not machine.cpu.mmu.large_pages  # all of 4 KB


@pytest.mark.skipif(not CPYTHON, reason="the figures are CPython's")
def test_the_figures_in_the_documentation_are_those_that_are_measured_today():
    results = json.loads(bench.RESULTS.read_text())
    rows = [row for name, part in bench.PARTS.items() for row in part.rows(results["measured"][name])]
    shown = [(row["work"], row["measure"], row["target"]) for row in results["rows"]]
    assert shown == [(row.work, row.measure, row.target) for row in rows]
