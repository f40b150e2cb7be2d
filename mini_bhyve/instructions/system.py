"""System instructions (Intel SDM vol. 1, 5.21; vol. 3A, 2.8): for the operating system's own use."""

from __future__ import annotations

from mini_bhyve import msr
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import general_protection, undefined_opcode
from mini_bhyve.flags import EXPLICIT, ZF, arithmetic_flags
from mini_bhyve.instructions.definition import instruction
from mini_bhyve.operands import RAX, RCX, RDX, Memory
from mini_bhyve.paging import is_canonical
from mini_bhyve.registers import (
    CR0_TS,
    CR4_FSGSBASE,
    CR4_TSD,
    CR4_UMIP,
)


def _privileged(cpu):
    """Only for level 0: #GP elsewhere."""
    if cpu.cpl != 0:
        raise general_protection()


def _protected_only(cpu):
    """Not recognized in real mode."""
    if not cpu.protected_mode:
        raise undefined_opcode()


def _kept_from_programs(cpu):
    """With CR4.UMIP, only level 0 sees where the kernel's tables are (SDM vol. 3A, 2.5, "UMIP")."""
    if cpu.cpl and cpu.cr4 & CR4_UMIP:
        raise general_protection()


def _64_bit_only(cpu):
    """Not recognized outside 64-bit mode."""
    if cpu.code_size != 64:
        raise undefined_opcode()


# --- Descriptor tables ----------------------------------------------------------------------------------------------
#
# In memory, GDTR and IDTR are a limit of 16 bits and behind it a base of 32 (64 in 64-bit mode). With a 16-bit operand
# size only 24 bits of the base count, as on the 80286.


def _load_table(cpu, encoding, pointer):
    _privileged(cpu)
    limit = pointer.at(0, 16).value
    base = pointer.at(2, 64 if cpu.code_size == 64 else 32).value
    if cpu.code_size != 64:
        return base & 0xFFFFFF if encoding.operand_width == 16 else base, limit
    if not is_canonical(base):
        raise general_protection()
    return base, limit


def _store_table(cpu, pointer, base, limit):
    pointer.at(0, 16).value = limit
    pointer.at(2, 64 if cpu.code_size == 64 else 32).value = base


@instruction("lgdt", encoded=True, data_decides=True)
def lgdt(cpu, encoding, pointer):
    cpu.gdtr_base, cpu.gdtr_limit = _load_table(cpu, encoding, pointer)


@instruction("lidt", encoded=True, data_decides=True)
def lidt(cpu, encoding, pointer):
    cpu.idtr_base, cpu.idtr_limit = _load_table(cpu, encoding, pointer)


@instruction("sgdt", data_decides=True)
def sgdt(cpu, pointer):
    _kept_from_programs(cpu)
    _store_table(cpu, pointer, cpu.gdtr_base, cpu.gdtr_limit)


@instruction("sidt", data_decides=True)
def sidt(cpu, pointer):
    _kept_from_programs(cpu)
    _store_table(cpu, pointer, cpu.idtr_base, cpu.idtr_limit)


@instruction("lldt", data_decides=True)
def lldt(cpu, selector):
    _protected_only(cpu)
    _privileged(cpu)
    seg.load_ldtr(cpu, selector.value & 0xFFFF)


@instruction("ltr", data_decides=True)
def ltr(cpu, selector):
    _protected_only(cpu)
    _privileged(cpu)
    seg.load_tr(cpu, selector.value & 0xFFFF)


def _store_selector(dst, selector):
    """16 bits of memory, or a whole register."""
    (dst.at(0, 16) if isinstance(dst, Memory) else dst).value = selector


@instruction("sldt", data_decides=True)
def sldt(cpu, dst):
    _protected_only(cpu)
    _kept_from_programs(cpu)
    _store_selector(dst, cpu.ldtr.selector)


@instruction("str", data_decides=True)
def str_(cpu, dst):
    _protected_only(cpu)
    _kept_from_programs(cpu)
    _store_selector(dst, cpu.tr.selector)


# --- Looking at descriptors without using them ----------------------------------------------------------------------


def _set_zero(cpu, ok):
    flags = arithmetic_flags(cpu.flags) & ~ZF | (ZF if ok else 0)
    cpu.flags = (EXPLICIT, flags, 0, 0, 32)


