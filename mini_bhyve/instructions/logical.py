"""Logical instructions (Intel SDM vol. 1, 5.1.4), and TEST, which is AND without a result (5.1.6)."""

from __future__ import annotations

from mini_bhyve.flags import LOGIC
from mini_bhyve.instructions.definition import instruction


@instruction("and", lockable=True)
def and_(cpu, dst, src):
    result = dst.value & src.value
    dst.value = result
    cpu.flags = (LOGIC, 0, 0, result, dst.width)


@instruction("or", lockable=True)
def or_(cpu, dst, src):
    result = dst.value | src.value
    dst.value = result
    cpu.flags = (LOGIC, 0, 0, result, dst.width)


@instruction("xor", lockable=True)
def xor(cpu, dst, src):
    result = dst.value ^ src.value
    dst.value = result
    cpu.flags = (LOGIC, 0, 0, result, dst.width)


@instruction("not", lockable=True)
def not_(cpu, dst):
    """NOT changes no flags."""
    dst.value = dst.value ^ dst.mask


@instruction("test")
def test(cpu, dst, src):
    cpu.flags = (LOGIC, 0, 0, dst.value & src.value, dst.width)
