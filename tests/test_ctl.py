"""ctl.py as its user sees it: what is printed where, and the exit status, with a process that is no VM behind it."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fake_vm import SNAPSHOT_SIZE, fake_vm, registers

import ctl
from mini_bhyve import ipc

CTL = Path(ctl.__file__)


@pytest.fixture
def run_dir():
    # Not tmp_path: a socket's address has to fit into sun_path.
    directory = tempfile.mkdtemp(prefix="mb")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def vm(run_dir, request):
    """A VM named "vm"; a mark says how it behaves."""
    with fake_vm(run_dir, "vm", *getattr(request, "param", ())) as process:
        yield process


def behaving(*behaviour):
    return pytest.mark.parametrize("vm", [behaviour], indirect=True, ids=" ".join)


@pytest.fixture
def run(run_dir, capsys):
    """A function that runs ctl.py: exit status, standard output, standard error."""

    def run(*arguments):
        try:
            status = ctl.main([f"--rundir={run_dir}", *arguments])
        except SystemExit as end:  # argparse's way out
            status = end.code
        return (status, *capsys.readouterr())

    return run


def leave_dead_socket(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(path)


# --- our own spelling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, opcode, sentence",
    [
        ("pause", "PAUSE", "VM 'vm' is paused"),
        ("resume", "RESUME", "VM 'vm' runs again"),
        ("poweroff", "POWEROFF", "VM 'vm' is powered off"),
        ("reset", "RESET", "VM 'vm' is reset, and can be started again"),
        ("inject-nmi", "INJECT_NMI", "a non-maskable interrupt is injected into CPU 0 of VM 'vm'"),
        ("destroy", "DESTROY", "VM 'vm' is destroyed"),
    ],
)
def test_a_command_reaches_the_vm_and_its_effect_is_told_in_a_sentence(run, vm, command, opcode, sentence):
    assert run(command, "vm") == (0, sentence + "\n", "")
    assert vm.next_request() == {"opcode": opcode, "vcpuid": 0}


@pytest.mark.parametrize("command, opcode", [("checkpoint", "START_CHECKPOINT"), ("suspend", "START_SUSPEND")])
@pytest.mark.parametrize("file, expected", [([], "vm.ckp"), (["my.ckp"], "my.ckp"), (["../my.ckp"], "../my.ckp")])
def test_a_relative_file_name_is_the_clients_and_defaults_to_vm_ckp(
    run, vm, command, opcode, file, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(command, "vm", *file)
    assert (status, err) == (0, "")
    assert vm.next_request() == {"opcode": opcode, "filename": str(tmp_path / expected)}
    assert str(tmp_path / expected) in out


def test_an_absolute_file_name_is_left_as_it_is(run, vm):
    assert run("suspend", "vm", "/snap/été.ckp") == (0, "VM 'vm' is suspended to /snap/été.ckp\n", "")
    assert vm.next_request() == {"opcode": "START_SUSPEND", "filename": "/snap/été.ckp"}


@behaving("slow")
def test_a_snapshot_that_takes_longer_than_other_commands_may_is_waited_for(run, vm, monkeypatch):
    monkeypatch.setattr(ipc.send_message, "__defaults__", (0.2,))  # what other commands have
    monkeypatch.setattr(ipc, "PROBE_INTERVAL", 0.1)  # and the VM is found alive meanwhile
    assert run("checkpoint", "vm", "/vm.ckp")[0] == 0
    assert run("suspend", "vm", "/vm.ckp")[0] == 0
    assert vm.wait(5) == 0


def test_a_command_can_go_to_another_cpu(run, vm):
    assert run("inject-nmi", "vm", "--cpu", "1")[0] == 0
    assert vm.next_request() == {"opcode": "INJECT_NMI", "vcpuid": 1}
    assert "rip 0000000000001100" in run("regs", "vm", "--cpu=1")[1]


def test_status_tells_what_the_vm_is_doing(run, vm):
    run("pause", "vm")
    status, out, err = run("status", "vm")
    assert (status, err) == (0, "")
    assert dict(line.split(None, 1) for line in out.replace("virtual time", "time").splitlines()) == {
        "name": "vm",
        "state": "paused",
        "mode": "32-bit paged",
        "rip": "0xc0100000",
        "memory": "64 MB",
        "CPUs": "2; active: 0, 1; suspended: 0, 1",
        "instructions": "123,456,789",
        "time": "12.345679 s",
        "snapshots": "yes",
        "process": str(vm.pid),
    }


def test_regs_shows_every_register(run, vm):
    status, out, err = run("regs", "vm")
    assert (status, err) == (0, "")
    for name, value in registers(0).items():
        assert name.partition("_")[0] in out.split()
        assert f"{value:x}" in out


def test_json_is_the_answer_itself(run, vm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(run("regs", "vm", "--json")[1]) == registers(0)
    status = json.loads(run("--json", "status", "vm")[1])
    assert (status["name"], status["pid"], status["suspended_cpus"]) == ("vm", vm.pid, [])
    assert json.loads(run("list", "--json")[1]) == [status]
    done = json.loads(run("checkpoint", "vm", "--json")[1])
    file = str(tmp_path / "vm.ckp")
    assert done == {
        "vm": "vm",
        "command": "checkpoint",
        "file": file,
        "done": f"a snapshot of VM 'vm' is written to {file}",
    }


def test_list_shows_the_living_and_the_dead(run, run_dir, monkeypatch):
    assert run("list") == (0, f"there are no VMs in {run_dir}\n", "")
    assert run("list", "--json") == (0, "[]\n", "")
    monkeypatch.setattr(ctl, "LIST_TIMEOUT", 0.2)
    leave_dead_socket(os.path.join(run_dir, "dead"))
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        deaf.bind(os.path.join(run_dir, "deaf"))
        long = "[bold]" + "x" * 60
        stack.enter_context(fake_vm(run_dir, long))
        pid = stack.enter_context(fake_vm(run_dir, "vm")).pid
        status, out, err = run("list")
        found = json.loads(run("list", "--json")[1])
    assert (status, err) == (0, "")
    header, first, *rows = [row.split() for row in out.splitlines()]
    assert first[:2] == [long, "running"]  # neither folded nor taken for markup
    assert rows == [
        ["dead", "dead"],
        ["deaf", "no", "answer"],
        ["vm", "running", "32-bit", "paged", "64", "MB", "2", "12.346", "s", str(pid)],
    ]
    assert [vm.get("error", "")[:20] for vm in found] == ["", "VM 'dead' is dead: n", "VM 'deaf' does not a", ""]


def test_destroy_removes_the_socket_of_a_vm_that_was_killed(run, run_dir, vm):
    vm.kill()
    vm.wait()
    assert os.listdir(run_dir) == ["vm"]
    status, out, err = run("destroy", "vm")
    assert (status, out, err) == (0, f"VM 'vm' was dead, and its socket {run_dir}/vm is removed\n", "")
    assert os.listdir(run_dir) == []
    assert run("destroy", "vm")[0] == 1


# --- bhyvectl's spelling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, request_",
    [
        ("--suspend=/vm.ckp", {"opcode": "START_SUSPEND", "filename": "/vm.ckp"}),
        ("--checkpoint=/vm.ckp", {"opcode": "START_CHECKPOINT", "filename": "/vm.ckp"}),
        ("--destroy", {"opcode": "DESTROY", "vcpuid": 0}),
        ("--force-poweroff", {"opcode": "POWEROFF", "vcpuid": 0}),
        ("--force-reset", {"opcode": "RESET", "vcpuid": 0}),
        ("--inject-nmi", {"opcode": "INJECT_NMI", "vcpuid": 0}),
    ],
)
def test_bhyvectls_options_do_the_same(run, vm, option, request_):
    status, out, err = run("--vm=vm", option)
    assert (status, err) == (0, "") and out.count("\n") == 1
    if option != "--destroy":
        assert vm.next_request()["opcode"] == "STATUS"  # whether there is such a VM
    assert vm.next_request() == request_


def test_a_relative_file_name_is_the_clients_in_bhyvectls_spelling_too(run, vm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--vm", "vm", "--checkpoint", "my.ckp")[0] == 0
    vm.next_request()
    assert vm.next_request() == {"opcode": "START_CHECKPOINT", "filename": str(tmp_path / "my.ckp")}


@pytest.mark.parametrize(
    "option, line",
    [
        ("--get-rip", "rip[0]\t\t0x0000000000000100"),
        ("--get-rflags", "rflags[0]\t0x0000000000000111"),
        ("--get-efer", "efer[0]\t\t0x0000000000000116"),
        ("--get-r15", "r15[0]\t\t0x0000000000000110"),
        ("--get-dr7", "dr7[0]\t\t0x000000000000011c"),
        ("--get-cs", "cs[0]\t\t0x0000"),
        ("--get-ldtr", "ldtr[0]\t\t0x0038"),
        ("--get-desc-ds", "ds desc[0]\t0xffff800000000001/0xffffff01/0x0000a091"),
        ("--get-desc-ldtr", "ldtr desc[0]\t0xffff800000000007/0xffffff07/0x0000a097"),
        ("--get-desc-gdtr", "gdtr[0]\t\t0x0000000000008000/0x0000007f"),
        ("--get-desc-idtr", "idtr[0]\t\t0x0000000000008001/0x00000080"),
        ("--get-active-cpus", "active cpus:\t 0, 1"),
        ("--get-suspended-cpus", "suspended cpus:\t (none)"),
    ],
)
def test_registers_come_out_as_bhyvectl_prints_them(run, vm, option, line):
    assert run("--vm=vm", option) == (0, line + "\n", "")


def test_each_register_option_shows_the_register_it_names(run, vm):
    values = registers(1)
    for option in ctl.REGISTER_LINES:
        name = option.replace("get-", "").replace("desc-", "")
        keys = [f"{name}_{part}" for part in ("base", "limit", "access")] if "desc" in option else [name]
        expected = [values[key] for key in keys if key in values]
        out = run("--vm=vm", "--cpu=1", f"--{option}")[1]
        assert out.startswith((f"{name}[1]\t", f"{name} desc[1]\t"))
        assert [int(number, 16) for number in out.split("\t")[-1].split("/")] == expected


def test_several_registers_come_in_bhyvectls_order_whatever_the_order_of_the_options(run, vm):
    out = run("--vm=vm", "--get-cs", "--get-desc-cs", "--get-rip", "--get-cr0")[1]
    assert [line.split("[")[0] for line in out.splitlines()] == ["cr0", "rip", "cs desc", "cs"]
    lines = run("--vm=vm", "--get-all")[1].splitlines()
    assert len(lines) == len(ctl.REGISTER_LINES) + 2
    assert lines[0].startswith("efer[0]") and lines[-1].startswith("suspended cpus")


def test_without_anything_to_do_bhyvectl_only_says_whether_there_is_such_a_vm(run, vm):
    assert run("--vm=vm") == (0, "", "")
    status, out, err = run("--vm=none")
    assert (status, out) == (1, "") and "there is no VM named 'none'" in err


def test_what_a_vm_warns_of_is_told_beside_what_it_has_done(run, run_dir):
    commands = {ipc.IpcOpcode.START_CHECKPOINT: lambda message: {"warning": "it stood still"}}
    with contextlib.closing(ipc.init_ipc("vm", run_dir, commands)):
        done = "a snapshot of VM 'vm' is written to /vm.ckp"
        assert run("checkpoint", "vm", "/vm.ckp") == (0, f"{done}\n", "ctl.py: it stood still\n")
        assert json.loads(run("checkpoint", "vm", "/vm.ckp", "--json")[1])["warning"] == "it stood still"


# --- a snapshot that takes long --------------------------------------------------------------------------------------


@behaving("writing")
def test_on_a_terminal_a_bar_shows_how_far_a_snapshot_is_and_goes_when_it_is_there(run_dir, vm):
    master, terminal = pty.openpty()
    command = [sys.executable, CTL, "suspend", "vm", "/vm.ckp", "--rundir", run_dir]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while data := os.read(master, 4096):
                shown += data
        assert (process.wait(20), process.stdout.read()) == (0, b"VM 'vm' is suspended to /vm.ckp\n")
    os.close(master)
    done = [int(number) for number in re.findall(rb"(\d+) of 64 MB to /vm.ckp", shown)]
    assert len(done) > 2 and done == sorted(done) and 0 < done[0] < done[-1] <= 64
    assert shown.endswith(b"\x1b[2K"), "and its line is empty in the end"


@behaving("writing")
def test_on_a_pipe_nothing_is_shown_of_how_far_a_snapshot_is(run_dir, vm):
    with run_process("checkpoint", "vm", "/vm.ckp", "--rundir", run_dir) as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "a snapshot of VM 'vm' is written to /vm.ckp\n", "")
    vm.next_request()


@behaving("writing")
def test_while_a_snapshot_is_written_status_shows_it_and_an_interrupted_request_leaves_it_alone(run, run_dir, vm):
    with run_process("checkpoint", "vm", "/vm.ckp", "--rundir", run_dir) as process:
        vm.next_request()
        assert re.search(r"^writing       \d+ of 64 MB to /vm.ckp$", run("status", "vm")[1], re.MULTILINE)
        assert json.loads(run("status", "vm", "--json")[1])["snapshot_total"] == SNAPSHOT_SIZE
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(
        r"ctl.py: interrupted; VM 'vm' goes on writing the snapshot, so far \d+ of 64 MB to /vm.ckp: "
        r"`ctl.py status vm` tells\n",
        err,
    )
    assert os.listdir(run_dir) == ["vm"]


@behaving("deaf")
def test_an_interrupted_request_to_a_vm_that_does_not_answer_says_that_it_may_still_be_carried_out(run_dir, vm):
    with run_process("suspend", "vm", "/vm.ckp", "--rundir", run_dir) as process:
        vm.next_request()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err == (
        "ctl.py: interrupted; VM 'vm' was asked for a snapshot to /vm.ckp and may still be writing it: "
        "`ctl.py status vm` tells\n"
    )
    assert os.listdir(run_dir) == ["vm"]


def test_what_became_of_an_interrupted_request_is_told_also_if_nothing_is_being_written(run_dir, vm):
    path = os.path.join(run_dir, "vm")
    assert ctl.interrupted(path, "/vm.ckp") == "VM 'vm' is not writing a snapshot: it has finished, or not begun"
    vm.kill()
    vm.wait()
    assert ctl.interrupted(path, "/vm.ckp") == "VM 'vm', which was asked for a snapshot to /vm.ckp, has ended"


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["regs"], ["suspend"], ["checkpoint"], ["pause"], ["poweroff"], ["destroy"], ["inject-nmi"]],
)
def test_no_such_vm_is_one_sentence_and_status_1(run, run_dir, arguments):
    assert run(*arguments, "none") == (1, "", f"ctl.py: there is no VM named 'none' in {run_dir}\n")


@behaving("refuse")
@pytest.mark.parametrize("arguments", [["suspend", "vm"], ["pause", "vm"], ["--vm=vm", "--checkpoint=x"]])
def test_a_refused_command_is_told_with_the_vms_own_sentence(run, vm, arguments):
    assert run(*arguments) == (1, "", "ctl.py: snapshots are switched off (-o snapshot=false)\n")


@pytest.mark.parametrize("command", ["status", "suspend"])
def test_a_dead_vm_is_one_sentence_and_status_1(run, run_dir, command):
    leave_dead_socket(os.path.join(run_dir, "vm"))
    status, out, err = run(command, "vm")
    assert (status, out) == (1, "")
    assert err == f"ctl.py: VM 'vm' is dead: no process has its socket {run_dir}/vm open\n"


@pytest.mark.parametrize("arguments", [["status", "vm"], ["regs", "vm"], ["pause", "vm"], ["--vm=vm", "--get-rip"]])
def test_a_vm_that_does_not_answer_is_one_sentence_and_status_1(run, run_dir, monkeypatch, arguments):
    monkeypatch.setattr(ctl, "send_message", lambda path, message, *timeout: ipc.send_message(path, message, 0.1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(os.path.join(run_dir, "vm"))
        assert run(*arguments) == (1, "", "ctl.py: VM 'vm' does not answer: nothing came within 0.1 seconds\n")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate", "vm"], "invalid choice: 'frobnicate'"),
        (["status"], "the following arguments are required: VM"),
        (["status", "vm", "other"], "unrecognized arguments: other"),
        (["--vm=vm", "--get-stats"], "unrecognized arguments: --get-stats"),
        (["--vm=vm", "--cpu=-1"], "'-1' is not the number of a virtual CPU"),
        (["regs", "vm", "--cpu", "x"], "'x' is not the number of a virtual CPU"),
        (["status", ""], "the name of a VM is empty"),
        (["status", "a/b"], "may not have a slash"),
        (["status", "x" * 200], "the name of a VM has at most"),
        (["suspend", "vm", "/" + "x" * 2000], "a file name has at most 1023 bytes"),
        (["suspend", "vm", "/\udcff"], "is not UTF-8"),
        (["list", "--rundir", "/" + "x" * 300], "File name too long"),
        (["status", "vm", "--rundir", "/" + "x" * 200], "too long for a socket"),
        (["list", "--rundir", str(CTL)], "Not a directory"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence_and_status_1(run, arguments, sentence):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert sentence in err and err.count("\n") == 1 and err.startswith("ctl.py")


def test_an_answer_that_lacks_something_is_one_sentence_and_status_1(run, run_dir):
    with contextlib.closing(ipc.init_ipc("vm", run_dir, dict.fromkeys(ipc.IpcOpcode, lambda message: {"name": 5}))):
        assert run("status", "vm") == (1, "", "ctl.py: the answer of VM 'vm' has no name of type str\n")
        assert run("regs", "vm") == (1, "", "ctl.py: the answer of VM 'vm' has no efer of type int\n")


def run_process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, CTL, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **options
    )


def test_it_runs_from_any_directory_and_its_exit_status_is_that_of_the_process(run_dir, vm, tmp_path):
    for name, status in (("vm", 0), ("none", 1)):
        with run_process("status", name, "--rundir", run_dir, cwd=tmp_path) as process:
            out, err = process.communicate(timeout=20)
        assert process.returncode == status
        assert bool(out) == (status == 0) and bool(err) == (status == 1)


@behaving("deaf")
def test_an_interrupt_while_it_waits_for_another_answer_ends_it_with_a_sentence(run_dir, vm):
    with run_process("pause", "vm", "--rundir", run_dir) as process:
        vm.next_request()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err == "ctl.py: interrupted; what a VM was asked to do, it may still do\n"


def test_a_reader_that_has_seen_enough_is_not_complained_of(run_dir, vm):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, CTL, "regs", "vm", "--rundir", run_dir]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, encoding="utf-8")
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_parsers_can_be_had_for_the_documentation():
    for parser in (ctl.build_parser(), ctl.build_bhyvectl_parser()):
        assert parser.format_help().startswith("usage: ctl.py")
    assert set(ctl.ACTIONS) < set(ctl.build_parser().format_help().split())
