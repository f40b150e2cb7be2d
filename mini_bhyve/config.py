"""The configuration of a virtual machine: named variables, each with a value that is text.

Mirrors FreeBSD's usr.sbin/bhyve/config.c and the manual page bhyve_config(5). Every option of the command line only
sets variables; the machine is then built from the variables alone. So `-m 32` and `-o memory.size=32` are the same
request, and a file of `name=value` lines (option `-k`) can stand for a whole command line:

    # a small machine with one disk
    name=xv6
    memory.size=32M
    pci.0.1.0.device=ide
    pci.0.1.0.path=xv6.img

The last value given to a variable wins. Dots in a name are a path through a tree: `pci.0.1.0.path` is the image of the
device on PCI bus 0, slot 1, function 0.

bhyve accepts any variable whatever. Here an unknown name or a value of the wrong kind is refused at once, since a
typing mistake that passes in silence costs a student an afternoon.
"""

from __future__ import annotations

import difflib
import re
from typing import Callable, NamedTuple, Union, overload

MAX_LINE = 65536  # characters: more than that in a line is no configuration
MAX_SHOWN = 60  # characters of what is no assignment: somebody may have named a file of another kind


class ConfigError(Exception):
    """A variable or an option is wrong; the message is one sentence for the user."""


# What kinds of value there are. Each function turns the text into the value, or raises ValueError with the words that
# complete the sentence "VARIABLE must be ...".

Value = Union[str, bool, int]


def text(value: str) -> str:
    return value


def boolean(value: str) -> bool:
    """config.c takes these eight words, in either case."""
    if value.lower() in ("true", "on", "yes", "1"):
        return True
    if value.lower() in ("false", "off", "no", "0"):
        return False
    raise ValueError("true or false")


def number(value: str) -> int:
    """Decimal, or hexadecimal after 0x."""
    if not re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]+", value):
        raise ValueError("a number")
    return int(value, 16) if value[:2] in ("0x", "0X") else int(value)


def one_cpu(value: str) -> int:
    if number(value) != 1:
        raise ValueError("1, since only one vCPU is supported")
    return 1


UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
PAGE = 4096
MAX_MEMORY = 3 << 30  # bhyve's lowmem limit: above it lies the room for devices


def size(value: str) -> int:
    """A size of memory in bytes: a bare number counts megabytes, as for bhyve's `-m`."""
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)", value.upper())
    if not match:
        raise ValueError("a number of megabytes, or a number followed by K, M or G")
    count, unit = match.groups()
    octets = int(count) * UNITS[unit or "M"]
    if not UNITS["M"] <= octets <= MAX_MEMORY or octets % PAGE:
        raise ValueError("from 1M to 3G, in whole pages of 4K")
    return octets


def one_of(*words: str) -> Callable[[str], str]:
    def choice(value: str) -> str:
        if value not in words:
            raise ValueError(", ".join(words[:-1]) + " or " + words[-1])
        return value

    return choice


class Variable(NamedTuple):
    parse: Callable[[str], Value]
    default: str | None
    meaning: str


VARIABLES = {
    "name": Variable(text, "vm", "the VM's name, and that of its socket"),
    "cpus": Variable(one_cpu, "1", "number of virtual CPUs; only 1"),
    "memory.size": Variable(size, "64M", "size of guest memory; a bare number is megabytes"),
    "bootrom": Variable(text, None, "a ROM image, started at the reset vector"),
    "kernel": Variable(text, None, "a kernel to load: Linux, ELF, Multiboot, or a boot image"),
    "initrd": Variable(text, None, "what Linux gets as its initial RAM disk, a Multiboot kernel as a module"),
    "append": Variable(text, "", "the kernel's command line"),
    "guest": Variable(text, "counter", "the embedded guest: what runs where there is neither kernel, ROM nor disk"),
    "lpc.com1.path": Variable(text, "stdio", "where the first serial line ends: stdio, a file, or a unix socket"),
    "rundir": Variable(text, None, "directory of the socket that ctl.py talks to"),
    "snapshot": Variable(boolean, "true", "whether checkpoint and suspend are served"),
    "clock": Variable(
        one_of("auto", "virtual", "wall"),
        "auto",
        "what a halted guest waits for: its next event at once (virtual), or as long as it takes (wall); "
        "auto is wall on a terminal or with x86.vmexit_on_hlt",
    ),
    "translate": Variable(boolean, "true", "whether what the guest does often is translated into Python functions"),
    "translate.dump": Variable(text, None, "directory for what is translated, guest and Python code side by side"),
    "restore.changed_disks": Variable(
        boolean, "false", "whether to go on from a snapshot though a disk has other contents than it had then"
    ),
    "config.dump": Variable(boolean, "false", "print all variables and exit"),
    "x86.strictio": Variable(boolean, "false", "whether access to a port that no device claims ends the VM"),
    "x86.vmexit_on_hlt": Variable(boolean, "false", "whether a halted vCPU gives up the host's CPU"),
}

# One PCI slot. Only bus 0 and function 0 exist here.
SLOT_VARIABLES = {
    "device": Variable(one_of("ide", "virtio-blk", "hostbridge", "lpc"), None, "what is in the slot"),
    "path": Variable(text, None, "the disk's image"),
    "ro": Variable(boolean, "false", "whether the disk is read-only"),
}
SLOT_NAME = re.compile(r"pci\.0\.([12]?[0-9]|3[01])\.0\.(device|path|ro)")

