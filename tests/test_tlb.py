"""The TLB: what it remembers, and that it forgets what the manual says, when the manual says it (vol. 3A, 4.10).

Only our processor can be asked: Unicorn knows neither global pages nor PAE's PDPTE registers, and a guest may not rely
on more than is tested here. Where pages are changed behind the TLB's back, the tests that say "still" hold this
processor to less flushing than the manual allows, since that is what the TLB is for.
"""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn")

from unicorn_tools import CODE, DESCRIPTORS, GDT, usual_memory

from mini_bhyve import flags as fl
from mini_bhyve import paging
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import GP, PF, GuestFault
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.new_stack import NewStack
from mini_bhyve.operands import RAX, RBX, RCX, RSI, RSP
from mini_bhyve.paging import ACCESSED, DIRTY, EXECUTE_DISABLE, GLOBAL, PAGE_SIZE_BIT, PRESENT, WRITABLE
from mini_bhyve.registers import (
    CR0_CD,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CR4_TSD,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
)  # fmt: skip
from mini_bhyve.snapshot_state import restore_state, save_state
from mini_bhyve.task_switch import LAYOUT_32, NewTask, load_registers

pytestmark = pytest.mark.both_readings

DIRECTORY, TABLE, STACK = 0x10000, 0x11000, 0x9000
PAGE, OLD, NEW = 0x400000, 0x20000, 0x30000  # a linear page, and two frames that it is mapped to
HANDLER, IDT = 0x2000, 0x3000


def machine(program: str, entry: int) -> Cpu:
    """A processor in flat 32-bit mode with paging, at `program` (in hex). The first 4 MiB are mapped to themselves.

    `entry` maps PAGE. A page fault leads to a HLT, with the error code on the stack.
    """
    memory = GuestMemory(1 << 20)
    memory.load(CODE, bytes.fromhex(program))
    memory.load(DIRECTORY, (TABLE + 0x1000 | 7).to_bytes(4, "little") + (TABLE | 7).to_bytes(4, "little"))
    memory.load(TABLE, entry.to_bytes(4, "little"))
    memory.load(TABLE + 0x1000, b"".join((page << 12 | 7).to_bytes(4, "little") for page in range(256)))
    memory.load(GDT, usual_memory()[GDT : GDT + 8 * len(DESCRIPTORS)])
    memory.load(HANDLER, b"\xf4")
    memory.load(IDT + 8 * PF, (HANDLER | 8 << 16 | 0x8E00 << 32).to_bytes(8, "little"))
    memory.load(OLD, (0x01D).to_bytes(4, "little"))
    memory.load(NEW, (0x3E3).to_bytes(4, "little"))
    cpu = Cpu(memory, IoPorts())
    cpu.gdtr_base, cpu.gdtr_limit = GDT, 8 * len(DESCRIPTORS) - 1
    cpu.idtr_base, cpu.idtr_limit = IDT, 0x7FF
    cpu.cr0 = CR0_PE
    for index in range(6):
        selector = 8 if index == seg.CS else 0x10
        cpu.segments[index] = seg.read_descriptor(cpu, selector).segment(selector)
    cpu.write_control_register(3, DIRECTORY)
    cpu.write_cr0(CR0_PG | CR0_WP | CR0_PE)
    cpu.regs[RSP].value = STACK
    cpu.ip = CODE
    return cpu


def run(cpu: Cpu) -> None:
    while not cpu.halted:
        assert cpu.retired < 1000
        cpu.attention = False
        cpu.run(cpu.retired + 100)


def table_entry(cpu: Cpu) -> int:
    return int.from_bytes(cpu.memory.read(TABLE, 4), "little")


READ_EAX, READ_EBX, READ_ECX = "a1 00004000", "8b1d 00004000", "8b0d 00004000"  # mov eax, [PAGE] ...
MAP_NEW = "c705 00100100 07000300"  # mov dword [TABLE], NEW | 7
INVLPG, RELOAD_CR3 = "0f013d 00004000", "0f20d8 0f22d8"
TOGGLE_PGE = "0f20e0 3580000000 0f22e0"  # mov eax, cr4; xor eax, 80h; mov cr4, eax
TOGGLE_WP = "0f20c0 3500000100 0f22c0"  # mov eax, cr0; xor eax, 10000h; mov cr0, eax
STORE = "c605 00004000 55"  # mov byte [PAGE], 55h


