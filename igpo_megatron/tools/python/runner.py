"""The process that holds a piece of Python code: started by tool.py, imports the standard library and its two neighbours only.

    caller ──job line on stdin──> keeper ──fork──> init ──fork──> the code
       <──report line on stdout──   │  clock, output, number of processes       user, pid, network, mount and IPC namespaces of its own

The keeper stays outside and sees every process below it. It ends them all when the code is done, at a limit, and when the caller has
gone, which closes stdin. Inside, process 1 only waits: when the keeper kills it, the kernel kills everything that is left at once,
however fast it forks. The kernel also counts processes if a control group can be made (cgroup.py).
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import errno
import json
import linecache
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import islice
from typing import Any, NoReturn

from igpo_megatron.tools.python import syscalls
from igpo_megatron.tools.python.cgroup import PidsGroup

POLL_S = 0.02
"""Interval between checks of the number of processes; without a control group a fork bomb lives this long past its limit."""

NICENESS = 10
"""How far the code's priority is below the keeper's. With equal priority, a loop of forks blocked the keeper for seconds."""

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_RECURSIVE, AT_FDCWD = 442, 0x8000, -100
"""Number of mount_setattr(2) on every architecture."""

DEVICES = ("null", "zero", "full", "random", "urandom")
"""Devices that can be used inside."""

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """This system cannot isolate the code; the message says which step failed."""


def main() -> None:
    """Read one job, run it, write one report: {"end": ok | error | timeout | limit | refused, "stdout", "value", "error"}.

    It also has "unenforced": sentences about limits that this system cannot enforce.
    """
    job = json.loads(sys.stdin.buffer.readline())
    # The code's orphans become children of the keeper if they have no process 1 of their own.
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    isolated = not job["allow_network"] or _can_isolate(job)
    try:
        if isolated:
            _enter_namespaces(network=job["allow_network"])
        report = _start(job, isolated)
    except Refused as error:
        report = {"end": "refused", "stdout": "", "value": None, "error": str(error), "unenforced": []}
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def _start(job: dict[str, Any], isolated: bool) -> dict[str, Any]:
    """Fork, wait until the sandbox is ready, watch the code. Raises Refused."""
    (output, output_end), (said, said_end), (ready, ready_end) = os.pipe(), os.pipe(), os.pipe()
    unenforced = []
    group = None
    try:
        group = PidsGroup.enter(job["max_processes"] + 1)  # process 1 is not counted
    except OSError as error:
        unenforced.append(f"no control group bounds the processes ({error.strerror or error}): they are counted every {POLL_S:g} s instead")
    child = os.fork()
    if child == 0:
        for pipe in (output, said, ready):
            os.close(pipe)
        _inside(job, isolated, output_end, said_end, ready_end)
    for pipe in (output_end, said_end, ready_end):
        os.close(pipe)
    try:
        if group:
            group.leave()
        # Written before the code runs, so the code cannot fake a failed sandbox.
        with open(ready, "rb") as file:
            problem, *missing = json.loads(file.read() or b'["process 1 of the sandbox ended at once"]')
        report = {} if problem else _keep(job, child, output, said, group, isolated)
    finally:
        _end_all(child, isolated, group)
        if group:
            group.remove()
    if problem:
        raise Refused(problem)
    return {**report, "unenforced": unenforced + missing}


def _can_isolate(job: dict[str, Any]) -> bool:
    """Try the isolation in a throw-away process."""
    trial = os.fork()
    if trial:
        return os.waitpid(trial, 0)[1] == 0
    try:
        _enter_namespaces(network=True)
        inner = os.fork()
        if inner:
            os._exit(0 if os.waitpid(inner, 0)[1] == 0 else 1)
        _hide_files(job["scratch"], job["max_files"])
        os._exit(0)
    except (Refused, OSError):
        os._exit(1)


# ---- the keeper


def _keep(job: dict[str, Any], child: int, output: int, said: int, group: PidsGroup | None, isolated: bool) -> dict[str, Any]:
    """Watch until the code ends or must end; returns after all its processes have ended."""
    deadline = time.monotonic() + job["timeout_s"]
    shown, spoken = bytearray(), bytearray()
    sinks = {output: (shown, job["max_output"] + 1), said: (spoken, 8 * job["max_output"] + 65_536)}
    status: int | None = None
    broken: dict[str, Any] | None = None
    most = job["max_processes"]
    while broken is None:
        if status is None:
            done, found = os.waitpid(child, os.WNOHANG)
            status = found if done else None
        ready, _, _ = select.select([*sinks, 0], [], [], POLL_S if status is None else 0.0)
        # A process that outlives the code keeps the pipes open, though they are empty.
        if status is not None and not set(ready) & set(sinks):
            break
        if 0 in ready and not os.read(0, 4096):
            broken = {"end": "limit", "error": "the caller went away"}
        for pipe in [pipe for pipe in ready if pipe in sinks]:
            part = os.read(pipe, 65_536)
            if not part:
                del sinks[pipe]
                continue
            # Output beyond the limit is read and dropped: a full pipe would block the code until its timeout.
            sink, limit = sinks[pipe]
            sink += part[: limit - len(sink)]
        if time.monotonic() > deadline:
            broken = {"end": "timeout", "error": f"the code did not end within {job['timeout_s']:g} s"}
        elif group.is_overrun() if group else status is None and _has_more_below(most + 1):  # process 1 is not counted
            broken = {"end": "limit", "error": f"the code had more than {most} processes and threads; {most} are allowed"}
    _end_all(child, isolated, group)
    text = bytes(shown[: job["max_output"]]).decode(errors="replace")
    if len(shown) > job["max_output"]:
        text += f"\n[output cut after {job['max_output']} bytes]"
    return {"stdout": text, "value": None, **(broken or _outcome(spoken, status or 0))}


def _outcome(spoken: bytearray, status: int) -> dict[str, Any]:
    """The code's own report, or how its process died. Code that forges the report harms only itself: only text is taken from it."""
    try:
        words = json.loads(spoken)
        value, error = words["value"], words["error"]
        if all(word is None or isinstance(word, str) for word in (value, error)):
            return {"end": "ok" if error is None else "error", "value": value, "error": error}
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    code = os.waitstatus_to_exitcode(status)
    # Process 1 reports a death by signal n as 128 + n.
    number = -code if code < 0 else code - 128
    if number in (signal.SIGXCPU, signal.SIGXFSZ, signal.SIGKILL):
        return {"end": "limit", "error": f"the process was killed by {signal.Signals(number).name}: it reached a limit of time or memory"}
    return {"end": "error", "error": f"the process ended by itself with exit code {code}"}


