"""String instructions and REP (Intel SDM vol. 1, 5.1.8 and 7.3.9), and the port strings INS and OUTS (5.1.9).

    source       DS:ESI (another segment with a prefix)     LODS  CMPS  MOVS  OUTS
    destination  ES:EDI (always ES)                         STOS  SCAS  MOVS  CMPS  INS

Each moves its pointers by the size of an element, upwards or, with DF set, downwards. With REP, ECX counts the
elements.

A repeated instruction can be interrupted between two elements: the registers say how far it has come, and the same
instruction goes on afterwards. Here a repeat is done in stretches, each of which counts as one instruction, and "jumps"
to itself until it is done. While the guest is being debugged a stretch is one element, as each has its trap. The data
decides how long it takes, so all of these are called, never inlined.

MOVS and STOS are what memory is copied and filled with, and Python is quick at that: one slice does for all pages that
follow one another in RAM as they do in the guest's addresses. It is worth the more, the longer it is. So many stretches
are done in one go, as long as nothing is due between them.
"""

from __future__ import annotations

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.instructions.definition import instruction
from mini_bhyve.instructions.miscellaneous import check_port_allowed
from mini_bhyve.memory import PAGE_SIZE
from mini_bhyve.operands import MASKS, RAX, RCX, RDI, RDX, RSI
from mini_bhyve.paging import READ, WRITE

# Elements in a stretch: between two of them interrupts and pauses get their turn, so it should not last long (a
# millisecond; ten, if all of a bulk stretch has to be done by element). How many it is follows from the instruction and
# the registers alone, never from what is in the TLB: each stretch counts as one instruction, and runs must repeat.
STRETCH, BULK_STRETCH = 256, 4096
# Stretches that may be done in one go, which is so only where no interrupt can come between them.
MAX_STRETCHES = 64
PATTERN = 1 << 16  # bytes with which memory is filled at a time: few enough for a cache of the host


