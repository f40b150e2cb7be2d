"""The same instruction on our processor and on Unicorn's (QEMU's, made into a library), and what became of it.

Both get the same 256 KiB of memory with the same content, the same registers and the same code, run it, and leave an
`Outcome` each. What both worlds have in common:

    0 0800   descriptor table            0 A000 - 3 FFFF   data, pseudo-random; most operands lie here
    0 1000   page tables, if any         0 8000            the code under test

Unicorn delivers no exceptions: it tells the vector to a hook and stops. Our processor is stopped at the same point, by
replacing the function that would deliver. The error code, too, can be had from Unicorn: it is in the saved state, at a
place that is found by provoking two faults with known codes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import random
from typing import Callable, NamedTuple
from unittest import mock

import unicorn
from unicorn import x86_const as uc

from mini_bhyve import flags as fl
from mini_bhyve import interrupts, msr
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import DB, DF, GP, NP, PF, SS, TS, UD, GuestFault
from mini_bhyve.fpu import CONTROL_AFTER_RESET, MXCSR_AFTER_RESET
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import MASKS
from mini_bhyve.paging import PAGING_PAE
from mini_bhyve.registers import CR0_ET, CR0_PE, CR0_PG, CR0_WP, CR4_OSFXSR, CR4_PAE, EFER_LMA, EFER_LME

SIZE = 0x40000
GDT, PAGE_TABLES, CODE, DATA = 0x800, 0x1000, 0x8000, 0xA000
HLT = b"\xf4"  # behind the code, where decoding shall end
MAX_ROUNDS = 2000  # of Unicorn's counting
UNMAPPED = (unicorn.UC_ERR_READ_UNMAPPED, unicorn.UC_ERR_WRITE_UNMAPPED)
WITH_ERROR_CODE = (DF, TS, NP, SS, GP, PF)

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
REGISTERS_64 = [getattr(uc, f"UC_X86_REG_{n}") for n in "RAX RCX RDX RBX RSP RBP RSI RDI".split()] + [
    getattr(uc, f"UC_X86_REG_R{n}") for n in range(8, 16)
]
REGISTERS_32 = [getattr(uc, f"UC_X86_REG_{n}") for n in "EAX ECX EDX EBX ESP EBP ESI EDI".split()]
CONTROLS = [uc.UC_X86_REG_CR0, uc.UC_X86_REG_CR2, uc.UC_X86_REG_CR3, uc.UC_X86_REG_CR4]
SEGMENTS = [getattr(uc, f"UC_X86_REG_{n}") for n in "ES CS SS DS FS GS".split()]


def descriptor(base: int, limit: int, access: int, flags: int) -> int:
    """A segment descriptor: `access` is its sixth byte, `flags` the upper half of its seventh (G, D/B, L, AVL)."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16
    return low | access << 40 | (limit >> 16 & 0xF) << 48 | flags << 52 | base >> 24 << 56


