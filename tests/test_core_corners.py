"""Corners of the processor and of the run loop in which mistakes were found: each is a small program or a small
race.
"""

from __future__ import annotations

import threading

import pytest

from mini_bhyve import code_cache
from mini_bhyve import segmentation as seg
from mini_bhyve.config import Config
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import GP, PF, GuestFault, VmExit
from mini_bhyve.inout import IoPorts
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RAX, RCX, RDI, RDX, RSP

pytestmark = pytest.mark.both_readings

CODE = 0x1000


def real_mode_cpu(program: bytes) -> Cpu:
    """A processor in real mode, about to run `program` at 0000:1000; every interrupt vector leads to a HLT at
    0000:0F00.
    """
    memory = GuestMemory(16 << 20)
    memory.load(0, b"\x00\x0f\x00\x00" * 256)
    memory.load(0xF00, b"\xf4")
    memory.load(CODE, program)
    cpu = Cpu(memory, IoPorts())
    cpu.set_code_segment(seg.real_mode_segment(0), 0)
    cpu.ip = CODE
    cpu.regs[RSP].value = 0x800
    return cpu


def run_to_halt(cpu: Cpu, slice_of: int = 1000) -> None:
    while not cpu.halted:
        assert cpu.retired < 100_000
        cpu.attention = False
        cpu.run(cpu.retired + slice_of)


def test_real_mode_code_may_store_through_cs():
    cpu = real_mode_cpu(bytes.fromhex("b8 34 12  2e a3 00 20  f4"))  # mov ax, 1234h; mov cs:[2000h], ax; hlt
    run_to_halt(cpu)
    assert cpu.memory.read(0x2000, 2) == b"\x34\x12"


def test_a_frame_may_have_32_kib_and_more():
    cpu = real_mode_cpu(bytes.fromhex("bc 00f0  c8 00c0 00  f4"))  # mov sp, F000h; enter C000h, 0; hlt
    run_to_halt(cpu)
    assert cpu.regs[RSP].value == 0xF000 - 2 - 0xC000


def test_aam_divides_by_its_operand_and_not_by_zero():
    cpu = real_mode_cpu(bytes.fromhex("b0 53  d4 10  d4 00"))  # mov al, 53h; aam 16; aam 0
    run_to_halt(cpu)
    assert cpu.regs[RAX].value == 0x0503
    assert cpu.peek(0, 16) == CODE + 4  # #DE, at the second one


@pytest.mark.parametrize(
    "before, jump",
    [
        ("", "66 e9 00000100"),  # jmp beyond 64 KiB
        ("", "66 e8 00000100"),  # call
        ("66 b8 00000100", "66 ffe0"),  # mov eax, 10000h; jmp eax
        ("66 68 00000100", "66 c3"),  # push dword 10000h; ret
        ("66 68 00000100", "66 c2 0800"),  # ret 8
        ("b9 0500", "66 e2 80"),  # mov cx, 5; loop, to below 0
        ("0c01", "66 7580"),  # or al, 1; jnz
    ],
)
def test_a_jump_beyond_the_limit_is_a_fault_of_the_jump_and_nothing_has_changed(before, jump):
    setup = bytes.fromhex(before)
    cpu = real_mode_cpu(setup + bytes.fromhex(jump))
    cpu.set_code_segment(seg.real_mode_segment(CODE >> 4), 0)
    cpu.ip = 0
    if setup:
        cpu.run(1)
    registers = [register.value for register in cpu.regs]
    run_to_halt(cpu)
    assert cpu.peek(0, 16) == len(setup)  # where the handler would return to
    registers[RSP] -= 6
    assert [register.value for register in cpu.regs] == registers


@pytest.mark.parametrize("slice_of", [1, 2, 3, 1000])
def test_a_rep_that_overwrites_itself_counts_the_same_in_any_slices(slice_of):
    # mov cx, 8; mov di, 1009h; mov al, F4h; rep stosb: the last writes HLT over itself and what follows it
    cpu = real_mode_cpu(bytes.fromhex("b9 08 00  bf 08 10  b0 f4  f3 aa  90 90 90 90 90 90 90"))
    run_to_halt(cpu, slice_of)
    assert (cpu.regs[RCX].value, cpu.regs[RDI].value) == (0, 0x1010)
    assert cpu.instructions == 5


