"""The control socket from both ends, with handlers of the test's own in place of a machine."""

import contextlib
import os
import shutil
import socket
import stat
import statistics
import struct
import subprocess
import tempfile
import threading
import time

import pytest
from fake_vm import fake_vm
from hypothesis import given, settings
from hypothesis import strategies as st
from review_client import compile_review_client

from mini_bhyve import ipc, nvlist
from mini_bhyve.ipc import (
    ENDS_VM,
    MAX_SNAPSHOT_FILENAME,
    MAX_VMNAME,
    SUN_PATH_SIZE,
    TAKES_FILENAME,
    IpcError,
    IpcMessage,
    IpcOpcode,
    init_ipc,
    remove_dead_socket,
    run_dir_for,
    send_message,
    snapshot_request,
    socket_path,
    vm_names,
)


@pytest.fixture
def run_dir():
    # Not tmp_path: a socket's address has to fit into sun_path.
    directory = tempfile.mkdtemp(prefix="mb")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def serve(run_dir):
    """A function that starts a VM's control socket; all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def start(commands, name="vm"):
            server = init_ipc(name, run_dir, commands)
            stack.callback(server.close)
            return server

        yield start


class Client(socket.socket):
    """A sender with an address of its own, that sends what it likes."""

    def __init__(self, run_dir, path, name=".client"):
        super().__init__(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bind(os.path.join(run_dir, name))
        self.connect(path)
        self.settimeout(5)

    def ask(self, datagram):
        self.send(datagram)
        return nvlist.unpack(self.recv(65536))


def whole(opcode, filename=b""):
    """``struct ipc_message`` as the review's C lays it out."""
    return struct.pack("=I1024s", opcode, filename)


def code_alone(opcode):
    return struct.pack("=I", opcode)


def record(seen):
    """Handlers for every opcode that note what they were called with."""

    def handle(message):
        opcode = IpcOpcode(message.code)
        seen.append((opcode, message.filename if opcode in TAKES_FILENAME else None))

    return dict.fromkeys(IpcOpcode, handle)


# --- messages --------------------------------------------------------------------------------------------------------


def test_a_program_written_from_the_review_is_understood(run_dir, serve, tmp_path):
    program = compile_review_client(tmp_path)
    seen = []
    served = threading.Semaphore(0)

    def handle(message):
        seen.append((message.code, message.filename))
        served.release()

    server = serve({IpcOpcode.START_CHECKPOINT: handle, IpcOpcode.START_SUSPEND: handle})
    longest = "/" + "x" * (MAX_SNAPSHOT_FILENAME - 2)
    for arguments in (["checkpoint", "/snap/vm.ckp"], ["checkpoint", longest], ["suspend", "/snap/été.ckp"]):
        subprocess.run([program, server.path, *arguments], check=True)
        assert served.acquire(timeout=5)
    assert seen == [(0, "/snap/vm.ckp"), (0, longest), (1, "/snap/été.ckp")]


def test_a_message_has_the_layout_that_the_reviews_c_gives_it():
    message = IpcMessage(code=IpcOpcode.START_SUSPEND)
    message.data.op.snapshot_filename = b"/vm.ckp"
    assert bytes(message) == whole(1, b"/vm.ckp")
    assert len(bytes(message)) == 1028
    message = IpcMessage(code=IpcOpcode.REGS)
    message.data.vcpu.vcpuid = 3
    assert bytes(message) == struct.pack("=II", 3, 3).ljust(1028, b"\0")


def test_success_is_answered_with_an_empty_list_and_data_with_what_was_asked_for(run_dir, serve):
    server = serve({IpcOpcode.PAUSE: lambda message: None, IpcOpcode.STATUS: lambda message: {"state": "running"}})
    with Client(run_dir, server.path) as client:
        assert client.ask(code_alone(IpcOpcode.PAUSE)) == {}
        assert client.ask(code_alone(IpcOpcode.STATUS)) == {"state": "running"}


@pytest.mark.parametrize("opcode", [opcode for opcode in IpcOpcode if opcode not in TAKES_FILENAME])
@pytest.mark.parametrize("datagram", [code_alone, whole])
def test_a_command_without_a_file_name_may_be_its_code_alone(run_dir, serve, opcode, datagram):
    seen = []
    server = serve(record(seen))
    with Client(run_dir, server.path) as client:
        assert client.ask(datagram(opcode)) == {}
    assert seen == [(opcode, None)]


