"""Comparing the outcomes of our processor and of Unicorn's: what counts, and what does not.

What is compared is everything there is: registers, flags, memory, ports, and the exception with its error code where
there is one. What the manual (Intel SDM) leaves undefined is left out, by the tables below; and where Unicorn does
something else than the manual says, another table names it and the place.
"""

from __future__ import annotations

import collections
import contextlib
from typing import Any, Callable, NamedTuple
from unittest import mock

import capstone
from capstone import x86_const as x86
from random_instructions import CS, REGISTERS, ROOM, SEGMENTS, STRINGS, decode, memory_operand, offset_of, repeats
from random_pages import ACCESSED, LAR, STAC, TABLES
from unicorn_tools import (
    CODE,
    DATA,
    GDT,
    RCX,
    RDI,
    RSI,
    SIZE,
    WORLDS,
    Case,
    Ours,
    Outcome,
    Theirs,
    Unusable,
    World,
    usual_memory,
)

from mini_bhyve import flags as fl
from mini_bhyve import interrupts
from mini_bhyve import segmentation as seg
from mini_bhyve.access import MemoryAccess
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import GP, PF, SS, UD
from mini_bhyve.instructions import DEFINITIONS, control
from mini_bhyve.operands import ZERO, Memory
from mini_bhyve.registers import CR4_PAE, CR4_SMAP

# --- What the manual leaves undefined ---------------------------------------------------------------------------------

ALL = fl.ARITHMETIC
# SDM vol. 2, "Flags Affected" of each instruction; vol. 1, appendix A, has them all in one table.
UNDEFINED_FLAGS = {
    **dict.fromkeys(("aaa", "aas"), fl.OF | fl.SF | fl.ZF | fl.PF),
    **dict.fromkeys(("aam", "aad"), fl.OF | fl.AF | fl.CF),
    **dict.fromkeys(("daa", "das"), fl.OF),
    **dict.fromkeys(("and", "or", "xor", "test"), fl.AF),
    **dict.fromkeys(("mul", "imul"), fl.SF | fl.ZF | fl.AF | fl.PF),
    **dict.fromkeys(("div", "idiv"), ALL),
    **dict.fromkeys(("bt", "bts", "btr", "btc"), fl.OF | fl.SF | fl.AF | fl.PF),
    **dict.fromkeys(("bsf", "bsr"), ALL & ~fl.ZF),
    **dict.fromkeys(("tzcnt", "lzcnt"), ALL & ~fl.ZF & ~fl.CF),
    **dict.fromkeys(("andn", "blsi", "blsmsk", "blsr", "bzhi"), fl.AF | fl.PF),
    "bextr": fl.AF | fl.SF | fl.PF,
}
SHIFTS = ("shl", "sal", "shr", "sar", "shld", "shrd")
ROTATES = ("rol", "ror", "rcl", "rcr")


def shift_count(case: Case, insn: capstone.CsInsn) -> int:
    width = insn.operands[0].size * 8
    if insn.opcode[0] in (0xD0, 0xD1):
        return 1
    by_cl = insn.opcode[0] in (0xD2, 0xD3) or insn.opcode[:2] in ([0x0F, 0xA5], [0x0F, 0xAD])
    count = case.registers[RCX] if by_cl else insn.bytes[-1]
    return count & (0x3F if width == 64 else 0x1F)


def undefined_flags(case: Case, insn: capstone.CsInsn) -> int:
    """The flags that the manual leaves undefined after this instruction with these operands."""
    name = insn.insn_name()
    if name not in SHIFTS + ROTATES:
        return UNDEFINED_FLAGS.get(name, 0)
    count, width = shift_count(case, insn), insn.operands[0].size * 8
    undefined = 0
    if count > 1:
        undefined |= fl.OF
    if name in SHIFTS and count:
        undefined |= fl.AF
    if name in ("shl", "sal", "shr") and count >= width:
        undefined |= fl.CF  # nothing is left of the operand
    if name in ("shld", "shrd") and count > width:
        undefined |= ALL
    return undefined


# Flags that are not kept alike: RF and the virtual interrupt flags mean nothing to either processor here. RF would be
# cleared again with the next instruction (vol. 3B, 17.3.1.1), and we never set it; Unicorn never changes VIF and VIP.
NOT_KEPT = fl.RF | fl.VIF | fl.VIP


