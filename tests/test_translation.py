"""Translated code against interpreted code: the same registers, flags, memory, page tables and TLB after the same
number of instructions, wherever one stops.

Two processors begin alike; one translates every block when it first comes there, the other one none. Both run the same
random instructions, one at a time and in loops, and are stopped at random limits.
"""

from __future__ import annotations

import contextlib
import gc
import random
import re
from pathlib import Path

import pytest

pytest.importorskip("unicorn")  # the worlds are shared with it

import test_xv6
from random_instructions import Generator, Unfit, forms
from random_pages import with_pages
from test_linux import MEGABYTE, linux
from test_self_modifying_code import COUNTERS, machine, model, rewriting_case, rewriting_program
from two_readings import Pair
from unicorn_tools import CODE, RAX, RBP, RBX, RCX, RDI, RDX, RSI, WORLDS, Case
from vm_tools import ROOT, assert_same_state, boot, configured, loaded, run_to

from mini_bhyve import segmentation as seg
from mini_bhyve import translate
from mini_bhyve.cpu import Cpu
from mini_bhyve.decode import COLD, Block
from mini_bhyve.faults import VmExit
from mini_bhyve.instructions import DEFINITIONS
from mini_bhyve.trees import Reader

TRIES = 1  # of each instruction in each world
LOOPS = 30


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_each_instruction_does_the_same_translated(world):
    pair, generator = Pair(world), Generator(world, "translated")
    for stems in forms(world.bits).values():
        for _ in range(TRIES):
            with contextlib.suppress(Unfit):
                case, _ = generator.case(generator.random.choice(stems))
                if not world.real and generator.random.random() < 0.3:
                    case = with_pages(case, generator.random)
                pair.compare(case, [1])
    assert pair.left


def loop(generator: Generator, often: list, all_stems: list) -> Case:
    """Some instructions in a row, and a jump back to the first that is taken some times; perhaps a jump across some."""
    world, choice = generator.world, generator.random
    registers = generator.registers()
    for index in (RBX, RBP, RSI, RDI):
        registers[index] = generator.target(2 if index == RBP else 3, world.bits)
    registers[RCX] = choice.randrange(2, 40)
    pieces: list[bytes] = []
    for _ in range(choice.randrange(1, 8)):
        with contextlib.suppress(Unfit):
            stems = choice.choice(often if choice.random() < 0.9 else all_stems)
            pieces.append(generator.instruction(choice.choice(stems), registers, CODE + len(b"".join(pieces)))[0])
    if len(pieces) > 2 and choice.random() < 0.5:
        place = choice.randrange(len(pieces) - 1)
        pieces.insert(place, bytes([0x70 | choice.getrandbits(4), len(pieces[place])]))  # Jcc
    code = b"".join(pieces)
    counted = b"\x49" if world.bits != 64 else b"\xff\xc9"
    back = choice.choice([b"\xe2", counted + b"\x75", counted + b"\x7f"])  # LOOP; DEC ECX, JNZ; DEC ECX, JG
    code += back + (-len(code) - len(back) - 1 & 0xFF).to_bytes(1, "little")
    case = Case(world.name, code, tuple(registers), generator.flags())
    return with_pages(case, choice) if not world.real and choice.random() < 0.3 else case


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_loops_do_the_same_translated_wherever_they_are_stopped(world, loops=LOOPS, seed="loops"):
    pair, generator = Pair(world), Generator(world, seed)
    all_stems = list(forms(world.bits).values())
    often = [stems for number, stems in forms(world.bits).items() if not DEFINITIONS[number].data_decides]
    for _ in range(loops):
        case = loop(generator, often, all_stems)
        pair.compare(case, [generator.random.randrange(1, 40) for _ in range(12)])
    assert pair.left


