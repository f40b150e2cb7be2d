"""The consoles, against the real things: pipes, files, sockets, and pseudo-terminals of the host's kernel."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import tempfile
import termios
import threading
import time

import pytest

from mini_bhyve.console import (
    HELP,
    Console,
    ConsoleError,
    DescriptorConsole,
    DeviceConsole,
    FileConsole,
    ScriptedConsole,
    SocketConsole,
    TerminalConsole,
    open_console,
)


def soon(happened, seconds: float = 5) -> bool:
    """Whether it happens before the time is over."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def read_all(console: Console, count: int) -> bytes:
    """What the console delivers until `count` bytes are there (or nothing more comes)."""
    data = bytearray()
    soon(lambda: data.extend(console.read(16)) or len(data) >= count, seconds=2)
    return bytes(data)


def write_all(console: Console, data: bytes) -> None:
    """All of it, waiting for room as the machine does."""
    while data := console.write(data) or b"":
        assert select.select([], [console.room_fd], [], 5)[1]


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


# --- A console in memory ---


def test_a_scripted_console_types_its_input_in_the_pieces_asked_for_and_keeps_the_output():
    console = ScriptedConsole(b"hello")
    assert [console.read(2), console.read(0), console.read(9), console.read(9)] == [b"he", b"", b"llo", b""]
    console.write(b"ab")
    console.write(b"c")
    assert console.output == b"abc"


# --- Pipes and files as standard input and output ---


def test_a_read_takes_no_more_than_it_asked_for_and_never_waits(pipe):
    reader, writer = pipe
    console = DescriptorConsole(reader, None)
    assert console.read(16) == b""
    os.write(writer, b"0123456789")
    assert console.read(0) == b"", "asking for nothing is not the end of the file"
    assert console.read(4) == b"0123"
    assert console.read(16) == b"456789"
    assert console.read(16) == b""


def test_after_the_end_of_its_input_a_console_is_not_waited_for_again(pipe):
    reader, writer = pipe
    console = DescriptorConsole(reader, None)
    os.write(writer, b"last")
    os.close(writer)
    assert console.wait_fd == reader
    assert console.read(16) == b"last"
    assert console.read(16) == b""
    assert console.wait_fd is None, "an end of file is readable for ever: who selects on it would spin"


def test_a_regular_file_is_read_byte_for_byte_without_delay(tmp_path):
    path = tmp_path / "input"
    path.write_bytes(bytes(range(256)))
    with open(path, "rb") as file:
        console = DescriptorConsole(file.fileno(), None)
        assert b"".join(console.read(16) for _ in range(16)) == bytes(range(256))
        assert console.read(16) == b"" and console.wait_fd is None


def test_no_byte_is_lost_on_a_full_pipe_with_a_slow_reader(pipe):
    reader, writer = pipe
    console = DescriptorConsole(None, writer)
    sent = os.urandom(300_000)
    received = bytearray()

    def read_slowly():
        while len(received) < len(sent):
            received.extend(os.read(reader, 9999))
            time.sleep(0.002)

    thread = threading.Thread(target=read_slowly)
    thread.start()
    for start in range(0, len(sent), 7000):
        write_all(console, sent[start : start + 7000])
    thread.join()
    assert bytes(received) == sent


def test_no_byte_is_lost_where_somebody_else_made_the_pipe_non_blocking(pipe):
    reader, writer = pipe
    os.set_blocking(writer, False)
    console = DescriptorConsole(None, writer)
    sent = os.urandom(200_000)
    thread = threading.Thread(target=write_all, args=(console, sent))
    thread.start()
    received = b""
    while len(received) < len(sent):
        received += os.read(reader, 5000)
    thread.join()
    assert received == sent


def test_reading_and_writing_leave_the_flags_of_a_shared_descriptor_alone(pipe):
    reader, writer = pipe
    console = DescriptorConsole(reader, writer)
    console.write(b"x")
    console.read(16)
    assert os.get_blocking(reader) and os.get_blocking(writer)