# --- Where Unicorn is wrong -------------------------------------------------------------------------------------------


class Replacement(NamedTuple):
    """What shall stand in the place of a function of ours: `make` makes it from that function."""

    owner: object
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]


class Error(NamedTuple):
    """Something that Unicorn (QEMU 5) does not do as the manual says, and how to tell that this is it.

    Where `likewise` can make ours err in the same way, the outcomes must be alike then.
    """

    what: str
    manual: str
    names: str  # of the instructions concerned; all, if empty
    applies: Callable[[Case, capstone.CsInsn, Outcome, Outcome], bool] = lambda case, insn, ours, theirs: True
    fields: str = ""  # in which the outcomes differ then; any, if empty
    likewise: tuple[Replacement, ...] = ()


def unchecked(_: Callable[..., Any]) -> Callable[..., Any]:
    """In place of Cpu.check_target() and segmentation.check_offset(): whether code can be there is not asked."""
    return lambda *_: None


def unchecked_branch(_: Callable[..., Any]) -> Callable[..., Any]:
    """In place of Cpu.branch(), too."""

    def branch(cpu: Cpu, taken: bool, target: int) -> None:
        if taken:
            cpu.next_ip = target

    return branch


def near_limit(case: Case, insn: capstone.CsInsn) -> bool:
    """A string begins near the end or the beginning of its segment, or beyond it: of 64 KiB, or of 4 GiB."""
    bits, reach = WORLDS[case.world].bits, ROOM if repeats(insn) else 8
    offsets = [case.registers[index] & (1 << insn.addr_size * 8) - 1 for index in (RSI, RDI)]
    size = 0x10000 if bits == 16 else 1 << 32
    return bits != 64 and any(not reach <= offset < size - reach for offset in offsets)


TWO_PARTS = (
    "lds les lfs lgs lss ljmp lcall jmp call bound lgdt lidt sgdt sidt fxsave fxrstor fnsave frstor fnstenv fldenv"
)


def just_before_its_end(case: Case, insn: capstone.CsInsn, ours: Outcome, theirs: Outcome) -> bool:
    """A memory operand with a 16-bit address begins there."""
    where = memory_operand(insn)
    if where is None or insn.addr_size != 2:
        return False
    return offset_of(insn, where, case.registers, case.start) > 0x10000 - ROOM


def beyond_the_end(_: Callable[..., Any]) -> Callable[..., Any]:
    """In place of Memory.at(): the distance is added to what was cut to 16 bits."""

    def at(self: Memory, distance: int, width: int) -> Memory:
        kind = type(self).for_width(width)
        zero = self.cpu.regs[ZERO]
        return kind(self.cpu, width, self.segment, zero, zero, 1, self.address() + distance, 32)

    return at


def as_if_to_load(usual: Callable[..., Any]) -> Callable[..., Any]:
    """In place of Cpu.linear(): what may be read of a code segment may be written."""

    def linear(cpu: Cpu, index: int, offset: int, size: int, writing: bool) -> int:
        return usual(cpu, index, offset, size, writing and index != CS)

    return linear


def with_rights_of_level_0(transfer: Callable[..., Any]) -> Callable[..., Any]:
    """In place of a far transfer: its accesses to the stack are the supervisor's."""

    def instead(cpu: Cpu, *arguments: int) -> None:
        cpu.user_access, cpu.read_tlb, cpu.write_tlb = 0, cpu.mmu.read_tlb[0], cpu.mmu.write_tlb[0]
        try:
            transfer(cpu, *arguments)
        finally:
            cpu.update_user_access()

    return instead


def without_a_look_at_pages(_: Callable[..., Any]) -> Callable[..., Any]:
    """In place of Cpu.check_store(): only the segment is looked at."""

    def check_store(cpu: Cpu, index: int, offset: int, width: int) -> None:
        cpu.linear(index, offset, width >> 3, True)

    return check_store


def to_virtual_8086_from_anywhere(usual: Callable[..., Any]) -> Callable[..., Any]:
    """In place of IRET: if EFLAGS on the stack has VM set, no level and no mode is asked for, and EIP is cut."""

    def instead(cpu: Cpu, width: int) -> None:
        ip, selector, flags = (cpu.peek(index * width >> 3, width) for index in range(3))
        if width == 32 and flags & fl.VM:
            interrupts._return_to_virtual_8086(cpu, ip & 0xFFFF, selector & 0xFFFF, flags)
        else:
            usual(cpu, width)

    return instead