def test_a_code_alone_means_virtual_cpu_0(run_dir, serve):
    seen = []
    server = serve({IpcOpcode.INJECT_NMI: lambda message: seen.append(message.data.vcpu.vcpuid)})
    with Client(run_dir, server.path) as client:
        client.ask(struct.pack("=II", IpcOpcode.INJECT_NMI, 7).ljust(1028, b"\0"))
        client.ask(code_alone(IpcOpcode.INJECT_NMI))
    assert seen == [7, 0]


@pytest.mark.parametrize(
    "datagram, sentence",
    [
        (b"", "0 bytes has no opcode"),
        (b"\0\0\0", "3 bytes has no opcode"),
        (code_alone(77), "command 77 not found"),
        (whole(2**32 - 1), "command 4294967295 not found"),
        (code_alone(0), "START_CHECKPOINT is a message of 1028 bytes, and this one had 4"),
        (whole(0, b"/snap/vm.ckp")[:17], "START_CHECKPOINT is a message of 1028 bytes, and this one had 17"),
        (whole(1, b"/snap/vm.ckp")[:-1], "START_SUSPEND is a message of 1028 bytes, and this one had 1027"),
        (whole(0, b"/snap/vm.ckp") + b"\0", "a message has 1028 bytes, and this one had more"),
        (whole(0, b"/snap/vm.ckp") * 3, "a message has 1028 bytes, and this one had more"),
        (code_alone(IpcOpcode.STATUS) + b"\0", "STATUS is a message of 1028 bytes, and this one had 5"),
        (whole(0, b"/" * 1024), "does not end in a NUL"),
        (whole(0, b"/\xff.ckp"), "not UTF-8"),
        (whole(0, b"vm.ckp"), "'vm.ckp' is relative"),
        (whole(0, b""), "'' is relative"),
    ],
)
def test_a_bad_datagram_is_answered_with_a_sentence_and_does_nothing(run_dir, serve, datagram, sentence):
    seen = []
    server = serve(record(seen))
    with Client(run_dir, server.path) as client:
        assert sentence in client.ask(datagram)["error"]
        assert seen == []
        assert client.ask(code_alone(IpcOpcode.STATUS)) == {}


def test_a_short_datagram_never_reuses_the_previous_filename(run_dir, serve):
    seen = []
    server = serve(record(seen))
    with Client(run_dir, server.path) as client:
        assert client.ask(whole(IpcOpcode.START_CHECKPOINT, b"/snap/previous.ckp")) == {}
        for size in (4, 5, 17, 1027):
            assert "START_CHECKPOINT is a message" in client.ask(whole(IpcOpcode.START_CHECKPOINT)[:size])["error"]
        assert "relative" in client.ask(whole(IpcOpcode.START_CHECKPOINT))["error"]
    assert seen == [(IpcOpcode.START_CHECKPOINT, "/snap/previous.ckp")]


def test_no_datagram_whatever_ends_the_service(run_dir, serve):
    seen = []
    server = serve({opcode: handle for opcode, handle in record(seen).items() if opcode not in ENDS_VM})
    opcodes = st.integers(0, 12) | st.integers(0, 2**32 - 1)
    whole_ones = st.builds(whole, opcodes, st.binary(max_size=1024) | st.just(b"/vm.ckp"))
    longer_or_shorter = st.builds(lambda opcode, more: code_alone(opcode) + more, opcodes, st.binary(max_size=1030))
    datagrams = opcodes.map(code_alone) | whole_ones | longer_or_shorter | st.binary(max_size=3000)

    with Client(run_dir, server.path) as client, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unbound:

        @settings(max_examples=300, deadline=None)
        @given(datagrams)
        def send(datagram):
            before = len(seen)
            unbound.sendto(datagram, server.path)
            reply = client.ask(datagram)
            assert reply == {} or list(reply) == ["error"]
            assert len(seen) == before + (2 if reply == {} else 0)

        send()
        assert client.ask(code_alone(IpcOpcode.STATUS)) == {}


def test_a_command_that_nobody_registered_is_not_found(run_dir, serve):
    server = serve({})
    with pytest.raises(IpcError, match="command PAUSE not found"):
        send_message(server.path, IpcMessage(code=IpcOpcode.PAUSE))


# --- the thread ------------------------------------------------------------------------------------------------------


