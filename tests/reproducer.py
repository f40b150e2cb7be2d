"""A case that fails, made small and written in a line, to be run again: `python -m tests.fuzz --case '...'`.

The line is JSON, and what is as usual is left out of it:

    {"world": "flat32", "code": "11d8", "registers": {"eax": "0xff"}, "flags": "0x3", "memory": {"0xa000": "00ff"}}

`minimise()` takes from a case whatever it can do without and still fail: instructions, prefixes, registers, flags, and
what is unusual in memory, such as the entries of page tables; and events, if it has any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Callable

from comparison import instruction_at
from random_instructions import decode, repeats
from unicorn_tools import CODE, DATA, SIZE, WORLDS, Case, Event, Memory, World, usual_memory

from mini_bhyve import flags as fl

NAMES = "ax cx dx bx sp bp si di".split()
MAX_CODE, MAX_INSTRUCTIONS = DATA - CODE - 1, 1000
CONTROLS = "cr0 cr3 cr4 efer".split()
KEYS = {"world", "code", "registers", "flags", "memory", "instructions", "start", "controls", "events"}


class NoCase(Exception):
    """The text is no case; the message is one sentence."""


def register_names(world: World) -> list[str]:
    if world.bits == 64:
        return [f"r{name}" for name in NAMES] + [f"r{number}" for number in range(8, 16)]
    return [f"e{name}" for name in NAMES]


# --- As text ----------------------------------------------------------------------------------------------------------


def to_text(case: Case) -> str:
    """The case as a line that `from_text` reads."""
    registers = zip(register_names(WORLDS[case.world]), case.registers)
    fields: dict[str, Any] = {"world": case.world, "code": case.code.hex()}
    fields["registers"] = {name: hex(value) for name, value in registers if value}
    if case.flags != fl.ALWAYS_ONE:
        fields["flags"] = hex(case.flags)
    if case.memory:
        fields["memory"] = {hex(address): data.hex() for address, data in case.memory}
    if case.instructions != 1:
        fields["instructions"] = case.instructions
    if case.start != CODE:
        fields["start"] = hex(case.start)
    if case.controls:
        fields["controls"] = dict(zip(CONTROLS, map(hex, case.controls)))
    if case.events:
        fields["events"] = case.events
    return json.dumps(fields)


def from_text(text: str) -> Case:
    """The case that a line describes. Raises NoCase."""
    try:
        fields = json.loads(text)
        unknown = set(fields) - KEYS
        if unknown:
            raise NoCase(f"a case has no {min(unknown)!r}.")
        if fields["world"] not in WORLDS:
            raise NoCase(f"there is no world {fields['world']!r}; there are {', '.join(WORLDS)}.")
        world = WORLDS[fields["world"]]
        names = register_names(world)
        registers = {name: number(value, world.bits) for name, value in fields.get("registers", {}).items()}
        if not registers.keys() <= set(names):
            raise NoCase(f"there is no register {min(registers.keys() - set(names))!r} in {world.name}.")
        controls = fields.get("controls")
        case = Case(
            world.name,
            bytes.fromhex(fields["code"]),
            tuple(registers.get(name, 0) for name in names),
            number(fields.get("flags", "0x2"), 32),
            tuple((number(address, 18), bytes.fromhex(data)) for address, data in fields.get("memory", {}).items()),
            int(fields.get("instructions", 1)),
            start=number(fields.get("start", hex(CODE)), 64),
            controls=tuple(number(controls[name], 64) for name in CONTROLS) if controls else None,
            events=tuple(Event(int(after), str(what), int(last)) for after, what, last in fields.get("events", ())),
        )
    except json.JSONDecodeError as error:
        raise NoCase(f"it is no JSON: {error}.") from None
    except KeyError as error:
        raise NoCase(f"{error} is missing.") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise NoCase(f"something in it is of the wrong kind: {error}.") from None
    if not 0 < len(case.code) <= MAX_CODE or not 0 < case.instructions <= MAX_INSTRUCTIONS:
        raise NoCase(f"it has between 1 and {MAX_CODE} bytes of code, and 1 to {MAX_INSTRUCTIONS} instructions.")
    if any(address + len(data) > SIZE for address, data in case.memory):
        raise NoCase(f"memory ends at {SIZE:#x}.")
    return with_repeats(case)


def number(text: str, bits: int) -> int:
    """A number in hexadecimal, of so many bits at most."""
    value = int(text, 16)
    if not 0 <= value < 1 << max(bits, 32):
        raise ValueError(f"{text} does not fit")
    return value


def with_repeats(case: Case) -> Case:
    """The case with what follows from its code."""
    insn = instruction_at(case, case.start)
    return case._replace(repeats=repeats(insn, case.start) if insn and case.instructions == 1 else 0)


# --- Smaller ----------------------------------------------------------------------------------------------------------


def minimise(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A case with as little in it as possible that still fails."""
    case = case_if(fails, case, case._replace(memory=in_words(case.memory)))
    smaller = None
    while smaller != case:
        smaller = case
        for candidate_of in (fewer_events, shorter_code, fewer_registers, fewer_flags):
            again = True
            while again:
                again = False
                for candidate in candidate_of(case):
                    if fails(candidate):
                        case, again = candidate, True
                        break
        case = with_less_memory(case, fails)
    return case


