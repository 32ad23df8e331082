"""How a command or a rank ends: with one sentence on the console that gives the reason, and an exit code.

    what was raised             sentence                                            exit code
    UserError, ConversionError  its message                                         2
    RunStopped                  its message                                         1
    disk full, no permission    what the file system refused                        1
    KeyboardInterrupt           the signal's name                                   128 + its number
    output that nobody reads    none                                                128 + SIGPIPE
    anything else               type and message, and the file with its traceback   1

A rank that a launcher started writes its `Ending` to the file that torchrun's agent reads; the launcher reports the one that was the
cause (launch/agent.py). Without such a launcher the process prints it itself.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from checkpoint_conversion import ConversionError
from igpo_megatron.supervision.failures import in_short, keep_failure
from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import RunStopped, UserError

Kind = Literal["done", "interrupted", "signal", "error", "peer"]
"""`interrupted`: it was asked to end; `signal`: a signal killed it; `error`: it ended itself; `peer`: it lost another rank, which is never
the cause."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM}
_FULL_BYTES = 2**12
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# torch 2.13 has no type for this: gloo raises RuntimeError, NCCL a DistBackendError whatever fails, and the store a DistNetworkError, as it
# does for a port in use. So the type only tells that the message is one of theirs.
_LOST_PEER = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),  # gloo; the last two also the store
    "remote process exited",  # NCCL: its ncclRemoteError
    "Connection was likely closed",  # the store
)
"""Parts of the message when a collective fails because another rank, or the store by which ranks meet, is gone."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a process, or all ranks of a node, ended."""

    kind: Kind
    code: int
    """Exit code for the shell."""

    sentence: str = ""
    """The reason, for the user; empty after success."""

    time: float = 0.0
    """When it was noticed, seconds since the epoch; 0 if unknown."""

    @property
    def text(self) -> str:
        """The line that a run's launcher prints. The run can be resumed, except after a user's mistake."""
        if self.code == 2:
            return f"error: {self.sentence}\n"
        again = "the same command resumes from the last checkpoint"
        return f"{self.sentence}; {again}\n" if self.kind == "interrupted" else f"stopped: {self.sentence}; {again}\n"


def ending_of(error: BaseException, who: str, folder: Path | None) -> Ending:
    """The ending that `error` caused in `who`, e.g. `rank 1`; `folder` keeps the traceback of an unexpected one (see `keep_failure`)."""
    now = time.time()
    if isinstance(error, (UserError, ConversionError)):
        return Ending("error", 2, str(error), now)
    if isinstance(error, RunStopped):
        return Ending("error", 1, str(error), now)
    if (number := _signal_of(error)) is not None:
        return Ending("interrupted", 128 + number, f"{who} was interrupted by {number.name}".removeprefix(" was "), now)
    if _lost_peer(error):
        return Ending("peer", 1, f"{who} lost its connection to another rank", now)
    if (refusal := _refusal(error, folder)) is not None:
        return Ending("error", 1, refusal, now)
    kept = keep_failure(folder, who.replace(" ", "") or "command", error)
    return Ending("error", 1, f"{who} failed: {kept}" if who else kept, now)


def _signal_of(error: BaseException) -> signal.Signals | None:
    """The signal behind a KeyboardInterrupt, or behind the SystemExit into which Ray, once imported, turns a SIGTERM."""
    if isinstance(error, KeyboardInterrupt):
        return signal.Signals[str(error)] if str(error) in signal.Signals.__members__ else signal.SIGINT
    return signal.SIGTERM if isinstance(error, SystemExit) and error.code == signal.SIGTERM else None


def _lost_peer(error: BaseException) -> bool:
    """Whether torch's collectives say that another rank is gone. An engine's or a tool's lost connection is none of theirs."""
    is_theirs = isinstance(error, RuntimeError) and (type(error).__module__ == "torch.distributed" or "gloo" in str(error))
    return is_theirs and any(words in str(error) for words in _LOST_PEER)


