"""The command line of bhyve(8): what each option sets, how a VM ends, and in what state it leaves the terminal.

The second half runs whole VMs with the embedded guests, as a user does, on pipes and on pseudo-terminals.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tty
from pathlib import Path

import pytest
from terminal_tools import VmOnTerminal

from mini_bhyve import ipc
from mini_bhyve.__main__ import build_parser, main
from mini_bhyve.config import Config, ConfigError, Disk

ROOT = Path(__file__).resolve().parent.parent
REBOOT, POWEROFF, HALT, TRIPLE_FAULT, ERROR, SUSPENDED = range(6)


def configured(*arguments: str) -> Config:
    return build_parser().parse_args(arguments, argparse.Namespace(config=Config())).config


# --- What the options set ---


def test_without_options_everything_has_its_default():
    config = configured()
    assert config.dump() == Config().dump()
    assert config.get("name") == "vm" and "name" not in config
    assert config.get_number("memory.size") == 64 << 20
    assert config.get("lpc.com1.path") == "stdio"


@pytest.mark.parametrize(
    "option, name, value",
    [
        (["-c", "1"], "cpus", "1"),
        (["-m", "32"], "memory.size", "32"),
        (["-m128M"], "memory.size", "128M"),
        (["-H"], "x86.vmexit_on_hlt", "true"),
        (["-e"], "x86.strictio", "true"),
        (["-o", "rundir=/tmp/x"], "rundir", "/tmp/x"),
        (["-l", "com1,stdio"], "lpc.com1.path", "stdio"),
        (["-l", "com1,/tmp/a,b"], "lpc.com1.path", "/tmp/a,b"),
        (["-l", "bootrom,bios.bin"], "bootrom", "bios.bin"),
        (["--kernel", "k.elf"], "kernel", "k.elf"),
        (["--kernel=k.elf"], "kernel", "k.elf"),
        (["--initrd", "fs.img"], "initrd", "fs.img"),
        (["--append", "a=b c"], "append", "a=b c"),
        (["xv6"], "name", "xv6"),
    ],
)
def test_an_option_sets_its_variable(option, name, value):
    assert configured(*option).get(name) == value


@pytest.mark.parametrize("slot", ["1", "1:0", "0:1:0"])
def test_a_slot_is_written_in_any_of_the_three_ways_of_bhyve(slot):
    assert configured("-s", f"{slot},ide,a.img,ro").disks() == [Disk(1, "a.img", True)]


def test_several_slots_are_several_disks():
    config = configured("-s", "2,ide,b.img", "-s", "1,ide,a.img,ro", "-s", "31,lpc")
    assert config.disks() == [Disk(1, "a.img", True), Disk(2, "b.img", False)]


def test_the_last_word_on_a_variable_of_a_slot_counts():
    config = configured("-s", "1,ide,a.img,ro", "-o", "pci.0.1.0.path=c.img")
    assert config.disks() == [Disk(1, "c.img", True)]


def test_a_disk_is_behind_the_device_that_its_slot_names():
    config = configured("-s", "3,virtio-blk,b.img,ro", "-s", "1,ide,a.img")
    assert config.disks() == [Disk(1, "a.img", False, "ide"), Disk(3, "b.img", True, "virtio-blk")]


@pytest.mark.parametrize("flags", ["-AHP", "-AIaxYPWSwCuDMH", "-HA"])
def test_flags_of_bhyve_are_taken_in_one_word_and_those_without_meaning_change_nothing(flags):
    config = configured(flags)
    assert config.get_bool("x86.vmexit_on_hlt")
    assert config.dump() == configured("-H").dump()


def test_a_whole_command_line_for_bhyve_is_taken():
    config = configured(
        "-AHP", "-c", "1", "-m", "1G", "-s", "0,hostbridge", "-s", "0:1:0,ide,disk.img", "-s", "31,lpc", "-l",
        "com1,stdio", "-p", "0:1", "-U", "00000000-0000-0000-0000-000000000001", "guest1",
    )  # fmt: skip
    assert config.get("name") == "guest1"
    assert config.disks() == [Disk(1, "disk.img", False)]


def test_a_configuration_file_counts_at_its_place_in_the_command_line(tmp_path):
    path = tmp_path / "vm.conf"
    path.write_text("memory.size=16\nname=file\n")
    assert configured("-m", "32", "-k", str(path)).get("memory.size") == "16"
    assert configured("-k", str(path), "-m", "32").get("memory.size") == "32"
    assert configured("-k", str(path), "-o", "memory.size=8").get("memory.size") == "8"
    assert configured("-m", "32", "-k", str(path), "given").get("name") == "given"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["-c", "2"], "only one vCPU is supported"),
        (["-c", "many"], "cpus must be a number, not 'many'"),
        (["-c"], "-c: expected one argument"),
        (["-m", "lots"], "memory.size must be a number of megabytes"),
        (["-o", "nmae=x"], "unknown variable nmae, did you mean name?"),
        (["-o", "name"], "not of the form variable=value"),
        (["-l", "com2,stdio"], "-l com2,stdio: expected com1,stdio or com1,PATH or bootrom,FILE"),
        (["-l", "com1"], "-l com1: expected"),
        (["-s", "1"], "-s 1: expected SLOT,ide,PATH"),
        (["-s", "1,ide"], "-s 1,ide: expected SLOT,ide,PATH"),
        (["-s", "1,ide,a.img,rw"], "expected SLOT,ide,PATH or SLOT,ide,PATH,ro"),
        (["-s", "1,virtio-blk,a.img,rw"], "expected SLOT,virtio-blk,PATH or SLOT,virtio-blk,PATH,ro"),
        (["-s", "1,virtio-net,tap0"], "must be ide, virtio-blk, hostbridge or lpc, not 'virtio-net'"),
        (["-s", "1,ide,a.img", "-s", "1:0,ide,b.img"], "-s 1:0,ide,b.img: slot 1 is occupied already"),
        (["-s", "32,ide,a.img"], "SLOT 0 to 31"),
        (["-s", "1:1,ide,a.img"], "-s 1:1,ide,a.img: expected SLOT,ide,PATH"),
        (["--kern", "k.elf"], "unrecognized arguments: --kern"),
        (["one", "two"], "unrecognized arguments: two"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError) as error:
        configured(*arguments)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_parser_can_be_built_any_number_of_times_and_shares_nothing():
    first, second = build_parser(), build_parser()
    one = first.parse_args(["-m", "8"], argparse.Namespace(config=Config())).config
    other = second.parse_args([], argparse.Namespace(config=Config())).config
    assert one.get("memory.size") == "8" and other.get("memory.size") == "64M"


def test_the_help_names_every_option_and_every_exit_code(capsys):
    with pytest.raises(SystemExit) as end:
        main(["-h"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for option in "-c -m -H -h -k -l -o -r -s --kernel --initrd --append VMNAME -A -C -w".split():
        assert option in shown
    assert "5 suspended" in " ".join(shown.split())


def test_config_dump_prints_all_variables_and_runs_nothing(capfd):
    assert main(["-m", "8", "-o", "config.dump=true", "name"]) == POWEROFF
    lines = capfd.readouterr().out.splitlines()
    assert "memory.size=8" in lines and "name=name" in lines


# --- How a VM ends ---


@pytest.fixture
def run_dir():
    """A short path: a unix socket's is limited to about 100 characters."""
    directory = tempfile.mkdtemp(prefix="mb")
    yield directory
    shutil.rmtree(directory)


