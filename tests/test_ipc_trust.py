"""Who can use the control socket, who can take its name, and what others can do to it: nothing."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import random
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from vm_tools import Vm, bhyve, ctl, wait_until

from mini_bhyve import ipc, nvlist
from mini_bhyve.ipc import IpcError, IpcMessage, IpcOpcode, init_ipc, is_alive, send_message

ROOT = Path(__file__).resolve().parent.parent
STATUS = struct.pack("=I", IpcOpcode.STATUS)
ALREADY = "a VM named 'vm' is already running: its control socket {} is in use"


@pytest.fixture
def server(run_dir: str) -> Iterator[ipc.IpcServer]:
    """The socket of a VM that counts how often its status was asked for."""
    counted = []
    server = init_ipc("vm", run_dir, {IpcOpcode.STATUS: lambda message: counted.append(1) or {"count": len(counted)}})
    yield server
    server.close()


def count(server: ipc.IpcServer) -> int:
    return send_message(server.path, IpcMessage(code=IpcOpcode.STATUS))["count"]


def send(client: socket.socket, datagram: bytes, path: str) -> None:
    """Send when there is room. (Under PyPy, sendto() of a socket with a timeout does not wait for it.)"""
    while True:
        with contextlib.suppress(BlockingIOError):
            client.sendto(datagram, path)
            return
        time.sleep(0.001)


@contextlib.contextmanager
def client(run_dir: str, name: str) -> Iterator[socket.socket]:
    """A socket with an address to be answered at."""
    address = os.path.join(run_dir, name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(address)
        bound.settimeout(20)
        yield bound
    os.unlink(address)


# --- Who can ask ------------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
needs_credentials = pytest.mark.skipif(not ipc.SENDERS_ARE_KNOWN, reason="the system does not tell who sent a datagram")

ANOTHER_USER = """
import os, socket, sys
run_dir, path = sys.argv[1:]
os.setgid(65534)
os.setuid(65534)
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.bind(run_dir + "/.stranger")
sender.settimeout(0.5)
try:
    sender.sendto(b"\\2\\0\\0\\0", path)
    print(sender.recv(65536))
except OSError as error:
    print(type(error).__name__)
