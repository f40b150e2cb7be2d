"""The three files of a snapshot, and how new ones take the place of old ones: as a whole or not at all.

FreeBSD's names: NAME, NAME.kern, NAME.meta. FreeBSD writes into them directly, so that a crash or a full disk leaves
neither the old snapshot nor the new one.

One rename is atomic, but three are not together. So the moment of truth is a fourth one, and everything that follows it
can be done again by whoever comes next (a redo log, as databases have it):

    0  remove what an interrupted step 1 left, and fsync the directory
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

There are two locks (flock(2); the kernel takes them back from a process that dies):

    the directory's          whoever has it may do steps 4 to 8 and open the three files, which then belong together.
                             It is never kept for long, and never waited for longer than LOCK_TIMEOUT: anybody who can
                             read the directory could keep it, and a VM shall not stand still for that.
    that of NAME.unfinished  whoever has it writes NAME, and the three unfinished files are theirs alone. It is never
                             waited for: a second checkpoint of this name is refused. Unfinished files without it are
                             what somebody left who was killed.

    writer                   |- begin() -|                                      |- commit() -|
                             |  step 0   |               step 1                 | 2 to 8     |
    directory locked         |===========|                                      |============|
    NAME.unfinished locked            |=======================================================| (as NAME, since step 5)
    reader                                   |= open() =|

NAME.unfinished gets and loses its name only with the directory locked, but for one case: who has its lock and gives up
removes it, as the last of the three.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO, Callable

from mini_bhyve.file_lock import lock_within, try_lock
from mini_bhyve.snapshot_state import SnapshotError

# Suffixes of the three files, and of a file that is not yet what its name will say.
RAM = ""
KERN = ".kern"
META = ".meta"
UNFINISHED = ".unfinished"
READY = ".ready"

# All names that a checkpoint may write, rename or remove.
NAMES = (RAM, KERN, META, RAM + UNFINISHED, KERN + UNFINISHED, META + UNFINISHED, META + READY)

LOCK_TIMEOUT = 5.0  # seconds to wait for the lock of the directory, which nobody needs for long


@contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Turn what the operating system says into a sentence that names the file."""
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"cannot {action} {path}: {error.strerror or error}") from error