@pytest.mark.parametrize("flush", [INVLPG, RELOAD_CR3, TOGGLE_PGE], ids=["INVLPG", "MOV CR3", "CR4.PGE"])
def test_a_changed_page_table_counts_at_the_latest_after_the_tlb_was_told(flush):
    cpu = machine(READ_EAX + "89c6" + MAP_NEW + READ_EBX + flush + READ_ECX + "f4", OLD | 7)  # (89 c6: mov esi, eax)
    run(cpu)
    assert cpu.regs[RSI].value == 0x1D
    assert cpu.regs[RBX].value in (0x1D, 0x3E3)  # the manual allows both
    assert cpu.regs[RCX].value == 0x3E3


def test_invlpg_of_another_page_leaves_the_rest_of_the_tlb_as_good_as_it_was():
    cpu = machine(READ_EAX + "0f013d 00104000" + READ_EBX + "f4", OLD | 7)
    run(cpu)
    assert cpu.regs[RAX].value == cpu.regs[RBX].value == 0x1D


def test_a_page_is_dirty_only_once_it_was_written():
    cpu = machine(READ_EAX + "90 eb00 90" + STORE + "f4", OLD | 7)
    cpu.run(1)
    assert table_entry(cpu) & (ACCESSED | DIRTY) == ACCESSED
    run(cpu)
    assert table_entry(cpu) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    assert cpu.memory.read(OLD, 1) == b"\x55"


def test_a_dirty_bit_that_was_cleared_is_set_again_by_the_next_store():
    clear = "8025 00100100 bf"  # and byte [TABLE], ~40h
    cpu = machine(STORE + clear + INVLPG + READ_EAX + "f4", OLD | 7)
    run(cpu)
    assert not table_entry(cpu) & DIRTY
    cpu = machine(STORE + clear + INVLPG + READ_EAX + STORE + "f4", OLD | 7)
    run(cpu)
    assert table_entry(cpu) & DIRTY


def test_setting_wp_ends_the_stores_to_a_read_only_page_that_went_well_before():
    cpu = machine(TOGGLE_WP + STORE + TOGGLE_WP + STORE + "f4", OLD | PRESENT)
    run(cpu)
    assert cpu.ip == HANDLER + 1
    assert cpu.cr2 == PAGE
    assert cpu.peek(0, 32) == 3  # error code: present, write
    assert cpu.memory.read(OLD, 1) == b"\x55"  # the first one


def test_a_page_that_the_supervisor_has_read_is_still_closed_to_the_user():
    # mov eax, [PAGE]; then by IRET to level 3, where it is read again
    to_user = "6a23 68 00700000 6a02 6a1b 68 16800000 cf"  # push 23h, 7000h, 2, 1Bh, the address behind this; iret
    assert CODE + len(bytes.fromhex(READ_EAX + to_user)) == 0x8016
    load_ds = "6a23 1f"  # push 23h; pop ds
    cpu = machine(READ_EAX + to_user + load_ds + READ_EBX + "f4", OLD | PRESENT | WRITABLE)
    cpu.tr = seg.Segment(0x88, 0x5000, 0x67, 0x8B)
    cpu.memory.load(0x5004, (STACK).to_bytes(4, "little") + (0x10).to_bytes(4, "little"))
    run(cpu)
    assert cpu.ip == HANDLER + 1
    assert cpu.cr2 == PAGE
    assert cpu.peek(0, 32) == 5  # present, user
    assert cpu.regs[RBX].value == 0


def test_a_store_across_pages_is_done_on_both_or_on_none():
    # mov dword [PAGE - 2], 11223344h, the second page being read-only
    cpu = machine("c705 feff3f00 44332211 f4", OLD | PRESENT)
    cpu.memory.load(TABLE + 0x1000 + 0xFFC, (NEW | 7).to_bytes(4, "little"))
    cpu.memory.load(NEW, bytes(0x1000))
    run(cpu)
    assert (cpu.cr2, cpu.peek(0, 32)) == (PAGE, 3)
    assert cpu.memory.read(NEW, 0x1000) == bytes(0x1000)


CALL_PAGE = "bd00004000 ffd5"  # mov ebp, PAGE; call ebp


