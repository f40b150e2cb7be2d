"""Builds the Linux guest from Debian's sources: a small 64-bit kernel, and an initramfs with our own `init`.

    python guests/linux/build.py        or: make linux-guest

It goes to a directory outside of this tree, once; a second call finds that nothing has changed and is done.

    vmlinux         the kernel as an ELF file, with its symbols: what a loader puts into memory as it is
    bzImage         the kernel as it is installed: compressed, behind the code that starts it on a PC
    initrd.cpio     the initramfs: `init`, and the directories and the device that it needs
    initrd.cpio.gz  the same, compressed
    made-from       checksums of what all this was built from

Everything is built in a directory beside it, which takes its place at the very end: a build that is cut off leaves the
old guest or none, never half of one.

Environment variables: LINUX_GUEST_DIR (where to), LINUX_SOURCE (another tar file), COMPRESSION (of bzImage: gzip, or
bzip2, lzma, xz, lzo, lz4, zstd, if the tool is there), CROSS (the prefix of a cross toolchain: x86_64-linux-gnu-).
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
TARGET = Path(os.environ.get("LINUX_GUEST_DIR") or CACHE / "mini-bhyve" / "linux").absolute()
SOURCE = Path(os.environ.get("LINUX_SOURCE") or "/usr/src/linux-source-6.1.tar.xz")
COMPRESSION = os.environ.get("COMPRESSION") or "gzip"
CROSS = os.environ.get("CROSS", "")

KERNEL_FILES = ["vmlinux", "bzImage"]
TOOLS = ["tar", "xz", "make", "flex", "bison", "bc", CROSS + "gcc", CROSS + "ld"]
INSTALL = "apt-get install linux-source-6.1 make gcc flex bison bc libelf-dev"

# The kernel says who built it, where and when. With a fixed answer, the same source gives the same bytes.
BUILD_NAMES = {
    "KBUILD_BUILD_USER": "mini-bhyve",
    "KBUILD_BUILD_HOST": "guest",
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 2026",
}

# No C library, no address that is only known when it runs, and nothing but integers (see init.c).
INIT_FLAGS = (
    "-std=gnu11 -Os -Wall -Wextra -Werror -ffreestanding -mgeneral-regs-only -fno-pic -fno-pie -fno-stack-protector "
    "-fcf-protection=none -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -fno-strict-aliasing "
    "-nostdlib -static -no-pie -s -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,noseparate-code"
).split()


class Failure(Exception):
    """What to tell the user, in a sentence."""


def main() -> None:
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with open(TARGET.with_name(TARGET.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"another build of {TARGET} is going on") from None
        made_from = {"kernel": kernel_checksum(), "initrd": initrd_checksum()}
        old = read_made_from()
        if old == made_from:
            print(f"The Linux guest in {TARGET} is up to date.")
            return
        new = TARGET.with_name(TARGET.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            if old.get("kernel") == made_from["kernel"]:
                for name in KERNEL_FILES:
                    shutil.copy2(TARGET / name, new / name)
            else:
                build_kernel(new)
            build_initrd(new)
            (new / "made-from").write_text("".join(f"{part} {value}\n" for part, value in made_from.items()))
            shutil.rmtree(TARGET, ignore_errors=True)
            new.rename(TARGET)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        print(f"The Linux guest is in {TARGET}.")


# ---- Is there anything to do? ----


def checksum(*files: Path, text: str = "") -> str:
    return hashlib.sha256(b"\0".join([file.read_bytes() for file in files] + [text.encode()])).hexdigest()


def kernel_checksum() -> str:
    """Of what the kernel depends on. The source is known by name, and size if it is there: it is long to read."""
    size = SOURCE.stat().st_size if SOURCE.exists() else 0
    return checksum(HERE / "config", text=f"{SOURCE.name} {size} {COMPRESSION}")


def initrd_checksum() -> str:
    """Of what the initrd depends on."""
    return checksum(HERE / "init.c", Path(__file__))


def read_made_from() -> dict[str, str]:
    try:
        return dict(line.split() for line in (TARGET / "made-from").read_text().splitlines())
    except (OSError, ValueError):
        return {}


# ---- The kernel ----


def check_tools() -> None:
    if not SOURCE.exists():
        raise Failure(f"there is no {SOURCE}, the source of Linux: {INSTALL}")
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise Failure(f"{tool} is missing: {INSTALL}")
    program = subprocess.run(["gcc", "-E", "-"], input=b"#include <gelf.h>\n", capture_output=True)
    if program.returncode:  # the kernel checks its own code with it (objtool)
        raise Failure(f"gelf.h of libelf is missing: {INSTALL}")


def build_kernel(new: Path) -> None:
    check_tools()
    print(f"Unpacking {SOURCE} ...", flush=True)
    build = new / "build"
    build.mkdir()
    run("unpacking the source", "tar", "-xf", str(SOURCE), "-C", str(build))
    (source,) = build.iterdir()
    print("Building Linux; this takes a few minutes ...", flush=True)
    wanted = wanted_options()
    fragment = new / "build" / "fragment"
    fragment.write_text("".join(f"{name}={value}\n" for name, value in wanted.items()))
    make(source, "allnoconfig", KCONFIG_ALLCONFIG=str(fragment))
    check_options(wanted, source / ".config")
    make(source, "bzImage")
    shutil.copy2(source / "vmlinux", new / "vmlinux")
    shutil.copy2(source / "arch" / "x86" / "boot" / "bzImage", new / "bzImage")
    shutil.rmtree(build)


def make(source: Path, goal: str, **variables: str) -> None:
    command = ["make", "-s", "-C", str(source), f"-j{os.cpu_count()}", "ARCH=x86_64", f"CROSS_COMPILE={CROSS}", goal]
    run("building Linux", *command, **BUILD_NAMES, **variables)


def run(purpose: str, *command: str, **variables: str) -> None:
    """Run a tool, which complains for itself if it must. What a `make` around us wants is not for it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    if subprocess.run(command, env={**environment, **variables}, stdout=subprocess.DEVNULL).returncode:
        raise Failure(f"{purpose} failed; what {command[0]} said is above")


