"""BMI1 and BMI2, LZCNT and TZCNT (Intel SDM vol. 1, 5.1.16): counting, cutting out and moving bits.

Most of them are encoded with a VEX prefix (vol. 2A, 2.3), which has room for a third register, and leaves the flags
alone or at least the source. They work on 32 or 64 bits, and not in real and virtual-8086 mode, where VEX is unknown.
"""

from __future__ import annotations

from mini_bhyve.flags import LOGIC, SHIFT
from mini_bhyve.instructions.definition import choose, instruction, signed
from mini_bhyve.operands import RDX

# --- Counting zeros -------------------------------------------------------------------------------------------------
#
# BSF and BSR behind an F3 prefix. What is new: a source of zero is counted, too, and CF tells of it. ZF tells of the
# result, the other flags are undefined.


@instruction("tzcnt", data_decides=True)
def tzcnt(cpu, dst, src):
    """TZCNT: how many zeros are below the lowest 1."""
    value = src.value
    count = (value & -value).bit_length() - 1 if value else src.width
    dst.value = count
    cpu.flags = (SHIFT, value == 0, 0, count, src.width)


@instruction("lzcnt", data_decides=True)
def lzcnt(cpu, dst, src):
    """LZCNT: how many zeros are above the highest 1."""
    value = src.value
    count = src.width - value.bit_length()
    dst.value = count
    cpu.flags = (SHIFT, value == 0, 0, count, src.width)


# --- The lowest 1 ---------------------------------------------------------------------------------------------------
#
#     source             . . . . 1 0 0
#     source - 1         . . . . 0 1 1        the same above the lowest 1, the contrary from there on down
#
# CF is the borrow of the subtraction (for BLSI: of the negation); OF is 0, AF and PF are undefined.


@instruction("blsi", vex=True)
def blsi(cpu, dst, src):
    """BLSI: the lowest 1 alone."""
    value = src.value
    result = -value & value
    dst.value = result
    cpu.flags = (SHIFT, value != 0, 0, result, src.width)


@instruction("blsmsk", vex=True)
def blsmsk(cpu, dst, src):
    """BLSMSK: ones up to and including the lowest 1; all ones if there is none."""
    value = src.value
    result = (value ^ (value - 1)) & src.mask
    dst.value = result
    cpu.flags = (SHIFT, value == 0, 0, result, src.width)


@instruction("blsr", vex=True)
def blsr(cpu, dst, src):
    """BLSR: all but the lowest 1."""
    value = src.value
    result = value & (value - 1)
    dst.value = result
    cpu.flags = (SHIFT, value == 0, 0, result, src.width)


# --- Cutting out ----------------------------------------------------------------------------------------------------


@instruction("andn", vex=True)
def andn(cpu, dst, inverted, src):
    """ANDN: NOT the first source AND the second."""
    result = (inverted.value ^ inverted.mask) & src.value
    dst.value = result
    cpu.flags = (LOGIC, 0, 0, result, dst.width)


@instruction("bextr", vex=True)
def bextr(cpu, dst, src, control):
    """BEXTR: the field that `control` says: its lowest bit in bits 7-0, its length in bits 15-8."""
    start, length = control.value & 0xFF, control.value >> 8 & 0xFF
    result = src.value >> start & (1 << length) - 1
    dst.value = result
    cpu.flags = (LOGIC, 0, 0, result, dst.width)


@instruction("bzhi", vex=True)
def bzhi(cpu, dst, src, index):
    """BZHI: the bits below the number in bits 7-0 of `index`. CF tells that these are all."""
    value, count = src.value, index.value & 0xFF
    result = choose(count < src.width, value & (1 << count) - 1, value)
    dst.value = result
    cpu.flags = (SHIFT, count >= src.width, 0, result, dst.width)


# --- Spreading and gathering ----------------------------------------------------------------------------------------
#
#     PDEP    source    . . . . d c b a            PEXT    source    . d . . c b . a
#             mask      0 1 0 0 1 1 0 1                    mask      0 1 0 0 1 1 0 1
#             result    0 d 0 0 c b 0 a                    result    0 0 0 0 d c b a


def _ones(mask):
    """The places of the ones in `mask`, upwards, each as a number with that one bit."""
    while mask:
        lowest = mask & -mask
        yield lowest
        mask ^= lowest


@instruction("pdep", vex=True, data_decides=True)
def pdep(cpu, dst, src, mask):
    """PDEP: spread the low bits of the source over the ones of the mask."""
    value = src.value
    dst.value = sum(place for bit, place in enumerate(_ones(mask.value)) if value >> bit & 1)


@instruction("pext", vex=True, data_decides=True)
def pext(cpu, dst, src, mask):
    """PEXT: gather the bits of the source that the mask shows."""
    value = src.value
    dst.value = sum(1 << bit for bit, place in enumerate(_ones(mask.value)) if value & place)


# --- Arithmetic that leaves the flags alone -------------------------------------------------------------------------


@instruction("mulx", vex=True)
def mulx(cpu, high, low, src):
    """MULX: EDX times the source. Where both halves go to one register, the upper one stays."""
    product = (cpu.regs[RDX].value & src.mask) * src.value
    low.value = product & src.mask
    high.value = product >> src.width


@instruction("rorx", vex=True)
def rorx(cpu, dst, src, count):
    value, n = src.value, count.value & src.width - 1
    dst.value = (value >> n | value << (src.width - n)) & src.mask


@instruction("sarx", vex=True)
def sarx(cpu, dst, src, count):
    value, n = signed(src.value, src.width), count.value & src.width - 1
    dst.value = value >> n & src.mask


@instruction("shlx", vex=True)
def shlx(cpu, dst, src, count):
    dst.value = src.value << (count.value & src.width - 1) & src.mask


@instruction("shrx", vex=True)
def shrx(cpu, dst, src, count):
    dst.value = src.value >> (count.value & src.width - 1)
