"""The control socket between bhyve(8) and bhyvectl(8): ``ipc.c`` and ``ipc.h`` of the review explained here.

A running VM owns a unix domain socket named after it, and a thread waits there for messages. Each message is one
datagram, ``struct ipc_message``: an opcode and a union with a member for each kind of command::

    0      4                                                              1028
    +------+--------------------------------------------------------------+
    | code | union: snapshot_filename[1024], or vcpuid, or nothing        |
    +------+--------------------------------------------------------------+

Both numbers are in the byte order of the machine, as a C program leaves them. What a command does is not known here:
the machine hands :func:`init_ipc` a table of handlers, of which "checkpoint" is one among others, and so a VM that
cannot take snapshots still answers its socket. The names are those of the review:

======================  ================================================================================
in the review           here
======================  ================================================================================
BHYVE_RUN_DIR           :data:`BHYVE_RUN_DIR`; :func:`run_dir_for` where that is not ours to write
MAX_VMNAME              :data:`MAX_VMNAME`
MAX_SNAPSHOT_FILENAME   :data:`MAX_SNAPSHOT_FILENAME`
enum ipc_opcode         :class:`IpcOpcode`
struct checkpoint_op    :class:`CheckpointOp`
struct ipc_message      :class:`IpcMessage`
init_ipc()              :func:`init_ipc`
ipc_thread()            :func:`ipc_thread`
get_message()           :func:`get_message`
send_message()          :func:`send_message`, bhyvectl's half, shared with it as ipc.h is
snapshot_request()      :func:`snapshot_request`, likewise
======================  ================================================================================

Unlike the review's, a message may be answered. A sender that has bound an address of its own gets an nvlist back, as
in FreeBSD from 2026 on: what was asked for, nothing (an empty list) when all went well, or ``error`` with a sentence.
A sender without an address is served in silence, so that a program written from the review's header works unchanged.

Requests are served one after the other. For one that takes its time a handler returns a :class:`Pending`, and while
that is under way those that only look are served all the same, and the others wait their turn::

                    STATUS, REGS                       at once
    datagram --->   any other, nothing is pending      at once
                    any other, an answer is pending    waiting[0 .. MAX_WAITING - 1], served when the answer is there

Only root and the user whose VM it is can ask: directory and socket have modes that keep others out, and where the
system tells who sent a datagram (Linux: unix(7), SO_PASSCRED), what others have sent all the same is dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import select
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Callable, Protocol, Union, runtime_checkable

from mini_bhyve import nvlist
from mini_bhyve.file_lock import lock_within

BHYVE_RUN_DIR = "/var/run/bhyve/"

#: Bytes in ``sun_path`` of ``struct sockaddr_un``, the final NUL included.
SUN_PATH_SIZE = 108 if sys.platform.startswith("linux") else 104

#: Bytes for the name of a VM, the final NUL included: what BHYVE_RUN_DIR leaves of sun_path, 89 on FreeBSD.
MAX_VMNAME = SUN_PATH_SIZE - len(BHYVE_RUN_DIR)

#: Bytes for the name of a snapshot, the final NUL included: FreeBSD's PATH_MAX, on every platform.
MAX_SNAPSHOT_FILENAME = 1024

#: No answer is longer than this many bytes (it is one datagram).
MAX_REPLY = 65536

#: Seconds to wait for an answer. Writing a snapshot takes as long as the disk takes.
REPLY_TIMEOUT = 5.0
SNAPSHOT_TIMEOUT = 600.0

#: Seconds between two looks at whether the VM that owes an answer is still there.
PROBE_INTERVAL = 0.5

#: So many requests wait while one takes its time. Those beyond are refused.
MAX_WAITING = 100

#: Of the time there is, the thread takes no more than this part, however many requests come: the rest is the virtual
#: CPU's. What it may take at once, in seconds, is enough for some ten of them.
SHARE = 0.2
AT_ONCE = 0.002

#: A client's socket that nobody has open is removed if its name is so many seconds old. (One that is being made has
#: its name a moment before it can be reached.)
DEAD_AFTER = 60.0

#: Seconds to wait for somebody else to be done with the names in the run directory, which takes a moment.
LOCK_TIMEOUT = 5.0

#: How Linux tells who has sent a datagram: ``struct ucred``, which is pid, uid, gid. PyPy's socket module lacks the
#: numbers, which are the same on almost every architecture.
UCRED = struct.Struct("@iII")
SO_PASSCRED = getattr(socket, "SO_PASSCRED", 16)
SCM_CREDENTIALS = getattr(socket, "SCM_CREDENTIALS", 2)
SENDERS_ARE_KNOWN = sys.platform.startswith("linux") and (
    hasattr(socket, "SO_PASSCRED") or os.uname().machine in ("x86_64", "aarch64")
)

#: Room beside a datagram for the sender's credentials, and for nothing else: descriptors sent along are closed by the
#: kernel, and never become ours.
ANCILLARY_SIZE = socket.CMSG_SPACE(UCRED.size) if SENDERS_ARE_KNOWN else 0


class IpcError(Exception):
    """Why a command was refused, or could not be delivered: one sentence."""


class NoAnswer(IpcError):
    """A VM is there, but has not answered in time."""


# --- ipc.h: the messages ---------------------------------------------------------------------------------------------


class IpcOpcode(enum.IntEnum):
    """``enum ipc_opcode``. The first two are the review's; what each is answered stands beside it.

    STATUS is answered with ``name``; ``state``: "running", "paused" or "halted"; ``pid``; ``ncpus``; ``memory`` in
    bytes; ``instructions`` executed so far; ``time_ns``, virtual, since power-on; ``rip``; ``mode``, such as "32-bit
    code, no paging"; ``snapshot``: whether the VM can take any; ``active_cpus`` and ``suspended_cpus``: lists. While a
    snapshot is being written there are also ``snapshot_file``, its name, ``snapshot_done`` and ``snapshot_total``: how
    many bytes of memory have been gone through, and of how many.

    REGS is answered with the numbers that bhyvectl shows, under its names: rip rsp rax rbx rcx rdx rsi rdi rbp r8 to
    r15 rflags cr0 cr2 cr3 cr4 efer dr0 to dr3 dr6 dr7; the selectors cs ds es fs gs ss tr ldtr, and for each of them
    ``cs_base``, ``cs_limit``, ``cs_access`` and so on (the limit in bytes, granularity applied; the access rights as a
    VMCS has them, Intel SDM vol. 3C, "Guest Register State", table "Format of Access Rights"); ``gdtr_base``,
    ``gdtr_limit``, ``idtr_base``, ``idtr_limit``.

    START_CHECKPOINT and START_SUSPEND are answered with nothing, or with ``warning``: the snapshot is there, and a
    sentence says what the user should know of it.
    """

    START_CHECKPOINT = 0  # takes a CheckpointOp; see above
    START_SUSPEND = 1  # takes a CheckpointOp; see above, and the VM is gone
    STATUS = 2  # see above
    REGS = 3  # takes a VcpuOp; see above
    PAUSE = 4  # empty
    RESUME = 5  # empty
    POWEROFF = 6  # empty, and the VM is gone
    RESET = 7  # empty, and the VM is gone: bhyve ends, with the exit code that asks for a new start
    INJECT_NMI = 8  # takes a VcpuOp; empty
    DESTROY = 9  # empty, and the VM is gone


TAKES_FILENAME = frozenset({IpcOpcode.START_CHECKPOINT, IpcOpcode.START_SUSPEND})
ENDS_VM = frozenset({IpcOpcode.START_SUSPEND, IpcOpcode.POWEROFF, IpcOpcode.RESET, IpcOpcode.DESTROY})
ONLY_LOOKS = frozenset({IpcOpcode.STATUS, IpcOpcode.REGS})


class CheckpointOp(ctypes.Structure):
    """``struct checkpoint_op``: where to write the snapshot, as a path with a NUL behind it."""

    _fields_ = [("snapshot_filename", ctypes.c_char * MAX_SNAPSHOT_FILENAME)]
    snapshot_filename: bytes


class VcpuOp(ctypes.Structure):
    """Which virtual CPU is meant: bhyvectl's ``--cpu``. A message that is only a code means CPU 0.

    Whether the VM has that CPU is for the handler to say.
    """

    _fields_ = [("vcpuid", ctypes.c_uint32)]
    vcpuid: int


class IpcData(ctypes.Union):
    """The union inside ``struct ipc_message``; the code says which member holds."""

    _fields_ = [("op", CheckpointOp), ("vcpu", VcpuOp)]
    op: CheckpointOp
    vcpu: VcpuOp


class IpcMessage(ctypes.Structure):
    """``struct ipc_message``, 1028 bytes."""

    _fields_ = [("code", ctypes.c_uint32), ("data", IpcData)]
    code: int
    data: IpcData

    @classmethod
    def from_datagram(cls, datagram: bytes) -> IpcMessage:
        """The message in a datagram, in memory of its own.

        (FreeBSD's get_message() received into the same buffer again and again and asked only for the code to be
        there, so that a short datagram was taken to mean the file name of the request before it.)

        Raises IpcError unless it is a whole message, or, for a command that needs no more, its code alone.
        """
        whole, code_alone = ctypes.sizeof(cls), ctypes.sizeof(ctypes.c_uint32)
        if len(datagram) < code_alone:
            raise IpcError(f"a message of {len(datagram)} bytes has no opcode, which takes {code_alone}")
        if len(datagram) > whole:
            raise IpcError(f"a message has {whole} bytes, and this one had more")
        message = cls.from_buffer_copy(datagram.ljust(whole, b"\0"))
        try:
            opcode = IpcOpcode(message.code)
        except ValueError:
            raise IpcError(f"command {message.code} not found") from None
        if len(datagram) != whole and (len(datagram) != code_alone or opcode in TAKES_FILENAME):
            raise IpcError(f"{opcode.name} is a message of {whole} bytes, and this one had {len(datagram)}")
        if opcode in TAKES_FILENAME:
            _ = message.filename  # refuse a bad one before anything begins
        return message

    @property
    def filename(self) -> str:
        """The absolute path in a message that has one. Raises IpcError if what is there is none."""
        name = self.data.op.snapshot_filename  # up to the first NUL, or all 1024 bytes if there is no NUL
        if len(name) == MAX_SNAPSHOT_FILENAME:
            raise IpcError("the file name does not end in a NUL")
        try:
            path = name.decode("utf-8")
        except UnicodeDecodeError:
            raise IpcError("the file name is not UTF-8") from None
        if not os.path.isabs(path):
            raise IpcError(f"the file name {path!r} is relative, and the VM may run in another directory")
        return path


@runtime_checkable
class Pending(Protocol):
    """The answer to a command that takes its time: what a handler returns instead of it."""

    def fileno(self) -> int:
        """Readable when there is news of it. Open until answer() has been called, and readable once it is finished."""

    def finished(self) -> bool:
        """Takes in the news, without waiting; whether the answer is there."""

    def wait(self) -> None:
        """Waits until finished() holds."""

    def answer(self) -> dict[str, Any] | None:
        """The answer, once finished; raises IpcError if it is a refusal."""


Handler = Callable[[IpcMessage], Union[None, dict[str, Any], Pending]]


# --- names and places ------------------------------------------------------------------------------------------------

#: Bytes in the hidden name of a client's socket, see send_message().
CLIENT_NAME_SIZE = len(".01234567")


def run_dir_for(option: str | None) -> str:
    """The directory of the control sockets: ``option`` if there is one, else BHYVE_RUN_DIR where we may use it.

    Where we may not, as a user who is not root, it is a directory of our own: ``$XDG_RUNTIME_DIR/bhyve``, or
    ``bhyve-UID`` among the temporary files. Nothing is created here, so that bhyve and bhyvectl come to the same
    answer whoever is first.

    Raises IpcError if the directory of our own turns out not to be ours alone.
    """
    if option:
        return os.path.abspath(option)
    system = os.path.normpath(BHYVE_RUN_DIR)
    nearest = system if os.path.lexists(system) else os.path.dirname(system)
    if os.access(nearest, os.W_OK | os.X_OK):
        return system
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and os.path.isdir(runtime):
        own = os.path.join(runtime, "bhyve")
    else:
        own = os.path.join(tempfile.gettempdir(), f"bhyve-{os.getuid()}")
    with contextlib.suppress(FileNotFoundError):
        # Everybody may write among the temporary files, so somebody else may have come first with this name.
        found = os.lstat(own)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise IpcError(f"the run directory {own} is not a directory that belongs to you alone (mode 0700)")
    return own


def socket_path(run_dir: str, vmname: str) -> str:
    """The address of a VM's control socket. Raises IpcError for a name that no VM can have there.

    A leading dot is kept free for the addresses of clients, see :func:`send_message`.
    """
    if not vmname:
        raise IpcError("the name of a VM is empty")
    if "/" in vmname or not vmname.isprintable():  # a NUL is not printable, nor is a byte that is not UTF-8
        raise IpcError(f"the name of a VM may not have a slash or an unprintable character: {vmname!r}")
    if vmname.startswith("."):
        raise IpcError(f"the name of a VM may not begin with a dot: {vmname!r}")
    longest = min(MAX_VMNAME, SUN_PATH_SIZE - len(os.fsencode(os.path.join(run_dir, "")))) - 1
    if longest < CLIENT_NAME_SIZE:  # the client's name stands beside the VM's, or nobody could be answered
        raise IpcError(f"the path of the run directory {run_dir} is too long for a socket in it")
    if len(os.fsencode(vmname)) > longest:
        raise IpcError(f"the name of a VM has at most {longest} bytes in {run_dir}: {vmname!r}")
    return os.path.join(run_dir, vmname)


def vm_names(run_dir: str) -> list[str]:
    """The names of the VMs that have a socket in a directory, dead or alive; none if there is no such directory."""
    try:
        with os.scandir(run_dir) as entries:
            found = [entry.name for entry in entries if stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)]
    except FileNotFoundError:
        return []
    return sorted(name for name in found if not name.startswith(".") and name.isprintable())


def is_alive(path: str | bytes) -> bool:
    """Whether some process still has this socket open; the name stays behind when a VM is killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # a socket of another type, or another user's: alive or not, it is not ours to touch
    return True