def test_decoded_code_that_was_overwritten_is_forgotten():
    # mov cx, 1000; again: mov byte [changed], 40h (inc ax); changed: nop; loop again; hlt
    cpu = real_mode_cpu(bytes.fromhex("b9 e8 03  c6 06 08 10 40  90  e2 f8  f4"))
    run_to_halt(cpu)
    assert cpu.regs[RAX].value == 1000
    assert len(cpu.code_cache.by_place) < 10
    assert all(block.steps for block in cpu.code_cache.by_place.values())


def test_far_calls_into_many_segments_leave_few_tables_behind():
    cpu = real_mode_cpu(b"")
    for selector in range(0x200, 0x600):
        cpu.set_code_segment(seg.real_mode_segment(selector), 0)
        cpu.forget_code()
    assert len(cpu.code_cache.by_ip) == 1


def test_code_does_not_run_on_from_the_end_of_its_segment_to_the_beginning():
    cpu = real_mode_cpu(b"")
    cpu.memory.load(0x1FFFF, b"\x90")  # at FFFFh
    cpu.set_code_segment(seg.real_mode_segment(0x1000), 0)
    cpu.ip = 0xFFFF
    cpu.run(1)
    assert cpu.ip == 0x10000
    run_to_halt(cpu)
    assert cpu.peek(0, 16) == 0  # of the IP at fault, 16 bits have room in the frame
    assert cpu.instructions == 3


def test_16_bit_code_runs_on_beyond_64_kib_in_a_segment_that_reaches_further():
    cpu = real_mode_cpu(b"")
    cpu.memory.load(0x1FFFF, b"\x40\x40\xf4")  # inc ax; inc ax; hlt
    cpu.set_code_segment(seg.Segment(0x1000, 0x10000, 0xFFFFF, seg.REAL_MODE_ACCESS), 0)
    cpu.ip = 0xFFFF
    run_to_halt(cpu)
    assert (cpu.regs[RAX].value, cpu.ip) == (2, 0x10002)


# --- Paging
# ---------------------------------------------------------------------------------------------------------------

DIRECTORY, TABLE = 0x10000, 0x11000
PAGE = 0x400000  # the linear page under test; the first 4 MiB are mapped 1:1 by one large page


def paged_cpu(program: str, table_entry: int) -> Cpu:
    """Flat 32-bit protected mode with paging, at CODE; `table_entry` maps PAGE."""
    memory = GuestMemory(16 << 20)
    memory.load(CODE, bytes.fromhex(program))
    memory.load(DIRECTORY, (0x83).to_bytes(4, "little") + (TABLE | 7).to_bytes(4, "little"))
    memory.load(TABLE, table_entry.to_bytes(4, "little"))
    cpu = Cpu(memory, IoPorts())
    code = seg.PRESENT | seg.CODE_OR_DATA | seg.BIG | seg.GRANULAR | seg.CODE | seg.READABLE
    data = seg.PRESENT | seg.CODE_OR_DATA | seg.BIG | seg.GRANULAR | seg.WRITABLE
    cpu.segments = [seg.Segment(0x10, 0, 0xFFFFFFFF, data) for _ in range(6)]
    cpu.segments[seg.CS] = seg.Segment(8, 0, 0xFFFFFFFF, code)
    cpu.write_control_register(4, 1 << 4)  # PSE
    cpu.write_control_register(3, DIRECTORY)
    cpu.write_cr0(1 << 31 | 1 << 16 | 1)  # PG, WP, PE
    cpu.ip = CODE
    cpu.regs[RSP].value = 0x9000
    return cpu


