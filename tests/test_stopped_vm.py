"""Snapshots looked at and compared without being started: ctl.py inspect and ctl.py diff, and what is behind them."""

from __future__ import annotations

import json
import os
import re
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot_machine import Machine as ForeignMachine
from snapshot_machine import checkpoint
from vm_tools import Typist, Vm, boot, configured, ctl, loaded, run_to

import ctl as ctl_module
from mini_bhyve.machine import Machine
from mini_bhyve.memory_picture import COLUMNS, MemoryPicture
from mini_bhyve.ram_pages import count, differing_pages, union, used_pages
from mini_bhyve.snapshot_files import KERN, META, RAM, READY, UNFINISHED
from mini_bhyve.snapshot_state import save_state

PAGE = 4096
SVG = "{http://www.w3.org/2000/svg}"


def save(machine, path) -> str:
    checkpoint(machine, path)
    return str(path)


@pytest.fixture
def run(capsys):
    """A function that runs ctl.py: exit status, standard output, standard error."""

    def run(*arguments):
        try:
            status = ctl_module.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's way out
            status = end.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Two snapshots of `counter`: early, and some numbers later."""
    directory = tmp_path_factory.mktemp("snapshots")
    machine = boot("counter")
    run_to(machine, 6000)
    early = save(machine, directory / "early.ckp")
    run_to(machine, 9000)
    return early, save(machine, directory / "late.ckp")


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guest, instructions", [("counter", 6000), ("shell", 9000), ("long64", 2000)])
def test_inspect_shows_the_registers_and_the_mode_that_the_machine_had(run, tmp_path, guest, instructions):
    machine = boot(guest)
    run_to(machine, instructions)
    path = save(machine, tmp_path / "vm.ckp")
    status, out, err = run("inspect", path, "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["registers"] == machine.cpu.register_values()
    assert (report["mode"], report["instructions"]) == (machine.cpu.describe_mode(), instructions)
    assert (report["memory"], report["time_ns"]) == (machine.memory.size, machine.clock.now)


@pytest.mark.parametrize("guest, printed", [("counter", b"\n3\r\n"), ("shell", b"$ ")])
def test_inspect_prints_what_regs_printed_just_before_the_vm_was_suspended(run_dir, tmp_path, guest, printed):
    with Vm(run_dir, "-m", "2", "-o", f"guest={guest}", "-H", "vm") as vm:
        vm.wait_for(printed)
        assert ctl(run_dir, "pause", "vm").returncode == 0
        registers = ctl(run_dir, "regs", "vm").stdout
        assert ctl(run_dir, "suspend", "vm", str(tmp_path / "vm.ckp")).returncode == 0
        vm.exit_code()
    inspected = ctl(run_dir, "inspect", str(tmp_path / "vm.ckp"))
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert registers.count("\n") == 18 and registers in inspected.stdout
    assert inspected.stdout.replace("\n    ", "\n").endswith("\n".join(vm.console.decode().splitlines()[-16:]) + "\n")


def test_inspect_shows_memory_devices_and_the_end_of_what_the_guest_printed(run, counting):
    status, out, err = run("inspect", counting[1])
    assert (status, err) == (0, "")
    for line in (
        r"name          vm",
        r"mode          32-bit code, 32-bit paging",
        r"00000000-000fffff  RAM",
        r"fee00000-fee00fff  vlapic",
        r"10 of 256 pages in use, of 4 KB each",
        r"00000000  █·{6}█{8}·{49}",
        r"00007000-0000efff  8 pages",
        r"vioapic +id=0x0  select=0x0 .* pin23=0x10000",
        r"uart-com1 +base=0x3f8  divisor=0x1  ier=0x0 .*",
    ):
        assert re.search(f"^{line}$", out, re.MULTILINE), line
    assert out.endswith("the guest printed last:\n" + "".join(f"    {number}\n" for number in range(18, 34)))


def test_a_picture_for_a_terminal_that_has_no_blocks_is_of_ascii(counting, run_dir, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PYTHONUTF8", "0")
    inspected = ctl(run_dir, "inspect", counting[0])
    assert inspected.returncode == 0 and inspected.stdout.isascii()
    assert "\n00000000  #......########....." in inspected.stdout


def test_what_a_guest_printed_to_trick_a_terminal_is_shown_and_not_obeyed(run, tmp_path):
    machine = boot("counter")
    for byte in b"\x1b]0;title\x07\x9b2J\r\n\xc3\xa9\r\n":
        machine.uart.outb(0x3F8, byte)
    out = run("inspect", save(machine, tmp_path / "vm.ckp"))[1]
    assert out.endswith("last:\n    \\x1b]0;title\\x07\\x9b2J\n    é\n")


@pytest.mark.parametrize(
    "printed, sentence",
    [({"printed": b""}, "the guest has printed nothing"), ({}, "what the guest printed is not in this snapshot")],
)
def test_a_guest_that_printed_nothing_is_told_from_a_snapshot_that_does_not_keep_it(run, tmp_path, printed, sentence):
    machine = boot("counter")
    machine.devices = lambda: [Part("uart-com1", printed)]
    assert run("inspect", save(machine, tmp_path / "vm.ckp"))[1].endswith(f"\n{sentence}\n")


def test_the_memory_map_tells_of_ram_rom_and_the_pages_of_devices(tmp_path, run):
    (tmp_path / "rom").write_bytes(bytes.fromhex("ebfe").ljust(0x20000, b"\x90"))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    config = configured(bootrom=str(tmp_path / "rom"), memory_size="2M", pci_0_1_0_device="virtio-blk")
    config.set("pci.0.1.0.path", str(tmp_path / "disk"))
    report = json.loads(run("inspect", save(loaded(config, b""), tmp_path / "vm.ckp"), "--json")[1])
    assert [(f"{area['first']:x}", f"{area['last']:x}", area["what"]) for area in report["memory_map"]] == [
        ("0", "dffff", "RAM"),
        ("e0000", "fffff", "boot ROM"),
        ("100000", "1fffff", "RAM"),
        ("d0000000", "d0000fff", "virtio-blk-1"),
        ("fec00000", "fec00fff", "vioapic"),
        ("fee00000", "fee00fff", "vlapic"),
        ("fffe0000", "ffffffff", "boot ROM again"),
    ]
    assert report["used"] == [[0xE0, 0xFF]] and report["used_pages"] == 0x20


def contents_of(directory: Path) -> dict[str, tuple[bytes, float]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime) for path in directory.iterdir()}


def test_a_snapshot_that_is_looked_at_stays_as_it_is(run, counting, tmp_path):
    before = contents_of(Path(counting[0]).parent)
    assert run("inspect", counting[0])[0] == run("diff", *counting)[0] == 0
    assert contents_of(Path(counting[0]).parent) == before


def test_a_checkpoint_that_was_interrupted_after_its_commit_is_finished_and_looked_at(run, tmp_path):
    path = save(boot("counter"), tmp_path / "vm.ckp")
    report = run("inspect", path, "--json")
    os.rename(path + META, path + META + READY)
    for suffix in (RAM, KERN):
        os.rename(path + suffix, path + suffix + UNFINISHED)
    assert run("inspect", path, "--json") == report


# --- diff -------------------------------------------------------------------------------------------------------------


def test_diff_finds_exactly_the_registers_fields_and_pages_that_differ(run, tmp_path):
    machine = boot("counter")
    before = save(machine, tmp_path / "before.ckp")
    machine.cpu.regs[3].value = 0x1234
    machine.uart.scr = 0x5A
    machine.memory.ram[0x54321] ^= 0x10
    machine.memory.ram[0xFFFFF] ^= 0x80
    machine.memory.ram[0x80FFF:0x81001] = b"\1\1"
    after = save(machine, tmp_path / "after.ckp")
    status, out, err = run("diff", before, after, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "before": before,
        "after": after,
        "vm": {},
        "disks": {},
        "registers": {"rbx": {"before": 0, "after": 0x1234}},
        "devices": {"uart-com1": {"scr": {"before": 0, "after": 0x5A}}},
        "pages": 256,
        "changed_pages": 4,
        "changed": [[0x54, 0x54], [0x80, 0x81], [0xFF, 0xFF]],
    }
    assert run("diff", before, after)[1].splitlines() == [
        "               before  after",
        "register rbx   0x0     0x1234",
        "uart-com1 scr  0x0     0x5a",
        "",
        "4 of 256 pages differ, of 4 KB each",
        "00000000  " + "·" * 64,
        "00040000  " + "·" * 20 + "█" + "·" * 43,
        "00080000  ██" + "·" * 62,
        "000c0000  " + "·" * 63 + "█",
        "of each 4 KB: · no page, ░ up to 1/4, ▒ up to 1/2, ▓ up to 3/4, █ more",
        "00054000-00054fff  1 page",
        "00080000-00081fff  2 pages",
        "000ff000-000fffff  1 page",
    ]


def test_a_snapshot_does_not_differ_from_itself(run, counting):
    assert run("diff", counting[0], counting[0]) == (0, "0 of 256 pages differ, of 4 KB each\n", "")


def test_diff_of_a_vm_that_ran_on_tells_how_far_and_what_it_printed_meanwhile(run, counting):
    out = run("diff", *counting)[1]
    assert re.search(r"^instructions +6,000 +9,000$", out, re.MULTILINE)
    assert re.search(r"^uart-com1 printed +\+0x36: empty +\+0x36: 8\\r\\n9\\r\\n10", out, re.MULTILINE)


def test_of_vms_with_different_memory_and_devices_what_both_have_is_compared(run, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    small = save(boot("counter"), tmp_path / "small.ckp")
    config = configured(memory_size="2M", pci_0_1_0_device="ide")
    config.set("pci.0.1.0.path", str(tmp_path / "disk"))
    large = Machine(config, Typist(b""))
    large.memory.ram[0x123456] = 1
    status, out, err = run("diff", small, save(large, tmp_path / "large.ckp"))
    assert (status, err) == (0, "")
    assert re.search(r"^memory +1,048,576 +2,097,152$", out, re.MULTILINE)
    assert re.search(r"^disk slot 1 size +not there +1,048,576$", out, re.MULTILINE)
    assert re.search(r"^ide selected +not there +0x0$", out, re.MULTILINE)
    assert "\none has more memory than the other; compared is what both have\n" in out
    assert " of 256 pages differ" in out


def test_the_svg_is_whole_xml_with_title_axis_legend_and_a_square_for_each_changed_cell(run, counting, tmp_path):
    out = run("diff", *counting, "--svg", tmp_path / "out.svg")[1]
    assert out.endswith(f"the picture is also in {tmp_path}/out.svg\n")
    picture = ET.parse(tmp_path / "out.svg").getroot()
    assert picture.tag == SVG + "svg"
    assert picture.find(SVG + "title").text == "Memory: early.ckp and late.ckp"
    texts = [text.text for text in picture.iter(SVG + "text")]
    assert {"2 of 256 pages differ, of 4 KB each", "000c0000", "+30000", "Of each 4 KB:", "more"} < set(texts)
    hints = [rect.find(SVG + "title").text for rect in picture.iter(SVG + "rect") if len(rect)]
    assert hints == ["0000b000: 1 of 1 pages", "0000e000: 1 of 1 pages"]


def test_a_title_may_be_whatever_a_file_may_be_called():
    title = "<a & 'b' \"c\" \udcff \x01 é>"
    picture = ET.fromstring(MemoryPicture(256, []).svg(title, "&"))
    assert picture.find(SVG + "title").text == "<a & 'b' \"c\" \ufffd \ufffd é>"


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_what_is_no_snapshot_is_one_sentence_and_status_1(run, counting, tmp_path):
    (tmp_path / "disk").write_bytes(b"no snapshot")
    for name in ("text", "text.kern", "text.meta"):
        (tmp_path / name).write_bytes(b"no JSON")
    foreign = ForeignMachine()
    checkpoint(foreign, tmp_path / "foreign")
    for name, sentence in (
        ("none", f"cannot open {tmp_path}/none.meta: No such file or directory"),
        ("disk", f"cannot open {tmp_path}/disk.meta: No such file or directory"),
        ("text", f"{tmp_path}/text.meta is not JSON"),
        ("foreign", f"{tmp_path}/foreign: memory of 65536 bytes: .*"),
        ("", ".*is not the name of a file"),
    ):
        file = tmp_path / name if name else ""
        for arguments in (["inspect", file], ["diff", counting[0], file], ["diff", file, counting[0]]):
            status, out, err = run(*arguments)
            assert (status, out) == (1, "")
            assert re.fullmatch(f"ctl.py: (?:{sentence})\n", err), err


def test_a_bit_that_flipped_in_ram_is_one_sentence_and_status_1(run, counting, tmp_path):
    path = save(boot("counter"), tmp_path / "vm.ckp")
    with open(path, "rb+") as file:
        file.seek(0x7C00)
        file.write(bytes([file.read(1)[0] ^ 1]))
    for arguments in (["inspect", path], ["diff", counting[0], path]):
        status, out, err = run(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith(f"ctl.py: {path} is damaged") and err.count("\n") == 1


def test_a_state_that_this_program_does_not_know_is_one_sentence_and_status_1(run, tmp_path):
    path = str(tmp_path / "vm.ckp")
    for change, sentence in (
        (lambda kern: kern.pop("vmcx"), f"{path} has no vmcx"),
        (lambda kern: kern["vmcx"].update(cr9=1), f"{path}.kern: vmcx: the snapshot has fields .*: cr9"),
        (lambda kern: kern["clock"].update(skipped="x"), f"{path}.kern: clock: skipped is 'x', not .*"),
    ):
        foreign = ForeignMachine(1 << 20)
        kern = {part.name: save_state(part) for part in boot("counter").kern_structs()}
        change(kern)
        foreign.kern_structs = lambda kern=kern: [Part(name, fields) for name, fields in kern.items()]
        checkpoint(foreign, path)
        status, out, err = run("inspect", path)
        assert (status, out) == (1, "") and re.fullmatch(f"ctl.py: {sentence}\n", err), err


class Part:
    """A part of a machine that is nothing but its fields."""

    def __init__(self, name, fields):
        self.name, self.fields = name, fields

    def snapshot(self, state):
        for name, value in self.fields.items():
            state._exchange(name, value)


def test_an_svg_that_cannot_be_written_is_one_sentence_and_status_1(run, counting, tmp_path):
    assert run("diff", *counting, "--svg", tmp_path / "no" / "out.svg") == (
        1,
        "",
        f"ctl.py: {tmp_path}/no/out.svg: No such file or directory\n",
    )


# --- pages ------------------------------------------------------------------------------------------------------------


PAGES = 600  # more than two chunks


def sparse_file(marked: set[int]) -> IO[bytes]:
    """RAM in which each page of `marked` has a byte that is not zero, somewhere."""
    file = tempfile.TemporaryFile()
    file.truncate(PAGES * PAGE)
    for page in marked:
        os.pwrite(file.fileno(), b"x", page * PAGE + page)
    return file


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, PAGES - 1)), st.sets(st.integers(0, PAGES - 1)), st.integers(1, PAGES))
def test_the_pages_that_are_in_use_or_differ_are_found_one_by_one(first, second, size):
    with sparse_file(first) as before, sparse_file(second) as after:
        used = used_pages(before.fileno(), size * PAGE)
        changed = differing_pages(before.fileno(), after.fileno(), size * PAGE)
    assert [page for span in used for page in span] == sorted(page for page in first if page < size)
    assert [page for span in changed for page in span] == sorted(page for page in first ^ second if page < size)
    assert union(changed) == changed and count(used) == sum(page < size for page in first)


@pytest.mark.parametrize("pages", [1, 256, 1024, 1025, 65536, 65537, 786432])
def test_a_picture_of_any_memory_fits_and_counts_every_marked_page_once(pages):
    marked = union([range(pages // 3), range(pages - 1, pages)])
    picture = MemoryPicture(pages, marked)
    lines = picture.lines()
    assert sum(picture.counts) == count(marked)
    assert len(lines) <= 16 and max(map(len, lines)) <= 10 + COLUMNS
    assert lines[-1][-1] != "·"


def test_a_cell_is_the_darker_the_more_of_its_pages_are_marked():
    picture = MemoryPicture(8192, [range(0, 1), range(8, 11), range(16, 22), range(24, 32)])
    assert picture.cell_size == "32 KB"
    assert picture.lines()[0].startswith("00000000  ░▒▓█·")