def _has_more_below(count: int) -> bool:
    """True if this process has more than `count` tasks below it. Stops counting there: a fork bomb makes them faster than we read."""
    return next(islice(_descendants(os.getpid()), count, None), None) is not None


def _descendants(pid: int) -> Iterator[int]:
    """Tasks (processes and threads) below `pid`, found lazily."""
    for path in _tasks(pid):
        with contextlib.suppress(OSError), open(f"{path}/children", encoding="ascii") as file:
            for child in map(int, file.read().split()):
                yield from [child] * max(1, len(_tasks(child)))
                yield from _descendants(child)


def _tasks(pid: int) -> list[str]:
    try:
        return [f"/proc/{pid}/task/{task}" for task in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _end_all(child: int, isolated: bool, group: PidsGroup | None) -> None:
    """Kill and reap every descendant, process 1 first: with it the kernel ends its whole namespace, however fast it forks."""
    while True:
        try:
            # Its process id cannot be reused before it has been waited for.
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                os.kill(child, signal.SIGKILL)
        except ChildProcessError:
            pass
        if not isolated:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)  # all at once that have not left its group
            if group:
                group.kill()
            for pid in _descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


# ---- isolation


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises Refused if it fails."""
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise Refused(f"{name} failed: {os.strerror(number)} ({errno.errorcode.get(number, number)})")


def _enter_namespaces(*, network: bool) -> None:
    """Leave the caller's users, processes, IPC and, unless `network`, its network. The next child is process 1."""
    user, group = os.getuid(), os.getgid()
    kept = 0 if network else CLONE_NEWNET
    _call("unshare", CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWIPC | kept)
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    except OSError as error:
        raise Refused(f"writing {error.filename or 'the id maps'} failed: {error.strerror}") from None
    # The code needs no user namespaces, and without them it reaches less of the kernel. Some containers forbid this write.
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as file:
        file.write("0")


def _hide_files(scratch: str, size: int) -> None:
    """Make all files read-only; scratch folder and /dev/shm empty and in memory; /proc of this namespace only; /run empty; few devices."""
    _call("unshare", CLONE_NEWNS)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    devices = [f"/dev/{name}" for name in DEVICES if os.path.exists(f"/dev/{name}")]
    for device in devices:
        _mount(device, device, None, MS_BIND)
    # A read-only mount does not stop root from writing to a disk through its device.
    _set_attributes("/", AT_RECURSIVE, MS_RDONLY | MS_NOSUID | MS_NODEV, 0)
    for device in devices:
        _set_attributes(device, 0, 0, MS_NODEV)
    _mount("tmpfs", scratch, f"size={size},mode=700", MS_NOSUID | MS_NODEV)
    try:
        # Read-only, because root can write to /proc/sys even without capabilities.
        _mount("proc", "/proc", None, MS_RDONLY | MS_NOSUID | MS_NODEV)
    except Refused:
        # Containers that hide parts of /proc forbid a new one. An empty /proc is safe, too.
        _mount("tmpfs", "/proc", "size=4k", MS_RDONLY)
    for folder, options, flags in (("/run", "size=4k", MS_RDONLY), ("/dev/shm", f"size={size}", MS_NOSUID | MS_NODEV)):
        if os.path.isdir(folder):
            _mount("tmpfs", folder, options, flags)