def command(run_dir: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mini_bhyve", "-o", f"rundir={run_dir}", *arguments]


def run(run_dir: str, *arguments: str, typed: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(
        command(run_dir, *arguments), input=typed, capture_output=True, cwd=ROOT, timeout=60, check=False
    )


def wait_until(happened, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_refused(ended: subprocess.CompletedProcess, sentence: str) -> None:
    """One sentence on standard error and exit code 4."""
    stderr = ended.stderr.decode()
    assert ended.returncode == ERROR, stderr
    assert sentence in stderr and stderr.startswith("mini_bhyve: ")
    assert stderr.count("\n") == 1 and "Traceback" not in stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["-c", "2"], "only one vCPU"),
        (["-k", "/nonexistent/vm.conf"], "/nonexistent/vm.conf: No such file or directory"),
        (["--kernel", "/nonexistent/kernel"], "/nonexistent/kernel: No such file or directory"),
        (["-s", "1,ide,/nonexistent/disk"], "/nonexistent/disk"),
        (["-l", "bootrom,/nonexistent/rom"], "/nonexistent/rom"),
        (["-l", "com1,/nonexistent/log"], "cannot open the console /nonexistent/log"),
        (["-r", "/nonexistent.ckp"], "/nonexistent.ckp"),
        (["-o", "guest=nobody"], "nobody"),
        (["a/b"], "a/b"),
        ([".hidden"], ".hidden"),
    ],
)
def test_what_cannot_be_run_is_refused_with_one_sentence_and_exit_code_4(run_dir, arguments, sentence):
    assert_refused(run(run_dir, *arguments), sentence)

    assert os.listdir(run_dir) == [], "and no socket is left"