"""


def ask_as_another_user(run_dir: str, path: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(run_dir, ".stranger"))
    asked = subprocess.run(
        [sys.executable, "-S", "-c", ANOTHER_USER, run_dir, path], capture_output=True, text=True, check=True, cwd="/"
    )
    return asked.stdout.strip()


@needs_root
def test_the_modes_keep_another_user_out_of_the_directory_and_from_the_socket(run_dir, server):
    assert ask_as_another_user("/tmp", server.path) == "PermissionError", "the directory has mode 0700"
    os.unlink("/tmp/.stranger")
    os.chmod(run_dir, 0o777)
    assert ask_as_another_user(run_dir, server.path) == "PermissionError", "the socket has mode 0600"
    assert count(server) == 1


@needs_root
@needs_credentials
def test_another_user_whom_the_modes_let_in_all_the_same_is_not_served_nor_answered(run_dir, server):
    os.chmod(run_dir, 0o777)
    os.chmod(server.path, 0o666)
    assert ask_as_another_user(run_dir, server.path) in ("TimeoutError", "timeout")
    assert count(server) == 1


@needs_root
@needs_credentials
def test_root_may_ask_the_vm_of_another_user(run_dir):
    os.chown(run_dir, 65534, 65534)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    vm = (
        "import os, sys, time; os.setuid(65534)\n"
        "from mini_bhyve.ipc import IpcOpcode, init_ipc\n"
        "init_ipc('vm', sys.argv[1], {IpcOpcode.STATUS: lambda message: {'uid': os.getuid()}})\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    # A process that has the modules already, as another user may not read where they are.
    vm = vm.replace("os.setuid(65534)", "import mini_bhyve.ipc; os.setuid(65534)")
    with subprocess.Popen([sys.executable, "-c", vm, run_dir], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        assert send_message(os.path.join(run_dir, "vm"), IpcMessage(code=IpcOpcode.STATUS)) == {"uid": 65534}
        process.kill()


@needs_credentials
def test_a_datagram_is_from_whom_the_credentials_beside_it_name_and_without_any_from_nobody():
    kind = (socket.SOL_SOCKET, ipc.SCM_CREDENTIALS)
    for uid, expected in ((0, True), (1000, True), (1001, False), (65534, False), (2**32 - 1, False)):
        assert ipc.is_from([(*kind, struct.pack("@iII", 1234, uid, 1000))], 0, 1000) == expected
    assert not ipc.is_from([], 0)
    assert not ipc.is_from([(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@iII", 0, 0, 0))], 0)
    assert not ipc.is_from([(*kind, b"\0\0\0\0")], 0)


@needs_root
@needs_credentials
def test_an_answer_of_another_user_is_not_taken_for_the_vms(run_dir, server, monkeypatch):
    forge = "import os, socket, sys; os.setuid(65534); " + (
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'forged', sys.argv[1])"
    )
    deliver = ipc._deliver

    def deliver_late(client, *arguments):
        os.chmod(client.getsockname(), 0o666)
        os.chmod(run_dir, 0o777)
        subprocess.run([sys.executable, "-S", "-c", forge, client.getsockname()], check=True, cwd="/")
        deliver(client, *arguments)

    monkeypatch.setattr(ipc, "_deliver", deliver_late)
    assert count(server) == 1


def test_the_address_of_a_client_is_open_to_its_user_only_whatever_the_umask(run_dir, server, monkeypatch):
    modes = []
    deliver = ipc._deliver

    def look(client, *arguments):
        modes.append(stat.S_IMODE(os.stat(client.getsockname()).st_mode))
        deliver(client, *arguments)

    monkeypatch.setattr(ipc, "_deliver", look)
    before = os.umask(0)
    try:
        count(server)
    finally:
        os.umask(before)
    assert modes == [0o600]


# --- Names that lead elsewhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../vm", "a/b", "/tmp/vm", "..", ".", ".vm", "", "vm\0", "vm\n", "vm\udcff"])
def test_no_name_leaves_the_directory(run_dir, name):
    with pytest.raises(IpcError, match="^the name of a VM "):
        init_ipc(name, run_dir, {})
    assert os.listdir(run_dir) == []


def test_a_symbolic_link_is_not_followed_as_a_run_directory(run_dir):
    elsewhere, link = os.path.join(run_dir, "elsewhere"), os.path.join(run_dir, "link")
    os.symlink(elsewhere, link)
    for _ in range(2):  # whether it leads anywhere or not
        with pytest.raises(IpcError, match=f"^the run directory {link} is a symbolic link, which is not followed$"):
            init_ipc("vm", link, {})
        os.path.isdir(elsewhere) or os.mkdir(elsewhere, 0o700)
    assert os.listdir(elsewhere) == []


def test_a_symbolic_link_in_the_place_of_a_vms_socket_is_not_followed_by_anybody(run_dir, server):
    link = os.path.join(run_dir, "link")
    for target in (server.path, os.path.join(run_dir, "dangling")):
        os.symlink(target, link)
        with pytest.raises(IpcError, match=f"^{link} is in the way of the control socket, and not a socket$"):
            init_ipc("link", run_dir, {})
        with pytest.raises(IpcError, match=f"^{link} is not the control socket of a VM$"):
            send_message(link, IpcMessage(code=IpcOpcode.STATUS))
        assert not ipc.remove_dead_socket(link)
        assert os.readlink(link) == target
        assert ipc.vm_names(run_dir) == ["vm"]
        os.unlink(link)
    assert count(server) == 1


def test_somebody_elses_socket_is_not_told_anything(run_dir, server, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: os.stat(server.path).st_uid + 1000)
    if os.stat(server.path).st_uid != 0:
        with pytest.raises(IpcError, match="belongs to another user"):
            send_message(server.path, IpcMessage(code=IpcOpcode.STATUS))
    else:
        os.chown(server.path, 65534, 65534)
        with pytest.raises(IpcError, match="belongs to another user, with the number 65534"):
            send_message(server.path, IpcMessage(code=IpcOpcode.STATUS))


def test_who_keeps_the_directory_locked_makes_a_start_fail_with_a_sentence_and_not_hang(run_dir, server, monkeypatch):
    monkeypatch.setattr(ipc, "LOCK_TIMEOUT", 0.05)
    descriptor = os.open(run_dir, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(IpcError, match=f"^somebody keeps the run directory {run_dir} locked$"):
            init_ipc("other", run_dir, {})
        server.close()  # needs no lock: nobody else touches the socket of a living VM
        assert os.listdir(run_dir) == []
    finally:
        os.close(descriptor)
    init_ipc("other", run_dir, {}).close()


# --- One name, one VM -------------------------------------------------------------------------------------------------


class Contender(subprocess.Popen):
    """A process that tries to become the VM named vm as often as it is told: contender.py."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(
            [sys.executable, str(ROOT / "tests" / "contender.py"), run_dir, "vm"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.hear()

    def tell(self, word: str) -> None:
        assert self.stdin is not None
        self.stdin.write(f"{word}\n")
        self.stdin.flush()

    def hear(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().rstrip("\n")


@pytest.fixture
def race(run_dir: str) -> Iterator[Callable[[int], None]]:
    """A function that lets eight processes race for one name so many times."""
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(Contender(run_dir)) for _ in range(8)]
        for contender in contenders:
            stack.callback(contender.kill)

        def rounds(number: int) -> None:
            path, refused = os.path.join(run_dir, "vm"), ALREADY.format(os.path.join(run_dir, "vm"))
            chance = random.Random(number)
            for _ in range(number):
                chance.shuffle(contenders)
                for contender in contenders:
                    contender.tell("go")
                outcomes = [contender.hear() for contender in contenders]
                assert sorted(outcomes) == sorted(["won"] + [refused] * (len(contenders) - 1))
                assert is_alive(path)
                winner, end = contenders[outcomes.index("won")], chance.choice(["end", "die"])
                winner.tell(end)
                assert winner.hear() == "gone"
                assert os.path.lexists(path) == (end == "die")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            assert os.listdir(run_dir) == []

        yield rounds


def test_of_eight_processes_that_start_at_once_under_a_name_one_gets_it_whether_a_dead_vm_had_it_or_nobody(race):
    race(60)


@pytest.mark.soak
def test_of_eight_processes_that_start_at_once_under_a_name_one_gets_it_5000_times(race):
    race(5000)


def start_vms_at_once(run_dir: str, number: int) -> None:
    vms = [
        subprocess.Popen(
            bhyve(run_dir, "-m", "2", "-H", "vm"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, cwd=ROOT,
        )
        for _ in range(number)
    ]  # fmt: skip
    wait_until(lambda: sum(vm.poll() is not None for vm in vms) == number - 1)
    (living,) = [vm for vm in vms if vm.poll() is None]
    path = os.path.join(run_dir, "vm")
    wait_until(lambda: os.path.exists(path))
    assert send_message(path, IpcMessage(code=IpcOpcode.STATUS))["pid"] == living.pid
    assert send_message(path, IpcMessage(code=IpcOpcode.POWEROFF)) == {}
    for vm in vms:
        assert vm.stderr is not None
        sentence = vm.stderr.read().decode()
        vm.stderr.close()
        if vm is living:
            assert (vm.wait(30), sentence) == (1, "vm: powered off\n")
        else:
            assert (vm.wait(30), sentence) == (4, f"mini_bhyve: {ALREADY.format(path)}\n")
    assert os.listdir(run_dir) == []


def test_of_vms_that_are_started_at_once_under_one_name_one_runs_and_the_others_say_so(run_dir):
    start_vms_at_once(run_dir, 4)


@pytest.mark.soak
def test_of_vms_that_are_started_at_once_under_one_name_one_runs_50_times(run_dir):
    for _ in range(50):
        start_vms_at_once(run_dir, 4)


def test_a_vm_that_was_killed_leaves_a_name_that_can_be_cleared_or_taken(run_dir):
    with Vm(run_dir, "-m", "2", "-H", "vm") as vm:
        vm.wait_for(b"\n1\r\n")
        vm.process.kill()
        vm.process.wait()
    assert os.listdir(run_dir) == ["vm"]
    assert ctl(run_dir, "destroy", "vm").stdout.startswith("VM 'vm' was dead")
    assert os.listdir(run_dir) == []


KILLED_CLIENT = """
import sys
from mini_bhyve.ipc import IpcMessage, IpcOpcode, send_message
send_message(sys.argv[1], IpcMessage(code=IpcOpcode.STATUS), 60)
"""


def test_the_next_vm_removes_the_addresses_of_clients_that_were_killed_and_of_nobody_else(run_dir):
    deaf = os.path.join(run_dir, "deaf")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as vm:
        vm.bind(deaf)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen([sys.executable, "-c", KILLED_CLIENT, deaf], env=environment) as process:
            vm.recv(2048)
            process.kill()
    (left,) = (name for name in os.listdir(run_dir) if name.startswith("."))
    for name in (".shorter", ".another-", "without.d"):  # dead as well, but not a client's, or not by its name
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
            dead.bind(os.path.join(run_dir, name))
    Path(run_dir, ".01234567").write_text("no socket")
    Path(run_dir, ".12345678").symlink_to(left)
    kept = set(os.listdir(run_dir)) - {left, ".another-"}
    with client(run_dir, ".abcdefgh"):
        init_ipc("vm", run_dir, {}).close()
        assert left in os.listdir(run_dir), "it has only just come, and may not have its address yet"
        for name in os.listdir(run_dir):
            os.utime(os.path.join(run_dir, name), (0, 0), follow_symlinks=False)
        init_ipc("vm", run_dir, {}).close()
        assert set(os.listdir(run_dir)) == kept | {".abcdefgh"}


@needs_root
def test_what_a_client_of_another_user_left_behind_stays(run_dir):
    path = os.path.join(run_dir, ".01234567")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(path)
    os.utime(path, (0, 0))
    os.chown(path, 65534, 65534)
    init_ipc("vm", run_dir, {}).close()
    assert os.listdir(run_dir) == [".01234567"]
    os.chown(path, 0, 0)
    init_ipc("vm", run_dir, {}).close()
    assert os.listdir(run_dir) == []


# --- What else may be sent --------------------------------------------------------------------------------------------


def test_descriptors_that_are_sent_along_do_not_stay_open(run_dir, server):
    path = "/dev/fd"
    with client(run_dir, ".client") as sender:
        before = len(os.listdir(path))
        descriptors = array.array("i", [0] * 50)
        for _ in range(20):
            sender.sendmsg([STATUS], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)], 0, server.path)
            assert "count" in nvlist.unpack(sender.recv(65536))
        assert len(os.listdir(path)) == before