def remove_dead_socket(path: str) -> bool:
    """Remove the socket that a killed VM left behind; whether there was one."""
    with contextlib.suppress(FileNotFoundError), _locked(os.path.dirname(path)):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not is_alive(path):
            os.unlink(path)
            return True
    return False


def _remove_dead_clients(run_dir: str) -> None:
    """Remove the sockets that killed clients of this user left behind. What cannot be removed is no harm."""
    with contextlib.suppress(OSError), os.scandir(run_dir) as entries:
        for entry in entries:
            if len(entry.name) == CLIENT_NAME_SIZE and entry.name.startswith("."):
                found = entry.stat(follow_symlinks=False)
                ours = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.getuid()
                if ours and time.time() - found.st_mtime > DEAD_AFTER and not is_alive(entry.path):
                    os.unlink(entry.path)


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Nobody else replaces dead sockets here meanwhile: between the look and the unlink() a VM could have come."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not lock_within(descriptor, LOCK_TIMEOUT):
            raise IpcError(f"somebody keeps the run directory {directory} locked")
        yield
    finally:
        os.close(descriptor)  # and with it the lock


# --- ipc.c: bhyve's half ---------------------------------------------------------------------------------------------


def init_ipc(
    vmname: str, run_dir: str, commands: Mapping[IpcOpcode, Handler], first: Pending | None = None
) -> IpcServer:
    """Create the control socket of a VM, and the thread that serves it.

    ``commands`` are the handlers: called in that thread, one after the other, with the message; what they return is
    the answer, None being an empty one, or a Pending. A handler refuses by raising IpcError. When one has returned for
    a command in ENDS_VM, or its pending answer is there and no refusal, the name of the socket is gone before the
    answer leaves: whoever has read that the VM is suspended can start it again at once under the same name.

    ``first`` is something that the VM has under way already: until it is finished, requests wait as they do while an
    answer is pending. What comes of it is for whoever started it to see.

    The directory is made (0700) if it is not there, and what killed clients left in it is removed; the socket has mode
    0600. Call this while there is no other thread yet that creates files, for the file mode mask belongs to the whole
    process.

    Raises IpcError if the name cannot be used, or a living VM has it.
    """
    path = socket_path(run_dir, vmname)
    listener = _new_socket()
    try:
        _know_senders(listener)  # before there is a name to send to
        _make_run_dir(run_dir)
        with _locked(run_dir):
            _remove_dead_clients(run_dir)
            if os.path.lexists(path):
                if not stat.S_ISSOCK(os.lstat(path).st_mode):
                    raise IpcError(f"{path} is in the way of the control socket, and not a socket")
                if is_alive(path):
                    raise IpcError(f"a VM named {vmname!r} is already running: its control socket {path} is in use")
                os.unlink(path)
            mask = os.umask(0o177)  # bind() makes the file, and there must be no moment at which it is open to others
            try:
                listener.bind(path)
            finally:
                os.umask(mask)
        try:
            return IpcServer(vmname, path, listener, commands, first)
        except (OSError, RuntimeError):  # there are no more descriptors, or no more threads
            os.unlink(path)
            raise
    except (OSError, RuntimeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise IpcError(f"cannot create the control socket {path}: {reason}") from None
    except IpcError:
        listener.close()
        raise


def _make_run_dir(run_dir: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(run_dir, 0o700)
    found = os.lstat(run_dir)
    if stat.S_ISLNK(found.st_mode):
        raise IpcError(f"the run directory {run_dir} is a symbolic link, which is not followed")
    if not stat.S_ISDIR(found.st_mode):
        raise IpcError(f"the run directory {run_dir} is not a directory")
    if found.st_uid not in (0, os.getuid()) or (found.st_mode & 0o002 and not found.st_mode & stat.S_ISVTX):
        raise IpcError(f"the run directory {run_dir} is open to others, who could put their socket in the VM's place")


class IpcServer:
    """The control socket of a running VM. Made by init_ipc(); close() it when the VM ends."""

    def __init__(
        self,
        vmname: str,
        path: str,
        listener: socket.socket,
        commands: Mapping[IpcOpcode, Handler],
        first: Pending | None,
    ) -> None:
        self.vmname = vmname
        self.path = path
        self.socket = listener
        self.commands = commands
        self.ending = False
        self.pending = first
        self.asked: tuple[IpcOpcode, Any] | None = None  # what is pending, and who waits for it; for `first`, None
        self.waiting: deque[tuple[IpcMessage, Any]] = deque()  # and it is empty unless something is pending
        self._identity = _identity(path)
        self._owed = self._looked = self._used = 0.0  # see rest()
        with contextlib.ExitStack() as undo:
            # Has no name: should an answer come to a VM, nobody answers that for ever.
            self._outlet = undo.enter_context(_new_socket())
            self._knock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            self._knock.connect(path)  # to wake the thread later, when the name may be gone already
            self._thread = threading.Thread(target=ipc_thread, args=(self,), name="ipc", daemon=True)
            self._thread.start()
            undo.pop_all()

    def close(self) -> None:
        """End the thread: the request being served is finished and answered, those that wait are refused."""
        self.ending = True
        with contextlib.suppress(OSError):  # a full queue wakes the thread as well
            self._knock.send(b"", socket.MSG_DONTWAIT)
        self._thread.join()
        self._knock.close()

    def unlink(self) -> None:
        """Take the name out of the directory, unless somebody else has it by now."""
        with contextlib.suppress(FileNotFoundError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)

    def rest(self) -> None:
        """Leave the virtual CPU its time, if requests come so close that the guest would hardly run beside them."""
        now, used = time.monotonic(), time.thread_time()
        self._owed = max(0.0, self._owed - (now - self._looked) * SHARE) + used - self._used
        self._looked, self._used = now, used
        if self._owed > AT_ONCE:
            self._owed = min(self._owed, 2 * AT_ONCE)  # what took longer was no flood
            time.sleep(self._owed / SHARE)

    def take(self, message: IpcMessage, sender: Any) -> None:
        """Serve a request now, or have it wait its turn."""
        opcode = IpcOpcode(message.code)
        if self.pending is None or opcode in ONLY_LOOKS:
            self.serve(message, sender)
        elif len(self.waiting) < MAX_WAITING:
            self.waiting.append((message, sender))
        else:
            self.answer(sender, {"error": f"{opcode.name} is refused: {MAX_WAITING} requests wait already"})

    def serve(self, message: IpcMessage, sender: Any) -> None:
        """Have a command carried out, or begun, and answer."""
        opcode = IpcOpcode(message.code)
        try:
            reply = self.carry_out(opcode, message)
        except IpcError as error:
            return self.answer(sender, {"error": str(error)})
        if isinstance(reply, Pending):
            self.pending, self.asked = reply, (opcode, sender)
        else:
            self.done(opcode, sender, reply)

    def carry_out(self, opcode: IpcOpcode, message: IpcMessage) -> dict[str, Any] | Pending:
        """Have the handler of a message do its work; the answer. Raises IpcError if it is refused."""
        if opcode not in self.commands:
            raise IpcError(f"command {opcode.name} not found")
        with self._at_all_costs(opcode.name):
            reply = self.commands[opcode](message) or {}
            # One that only looks has no time to take: there may be an answer pending already.
            return reply if isinstance(reply, Pending) and opcode not in ONLY_LOOKS else dict(reply)  # type: ignore

    def conclude(self, wait: bool = False) -> bool:
        """If the pending answer is there, pass it on and serve what has waited for it. Whether it was there."""
        assert self.pending is not None
        opcode, sender = self.asked or (None, None)
        refusal, reply = None, {}
        try:
            with self._at_all_costs(opcode.name if opcode is not None else "what was to be done first"):
                if wait:
                    self.pending.wait()
                if not self.pending.finished():
                    return False
                reply = dict(self.pending.answer() or {})
        except IpcError as error:
            refusal = {"error": str(error)}
        self.pending = self.asked = None
        if refusal:
            self.answer(sender, refusal)
        elif opcode is not None:
            self.done(opcode, sender, reply)
        while self.waiting and self.pending is None and not self.ending:
            message, sender = self.waiting.popleft()
            # Who has given up, and been told that the VM does not answer, shall not find it paused a minute later.
            if not sender or is_alive(sender):
                self.serve(message, sender)
        return True

    def done(self, opcode: IpcOpcode, sender: Any, reply: dict[str, Any]) -> None:
        """A command is carried out: say so."""
        if opcode in ENDS_VM:
            self.ending = True
            self.unlink()
        self.answer(sender, reply)

    @contextlib.contextmanager
    def _at_all_costs(self, what: str) -> Iterator[None]:
        """Whatever goes wrong meanwhile becomes a refusal: the VM keeps its socket."""
        try:
            yield
        except IpcError:
            raise
        except Exception as error:
            sentence = f"{what} failed unexpectedly: {type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                print(f"{self.vmname}: {sentence}", file=sys.stderr)
            raise IpcError(sentence) from error

    def answer(self, sender: Any, reply: dict[str, Any]) -> None:
        """Send an answer, if the sender has an address. One that has gone, or does not read, is not waited for."""
        if not sender:
            return
        packed = _pack_reply(reply)
        with contextlib.suppress(OSError):
            try:
                self._outlet.sendto(packed, socket.MSG_DONTWAIT, sender)
            except BlockingIOError:
                # The sender's queue is full; or, on Linux, our own socket has no room, for what others leave unread
                # is charged to it. The first is their affair, but the second must not keep this one waiting.
                full, self._outlet = self._outlet, _new_socket()
                full.close()
                self._outlet.sendto(packed, socket.MSG_DONTWAIT, sender)
            except PermissionError:
                # On Linux, a sender who is connected to our socket takes nothing from another.
                self.socket.sendto(packed, socket.MSG_DONTWAIT, sender)


def _new_socket() -> socket.socket:
    new = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # the BSDs would give no more than a few KB to a datagram
        new.setsockopt(socket.SOL_SOCKET, buffer, MAX_REPLY)
    return new


def _know_senders(receiver: socket.socket) -> None:
    """From now on recvmsg() tells who has sent a datagram, where the system does."""
    if SENDERS_ARE_KNOWN:
        receiver.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)


def is_from(ancillary: list[tuple[int, int, bytes]], *users: int) -> bool:
    """Whether what came with a datagram says that one of these users has sent it, as far as the system tells."""
    if not SENDERS_ARE_KNOWN:
        return True
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SCM_CREDENTIALS) and len(data) == UCRED.size:
            _, uid, _ = UCRED.unpack(data)
            return uid in users
    return False


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino  # no other file is given the same as long as the socket is open