def test_a_handler_refuses_with_a_sentence(run_dir, serve):
    def refuse(message):
        raise IpcError("snapshots are switched off")

    server = serve({IpcOpcode.START_CHECKPOINT: refuse})
    with pytest.raises(IpcError, match="^snapshots are switched off$"):
        snapshot_request(server.path, "/vm.ckp", IpcOpcode.START_CHECKPOINT)


def test_a_handler_that_fails_costs_one_command_and_not_the_socket(run_dir, serve, capsys):
    def fail(message):
        raise ZeroDivisionError("of all things")

    server = serve({IpcOpcode.PAUSE: fail, IpcOpcode.RESUME: lambda message: None})
    with pytest.raises(IpcError, match="PAUSE failed unexpectedly: ZeroDivisionError: of all things"):
        send_message(server.path, IpcMessage(code=IpcOpcode.PAUSE))
    assert capsys.readouterr().err == "vm: PAUSE failed unexpectedly: ZeroDivisionError: of all things\n"
    assert send_message(server.path, IpcMessage(code=IpcOpcode.RESUME)) == {}


@pytest.mark.parametrize("answer", [{"a": -1}, {"a": 1.5}, {"a": b"x" * 100_000}, {"error": "\ud800"}, 5, "text"])
def test_an_answer_that_cannot_be_sent_becomes_an_error(run_dir, serve, answer):
    server = serve({IpcOpcode.STATUS: lambda message: answer, IpcOpcode.PAUSE: lambda message: None})
    with pytest.raises(IpcError, match="cannot be sent|failed unexpectedly"):
        send_message(server.path, IpcMessage(code=IpcOpcode.STATUS))
    assert send_message(server.path, IpcMessage(code=IpcOpcode.PAUSE)) == {}


def test_a_long_answer_arrives_whole(run_dir, serve):
    answer = {f"register {number}": number for number in range(1000)}
    server = serve({IpcOpcode.REGS: lambda message: answer})
    assert send_message(server.path, IpcMessage(code=IpcOpcode.REGS)) == answer


def test_a_client_that_has_gone_is_not_missed(run_dir, serve):
    entered, go_on = threading.Event(), threading.Event()

    def slow(message):
        entered.set()
        assert go_on.wait(5)

    server = serve({IpcOpcode.PAUSE: slow, IpcOpcode.STATUS: lambda message: None})
    for gone in (lambda: None, lambda: os.unlink(os.path.join(run_dir, ".client"))):
        with Client(run_dir, server.path) as client:
            client.send(code_alone(IpcOpcode.PAUSE))
            assert entered.wait(5)
        gone()
        go_on.set()
        assert send_message(server.path, IpcMessage(code=IpcOpcode.STATUS)) == {}
        if os.path.lexists(client_address := os.path.join(run_dir, ".client")):
            os.unlink(client_address)


def test_a_client_that_never_reads_does_not_hold_up_the_others(run_dir, serve):
    seen = []
    server = serve({IpcOpcode.STATUS: seen.append})
    with Client(run_dir, server.path) as deaf:
        for _ in range(300):  # far more answers than its queue holds
            deaf.send(whole(IpcOpcode.STATUS))
        assert send_message(server.path, IpcMessage(code=IpcOpcode.STATUS)) == {}
    assert len(seen) == 301


def test_an_answer_comes_within_20_ms_from_a_process_that_computes_without_a_pause(run_dir):
    with fake_vm(run_dir, "vm", "busy"):
        path, times = socket_path(run_dir, "vm"), []
        for _ in range(30):
            before = time.perf_counter()
            send_message(path, IpcMessage(code=IpcOpcode.STATUS))
            times.append(time.perf_counter() - before)
    assert statistics.median(times) < 0.020


@pytest.mark.parametrize("opcode", sorted(ENDS_VM), ids=lambda opcode: opcode.name)
def test_the_name_is_free_when_the_answer_says_that_the_vm_is_gone(run_dir, serve, opcode):
    for _ in range(20):
        old = serve(record([]))
        with Client(run_dir, old.path) as client:
            assert client.ask(whole(opcode, b"/vm.ckp")) == {}
            assert not os.path.lexists(old.path)
        os.unlink(os.path.join(run_dir, ".client"))
        new = serve(record([]))
        old.close()
        assert send_message(new.path, IpcMessage(code=IpcOpcode.STATUS)) == {}
        new.close()