# One descriptor table for all worlds: what the programs run on, and one of each kind that a load can stumble over.
DESCRIPTORS = [
    0,
    descriptor(0, 0xFFFFF, 0x9B, 0xC),  # 08 flat code, 32 bits
    descriptor(0, 0xFFFFF, 0x93, 0xC),  # 10 flat data
    descriptor(0, 0xFFFFF, 0xFB, 0xC),  # 18 flat code for level 3
    descriptor(0, 0xFFFFF, 0xF3, 0xC),  # 20 flat data for level 3
    descriptor(0x10000, 0xFFFFF, 0x93, 0xC),  # 28 data that does not begin at 0
    descriptor(0x18000, 0xFFFFF, 0x93, 0xC),  # 30
    descriptor(0x20000, 0xFFFFF, 0x93, 0xC),  # 38
    descriptor(0x1234, 0xFFFFF, 0x93, 0xC),  # 40 what FS holds
    descriptor(0x2345, 0xFFFFF, 0x93, 0xC),  # 48 what GS holds
    descriptor(0, 0xFFFFF, 0x9B, 0xA),  # 50 64-bit code
    descriptor(0, 0xFFFF, 0x9B, 0x0),  # 58 16-bit code
    descriptor(0x10000, 0xFFFF, 0x93, 0x0),  # 60 16-bit data
    descriptor(0, 0xFFFFF, 0x13, 0xC),  # 68 data, not present
    descriptor(0, 0xFFFFF, 0x91, 0xC),  # 70 data, read-only
    descriptor(0, 0xFFFFF, 0x99, 0xC),  # 78 code, execute-only
    descriptor(0, 0xFFFFF, 0x9F, 0xC),  # 80 code, conforming
    descriptor(0x3000, 0x67, 0x89, 0x0),  # 88 a free TSS; in long mode the next entry is its upper half
    0,  # 90
    descriptor(0x4000, 0x27, 0x82, 0x0),  # 98 a local descriptor table
    0,  # A0
    descriptor(0, 0xFFFFF, 0x92, 0xC),  # A8 data, not yet accessed
    descriptor(0, 0xFFFFF, 0x1B, 0xC),  # B0 code, not present
    8 << 16 | 0x8E00 << 32,  # B8 an interrupt gate, which does not belong here
    0,
    descriptor(0x3000, 0x67, 0x8B, 0x0),  # C8 a busy TSS
    0,
    descriptor(0, 0xFFFFF, 0xBB, 0xC),  # D8 code for level 1
    descriptor(0, 0xFFFFF, 0xB3, 0xC),  # E0 data for level 1
    descriptor(0x1234, 0xFFFFF, 0xF3, 0xC),  # E8 what FS holds at level 3
    descriptor(0x2345, 0xFFFFF, 0xF3, 0xC),  # F0 and GS
    descriptor(0, 0xFFFFF, 0xFB, 0xA),  # F8 64-bit code for level 3
]


class World(NamedTuple):
    """A mode of the processor: what it is called, its code size, and the selectors of ES CS SS DS FS GS."""

    name: str
    bits: int
    selectors: tuple[int, int, int, int, int, int]
    cpl: int = 0

    @property
    def real(self) -> bool:
        return self.name == "real"

    @property
    def controls(self) -> tuple[int, int, int, int]:
        """CR0, CR2, CR3 and CR4."""
        if self.bits == 64:
            return CR0_PE | CR0_ET | CR0_PG, 0, PAGE_TABLES, CR4_PAE | CR4_OSFXSR
        return CR0_ET | (0 if self.real else CR0_PE), 0, 0, CR4_OSFXSR


WORLDS = {
    world.name: world
    for world in (
        World("real", 16, (0x1800, 0x0800, 0x2000, 0x1000, 0x1234, 0x2345)),
        World("flat32", 32, (0x10, 0x08, 0x10, 0x10, 0x40, 0x48)),
        World("based32", 32, (0x30, 0x08, 0x38, 0x28, 0x40, 0x48)),
        World("code16", 16, (0x60, 0x58, 0x60, 0x60, 0x40, 0x48)),
        World("user32", 32, (0x23, 0x1B, 0x23, 0x23, 0xEB, 0xF3), cpl=3),
        World("user64", 64, (0, 0xFB, 0x23, 0, 0, 0), cpl=3),
        World("long64", 64, (0, 0x50, 0x10, 0, 0, 0)),
    )
}
# In 64-bit mode paging is on, and every address (below 2 MiB) mapped to itself: PML4, PDPT, PD.
LONG_MODE_TABLES = (
    (PAGE_TABLES, PAGE_TABLES + 0x1027),
    (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2027),
    (PAGE_TABLES + 0x2000, 0xE7),
)
FS_BASE, GS_BASE = 0x1234, 0x2345  # in 64-bit mode; elsewhere the descriptors say so


Memory = tuple[tuple[int, bytes], ...]  # addresses and what is there


class Event(NamedTuple):
    """What happens to a program from outside; for programs that are run in both readings (two_readings.py)."""

    after: int  # instructions since the event before
    what: str  # "": no more than a look at the state
    argument: int = 0


