"""Flag control (Intel SDM vol. 1, 5.1.11): single flags, and the whole register to and from AH or the stack."""

from __future__ import annotations

from mini_bhyve import flags as fl
from mini_bhyve import interrupts
from mini_bhyve.faults import general_protection, undefined_opcode
from mini_bhyve.instructions.definition import instruction
from mini_bhyve.operands import RAX


def _change(cpu, cleared, set_or_flipped):
    flags = fl.arithmetic_flags(cpu.flags) & ~cleared ^ set_or_flipped
    cpu.flags = (fl.EXPLICIT, flags, 0, 0, 32)


@instruction("clc")
def clc(cpu):
    _change(cpu, fl.CF, 0)


@instruction("stc")
def stc(cpu):
    _change(cpu, fl.CF, fl.CF)


@instruction("cmc")
def cmc(cpu):
    _change(cpu, 0, fl.CF)


@instruction("cld")
def cld(cpu):
    cpu.change_system_flags(fl.DF, 0)


@instruction("std")
def std(cpu):
    cpu.change_system_flags(0, fl.DF)


@instruction("cli", data_decides=True)
def cli(cpu):
    """CLI: only for code at least as privileged as IOPL says."""
    if cpu.cpl > cpu.iopl:
        raise general_protection()
    cpu.change_system_flags(fl.IF, 0)


@instruction("sti", ends_block=True, data_decides=True)
def sti(cpu):
    """STI: interrupts come in after the next instruction, so that STI; HLT or STI; RET cannot be torn apart."""
    if cpu.cpl > cpu.iopl:
        raise general_protection()
    if not cpu.system_flags & fl.IF:
        cpu.shadow_interrupts()
    cpu.system_flags |= fl.IF


def _define_access_flag(name, cleared, then_set):
    @instruction(name, data_decides=True)
    def access_flag(cpu):
        """STAC, CLAC: whether the supervisor may touch user pages under SMAP. #UD above level 0."""
        if cpu.cpl:
            raise undefined_opcode()
        cpu.change_system_flags(cleared, then_set)


_define_access_flag("stac", 0, fl.AC)
_define_access_flag("clac", fl.AC, 0)


# AH takes the low byte of EFLAGS: SF ZF - AF - PF - CF.
LOW_FLAGS = fl.SF | fl.ZF | fl.AF | fl.PF | fl.CF


@instruction("lahf")
def lahf(cpu):
    low = fl.arithmetic_flags(cpu.flags) & LOW_FLAGS | fl.ALWAYS_ONE
    cpu.regs[RAX].value = cpu.regs[RAX].value & ~0xFF00 | low << 8


@instruction("sahf")
def sahf(cpu):
    _change(cpu, LOW_FLAGS, cpu.regs[RAX].value >> 8 & LOW_FLAGS)


@instruction("salc")
def salc(cpu):
    """SALC, opcode D6: CF into every bit of AL. The manual has no name for it, and only says that it is no #UD."""
    cpu.regs[RAX].value = cpu.regs[RAX].value & ~0xFF | fl.carry(cpu.flags) * 0xFF


def _check_virtual_8086(cpu):
    """In virtual-8086 mode the flags are the monitor's business, unless it has set IOPL to 3 (SDM vol. 3B, 20.2.7)."""
    if cpu.virtual_8086_mode and cpu.iopl < 3:
        raise general_protection()


@instruction("pushf", "pushfd", "pushfq", encoded=True, data_decides=True)
def pushf(cpu, encoding):
    """PUSHF: VM and RF are stored as 0."""
    _check_virtual_8086(cpu)
    cpu.push(cpu.eflags & ~(fl.VM | fl.RF) & (1 << encoding.stack_width) - 1, encoding.stack_width)


@instruction("popf", "popfd", "popfq", encoded=True, ends_block=True, data_decides=True)
def popf(cpu, encoding):
    """POPF: flags that this privilege level may not change are silently left as they are."""
    _check_virtual_8086(cpu)
    interrupts.set_flags(cpu, cpu.pop(encoding.stack_width), encoding.stack_width)