def through_cs(insn: capstone.CsInsn) -> bool:
    return any(o.type == x86.X86_OP_MEM and SEGMENTS.get(o.mem.segment) == CS for o in insn.operands)


def prefixes(insn: capstone.CsInsn) -> bytes:
    return insn.bytes[: insn.bytes.index(insn.opcode[0])]


LOCKABLE = "adc add and btc btr bts cmpxchg cmpxchg8b cmpxchg16b dec inc neg not or sbb sub xadd xchg xor".split()


def may_be_locked(insn: capstone.CsInsn) -> bool:
    """It is one of those that may have a LOCK prefix, and its destination is in memory (vol. 2A, LOCK)."""
    name, kinds = insn.insn_name(), [operand.type for operand in insn.operands]
    return name in LOCKABLE and x86.X86_OP_MEM in (kinds if name == "xchg" else kinds[:1])


def source_of(case: Case, insn: capstone.CsInsn) -> int:
    """What the register holds that is the last operand."""
    return case.registers[REGISTERS[insn.operands[-1].reg]]


PAGE_TABLE_BYTES = range(TABLES[0] << 12, TABLES[-1] + 1 << 12)


def is_near_call(insn: capstone.CsInsn) -> bool:
    return insn.opcode[0] == 0xE8 or (insn.opcode[0] == 0xFF and insn.modrm >> 3 & 7 == 2)


def only_tables_differ(ours: Outcome, theirs: Outcome) -> bool:
    """In memory: the accessed and dirty bits."""
    return all(place in PAGE_TABLE_BYTES for place in different_places(ours.memory, theirs.memory))


def both(vector: int, ours: Outcome, theirs: Outcome) -> bool:
    return ours.vector == theirs.vector == vector


def smap_and_ac(case: Case) -> bool:
    smap = case.controls is not None and bool(case.controls[2] & CR4_SMAP)
    return smap and (bool(case.flags & fl.AC) or STAC in case.code)


