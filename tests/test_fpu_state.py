"""The state of x87 and SSE is kept, though nothing computes with it; and CR0 and CR4 say who may touch it."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("unicorn")  # the worlds are shared with it

from hypothesis import given, settings
from hypothesis import strategies as st
from unicorn_tools import DATA, WORLDS, Case, Ours, Theirs

from mini_bhyve.faults import GP, MF, NM, UD, Unsupported
from mini_bhyve.registers import CR0_EM, CR0_MP, CR0_NE, CR0_TS, CR4_OSFXSR

pytestmark = pytest.mark.both_readings

RSI, RDI = 6, 7
SOURCE, FIRST, SECOND = DATA, DATA + 0x400, DATA + 0x800
FXRSTOR, FXSAVE = b"\x0f\xae\x0e", b"\x0f\xae\x07"  # [esi]; [edi]
ST, XMM = slice(32, 160), slice(160, 416)


@pytest.fixture(scope="module", params=["flat32", "long64"])
def world(request):
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def ours(world):
    return Ours(world)


@pytest.fixture(scope="module")
def theirs(world):
    return Theirs(world)


def case(world, code, count, image=b"", controls=None):
    registers = [0] * (16 if world.bits == 64 else 8)
    registers[RSI], registers[RDI], registers[4] = SOURCE, FIRST, DATA + 0x2000
    memory = ((SOURCE, bytes(image)), (FIRST, bytes(0x800)))
    return Case(world.name, code, tuple(registers), 2, memory, count, controls=controls)


def well_formed(image: bytearray, simd: int) -> bytearray:
    """An image as FXSAVE stores it: reserved bits as they come out, and nothing where nothing is stored."""
    image[0:2] = (int.from_bytes(image[0:2], "little") & 0x1F3F | 0x40).to_bytes(2, "little")
    control, status = image[0], int.from_bytes(image[2:4], "little") & ~0x8080
    status |= 0x8080 if status & ~control & 0x3F else 0
    image[2:4] = status.to_bytes(2, "little")
    image[5], image[7] = 0, image[7] & 7
    image[26:28], image[28:32] = b"\0\0", b"\xff\xff\0\0"
    for register in range(8):
        image[42 + 16 * register : 48 + 16 * register] = bytes(6)
    image[160 + 16 * simd :] = bytes(512 - 160 - 16 * simd)
    return image


images = st.binary(min_size=512, max_size=512).map(bytearray)


@settings(max_examples=60, deadline=None)
@given(image=images)
def test_what_fxrstor_loads_fxsave_stores(ours, world, image):
    image = well_formed(image, 16 if world.bits == 64 else 8)
    image[14:16] = image[22:24] = b"\0\0"  # behind a selector
    done = ours.run(case(world, FXRSTOR + FXSAVE, 2, image))
    assert done.vector is None
    assert done.memory[FIRST : FIRST + 512] == image


@settings(max_examples=30, deadline=None)
@given(image=images)
def test_the_forms_for_64_bits_keep_whole_pointers(image):
    world = WORLDS["long64"]
    image = well_formed(image, 16)
    done = Ours(world).run(case(world, b"\x48" + FXRSTOR + b"\x48" + FXSAVE, 2, image))
    assert done.memory[FIRST : FIRST + 512] == image


@settings(max_examples=60, deadline=None)
@given(image=images, width=st.sampled_from([16, 32]))
def test_the_same_registers_come_out_in_all_formats_as_on_unicorn(ours, theirs, world, image, width):
    image[0] |= 0x3F  # Unicorn's FNSTENV does not mask the exceptions
    image = well_formed(image, 16 if world.bits == 64 else 8)
    image[6:24] = bytes(18)  # nor are pointers kept there
    prefix = b"\x66" if width == 16 else b""
    # fxrstor [esi]; fxsave [edi]; fnstenv [edi + 200h]; fnsave [edi + 280h]; fxsave [edi + 400h]
    code = FXRSTOR + FXSAVE + prefix + b"\xd9\xb7\0\2\0\0" + prefix + b"\xdd\xb7\x80\2\0\0" + b"\x0f\xae\x87\0\4\0\0"
    asked = case(world, code, 5, image)
    mine, other = ours.run(asked), theirs.run(asked)
    assert mine.vector is other.vector is None
    for base in (FIRST, FIRST + 0x400):
        same = [(0, 5), (24, 28), (160, 512)] + [(32 + 16 * n, 42 + 16 * n) for n in range(8)]
        for start, end in same:
            assert mine.memory[base + start : base + end] == other.memory[base + start : base + end], (base, start)
    for base in (FIRST + 0x200, FIRST + 0x280):
        for word in range(3):
            start = base + word * width // 8
            assert mine.memory[start : start + 2] == other.memory[start : start + 2]
    registers = slice(FIRST + 0x280 + 7 * width // 8, FIRST + 0x280 + 7 * width // 8 + 80)
    assert mine.memory[registers] == other.memory[registers]


@settings(max_examples=40, deadline=None)
@given(image=images, width=st.sampled_from([16, 32]), name=st.sampled_from(["real", "flat32", "long64"]))
def test_frstor_and_fldenv_load_what_fnsave_stores(image, width, name):
    world = WORLDS[name]
    image = well_formed(image, 0)
    image[0:4] = image[0:1] + b"\x03\0\x38"  # all exceptions masked, so that none is pending
    image[0] |= 0x3F
    prefix = b"\x66" if (width == 16) != (world.bits == 16) else b""
    registers = [0] * (16 if world.bits == 64 else 8)
    if world.real:
        image[16:20], image[8:12] = image[16:18] + b"\x0c\0", image[8:10] + b"\x03\0"  # linear addresses of 20 bits
        image[12:14] = image[20:22] = b"\0\0"
        registers[RSI], registers[RDI], memory = 0, 0x400, ((0x10000, bytes(image)), (0x10400, bytes(0x800)))
        load, save = b"\x0f\xae\x0c", b"\xdd\xb5"
        distance, base = (lambda n: n.to_bytes(2, "little")), 0x10400
    else:
        registers[RSI], registers[RDI], memory = SOURCE, FIRST, ((SOURCE, bytes(image)), (FIRST, bytes(0x800)))
        load, save = FXRSTOR, b"\xdd\xb7"
        distance, base = (lambda n: n.to_bytes(4, "little")), FIRST
    # fxrstor; fnsave; frstor; fnsave elsewhere
    restore = bytes([save[0], save[1] & ~0x38 | 0x20])
    code = load + prefix + save + distance(0) + prefix + restore + distance(0) + prefix + save + distance(0x200)
    done = Ours(world).run(Case(name, code, tuple(registers), 2, memory, 4))
    assert done.vector is None
    size = 7 * width // 8 + 80
    assert done.memory[base : base + size] == done.memory[base + 0x200 : base + 0x200 + size]
    assert done.memory[base : base + 2] == image[0:2]
    if not world.real and width == 32:
        assert done.memory[base + 12 : base + 16] == image[8:12], "the instruction's offset"
        assert done.memory[base + 16 : base + 20] == image[12:14] + image[6:8], "its selector and opcode"
        assert done.memory[base + 20 : base + 26] == image[16:22], "the operand's offset and selector"
    if world.real:
        ip = int.from_bytes(image[8:12], "little")
        word = int.from_bytes(done.memory[base + 4 * width // 8 :][:2], "little")
        assert word == (ip >> 16 << 12 | int.from_bytes(image[6:8], "little")) & 0xFFFF


def test_after_fninit_the_registers_are_empty_and_all_exceptions_masked(ours, world):
    done = ours.run(case(world, b"\xdb\xe3" + FXSAVE, 2))
    assert done.memory[FIRST : FIRST + 8] == bytes.fromhex("7f03 0000 00 00 0000")


@pytest.mark.parametrize("code", [FXRSTOR, FXSAVE, b"\x0f\xae\x4e\x08", b"\x0f\xae\x47\x01"])
def test_an_image_lies_at_a_multiple_of_16(ours, world, code):
    image = well_formed(bytearray(512), 0)
    assert ours.run(case(world, code, 1, image)).vector == (None if len(code) == 3 else GP)


@pytest.mark.parametrize("bit", range(16, 32))
def test_a_reserved_bit_of_mxcsr_is_a_general_protection_exception_and_nothing_is_loaded(ours, world, bit):
    image = bytearray(512)
    image[24:28] = (1 << bit).to_bytes(4, "little")
    done = ours.run(case(world, FXRSTOR, 1, image))
    assert (done.vector, done.error_code) == (GP, 0)
    assert ours.cpu.fpu.control == 0x40, "as after a reset"
    assert ours.run(case(world, b"\x0f\xae\x56\x18", 1, image)).vector == GP, "ldmxcsr [esi + 18h]"


def test_without_osfxsr_fxsave_leaves_mxcsr_and_xmm_alone(ours, world):
    cr0, _, cr3, cr4 = world.controls
    controls = (cr0, cr3, cr4 & ~CR4_OSFXSR, ours.controls[3])
    image = bytearray(b"\xff" * 512)  # MXCSR too, which nobody looks at
    done = ours.run(case(world, FXRSTOR + FXSAVE, 2, image, controls))
    assert done.vector is None
    assert done.memory[FIRST + 24 : FIRST + 32] == bytes(8) and not any(done.memory[FIRST:][XMM])
    assert ours.cpu.fpu.mxcsr == 0x1F80 and not any(ours.cpu.fpu.xmm)


# --- Who may: CR0.EM, TS and MP, CR4.OSFXSR ---------------------------------------------------------------------------

X87, OTHER_X87, PRESENT_X87, WAIT, MMX, EMMS, SSE, MXCSR, STATE, VEX = (
    b"\xd9\xe8", b"\xdc\xd1", b"\xdb\xe3", b"\x9b", b"\x0f\xfc\xc1", b"\x0f\x77", b"\x0f\x58\xc1", b"\x0f\xae\x1f",
    FXSAVE, b"\xc5\xf8\x58\xc1",
)  # fmt: skip


def expected(code, em, mp, ts, osfxsr):
    """SDM vol. 3A, table 2-2 (x87), table 12-1 (MMX), 13.1.4 (SSE); #UD where CPUID does not offer what would run."""
    if code == WAIT:
        return NM if mp and ts else None
    if code in (X87, OTHER_X87, PRESENT_X87, STATE):
        return NM if em or ts else UD if code in (X87, OTHER_X87) else None
    if code in (MMX, EMMS):
        return UD if em else NM if ts else UD
    if code in (SSE, MXCSR):
        return UD if em or not osfxsr else NM if ts else UD if code == SSE else None
    return UD