def test_two_vms_do_not_answer_each_other_for_ever(run_dir, server, monkeypatch):
    """The client's address becomes the name of a VM: that one, or the other."""
    answers = []
    answer = ipc.IpcServer.answer
    monkeypatch.setattr(ipc.IpcServer, "answer", lambda vm, *rest: (answers.append(vm), answer(vm, *rest)))
    with contextlib.closing(init_ipc("other", run_dir, {IpcOpcode.STATUS: lambda message: None})) as other:
        for number, path in enumerate((server.path, other.path)):
            with client(run_dir, f".client{number}") as sender:
                os.unlink(sender.getsockname())
                os.link(path, sender.getsockname())
                for request in (STATUS, b"bad", struct.pack("=I", 77)):
                    sender.sendto(request, server.path)
        time.sleep(0.1)
        assert count(server) == 3
    assert len(answers) <= 2 * 6 + 2, "each request, each answer that went astray, and what came afterwards"


def test_a_client_that_takes_answers_from_the_vms_own_socket_only_gets_them_though_many_others_read_none(
    run_dir, server
):
    with contextlib.ExitStack() as stack:
        for number in range(60):  # the answers that wait for these are charged to whoever sent them
            deaf = stack.enter_context(client(run_dir, f".deaf{number}"))
            for _ in range(15):
                send(deaf, STATUS, server.path)
        connected = stack.enter_context(client(run_dir, ".connected"))
        connected.connect(server.path)
        connected.send(STATUS)
        assert nvlist.unpack(connected.recv(65536)) == {"count": 901}
        assert count(server) == 902


def test_a_vm_without_another_descriptor_goes_on_answering(run_dir, server, monkeypatch):
    def no_descriptor() -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with client(run_dir, ".deaf") as deaf:
        with monkeypatch.context() as patched:
            patched.setattr(ipc, "_new_socket", no_descriptor)
            for _ in range(20):  # more answers than its queue holds
                send(deaf, STATUS, server.path)
            with client(run_dir, ".client") as sender:
                sender.sendto(STATUS, server.path)
                assert nvlist.unpack(sender.recv(65536)) == {"count": 21}


def test_whoever_waits_for_room_in_the_queue_gets_in_though_fifty_others_wait_too(run_dir, server):
    """They wait in sendto(), and never read. Whoever only tried now and then would find the queue full each time."""
    stop = threading.Event()

    def flood() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            while not stop.is_set():
                sender.sendto(STATUS, server.path)

    flooding = [threading.Thread(target=flood) for _ in range(50)]
    for thread in flooding:
        thread.start()
    try:
        for _ in range(10):
            count(server)  # or it raises: does not answer
    finally:
        stop.set()
        for thread in flooding:
            thread.join()