def test_a_page_fault_forgets_the_page_so_that_copy_on_write_needs_no_invlpg():
    # mov eax, [PAGE]; add dword [PAGE], 1; hlt. The handler maps another, writable, frame and returns.
    cpu = paged_cpu("a1 00004000  83 05 00004000 01  f4", table_entry=0x200000 | 1)
    memory = cpu.memory
    memory.load(0x200000, (100).to_bytes(4, "little"))
    memory.load(0x300000, (500).to_bytes(4, "little"))
    # mov dword [TABLE], 300003h; add esp, 4; iret
    memory.load(0x2000, bytes.fromhex("c7 05 00100100 03003000  83 c4 04  cf"))
    memory.load(0x3000 + 14 * 8, bytes.fromhex("00200800 008e0000"))  # IDT: an interrupt gate to 0008:2000
    memory.load(0x4000, bytes.fromhex("0000000000000000 ffff0000009bcf00 ffff00000093cf00"))  # GDT: null, code, data
    cpu.idtr_base, cpu.idtr_limit, cpu.gdtr_base, cpu.gdtr_limit = 0x3000, 0x7FF, 0x4000, 23
    run_to_halt(cpu)
    assert memory.read(0x200000, 4) == (100).to_bytes(4, "little")
    assert memory.read(0x300000, 4) == (501).to_bytes(4, "little")


@pytest.mark.parametrize(
    "code", ["d3 20", "d3 28", "d3 38", "d3 00", "d3 08", "d3 10", "d3 18", "0f a5 08", "0f ad 08", "63 08"],
    ids="shl shr sar rol ror rcl rcr shld shrd arpl".split(),
)  # fmt: skip
def test_a_destination_has_to_be_writable_even_if_it_does_not_change(code):
    # xor ecx, ecx; mov eax, PAGE; the instruction with [eax] and CL or CX; hlt
    cpu = paged_cpu(f"31c9  b8 00004000  {code}  f4", table_entry=0x200003)
    run_to_halt(cpu)
    assert int.from_bytes(cpu.memory.read(TABLE, 4), "little") & 0x40  # the page is dirty
    assert cpu.memory.read(0x200000, 4) == bytes(4)


@pytest.mark.parametrize(
    "code, first",
    [
        ("bf ff0f4000  6d", 0x1000),  # mov edi, PAGE + FFFh; insd
        ("0fae05 f00f4000", 0x1000),  # fxsave [PAGE + FF0h]
        ("bc f90f4000  6661", 0x1001),  # mov esp, PAGE + FF9h; popaw: skips the word of SP, which lies across
    ],
    ids=["insd", "fxsave", "popaw"],
)
def test_cr2_is_the_first_byte_of_the_page_behind_that_is_asked_for(code, first):
    cpu = paged_cpu(code, table_entry=0x200003)  # PAGE is there, and the one behind it is not
    with pytest.raises(VmExit):  # nor is a handler
        run_to_halt(cpu)
    assert cpu.cr2 == PAGE + first


def test_the_eight_bytes_of_cmpxchg8b_are_one_value_and_go_on_behind_offset_ffffh():
    cpu = paged_cpu("bf ffff0000  67 0fc70d  f4", table_entry=0)  # mov edi, FFFFh; cmpxchg8b [di]; hlt
    cpu.segments[seg.DS] = seg.Segment(0x10, 0x8000, 0xFFFFFFFF, cpu.segments[seg.DS].access)
    cpu.update_mode()
    cpu.memory.load(0x17FFF, bytes(range(1, 9)))
    run_to_halt(cpu)
    assert (cpu.regs[RAX].value, cpu.regs[RDX].value) == (0x04030201, 0x08070605)


def test_invlpg_forgets_all_of_a_large_page():
    cpu = paged_cpu("", table_entry=0)
    memory = cpu.memory
    memory.load(DIRECTORY + 8, (0x400083).to_bytes(4, "little"))  # 8-12 MiB -> 4-8 MiB, one large page
    memory.load(0x401000, b"old!")
    memory.load(0x801000, b"new!")
    assert (cpu.load(0x800000, 32), cpu.load(0x801000, 32)) == (0, int.from_bytes(b"old!", "little"))
    memory.load(DIRECTORY + 8, (0x800083).to_bytes(4, "little"))
    cpu.forget_page(0x800000)
    assert cpu.load(0x801000, 32) == int.from_bytes(b"new!", "little")


def test_an_instruction_beyond_the_limit_of_cs_is_not_run():
    cpu = real_mode_cpu(b"\x40" * 32 + b"\xf4")  # inc ax, 32 times
    cpu.set_code_segment(seg.Segment(0, 0, CODE + 8, seg.REAL_MODE_ACCESS), 0)
    cpu.ip = CODE
    run_to_halt(cpu)
    assert cpu.regs[RAX].value == 9


