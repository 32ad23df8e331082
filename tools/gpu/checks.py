"""Run the parts of the GPU checks, each within its own limit, and say in one table what they found.

    wheels ──pip──> scratch/site
    PARTS ──a process group each──> OUT/NAME.json, OUT/NAME.log (stdout), OUT/NAME.err (stderr), a line on the terminal
                                └─> OUT/summary.json, rewritten after every part, so that an interruption loses nothing

A part is a script that takes `--out FILE.json`, prints its headline as its last line and exits with 0. Standard library only: this runs
before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any, Literal

import machine

ROOT = machine.ROOT
ON_PATH = ("", "tests/unit", "tests/distributed", "tools", "tools/bench", "tools/gpu")
HEADLINE_LENGTH = 300
_PATIENCE_ON_CPU = 6


@dataclass(frozen=True)
class Part:
    """One thing to find out."""

    name: str
    limit_s: int
    on_gpu: str
    """Script and arguments, without `--out`."""

    small: str
    """The same on a CPU within seconds, so that no line is new to a GPU."""

    needs: tuple[str, ...] = ("torch",)
    """Import packages; the part is skipped where one is missing."""

    keeps: tuple[str, ...] = ()
    """Files of the repository that the part may rewrite; copied to OUT."""


MODEL = "MODEL"
"""Stands for the folder of `--model`; a part that names it is skipped without one."""

HEAD_TESTS = "tests/gpu/test_linear_logprob_gpu.py tests/gpu/test_token_loss_gpu.py"
POLICY_TESTS = "tests/gpu/test_policy_gpu.py tests/gpu/test_transformer_engine.py"
PARTS = (
    Part("smoke", 30, "tools/gpu/smoke.py", "tools/gpu/smoke.py"),
    Part(
        "head_parity",
        90,
        # Whoever waits for a GPU that hangs hears no signal; a thread ends the worker, and the others go on.
        f"tools/gpu/suite.py {HEAD_TESTS} -n 8 --timeout 40 --timeout-method thread",
        f"tools/gpu/suite.py --interpret {HEAD_TESTS}",
        needs=("torch", "triton", "pytest"),
    ),
    Part("trees", 110, f"tools/gpu/suite.py {POLICY_TESTS}", f"tools/gpu/suite.py {POLICY_TESTS}", needs=("torch", "megatron", "pytest")),
    Part(
        "head_speed",
        105,
        "tools/bench/head_kernel.py --rows 128,4096,16384 --repeats 5 --seconds 80 --write-table",
        "tools/bench/head_kernel.py --rows 8,64 --repeats 2 --uncompiled",
        needs=("torch", "triton"),
        keeps=("igpo_megatron/kernels/head_forms.json",),
    ),
    Part(
        "fold",
        65,
        "tools/bench/probe_cost.py --shape 7B --layers 8 --turns 10 --published batched --repeats 3 --no-engine",
        "tools/bench/probe_cost.py --shape demo --turns 2 --repeats 2 --no-engine",
        needs=("torch", "megatron"),
    ),
    Part(
        "step",
        80,
        "tools/bench/step.py --shape 7B,0.5B,1.5B --seconds 55",
        "tools/bench/step.py --shape demo --small",
        needs=("torch", "megatron"),
    ),
    Part(
        "learn",
        80,
        "tools/gpu/learn.py --device cuda --seconds 70",
        "tools/gpu/learn.py --device cpu --small --seconds 460",
        needs=("torch", "megatron"),
    ),
    Part(
        "learn_model",
        120,
        f"tools/gpu/learn.py --device cuda --seconds 110 --model {MODEL}",
        f"tools/gpu/learn.py --device cpu --small --seconds 700 --model {MODEL}",
        needs=("torch", "megatron"),
    ),
)
"""In order of what they tell, should time run out. Without `learn_model` they leave room for the wheels in a call of ten minutes."""

State = Literal["ok", "FAILED", "skipped"]


@dataclass(frozen=True)
class Result:
    """What became of a part."""

    name: str
    state: State
    seconds: float
    headline: str
    command: str = ""

    def line(self) -> str:
        return f"{self.name:12} {self.state:8} {self.seconds:6.1f} s  {self.headline}"


class Running:
    """A part's process group; it ends with its leader or at its limit."""

    def __init__(self, part: Part, command: Sequence[str], out: Path, environment: Mapping[str, str]) -> None:
        self.part, self.command, self.started = part, command, time.monotonic()
        self.json, self.stdout, self.stderr = (out / f"{part.name}.{ending}" for ending in ("json", "log", "err"))
        self.json.unlink(missing_ok=True)  # of an earlier call
        with self.stdout.open("wb") as log, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=err, start_new_session=True
            )

    def is_over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() - self.started > self.part.limit_s

    def end(self, interrupted: bool = False) -> Result:
        """Kill what is left of the group, and judge."""
        seconds, code = time.monotonic() - self.started, self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        said, complained = last_line(self.stdout), last_line(self.stderr)
        state: State = "FAILED"
        if interrupted:
            headline = f"interrupted after: {said or complained or 'no output'}"
        elif code is None:
            headline = f"stopped at its limit of {self.part.limit_s} s after: {said or complained or 'no output'}"
        elif code:
            headline = f"exit code {code}: {complained or said}"
        elif not is_json(self.json):
            headline = f"exit code 0 without a result in {self.json.name}"
        else:
            state, headline = "ok", said
        return Result(self.part.name, state, round(seconds, 1), headline, shlex.join(self.command))


