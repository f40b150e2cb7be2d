"""What a real processor did: 7,624 instructions captured from an 80286, run on ours."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from run_vectors import main, read_tests, run_file

# The vectors are not part of the project; where they are at hand, they lie beside it.
VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "80286-real-mode.jsonl.gz"

needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason=f"there are no captured vectors at {VECTORS}")


@needs_vectors
def test_all_that_was_captured_from_an_80286_comes_out_alike():
    result = run_file(str(VECTORS))
    assert not result.failures
    assert result["passed"] + result["skipped"] == 7624
    assert result["skipped"] < 50


@needs_vectors
def test_the_runner_names_the_form_that_fails_and_says_how_many_passed(tmp_path, capsys):
    tests = [test for test, _ in zip(read_tests(str(VECTORS)), range(3))]
    tests[1]["final_regs"]["dx"] = tests[1]["regs"]["dx"] ^ 1
    path = tmp_path / "three.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(test) + "\n" for test in tests)
    assert main(str(path)) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith(f"{tests[1]['opcode']}: 1 failed, first {tests[1]['name']}: dx: ")
    assert printed[1] == "passed 2 of 3, skipped 0"


HLT, MOV_AX_BX = "f4", "89d8"


@pytest.mark.parametrize("ax, failed", [(0x1234, 0), (0x1235, 1)])
def test_the_runner_runs_a_test_of_our_own(tmp_path, capsys, ax, failed):
    registers = dict.fromkeys("cx dx sp bp si di ds es ss".split(), 0) | {"ax": 0, "bx": 0x1234, "cs": 0x100, "ip": 0}
    code = bytes.fromhex(MOV_AX_BX + HLT)
    test = {
        "name": "mov ax,bx", "bytes": code.hex(), "opcode": "89", "flags_mask": 0xFFFF,
        "regs": {**registers, "flags": 2}, "ram": [[0x1000 + n, byte] for n, byte in enumerate(code)],
        "final_regs": {"ax": ax, "ip": len(code)}, "final_ram": [],
    }  # fmt: skip
    path = tmp_path / "one.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(test) + "\n")
    assert main(str(path)) == failed
    assert capsys.readouterr().out.endswith(f"passed {1 - failed} of 1, skipped 0\n")