def _pack_reply(reply: dict[str, Any]) -> bytes:
    try:
        packed = nvlist.pack(reply)
    except nvlist.NvlistError as error:
        return nvlist.pack({"error": f"the answer cannot be sent: {error}"})
    if len(packed) > MAX_REPLY:
        return nvlist.pack({"error": f"the answer cannot be sent: it has {len(packed)} bytes"})
    return packed


def ipc_thread(server: IpcServer) -> None:
    """Serve the socket until the VM ends."""
    # No signal is for this thread, nor for a process that a handler forks: Ctrl-C would be for that one as well.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while not server.ending:
        server.rest()
        if server.pending is None:
            get_message(server)
        elif not server.conclude() and wait_for_message(server.socket, server.pending):
            get_message(server)
    if server.asked:
        server.conclude(wait=True)
    server.unlink()
    ended = {"error": f"VM {server.vmname!r} has ended"}
    for _, sender in server.waiting:
        server.answer(sender, ended)
    with server.socket, server._outlet:
        server.socket.setblocking(False)
        with contextlib.suppress(OSError):  # EAGAIN: nobody waits any more
            for _ in range(1000):
                _, ancillary, _, sender = server.socket.recvmsg(1, ANCILLARY_SIZE)
                if is_from(ancillary, 0, os.getuid()):
                    server.answer(sender, ended)


