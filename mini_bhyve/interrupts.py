"""Interrupts and exceptions: from a vector to its handler, and back.

Mirrors Intel SDM vol. 3A, chapter 6 (Interrupt and Exception Handling): 6.12 the protected-mode procedure, 6.14 64-bit
mode, 6.15 the double fault; vol. 3B, 20.1.4 real mode.

A gate in the IDT (figure 6-2; in 64-bit mode 8 more bytes follow, with bits 63-32 of the offset):

    63               48 47 46-45 44 43  40 39   37 36   34    32
    | offset 31-16     | P | DPL | 0 | type |        |    IST    |
    | selector         | offset 15-0                            |
    31               16 15                                     0

What the handler finds on its stack (the part in brackets only where the privilege level changes, or in 64-bit mode;
from virtual-8086 mode, GS FS DS ES above all):

    [ SS ]  [ ESP ]  EFLAGS  CS  EIP  [ error code ]   <- ESP, downwards
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve import task_switch
from mini_bhyve.debug import SINGLE_STEP
from mini_bhyve.far_transfer import (
    drop_privileged_segments,
    real_mode_code_segment,
    returned_code_segment,
    returned_stack_segment,
)
from mini_bhyve.faults import DB, DE, DF, GP, NP, PF, SS, TS, GuestFault, TripleFault, general_protection
from mini_bhyve.new_stack import NewStack
from mini_bhyve.operands import RSP
from mini_bhyve.registers import CR0_PE

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

# Bits of an error code that names a gate (figure 6-6): an event from outside, an entry of the IDT.
EXTERNAL, IN_IDT = 1, 2
NMI_VECTOR = 2

# Faults that, when one meets another, make a double fault (SDM vol. 3A, table 6-4).
CONTRIBUTORY = {DE, TS, NP, SS, GP}


# --- Delivery -------------------------------------------------------------------------------------------------------


def deliver_fault(cpu: Cpu, fault: GuestFault) -> None:
    """An exception has stopped the instruction at cpu.ip: call its handler, or a double fault's, or give up.

    Raises TripleFault when even the double fault cannot be delivered.
    """
    first = fault
    _note_page_fault(cpu, fault)
    cpu.debug.pending = 0  # an instruction that did not happen has no traps either
    if fault.vector != DB:
        cpu.system_flags |= fl.RF  # for what is pushed: it will be started again, past a breakpoint on it (17.3.1.1)
    while True:
        if fault.return_to is not None:
            cpu.ip = fault.return_to
        cpu.next_ip = cpu.ip
        try:
            deliver(cpu, fault.vector, fault.error_code)
        except GuestFault as second:
            _note_page_fault(cpu, second)
            if fault.vector == DF:
                raise TripleFault(f"triple fault at {cpu.where()}, which began as {first}") from None
            fault = _combine(fault, second)
        else:
            cpu.ip = cpu.next_ip
            return


def _note_page_fault(cpu: Cpu, fault: GuestFault) -> None:
    """CR2 gets the address of every page fault, even of one that makes a double fault (6.15, interrupt 14)."""
    if fault.vector == PF:
        assert fault.address is not None
        cpu.cr2 = fault.address
        cpu.forget_page(fault.address)  # so a handler that grants more rights need not say INVLPG


def _combine(first: GuestFault, second: GuestFault) -> GuestFault:
    """What to deliver when delivering `first` raised `second` (SDM vol. 3A, table 6-5)."""
    benign = first.vector not in CONTRIBUTORY and first.vector != PF
    if benign or (first.vector in CONTRIBUTORY and second.vector == PF):
        return second
    return GuestFault(DF, 0)


def deliver_external(cpu: Cpu, vector: int) -> None:
    """An interrupt from outside, or a trap, between two instructions."""
    cpu.halted = False
    cpu.next_ip = cpu.ip
    try:
        deliver(cpu, vector, None)
        cpu.ip = cpu.next_ip
    except GuestFault as fault:
        deliver_fault(cpu, fault)


def deliver_debug_trap(cpu: Cpu) -> None:
    """#DB for what the last instruction did (SDM vol. 3B, 17.3.1)."""
    causes, cpu.debug.pending = cpu.debug.pending, 0
    deliver_external(cpu, cpu.debug.exception(causes).vector)