class Case(NamedTuple):
    """What to run: the state before it. Its repr is a reproducer."""

    world: str
    code: bytes
    registers: tuple[int, ...]
    flags: int
    memory: Memory = ()  # what differs from the usual content
    instructions: int = 1
    repeats: int = 0  # where the instruction ends if it has a REP prefix
    start: int = CODE  # linear address of the first instruction
    controls: tuple[int, int, int, int] | None = None  # CR0, CR3, CR4, EFER, where they are not the world's
    events: tuple[Event, ...] = ()


class Outcome(NamedTuple):
    """What became of it."""

    vector: int | None  # of the exception or software interrupt, if there was one
    error_code: int
    ip: int
    registers: tuple[int, ...]
    flags: int
    selectors: tuple[int, ...]
    controls: tuple[int, ...]  # CR0, CR2, CR3, CR4
    ports: tuple[tuple[int, int | None], ...]  # bytes written to ports; None: read from there
    memory: bytes


class Unusable(Exception):
    """The case touches memory that Unicorn does not have."""


@functools.cache
def usual_memory() -> bytes:
    """What memory holds before every case."""
    content = bytearray(random.Random(1).randbytes(SIZE))
    content[:DATA] = bytes(DATA)
    for index, value in enumerate(DESCRIPTORS):
        content[GDT + index * 8 : GDT + index * 8 + 8] = value.to_bytes(8, "little")
    for address, entry in LONG_MODE_TABLES:
        content[address : address + 8] = entry.to_bytes(8, "little")
    return bytes(content)


class Ours:
    """Our processor in one of the worlds."""

    def __init__(self, world: World):
        self.world = world
        self.memory = GuestMemory(1 << 20)
        self.port_device = Ports()
        ports = IoPorts()
        ports.claim(self.port_device)
        self.cpu = cpu = Cpu(self.memory, ports)
        self.memory.load(0, usual_memory())
        cpu.gdtr_base, cpu.gdtr_limit = GDT, len(DESCRIPTORS) * 8 - 1
        if world.bits == 64:
            cpu.efer = EFER_LME | EFER_LMA
        cpu.cr0, _, cpu.cr3, cpu.cr4 = world.controls
        self.controls = cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer
        self.segments = [self.segment(index, selector) for index, selector in enumerate(world.selectors)]

    def segment(self, index: int, selector: int) -> seg.Segment:
        if self.world.real:
            return seg.real_mode_segment(selector)
        if selector:
            return seg.read_descriptor(self.cpu, selector).segment(selector)
        base = {seg.FS: FS_BASE, seg.GS: GS_BASE}.get(index, 0)
        return seg.Segment(0, base, 0, seg.UNUSABLE)

    def run(self, case: Case) -> Outcome:
        """Run a case from the beginning, up to an exception or its end."""
        self.begin(case)
        return self.go_on(case.instructions)

    def begin(self, case: Case) -> None:
        """Take on the state before the case."""
        cpu = self.cpu
        cpu.code_cache.drop_all()
        self.memory.bytes8[:SIZE] = usual_memory()
        for address, data in case.memory:
            self.memory.load(address, data)
        cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer = case.controls or self.controls
        cpu.cr2, cpu.halted, cpu.attention = 0, False, False
        cpu.gdtr_base, cpu.gdtr_limit, cpu.idtr_base, cpu.idtr_limit = GDT, len(DESCRIPTORS) * 8 - 1, 0, 0x3FF
        cpu.msrs = msr.after_reset()
        cpu.debug.reset()
        cpu.update_debug()
        cpu.fpu.reset()
        cpu.ldtr, cpu.tr = seg.null_segment(0), seg.null_segment(0)
        cpu.segments, cpu.cpl = list(self.segments), self.world.cpl
        cpu.write_eflags(case.flags)
        cpu.update_paging()
        cpu.update_mode()
        if cpu.mmu.mode is PAGING_PAE:
            cpu.mmu.load_pdptes(cpu.cr3)
        for register, value in zip(cpu.regs, case.registers):
            register.value = value & MASKS[64 if self.world.bits == 64 else 32]
        self.memory.load(CODE, case.code + HLT)
        cpu.ip = case.start - cpu.segments[seg.CS].base
        self.port_device.log.clear()

    def go_on(self, instructions: int) -> Outcome:
        """Run so many instructions, up to an exception at most, and tell the state then."""
        cpu = self.cpu
        raised: list[tuple[int, int]] = []

        def fault(cpu: Cpu, fault: GuestFault) -> None:
            raised.append((fault.vector, fault.error_code or 0))
            if fault.address is not None:
                cpu.cr2 = fault.address
            cpu.attention = True

        def software_interrupt(cpu: Cpu, vector: int, error_code: int | None, software: bool = False) -> None:
            assert software or vector == DB  # INT1
            raised.append((vector, 0))

        with mock.patch.object(interrupts, "deliver_fault", fault):
            with mock.patch.object(interrupts, "deliver", software_interrupt):
                goal = cpu.retired + instructions
                while cpu.retired < goal and not raised and not cpu.halted:
                    cpu.attention = False
                    cpu.run(goal)
        vector, error_code = raised[0] if raised else (None, 0)
        return Outcome(
            vector,
            error_code,
            cpu.ip,
            tuple(register.value for register in cpu.regs[: 16 if self.world.bits == 64 else 8]),
            cpu.eflags,
            tuple(segment.selector for segment in cpu.segments),
            (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4),
            tuple(self.port_device.log),
            bytes(self.memory.bytes8[:SIZE]),
        )


