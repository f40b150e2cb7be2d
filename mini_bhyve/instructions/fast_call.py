"""Fast system calls (Intel SDM vol. 1, 5.21; vol. 3A, 5.8.7 and 5.8.8): to level 0 and back without a gate.

No descriptor is read: model-specific registers say where to go, and the segments become what flat segments are,
whatever the GDT has under their selectors. It is for the operating system to see to it that both agree.

              from            to   instruction pointer       stack pointer   selector of CS; SS is the next
    SYSCALL   64-bit mode     0    LSTAR; the old into RCX   -               STAR, bits 47-32
    SYSRET    64-bit mode, 0  3    RCX                       -               STAR, bits 63-48; +16 for 64-bit code
    SYSENTER  protected mode  0    SYSENTER_EIP              SYSENTER_ESP    SYSENTER_CS
    SYSEXIT   level 0         3    RDX                       RCX             SYSENTER_CS +16; +32 for 64-bit code

(After SYSRET to 64-bit code, SS lies below CS: STAR +8.) RFLAGS: SYSCALL saves it in R11 and clears what FMASK says,
SYSRET takes it from there; SYSENTER clears IF, and SYSEXIT leaves it alone.
"""

from __future__ import annotations

from mini_bhyve import flags as fl
from mini_bhyve import msr
from mini_bhyve import segmentation as seg
from mini_bhyve.debug import SINGLE_STEP
from mini_bhyve.faults import general_protection, undefined_opcode
from mini_bhyve.instructions.definition import instruction
from mini_bhyve.operands import RCX, RDX, RSP
from mini_bhyve.paging import is_canonical
from mini_bhyve.registers import CR0_PE, EFER_SCE

R11 = 11

FLAT_CODE = seg.PRESENT | seg.CODE_OR_DATA | seg.CODE | seg.READABLE | seg.ACCESSED | seg.GRANULAR
FLAT_DATA = seg.PRESENT | seg.CODE_OR_DATA | seg.WRITABLE | seg.ACCESSED | seg.GRANULAR | seg.BIG


def _change_level(cpu, cpl, code_selector, stack_selector, wide):
    """CS and SS become flat segments of the new privilege level, CS of 64-bit code if `wide`."""
    level = cpl << seg.DPL_SHIFT
    code = FLAT_CODE | level | (seg.LONG if wide else seg.BIG)
    cpu.segments[seg.CS] = seg.Segment(code_selector & 0xFFFF, 0, seg.FOUR_GIB_LIMIT, code)
    cpu.segments[seg.SS_] = seg.Segment(stack_selector & 0xFFFF, 0, seg.FOUR_GIB_LIMIT, FLAT_DATA | level)
    cpu.cpl = cpl
    cpu.update_mode()


# --- SYSCALL and SYSRET -----------------------------------------------------------------------------------------------


def _enabled_in_64_bit_mode(cpu):
    """On Intel's, not even compatibility mode has them."""
    if cpu.code_size != 64 or not cpu.efer & EFER_SCE:
        raise undefined_opcode()


@instruction("syscall", encoded=True, ends_block=True, data_decides=True)
def syscall(cpu, encoding):
    """SYSCALL: the stack is for the kernel to change."""
    _enabled_in_64_bit_mode(cpu)
    cpu.regs[RCX].value = encoding.next_ip
    cpu.regs[R11].value = cpu.eflags & ~fl.RF
    cpu.write_eflags(cpu.eflags & ~cpu.msrs[msr.FMASK])
    if not cpu.system_flags & fl.TF:
        cpu.debug.pending &= ~SINGLE_STEP  # so that a kernel that clears TF is not entered with a trap
    selector = cpu.msrs[msr.STAR] >> 32 & 0xFFFF
    _change_level(cpu, 0, selector & ~3, selector + 8, wide=True)
    cpu.next_ip = cpu.msrs[msr.LSTAR]


@instruction("sysret", "sysretq", encoded=True, ends_block=True, data_decides=True)
def sysret(cpu, encoding):
    """SYSRET: to 64-bit code with a REX.W prefix, else to compatibility mode."""
    _enabled_in_64_bit_mode(cpu)
    wide = encoding.operand_width == 64
    target = cpu.regs[RCX].value if wide else cpu.regs[RCX].value & 0xFFFFFFFF
    if cpu.cpl or not is_canonical(target):
        raise general_protection()
    cpu.write_eflags(cpu.regs[R11].value & ~(fl.RF | fl.VM))
    selector = cpu.msrs[msr.STAR] >> 48
    _change_level(cpu, 3, selector + 16 | 3 if wide else selector | 3, selector + 8 | 3, wide)
    cpu.next_ip = target


# --- SYSENTER and SYSEXIT ---------------------------------------------------------------------------------------------


def _selector_of_level_0(cpu):
    """From SYSENTER_CS; a null one says that the operating system has not set the registers up."""
    selector = cpu.msrs[msr.SYSENTER_CS] & 0xFFFF
    if not cpu.cr0 & CR0_PE or seg.is_null(selector):
        raise general_protection()
    return selector & ~3


@instruction("sysenter", ends_block=True, data_decides=True)
def sysenter(cpu):
    """SYSENTER: to come back, the program must have left addresses in RDX and RCX, as SYSEXIT wants them."""
    selector = _selector_of_level_0(cpu)
    cpu.write_eflags(cpu.eflags & ~(fl.VM | fl.IF))
    _change_level(cpu, 0, selector, selector + 8, wide=cpu.long_mode)
    mask = cpu.linear_mask
    cpu.regs[RSP].value = cpu.msrs[msr.SYSENTER_ESP] & mask
    cpu.next_ip = cpu.msrs[msr.SYSENTER_EIP] & mask


@instruction("sysexit", "sysexitq", encoded=True, ends_block=True, data_decides=True)
def sysexit(cpu, encoding):
    """SYSEXIT: to 64-bit code with a REX.W prefix."""
    selector = _selector_of_level_0(cpu)
    wide = encoding.operand_width == 64
    target, stack_pointer = cpu.regs[RDX].value, cpu.regs[RCX].value
    if not wide:
        target, stack_pointer = target & 0xFFFFFFFF, stack_pointer & 0xFFFFFFFF
    if cpu.cpl or not is_canonical(target) or not is_canonical(stack_pointer):
        raise general_protection()
    selector = selector + (32 if wide else 16) | 3
    _change_level(cpu, 3, selector, selector + 8, wide)
    cpu.regs[RSP].value = stack_pointer
    cpu.next_ip = target