def last_line(path: Path) -> str:
    """Of a text file, shortened; empty where there is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:HEADLINE_LENGTH] for line in reversed(lines) if line.strip()), "")


def is_json(path: Path) -> bool:
    """Is there a whole JSON value in the file?"""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def why_not(part: Part, model: Path | None) -> str | None:
    """None where the part can run."""
    missing = [package for package in part.needs if find_spec(package) is None]
    if missing:
        return f"not importable: {', '.join(missing)}"
    return "no --model FOLDER was given" if MODEL in part.on_gpu and model is None else None


def run_parts(
    parts: Sequence[Part],
    refused: Callable[[Part], str | None],
    start: Callable[[Part], Running],
    jobs: int,
    report: Callable[[Result], None],
    stop: Event,
) -> None:
    """At most `jobs` at a time; none changes another's fate. Once `stop` is set, what has not ended is reported as such."""
    waiting, running = deque(parts), list[Running]()
    while (waiting or running) and not stop.is_set():
        while waiting and len(running) < jobs:
            part = waiting.popleft()
            if reason := refused(part):
                report(Result(part.name, "skipped", 0.0, reason))
            else:
                running.append(start(part))
        for child in [child for child in running if child.is_over()]:
            running.remove(child)
            report(child.end())
        stop.wait(0.05)
    for child in running:
        report(child.end(interrupted=True))
    for part in waiting:
        report(Result(part.name, "skipped", 0.0, "interrupted before it began"))


def install(wheels: Path, site: Path) -> None:
    """One by one: a wheel for another platform must not keep the others out."""
    for wheel in sorted(wheels.glob("*.whl")):
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", str(site)]
        if subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)]).returncode:
            print(f"checks: {wheel.name} did not install", file=sys.stderr, flush=True)
    sys.path.append(str(site))