@pytest.mark.parametrize("code", [X87, OTHER_X87, PRESENT_X87, WAIT, MMX, EMMS, SSE, MXCSR, STATE, VEX], ids=bytes.hex)
def test_control_bits_decide_between_a_missing_unit_and_an_invalid_opcode(ours, theirs, world, code):
    for bits in itertools.product((False, True), repeat=4):
        em, mp, ts, osfxsr = bits
        cr0, _, cr3, cr4 = world.controls
        cr0 |= em * CR0_EM | mp * CR0_MP | ts * CR0_TS
        asked = case(world, code, 1, controls=(cr0, cr3, cr4 & ~CR4_OSFXSR | osfxsr * CR4_OSFXSR, ours.controls[3]))
        vector = ours.run(asked).vector
        assert vector == expected(code, *bits), bits
        if code not in (X87, OTHER_X87, MMX, EMMS, SSE, VEX):
            assert theirs.run(asked).vector == vector, bits
        elif vector == NM:
            assert theirs.run(asked).vector == NM, bits


def test_the_same_code_raises_another_exception_after_ts_has_changed(ours, world):
    code = b"\x0f\x06" + X87  # clts first
    cr0, _, cr3, cr4 = world.controls
    asked = case(world, X87, 1, controls=(cr0 | CR0_TS, cr3, cr4, ours.controls[3]))
    assert ours.run(asked).vector == NM
    assert ours.run(asked._replace(code=code, instructions=2)).vector == UD


