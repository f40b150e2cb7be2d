"""The far end of the serial line: where bytes that the guest sends on COM1 go to, and where typed ones come from.

Mirrors FreeBSD's usr.sbin/bhyve/uart_backend.c (ttyopen, ttyread, ttywrite). The UART sees only `read`, which never
waits, and `write`, which gives back what a slow reader leaves no room for. There is a console for

    stdio               the terminal, or whatever the shell has redirected standard input and output to
    a path              a file, to which output is appended; a terminal device; or a unix socket
    a test              `ScriptedConsole`: bytes to be typed, bytes that were printed

A terminal is switched to raw mode while the VM runs, so that every key, Ctrl-C included, is the guest's. What is left
for the user begins with Ctrl-A:

    terminal --- keys ---> terminal thread --- pipe ---> read()  ---> UART ---> guest
                                |
                                +--- Ctrl-A x: leave, Ctrl-A h: help

The thread is there because the user must be able to leave also when the guest reads no input, or is paused. However
the VM ends, the terminal is as before: what a process that was killed cannot do any more, its guard does (`Guard`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import stat
import sys
import termios
import threading
from typing import Callable, NoReturn

from mini_bhyve.child import close_all_but

ESCAPE = 0x01  # Ctrl-A

HELP = (
    b"\r\n"
    b"Ctrl-A x       leave: the VM is powered off\r\n"
    b"Ctrl-A h       this help\r\n"
    b"Ctrl-A Ctrl-A  send one Ctrl-A to the guest\r\n"
)

# How long, in seconds, a console in the background goes without looking whether that is still so.
LOOK_AGAIN = 0.1

# Once select() says that a pipe can be written to, this many bytes never block (POSIX: PIPE_BUF is at least 512).
WRITE_AT_ONCE = 512


class ConsoleError(Exception):
    """The console cannot be opened or written to; the message is one sentence for the user."""


def nobody_listens(reason: str) -> None:
    """The `on_leave` of a console that has not been connected to a machine."""


class Console:
    """What all consoles have in common. `with console:` closes it in the end, and undoes what `start` did.

    `on_leave` is called, from any thread, with the reason when whoever sat at the console is gone for good.
    """

    is_terminal = False

    def __init__(self) -> None:
        self.on_leave: Callable[[str], None] = nobody_listens

    def start(self) -> None:
        """The VM is about to run: take over the terminal, if it is one."""

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes of input, without waiting; b"" if there is nothing now."""
        return b""

    def write(self, data: bytes) -> bytes | None:
        """As much of `data` as there is room for, without waiting; the rest is returned. Raises ConsoleError."""

    @property
    def wait_fd(self) -> int | None:
        """The descriptor that select() finds readable when there is input; None if there will never be any."""
        return None

    @property
    def room_fd(self) -> int | None:
        """The descriptor that select() finds writable when there is room again; None if there is always."""
        return None

    def suspend(self) -> None:
        """The process is about to be stopped by job control."""

    def resume(self) -> None:
        """The process runs again after it was stopped."""

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class ScriptedConsole(Console):
    """A console in memory. `input` is what is still to be typed, `output` what the guest has printed."""

    def __init__(self, typed: bytes = b"") -> None:
        super().__init__()
        self.input = bytearray(typed)
        self.output = bytearray()

    def read(self, limit: int) -> bytes:
        taken = bytes(self.input[:limit])
        del self.input[:limit]
        return taken

    def write(self, data: bytes) -> None:
        self.output += data


