"""xv6, MIT's teaching system, unmodified: a kernel that was not written for this machine boots from one disk and keeps
its files on the other, and notices nothing of being suspended and restored.

Where it is looked for, and how it is built, says the sentence with which these tests are skipped.
"""

from __future__ import annotations

import functools
import io
import os
import re
from pathlib import Path

import pytest
from lockstep import assert_checkpoints_go_on_in_lockstep
from os_tools import (
    Guest,
    address_of,
    answers,
    assert_checkpoints_end_alike,
    assert_suspensions_change_nothing,
    assert_tick_length,
    undisturbed,
)

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
    """xv6, with more than the 224 MB that it takes for granted. Its kernel follows upon the boot sector of a disk."""
    return Guest(
        prompt=b"$ ",
        ticks=address_of("ticks", io.BytesIO((XV6 / "xv6.img").read_bytes()[SECTOR:])) - KERNEL_BASE,
        variables=(("memory_size", "240M"),),
        disk_device="ide",
        disks=tuple((slot, XV6 / name) for slot, name in enumerate(IMAGES, start=1)),
    )


def test_xv6_keeps_a_file_and_the_time_and_notices_no_suspension_of_its_boot_or_writing_and_no_checkpoint(tmp_path):
    guest, commands = xv6(), [b"echo to be kept > f\n", b"ls f\n"]
    run = undisturbed(guest, *commands)
    _, echoed, listed, rest = answers(guest, run)
    assert (echoed, rest) == ("", "") and re.fullmatch(r"f +2 \d+ 11\n", listed)
    booting, writing = run.busy_between(-1, 0), run.busy_between(0, 1)
    machine = guest.boot(tmp_path, commands)
    at = [booting[len(booting) // 2], writing[0], writing[len(writing) // 2]]
    machine = guest.suspended_and_restored(machine, tmp_path, at)
    user = guest.checkpoint(machine, tmp_path, tmp_path / "copy")
    assert b"to be kept" not in (tmp_path / "copy" / "fs.img").read_bytes()

    assert guest.end(machine, tmp_path) == run.end
    assert b"to be kept\n" in (tmp_path / "fs.img").read_bytes()
    copy = guest.restore(tmp_path / "copy" / "checkpoint", tmp_path / "copy", user)
    assert guest.end(copy, tmp_path / "copy") == run.end
    assert_tick_length(run, TICK_NS)


# --- make soak --------------------------------------------------------------------------------------------------------

COMMANDS = (b"ls\n", b"cat README | wc\n", b"stressfs\n", b"cat stressfs0 | wc\n")

# The five processes of stressfs write to the console all at once, a letter at a time.
STRESSED = "stressfs starting\n" + "".join(f"write {i}\n" for i in range(5)) + 5 * "read\n"


@pytest.mark.soak
def test_the_programs_of_xv6_say_what_they_should():
    run = undisturbed(xv6(), *COMMANDS)
    banner, listed, counted, stressed, written, rest = answers(xv6(), run)
    assert banner.endswith("init: starting sh\n") and rest == ""
    sizes = {name: int(size) for name, size in re.findall(r"^(\w+) +\d+ +\d+ (\d+)$", listed, re.M)}
    assert {"README", "cat", "console", "ls", "sh", "usertests", "wc"} <= set(sizes)
    assert int(counted.split()[2]) == sizes["README"]
    assert sorted(stressed) == sorted(STRESSED)
    assert written.split() == ["0", "1", "10240"]  # 20 times 512 letters, and no line
    assert_tick_length(run, TICK_NS)


@pytest.mark.soak
def test_xv6_forks_until_it_cannot_and_goes_on():
    assert answers(xv6(), undisturbed(xv6(), b"forktest\n"))[1] == "fork test\nfork test OK\n"


@pytest.mark.soak
def test_xv6_suspended_and_restored_at_20_random_instants_ends_as_it_does_undisturbed(tmp_path):
    at = undisturbed(xv6(), *COMMANDS).instants(20, seed="suspended")
    assert_suspensions_change_nothing(xv6(), tmp_path, COMMANDS, at)


@pytest.mark.soak
def test_the_next_million_instructions_of_xv6_are_the_same_with_a_disk_at_work_and_at_any_instant(tmp_path):
    at = undisturbed(xv6(), *COMMANDS).instants(12, seed="lockstep")
    assert_checkpoints_go_on_in_lockstep(xv6(), tmp_path, COMMANDS, at)


@pytest.mark.soak
def test_each_of_5_checkpoints_of_a_running_xv6_ends_in_its_own_copy_as_it_does_undisturbed(tmp_path):
    at = undisturbed(xv6(), *COMMANDS).instants(5, seed="checkpoints")
    assert_checkpoints_end_alike(xv6(), tmp_path, COMMANDS, at)


@pytest.mark.soak
def test_xv6_passes_its_own_tests():
    assert "\nALL TESTS PASSED\n" in answers(xv6(), undisturbed(xv6(), b"usertests\n"))[1]
