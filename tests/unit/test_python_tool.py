"""The python tool: code runs once, in bounds, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from igpo_megatron.config.schema import Python
from igpo_megatron.search.python_tool import PythonResult, PythonStatus, PythonTool, render_result

SMALL = Python(timeout_s=20, max_memory_mib=512, max_file_mib=1, max_processes=8, max_output_kib=1)
ROOT = Path(__file__).resolve().parents[2]


def sandbox_problem() -> str | None:
    try:
        PythonTool.from_config(SMALL)
    except ValueError as error:
        return str(error)
    return None


PROBLEM = sandbox_problem()
isolated = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

THREAD = "threading.Thread(target=time.sleep, args=(9,))"

WITHOUT_NAMESPACES = """
import ctypes, os, sys
user, group = os.getuid(), os.getgid()
if ctypes.CDLL(None).unshare(0x10000000):
    sys.exit(77)
for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
    open(f"/proc/self/{name}", "w").write(text)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
import asyncio
from igpo_megatron.config.schema import Python
from igpo_megatron.search.python_tool import PythonTool
settings = Python(timeout_s=5, max_processes=8, allow_network=sys.argv[1] == "allow")
try:
    tool = PythonTool.from_config(settings)
except ValueError as error:
    print(error)
else:
    print(asyncio.run(tool.run(sys.argv[2])))
"""


def run(code: str, config: Python = SMALL) -> PythonResult:
    return asyncio.run(PythonTool(config).run(code))


def run_without_namespaces(allow: str, code: str) -> str:
    """Output of a process tree that may not make user namespaces."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_NAMESPACES, allow, code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    if done.returncode == 77:
        pytest.skip("this system has no user namespaces to take away")
    assert done.returncode == 0, done.stderr
    return done.stdout


def processes_with(mark: str) -> list[str]:
    """Command lines of running processes that contain `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in text:
            found.append(text)
    return found


@isolated
def test_output_last_value_and_error_come_back() -> None:
    assert (run("print('a')\nx = 2\nx + 1").stdout, run("x = 2\nx + 1").value) == ("a\n", "3")
    silent = run("x = 1")
    assert (silent.status, silent.stdout, silent.value, silent.error) == (PythonStatus.OK, "", None, None)
    broken = run("print('before')\n[1, 2][5]")
    assert broken.status is PythonStatus.ERROR and broken.stdout == "before\n"
    assert broken.error is not None and "IndexError" in broken.error and "line 2" in broken.error and "python_runner" not in broken.error
    assert "SyntaxError" in str(run("x =").error)
    assert run("import sys; sys.exit(0)").status is PythonStatus.OK and "4" in str(run("exit(4)").error)
    assert "exit code 3" in str(run("import os; os._exit(3)").error)


def test_results_read_as_text_and_silence_is_said() -> None:
    assert render_result(PythonResult(PythonStatus.OK, "a\n", "3")) == "a\n3"
    assert render_result(PythonResult(PythonStatus.ERROR, "a\n", None, "KeyError: 1")) == "a\nKeyError: 1"
    assert render_result(PythonResult(PythonStatus.OK)) == "The code ended without output."


@isolated
def test_code_that_prints_nothing_is_not_run_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket\nsocket.create_connection({server.getsockname()!r}, 2).close()"
        assert run(code, SMALL.model_copy(update={"allow_network": True})).status is PythonStatus.OK
        server.accept()[0].close()
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


@isolated
@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("import time; time.sleep(60)", PythonStatus.TIMEOUT, "within 1 s"),
        ("while True: pass", PythonStatus.TIMEOUT, "within 1 s"),
        ("x = bytearray(2**30)", PythonStatus.ERROR, "MemoryError"),
        ("open('a', 'wb').write(bytes(2**21))", PythonStatus.ERROR, "File too large"),
        ("for n in range(4): open(str(n), 'wb').write(bytes(2**19))", PythonStatus.ERROR, "No space left"),
        (
            "import os, time\nfor _ in range(40):\n    if os.fork() == 0: time.sleep(60)\ntime.sleep(60)",
            None,
            "8 are allowed|temporarily unavailable",
        ),
        (
            "import threading, time\nfor _ in range(40): threading.Thread(target=time.sleep, args=(9,)).start()",
            None,
            "8 are allowed|new thread",
        ),
    ],
)
def test_every_limit_holds(code: str, status: PythonStatus | None, error: str) -> None:
    seconds = 1.0 if status is PythonStatus.TIMEOUT else 20.0
    result = run(code, SMALL.model_copy(update={"timeout_s": seconds}))
    assert status is None or result.status is status
    assert any(part in str(result.error) for part in error.split("|")), result
    assert result.latency_s < 8, "no limit waits for the clock of the code"


@isolated
def test_output_and_values_are_cut() -> None:
    result = run("print('x' * 5000)\n'y' * 5000")
    assert result.stdout == "x" * 1024 + "\n[output cut after 1024 bytes]" and result.value == "'" + "y" * 1023


@isolated
def test_code_reaches_no_network_not_even_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        code = f"import socket; socket.create_connection({address!r}, 2)\n'connected'"
        assert "Network is unreachable" in str(run(code).error)
        assert run(code, SMALL.model_copy(update={"allow_network": True})).value == "'connected'"


@isolated
def test_the_environment_is_clean_and_files_are_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    seen = ["CUDA_VISIBLE_DEVICES", "HOME", "LANG", "OMP_NUM_THREADS", "PATH", "TMPDIR"]
    assert run("import os; sorted(os.environ)").value == str(seen)
    # The parent's environment is not to be had from /proc either.
    found = run("import pathlib\n[p for p in pathlib.Path('/proc').glob('[0-9]*/environ') if b'hunter2' in p.read_bytes()]")
    assert found.value == "[]"
    target = tmp_path / "file"
    assert "Read-only file system" in str(run(f"open({str(target)!r}, 'w')").error) and not target.exists()
    assert run("import os; open('note', 'w').write('x'); os.listdir('.')").value == "['note']"
    assert run("import os; os.listdir('.')").value == "[]", "a scratch folder is used once"


@isolated
def test_nothing_but_the_scratch_folder_and_shared_memory_can_be_written() -> None:
    code = """