# --- Exceptions that are still to be reported -------------------------------------------------------------------------


@pytest.mark.parametrize("code, vector", [
    (WAIT, MF), (b"\xd9\x2e", MF), (b"\xd9\x26", MF), (b"\xdd\x26", MF),  # wait; fldcw, fldenv, frstor [esi]
    (PRESENT_X87 + WAIT, None), (b"\xdb\xe2" + WAIT, None), (FXSAVE, None),  # fninit; fnclex; fxsave
    (b"\xdd\x37" + WAIT, None), (b"\xd9\x37" + WAIT, None),  # fnsave; fnstenv, which masks
])  # fmt: skip
def test_an_exception_that_was_loaded_is_reported_by_the_next_instruction_that_waits(ours, world, code, vector):
    image = bytearray(512)
    image[0:4] = bytes.fromhex("7b03 0400")  # a division by zero, which is not masked
    cr0, _, cr3, cr4 = world.controls
    controls = (cr0 | CR0_NE, cr3, cr4, ours.controls[3])
    done = ours.run(case(world, FXRSTOR + code, 1 + (2 if vector is None and code != FXSAVE else 1), image, controls))
    assert done.vector == vector


def test_fldcw_can_unmask_an_exception_and_fnstsw_shows_it(ours, world):
    image = bytearray(512)
    image[0:4] = bytes.fromhex("7f03 0400")
    image[256:258] = bytes.fromhex("7b03")
    # fxrstor [esi]; fnstsw [edi]; fldcw [esi + 100h]; fnstsw ax
    done = ours.run(case(world, FXRSTOR + b"\xdd\x3f" + b"\xd9\xae\0\1\0\0" + b"\xdf\xe0", 4, image))
    assert done.memory[FIRST : FIRST + 2] == bytes.fromhex("0400")
    assert done.registers[0] == 0x8084


def test_an_exception_that_should_leave_by_a_pin_ends_the_vm_with_a_sentence(ours, world):
    image = bytearray(512)
    image[0:4] = bytes.fromhex("7b03 0400")
    with pytest.raises(Unsupported, match="CR0.NE = 0"):
        ours.run(case(world, FXRSTOR + WAIT, 2, image))