def test_a_refused_suspend_leaves_the_vm_its_socket(run_dir, serve):
    def refuse(message):
        raise IpcError("the disk is full")

    server = serve({IpcOpcode.START_SUSPEND: refuse, IpcOpcode.STATUS: lambda message: None})
    for _ in range(2):
        with pytest.raises(IpcError, match="the disk is full"):
            snapshot_request(server.path, "/vm.ckp", IpcOpcode.START_SUSPEND)
    assert send_message(server.path, IpcMessage(code=IpcOpcode.STATUS)) == {}


def test_close_lets_the_request_being_served_finish_and_refuses_those_that_wait(run_dir, serve):
    entered, go_on = threading.Event(), threading.Event()

    def slow(message):
        entered.set()
        assert go_on.wait(5)
        return {"finished": True}

    server = serve({IpcOpcode.PAUSE: slow})
    with Client(run_dir, server.path, ".first") as first, Client(run_dir, server.path, ".second") as second:
        first.send(code_alone(IpcOpcode.PAUSE))
        assert entered.wait(5)
        second.send(code_alone(IpcOpcode.PAUSE))
        closing = threading.Thread(target=server.close)
        closing.start()
        while not server.ending:
            time.sleep(0.001)
        go_on.set()
        assert nvlist.unpack(first.recv(65536)) == {"finished": True}
        assert nvlist.unpack(second.recv(65536)) == {"error": "VM 'vm' has ended"}
        closing.join(5)
        assert not closing.is_alive()
    server.close()  # a second time does no harm


# --- names and places ------------------------------------------------------------------------------------------------