def _refusal(error: BaseException, folder: Path | None) -> str | None:
    """What the file system refused, if that caused `error`: on a full disk libraries also raise errors that do not mention it.

    A missing permission earlier in the chain may have been handled: it is the reason only if `error` is that error or names it (`from`).
    """
    link: BaseException | None = error
    reasons = _FULL | _FORBIDDEN | {errno.EROFS}
    while link is not None:
        if isinstance(link, OSError) and link.errno in reasons and (link.filename or link.errno not in _FORBIDDEN):
            return _refused(link.errno, link.filename or folder)
        if link.__cause__ is None:
            reasons = reasons - _FORBIDDEN
        link = link.__cause__ or link.__context__
    while folder is not None and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if folder is not None and shutil.disk_usage(folder).free < _FULL_BYTES:
        return f"{_refused(errno.ENOSPC, folder)} ({in_short(error)})"
    return None


def _refused(number: int | None, place: Any) -> str:
    where = "" if place is None else f"{os.fsdecode(place)}: "
    advice = "free some space there" if number in _FULL else "choose another folder, or change its permissions"
    return f"{where}{os.strerror(number or 0).lower()}; {advice}"


# ---- ranks


class Ended(Exception):
    """The reason for this process's end has been written; open resources are closed as this propagates."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.sentence)
        self.ending = ending


@contextmanager
def reason_left(who: str, folder: Path | None) -> Iterator[None]:
    """Write for the launcher what ended the block, and raise `Ended` instead. The first reason counts, not errors while closing."""
    try:
        yield
    except BaseException as error:
        raise Ended(_first(error) or leave(ending_of(error, who, folder))) from error


def _first(error: BaseException | None) -> Ending | None:
    while error is not None and not isinstance(error, Ended):
        error = error.__cause__ or error.__context__
    return error.ending if error is not None else None


def leave(ending: Ending) -> Ending:
    """Write it to the file that torchrun's agent reads (`read`); print it where no launcher of ours does."""
    path, written = os.environ.get("TORCHELASTIC_ERROR_FILE"), False
    if path:
        values = {"message": ending.sentence, "timestamp": int(ending.time), "ending": asdict(ending)}
        # Whole or absent: torchrun's agent dies of half a file. This rank may be killed here when another ends, and the disk may be full.
        with suppress(OSError), whole(Path(path)) as part:
            part.write_text(json.dumps(values), encoding="utf-8")
        written = Path(path).is_file()
    if not (written and os.environ.get(LAUNCHED)) and ending.kind != "peer":
        sys.stderr.write(ending.text)
        sys.stderr.flush()
    return ending


LAUNCHED = "IGPO_LAUNCHED"
"""Environment variable that is set for ranks whose launcher reports how they ended."""


def read(error_file: dict[str, Any]) -> Ending | None:
    """What `leave` wrote; None if a rank wrote nothing."""
    values = error_file.get("ending")
    return Ending(**values) if values is not None else None


def end_process(code: int) -> NoReturn:
    """Exit. A failed rank does so at once: process groups that lost a rank cannot be closed cleanly."""
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(0)


@contextmanager
def signals_restored() -> Iterator[None]:
    """Restore the handlers of the signals that end a process when the block ends."""
    before = {number: signal.getsignal(number) for number in (*_INTERRUPTS, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first interrupting signal raises KeyboardInterrupt; later ones are ignored, so that closing is not cut short."""
    try:
        for number in _INTERRUPTS:
            signal.signal(number, _interrupt)
        yield
    finally:
        _ignore_interrupts()


def _interrupt(number: int, frame: Any) -> NoReturn:
    _ignore_interrupts()
    raise KeyboardInterrupt(signal.Signals(number).name)


def _ignore_interrupts() -> None:
    for number in _INTERRUPTS:
        signal.signal(number, lambda number, frame: None)  # SIG_IGN would be passed on to children


# ---- commands


def sigterm_interrupts() -> None:
    """Let a command close what it opened on SIGTERM, as it does after Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)


@contextmanager
def one_sentence(folder: Path | None = None, passing: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Report an error that ends a command in one sentence on standard error, and exit with its code. `passing`: types left to others."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (*passing, SystemExit)):
            raise
        if isinstance(error, BrokenPipeError) and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still buffered
            raise SystemExit(128 + signal.SIGPIPE) from None
        ending = ending_of(error, "", folder)
        sys.stderr.write(f"{ending.sentence}\n" if ending.kind == "interrupted" else f"error: {ending.sentence}\n")
        raise SystemExit(ending.code) from None


def _reader_left() -> bool:
    """Nobody reads standard output any more, e.g. after `| head -1`."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))