# Variables of bhyve that this machine has no use for. They are accepted, so that a bhyve configuration can be tried.
WITHOUT_MEANING = {
    name: Variable(text, None, "accepted for bhyve's sake, without effect")
    for name in (
        "acpi_tables", "acpi_tables_in_memory", "cores", "destroy_on_poweroff", "keyboard.layout",
        "memory.guest_in_core", "memory.wired", "rtc.use_localtime", "sockets", "threads", "uuid", "virtio_msix",
        "x86.mptable", "x86.strictmsr", "x86.verbosemsr", "x86.vmexit_on_pause", "x86.x2apic",
    )
}  # fmt: skip


# What a disk may be behind, and how many there can be of each kind: master and slave on the one IDE channel, and as
# many virtio disks as a PC has interrupt lines to spare.
DISK_DEVICES = {"ide": 2, "virtio-blk": 4}


class Disk(NamedTuple):
    slot: int
    path: str
    read_only: bool
    device: str = "ide"


def variable_named(name: str) -> Variable:
    """Raises ConfigError for a name that is not known, and proposes the closest one that is."""
    slot = SLOT_NAME.fullmatch(name)
    if slot:
        return SLOT_VARIABLES[slot.group(2)]
    known = {**VARIABLES, **WITHOUT_MEANING}
    if name in known:
        return known[name]
    if name.startswith("pci."):
        raise ConfigError(f"unknown variable {name}: PCI devices are pci.0.SLOT.0.device, .path and .ro, SLOT 0 to 31")
    closest = difflib.get_close_matches(name, list(known), n=1)
    raise ConfigError(f"unknown variable {name}" + (f", did you mean {closest[0]}?" if closest else ""))


class Config:
    """The variables that were set; all others have their defaults.

    Every method that takes a name raises ConfigError if there is no such variable.
    """

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, name: str, value: str) -> None:
        """Give a variable a value. Raises ConfigError if the value is not of the variable's kind."""
        variable = variable_named(name)
        if "\n" in value or "\0" in value:
            raise ConfigError(f"{name} must be one line of text")
        try:
            variable.parse(value)
        except ValueError as error:
            raise ConfigError(f"{name} must be {error}, not {value!r}") from None
        self._values[name] = value

    def assign(self, assignment: str) -> None:
        """`name=value`, as an option `-o` or a line of a file has it."""
        name, equals, value = assignment.partition("=")
        if not equals:
            shown = assignment if len(assignment) <= MAX_SHOWN else assignment[:MAX_SHOWN] + "..."
            raise ConfigError(f"{shown!r} is not of the form variable=value")
        self.set(name.strip(), value.strip())

    def load_file(self, path: str) -> None:
        """Read assignments, one a line; blank lines and those that begin with `#` are skipped.

        Raises OSError if the file cannot be read, ConfigError with file name and line number if a line is wrong.
        """
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            for line_number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                if len(line) > MAX_LINE:
                    raise ConfigError(f"{path}, line {line_number}: longer than {MAX_LINE} characters")
                if not line.strip() or line.lstrip().startswith("#"):
                    continue
                try:
                    self.assign(line)
                except ConfigError as error:
                    raise ConfigError(f"{path}, line {line_number}: {error}") from None

    def __contains__(self, name: str) -> bool:
        """Whether the variable was set (and does not merely have its default)."""
        return name in self._values

    @overload
    def get(self, name: str) -> str | None: ...

    @overload
    def get(self, name: str, default: str) -> str: ...

    def get(self, name: str, default: str | None = None) -> str | None:
        """The text of a variable: as set, else `default`, else the variable's own default, which may be None."""
        own_default = variable_named(name).default
        return self._values.get(name, own_default if default is None else default)

    def require(self, name: str) -> str:
        """The text of a variable. Raises ConfigError if it was not set and has no default."""
        value = self.get(name)
        if value is None:
            raise ConfigError(f"{name} is not set")
        return value

    def get_bool(self, name: str) -> bool:
        return boolean(self.require(name))

    def get_number(self, name: str) -> int:
        """A number; a size is in bytes."""
        return int(variable_named(name).parse(self.require(name)))

    def disks(self) -> list[Disk]:
        """The disks by rising slot number. Raises ConfigError if a slot is half described, or there are too many."""
        slots = sorted({int(name.split(".")[2]) for name in self._values if SLOT_NAME.fullmatch(name)})
        disks = []
        for slot in slots:
            prefix = f"pci.0.{slot}.0"
            device, path = self.get(f"{prefix}.device"), self.get(f"{prefix}.path")
            if device is None:
                raise ConfigError(f"{prefix}.device is not set: what is in slot {slot}?")
            if device in DISK_DEVICES:
                if not path:
                    raise ConfigError(f"{prefix}.path is not set: the disk in slot {slot} needs an image")
                disks.append(Disk(slot, path, self.get_bool(f"{prefix}.ro"), device))
        for kind, limit in DISK_DEVICES.items():
            taken = [str(disk.slot) for disk in disks if disk.device == kind]
            if len(taken) > limit:
                raise ConfigError(f"there can be at most {limit} {kind} disks, but slots {', '.join(taken)} have one")
        return disks

    def dump(self) -> str:
        """All variables with their values, defaults included, as lines that `load_file` takes."""
        values = {name: variable.default for name, variable in VARIABLES.items() if variable.default is not None}
        values.update(self._values)
        del values["config.dump"]
        return "".join(f"{name}={values[name]}\n" for name in sorted(values))