@pytest.mark.parametrize("flush", [INVLPG, RELOAD_CR3, TOGGLE_PGE], ids=["INVLPG", "MOV CR3", "CR4.PGE"])
def test_code_that_ran_at_an_address_is_forgotten_with_its_page(flush):
    cpu = machine(CALL_PAGE + MAP_NEW + flush + CALL_PAGE + "f4", OLD | 7)
    cpu.memory.load(OLD, bytes.fromhex("bb01000000 c3"))  # mov ebx, 1; ret
    cpu.memory.load(NEW, bytes.fromhex("bb02000000 c3"))
    run(cpu)
    assert cpu.regs[RBX].value == 2


# --- Global pages -----------------------------------------------------------------------------------------------------

SET_PGE = "b880000000 0f22e0"  # mov eax, 80h; mov cr4, eax


def test_a_global_page_outlives_a_new_cr3_and_no_other_page_does():
    for flags, expected in ((GLOBAL, 0x1D), (0, 0x3E3)):
        cpu = machine(SET_PGE + READ_EAX + MAP_NEW + RELOAD_CR3 + READ_ECX + "f4", OLD | 7 | flags)
        run(cpu)
        assert cpu.regs[RCX].value == expected


def test_without_pge_a_page_is_global_for_nobody():
    cpu = machine(READ_EAX + MAP_NEW + RELOAD_CR3 + READ_ECX + "f4", OLD | 7 | GLOBAL)
    run(cpu)
    assert cpu.regs[RCX].value == 0x3E3


@pytest.mark.parametrize("flush", [INVLPG, TOGGLE_PGE], ids=["INVLPG", "CR4.PGE"])
def test_a_global_page_is_forgotten_with(flush):
    cpu = machine(SET_PGE + READ_EAX + MAP_NEW + RELOAD_CR3 + flush + READ_ECX + "f4", OLD | 7 | GLOBAL)
    run(cpu)
    assert cpu.regs[RCX].value == 0x3E3


def test_a_page_that_was_global_and_is_not_any_more_goes_with_the_next_cr3():
    cpu = machine("", OLD | 7 | GLOBAL)
    cpu.write_control_register(4, CR4_PGE)
    assert cpu.load(PAGE, 32) == 0x1D
    cpu.memory.load(TABLE, (OLD | 7).to_bytes(4, "little"))
    cpu.store(PAGE, 0x1E, 32)  # it enters for writing, too, now without the bit
    cpu.memory.load(TABLE, (NEW | 7).to_bytes(4, "little"))
    cpu.write_cr3(DIRECTORY)
    assert cpu.load(PAGE, 32) == 0x3E3


# --- Large pages ------------------------------------------------------------------------------------------------------


def test_invlpg_of_a_large_page_leaves_the_others_as_they_were():
    cpu = machine("", OLD | 7)
    cpu.write_control_register(4, CR4_PSE)
    for number in (2, 3):
        cpu.memory.load(DIRECTORY + 4 * number, (PAGE_SIZE_BIT | 7).to_bytes(4, "little"))
    cpu.memory.load(0, b"zero")
    for linear in (0x800000, 0x820000, 0xC00000):
        cpu.load(linear, 32)
    cpu.load(PAGE, 32)
    cpu.memory.load(DIRECTORY + 4, bytes(4) * 3)  # nothing is mapped any more
    cpu.forget_page(0x833000)
    for linear in (0x800000, 0x820000):
        with pytest.raises(GuestFault):
            cpu.load(linear, 32)
    assert cpu.load(0xC00000, 32) == int.from_bytes(b"zero", "little")
    assert cpu.load(PAGE, 32) == 0x1D


def test_a_4_mbyte_page_may_lie_beyond_4_gib_where_there_is_no_memory():
    cpu = machine("", 0)
    cpu.write_control_register(4, CR4_PSE)
    cpu.memory.load(DIRECTORY + 8, (1 << 13 | PAGE_SIZE_BIT | 7).to_bytes(4, "little"))
    assert cpu.load(0x800000, 32) == 0xFFFFFFFF
    cpu.store(0x800000, 1, 32)
    assert cpu.load(0x800000, 32) == 0xFFFFFFFF


def test_a_tlb_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(paging, "TLB_PAGES", 8)
    cpu = machine("", OLD | 7)
    for page in range(100):
        cpu.store(page << 12 | 0x800, cpu.load(page << 12, 32), 32)
    assert all(len(tlb) <= 8 for tlb in cpu.mmu.tlbs())