def _visible_descriptor(cpu, selector):
    """The descriptor if the selector names one that this privilege level may see, else None."""
    if seg.is_null(selector):
        return None
    base_limit = cpu.ldtr.limit if selector & 4 else cpu.gdtr_limit
    if selector | 7 > base_limit:
        return None
    descriptor = seg.read_descriptor(cpu, selector)
    conforming = descriptor.is_code and descriptor.access & seg.CONFORMING
    if not conforming and max(cpu.cpl, selector & 3) > descriptor.dpl:
        return None
    return descriptor


# System descriptors that are segments, and those that do not exist in long mode (SDM vol. 2A, LAR, table 3-54).
_WITH_LIMIT = (seg.TSS16_AVAILABLE, seg.LDT, seg.TSS16_BUSY, seg.TSS32_AVAILABLE, seg.TSS32_BUSY)
_NOT_IN_LONG_MODE = (seg.TSS16_AVAILABLE, seg.TSS16_BUSY, seg.CALL_GATE16, seg.TASK_GATE)


def _has_type(cpu, descriptor, system_types):
    """Whether it is a visible descriptor of code, data or one of the system types."""
    if descriptor is None or not descriptor.is_system:
        return descriptor is not None
    kind = descriptor.access & seg.TYPE
    return kind in system_types and not (cpu.long_mode and kind in _NOT_IN_LONG_MODE)


@instruction("lar", data_decides=True)
def lar(cpu, dst, src):
    """LAR: bits 55-52 and 47-40 of a descriptor, as they stand there."""
    _protected_only(cpu)
    descriptor = _visible_descriptor(cpu, src.value & 0xFFFF)
    ok = _has_type(cpu, descriptor, (*_WITH_LIMIT, seg.CALL_GATE16, seg.CALL_GATE32, seg.TASK_GATE))
    if ok:
        dst.value = descriptor.raw >> 32 & 0x00F0FF00 & dst.mask
    _set_zero(cpu, ok)


@instruction("lsl", data_decides=True)
def lsl(cpu, dst, src):
    """LSL: a segment's limit in bytes; gates have none."""
    _protected_only(cpu)
    descriptor = _visible_descriptor(cpu, src.value & 0xFFFF)
    ok = _has_type(cpu, descriptor, _WITH_LIMIT)
    if ok:
        dst.value = descriptor.limit & dst.mask
    _set_zero(cpu, ok)


def _define_verify(name, allowed):
    @instruction(name, data_decides=True)
    def verify(cpu, src):
        """VERR, VERW: whether this privilege level could read or write the segment."""
        _protected_only(cpu)
        descriptor = _visible_descriptor(cpu, src.value & 0xFFFF)
        _set_zero(cpu, descriptor is not None and not descriptor.is_system and allowed(descriptor))


_define_verify("verr", lambda descriptor: not descriptor.is_code or descriptor.access & seg.READABLE)
_define_verify("verw", lambda descriptor: not descriptor.is_code and descriptor.access & seg.WRITABLE)


@instruction("arpl", data_decides=True)
def arpl(cpu, dst, src):
    """ARPL: raise the RPL of a selector that was handed over to the caller's, so that it cannot reach further."""
    _protected_only(cpu)
    selector, caller = dst.value, src.value & 3
    raised = selector & 3 < caller
    dst.value = selector & ~3 | caller if raised else selector  # it has to be writable in any case
    _set_zero(cpu, raised)


# --- Control registers ----------------------------------------------------------------------------------------------
#
# MOV to and from CRn and DRn is the MOV of data_transfer.py; the operand does the rest, and the check of the privilege
# level.


@instruction("smsw", data_decides=True)
def smsw(cpu, dst):
    """SMSW: the low half of CR0, from the time when there was no more of it."""
    _kept_from_programs(cpu)
    if isinstance(dst, Memory):
        dst.at(0, 16).value = cpu.cr0 & 0xFFFF
    else:
        dst.value = cpu.cr0 & dst.mask


@instruction("lmsw", ends_block=True, data_decides=True)
def lmsw(cpu, src):
    """LMSW: PE, MP, EM and TS of CR0; PE can be set by it and not cleared."""
    _privileged(cpu)
    low = src.value & 0xF
    cpu.write_cr0(cpu.cr0 & ~0xE | low)


