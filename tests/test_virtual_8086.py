"""Virtual-8086 mode (Intel SDM vol. 3B, chapter 20): a task as if in real mode, and what its monitor gets to see.

The 8086 program is at 2000:0000 (linear 20000h) with its stack at 3000:0100; a HLT in it is an exception. Its monitor's
stack is that of level 0 in the TSS.
"""

from __future__ import annotations

import pytest
from protected_guest import INTERRUPT_GATE, INTERRUPT_GATE_16, LEVEL_3, STACK0, TSS, Guest, assemble

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import GP, OF, SS, UD
from mini_bhyve.operands import RAX, RBX, RSP

pytestmark = pytest.mark.both_readings

PROGRAM, PROGRAM_SEGMENT, STACK_SEGMENT = 0x20000, 0x2000, 0x3000


def virtual_8086(program: str, iopl: int = 0, flags: int = 0) -> Guest:
    """A guest whose monitor has just begun the 8086 program by IRET: ES 1111h, DS 2222h, FS 3333h, GS 4444h."""
    image = fl.VM | fl.ALWAYS_ONE | iopl << 12 | flags
    frame = [0x4444, 0x3333, 0x2222, 0x1111, STACK_SEGMENT, 0x100, image, PROGRAM_SEGMENT, 0]
    pushes = "".join("68" + value.to_bytes(4, "little").hex() for value in frame)
    guest = Guest(pushes + "cf")
    guest.memory.load(PROGRAM, assemble(program))
    guest.cpu.run(10)
    assert guest.cpu.virtual_8086_mode
    return guest


def test_iret_with_vm_set_in_the_flags_enters_it():
    cpu = virtual_8086("").cpu
    assert [segment.selector for segment in cpu.segments] == [0x1111, 0x2000, 0x3000, 0x2222, 0x3333, 0x4444]
    assert all((s.base, s.limit, s.dpl) == (s.selector << 4, 0xFFFF, 3) for s in cpu.segments)
    assert (cpu.ip, cpu.regs[RSP].value, cpu.cpl, cpu.code_size) == (0, 0x100, 3, 16)
    assert cpu.describe_mode() == "virtual-8086 mode"


def test_segments_are_loaded_and_jumped_to_as_in_real_mode():
    # mov ax, 4567h; mov ds, ax; mov byte [8], 5Ah; jmp 2001:0010
    guest = virtual_8086("b8 6745 8ed8 c606 0800 5a ea 1000 0120")
    guest.cpu.attention = False
    guest.cpu.run(guest.cpu.retired + 4)
    assert guest.memory.read(0x45678, 1) == b"\x5a"
    assert (guest.cpu.segments[seg.CS].base, guest.cpu.ip, guest.cpu.cpl) == (0x20010, 0x10, 3)


def test_an_exception_leaves_it_for_level_0_with_all_segments_on_the_stack():
    guest = virtual_8086("40 f4")  # inc ax; hlt, which only level 0 may
    guest.run()
    assert guest.ended_in == GP
    image = fl.VM | fl.RF | fl.ALWAYS_ONE
    frame = [0, 1, 0x2000, image, 0x100, 0x3000, 0x1111, 0x2222, 0x3333, 0x4444]
    assert guest.stack(10) == frame
    assert guest.cpu.regs[RSP].value == STACK0 - 40
    cpu = guest.cpu
    assert [cpu.segments[index].selector for index in (seg.ES, seg.DS, seg.FS, seg.GS)] == [0] * 4
    assert all(cpu.segments[index].access & seg.UNUSABLE for index in (seg.ES, seg.DS, seg.FS, seg.GS))
    assert (cpu.cpl, cpu.virtual_8086_mode, cpu.segments[seg.SS_].selector) == (0, False, 0x10)


def test_the_monitor_returns_to_where_it_was():
    guest = virtual_8086("cd 80 40 f4")  # int 80h; inc ax; hlt
    guest.cpu.system_flags |= fl.IOPL
    guest.memory.load(0x2000 + 0x80 * 16, b"\xcf")  # iret
    guest.run()
    assert guest.ended_in == GP
    assert guest.stack(3)[1:] == [3, 0x2000]
    assert guest.cpu.regs[RAX].value == 1


