"""Data transfer (Intel SDM vol. 1, 5.1.1): moves, exchanges, the stack, conversions. None of them changes the flags,
but CMPXCHG, CMPXCHG8B and XADD.
"""

from __future__ import annotations

from mini_bhyve.faults import general_protection
from mini_bhyve.flags import ADD, CONDITIONS, EXPLICIT, SUB, ZF, arithmetic_flags
from mini_bhyve.instructions.definition import choose, instruction, sign_extend
from mini_bhyve.operands import RAX, RBP, RBX, RCX, RDX, RSP, Memory, SegmentRegister, general_register
from mini_bhyve.segmentation import SS_


@instruction("mov", "movabs")
def mov(cpu, dst, src):
    """MOV, also to and from segment, control and debug registers: what more happens then is the operand's business."""
    dst.value = src.value


@instruction("movzx")
def movzx(cpu, dst, src):
    dst.value = src.value


@instruction("movsx", "movsxd")
def movsx(cpu, dst, src):
    dst.value = sign_extend(src.value, src.width, dst.width)


def _define_cmov(condition_name, condition):
    @instruction(f"cmov{condition_name}")
    def cmov(cpu, dst, src):
        """CMOVcc reads its source, and writes its destination, whether the condition holds or not."""
        value = src.value
        dst.value = choose(condition(cpu.flags), value, dst.value)


for _name, _condition in CONDITIONS.items():
    _define_cmov(_name, _condition)


@instruction("xchg", lockable=True)
def xchg(cpu, dst, src):
    a, b = dst.value, src.value
    dst.value = b  # which may be in memory, and fault; the source never is
    src.value = a


def _reverse_bytes(value, width):
    result = 0
    for byte in range(0, width, 8):
        result = result | (value >> byte & 0xFF) << (width - 8 - byte)
    return result


@instruction("bswap")
def bswap(cpu, dst):
    """BSWAP reverses the bytes. With a 16-bit register, undefined by the manual, processors give zero."""
    dst.value = 0 if dst.width == 16 else _reverse_bytes(dst.value, dst.width)


@instruction("movbe", not_behind=b"\xf3")
def movbe(cpu, dst, src):
    """MOVBE: as MOV, between a register and memory in which the most significant byte comes first."""
    dst.value = _reverse_bytes(src.value, src.width)


@instruction("xadd", lockable=True)
def xadd(cpu, dst, src):
    a, b = dst.value, src.value
    result = (a + b) & dst.mask
    if isinstance(dst, Memory):
        dst.value = result
        src.value = a
    else:
        src.value = a
        dst.value = result
    cpu.flags = (ADD, a, b, result, dst.width)


@instruction("cmpxchg", data_decides=True, lockable=True)
def cmpxchg(cpu, dst, src):
    """CMPXCHG: if the accumulator equals the destination, store the source there, else load the accumulator from it.

    Memory is written in both cases, with its old value if they differ.
    """
    accumulator = cpu.accumulator(dst.width)
    expected, old = accumulator.value, dst.value
    if expected == old:
        dst.value = src.value
    else:
        if isinstance(dst, Memory):
            dst.value = old
        accumulator.value = old
    cpu.flags = (SUB, expected, old, (expected - old) & dst.mask, dst.width)


def _define_cmpxchg_pair(name, width):
    @instruction(name, data_decides=True, lockable=True)
    def cmpxchg_pair(cpu, dst):
        """CMPXCHG8B, 16B: as CMPXCHG, for a pair of registers: EDX:EAX against memory, ECX:EBX the new value."""
        mask = (1 << width) - 1
        if width == 64 and (cpu.segment_base(dst.segment) + dst.address()) & 0xF:
            raise general_protection()  # 16 bytes must be aligned
        regs, old = cpu.regs, dst.value
        equal = old == (regs[RDX].value & mask) << width | regs[RAX].value & mask
        new = (regs[RCX].value & mask) << width | regs[RBX].value & mask
        dst.value = new if equal else old  # memory is written either way
        if not equal:
            regs[RAX].value, regs[RDX].value = old & mask, old >> width
        flags = arithmetic_flags(cpu.flags) & ~ZF | (ZF if equal else 0)
        cpu.flags = (EXPLICIT, flags, 0, 0, 32)


_define_cmpxchg_pair("cmpxchg8b", 32)
_define_cmpxchg_pair("cmpxchg16b", 64)


# --- The stack ------------------------------------------------------------------------------------------------------


@instruction("push", encoded=True)
def push(cpu, encoding, src):
    """PUSH. A segment register or a constant takes a whole slot of the stack; PUSH ESP pushes the value from before."""
    cpu.push(src.value, encoding.stack_width)


