"""Model-specific and control registers, and the instructions around them (Intel SDM vol. 2, 3A 2.5, 4)."""

from __future__ import annotations

import random

import pytest
from long_mode_guest import (
    CODE,
    KERNEL_CODE,
    KERNEL_CODE32,
    NOT_CANONICAL,
    TARGET,
    TSS16_SELECTOR,
    USER_CODE,
    USER_CODE32,
    LongModeGuest,
)

from mini_bhyve import msr
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import GP, UD
from mini_bhyve.operands import RAX, RBX, RCX, RDX
from mini_bhyve.registers import (
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_FSGSBASE,
    CR4_PAE,
    CR4_TSD,
    CR4_UMIP,
    EFER_LMA,
    EFER_LME,
)
from mini_bhyve.snapshot_state import restore_state, save_state

pytestmark = pytest.mark.both_readings

RDMSR, WRMSR = "0f32", "0f30"
ADDRESS, NOT_AN_ADDRESS = 0xFFFF8000_12345678, NOT_CANONICAL
MISSING = 0xC0000105


def with_value(program: str, number: int, value: int, code: int = KERNEL_CODE) -> LongModeGuest:
    """A program that finds `number` in ECX and `value` in EDX:EAX. The upper halves, which do not count, are not 0."""
    made = LongModeGuest(program, code)
    for register, half in ((RCX, number), (RDX, value >> 32), (RAX, value & 0xFFFFFFFF)):
        made.cpu.regs[register].value = 0xABCD << 32 | half
    return made


# --- Model-specific registers -----------------------------------------------------------------------------------------

TAKES = {
    msr.SYSENTER_CS: [(0x1234, 0x1234), (1 << 63 | 0x10, 0x10)],
    msr.SYSENTER_ESP: [(ADDRESS, ADDRESS), (NOT_AN_ADDRESS, None)],
    msr.SYSENTER_EIP: [(ADDRESS, ADDRESS), (NOT_AN_ADDRESS, None)],
    msr.STAR: [((1 << 64) - 1, (1 << 64) - 1)],
    msr.LSTAR: [(ADDRESS, ADDRESS), (NOT_AN_ADDRESS, None)],
    msr.CSTAR: [(ADDRESS, ADDRESS), (NOT_AN_ADDRESS, None)],
    msr.FMASK: [(0xFFFFFFFF, 0xFFFFFFFF), (1 << 32, None)],
    msr.PAT: [
        (0x0706_0504_0100_0000, 0x0706_0504_0100_0000),
        *((unknown << shift, None) for unknown, shift in ((2, 0), (3, 8), (8, 56), (0xFF, 24))),
    ],
    msr.FS_BASE: [(ADDRESS, ADDRESS), (NOT_AN_ADDRESS, None)],
    msr.GS_BASE: [(ADDRESS, ADDRESS), (NOT_AN_ADDRESS, None)],
    msr.KERNEL_GS_BASE: [(ADDRESS, ADDRESS), (NOT_AN_ADDRESS, None)],
    msr.TSC_AUX: [(0xFFFFFFFF, 0xFFFFFFFF), (1 << 32, None)],
    msr.EFER: [
        (0x501, 0x501),  # SCE, LME; LMA is read only
        (0xD00, 0xD00),  # NXE
        (0x101, 0x501),
        (0x401, None),  # LME cannot change while paging is on
        (0x502, None),  # reserved
        (0x2500, None),
        (1 << 63 | 0x500, None),
    ],
    MISSING: [(0, None)],
}


@pytest.mark.parametrize("number", TAKES, ids=hex)
def test_wrmsr_takes_what_a_register_may_hold_and_refuses_the_rest(number):
    for value, kept in TAKES[number]:
        made = with_value(WRMSR + RDMSR, number, value)
        before = dict(made.cpu.msrs), made.cpu.efer, [segment.base for segment in made.cpu.segments]
        made.run()
        if kept is None:
            assert made.fault() == (GP, 0, CODE)
            assert (made.cpu.msrs, made.cpu.efer, [segment.base for segment in made.cpu.segments]) == before
        else:
            assert made.ended_in is None
            assert made.cpu.regs[RDX].value << 32 | made.cpu.regs[RAX].value == kept


def test_rdmsr_refuses_a_register_that_is_not_there():
    assert with_value(RDMSR, MISSING, 0).run().fault() == (GP, 0, CODE)


@pytest.mark.parametrize("program", [RDMSR, WRMSR])
def test_model_specific_registers_are_for_level_0_only(program):
    assert with_value(program, msr.LSTAR, 0, USER_CODE).run().fault() == (GP, 0, CODE)


