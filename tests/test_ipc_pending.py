"""The control socket while an answer takes its time. What takes it is a pipe that the test writes to."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from fake_vm import PipeAnswer
from vm_tools import wait_until

from mini_bhyve import ipc, nvlist
from mini_bhyve.ipc import MAX_WAITING, IpcError, IpcMessage, IpcOpcode, init_ipc, is_alive, send_message

ENDED = {"error": "VM 'vm' has ended"}


class Slow(PipeAnswer):
    """An answer that is there when the test says so; an IpcError is a refusal."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.outcome: Any = None

    def finish(self, outcome: Any = None) -> None:
        self.outcome = outcome
        os.write(self.writer, b"x")

    def answer(self) -> dict[str, Any] | None:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def slow() -> Iterator[Callable[[], Slow]]:
    """Makes answers that take their time."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(Slow()))


class Asker:
    """A client with one request under way."""

    def __init__(self, run_dir: str, opcode: int, filename: bytes = b"/vm.ckp") -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = os.path.join(run_dir, f".{os.urandom(4).hex()}")
        self.socket.bind(self.address)
        self.socket.sendto(struct.pack("=I1024s", opcode, filename if opcode < 2 else b""), os.path.join(run_dir, "vm"))
        self.socket.settimeout(20)  # not before: under PyPy, sendto() with a timeout does not wait for room

    @property
    def answered(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def answer(self) -> dict[str, Any]:
        """What it is answered; once and no more."""
        reply = nvlist.unpack(self.socket.recv(65536))
        assert not self.answered
        return reply

    def close(self) -> None:
        self.socket.close()
        os.unlink(self.address)


@pytest.fixture
def ask(run_dir: str) -> Iterator[Callable[..., Asker]]:
    """Sends a request to the VM named vm."""
    with contextlib.ExitStack() as stack:
        yield lambda *request: stack.enter_context(contextlib.closing(Asker(run_dir, *request)))


@pytest.fixture
def serve(run_dir: str) -> Iterator[Callable[..., ipc.IpcServer]]:
    with contextlib.ExitStack() as stack:

        def start(commands: dict[IpcOpcode, ipc.Handler], first: Any = None) -> ipc.IpcServer:
            server = init_ipc("vm", run_dir, commands, first)
            stack.callback(server.close)
            return server

        yield start


def look(run_dir: str) -> dict[str, Any]:
    return send_message(os.path.join(run_dir, "vm"), IpcMessage(code=IpcOpcode.STATUS))


def test_while_an_answer_is_pending_who_only_looks_is_served_and_the_others_are_in_turn_when_it_is_there(
    run_dir, serve, ask, slow
):
    order: list[str] = []
    pending = slow()

    def noting(opcode: IpcOpcode) -> ipc.Handler:
        return lambda message: order.append(opcode.name) or {"number": len(order)}

    commands = {opcode: noting(opcode) for opcode in IpcOpcode if opcode not in ipc.ENDS_VM}
    serve({**commands, IpcOpcode.START_CHECKPOINT: lambda message: pending})
    checkpoint = ask(IpcOpcode.START_CHECKPOINT)
    waiting = [ask(opcode) for opcode in (IpcOpcode.PAUSE, IpcOpcode.INJECT_NMI, IpcOpcode.RESUME)]
    assert ask(IpcOpcode.STATUS).answer() == {"number": 1}
    assert ask(IpcOpcode.REGS).answer() == {"number": 2}
    assert "not found" in ask(77).answer()["error"], "what is no request need not wait for its refusal"
    assert not any(asker.answered for asker in [checkpoint, *waiting])
    pending.finish({"written": True})
    assert checkpoint.answer() == {"written": True}
    assert [asker.answer() for asker in waiting] == [{"number": 3}, {"number": 4}, {"number": 5}]
    assert order == ["STATUS", "REGS", "PAUSE", "INJECT_NMI", "RESUME"]


def test_requests_that_take_their_time_are_begun_one_after_the_other(run_dir, serve, ask, slow):
    begun: list[Slow] = []
    serve({IpcOpcode.START_CHECKPOINT: lambda message: begun.append(slow()) or begun[-1]})
    askers = [ask(IpcOpcode.START_CHECKPOINT) for _ in range(5)]
    for number, asker in enumerate(askers):
        wait_until(lambda expected=number + 1: len(begun) == expected)
        time.sleep(0.01)
        assert len(begun) == number + 1 and not asker.answered
        begun[number].finish({"number": number})
        assert asker.answer() == {"number": number}


def test_an_answer_that_is_there_at_once_is_passed_on_at_once(run_dir, serve, ask, slow):
    ready = slow()
    ready.finish({"ready": True})
    serve({IpcOpcode.START_CHECKPOINT: lambda message: ready})
    assert ask(IpcOpcode.START_CHECKPOINT).answer() == {"ready": True}


def test_news_that_is_not_yet_the_answer_is_taken_in_and_waited_on(run_dir, serve, ask, slow):
    class InTwoSteps(Slow):
        steps = 0

        def finished(self) -> bool:
            while self.steps < 2 and super().finished():
                os.read(self.reader, 1)
                self.steps += 1
            return self.steps == 2

    pending = InTwoSteps()
    with contextlib.closing(pending):
        serve({IpcOpcode.START_CHECKPOINT: lambda message: pending, IpcOpcode.STATUS: lambda message: None})
        asker = ask(IpcOpcode.START_CHECKPOINT)
        pending.finish({"halfway": True})
        wait_until(lambda: pending.steps == 1)
        assert ask(IpcOpcode.STATUS).answer() == {} and not asker.answered
        pending.finish({"halfway": False})
        assert asker.answer() == {"halfway": False}


def test_so_many_requests_wait_and_the_next_one_is_refused_with_a_sentence(run_dir, serve, ask, slow):
    pending, order = slow(), []
    serve({
        IpcOpcode.START_CHECKPOINT: lambda message: pending,
        IpcOpcode.INJECT_NMI: lambda message: order.append(message.data.vcpu.vcpuid),
    })  # fmt: skip
    checkpoint = ask(IpcOpcode.START_CHECKPOINT)
    waiting = [ask(IpcOpcode.INJECT_NMI) for _ in range(MAX_WAITING)]
    for _ in range(3):
        refused = ask(IpcOpcode.INJECT_NMI)
        assert refused.answer() == {"error": f"INJECT_NMI is refused: {MAX_WAITING} requests wait already"}
    pending.finish()
    assert [asker.answer() for asker in [checkpoint, *waiting]] == [{}] * (MAX_WAITING + 1)
    assert len(order) == MAX_WAITING
    assert ask(IpcOpcode.INJECT_NMI).answer() == {}, "and then there is room again"


def test_what_nobody_waits_for_any_more_when_its_turn_comes_is_not_done_but_for_who_has_no_address(
    run_dir, serve, ask, slow
):
    pending, done = slow(), []
    server = serve({
        IpcOpcode.START_CHECKPOINT: lambda message: pending,
        IpcOpcode.INJECT_NMI: lambda message: done.append(message.data.vcpu.vcpuid),
        IpcOpcode.STATUS: lambda message: None,
    })  # fmt: skip

    def inject(vcpu: int) -> IpcMessage:
        message = IpcMessage(code=IpcOpcode.INJECT_NMI)
        message.data.vcpu.vcpuid = vcpu
        return message

    checkpoint = ask(IpcOpcode.START_CHECKPOINT)
    with pytest.raises(IpcError, match="does not answer"):
        send_message(server.path, inject(1), timeout=0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nameless:
        nameless.sendto(bytes(inject(2)), server.path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connected:
        connected.bind(os.path.join(run_dir, ".connected"))
        connected.connect(server.path)
        connected.settimeout(20)
        connected.send(bytes(inject(3)))
        assert ask(IpcOpcode.STATUS).answer() == {}
        pending.finish()
        assert checkpoint.answer() == {} and nvlist.unpack(connected.recv(65536)) == {}
    assert done == [2, 3]


@pytest.mark.parametrize("outcome", [IpcError("the disk is full"), ZeroDivisionError("of all things"), 5])
def test_a_suspend_that_fails_in_the_end_leaves_the_vm_its_socket(run_dir, serve, ask, slow, capsys, outcome):
    pending = slow()
    server = serve({IpcOpcode.START_SUSPEND: lambda message: pending, IpcOpcode.PAUSE: lambda message: None})
    suspend, waiting = ask(IpcOpcode.START_SUSPEND), ask(IpcOpcode.PAUSE)
    pending.finish(outcome)
    expected = "the disk is full" if isinstance(outcome, IpcError) else "START_SUSPEND failed unexpectedly: "
    assert suspend.answer()["error"].startswith(expected)
    assert waiting.answer() == {}
    assert is_alive(server.path)


def test_when_a_suspend_is_done_the_name_is_gone_before_the_answer_leaves_and_who_waits_is_told(
    run_dir, serve, ask, slow
):
    pending = slow()
    server = serve({
        IpcOpcode.START_SUSPEND: lambda message: pending,
        IpcOpcode.PAUSE: lambda message: None,
        IpcOpcode.STATUS: lambda message: None,
    })  # fmt: skip
    suspend, waiting = ask(IpcOpcode.START_SUSPEND), ask(IpcOpcode.PAUSE)
    assert ask(IpcOpcode.STATUS).answer() == {}
    pending.finish()
    assert suspend.answer() == {}
    assert not os.path.lexists(server.path)
    assert waiting.answer() == ENDED


def test_a_vm_that_ends_waits_for_what_is_pending_answers_it_and_refuses_the_rest(run_dir, serve, ask, slow):
    pending = slow()
    server = serve({IpcOpcode.START_CHECKPOINT: lambda message: pending, IpcOpcode.STATUS: lambda message: None})
    checkpoint, waiting = ask(IpcOpcode.START_CHECKPOINT), ask(IpcOpcode.PAUSE)
    assert ask(IpcOpcode.STATUS).answer() == {}
    closing = threading.Thread(target=server.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive() and not checkpoint.answered
    assert is_alive(server.path), "until then nobody takes the name, and who asks for the snapshot need not give up"
    late = ask(IpcOpcode.PAUSE)
    pending.finish({"written": True})
    assert checkpoint.answer() == {"written": True}
    assert waiting.answer() == late.answer() == ENDED
    closing.join(5)
    assert not closing.is_alive() and not os.path.lexists(server.path)


@pytest.mark.parametrize("outcome", [None, {"ignored": True}, IpcError("the snapshot is damaged")])
def test_what_a_vm_has_under_way_at_its_start_is_waited_for_like_a_request_and_its_outcome_ignored(
    run_dir, serve, ask, slow, outcome
):
    first = slow()
    serve({IpcOpcode.PAUSE: lambda message: None, IpcOpcode.STATUS: lambda message: None}, first)
    waiting = ask(IpcOpcode.PAUSE)
    assert ask(IpcOpcode.STATUS).answer() == {}
    assert not waiting.answered
    first.finish(outcome)
    assert waiting.answer() == {}


def test_a_vm_that_ends_does_not_wait_for_what_it_had_under_way_at_its_start(run_dir, serve, ask, slow):
    server = serve({IpcOpcode.STATUS: lambda message: None}, slow())
    waiting = ask(IpcOpcode.PAUSE)
    assert ask(IpcOpcode.STATUS).answer() == {}
    server.close()
    assert waiting.answer() == ENDED


def test_a_command_that_only_looks_has_no_time_to_take(run_dir, serve, ask, slow, capsys):
    serve({IpcOpcode.STATUS: lambda message: slow(), IpcOpcode.PAUSE: lambda message: None})
    assert "STATUS failed unexpectedly" in ask(IpcOpcode.STATUS).answer()["error"]
    assert ask(IpcOpcode.PAUSE).answer() == {}


# --- Processes that a handler forks -----------------------------------------------------------------------------------

FORKING_VM = """
import sys, time
from mini_bhyve.child import ChildTask
from mini_bhyve.ipc import IpcOpcode, init_ipc

