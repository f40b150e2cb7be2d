"""A kernel's view of the processor: guests that state what the manual promises, on QEMU and on mini-bhyve.

Each topic is a commented source in `kernel_view/`, a list of experiments that begin with a sentence (`base.inc` says
how they work). It is assembled here, and one and the same binary runs on QEMU, an x86 that we did not write, and on
ours. It compares what it sees with what it expects, and prints a line an experiment.

What a topic expects is what the manual says, not what either machine does. Where QEMU is known to differ, `ON_QEMU`
says how; mini-bhyve has no such table.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import socket
import subprocess
import time
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from guest_tools import REPOSITORY, make_rom
from vm_tools import PATIENCE, configured

from mini_bhyve import loader
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.machine import ExitCode, Machine

SOURCES = Path(__file__).resolve().parent / "kernel_view"
TOPICS = sorted(path.stem for path in SOURCES.glob("*.s"))
LONG_MODE = {topic for topic in TOPICS if '.include "base64.inc"' in (SOURCES / f"{topic}.s").read_text()}

# A guest that cannot do something by itself asks for it with a line: an NMI, perhaps with a key once it has been sent.
PLEASE_NMI, PLEASE_NMI_AND_KEY = b"please: nmi\n", b"please: nmi and key\n"

NO_LIMITS = "QEMU's translated code does not look at segment limits, nor whether a segment is null"
NO_EXT = "QEMU leaves EXT out when delivering an exception fails (SDM vol. 3A, 6.13)"
NO_AC = "QEMU's translated code does not check alignment"
RESERVED_ALONE = "QEMU's error code has RSVD without P (vol. 3A, 4.7)"
FOUND_LATE = "QEMU finds out when it fetches the first instruction there"
VECTOR_TIMES_16 = "QEMU's error code has the vector times 16, not 8 (6.13)"
NOT_SS = "QEMU does not raise #SS for a stack segment that is not present"

# Where QEMU does not do what the manual says, by title; a * stands for anything. (Seen with QEMU 7.2.)
ON_QEMU = {
    "gates": {
        "A handler's segment must reach to the handler": NO_LIMITS,
        "An exception that finds no gate says EXT: the program did not ask for it": NO_EXT,
        "An exception that finds no segment says EXT": NO_EXT,
        "EXT stands alone when the selector is null": NO_EXT,
        "EXT stands alone when the handler lies beyond its segment": NO_LIMITS,
        "A stack segment in the TSS must be present: #SS with the selector": NOT_SS + " but #TS (6.15, interrupt 12)",
        "A stack segment in the TSS must have room: #SS with it": NO_LIMITS,
        "An exception that finds no stack says EXT": NO_EXT,
        "A call gate to conforming code changes neither level nor stack": "QEMU puts DPL for CPL into CS (5.8.5)",
        "The code behind a gate must be present: #NP with the code": "QEMU raises #GP for a JMP (vol. 2A, JMP)",
        "The code behind a gate must reach to the gate's offset": NO_LIMITS,
        "An offset beyond the segment is #GP(0), before anything has been pushed": "QEMU gives the selector (vol. 2A)",
        "So is a near one, at the jump, call or return": NO_LIMITS,
        "A segment taken away is null: its use is #GP(0)": NO_LIMITS,
        "A return does not go beyond the end of its segment": NO_LIMITS,
        "A stack segment returned to must be present: #SS with it": NOT_SS + " but #NP (vol. 2B, RET)",
    },
    "debug": {
        "A fault's frame has RF set, for the instruction will be tried again": "QEMU never sets RF (17.3.1.1)",
        "Each turn of a REP is a step; RF is set until the last": "QEMU never sets RF (17.3.1.1)",
        "Within a REP the trap comes behind the turn that did it, with RF set": "QEMU never sets RF (17.3.1.1)",
        "IRET loads RF, and the next instruction clears it": "QEMU clears RF later, at the end of a block (17.3.1.1)",
        "RF stays while a REP goes on": "QEMU meets the breakpoint again each turn (17.3.1.1)",
        "But behind LSS, and behind STI": "QEMU holds the trap back behind all of them (17.3.1.4, vol. 3A, 6.8.3)",
        "INT1 *": "QEMU sees a single step in it, and stops with an exception later (vol. 2A, INT1)",
        "Any byte in common will do": "QEMU knows no length but that of the access (17.2.5)",
        "The low bits of the address do not count": "QEMU does not align breakpoints (17.2.5)",
        "All breakpoints that were hit are told together": "QEMU tells of the first (17.3)",
        "A step and a breakpoint are told together": "QEMU makes two exceptions of them (17.3)",
        "The trap of MOV SS waits for the next instruction": "QEMU does not let it wait (vol. 3A, 6.8.3)",
        "With DR7.GD set touching one is #DB, a fault, and DR6 says BD": "QEMU ignores GD (17.2.4)",
    },
    "debug_ports": {
        "INS and OUTS are watched turn by turn": "QEMU stops at the end of the REP (17.3.1.2)",
    },
    "protection": {
        "With CR0.AM and EFLAGS.AC what is not aligned is #AC(0) at level 3": NO_AC,
        "The stack counts as well": NO_AC,
        "It is the linear address that counts": NO_AC,
        "FXRSTOR refuses reserved bits of MXCSR: #GP(0)": "QEMU takes them (vol. 2A, FXRSTOR)",
    },
    "page_rights": {
        "A reserved bit in it is told of": RESERVED_ALONE,
        "STAC does not help the processor's own accesses": "QEMU lets it help them (4.6.1)",
    },
    "page_rights64": {
        "Without EFER.NXE the bit is reserved, and an error code does not tell fetches": RESERVED_ALONE,
        "A bit above the physical address is reserved": RESERVED_ALONE,
        "The size bit is, in the topmost table": RESERVED_ALONE,
        "Its low address bits are reserved": RESERVED_ALONE,
        "A page of 2 MB, and its low address bits": RESERVED_ALONE,
    },
    "double_faults": {
        "Benign, then contributory: the second is delivered": NO_EXT,
    },
    "interrupts": {
        "An interrupt that finds no gate is an exception with EXT": NO_EXT,
        "RF is set in its frame then": "QEMU never sets RF (17.3.1.1)",
        "INT n goes before: it is part of an instruction": "QEMU keeps the shadow of STI for the handler (6.8.3)",
    },
    "frames64": {
        "An error code makes it six": VECTOR_TIMES_16,
        "There are no 16-bit gates, and no tasks": VECTOR_TIMES_16,
        "A gate beyond the end of the IDT: 16 bytes each count": VECTOR_TIMES_16,
        "... and at level 0 as well": "QEMU makes SS null although the level stays (vol. 2A, INT)",
        "A handler's address must be canonical: #GP(0)": FOUND_LATE,
        "RIP must be canonical": FOUND_LATE,
        "RIP must be canonical at level 0 as well": FOUND_LATE,
        "CS must not be of both sizes": "QEMU does not look (vol. 2A, IRET)",
        "RSP that is not canonical is found out when it is used: #SS(0)": "QEMU raises #GP (6.15, interrupt 12)",
        "Data there are #GP(0), by way of RBP or RSP #SS(0)": "QEMU raises #GP (6.15, interrupt 12)",
        "A jump there is #GP(0), at the jump": FOUND_LATE,
        "So is one byte of many": "QEMU looks at each page by itself (vol. 1, 3.3.7.1)",
    },
    "calls64": {
        "SYSCALL goes *": "QEMU clears the arithmetic flags (vol. 2B, SYSCALL)",
        "SYSCALL is not for compatibility mode": "QEMU goes to CSTAR, as AMD's do (vol. 2B, SYSCALL)",
        "SYSRET to what is not canonical is #GP(0), still at level 0": FOUND_LATE,
        "SYSEXIT to what is not canonical is #GP(0), still at level 0": FOUND_LATE,
        "The bases of FS and GS must be canonical: #GP(0)": "QEMU takes anything (vol. 2B, WRMSR)",
        "At an address that is canonical: #GP(0)": FOUND_LATE,
    },
    "apic64": {
        "As long as it is not enabled, entries cannot be unmasked": "QEMU does not look (vol. 3A, 10.4.7.2)",
        "A register that is not there *": "QEMU's ESR keeps errors for good (10.5.3)",
    },
    "tasks": {
        "A task gate must not lead to the LDT": "QEMU raises #TS (SDM vol. 3A, table 7-1)",
        "A new task's *": "QEMU saves an EIP from the old task when the new one cannot begin (7.3)",
        "The T bit stops a task with #DB before its first instruction, and DR6 says BT": "QEMU ignores it (17.3.1.5)",
    },
    "v86": {
        "IRET does not go to an IP beyond FFFFh: #GP(0)": "QEMU drops the upper half of EIP (vol. 2A, IRET)",
        "A segment ends at FFFFh: #GP(0) for a word there": NO_LIMITS,
        "An address of 32 bits is beyond it, too": NO_LIMITS,
        "A stack ends there as well: #SS(0)": NO_LIMITS,
        "SS has the same limit for data: #SS(0)": NO_LIMITS,
        "A gate must lead to level 0: #GP with the code segment": "QEMU looks at the stack of level 1 first (vol. 2A)",
        "At level 3 IRET leaves VM alone": "QEMU enters virtual-8086 mode from level 3 (vol. 2A, IRET)",
    },
}


# --- Building ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The binary of a topic, assembled once. Skips the test where the tools for it are missing."""
    built: dict[str, bytes] = {}

    def binary(topic: str) -> bytes:
        for tool in ["as", "ld", "objcopy"]:
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
        if "i386" not in subprocess.run(["ld", "-V"], capture_output=True, text=True).stdout:
            pytest.skip("the linker of this machine does not link for the x86")
        if topic not in built:
            built[topic] = assemble(topic, tmp_path_factory.mktemp(topic))
        return built[topic]

    return binary