def wait_for_message(listener: socket.socket, pending: Pending) -> bool:
    """Wait until there is a message or news of the pending answer; whether there is a message."""
    ends: list[Any] = [listener, pending]
    return listener in select.select(ends, [], [])[0]


def get_message(server: IpcServer) -> None:
    """Wait for one message, and see to it that it is served.

    The thread sits in recvmsg() itself, not in select() before it, unless it has to wait for something else as well:
    each system call gives Python's interpreter lock to the virtual CPU, which computes without a pause and hands it
    back some milliseconds later.
    """
    size = ctypes.sizeof(IpcMessage) + 1  # one more shows that it was too long
    datagram, ancillary, _, sender = server.socket.recvmsg(size, ANCILLARY_SIZE)
    if not is_from(ancillary, 0, os.getuid()):
        return  # in silence: where an answer would go is a name of his choice, and we would go there with our rights
    if server.ending:
        return server.answer(sender, {"error": f"VM {server.vmname!r} has ended"})
    try:
        message = IpcMessage.from_datagram(datagram)
    except IpcError as error:
        return server.answer(sender, {"error": str(error)})
    server.take(message, sender)


# --- ipc.h: bhyvectl's half ------------------------------------------------------------------------------------------


def send_message(path: str, message: IpcMessage, timeout: float = REPLY_TIMEOUT) -> dict[str, Any]:
    """Send a message to the VM whose control socket is at ``path``, and wait ``timeout`` seconds for its answer.

    The address that the answer comes to is a socket beside the VM's, under a hidden name, for the time of the call.

    Raises IpcError with what the VM gave as the error, or if there is no VM, or it ends first; NoAnswer, which is one
    as well, if the time is up.
    """
    run_dir, vmname = os.path.split(path)
    address = os.path.join(run_dir, f".{os.urandom(4).hex()}")  # CLIENT_NAME_SIZE bytes
    deadline = time.monotonic() + timeout
    with _new_socket() as client:
        try:
            owner = _owner_of(path)
            _know_senders(client)
            _bind_for(owner, client, address)
            _deliver(client, path, bytes(message), deadline)
            reply = nvlist.unpack(_wait_for_reply(client, path, owner, deadline))
        except FileNotFoundError:
            raise IpcError(f"there is no VM named {vmname!r} in {run_dir}") from None
        except ConnectionError:
            raise IpcError(f"VM {vmname!r} is dead: no process has its socket {path} open") from None
        except socket.timeout:
            raise NoAnswer(f"VM {vmname!r} does not answer: nothing came within {timeout:g} seconds") from None
        except nvlist.NvlistError as error:
            raise IpcError(f"the answer of VM {vmname!r} is not an nvlist: {error}") from None
        except OSError as error:
            raise IpcError(f"cannot talk to VM {vmname!r} at {path}: {error.strerror or error}") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(address)
    if "error" in reply:
        raise IpcError(str(reply["error"]))
    return reply


