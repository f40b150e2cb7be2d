"""Hardware task switches: the processor saves all its registers in one TSS and loads them from another.

Mirrors Intel SDM vol. 3A, chapter 7 (Task Management). What leads here:

    JMP, CALL     to the selector of a TSS, or of a task gate
    INT, faults   through a task gate in the IDT
    IRET          with EFLAGS.NT set: back to the task whose selector the current TSS begins with

                  old TSS     new TSS     EFLAGS.NT of the     first word of
                  busy        busy        old      new         the new TSS
    JMP           cleared     set         -        -           -
    CALL, INT     stays       set         -        set         the old task's selector
    IRET          cleared     is already  cleared  -           -

A TSS (figures 7-2 and 7-10). The processor writes what is between the lines, and reads that and what is starred:

            32 bits                      16 bits
     0      selector of the last task     0
     4-1B   ESP0 SS0 ... ESP2 SS2         2-D
    1C      CR3 *                         -
            -----------------------------------
    20      EIP, 24 EFLAGS                E, 10
    28-47   EAX ECX EDX EBX               12-21
            ESP EBP ESI EDI
    48-5F   ES CS SS DS FS GS             22-29   ES CS SS DS
            -----------------------------------
    60      LDT *                        2A
    64      T * (bit 0)                   -
    66      where the I/O map begins      -
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.debug import TASK_SWITCHED
from mini_bhyve.faults import GP, NP, TS, GuestFault, general_protection
from mini_bhyve.new_stack import NewStack
from mini_bhyve.operands import RSP
from mini_bhyve.paging import WRITE
from mini_bhyve.registers import CR0_PG, CR0_TS

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu


class Reason(enum.Enum):
    """Why the task is switched: it decides what becomes of the old one."""

    JUMP = enum.auto()
    CALL = enum.auto()  # and interrupts and exceptions
    RETURN = enum.auto()


class Layout(NamedTuple):
    """Where things are in a TSS: offsets in bytes."""

    width: int  # of the registers in it, in bits
    size: int  # its limit must be at least this, less one
    cr3: int | None
    ip: int  # the flags follow
    registers: int
    segments: int
    segment_count: int
    ldt: int
    trap: int | None


LAYOUT_32 = Layout(32, 0x68, 0x1C, 0x20, 0x28, 0x48, 6, 0x60, 0x64)
LAYOUT_16 = Layout(16, 0x2C, None, 0x0E, 0x12, 0x22, 4, 0x2A, None)
LAYOUTS = {seg.TSS32_AVAILABLE: LAYOUT_32, seg.TSS16_AVAILABLE: LAYOUT_16}


class NewTask(NamedTuple):
    """What a TSS says of its task."""

    cr3: int | None
    ip: int
    flags: int
    registers: list[int]
    selectors: list[int]
    ldt: int
    trap: bool


def layout_of(access: int) -> Layout | None:
    """The layout of a TSS with these access rights, busy or not; None if it is none."""
    if access & seg.CODE_OR_DATA:
        return None
    return LAYOUTS.get(access & seg.TYPE & ~seg.BUSY)


# --- The ways here ------------------------------------------------------------------------------------------------


def switch_by_selector(cpu: Cpu, selector: int, descriptor: seg.Descriptor, reason: Reason) -> None:
    """JMP and CALL far to a TSS or a task gate: the DPL of whichever is named decides who may (7.3)."""
    error_code = selector & ~3
    if cpu.long_mode or max(cpu.cpl, selector & 3) > descriptor.dpl:
        raise general_protection(error_code)
    if descriptor.access & seg.TYPE == seg.TASK_GATE:
        if not descriptor.present:
            raise GuestFault(NP, error_code)
        switch_through_gate(cpu, descriptor, reason)
    else:
        switch_task(cpu, selector, descriptor, reason)


def switch_through_gate(cpu: Cpu, gate: seg.Descriptor, reason: Reason, error_code: int | None = None) -> None:
    """A task gate has been entered: what it says is the selector of a TSS, which must be in the GDT."""
    selector = gate.raw >> 16 & 0xFFFF
    if selector & 4:
        raise general_protection(selector & ~3)
    switch_task(cpu, selector, seg.read_descriptor(cpu, selector), reason, error_code)


def return_to_previous_task(cpu: Cpu) -> None:
    """IRET with EFLAGS.NT: to the task that the current TSS names (7.4)."""
    selector = cpu.load_system(cpu.tr.base, 16)
    if selector & 4:
        raise GuestFault(TS, selector & ~3)
    switch_task(cpu, selector, seg.read_descriptor(cpu, selector, TS), Reason.RETURN)


# --- The switch -----------------------------------------------------------------------------------------------------


def switch_task(
    cpu: Cpu, selector: int, descriptor: seg.Descriptor, reason: Reason, error_code: int | None = None
) -> None:
    """Save the current task and go on with another (7.3, whose steps these are).

    cpu.next_ip is where the old task will go on, and then where the new one does. Faults up to the point where the
    old task has been saved belong to it. Those after it belong to the new task, before its first instruction.
    """
    new_layout = layout_of(descriptor.access)
    busy = descriptor.access & seg.BUSY != 0
    if new_layout is None or busy != (reason is Reason.RETURN):
        raise GuestFault(TS if reason is Reason.RETURN else GP, selector & ~3)
    if not descriptor.present:
        raise GuestFault(NP, selector & ~3)
    if descriptor.limit < new_layout.size - 1:
        raise GuestFault(TS, selector & ~3)
    old_layout = layout_of(cpu.tr.access)
    if old_layout is None or cpu.tr.limit < old_layout.size - 1:
        raise GuestFault(TS, cpu.tr.selector & ~3)
    task = read_task(cpu, descriptor.base, new_layout)

    # From here on nothing may fault, until the old task is safe in its TSS.
    for address, size in ((cpu.tr.base, old_layout.size), (descriptor.base, new_layout.size)):
        cpu.mmu.translate(address, WRITE)
        cpu.mmu.translate(address + size - 1 & 0xFFFFFFFF, WRITE)
    if reason is not Reason.CALL:
        set_busy(cpu, seg.read_descriptor(cpu, cpu.tr.selector), False)
    flags = cpu.eflags & ~fl.NT if reason is Reason.RETURN else cpu.eflags
    save_task(cpu, old_layout, flags)
    if reason is Reason.CALL:
        cpu.store_system(descriptor.base, cpu.tr.selector, 16)
        task = task._replace(flags=task.flags | fl.NT)
    if reason is not Reason.RETURN:
        set_busy(cpu, descriptor, True)

    cpu.tr = seg.Segment(selector, descriptor.base, descriptor.limit, descriptor.access | seg.BUSY)
    cpu.cr0 |= CR0_TS
    load_registers(cpu, task, new_layout)
    try:
        load_segments(cpu, task)
        if error_code is not None:
            stack = NewStack(cpu, cpu.segments[seg.SS_], cpu.regs[RSP].value, cpu.cpl)
            stack.push(error_code, new_layout.width)
            stack.commit()
        seg.check_offset(cpu, cpu.segments[seg.CS], task.ip)
    except GuestFault as fault:
        fault.return_to = task.ip
        raise
    finally:
        if task.trap:
            cpu.debug.pending |= TASK_SWITCHED
    cpu.next_ip = task.ip


def read_task(cpu: Cpu, base: int, layout: Layout) -> NewTask:
    """All of a TSS that a switch loads."""

    def words(offset: int, count: int, width: int) -> list[int]:
        return [cpu.load_system(base + offset + i * layout.width // 8 & 0xFFFFFFFF, width) for i in range(count)]

    ip, flags = words(layout.ip, 2, layout.width)
    return NewTask(
        cr3=None if layout.cr3 is None else words(layout.cr3, 1, 32)[0],
        ip=ip,
        flags=flags,
        registers=words(layout.registers, 8, layout.width),
        selectors=words(layout.segments, layout.segment_count, 16),
        ldt=words(layout.ldt, 1, 16)[0],
        trap=layout.trap is not None and words(layout.trap, 1, 16)[0] & 1 != 0,
    )


def save_task(cpu: Cpu, layout: Layout, flags: int) -> None:
    """The current task into its TSS: what can change while it runs, which CR3 and the LDT do not."""
    values = [cpu.next_ip, flags, *(register.value for register in cpu.regs[:8])]
    for index, value in enumerate(values):
        cpu.store_system(cpu.tr.base + layout.ip + index * layout.width // 8 & 0xFFFFFFFF, value, layout.width)
    for index, segment in enumerate(cpu.segments[: layout.segment_count]):
        address = cpu.tr.base + layout.segments + index * layout.width // 8
        cpu.store_system(address & 0xFFFFFFFF, segment.selector, 16)


def set_busy(cpu: Cpu, descriptor: seg.Descriptor, busy: bool) -> None:
    """Tasks cannot be entered twice: the descriptor of a TSS says whether it is in use (7.2.2)."""
    access = descriptor.raw >> 40 & 0xFF
    cpu.store_system(descriptor.address + 5, access | seg.BUSY if busy else access & ~seg.BUSY, 8)


def load_registers(cpu: Cpu, task: NewTask, layout: Layout) -> None:
    """What cannot fault: CR3 (but for PAE's PDPTEs: #GP before anything else is loaded), flags and general registers.

    Segments have their selectors, but may not yet be used.
    """
    if task.cr3 is not None and cpu.cr0 & CR0_PG:
        cpu.write_cr3(task.cr3)
    cpu.write_eflags(task.flags)
    # The upper halves are undefined after a 16-bit task switch; processors set them.
    upper = 0xFFFF0000 if layout.width == 16 else 0
    for register, value in zip(cpu.regs, task.registers):
        register.value = upper | value
    selectors = task.selectors + [0] * (6 - layout.segment_count)
    cpu.segments = [seg.null_segment(selector) for selector in selectors]
    cpu.ldtr = seg.null_segment(task.ldt)
    cpu.cpl = 3 if task.flags & fl.VM else selectors[seg.CS] & 3
    cpu.debug.forget_local()
    cpu.update_debug()
    cpu.update_mode()


def load_segments(cpu: Cpu, task: NewTask) -> None:
    """What the selectors lead to, with all checks. Any of them may fault: #TS, #NP or #SS with the selector."""
    if not seg.is_null(task.ldt):
        cpu.ldtr = _local_table(cpu, task.ldt)
    selectors = [segment.selector for segment in cpu.segments]
    if cpu.virtual_8086_mode:
        cpu.segments = [seg.virtual_8086_segment(selector) for selector in selectors]
        cpu.update_mode()
        return
    code = _code_segment(cpu, selectors[seg.CS])
    seg.mark_accessed(cpu, code)
    cpu.set_code_segment(code, cpu.cpl)
    stack = seg.stack_segment(cpu, selectors[seg.SS_], cpu.cpl, TS)
    seg.mark_accessed(cpu, stack)
    cpu.set_stack_segment(stack)
    for index in (seg.ES, seg.DS, seg.FS, seg.GS):
        segment = seg.data_segment(cpu, selectors[index], TS)
        seg.mark_accessed(cpu, segment)
        cpu.segments[index] = segment
    cpu.update_mode()


def _local_table(cpu: Cpu, selector: int) -> seg.Segment:
    if selector & 4:
        raise GuestFault(TS, selector & ~3)
    descriptor = seg.read_descriptor(cpu, selector, TS)
    if not descriptor.is_system or descriptor.access & seg.TYPE != seg.LDT or not descriptor.present:
        raise GuestFault(TS, selector & ~3)
    return descriptor.segment(selector)


def _code_segment(cpu: Cpu, selector: int) -> seg.Segment:
    """The RPL of its selector is the new task's privilege level."""
    if seg.is_null(selector):
        raise GuestFault(TS, selector & ~3)
    descriptor = seg.read_descriptor(cpu, selector, TS)
    conforming = descriptor.access & seg.CONFORMING
    wrong_level = descriptor.dpl > selector & 3 if conforming else descriptor.dpl != selector & 3
    if not descriptor.is_code or wrong_level:
        raise GuestFault(TS, selector & ~3)
    return seg.code_segment(cpu, selector, descriptor, selector & 3)