def case_if(fails: Callable[[Case], bool], case: Case, candidate: Case) -> Case:
    return candidate if candidate != case and fails(candidate) else case


def fewer_events(case: Case) -> Iterator[Case]:
    """Up to one that is not the last; without one of them, or with nothing happening there."""
    events = case.events
    for count in range(1, len(events)):
        yield case._replace(events=events[:count])
    for index, (after, what, _) in enumerate(events[:-1]):
        following = events[index + 1]._replace(after=after + events[index + 1].after)
        yield case._replace(events=(*events[:index], following, *events[index + 2 :]))
        if what:
            yield case._replace(events=(*events[:index], Event(after, ""), *events[index + 1 :]))


def shorter_code(case: Case) -> Iterator[Case]:
    """Without one of the instructions, or one of the prefixes of one."""
    if not CODE <= case.start < CODE + len(case.code):
        return
    if case.start != CODE:
        yield with_repeats(case._replace(code=case.code[case.start - CODE :], start=CODE))
    pieces = pieces_of(case)
    for index, piece in enumerate(pieces):
        before, after = b"".join(pieces[:index]), b"".join(pieces[index + 1 :])
        if len(pieces) > 1:
            yield with_repeats(case._replace(code=before + after, instructions=max(1, case.instructions - 1)))
        insn = decode(piece, WORLDS[case.world].bits)
        prefixes = piece.index(insn.opcode[0]) if insn else 0
        for place in range(prefixes):
            yield with_repeats(case._replace(code=before + piece[:place] + piece[place + 1 :] + after))


def pieces_of(case: Case) -> list[bytes]:
    """The bytes of each instruction."""
    pieces, place = [], case.start
    while place < CODE + len(case.code):
        insn = instruction_at(case, place)
        if insn is None:
            break
        pieces.append(bytes(insn.bytes))
        place += insn.size
    return pieces


def fewer_registers(case: Case) -> Iterator[Case]:
    """With one more register that is 0, or smaller than it was."""
    for index, value in enumerate(case.registers):
        for smaller in (0, 1, value & 0xFF, value & 0xFFFF, value & 0xFFFFFFFF):
            if smaller < value:
                yield case._replace(registers=(*case.registers[:index], smaller, *case.registers[index + 1 :]))


def fewer_flags(case: Case) -> Iterator[Case]:
    for bit in range(22):
        if case.flags & ~fl.ALWAYS_ONE & 1 << bit:
            yield case._replace(flags=case.flags & ~(1 << bit))


def in_words(memory: Memory) -> Memory:
    """What differs from the usual content, in words of eight bytes."""
    content = bytearray(usual_memory())
    for address, data in memory:
        content[address : address + len(data)] = data
    usual = usual_memory()
    words = (place for place in range(0, SIZE, 8) if content[place : place + 8] != usual[place : place + 8])
    return tuple((place, bytes(content[place : place + 8])) for place in words)


def with_less_memory(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Without pieces of what is unusual: large ones first, single words at last."""
    size = len(case.memory)
    while size:
        start = 0
        while start < len(case.memory):
            smaller = case._replace(memory=case.memory[:start] + case.memory[start + size :])
            if fails(smaller):
                case = smaller
            else:
                start += size
        size //= 2
    return case
