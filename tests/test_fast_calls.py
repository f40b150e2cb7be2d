"""SYSCALL, SYSRET, SYSENTER and SYSEXIT, each with what the manual says of it (Intel SDM vol. 2B; vol. 3A, 5.8.7-8)."""

from __future__ import annotations

import random

import pytest
from long_mode_guest import (
    CODE,
    HANDLERS,
    KERNEL_CODE,
    KERNEL_CODE32,
    NOT_CANONICAL,
    STACK,
    TARGET,
    USER_CODE,
    USER_CODE32,
    USER_DATA,
    LongModeGuest,
)

from mini_bhyve import flags as fl
from mini_bhyve import msr
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import DB, GP, UD
from mini_bhyve.operands import RCX, RDX, RSP
from mini_bhyve.registers import EFER_LMA, EFER_LME, EFER_SCE

pytestmark = pytest.mark.both_readings

R11 = 11
SYSCALL, SYSRET, SYSRETQ, SYSENTER, SYSEXIT, SYSEXITQ = "0f05", "0f07", "480f07", "0f34", "0f35", "480f35"
FLAT = seg.PRESENT | seg.CODE_OR_DATA | seg.GRANULAR | seg.ACCESSED
HERE = CODE + 2  # behind an instruction of two bytes


def guest(program: str, code: int, selectors: int = 0x08) -> LongModeGuest:
    """The registers lead to TARGET; `selectors` is SYSENTER_CS, of which 8 fits the GDT for neither SYSEXIT."""
    made = LongModeGuest(program, code)
    msrs = made.cpu.msrs
    msrs[msr.STAR] = USER_CODE32 << 48 | KERNEL_CODE << 32
    msrs[msr.LSTAR] = msrs[msr.SYSENTER_EIP] = TARGET
    msrs[msr.SYSENTER_CS], msrs[msr.SYSENTER_ESP] = selectors, STACK - 0x100
    return made


def hidden_parts(made: LongModeGuest, index: int) -> tuple[int, int, int]:
    segment = made.cpu.segments[index]
    return segment.base, segment.limit, segment.access


# --- SYSCALL ----------------------------------------------------------------------------------------------------------


def test_syscall_goes_to_lstar_and_leaves_address_and_flags_in_registers():
    made = guest(SYSCALL, USER_CODE)
    made.cpu.msrs[msr.FMASK] = fl.IF | fl.DF
    made.cpu.write_eflags(fl.IF | fl.DF | fl.CF | fl.AC)
    made.run()
    cpu = made.cpu
    assert (made.ended_at, cpu.cpl, cpu.code_size) == (TARGET, 0, 64)
    assert (cpu.regs[RCX].value, cpu.regs[R11].value) == (HERE, fl.IF | fl.DF | fl.CF | fl.AC | fl.ALWAYS_ONE)
    assert cpu.eflags == fl.CF | fl.AC | fl.ALWAYS_ONE
    assert cpu.regs[RSP].value == STACK
    assert (made.selectors["cs"], made.selectors["ss"]) == (0x08, 0x10)


@pytest.mark.parametrize("mask, where", [(fl.TF, TARGET), (0, HANDLERS + DB * 16)])
def test_a_single_stepped_syscall_is_trapped_in_the_kernel_unless_fmask_clears_tf(mask, where):
    made = guest(SYSCALL, USER_CODE)
    made.cpu.msrs[msr.FMASK] = mask
    made.cpu.write_eflags(fl.TF)
    made.run()
    assert made.ended_at == where


def test_syscall_makes_its_segments_without_a_look_at_the_gdt():
    made = guest(SYSCALL, USER_CODE)
    made.cpu.msrs[msr.STAR] = 0x1237 << 32
    made.run()
    assert (made.selectors["cs"], made.selectors["ss"]) == (0x1234, 0x123F)
    assert hidden_parts(made, seg.CS) == (0, 0xFFFFFFFF, FLAT | seg.CODE | seg.READABLE | seg.LONG)
    assert hidden_parts(made, seg.SS_) == (0, 0xFFFFFFFF, FLAT | seg.WRITABLE | seg.BIG)


