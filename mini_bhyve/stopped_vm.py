"""A VM that does not run, looked at in its snapshot: registers, devices, memory, what its guest printed last.

FreeBSD has nothing like it: there, a VM has to run to be asked anything. Here a processor is made that never executes
an instruction, and asked like that of a running VM; of a device, the fields in the snapshot say enough.

The files are read and never written. (But a checkpoint that was interrupted after its commit is finished first, as
whenever a snapshot is read: until then its files do not have their names.)
"""

from __future__ import annotations

from typing import Any

from mini_bhyve.cpu import Cpu
from mini_bhyve.inout import IoPorts
from mini_bhyve.ioapic import IOAPIC_ADDRESS, IoApic
from mini_bhyve.lapic import LAPIC_ADDRESS, LocalApic
from mini_bhyve.memory import FOUR_GIB, MAX_SIZE, ONE_MIB, PAGE_SIZE, GuestMemory, GuestMemoryError
from mini_bhyve.ram_pages import count, used_pages
from mini_bhyve.snapshot import load_snapshot
from mini_bhyve.snapshot_files import KERN, explained
from mini_bhyve.snapshot_state import SnapshotError, restore_state


class StoppedVm:
    """The VM of the snapshot `path`. SnapshotError if there is none, or it is damaged."""

    def __init__(self, path: str):
        self.snapshot = load_snapshot(path)
        self.snapshot.verify_ram()
        try:
            self.memory = GuestMemory(self.snapshot.memsize, self.snapshot.ram)
        except GuestMemoryError as error:
            raise SnapshotError(f"{path}: {error}") from error
        self.cpu = Cpu(self.memory, IoPorts(strict=False))
        for part in (self.memory, self.cpu.clock, self.cpu):
            if part.name not in self.snapshot.kern_structs:
                raise SnapshotError(f"{path} has no {part.name}")
            try:
                restore_state(part, self.snapshot.kern_structs[part.name])
            except SnapshotError as error:
                raise SnapshotError(f"{path}{KERN}: {error}") from error

    def what(self) -> dict[str, Any]:
        """What kind of VM it is, and how far its guest has come: much as STATUS has it of one that runs."""
        return {
            "name": self.snapshot.vmname,
            "ncpus": self.snapshot.ncpus,
            "memory": self.snapshot.memsize,
            "memflags": self.snapshot.memflags,
            "state": "halted" if self.cpu.halted else "running",
            "mode": self.cpu.describe_mode(),
            "instructions": self.cpu.retired,
            "time_ns": self.cpu.clock.now,
        }

    def registers(self) -> dict[str, int]:
        """As REGS has them of a running VM."""
        return self.cpu.register_values()

    def parts(self) -> dict[str, dict[str, Any]]:
        """The fields of each device, by name; and those of the processor that are not among the registers."""
        parts = {**self.snapshot.kern_structs, **self.snapshot.devices}
        shown = {"instructions", *self.registers(), *(f"{name}_selector" for name in self.registers())}
        parts[Cpu.name] = {name: value for name, value in parts[Cpu.name].items() if name not in shown}
        return parts

    def memory_map(self) -> list[dict[str, Any]]:
        """What answers at which addresses, from the lowest to the highest (memory.py draws it)."""
        size, rom_size = self.memory.size, self.memory.rom_size
        areas = [(0, ONE_MIB - rom_size, "RAM"), (ONE_MIB - rom_size, ONE_MIB, "boot ROM"), (ONE_MIB, size, "RAM")]
        if not rom_size:
            areas = [(0, size, "RAM")]
        bases = {name: fields.get("base") for name, fields in self.snapshot.devices.items()}
        for name, base in {IoApic.name: IOAPIC_ADDRESS, LocalApic.name: LAPIC_ADDRESS, **bases}.items():
            if isinstance(base, int) and base >= MAX_SIZE:  # else it is where its ports begin
                areas.append((base, base + PAGE_SIZE, name))
        if rom_size:
            areas.append((FOUR_GIB - rom_size, FOUR_GIB, "boot ROM again"))
        return [{"first": start, "last": end - 1, "what": what} for start, end, what in sorted(areas) if start < end]

    def used(self) -> list[range]:
        """The pages of RAM that are not all zeros."""
        with explained("read", self.snapshot.path):
            return used_pages(self.snapshot.ram_file.fileno(), self.memory.size)

    def printed(self) -> str | None:
        """The end of what the guest has sent to the serial port; None if the snapshot is older than that is kept."""
        printed = self.snapshot.devices.get("uart-com1", {}).get("printed")
        return printed.decode("utf-8", "backslashreplace") if isinstance(printed, bytes) else None

    def report(self) -> dict[str, Any]:
        """All of this, as numbers, text, bytes, lists and dictionaries."""
        used = self.used()
        return {
            "file": self.snapshot.path,
            **self.what(),
            "disks": self.snapshot.disks,
            "registers": self.registers(),
            "memory_map": self.memory_map(),
            "pages": self.memory.size // PAGE_SIZE,
            "used_pages": count(used),
            "used": page_numbers(used),
            "devices": self.parts(),
            "printed": self.printed(),
        }


def page_numbers(pages: list[range]) -> list[list[int]]:
    """Ranges of pages as pairs: the number of the first page, and of the last."""
    return [[span.start, span.stop - 1] for span in pages]
