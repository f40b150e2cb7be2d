"""Far transfers: from one code segment to another, and perhaps to another privilege level.

Mirrors Intel SDM vol. 3A, 5.8 (Privilege Level Checking When Transferring Program Control Between Code Segments).

                    same level                          more privileged             less privileged
    JMP far         a code segment, or a call gate      -                           -
    CALL far        a code segment, or a call gate      a call gate                 -
    RETF, IRET      what was pushed                     -                           what was pushed

(JMP and CALL to a TSS or a task gate switch tasks instead: `task_switch.py`.)

A call gate, in the GDT or LDT (figure 5-8), is a door with an address of its own behind it: what the caller says is
only which door. The inner level gets a stack of its own, from the TSS, with `count` parameters copied over:

    63               48 47 46-45 44 43  40        36   32
    | offset 31-16     | P | DPL | 0 | type |    | count |
    | selector         | offset 15-0                     |
    31               16 15                              0

In long mode a gate has 16 bytes, and leads to 64-bit code only. Bits 63-32 of the offset follow; there are no
parameters, and the inner stack's SS is null (5.8.3.1, 5.8.5.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mini_bhyve import segmentation as seg
from mini_bhyve import task_switch
from mini_bhyve.faults import NP, TS, GuestFault, general_protection
from mini_bhyve.new_stack import NewStack
from mini_bhyve.operands import RSP

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu


def real_mode_code_segment(cpu: Cpu, selector: int) -> seg.Segment:
    """CS after a far transfer in real mode: a new base, the old limit, and writable as all segments there are.

    In virtual-8086 mode the limit is always that of real mode.
    """
    if cpu.virtual_8086_mode:
        return seg.virtual_8086_segment(selector)
    old = cpu.segments[seg.CS]
    return seg.Segment(selector, selector << 4, old.limit, old.access & ~0xFF | seg.REAL_MODE_ACCESS)


# --- There ------------------------------------------------------------------------------------------------------------


def far_jump(cpu: Cpu, selector: int, offset: int) -> None:
    """JMP far (SDM vol. 2A)."""
    if not cpu.protected_mode:
        segment = real_mode_code_segment(cpu, selector)
        seg.check_offset(cpu, segment, offset)
        cpu.set_code_segment(segment, cpu.cpl)
        cpu.next_ip = offset
        return
    descriptor = _destination(cpu, selector)
    if _leads_to_task(descriptor):
        task_switch.switch_by_selector(cpu, selector, descriptor, task_switch.Reason.JUMP)
        return
    if descriptor.is_system:
        selector, offset, descriptor, _ = _behind_gate(cpu, selector, descriptor)
        if not descriptor.access & seg.CONFORMING and descriptor.dpl != cpu.cpl:
            raise general_protection(selector & ~3)
    segment = seg.code_segment(cpu, selector, descriptor, cpu.cpl)
    seg.check_offset(cpu, segment, offset)
    seg.mark_accessed(cpu, segment)
    cpu.set_code_segment(segment, cpu.cpl)
    cpu.next_ip = offset


def far_call(cpu: Cpu, selector: int, offset: int, width: int) -> None:
    """CALL far (SDM vol. 2A); `width` is the operand size, which a gate overrides."""
    stack = NewStack(cpu, cpu.segments[seg.SS_], cpu.regs[RSP].value, cpu.cpl)
    if not cpu.protected_mode:
        segment, cpl = real_mode_code_segment(cpu, selector), cpu.cpl
    else:
        cpl = cpu.cpl
        descriptor = _destination(cpu, selector)
        if _leads_to_task(descriptor):
            task_switch.switch_by_selector(cpu, selector, descriptor, task_switch.Reason.CALL)
            return
        if descriptor.is_system:
            gate = descriptor
            selector, offset, descriptor, width = _behind_gate(cpu, selector, gate)
            stack = NewStack(cpu, stack.segment, stack.pointer, cpl, wide=width == 64)
            if not descriptor.access & seg.CONFORMING and descriptor.dpl < cpl:
                cpl = descriptor.dpl
                stack = _inner_stack(cpu, cpl, gate.raw >> 32 & 0x1F, width)
        segment = seg.code_segment(cpu, selector, descriptor, cpl)
    seg.check_offset(cpu, segment, offset)
    stack.push(cpu.segments[seg.CS].selector, width)
    stack.push(cpu.next_ip, width)
    seg.mark_accessed(cpu, segment, stack.segment)
    cpu.set_code_segment(segment, cpl)
    stack.commit()
    cpu.next_ip = offset


def _destination(cpu: Cpu, selector: int) -> seg.Descriptor:
    """The descriptor that a far JMP or CALL names: a code segment that may be entered as it is, or a gate."""
    if seg.is_null(selector):
        raise general_protection()
    descriptor = seg.read_descriptor(cpu, selector)
    if descriptor.is_system:
        return descriptor
    if descriptor.access & seg.CONFORMING:
        wrong_level = descriptor.dpl > cpu.cpl
    else:
        wrong_level = selector & 3 > cpu.cpl or descriptor.dpl != cpu.cpl
    if not descriptor.is_code or wrong_level:
        raise general_protection(selector & ~3)
    return descriptor


def _leads_to_task(descriptor: seg.Descriptor) -> bool:
    """A TSS, or a task gate, which names one."""
    tss = seg.TSS16_AVAILABLE, seg.TSS16_BUSY, seg.TSS32_AVAILABLE, seg.TSS32_BUSY
    return descriptor.is_system and descriptor.access & seg.TYPE in (seg.TASK_GATE, *tss)


def _behind_gate(cpu: Cpu, selector: int, gate: seg.Descriptor) -> tuple[int, int, seg.Descriptor, int]:
    """Open a call gate: the selector, offset and descriptor of the code behind it, and the width of what is pushed."""
    kind = gate.access & seg.TYPE
    if kind != seg.CALL_GATE32 and (kind != seg.CALL_GATE16 or cpu.long_mode):
        raise general_protection(selector & ~3)
    offset, width = gate.raw & 0xFFFF, 16
    if kind == seg.CALL_GATE32:
        offset, width = offset | gate.raw >> 32 & 0xFFFF0000, 32
    if cpu.long_mode:
        offset, width = offset | seg.upper_half(cpu, selector, gate) << 32, 64
    if max(cpu.cpl, selector & 3) > gate.dpl:
        raise general_protection(selector & ~3)
    if not gate.present:
        raise GuestFault(NP, selector & ~3)
    target = gate.raw >> 16 & 0xFFFF
    if seg.is_null(target):
        raise general_protection()
    descriptor = seg.read_descriptor(cpu, target)
    if not descriptor.is_code or descriptor.dpl > cpu.cpl:
        raise general_protection(target & ~3)
    if cpu.long_mode and descriptor.access & (seg.LONG | seg.BIG) != seg.LONG:
        raise general_protection(target & ~3)
    return target, offset, descriptor, width


def _inner_stack(cpu: Cpu, cpl: int, count: int, width: int) -> NewStack:
    """The stack of a more privileged level: the caller's SS and ESP lie on top, below them copies of its parameters."""
    parameters = []
    if cpu.long_mode:
        stack = NewStack(cpu, seg.null_segment(cpl), seg.pointer_from_tss(cpu, 4 + cpl * 8), cpl, wide=True)
    else:
        parameters = [cpu.peek(index * width // 8, width) for index in range(count)]
        ss, esp = seg.stack_from_tss(cpu, cpl)
        stack = NewStack(cpu, seg.stack_segment(cpu, ss, cpl, vector=TS), esp, cpl)
    stack.push(cpu.segments[seg.SS_].selector, width)
    stack.push(cpu.regs[RSP].value, width)
    for parameter in reversed(parameters):
        stack.push(parameter, width)
    return stack


# --- And back ---------------------------------------------------------------------------------------------------------


def returned_code_segment(cpu: Cpu, selector: int) -> tuple[seg.Segment, int]:
    """The code segment that a far return or IRET goes back to: never to a more privileged level."""
    if seg.is_null(selector):
        raise general_protection()
    cpl = selector & 3
    descriptor = seg.read_descriptor(cpu, selector)
    conforming = descriptor.access & seg.CONFORMING
    wrong_level = descriptor.dpl > cpl if conforming else descriptor.dpl != cpl
    if not descriptor.is_code or cpl < cpu.cpl or wrong_level:
        raise general_protection(selector & ~3)
    return seg.code_segment(cpu, selector, descriptor, cpl), cpl


def returned_stack_segment(cpu: Cpu, selector: int, cpl: int, code: seg.Segment) -> seg.Segment:
    """The stack segment on the way back; a null one only for 64-bit code below level 3, and with its RPL."""
    if seg.is_null(selector):
        if not (cpu.long_mode and code.access & seg.LONG) or cpl == 3 or selector & 3 != cpl:
            raise general_protection()
        return seg.null_segment(selector)
    return seg.stack_segment(cpu, selector, cpl)


def far_return(cpu: Cpu, width: int, released: int) -> None:
    """RETF (SDM vol. 2B): back to the same or an outer level, `released` more bytes of stack with it."""
    size = width >> 3
    ip, selector = cpu.peek(0, width), cpu.peek(size, width) & 0xFFFF
    if not cpu.protected_mode:
        code = real_mode_code_segment(cpu, selector)
        seg.check_offset(cpu, code, ip)
        cpu.move_stack_pointer(2 * size + released)
        cpu.set_code_segment(code, cpu.cpl)
        cpu.next_ip = ip
        return
    code, cpl = returned_code_segment(cpu, selector)
    seg.check_offset(cpu, code, ip)
    if cpl == cpu.cpl:
        seg.mark_accessed(cpu, code)
        cpu.move_stack_pointer(2 * size + released)
        cpu.set_code_segment(code, cpl)
    else:
        depth = 2 * size + released
        rsp, ss_selector = cpu.peek(depth, width), cpu.peek(depth + size, width) & 0xFFFF
        ss = returned_stack_segment(cpu, ss_selector, cpl, code)
        seg.mark_accessed(cpu, code, ss)
        cpu.set_code_segment(code, cpl)
        cpu.set_stack_segment(ss)
        cpu.set_stack_pointer(rsp)
        cpu.move_stack_pointer(released)
        drop_privileged_segments(cpu)
    cpu.next_ip = ip


def drop_privileged_segments(cpu: Cpu) -> None:
    """On the way out, data segments that the outer level may not use become null (SDM vol. 3A, 5.8.6)."""
    for index in (seg.ES, seg.DS, seg.FS, seg.GS):
        segment = cpu.segments[index]
        conforming = segment.access & seg.CODE and segment.access & seg.CONFORMING
        if segment.dpl < cpu.cpl and not conforming:
            # Only the selector becomes null: 64-bit mode goes on using the bases of FS and GS.
            cpu.segments[index] = seg.Segment(0, segment.base, segment.limit, segment.access | seg.UNUSABLE)
    cpu.update_mode()