import os
rows = [line.split() for line in open("/proc/self/mountinfo")] if os.path.exists("/proc/self") else []
here = os.getcwd()
sorted({"scratch" if row[4] == here else row[4] for row in rows if "rw" in row[5].split(",")})
"""
    assert run(code).value in ("['/dev/shm', 'scratch']", "['scratch']", "[]")
    # As root, a capability is not even needed for this.
    error = str(run("open('/proc/sys/kernel/core_pattern', 'r+')").error)
    assert any(reason in error for reason in ("Read-only", "Permission denied", "No such file"))


@isolated
def test_no_device_is_there_but_the_harmless_ones() -> None:
    code = """
import os, stat
found = []
for folder, _, names in os.walk("/dev"):
    for name in names:
        path = os.path.join(folder, name)
        try:
            mode = os.lstat(path).st_mode
            if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
                found.append(path)
        except OSError:
            pass
open("/dev/null", "w").write("x")
sorted(found)
"""
    assert run(code).value == str([f"/dev/{name}" for name in ("full", "null", "random", "urandom", "zero")])


@isolated
def test_read_only_cannot_be_undone_from_inside(tmp_path: Path) -> None:
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
tried = [libc.mount(b"none", b"/", None, ctypes.c_ulong(0x1000 | 0x20), None)]
libc.unshare(0x10000000 | 0x20000)
tried.append(libc.mount(b"none", b"/", None, ctypes.c_ulong(0x1000 | 0x20), None))
try:
    open({str(tmp_path / "file")!r}, "w")
except OSError as error:
    tried.append(error.strerror)
tried
"""
    assert run(code).value == "[-1, -1, 'Read-only file system']"


@isolated
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mark = f"igpo-mark-{os.getpid()}"
    code = f"""
import os, subprocess
if os.fork() == 0:
    os.setsid()
    subprocess.run(["/bin/sh", "-c", "sleep 30; : {mark}"])
else:
    import time; time.sleep(0.2)
    print("left")
"""
    assert run(code).stdout == "left\n"
    assert processes_with(mark) == []
    assert list(tmp_path.iterdir()) == []


@isolated
def test_a_cancelled_call_takes_its_code_with_it() -> None:
    mark = f"igpo-cancelled-{os.getpid()}"
    code = f"import subprocess; subprocess.run(['/bin/sh', '-c', 'sleep 30; : {mark}'])"

    async def cancel() -> None:
        task = asyncio.create_task(PythonTool(SMALL).run(code))
        while not processes_with(f": {mark}"):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    start = time.monotonic()
    asyncio.run(cancel())
    assert processes_with(mark) == [] and time.monotonic() - start < 10


@isolated
def test_calls_run_side_by_side_up_to_the_limit() -> None:
    async def four(limit: int) -> float:
        tool = PythonTool(SMALL.model_copy(update={"max_concurrency": limit}))
        start = time.monotonic()
        await asyncio.gather(*(tool.run("import time; time.sleep(0.25)") for _ in range(4)))
        return time.monotonic() - start

    alone = asyncio.run(four(1))
    assert alone >= 1.0 and asyncio.run(four(4)) < alone


def test_where_the_network_cannot_be_cut_it_refuses_to_start() -> None:
    assert "cannot isolate" in (said := run_without_namespaces("no", "1 + 1")) and "python.allow_network=true" in said


def test_allow_network_runs_there_with_limits_only_and_still_leaves_nothing() -> None:
    mark = f"igpo-orphan-{os.getpid()}"
    code = f"import os, subprocess\nif os.fork() == 0:\n    os.setsid(); subprocess.run(['/bin/sh', '-c', 'sleep 30; : {mark}'])\n6 * 7"
    assert "value='42'" in run_without_namespaces("allow", code) and processes_with(mark) == []
    bomb = "import os, time\nfor _ in range(40):\n    if os.fork() == 0: time.sleep(60)"
    assert "8 are allowed" in run_without_namespaces("allow", bomb)