NEAR_BRANCHES = (
    "jmp call ret loop loope loopne jrcxz jecxz jcxz jo jno jb jae je jne jbe ja js jns jp jnp jl jge jle jg"
)
FAR_RETURNS = "retf retfq iret iretd iretq"
VEX_INSTRUCTIONS = "andn bextr blsi blsmsk blsr bzhi mulx pdep pext rorx sarx shlx shrx"
UNICORN_ERRORS = [
    Error("a jump beyond the limit, or to an address that is not canonical, faults only where it leads to",
          "vol. 2A, Jcc, JMP, CALL, IRET; vol. 2B, RET: #GP(0)", f"{NEAR_BRANCHES} {FAR_RETURNS} ljmp lcall",
          lambda case, insn, ours, theirs: (ours.vector, ours.error_code) == (GP, 0), likewise=(
              Replacement(Cpu, "check_target", unchecked), Replacement(Cpu, "branch", unchecked_branch),
              Replacement(seg, "check_offset", unchecked))),
    Error("the limit of a segment is not checked", "vol. 3A, 5.3",
          " ".join(f"{name}{suffix}" for name in STRINGS for suffix in "bwd"),
          lambda case, insn, ours, theirs: ours.vector in (GP, SS) and theirs.vector in (None, PF)
          and near_limit(case, insn)),
    Error("of a pointer that begins just before offset 10000h, the second part is not looked for at 0",
          "80286 manual, LDS: vector 13 at FFFFh and FFFDh, so not at FFFEh", TWO_PARTS, just_before_its_end,
          likewise=(Replacement(Memory, "at", beyond_the_end),)),
    Error("a store through CS is let through, as nothing is checked when memory is accessed", "vol. 3A, 5.4", "",
          lambda case, insn, ours, theirs: ours.vector == GP and through_cs(insn),
          likewise=(Replacement(MemoryAccess, "linear", as_if_to_load),)),
    Error("some instructions may have a LOCK prefix that may not", "vol. 2A, LOCK: #UD", "",
          lambda case, insn, ours, theirs: ours.vector == UD and 0xF0 in prefixes(insn) and not may_be_locked(insn)),
    Error("with a 16-bit operand size, all of EBP is changed", "vol. 2A, ENTER", "enter",
          lambda case, insn, ours, theirs: 0x66 in prefixes(insn) or case.world in ("real", "code16"),
          fields="registers"),
    Error("F6 /1 and F7 /1 are refused; processors run them as TEST", "AMD vol. 3, table A-6", "test",
          lambda case, insn, ours, theirs: insn.modrm >> 3 & 7 == 1 and theirs.vector == UD),
    Error("the number of bytes is taken to be signed", "vol. 2B, RET", "ret retf retfq",
          lambda case, insn, ours, theirs: insn.bytes[-1] >= 0x80, fields="registers"),
    Error("the upper half of the register is kept", "vol. 2B, SMSW", "smsw", fields="registers"),
    Error("with LOCK, the flags are those of the wrong number", "vol. 2B, NEG", "neg",
          lambda case, insn, ours, theirs: 0xF0 in prefixes(insn), fields="flags"),
    Error("INT 6 is reported as an invalid opcode", "vol. 2A, INT n", "int",
          lambda case, insn, ours, theirs: ours.vector == theirs.vector == UD, fields="ip"),
    Error("with a REX prefix, SPL is taken for AH", "vol. 2A, LAHF", "lahf sahf",
          lambda case, insn, ours, theirs: insn.rex != 0, fields="registers flags"),
    Error("a 32-bit register that shall not change loses its upper half", "vol. 2A, CMPXCHG", "cmpxchg",
          lambda case, insn, ours, theirs: WORLDS[case.world].bits == 64 and insn.operands[0].size == 4,
          fields="registers"),
    Error("REX.R is taken for a part of the opcode", "vol. 2A, 2.2.1.2", "mov",
          lambda case, insn, ours, theirs: insn.opcode[0] in (0xC6, 0xC7) and insn.rex & 4 != 0),
    Error("the privilege level is looked at before the register's number", "vol. 3A, table 6-2", "mov",
          lambda case, insn, ours, theirs: (ours.vector, theirs.vector) == (UD, GP), fields="vector"),
    Error("a null selector for SS needs no RPL", "vol. 2B, MOV: #GP unless RPL = CPL", "mov pop lss",
          lambda case, insn, ours, theirs: ours.vector == GP and theirs.vector is None and 0 < theirs.selectors[2] < 4),
    Error("a null selector is let through", "vol. 2A, LTR: #GP(0)", "ltr",
          lambda case, insn, ours, theirs: ours.vector == GP and ours.error_code == 0 and theirs.vector is None),
    Error("a REX.W prefix is ignored, as on AMD's", "vol. 2A, LDS/LES/LFS/LGS/LSS", "lfs lgs lss",
          lambda case, insn, ours, theirs: insn.rex & 8 != 0),
    Error("in 64-bit mode a 66 prefix makes a near branch 16 bits wide, as on AMD's", "vol. 2A, CALL, Jcc, JMP, RET",
          NEAR_BRANCHES, lambda case, insn, ours, theirs: case.world.endswith("64") and 0x66 in prefixes(insn)),
    Error("an offset beyond the limit is noticed late, and reported with the selector", "vol. 2A, CALL", "lcall ljmp",
          lambda case, insn, ours, theirs: ours.vector == theirs.vector == GP, fields="error_code memory"),
    Error("real mode is refused before it is asked whether there is such an instruction", "vol. 2B, SYSRET", "sysret",
          lambda case, insn, ours, theirs: case.world == "real", fields="vector"),
    Error("there is no such instruction", "vol. 2B, RDPMC", "rdpmc", fields="vector"),
    Error("a base that is not canonical is taken", "vol. 2A, LGDT/LIDT", "lgdt lidt",
          lambda case, insn, ours, theirs: WORLDS[case.world].bits == 64 and ours.vector == GP and not theirs.vector),
    Error("VEX.B and the top bit of VEX.vvvv count in 32-bit mode, too", "vol. 2A, 2.3.5", VEX_INSTRUCTIONS,
          lambda case, insn, ours, theirs: WORLDS[case.world].bits == 32 and (
              insn.opcode[1] & 0x20 == 0 or insn.opcode[2] & 0x40 == 0)),
    Error("VEX is not known in 16-bit protected mode", "vol. 2A, 2.3", VEX_INSTRUCTIONS,
          lambda case, insn, ours, theirs: case.world == "code16"),
    Error("a bit number beyond the operand counts as that of the top bit", "vol. 2A, BZHI", "bzhi",
          lambda case, insn, ours, theirs: ours.flags & fl.CF != 0, fields="registers flags"),
    Error("the number of the top bit sets CF", "vol. 2A, BZHI: CF is 1 for more than OperandSize - 1", "bzhi",
          lambda case, insn, ours, theirs: ours.flags & fl.CF == 0, fields="flags"),
    Error("the upper half of a 32-bit source counts", "vol. 2A, BEXTR", "bextr",
          lambda case, insn, ours, theirs: WORLDS[case.world].bits == 64 and insn.operands[0].size == 4,
          fields="registers flags"),
    Error("a length beyond the operand leaves out the top bit", "vol. 2A, BEXTR", "bextr",
          lambda case, insn, ours, theirs: source_of(case, insn) >> 8 & 0xFF >= insn.operands[0].size * 8,
          fields="registers flags"),
    Error("in 16-bit code the operand has 32 bits", "vol. 2B, MOVBE, POPCNT", "movbe popcnt",
          lambda case, insn, ours, theirs: WORLDS[case.world].bits == 16),
    Error("66 counts more than F3 or REX.W, and F2 more than F3", "vol. 2A, ADOX; vol. 2B, POPCNT", "adox popcnt",
          lambda case, insn, ours, theirs: 0x66 in prefixes(insn) or 0xF2 in prefixes(insn)),
    Error("66 counts more than F3", "vol. 2D, table A-4: there is no F3 0F 38 F0", "movbe",
          lambda case, insn, ours, theirs: ours.vector == UD and 0x66 in prefixes(insn) and 0xF3 in prefixes(insn)),
    Error("the upper half of a 32-bit mask counts", "vol. 2B, PDEP, PEXT", "pdep pext",
          lambda case, insn, ours, theirs: insn.operands[2].type == x86.X86_OP_REG, fields="registers"),
    Error("66, F2 and F3 are let through", "vol. 2A, 3.1.1.1: NP", "",
          lambda case, insn, ours, theirs: ours.vector == UD and insn.opcode[:2] in ([0x0F, 0xAE], [0x0F, 0xC3])),
    Error("reserved bits of MXCSR may be set", "vol. 2A, FXRSTOR, LDMXCSR: #GP", "fxrstor fxrstor64 ldmxcsr",
          lambda case, insn, ours, theirs: ours.vector == GP),
    Error("what is unused is zero or kept, pointers are not saved", "vol. 1, 8.1.10; vol. 2A, FXSAVE",
          "fnsave fnstenv fxsave fxsave64", fields="memory"),
    Error("with REX.W, the registers lie 28 bytes too far up", "vol. 1, figure 8-9", "fnsave frstor",
          lambda case, insn, ours, theirs: insn.rex & 8 != 0 and PF in (ours.vector, theirs.vector),
          fields="vector error_code ip controls memory"),
    Error("CF is the contrary", "vol. 2A, BLSI: CF is 0 for a source of zero", "blsi", fields="flags"),
    Error("ports are open to every privilege level", "vol. 1, 19.5.2", "in out insb insw insd outsb outsw outsd",
          lambda case, insn, ours, theirs: WORLDS[case.world].cpl > 0 and ours.vector == GP),
    Error("nothing is accessed, not even to see if it may be", "vol. 2A, CLFLUSH: faults and A bit as of a byte load",
          "clflush clflushopt clwb", lambda case, insn, ours, theirs: case.controls is not None
          and only_tables_differ(ours, theirs), fields="vector error_code ip controls memory"),
    Error("the constant behind the displacement is not counted", "vol. 2A, 2.2.1.6: RIP-relative", "shld shrd rorx",
          lambda case, insn, ours, theirs: insn.operands[-1].type == x86.X86_OP_IMM and insn.modrm & 0xC7 == 5
          and WORLDS[case.world].bits == 64),
    Error("the final value of the stack pointer is not tried", "vol. 2A, ENTER: #PF", "enter",
          lambda case, insn, ours, theirs: case.controls is not None,
          likewise=(Replacement(MemoryAccess, "check_store", without_a_look_at_pages),)),
    Error("flags have changed when the store faults", "vol. 3A, 6.5: faults", "rcl rcr",
          lambda case, insn, ours, theirs: both(PF, ours, theirs), fields="flags"),
    Error("what is at the end is not read", "vol. 2A, FLDENV", "fldenv frstor",
          lambda case, insn, ours, theirs: case.controls is not None and only_tables_differ(ours, theirs),
          fields="vector error_code ip controls memory"),
    Error("the data pointer is not read, and MXCSR last", "vol. 2A, FXRSTOR", "fxrstor fxrstor64",
          lambda case, insn, ours, theirs: both(PF, ours, theirs) and theirs.controls[1] == ours.controls[1] + 16,
          fields="controls"),
    Error("with VM in the image of EFLAGS, it goes to virtual-8086 mode from anywhere, and cuts EIP",
          "vol. 2A, IRET; AMD vol. 3, IRET: only from level 0, and not in long mode", "iret iretd iretq",
          lambda case, insn, ours, theirs: not WORLDS[case.world].real,
          likewise=(Replacement(interrupts, "interrupt_return", to_virtual_8086_from_anywhere),)),
    Error("the stack is read and written with the rights of level 0", "vol. 3A, 4.6.1: user-mode accesses",
          f"{FAR_RETURNS} lcall call", lambda case, insn, ours, theirs: WORLDS[case.world].cpl == 3
          and PF in (ours.vector, theirs.vector) and not is_near_call(insn), likewise=(
              Replacement(control, "far_call", with_rights_of_level_0),
              Replacement(control, "far_return", with_rights_of_level_0),
              Replacement(interrupts, "interrupt_return", with_rights_of_level_0))),
    Error("the PDPTEs are not loaded, and so their reserved bits not seen", "vol. 3A, 4.4.1: MOV to CR", "mov",
          lambda case, insn, ours, theirs: insn.opcode[:2] == [0x0F, 0x22] and ours.vector == GP
          and theirs.vector is None and theirs.controls[3] & CR4_PAE != 0
          and WORLDS[case.world].bits != 64),
    Error("the registers that were popped before a page fault have changed", "vol. 3A, 6.5: only at a segment's end",
          "popaw popal", lambda case, insn, ours, theirs: both(PF, ours, theirs), fields="registers"),
    Error("EFLAGS.AC counts for the processor's own accesses, too", "vol. 3A, 4.6.1: implicit accesses", "",
          lambda case, insn, ours, theirs: smap_and_ac(case) and LAR in case.code and ours.vector == PF
          and ours.error_code == 1 and ours.controls[1] >> 12 == GDT >> 12),
]  # fmt: skip