def test_sun_path_has_the_size_that_this_platform_gives_it(run_dir):
    longest = os.path.join(run_dir, "x" * (SUN_PATH_SIZE - 2 - len(run_dir)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one, socket.socket(socket.AF_UNIX) as other:
        one.bind(longest)
        with pytest.raises(OSError, match="too long"):
            other.bind(longest + "x")


def test_a_name_follows_from_what_the_run_directory_leaves_of_sun_path(run_dir, serve):
    assert MAX_VMNAME == SUN_PATH_SIZE - len("/var/run/bhyve/")  # 89 = 104 - 15 in FreeBSD's vmmapi.h
    assert socket_path("/r", "v" * (MAX_VMNAME - 1))
    with pytest.raises(IpcError, match=f"at most {MAX_VMNAME - 1} bytes in /r"):
        socket_path("/r", "v" * MAX_VMNAME)
    longest = "é" * ((SUN_PATH_SIZE - len(run_dir) - 2) // 2)  # counted in bytes, of which é has two
    assert send_message(serve(record([]), longest).path, IpcMessage(code=IpcOpcode.STATUS)) == {}
    with pytest.raises(IpcError, match="at most"):
        socket_path(run_dir, longest + "é")
    deep = "/" + "d" * 60
    assert len(socket_path(deep, "v" * (SUN_PATH_SIZE - 63))) == SUN_PATH_SIZE - 1
    with pytest.raises(IpcError, match=f"at most {SUN_PATH_SIZE - 63} bytes in /ddd"):
        socket_path(deep, "v" * (SUN_PATH_SIZE - 62))
    with pytest.raises(IpcError, match="too long for a socket"):
        socket_path("/" + "d" * 100, "v")


def test_a_client_finds_room_for_its_address_wherever_a_vm_does(run_dir):
    deep = os.path.join(run_dir, "d" * (SUN_PATH_SIZE - len(run_dir) - len("/") - len("/.01234567") - 1))
    server = init_ipc("v", deep, record([]))
    assert send_message(server.path, IpcMessage(code=IpcOpcode.STATUS)) == {}
    server.close()
    with pytest.raises(IpcError, match="too long for a socket"):
        init_ipc("v", deep + "d", {})


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a\0b", "a\nb", "\x1b[2J", "\udcff"])
def test_a_name_that_would_lead_elsewhere_or_cannot_be_shown_is_refused(run_dir, name):
    with pytest.raises(IpcError, match="the name of a VM"):
        init_ipc(name, run_dir, {})
    assert os.listdir(run_dir) == []


def test_the_directory_and_the_socket_are_for_their_owner_only(run_dir):
    inner = os.path.join(run_dir, "bhyve")
    before = os.umask(0)
    try:
        server = init_ipc("vm", inner, {})
        assert os.umask(0) == 0  # put back as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(inner).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o600
    server.close()
    assert os.listdir(inner) == []


def test_a_run_directory_that_others_can_write_to_is_refused(run_dir):
    os.chmod(run_dir, 0o777)
    with pytest.raises(IpcError, match="open to others"):
        init_ipc("vm", run_dir, {})
    os.chmod(run_dir, 0o1777)  # but not where each can only remove what is his, as among the temporary files
    init_ipc("vm", run_dir, {}).close()


def test_a_run_directory_that_cannot_be_is_refused_with_a_sentence(run_dir, tmp_path):
    with pytest.raises(IpcError, match="cannot create the control socket .*No such file or directory"):
        init_ipc("vm", os.path.join(run_dir, "not", "there"), {})
    file = os.path.join(run_dir, "file")
    open(file, "w").close()
    with pytest.raises(IpcError, match="is not a directory"):
        init_ipc("vm", file, {})


def test_a_living_vms_name_cannot_be_taken(run_dir, serve):
    server = serve({IpcOpcode.STATUS: lambda message: {"still": "here"}})
    with pytest.raises(IpcError, match="a VM named 'vm' is already running"):
        init_ipc("vm", run_dir, {})
    assert send_message(server.path, IpcMessage(code=IpcOpcode.STATUS)) == {"still": "here"}


def test_a_name_held_by_a_socket_of_another_kind_cannot_be_taken(run_dir):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:  # as FreeBSD's bhyve listens
        stream.bind(os.path.join(run_dir, "vm"))
        stream.listen()
        with pytest.raises(IpcError, match="already running"):
            init_ipc("vm", run_dir, {})
        assert not remove_dead_socket(stream.getsockname())


def leave_dead_socket(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(path)
    assert os.path.lexists(path)


def test_a_dead_vms_socket_is_replaced(run_dir, serve):
    leave_dead_socket(os.path.join(run_dir, "vm"))
    server = serve({IpcOpcode.STATUS: lambda message: {"new": True}})
    assert send_message(server.path, IpcMessage(code=IpcOpcode.STATUS)) == {"new": True}


def test_of_many_that_replace_a_dead_vms_socket_at_once_one_wins(run_dir):
    for _ in range(10):
        leave_dead_socket(os.path.join(run_dir, "vm"))
        start, outcomes = threading.Barrier(8), []

        def contend(start=start, outcomes=outcomes):
            start.wait()
            try:
                outcomes.append(init_ipc("vm", run_dir, {}))
            except IpcError:
                outcomes.append(None)

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [server for server in outcomes if server]
        assert len(winners) == 1 and len(outcomes) == 8
        winners[0].close()


def test_a_file_that_is_no_socket_is_left_alone(run_dir):
    path = os.path.join(run_dir, "vm")
    with open(path, "w") as file:
        file.write("precious")
    with pytest.raises(IpcError, match="not a socket"):
        init_ipc("vm", run_dir, {})
    assert not remove_dead_socket(path)
    assert open(path).read() == "precious"


def test_close_leaves_alone_what_others_have_put_in_its_place(run_dir, serve):
    server = serve({})
    os.unlink(server.path)
    leave_dead_socket(server.path)
    server.close()
    assert os.path.lexists(server.path)


def test_only_dead_sockets_are_removed(run_dir, serve):
    server = serve(record([]))
    assert not remove_dead_socket(server.path)
    assert not remove_dead_socket(os.path.join(run_dir, "none"))
    assert not remove_dead_socket(os.path.join(run_dir, "no", "directory"))
    dead = os.path.join(run_dir, "dead")
    leave_dead_socket(dead)
    assert vm_names(run_dir) == ["dead", "vm"]
    assert remove_dead_socket(dead)
    assert vm_names(run_dir) == ["vm"]
    assert vm_names(os.path.join(run_dir, "no", "directory")) == []


def test_the_run_directory_is_the_systems_where_we_may_write_and_otherwise_our_own(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir)
    assert run_dir_for("there") == os.path.join(os.getcwd(), "there")
    monkeypatch.setattr(ipc, "BHYVE_RUN_DIR", os.path.join(run_dir, "bhyve", ""))
    assert run_dir_for(None) == run_dir_for("") == os.path.join(run_dir, "bhyve")  # can be made
    assert os.listdir(run_dir) == []  # but is not made yet
    monkeypatch.setattr(ipc, "BHYVE_RUN_DIR", os.path.join(run_dir, "not", "there", ""))
    monkeypatch.setenv("XDG_RUNTIME_DIR", run_dir)
    assert run_dir_for(None) == os.path.join(run_dir, "bhyve")
    for useless in ("", "relative", os.path.join(run_dir, "gone")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", useless)
        assert run_dir_for(None) == os.path.join(tempfile.gettempdir(), f"bhyve-{os.getuid()}")


def test_a_run_directory_of_our_own_that_others_prepared_is_refused(run_dir, monkeypatch):
    monkeypatch.setattr(ipc, "BHYVE_RUN_DIR", os.path.join(run_dir, "not", "there", ""))
    monkeypatch.setenv("XDG_RUNTIME_DIR", run_dir)
    own = os.path.join(run_dir, "bhyve")
    os.mkdir(own, 0o700)
    assert run_dir_for(None) == own
    os.chmod(own, 0o755)
    with pytest.raises(IpcError, match="belongs to you alone"):
        run_dir_for(None)
    os.rmdir(own)
    os.symlink(tempfile.gettempdir(), own)
    with pytest.raises(IpcError, match="belongs to you alone"):
        run_dir_for(None)


# --- bhyvectl's half -------------------------------------------------------------------------------------------------


def test_a_snapshot_request_carries_the_file_name(run_dir, serve):
    seen = []
    server = serve(record(seen))
    longest = "/" + "x" * (MAX_SNAPSHOT_FILENAME - 2)
    for name in ("/snap/vm.ckp", "/snap/été.ckp", longest):
        assert snapshot_request(server.path, name, IpcOpcode.START_CHECKPOINT) == {}
    assert [filename for _, filename in seen] == ["/snap/vm.ckp", "/snap/été.ckp", longest]
    for name in (longest + "x", "/a\0b", "/\udcff"):
        with pytest.raises(IpcError):
            snapshot_request(server.path, name, IpcOpcode.START_CHECKPOINT)
    assert len(seen) == 3


def test_a_request_leaves_nothing_behind_in_the_directory(run_dir, serve):
    server = serve(record([]))
    send_message(server.path, IpcMessage(code=IpcOpcode.STATUS))
    with pytest.raises(IpcError):
        snapshot_request(server.path, "relative", IpcOpcode.START_CHECKPOINT)
    with pytest.raises(IpcError):
        send_message(os.path.join(run_dir, "none"), IpcMessage(code=IpcOpcode.STATUS))
    assert os.listdir(run_dir) == ["vm"]


def test_there_is_no_such_vm(run_dir):
    with pytest.raises(IpcError, match=f"^there is no VM named 'none' in {run_dir}$"):
        send_message(os.path.join(run_dir, "none"), IpcMessage(code=IpcOpcode.STATUS))


def test_a_dead_vm_is_called_dead(run_dir):
    path = os.path.join(run_dir, "vm")
    leave_dead_socket(path)
    with pytest.raises(IpcError, match=f"^VM 'vm' is dead: no process has its socket {path} open$"):
        send_message(path, IpcMessage(code=IpcOpcode.STATUS))


def test_a_vm_that_does_not_answer_is_not_waited_for_without_end(run_dir):
    path = os.path.join(run_dir, "vm")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(path)
        for _ in range(50):  # in the end its queue is full, and sending waits as well
            with pytest.raises(IpcError, match="^VM 'vm' does not answer: nothing came within 0.02 seconds$"):
                send_message(path, IpcMessage(code=IpcOpcode.STATUS), timeout=0.02)


def test_an_answer_that_is_no_nvlist_is_refused(run_dir):
    path = os.path.join(run_dir, "vm")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as vm:
        vm.bind(path)

        def answer():
            _, sender = vm.recvfrom(2000)
            vm.sendto(b"OK", sender)

        threading.Thread(target=answer).start()
        with pytest.raises(IpcError, match="is not an nvlist"):
            send_message(path, IpcMessage(code=IpcOpcode.STATUS))


def test_a_vm_that_is_killed_over_a_snapshot_is_noticed_long_before_the_time_is_up(run_dir):
    with fake_vm(run_dir, "vm", "deaf") as vm:
        failure = []

        def request():
            try:
                snapshot_request(socket_path(run_dir, "vm"), "/vm.ckp", IpcOpcode.START_SUSPEND)
            except IpcError as error:
                failure.append(str(error))

        waiting = threading.Thread(target=request)
        waiting.start()
        vm.next_request()
        vm.kill()
        waiting.join(5 * ipc.PROBE_INTERVAL)
        assert failure == ["VM 'vm' ended before it answered"]