def test_a_write_gives_back_what_a_full_pipe_has_no_room_for_and_never_waits(pipe):
    reader, writer = pipe
    console = DescriptorConsole(None, writer)
    sent = os.urandom(1 << 20)
    rest = console.write(sent)
    assert 0 < len(rest) < len(sent) and sent.endswith(rest)
    assert console.room_fd == writer and not select.select([], [console.room_fd], [], 0)[1]
    assert console.write(b"x") == b"x"
    assert os.read(reader, 1 << 20) == sent[: len(sent) - len(rest)]
    assert console.write(b"x") == b""


def test_when_the_reader_of_a_pipe_is_gone_the_machine_is_told_once_and_output_is_dropped(pipe):
    reader, writer = pipe
    console = DescriptorConsole(None, writer)
    reasons: list[str] = []
    console.on_leave = reasons.append
    os.close(reader)
    console.write(b"x")
    console.write(b"y")
    assert reasons == ["nobody is left to read the console"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_is_reported_as_an_error_of_the_console():
    with open_console("/dev/full") as console, pytest.raises(ConsoleError, match="cannot write to the console: No sp"):
        console.write(b"x")


# --- Files ---


def test_output_to_a_file_is_appended_so_that_a_restored_vm_goes_on_in_the_same_log(tmp_path):
    path = tmp_path / "log"
    for text in (b"before ", b"after"):
        with open_console(str(path)) as console:
            assert isinstance(console, FileConsole) and not console.is_terminal
            console.write(text)
            assert console.read(16) == b"" and console.wait_fd is None
    assert path.read_bytes() == b"before after"


@pytest.mark.parametrize("path", ["", "/", "/nonexistent/log", "/nonexistent/com1.sock"])
def test_a_console_that_cannot_be_opened_is_one_sentence_with_its_name(path):
    with pytest.raises(ConsoleError, match=f"^cannot open the console {path}: [A-Z]"):
        open_console(path)


# --- Unix sockets ---


@pytest.fixture
def socket_path():
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        yield os.path.join(directory, "com1.sock")


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(path)
    client.settimeout(5)
    return client


def test_a_socket_console_listens_for_its_owner_only_and_removes_the_socket(socket_path):
    with open_console(socket_path) as console:
        assert isinstance(console, SocketConsole)
        assert stat.S_IMODE(os.stat(socket_path).st_mode) & 0o077 == 0
    assert not os.path.exists(socket_path)


def test_output_without_a_client_is_dropped_and_with_one_goes_both_ways(socket_path):
    with open_console(socket_path) as console:
        console.write(b"unheard")
        with connect(socket_path) as client:
            client.sendall(b"typed")
            assert read_all(console, 5) == b"typed"
            console.write(b"printed")
            assert client.recv(100) == b"printed"


def test_clients_of_a_socket_console_are_served_one_after_the_other(socket_path):
    with open_console(socket_path) as console:
        with connect(socket_path) as first:
            console.write(b"1")
            assert first.recv(100) == b"1"
            second = connect(socket_path)
            second.sendall(b"second")
            first.sendall(b"first")
            assert read_all(console, 5) == b"first"
        with second:
            assert read_all(console, 6) == b"second"
            console.write(b"2")
            assert second.recv(100) == b"2"


def test_a_client_that_disappears_does_not_end_the_vm(socket_path):
    with open_console(socket_path) as console:
        reasons: list[str] = []
        console.on_leave = reasons.append
        connect(socket_path).close()
        console.write(b"x" * 100)
        console.write(b"y" * 100)
        with connect(socket_path) as client:
            client.sendall(b"back")
            assert read_all(console, 4) == b"back"
        assert reasons == []


def test_a_write_gives_back_what_a_client_leaves_no_room_for_and_never_waits(socket_path):
    with open_console(socket_path) as console:
        sent = os.urandom(1 << 22)
        with connect(socket_path) as client:
            rest = console.write(sent)
            assert 0 < len(rest) < len(sent) and sent.endswith(rest)
            assert not select.select([], [console.room_fd], [], 0)[1]
            received = client.recv(1 << 22, socket.MSG_WAITALL)
            assert received == sent[: len(received)]
        assert console.write(b"gone") == b"" and console.room_fd is None


def test_a_socket_console_can_be_waited_for(socket_path):
    with open_console(socket_path) as console:
        assert select.select([console.wait_fd], [], [], 0)[0] == []
        with connect(socket_path) as client:
            assert select.select([console.wait_fd], [], [], 5)[0], "a client is an event"
            console.read(16)
            assert select.select([console.wait_fd], [], [], 0)[0] == []
            client.sendall(b"x")
            assert select.select([console.wait_fd], [], [], 5)[0]


def test_the_socket_of_a_dead_vm_is_replaced(socket_path):
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(socket_path)
    dead.close()
    with open_console(socket_path) as console, connect(socket_path) as client:
        client.sendall(b"x")
        assert read_all(console, 1) == b"x"


def test_where_somebody_listens_already_the_console_is_the_client(socket_path):
    with open_console(socket_path) as one, open_console(socket_path) as other:
        other.write(b"ping")
        assert read_all(one, 4) == b"ping"
        one.write(b"pong")
        assert read_all(other, 4) == b"pong"
    assert not os.path.exists(socket_path)


# --- Terminals ---

# pytest-xdist runs tests in processes that have threads. The VM forks its guard before it has any, which a test of
# the command line shows.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def terminal():
    """A pseudo-terminal: (what the user types and sees, what the VM has as standard input and output)."""
    user, vm = os.openpty()
    yield user, vm
    for fd in (user, vm):
        with contextlib.suppress(OSError):
            os.close(fd)


def is_raw(fd: int) -> bool:
    lflag = termios.tcgetattr(fd)[3]
    return not lflag & (termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)


def test_a_terminal_is_raw_from_the_start_of_the_run_to_the_end_and_then_as_before(terminal):
    _, vm = terminal
    before = termios.tcgetattr(vm)
    with TerminalConsole(vm, vm) as console:
        assert not is_raw(vm), "not yet: while the VM is set up, Ctrl-C is the user's"
        console.start()
        assert is_raw(vm)
    assert termios.tcgetattr(vm) == before


def test_a_terminal_is_restored_after_an_exception(terminal):
    _, vm = terminal
    before = termios.tcgetattr(vm)
    with pytest.raises(ZeroDivisionError), TerminalConsole(vm, vm) as console:
        console.start()
        raise ZeroDivisionError
    assert termios.tcgetattr(vm) == before


@pytest.fixture
def guards(monkeypatch):
    """The process ids of the guards of the consoles that a test opens."""
    fork = os.fork
    forked: list[int] = []

    def recorded_fork() -> int:
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", recorded_fork)
    return forked


@pytest.mark.parametrize("started", [False, True])
def test_the_guard_of_a_terminal_is_gone_when_the_console_is_closed(terminal, guards, started):
    _, vm = terminal
    with TerminalConsole(vm, vm) as console:
        if started:
            console.start()
        assert os.waitpid(guards[0], os.WNOHANG) == (0, 0), "it stands guard"
    with pytest.raises(ChildProcessError):
        os.waitpid(guards[0], 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP])