class Ports:
    """A device that answers at every port, with a value that depends on it, and remembers what was asked of it.

    Who wants to know what is written at once puts something at `written`.
    """

    ports = range(0x10000)

    def __init__(self) -> None:
        self.log: list[tuple[int, int | None]] = []
        self.written: Callable[[int], object] = lambda port: None

    def inb(self, port: int) -> int:
        if port >= 0x10000:
            return 0xFF
        self.log.append((port, None))
        return port * 7 + 3 & 0xFF

    def outb(self, port: int, value: int) -> None:
        if port < 0x10000:
            self.log.append((port, value))
            self.written(port)


class Theirs:
    """Unicorn in one of the worlds."""

    def __init__(self, world: World):
        self.world = world
        self.port_device = Ports()
        self.ram = mmap.mmap(-1, SIZE)
        self.address = ctypes.addressof((ctypes.c_char * SIZE).from_buffer(self.ram))
        mode = {16: unicorn.UC_MODE_16, 32: unicorn.UC_MODE_32, 64: unicorn.UC_MODE_64}
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, mode[16 if world.real else max(world.bits, 32)])
        self.uc.ctl_set_cpu_model(uc.UC_CPU_X86_SKYLAKE_SERVER)  # has all that ours has, and more
        self.uc.mem_map_ptr(0, SIZE, unicorn.UC_PROT_ALL, self.address)
        self.ram[:] = usual_memory()
        self.vectors: list[int] = []
        self.uc.hook_add(unicorn.UC_HOOK_INTR, self.on_exception)
        self.uc.hook_add(unicorn.UC_HOOK_INSN, self.on_in, aux1=uc.UC_X86_INS_IN)
        self.uc.hook_add(unicorn.UC_HOOK_INSN, self.on_out, aux1=uc.UC_X86_INS_OUT)
        self.uc.reg_write(uc.UC_X86_REG_GDTR, (0, GDT, len(DESCRIPTORS) * 8 - 1, 0))
        self.uc.reg_write(uc.UC_X86_REG_IDTR, (0, 0, 0x3FF, 0))
        if world.cpl:
            self.go_to_level_3()
        else:
            for register, selector in zip(SEGMENTS, world.selectors):
                self.uc.reg_write(register, selector)
        if world.bits == 64 and not world.cpl:
            self.load_stack_segment(world.selectors[seg.SS_])
        if world.bits == 64:
            self.uc.reg_write(uc.UC_X86_REG_FS_BASE, FS_BASE)
            self.uc.reg_write(uc.UC_X86_REG_GS_BASE, GS_BASE)
        cr0, _, cr3, cr4 = world.controls
        for register, value in zip(CONTROLS, (cr0, 0, cr3, cr4)):
            if register != uc.UC_X86_REG_CR0:
                self.uc.reg_write(register, value)
        self.uc.reg_write(uc.UC_X86_REG_CR0, cr0)
        self.uc.reg_write(uc.UC_X86_REG_FPCW, CONTROL_AFTER_RESET)
        self.uc.reg_write(uc.UC_X86_REG_MXCSR, MXCSR_AFTER_RESET)
        self.registers = REGISTERS_64 if world.bits == 64 else REGISTERS_32
        self.beginning = self.uc.context_save()

    def go_to_level_3(self) -> None:
        """Writing a selector does not change the privilege level; an IRET does. The data segments can follow then."""
        es, cs, ss, ds, fs, gs = self.world.selectors
        wide = self.world.bits == 64
        for register, selector in zip(SEGMENTS, (0x10, 0x50 if wide else 0x08, 0x10, 0x10, fs, gs)):
            self.uc.reg_write(register, selector)
        frame = (CODE, cs, 2, DATA, ss)
        self.uc.mem_write(DATA, b"".join(value.to_bytes(8 if wide else 4, "little") for value in frame))
        self.uc.mem_write(CODE, b"\x48\xcf" if wide else b"\xcf")
        self.uc.reg_write(uc.UC_X86_REG_RSP if wide else uc.UC_X86_REG_ESP, DATA)
        self.uc.emu_start(CODE, 0, count=1)
        self.uc.reg_write(uc.UC_X86_REG_DS, ds)
        self.uc.reg_write(uc.UC_X86_REG_ES, es)
        assert self.uc.reg_read(uc.UC_X86_REG_CS) == cs

    def load_stack_segment(self, selector: int) -> None:
        """In 64-bit mode, writing a selector does not bring its descriptor; MOV SS does."""
        self.uc.mem_write(CODE, b"\x8e\xd0")
        self.uc.reg_write(uc.UC_X86_REG_EAX, selector)
        self.uc.emu_start(CODE, 0, count=1)

    def on_exception(self, _: unicorn.Uc, vector: int, __: object) -> None:
        self.vectors.append(vector)
        self.uc.emu_stop()

    def on_in(self, _: unicorn.Uc, port: int, size: int, __: object) -> int:
        return sum((self.port_device.inb(port + byte) & 0xFF) << byte * 8 for byte in range(size))

    def on_out(self, _: unicorn.Uc, port: int, size: int, value: int, __: object) -> None:
        for byte in range(size):
            self.port_device.outb(port + byte, value >> byte * 8 & 0xFF)

    def run(self, case: Case) -> Outcome:
        self.ram[:] = usual_memory()
        for address, data in case.memory:
            self.ram[address : address + len(data)] = data
        self.ram[CODE : CODE + len(case.code) + 1] = case.code + HLT
        self.uc.context_restore(self.beginning)
        self.uc.ctl_remove_cache(CODE, CODE + 0x200)
        self.flush_tlb()
        if case.controls:
            cr0, cr3, cr4, efer = case.controls
            for register, value in ((uc.UC_X86_REG_CR3, cr3), (uc.UC_X86_REG_CR4, cr4)):
                self.uc.reg_write(register, value)
            self.uc.reg_write(uc.UC_X86_REG_MSR, (msr.EFER, efer))
            self.uc.reg_write(uc.UC_X86_REG_CR0, cr0)
        self.uc.reg_write_batch(list(zip(self.registers, case.registers)))
        self.uc.reg_write(uc.UC_X86_REG_EFLAGS, case.flags)
        self.vectors.clear()
        self.port_device.log.clear()
        vector, error_code, fetched = None, 0, True
        try:
            if case.instructions == 1 and not case.repeats:
                self.uc.emu_start(case.start, 0, count=1)
            else:  # Unicorn counts each round of a REP; the code has no jumps, so it ends at its end
                self.uc.emu_start(case.start, case.repeats or CODE + len(case.code), count=MAX_ROUNDS)
        except unicorn.UcError as error:
            if error.errno == unicorn.UC_ERR_INSN_INVALID:
                vector = UD
            elif error.errno in UNMAPPED:
                raise Unusable(str(error)) from None
            elif error.errno == unicorn.UC_ERR_FETCH_UNMAPPED:
                fetched = False  # the next instruction's business, unless there was none yet
            else:
                raise
        ip = self.uc.reg_read(uc.UC_X86_REG_RIP if self.world.bits == 64 else uc.UC_X86_REG_EIP)
        if not fetched and ip == case.start:
            raise Unusable("no code")
        if self.vectors and not self.at_target(case, ip):
            vector = self.vectors[0]
            error_code = self.error_code() if vector in WITH_ERROR_CODE else 0
        return Outcome(
            vector,
            error_code,
            ip,
            tuple(self.uc.reg_read_batch(self.registers)),
            self.uc.reg_read(uc.UC_X86_REG_EFLAGS),
            tuple(self.uc.reg_read_batch(SEGMENTS)),
            tuple(self.uc.reg_read_batch(CONTROLS)),
            tuple(self.port_device.log),
            bytes(self.ram),
        )

    def flush_tlb(self) -> None:
        """The case before may have had other page tables. A change of CR0.WP is what empties Unicorn's TLB."""
        cr0 = self.world.controls[0]
        for value in (cr0 ^ CR0_WP, cr0):
            self.uc.reg_write(uc.UC_X86_REG_CR0, value)

    def at_target(self, case: Case, ip: int) -> bool:
        """A jump or a change of paging has gone well, but Unicorn looks at the code there before it stops: none."""
        base = CODE if self.world.real else 0
        elsewhere = ip not in (case.start - base, CODE + len(case.code) - base)
        elsewhere |= self.uc.reg_read(uc.UC_X86_REG_CS) != self.world.selectors[seg.CS]
        elsewhere |= self.uc.reg_read(uc.UC_X86_REG_EFLAGS) & fl.VM != 0
        elsewhere |= self.vectors[0] == PF and self.uc.reg_read(uc.UC_X86_REG_CR2) == ip != case.start
        found = case.instructions == 1 and self.vectors[0] in (GP, PF) and elsewhere
        if found:
            self.uc.reg_write(uc.UC_X86_REG_CR2, 0)
        return found

    def error_code(self) -> int:
        return int.from_bytes(_saved_state(self.uc)[_place_of_error_code() :][:2], "little")


def _saved_state(machine: unicorn.Uc) -> bytes:
    context = machine.context_save()
    return ctypes.string_at(context.context, context.size)


@functools.cache
def _place_of_error_code() -> int:
    """Where in Unicorn's saved state the error code lies: where 2340 is after a fault with that code, and so on."""
    states = []
    for selector in (0x2340, 0x5678):
        machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
        machine.mem_map(0, SIZE)
        machine.mem_write(CODE, b"\x8e\xd8")  # mov ds, ax
        machine.hook_add(unicorn.UC_HOOK_INTR, lambda machine, vector, _: machine.emu_stop())
        machine.reg_write(uc.UC_X86_REG_EBX, 0)
        machine.reg_write(uc.UC_X86_REG_EAX, selector)
        machine.emu_start(CODE, 0, count=1)
        machine.reg_write(uc.UC_X86_REG_EAX, 0)
        states.append((selector, _saved_state(machine)))
    places = [
        place
        for place in range(len(states[0][1]) - 3)
        if all(state[place : place + 4] == selector.to_bytes(4, "little") for selector, state in states)
    ]
    (place,) = places
    return place
