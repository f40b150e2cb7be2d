"""Miscellaneous instructions (Intel SDM vol. 1, 5.1.13) and input/output (5.1.9)."""

from __future__ import annotations

from mini_bhyve import cpuid as identification
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import general_protection
from mini_bhyve.instructions.definition import instruction
from mini_bhyve.operands import RAX, RBX, RCX, RDX


@instruction("lea")
def lea(cpu, dst, src):
    """LEA: the address itself, cut or zero-extended to the register."""
    dst.value = src.address() & dst.mask


@instruction(
    "nop", "pause", "prefetchnta", "prefetcht0", "prefetcht1", "prefetcht2", "prefetch", "prefetchw", "prefetchwt1",
    "endbr32", "endbr64", "rdsspd", "rdsspq", "cldemote",
    "bndcl", "bndcn", "bndcu", "bndldx", "bndmk", "bndmov", "bndstx",
)  # fmt: skip
def nop(cpu, *operands):
    """NOP; hints that change nothing that can be seen; and what is a NOP as long as CPUID does not offer it.

    The last are in the part of the opcode map that was set aside for hints (0F 18 to 0F 1F), so that a program may use
    them without asking: they do something only on processors with CET, MPX and so on.
    """


@instruction("xlatb", encoded=True)
def xlat(cpu, encoding):
    """XLAT: AL from the table at DS:EBX, AL itself being the index."""
    offset = (cpu.regs[RBX].value + (cpu.regs[RAX].value & 0xFF)) & (1 << encoding.address_width) - 1
    cpu.regs[RAX].value = cpu.regs[RAX].value & ~0xFF | cpu.load_segment_memory(encoding.segment, offset, 8)


@instruction("cpuid", data_decides=True)
def cpuid(cpu):
    leaf, subleaf = cpu.regs[RAX].value & 0xFFFFFFFF, cpu.regs[RCX].value & 0xFFFFFFFF
    values = identification.cpuid(leaf, subleaf, cpu.code_size, cpu.claim_x87)
    for index, value in zip((RAX, RBX, RCX, RDX), values):
        cpu.regs[index].value = value


# --- Input and output -----------------------------------------------------------------------------------------------


def check_port_allowed(cpu, port, width):
    """Above IOPL, and always in virtual-8086 mode, the TSS's bit map decides: a 1 for any of the ports is #GP.

    (SDM vol. 1, 19.5.2; vol. 3B, 20.3.2.)
    """
    cpu.debug.note_port(port, width // 8)
    if not cpu.virtual_8086_mode and (not cpu.protected_mode or cpu.cpl <= cpu.iopl):
        return
    tss = cpu.tr
    if tss.access & seg.TYPE != seg.TSS32_BUSY or tss.limit < 0x67:
        raise general_protection()
    # Two bytes are always read, as a wide port may run on into the next byte of the map.
    place = cpu.load_system(tss.base + 0x66, 16) + port // 8
    if place + 1 > tss.limit:
        raise general_protection()
    bits = cpu.load_system(tss.base + place, 16) >> port % 8
    if bits & (1 << width // 8) - 1:
        raise general_protection()


@instruction("in", ends_block=True, data_decides=True)
def in_(cpu, dst, port):
    """IN: what a device answers may change what is due next, so a block ends here."""
    number = port.value
    check_port_allowed(cpu, number, dst.width)
    dst.value = cpu.ports.read(number, dst.width)
    cpu.attention = True


@instruction("out", ends_block=True, data_decides=True)
def out(cpu, port, src):
    number = port.value
    check_port_allowed(cpu, number, src.width)
    cpu.ports.write(number, src.value, src.width)
    cpu.attention = True