def test_no_signal_that_is_for_the_vm_ends_or_stops_its_guard(terminal, guards, number):
    _, vm = terminal
    with TerminalConsole(vm, vm) as console:
        console.start()
        os.kill(guards[0], number)
        time.sleep(0.05)
        assert os.waitpid(guards[0], os.WNOHANG | os.WUNTRACED) == (0, 0)


def test_a_vm_whose_guard_was_killed_goes_on_and_still_restores_the_terminal_itself(terminal, guards):
    user, vm = terminal
    before = termios.tcgetattr(vm)
    with TerminalConsole(vm, vm) as console:
        os.kill(guards[0], signal.SIGKILL)
        os.waitpid(guards[0], 0)
        console.start()
        os.write(user, b"key")
        assert is_raw(vm) and read_all(console, 3) == b"key"
    assert termios.tcgetattr(vm) == before


def test_the_guard_keeps_nothing_open_that_the_vm_closes(terminal, pipe):
    _, vm = terminal
    reader, writer = pipe
    with TerminalConsole(vm, vm) as console:
        console.start()
        os.close(writer)
        assert soon(lambda: select.select([reader], [], [], 0)[0]), "the end of the pipe"
        assert os.read(reader, 1) == b""


def test_every_byte_but_the_escape_reaches_the_guest_unchanged(terminal):
    user, vm = terminal
    keys = bytes(key for key in range(256) if key != 1)  # Ctrl-C, Ctrl-D, Ctrl-Z, return and newline among them
    with TerminalConsole(vm, vm) as console:
        console.start()
        os.write(user, keys)
        assert read_all(console, len(keys)) == keys


