"""tools/gpu: parts are kept apart, held to their limits and reported whatever becomes of them; tests become JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tools/gpu"
sys.path.insert(0, str(GPU))

import checks  # noqa: E402
import machine  # noqa: E402

WRITES = "import json, sys; json.dump({'figures': {}}, open(sys.argv[sys.argv.index('--out') + 1], 'w'))"
HAS_CHILD = "import subprocess, sys; child = subprocess.Popen(['sleep', '300']); print(child.pid, flush=True)"
SCRIPTS = {
    "good": f"{WRITES}; print('noise'); print('42 apples')",
    "broken": f"{WRITES}; print('so far so good'); raise ValueError('no pears')",
    "slow": f"{HAS_CHILD}; child.wait()",
    "litters": f"{WRITES}; {HAS_CHILD}",
    "silent": "print('done')",
    "last": f"{WRITES}; print('still run')",
}


CLOCK = """
import time, types
from pathlib import Path
log = Path({log!r})
checks.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 200 * (log.is_file() and log.stat().st_size > 0))
"""


def call(folder: Path, limits_s: dict[str, float], needs: str = "sys", late: str = "none") -> subprocess.Popen[str]:
    """checks.py with fake parts, two at a time. Once part `late` has said something its clock goes 200 s ahead."""
    for name, script in SCRIPTS.items():
        (folder / f"{name}.py").write_text(script, encoding="utf-8")
    parts = [f"checks.Part({n!r}, {limit}, '', {str(folder / n) + '.py'!r}, needs=({needs!r},))" for n, limit in limits_s.items()]
    clock = CLOCK.format(log=str(folder / f"out/{late}.log"))
    code = f"import sys, checks\n{clock}\nchecks.PARTS = ({', '.join(parts)},); sys.exit(checks.main())"
    command = [sys.executable, "-c", code, "--device", "cpu", "--small", "--out", str(folder / "out")]
    command += ["--archive", str(folder / "all.tar.gz")]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(GPU)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out/summary.json").read_text(encoding="utf-8"))


def ends(process_id: int) -> bool:
    """Whether it does: one that was killed ends when it has its turn."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if "State:\tZ" in Path(f"/proc/{process_id}/status").read_text(encoding="ascii"):
                return True
        except OSError:  # it is gone
            return True
        time.sleep(0.01)
    return False


def test_parts_end_at_their_limits_with_their_children_and_fail_alone(tmp_path: Path) -> None:
    process = call(tmp_path, {"good": 600, "broken": 600, "slow": 10, "litters": 600, "silent": 600, "last": 600}, late="slow")
    printed, complaints = process.communicate(timeout=250)
    assert process.returncode == 1, complaints
    results = {result["name"]: result for result in summary(tmp_path)["parts"]}
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        packed = {Path(name).name for name in tar.getnames()} - {"out"}
        assert packed == {path.name for path in (tmp_path / "out").iterdir()}
        assert json.load(tar.extractfile("out/summary.json") or pytest.fail("no file")) == summary(tmp_path)
    children = {name: int((tmp_path / f"out/{name}.log").read_text(encoding="utf-8")) for name in ("slow", "litters")}
    assert {name: (result["state"], result["headline"]) for name, result in results.items()} == {
        "good": ("ok", "42 apples"),
        "broken": ("FAILED", "exit code 1: ValueError: no pears"),
        "slow": ("FAILED", f"stopped at its limit of 60 s after: {children['slow']}"),
        "litters": ("ok", str(children["litters"])),
        "silent": ("FAILED", "exit code 0 without a result in silent.json"),
        "last": ("ok", "still run"),
    }
    assert all(map(ends, children.values()))
    assert 200 <= results["slow"]["seconds"] < 1800
    at_once, table = printed.split("\n\n")
    assert sorted(at_once.splitlines()) == sorted(table.splitlines()[1:]) and table.startswith("cpu, python 3.")
    assert summary(tmp_path).keys() == {"device", "gpu", "started", "commit", "versions", "seconds", "parts"}