@pytest.mark.parametrize("program", ["fa", "fb", "9c", "9d", "66 9c", "66 9d", "cd 80", "cf", "66 cf"])
def test_flags_and_interrupts_are_the_monitors_unless_iopl_is_3(program):
    guest = virtual_8086(program)
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (GP, [0, 0])


def test_with_iopl_3_the_interrupt_flag_is_the_tasks_own():
    guest = virtual_8086("fb fa fb 9c 58 f4", iopl=3)  # sti; cli; sti; pushf; pop ax; hlt
    guest.run()
    assert guest.cpu.regs[RAX].value == fl.IOPL | fl.IF | fl.ALWAYS_ONE
    assert guest.stack(4)[3] == fl.VM | fl.IOPL | fl.IF | fl.RF | fl.ALWAYS_ONE


def test_popf_and_iret_change_neither_iopl_nor_vm():
    # push dword 0; popfd; push dword 0; push cs; push 0Dh...; iretd; at 0Fh: hlt
    guest = virtual_8086("66 6a00 66 9d  66 6a00 66 0e 66 6a0f 66 cf 90 f4", iopl=3)
    guest.run()
    assert (guest.ended_in, guest.stack(4)) == (GP, [0, 0x10, 0x2000, fl.VM | fl.IOPL | fl.RF | fl.ALWAYS_ONE])


def test_into_and_int3_are_not_the_monitors_but_go_through_the_idt():
    guest = virtual_8086("b07f 0401 ce")  # mov al, 7Fh; add al, 1; into
    guest.gate(OF, INTERRUPT_GATE | LEVEL_3)
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (OF, [5, 0x2000])


def test_a_gate_that_level_3_may_not_use_is_refused():
    guest = virtual_8086("cd 0d", iopl=3)
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (GP, [GP * 8 + 2, 0])


def test_a_handler_must_be_at_level_0():
    guest = virtual_8086("cd 80", iopl=3)
    guest.gate(0x80, INTERRUPT_GATE | LEVEL_3, selector=0x18)  # code of level 3
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (GP, [0x18, 0])


def test_a_conforming_handler_is_refused_as_it_would_run_at_level_3():
    guest = virtual_8086("cd 80", iopl=3)
    guest.gate(0x80, INTERRUPT_GATE | LEVEL_3, selector=0x68)
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (GP, [0x68, 0])


def test_a_16_bit_gate_pushes_words():
    guest = virtual_8086("cd 80", iopl=3)
    guest.gate(0x80, INTERRUPT_GATE_16 | LEVEL_3)
    guest.run()
    assert guest.ended_in == 0x80
    words = [guest.cpu.peek(2 * n, 16) for n in range(9)]
    assert words == [2, 0x2000, fl.IOPL | fl.ALWAYS_ONE, 0x100, 0x3000, 0x1111, 0x2222, 0x3333, 0x4444]


@pytest.mark.parametrize("iopl", [0, 3])
def test_ports_are_allowed_by_the_bit_map_alone(iopl):
    guest = virtual_8086("e4 40 e4 41 f4", iopl)  # in al, 40h; in al, 41h
    guest.memory.load(TSS + 0x66, b"\x68\x00" + b"\xff" * 8 + b"\x02\xff")
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (GP, [0, 2])


@pytest.mark.parametrize(
    "program, vector",
    [
        ("a1 ffff", GP),  # mov ax, [FFFFh]: the second byte lies beyond the limit
        ("bc 0100 50", SS),  # mov sp, 1; push ax
        ("0f00c8", UD),  # str ax: not recognized
        ("0f01f0", GP),  # lmsw ax
        ("0f20c0", GP),  # mov eax, cr0
        ("63c0", UD),  # arpl
    ],
)
def test_what_real_mode_or_level_3_forbids_is_forbidden(program, vector):
    guest = virtual_8086(program)
    guest.run()
    assert guest.ended_in == vector


def test_smsw_tells_an_8086_program_that_it_is_in_protected_mode():
    guest = virtual_8086("0f01e3 f4")  # smsw bx
    guest.run()
    assert guest.cpu.regs[RBX].value & 1


def test_an_outer_level_cannot_enter_it():
    guest = Guest(level_3="6a00 68 02000200 6a1b 68 40800000 cf")  # an IRET frame with VM set, at level 3
    guest.memory.load(0x8040, b"\xf4")
    guest.run()
    assert not guest.cpu.virtual_8086_mode
    assert guest.ended_in == GP
