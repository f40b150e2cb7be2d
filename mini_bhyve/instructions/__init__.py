"""The instructions, one file a family, in the order of Intel SDM vol. 1, chapter 5 (Instruction Set Summary).

    data_transfer.py   5.1.1   MOV, PUSH, POP, XCHG, CMOVcc ...
    arithmetic.py      5.1.2   ADD, SUB, MUL, DIV ...
    decimal.py         5.1.3   DAA, AAM ...
    logical.py         5.1.4   AND, OR, XOR, NOT
    shift_rotate.py    5.1.5   SHL, SAR, ROL, SHLD ...
    bit_byte.py        5.1.6   BT, BSF, SETcc, TEST
    control.py         5.1.7   JMP, Jcc, CALL, RET, INT, IRET, LOOP, ENTER
    string.py          5.1.8-9 MOVS, CMPS, SCAS, STOS, LODS, INS, OUTS, and their REP
    flag_control.py    5.1.11  STC, CLD, STI, PUSHF, LAHF ...
    segment.py         5.1.12  LDS, LES ...
    miscellaneous.py   5.1.9, 5.1.13  LEA, NOP, XLAT, CPUID, IN, OUT
    bit_manipulation.py  5.1.16  ANDN, BEXTR, PDEP, TZCNT ...
    x87_control.py     5.2.6   FNINIT, FLDCW, FNSAVE ...
    state.py           5.2.7   FXSAVE, FXRSTOR; LDMXCSR (5.5.3)
    cacheability.py    5.6.4   CLFLUSH, LFENCE, MOVNTI ...
    system.py          5.21    LGDT, MOV CR, INVLPG, HLT, RDMSR ...
    fast_call.py       5.21    SYSCALL, SYSRET, SYSENTER, SYSEXIT

Importing this package fills `DEFINITIONS`.
"""

from mini_bhyve.instructions import (  # noqa: F401
    arithmetic,
    bit_byte,
    bit_manipulation,
    cacheability,
    control,
    data_transfer,
    decimal,
    fast_call,
    flag_control,
    logical,
    miscellaneous,
    segment,
    shift_rotate,
    state,
    string,
    system,
    x87_control,
)
from mini_bhyve.instructions.definition import DEFINITIONS

__all__ = ["DEFINITIONS"]