def test_a_part_whose_needs_are_missing_is_skipped_with_a_reason_and_is_no_failure(tmp_path: Path) -> None:
    process = call(tmp_path, {"good": 60}, needs="nothing_by_this_name")
    assert process.wait(timeout=250) == 0
    (result,) = summary(tmp_path)["parts"]
    assert (result["state"], result["headline"]) == ("skipped", "not importable: nothing_by_this_name")


def test_a_part_that_trains_a_model_is_skipped_without_one() -> None:
    (part,) = (part for part in checks.PARTS if part.name == "learn_model")
    part = replace(part, needs=())
    assert checks.why_not(part, None) == "no --model FOLDER was given" and checks.why_not(part, Path("model")) is None


def test_parts_meet_on_the_loopback_interface_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    found = checks.environment(False, tmp_path)
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("lo", "eth7")


def test_what_was_found_before_an_interruption_is_kept(tmp_path: Path) -> None:
    process = call(tmp_path, {"litters": 60, "silent": 60, "slow": 60, "good": 60})  # on a CPU the last begin first
    assert process.stdout is not None
    assert process.stdout.readline().startswith("good ")
    log = tmp_path / "out/slow.log"
    while not (log.exists() and log.read_text(encoding="utf-8").endswith("\n")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=250) == 1
    results = {result["name"]: result for result in summary(tmp_path)["parts"]}
    assert results["good"]["state"] == "ok"
    assert results["slow"]["headline"] == f"interrupted after: {int(log.read_text(encoding='utf-8'))}"
    assert len(results) == 4 and ends(int(log.read_text(encoding="utf-8")))