# And where the manual leaves it open which of two faults comes first (vol. 3A, 6.9).
TWO_OPERANDS = [f"cmps{suffix}" for suffix in "bwdq"]


def other_fault_first(insn: capstone.CsInsn, ours: Outcome, theirs: Outcome, found: list[str]) -> bool:
    """Two operands are not to be had, and each processor has tried another one of them first."""
    # (A page that is not to be had, or an address that is not canonical.)
    in_both = insn.insn_name() in TWO_OPERANDS and {ours.vector, theirs.vector} <= {PF, GP} and PF in (
        ours.vector, theirs.vector)
    return in_both and fields_of(found) <= {"vector", "error_code", "controls"}


# What is not compared at all.
NOT_COMPARED = {
    "cpuid": "says what our processor is, and it is another one than Unicorn's",
    **dict.fromkeys(("rdtsc", "rdtscp"), "tells our time"),
    "rdpid": "is younger than the processor that Unicorn plays here",
    **dict.fromkeys(("syscall", "sysenter"), "Unicorn has a hook in its place"),
    "int1": "Unicorn has none; it is a debug exception (vol. 2A, INT1)",
}


def concerned(case: Case, insn: capstone.CsInsn, ours: Outcome, theirs: Outcome) -> list[Error]:
    """Which of Unicorn's errors it may be."""
    return [
        error
        for error in UNICORN_ERRORS
        if (not error.names or insn.insn_name() in error.names.split()) and error.applies(case, insn, ours, theirs)
    ]