class DescriptorConsole(Console):
    """A console on file descriptors, either of which may be None.

    The descriptors are never made non-blocking: that flag belongs to the open file and not to the descriptor, so a
    shell that shares the terminal would find its own reads failing. select() is asked instead.
    """

    def __init__(self, input_fd: int | None, output_fd: int | None) -> None:
        super().__init__()
        self._input_fd = input_fd
        self._output_fd = output_fd

    def read(self, limit: int) -> bytes:
        if self._input_fd is None or limit == 0 or not select.select([self._input_fd], [], [], 0)[0]:
            return b""
        try:
            data = os.read(self._input_fd, limit)
        except BlockingIOError:  # somebody else has set O_NONBLOCK, and yet another one was quicker
            return b""
        except OSError:  # a terminal that was hung up
            data = b""
        if not data:
            self._input_fd = None  # end of file: an end that is asked for again is readable for ever
        return data

    @property
    def wait_fd(self) -> int | None:
        return self._input_fd

    def write(self, data: bytes) -> bytes:
        while data and self._output_fd is not None and select.select([], [self._output_fd], [], 0)[1]:
            try:
                data = data[os.write(self._output_fd, data[:WRITE_AT_ONCE]) :]
            except BlockingIOError:
                break
            except OSError as error:
                self._output_fd = None
                if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.EIO):  # EIO: a terminal that was hung up
                    self.on_leave("nobody is left to read the console")
                else:
                    raise ConsoleError(f"cannot write to the console: {error.strerror}") from None
        return b"" if self._output_fd is None else data

    @property
    def room_fd(self) -> int | None:
        return self._output_fd


# The local modes of a cooked terminal: echo, editing of the line, and keys that raise signals.
COOKED = termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG


class Guard:
    """A second process, which restores the terminal if ours dies before it can: of SIGKILL, SIGSEGV, a SIGUSR1.

        VM --- the mode to restore, or null: nothing to do ---> guard --- when the pipe ends ---> terminal

    However a process dies, the kernel closes its descriptors. Only the VM holds the pipe's upper end, so the lower one
    comes to its end when the VM does. Whoever was waiting for the VM may see the restored mode a moment later.
    """

    def __init__(self, terminal_fd: int) -> None:
        """Fork. Not to be called when there are threads: the child would find locks held by threads it has not got.

        Raises OSError.
        """
        pipe_out, self._pipe_in = os.pipe()  # not inheritable: a program that the VM starts does not keep it open
        # No signal is for the guard, and none may come before it has said so.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._pid = os.fork()
            if self._pid == 0:
                os.close(self._pipe_in)  # or we would wait for ourselves
                self._stand_guard(pipe_out, terminal_fd)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(pipe_out)

    @staticmethod
    def _stand_guard(pipe_fd: int, terminal_fd: int) -> NoReturn:
        try:
            # A session of its own, because a shell's `kill -KILL %1` is for the VM's whole process group.
            os.setsid()
            # What the VM has open must not stay open through us: a reader of its output waits for the end.
            close_all_but({pipe_fd, terminal_fd})
            mode = None
            with open(pipe_fd, "rb") as told:
                for line in told:
                    mode = json.loads(line)
            # If the terminal is not raw any more, the shell was quicker, and its mode is the right one.
            if mode is not None and not termios.tcgetattr(terminal_fd)[3] & COOKED:
                termios.tcsetattr(terminal_fd, termios.TCSANOW, mode)
        finally:
            # Whatever happened (the terminal may have been hung up): this process never returns to the VM's code.
            os._exit(0)

    def restore(self, mode: list | None) -> None:
        """What to do, from now on, when the VM dies: restore this mode (of termios.tcgetattr), or nothing."""
        line = json.dumps(mode, default=ord).encode() + b"\n"  # ord: control characters are bytes of length 1
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the guard; the VM can do without
            os.write(self._pipe_in, line)  # all or nothing, since it is shorter than PIPE_BUF

    def close(self) -> None:
        """The VM ends in order: dismiss the guard."""
        os.close(self._pipe_in)
        with contextlib.suppress(ChildProcessError):  # we were started to ignore SIGCHLD: the kernel has reaped it
            os.waitpid(self._pid, 0)


