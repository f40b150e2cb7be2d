"""Fifty clients that ask a VM for all it can take: a process of its own, which shares no lock with whoever watches.

    python flooder.py RUN_DIR NAME SEED DATAGRAMS

Each client is a thread, and sends as soon as the VM's queue has room. Of each five there are

    two that ask and wait      for one answer to each request, before they ask again; what is wrong is answered, too
    one that never reads       its queue is soon full of answers
    one that vanishes          before its answer comes; the next request comes from a new address
    one without an address     which nobody can answer

What they send is, in equal parts, well-formed (and does not end or pause the VM), mutated, and random. In the end a
line of JSON says how many requests those who waited have sent, how many were answered, and what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Callable

from mini_bhyve import nvlist
from mini_bhyve.ipc import IpcError, IpcMessage, IpcOpcode

CLIENTS = 50
PATIENCE = 120.0  # seconds

# Well-formed, whatever becomes of it. RESUME is refused, as the VM is not paused, and the checkpoint has no directory.
HARMLESS = {
    IpcOpcode.START_CHECKPOINT: b"/nonexistent/directory/vm.ckp",
    IpcOpcode.STATUS: b"",
    IpcOpcode.REGS: b"",
    IpcOpcode.RESUME: b"",
}


def is_harmless(datagram: bytes) -> bool:
    """Whether a datagram is no request at all, or one of HARMLESS."""
    try:
        message = IpcMessage.from_datagram(datagram)
    except IpcError:
        return True
    if message.code == IpcOpcode.START_CHECKPOINT:
        return message.filename.startswith("/nonexistent/")
    return message.code in HARMLESS


def is_granted(datagram: bytes) -> bool:
    """Whether this is a request which the VM answers with anything but a refusal."""
    try:
        message = IpcMessage.from_datagram(datagram)
    except IpcError:
        return False
    return message.code == IpcOpcode.STATUS or (message.code == IpcOpcode.REGS and message.data.vcpu.vcpuid == 0)


def well_formed(chance: random.Random) -> bytes:
    opcode = chance.choice(list(HARMLESS))
    whole = struct.pack("=I1024s", opcode, HARMLESS[opcode])
    return whole if HARMLESS[opcode] or chance.random() < 0.5 else whole[:4]


def mutated(chance: random.Random) -> bytes:
    datagram = bytearray(well_formed(chance))
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(datagram) + 1)
        how = chance.randrange(4)
        if how == 0:
            datagram[place : place + 1] = bytes([chance.randrange(256)])
        elif how == 1:
            del datagram[place:]
        elif how == 2:
            datagram[place:place] = chance.randbytes(chance.randrange(1, 9))
        else:
            datagram[place : place + 4] = struct.pack("=I", chance.choice([0, 1, 10, 2**31, 2**32 - 1]))
    return bytes(datagram)


def any_bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice([chance.randrange(16), chance.randrange(2000)]))


def datagrams(chance: random.Random, number: int) -> Iterator[bytes]:
    """So many datagrams, none of which ends or pauses the VM."""
    while number:
        datagram = chance.choice([well_formed, mutated, any_bytes])(chance)
        if is_harmless(datagram):
            yield datagram
            number -= 1


class Flood:
    def __init__(self, run_dir: str, name: str) -> None:
        self.run_dir = run_dir
        self.path = os.path.join(run_dir, name)
        self.lock = threading.Lock()
        self.asked = self.answered = 0
        self.failures: list[str] = []

    @contextlib.contextmanager
    def client(self) -> Iterator[socket.socket]:
        address = os.path.join(self.run_dir, f".{os.urandom(4).hex()}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.bind(address)
            try:
                yield client
            finally:
                os.unlink(address)

    def patient(self, requests: Iterable[bytes]) -> None:
        with self.client() as client:
            # Whoever waits in recv() with a time limit does so in sendto() as well, and not in line.
            limit = struct.pack("@ll", int(PATIENCE), 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            for request in requests:
                with self.lock:
                    self.asked += 1
                client.sendto(request, self.path)
                reply = nvlist.unpack(client.recv(65536))
                assert ("error" not in reply) == is_granted(request), (request, reply)
                with self.lock:
                    self.answered += 1
            with contextlib.suppress(BlockingIOError):
                client.recv(65536, socket.MSG_DONTWAIT)
                raise AssertionError("a request was answered twice")

    def deaf(self, requests: Iterable[bytes]) -> None:
        with self.client() as client:
            for request in requests:
                client.sendto(request, self.path)

    def vanishing(self, requests: Iterable[bytes]) -> None:
        for request in requests:
            with self.client() as client:
                client.sendto(request, self.path)

    def nameless(self, requests: Iterable[bytes]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            for request in requests:
                client.sendto(request, self.path)

    def run(self, behaviour: Callable[[Iterable[bytes]], None], requests: Iterable[bytes]) -> None:
        try:
            behaviour(requests)
        except Exception as error:
            self.failures.append(f"{behaviour.__name__}: {type(error).__name__}: {error}")


def main(run_dir: str, name: str, seed: str, number: str) -> None:
    flood = Flood(run_dir, name)
    kinds = [flood.patient, flood.patient, flood.deaf, flood.vanishing, flood.nameless]
    threads = [
        threading.Thread(
            target=flood.run,
            args=(kinds[i % len(kinds)], datagrams(random.Random(f"{seed} {i}"), int(number) // CLIENTS)),
        )
        for i in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {name: getattr(flood, name) for name in ("asked", "answered", "failures")}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