def excused(case: Case, insn: capstone.CsInsn, ours: Outcome, theirs: Outcome, found: list[str]) -> bool:
    """Whether the fields that are `found` to differ are those of an error, or the manual leaves it open."""
    fields = fields_of(found)
    return other_fault_first(insn, ours, theirs, found) or any(
        not error.likewise and (not error.fields or fields <= set(error.fields.split()))
        for error in concerned(case, insn, ours, theirs)
    )


def is_known(
    processor: Ours, case: Case, insn: capstone.CsInsn, ours: Outcome, theirs: Outcome, found: list[str]
) -> bool:
    """Whether Unicorn's errors are all that is `found` to differ. Those that ours can make likewise, it makes."""
    replacements: list[Replacement] = []
    while found and not excused(case, insn, ours, theirs, found):
        likewise = [replacement for error in concerned(case, insn, ours, theirs) for replacement in error.likewise]
        if set(likewise) <= set(replacements):
            return False
        replacements += [replacement for replacement in likewise if replacement not in replacements]
        with contextlib.ExitStack() as replaced:
            for owner, name, make in replacements:
                replaced.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))
            ours = processor.run(case)
        found = differences(case, insn, ours, theirs)
    return True


def found_no_bit(case: Case, insn: capstone.CsInsn, ours: Outcome) -> bool:
    """The source of a bit scan was zero: then the destination is undefined (vol. 2A, BSF)."""
    return insn.insn_name() in ("bsf", "bsr") and ours.flags & fl.ZF != 0


