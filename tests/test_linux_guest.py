"""Linux, the largest guest, does on QEMU what it says it does; and the program that builds it takes care.

`make linux-guest` builds it, outside of this tree; without it, what needs it is skipped.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess

import pytest
from guest_tools import REPOSITORY, LinuxOnQemu, random_bytes, summed

MEGABYTE = 1 << 20


# ---- The commands ----


@pytest.fixture(scope="module")
def linux():
    with LinuxOnQemu(memory=64) as guest:
        yield guest


def test_linux_reaches_the_prompt_of_our_init(linux):
    assert linux.boot_messages.endswith("Linux guest: type help for a list of commands\r\n# ")


def test_every_command_of_the_linux_guest_is_in_its_help(linux):
    names = [line.split()[0] for line in linux.ask("help").splitlines()]
    assert names[:-1] == sorted(names[:-1]) and names[-1] == "COMMAND"
    for name in names[:-1]:
        assert "there is no command" not in linux.ask(name + " a b c d" * (name in ("poweroff", "halt", "reboot")))


@pytest.mark.parametrize(
    "command, answer",
    [
        ("echo one  two", "one two\n"),
        ("echo", "\n"),
        ("format c:", "there is no command format: type help for a list\n"),
        ("mount /dev/null", "write it as: mount DISK DIRECTORY\n"),
        ("cat /absent", "cat: /absent: there is no such file or directory\n"),
        ("cat /", "cat: /: this is a directory\n"),
        ("ls /init", "ls: /init: this is no directory\n"),
        ("mount /dev/null /mnt", "mount: /dev/null: this is no disk\n"),
        ("sync", ""),
        ("write /x many 1", "write: many: this is no number (as 512, 64K or 2M)\n"),
        ("echo x > /proc/x", ">: /proc/x: there is no such file or directory\n"),
        ("stress-mem 4", "1024 pages written and read, 0 numbers were wrong\n"),
        ("stress-mem 4096", "stress-mem: 4096: there is not enough memory\n"),
        ("stress-fork 100", "100 processes started and ended\n"),
    ],
)
def test_a_command_of_the_linux_guest_says_what_it_did(linux, command, answer):
    assert linux.ask(command) == answer.replace("\n", "\r\n")


def test_linux_shows_its_files_and_processes(linux):
    assert re.search(r"^-\s+\d+ init\r$", linux.ask("ls"), re.M)
    assert re.search(r"^c\s+0 ttyS0\r$", linux.ask("ls /dev"), re.M)
    assert re.search(r"^    1      0  S      init\r$", linux.ask("ps"), re.M)
    assert re.fullmatch(r"up \d+ s, \d+ processes, \d+ of \d+ KB free\r\n", linux.ask("uptime"))


def test_a_file_of_the_linux_guest_holds_what_was_written_to_it(linux):
    assert linux.ask("echo kept > /file") == ""
    assert linux.ask("cat /file /file") == "kept\r\n" * 2
    data = random_bytes(10001, seed=7)
    assert linux.ask("write /numbers 10001 7") == summed(data)
    assert linux.ask("sum /numbers") == summed(data)
    assert linux.ask("sum /numbers 4K") == summed(data[:4096])


# ---- Disks ----


DISKS = {
    "vda": ["-device", "virtio-blk-device,drive=disk"],
    "sda": ["-device", "isa-ide", "-device", "ide-hd,drive=disk"],
}


@pytest.fixture
def disk(tmp_path):
    """An image with the file system ext2, in which there are no files."""
    mke2fs = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
    if mke2fs is None:
        pytest.skip("mke2fs is not installed: apt-get install e2fsprogs")
    image = tmp_path / "disk"
    image.write_bytes(bytes(2 * MEGABYTE))
    subprocess.run([mke2fs, "-q", "-F", "-t", "ext2", str(image)], check=True)
    return image


@pytest.mark.parametrize("name", DISKS)
def test_linux_keeps_a_file_system_on_a_disk(name, disk):
    drive = ["-drive", f"id=disk,file={disk},format=raw,if=none", *DISKS[name]]
    data = random_bytes(100_000, seed=1)
    with LinuxOnQemu(memory=64, options=drive) as guest:
        assert guest.ask(f"mount /dev/{name} /mnt") == ""
        assert guest.ask("write /mnt/numbers 100000 1") == summed(data)
        assert guest.ask("umount /mnt") == ""
        assert guest.ask(f"mount /dev/{name} /mnt") == ""  # nothing is left in memory: it has to be read
        assert guest.ask("sum /mnt/numbers") == summed(data)
        assert guest.ask("umount /mnt") == ""
    assert data[:1024] in disk.read_bytes()


def test_linux_mounts_a_disk_that_can_only_be_read(disk):
    drive = ["-drive", f"id=disk,file={disk},format=raw,if=none,readonly=on", *DISKS["vda"]]
    with LinuxOnQemu(memory=64, options=drive) as guest:
        assert guest.ask("mount /dev/vda /mnt") == ""
        assert "lost+found" in guest.ask("ls /mnt")
        assert guest.ask("write /mnt/numbers 1 1") == "write: /mnt/numbers: it can only be read\r\n"
        assert guest.ask("write /dev/vda 1 1") == "write: /dev/vda: this is not permitted\r\n"


# ---- The machine ----


@pytest.mark.parametrize("memory, command", [(16, "poweroff"), (1024, "halt")])
def test_linux_boots_with_little_memory_and_with_much_and_stops_the_processor(memory, command):
    with LinuxOnQemu(memory=memory) as guest:
        assert guest.ask("stress-mem 2") == "512 pages written and read, 0 numbers were wrong\r\n"
        guest.send(command + "\n")
        guest.read_until("System halted")


def test_linux_starts_the_machine_again():
    with LinuxOnQemu(memory=64) as guest:
        guest.send("reboot\n")
        assert guest.wait() == 0


# ---- Building it. The kernel itself takes too long: something else takes its place. ----


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """The program that builds the guest, on copies of its sources. It counts the kernels that it "builds"."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    sources = shutil.copytree(REPOSITORY / "guests" / "linux", tmp_path / "sources")
    spec = importlib.util.spec_from_file_location("linux_builder", sources / "build.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    builder.kernels = 0

    def build_kernel(new):
        builder.kernels += 1
        for name in builder.KERNEL_FILES:
            (new / name).write_text(f"kernel {builder.kernels}")

    monkeypatch.setattr(builder, "TARGET", tmp_path / "cache" / "linux")
    monkeypatch.setattr(builder, "SOURCE", tmp_path / "linux-source-6.1.tar.xz")
    monkeypatch.setattr(builder, "build_kernel", build_kernel)
    return builder


def test_the_linux_guest_is_built_once(builder, capsys):
    builder.main()
    assert sorted(path.name for path in builder.TARGET.iterdir()) == [
        "bzImage", "initrd.cpio", "initrd.cpio.gz", "made-from", "vmlinux",
    ]  # fmt: skip
    inode = builder.TARGET.stat().st_ino
    capsys.readouterr()
    builder.main()
    assert capsys.readouterr().out == f"The Linux guest in {builder.TARGET} is up to date.\n"
    assert builder.TARGET.stat().st_ino == inode


def test_a_change_of_init_builds_no_other_kernel_but_a_change_of_the_configuration_does(builder):
    builder.main()
    with open(builder.HERE / "init.c", "a") as init:
        init.write('static const char *const ADDED __attribute__((used)) = "added";\n')
    builder.main()
    assert builder.kernels == 1
    assert b"added" in (builder.TARGET / "initrd.cpio").read_bytes()
    with open(builder.HERE / "config", "a") as config:
        config.write("CONFIG_NET=y\n")
    builder.main()
    assert builder.kernels == 2


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_a_build_of_linux_that_is_cut_off_leaves_the_old_one(builder, monkeypatch, end):
    builder.main()

    def cut_off(new):
        (new / "vmlinux").write_text("half a ker")
        raise end

    monkeypatch.setattr(builder, "build_kernel", cut_off)
    (builder.HERE / "config").write_text("CONFIG_NET=y\n")
    with pytest.raises(end):
        builder.main()
    assert (builder.TARGET / "vmlinux").read_text() == "kernel 1"
    assert [path.name for path in builder.TARGET.parent.iterdir() if path.is_dir()] == ["linux"]


def test_a_missing_source_of_linux_is_named_with_its_package(builder):
    with pytest.raises(builder.Failure, match="^there is no .*, the source of Linux: apt-get install "):
        builder.check_tools()


def test_a_missing_tool_is_named_with_its_package(builder, monkeypatch):
    builder.SOURCE.touch()
    monkeypatch.setattr(builder, "TOOLS", ["make", "no-such-tool"])
    with pytest.raises(builder.Failure, match="^no-such-tool is missing: apt-get install "):
        builder.check_tools()


def test_an_option_that_the_kernel_does_not_know_is_named(builder, tmp_path):
    (tmp_path / "result").write_text("CONFIG_TTY=y\n")
    builder.check_options({"CONFIG_TTY": "y", "CONFIG_NET": "n"}, tmp_path / "result")
    with pytest.raises(builder.Failure, match="^this Linux cannot be built with CONFIG_PRITNK=y, as "):
        builder.check_options({"CONFIG_PRITNK": "y"}, tmp_path / "result")


def test_cpio_finds_in_the_initramfs_what_was_put_there(builder):
    if shutil.which("cpio") is None:
        pytest.skip("cpio is not installed")
    builder.main()
    archive = (builder.TARGET / "initrd.cpio").read_bytes()
    listed = subprocess.run(["cpio", "-itv", "--quiet"], input=archive, capture_output=True, check=True).stdout.decode()
    assert [(line.split()[0], line.split()[-1]) for line in listed.splitlines()] == [
        ("drwxr-xr-x", "dev"),
        ("drwxr-xr-x", "proc"),
        ("drwxr-xr-x", "mnt"),
        ("crw-------", "dev/console"),
        ("-rwxr-xr-x", "init"),
    ]
    assert " 5,   1 " in listed
