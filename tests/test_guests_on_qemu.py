"""The shipped guests do on QEMU what they say they do: before our own CPU runs them, somebody else's has."""

from __future__ import annotations

import re
import runpy
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from guest_tools import GUESTS, REPOSITORY, Qemu, make_rom

NAMES = ["counter", "shell", "long64", "compute", "calls"]
HEX = "[0-9a-f]{8}"


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_is_a_boot_sector_that_may_be_longer(name):
    guest = (GUESTS / f"{name}.bin").read_bytes()
    assert guest[510:512] == b"\x55\xaa"
    assert len(make_rom(guest)) == 0x10000  # make_rom refuses what does not fit


# ---- counter ----


def test_counter_counts_from_one_and_leaves_no_number_out(tmp_path):
    with Qemu("counter", tmp_path) as guest:
        numbers = "".join(f"{number}\r\n" for number in range(1, 11))
        assert guest.read_until("\n10\r\n") == "counter: paging is on, counting\r\n" + numbers


def test_counter_ticks_about_twenty_times_a_second(tmp_path):
    with Qemu("counter", tmp_path) as guest:
        guest.read_until("\n1\r\n")
        start = time.monotonic()
        guest.read_until("\n21\r\n")
        assert 0.5 < time.monotonic() - start < 5  # 1 s, on a machine that may have other things to do


# ---- shell ----


@pytest.fixture
def shell(tmp_path):
    with Qemu("shell", tmp_path) as guest:
        assert guest.read_until("$ ") == "shell: type help for a list of commands\r\n$ "
        yield guest


def ask(shell: Qemu, command: str) -> str:
    """What the shell answers to a command, without its echo and the next prompt."""
    shell.send(command + "\r")
    answer = shell.read_until("\n$ ")
    assert answer.startswith(command + "\r\n")
    return answer[len(command) + 2 : -2]


def shell_bytes() -> bytes:
    return (GUESTS / "shell.bin").read_bytes()


def test_shell_help_names_every_command(shell):
    names = [line.split()[0] for line in ask(shell, "help").splitlines()]
    assert names == ["help", "uptime", "peek", "fault", "user", "halt", "reboot"]


def test_shell_says_so_when_it_does_not_know_a_command(shell):
    assert ask(shell, "format c:") == "there is no command format: type help for a list\r\n"


def test_shell_uptime_counts_a_hundred_ticks_a_second(shell):
    time.sleep(1.2)
    match = re.fullmatch(r"(\d+) seconds, (\d+) ticks\r\n", ask(shell, "uptime"))
    assert match
    seconds, ticks = int(match[1]), int(match[2])
    assert seconds == ticks // 100
    assert 60 < ticks < 600


@pytest.mark.parametrize("spelling", ["c0007c00", "C0007C00", "0xc0007c00"])
def test_shell_peek_shows_memory(shell, spelling):
    first = int.from_bytes(shell_bytes()[:4], "little")
    assert ask(shell, f"peek {spelling}") == f"c0007c00: {first:08x}\r\n"


@pytest.mark.parametrize("arguments", ["", " ", " kernel", " c0007c00g", " 1c0007c00", " @", " :", " /"])
def test_shell_peek_asks_for_an_address_when_it_gets_none(shell, arguments):
    answer = ask(shell, "peek" + arguments)
    assert answer == "peek: give an address of up to eight hexadecimal digits, as in: peek c0007c00\r\n"


def test_shell_peek_survives_an_address_that_is_not_mapped(shell):
    # 00007c00 was mapped while paging was being turned on, and must not be any more.
    for address in ["00000000", "00007c00", "bfffffff", "c0400000", "deadbeef"]:
        answer = ask(shell, f"peek {address}")
        report = rf"peek: page fault at {address}, error code 00000000 \(not present, read, ring 0\), EIP {HEX}\r\n"
        assert re.fullmatch(report, answer)


def test_shell_fault_reports_address_error_code_and_instruction(shell):
    match = re.fullmatch(
        rf"fault: page fault at dead0000, error code 00000002 \(not present, write, ring 0\), EIP ({HEX})\r\n"
        r"fault: the kernel goes on\r\n",
        ask(shell, "fault"),
    )
    assert match
    instruction = shell_bytes()[int(match[1], 16) - 0xC0007C00 :]
    assert instruction.startswith(bytes.fromhex("c705 0000adde 01000000"))  # mov dword ptr [0xDEAD0000], 1


def test_shell_user_runs_a_task_in_ring_3_and_catches_the_bad_ones(shell):
    for _ in range(2):  # the second time shows that a killed task left nothing behind
        match = re.fullmatch(
            r"task 1 writes, and exits with the ring it ran in:\r\n"
            r"  hello from ring 3\r\n"
            r"  exit, status 00000003\r\n"
            r"task 2 asks the kernel to write out kernel memory:\r\n"
            r"  exit, status ffffffff\r\n"
            r"task 3 turns interrupts off:\r\n"
            rf"  killed: general protection fault, error code 00000000, EIP ({HEX})\r\n"
            r"task 4 reads kernel memory:\r\n"
            r"  killed: page fault at c0007c00, error code 00000005 \(protection, read, ring 3\), "
            rf"EIP ({HEX})\r\n",
            ask(shell, "user"),
        )
        assert match
        user_page = shell_bytes()[shell_bytes().index(b"  hello from ring 3") :]  # where its first bytes are
        assert user_page[int(match[1], 16) - 0x400000 :].startswith(b"\xfa")  # cli
        assert user_page[int(match[2], 16) - 0x400000 :].startswith(b"\xa1\x00\x7c\x00\xc0")  # mov eax, [C0007C00h]