# --- SMEP and SMAP ----------------------------------------------------------------------------------------------------

SET_SMAP = "b800002000 0f22e0"  # mov eax, 200000h; mov cr4, eax
STAC, CLAC = "0f01cb", "0f01ca"
SET_AC_BY_POPF, CLEAR_AC_BY_POPF = "68 02000400 9d", "6a02 9d"  # push 40002h; popf
SET_AC_BY_IRET = "68 02000400 0e e800000000 83042406 cf 90"  # push 40002h; push cs; call $+5; add [esp], 6; iret; nop


def supervisor_only(cpu: Cpu) -> None:
    """The first 4 MiB, with program and stack, are the supervisor's."""
    table = TABLE + 0x1000
    entries = b"".join((page << 12 | PRESENT | WRITABLE).to_bytes(4, "little") for page in range(256))
    cpu.memory.load(table, entries)


@pytest.mark.parametrize("before", ["", STAC + READ_EAX + CLAC, SET_AC_BY_POPF + READ_EAX + CLEAR_AC_BY_POPF])
def test_under_smap_a_user_page_is_closed_to_the_supervisor_whether_it_is_in_the_tlb_or_not(before):
    cpu = machine(SET_SMAP + before + READ_EBX + "f4", OLD | 7)
    supervisor_only(cpu)
    run(cpu)
    assert (cpu.ip, cpu.cr2, cpu.peek(0, 32)) == (HANDLER + 1, PAGE, 1)
    assert cpu.regs[RAX].value == (0x1D if before else CR4_SMAP)


@pytest.mark.parametrize("opening", [STAC, SET_AC_BY_POPF, SET_AC_BY_IRET], ids=["STAC", "POPF", "IRET"])
def test_under_smap_a_user_page_is_open_to_the_supervisor_with_ac_set_by(opening):
    cpu = machine(SET_SMAP + opening + READ_EBX + "f4", OLD | 7)
    supervisor_only(cpu)
    run(cpu)
    assert cpu.regs[RBX].value == 0x1D
    assert cpu.eflags & fl.AC


def test_under_smap_ac_does_not_open_user_pages_to_the_processor_itself():
    cpu = machine("", OLD | 7)
    cpu.write_control_register(4, CR4_SMAP)
    cpu.system_flags |= fl.AC
    assert cpu.load(PAGE, 32) == 0x1D
    cpu.gdtr_base = PAGE
    with pytest.raises(GuestFault) as caught:
        seg.read_descriptor(cpu, 0x10)
    assert (caught.value.vector, caught.value.error_code, caught.value.address) == (PF, 1, PAGE + 0x10)


def test_under_smap_ac_opens_a_stack_on_a_user_page_but_not_to_the_way_into_an_inner_level():
    cpu = machine("", OLD | 7)
    cpu.write_control_register(4, CR4_SMAP)
    cpu.system_flags |= fl.AC
    stack = PAGE + 0x100
    NewStack(cpu, cpu.segments[seg.SS_], stack, 0).push(0x1234, 32)
    assert cpu.memory.read(OLD + 0xFC, 4) == (0x1234).to_bytes(4, "little")
    cpu.cpl = 3
    cpu.update_mode()
    NewStack(cpu, cpu.segments[seg.SS_], stack, 3).push(0x1234, 32)
    with pytest.raises(GuestFault) as caught:
        NewStack(cpu, cpu.segments[seg.SS_], stack, 0).push(0x1234, 32)
    assert (caught.value.vector, caught.value.error_code, caught.value.address) == (PF, 3, stack - 4)


def test_stac_and_clac_are_for_level_0():
    for code in (STAC, CLAC):
        cpu = machine(code, OLD | 7)
        cpu.cpl = 3
        cpu.update_mode()
        with pytest.raises(GuestFault, match="#UD"):
            for definition, arguments, _ in cpu.code_cache.find().steps:
                definition(*arguments)


def test_setting_smep_ends_the_execution_of_user_pages_at_the_next_instruction():
    # mov eax, 100000h; mov cr4, eax; inc ebx: it begins a new block, on the same page
    cpu = machine("43 b800001000 0f22e0 43 f4", OLD | 7)
    cpu.memory.load(TABLE + 0x1000 + 4 * (HANDLER >> 12), (HANDLER | 3).to_bytes(4, "little"))
    run(cpu)
    assert cpu.regs[RBX].value == 1
    assert (cpu.ip, cpu.cr2, cpu.peek(0, 32)) == (HANDLER + 1, CODE + 9, 0x11)  # present, fetch