class RawMode:
    """Raw mode of one terminal: every key arrives at once, unchanged, without echo, and none raises a signal.

    Output processing (OPOST) stays as the user has it, so that a guest that sends bare newlines is readable.
    """

    def __init__(self, fd: int) -> None:
        """Raises OSError."""
        self._fd = fd
        self._saved: list | None = None
        # Here and not in `enter`: the console is opened before the VM has its threads, and its memory to be copied.
        self._guard = Guard(fd)

    def in_foreground(self) -> bool:
        """Whether job control lets us use the terminal: in the background a read or a mode change stops the process."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True  # not our controlling terminal, so there is no job control on it

    def enter(self) -> None:
        """Switch to raw mode; again, if somebody else has changed the mode meanwhile."""
        if not self.in_foreground():
            return
        with contextlib.suppress(termios.error):  # a terminal that was hung up
            if self._saved is None:
                self._saved = termios.tcgetattr(self._fd)
                self._guard.restore(self._saved)
            iflag, oflag, cflag, lflag, ispeed, ospeed, cc = self._saved
            iflag &= ~(termios.BRKINT | termios.ICRNL | termios.IGNCR | termios.INLCR | termios.ISTRIP | termios.IXON)
            cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            lflag &= ~COOKED
            cc = list(cc)
            cc[termios.VMIN], cc[termios.VTIME] = 1, 0
            termios.tcsetattr(self._fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])

    def leave(self) -> None:
        """Back to the mode before `enter`. In the background the mode is the shell's, and stays."""
        if self._saved is not None and self.in_foreground():
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
        self._saved = None
        self._guard.restore(None)

    def close(self) -> None:
        """`leave`, for good."""
        self.leave()
        self._guard.close()


class TerminalConsole(DescriptorConsole):
    """The user's terminal, raw between `start` and `__exit__`."""

    is_terminal = True

    def __init__(self, terminal_fd: int, output_fd: int | None) -> None:
        pipe_out, self._pipe_in = os.pipe()
        os.set_blocking(self._pipe_in, False)
        super().__init__(pipe_out, output_fd)
        self._pipe_out = pipe_out
        self._terminal_fd = terminal_fd
        self._raw = RawMode(terminal_fd)
        self._escaped = False  # the last key was Ctrl-A
        self._changing_mode = threading.Lock()
        self._stopped = False  # by job control: the terminal thread must not make it raw again
        self._quit_out, self._quit_in = os.pipe()
        self._thread = threading.Thread(target=self._terminal_thread, name="terminal", daemon=True)

    def start(self) -> None:
        self._raw.enter()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:  # it was started
            os.write(self._quit_in, b"q")
            self._thread.join()
        self._raw.close()
        for fd in (self._quit_in, self._quit_out, self._pipe_in, self._pipe_out):
            os.close(fd)
        self._input_fd = None

    def suspend(self) -> None:
        with self._changing_mode:
            self._stopped = True
            self._raw.leave()

    def resume(self) -> None:
        with self._changing_mode:
            self._stopped = False
            self._raw.enter()

    def _terminal_thread(self) -> None:
        """Carry keys from the terminal to the pipe that `read` reads, until `__exit__` or the terminal's end."""
        while True:
            if self._raw.in_foreground():
                with self._changing_mode:
                    if not self._stopped:
                        self._raw.enter()
                ready = select.select([self._terminal_fd, self._quit_out], [], [])[0]
            else:
                ready = select.select([self._quit_out], [], [], LOOK_AGAIN)[0]
            if self._quit_out in ready:
                return
            if self._terminal_fd in ready and self._raw.in_foreground():
                try:
                    keys = os.read(self._terminal_fd, 1024)
                except BlockingIOError:
                    continue
                except OSError:
                    keys = b""
                if not keys:
                    self.on_leave("the terminal is gone")
                    return
                self._type(self._take_escapes(keys))

    def _take_escapes(self, keys: bytes) -> bytes:
        """Do what the keys after a Ctrl-A ask for; the other keys are returned, for the guest."""
        for_guest = bytearray()
        for key in keys:
            if not self._escaped:
                if key == ESCAPE:
                    self._escaped = True
                else:
                    for_guest.append(key)
                continue
            self._escaped = False
            if key == ESCAPE:
                for_guest.append(ESCAPE)
            elif key == ord("x"):
                self.on_leave("left with Ctrl-A x")
            else:
                self.write(HELP)
        return bytes(for_guest)

    def _type(self, keys: bytes) -> None:
        """Into the pipe; what a guest that never reads leaves no room for is lost, with a bell, as on any terminal."""
        try:
            typed = os.write(self._pipe_in, keys) if keys else 0
        except BlockingIOError:
            typed = 0
        if typed < len(keys):
            self.write(b"\a")