# --- Comparing --------------------------------------------------------------------------------------------------------


def differences(case: Case, insn: capstone.CsInsn, ours: Outcome, theirs: Outcome) -> list[str]:
    """What is not alike, as far as it is defined."""
    world, found = WORLDS[case.world], []
    for field in ("vector", "error_code", "ip", "selectors", "controls", "ports"):
        if getattr(ours, field) != getattr(theirs, field):
            found.append(f"{field}: {getattr(ours, field)}, not {getattr(theirs, field)}")
    # Outside 64-bit mode nothing is said of the upper halves (vol. 1, 3.4.1.1).
    left_64bit = world.bits == 64 and (ours.selectors[CS] & ~3 != world.selectors[CS] or ours.flags & fl.VM != 0)
    mask = 0xFFFFFFFF if left_64bit or found_no_bit(case, insn, ours) else -1
    for index, (mine, other) in enumerate(zip(ours.registers, theirs.registers)):
        if (mine ^ other) & mask:
            found.append(f"registers[{index}]: {mine:#x}, not {other:#x}")
    compared = ~NOT_KEPT & ~(undefined_flags(case, insn) if ours.vector is None else 0)
    if (ours.flags ^ theirs.flags) & compared:
        found.append(f"flags: {ours.flags & compared:#x}, not {theirs.flags & compared:#x}")
    places = different_places(ours.memory, theirs.memory)
    moved_on = led_elsewhere(case, insn, ours) or ours.controls != controls_before(case)
    if case.controls and (ours.vector == PF or moved_on):
        # When a walk ends in a fault, Unicorn has set the accessed bit of the entries above the one at fault. The
        # manual says only that it is set where an entry is used for a translation (4.8), and there was none. Which
        # operand comes first it does not say. And where a jump leads to, or behind a change of the control registers,
        # Unicorn has looked at the code already.
        places = [p for p in places if p not in PAGE_TABLE_BYTES or ours.memory[p] ^ theirs.memory[p] != ACCESSED]
    if places:
        found.append(
            "memory: " + ", ".join(f"{ours.memory[p]:02x} at {p:x}, not {theirs.memory[p]:02x}" for p in places[:8])
        )
    return found


def controls_before(case: Case) -> tuple[int, ...]:
    """The control registers as an Outcome has them."""
    return (case.controls[0], 0, *case.controls[1:3]) if case.controls else WORLDS[case.world].controls


def led_elsewhere(case: Case, insn: capstone.CsInsn, outcome: Outcome) -> bool:
    """The instruction was a jump, or did not get through."""
    return outcome.ip != case.start + insn.size - (CODE if WORLDS[case.world].real else 0)


def fields_of(found: list[str]) -> set[str]:
    """The fields of an Outcome that `differences` names."""
    return {text.split(":")[0].split("[")[0] for text in found}


def different_places(ours: bytes, theirs: bytes) -> list[int]:
    """Where two memories differ."""
    if ours == theirs:
        return []
    places, length = [0], SIZE
    for size in (4096, 64, 1):  # pages, lines of those, bytes of those
        starts = [start for place in places for start in range(place, place + length, size)]
        places = [start for start in starts if ours[start : start + size] != theirs[start : start + size]]
        length = size
    return places


