"""What every benchmark here shares: timing by turns, ratios with their spread, the ceilings of the device, and the result as JSON."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median, stdev
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from igpo_megatron.doctor.machine import version

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
BOOTSTRAP_SAMPLES = 2000
EVALUATION = ("eval.questions=480", "eval.samples=4")
"""Of the runs whose results are kept here. The demo has changed since, and scores of other questions could not be compared."""

T = TypeVar("T")

torch.set_num_threads(1)  # on CPU as a rank of a run has; two would wait for each other where anything else runs


def interleaved(
    providers: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call of each provider, taken in turns so that a change of the machine's load meets all of them alike.

    `clock`: what tells the time on a CPU; time.process_time leaves out what other programs take of the core.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for number in track(range(warmup + repeats), description=", ".join(providers), transient=True, console=Console(stderr=True)):
        for name, call in providers.items():
            took = _seconds(call, clock)
            if number >= warmup:
                seconds[name].append(took)
    return seconds


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    if not torch.cuda.is_available():
        started = clock()
        call()
        return clock() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Ratio of medians with a 95% bootstrap interval over repeats that were timed in turns."""
    draw = random.Random(0)
    pairs = list(zip(numerators, denominators, strict=True))
    ratios = []
    for _ in range(BOOTSTRAP_SAMPLES):
        sample = draw.choices(pairs, k=len(pairs))
        ratios.append(median(pair[0] for pair in sample) / median(pair[1] for pair in sample))
    ratios.sort()
    return {
        "median": round(median(numerators) / median(denominators), 4),
        "low": round(ratios[int(0.025 * len(ratios))], 4),
        "high": round(ratios[int(0.975 * len(ratios)) - 1], 4),
    }


def device_name() -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions(*packages: str) -> dict[str, str]:
    """Python's and those of the packages that are installed."""
    return {"python": platform.python_version(), **{package: found for package in packages if (found := version(package))}}


def kept_cell(path: Path, wanted: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """A cell of a study: `wanted` and what `make` says of it, from its file once that is there.

    Raises ValueError where the file is of other settings.
    """
    if path.is_file():
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {key: cell.get(key) for key in wanted}
        if found != wanted:
            raise ValueError(f"{path} holds a cell of {found}, expected {wanted}; move the file away, or ask for its settings")
        return cell
    cell = {**wanted, **make()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell, indent=1) + "\n", encoding="utf-8")
    return cell


def world_facts() -> Path:
    """The folder of the demo's questions and passages, made where it is not there yet."""
    folder = ROOT / "runs" / "world-facts"
    if not (folder / "SOURCES.md").exists():  # written last
        command = [sys.executable, "tools/prepare_data.py", "world-facts", "--out", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def train(config: Path | str, name: str, settings: Sequence[str], runs: Path = ROOT / "runs") -> Path:
    """One `igpo train` from the repository's root; its folder below `runs`."""
    arguments = [str(config), f"run.folder={runs}", f"run.name={name}", *EVALUATION, *settings]
    command = [sys.executable, "-m", "igpo_megatron.cli", "train", *arguments]
    subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ}, check=True)
    return runs / name


def table(of: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """One row per name, one column per figure; behind a figure stands its error, which is named NAME_se or NAME_sd."""
    names = [name for name in next(iter(rows.values())) if not name.endswith(("_se", "_sd"))]
    shown = Table(of, *names)

    def cell(found: Mapping[str, float], name: str) -> str:
        value, error = found[name], found.get(f"{name}_se", found.get(f"{name}_sd"))
        text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
        return text if error is None else f"{text} ± {error:.3f}"

    for row, found in rows.items():
        shown.add_row(row, *(cell(found, name) for name in names))
    return shown


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def in_a_process(call: Callable[..., T], *arguments: Any) -> T:
    """What a call returns in a new process of its own. Raises BrokenProcessPool where the process dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def matmul_tflops(cuda: bool) -> float:
    """Speed of a large square matmul on this device, in the heads' dtype."""
    size = 8192 if cuda else 1024
    a = torch.randn(size, size, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    out = torch.empty_like(a)
    best = min(interleaved({"matmul": partial(torch.mm, a, a, out=out)}, 20, warmup=5)["matmul"])
    return round(2 * size**3 / best / 1e12, 4)


def copy_gb_per_s(cuda: bool) -> float:
    """Bytes read and written per second while copying a tensor much larger than any cache."""
    data = torch.ones((2**30 if cuda else 2**26), device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
    target = torch.empty_like(data)
    best = min(interleaved({"copy": partial(target.copy_, data)}, 10, warmup=2)["copy"])
    return round(2 * data.nbytes / best / 1e9, 2)


def finish(
    name: str,
    figures: dict[str, Any],
    floors: dict[str, Any],
    packages: Sequence[str] = ("torch",),
    out: Path | None = None,
    headline: str | None = None,
) -> None:
    """Write results/DEVICE/NAME.json (or `out`), print the same object, and then the headline as the last line."""
    device = device_name()
    result = {"name": name, "device": device, "figures": figures, "floors": floors, "versions": versions(*packages)}
    path = out or RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    if headline:
        print(headline)
