"""The python tool: runs a piece of code once in its own process and shows its output, the value of its last expression and its errors.

What is isolated, on Linux 5.12 or newer if users may make namespaces (runner.py does it, step by step):

- network: a namespace without interfaces, not even loopback
- processes: the code sees and signals its own only; all of them end with it, at its limits, or with the caller
- files: everything is read-only, except a scratch folder and /dev/shm, both in memory and deleted afterwards; /run is empty, /proc its own
- devices: /dev/null and the like only, so no disks and no GPUs
- environment: none of the caller's variables, so no keys
- limits: wall and CPU time, address space of each process, bytes in the scratch folder, processes and threads, bytes of output; the
  kernel itself enforces the number of processes if a pids control group can be made (cgroup.py), or the user is not root
- priority: lower than that of the run's own processes
- system calls: ptrace, io_uring, kernel keys and the like are refused if libseccomp is installed (syscalls.py)

What is not isolated: files that the run's user may read (the code can only copy them into its own output, which the policy sees); Unix
sockets outside /run; CPU cores and memory bandwidth; total memory, which is limited per process, so `max_processes` times as much is
possible; the machine's kernel. This contains a careless or curious policy. For code of people who attack you, use a virtual machine.

With `allow_network` the network stays. The rest is isolated as above if the system supports it; if not, only limits, the clean environment
and the scratch folder remain, and the code can do whatever its user can. Without `allow_network` the tool refuses to start there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from igpo_megatron.tools.base import Description, Observed
from igpo_megatron.tools.settings import Python
from igpo_megatron.types import UserError
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

PYTHON = Description(
    name="python",
    purpose="Run Python code once and see what it prints and the value of its last line. Nothing is kept between calls.",
    arguments={"code": "The code."},
    tag=("code", "runs Python code once; print what you want to see"),
    verbatim=True,
)

ROOT = Path(__file__).resolve().parents[3]
START = "import sys; sys.path.insert(0, sys.argv[1]); from igpo_megatron.tools.python import runner; del sys.path[0]; runner.main()"
"""The runner's first lines: with -I this package is not on its path."""

GRACE_S = 10.0
"""Time that the runner may take beyond the code's before it is considered broken."""


class PythonStatus(StrEnum):
    """How a piece of code ended."""

    OK = "ok"
    ERROR = "error"
    """It raised an exception, or its process ended early."""

    TIMEOUT = "timeout"
    LIMIT = "limit"
    """It was killed for too many processes, too much memory or too much CPU time."""

    FAILED = "failed"
    """The sandbox failed, not the code."""


@dataclass(frozen=True, slots=True)
class PythonResult:
    """The result of a piece of code."""

    status: PythonStatus
    stdout: str = ""
    """Standard output and standard error, cut to `max_output_kib`."""

    value: str | None = None
    """`repr` of its last statement, if that is an expression with a value other than None."""

    error: str | None = None
    """Traceback, or one sentence; None on success."""


