"""Debug exceptions: breakpoints in DR0 to DR3, and the single steps of EFLAGS.TF.

Mirrors Intel SDM vol. 3B, chapter 17 (17.2 Debug Registers, 17.3 Debug Exceptions).

    DR0-DR3   linear addresses
    DR6       what the last debug exception was for; the handler clears it
               15 14 13        3  2  1  0
              | BT BS BD  ... B3 B2 B1 B0 |     task switch, single step, DR accessed; breakpoint n
    DR7       what to watch for: two bits to switch breakpoint n on (local, global), and four to describe it
               31-30  29-28 ...  19-18  17-16     13          7  6  5  4  3  2  1  0
              | LEN3   R/W3 ...   LEN0   R/W0 ... GD  ...     G3 L3 G2 L2 G1 L1 G0 L0 |

A breakpoint on an instruction is a fault: it comes before the instruction, and EFLAGS.RF lets that one through
afterwards. All others are traps: they come after the instruction that did it. `pending` holds their bits of DR6 until
then. While anything is being watched the CPU runs one instruction at a time (`Cpu.run`), and pages with watched data
are kept out of the TLB, so all of this costs nothing when it is not in use.
"""

from __future__ import annotations

from typing import NamedTuple

from mini_bhyve.faults import DB, GuestFault, general_protection, undefined_opcode
from mini_bhyve.memory import PAGE_SIZE

# DR6
HITS, ACCESS_DETECTED, SINGLE_STEP, TASK_SWITCHED = 0xF, 1 << 13, 1 << 14, 1 << 15
DR6_FIXED = 0xFFFF0FF0  # these bits are always 1
DR6_WRITABLE = HITS | ACCESS_DETECTED | SINGLE_STEP | TASK_SWITCHED
# DR7
DR7_FIXED = 1 << 10
DR7_LOCAL = 0x155  # L0 to L3, and LE
DR7_GENERAL_DETECT = 1 << 13
DR7_WRITABLE = 0xFFFF23FF
# R/W: what a breakpoint is for. Kind 2 needs CR4.DE.
EXECUTE, STORE, PORT, LOAD_OR_STORE = range(4)
LENGTHS = (1, 2, 8, 4)  # bytes, by LEN


class Breakpoint(NamedTuple):
    """A breakpoint that is switched on: addresses (or ports) from `start` up to `end`, and what is watched there."""

    bit: int  # in DR6
    kind: int
    start: int
    end: int


class Debug:
    """The debug registers of one CPU. It tells the breakpoints apart; the CPU asks it where there is something to ask.

    `extensions` is CR4.DE: there are breakpoints on ports, and no DR4 and DR5. `watched_pages` are the linear page
    numbers that hold watched data.
    """

    __slots__ = ("breakpoints", "extensions", "pending", "registers", "watched_pages")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The state after power-on (SDM vol. 3A, table 9-1)."""
        self.registers = [0, 0, 0, 0, 0, 0, DR6_FIXED, DR7_FIXED]
        self.pending = 0  # bits of DR6 for which there will be a trap once the running instruction is done
        self.set_extensions(False)

    def set_extensions(self, extensions: bool) -> None:
        """CR4.DE has been written."""
        self.extensions = extensions
        self.update()

    def update(self) -> None:
        """Work out what DR7 asks for."""
        addresses, control = self.registers[:4], self.registers[7]
        self.breakpoints = []
        for number, address in enumerate(addresses):
            kind, length = control >> 16 + number * 4 & 3, LENGTHS[control >> 18 + number * 4 & 3]
            if control >> number * 2 & 3 and (self.extensions or kind != PORT):
                start = address & -length  # the low bits of the address do not count
                self.breakpoints.append(Breakpoint(1 << number, kind, start, start + length))
        on_data = [point for point in self.breakpoints if point.kind in (STORE, LOAD_OR_STORE)]
        self.watched_pages = {point.start // PAGE_SIZE for point in on_data}

    # --- MOV to and from DRn ----------------------------------------------------------------------------------------

    def read(self, number: int) -> int:
        """DRn. Raises #UD for 4 and 5 with CR4.DE (otherwise they are other names of 6 and 7), #DB with DR7.GD."""
        return self.registers[self.existing(number)]

    def write(self, number: int, value: int) -> None:
        """DRn := value. Raises as `read`, and #GP for bits 63-32 of DR6 and DR7."""
        number = self.existing(number)
        if number >= 6 and value >> 32:
            raise general_protection()
        if number == 6:
            value = value & DR6_WRITABLE | DR6_FIXED
        elif number == 7:
            value = value & DR7_WRITABLE | DR7_FIXED
        self.registers[number] = value
        self.update()

    def existing(self, number: int) -> int:
        """The register that goes by this number."""
        if number in (4, 5):
            if self.extensions:
                raise undefined_opcode()
            number += 2
        if self.registers[7] & DR7_GENERAL_DETECT:
            raise self.exception(ACCESS_DETECTED)
        return number

    def forget_local(self) -> None:
        """A task switch turns local breakpoints off (SDM vol. 3B, 17.2.4)."""
        self.registers[7] &= ~DR7_LOCAL
        self.update()

    # --- Is this the place? -----------------------------------------------------------------------------------------

    def exception(self, causes: int) -> GuestFault:
        """#DB, with its causes noted in DR6; bits other than those of the breakpoints stay there until cleared."""
        self.registers[6] = self.registers[6] & ~HITS | causes
        self.registers[7] &= ~DR7_GENERAL_DETECT  # so that the handler itself may use the registers
        return GuestFault(DB)

    def check_execution(self, address: int) -> None:
        """An instruction is about to begin at a linear address. Raises #DB if a breakpoint stands there."""
        hits = self.hits((EXECUTE,), address, 1)
        if hits:
            raise self.exception(hits)

    def note_access(self, address: int, size: int, storing: bool) -> None:
        """Data were read or written at a linear address."""
        self.pending |= self.hits((STORE, LOAD_OR_STORE) if storing else (LOAD_OR_STORE,), address, size)

    def note_port(self, port: int, size: int) -> None:
        """`size` ports from `port` on were used."""
        self.pending |= self.hits((PORT,), port, size)

    def hits(self, kinds: tuple[int, ...], start: int, size: int) -> int:
        """The bits in DR6 of the breakpoints of these kinds that `size` bytes from `start` on touch."""
        return sum(
            point.bit
            for point in self.breakpoints
            if point.kind in kinds and point.start < start + size and start < point.end
        )

    def snapshot(self, state) -> None:
        self.registers = state.numbers("debug_registers", self.registers)
        if len(self.registers) != 8:
            raise ValueError(f"there are 8 debug registers, not {len(self.registers)}")
        self.pending = state.u32("pending_debug_exceptions", self.pending)
        self.update()