@pytest.mark.parametrize(
    "typed, code, reason", [(b"halt\n", HALT, "halted with interrupts off"), (b"reboot\n", REBOOT, "rebooted")]
)
def test_what_is_typed_reaches_the_guest_and_how_it_ends_is_the_exit_code(run_dir, typed, code, reason):
    ended = run(run_dir, "-o", "guest=shell", "ends", typed=typed)
    assert ended.returncode == code
    assert b"$ " + typed.strip() in ended.stdout
    assert ended.stderr.decode().startswith("ends: ") and reason in ended.stderr.decode()


# Small guests, as the machine code of a boot sector; each prints a letter on COM1 (port 3F8h) first.
PRINT = bytes.fromhex("ba f8 03  b0 47  ee")  # mov dx, 0x3f8; mov al, 'G'; out dx, al
CLI_HLT = bytes.fromhex("fa f4")
TRIPLE = bytes.fromhex("0f 01 1e 00 7d  cc")  # lidt [0x7d00], where there are zeros: no vector at all; int3
IN_99 = bytes.fromhex("e4 99")  # in al, 0x99: a port that no device has


def boot_sector(tmp_path: Path, code: bytes) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes((PRINT + code).ljust(510, b"\0") + b"\x55\xaa" + bytes(512))
    return str(path)


@pytest.mark.parametrize("option", ["-s1,ide,{}", "--kernel={}"])
@pytest.mark.parametrize("code, exit_code", [(CLI_HLT, HALT), (TRIPLE, TRIPLE_FAULT)])
def test_a_boot_sector_is_run_from_a_disk_and_as_a_kernel(run_dir, tmp_path, option, code, exit_code):
    ended = run(run_dir, option.format(boot_sector(tmp_path, code)))
    assert (ended.stdout, ended.returncode) == (b"G", exit_code), ended.stderr


def test_a_boot_rom_is_started_at_the_reset_vector(run_dir, tmp_path):
    rom = tmp_path / "rom.bin"
    rom.write_bytes((PRINT + CLI_HLT).ljust(16, b"\0").rjust(4096, b"\xcc"))
    ended = run(run_dir, "-l", f"bootrom,{rom}")
    assert (ended.stdout, ended.returncode) == (b"G", HALT), ended.stderr


def test_strict_io_ends_the_vm_at_a_port_that_nobody_claims(run_dir, tmp_path):
    disk = f"1,ide,{boot_sector(tmp_path, IN_99 + CLI_HLT)}"
    assert run(run_dir, "-s", disk).returncode == HALT
    for strict in (["-e"], ["-o", "x86.strictio=true"]):
        ended = run(run_dir, *strict, "-s", disk)
        assert ended.returncode == ERROR
        assert b"0x99" in ended.stderr and ended.stderr.count(b"\n") == 1


def test_the_console_can_be_a_file(run_dir, tmp_path):
    log = tmp_path / "log"
    ended = run(run_dir, "-l", f"com1,{log}", "-s", f"1,ide,{boot_sector(tmp_path, CLI_HLT)}")
    assert (ended.stdout, ended.returncode) == (b"", HALT)
    assert log.read_bytes() == b"G"


def test_the_console_can_be_a_unix_socket(run_dir):
    path = os.path.join(run_dir, "com1.sock")
    with (
        subprocess.Popen(
            command(run_dir, "-o", "guest=shell", "-o", "clock=wall", "-l", f"com1,{path}"),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        ) as process,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client,
    ):
        wait_until(lambda: client.connect_ex(path) == 0)
        client.settimeout(30)
        client.sendall(b"halt\n")
        shown = b""
        while chunk := client.recv(4096):
            shown += chunk
        assert process.wait(30) == HALT
    assert b"halt" in shown


# --- Suspend and restore ---