def assemble(topic: str, directory: Path) -> bytes:
    """A flat file that is loaded at 0x7C00, as the shipped guests are."""
    bits, emulation = ("64", "elf_x86_64") if topic in LONG_MODE else ("32", "elf_i386")
    options = ["-I", str(SOURCES), "-I", str(REPOSITORY / "guests"), "--defsym", "KERNEL_BASE=0"]
    object_file, linked, flat = (str(directory / f"{topic}{suffix}") for suffix in (".o", ".elf", ".bin"))
    script = ["-T", str(SOURCES / "guest.ld"), "--build-id=none", "-z", "noexecstack"]
    run("as", f"--{bits}", *options, "-o", object_file, str(SOURCES / f"{topic}.s"))
    run("ld", "-m", emulation, *script, "--no-warn-rwx-segments", "-o", linked, object_file)
    run("objcopy", "-O", "binary", linked, flat)
    return Path(flat).read_bytes()


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Running ----------------------------------------------------------------------------------------------------------


def on_mini_bhyve(binary: bytes) -> tuple[str, ExitCode]:
    """What the guest prints on our own machine, and how that ended."""
    console = Operator()
    machine = console.machine = Machine(configured(guest="counter"), console)
    machine.cpu.start(loader.load_flat(machine.memory, binary))
    ended = machine.run()
    assert ended in (ExitCode.REBOOT, ExitCode.TRIPLE_FAULT), machine.reason
    return console.output.decode("ascii"), ended