def test_the_base_that_is_written_is_the_one_that_is_used():
    made = LongModeGuest("65488b0425 10000000")  # mov rax, gs:[10h]
    made.words(0x9010, 0x1122334455667788)
    msr.write(made.cpu, msr.GS_BASE, 0x9000)
    made.run()
    assert made.cpu.regs[RAX].value == 0x1122334455667788


def test_bases_survive_the_way_to_level_3_and_back_while_the_selectors_are_null():
    """SDM vol. 2A, IRET: a null selector stays null; nothing is said of the base, and processors keep it."""
    # push 23h; push 7000h; push 2; push 2Bh; push 8012h; iretq; mov rax, fs:[10h]; int 80h
    made = LongModeGuest("6a23 6800700000 6a02 6a2b 6812800000 48cf 64488b0425 10000000 cd80")
    made.words(0x9010, 0x55)
    for index in (seg.FS, seg.GS):
        made.cpu.load_segment(index, 0)
    msr.write(made.cpu, msr.FS_BASE, 0x9000)
    msr.write(made.cpu, msr.GS_BASE, ADDRESS)
    made.run()
    assert made.ended_in == 0x80
    assert made.cpu.regs[RAX].value == 0x55
    assert made.cpu.segments[seg.GS].base == ADDRESS


# --- The time stamp ---------------------------------------------------------------------------------------------------

RDTSC, RDTSCP, RDPID = "0f31", "0f01f9", "f30fc7f8"


def test_the_time_stamp_counts_on_from_what_was_written():
    made = LongModeGuest("0f30 0f31")  # wrmsr; rdtsc
    registers = made.cpu.regs
    registers[RCX].value, registers[RDX].value, registers[RAX].value = msr.TIME_STAMP_COUNTER, 5, 0xFFFFFFF0
    made.run()
    assert registers[RDX].value << 32 | registers[RAX].value == (5 << 32 | 0xFFFFFFF0) + 100


def test_the_time_stamp_begins_at_zero_again_after_a_reset():
    made = LongModeGuest("90" * 50).run()
    assert made.cpu.time_stamp > 0
    made.cpu.reset()
    assert made.cpu.time_stamp == 0


@pytest.mark.parametrize("program", [RDTSC, RDTSCP])
@pytest.mark.parametrize(
    "code, cr4, vector", [(USER_CODE, 0, None), (USER_CODE, CR4_TSD, GP), (KERNEL_CODE, CR4_TSD, None)]
)
def test_tsd_keeps_the_time_stamp_from_programs(program, code, cr4, vector):
    made = LongModeGuest(program + "cd81", code)
    made.cpu.cr4 |= cr4
    made.run()
    assert made.ended_in == (vector or 0x81)


def test_rdtscp_and_rdpid_tell_what_tsc_aux_holds():
    made = LongModeGuest(RDTSCP + "f30fc7fb cd81", USER_CODE)  # rdpid rbx
    made.cpu.msrs[msr.TSC_AUX] = 0x89ABCDEF
    for register in (RAX, RBX, RCX, RDX):
        made.cpu.regs[register].value = (1 << 64) - 1
    made.run()
    assert made.ended_in == 0x81
    assert (made.cpu.regs[RCX].value, made.cpu.regs[RBX].value) == (0x89ABCDEF, 0x89ABCDEF)
    assert made.cpu.regs[RDX].value == 0


@pytest.mark.parametrize("code", [KERNEL_CODE, USER_CODE])
def test_rdpmc_finds_no_counter(code):
    assert LongModeGuest("0f33", code).run().fault() == (GP, 0, CODE)


# --- The bases of FS and GS -------------------------------------------------------------------------------------------

SWAPGS = "0f01f8"


def test_swapgs_exchanges_the_base_and_nothing_else():
    made = LongModeGuest(SWAPGS)
    before = made.cpu.segments[seg.GS]
    msr.write(made.cpu, msr.GS_BASE, ADDRESS)
    made.cpu.msrs[msr.KERNEL_GS_BASE] = 0x1234
    made.run()
    after = made.cpu.segments[seg.GS]
    assert (after.base, made.cpu.msrs[msr.KERNEL_GS_BASE]) == (0x1234, ADDRESS)
    assert (after.selector, after.limit, after.access) == (before.selector, before.limit, before.access)


@pytest.mark.parametrize("code, vector", [(USER_CODE, GP), (USER_CODE32, UD), (KERNEL_CODE32, UD)])
def test_swapgs_is_for_64_bit_code_of_level_0(code, vector):
    assert LongModeGuest(SWAPGS, code).run().ended_in == vector


READS = {seg.FS: ("f3480faec0", "f30faec0"), seg.GS: ("f3480faec8", "f30faec8")}  # rdfsbase rax; eax
WRITES = {seg.FS: ("f3480faed0", "f30faed0"), seg.GS: ("f3480faed8", "f30faed8")}


