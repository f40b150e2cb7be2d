"""Builds tests/review_client.c, a client that knows the review and not mini-bhyve, where there is a C compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")


def compile_review_client(directory: Path) -> Path:
    """The path of the program, built in ``directory``. Skips the test if there is no C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler here to build a client of the review with")
    program = directory / "review_client"
    subprocess.run([compiler, "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE], check=True)
    return program