def deliver(cpu: Cpu, vector: int, error_code: int | None, software: bool = False) -> None:
    """Go to the handler of `vector`; cpu.next_ip is the address to come back to, and then that of the handler.

    `software` is an INT n, INT3 or INTO: only those must be allowed by the gate's DPL. Raises GuestFault if the way
    there is barred, with no register changed. Its error code says, by the bit EXT, that the program did not ask for
    this: it is set unless `software` (SDM vol. 3A, 6.13).
    """
    cpu.debug.pending &= ~SINGLE_STEP
    if not cpu.cr0 & CR0_PE:
        _deliver_real(cpu, vector)
        return
    try:
        _deliver_protected(cpu, vector, error_code, software)
    except GuestFault as fault:
        if not software and fault.vector != PF and fault.error_code is not None:
            fault.error_code |= EXTERNAL
        raise


def _deliver_protected(cpu: Cpu, vector: int, error_code: int | None, software: bool) -> None:
    """Find the gate and check it (SDM vol. 3A, 6.12.1 and 6.14)."""
    wide = cpu.long_mode
    entry_size = 16 if wide else 8
    reference = vector * 8 | IN_IDT
    if vector * entry_size + entry_size - 1 > cpu.idtr_limit:
        raise general_protection(reference)
    address = cpu.idtr_base + vector * entry_size
    gate = seg.Descriptor(cpu.load_system(address, 64), address)
    kind = gate.access & (seg.TYPE | seg.CODE_OR_DATA)
    allowed = [seg.INTERRUPT_GATE32, seg.TRAP_GATE32]
    if not wide:
        allowed += [seg.INTERRUPT_GATE16, seg.TRAP_GATE16, seg.TASK_GATE]
    if kind not in allowed or (software and gate.dpl < cpu.cpl):
        raise general_protection(reference)
    if not gate.present:
        raise GuestFault(NP, reference)
    if kind == seg.TASK_GATE:
        task_switch.switch_through_gate(cpu, gate, task_switch.Reason.CALL, error_code)
        return

    offset = gate.raw & 0xFFFF | gate.raw >> 32 & 0xFFFF0000
    if kind in (seg.INTERRUPT_GATE16, seg.TRAP_GATE16):
        offset &= 0xFFFF
    if wide:
        offset |= cpu.load_system(address + 8, 32) << 32
    width = 64 if wide else 32 if kind in (seg.INTERRUPT_GATE32, seg.TRAP_GATE32) else 16
    selector = gate.raw >> 16 & 0xFFFF
    _enter_handler(cpu, selector, offset, width, error_code, ist=gate.raw >> 32 & 7 if wide else 0)
    # An interrupt gate also closes the door behind it; a trap gate leaves IF as it was.
    cleared = fl.TF | fl.NT | fl.RF | fl.VM
    if kind in (seg.INTERRUPT_GATE32, seg.INTERRUPT_GATE16):
        cleared |= fl.IF
    cpu.system_flags &= ~cleared


def _deliver_real(cpu: Cpu, vector: int) -> None:
    """Real mode: the IDT is a table of far pointers, offset and segment (SDM vol. 3B, 20.1.4)."""
    if vector * 4 + 3 > cpu.idtr_limit:
        raise general_protection()
    pointer = cpu.load_system(cpu.idtr_base + vector * 4, 32)
    code, offset = real_mode_code_segment(cpu, pointer >> 16), pointer & 0xFFFF
    seg.check_offset(cpu, code, offset)
    stack = NewStack(cpu, cpu.segments[seg.SS_], cpu.regs[RSP].value, cpu.cpl)
    for value in (cpu.eflags, cpu.segments[seg.CS].selector, cpu.next_ip):
        stack.push(value, 16)
    stack.commit()
    cpu.system_flags &= ~(fl.IF | fl.TF | fl.AC | fl.RF)
    cpu.set_code_segment(code, 0)
    cpu.next_ip = offset


