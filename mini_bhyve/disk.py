"""A disk's contents: an image file on the host, read and written by sectors.

Mirrors usr.sbin/bhyve/block_if.c of FreeBSD: blockif_open, _read, _write, _flush, _size, _is_ro. There, a thread for
each request; here a request is done at once, because the time that it takes the guest is virtual.

The image is nothing but the disk's sectors, one behind the other. Two machines that write to the same one would ruin
it, so it is locked while it is in use (flock(2), which holds among those who ask for it).
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
import weakref
from typing import Callable

from mini_bhyve.sparse import checksum_of_file

SECTOR_SIZE = 512

# Nanoseconds within which two writes may leave a file with the same time of change: it is that of the kernel's last
# clock tick, of which there are at least 100 a second.
SAME_TICK = 20_000_000


class DiskError(Exception):
    """An image cannot be used as a disk; the message is one sentence for the user."""


class DiskImage:
    """An image file that is open. `sectors` is its size. OSError if the host cannot do what is asked for.

    DiskError, when it is opened, if it cannot be a disk.
    """

    def __init__(self, path: str, read_only: bool = False):
        self.path = path
        self.read_only = read_only
        try:
            # Asked before it is opened: to open a named pipe would wait for somebody at its other end.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise DiskError(f"{path} cannot be a disk: it is not a regular file")
            self.descriptor = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        except OSError as error:
            purpose = "read" if read_only else "read and write"
            hint = "" if read_only or isinstance(error, FileNotFoundError) else " (for a disk to be read only, add ,ro)"
            raise DiskError(f"cannot {purpose} the disk {path}: {error.strerror}{hint}") from None
        except ValueError:
            raise DiskError(f"{path!r} is not a file name") from None
        self.close = weakref.finalize(self, os.close, self.descriptor)  # also lets go of the lock
        self._lock()
        size = os.fstat(self.descriptor).st_size
        if size % SECTOR_SIZE or not size:
            raise DiskError(f"{path} cannot be a disk: it has {size} bytes, not one or more sectors of {SECTOR_SIZE}")
        self.sectors = size // SECTOR_SIZE
        # Called before each write; while it is not known whether the guest may go on, it waits (Machine.hold_back).
        self.before_write: Callable[[], None] = lambda: None
        self._told_modified: int | None = None

    def _lock(self) -> None:
        """One machine that writes, or any number that only read."""
        try:
            fcntl.flock(self.descriptor, (fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DiskError(f"the disk {self.path} is in use already, and one of the two would write to it") from None

    def read(self, sector: int, count: int) -> bytes:
        """`count` sectors from `sector` on, all of them on the disk."""
        data = os.pread(self.descriptor, count * SECTOR_SIZE, sector * SECTOR_SIZE)
        if len(data) < count * SECTOR_SIZE:
            raise OSError(f"{self.path} has become shorter")
        return data

    def write(self, sector: int, data: bytes | bytearray) -> None:
        """Whole sectors from `sector` on. They are in the file then, but not yet certain to outlive the host."""
        self.before_write()
        if self._told_modified is not None:
            self._pass_tick(self._told_modified)
        view, offset = memoryview(data), sector * SECTOR_SIZE
        while view:
            written = os.pwrite(self.descriptor, view, offset)
            view, offset = view[written:], offset + written

    def flush(self) -> None:
        """What has been written so far will outlive the host."""
        os.fsync(self.descriptor)

    def modified(self) -> int:
        """When the image was last changed (ns since 1970). The next write, however soon, will make it another time."""
        self._told_modified = os.fstat(self.descriptor).st_mtime_ns
        return self._told_modified

    def _pass_tick(self, told: int) -> None:
        """Let the clock that files are stamped by move on from the time `told`."""
        self._told_modified = None
        time.sleep(min(max(0, told + SAME_TICK - time.time_ns()), SAME_TICK) / 1e9)

    def checksum(self) -> str:
        """The checksum (sparse.py) of all that is on the disk."""
        return checksum_of_file(self.descriptor, self.sectors * SECTOR_SIZE)
