"""What several tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("vm_tools", "os_tools")


@pytest.fixture
def run_dir() -> Iterator[str]:
    """A directory for control sockets, with a short path: that of a unix socket has at most about 100 characters."""
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        yield directory