@pytest.mark.parametrize("code", [USER_CODE32, KERNEL_CODE32])
@pytest.mark.parametrize("instruction", [SYSCALL, SYSRET])
def test_syscall_and_sysret_exist_in_64_bit_mode_only(instruction, code):
    made = guest(instruction, code).run()
    assert made.ended_in == UD
    assert made.stack(1) == [CODE]


@pytest.mark.parametrize("instruction", [SYSCALL, SYSRET])
def test_syscall_and_sysret_must_be_enabled(instruction):
    made = guest(instruction, KERNEL_CODE)
    made.cpu.write_efer(made.cpu.efer & ~EFER_SCE)
    assert made.run().ended_in == UD


# --- SYSRET -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction, code_size, selector", [(SYSRETQ, 64, 0x2B), (SYSRET, 32, 0x1B)])
def test_sysret_goes_back_to_code_of_the_size_that_its_prefix_says(instruction, code_size, selector):
    made = guest(instruction, KERNEL_CODE)
    cpu = made.cpu
    cpu.regs[RCX].value, cpu.regs[R11].value = TARGET, fl.CF | fl.IF | fl.ALWAYS_ONE
    made.step()
    assert (cpu.ip, cpu.cpl, cpu.code_size) == (TARGET, 3, code_size)
    assert cpu.eflags == fl.CF | fl.IF | fl.ALWAYS_ONE
    assert (made.selectors["cs"], made.selectors["ss"]) == (selector, USER_DATA | 3)
    size, level = (seg.LONG if code_size == 64 else seg.BIG), 3 << seg.DPL_SHIFT
    assert hidden_parts(made, seg.CS) == (0, 0xFFFFFFFF, FLAT | level | seg.CODE | seg.READABLE | size)
    assert hidden_parts(made, seg.SS_) == (0, 0xFFFFFFFF, FLAT | level | seg.WRITABLE | seg.BIG)


def test_sysret_takes_all_flags_from_r11_but_rf_and_vm_and_those_that_do_not_exist():
    made = guest(SYSRETQ, KERNEL_CODE)
    made.cpu.regs[R11].value = (1 << 64) - 1 - fl.TF
    made.step()
    assert made.cpu.eflags == 0x3C7FD7 - fl.TF  # the number in the manual, and it has bit 1 set


@pytest.mark.parametrize("target", [NOT_CANONICAL, (1 << 64) - NOT_CANONICAL - 1])
def test_sysret_refuses_an_address_that_is_not_canonical_while_it_is_still_at_level_0(target):
    made = guest(SYSRETQ, KERNEL_CODE)
    made.cpu.regs[RCX].value = target
    made.run()
    assert made.fault() == (GP, 0, CODE)
    assert made.stack(3)[2] == KERNEL_CODE


def test_sysret_to_32_bit_code_uses_the_lower_half_of_rcx():
    made = guest(SYSRET, KERNEL_CODE)
    made.cpu.regs[RCX].value = 0xFEDC << 48 | TARGET
    made.step()
    assert made.cpu.ip == TARGET


def test_sysret_is_for_level_0_only():
    assert guest(SYSRETQ, USER_CODE).run().fault() == (GP, 0, CODE)


# --- SYSENTER ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [USER_CODE, USER_CODE32])
def test_sysenter_from_long_mode_goes_to_64_bit_code(code):
    made = guest(SYSENTER, code)
    made.cpu.write_eflags(fl.IF | fl.CF)
    made.run()
    cpu = made.cpu
    assert (made.ended_at, cpu.regs[RSP].value) == (TARGET, STACK - 0x100)
    assert (cpu.cpl, cpu.code_size, cpu.eflags) == (0, 64, fl.CF | fl.ALWAYS_ONE)
    assert (made.selectors["cs"], made.selectors["ss"]) == (0x08, 0x10)
    assert hidden_parts(made, seg.CS) == (0, 0xFFFFFFFF, FLAT | seg.CODE | seg.READABLE | seg.LONG)


