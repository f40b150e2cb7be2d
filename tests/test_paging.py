"""Paging: random page tables of each kind and random accesses, on our processor and on Unicorn's.

Whatever Unicorn does with an address is compared: where the access went, the exception with its error code and CR2, and
the accessed and dirty bits, for they are in the memory that is compared. (Intel SDM vol. 3A, chapter 4.) What the TLB
remembers is in test_tlb.py.
"""

from __future__ import annotations

import collections
import contextlib
import random
import sys

import pytest

pytest.importorskip("unicorn")

from comparison import differences, is_known
from random_instructions import decode
from random_pages import FORMATS, access, fetch, world_of
from unicorn_tools import Case, Ours, Outcome, Theirs, Unusable

from mini_bhyve.faults import PF

pytestmark = pytest.mark.both_readings

P, WR, US, RSVD, ID = (1 << bit for bit in range(5))  # of an error code
CASES, FETCHES = (1500, 400) if sys.implementation.name != "pypy" else (400, 200)


def compare(ours: Ours, theirs: Theirs, case: Case) -> Outcome:
    """Run a case on both and insist on the same outcome."""
    other = theirs.run(case)
    mine = ours.run(case)
    insn = decode(case.code, ours.world.bits)
    found = differences(case, insn, mine, other)
    assert not found or is_known(ours, case, insn, mine, other, found), (found, case._replace(memory=()))
    return mine


@pytest.mark.parametrize("level", [0, 3], ids=["supervisor", "user"])
@pytest.mark.parametrize("layout", FORMATS, ids=lambda layout: layout.name)
def test_an_access_through_random_page_tables_goes_where_it_goes_on_unicorn(layout, level):
    world = world_of(layout, level)
    ours, theirs = Ours(world), Theirs(world)
    rng = random.Random(f"{layout.name} {level}")
    vectors: collections.Counter[int | None] = collections.Counter()
    codes: collections.Counter[int] = collections.Counter()
    for _ in range(CASES):
        with contextlib.suppress(Unusable):
            outcome = compare(ours, theirs, access(layout, level, rng))
            vectors[outcome.vector] += 1
            if outcome.vector == PF:
                codes[outcome.error_code] += 1
    assert vectors[PF] > CASES / 10 and vectors[None] > CASES / 15
    # Every error code that is possible has come up: not present; refused, and on writing; reserved bits.
    user = US if level else 0
    reserved = layout.entry_bytes == 8 or layout.large_at
    assert {user, user | WR, user | P, user | WR | P} <= codes.keys()
    assert not reserved or {P | RSVD | user, P | RSVD | WR | user} <= codes.keys()


@pytest.mark.parametrize("level", [0, 3], ids=["supervisor", "user"])
@pytest.mark.parametrize("layout", FORMATS, ids=lambda layout: layout.name)
def test_a_fetch_through_random_page_tables_finds_the_code_that_unicorn_finds(layout, level):
    world = world_of(layout, level)
    ours, theirs = Ours(world), Theirs(world)
    rng = random.Random(f"fetch {layout.name} {level}")
    vectors: collections.Counter[int | None] = collections.Counter()
    codes: collections.Counter[int] = collections.Counter()
    for _ in range(FETCHES):
        case = fetch(layout, level, rng)
        if case is None:
            continue
        with contextlib.suppress(Unusable):
            outcome = compare(ours, theirs, case)
            vectors[outcome.vector] += 1
            if outcome.vector == PF:
                codes[outcome.error_code] += 1
    assert vectors[PF] > FETCHES / 10 and vectors[0xCD] > FETCHES / 10
    user = US if level else 0
    assert {user, user | ID, user | P | ID} <= codes.keys()  # with and without the bit, by SMEP and NXE