def _owner_of(path: str) -> int:
    """Whose VM it is. Raises IpcError for somebody else's and for what is no socket, FileNotFoundError for nothing."""
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        raise IpcError(f"{path} is not the control socket of a VM")
    if os.getuid() != 0 and found.st_uid not in (0, os.getuid()):
        raise IpcError(f"the control socket {path} belongs to another user, with the number {found.st_uid}")
    return found.st_uid


def _bind_for(owner: int, client: socket.socket, address: str) -> None:
    """Give a client an address that the VM of `owner` may send to. (By its name the file must not be touched again: in
    another user's directory, it may have become something else.)"""
    if owner == os.getuid():
        with contextlib.suppress(OSError):
            os.fchmod(client.fileno(), 0o600)  # on Linux, the mode that bind() makes the file with
        client.bind(address)
    else:
        mask = os.umask(0)
        try:
            client.bind(address)
        finally:
            os.umask(mask)


def _deliver(client: socket.socket, path: str, datagram: bytes, deadline: float) -> None:
    """Send, as soon as the VM's queue has room. Whoever waits for that in sendto() is served in turn by Linux."""
    while True:
        microseconds = max(1000, int((deadline - time.monotonic()) * 1e6))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *divmod(microseconds, 1_000_000)))
        try:
            client.sendto(datagram, path)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ENOBUFS):  # Linux, the BSDs
                raise
        if time.monotonic() >= deadline:
            raise socket.timeout
        time.sleep(0.01)


