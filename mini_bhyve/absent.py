"""What becomes of an instruction that the processor does not have: #UD, or #NM where a control bit says so.

Mirrors Intel SDM vol. 3A, 2.5 (CR0.EM, TS; CR4.OSFXSR) and the exception tables of vol. 2A, 2.4. CPUID offers no x87,
no MMX and no SSE, but a kernel that sets CR0.TS expects #NM all the same, when a program first uses one of them. So
the control bits are looked at each time before it is said that there is no such instruction.

For the guest that is all. For the user, who may wonder why a program died, the processor says what it was, too
(`Cpu.tell_absent`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NoReturn

from capstone import CsInsn
from capstone import x86_const as x86

from mini_bhyve.faults import UD, GuestFault, undefined_opcode
from mini_bhyve.fpu import check_mmx, check_sse, check_x87

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

_X87_OPCODES = range(0xD8, 0xE0)
_VEX_AND_ITS_LIKE = (0x62, 0x8F, 0xC4, 0xC5)  # EVEX, XOP, VEX; 8F is also POP, which is not absent
_MMX = range(x86.X86_REG_MM0, x86.X86_REG_MM7 + 1)
_XMM = range(x86.X86_REG_XMM0, x86.X86_REG_XMM15 + 1)
_WITHOUT_OPERANDS = (x86.X86_INS_EMMS, x86.X86_INS_FEMMS)


def check_nothing(cpu: Cpu) -> None:
    """The instruction belongs to no unit that could be switched off. (AVX does, by CR4.OSXSAVE, which stays 0: #UD.)"""


def check_for(insn: CsInsn, operand_size: bool) -> Callable[[Cpu], None]:
    """How to find out whether the unit that an instruction belongs to may be used, apart from its being absent.

    With a 66 prefix (`operand_size`) what works on MMX registers works on XMM registers; capstone forgets it in 16-bit
    code.
    """
    if insn.opcode[0] in _X87_OPCODES:
        return check_x87
    if insn.opcode[0] in _VEX_AND_ITS_LIKE:
        return check_nothing
    registers = [operand.reg for operand in insn.operands if operand.type == x86.X86_OP_REG]
    if any(register in _XMM for register in registers):
        return check_sse
    if insn.id in _WITHOUT_OPERANDS or any(register in _MMX for register in registers):
        return check_sse if operand_size else check_mmx
    return check_nothing


def absent(cpu: Cpu, check: Callable[[Cpu], None], mnemonic: str, text: str) -> NoReturn:
    """The step for such an instruction."""
    try:
        check(cpu)
        raise undefined_opcode()
    except GuestFault as fault:
        if fault.vector == UD:
            cpu.tell_absent(mnemonic, f"the guest gets #UD at {cpu.where()}: this processor does not have {text}")
        raise