class StringOperation:
    """What all string instructions share: where the elements are, and the moving on from one to the next."""

    def __init__(self, cpu, encoding, width):
        self.cpu = cpu
        self.encoding = encoding
        self.width = width
        self.address_mask = MASKS[encoding.address_width]
        self.step = -(width // 8) if cpu.system_flags & fl.DF else width // 8

    def load_source(self):
        offset = self.cpu.regs[RSI].value & self.address_mask
        return self.cpu.load_segment_memory(self.encoding.segment, offset, self.width)

    def load_destination(self):
        return self.cpu.load_segment_memory(seg.ES, self.cpu.regs[RDI].value & self.address_mask, self.width)

    def store_destination(self, value):
        self.cpu.store_segment_memory(seg.ES, self.cpu.regs[RDI].value & self.address_mask, value, self.width)

    def advance(self, register, elements=1):
        """Move ESI or EDI on; with 16-bit addresses the upper half of the register stays."""
        regs, mask = self.cpu.regs, self.address_mask
        keep = regs[register].value & ~mask if mask == 0xFFFF else 0
        regs[register].value = keep | (regs[register].value + self.step * elements) & mask

    def count_down(self, elements=1):
        regs, mask = self.cpu.regs, self.address_mask
        keep = regs[RCX].value & ~mask if mask == 0xFFFF else 0
        regs[RCX].value = keep | (regs[RCX].value - elements) & mask

    @property
    def count(self):
        return self.cpu.regs[RCX].value & self.address_mask


def repeat(cpu, encoding, operation, one, compares=False, bulk=None, moves=False):
    """Run `one(operation)` once, or under REP a stretch of times; a comparison also ends it (SDM vol. 2B, REP).

    `bulk(operation, limit)`, if given, may do up to `limit` elements at once; it returns how many it did, 0 for "not
    here". What only moves memory upwards (`moves`) does many stretches, if nothing is due in between.
    """
    if not encoding.repeat:
        one(operation)
        return
    stretch, stretches = STRETCH, 1
    if cpu.single_steps:
        stretch = 1
    elif moves and operation.step > 0:
        stretch, stretches = BULK_STRETCH, min(cpu.limit - cpu.instructions, MAX_STRETCHES)
    cpu.system_flags &= ~fl.RF
    before, done, limit = cpu.retired, 0, stretch * stretches
    while operation.count and done < limit:
        cpu.retired = before + done // stretch  # what comes next may fault, or ask a device what time it is
        elements = bulk(operation, limit - done) if bulk else 0
        if not elements:
            one(operation)
            elements = 1
        operation.count_down(elements)
        done += elements
        if compares and fl.zero(cpu.flags) != (encoding.repeat == "rep"):
            return
        if cpu.attention:  # somebody wants to be heard: no further than the end of this stretch
            limit = -(-done // stretch) * stretch
    if done > stretch:
        cpu.retired = before + (done - 1) // stretch  # (the run loop counts the last one)
        cpu.code_cache.end_running()
    if operation.count:
        cpu.branch(True, encoding.ip)
        cpu.system_flags |= fl.RF  # whoever comes in between returns to an instruction that has begun (17.3.1.1)


def _define_string(name, one, compares=False, bulk=None, moves=False, suffixes="bwdq"):
    """Define an instruction for each element size: "movs" -> movsb, movsw, movsd, movsq."""
    for suffix, width in zip(suffixes, (8, 16, 32, 64)):

        def string(cpu, encoding, *operands, width=width):
            repeat(cpu, encoding, StringOperation(cpu, encoding, width), one, compares, bulk, moves)

        string.__doc__ = one.__doc__
        instruction(name + suffix, encoded=True, ends_block=True, data_decides=True)(string)


# --- Moving and filling ---------------------------------------------------------------------------------------------


def _movs(operation):
    """MOVS: from the source to the destination."""
    operation.store_destination(operation.load_source())
    operation.advance(RSI)
    operation.advance(RDI)


def _stos(operation):
    """STOS: the accumulator to the destination."""
    operation.store_destination(operation.cpu.regs[RAX].value & MASKS[operation.width])
    operation.advance(RDI)


def _lods(operation):
    """LODS: the source to the accumulator."""
    value = operation.load_source()
    operation.cpu.accumulator(operation.width).value = value
    operation.advance(RSI)


def _elements_in_place(operation, limit, registers):
    """How many elements, `limit` at most, can be done at once: upwards, side by side in plain RAM, within the segments.

    The result is [count, offset in RAM ...], or None where one element at a time must do: downwards, across the end of
    such pages, on pages that the TLB does not hold even after a walk, or where alignment is checked.
    """
    cpu, size = operation.cpu, operation.width // 8
    if operation.step < 0 or cpu.alignment_checked:
        return None
    count, places = min(operation.count, limit), []
    for register, segment, writing in registers:
        offset = cpu.regs[register].value & operation.address_mask
        address = cpu.linear(segment, offset, size, writing)
        length = min(count * size, operation.address_mask + 1 - offset, cpu.linear_mask + 1 - address)
        if cpu.code_size != 64:
            length = min(length, cpu.segments[segment].last + 1 - offset)
        look_up = (cpu.write_tlb if writing else cpu.read_tlb).get
        difference, end = look_up(address >> 12), address + length
        if difference is None and address % PAGE_SIZE + size <= PAGE_SIZE:
            # Now rather than with a first element of its own: what goes wrong is the same.
            cpu.mmu.translate(address, (WRITE if writing else READ) | cpu.user_access)
            difference = look_up(address >> 12)
        if difference is None:
            return None
        for page in range((address >> 12) + 1, (end - 1 >> 12) + 1):
            if look_up(page) != difference:
                end = page << 12
                break
        count = min(count, (end - address) // size)
        if not count:
            return None
        places.append(address + difference)
    return [count, *places]


def _movs_bulk(operation, limit):
    """MOVS as one slice copy."""
    place = _elements_in_place(operation, limit, ((RSI, operation.encoding.segment, False), (RDI, seg.ES, True)))
    if place is None:
        return 0
    count, source, destination = place
    length, distance, ram = count * operation.step, destination - source, operation.cpu.bytes8
    if not 0 < distance < length:
        ram[destination : destination + length] = ram[source : source + length]
    elif distance < operation.step:
        return 0
    else:  # what has been copied is copied again later: the way to fill memory with a pattern
        ram[destination : destination + length] = (bytes(ram[source:destination]) * (length // distance + 1))[:length]
    operation.advance(RSI, count)
    operation.advance(RDI, count)
    return count


def _stos_bulk(operation, limit):
    """STOS as a few slices."""
    place = _elements_in_place(operation, limit, ((RDI, seg.ES, True),))
    if place is None:
        return 0
    count, destination = place
    element = (operation.cpu.regs[RAX].value & MASKS[operation.width]).to_bytes(operation.step, "little")
    end, pattern = destination + count * operation.step, element * min(count, PATTERN // operation.step)
    for start in range(destination, end, len(pattern)):
        operation.cpu.bytes8[start : min(start + len(pattern), end)] = pattern[: end - start]
    operation.advance(RDI, count)
    return count


_define_string("movs", _movs, bulk=_movs_bulk, moves=True)
_define_string("stos", _stos, bulk=_stos_bulk, moves=True)
_define_string("lods", _lods)


# --- Comparing ------------------------------------------------------------------------------------------------------


def _compare(operation, a, b):
    operation.cpu.flags = (fl.SUB, a, b, (a - b) & MASKS[operation.width], operation.width)


def _cmps(operation):
    """CMPS: source minus destination, for the flags."""
    _compare(operation, operation.load_source(), operation.load_destination())
    operation.advance(RSI)
    operation.advance(RDI)


def _scas(operation):
    """SCAS: accumulator minus destination, for the flags."""
    _compare(operation, operation.cpu.regs[RAX].value & MASKS[operation.width], operation.load_destination())
    operation.advance(RDI)


_define_string("cmps", _cmps, compares=True)
_define_string("scas", _scas, compares=True)


# --- Ports ----------------------------------------------------------------------------------------------------------


def _ins(operation):
    """INS: from the port in DX to the destination, which is tried first, as a port may not be read twice."""
    cpu = operation.cpu
    port = cpu.regs[RDX].value & 0xFFFF
    check_port_allowed(cpu, port, operation.width)
    offset, width = cpu.regs[RDI].value & operation.address_mask, operation.width
    cpu.check_store(seg.ES, offset, width)
    if (cpu.segment_base(seg.ES) + offset) % (width // 8):
        cpu.check_alignment()
    operation.store_destination(cpu.ports.read(port, operation.width))
    operation.advance(RDI)
    cpu.attention = True


def _outs(operation):
    """OUTS: from the source to the port in DX."""
    cpu = operation.cpu
    port = cpu.regs[RDX].value & 0xFFFF
    check_port_allowed(cpu, port, operation.width)
    cpu.ports.write(port, operation.load_source(), operation.width)
    operation.advance(RSI)
    cpu.attention = True


def _ins_bulk(operation, limit):
    """A stretch of INS from a device that has many elements ready: a disk."""
    cpu = operation.cpu
    port = cpu.regs[RDX].value & 0xFFFF
    check_port_allowed(cpu, port, operation.width)
    place = _elements_in_place(operation, limit, ((RDI, seg.ES, True),))
    if place is None:
        return 0
    count, destination = place
    data = cpu.ports.read_string(port, operation.width, count)
    cpu.bytes8[destination : destination + len(data)] = data
    count = len(data) * 8 // operation.width
    operation.advance(RDI, count)
    cpu.attention = True
    return count


def _outs_bulk(operation, limit):
    cpu = operation.cpu
    port = cpu.regs[RDX].value & 0xFFFF
    check_port_allowed(cpu, port, operation.width)
    place = _elements_in_place(operation, limit, ((RSI, operation.encoding.segment, False),))
    if place is None:
        return 0
    count, source = place
    data = bytes(cpu.bytes8[source : source + count * operation.width // 8])
    count = cpu.ports.write_string(port, operation.width, data)
    operation.advance(RSI, count)
    cpu.attention = True
    return count


_define_string("ins", _ins, bulk=_ins_bulk, suffixes="bwd")
_define_string("outs", _outs, bulk=_outs_bulk, suffixes="bwd")