def test_all_limits_together_are_twelve_minutes_at_most_and_leave_room_in_a_call_of_ten_without_a_model() -> None:
    assert sum(part.limit_s for part in checks.PARTS) <= 12 * 60
    assert sum(part.limit_s for part in checks.PARTS if checks.MODEL not in part.on_gpu) <= 560
    assert len({part.name for part in checks.PARTS}) == len(checks.PARTS)
    named = {word for part in checks.PARTS for word in f"{part.on_gpu} {part.small}".split() if word.endswith(".py")}
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_the_documented_parts_are_those_that_run() -> None:
    documented = re.findall(r"^\| `(\w+)` \|.*\| (\d+) s \|$", (ROOT / "docs/performance.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert documented == [(part.name, str(part.limit_s)) for part in checks.PARTS]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "smoke, smog"], "--parts: unknown smog; known: smoke, head_parity, "),
        (["--parts", ""], "--parts: unknown (nothing); known: smoke, head_parity, "),
        (["--device", "cpu", "--small", "--out", "FILE"], "cannot be written (File exists); name another folder"),
        (["--device", "cpu", "--small", "--out", "FILE/in"], "cannot be written (Not a directory); name another folder"),
        (["--device", "cpu", "--small", "--archive", "FILE/in"], "name a file in a folder that exists, outside of --out"),
        (["--device", "cpu", "--small", "--out", "EMPTY", "--archive", "FILE"], "name a file in a folder that exists, outside of --out"),
        (["--device", "cpu"], "--device cpu and --small go together"),
        (["--small"], "--device cpu and --small go together"),
        (["--device", "cpu", "--small", "--wheels", "EMPTY"], "no wheels there; fetch them with tools/gpu/wheels.sh"),
        (["--device", "cpu", "--small", "--model", "EMPTY"], "no config.json there; name the folder of a Hugging Face model"),
        ([], " sees no GPU; --device cpu --small runs the same parts on a CPU"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_runs(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    places = {"EMPTY": str(tmp_path), "FILE": str(tmp_path / "file"), "FILE/in": str(tmp_path / "file/in")}
    monkeypatch.setattr(sys, "argv", ["checks.py", *(places.get(word, word) for word in words)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        checks.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_an_interpreter_without_torch_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["checks.py", "--device", "cpu", "--small", "--out", str(tmp_path)])
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        checks.main()
    assert f"{sys.executable} has no torch; name an interpreter that has by PYTHON=" in capsys.readouterr().err


def test_the_gpu_is_the_first_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\necho "Card ${3#--id=}, 580.65, 81559 MiB, 345 MHz, 1980 MHz, 700.00 W"\n', encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert machine.gpu() == dict(zip(machine.GPU_FIELDS, ("Card 3", "580.65", "81559 MiB", "345 MHz", "1980 MHz", "700.00 W"), strict=True))
    assert machine.device_name() == "Card 3"
    fake.write_text("#!/bin/sh\necho No devices were found; exit 6\n", encoding="utf-8")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *torch.cuda*) echo Card of torch;; esac\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert machine.gpu() is None and machine.device_name() == "Card of torch"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.device_name() == "cpu"


TESTS = """
import os
import pytest

@pytest.mark.parametrize("gap", [0.25, 0.5])
def test_good(gap, record_property):
    record_property("gap", gap)
    record_property("where", "here")

def test_absent():
    pytest.skip("no such thing")

def test_bad():
    assert 1 + 1 == 3

def test_deadly():
    os._exit(5)
"""


def suite(folder: Path, *words: str | Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    (folder / "test_some.py").write_text(TESTS, encoding="utf-8")
    command = [sys.executable, GPU / "suite.py", "--out", folder / "some.json", folder / "test_some.py", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # both take a second
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=folder, env=environment)
    return result, json.loads((folder / "some.json").read_text(encoding="utf-8"))


def test_what_tests_recorded_becomes_json_with_the_largest_of_each_name(tmp_path: Path) -> None:
    result, found = suite(tmp_path, "-k", "good or absent", "-p", "xdist.plugin", "-n", "2")
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "2 passed, 1 skipped; gap 0.5"
    assert found.keys() == {"name", "device", "figures", "floors", "versions"} and found["name"] == "some"
    figures = found["figures"]
    assert (figures["passed"], figures["failed"], figures["skipped"]) == (2, 0, 1)
    assert figures["skips"] == {"no such thing": 1} and figures["largest"] == {"gap": 0.5}
    assert figures["properties"]["test_some.py::test_good[0.25]"] == {"gap": 0.25, "where": "here"}


def test_failures_and_a_run_without_any_passing_test_fail_and_say_why(tmp_path: Path) -> None:
    result, found = suite(tmp_path, "-k", "good or bad")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("2 passed, 1 failed; test_some.py::test_bad: assert (1 + 1) == 3")
    result, _ = suite(tmp_path, "-k", "absent")
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "1 skipped"
    (tmp_path / "test_unimportable.py").write_text("import nothing_by_this_name\n", encoding="utf-8")
    result, found = suite(tmp_path, tmp_path / "test_unimportable.py", "-k", "good")
    assert result.returncode == 1 and "nothing_by_this_name" in found["figures"]["failures"]["test_unimportable.py"]


HANGING = """
import signal
import time

def test_before():
    pass

def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)

def test_after():
    pass
"""


def test_a_test_that_hangs_and_hears_no_signal_costs_the_head_s_others_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGING, encoding="utf-8")
    words = next(part.on_gpu for part in checks.PARTS if part.name == "head_parity").split()
    for option, value in {"-n": "1", "--timeout": "5"}.items():
        words[words.index(option) + 1] = value
    plugins = ("-p", "xdist.plugin", "-p", "pytest_timeout")
    result, found = suite(tmp_path, tmp_path / "test_hanging.py", "-k", "before or hangs or after", *plugins, *words[words.index("-n") :])
    figures = found["figures"]
    assert result.returncode == 1 and (figures["passed"], figures["failed"]) == (2, 1)
    assert "crashed" in figures["failures"]["test_hanging.py::test_hangs"]


def test_tests_that_are_cut_off_keep_what_they_found(tmp_path: Path) -> None:
    result, found = suite(tmp_path)
    assert result.returncode == 5
    assert (found["figures"]["passed"], found["figures"]["failed"], found["figures"]["skipped"]) == (2, 1, 1)
    assert found["figures"]["largest"] == {"gap": 0.5}