class PythonTool:
    """Runs code for the policy. Used from one event loop; nothing is kept between calls."""

    def __init__(self, config: Python):
        self.config = config
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self.unenforced: list[str] = []
        """Sentences about limits that this system cannot enforce; filled by `from_config` only."""

    @classmethod
    def from_config(cls, config: Python) -> PythonTool:
        """A tool that has run a first test. UserError if this system cannot isolate code as configured."""
        tool = cls(config)
        pipe = subprocess.PIPE
        with _scratch() as folder, subprocess.Popen(_command(), stdin=pipe, stdout=pipe, env=_environment(folder)) as runner:
            assert runner.stdin is not None and runner.stdout is not None
            runner.stdin.write(tool._job("1 + 1", folder))
            runner.stdin.flush()
            report = _read_report(runner.stdout.read())
        if report.get("end") == "refused":
            raise UserError(
                f"the python tool cannot isolate code on this system: {report['error']}. It needs Linux 5.12 or newer and unprivileged "
                "user namespaces (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns, the container's seccomp "
                "profile); or set python.allow_network=true and accept the risks that igpo_megatron/tools/python/tool.py describes"
            )
        if report.get("value") != "2":
            raise UserError(f"the python tool does not work: 1 + 1 gave {report}")
        tool.unenforced = report["unenforced"]
        return tool

    async def use(self, arguments: Sequence[str]) -> Observed:
        """Run `arguments[0]` and show its result."""
        result = await self.run(arguments[0])
        if result.status is PythonStatus.FAILED:
            return Observed("", f"python: {result.error}", result.status)
        return Observed(render_result(result), status=result.status)

    async def close(self) -> None:
        """Nothing to release: every call cleans up after itself."""

    async def run(self, code: str) -> PythonResult:
        """Run `code` once. Problems are statuses, never exceptions; if the call is cancelled, the code is killed."""
        async with self._slots:
            with _scratch() as folder:
                report = await self._call_runner(self._job(code, folder), folder)
        if report.get("end") in (PythonStatus.OK, PythonStatus.ERROR, PythonStatus.TIMEOUT, PythonStatus.LIMIT):
            return PythonResult(PythonStatus(report["end"]), report["stdout"], report["value"], report["error"])
        return PythonResult(PythonStatus.FAILED, error=report.get("error") or "the sandbox ended without a report")

    async def _call_runner(self, job: bytes, folder: str) -> dict[str, Any]:
        """The runner's report; empty if there is none."""
        try:
            runner = await asyncio.create_subprocess_exec(
                *_command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(folder),
                start_new_session=True,
            )
        except OSError as error:
            return {"error": f"no process could be started: {error}"}
        assert runner.stdin is not None and runner.stdout is not None
        try:
            async with asyncio.timeout(self.config.timeout_s + GRACE_S):
                # stdin stays open: its end tells the runner that the caller has gone.
                with contextlib.suppress(ConnectionError):
                    runner.stdin.write(job)
                    await runner.stdin.drain()
                return _read_report(await runner.stdout.read())
        except TimeoutError:
            return {"error": f"the sandbox gave no report within {self.config.timeout_s + GRACE_S:g} s"}
        finally:
            runner.stdin.close()
            try:
                # The runner kills its children and exits.
                async with asyncio.timeout(GRACE_S):
                    await asyncio.shield(runner.wait())
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(runner.pid, signal.SIGKILL)
                await runner.wait()

    def _job(self, code: str, folder: str) -> bytes:
        config = self.config
        job = {
            "code": code,
            "scratch": folder,
            "allow_network": config.allow_network,
            "timeout_s": config.timeout_s,
            "max_memory": config.max_memory_mib * 2**20,
            "max_files": config.max_file_mib * 2**20,
            "max_processes": config.max_processes,
            "max_output": config.max_output_kib * 2**10,
        }
        return json.dumps(job).encode() + b"\n"


def render_result(result: PythonResult) -> str:
    """Output, last value and error as the policy reads them, or a sentence if there is none of them."""
    parts = [result.stdout.rstrip("\n"), result.value, result.error]
    return "\n".join(part for part in parts if part) or "The code ended without output."


def _command() -> list[str]:
    # -I: neither PYTHON* variables nor the working folder nor the user's packages; -B: no .pyc files.
    return [sys.executable, "-I", "-B", "-c", START, str(ROOT)]


def _environment(folder: str) -> dict[str, str]:
    """The code's complete environment."""
    fixed = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**fixed, "HOME": folder, "TMPDIR": folder}


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A new folder; removed, with its contents, at the end of the context."""
    return tempfile.TemporaryDirectory(prefix="igpo-python-", ignore_cleanup_errors=True)


def _read_report(output: bytes) -> dict[str, Any]:
    """The runner's report with checked types: {"end", "stdout", "value", "error"}; empty if it cannot be read."""
    try:
        report = json_loads_untrusted(output)
    except BadJson:
        return {}
    shape = {"end": str, "stdout": str, "value": str | None, "error": str | None}
    if not isinstance(report, dict) or not all(name in report and isinstance(report[name], kind) for name, kind in shape.items()):
        return {}
    return report
