"""What makes an instruction one: prefixes that belong to it or must not stand there, and bytes that mean the same."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("unicorn")  # the worlds are shared with it

from unicorn_tools import CODE, DATA, RBX, RCX, RSP, WORLDS, Case, Ours, Theirs

from mini_bhyve import flags as fl
from mini_bhyve import operands as op
from mini_bhyve.cpu import Cpu
from mini_bhyve.decode import Decoder
from mini_bhyve.faults import GP, UD
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.registers import CR0_ET, CR0_PE


@pytest.fixture(scope="module")
def ours():
    return {name: Ours(world) for name, world in WORLDS.items()}


@pytest.fixture(scope="module")
def theirs():
    return {name: Theirs(world) for name, world in WORLDS.items()}


def case(name: str, code: bytes, flags: int = 2) -> Case:
    registers = [0x80000010 + 0x1111 * index for index in range(16 if WORLDS[name].bits == 64 else 8)]
    registers[RCX], registers[RBX], registers[RSP] = 0x80000905, DATA + 0x100, DATA + 0x1000
    if WORLDS[name].bits == 16:
        registers[RBX], registers[RSP] = 0x100, 0x4000
    return Case(name, code, tuple(registers), flags)


# --- What begins alike ------------------------------------------------------------------------------------------------


def parts(argument):
    """An argument of a step as something that can be compared."""
    if isinstance(argument, op.Register) or not isinstance(argument, op.Operand):
        return argument
    slots = [name for kind in type(argument).__mro__ for name in getattr(kind, "__slots__", ())]
    return type(argument), [getattr(argument, name) for name in slots]


def decoded(decoder: Decoder, code: bytes, ip: int):
    instruction = decoder.instruction(code, ip, decoder.cpu.mode)
    if instruction is None:
        return None
    (function, arguments, next_ip), size, ends_block = instruction
    return function, [parts(argument) for argument in arguments], next_ip, size, ends_block


@pytest.mark.parametrize("name", ["real", "flat32", "based32", "code16", "long64"])
def test_an_instruction_is_decoded_alike_whatever_was_decoded_before(ours, name):
    ours[name].begin(case(name, b""))
    cpu, rng = ours[name].cpu, random.Random(name)
    used, fresh = Decoder(cpu), Decoder(cpu)
    # Opcodes with all kinds of constants, prefixes, and constants at their edges are more frequent than other bytes.
    frequent = bytes.fromhex("6b 69 6a 68 70 80 81 83 8b a1 a3 b8 c0 c1 c2 c6 c7 c8 cd e4 e8 ea eb f6 f7 0f 84 a4 ba")
    frequent += bytes.fromhex("66 67 48 4c f2 f3 65 2e 00 00 ff ff 7f 80 05 25 44 84")
    for _ in range(800):
        beginning = bytes(rng.choice((rng.randrange(256), *rng.choices(frequent, k=2))) for _ in range(15))
        for _ in range(3):
            kept = rng.randrange(1, 15)
            code = beginning[:kept].ljust(15, bytes([rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))]))
            ip = rng.choice((0x1000, 0xFFF0))
            fresh.patterns.clear()
            assert decoded(used, code, ip) == decoded(fresh, code, ip), code.hex(" ")


def test_what_is_not_whole_is_no_instruction_even_if_one_like_it_is_known(ours):
    ours["flat32"].begin(case("flat32", b""))
    decoder = Decoder(ours["flat32"].cpu)
    whole = bytes.fromhex("81 05 00 20 00 00 78 56 34 12")  # add dword [0x2000], 0x12345678
    assert decoder.instruction(whole, 0x1000, decoder.cpu.mode) is not None
    for size in range(len(whole)):
        assert decoder.instruction(whole[:size], 0x1000, decoder.cpu.mode) is None


# --- VEX (SDM vol. 2A, 2.3.1 to 2.3.6) --------------------------------------------------------------------------------

VEX = {
    "andn eax, ecx, edx": "c4e270f2c2", "bextr eax, edx, ecx": "c4e270f7c2", "blsr eax, edx": "c4e278f3ca",
    "bzhi eax, edx, ecx": "c4e270f5c2", "mulx eax, ecx, edx": "c4e273f6c2", "pdep eax, ecx, edx": "c4e273f5c2",
    "rorx eax, edx, 5": "c4e37bf0c205", "shlx eax, edx, ecx": "c4e271f7c2",
}  # fmt: skip


@pytest.mark.parametrize("code", VEX.values(), ids=VEX)
def test_there_is_no_vex_in_real_mode(ours, code):
    assert ours["real"].run(case("real", bytes.fromhex(code))).vector == UD
    for name in ("flat32", "code16", "user32", "long64"):
        assert ours[name].run(case(name, bytes.fromhex(code))).vector is None


def test_code_that_was_decoded_in_real_mode_is_decoded_again_in_protected_and_virtual_8086_mode():
    cpu = Cpu(GuestMemory(1 << 20), IoPorts())
    assert cpu.mode.real
    modes = {cpu.mode}
    cpu.write_cr0(CR0_PE | CR0_ET)
    assert not cpu.mode.real
    modes.add(cpu.mode)
    cpu.write_eflags(fl.VM)
    cpu.update_mode()
    assert cpu.mode.real
    assert len(modes) == 2


@pytest.mark.parametrize("code", VEX.values(), ids=VEX)
@pytest.mark.parametrize("prefix", ["66", "f2", "f3", "f0", "48", "6667", "f265"])
@pytest.mark.parametrize("name", ["flat32", "long64"])
def test_no_prefix_that_vex_has_room_for_may_stand_before_it(ours, theirs, code, prefix, name):
    if name == "flat32" and prefix == "48":
        pytest.skip("an instruction of its own")
    asked = case(name, bytes.fromhex(prefix + code))
    assert ours[name].run(asked).vector == theirs[name].run(asked).vector == UD


@pytest.mark.parametrize("code", VEX.values(), ids=VEX)
@pytest.mark.parametrize("prefix", ["67", "65", "2e67"])
def test_other_prefixes_may_stand_before_vex(ours, theirs, code, prefix):
    asked = case("long64", bytes.fromhex(prefix + code))
    mine, other = ours["long64"].run(asked), theirs["long64"].run(asked)
    assert mine.vector is None
    assert mine._replace(flags=0) == other._replace(flags=0)


@pytest.mark.parametrize("code", VEX.values(), ids=VEX)
@pytest.mark.parametrize("name", ["flat32", "long64"])
def test_a_vex_prefix_for_256_bits_is_an_invalid_opcode(ours, theirs, code, name):
    changed = bytearray.fromhex(code)
    changed[2] |= 4  # L
    asked = case(name, bytes(changed))
    assert ours[name].run(asked).vector == theirs[name].run(asked).vector == UD


@pytest.mark.parametrize("register", range(1, 16))
def test_a_third_register_where_there_is_none_is_an_invalid_opcode(ours, register):
    changed = bytearray.fromhex(VEX["rorx eax, edx, 5"])
    changed[2] ^= register << 3  # vvvv. (Unicorn does not look at it.)
    assert ours["long64"].run(case("long64", bytes(changed))).vector == UD


# --- Prefixes that belong to an opcode --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_adcx_and_adox_take_32_bits_in_every_mode(ours, name):
    for code, carry in (("660f38f6c8", fl.CF), ("f30f38f6c8", fl.OF)):  # adcx, adox ecx, eax
        asked = case(name, bytes.fromhex(code), flags=2 | carry)
        done = ours[name].run(asked)
        total = (asked.registers[1] & 0xFFFFFFFF) + (asked.registers[0] & 0xFFFFFFFF) + 1
        assert done.vector is None
        assert done.registers[1] == total & 0xFFFFFFFF
        assert done.flags & fl.ARITHMETIC == carry * (total >> 32)


@pytest.mark.parametrize("code, width", [
    ("66480f38f6c8", 64), ("664c0f38f6c8", 64), ("66480f38f003", 64), ("66480f38f103", 64), ("66f3480fb8c2", 64),
    ("66480fc8", 64), ("664863c2", 64),  # adcx, movbe, popcnt; bswap, movsxd
])  # fmt: skip
def test_a_66_before_rex_w_is_idle_or_belongs_to_the_opcode(ours, theirs, code, width):
    asked = case("long64", bytes.fromhex(code))
    mine = ours["long64"].run(asked)
    assert mine.vector is None
    if "0fb8" not in code:  # for POPCNT, Unicorn thinks the 66 counts
        assert mine == theirs["long64"].run(asked)


@pytest.mark.parametrize("code", ["0fae3b", "660fae3b", "66480fae3b", "660fae33"], ids=lambda code: code)
def test_a_cache_line_is_flushed_where_a_byte_may_be_read(ours, code):
    assert ours["long64"].run(case("long64", bytes.fromhex(code))).vector is None
    beyond = case("real", b"\x67" + bytes.fromhex(code.replace("48", "")))
    beyond = beyond._replace(registers=(0, 0, 0, 0x10000, 0, 0, 0, 0))
    assert ours["real"].run(beyond).vector == GP


@pytest.mark.parametrize("code", [
    "0fc303", "0fae03", "0fae0b", "0fae13", "0fae1b", "0faee8", "0faef0", "0faef8", "0fae3b",
])  # movnti, fxsave, fxrstor, ldmxcsr, stmxcsr, the fences, clflush
@pytest.mark.parametrize("prefix", ["66", "f2", "f3"])
def test_what_the_manual_marks_np_has_none_of_the_three_prefixes(ours, code, prefix):
    if prefix + code == "660fae3b":
        pytest.skip("CLFLUSHOPT")
    for name in ("real", "flat32", "long64"):
        assert ours[name].run(case(name, bytes.fromhex(prefix + code))).vector == UD


def test_movbe_has_no_f3_and_with_f2_it_is_crc32_which_is_not_offered(ours):
    for name in ("real", "flat32", "long64"):
        for prefix in ("f3", "f2", "66f3", "66f2"):
            for code in ("0f38f003", "0f38f103"):
                assert ours[name].run(case(name, bytes.fromhex(prefix + code))).vector == UD


# --- Bytes that mean the same -----------------------------------------------------------------------------------------

HINTS = [bytes([0x0F, opcode]) for opcode in (0x0D, *range(0x18, 0x20))]


@pytest.mark.parametrize("name", ["real", "flat32", "long64"])
@pytest.mark.parametrize("hint", HINTS, ids=bytes.hex)
def test_a_hint_does_nothing_whatever_its_modrm_and_prefix(ours, name, hint):
    start = 0 if name == "real" else CODE
    for prefix in (b"", b"\x66", b"\xf2", b"\xf3", b"\x66\xf3", b"\x67"):
        for modrm in [mode | number << 3 | 3 for mode in (0, 0xC0) for number in range(8)]:
            code = prefix + hint + bytes([modrm])
            asked = case(name, code)
            done = ours[name].run(asked)
            assert (done.vector, done.ip, done.registers) == (None, start + len(code), asked.registers), code.hex()


@pytest.mark.parametrize("name", ["real", "flat32", "long64"])
def test_a_fence_is_one_whatever_the_low_bits_of_its_modrm(ours, theirs, name):
    for modrm in range(0xE8, 0x100):
        asked = case(name, bytes([0x0F, 0xAE, modrm]))
        assert ours[name].run(asked) == theirs[name].run(asked)
        assert ours[name].run(asked).vector is None


@pytest.mark.parametrize("code", [
    "66f2 0f84 02000000", "66f3 0f85 02000000", "f266 0f8f 02000000",  # jcc
    "66f3 90", "f266 90", "f2 90", "f2 0fbcc1", "66f2 0fbdc1",
    "f2 63c1", "f3 4863c1", "67 63c1", "6567 63 03", "66 63c1",
], ids=lambda code: code)  # fmt: skip
def test_an_idle_prefix_changes_nothing(ours, theirs, code):
    asked = case("long64", bytes.fromhex(code), flags=0x246)
    mine, other = ours["long64"].run(asked), theirs["long64"].run(asked)
    assert mine.vector is None
    undefined = fl.ARITHMETIC & ~fl.ZF if "0fb" in code else 0
    if "66" not in code or "0f8" not in code:  # in Unicorn, a 66 makes a near branch 16 bits wide
        assert mine._replace(flags=mine.flags & ~undefined) == other._replace(flags=other.flags & ~undefined)


def test_salc_fills_al_with_the_carry_flag(ours, theirs):
    for name in ("real", "flat32"):
        for flags in (2, 3):
            asked = case(name, b"\xd6", flags)
            assert ours[name].run(asked) == theirs[name].run(asked)
    assert ours["long64"].run(case("long64", b"\xd6")).vector == UD


@pytest.mark.parametrize("name", ["real", "flat32", "long64"])
@pytest.mark.parametrize(
    "prefixes, rest", [(15, "90"), (16, "90"), (14, "01c0"), (13, "83c001"), (15, "0f0b"), (30, "")]
)
def test_an_instruction_of_more_than_15_bytes_is_a_general_protection_fault(ours, theirs, name, prefixes, rest):
    """(SDM vol. 3A, 6.15, interrupt 13; the last is made of nothing but prefixes.)"""
    for prefix in (b"\x2e", b"\x3e", b"\x66"):
        asked = case(name, prefix * prefixes + bytes.fromhex(rest))
        mine, other = ours[name].run(asked), theirs[name].run(asked)
        assert (mine.vector, mine.error_code) == (GP, 0)
        assert (mine.vector, mine.ip) == (other.vector, other.ip)


def test_an_instruction_of_15_bytes_is_not_too_long(ours):
    for name in ("real", "flat32", "long64"):
        assert ours[name].run(case(name, b"\x2e" * 14 + b"\x90")).vector is None


def test_15_bytes_that_are_no_instruction_with_fewer_prefixes_either_are_undefined(ours):
    assert ours["flat32"].run(case("flat32", b"\x2e" * 13 + b"\x0f\x04\0\0")).vector == UD