def test_an_instruction_that_crosses_the_limit_of_cs_does_not_touch_the_page_behind_it():
    cpu = paged_cpu("", table_entry=0x200003)
    cpu.memory.load(0x200FFF, b"\x05")  # the first byte of ADD EAX, constant; the next page is not there
    code = cpu.segments[seg.CS]
    for limit, vector in ((PAGE + 0xFFF, GP), (PAGE + 0x1000, PF)):
        cpu.segments[seg.CS] = seg.Segment(8, 0, limit, code.access)
        cpu.ip = PAGE + 0xFFF
        with pytest.raises(GuestFault) as caught:
            cpu.code_cache.find()
        assert caught.value.vector == vector


def test_decoded_code_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(code_cache, "MAX_BLOCKS", 8)
    cpu = real_mode_cpu(b"\x40\xeb\0" * 50 + b"\xf4")  # inc ax; jmp to the next: a block each
    run_to_halt(cpu)
    assert cpu.regs[RAX].value == 50
    assert 0 < len(cpu.code_cache.by_place) <= 8


def test_an_error_code_tells_exceptions_from_what_the_program_asked_for():
    """The bit EXT (SDM vol. 3A, 6.13): #UD through a gate that is not present gives 33h, INT 6 through it 32h."""
    for program, expected in (("0f 0b", 0x33), ("cd 06", 0x32)):
        cpu = paged_cpu(program, table_entry=0)
        memory = cpu.memory
        memory.load(0x2000, b"\xf4")
        memory.load(0x3000 + 6 * 8, bytes.fromhex("00200800 000e0000"))  # not present
        memory.load(0x3000 + 11 * 8, bytes.fromhex("00200800 008e0000"))  # #NP
        memory.load(0x4000, bytes.fromhex("0000000000000000 ffff0000009bcf00 ffff00000093cf00"))
        cpu.idtr_base, cpu.idtr_limit, cpu.gdtr_base, cpu.gdtr_limit = 0x3000, 0x7FF, 0x4000, 23
        run_to_halt(cpu)
        assert cpu.load_stack(cpu.regs[RSP].value, 32) == expected


# --- The run loop
# -------------------------------------------------------------------------------------------------------


def machine_with(program: bytes, clock: str, typed: bytes = b"") -> Machine:
    config = Config()
    config.set("clock", clock)
    machine = Machine(config, ScriptedConsole(typed))
    machine.load()
    machine.memory.load(0x7C00, program)
    return machine


def test_a_stop_that_comes_just_before_a_turn_is_not_lost():
    machine = machine_with(b"\xeb\xfe", "virtual")  # a jump to itself
    turn = machine.run_once

    def turn_after_a_stop() -> None:
        machine.stop(ExitCode.POWEROFF, "powered off")
        turn()

    machine.run_once = turn_after_a_stop  # type: ignore[method-assign]
    vcpu = threading.Thread(target=machine.run, daemon=True)
    vcpu.start()
    vcpu.join(20)
    assert not vcpu.is_alive()
    assert machine.cpu.instructions == 0


def test_a_paused_vm_that_is_stopped_cannot_be_paused_again():
    machine = machine_with(b"\xeb\xfe", "virtual")
    vcpu = threading.Thread(target=machine.run, daemon=True)
    vcpu.start()
    machine.pause_command(None)  # type: ignore[arg-type]
    machine.stop(ExitCode.POWEROFF, "powered off")
    with pytest.raises(Exception, match="ended"):
        machine.pause_command(None)  # type: ignore[arg-type]
    vcpu.join(20)
    assert not vcpu.is_alive()


@pytest.mark.parametrize("warm", [False, True])
def test_a_repeated_move_takes_as_long_whether_its_pages_are_in_the_tlb_or_not(warm):
    cpu = real_mode_cpu(bytes.fromhex("b9 00 60  be 00 20  bf 00 80  fc  f3 a4  f4"))  # 6000h bytes, 2000h -> 8000h
    if warm:
        for address in range(0x2000, 0xE000, 0x1000):
            cpu.store(address, cpu.load(address, 8), 8)
    run_to_halt(cpu)
    assert cpu.instructions == 4 + 6 + 1  # six stretches of 4096 elements
