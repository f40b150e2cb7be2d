"""The three files of a snapshot, and how new ones take the place of old ones: as a whole or not at all.

FreeBSD's names: NAME, NAME.kern, NAME.meta. FreeBSD writes into them directly, so that a crash or a full disk leaves
neither the old snapshot nor the new one.

One rename is atomic, but three are not together. So the moment of truth is a fourth one, and everything that follows it
can be done again by whoever comes next (a redo log, as databases have it):

    1  write and fsync NAME.unfinished, NAME.kern.unfinished, NAME.meta.unfinished
    2  fsync the directory
                                                      a crash up to here leaves the old snapshot
    3  rename NAME.meta.unfinished to NAME.meta.ready     <- in one step from the old snapshot to the new one
                                                      a crash from here on leaves the new snapshot:
    4  fsync the directory                            whoever finds NAME.meta.ready does steps 4 to 8 (again)
    5  rename NAME.unfinished to NAME,
       NAME.kern.unfinished to NAME.kern
    6  fsync the directory
    7  rename NAME.meta.ready to NAME.meta
    8  fsync the directory

After a power cut a directory may lack any of the changes since its last fsync. Steps 4, 6 and 8 put them in order: no
file takes its place before the new snapshot is certain, and NAME.meta.ready is there until all have.

A rename replaces a name and not the file behind it. A VM that was restored from NAME has mapped the old file, and keeps
it when a new one takes its name.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Callable

from mini_bhyve.snapshot_state import SnapshotError

# Suffixes of the three files, and of a file that is not yet what its name will say.
RAM = ""
KERN = ".kern"
META = ".meta"
UNFINISHED = ".unfinished"
READY = ".ready"


@contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Turn what the operating system says into a sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"cannot {action} {path}: {error.strerror or error}") from error


class SnapshotFiles:
    """The files of the snapshot `path`, and the steps from the old ones to the new ones (top of this file).

    The directory is kept open, so that all names are looked up in the same one even if it is moved meanwhile; and
    locked, so that two VMs that write the same snapshot, or one that writes it and one that reads it, do so in turn.
    """

    def __init__(self, path: str):
        directory, self.base = os.path.split(path)
        self.path = path
        if "\0" in path or self.base in ("", ".", ".."):
            raise SnapshotError(f"{path!r} is not the name of a file")
        self.committed = False
        self.directory_path = directory or "."
        with explained("open the directory", self.directory_path):
            self.directory = os.open(self.directory_path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with explained("lock the directory", self.directory_path):
                fcntl.flock(self.directory, fcntl.LOCK_EX)
        except SnapshotError:
            os.close(self.directory)
            raise

    def __enter__(self) -> SnapshotFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # there is nothing unwritten in it that could be lost
            os.close(self.directory)  # and with it goes the lock

    def check_names(self) -> None:
        """SnapshotError if a snapshot of this name would replace something else: a directory, a disk image."""
        modes = {suffix: self._mode(suffix) for suffix in (RAM, KERN, META)}
        for suffix, mode in modes.items():
            if mode is not None and not stat.S_ISREG(mode):
                raise SnapshotError(f"{self.path}{suffix} exists and is not a regular file")
        if modes[RAM] is not None and modes[META] is None:
            raise SnapshotError(f"{self.path} exists and is not a snapshot: there is no {self.path}{META} beside it")

    def write_new(self, suffix: str, write: Callable[[int], None]) -> None:
        """Step 1 for one file: make it, let `write(descriptor)` fill it, and see it to the disk."""
        with explained("write", self.path + suffix + UNFINISHED):
            descriptor = os.open(
                self.base + suffix + UNFINISHED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.directory
            )
            try:
                write(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def commit(self) -> None:
        """Steps 2 to 8."""
        self._fsync_directory()
        self._rename(META + UNFINISHED, META + READY)
        self.committed = True
        self.finish_interrupted()

    def finish_interrupted(self) -> None:
        """Steps 4 to 8, as far as they are still to be done; nothing if no NAME.meta.ready is there."""
        if self._mode(META + READY) is None:
            return
        self._fsync_directory()
        for suffix in (RAM, KERN):
            if self._mode(suffix + UNFINISHED) is not None:
                self._rename(suffix + UNFINISHED, suffix)
        self._fsync_directory()
        self._rename(META + READY, META)
        self._fsync_directory()

    def remove_unfinished(self) -> None:
        """Remove what an interrupted step 1 left.

        The fsync also sees to it that the last rename of the checkpoint before this one (step 7) is on the disk. Were
        it still to be lost in a power cut, NAME.meta.ready would come back, and take the next unfinished files for its
        own.
        """
        for suffix in (META, KERN, RAM):
            with explained("remove", self.path + suffix + UNFINISHED), suppress(FileNotFoundError):
                os.unlink(self.base + suffix + UNFINISHED, dir_fd=self.directory)
        self._fsync_directory()

    def open(self, suffix: str) -> BinaryIO:
        """Open one of the three files to read. SnapshotError if there is none."""
        with explained("open", self.path + suffix):
            # O_NONBLOCK, because to open a named pipe would wait for somebody to write.
            descriptor = os.open(self.base + suffix, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self.directory)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise SnapshotError(f"{self.path}{suffix} is not a regular file")
        return os.fdopen(descriptor, "rb")

    def _mode(self, suffix: str) -> int | None:
        with explained("look at", self.path + suffix):
            try:
                return os.stat(self.base + suffix, dir_fd=self.directory, follow_symlinks=False).st_mode
            except FileNotFoundError:
                return None

    def _rename(self, old: str, new: str) -> None:
        with explained("rename", self.path + old):
            os.rename(self.base + old, self.base + new, src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def _fsync_directory(self) -> None:
        with explained("write", self.directory_path):
            os.fsync(self.directory)