def options() -> argparse.Namespace:
    """The command line, checked; `device` is the GPU's name, or `cpu`, and `out` can be written."""
    parser = argparse.ArgumentParser(prog="checks.sh", description="All checks and benchmarks for one GPU.")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels that this machine lacks (tools/gpu/wheels.sh)")
    parser.add_argument("--out", type=Path, help="folder for results; default: runs/checks/DEVICE")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of that folder, rewritten after every part: one file to carry away")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="with --device cpu: every part as small as it can be")
    parser.add_argument("--model", type=Path, help="folder of a language model that learn_model trains, such as SmolLM2's")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="comma-separated; default: %(default)s")
    given = parser.parse_args()
    given.parts = [name.strip() for name in given.parts.split(",")]
    if unknown := set(given.parts) - {part.name for part in PARTS}:
        parser.error(f"--parts: unknown {', '.join(sorted(unknown)) or '(nothing)'}; known: {', '.join(part.name for part in PARTS)}")
    if (given.device == "cpu") != given.small:
        parser.error("--device cpu and --small go together: the parts in full are for a GPU, the small ones for a CPU")
    if given.wheels and not list(given.wheels.glob("*.whl")):
        parser.error(f"--wheels {given.wheels}: no wheels there; fetch them with tools/gpu/wheels.sh")
    if given.model and not (given.model / "config.json").is_file():
        parser.error(f"--model {given.model}: no config.json there; name the folder of a Hugging Face model")
    if find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch; name an interpreter that has by PYTHON=...")
    # torch is asked, not nvidia-smi: a torch built for CPUs would run the full sizes on them.
    given.device = "cpu" if given.small else machine.torch_gpu()
    if given.device is None:
        parser.error(f"torch of {sys.executable} sees no GPU; --device cpu --small runs the same parts on a CPU")
    folder = re.sub(r"[^a-z0-9]+", "-", given.device.lower()).strip("-")
    given.out = (given.out or ROOT / "runs/checks" / folder).absolute()
    if given.archive and (not given.archive.parent.is_dir() or given.archive.resolve().is_relative_to(given.out.resolve())):
        parser.error(f"--archive {given.archive}: name a file in a folder that exists, outside of --out {given.out}")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "summary.json").touch()
        (given.out / "summary.json").unlink()  # of an earlier call
    except OSError as error:
        parser.error(f"--out {given.out}: cannot be written ({error.strerror}); name another folder")
    return given


def environment(small: bool, scratch: Path) -> dict[str, str]:
    """For every part: the repository and the wheels importable, no network, temporary files where they are cleaned up."""
    paths = [*(str(ROOT / folder) for folder in ON_PATH), str(scratch / "site"), os.environ.get("PYTHONPATH", "")]
    fixed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)}
    if small:
        fixed |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # Found otherwise by the machine's name, for which one without network may ask a name server in vain, for seconds and at every group.
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {"OMP_NUM_THREADS": "4"} | loopback | os.environ | fixed


def archive(folder: Path, file: Path) -> None:
    """The folder's files in one; what was there before is replaced only when the new one is complete."""
    partial_file = file.with_name(f"{file.name}.partial")
    with tarfile.open(partial_file, "w:gz") as tar:
        tar.add(folder, folder.name)
    partial_file.replace(file)


def main() -> int:
    """Exit code 0: every part is ok or skipped; 1: one failed or the call was interrupted; 2: the call was wrong."""
    given = options()
    out = given.out
    results: list[Result] = []
    started = time.monotonic()
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with tempfile.TemporaryDirectory(prefix="igpo-checks-") as folder:
        scratch = Path(folder)
        if given.wheels:
            install(given.wheels, scratch / "site")
        about: dict[str, Any] = {
            "device": given.device,
            "gpu": None if given.small else machine.gpu(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "versions": machine.versions(),
        }

        def start(part: Part) -> Running:
            words = shlex.split(part.small if given.small else part.on_gpu)
            words = [str(given.model.absolute()) if word == MODEL else word for word in words]
            command = [sys.executable, *words, "--out", str(out / f"{part.name}.json")]
            return Running(part, command, out, environment(given.small, scratch))

        def report(result: Result) -> None:
            print(result.line(), flush=True)
            if result.command and not given.small:
                for name in next(part.keeps for part in PARTS if part.name == result.name):
                    shutil.copy(ROOT / name, out)
            results.append(result)
            summary = {**about, "seconds": round(time.monotonic() - started, 1), "parts": list(map(asdict, results))}
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            if given.archive:
                archive(out, given.archive)

        chosen = [part for part in PARTS if part.name in given.parts]
        if given.small:
            # A CPU that does other things beside may be slow. Two at a time: the longest come last in PARTS, and would be waited for alone.
            chosen = [replace(part, limit_s=_PATIENCE_ON_CPU * part.limit_s) for part in reversed(chosen)]
        run_parts(chosen, partial(why_not, model=given.model), start, 2 if given.small else 1, report, stop)
    print(f"\n{given.device}, {', '.join(f'{name} {version}' for name, version in about['versions'].items())}; results in {out}")
    for result in results:
        print(result.line())
    return int(stop.is_set() or any(result.state == "FAILED" for result in results))


if __name__ == "__main__":
    sys.exit(main())