def wanted_options() -> dict[str, str]:
    """The options in `config`, and the compression."""
    lines = [line.split("=", 1) for line in (HERE / "config").read_text().splitlines() if line.startswith("CONFIG_")]
    return {**dict(lines), f"CONFIG_KERNEL_{COMPRESSION.upper()}": "y"}


def check_options(wanted: dict[str, str], result: Path) -> None:
    """An option that depends on another one is dropped in silence if that is off."""
    lines = [line.split("=", 1) for line in result.read_text().splitlines() if line.startswith("CONFIG_")]
    got = dict(lines)
    for name, value in wanted.items():
        if got.get(name, "n") != value:
            raise Failure(f"this Linux cannot be built with {name}={value}, as {HERE / 'config'} wants it")


# ---- The initramfs ----


def build_initrd(new: Path) -> None:
    program = new / "init"
    run("building init", CROSS + "gcc", *INIT_FLAGS, "-o", str(program), str(HERE / "init.c"))
    files = [(name, stat.S_IFDIR | 0o755, 0, b"") for name in ("dev", "proc", "mnt")]
    files.append(("dev/console", stat.S_IFCHR | 0o600, os.makedev(5, 1), b""))  # where init's output goes
    files.append(("init", stat.S_IFREG | 0o755, 0, program.read_bytes()))
    program.unlink()
    archive = b"".join(cpio_entry(number, *file) for number, file in enumerate(files, 1))
    archive += cpio_entry(0, "TRAILER!!!", 0, 0, b"")
    (new / "initrd.cpio").write_bytes(archive)
    (new / "initrd.cpio.gz").write_bytes(gzip.compress(archive, mtime=0))


def cpio_entry(inode: int, name: str, mode: int, device: int, data: bytes) -> bytes:
    """A file in an archive of cpio, "newc": thirteen numbers of 8 hexadecimal digits, name, data.

    Each of the two is filled up to a multiple of 4 (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
    """
    links, owner, group, time, check = 1, 0, 0, 0, 0
    numbers = (
        inode, mode, owner, group, links, time, len(data),
        0, 0, os.major(device), os.minor(device), len(name) + 1, check,
    )  # fmt: skip
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


if __name__ == "__main__":
    try:
        main()
    except (Failure, OSError) as error:
        sys.exit(f"The Linux guest was not built: {error}.")
    except KeyboardInterrupt:
        sys.exit("The Linux guest was not built: interrupted.")
