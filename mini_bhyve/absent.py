"""What becomes of an instruction that the processor does not have: #UD, or #NM where a control bit says so.

Mirrors Intel SDM vol. 3A, 2.5 (CR0.EM, TS; CR4.OSFXSR) and the exception tables of vol. 2A, 2.4. Of x87, MMX
and SSE there is nothing that computes, but a kernel that sets CR0.TS expects #NM all the same, when a program first
uses one of them. So the control bits are looked at each time before it is said that there is no such instruction.

For the guest that is all. For the user, who may wonder why a program died, the processor says what it was, too
(`Cpu.tell_absent`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple, NoReturn

from capstone import CsInsn
from capstone import x86_const as x86

from mini_bhyve.faults import UD, GuestFault, undefined_opcode
from mini_bhyve.fpu import check_mmx, check_sse, check_x87

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu


class Unit(NamedTuple):
    """A part of the processor that this one does not have."""

    name: str
    check: Callable[[Cpu], None]  # raises what the control bits say


def check_nothing(cpu: Cpu) -> None:
    """There are no control bits for it. (For AVX there is CR4.OSXSAVE, which stays 0: #UD.)"""


X87, MMX, SSE = Unit("x87", check_x87), Unit("MMX", check_mmx), Unit("SSE", check_sse)
AMD_3DNOW, AVX, AVX512 = Unit("3DNow!", check_mmx), Unit("AVX", check_nothing), Unit("AVX-512", check_nothing)
XOP, OTHER = Unit("XOP", check_nothing), Unit("", check_nothing)

ESCAPES = range(0xD8, 0xE0)  # what begins with one of these is for the x87
_EVEX, _XOP, _VEX = 0x62, 0x8F, (0xC4, 0xC5)  # the first is also BOUND, then POP, then LES and LDS: none is absent
_MMX_REGISTERS = range(x86.X86_REG_MM0, x86.X86_REG_MM7 + 1)
_XMM_REGISTERS = range(x86.X86_REG_XMM0, x86.X86_REG_XMM15 + 1)
# Conversions of SSE that, from memory, go to other registers.
_FROM_MEMORY = [getattr(x86, f"X86_INS_CVT{name}") for name in "SS2SI SD2SI TSS2SI TSD2SI PS2PI TPS2PI".split()]


def unit_of(insn: CsInsn, operand_size: bool) -> Unit:
    """The unit that an absent instruction belongs to. Its encoding says it, or its registers.

    With a 66 prefix (`operand_size`) what works on MMX registers works on XMM registers; capstone forgets it in 16-bit
    code.
    """
    first, second, *_ = insn.opcode
    if first in ESCAPES:
        return X87
    if first == _EVEX:
        return AVX512
    if first == _XOP:
        return XOP
    if first in _VEX:
        return AVX512 if insn.insn_name().startswith("k") else AVX  # K: mask registers
    registers = [operand.reg for operand in insn.operands if operand.type == x86.X86_OP_REG]
    if insn.id == x86.X86_INS_FEMMS or x86.X86_GRP_3DNOW in insn.groups:
        return AMD_3DNOW
    if insn.id in _FROM_MEMORY or any(register in _XMM_REGISTERS for register in registers):
        return SSE
    if insn.id == x86.X86_INS_EMMS or any(register in _MMX_REGISTERS for register in registers):
        return SSE if operand_size else MMX
    return OTHER


def absent(cpu: Cpu, unit: Unit, mnemonic: str, text: str) -> NoReturn:
    """The step for such an instruction."""
    try:
        unit.check(cpu)
        raise undefined_opcode()
    except GuestFault as fault:
        if fault.vector == UD:
            kind = f"no {unit.name}" if unit.name else "no such instruction"
            cpu.tell_absent(mnemonic, f"the guest gets #UD at {cpu.where()} for {text}: this processor has {kind}")
        raise