def _enter_handler(cpu: Cpu, selector: int, offset: int, width: int, error_code: int | None, ist: int) -> None:
    """Check the handler's code segment, change stacks if it is more privileged, push the frame, and go there."""
    if seg.is_null(selector):
        raise general_protection()
    error_selector = selector & ~3
    descriptor = seg.read_descriptor(cpu, selector)
    if not descriptor.is_code or descriptor.dpl > cpu.cpl:
        raise general_protection(error_selector)
    if cpu.long_mode and descriptor.access & (seg.LONG | seg.BIG) != seg.LONG:
        raise general_protection(error_selector)
    if not descriptor.present:
        raise GuestFault(NP, error_selector)
    cpl = cpu.cpl if descriptor.access & seg.CONFORMING else descriptor.dpl
    if cpu.virtual_8086_mode and cpl != 0:
        raise general_protection(error_selector)

    old_ss, old_sp = cpu.segments[seg.SS_], cpu.regs[RSP].value
    if cpu.long_mode:
        stack = _long_mode_stack(cpu, cpl, ist)
    elif cpl < cpu.cpl:
        ss, esp = seg.stack_from_tss(cpu, cpl)
        stack = NewStack(cpu, seg.stack_segment(cpu, ss, cpl, vector=TS), esp, cpl)
    else:
        stack = NewStack(cpu, old_ss, old_sp, cpl)
    if cpu.virtual_8086_mode:
        # What these hold would make no sense to the handler, and its selectors none to the 8086 task.
        data_segments = seg.GS, seg.FS, seg.DS, seg.ES
        for index in data_segments:
            stack.push(cpu.segments[index].selector, width)
    if cpu.long_mode or cpl < cpu.cpl:
        stack.push(old_ss.selector, width)
        stack.push(old_sp, width)
    for value in (cpu.eflags, cpu.segments[seg.CS].selector, cpu.next_ip):
        stack.push(value, width)
    if error_code is not None:
        stack.push(error_code, width)

    code = seg.code_segment(cpu, selector, descriptor, cpl)
    seg.check_offset(cpu, code, offset)
    seg.mark_accessed(cpu, code, stack.segment)
    if cpu.virtual_8086_mode:
        for index in data_segments:
            cpu.segments[index] = seg.null_segment(0)
        cpu.system_flags &= ~fl.VM  # now, for the next line works out what follows from the mode
    cpu.set_code_segment(code, cpl)
    stack.commit()
    cpu.next_ip = offset


def _long_mode_stack(cpu: Cpu, cpl: int, ist: int) -> NewStack:
    """In 64-bit mode the stack is aligned to 16, and may be one of seven special ones (SDM vol. 3A, 6.14.2-5)."""
    segment, pointer = cpu.segments[seg.SS_], cpu.regs[RSP].value
    if ist or cpl < cpu.cpl:
        pointer = seg.pointer_from_tss(cpu, 0x1C + ist * 8 if ist else 4 + cpl * 8)
    if cpl < cpu.cpl:
        segment = seg.null_segment(cpl)
    return NewStack(cpu, segment, pointer & ~0xF, cpl, wide=True)


# --- Return ---------------------------------------------------------------------------------------------------------