def fork(message):
    return {"child": ChildTask("wait", lambda tell: time.sleep(60))._pid}

init_ipc("vm", sys.argv[1], {IpcOpcode.START_CHECKPOINT: fork})
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def forking_vm(run_dir: str, ask: Callable[..., Asker]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A VM, and a child that it has forked to serve a request."""
    command = [sys.executable, "-c", FORKING_VM, run_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as vm:
        assert vm.stdout is not None and vm.stdout.readline() == b"ready\n"
        child = ask(IpcOpcode.START_CHECKPOINT).answer()["child"]
        yield vm, child
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        vm.kill()


def test_a_process_that_a_handler_forks_does_not_keep_the_socket_of_a_killed_vm_alive(run_dir, forking_vm):
    vm, child = forking_vm
    path = os.path.join(run_dir, "vm")
    assert is_alive(path)
    vm.kill()
    vm.wait()
    wait_until(lambda: not is_alive(path))  # the child has closed what it does not need
    os.kill(child, 0)  # it is there
    init_ipc("vm", run_dir, {}).close()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system has no /proc to look whether it runs")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_of_the_terminal_does_not_end_a_process_that_a_handler_forks(forking_vm, number):
    _, child = forking_vm
    os.kill(child, number)
    time.sleep(0.05)
    with open(f"/proc/{child}/stat") as stat:
        assert stat.read().rpartition(")")[2].split()[0] in "SR"