@instruction("clts", data_decides=True)
def clts(cpu):
    _privileged(cpu)
    cpu.cr0 &= ~CR0_TS


@instruction("invlpg", ends_block=True, data_decides=True)
def invlpg(cpu, where):
    """INVLPG: forget the translation of one page."""
    _privileged(cpu)
    cpu.forget_page((cpu.segment_base(where.segment) + where.address()) & cpu.linear_mask)


@instruction("invd", "wbinvd", "wbnoinvd", data_decides=True)
def wbinvd(cpu):
    """INVD, WBINVD: there are no caches to empty. (WBNOINVD is WBINVD with a prefix that means nothing yet.)"""
    _privileged(cpu)


@instruction("hlt", ends_block=True, data_decides=True)
def hlt(cpu):
    _privileged(cpu)
    cpu.halt()


# --- Model-specific registers and the time stamp --------------------------------------------------------------------


def _write_pair(cpu, value):
    """EDX:EAX."""
    cpu.regs[RAX].value, cpu.regs[RDX].value = value & 0xFFFFFFFF, value >> 32


def _read_time_stamp(cpu):
    if cpu.cr4 & CR4_TSD and cpu.cpl:
        raise general_protection()
    _write_pair(cpu, cpu.time_stamp)


@instruction("rdtsc", data_decides=True)
def rdtsc(cpu):
    _read_time_stamp(cpu)


@instruction("rdtscp", data_decides=True)
def rdtscp(cpu):
    """RDTSCP: RDTSC, and in ECX what the operating system says of this processor."""
    _read_time_stamp(cpu)
    cpu.regs[RCX].value = cpu.msrs[msr.TSC_AUX]


@instruction("rdpid", data_decides=True)
def rdpid(cpu, dst):
    dst.value = cpu.msrs[msr.TSC_AUX]


@instruction("rdpmc", data_decides=True)
def rdpmc(cpu):
    """RDPMC: there are no performance-monitoring counters, and #GP is what the number of one that is not there gives.

    (So CR4.PCE, which lets programs read them, changes nothing.)
    """
    raise general_protection()


@instruction("rdmsr", data_decides=True)
def rdmsr(cpu):
    _privileged(cpu)
    _write_pair(cpu, msr.read(cpu, cpu.regs[RCX].value & 0xFFFFFFFF))


@instruction("wrmsr", ends_block=True, data_decides=True)
def wrmsr(cpu):
    _privileged(cpu)
    value = (cpu.regs[RDX].value & 0xFFFFFFFF) << 32 | cpu.regs[RAX].value & 0xFFFFFFFF
    msr.write(cpu, cpu.regs[RCX].value & 0xFFFFFFFF, value)


# --- The bases of FS and GS -----------------------------------------------------------------------------------------
#
# In 64-bit mode they are what is left of segmentation: FS points to a thread's own data, GS to the processor's.


@instruction("swapgs", data_decides=True)
def swapgs(cpu):
    """SWAPGS: a kernel that has been entered by SYSCALL has no register to work with, but for this."""
    _64_bit_only(cpu)
    _privileged(cpu)
    base = cpu.segments[seg.GS].base
    msr.set_base(cpu, seg.GS, cpu.msrs[msr.KERNEL_GS_BASE])
    cpu.msrs[msr.KERNEL_GS_BASE] = base


def _define_base_access(letter, index):
    @instruction(f"rd{letter}sbase", data_decides=True)
    def read_base(cpu, dst):
        """RDFSBASE, RDGSBASE: at any privilege level, if the operating system lets it."""
        _bases_enabled(cpu)
        dst.value = cpu.segments[index].base & dst.mask

    @instruction(f"wr{letter}sbase", data_decides=True)
    def write_base(cpu, src):
        """WRFSBASE, WRGSBASE: 32 bits are zero-extended."""
        _bases_enabled(cpu)
        msr.set_base(cpu, index, src.value)


def _bases_enabled(cpu):
    _64_bit_only(cpu)
    if not cpu.cr4 & CR4_FSGSBASE:
        raise undefined_opcode()


_define_base_access("f", seg.FS)
_define_base_access("g", seg.GS)
