"""Every instruction, with random operands in random states, on our processor and on Unicorn's."""

from __future__ import annotations

import contextlib
import sys

import pytest

pytest.importorskip("unicorn")

from capstone import x86_const as x86
from comparison import NOT_COMPARED, VEX_INSTRUCTIONS, Comparison
from random_instructions import Generator, Stem, Unfit, decode, disassembler, forms, opcodes
from unicorn_tools import CODE, WORLDS, Case, Ours, Theirs, Unusable

from mini_bhyve import flags as fl
from mini_bhyve.faults import UD
from mini_bhyve.instructions import DEFINITIONS

pytestmark = pytest.mark.both_readings

# How many cases: for each instruction, each opcode, and of several instructions in a row. PyPy calls Unicorn slowly.
CASES_PER_INSTRUCTION, CASES_PER_OPCODE, CHAINS = (25, 6, 500) if sys.implementation.name != "pypy" else (6, 2, 100)

# What never gets through, and where: there its exception alone is compared.
ALWAYS_FAULT = {
    "": "int int3 rdfsbase rdgsbase rdpmc sysexit sysexitq sysret sysretq ud0 ud1 ud2 wrfsbase wrgsbase",
    "real": f"arpl lar lldt lsl ltr sldt str verr verw {VEX_INSTRUCTIONS}",
    "user": "clac clts cli hlt in insb insd insw invd invlpg lgdt lidt lldt lmsw ltr out outsb outsd outsw rdmsr stac "
    "sti swapgs wbinvd wbnoinvd wrmsr",
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_an_instruction_does_what_it_does_on_unicorn(world):
    fault = (ALWAYS_FAULT[""] + " " + ALWAYS_FAULT.get("user" if world.cpl else world.name, "")).split()
    comparison = Comparison(world)
    generator = Generator(world, "one instruction")
    for number, stems in forms(world.bits).items():
        for tries in range(100):
            if tries >= CASES_PER_INSTRUCTION and (comparison.completed[number] or name_of(number) in fault):
                break
            with contextlib.suppress(Unfit):
                comparison.run(*generator.case(generator.random.choice(stems)))
    assert not comparison.failures, "\n".join(comparison.failures[:20])
    never = {name_of(number) for number in forms(world.bits) if not comparison.completed[number]}
    assert never <= {*fault, *NOT_COMPARED}


def test_every_definition_is_compared_in_some_mode():
    reached = set().union(*(forms(bits) for bits in (16, 32, 64)))
    assert {name_of(number) for number in DEFINITIONS} == {name_of(number) for number in reached}


def name_of(number: int) -> str:
    return disassembler(64).insn_name(number)


# --- Several instructions in a row: flags that were left for later ----------------------------------------------------

CONDITIONS = "o no b ae e ne be a s ns p np l ge le g".split()
# Two vocabularies, since an instruction that reads a flag must not follow one that leaves it undefined: AF after
# logical instructions and shifts, OF after DAA and DAS.
WITHOUT_AF = (
    "add adc sub sbb cmp neg inc dec and or xor test xadd cmpxchg rol ror rcl rcr shl shr sar clc stc cmc".split()
    + [f"set{c}" for c in CONDITIONS] + [f"cmov{c}" for c in CONDITIONS]
)  # fmt: skip
WITHOUT_OF = "add adc sub sbb cmp neg inc dec rol ror rcl rcr clc stc cmc daa das lahf sahf xadd".split()


def chain(generator: Generator, names: list[str], length: int) -> tuple[bytes, int]:
    """Code of instructions that work on registers, shifts by one bit only, and how many they are."""
    number_of = {name_of(number): number for number in forms(generator.world.bits)}
    usable = [name for name in names if name in number_of]
    code, count = b"", 0
    while count < length:
        stems = forms(generator.world.bits)[number_of[generator.random.choice(usable)]]
        candidates = [
            stem
            for stem in stems
            if (stem.modrm is None or stem.modrm >= 0xC0)
            and stem.opcode not in (b"\xc0", b"\xc1", b"\xd2", b"\xd3")
            and not (stem.opcode in (b"\xf6", b"\xf7") and stem.modrm & 0x38 == 8)  # one of Unicorn's errors
        ]
        encoded = generator.encode(generator.random.choice(candidates))
        insn = decode(encoded, generator.world.bits)
        if insn is None or name_of(insn.id) not in names or any(o.type == x86.X86_OP_MEM for o in insn.operands):
            continue
        if generator.wide and insn.insn_name() in ("lahf", "sahf", "cmpxchg"):  # one more
            continue
        code, count = code + encoded[: insn.size], count + 1
    return code, count


@pytest.mark.parametrize("world", [WORLDS["real"], WORLDS["flat32"], WORLDS["long64"]], ids=lambda world: world.name)
@pytest.mark.parametrize("names, undefined", [(WITHOUT_AF, fl.AF), (WITHOUT_OF, fl.OF)], ids=["no AF", "no OF"])
def test_flags_cross_from_one_instruction_to_the_next(world, names, undefined):
    ours, theirs = Ours(world), Theirs(world)
    generator = Generator(world, "chains")
    for _ in range(CHAINS):
        code, count = chain(generator, names, generator.random.randrange(2, 9))
        case = Case(world.name, code, tuple(generator.registers()), generator.flags(), instructions=count)
        mine, other = ours.run(case), theirs.run(case)
        mask = ~undefined
        text = "; ".join(f"{insn.mnemonic} {insn.op_str}" for insn in disassembler(world.bits).disasm(code, CODE))
        assert mine._replace(flags=mine.flags & mask) == other._replace(flags=other.flags & mask), (text, case)


# --- What is no instruction -------------------------------------------------------------------------------------------

# Opcodes at which one of the two does not know its way about.
NOT_DECODED_ALIKE = {
    b"\x8f": "Unicorn takes POP with any number in bits 5-3 of ModRM; only 0 is one (vol. 2D, table A-6)",
    b"\xf6": "Unicorn does not know F6 /1, an alias of TEST",
    b"\xf7": "Unicorn does not know F7 /1, an alias of TEST",
    b"\x0f\x0d": "Unicorn takes no hint with registers (vol. 2D, table A-3)",
    b"\x0f\x18": "Unicorn takes no hint with registers (vol. 2D, table A-3)",
    b"\x0f\xba": "Unicorn reads the operand of 0F BA /0 to /3 before it finds that there is no such instruction",
    b"\x0f\x07": "Unicorn asks for protected mode before it asks whether there is SYSRET",
    **dict.fromkeys((b"\x0f\x05", b"\x0f\x34"), "Unicorn has a hook in place of SYSCALL and SYSENTER"),
    b"\x0f\x33": "Unicorn does not know RDPMC",
    b"\xff": "Unicorn reads the operand of FF /7 before it finds that there is no such instruction",
    b"\xc6": "Unicorn takes MOV with any number in bits 5-3 of ModRM",
    b"\xc7": "Unicorn takes MOV with any number in bits 5-3 of ModRM",
}  # fmt: skip
# Opcodes of units that our processor does not have, and Unicorn's has.
OTHER_UNITS = (
    [bytes([n]) for n in (0xC4, 0xC5, 0x62, *range(0xD8, 0xE0))]  # VEX, EVEX; x87
    + [b"\x0f" + bytes([n]) for n in (0x01, 0x0E, 0x0F, 0xAE, 0xC3, 0xC7, 0xF7, *range(0x10, 0x18), *range(0x28, 0x30))]
    + [b"\x0f" + bytes([n]) for n in (*range(0x50, 0x80), *range(0xC2, 0xC7), *range(0xD0, 0xFF))]
    + [bytes([0x0F, escape, n]) for escape in (0x38, 0x3A) for n in range(256)]
)


@pytest.mark.parametrize("world", [WORLDS["real"], WORLDS["flat32"], WORLDS["long64"]], ids=lambda world: world.name)
def test_bytes_that_are_no_instruction_are_an_invalid_opcode(world):
    ours, theirs = Ours(world), Theirs(world)
    generator = Generator(world, "any bytes")
    invalid = 0
    for opcode in opcodes(world.bits):
        if opcode in NOT_DECODED_ALIKE or opcode in OTHER_UNITS:
            continue
        for _ in range(CASES_PER_OPCODE):
            code = generator.encode(Stem(b"", opcode, None))
            if 0xF0 in code[: code.index(opcode[0])]:
                continue  # LOCK: one of Unicorn's errors
            insn = decode(code, world.bits)
            if insn and insn.insn_name() in NOT_COMPARED:
                continue
            case = Case(world.name, code[: insn.size] if insn else code, tuple(generator.registers()), 2)
            with contextlib.suppress(Unusable):
                mine = ours.run(case).vector
                other = theirs.run(case).vector
                assert (mine == UD) == (other == UD), case
                invalid += mine == UD
    assert invalid
