"""Work that a child process does on memory as it was when it was made."""

import mmap
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from vm_tools import wait_until

from mini_bhyve.child import ChildTask
from mini_bhyve.snapshot_state import SnapshotError


def shared_memory():
    """A page that parent and child both see."""
    return mmap.mmap(-1, 4096)


def test_the_child_sees_private_memory_as_it_was_and_the_parent_does_not_wait():
    private = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private[:6] = b"before"
    seen, go = shared_memory(), shared_memory()

    def work(tell):
        wait_until(lambda: go[0])
        seen[:6] = private[:6]
        private[:6] = b"child "

    task = ChildTask("look", work)
    assert not task.finished()
    private[:6] = b"after "
    go[0] = 1
    task.check()
    assert (seen[:6], private[:6]) == (b"before", b"after ")
    assert task.finished()
    assert task.refused == ""


def test_an_error_of_the_work_is_the_parents_error():
    def work(tell):
        raise SnapshotError("cannot write vm.ckp: No space left on device")

    with pytest.raises(SnapshotError, match="^cannot write vm.ckp: No space left on device$"):
        ChildTask("write vm.ckp", work).check()


def test_a_mistake_of_ours_in_the_child_is_told_and_not_a_success():
    with pytest.raises(SnapshotError, match="failed unexpectedly: ZeroDivisionError"):
        ChildTask("divide", lambda tell: 1 // 0).check()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV, 40])
def test_a_child_that_is_killed_is_told_and_not_a_success(end):
    task = ChildTask("write vm.ckp", lambda tell: os.kill(os.getpid(), end))
    name = getattr(end, "name", f"signal {end}")
    with pytest.raises(SnapshotError, match=f"^cannot write vm.ckp: the process that did it was ended by {name}$"):
        task.check()
    with pytest.raises(SnapshotError, match=name):  # and again, if asked again
        task.check()


def test_a_child_that_is_cancelled_ends_at_once():
    task = ChildTask("sleep", lambda tell: time.sleep(60))
    task.cancel()
    with pytest.raises(SnapshotError, match="SIGKILL"):
        task.check()
    task.cancel()  # too late, and no harm


def test_without_a_descriptor_to_be_had_there_is_no_task(monkeypatch):
    def refuse():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", refuse)
    with pytest.raises(SnapshotError, match="^cannot write vm.ckp: Too many open files$"):
        ChildTask("write vm.ckp", lambda tell: None)


def test_a_child_that_ends_without_a_word_is_not_a_success():
    with pytest.raises(SnapshotError, match="has ended before its time"):
        ChildTask("write vm.ckp", lambda tell: os._exit(0)).check()


def test_a_child_whose_end_somebody_else_has_waited_for_is_understood(monkeypatch):
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        ChildTask("nothing", lambda tell: None).check()
        with pytest.raises(SnapshotError, match="has ended before its time"):
            ChildTask("write vm.ckp", lambda tell: os._exit(0)).check()
    finally:
        signal.signal(signal.SIGCHLD, previous)


def test_a_child_that_has_ended_leaves_no_descriptor_and_no_process_behind():
    open_before = set(os.listdir("/dev/fd"))
    task = ChildTask("nothing", lambda tell: None)
    task.check()
    task.close()
    assert task.finished()
    assert set(os.listdir("/dev/fd")) <= open_before
    with pytest.raises(ChildProcessError):
        os.waitpid(task._pid, os.WNOHANG)


def test_progress_arrives_while_the_child_works():
    go = shared_memory()

    def work(tell):
        tell(5, 10)
        wait_until(lambda: go[0])

    task = ChildTask("count", work)
    wait_until(lambda: task.finished() or task.done)
    assert (task.done, task.total, task.finished()) == (5, 10, False)
    assert not task.wait(0.01)
    go[0] = 1
    assert task.wait(30)


def test_progress_is_told_ten_times_a_second_and_not_more_often():
    def work(tell):
        begin = time.monotonic()
        while time.monotonic() < begin + 0.35:
            tell(1, 10)

    task = ChildTask("count", work)
    lines = []
    hear = task._hear
    task._hear = lambda data: (lines.append(data), hear(data))
    task.check()
    assert 3 <= b"".join(lines).count(b"done") <= 5


@pytest.mark.parametrize("why", ["no such call", "no process to be had"])
def test_where_there_is_no_fork_the_work_is_done_at_once_and_says_so(monkeypatch, why):
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    if why == "no such call":
        monkeypatch.delattr(os, "fork")
    else:
        monkeypatch.setattr(os, "fork", refuse)
    done = []
    task = ChildTask("count", lambda tell: done.append(os.getpid()))
    assert done == [os.getpid()]
    assert task.finished()
    task.check()
    assert task.refused == ("this system cannot fork" if why == "no such call" else "Resource temporarily unavailable")


def test_the_child_keeps_no_descriptor_open_but_those_it_needs(tmp_path):
    one, other = socket.socketpair()
    with open(tmp_path / "needed", "w") as needed, one, other:
        go = shared_memory()

        def work(tell):
            os.write(needed.fileno(), b"written")
            wait_until(lambda: go[0])

        task = ChildTask("wait", work, (needed.fileno(),))
        one.close()
        other.settimeout(30)
        assert other.recv(1) == b""  # nobody has the other end open any more
        go[0] = 1
        task.check()
    assert (tmp_path / "needed").read_text() == "written"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_what_ends_a_vm_does_not_end_the_child(number):
    def work(tell):
        os.kill(os.getpid(), number)

    ChildTask("live on", work).check()


def test_the_child_runs_nothing_of_its_parent_when_it_ends(tmp_path):
    program = """
import atexit, sys
from mini_bhyve.child import ChildTask
atexit.register(print, "the end")
print("once", end=" ")  # not flushed yet: the child has a copy
ChildTask("nothing", lambda tell: None).check()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("once the end\n", "")


def test_a_child_goes_on_when_its_parent_is_killed(tmp_path):
    program = f"""
import os, signal, time
from mini_bhyve.child import ChildTask
def work(tell):
    while os.getppid() == parent:
        time.sleep(0.01)
    for _ in range(3):
        tell(1, 2)
        time.sleep(0.11)
    open({str(tmp_path / "written")!r}, "w").close()
parent = os.getpid()
ChildTask("write", work)
os.kill(parent, signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -signal.SIGKILL
    wait_until((tmp_path / "written").exists)
