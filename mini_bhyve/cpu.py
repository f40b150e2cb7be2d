"""The processor: its registers and modes, and how it runs.

Mirrors Intel SDM vol. 1, chapter 3 (Basic Execution Environment), vol. 3A, chapter 2 (System Architecture Overview),
and, on FreeBSD's side, struct vcpu and vm_run() of sys/amd64/vmm. What the instructions do is in `instructions/`, how
they are decoded in `decode.py`, interrupts in `interrupts.py`, segments in `segmentation.py`, page tables in
`paging.py`, and how all of these come together when memory is accessed in `access.py`.

    run() --> code cache --> for each step: definition(cpu, operands ...)
                 |                                 |
              fetch, decode                  operand.value --> load() / store() --> TLB --> RAM
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Callable

from mini_bhyve import flags as fl
from mini_bhyve import interrupts, msr
from mini_bhyve import segmentation as seg
from mini_bhyve.access import MemoryAccess
from mini_bhyve.clock import Clock
from mini_bhyve.code_cache import CodeCache
from mini_bhyve.cpuid import CR4_SUPPORTED, EFER_SUPPORTED, SIGNATURE
from mini_bhyve.debug import SINGLE_STEP, Debug
from mini_bhyve.decode import Block, Mode, Step
from mini_bhyve.faults import GuestFault, VmExit, general_protection
from mini_bhyve.fpu import Fpu
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import MASKS, RAX, RDX, Operand, Register, general_register
from mini_bhyve.paging import (
    CR0_LOADS_PDPTES,
    CR4_LOADS_PDPTES,
    FETCH,
    PAGING_PAE,
    PHYSICAL_BITS,
    SMAP_OVERRIDE,
    USER_ACCESS,
    Mmu,
    is_canonical,
    paging_mode,
)  # fmt: skip
from mini_bhyve.registers import (
    CR0_CD,
    CR0_DEFINED,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_DE,
    CR4_PAE,
    CR4_SMAP,
    EFER_LMA,
    EFER_LME,
)  # fmt: skip
from mini_bhyve.translate import SLICE, Translator

if TYPE_CHECKING:
    from mini_bhyve.start import Start

REGISTER_NAMES = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()


class Cpu(MemoryAccess):
    """One x86-64 processor, as after power-on: real mode, at the reset vector."""

    __slots__ = (
        "_system_flags", "acknowledge_interrupt", "attention", "bytes8", "claim_x87", "clock", "code",
        "code_cache", "code_limit", "code_size", "cpl", "cr0", "cr2", "cr3", "cr4", "cr8", "debug", "efer", "fetched",
        "flags", "flat_stack", "fpu", "gdtr_base", "gdtr_limit", "halted", "idtr_base", "idtr_limit",
        "interrupt_line", "interrupts_from", "ip", "ldtr", "limit", "linear_mask", "long_mode", "memory", "mmu", "mode",
        "msrs", "next_ip", "nmi_blocked", "nmi_pending", "ports", "read_tlb", "read_words", "regs", "retired",
        "running", "segments", "stack_mask", "task_priority_changed", "tell_absent", "tr", "translator", "traps_from",
        "tsc_offset", "user_access", "words16", "words32", "words64", "write_tlb",
        "write_words",
    )  # fmt: skip

    name = "vmcx"  # bhyve's name for a vCPU's registers in a snapshot

    def __init__(self, memory: GuestMemory, ports: IoPorts):
        self.memory = memory
        self.ports = ports
        self.bytes8, self.words16 = memory.bytes8, memory.words16
        self.words32, self.words64 = memory.words32, memory.words64
        self.mmu = Mmu(memory, self.store_physical)
        self.clock = Clock(lambda: self.instructions)
        self.debug = Debug()
        self.code_cache = CodeCache(self)
        memory.device_accessed = self.device_accessed
        # How an interrupt controller is asked for its vector; the machine connects one.
        self.acknowledge_interrupt: Callable[[], int] = lambda: 0
        self.interrupt_line = False  # the INTR pin
        # What is told of a write to CR8; the machine connects the local APIC, whose TPR it is.
        self.task_priority_changed: Callable[[int], object] = lambda priority: None
        # What is told of an instruction that the processor does not have: its mnemonic, and a sentence; the machine
        # connects one.
        self.tell_absent: Callable[[str, str], None] = lambda mnemonic, sentence: None
        self.fpu = Fpu()
        self.claim_x87 = False  # CPUID tells of an x87 (see `Start`)
        self.attention = False  # set, from any thread, to make run() return soon
        self.retired = 0  # instructions executed up to the beginning of the running block
        self.limit = 0  # where in this count run_blocks() will stop
        self.running: Block | None = None
        # RAX ... RDI are as wide as the mode says; R8 ... R15 keep their 64 bits. The last is always zero.
        self.regs = [Register(32) for _ in range(8)] + [Register(64) for _ in range(9)]
        self.translator = Translator(self)
        self._system_flags = 0
        self.reset()

    # --- Registers and modes ----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """The state after power-on or RESET (SDM vol. 3A, table 9-1). The instruction count goes on."""
        for register in self.regs:
            register.value = 0
        self.regs[RDX].value = SIGNATURE
        self.ip = self.next_ip = 0xFFF0
        self.flags: fl.FlagSource = (fl.EXPLICIT, 0, 0, 0, 32)
        self.system_flags = 0
        self.segments: list[seg.Segment] = [seg.real_mode_segment(0) for _ in range(6)]
        # The one time that CS is not its selector times 16: the first instruction is fetched from FFFF FFF0.
        self.segments[seg.CS] = seg.Segment(0xF000, 0xFFFF0000, 0xFFFF, seg.REAL_MODE_ACCESS)
        self.gdtr_base = self.idtr_base = 0
        self.gdtr_limit = self.idtr_limit = 0xFFFF
        self.ldtr = seg.Segment(0, 0, 0xFFFF, seg.PRESENT | seg.LDT)
        self.tr = seg.Segment(0, 0, 0xFFFF, seg.PRESENT | seg.TSS32_BUSY)
        self.cr0 = CR0_CD | CR0_NW | CR0_ET
        self.cr2 = self.cr3 = self.cr4 = 0
        self.efer: int = 0
        self.cr8 = 0  # the task priority, 0 to 15: interrupts of that priority and below wait in the local APIC
        self.msrs = msr.after_reset()
        self.set_time_stamp(0)
        self.debug.reset()
        self.fpu.reset()
        self.halted = False
        self.nmi_pending = self.nmi_blocked = False
        self.interrupts_from = 0  # interrupts wait until so many instructions have been executed: the shadow of STI
        self.traps_from = 0  # and debug exceptions until then: the shadow of MOV SS
        self.cpl = 0
        self.update_mode()
        self.update_debug()
        self.update_paging()

    def write_eflags(self, value: int, writable: int = 0xFFFFFFFF) -> None:
        """Set EFLAGS; bits not in `writable`, other than the arithmetic ones, stay as they are."""
        writable &= fl.SYSTEM
        self.system_flags = self.system_flags & ~writable | value & writable
        self.flags = (fl.EXPLICIT, value & fl.ARITHMETIC, 0, 0, 32)
        self.attention = True  # IF or TF may have changed what is due next

    @property
    def system_flags(self) -> int:
        """EFLAGS but for the arithmetic ones and the bit that is always 1."""
        return self._system_flags

    @system_flags.setter
    def system_flags(self, value: int) -> None:
        changed = self._system_flags ^ value
        self._system_flags = value
        if changed & fl.AC:
            self.update_user_access()

    def change_system_flags(self, cleared: int, then_set: int) -> None:
        """Change single ones."""
        self.system_flags = self.system_flags & ~cleared | then_set

    @property
    def protected_mode(self) -> bool:
        """Whether segments are what descriptors say: not in real mode, nor in virtual-8086 mode, its likeness."""
        return self.cr0 & CR0_PE != 0 and not self.system_flags & fl.VM

    @property
    def virtual_8086_mode(self) -> bool:
        """Whether a task runs as if in real mode, at level 3 and watched over by protected mode (SDM vol. 3B, 20.2)."""
        return self.system_flags & fl.VM != 0

    @property
    def time_stamp(self) -> int:
        """The time-stamp counter: the clock in nanoseconds, so a processor of 1 GHz, and what WRMSR has added to it."""
        return self.clock.now + self.tsc_offset & MASKS[64]

    def set_time_stamp(self, value: int) -> None:
        """Let the counter go on from `value`."""
        self.tsc_offset = value - self.clock.now & MASKS[64]

    def accumulator(self, width: int) -> Operand:
        """AL, AX, EAX or RAX as an operand, for instructions that imply it."""
        return general_register(self.regs[RAX], width)

    def update_mode(self) -> None:
        """Work out what follows from CS, SS, CR0 and EFER, after one of them has changed."""
        cs, ss = self.segments[seg.CS], self.segments[seg.SS_]
        self.long_mode = self.efer & EFER_LMA != 0
        if self.long_mode and cs.access & seg.LONG:
            self.code_size, self.stack_mask, flat, code_base = 64, MASKS[64], True, 0
            self.code_limit = MASKS[64]
        else:
            self.code_size = 32 if cs.access & seg.BIG else 16
            self.stack_mask = 0xFFFFFFFF if ss.access & seg.BIG else 0xFFFF
            flat = ss.flat and self.segments[seg.DS].flat and self.segments[seg.ES].flat
            code_base = cs.base
            self.code_limit = cs.last
        register_width = 64 if self.code_size == 64 else 32
        if self.regs[RAX].width != register_width:
            for register in self.regs[:8]:  # (SDM vol. 1, 3.4.1.1)
                register.set_width(register_width)
        self.linear_mask = MASKS[64] if self.code_size == 64 else MASKS[32]
        self.flat_stack = (ss.flat or self.code_size == 64) and self.stack_mask > 0xFFFF
        self.mode = Mode(
            self.code_size, self.stack_mask, flat, self.cpl, code_base, self.code_limit, not self.protected_mode,
            self.long_mode,
        )  # fmt: skip
        self.update_user_access()
        self.code = self.code_cache.lookup(self.mode)

    def update_paging(self) -> None:
        """Tell the paging unit what the control registers say."""
        self.mmu.configure(self.cr0, self.cr3, self.cr4, self.efer)
        self.forget_code()
        self.update_user_access()

    def update_user_access(self) -> None:
        """Whose the accesses of the program are, for paging, after CPL, CR4.SMAP or EFLAGS.AC has changed."""
        if self.cpl == 3:
            self.user_access = USER_ACCESS
        else:
            self.user_access = SMAP_OVERRIDE if self.cr4 & CR4_SMAP and self.system_flags & fl.AC else 0
        mmu, whose = self.mmu, self.user_access
        self.fetched = mmu.known[self.fetch_access]
        self.read_tlb, self.write_tlb = mmu.read_tlb[whose], mmu.write_tlb[whose]
        self.read_words, self.write_words = mmu.read_words[whose], mmu.write_words[whose]

    @property
    def fetch_access(self) -> int:
        """What fetching is to paging. Whether AC lifts SMAP is of no matter for it."""
        return FETCH | self.user_access & USER_ACCESS

    def flush_tlb(self) -> None:
        """Forget all translations, and which code lies at which address."""
        self.mmu.flush()
        self.forget_code()

    def forget_page(self, linear: int) -> None:
        """INVLPG, and what a page fault does."""
        if self.mmu.forget_page(linear):
            self.forget_code()

    def forget_code(self) -> None:
        """Which code lies at which address has to be found out again."""
        self.code_cache.forget()
        self.code = self.code_cache.lookup(self.mode)

    def set_a20(self, enabled: bool) -> None:
        """The A20 gate has been opened or closed."""
        self.memory.set_a20(enabled)
        self.flush_tlb()

    def read_control_register(self, number: int) -> int:
        """MOV from CRn: for level 0 only."""
        if self.cpl:
            raise general_protection()
        return {0: self.cr0, 2: self.cr2, 3: self.cr3, 4: self.cr4, 8: self.cr8}[number]

    def write_control_register(self, number: int, value: int) -> None:
        """MOV to CRn, with its checks (SDM vol. 2B, MOV-Control Registers); #GP for what may not be set."""
        if self.cpl:
            raise general_protection()
        if number == 0:
            self.write_cr0(value)
        elif number == 2:
            self.cr2 = value
        elif number == 3:
            self.write_cr3(value)
        elif number == 4:
            if value & ~CR4_SUPPORTED or (self.long_mode and not value & CR4_PAE):
                raise general_protection()
            if (value ^ self.cr4) & CR4_LOADS_PDPTES and paging_mode(self.cr0, value, self.efer) is PAGING_PAE:
                self.mmu.load_pdptes(self.cr3)
            self.cr4 = value
            self.update_paging()
            self.debug.set_extensions(value & CR4_DE != 0)
            self.update_debug()
        elif value > 15:
            raise general_protection()
        else:
            self.cr8 = value
            self.task_priority_changed(value)
            self.attention = True  # an interrupt may have waited for this

    def write_cr0(self, value: int) -> None:
        """CR0, and with it protected mode, paging, and the second half of entering long mode (SDM vol. 3A, 9.8.5)."""
        if value >> 32:
            raise general_protection()
        value = value & CR0_DEFINED | CR0_ET
        if (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
            raise general_protection()
        efer = self.efer
        paging_begins = value & CR0_PG and not self.cr0 & CR0_PG
        paging_ends = self.cr0 & CR0_PG and not value & CR0_PG
        if paging_begins and self.efer & EFER_LME:
            tss16 = self.tr.access & seg.TYPE in (seg.TSS16_AVAILABLE, seg.TSS16_BUSY)
            if not self.cr4 & CR4_PAE or self.segments[seg.CS].access & seg.LONG or tss16:
                raise general_protection()
            efer |= EFER_LMA
        elif paging_ends:
            if self.code_size == 64:
                raise general_protection()
            efer &= ~EFER_LMA
        if (value ^ self.cr0) & CR0_LOADS_PDPTES and paging_mode(value, self.cr4, efer) is PAGING_PAE:
            self.mmu.load_pdptes(self.cr3)
        self.cr0, self.efer = value, efer
        self.update_paging()
        self.update_mode()

    def write_cr3(self, value: int) -> None:
        """CR3, by MOV or by a task switch: other page tables. #GP for a bit that no physical address has."""
        if value >> PHYSICAL_BITS:
            raise general_protection()
        if self.mmu.mode is PAGING_PAE:
            self.mmu.load_pdptes(value)
        self.cr3 = value
        self.mmu.set_root(value)
        self.forget_code()

    def write_efer(self, value: int) -> None:
        """WRMSR to EFER: LMA follows from LME and paging, and LME cannot change while paging is on."""
        if value & ~EFER_SUPPORTED or (self.cr0 & CR0_PG and (value ^ self.efer) & EFER_LME):
            raise general_protection()
        self.efer = value & ~EFER_LMA | self.efer & EFER_LMA
        self.update_paging()

    def read_debug_register(self, number: int) -> int:
        """MOV from DRn; #GP above level 0."""
        if self.cpl:
            raise general_protection()
        return self.debug.read(number)

    def write_debug_register(self, number: int, value: int) -> None:
        """MOV to DRn; #GP above level 0."""
        if self.cpl:
            raise general_protection()
        self.debug.write(number, value)
        self.update_debug()

    def update_debug(self) -> None:
        """What is being watched has changed: watched pages leave the TLB, and run() looks how to go on."""
        self.mmu.watched_pages = self.debug.watched_pages
        self.flush_tlb()
        if self.debug.breakpoints:
            self.attention = True

    def load_segment(self, index: int, selector: int) -> None:
        """What a MOV or POP to a segment register other than CS does, with all checks of the mode."""
        if self.virtual_8086_mode:
            segment = seg.virtual_8086_segment(selector)
        elif not self.protected_mode:
            old = self.segments[index]
            segment = seg.real_mode_segment(selector)
            if not old.access & seg.UNUSABLE:
                # The base changes and nothing else: a limit left behind by protected mode stays ("unreal mode").
                segment = seg.Segment(selector, segment.base, old.limit, old.access)
        elif index == seg.SS_:
            segment = seg.stack_segment(self, selector, self.cpl)
        else:
            segment = seg.data_segment(self, selector)
        seg.mark_accessed(self, segment)
        self.segments[index] = segment
        self.update_mode()

    def set_code_segment(self, segment: seg.Segment, cpl: int) -> None:
        """A far transfer has arrived: CS and the privilege level change together."""
        self.segments[seg.CS] = segment
        self.cpl = cpl
        self.update_mode()

    def set_stack_segment(self, segment: seg.Segment) -> None:
        """SS, already checked."""
        self.segments[seg.SS_] = segment
        self.update_mode()

    def shadow_interrupts(self) -> None:
        """Interrupts wait until the next instruction is done: after STI, MOV SS and POP SS (SDM vol. 3A, 6.8.3)."""
        self.interrupts_from = self.instructions + 2
        self.attention = True

    def shadow_traps(self) -> None:
        """As `shadow_interrupts`, for debug exceptions too: the next instruction sets the other half of the stack."""
        self.shadow_interrupts()
        self.traps_from = self.interrupts_from

    # --- The state as a whole: at the start, in a snapshot, for bhyvectl --------------------------------------------

    def start(self, start: Start) -> None:
        """Begin where and how a loader says."""
        self.reset()
        self.regs[RDX].value = 0
        for name, value in start.registers.items():
            self.regs[REGISTER_NAMES.index("r" + name[1:])].value = value
        self.claim_x87 = start.claim_x87
        self.gdtr_base, self.gdtr_limit = start.gdt_base, start.gdt_limit
        self.cr3 = start.cr3
        if start.mode == "real":
            self.segments = [seg.real_mode_segment(start.data_selector) for _ in range(6)]
            self.segments[seg.CS] = seg.Segment(
                start.code_selector, start.code_base, 0xFFFF, seg.REAL_MODE_ACCESS
            )  # fmt: skip
        else:
            self.cr0 = CR0_PE | CR0_ET
            self.write_efer(EFER_LME if start.mode == "long" else 0)
            if start.mode == "long":
                self.cr4 = CR4_PAE
                self.write_cr0(CR0_PE | CR0_PG)
            for index in (seg.ES, seg.SS_, seg.DS, seg.FS, seg.GS):
                self.segments[index] = seg.read_descriptor(self, start.data_selector).segment(start.data_selector)
            self.segments[seg.CS] = seg.read_descriptor(self, start.code_selector).segment(start.code_selector)
        self.update_paging()
        self.update_mode()
        self.ip = start.entry

    def snapshot(self, state) -> None:
        """Everything that tells how the guest goes on. What is decoded or in the TLB is found again.

        (In both directions, so that a VM that goes on after it was saved and its copy are alike. A guest that changed a
        page table and has not said so yet may notice; a processor promises it no more.)
        """
        for register, name in zip(self.regs, REGISTER_NAMES):
            register.value = state.u64(name, register.value)
        self.ip = state.u64("rip", self.ip)
        flags = state.u32("rflags", self.eflags)
        self.system_flags, self.flags = flags & fl.SYSTEM, (fl.EXPLICIT, flags & fl.ARITHMETIC, 0, 0, 32)
        self.segments = [
            segment.snapshot(state, name) for segment, name in zip(self.segments, seg.SEGMENT_NAMES)
        ]
        self.ldtr, self.tr = self.ldtr.snapshot(state, "ldtr"), self.tr.snapshot(state, "tr")
        self.gdtr_base = state.u64("gdtr_base", self.gdtr_base)
        self.gdtr_limit = state.u16("gdtr_limit", self.gdtr_limit)
        self.idtr_base = state.u64("idtr_base", self.idtr_base)
        self.idtr_limit = state.u16("idtr_limit", self.idtr_limit)
        self.cpl = state.u8("cpl", self.cpl)
        self.cr0, self.cr2 = state.u32("cr0", self.cr0), state.u64("cr2", self.cr2)
        self.cr3, self.cr4 = state.u64("cr3", self.cr3), state.u32("cr4", self.cr4)
        self.efer = state.u64("efer", self.efer)
        self.mmu.pdptes = [state.u64(f"pdpte{number}", pdpte) for number, pdpte in enumerate(self.mmu.pdptes)]
        self.cr8 = state.u8("cr8", self.cr8)
        self.msrs = {number: state.u64(kept.name, self.msrs[number]) for number, kept in msr.KEPT.items()}
        self.tsc_offset = state.u64("tsc_offset", self.tsc_offset)
        self.debug.extensions = self.cr4 & CR4_DE != 0
        self.debug.snapshot(state)
        self.fpu.snapshot(state)
        self.claim_x87 = state.flag("claim_x87", self.claim_x87)
        self.halted = state.flag("halted", self.halted)
        self.interrupt_line = state.flag("interrupt_line", self.interrupt_line)
        self.nmi_pending = state.flag("nmi_pending", self.nmi_pending)
        self.nmi_blocked = state.flag("nmi_blocked", self.nmi_blocked)
        self.interrupts_from = state.u64("interrupts_from", self.interrupts_from)
        self.traps_from = state.u64("traps_from", self.traps_from)
        self.retired = state.u64("instructions", self.retired)
        unknown = self.cr0 & ~CR0_DEFINED | self.cr4 & ~CR4_SUPPORTED | self.efer & ~(EFER_SUPPORTED | EFER_LMA)
        if unknown or self.cpl > 3 or self.cr8 > 15:
            raise ValueError("this processor does not have such control registers, or such a privilege level")
        self.update_debug()
        self.update_paging()
        self.update_mode()
        for register in self.regs[:8]:
            register.value &= register.mask  # (none is wider than the mode, unless a snapshot says so)

    def register_values(self) -> dict[str, int]:
        """All registers, under the names that bhyvectl has for them."""
        values = {name: register.value for name, register in zip(REGISTER_NAMES, self.regs)}
        values.update(rip=self.ip, rflags=self.eflags, efer=self.efer)
        values.update(cr0=self.cr0, cr2=self.cr2, cr3=self.cr3, cr4=self.cr4)
        values.update({f"dr{number}": self.debug.registers[number] for number in (0, 1, 2, 3, 6, 7)})
        values.update(gdtr_base=self.gdtr_base, gdtr_limit=self.gdtr_limit)
        values.update(idtr_base=self.idtr_base, idtr_limit=self.idtr_limit)
        for name, segment in zip((*seg.SEGMENT_NAMES, "ldtr", "tr"), (*self.segments, self.ldtr, self.tr)):
            values[name] = segment.selector
            values[f"{name}_base"] = segment.base
            values[f"{name}_limit"] = segment.limit
            values[f"{name}_access"] = segment.access
        return values

    def describe_mode(self) -> str:
        """The mode in words, as "32-bit, paging"."""
        if not self.protected_mode:
            return "virtual-8086 mode" if self.virtual_8086_mode else "16-bit real mode"
        paging_mode = self.mmu.mode
        return f"{self.code_size}-bit code, " + (f"{paging_mode.name} paging" if paging_mode else "no paging")

    # --- Control flow -----------------------------------------------------------------------------------------------

    def branch(self, taken, target: int) -> None:
        """Go on at `target` (an offset in the code segment) if `taken`; #GP, at the jump, if it is beyond the limit."""
        if taken:
            if target > self.code_limit:
                raise general_protection()
            self.next_ip = target

    def check_target(self, target: int) -> None:
        """#GP if no code can be at `target`: also if that is not canonical, as what a jump computes may be."""
        if target > self.code_limit or (self.code_size == 64 and not is_canonical(target)):
            raise general_protection()

    def device_accessed(self) -> None:
        """The running instruction has to do with a device in memory, which may change what is due next: as IN, OUT."""
        self.attention = True
        self.code_cache.end_running()

    def halt(self) -> None:
        """HLT: nothing is executed until an interrupt comes."""
        self.halted = True
        self.attention = True

    def where(self) -> str:
        """The address of the running instruction, for a message."""
        ip = self.ip
        if self.running is not None and self.next_ip in self.running.next_ips:
            ip = self.running.ips[self.running.next_ips.index(self.next_ip)]
        return f"{self.segments[seg.CS].selector:04x}:{ip:0{max(self.code_size, 16) // 4}x}"

    # --- Running ----------------------------------------------------------------------------------------------------

    @property
    def instructions(self) -> int:
        """How many instructions have been executed since power-on, exact also in the middle of a block."""
        if self.running is None:
            return self.retired
        return self.retired + self.running.next_ips.index(self.next_ip)

    def run(self, limit: int) -> None:
        """Execute until `limit` instructions have been executed since power-on, or until `attention` is set.

        A fault counts as the instruction that it replaces. Raises VmExit when the guest cannot go on.
        """
        while self.retired < limit and not self.attention:
            if not self.trap_due:  # (it is, here, if the last one has hit a breakpoint with what it pushed)
                if self.single_steps or self.system_flags & fl.RF:
                    self.step()
                else:
                    self.run_blocks(limit)
            if self.trap_due:
                interrupts.deliver_debug_trap(self)

    def run_blocks(self, limit: int) -> None:
        """The loop that all is about: block after block, until `limit` or `attention`.

        A block is interpreted as often as its `heat` says; then it is translated, and its translation runs in its place
        if there are instructions enough left, unless that has just been left in its middle: then the interpreter must
        do the next instruction.
        """
        self.limit = limit
        just_left = False
        while self.retired < limit and not self.attention:
            try:
                try:
                    block = self.code[self.ip]
                except KeyError:
                    self.running = None
                    block = self.code_cache.find()
                heat = block.heat
                if heat:
                    block.heat = heat - 1
                elif block.translation is None:
                    self.translator.translate(block)
                    continue
                elif not just_left and block.longest <= limit - self.retired:
                    self.running = None
                    left = limit - self.retired
                    if left > SLICE:
                        left = SLICE
                    self.retired += left
                    self.retired -= block.function(block.entry, left)  # type: ignore[misc]
                    continue
                just_left = False
                self.running = block
                steps: Iterable[Step] = block.steps
                end = self.retired + block.length
                if end > limit:
                    end = limit
                    steps = itertools.islice(steps, limit - self.retired)
                for definition, arguments, self.next_ip in steps:
                    definition(*arguments)
                if block.steps:
                    self.retired = end
                else:  # it has been emptied, and so ended early: it wrote into itself, or to a device
                    self.retired += self.code_cache.ended_after
                    self.code_cache.put_back(block)
                self.ip = self.next_ip
            except GuestFault as fault:
                self.undo_until_fault()
                interrupts.deliver_fault(self, fault)
            except KeyError as error:
                self.translator.leave(error)
                just_left = True
            except VmExit:
                self.undo_until_fault()
                raise
        self.running = None

    @property
    def single_steps(self) -> bool:
        """Whether something is to be looked at after each instruction: EFLAGS.TF is set, or a breakpoint."""
        return self.system_flags & fl.TF != 0 or bool(self.debug.breakpoints)

    @property
    def trap_due(self) -> bool:
        """Whether there is a #DB for what has been done already, to come before anything else."""
        return self.debug.pending != 0 and self.retired >= self.traps_from

    def step(self) -> None:
        """One instruction, with all that debugging asks for (SDM vol. 3B, 17.3.1).

        TF and RF count as they are before it: so POPF and IRET can set them without being caught themselves. Whatever
        calls a handler takes back the single-step trap.
        """
        began, pending, resumes = self.retired, self.debug.pending, self.system_flags & fl.RF
        try:
            if self.debug.breakpoints and not resumes and self.retired >= self.traps_from:
                self.debug.check_execution((self.segment_base(seg.CS) + self.ip) & self.linear_mask)
        except GuestFault as fault:
            self.retired += 1
            interrupts.deliver_fault(self, fault)
            return
        self.system_flags &= ~fl.RF
        if self.system_flags & fl.TF:
            self.debug.pending |= SINGLE_STEP
        self.run_blocks(began + 1)
        if self.retired == began:  # another thread wants attention, and nothing has been done yet
            self.debug.pending = pending
            self.system_flags |= resumes

    def undo_until_fault(self) -> None:
        """The running instruction did not happen: the processor stands where it begins. It counts all the same."""
        block, self.running = self.running, None
        if block is not None:
            index = block.next_ips.index(self.next_ip)
            self.retired += index
            self.ip = block.ips[index]
            self.code_cache.put_back(block)
        self.retired += 1
