"""CPUID: what the processor says of itself, and that it says nothing that is not so (Intel SDM vol. 2A, CPUID)."""

from __future__ import annotations

import pytest

from mini_bhyve import cpuid as identification
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.cpuid import CR4_SUPPORTED, EAX, EBX, ECX, EDX, EFER_SUPPORTED, FEATURES, MAX_BASIC, cpuid
from mini_bhyve.faults import GuestFault
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RAX, RBX, RCX, RDX

pytestmark = pytest.mark.both_readings

EFER_LMA = 1 << 10


def text(*registers: int) -> bytes:
    return b"".join(register.to_bytes(4, "little") for register in registers).rstrip(b"\0")


def test_names_are_spelt_in_the_order_of_registers_that_the_manual_gives():
    _, ebx, ecx, edx = cpuid(0)
    assert text(ebx, edx, ecx) == b"GenuineIntel"
    assert text(*cpuid(0x40000000)[1:]) == b"bhyve bhyve "
    assert text(*cpuid(0x80000002), *cpuid(0x80000003), *cpuid(0x80000004)) == identification.BRAND


def test_a_bit_of_the_table_is_a_bit_of_the_answer():
    for (leaf, subleaf, register), features in FEATURES.items():
        assert leaf <= cpuid(leaf & 0x80000000)[EAX]
        for bit in range(32):
            answer = cpuid(leaf, subleaf, claim=True)[register]
            assert answer >> bit & 1 == (bit in features) or register == EAX


def test_only_some_leaves_look_at_the_subleaf():
    assert cpuid(1, 5) == cpuid(1, 0)
    assert cpuid(7, 0)[EBX] & 1
    assert cpuid(7, 1) == (0, 0, 0, 0)


@pytest.mark.parametrize("leaf", [MAX_BASIC + 1, 0x40000001, 0x7FFFFFFF, 0x80000009, 0xFFFFFFFF])
def test_beyond_the_last_leaf_comes_what_the_last_basic_one_says(leaf):
    assert cpuid(leaf) == cpuid(MAX_BASIC)


@pytest.mark.parametrize("leaf", [0x3, 0x4, 0x5, 0xA, 0xB, 0xD, 0x14])
def test_leaves_of_what_is_not_there_are_empty(leaf):
    assert cpuid(leaf) == (0, 0, 0, 0)


def test_syscall_is_offered_to_64_bit_code_only():
    assert cpuid(0x80000001, 0, 64)[EDX] >> 11 & 1
    assert not cpuid(0x80000001, 0, 32)[EDX] >> 11 & 1


def test_sysenter_is_not_taken_for_the_one_that_the_first_pentium_pro_had_not():
    """Family 6, model below 3, stepping below 3: the manual says how to tell them."""
    signature = cpuid(1)[EAX]
    family, model, stepping = signature >> 8 & 15, signature >> 4 & 15, signature & 15
    assert family == 6 and model >= 3 and stepping >= 3
    assert cpuid(1)[EDX] >> 11 & 1


def test_the_x87_and_how_to_save_it_are_claimed_where_a_guest_insists_on_it_and_nowhere_else():
    fpu_and_fxsr = 1 << 0 | 1 << 24
    assert cpuid(1, claim=True)[EDX] & fpu_and_fxsr == fpu_and_fxsr
    assert cpuid(1)[EDX] == cpuid(1, claim=True)[EDX] & ~fpu_and_fxsr


def test_neither_mmx_nor_sse_is_offered():
    assert not any(cpuid(1, claim=True)[EDX] >> bit & 1 for bit in (23, 25, 26))  # MMX, SSE, SSE2


def processor() -> Cpu:
    return Cpu(GuestMemory(1 << 20), IoPorts())


def test_what_may_be_set_in_cr4_is_what_is_offered():
    for bit in range(64):
        cpu = processor()
        if CR4_SUPPORTED >> bit & 1:
            cpu.write_control_register(4, 1 << bit)
            assert cpu.cr4 == 1 << bit
        else:
            with pytest.raises(GuestFault):
                cpu.write_control_register(4, 1 << bit)
            assert cpu.cr4 == 0


def test_what_may_be_set_in_efer_is_what_is_offered():
    for bit in range(64):
        cpu = processor()
        if EFER_SUPPORTED >> bit & 1:
            cpu.write_efer(1 << bit)
            assert cpu.efer == 1 << bit & ~EFER_LMA  # which is read only
        else:
            with pytest.raises(GuestFault):
                cpu.write_efer(1 << bit)


@pytest.mark.parametrize(
    "leaf, register, bit, cr4", [(1, EDX, 3, 4), (7, EBX, 0, 16), (7, ECX, 2, 11), (1, EDX, 13, 7), (1, EDX, 4, 2)]
)
def test_a_feature_with_a_switch_has_the_switch_that_the_manual_says(leaf, register, bit, cr4):
    """SDM vol. 3A, 2.5."""
    assert FEATURES[leaf, 0, register][bit].cr4 == 1 << cr4


def test_the_instruction_takes_leaf_and_subleaf_from_eax_and_ecx():
    cpu = processor()
    cpu.memory.load(0x1000, b"\x0f\xa2")
    cpu.set_code_segment(seg.real_mode_segment(0x100), 0)
    cpu.ip = 0
    cpu.regs[RAX].value, cpu.regs[RCX].value = 7, 0
    cpu.run(1)
    assert tuple(cpu.regs[index].value for index in (RAX, RBX, RCX, RDX)) == cpuid(7, 0)
