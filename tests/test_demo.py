"""The demo notices what it is there to notice. (That the real VM passes it is `make demo`.)

It runs here with actors: a program that counts in the VM's place, and one that suspends it, each with a fault to order.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parent.parent / "tools" / "demo.py"

# Counts until the file `end` appears, which holds the exit code. The snapshot holds the count.
VM = """
import os, sys, time
fault = os.environ["FAULT"]
restoring = "-r" in sys.argv
if fault == "dies":
    sys.exit(4)
if restoring:
    count = int(open("vm.ckp").read()) + {"skips": 1, "repeats": -1}.get(fault, 0)
    print("" if fault == "in a line" else f"{count + 1}", flush=True)
    count += fault != "in a line"
else:
    print("counter: paging is on, counting", flush=True)
    count = 0
while not os.path.exists("end"):
    count += 1
    print(count, flush=True)
    time.sleep(0.002)
if fault == "in a line":
    count += 1
    print(count, end="", flush=True)
open("vm.ckp", "w").write(str(count))
code = open("end").read()
os.unlink("end")
sys.exit(0 if fault == "wrong code" else int(code))
"""
CTL = """
import os, sys, time
fault, command = os.environ["FAULT"], sys.argv[1]
if command == "status":
    sys.exit(0 if os.path.exists("asked") or open("asked", "w").close() else 1)
if fault == "refuses":
    sys.exit("ctl: refused")
with open("new", "w") as file:
    file.write({"suspend": "5", "poweroff": "1"}[command])
os.rename("new", "end")
while os.path.exists("end"):
    time.sleep(0.002)
for suffix in (".kern", ".meta") if fault != "no meta" else (".kern",):
    open("vm.ckp" + suffix, "w").write("state\\n")
"""


def run_demo(tmp_path: Path, fault: str) -> subprocess.CompletedProcess:
    (tmp_path / "tools").mkdir()
    shutil.copy(DEMO, tmp_path / "tools")
    (tmp_path / "ctl.py").write_text(CTL)
    (tmp_path / "mini_bhyve").mkdir()
    (tmp_path / "mini_bhyve" / "__main__.py").write_text(VM)
    # The demo works in a directory below TMPDIR, and the programs it starts find our actors there before anything else.
    (tmp_path / "tmp").mkdir()
    return subprocess.run(
        [sys.executable, tmp_path / "tools" / "demo.py"],
        env={**os.environ, "FAULT": fault, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("suspended", ["between two lines", "in a line"])
def test_the_demo_succeeds_when_the_next_number_follows(tmp_path, suspended):
    demo = run_demo(tmp_path, suspended)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "restored, and the next number was" in demo.stdout
    for command in ("python -m mini_bhyve -H vm", "python ctl.py suspend vm", "python -m mini_bhyve -H -r vm.ckp"):
        assert f"$ {command}\n" in demo.stdout


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("skips", "should have come after"),
        ("repeats", "should have come after"),
        ("wrong code", "should have been 5"),
        ("no meta", "`ls -lsh vm.ckp vm.ckp.kern vm.ckp.meta` ended with exit code"),
        ("refuses", "`python ctl.py suspend vm` ended with exit code 1"),
        ("dies", "`python -m mini_bhyve -H vm` ended with exit code 4"),
    ],
)
def test_the_demo_fails_and_says_why_when_something_does_not_hold(tmp_path, fault, complaint):
    demo = run_demo(tmp_path, fault)
    assert demo.returncode == 1
    assert complaint in demo.stderr
    assert not list((tmp_path / "tmp").iterdir())
