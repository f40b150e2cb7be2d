"""The documentation accounts for every instruction that capstone has a name for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))

import instruction_reasons as reasons

from mini_bhyve import absent
from mini_bhyve.cpuid import FEATURES
from mini_bhyve.instructions import DEFINITIONS

OFFERED = {feature.name for features in FEATURES.values() for feature in features.values()}
NUMBERS = {name: number for number, name in reasons.NAMES.items()}


def test_every_instruction_is_there_or_has_a_reason_not_to_be():
    assert not [name for name, number in NUMBERS.items() if number not in DEFINITIONS and not reasons.reason(number)]


def test_capstone_has_a_name_for_each_number_and_counts_from_1():
    assert sorted(reasons.NAMES) == list(range(1, len(reasons.NAMES) + 1))


@pytest.mark.parametrize("why", reasons.OTHER)
def test_no_reason_is_stale(why):
    for name in reasons.OTHER[why].split():
        assert NUMBERS[name] not in DEFINITIONS, "it is there by now"
        assert reasons.reason(NUMBERS[name]) == why, "and has no other reason"


@pytest.mark.parametrize("why", [*reasons.OTHER, *reasons.UNITS.values()])
def test_what_is_said_not_to_be_offered_is_not(why):
    said = re.search(r"(?:\w+: )?(.*) (?:is|are) not offered", why)
    assert not said or not OFFERED & set(re.findall(r"[A-Z0-9.]+", said[1]))


def test_every_unit_and_every_unused_name_is_needed():
    given = {reasons.reason(number) for number in reasons.NAMES.keys() - DEFINITIONS.keys()}
    assert set(reasons.UNITS.values()) <= given
    for start in (start for starts in reasons.UNUSED_NAMES.values() for start in starts):
        unseen = {number for name, number in NUMBERS.items() if name.startswith(start)} - reasons.examples().keys()
        assert unseen and not DEFINITIONS.keys() & unseen


def test_what_the_encoding_shows_to_be_of_a_unit_is_not_listed_by_name():
    listed = {NUMBERS[name] for names in reasons.OTHER.values() for name in names.split()}
    units = {n: absent.unit_of(insn, insn.prefix[2] != 0) for n, insn in reasons.examples().items() if n in listed}
    assert set(units.values()) == {absent.OTHER}