def changed_memory(memory: bytes) -> tuple[tuple[int, bytes], ...]:
    """What differs from the usual content, code aside, in words of eight bytes: as a Case has it."""
    places = different_places(memory, usual_memory())
    words = sorted({place & ~7 for place in places if not CODE <= place < DATA})
    return tuple((word, memory[word : word + 8]) for word in words)


class Comparison:
    """Both processors in one world, and what has come out so far."""

    def __init__(self, world: World):
        self.ours, self.theirs = Ours(world), Theirs(world)
        self.compared: collections.Counter[int] = collections.Counter()  # by capstone's number of the instruction
        self.completed: collections.Counter[int] = collections.Counter()  # and those that raised no exception
        self.failures: list[str] = []

    def run(self, case: Case, insn: capstone.CsInsn) -> None:
        """Run a case and note what comes out."""
        ours, found = self.check(case, insn)
        if found:
            self.failures.append(f"{insn.mnemonic} {insn.op_str}: {'; '.join(found)}\n    {case!r}")
        if ours:
            self.compared[insn.id] += 1
            self.completed[insn.id] += ours.vector is None

    def check(self, case: Case, insn: capstone.CsInsn) -> tuple[Outcome | None, list[str]]:
        """Run one instruction on both: our outcome (None if there is nothing to compare), and what is wrong with it."""
        if insn.insn_name() in NOT_COMPARED or insn.id not in DEFINITIONS:
            return None, []
        try:
            theirs = self.theirs.run(case)
        except Unusable:
            return None, []
        ours = self.ours.run(case)
        found = differences(case, insn, ours, theirs)
        if found and is_known(self.ours, case, insn, ours, theirs, found):
            return ours, []
        return ours, found

    def check_block(self, case: Case) -> tuple[Case, Outcome | None, list[str]]:
        """Run several instructions: each by itself on both, and then all in one go on ours, which must be the same.

        Each begins with our outcome of the one before, so that what was undefined there is alike here. Tells the last
        of these steps as a case of its own if it is what went wrong, or else the block.
        """
        step, ours, ports = case, None, ()
        end, number = case.start, 0
        while number < case.instructions:
            insn = instruction_at(case, end)
            if insn is None:
                break
            step = step._replace(start=end, instructions=1, repeats=repeats(insn, end))
            outcome, found = self.check(step, insn)
            if found:
                return step, outcome, found
            if outcome is None:
                break
            ours, ports, end, number = outcome, ports + outcome.ports, end + insn.size, number + 1
            if ends_block(step, insn, outcome):
                break
            step = step._replace(registers=ours.registers, flags=ours.flags, memory=changed_memory(ours.memory))
        if number < 2:
            return step, ours, []
        block = case._replace(instructions=number)
        mine = self.ours.run(block)
        return block, mine, unlike(mine, ours._replace(ports=ports))


def instruction_at(case: Case, place: int) -> capstone.CsInsn | None:
    """The next instruction of the case; where `place` is elsewhere in memory, it is made of the same bytes there."""
    code = case.code[place - CODE :] if CODE <= place <= CODE + len(case.code) else case.code
    return decode(code, WORLDS[case.world].bits)


# What changes something that a Case does not have.
CHANGES_MORE = (
    "clts fldcw fldenv fnclex fninit fnsave frstor fxrstor fxrstor64 hlt invd ldmxcsr lgdt lidt lldt ltr swapgs "
    "wrfsbase wrgsbase wrmsr fnstenv"
).split()


def ends_block(case: Case, insn: capstone.CsInsn, outcome: Outcome) -> bool:
    """Whether what comes then cannot be told by a Case: the instruction led elsewhere, or changed more than it has."""
    return (
        outcome.vector is not None
        or outcome.flags & fl.TF != 0
        or led_elsewhere(case, insn, outcome)
        or outcome.selectors != WORLDS[case.world].selectors
        or outcome.controls != controls_before(case)
        or insn.insn_name() in CHANGES_MORE
    )


def unlike(block: Outcome, steps: Outcome) -> list[str]:
    """What came out otherwise in one go than one by one."""
    found = [
        f"{name} in one go: {one}, not {other}"
        for name, one, other in zip(Outcome._fields, block, steps)
        if name != "memory" and one != other
    ]
    places = different_places(block.memory, steps.memory)[:8]
    return found + [f"memory in one go: {block.memory[p]:02x} at {p:x}, not {steps.memory[p]:02x}" for p in places]