def _wait_for_reply(client: socket.socket, path: str, owner: int, deadline: float) -> bytes:
    """One datagram of the VM. Raises socket.timeout if none comes in time, IpcError if nobody is left to send it."""
    gone = False
    while True:
        client.settimeout(max(min(PROBE_INTERVAL, deadline - time.monotonic()), 0.001))
        try:
            reply, ancillary, _, _ = client.recvmsg(MAX_REPLY, ANCILLARY_SIZE)
            if is_from(ancillary, owner, 0, os.getuid()):
                return reply
            continue
        except socket.timeout:
            if gone:
                raise IpcError(f"VM {os.path.basename(path)!r} ended before it answered") from None
            if time.monotonic() >= deadline:
                raise
        # The name also goes just before the answer to a command that ends the VM, so look once more after this.
        gone = not is_alive(path)


def snapshot_request(path: str, filename: str, code: IpcOpcode) -> dict[str, Any]:
    """Ask for a snapshot: START_CHECKPOINT, after which the VM goes on, or START_SUSPEND, after which it is gone.

    ``filename`` must be absolute, for the VM may run in another directory. Raises IpcError as send_message() does.
    """
    try:
        encoded = filename.encode("utf-8")
    except UnicodeEncodeError:
        raise IpcError(f"the file name {filename!r} is not UTF-8") from None
    if len(encoded) >= MAX_SNAPSHOT_FILENAME or b"\0" in encoded:
        raise IpcError(f"a file name has at most {MAX_SNAPSHOT_FILENAME - 1} bytes and no NUL: {filename[:60]!r}...")
    message = IpcMessage(code=code)
    message.data.op.snapshot_filename = encoded
    return send_message(path, message, SNAPSHOT_TIMEOUT)