@pytest.mark.parametrize("erase", ["\b", "\x7f"])
def test_shell_backspace_takes_a_character_back(shell, erase):
    shell.send(f"{erase}hex{erase}lk{erase}p\n")
    assert shell.read_until("\r\n") == "hex\b \blk\b \bp\r\n"
    assert "shows this" in shell.read_until("\n$ ")


def test_shell_ignores_what_does_not_fit_on_a_line(shell):
    shell.send("x" * 100 + "\n")
    assert shell.read_until("\r\n") == "x" * 79 + "\r\n"
    assert shell.read_until("$ ") == f"there is no command {'x' * 79}: type help for a list\r\n$ "


def test_shell_an_empty_line_only_brings_the_next_prompt(shell):
    shell.send("\n\r")
    assert shell.read_until("\r\n$ \r\n$ ") == "\r\n$ \r\n$ "


def test_shell_loses_no_key_when_they_come_faster_than_it_works(shell):
    shell.send("help\n" * 400 + "fault\n")  # eight times what its buffer holds
    assert shell.read_until("the kernel goes on\r\n").count("help       shows this") == 400


def test_shell_halt_stops_the_cpu(shell):
    shell.send("halt\n")
    assert shell.read_until("halted\r\n") == "halt\r\nhalted\r\n"
    shell.send("help\n")
    ready, _, _ = select.select([shell.process.stdout], [], [], 0.3)
    assert not ready


def test_shell_reboot_resets_the_machine(shell):
    shell.send("reboot\n")
    assert shell.read_until("rebooting\r\n") == "reboot\r\nrebooting\r\n"
    assert shell.wait() == 0


# ---- long64 ----


def test_long64_reaches_long_mode_with_four_level_paging(tmp_path):
    with Qemu("long64", tmp_path, "qemu-system-x86_64") as guest:
        lines = guest.read_until("halted\r\n").splitlines()
    assert re.fullmatch(
        r"long64: long mode, four-level paging, 64-bit code at ffffffff8000[0-9a-f]{4}",
        lines[0],
    )
    assert lines[1] == "long64: CS.L = 1, EFER.LMA = 1"
    a, b = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    assert lines[2] == f"long64: {a:016x} * {b:016x} = {a * b:032x}"
    frames = re.findall(r"long64: 4 KB frame ([0-9a-f]{16}) holds ([0-9a-f]{16})\n", "\n".join(lines[3:8]))
    first = int(frames[0][0], 16)
    assert first % 4096 == 0
    assert [int(frame, 16) for frame, _ in frames] == [first + 4096 * i for i in range(4)]
    assert [int(content, 16) for _, content in frames] == [0xFFFF800000000000 + 4096 * (3 - i) for i in range(4)]
    assert lines[7:] == ["long64: halted"]


def test_long64_says_so_on_a_cpu_without_long_mode(tmp_path):
    with Qemu("long64", tmp_path, "qemu-system-i386") as guest:
        assert guest.read_until("\r\n") == "long64: this CPU has no long mode\r\n"


# ---- compute and calls ----


@pytest.mark.parametrize("name", ["compute", "calls"])
def test_the_guest_finds_the_number_that_the_same_work_in_python_finds(name, tmp_path):
    by_hand = runpy.run_path(str(REPOSITORY / "bench" / "by_hand.py"))
    expected = by_hand[name](by_hand["ROUNDS"][name])
    with Qemu(name, tmp_path) as guest:
        assert guest.read_until("\r\n") == f"{name}: {expected:08x}\r\n"


# ---- building them ----


def build_guests(directory: Path) -> dict[str, bytes]:
    """The guests built from source by the tools of this machine; skips the test where there are none."""
    for tool in ["make", "as", "ld", "gcc", "objcopy"]:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    if "i386" not in subprocess.run(["ld", "-V"], capture_output=True, text=True).stdout:
        pytest.skip("the linker of this machine does not link for the x86")
    subprocess.run(
        ["make", "-s", "-C", str(REPOSITORY / "guests"), f"OUT={directory}", f"BUILD={directory / 'build'}"],
        check=True,
    )
    return {name: (directory / f"{name}.bin").read_bytes() for name in NAMES}


def test_building_twice_gives_the_same_bytes(tmp_path):
    assert build_guests(tmp_path / "once") == build_guests(tmp_path / "elsewhere")


def test_the_shipped_guests_are_what_the_sources_build(tmp_path):
    built = build_guests(tmp_path)
    gcc = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    if gcc != "12.2.0":  # only these two hold compiled code
        del built["compute"], built["calls"]
    for name, content in built.items():
        assert content == (GUESTS / f"{name}.bin").read_bytes(), name
