"""x87 control instructions (Intel SDM vol. 1, 5.2.6): those that a kernel needs which does not compute itself.

Loading and saving for another task, that is. For the others, see `absent.py`. Those with an N in their name do not
wait: an exception that is still to be reported does not stop them.
"""

from __future__ import annotations

from mini_bhyve.faults import NM, GuestFault
from mini_bhyve.fpu import CLEARED_BY_FNCLEX, EXCEPTIONS, check_pending, check_x87
from mini_bhyve.instructions.definition import instruction
from mini_bhyve.registers import CR0_MP, CR0_TS


@instruction("fninit", data_decides=True)
def fninit(cpu):
    check_x87(cpu)
    cpu.fpu.initialize()


@instruction("fnclex", data_decides=True)
def fnclex(cpu):
    """FNCLEX: forget the exceptions."""
    check_x87(cpu)
    cpu.fpu.status &= ~CLEARED_BY_FNCLEX


@instruction("feni8087_nop", "fdisi8087_nop", "fsetpm", data_decides=True)
def fsetpm(cpu):
    """FNENI and FNDISI of the 8087, FNSETPM of the 80287: they have nothing to do any more."""
    check_x87(cpu)


@instruction("wait", data_decides=True)
def wait(cpu):
    """WAIT: for an exception to be reported. With CR0.MP, #NM tells that another task owns the x87."""
    if cpu.cr0 & CR0_MP and cpu.cr0 & CR0_TS:
        raise GuestFault(NM)
    check_pending(cpu)


# --- Control and status ---------------------------------------------------------------------------------------------


@instruction("fnstcw", data_decides=True)
def fnstcw(cpu, dst):
    check_x87(cpu)
    dst.value = cpu.fpu.control


@instruction("fnstsw", data_decides=True)
def fnstsw(cpu, dst):
    check_x87(cpu)
    dst.value = cpu.fpu.status


@instruction("fldcw", data_decides=True)
def fldcw(cpu, src):
    """FLDCW: an exception that it unmasks is reported by the next instruction that waits."""
    check_x87(cpu)
    check_pending(cpu)
    cpu.fpu.set_words(src.value, cpu.fpu.status)


# --- Environment: all but the registers; and state: with them --------------------------------------------------------


def _layout(cpu, encoding):
    """The size of a word, and whether pointers are linear addresses."""
    return (16 if encoding.operand_width == 16 else 32), not cpu.protected_mode


def _registers(where, width):
    """The places of ST(0) to ST(7), behind the environment: five words each, for more alignment is not asked for."""
    starts = range(7 * width // 8, 7 * width // 8 + 80, 10)
    return [[where.at(start + 2 * word, 16) for word in range(5)] for start in starts]


def _store_environment(cpu, where, width, real):
    for number, word in enumerate(cpu.fpu.environment(width, real)):
        where.at(number * width // 8, width).value = word


def _load_environment(where, width):
    return [where.at(number * width // 8, width).value for number in range(7)]


@instruction("fnstenv", encoded=True, data_decides=True)
def fnstenv(cpu, encoding, where):
    """FNSTENV: and then mask all exceptions."""
    check_x87(cpu)
    width, real = _layout(cpu, encoding)
    cpu.check_store(where.segment, where.address(), 7 * width)
    _store_environment(cpu, where, width, real)
    cpu.fpu.set_words(cpu.fpu.control | EXCEPTIONS, cpu.fpu.status)


@instruction("fldenv", encoded=True, data_decides=True)
def fldenv(cpu, encoding, where):
    check_x87(cpu)
    check_pending(cpu)
    width, real = _layout(cpu, encoding)
    cpu.fpu.set_environment(_load_environment(where, width), width, real)


@instruction("fnsave", encoded=True, data_decides=True)
def fnsave(cpu, encoding, where):
    """FNSAVE: and then as FNINIT, for the next task."""
    check_x87(cpu)
    width, real = _layout(cpu, encoding)
    cpu.check_store(where.segment, where.address(), 7 * width + 8 * 80)
    _store_environment(cpu, where, width, real)
    for places, value in zip(_registers(where, width), cpu.fpu.stack):
        for number, place in enumerate(places):
            place.value = value >> 16 * number & 0xFFFF
    cpu.fpu.initialize()


@instruction("frstor", encoded=True, data_decides=True)
def frstor(cpu, encoding, where):
    check_x87(cpu)
    check_pending(cpu)
    width, real = _layout(cpu, encoding)
    words = _load_environment(where, width)
    values = [
        sum(place.value << 16 * number for number, place in enumerate(places)) for places in _registers(where, width)
    ]
    cpu.fpu.set_environment(words, width, real)
    cpu.fpu.stack = values