# --- PAE's PDPTE registers --------------------------------------------------------------------------------------------

PDPT, DIRECTORIES = 0x20020, (0x22000, 0x23000)  # the topmost table needs no more than 32 bytes


def pae_cpu() -> Cpu:
    """PAE paging; a large page at 0, to itself, through the first PDPTE; the other directory maps another content."""
    memory = GuestMemory(8 << 20)
    memory.load(PDPT, (DIRECTORIES[0] | PRESENT).to_bytes(8, "little"))
    for number, directory in enumerate(DIRECTORIES):
        entry = number << 21 | PAGE_SIZE_BIT | WRITABLE | PRESENT
        memory.load(directory, entry.to_bytes(8, "little"))
    memory.load(2 << 20, b"\1")
    cpu = Cpu(memory, IoPorts())
    cpu.cr0 = CR0_PE
    cpu.write_control_register(4, CR4_PAE)
    cpu.write_control_register(3, PDPT)
    cpu.write_cr0(CR0_PG | CR0_PE)
    assert cpu.load(0, 8) == 0
    memory.load(PDPT, (DIRECTORIES[1] | PRESENT).to_bytes(8, "little"))
    return cpu


def test_a_pdpte_that_was_changed_in_memory_counts_only_after_a_load():
    cpu = pae_cpu()
    cpu.forget_page(0)
    assert cpu.load(0, 8) == 0
    cpu.write_control_register(3, PDPT)
    assert cpu.load(0, 8) == 1


def test_a_task_switch_loads_the_pdptes_with_cr3():
    cpu = pae_cpu()
    load_registers(cpu, NewTask(PDPT, 0, 2, [0] * 8, [0] * 6, 0, False), LAYOUT_32)
    assert cpu.load(0, 8) == 1


@pytest.mark.parametrize("bit, loads", [(CR4_PGE, 1), (CR4_PSE, 1), (CR4_SMEP, 1), (CR4_TSD, 0), (CR4_SMAP, 0)])
def test_a_mov_to_cr4_loads_the_pdptes_if_it_changes_one_of_four_bits(bit, loads):
    cpu = pae_cpu()
    cpu.write_control_register(4, CR4_PAE | bit)
    cpu.flush_tlb()
    assert cpu.load(0, 8) == loads


@pytest.mark.parametrize("bit, loads", [(CR0_CD, 1), (CR0_WP, 0)])
def test_a_mov_to_cr0_loads_the_pdptes_if_it_changes_paging_or_caching(bit, loads):
    cpu = pae_cpu()
    cpu.write_cr0(cpu.cr0 | bit)
    cpu.flush_tlb()
    assert cpu.load(0, 8) == loads


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 51, 52, 62, 63])
def test_a_reserved_bit_in_a_pdpte_that_is_present_is_refused_by_whatever_loads_it(bit):
    cpu = pae_cpu()
    cpu.memory.load(PDPT + 24, (1 << bit | PRESENT).to_bytes(8, "little"))
    before = cpu.cr0, cpu.cr3, cpu.cr4
    attempts = (
        lambda: cpu.write_control_register(3, PDPT | 8),
        lambda: cpu.write_control_register(4, CR4_PAE | CR4_PGE),
        lambda: cpu.write_cr0(cpu.cr0 | CR0_CD),
    )
    for attempt in attempts:
        with pytest.raises(GuestFault) as caught:
            attempt()
        assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert (cpu.cr0, cpu.cr3, cpu.cr4) == before
    assert cpu.load(0, 8) == 0  # none was loaded
    cpu.memory.load(PDPT + 24, (1 << bit).to_bytes(8, "little"))  # not present: then it may
    cpu.write_control_register(3, PDPT)
    assert cpu.load(0, 8) == 1


def test_a_pdpte_that_is_not_present_is_a_page_fault():
    with pytest.raises(GuestFault) as caught:
        pae_cpu().load(0x40000000, 8)
    assert (caught.value.vector, caught.value.error_code, caught.value.address) == (PF, 0, 0x40000000)