@instruction("pop", encoded=True)
def pop(cpu, encoding, dst):
    """POP. An address in the destination that uses ESP means ESP after the pop (SDM vol. 2B, POP)."""
    width = encoding.stack_width
    value = cpu.peek(0, width)
    if isinstance(dst, SegmentRegister):
        # POP SS may change how much of ESP counts; this pop still goes by the old stack.
        mask, rsp = cpu.stack_mask, cpu.regs[RSP].value
        dst.value = value
        cpu.regs[RSP].value = rsp & ~mask | (rsp + width // 8) & mask
    elif isinstance(dst, Memory):
        # The store may fault, so it comes before the change of ESP, with the address adjusted for that.
        target = dst.at(width // 8, width) if dst.base is cpu.regs[RSP] else dst
        target.value = value
        cpu.move_stack_pointer(width // 8)
    else:
        cpu.move_stack_pointer(width // 8)
        dst.value = value


@instruction("pushaw", "pushal", encoded=True)
def pusha(cpu, encoding):
    """PUSHA: the eight general registers, ESP as it was before. The lowest slot is tried first, lest half be pushed."""
    width = encoding.operand_width
    values = [register.value & (1 << width) - 1 for register in cpu.regs[:8]]
    top = cpu.regs[RSP].value
    for slot in reversed(range(8)):
        offset = (top - (slot + 1) * width // 8) & cpu.stack_mask
        cpu.store_stack(offset, values[slot], width)
    cpu.move_stack_pointer(-8 * width // 8)


@instruction("popaw", "popal", encoded=True)
def popa(cpu, encoding):
    """POPA: seven registers from the stack; the slot of ESP is skipped."""
    width = encoding.operand_width
    mask = (1 << width) - 1
    values = {index: cpu.peek((7 - index) * width // 8, width) for index in reversed(range(8)) if index != RSP}
    cpu.move_stack_pointer(8 * width // 8)
    for index, value in values.items():
        cpu.regs[index].value = cpu.regs[index].value & ~mask | value


@instruction("enter", data_decides=True, encoded=True)
def enter(cpu, encoding, size, level):
    """ENTER: make a stack frame of `size` bytes, with a display of `level` outer frame pointers (for Pascal)."""
    width = encoding.stack_width
    step = width // 8
    mask, value_mask = cpu.stack_mask, (1 << width) - 1
    levels = level.value & 0x1F
    rsp, frame = cpu.regs[RSP].value, cpu.regs[RBP].value
    frame_pointer = (rsp & ~mask | (rsp - step) & mask) & value_mask

    def store_slot(number, value):
        cpu.store_stack((rsp - step * (number + 1)) & mask, value, width)

    # The manual's order, which a fault may show. What is stored lies below the stack, as long as RSP has not changed.
    store_slot(0, frame & value_mask)
    for outer in range(1, levels):
        store_slot(outer, cpu.load_stack((frame - step * outer) & mask, width))
    if levels:
        store_slot(levels, frame_pointer)
    new_rsp = rsp - step * (levels + 1) - (size.value & 0xFFFF)
    cpu.check_store(SS_, new_rsp & mask, width)  # a frame that the stack cannot hold faults here and not later
    cpu.regs[RSP].value = rsp & ~mask | new_rsp & mask
    keep = ~value_mask if width == 16 else 0
    cpu.regs[RBP].value = frame & keep | frame_pointer


@instruction("leave", encoded=True)
def leave(cpu, encoding):
    """LEAVE: take down the frame: ESP from EBP, then POP EBP."""
    width = encoding.stack_width
    mask, value_mask = cpu.stack_mask, (1 << width) - 1
    frame = cpu.regs[RBP].value
    saved = cpu.load_stack(frame & mask, width)
    cpu.regs[RSP].value = cpu.regs[RSP].value & ~mask | (frame + width // 8) & mask
    cpu.regs[RBP].value = cpu.regs[RBP].value & ~value_mask | saved


# --- Conversion of the accumulator ----------------------------------------------------------------------------------


@instruction("cbw", "cwde", "cdqe", encoded=True)
def cbw(cpu, encoding):
    """CBW, CWDE, CDQE: the accumulator's lower half, sign-extended into all of it."""
    width = encoding.operand_width
    value = sign_extend(cpu.accumulator(width // 2).value, width // 2, width)
    cpu.accumulator(width).value = value


@instruction("cwd", "cdq", "cqo", encoded=True)
def cwd(cpu, encoding):
    """CWD, CDQ, CQO: the accumulator's sign into every bit of DX, EDX or RDX."""
    width = encoding.operand_width
    signs = ((1 << width) - 1) * (cpu.accumulator(width).value >> (width - 1))
    general_register(cpu.regs[RDX], width).value = signs
