"""Saving the state of x87 and SSE together (Intel SDM vol. 1, 5.2.7), and MXCSR (5.5.3)."""

from __future__ import annotations

from mini_bhyve.faults import general_protection
from mini_bhyve.fpu import check_sse, check_x87, register_places
from mini_bhyve.instructions.definition import NP, instruction
from mini_bhyve.registers import CR4_OSFXSR


def _image(cpu, where):
    """Check the alignment; how many XMM registers the image has: none if the kernel knows nothing of them (OSFXSR)."""
    check_x87(cpu)
    if (cpu.segment_base(where.segment) + where.address()) & 0xF:
        raise general_protection()
    return (16 if cpu.code_size == 64 else 8) if cpu.cr4 & CR4_OSFXSR else 0


def _define_fxsave(name, wide):
    @instruction(name, data_decides=True, not_behind=NP)
    def fxsave(cpu, where):
        """FXSAVE, FXSAVE64 (with pointers of 64 bits)."""
        words = cpu.fpu.image(wide, _image(cpu, where))
        cpu.check_store(where.segment, where.address(), (max(words) + 8) * 8)
        for place, word in words.items():
            where.at(place, 64).value = word


def _define_fxrstor(name, wide):
    @instruction(name, data_decides=True, not_behind=NP)
    def fxrstor(cpu, where):
        """FXRSTOR, FXRSTOR64."""
        simd = _image(cpu, where)
        words = {place: where.at(place, 64).value for place in range(0, register_places(simd).stop, 8)}
        cpu.fpu.set_image(words, wide, simd)


_define_fxsave("fxsave", wide=False)
_define_fxsave("fxsave64", wide=True)
_define_fxrstor("fxrstor", wide=False)
_define_fxrstor("fxrstor64", wide=True)


@instruction("ldmxcsr", data_decides=True, not_behind=NP)
def ldmxcsr(cpu, src):
    check_sse(cpu)
    cpu.fpu.set_mxcsr(src.value)


@instruction("stmxcsr", data_decides=True, not_behind=NP)
def stmxcsr(cpu, dst):
    check_sse(cpu)
    dst.value = cpu.fpu.mxcsr