def _mount(source: str, target: str, options: str | None, flags: int) -> None:
    kind = source.encode() if source in ("proc", "tmpfs") else None
    _call("mount", os.fsencode(source), os.fsencode(target), kind, ctypes.c_ulong(flags), options.encode() if options else None)


def _set_attributes(target: str, how: int, add: int, clear: int) -> None:
    """mount_setattr(2), whose flags have the values of mount(2)'s. Linux 5.12."""
    attributes = (ctypes.c_uint64 * 4)(add, clear, 0, 0)
    if _libc.syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), how, attributes, ctypes.c_size_t(32)):
        raise Refused(f"mount_setattr failed: {os.strerror(ctypes.get_errno())}")


def _drop_rights() -> None:
    """Give up all capabilities, also after exec, so that read-only mounts stay read-only."""
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _call("capset", header, nothing)


def _set_limits(job: dict[str, Any], isolated: bool) -> None:
    seconds = int(job["timeout_s"]) + 1
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: job["max_memory"],
        resource.RLIMIT_FSIZE: job["max_files"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    if isolated:
        # Without isolation it would count every process of the user. Root's are never counted; the keeper counts them.
        limits[resource.RLIMIT_NPROC] = job["max_processes"] + 1
    for kind, value in limits.items():
        ceiling = resource.getrlimit(kind)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (value, value))


# ---- inside


def _inside(job: dict[str, Any], isolated: bool, output: int, said: int, ready: int) -> NoReturn:
    """The child of the keeper: process 1 of its namespace. Never returns."""
    try:
        if isolated:
            _hide_files(job["scratch"], job["max_files"])
        else:
            os.setsid()  # a process group of its own, which can be killed at once
        os.chdir(job["scratch"])
        nothing = os.open(os.devnull, os.O_RDWR)
        for pipe, number in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(pipe, number)
        for pipe in (nothing, output):
            os.close(pipe)
        _drop_rights()
        _set_limits(job, isolated)
        # If the keeper is killed, process 1 is, and with it the rest.
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (Refused, OSError) as error:
        os.write(ready, json.dumps([str(error)]).encode())
        os._exit(1)
    missing = []
    try:
        syscalls.deny()
    except OSError as error:
        missing.append(f"system calls are not filtered ({error}): the code can reach ptrace, io_uring and the kernel's keys")
    os.write(ready, json.dumps([None, *missing]).encode())
    os.close(ready)
    worker = os.fork()
    if worker:
        # Process 1 must close the pipes: their end shows the end of the code.
        for pipe in (1, 2, said):
            os.close(pipe)
        os._exit(_wait_as_init(worker))
    os.nice(NICENESS)
    value, problem = _execute(job["code"])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # The end of a traceback is the most useful part.
    _say(said, value and value[: job["max_output"]], problem and problem[-job["max_output"] :])
    os._exit(0)


def _wait_as_init(worker: int) -> int:
    """Exit code of the code's process, 128 + n if signal n killed it; orphans are reaped meanwhile."""
    while True:
        done, status = os.wait()
        if done == worker:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _execute(code: str) -> tuple[str | None, str | None]:
    """(repr of the last expression, None) or (None, traceback). Runs `code` once."""
    try:
        tree = ast.parse(code, "<code>")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return None, "".join(traceback.format_exception_only(error)).strip()
    # So that a traceback can quote the code.
    linecache.cache["<code>"] = (len(code), None, code.splitlines(keepends=True), "<code>")
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    try:
        exec(compile(tree, "<code>", "exec"), names)
        if not isinstance(last, ast.Expr):
            return None, None
        value = eval(compile(ast.Expression(last.value), "<code>", "eval"), names)
        return (None if value is None else repr(value)), None
    except SystemExit as error:
        return None, None if error.code in (None, 0) else f"SystemExit: {error.code}"
    except BaseException as error:  # noqa: BLE001  (whatever the code raises is its result)
        try:
            frames = error.__traceback__ and error.__traceback__.tb_next  # without the frame of this file
            return None, "".join(traceback.format_exception(type(error), error, frames)).strip()
        except BaseException:  # noqa: BLE001  (an exception that cannot be shown, or no memory left to show it)
            return None, type(error).__name__


def _say(pipe: int, value: str | None, error: str | None) -> None:
    os.set_blocking(pipe, True)
    words = memoryview(json.dumps({"value": value, "error": error}).encode())
    with contextlib.suppress(OSError):
        while words:
            words = words[os.write(pipe, words) :]
