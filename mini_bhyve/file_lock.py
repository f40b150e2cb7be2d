"""Locks on files and directories, flock(2): taken at once or not at all, or waited for, but not for ever.

Whoever can open a file can lock it, and need be no friend. So nobody here waits in flock() itself.
"""

from __future__ import annotations

import fcntl
import time

INTERVAL = 0.005  # seconds between two attempts


def try_lock(descriptor: int) -> bool:
    """Lock a file or directory, unless another has it locked; whether it is ours now. OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_within(descriptor: int, seconds: float) -> bool:
    """Lock it as soon as nobody else has it locked, but give up after so many seconds; whether it is ours. OSError."""
    end = time.monotonic() + seconds
    while not try_lock(descriptor):
        if time.monotonic() >= end:
            return False
        time.sleep(INTERVAL)
    return True