@pytest.mark.parametrize("index", [seg.FS, seg.GS])
def test_programs_may_read_and_write_the_bases_if_the_kernel_lets_them(index):
    for width, mask in enumerate(((1 << 64) - 1, 0xFFFFFFFF)):
        made = LongModeGuest(WRITES[index][width] + "31c0" + READS[index][0] + "cd81", USER_CODE)  # ...; xor eax, eax
        made.cpu.cr4 |= CR4_FSGSBASE
        made.cpu.regs[RAX].value = ADDRESS
        made.run()
        assert made.ended_in == 0x81
        assert made.cpu.segments[index].base == made.cpu.regs[RAX].value == ADDRESS & mask
        made = LongModeGuest(READS[index][width] + "cd81", USER_CODE)
        made.cpu.cr4 |= CR4_FSGSBASE
        msr.set_base(made.cpu, index, ADDRESS)
        made.cpu.regs[RAX].value = (1 << 64) - 1
        made.run()
        assert made.cpu.regs[RAX].value == ADDRESS & mask


@pytest.mark.parametrize("world", ["long64", "user64"])
def test_the_bases_are_read_and_written_as_on_unicorn(world):
    pytest.importorskip("unicorn")
    from unicorn_tools import WORLDS, Case, Ours, Theirs

    ours, theirs = Ours(WORLDS[world]), Theirs(WORLDS[world])
    controls = (ON, ours.cpu.cr3, CR4_PAE | CR4_FSGSBASE, EFER_LME | EFER_LMA)
    numbers = random.Random(world)
    for program in (
        "f3480faed0 f3480faec3",  # wrfsbase rax; rdfsbase rbx
        "f30faed0 f3480faec3",  # wrfsbase eax; rdfsbase rbx
        "f3480faed8 f30faecb",  # wrgsbase rax; rdgsbase ebx
        "f3490faedf f3480faecb",  # wrgsbase r15; rdgsbase rbx
        "f3480faec3 f3480faec9",  # rdfsbase rbx; rdgsbase rcx
    ):
        registers = tuple(numbers.getrandbits(47) for _ in range(16))
        case = Case(world, bytes.fromhex(program), registers, 2, instructions=2, controls=controls)
        mine, other = ours.run(case), theirs.run(case)
        assert (mine.vector, mine.ip, mine.registers) == (None, other.ip, other.registers), program


def test_a_base_that_is_not_canonical_is_refused():
    made = LongModeGuest(WRITES[seg.FS][0])
    made.cpu.cr4 |= CR4_FSGSBASE
    made.cpu.regs[RAX].value = NOT_AN_ADDRESS
    assert made.run().fault() == (GP, 0, CODE)


@pytest.mark.parametrize("program", [READS[seg.FS][0], WRITES[seg.GS][1]])
def test_without_fsgsbase_there_are_no_such_instructions(program):
    assert LongModeGuest(program).run().ended_in == UD


# --- UMIP -------------------------------------------------------------------------------------------------------------

STORES = {
    "sgdt": "0f0104 25 00900000",
    "sidt": "0f010c25 00900000",
    "sldt": "0f00c0",
    "str": "0f00c8",
    "smsw": "0f01e0",
}


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize(
    "code, cr4, vector", [(USER_CODE, 0, None), (USER_CODE, CR4_UMIP, GP), (KERNEL_CODE, CR4_UMIP, None)]
)
def test_umip_keeps_the_tables_from_programs(name, code, cr4, vector):
    made = LongModeGuest(STORES[name] + "cd81", code)
    made.cpu.cr4 |= cr4
    made.run()
    assert made.ended_in == (vector or 0x81)


# --- Control registers ------------------------------------------------------------------------------------------------

TO_CR = {0: "0f22c0", 3: "0f22d8", 4: "0f22e0", 8: "440f22c0"}  # mov crN, rax
FROM_CR8 = "440f20c3"  # mov rbx, cr8
ON = CR0_PE | CR0_ET | CR0_PG