class Operator(ScriptedConsole):
    """A console at which somebody sits who does what the guest asks for."""

    machine: Machine

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.output.endswith((PLEASE_NMI, PLEASE_NMI_AND_KEY)):
            self.machine.cpu.nmi_pending = True
            self.machine.kick()
        if self.output.endswith(PLEASE_NMI_AND_KEY):
            self.input += b"\r"


def on_qemu(binary: bytes, directory: Path, apic: bool = False) -> str:
    """What the guest prints on QEMU, until it resets the machine. Skips the test where QEMU is not installed."""
    program = "qemu-system-x86_64"
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    rom, monitor = directory / "rom", None
    rom.write_bytes(make_rom(binary))
    # All that QEMU can do, as Intel does it; without a local APIC the 8259As are wired to the processor.
    cpu = f"max,vendor=GenuineIntel,{'+' if apic else '-'}apic"
    command = [program, "-cpu", cpu, "-accel", "tcg", "-m", "64", "-nodefaults"]
    command += ["-qmp", f"unix:{directory / 'qmp'},server=on,wait=off", "-serial", "stdio", "-display", "none"]
    command += ["-no-reboot", "-bios", str(rom)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    deadline, output = time.monotonic() + PATIENCE, b""
    try:
        while True:
            ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
            data = os.read(process.stdout.fileno(), 4096) if ready else b""
            if not data:
                assert ready, f"the guest does not end: {output!r}"
                return output.decode("ascii")
            output += data
            if output.endswith((PLEASE_NMI, PLEASE_NMI_AND_KEY)):
                monitor = monitor or Monitor(directory / "qmp")
                monitor.execute("inject-nmi")
            if output.endswith(PLEASE_NMI_AND_KEY):
                process.stdin.write(b"\r")
                process.stdin.flush()
    finally:
        if monitor:
            monitor.close()
        process.kill()
        process.communicate()


class Monitor:
    """A connection to QEMU's monitor, which speaks QMP: a line of JSON each way."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.answers = self.socket.makefile("r", encoding="utf-8")
        assert "QMP" in json.loads(self.answers.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str) -> None:
        """Give a command, and wait until QEMU says that it has been carried out."""
        self.socket.sendall(json.dumps({"execute": command}).encode("utf-8"))
        while "return" not in (answer := json.loads(self.answers.readline())):
            assert "event" in answer, answer

    def close(self) -> None:
        self.answers.close()
        self.socket.close()


# --- The account a guest gives of itself ------------------------------------------------------------------------------


def experiments(output: str) -> dict[str, list[str]]:
    """The experiments by title, each with what it found other than it expected; and all of them must be there."""
    found: dict[str, list[str]] = {}
    *lines, last = [line for line in output.splitlines() if not line.startswith("please: ")]
    for line in lines:
        match = re.fullmatch(r"ok (?P<ok>.*)|FAIL (?P<failed>.*): (?P<what>.* is [0-9a-f]+, not [0-9a-f]+)", line)
        assert match, f"the guest broke off: {line!r} after {list(found)[-1:]}"
        if match["ok"]:
            assert match["ok"] not in found, "two experiments of one title"
            found[match["ok"]] = []
        else:
            found.setdefault(match["failed"], []).append(match["what"])
    assert last == f"experiments: {len(found):08x}", last
    return found


@pytest.mark.parametrize("topic", TOPICS)
def test_mini_bhyve_does_what_the_manual_says_of(topic, build):
    output, ended = on_mini_bhyve(build(topic))
    found = experiments(output)
    assert {title: differences for title, differences in found.items() if differences} == {}
    assert ended == (ExitCode.TRIPLE_FAULT if topic == "double_faults" else ExitCode.REBOOT)


@pytest.mark.parametrize("topic", TOPICS)
def test_qemu_does_what_the_manual_says_but_for_what_is_known_of(topic, build, tmp_path):
    binary = build(topic)
    found = experiments(on_qemu(binary, tmp_path, apic=topic == "apic64"))
    different = {title: differences for title, differences in found.items() if differences}
    known = {name: {title for title in found if fnmatchcase(title, name)} for name in ON_QEMU.get(topic, {})}
    for titles in known.values():
        different = {title: differences for title, differences in different.items() if title not in titles}
    assert different == {}
    assert [name for name, titles in known.items() if not titles] == []  # excuses for what is no longer there