def interrupt_return(cpu: Cpu, width: int) -> None:
    """IRET, IRETD or IRETQ (SDM vol. 2A): back to the same or an outer privilege level, to a task, to an 8086."""
    if cpu.virtual_8086_mode and cpu.iopl < 3:
        raise general_protection()
    if cpu.protected_mode and cpu.system_flags & fl.NT:
        if cpu.long_mode:
            raise general_protection()
        task_switch.return_to_previous_task(cpu)
        return
    size = width >> 3
    ip, selector, flags = (cpu.peek(index * size, width) for index in range(3))
    selector &= 0xFFFF
    if not cpu.protected_mode:
        code = real_mode_code_segment(cpu, selector)
        seg.check_offset(cpu, code, ip)
        cpu.move_stack_pointer(3 * size)
        cpu.set_code_segment(code, cpu.cpl)
        restore_flags(cpu, flags, width)
        cpu.next_ip = ip
        return
    if flags & fl.VM and cpu.cpl == 0 and not cpu.long_mode:
        _return_to_virtual_8086(cpu, ip, selector, flags)
        return
    code, cpl = returned_code_segment(cpu, selector)
    seg.check_offset(cpu, code, ip)
    stack_too = cpl > cpu.cpl or cpu.code_size == 64
    if stack_too:
        rsp, ss_selector = cpu.peek(3 * size, width), cpu.peek(4 * size, width) & 0xFFFF
        ss = returned_stack_segment(cpu, ss_selector, cpl, code)
        seg.mark_accessed(cpu, ss)
    seg.mark_accessed(cpu, code)
    restore_flags(cpu, flags, width)
    leaving = cpl > cpu.cpl
    if not stack_too:
        cpu.move_stack_pointer(3 * size)
    cpu.set_code_segment(code, cpl)
    if stack_too:
        cpu.set_stack_segment(ss)
        cpu.set_stack_pointer(rsp)
    if leaving:
        drop_privileged_segments(cpu)
    cpu.next_ip = ip


def _return_to_virtual_8086(cpu: Cpu, ip: int, selector: int, flags: int) -> None:
    """IRETD at level 0 with VM set in the flags on the stack, the only way into virtual-8086 mode but a task switch.

    Above those flags lie what an interrupt from there has pushed: ESP SS ES DS FS GS.
    """
    esp, ss, es, ds, fs, gs = (cpu.peek(index * 4, 32) for index in range(3, 9))
    if ip > 0xFFFF:
        raise general_protection()
    cpu.write_eflags(flags)
    cpu.segments = [seg.virtual_8086_segment(value & 0xFFFF) for value in (es, selector, ss, ds, fs, gs)]
    cpu.cpl = 3
    cpu.update_mode()
    cpu.regs[RSP].value = esp
    cpu.next_ip = ip


def restore_flags(cpu: Cpu, value: int, width: int) -> None:
    """EFLAGS from the stack by IRET: as POPF, and also RF, by which a debugger steps over a breakpoint.

    At level 0 of protected mode, VIF and VIP as well.
    """
    set_flags(cpu, value, width)
    if width > 16:
        more = fl.RF | (fl.VIF | fl.VIP if cpu.protected_mode and cpu.cpl == 0 else 0)
        cpu.system_flags = cpu.system_flags & ~more | value & more


def set_flags(cpu: Cpu, value: int, width: int) -> None:
    """EFLAGS from POPF or IRET: what may change depends on the privilege level (SDM vol. 2B, POPF)."""
    writable = fl.TF | fl.DF | fl.NT
    if width > 16:
        writable |= fl.AC | fl.ID
    if cpu.cpl == 0:
        writable |= fl.IOPL
    if cpu.cpl <= cpu.iopl:
        writable |= fl.IF
    cpu.write_eflags(value, writable)


# --- Interrupts from outside ----------------------------------------------------------------------------------------


def take_interrupt(cpu: Cpu) -> None:
    """Deliver what is waiting outside, if the processor listens: NMI first, then INTR (SDM vol. 3A, 6.9).

    A trap of the instruction before goes first.
    """
    if cpu.trap_due:
        deliver_debug_trap(cpu)
    elif cpu.nmi_pending and not cpu.nmi_blocked:
        cpu.nmi_pending = False
        cpu.nmi_blocked = True  # until the next IRET
        deliver_external(cpu, NMI_VECTOR)
    elif cpu.interrupt_line and cpu.system_flags & fl.IF:
        deliver_external(cpu, cpu.acknowledge_interrupt())
