"""The story that mini-bhyve tells, as a user would live it, and checked on the way: `make demo`.

A VM boots and counts; it is suspended into three files; it is restored and must go on with the very next number. Every
command is shown as one would type it, and what is shown is what is run, with "python" being the Python that runs this.
The exit code is 0 only if everything held.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
SUSPENDED, POWERED_OFF = 5, 1  # exit codes of bhyve(8)
PATIENCE = 20  # seconds that any one step may take; it takes about one
BOLD, PLAIN = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
screen = threading.Lock()


class DemoFailed(Exception):
    """Something did not hold; the message is the sentence to end with."""


def put(line: str) -> None:
    """Print a line, whole: the VM's console is printed by a thread of its own."""
    with screen:
        print(line, flush=True)


def say(text: str) -> None:
    put("\n" + textwrap.fill(" ".join(text.split()), 100))


def show(command: str) -> list[str]:
    """Print the command as a user types it, and return it as it is run."""
    put(f"\n{BOLD}$ {command}{PLAIN}")
    words = shlex.split(command)
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def run(command: str) -> None:
    """Run a command to its end; its output is the user's to see."""
    try:
        code = subprocess.run(show(command), stdin=subprocess.DEVNULL, timeout=PATIENCE).returncode
    except subprocess.TimeoutExpired:
        raise DemoFailed(f"`{command}` has not come back after {PATIENCE} s") from None
    if code != 0:
        raise DemoFailed(f"`{command}` ended with exit code {code}")


class Vm:
    """A running VM, and a thread that shows its console and keeps what was on it."""

    def __init__(self, command: str):
        self.command = command
        self.console = ""
        self.process = subprocess.Popen(show(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode("ascii", "replace")
            put(f"    vm | {text.rstrip()}")
            self.console += text

    def wait_for_lines(self, count: int) -> None:
        """Until so many lines have come out."""
        deadline = time.monotonic() + PATIENCE
        while self.console.count("\n") < count:
            if self.process.poll() is not None:
                raise DemoFailed(f"`{self.command}` ended with exit code {self.process.returncode}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"`{self.command}` has not printed {count} lines after {PATIENCE} s")
            time.sleep(0.01)

    def wait_for_exit(self, expected: int) -> None:
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"`{self.command}` has not ended after {PATIENCE} s") from None
        self.reader.join()
        put(f"    vm ended with exit code {code}")
        if code != expected:
            raise DemoFailed(f"the exit code of `{self.command}` should have been {expected}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def numbers(console: str) -> list[int]:
    """The counter's numbers, but for a line that is not complete."""
    return [int(line) for line in console.split("\n")[:-1] if line.strip().isdecimal()]


def check_order(counted: list[int]) -> None:
    """The numbers are 1, 2, 3 and so on."""
    for expected, number in enumerate(counted or [0], 1):
        if number != expected:
            raise DemoFailed(f"{expected} should have come after {expected - 1}, not {number}")


def tell(cleanup: contextlib.ExitStack) -> None:
    """The story, in the working directory."""
    # Somebody's own VM of this name must not be disturbed: then ours get a directory for their sockets.
    probe = [sys.executable, "ctl.py", "status", "vm"]
    taken = subprocess.run(probe, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE).returncode == 0
    bhyve_option, ctl_option = ("-o rundir=. ", "--rundir . ") if taken else ("", "")

    say("Start a VM named vm. Its guest turns on paging and counts on the serial port, 20 a second.")
    vm = Vm(f"python -m mini_bhyve {bhyve_option}-H vm")
    cleanup.callback(vm.kill)
    vm.wait_for_lines(11)

    say("From another terminal, ask over the VM's socket how it is, and then suspend it to disk.")
    run(f"python ctl.py {ctl_option}status vm")
    run(f"python ctl.py {ctl_option}suspend vm")
    vm.wait_for_exit(SUSPENDED)
    before = numbers(vm.console)
    check_order(before)

    say("""The snapshot is three files: the guest's RAM, the state of CPU and devices, and a description of both. The
        first column is the space on disk: of RAM, only the pages in use take any.""")
    run("ls -lsh vm.ckp vm.ckp.kern vm.ckp.meta")
    run("cat vm.ckp.meta")

    say("A new process takes the VM up where the old one left it.")
    restored = Vm(f"python -m mini_bhyve {bhyve_option}-H -r vm.ckp")
    cleanup.callback(restored.kill)
    restored.wait_for_lines(10)
    run(f"python ctl.py {ctl_option}poweroff vm")
    restored.wait_for_exit(POWERED_OFF)

    # A suspend may come in the middle of a line; so the two consoles are read as one.
    both = numbers(vm.console + restored.console)
    check_order(both)
    if len(both) == len(before):
        raise DemoFailed(f"the restored VM should have gone on with {len(before) + 1}")
    say(f"It held: suspended at {before[-1]}, restored, and the next number was {both[len(before)]}.")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="mini-bhyve-") as directory, contextlib.ExitStack() as cleanup:
        for name in ("ctl.py", "mini_bhyve"):
            os.symlink(TREE / name, Path(directory, name))
        cleanup.callback(os.chdir, os.getcwd())
        os.chdir(directory)
        try:
            tell(cleanup)
        except DemoFailed as failure:
            print(f"\nThe demo failed: {failure}.", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