@pytest.mark.parametrize(
    "code",
    ["83c604 ebfb", "40 89c3 4b 83c004 ebf7", "01c0 91 ebfb", "29d8 93 ebfb", "83c604 e802000000 ebf6 c3"],
    ids=["add", "mov, dec, add", "add, xchg", "sub, xchg", "call"],
)
def test_flags_that_the_next_round_sets_anyway_are_there_if_it_does_not_come(code):
    """In loops without an end: another round, or else the flags of the last one, made of registers as they were."""
    case = Case("flat32", bytes.fromhex(code), (0xCB, 0x20, 5, 0, 0x20000, 0, 0xC7, 0), 2)
    Pair(WORLDS["flat32"]).compare(case, [1, 2, 3, 5, 7, 11] * 5)


# --- What may change under a translation ------------------------------------------------------------------------------


def test_code_that_rewrites_itself_runs_as_it_stands_also_if_it_was_translated():
    pair, rng = Pair(WORLDS["flat32"]), random.Random("rewriting translated")
    for _ in range(LOOPS // 3):
        start, code = rewriting_program(rng)
        case = rewriting_case(start, code)
        pair.compare(case, [*(rng.randrange(1, 60) for _ in range(20)), 10_000])
        registers = pair.translated.cpu.regs[: len(COUNTERS)]
        assert [register.value for register in registers] == model(start, code)[0], case


def test_a_store_into_one_block_of_a_loop_drops_the_translation_of_all_of_it():
    # mov ebp, 2; all: mov ecx, 100; again: test cl, 1; jz over; inc eax; jmp over; over: dec ecx; jnz again;
    # mov byte [the INC], 42h (inc edx); dec ebp; jnz all
    cpu = machine("bd02000000 b964000000 f6c101 7403 40 eb00 49 75f5 c605 0f800000 42 4d 75e6 f4")
    run(cpu)
    assert (cpu.regs[RAX].value, cpu.regs[RDX].value) == (50, 50)


def test_addresses_of_32_bit_code_in_long_mode_are_cut_to_32_bits():
    """There may be pages beyond; elsewhere, an address that is too large is not in the TLB."""
    cpu = machine("f4")
    for long_mode in (False, True):
        reader = Reader(cpu, cpu.mode._replace(long_mode=long_mode))
        address = (reader.regs[RAX].value + reader.regs[RBX].value) & 0xFFFFFFFF
        assert (reader.unwrapped(address) is address) == long_mode


@pytest.mark.parametrize(
    "effects, translated",
    [("load load store", True), ("store store", True), ("load store store", False), ("store load", False)],
)
def test_an_instruction_that_has_stored_must_not_find_out_that_it_has_to_begin_again(effects, translated):
    """If it has looked before at what it changes, or still has to look at something, it is not translated."""

    def definition(cpu):
        for place, effect in enumerate(effects.split()):
            if effect == "load":
                cpu.load(0x5000 + place * 0x1000, 32)
            else:
                cpu.store(0x5000 + place * 0x1000, 0, 32)

    cpu = machine("f4")
    reader = Reader(cpu, cpu.mode)
    assert reader.read((definition, (cpu,), CODE + 1), CODE, 0) == translated
    assert len(reader.way) == (len(effects.split()) if translated else 0)


SEGMENTS = {
    "up to 5FFFh": (0, 0x5FFF, seg.WRITABLE),
    "with a base, up to 6002h": (0x3000, 0x6002, seg.WRITABLE),
    "from 6000h downwards": (0, 0x5FFF, seg.WRITABLE | seg.EXPAND_DOWN),
    "read-only": (0, 0xFFFFFFFF, 0),
    "code": (0, 0xFFFFFFFF, seg.CODE | seg.READABLE),
    "code that cannot be read": (0, 0xFFFFFFFF, seg.CODE),
}


@pytest.mark.parametrize("step", ["43", "4b"], ids=["upwards", "downwards"])
@pytest.mark.parametrize("store", ["8803", "668903", "8903", ""], ids=["byte", "word", "doubleword", "none"])
@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
def test_a_segment_ends_where_it_ends(segment, store, step):
    """A loop that runs across the end, or stores where that is not allowed: a fault, and here the end of the VM."""
    # mov ebx, 6000h + or - 20h; mov ecx, 40h; again: inc or dec ebx; mov eax, [ebx]; add edx, eax; mov [ebx], ...
    begin = "bbe05f0000" if step == "43" else "bb20600000"
    body = f"{step} 8b03 01c2 {store} 49"
    program = f"{begin} b940000000 {body} 75{-len(bytes.fromhex(body)) - 2 & 0xFF:02x} f4"
    outcomes = []
    for heat in (2, COLD):
        cpu = machine(program)
        base, limit, kind = segment
        access = seg.PRESENT | seg.CODE_OR_DATA | seg.BIG | seg.GRANULAR | kind
        cpu.segments[seg.DS] = seg.Segment(0x10, base, limit, access)
        cpu.update_mode()
        cpu.memory.load(base + 0x5FC0, bytes(range(0x80)))
        try:
            run(cpu, heat)
            end = "halted"
        except VmExit as error:
            end = str(error)
        registers = [register.value for register in cpu.regs]
        outcomes.append((end, cpu.retired, registers, cpu.eflags, bytes(cpu.memory.ram)))
    assert outcomes[0] == outcomes[1]


def run(cpu: Cpu, heat: int = 0, most: int = 20_000) -> Cpu:
    """Run to HLT, translating what has been run `heat` times."""
    cpu.translator.heat = heat
    while not cpu.halted:
        assert cpu.retired < most
        cpu.attention = False
        cpu.run(most)
    return cpu


def number(value: int) -> str:
    return value.to_bytes(4, "little").hex()


@pytest.mark.parametrize(
    "program, expected",
    [
        # mov ecx, 200; again: mov eax, [5000h]; add edx, eax; dec ecx; jnz again
        ("b9c8000000 a100500000 01c2 49 75f6 f4", {RDX: 200 * 3}),
        # the same with the page at 6000h put there every second round: xor dword [entry], 3000h; invlpg [5000h]
        ("b9c8000000 a100500000 01c2 813514200000 00300000 0f013d00500000 49 75e5 f4", {RDX: 100 * 3 + 100 * 5}),
        # and with the entry not changed back, and the TLB emptied by MOV CR3: mov eax, cr3; mov cr3, eax
        ("b9c8000000 a100500000 01c2 810514200000 00000000 0f20d8 0f22d8 49 75e6 f4", {RDX: 200 * 3}),
    ],
    ids=["nothing", "INVLPG", "MOV CR3"],
)
def test_a_page_that_is_mapped_elsewhere_is_found_there(program, expected):
    cpu = machine(program)
    cpu.memory.load(0x5000, (3).to_bytes(4, "little"))
    cpu.memory.load(0x6000, (5).to_bytes(4, "little"))
    run(cpu)
    assert {register: cpu.regs[register].value for register in expected} == expected
    assert cpu.translator.translations


@pytest.mark.parametrize("guest", ["counter", "shell", "long64", "compute", "calls"])
def test_a_whole_machine_is_the_same_at_any_instant(guest):
    """With interrupts from the timer, a user at the console, system calls, and whatever else these guests do."""
    both = [boot(guest, b"help\n\0\0count\n\0\0\0ticks\n") for _ in range(2)]
    both[0].cpu.translator.heat, both[1].cpu.translator.heat = 1, COLD
    rng, instructions = random.Random(guest), 0
    for _ in range(6):
        instructions += rng.randrange(1, 60_000)
        for each in both:
            run_to(each, instructions)
        if any(each.exit_code is not None for each in both):
            break
        assert_same_state(*both)
    assert both[0].console.output == both[1].console.output
    assert both[0].cpu.translator.translations and not both[1].cpu.translator.translations


@pytest.mark.parametrize("flush", ["0f013d00900000", "0f20d8 0f22d8"], ids=["INVLPG", "MOV CR3"])
@pytest.mark.parametrize("jump, back", [("e8", "c3"), ("e9", "e9")], ids=["CALL", "JMP"])
def test_code_on_a_page_that_is_mapped_elsewhere_is_another(jump, back, flush):
    """The page at 9000h is the one at A000h every second round: its routine counts EDX, not EBX."""
    # mov ecx, 20; all: mov edi, 10; again: call 9000h; dec edi; jnz again; xor dword [entry], 3000h; invlpg; dec ecx;
    # jnz all
    body = f"bf0a000000 {jump}{number(0x9000 - CODE - 15)} 4f 75f8 813524200000 00300000 {flush} 49"
    cpu = machine(f"b914000000 {body} 75{-len(bytes.fromhex(body)) - 2 & 0xFF:02x} f4")
    for place, count in ((0x9000, "43"), (0xA000, "42")):
        end = back if back == "c3" else back + number(CODE + 15 - 0x9006 & 0xFFFFFFFF)
        cpu.memory.load(place, bytes.fromhex(count + end))
    run(cpu, heat=3)
    assert (cpu.regs[RBX].value, cpu.regs[RDX].value) == (100, 100)
    assert cpu.translator.translations


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_element_of_an_array_is_where_it_is(size, scale, monkeypatch):
    sib = bytes([{1: 0, 2: 0x40, 4: 0x80, 8: 0xC0}[scale] | 0x0D]).hex()  # ecx * scale + constant
    load, store = {1: ("0a04", "8804"), 2: ("660b04", "668904"), 4: ("0b04", "8904")}[size]
    # mov ecx, 100; again: or eax, [array]; mov [other array], eax; dec ecx; jnz again
    body = f"{load}{sib}{number(0x5000)} {store}{sib}{number(0x9000)} 49"
    cpu = machine(f"b964000000 {body} 75{-len(bytes.fromhex(body)) - 2 & 0xFF:02x} f4")
    content = random.Random(f"{size} {scale}").randbytes(1000)
    cpu.memory.load(0x5000, content)
    left = count_left(cpu, monkeypatch)
    run(cpu)
    assert len(left) <= 4  # before the pages are in the TLB
    model, value = bytearray(1000), 0
    for index in range(100, 0, -1):
        place = slice(index * scale, index * scale + size)
        value |= int.from_bytes(content[place], "little")
        model[place] = value.to_bytes(size, "little")
    assert cpu.memory.read(0x9000, 1000) == bytes(model)
    assert cpu.regs[RAX].value == value


# --- Both readings ----------------------------------------------------------------------------------------------------


@pytest.mark.both_readings
def test_a_test_that_runs_in_both_readings_is_translated_in_one(reading):
    cpu = machine("43 f4")  # inc ebx
    while not cpu.halted:
        cpu.attention = False
        cpu.run(10)
    assert bool(cpu.translator.translations) == (reading == "translated")


def test_all_tests_of_the_processor_run_in_both_readings():
    """Those that `make coverage` names; but one of them has a reading of its own."""
    makefile = (ROOT / "Makefile").read_text()
    (names,) = re.findall(r"CPU_TESTS = .*?\.py,((?:.*\\\n)*.*)\)\)", makefile)
    for name in {*names.replace("\\", "").split()} - {"one_definition"}:
        text = (ROOT / "tests" / f"test_{name}.py").read_text()
        assert "\npytestmark = pytest.mark.both_readings\n" in text, name


# --- What makes trouble -----------------------------------------------------------------------------------------------


def count_left(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where translations are left in their middle."""
    left = []
    leave = cpu.translator.leave

    def note(error: KeyError) -> None:
        leave(error)
        left.append(cpu.ip)

    monkeypatch.setattr(cpu.translator, "leave", note)
    return left


@pytest.mark.parametrize(
    "program, expected",
    [
        # mov ecx, 500; mov ebx, 5FFEh; again: add [ebx], ecx; add eax, [ebx]; dec ecx; jnz again: across two pages
        ("b9f4010000 bbfe5f0000 010b 0303 49 75f9 f4", None),
        # mov ebx, 6000h; mov esi, -1; again: mov eax, [ebx + esi * 4]; add edx, eax; dec ecx; jnz again; hlt
        ("b9f4010000 bb00600000 beffffffff 8b04b3 01c2 49 75f8 f4", {RDX: 500 * 7}),
        # mov ebx, 5000h; again: mov edx, ecx; and ecx, 1; shl eax, cl; mov ecx, edx; inc eax; dec ecx; jnz again
        ("b9f4010000 89ca 83e101 d3e0 89d1 40 49 75f3 f4", None),
        # again: mov [code], ecx (behind this program); dec ecx; jnz again
        ("b9f4010000 890d40800000 49 75f7 f4", {RCX: 0}),
        # again: call +0; pop eax; dec ecx; jnz again: a jump whose target is on the stack
        ("b9f4010000 e800000000 58 49 75f7 f4", {RAX: CODE + 10}),
    ],
    ids=["two pages", "an index of -1", "a shift by 0", "code beside data", "the stack"],
)
def test_an_instruction_that_often_leaves_its_translation_does_not_do_so_for_ever(program, expected, monkeypatch):
    cpu, other = machine(program), machine(program)
    for each in (cpu, other):
        each.memory.load(0x5FFC, (7).to_bytes(4, "little"))
    left = count_left(cpu, monkeypatch)
    run(cpu)
    run(other, heat=COLD)
    assert cpu.retired == other.retired
    assert [register.value for register in cpu.regs] == [register.value for register in other.regs]
    assert cpu.eflags == other.eflags
    assert bytes(cpu.memory.ram) == bytes(other.memory.ram)
    if expected:
        assert {register: cpu.regs[register].value for register in expected} == expected
    assert len(left) <= 5 * translate.MANY_TROUBLES


@pytest.mark.parametrize(
    "step",
    ["19d0", "0fc8", "d1d0", "0fafc2", "0fbae80b", "69c0b179379e", "01c28d04d0", "f7d8d1d215", "c1c80d0fafc001c2"],
    ids=["sbb", "bswap", "rcl", "imul", "bts", "imul constant", "add, lea", "neg, rcl, adc", "ror, imul, add"],
)
def test_an_expression_may_be_as_long_as_it_likes(step):
    """One that is longer than Python's parser, or its stack, could take, at an instruction that needs all of it."""
    step += "78563412" if step.endswith("15") else ""
    # mov ecx, 300; again: step, 100 times; mov [5000h], eax; dec ecx; jnz again
    body = step * 100 + "a300500000 49"
    back = -len(bytes.fromhex(body)) - 6
    program = "b92c010000" + body + "0f85" + number(back & 0xFFFFFFFF) + "f4"
    cpu, other = machine(program), machine(program)
    for each in (cpu, other):
        each.regs[RAX].value = 0x12345678
    run(cpu, most=100_000)
    run(other, COLD, most=100_000)
    assert [register.value for register in cpu.regs] == [register.value for register in other.regs]
    assert (cpu.eflags, cpu.retired) == (other.eflags, other.retired)
    assert cpu.translator.translations


def rounds_of(loops: int, rounds: int) -> str:
    """mov edx, rounds; all: (mov ecx, 20; again: dec ecx; jnz again; inc eax), so many of them; dec edx; jnz all"""
    body = "b914000000 49 75fd 40" * loops
    return f"ba{number(rounds)} {body} 4a 0f85{number(-len(bytes.fromhex(body)) - 7 & 0xFFFFFFFF)} f4"


@pytest.mark.parametrize("loops", [12, 50])
def test_translations_do_not_grow_without_end_and_those_in_use_stay(loops, monkeypatch):
    """Also if all of them are in use."""
    monkeypatch.setattr(translate, "MAX_TRANSLATIONS", 8)
    cpu, numbers = machine(rounds_of(loops, 6)), set()
    make = cpu.translator.translate

    def count(block: Block) -> None:
        make(block)
        numbers.add(len(cpu.translator.translations))

    monkeypatch.setattr(cpu.translator, "translate", count)
    run(cpu)
    assert cpu.regs[RAX].value == 6 * loops
    assert max(numbers) == 8
    for translation in cpu.translator.translations.values():
        assert all(translation in block.part_of for block in translation.blocks)


# mov ecx, 20; again: add eax, constant; dec ecx; jnz again; ret
LOADED, CONSTANT = "b914000000 05 00000000 49 75f8 c3", 6


def test_memory_stays_flat_while_a_guest_loads_and_runs_program_after_program(monkeypatch):
    """The same pages, again and again, with programs that have never been there: most of them will not be back."""
    monkeypatch.setattr(translate, "MAX_TRANSLATIONS", 16)
    rounds, size = 600, len(bytes.fromhex(LOADED))
    # mov ebx, rounds; round: mov edi, ebx; and edi, 3Fh; shl edi, 12; add edi, 20000h; mov ebp, edi
    load = "89df 83e73f c1e70c 81c700000200 89fd"
    load += f"be00400000 b9{number(size)} f3a4"  # mov esi, 4000h; mov ecx, size; rep movsb
    load += f"895d{CONSTANT:02x} ffd5 4b"  # mov [ebp + CONSTANT], ebx; call ebp; dec ebx
    cpu = machine(f"bb{number(rounds)} {load} 0f85{number(-len(bytes.fromhex(load)) - 6 & 0xFFFFFFFF)} f4")
    cpu.memory.load(0x4000, bytes.fromhex(LOADED))
    cpu.translator.heat = 3
    objects = []
    while not cpu.halted:
        cpu.attention = False
        cpu.run(cpu.retired + 5000)
        assert len(cpu.translator.translations) <= 16
        gc.collect()
        objects.append(len(gc.get_objects()))
    assert cpu.regs[RAX].value == 20 * sum(range(rounds + 1))
    assert len(cpu.translator.translations) > 1
    half = len(objects) // 2
    assert max(objects[half:]) < 1.05 * max(objects[:half])


# --- What the user sees -----------------------------------------------------------------------------------------------


def test_what_is_translated_is_written_side_by_side_with_its_code(tmp_path):
    vm = loaded(configured(guest="compute", translate_dump=str(tmp_path / "new" / "directory")), b"")
    run_to(vm, 200_000)
    files = sorted(Path(tmp_path, "new", "directory").iterdir())
    assert len(files) >= len(vm.cpu.translator.translations) > 0
    text = "".join(file.read_text() for file in files)
    lines = [line for line in text.splitlines() if "mov byte ptr [ebx - 0x3fff3800], 0" in line]
    assert lines and all("bytes8[write_tlb[" in text[text.index(line) :][:400] for line in lines)


def test_nothing_is_translated_if_the_user_does_not_want_it():
    vm = loaded(configured(guest="compute", translate="false"), b"")
    run_to(vm, 200_000)
    assert not vm.cpu.translator.translations


# --- make soak --------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "xv6": [b"ls\n", b"wc README\n", b"grep the README\n", b"echo kept > f\n", b"cat README | wc\n", b"rm f\n"],
    "linux": [b"stress-fork 5\n", b"ls /dev\n", b"ps\n", b"stress-mem 1\n", b"write /f 20000 1\n", b"sum /f\n"],
}


@pytest.mark.soak
@pytest.mark.parametrize("name, rounds", [pytest.param("xv6", 8, marks=test_xv6.pytestmark), ("linux", 12)])
def test_memory_stays_flat_while_an_operating_system_runs_program_after_program(name, rounds, tmp_path, monkeypatch):
    monkeypatch.setattr(translate, "MAX_TRANSLATIONS", 300)
    disk = tmp_path / "empty"
    disk.write_bytes(bytes(MEGABYTE))
    guest = test_xv6.xv6() if name == "xv6" else linux(disk)
    directory = tmp_path / "disks"
    directory.mkdir()
    machine = guest.boot(directory, PROGRAMS[name] * rounds)
    objects: list[int] = []
    while machine.exit_code is None:
        machine.run_once()
        assert len(machine.cpu.translator.translations) <= 300
        if len(machine.console.prompts) > (len(objects) + 1) * len(PROGRAMS[name]):
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert len(objects) == rounds
    before, last = objects[: rounds * 3 // 4], objects[rounds * 3 // 4 :]
    assert max(last) < 1.05 * max(before), objects  # up and down it goes, with what is dropped and found again
