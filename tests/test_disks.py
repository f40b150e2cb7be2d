"""Disks as a whole: their images on the host, a guest that drives them, and snapshots of a VM that has some."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest
from protected_guest import assemble
from snapshot_machine import checkpoint
from vm_tools import Typist, assert_same_state, close_disks, configured, run_bhyve, run_to, single_step

from mini_bhyve.config import ConfigError
from mini_bhyve.disk import DiskError, DiskImage
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.snapshot import SnapshotError, load_snapshot

HALT, ERROR = 2, 4
SECTOR = 512

# A guest that copies sectors 1-3 of the master, which it was booted from, to sectors 5-7 of the slave. It reads by
# looking at Status until the drive is not busy, and writes by waiting for interrupts.
GUEST = {
    0x000: """
        fa 31c0 8ed8 8ec0 bc007c   ; cli; DS = ES = 0; mov sp, 7C00h
        c706d801407d               ; mov word [76h * 4], 7D40h: IRQ 14
        c706da010000               ; mov word [76h * 4 + 2], 0
        be007d b90a00              ; mov si, 7D00h; mov cx, 10
        ad 88c2 b600 88e0 ee e2f6  ; initialise: lodsw; mov dl, al; mov dh, 0; mov al, ah; out dx, al; loop
        be207d b8607d ffd0         ; mov si, 7D20h; call 7D60h: READ SECTOR(S)
        bf0090 b303                ; mov di, 9000h; mov bl, 3
        baf701 ec a880 75fb        ; next: mov dx, 1F7h; busy: in al, dx; test al, 80h; jnz busy
        baf001 b90001 f36d         ; mov dx, 1F0h; mov cx, 256; rep insw
        fecb 75ec                  ; dec bl; jnz next
        be307d b8607d ffd0         ; mov si, 7D30h; call 7D60h: WRITE SECTOR(S)
        be0090 b303                ; mov si, 9000h; mov bl, 3
        baf001 b90001 f36f         ; next: mov dx, 1F0h; mov cx, 256; rep outsw
        fb f4 fa                   ; sti; hlt; cli
        fecb 75f1                  ; dec bl; jnz next
        baf803 b04b ee f4          ; print 'K'; hlt
    """,
    0x100: "2011 2108 2104 2101 21fb  a011 a170 a102 a101 a1bf",  # port and value: ICW1 to ICW4 and the mask
    0x120: "03 01 00 00 e0 20",  # Sector Count, LBA Low, Mid, High, Device, Command
    0x130: "03 05 00 00 f0 30",
    0x140: "50 52 baf701 ec b020 e6a0 e620 5a 58 cf",  # push ax; push dx; read Status; end of interrupt; pop ...; iret
    0x160: "baf201 b90600 6e 42 e2fc c3",  # mov dx, 1F2h; mov cx, 6; outsb; inc dx; loop; ret
}


def boot_sector() -> bytes:
    sector = bytearray(510) + b"\x55\xaa"
    for place, listing in GUEST.items():
        code = assemble(listing)
        sector[place : place + len(code)] = code
    return bytes(sector)


MASTER = boot_sector() + random.Random(0).randbytes(9 * SECTOR)
SLAVE = random.Random(1).randbytes(20 * SECTOR)
COPIED = SLAVE[: 5 * SECTOR] + MASTER[SECTOR : 4 * SECTOR] + SLAVE[8 * SECTOR :]


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = [tmp_path / "master.img", tmp_path / "slave.img"]
    for path, contents in zip(paths, (MASTER, SLAVE)):
        path.write_bytes(contents)
    return paths


def machine(images: list[Path], ram=None) -> Machine:
    config = configured()
    for slot, path in enumerate(images, start=1):
        config.set(f"pci.0.{slot}.0.device", "ide")
        config.set(f"pci.0.{slot}.0.path", str(path))
    return Machine(config, Typist(b""), ram)


def booted(images: list[Path]) -> Machine:
    vm = machine(images)
    vm.load()
    return vm


# ---- Images


@pytest.mark.parametrize("read_only", [False, True])
def test_an_image_is_read_by_sectors_and_written_unless_it_is_read_only(images, read_only):
    image = DiskImage(str(images[0]), read_only)
    assert image.sectors == 10
    assert image.read(3, 2) == MASTER[3 * SECTOR : 5 * SECTOR]
    if read_only:
        with pytest.raises(OSError):
            image.write(3, bytes(SECTOR))
    else:
        image.write(8, b"z" * 2 * SECTOR)
        assert images[0].read_bytes() == MASTER[: 8 * SECTOR] + b"z" * 2 * SECTOR
        image.flush()


def test_what_the_system_takes_in_pieces_is_written_whole(images, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:300], offset))
    DiskImage(str(images[0])).write(0, SLAVE[: 4 * SECTOR])
    assert images[0].read_bytes() == SLAVE[: 4 * SECTOR] + MASTER[4 * SECTOR :]


def test_an_image_that_becomes_shorter_is_an_error_of_the_host(images):
    image = DiskImage(str(images[0]))
    os.truncate(images[0], SECTOR)
    with pytest.raises(OSError, match="shorter"):
        image.read(0, 2)


@pytest.mark.parametrize("size, sentence", [
    (0, "cannot be a disk: it has 0 bytes"), (511, "it has 511 bytes, not one or more sectors of 512"), (1000, "1000"),
])  # fmt: skip
def test_an_image_of_no_whole_number_of_sectors_is_refused(tmp_path, size, sentence):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(size))
    with pytest.raises(DiskError, match=sentence):
        DiskImage(str(path))


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, sentence in (
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/null", "not a regular file"),
        (tmp_path / "none", "cannot read and write the disk .*none: No such file or directory$"),
        ("a\0b", "not a file name"),
    ):  # fmt: skip
        with pytest.raises(DiskError, match=sentence):
            DiskImage(str(path))


def test_an_image_that_may_not_be_written_is_refused_with_a_hint_unless_the_disk_is_read_only():
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "disk.img"
        path.write_bytes(MASTER)
        path.chmod(0o444)
        os.chmod(directory, 0o755)
        privileged = os.geteuid() == 0
        if privileged:  # who may write everything
            os.seteuid(65534)
        try:
            with pytest.raises(
                DiskError, match=r"disk\.img: Permission denied \(for a disk to be read only, add ,ro\)$"
            ):
                DiskImage(str(path))
            assert DiskImage(str(path), read_only=True).read(0, 10) == MASTER
        finally:
            if privileged:
                os.seteuid(0)


def test_an_image_is_for_one_machine_that_writes_or_for_several_that_read(images):
    path = str(images[0])
    reader, other = DiskImage(path, read_only=True), DiskImage(path, read_only=True)
    for close_it in (reader.close, other.close):
        with pytest.raises(DiskError, match=f"the disk {path} is in use already"):
            DiskImage(path)
        close_it()
    writer = DiskImage(path)
    for read_only in (True, False):
        with pytest.raises(DiskError, match="in use already"):
            DiskImage(path, read_only)
    writer.close()
    DiskImage(path)


# ---- The command line


def test_a_guest_reads_from_one_disk_and_writes_to_the_other(run_dir, images):
    ended = run_bhyve(run_dir, "-s", f"1,ide,{images[0]},ro", "-s", f"2,ide,{images[1]}")
    assert (ended.stdout, ended.returncode) == (b"K", HALT), ended.stderr
    assert images[0].read_bytes() == MASTER
    assert images[1].read_bytes() == COPIED


def test_what_cannot_be_a_disk_is_refused_with_one_sentence_and_exit_code_4(run_dir, images, tmp_path):
    odd = tmp_path / "odd.img"
    odd.write_bytes(MASTER + b"!")
    for arguments, sentence in (
        (["-s", f"1,ide,{tmp_path}"], "not a regular file"),
        (["-s", f"1,ide,{tmp_path}/nothing"], "nothing: No such file or directory"),
        (["-s", f"1,ide,{images[0]}", "-s", f"2,ide,{odd}"], f"{odd} cannot be a disk: it has 5121 bytes"),
        (["-s", f"1,ide,{images[0]}", "-s", f"2,ide,{images[0]}"], f"the disk {images[0]} is in use already"),
        (
            [f"-s{slot},ide,{images[0]},ro" for slot in (7, 3, 5)],
            "at most 2 ide disks, but slots 3, 5, 7 have one",
        ),
    ):
        ended = run_bhyve(run_dir, *arguments)
        assert (ended.returncode, ended.stdout) == (ERROR, b"")
        assert sentence in ended.stderr.decode() and ended.stderr.count(b"\n") == 1
    assert images[0].read_bytes() == MASTER


# ---- Machines


def test_the_master_is_the_disk_in_the_lower_slot(images):
    config = configured(pci_0_9_0_device="ide", pci_0_9_0_path=str(images[0]))
    config.set("pci.0.4.0.device", "ide")
    config.set("pci.0.4.0.path", str(images[1]))
    vm = Machine(config, Typist(b""))
    assert vm.ide is not None
    assert [drive.image.path for drive in vm.ide.drives] == [str(images[1]), str(images[0])]
    assert [disk["slot"] for disk in vm.disks()] == [4, 9]


def test_without_disks_nobody_answers_at_their_ports():
    vm = machine([])
    assert {vm.ports.read(port, 8) for port in (*range(0x1F0, 0x1F8), 0x3F6)} == {0xFF}
    assert vm.ports.read(0x1F0, 32) == 0xFFFFFFFF
    assert "ide" not in [device.name for device in vm.devices()]


def test_three_disks_are_too_many(images):
    with pytest.raises(ConfigError, match="at most 2 ide disks"):
        machine([*images, images[0]])


# ---- Snapshots


def undisturbed(images: list[Path]) -> Machine:
    vm = booted(images)
    run_to(vm)
    close_disks(vm)
    assert vm.exit_code == ExitCode.HALT and vm.console.output == b"K"
    assert images[1].read_bytes() == COPIED
    return vm


def test_a_vm_suspended_with_a_command_in_flight_goes_on_as_if_nothing_had_been(images, tmp_path):
    reference = undisturbed(images)
    instants: dict[tuple, int] = {}  # the first instruction of each state that a drive is in

    def note(vm: Machine) -> None:
        assert vm.ide is not None
        states = [(drive.status, drive.command, drive.remaining, bool(drive.position)) for drive in vm.ide.drives]
        instants.setdefault(tuple(states), vm.cpu.retired)

    images[1].write_bytes(SLAVE)
    vm = booted(images)
    single_step(vm, reference.cpu.retired, note)
    close_disks(vm)
    assert len(instants) > 12
    for instant in sorted({first + more for first in instants.values() for more in (0, 1, 40)}):
        images[1].write_bytes(SLAVE)
        vm = booted(images)
        run_to(vm, min(instant, reference.cpu.retired - 1))
        printed = vm.console.output
        checkpoint(vm, str(tmp_path / "vm.ckp"), stop_vm=True)
        snapshot = load_snapshot(str(tmp_path / "vm.ckp"))
        vm = machine(images, snapshot.ram)
        snapshot.restore(vm)
        run_to(vm)
        close_disks(vm)
        assert (vm.exit_code, printed + vm.console.output) == (ExitCode.HALT, b"K")
        assert_same_state(vm, reference)
        assert images[1].read_bytes() == COPIED


def test_the_disks_are_flushed_before_a_snapshot_is_complete(images, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "fork")  # so that it is this process that writes, and we see it
    vm = booted(images)
    complete = []
    for image in vm.images.values():
        monkeypatch.setattr(image, "flush", lambda: complete.append((tmp_path / "vm.ckp.meta").exists()))
    checkpoint(vm, str(tmp_path / "vm.ckp"), stop_vm=False)
    assert complete == [False, False]


def test_a_disk_that_cannot_be_flushed_makes_the_checkpoint_fail_and_the_vm_goes_on(images, tmp_path, monkeypatch):
    def fail() -> None:
        raise OSError(5, "Input/output error")

    vm = booted(images)
    monkeypatch.setattr(vm.images[2], "flush", fail)
    with pytest.raises(SnapshotError, match=rf"cannot write the disk {images[1]}: Input/output error"):
        checkpoint(vm, str(tmp_path / "vm.ckp"), stop_vm=True)
    assert sorted(os.listdir(tmp_path)) == ["master.img", "slave.img"]
    run_to(vm)
    assert images[1].read_bytes() == COPIED


def test_a_snapshot_wants_disks_of_the_same_size_in_the_same_slots_wherever_their_images_are(images, tmp_path):
    vm = booted(images)
    checkpoint(vm, str(tmp_path / "vm.ckp"), stop_vm=True)
    moved = images[0].rename(tmp_path / "moved.img")
    larger = tmp_path / "larger.img"
    larger.write_bytes(SLAVE + bytes(SECTOR))
    for disks, sentence in (
        ([moved, images[1]], None),
        ([moved], "a disk in slot 2, which this VM has not"),
        ([moved, larger], "disk in slot 2 had the size 10240, but that of .*larger.img is 10752"),
        ([], "has device ide, which this VM has not"),
    ):
        vm = machine(disks)
        if sentence:
            with pytest.raises(SnapshotError, match=sentence):
                load_snapshot(str(tmp_path / "vm.ckp")).restore(vm)
        else:
            load_snapshot(str(tmp_path / "vm.ckp")).restore(vm)
            run_to(vm)
            assert images[1].read_bytes() == COPIED
        close_disks(vm)


@pytest.mark.parametrize("device", ["ide", "virtio-blk"])
@pytest.mark.parametrize(
    "before, after, sentence",
    [
        ("false", "true", "disk in slot 1 had the access read and write, but that of .*master.img is read only"),
        ("true", "false", "disk in slot 1 had the access read only, but that of .*master.img is read and write"),
    ],
)
def test_a_snapshot_wants_a_disk_to_be_read_only_as_it_was_or_not(images, tmp_path, device, before, after, sentence):
    def with_disk(read_only: str) -> Machine:
        config = configured(pci_0_1_0_device=device, pci_0_1_0_path=str(images[0]), pci_0_1_0_ro=read_only)
        return Machine(config, Typist(b""))

    checkpoint(with_disk(before), str(tmp_path / "vm.ckp"), stop_vm=True)
    with pytest.raises(SnapshotError, match=sentence):
        load_snapshot(str(tmp_path / "vm.ckp")).restore(with_disk(after))
