"""A VM in front of which a user sits: a process on a pseudo-terminal of its own."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import termios
import time
from typing import Any, Callable

from vm_tools import ROOT


class VmOnTerminal:
    """A VM whose standard input, output and errors are a pseudo-terminal, and the user in front of it.

    The terminal is the VM's controlling one, as under a login shell: keys may raise signals, and closing it hangs up.
    """

    def __init__(self, arguments: list[str], stdout: int | None = None) -> None:
        """`stdout` is where standard output goes, if not to the terminal."""
        self.user, self.terminal = os.openpty()
        self.before = termios.tcgetattr(self.terminal)
        self.shown = b""
        # The session's leader takes the terminal, then becomes the VM. (preexec_fn would not do under PyPy's threads.)
        # A test that kills it wants no core file.
        take = (
            "import fcntl, os, resource, sys, termios\n"
            "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", take, *arguments],
            stdin=self.terminal, stdout=self.terminal if stdout is None else stdout, stderr=self.terminal, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip

    def mode(self) -> list:
        return termios.tcgetattr(self.terminal)

    def is_raw(self) -> bool:
        return not self.mode()[3] & (termios.ECHO | termios.ICANON | termios.ISIG)

    def look(self) -> bytes:
        """What is on the screen so far."""
        while select.select([self.user], [], [], 0)[0]:
            self.shown += os.read(self.user, 4096)
        return self.shown

    def until(self, happened: Callable[[], Any], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, self.shown
            self.look()
            time.sleep(0.01)

    def runs(self) -> VmOnTerminal:
        """Wait until the guest runs and has printed something."""
        self.until(lambda: self.is_raw() and self.look())
        return self

    def type(self, keys: bytes) -> None:
        os.write(self.user, keys)

    def exit_code(self) -> int:
        self.until(lambda: self.process.poll() is not None)
        self.look()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for fd in (self.user, self.terminal):
            with contextlib.suppress(OSError):
                os.close(fd)