def test_a_snapshot_holds_the_pdptes():
    cpu = pae_cpu()
    other = Cpu(cpu.memory, IoPorts())
    restore_state(other, save_state(cpu))
    assert cpu.load(0, 8) == other.load(0, 8) == 0


# --- Control registers ------------------------------------------------------------------------------------------------


def test_cr3_has_no_more_bits_than_a_physical_address():
    cpu = machine("", OLD | 7)
    cpu.write_control_register(3, DIRECTORY | 1 << 39)
    with pytest.raises(GuestFault, match="#GP"):
        cpu.write_control_register(3, DIRECTORY | 1 << 40)


# --- Addresses at the end ---------------------------------------------------------------------------------------------


def long_mode_cpu() -> Cpu:
    """64-bit paging: 1 GiB at 0, and the topmost GiB, both to physical address 0."""
    memory = GuestMemory(1 << 20)
    for address, entry in ((0x1000, 0x2003), (0x1FF8, 0x2003), (0x2000, 0x83), (0x2FF8, 0x83), (0x2020, 0x83)):
        memory.load(address, entry.to_bytes(8, "little"))
    cpu = Cpu(memory, IoPorts())
    cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer = CR0_PE | CR0_PG, 0x1000, CR4_PAE, EFER_LME | EFER_LMA | EFER_NXE
    cpu.segments[seg.CS] = seg.Segment(8, 0, 0xFFFFFFFF, seg.PRESENT | seg.CODE_OR_DATA | seg.CODE | seg.LONG)
    cpu.update_paging()
    cpu.update_mode()
    return cpu


def test_descriptor_tables_may_lie_across_and_beyond_4_gib_even_for_32_bit_code():
    cpu = long_mode_cpu()
    cpu.segments[seg.CS] = seg.Segment(8, 0, 0xFFFFFFFF, seg.PRESENT | seg.CODE_OR_DATA | seg.CODE | seg.BIG)
    cpu.update_mode()
    cpu.memory.load(0x7FFC, bytes(range(8)))
    assert cpu.load_system(0x1_0000_7FFC, 64) == int.from_bytes(bytes(range(8)), "little")
    cpu.store_system(0x1_0000_8FFC, 0x1122334455667788, 64)
    assert cpu.memory.read(0x8FFC, 8) == (0x1122334455667788).to_bytes(8, "little")


def test_without_long_mode_linear_addresses_end_at_4_gib():
    cpu = machine("", OLD | 7)
    cpu.memory.load(0x7000, b"seven")
    assert cpu.load_system(0x1_0000_7000, 32) == int.from_bytes(b"seve", "little")


def test_an_access_at_the_end_of_all_addresses_goes_on_at_the_beginning():
    cpu = long_mode_cpu()
    cpu.memory.load(0, b"\x11\x22")
    end = 1 << 64
    assert cpu.load(end - 2, 32) == 0x2211FFFF  # the end is where no memory is
    assert cpu.load(end - (1 << 30), 16) == 0x2211


@pytest.mark.parametrize("address", [0x7FFF_FFFF_FFFE, 0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFE])
def test_what_is_not_canonical_even_in_its_last_byte_is_refused(address):
    cpu = long_mode_cpu()
    cpu.memory.load(0x1000 + 255 * 8, (0x2003).to_bytes(8, "little"))
    for access in (lambda: cpu.load(address, 32), lambda: cpu.store(address, 0, 32)):
        with pytest.raises(GuestFault) as caught:
            access()
        assert (caught.value.vector, caught.value.error_code) == (GP, 0)


def test_page_tables_where_no_memory_is_have_all_bits_set_and_so_reserved_ones():
    cpu = long_mode_cpu()
    cpu.write_cr3(1 << 30)
    with pytest.raises(GuestFault) as caught:
        cpu.load(0, 8)
    assert (caught.value.vector, caught.value.error_code) == (PF, 9)


def test_execute_disable_holds_for_a_whole_gigabyte():
    cpu = long_mode_cpu()
    cpu.memory.load(0x2000, (EXECUTE_DISABLE | 0x83).to_bytes(8, "little"))
    cpu.ip = 0x8000
    with pytest.raises(GuestFault) as caught:
        cpu.code_cache.find()
    assert (caught.value.vector, caught.value.error_code, caught.value.address) == (PF, 0x11, 0x8000)
    assert cpu.load(0x8000, 8) == 0
