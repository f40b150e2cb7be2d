"""What can go wrong inside the guest: exceptions of the processor, and the ends a VM can come to.

Mirrors Intel SDM vol. 3A, chapter 6 (Interrupt and Exception Handling), table 6-1. A `GuestFault` is an event of the
guest's own world: the processor delivers it through the guest's IDT. A `VmExit` ends the run and is the host's
business.
"""

from __future__ import annotations

# Exception vectors, by the manual's mnemonics.
DE, DB, NMI, BP, OF, BR, UD, NM = range(8)
DF, _, TS, NP, SS, GP, PF = range(8, 15)
MF, AC, MC, XM = range(16, 20)

NAMES = {
    DE: "#DE divide error", DB: "#DB debug", NMI: "NMI", BP: "#BP breakpoint", OF: "#OF overflow",
    BR: "#BR bound range exceeded", UD: "#UD invalid opcode", NM: "#NM no math coprocessor", DF: "#DF double fault",
    TS: "#TS invalid TSS", NP: "#NP segment not present", SS: "#SS stack fault", GP: "#GP general protection",
    PF: "#PF page fault", MF: "#MF x87 error", AC: "#AC alignment check", MC: "#MC machine check",
    XM: "#XM SIMD floating point",
}  # fmt: skip


class GuestFault(Exception):
    """An exception of class fault: the instruction did not happen, and its own address is what the handler gets.

    `error_code` is None for vectors that push none. For a page fault, `address` is what CR2 will hold. `return_to` is
    where the handler returns to if that is not the instruction: a fault in the middle of a task switch belongs to the
    first instruction of the new task.
    """

    def __init__(self, vector: int, error_code: int | None = None, address: int | None = None):
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        self.address = address
        self.return_to: int | None = None

    def __str__(self) -> str:
        text = NAMES.get(self.vector, f"vector {self.vector}")
        if self.error_code is not None:
            text += f", error code {self.error_code:#x}"
        if self.address is not None:
            text += f", address {self.address:#x}"
        return text


def undefined_opcode() -> GuestFault:
    """#UD: the instruction does not exist, or not in this mode."""
    return GuestFault(UD)


def general_protection(error_code: int = 0) -> GuestFault:
    """#GP: `error_code` is 0 or the selector at fault, its low two bits clear."""
    return GuestFault(GP, error_code)


def in_stack_segment(fault: GuestFault) -> GuestFault:
    """What an access through SS raises where another one raises `fault`: #SS for #GP (SDM vol. 3A, 6.15, "#SS")."""
    return GuestFault(SS, fault.error_code) if fault.vector == GP else fault


class VmExit(Exception):
    """The run ends; the message is one sentence for the user."""


class TripleFault(VmExit):
    """The processor could not even report a double fault: it shuts down (SDM vol. 3A, 6.15, "Interrupt 8")."""


class Unsupported(VmExit):
    """The guest asked for something that this hypervisor does not do: where, which bytes, and what was asked for."""