class DeviceConsole(DescriptorConsole):
    """A terminal device named by its path (bhyve's `-l com1,/dev/nmdm0A`): raw, and without keys of our own."""

    is_terminal = True

    def __init__(self, fd: int) -> None:
        super().__init__(fd, fd)
        self._fd = fd
        self._raw = RawMode(fd)

    def start(self) -> None:
        self._raw.enter()

    def __exit__(self, *_: object) -> None:
        self._raw.close()
        os.close(self._fd)
        self._input_fd = self._output_fd = None


class SocketConsole(Console):
    """A unix stream socket. We listen, and serve one client at a time; without a client the cable is unplugged.

    If somebody listens there already, we are the client: so two VMs can share a null-modem cable.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        super().__init__()
        self._path = path
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(path)
            client.setblocking(False)
            self._client = client
        except (FileNotFoundError, ConnectionRefusedError):  # no socket, or one that a dead process left behind
            client.close()
            self._listen()

    def _listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(0o177)  # the console is its owner's alone
        try:
            self._listener.bind(self._path)
        finally:
            os.umask(umask)
        self._listener.listen(1)
        self._listener.setblocking(False)

    def _plugged_in(self) -> socket.socket | None:
        if self._client is None and self._listener is not None:
            with contextlib.suppress(OSError):  # nobody, or a client that has changed its mind
                self._client = self._listener.accept()[0]
                self._client.setblocking(False)
        return self._client

    def _unplug(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def read(self, limit: int) -> bytes:
        client = self._plugged_in()
        if client is None or limit == 0:
            return b""
        try:
            data = client.recv(limit)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._unplug()
        return data

    def write(self, data: bytes) -> bytes:
        client = self._plugged_in()
        try:
            while data and client is not None:
                data = data[client.send(data) :]
        except BlockingIOError:
            return data
        except OSError:
            self._unplug()
        return b""

    @property
    def room_fd(self) -> int | None:
        return None if self._client is None else self._client.fileno()

    @property
    def wait_fd(self) -> int | None:
        end = self._client or self._listener
        return None if end is None else end.fileno()

    def __exit__(self, *_: object) -> None:
        self._unplug()
        if self._listener is not None:
            self._listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)


class FileConsole(DescriptorConsole):
    """Output goes to the end of a file, as to a printer; there is no input."""

    def __init__(self, fd: int) -> None:
        super().__init__(None, fd)
        self._fd = fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        self._output_fd = None


def is_socket(path: str) -> bool:
    """Whether the path is a socket, or has the name of one that is not there yet."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return path.endswith(".sock")


def open_console(path: str) -> Console:
    """The console for a value of `lpc.com1.path`: `stdio`, or the path of a file, a terminal device or a unix socket.

    Raises ConsoleError.
    """
    if path == "stdio":
        # Python sets these to None if the descriptors were closed when it started.
        stdin = None if sys.stdin is None else 0
        stdout = None if sys.stdout is None else 1
        if stdin is not None and os.isatty(stdin):
            return TerminalConsole(stdin, stdout)
        return DescriptorConsole(stdin, stdout)
    try:
        if is_socket(path):
            return SocketConsole(path)
        if os.path.exists(path) and stat.S_ISCHR(os.stat(path).st_mode):
            fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
            return DeviceConsole(fd) if os.isatty(fd) else FileConsole(fd)
        return FileConsole(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
    except OSError as error:
        raise ConsoleError(f"cannot open the console {path}: {error.strerror or error}") from None
