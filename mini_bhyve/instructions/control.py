"""Control transfer (Intel SDM vol. 1, 5.1.7; the checks of far transfers are in vol. 3A, 5.8)."""

from __future__ import annotations

from mini_bhyve import flags as fl
from mini_bhyve import interrupts
from mini_bhyve.debug import HITS
from mini_bhyve.far_transfer import far_call, far_jump, far_return
from mini_bhyve.faults import BP, BR, DB, OF, GuestFault, general_protection, undefined_opcode
from mini_bhyve.instructions.definition import instruction, signed
from mini_bhyve.operands import RCX, Immediate


@instruction("jmp", ends_block=True)
def jmp(cpu, target):
    destination = target.value
    if not isinstance(target, Immediate):
        cpu.check_target(destination)
    cpu.branch(True, destination)


def _define_jump(condition_name, condition):
    @instruction(f"j{condition_name}", ends_block=True)
    def jcc(cpu, target):
        """Jcc: jump if the condition holds. Its target is always a constant."""
        cpu.branch(condition(cpu.flags), target.value)


for _name, _condition in fl.CONDITIONS.items():
    _define_jump(_name, _condition)


@instruction("call", encoded=True, ends_block=True)
def call(cpu, encoding, target):
    destination = target.value
    cpu.check_target(destination)
    cpu.push(encoding.next_ip, encoding.stack_width)
    cpu.branch(True, destination)


@instruction("ret", encoded=True, ends_block=True)
def ret(cpu, encoding, released=None):
    """RET: to the address on the stack; `released` bytes of arguments above it go as well."""
    width = encoding.stack_width
    destination = cpu.peek(0, width)
    cpu.check_target(destination)
    cpu.move_stack_pointer(width // 8 + (released.value if released else 0))
    cpu.branch(True, destination)


# --- Loops ----------------------------------------------------------------------------------------------------------


def _count_register(cpu, width):
    """CX, ECX or RCX: the counter is as wide as addresses are."""
    return cpu.regs[RCX].value & (1 << width) - 1


def _define_loop(name, goes_on):
    @instruction(name, encoded=True, ends_block=True)
    def loop(cpu, encoding, target):
        """LOOPcc: count down, and jump unless the counter is zero (and ZF is as asked for)."""
        width = encoding.address_width
        mask = (1 << width) - 1
        count = (cpu.regs[RCX].value - 1) & mask
        keep = cpu.regs[RCX].value & ~mask if width == 16 else 0
        cpu.branch((count != 0) & goes_on(cpu), target.value)
        cpu.regs[RCX].value = keep | count


_define_loop("loop", lambda cpu: True)
_define_loop("loope", lambda cpu: fl.zero(cpu.flags))
_define_loop("loopne", lambda cpu: fl.not_zero(cpu.flags))


@instruction("jcxz", "jecxz", "jrcxz", encoded=True, ends_block=True)
def jcxz(cpu, encoding, target):
    cpu.branch(_count_register(cpu, encoding.address_width) == 0, target.value)


# --- Far transfers --------------------------------------------------------------------------------------------------


def _far_pointer(encoding, operands):
    """Selector and offset, from the instruction itself or from memory, where the offset comes first."""
    if len(operands) == 2:
        selector, offset = operands
        return selector.value, offset.value & (1 << encoding.operand_width) - 1
    (pointer,) = operands
    offset = pointer.at(0, encoding.operand_width).value
    return pointer.at(encoding.operand_width // 8, 16).value, offset


@instruction("ljmp", encoded=True, ends_block=True, data_decides=True)
def ljmp(cpu, encoding, *operands):
    """JMP far: a new code segment and offset."""
    selector, offset = _far_pointer(encoding, operands)
    far_jump(cpu, selector, offset)


@instruction("lcall", encoded=True, ends_block=True, data_decides=True)
def lcall(cpu, encoding, *operands):
    """CALL far: as JMP far, with CS and the instruction pointer pushed."""
    selector, offset = _far_pointer(encoding, operands)
    far_call(cpu, selector, offset, encoding.operand_width)


@instruction("retf", "retfq", encoded=True, ends_block=True, data_decides=True)
def retf(cpu, encoding, released=None):
    """RETF: back from a far call, with `released` bytes of arguments."""
    far_return(cpu, encoding.operand_width, released.value if released else 0)


# --- Interrupts from the program ------------------------------------------------------------------------------------


@instruction("int", ends_block=True, data_decides=True)
def int_(cpu, vector):
    """INT n. In virtual-8086 mode it is the monitor's, unless that has set IOPL to 3 (SDM vol. 3B, 20.3.3)."""
    if cpu.virtual_8086_mode and cpu.iopl < 3:
        raise general_protection()
    interrupts.deliver(cpu, vector.value, None, software=True)


@instruction("int3", ends_block=True, data_decides=True)
def int3(cpu):
    interrupts.deliver(cpu, BP, None, software=True)


@instruction("int1", ends_block=True, data_decides=True)
def int1(cpu):
    """INT1: a debug exception, made for hardware debuggers; no privilege level is asked for.

    It tells also of a breakpoint that a MOV SS before it has met: there is one exception for both.
    """
    causes, cpu.debug.pending = cpu.debug.pending & HITS, 0
    if causes:
        cpu.debug.exception(causes)
    interrupts.deliver(cpu, DB, None)


@instruction("into", ends_block=True, data_decides=True)
def into(cpu):
    """INTO: an overflow exception if OF is set."""
    if fl.overflow(cpu.flags):
        interrupts.deliver(cpu, OF, None, software=True)


@instruction("bound", data_decides=True)
def bound(cpu, index, limits):
    """BOUND: #BR unless lower <= index <= upper, all signed; the two limits lie side by side in memory."""
    width = index.width
    lower = signed(limits.at(0, width).value, width)
    upper = signed(limits.at(width // 8, width).value, width)
    if not lower <= signed(index.value, width) <= upper:
        raise GuestFault(BR)


@instruction("iret", "iretd", "iretq", encoded=True, ends_block=True, data_decides=True)
def iret(cpu, encoding):
    """IRET: back from a handler. It also lets the next NMI in, even if it faults (SDM vol. 3A, 6.7.1)."""
    cpu.nmi_blocked = False
    cpu.attention = True
    interrupts.interrupt_return(cpu, encoding.operand_width)


@instruction("ud2", "ud0", "ud1")
def ud2(cpu, *operands):
    raise undefined_opcode()
