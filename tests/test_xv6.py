"""xv6, MIT's teaching system, unmodified: a kernel that was not written for this machine boots from one disk and keeps
its files on the other, and notices nothing of being suspended and restored.

Where it is looked for, and how it is built, says the sentence with which these tests are skipped.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tempfile
from pathlib import Path

import pytest
from os_tools import Guest, Run, address_of, assert_checkpoints_end_alike, run_undisturbed

from mini_bhyve.machine import ExitCode

XV6 = Path(os.environ.get("XV6_DIR") or Path.home() / ".cache" / "mini-bhyve" / "xv6")
IMAGES = ("xv6.img", "fs.img")
pytestmark = pytest.mark.skipif(
    not all((XV6 / name).exists() for name in IMAGES),
    reason=f"there is no xv6: put github.com/mit-pdos/xv6-public into {XV6} (XV6_DIR says where else) and say "
    "there make CC='gcc -Wno-error=array-bounds -Wno-error=infinite-recursion' xv6.img fs.img",
)

KERNEL_BASE = 0x80000000  # where the kernel sees physical memory
TICK_NS = 10_000_000  # its timer: 10 million cycles of a bus that has 1 GHz, on QEMU and here
SECTOR = 512


@functools.cache
def xv6() -> Guest:
    """xv6 with the memory that it takes for granted, 224 MB. Its kernel is on the first disk, behind the boot sector."""
    return Guest(
        prompt=b"$ ",
        ticks=address_of("ticks", io.BytesIO((XV6 / "xv6.img").read_bytes()[SECTOR:])) - KERNEL_BASE,
        variables=(("memory_size", "240M"),),
        disk_device="ide",
        disks=tuple((slot, XV6 / name) for slot, name in enumerate(IMAGES, start=1)),
    )


@functools.cache
def undisturbed(*commands: bytes) -> Run:
    with tempfile.TemporaryDirectory() as directory:
        run = run_undisturbed(xv6(), Path(directory), commands)
    assert run.end["exit"] == (ExitCode.POWEROFF, "the user has left")
    return run


def answers(run: Run) -> list[str]:
    """What xv6 answers to each command, after its echo."""
    texts = run.end["console"].split(xv6().prompt.decode())
    assert texts[0].endswith("init: starting sh\n") and texts[-1] == ""
    return [text.partition("\n")[2] for text in texts[1:-1]]


def test_xv6_keeps_a_file_and_the_time_and_notices_no_suspension_of_its_boot_or_writing_and_no_checkpoint(tmp_path):
    commands = [b"echo to be kept > f\n"]
    run = undisturbed(*commands)
    assert answers(run) == [""]
    booting, writing = run.busy_between(-1, 0), run.busy_between(0, 1)
    machine = xv6().boot(tmp_path, commands)
    machine = xv6().suspended_and_restored(machine, tmp_path, [booting[len(booting) // 2], booting[-1], writing[0]])
    machine = xv6().suspended_and_restored(machine, tmp_path, [writing[len(writing) // 2]])
    user = xv6().checkpoint(machine, tmp_path, tmp_path / "copy")
    assert b"to be kept" not in (tmp_path / "copy" / "fs.img").read_bytes()

    assert xv6().end(machine, tmp_path) == run.end
    assert b"to be kept\n" in (tmp_path / "fs.img").read_bytes()
    copy = xv6().restore(tmp_path / "copy" / "checkpoint", tmp_path / "copy", user)
    assert xv6().end(copy, tmp_path / "copy") == run.end
    assert_10_ms_a_tick(run)


def assert_10_ms_a_tick(run: Run) -> None:
    first, last = run.end["prompts"][0], run.end["prompts"][-1]
    assert abs((last.time - first.time) / TICK_NS - (last.ticks - first.ticks)) <= 1


# --- make soak --------------------------------------------------------------------------------------------------------

# Its five processes write to the console all at once, a letter at a time.
STRESSED = "stressfs starting\n" + "".join(f"write {i}\n" for i in range(5)) + 5 * "read\n"

COMMANDS = (b"ls\n", b"cat README | wc\n", b"stressfs\n", b"cat stressfs0 | wc\n")


@pytest.mark.soak
def test_the_programs_of_xv6_say_what_they_should():
    run = undisturbed(*COMMANDS)
    listed, counted, stressed, written = answers(run)
    sizes = {name: int(size) for name, size in re.findall(r"^(\w+) +\d+ +\d+ (\d+)$", listed, re.M)}
    assert {"README", "cat", "console", "ls", "sh", "usertests", "wc"} <= set(sizes)
    assert int(counted.split()[2]) == sizes["README"]
    assert sorted(stressed) == sorted(STRESSED)
    assert written.split() == ["0", "1", "10240"]  # 20 times 512 letters, and no line
    assert_10_ms_a_tick(run)


@pytest.mark.soak
def test_xv6_forks_until_it_cannot_and_goes_on():
    assert answers(undisturbed(b"forktest\n")) == ["fork test\nfork test OK\n"]


@pytest.mark.soak
def test_xv6_suspended_and_restored_at_20_random_instants_ends_as_it_does_undisturbed(tmp_path):
    run = undisturbed(*COMMANDS)
    machine = xv6().boot(tmp_path, COMMANDS)
    machine = xv6().suspended_and_restored(machine, tmp_path, run.instants(20, seed="suspended"))
    assert xv6().end(machine, tmp_path) == run.end


@pytest.mark.soak
def test_each_of_5_checkpoints_of_a_running_xv6_ends_in_its_own_copy_as_it_does_undisturbed(tmp_path):
    assert_checkpoints_end_alike(xv6(), undisturbed(*COMMANDS), tmp_path, COMMANDS, count=5)


@pytest.mark.soak
def test_xv6_passes_its_own_tests():
    assert "\nALL TESTS PASSED\n" in answers(undisturbed(b"usertests\n"))[0]