class SnapshotFiles:
    """The files of the snapshot `path`: to read them, open(); to write them, begin(), write_new() each, commit().

    The directory is kept open, so that all names are looked up in the same one even if it is moved meanwhile. What has
    been begun and not committed is removed in the end.
    """

    def __init__(self, path: str):
        directory, self.base = os.path.split(path)
        self.path = path
        if "\0" in path or self.base in ("", ".", ".."):
            raise SnapshotError(f"{path!r} is not the name of a file")
        self.committed = False
        self._unfinished: int | None = None  # descriptor of our NAME.unfinished, which is locked
        self.directory_path = directory or "."
        with explained("open the directory", self.directory_path):
            self.directory = os.open(self.directory_path, os.O_RDONLY | os.O_DIRECTORY)

    def __enter__(self) -> SnapshotFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._unfinished is not None:
            if not self.committed:
                with suppress(SnapshotError):  # what cannot be removed now, the next checkpoint of this name removes
                    self._check_ours()
                    self._remove_unfinished()
            with suppress(OSError):  # all of it has been seen to the disk, or is not wanted
                os.close(self._unfinished)  # and with it goes the lock
        with suppress(OSError):  # there is nothing unwritten in it that could be lost
            os.close(self.directory)

    def open(self) -> tuple[BinaryIO, BinaryIO, BinaryIO]:
        """NAME.meta, NAME.kern and NAME, open to read, and all of the same snapshot. SnapshotError if one is missing.

        An interrupted checkpoint that got past its commit is finished first.
        """
        with self._directory_locked(), ExitStack() as opened:
            self._finish_interrupted()
            meta, kern, ram = (opened.enter_context(self._open(suffix)) for suffix in (META, KERN, RAM))
            opened.pop_all()
        return meta, kern, ram

    def begin(self, disks: Iterable[int]) -> None:
        """From here on, it is we who write the snapshot. SnapshotError if others do, or if other files are in the way.

        `disks` are the descriptors of the VM's disk images, which are not to be replaced.
        """
        for suffix in (KERN, META, UNFINISHED, READY):
            if self.base.endswith(suffix):
                raise SnapshotError(f"{self.path} is no name for a snapshot: {suffix} is how parts of snapshots end")
        with self._directory_locked():
            self._check_disks(disks)
            self._finish_interrupted()
            self._check_names()
            self._check_nobody_writes()
            self._remove_unfinished()
            with explained("write", self.path + UNFINISHED):
                self._unfinished = self._create(RAM)
                fcntl.flock(self._unfinished, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write_new(self, suffix: str, write: Callable[[int], None]) -> None:
        """Step 1 for one file: make it, let `write(descriptor)` fill it, and see it to the disk."""
        with explained("write", self.path + suffix + UNFINISHED):
            if suffix == RAM and self._unfinished is not None:  # begin() has made it, and it stays open
                write(self._unfinished)
                os.fsync(self._unfinished)
                return
            descriptor = self._create(suffix)
            try:
                write(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def commit(self) -> None:
        """Steps 2 to 8."""
        with self._directory_locked():
            self._check_ours()
            self._fsync_directory()
            self._rename(META + UNFINISHED, META + READY)
            self.committed = True
            self._finish_interrupted()

    @contextmanager
    def _directory_locked(self) -> Iterator[None]:
        """Lock the directory for a short while."""
        with explained("lock the directory", self.directory_path):
            if not lock_within(self.directory, LOCK_TIMEOUT):
                raise SnapshotError(f"somebody keeps the directory {self.directory_path} locked")
        try:
            yield
        finally:
            with explained("unlock the directory", self.directory_path):
                fcntl.flock(self.directory, fcntl.LOCK_UN)

    def _check_disks(self, disks: Iterable[int]) -> None:
        """SnapshotError if one of the names that we need is that of a disk image, or of a link to one."""
        with explained("compare the disks with", self.path):
            identities = {_identity(os.fstat(descriptor)) for descriptor in disks}
        for suffix in NAMES:
            with explained("look at", self.path + suffix), suppress(FileNotFoundError):
                if _identity(os.stat(self.base + suffix, dir_fd=self.directory)) in identities:
                    raise SnapshotError(f"{self.path + suffix} is a disk of this VM, and a snapshot would replace it")

    def _check_names(self) -> None:
        """SnapshotError if the three files would replace something else than the three of a snapshot."""
        modes = {suffix: self._mode(suffix) for suffix in (RAM, KERN, META)}
        for suffix, mode in modes.items():
            if mode is not None and not stat.S_ISREG(mode):
                raise SnapshotError(f"{self.path}{suffix} exists and is not a regular file")
        there = [suffix for suffix, mode in modes.items() if mode is not None]
        missing = [suffix for suffix, mode in modes.items() if mode is None]
        if there and missing:
            raise SnapshotError(
                f"{self.path}{there[0]} exists and is not part of a snapshot: "
                f"there is no {self.path}{missing[-1]} beside it"
            )

    def _check_nobody_writes(self) -> None:
        """SnapshotError if somebody has NAME.unfinished locked. The directory is locked, so nobody can begin now."""
        mode = self._mode(UNFINISHED)
        if mode is None or not stat.S_ISREG(mode):
            return
        with explained("open", self.path + UNFINISHED):
            try:
                descriptor = os.open(self.base + UNFINISHED, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.directory)
            except FileNotFoundError:  # who wrote it has given up just now
                return
            try:
                if not try_lock(descriptor):
                    raise SnapshotError(f"{self.path} is being written by another process")
            finally:
                os.close(descriptor)

    def _check_ours(self) -> None:
        """SnapshotError if NAME.unfinished is not the file that we have locked: then it is not we who write NAME."""
        with explained("look at", self.path + UNFINISHED):
            found = os.stat(self.base + UNFINISHED, dir_fd=self.directory, follow_symlinks=False)
            ours = self._unfinished is not None and _identity(os.fstat(self._unfinished)) == _identity(found)
        if not ours:
            raise SnapshotError(f"somebody has replaced {self.path}{UNFINISHED} while it was written")

    def _finish_interrupted(self) -> None:
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

    def _remove_unfinished(self) -> None:
        """Step 0. NAME.unfinished goes last: until then nobody else begins to write.

        The fsync also sees to it that the last rename of the checkpoint before this one (step 7) is on the disk. Were
        it still to be lost in a power cut, NAME.meta.ready would come back, and take the next unfinished files for its
        own.
        """
        for suffix in (META, KERN, RAM):
            with explained("remove", self.path + suffix + UNFINISHED), suppress(FileNotFoundError):
                os.unlink(self.base + suffix + UNFINISHED, dir_fd=self.directory)
        self._fsync_directory()

    def _create(self, suffix: str) -> int:
        """A new unfinished file, open to be written. OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        return os.open(self.base + suffix + UNFINISHED, flags, 0o600, dir_fd=self.directory)

    def _open(self, suffix: str) -> BinaryIO:
        """Open one of the three files to read."""
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


def _identity(status: os.stat_result) -> tuple[int, int]:
    """What two names of the same file have in common, and no other file has."""
    return status.st_dev, status.st_ino