def suspend_counter(run_dir: str, snapshot: str, *arguments: str) -> bytes:
    """Run `counter` until it has counted a little, and suspend it. Returns what it printed."""
    with subprocess.Popen(
        command(run_dir, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        printed = process.stdout.read(40)
        name = os.listdir(run_dir)
        drain = threading.Thread(target=lambda: drained.append(process.stdout.read()))
        drained: list[bytes] = []
        drain.start()
        (path,) = [os.path.join(run_dir, n) for n in name if not n.startswith(".")]
        assert "error" not in ipc.snapshot_request(path, snapshot, ipc.IpcOpcode.START_SUSPEND)
        assert process.wait(30) == SUSPENDED
        drain.join()
        assert process.stderr.read().endswith(b": suspended\n")
    return printed + drained[0]


def test_a_suspended_vm_goes_on_under_its_own_name_with_the_next_number(run_dir, tmp_path):
    snapshot = str(tmp_path / "vm.ckp")
    before = suspend_counter(run_dir, snapshot, "-m", "16", "counting")
    process = subprocess.Popen(
        command(run_dir, "-r", snapshot),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        after = process.stdout.read(40)
        process.send_signal(signal.SIGTERM)
        after += process.stdout.read()
        assert process.wait(30) == POWEROFF
        assert process.stderr.read() == b"counting: powered off by SIGTERM\n"
    numbers = [int(word) for word in (before + after).split()[1:-1] if word.isdigit()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 10


def test_a_snapshot_is_not_restored_into_memory_of_another_size(run_dir, tmp_path):
    snapshot = str(tmp_path / "vm.ckp")
    suspend_counter(run_dir, snapshot, "-m", "16")
    assert_refused(run(run_dir, "-m", "32", "-r", snapshot), "is of a VM with 16384K of memory")


@pytest.fixture
def on_terminal(run_dir):
    """Starts VMs on terminals of their own, and clears them away."""
    vms: list[VmOnTerminal] = []

    def start(*arguments: str, instead: list[str] | None = None) -> VmOnTerminal:
        vms.append(VmOnTerminal(instead or command(run_dir, *arguments)))
        return vms[-1]

    yield start
    for vm in vms:
        vm.close()


def test_on_a_terminal_the_console_is_raw_and_ctrl_a_x_leaves_it_as_it_was(on_terminal, run_dir):
    vm = on_terminal("raw").runs()
    assert os.path.exists(os.path.join(run_dir, "raw"))
    vm.type(b"\x01x")
    assert vm.exit_code() == POWEROFF
    assert vm.mode() == vm.before
    assert b"raw: left with Ctrl-A x" in vm.shown
    assert not os.path.exists(os.path.join(run_dir, "raw")), "the socket is gone"


def test_ctrl_c_and_ctrl_z_and_ctrl_backslash_are_the_guests(on_terminal):
    vm = on_terminal().runs()
    vm.type(b"\x03\x1a\x1c")
    time.sleep(0.3)
    assert vm.process.poll() is None and vm.is_raw()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_powers_the_vm_off_and_the_terminal_is_as_it_was(on_terminal, run_dir, number):
    vm = on_terminal("signalled").runs()
    vm.process.send_signal(number)
    assert vm.exit_code() == POWEROFF
    assert vm.mode() == vm.before
    assert f"signalled: powered off by {number.name}".encode() in vm.shown
    assert not os.path.exists(os.path.join(run_dir, "signalled"))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_a_signal_that_kills_the_vm_on_the_spot_leaves_the_terminal_as_it_was(on_terminal, number, kill):
    vm = on_terminal().runs()
    kill(vm.process.pid, number)
    assert vm.exit_code() == -number
    vm.until(lambda: vm.mode() == vm.before, seconds=5)


def test_a_vm_that_is_killed_while_it_is_stopped_leaves_the_terminal_to_whoever_has_it_now(on_terminal):
    vm = on_terminal().runs()
    vm.process.send_signal(signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(vm.process.pid, os.WUNTRACED)[1])
    tty.setraw(vm.terminal)  # another VM, say
    raw = vm.mode()
    vm.process.kill()
    vm.process.wait()
    time.sleep(0.3)
    assert vm.mode() == raw


def test_python_does_not_warn_that_the_vm_forks_the_guard_of_its_terminal_when_it_has_threads(on_terminal, run_dir):
    vm = on_terminal(instead=[sys.executable, "-W", "always", *command(run_dir)[1:]]).runs()
    vm.type(b"\x01x")
    assert vm.exit_code() == POWEROFF
    assert b"fork" not in vm.shown


def test_a_crash_of_the_machine_leaves_the_terminal_as_it_was_and_is_no_exit_code_of_the_guest(on_terminal, run_dir):
    crash = (
        "import sys, time; from mini_bhyve import __main__ as bhyve\n"
        "def run(machine):\n"
        "    machine.console.write(b'here'); time.sleep(0.3); raise ZeroDivisionError('a mistake of ours')\n"
        "bhyve.Machine.run = run; sys.exit(bhyve.main())"
    )
    vm = on_terminal(instead=[sys.executable, "-c", crash, "-o", f"rundir={run_dir}", "crashed"]).runs()
    assert vm.exit_code() == ERROR
    assert vm.mode() == vm.before
    assert b"ZeroDivisionError: a mistake of ours" in vm.shown
    assert not os.path.exists(os.path.join(run_dir, "crashed"))


def test_a_terminal_that_is_closed_ends_the_vm_in_order(on_terminal, run_dir):
    vm = on_terminal("closed").runs()
    os.close(vm.terminal)
    os.close(vm.user)
    assert vm.process.wait(30) == POWEROFF
    assert not os.path.exists(os.path.join(run_dir, "closed"))


def test_a_hangup_behind_the_end_of_a_vm_does_not_take_its_exit_code(run_dir):
    # A terminal that is closed ends the input first, which ends the VM; SIGHUP may come when that is done.
    late = (
        "import os, signal, sys; from mini_bhyve import __main__ as bhyve\n"
        "code = bhyve.main(); os.kill(os.getpid(), signal.SIGHUP); sys.exit(code)"
    )
    arguments = [sys.executable, "-c", late, "-o", f"rundir={run_dir}", "-o", "guest=shell"]
    ended = subprocess.run(arguments, input=b"halt\n", capture_output=True, cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == HALT


def test_a_stopped_vm_gives_the_terminal_back_and_takes_it_again(on_terminal):
    vm = on_terminal().runs()
    vm.process.send_signal(signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(vm.process.pid, os.WUNTRACED)[1])
    assert vm.mode() == vm.before
    vm.process.send_signal(signal.SIGCONT)
    vm.until(vm.is_raw)
    vm.process.send_signal(signal.SIGTERM)
    assert vm.exit_code() == POWEROFF
    assert vm.mode() == vm.before


def test_a_vm_in_the_background_leaves_the_terminal_to_the_shell_and_takes_it_when_it_is_brought_forward(
    on_terminal, run_dir
):
    # What a shell does for `python -m mini_bhyve &`, and for `fg` when it is sent SIGUSR1.
    shell = (
        "import os, signal, sys\n"
        "vm = os.fork()\n"
        "if vm == 0:\n"
        "    os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.tcsetpgrp(0, vm))\n"
        "print('VM', vm, flush=True)\n"
        "sys.exit(os.WEXITSTATUS(os.waitpid(vm, 0)[1]))\n"
    )
    vm = on_terminal(instead=[sys.executable, "-c", shell, *command(run_dir, "job")])
    vm.until(lambda: os.path.exists(os.path.join(run_dir, "job")) and vm.look().count(b"\n") > 1)
    vm.type(b"for the shell\n")
    time.sleep(0.3)
    assert vm.mode() == vm.before, "and the VM was not stopped for touching it, since it comes forward on its own:"
    vm.process.send_signal(signal.SIGUSR1)
    vm.until(vm.is_raw)
    vm.type(b"\x01x")
    assert vm.exit_code() == POWEROFF
    assert vm.mode() == vm.before


@pytest.mark.skipif(
    sys.implementation.name == "pypy", reason="PyPy's getsignal() does not know which signals were ignored at its start"
)
def test_a_vm_that_nohup_protects_from_sighup_goes_on(run_dir):
    process = subprocess.Popen(
        ["nohup", *command(run_dir)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(30) == POWEROFF


def test_a_signal_ends_a_vm_whose_console_nobody_reads(run_dir):
    process = subprocess.Popen(
        command(run_dir, "full"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    with process:
        assert process.stdout is not None and process.stdout.read(1)
        time.sleep(0.5)  # the guest prints on, and the pipe may fill
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == POWEROFF
    assert not os.path.exists(os.path.join(run_dir, "full"))


def test_a_console_whose_reader_is_gone_ends_the_vm_in_order(run_dir):
    process = subprocess.Popen(
        command(run_dir, "headless"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    with process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(30) == POWEROFF
        assert process.stderr.read() == b"headless: nobody is left to read the console\n"
    assert not os.path.exists(os.path.join(run_dir, "headless"))
