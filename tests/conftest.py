"""What several tests share."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

pytest.register_assert_rewrite("vm_tools", "os_tools", "busy_machine", "lockstep")

# What the tests start shall behave as at a terminal, also where they were started by nohup, which has SIGHUP ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def run_dir() -> Iterator[str]:
    """A directory for control sockets, with a short path: that of a unix socket has at most about 100 characters."""
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        yield directory


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """Write bytes to a file, return its path."""

    def write(data: bytes, name: str = "kernel") -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write