def test_sysenter_uses_all_64_bits_of_its_registers_from_compatibility_mode_too():
    made = guest(SYSENTER, USER_CODE32)
    high = 0xFFFFFFFF80000000
    made.cpu.msrs[msr.SYSENTER_EIP], made.cpu.msrs[msr.SYSENTER_ESP] = high, high + 0x1000
    made.step()
    assert (made.cpu.ip, made.cpu.regs[RSP].value) == (high, high + 0x1000)


@pytest.mark.parametrize("selectors", [0, 3, 0x10003])
@pytest.mark.parametrize("instruction, code", [(SYSENTER, USER_CODE), (SYSENTER, KERNEL_CODE), (SYSEXIT, KERNEL_CODE)])
def test_a_null_selector_says_that_sysenter_has_not_been_set_up(instruction, code, selectors):
    assert guest(instruction, code, selectors).run().fault() == (GP, 0, CODE)


# --- SYSEXIT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction, code_size, selector", [(SYSEXIT, 32, 0x10), (SYSEXITQ, 64, 0x20)])
def test_sysexit_goes_back_to_code_of_the_size_that_its_prefix_says(instruction, code_size, selector):
    made = guest(instruction, KERNEL_CODE, 0x100)
    cpu = made.cpu
    cpu.regs[RDX].value, cpu.regs[RCX].value = TARGET, STACK - 0x200
    cpu.write_eflags(fl.IF | fl.CF)
    made.step()
    assert (cpu.ip, cpu.regs[RSP].value) == (TARGET, STACK - 0x200)
    assert (cpu.cpl, cpu.code_size, cpu.eflags) == (3, code_size, fl.IF | fl.CF | fl.ALWAYS_ONE)
    assert (made.selectors["cs"], made.selectors["ss"]) == (0x100 + selector | 3, 0x100 + selector + 8 | 3)
    size, level = (seg.LONG if code_size == 64 else seg.BIG), 3 << seg.DPL_SHIFT
    assert hidden_parts(made, seg.CS) == (0, 0xFFFFFFFF, FLAT | level | seg.CODE | seg.READABLE | size)
    assert hidden_parts(made, seg.SS_) == (0, 0xFFFFFFFF, FLAT | level | seg.WRITABLE | seg.BIG)


@pytest.mark.parametrize("register", [RCX, RDX])
def test_sysexit_to_64_bit_code_refuses_addresses_that_are_not_canonical(register):
    made = guest(SYSEXITQ, KERNEL_CODE)
    made.cpu.regs[register].value = NOT_CANONICAL
    assert made.run().fault() == (GP, 0, CODE)


def test_sysexit_to_32_bit_code_uses_the_lower_halves():
    made = guest(SYSEXIT, KERNEL_CODE)
    made.cpu.regs[RCX].value, made.cpu.regs[RDX].value = NOT_CANONICAL | STACK, NOT_CANONICAL | TARGET
    made.step()
    assert (made.cpu.ip, made.cpu.regs[RSP].value) == (TARGET, STACK)


@pytest.mark.parametrize("code", [USER_CODE, USER_CODE32])
def test_sysexit_is_for_level_0_only(code):
    assert guest(SYSEXIT, code).run().fault() == (GP, 0, CODE)


# --- Outside long mode ------------------------------------------------------------------------------------------------


def protected_mode_guest(program: str) -> LongModeGuest:
    """32-bit code of level 0 with paging and long mode off."""
    made = guest(program, KERNEL_CODE32, 0x100)
    made.cpu.write_cr0(0x11)
    made.cpu.write_efer(0)
    return made


