"""A process that tries to become the VM of a name, to race others for it.

    python contender.py RUN_DIR NAME

Each line on standard input is one try; the answer is a line on standard output: "won", or the sentence with which it
was refused. A try is made by a forked process. The one that has won is the VM until the next line: it ends in order if
that is "end", and is killed if it is "die".
"""

from __future__ import annotations

import os
import signal
import sys

from mini_bhyve.ipc import IpcError, init_ipc


def main(run_dir: str, name: str) -> None:
    print("ready", flush=True)
    while sys.stdin.readline():
        told, tell = os.pipe()
        vm = os.fork()
        if vm == 0:
            be_vm(run_dir, name, tell)
        os.close(tell)
        with open(told) as answer:
            outcome = answer.readline()
            print(outcome, end="", flush=True)
            if outcome == "won\n":
                os.kill(vm, signal.SIGTERM if sys.stdin.readline() == "end\n" else signal.SIGKILL)
            os.waitpid(vm, 0)
            if outcome == "won\n":
                print("gone", flush=True)


def be_vm(run_dir: str, name: str, tell: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        server = init_ipc(name, run_dir, {})
        os.write(tell, b"won\n")
        signal.sigwait([signal.SIGTERM])
        server.close()
    except IpcError as error:
        os.write(tell, f"{error}\n".encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
