"""Which instructions there are, and why others are not: what `instruction_table` shows.

Which are defined, the package says. Why another is not, its encoding says (`mini_bhyve.absent.unit_of`): so all opcode
maps are gone through for an example of each. What is left is in a short table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import capstone
from capstone import x86_const as x86

from mini_bhyve import absent

# capstone numbers the instructions from 1; 0 is what it calls none, and the last number tells how many there are.
NAMES = {
    number: name[len("X86_INS_") :].lower()
    for name, number in vars(x86).items()
    if name.startswith("X86_INS_") and name not in ("X86_INS_INVALID", "X86_INS_ENDING")
}

UNITS = {
    absent.X87: "x87: floating point comes later",
    absent.MMX: "MMX: comes later",
    absent.SSE: "SSE to SSE4.2, AES, PCLMULQDQ, SHA, GFNI: instructions on XMM registers come later",
    absent.AMD_3DNOW: "3DNow!, which only AMD's processors had",
    absent.AVX: "AVX, AVX2, FMA, F16C and more with a VEX prefix, and AMD's FMA4: XSAVE is not offered",
    absent.AVX512: "AVX-512: XSAVE is not offered",
    absent.XOP: "XOP, TBM and LWP, which only AMD's processors had",
}

# What the encoding does not tell: reason -> names.
OTHER = {
    "VMX is not offered: no virtual machines in the guest": """
        invept invvpid vmcall vmclear vmfunc vmlaunch vmptrld vmptrst vmread vmresume vmwrite vmxoff vmxon""",
    "SVM, virtual machines on AMD's processors": "clgi invlpga skinit stgi vmload vmmcall vmrun vmsave",
    "SGX and SMX are not offered: no enclaves, no measured launch": "encls enclu enclv getsec",
    "CET is not offered: no shadow stacks": """
        clrssbsy incsspd incsspq rstorssp saveprevssp setssbsy wrssd wrssq wrussd wrussq""",
    "XSAVE is not offered: there is no state that FXSAVE does not save": """
        xgetbv xrstor xrstor64 xrstors xrstors64 xsave xsave64 xsavec xsavec64 xsaveopt xsaveopt64 xsaves xsaves64
        xsetbv""",
    "TSX is not offered: no transactions": "xabort xbegin xend xtest",
    "RDRAND and RDSEED are not offered: two runs of a guest shall be alike": "rdrand rdseed",
    "MONITOR and WAITPKG are not offered": "monitor mwait tpause umonitor umwait",
    "SSE4.2 is not offered": "crc32",
    "MOVDIRI, MOVDIR64B, PTWRITE, PCONFIG, PCID and PKU are not offered": """
        invpcid movdir64b movdiri pconfig ptwrite rdpkru wrpkru""",
    "other instructions of AMD's": "clzero monitorx mwaitx",
    "PadLock, which only VIA's processors have": """
        montmul xcryptcbc xcryptcfb xcryptctr xcryptecb xcryptofb xsha1 xsha256 xstore""",
    "an invalid opcode outside of system-management mode, where this processor never is": "rsm",
    "no instructions, but prefixes": "data16 lock rep repne rex64 xacquire xrelease",
}

# Names that capstone has, but gives to no instruction: it has another for each case, as CMPEQPS for CMPPS.
UNUSED_NAMES = {
    absent.X87: ("fcmovnp",),
    absent.SSE: ("cmpps", "cmpss"),
    absent.AVX: ("vcmp",),
    absent.AVX512: ("v4f", "vfpclass", "vgetexp", "vpcmp", "vrcp", "vrndscale", "vrsqrt", "vscalef"),
    absent.XOP: ("vpcom",),
}  # beginnings


# --- An example of each -----------------------------------------------------------------------------------------------


def beginnings() -> Iterator[bytes]:
    """All of an instruction before its ModRM byte (SDM vol. 2A, 2.1 to 2.6; AMD vol. 6 for XOP)."""
    for prefix in (b"", b"\x66", b"\xf3", b"\xf2", b"\x48", b"\x66\x48", b"\xf3\x48"):
        for escape, opcode in itertools.product((b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"), range(256)):
            yield prefix + escape + bytes([opcode])
    # W, L and the prefix that is a part of the opcode; with a further register and without one.
    variants = [w | length | p for w in (0, 0x80) for length in (0, 4) for p in range(4)]
    for opcode_map, variant, registers, opcode in itertools.product((1, 2, 3), variants, (0x78, 0x70), range(256)):
        yield bytes([0xC4, 0xE0 | opcode_map, variant | registers, opcode])
    for opcode_map, variant, opcode in itertools.product((8, 9, 10), (0x70, 0x78, 0xF0, 0xF8, 0x74, 0x7C), range(256)):
        yield bytes([0x8F, 0xE0 | opcode_map, variant, opcode])
    # With 512 bits, and with a mask.
    variants = [w | p for w in (0, 0x80) for p in range(4)]
    for opcode_map, variant, registers, mask, opcode in itertools.product(
        (1, 2, 3), variants, (0x7C, 0x74), (0x48, 0x49), range(256)
    ):
        yield bytes([0x62, 0xF0 | opcode_map, variant | registers, mask, opcode])


# With a register and with memory; with all numbers in bits 5-3; and with an index register (gather and scatter).
MODRMS = [mode | number << 3 | 1 for number in range(8) for mode in (0, 0xC0)]
WITH_INDEX = [0x0C, 0x14, 0x2C, 0x34]
# Groups in which all of ModRM is a part of the opcode.
WHOLE_MODRM = (0x00, 0x01, 0x1E, 0xA6, 0xA7, 0xAE, 0xC7)


def modrms(start: bytes) -> Iterator[int]:
    yield from MODRMS[:8] if start[0] == 0x62 else MODRMS
    if start[0] == 0x62:
        yield from WITH_INDEX
    if start[-1] in range(0xD8, 0xE0) or (start[-2:-1] == b"\x0f" and start[-1] in WHOLE_MODRM):
        yield from range(0xC0, 0x100)


@functools.cache
def examples() -> dict[int, capstone.CsInsn]:
    """An instruction for each of capstone's numbers, as far as there is one in 64-bit mode."""
    found: dict[int, capstone.CsInsn] = {}
    quick, thorough = (capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64) for _ in range(2))
    thorough.detail = True
    rest = bytes(10)
    codes = (start + bytes([modrm]) + rest for start in beginnings() for modrm in modrms(start))
    suffixes = (b"\x0f\x0f\xc0" + bytes([suffix]) + rest for suffix in range(256))  # 3DNow!'s opcodes come last
    for code in itertools.chain(codes, suffixes):
        insn = next(quick.disasm(code, 0, 1), None)
        if insn is not None and insn.id not in found:
            found[insn.id] = next(thorough.disasm(code, 0, 1))
    return found


def reason(number: int) -> str | None:
    """Why an instruction is not defined; None if nobody knows."""
    name, example = NAMES[number], examples().get(number)
    if example is not None:
        unit = absent.unit_of(example, example.prefix[2] != 0)
    else:
        unit = next((unit for unit, starts in UNUSED_NAMES.items() if name.startswith(starts)), absent.OTHER)
    return UNITS.get(unit) or next((why for why, names in OTHER.items() if name in names.split()), None)
