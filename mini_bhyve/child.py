"""Work done by a child process, on memory as it was when the child was made.

FreeBSD has no counterpart: bhyve writes guest memory while the guest stands still. Here fork(2) does what a camera
does. The child gets all of our private memory as it is at that instant, and nothing is copied for it: both processes
have the same pages, and only when one of them writes to a page, the kernel gives it a copy of its own (copy on write).

    parent                                   child
    ChildTask(work) ------- fork ----------> work(tell)
      goes on at once                          |  tell(done, total)
      fileno() is readable   <---- pipe -----  +--  a line of JSON, some ten times a second
      finished()                               |
      check(): SnapshotError, or nothing <---- +--  the last line: how it ended
                                             exit

So a guest stands still only as long as fork() takes, which copies no memory but the page tables.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import threading
import time
import warnings
from typing import BinaryIO, Callable, NoReturn

from mini_bhyve.snapshot_state import SnapshotError

Tell = Callable[[int, int], None]
Work = Callable[[Tell], None]

# SIGTERM is how bhyve is asked to press the power button. A closed terminal (SIGHUP) and keys (SIGINT, SIGQUIT, which a
# raw terminal does not send) mean the same.
ENDING_SIGNALS = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT}
STANDARD = (0, 1, 2)  # the descriptors of standard input, output and error
TELL_INTERVAL = 0.1  # seconds between two lines of progress
MAX_DESCRIPTORS = 1 << 16  # a limit on open files may be a thousand million, but a VM has a handful


class ChildTask:
    """`work(tell)`, done by a child process, or by this one before the constructor returns, where it cannot fork.

    `what` is what it does, for the sentence on how it failed: "write vm.ckp". Of the descriptors above standard error
    the child has only `descriptors`: a socket or a terminal that it kept open would outlive the VM. It is nicer to
    other processes by `nice` (nice(2)): with 10 it takes a tenth of a CPU that we want, too.

    `done` and `total` are how far it has come, in bytes; `refused` is why there is no child, or empty. Any thread may
    ask how it goes on.
    """

    def __init__(self, what: str, work: Work, descriptors: tuple[int, ...] = (), nice: int = 0):
        self.what = what
        self.done = self.total = 0
        self.refused = ""
        self._outcome: str | None = None  # "" is success
        self._lines = b""
        self._asking = threading.Lock()
        try:
            reading, writing = os.pipe()
        except OSError as error:
            raise SnapshotError(f"cannot {what}: {error.strerror}") from error
        self._reader: BinaryIO = open(reading, "rb", buffering=0)
        writer: BinaryIO = open(writing, "wb", buffering=0)
        self._pid: int | None = None
        # Keys on the terminal and its end are for the VM. It waits for the child when it ends, so that nothing is lost.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        try:
            self._pid = _fork()
            if self._pid == 0:
                _be_the_child(writer, work, descriptors, nice)
        except (AttributeError, OSError) as error:  # no such call on this system, or no memory or process to be had
            self.refused = str(getattr(error, "strerror", None) or "this system cannot fork")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if self._pid is None:
            _put_line(writer, {"outcome": _outcome(work, lambda done, total: None)})
        writer.close()

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to be learnt by finished()."""
        return self._reader.fileno()

    def finished(self) -> bool:
        """Take in what the child has told, without waiting; whether it has ended."""
        with self._asking:
            while self._outcome is None and self._news(0):
                self._hear(self._reader.read(65536))
            return self._outcome is not None

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most so long; whether it has."""
        end = None if seconds is None else time.monotonic() + seconds
        while not self.finished():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            # Another thread may take in the last line before we see it: so look again now and then.
            self._news(TELL_INTERVAL if left is None else min(left, TELL_INTERVAL))
        return True

    def check(self) -> None:
        """Wait until it has ended. SnapshotError if it failed."""
        self.wait()
        if self._outcome:
            raise SnapshotError(self._outcome)

    def cancel(self) -> None:
        """End the child at once: nobody wants to know any more."""
        with self._asking:
            if self._outcome is None and self._pid:
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Give back the descriptor. To be called once it has ended, by who has waited for that."""
        self._reader.close()

    def _news(self, seconds: float) -> bool:
        """Wait so long for something from the child. (Not with select(2), which knows no descriptor above 1023.)"""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _hear(self, data: bytes | None) -> None:
        """Some bytes from the child; b"" is the end, with its last line or without."""
        *lines, self._lines = (self._lines + (data or b"")).split(b"\n")
        told = [json.loads(line) for line in lines]
        for line in told:
            self.done, self.total = line.get("done", self.done), line.get("total", self.total)
        outcome = told[-1].get("outcome") if told else None
        if outcome is not None or not data:
            status = self._reap()
            self._outcome = f"cannot {self.what}: {status}" if outcome is None else outcome

    def _reap(self) -> str:
        """Let the child go, and say what became of it."""
        if self._pid:
            with contextlib.suppress(ChildProcessError):  # we were started to ignore SIGCHLD: the kernel has reaped it
                status = os.waitpid(self._pid, 0)[1]
                if os.WIFSIGNALED(status):
                    return f"the process that did it was ended by {_signal_name(os.WTERMSIG(status))}"
        return "the process that did it has ended before its time"


def _fork() -> int:
    """fork(2). Python warns of it where there are threads: the child has none of them, but the locks that they held.

    What the child does (system calls, hashlib, json) takes none of Python's; those of the C library are put in order.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _be_the_child(writer: BinaryIO, work: Work, descriptors: tuple[int, ...], nice: int) -> NoReturn:
    """What the child does; it never returns to the parent's code."""
    try:
        # What is collected here would be the parent's: a socket object, say, whose descriptor has another meaning here.
        gc.disable()
        os.nice(nice)
        _lead_standard_descriptors_nowhere()
        close_all_but({*STANDARD, writer.fileno(), *descriptors})
        told_at = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal told_at
            if time.monotonic() - told_at >= TELL_INTERVAL:
                _put_line(writer, {"done": done, "total": total})
                told_at = time.monotonic()

        _put_line(writer, {"outcome": _outcome(work, tell)})
    finally:
        os._exit(0)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _lead_standard_descriptors_nowhere() -> None:
    """Who reads a pipe waits for its end, and we are not to keep it open."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in STANDARD:
        os.dup2(nowhere, standard)


def close_all_but(kept: set[int]) -> None:
    """Close all descriptors but these: what a child process has of its parent, it would keep open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = MAX_DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit, MAX_DESCRIPTORS)
    edges = [-1, *sorted(kept), limit]
    for before, after in zip(edges, edges[1:]):
        if before + 1 < after:  # CPython takes closerange(0, 0) for all there are
            os.closerange(before + 1, after)


def _outcome(work: Work, tell: Tell) -> str:
    """Do the work; "" if it succeeds, else why not."""
    try:
        work(tell)
    except SnapshotError as error:
        return str(error)
    except Exception as error:  # a mistake of ours, but the VM shall go on and somebody hear of it
        return f"failed unexpectedly: {type(error).__name__}: {error}"
    return ""


def _put_line(writer: BinaryIO, line: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the VM was killed; what it asked for is done all the same
        writer.write(json.dumps(line).encode() + b"\n")