def test_bare_newlines_of_the_guest_still_return_the_carriage(terminal):
    user, vm = terminal
    with TerminalConsole(vm, vm) as console:
        console.start()
        console.write(b"a\nb")
        assert soon(lambda: select.select([user], [], [], 0)[0])
        assert os.read(user, 100) == b"a\r\nb"


def test_ctrl_a_x_leaves_also_when_the_guest_reads_nothing(terminal):
    user, vm = terminal
    reasons: list[str] = []
    with TerminalConsole(vm, vm) as console:
        console.on_leave = reasons.append
        console.start()
        os.write(user, b"typed ahead\x01x")
        assert soon(lambda: reasons)
    assert reasons == ["left with Ctrl-A x"]


def test_ctrl_a_twice_sends_one_and_ctrl_a_h_shows_help_without_a_byte_for_the_guest(terminal):
    user, vm = terminal
    with TerminalConsole(vm, vm) as console:
        console.start()
        for keys in (b"a\x01", b"\x01b\x01", b"h", b"c"):  # apart, as keys come
            os.write(user, keys)
            time.sleep(0.02)
        assert read_all(console, 4) == b"a\x01bc"
        shown = b""
        while len(shown) < len(HELP):
            shown += os.read(user, 4096)
        assert b"Ctrl-A x" in shown


def test_when_the_terminal_is_hung_up_the_machine_is_told(terminal):
    user, vm = terminal
    reasons: list[str] = []
    with TerminalConsole(vm, vm) as console:
        console.on_leave = reasons.append
        console.start()
        os.close(user)
        assert soon(lambda: reasons)
        assert reasons == ["the terminal is gone"]


def test_keys_beyond_what_the_guest_will_take_ring_the_bell(terminal):
    user, vm = terminal
    with TerminalConsole(vm, vm) as console:
        console.start()
        shown = b""
        for _ in range(100):
            os.write(user, b"k" * 1000)
            while select.select([user], [], [], 0.01)[0]:
                shown += os.read(user, 100)
        assert shown.strip(b"\a") == b"" and shown


def test_a_console_can_be_waited_for_until_a_key_is_pressed(terminal):
    user, vm = terminal
    with TerminalConsole(vm, vm) as console:
        console.start()
        assert select.select([console.wait_fd], [], [], 0.05)[0] == []
        os.write(user, b"k")
        assert select.select([console.wait_fd], [], [], 5)[0]
        assert console.read(16) == b"k"
        assert select.select([console.wait_fd], [], [], 0.05)[0] == []


def test_a_terminal_that_is_stopped_and_goes_on_is_cooked_meanwhile_and_raw_again(terminal):
    _, vm = terminal
    before = termios.tcgetattr(vm)
    with TerminalConsole(vm, vm) as console:
        console.start()
        console.suspend()
        assert termios.tcgetattr(vm) == before
        console.resume()
        assert is_raw(vm)
    assert termios.tcgetattr(vm) == before


def test_a_terminal_device_at_a_path_is_raw_and_has_no_escape_key(terminal):
    user, vm = terminal
    before = termios.tcgetattr(vm)
    with open_console(os.ttyname(vm)) as console:
        assert isinstance(console, DeviceConsole) and console.is_terminal
        console.start()
        assert is_raw(vm)
        os.write(user, b"\x01x")
        assert read_all(console, 2) == b"\x01x"
        console.write(b"out")
        assert os.read(user, 100) == b"out"
    assert termios.tcgetattr(vm) == before