def test_sysenter_and_sysexit_in_protected_mode_are_of_32_bits():
    made = protected_mode_guest(SYSENTER)
    cpu = made.cpu
    made.memory.load(TARGET, bytes.fromhex(SYSEXIT))
    cpu.msrs[msr.SYSENTER_EIP] |= 0xFFFFFFFF << 32
    made.step()
    assert (cpu.ip, cpu.regs[RSP].value, cpu.cpl, cpu.code_size) == (TARGET, STACK - 0x100, 0, 32)
    assert hidden_parts(made, seg.CS) == (0, 0xFFFFFFFF, FLAT | seg.CODE | seg.READABLE | seg.BIG)
    cpu.regs[RCX].value, cpu.regs[RDX].value = STACK, HERE
    made.step()
    assert (cpu.ip, cpu.regs[RSP].value, cpu.cpl) == (HERE, STACK, 3)
    assert (made.selectors["cs"], made.selectors["ss"]) == (0x113, 0x11B)


def test_sysenter_is_a_way_out_of_virtual_8086_mode():
    made = protected_mode_guest(SYSENTER)
    cpu = made.cpu
    cpu.write_eflags(fl.VM | fl.IF | fl.CF)
    cpu.segments = [seg.virtual_8086_segment(0) for _ in range(6)]
    cpu.cpl = 3
    cpu.update_mode()
    made.step()
    assert (cpu.ip, cpu.regs[RSP].value, cpu.cpl, cpu.code_size) == (TARGET, STACK - 0x100, 0, 32)
    assert cpu.eflags == fl.CF | fl.ALWAYS_ONE
    assert (made.selectors["cs"], made.selectors["ss"]) == (0x100, 0x108)


@pytest.mark.parametrize("instruction", [SYSENTER, SYSEXIT])
def test_sysenter_and_sysexit_are_refused_in_real_mode(instruction):
    made = protected_mode_guest(instruction)
    cpu = made.cpu
    cpu.write_cr0(0x10)
    cpu.idtr_base, cpu.idtr_limit = 0x30000, 0x3FF
    made.memory.load(0x30000 + 4 * GP, TARGET.to_bytes(4, "little"))
    made.step()
    assert cpu.ip == TARGET


# --- The ways back, on Unicorn's processor as well (for the ways there it has hooks) ----------------------------------


@pytest.mark.parametrize("instruction", [SYSRET, SYSRETQ, SYSEXIT, SYSEXITQ])
def test_a_return_leaves_the_same_registers_as_on_unicorn(instruction):
    pytest.importorskip("unicorn")
    from unicorn import x86_const as uc
    from unicorn_tools import WORLDS, Case, Ours, Theirs

    world = WORLDS["long64"]
    ours, theirs = Ours(world), Theirs(world)
    numbers = random.Random(instruction)
    msrs = {msr.STAR: 0x18 << 48, msr.SYSENTER_CS: 0x108, msr.EFER: EFER_LME | EFER_LMA | EFER_SCE}
    for number, value in msrs.items():
        theirs.uc.reg_write(uc.UC_X86_REG_MSR, (number, value))
    theirs.beginning = theirs.uc.context_save()
    for _ in range(50):
        registers = [numbers.getrandbits(64) for _ in range(16)]
        registers[RCX], registers[RDX] = numbers.getrandbits(16) + 0x10000, numbers.getrandbits(15) + 0x10000
        registers[R11] &= ~fl.TF  # which Unicorn would act upon
        case = Case(world.name, bytes.fromhex(instruction), tuple(registers), numbers.getrandbits(8) | fl.IF | 2)
        other = theirs.run(case)
        ours.begin(case)
        for number, value in msrs.items():
            msr.write(ours.cpu, number, value)
        mine = ours.go_on(1)
        assert mine.vector is None
        # From R11 Unicorn takes RF, VM and reserved bits as well, but neither VIF nor VIP.
        mask = 0x3C7FD7 & ~(fl.VIF | fl.VIP)
        assert (mine.ip, mine.selectors, mine.flags & mask) == (other.ip, other.selectors, other.flags & mask), case
        wide = instruction in (SYSRETQ, SYSEXITQ)
        low = (1 << (64 if wide else 32)) - 1  # nothing is said of the upper halves outside 64-bit mode
        assert [value & low for value in mine.registers[:8]] == [value & low for value in other.registers[:8]]