@pytest.mark.parametrize(
    "number, value, vector",
    [
        (0, ON | 1 << 32, GP),  # there is no upper half
        (0, ON & ~CR0_PG, GP),  # 64-bit mode cannot do without paging
        (0, ON & ~CR0_PE, GP),  # nor paging without protected mode
        (0, ON | CR0_NW, GP),  # without CD
        (0, ON | CR0_NW | CR0_CD, None),
        (0, ON | 1 << 28, None),  # a reserved bit of the lower half is ignored
        (3, 0x20000 | 1 << 40, GP),  # beyond the physical addresses
        (3, 0x20000 | 0x18, None),
        (4, CR4_PAE | 1 << 32, GP),
        (4, 0, GP),  # long mode cannot do without PAE
        (4, CR4_PAE | 1 << 13, GP),  # VMXE
        (4, CR4_PAE | CR4_UMIP, None),
        (8, 15, None),
        (8, 16, GP),
        (8, 1 << 63, GP),
    ],
)
def test_a_control_register_refuses_what_it_may_not_hold(number, value, vector):
    made = LongModeGuest(TO_CR[number])
    made.cpu.regs[RAX].value = value
    before = [made.cpu.cr0, made.cpu.cr3, made.cpu.cr4, made.cpu.cr8]
    made.run()
    assert made.ended_in == vector
    if vector:
        assert made.fault() == (GP, 0, CODE)
        assert [made.cpu.cr0, made.cpu.cr3, made.cpu.cr4, made.cpu.cr8] == before
    else:
        assert {0: made.cpu.cr0, 3: made.cpu.cr3, 4: made.cpu.cr4, 8: made.cpu.cr8}[number] == value & ~(1 << 28)


def test_cr8_is_the_task_priority():
    made = LongModeGuest(TO_CR[8] + FROM_CR8)
    made.cpu.regs[RAX].value, made.cpu.regs[RBX].value = 9, (1 << 64) - 1
    made.run()
    assert (made.cpu.cr8, made.cpu.regs[RBX].value) == (9, 9)


@pytest.mark.parametrize("program, vector", [(TO_CR[8], GP), (FROM_CR8, GP), ("0f20c8", UD), ("440f20c8", UD)])
def test_control_registers_are_for_level_0_and_those_that_are_not_there_for_nobody(program, vector):
    assert LongModeGuest(program, USER_CODE).run().ended_in == vector


def test_a_processor_whose_task_register_holds_a_16_bit_tss_cannot_enter_long_mode():
    made = LongModeGuest("0f22c0", KERNEL_CODE32)  # mov cr0, eax
    cpu = made.cpu
    cpu.write_cr0(CR0_PE | CR0_ET)
    cpu.idtr_base, cpu.idtr_limit = 0x30000, 0x7FF
    made.words(0x30000 + 8 * GP, TARGET | KERNEL_CODE32 << 16 | 0x8E << 40)
    seg.load_tr(cpu, TSS16_SELECTOR)
    cpu.regs[RAX].value = ON
    made.run()
    assert made.ended_at == TARGET
    assert not cpu.cr0 & CR0_PG


def test_compatibility_mode_may_turn_long_mode_off():
    made = LongModeGuest("0f22c0", KERNEL_CODE32)
    made.cpu.regs[RAX].value = CR0_PE | CR0_ET
    made.run()
    assert not made.cpu.long_mode
    assert made.cpu.efer == 0x101


def test_lmsw_sets_pe_but_cannot_clear_it():
    made = LongModeGuest("0f01f0")
    made.cpu.regs[RAX].value = 0xFFF0
    made.run()
    assert made.cpu.cr0 == ON


@pytest.mark.parametrize("program", ["0f08", "0f09", "0f06", "0f01f0"])  # invd, wbinvd, clts, lmsw
def test_what_concerns_the_whole_processor_is_for_level_0_only(program):
    assert LongModeGuest(program, USER_CODE).run().fault() == (GP, 0, CODE)
    assert LongModeGuest(program, KERNEL_CODE).run().ended_in is None


# --- The state as a whole ---------------------------------------------------------------------------------------------


def test_a_snapshot_has_all_of_them():
    made, other = LongModeGuest(), LongModeGuest()
    cpu = made.cpu
    for position, number in enumerate(msr.KEPT):
        cpu.msrs[number] = 0x1000 + position
    cpu.cr8 = 7
    cpu.set_time_stamp(123456)
    restore_state(other.cpu, save_state(cpu))
    assert other.cpu.msrs == cpu.msrs
    assert (other.cpu.cr8, other.cpu.time_stamp) == (7, 123456)


def test_a_snapshot_from_before_there_were_any_leaves_them_as_they_are_after_a_reset():
    fields = save_state(LongModeGuest().cpu)
    for name in ["cr8", "tsc_offset", *(kept.name for kept in msr.KEPT.values())]:
        del fields[name]
    made = LongModeGuest()
    restore_state(made.cpu, fields)
    assert made.cpu.msrs == msr.after_reset()
    assert made.cpu.cr8 == 0


def test_a_reset_clears_them():
    made = LongModeGuest()
    made.cpu.msrs[msr.LSTAR] = made.cpu.msrs[msr.TSC_AUX] = 1
    made.cpu.cr8 = 3
    made.cpu.reset()
    assert made.cpu.msrs == msr.after_reset()
    assert made.cpu.cr8 == 0
