"""Caches and the order of memory accesses (Intel SDM vol. 1, 5.5.4 and 5.6.4). There are no caches here, and every
access is done when its instruction is; what is left to do is to find faults.

The fences and MOVNTI came with SSE and SSE2, which CPUID does not offer. Kernels for 64 bits use them without asking,
since every processor with 64 bits has them; they need neither XMM registers nor anything else of SSE.
"""

from __future__ import annotations

from mini_bhyve.instructions.definition import NP, instruction


@instruction("lfence", "mfence", "sfence", not_behind=NP)
def fence(cpu):
    """LFENCE, MFENCE, SFENCE: all loads, accesses, stores before it come before all after it. They always do."""


@instruction("movnti", not_behind=NP)
def movnti(cpu, dst, src):
    """MOVNTI: a store that shall not push anything else out of the cache."""
    dst.value = src.value


def _flush(cpu, where):
    cpu.check_touch(where.segment, where.address())


# Behind 66, CLFLUSH is another instruction.
@instruction("clflush", data_decides=True, not_behind=NP)
def clflush(cpu, where):
    """CLFLUSH: faults as the load of a byte does."""
    _flush(cpu, where)


@instruction("clflushopt", "clwb", data_decides=True)
def clflushopt(cpu, where):
    """CLFLUSHOPT, in any order with others; CLWB, which keeps the line."""
    _flush(cpu, where)
