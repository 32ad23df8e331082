"""Claim: ranks other than the main one receive and hold their own rows of a batch and nothing else of it.

    python tools/bench/rows_travel.py --before CHECKOUT     about 5 minutes on two cores

A run trains on recorded groups (a step of one, then the step that is measured) with a tiny policy, over gloo, at each number of
data-parallel ranks and each size of the batch. Counted on rank 1 are the bytes that its TCP connections received, by the kernel's counters
(1.1 MiB of them are gradients); the highest resident memory over that before the step; and the bytes of groups and of rows that are there
as the first row is trained. CHECKOUT is another version of this repository, measured by the same script: until 63ce74b all ranks held the
whole batch.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Annotated, Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from memory import forget_peak, status_bytes

ROOT = Path(__file__).resolve().parents[2]
SIZES = (1, 4, 16)
RANKS = (2, 4)
GROUPS, SAMPLES, TURNS, SAMPLED, OBSERVED, PROMPT = 8, 4, 4, 64, 192, 64
"""Groups of the batch of size 1, trajectories of each, turns of each, and tokens of a turn's two parts and of a prompt."""

ROW_TOKENS = 1024
VOCAB = 640
MIB = 2**20
BYTES_RECEIVED = 128
"""Offset of tcpi_bytes_received in Linux's struct tcp_info."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def measure(
    before: Annotated[Path | None, typer.Option(help="Checkout of a version to compare with.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/cpu/rows_travel.json.")] = None,
) -> None:
    """Measure this checkout, and the other where one is given."""
    from common import finish  # it imports this version, which a rank of another must not
    from models import random_policy

    versions = {"before": before} if before is not None else {}
    figures: dict[str, Any] = {"tokens": {str(size): _tokens(GROUPS * size) for size in SIZES}, "row_tokens": ROW_TOKENS}
    with TemporaryDirectory(prefix="igpo-bench-") as name, random_policy("demo", layers=1) as policy:
        for size in SIZES:
            _record(Path(name) / f"{size}.parquet", GROUPS * size)
        for version, code in {**versions, "after": ROOT}.items():
            figures[version] = {"commit": _commit(code)}
            for ranks in RANKS:
                found = {str(size): _rank_1(code.resolve(), Path(name), policy, ranks, size) for size in SIZES}
                figures[version][f"{ranks}_ranks"] = found
    floors = {f"{ranks}_ranks": {str(size): round(_rows_bytes(size) / ranks / MIB, 2) for size in SIZES} for ranks in RANKS}
    finish("rows_travel", figures, {"rows_mib": floors}, ("torch", "megatron-core"), out, _headline(figures))


def _headline(figures: dict[str, Any]) -> str:
    """Rank 1 of the most ranks at the largest batch, in every version."""
    found = {version: figures[version][f"{RANKS[-1]}_ranks"][str(SIZES[-1])] for version in ("before", "after") if version in figures}
    return "; ".join(f"{version}: {', '.join(f'{name} {value:g}' for name, value in of.items())}" for version, of in found.items())


def _commit(code: Path) -> str:
    return subprocess.run(
        ["git", "-C", str(code), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def _tokens(groups: int) -> int:
    return groups * (PROMPT + SAMPLES * TURNS * (SAMPLED + OBSERVED))


def _rows_bytes(size: int) -> int:
    """Of all rows of the batch: three int64 of every token; three more of a target, and seven fp32. A trajectory fills a row."""
    trajectories = GROUPS * size * SAMPLES
    return trajectories * ((PROMPT + TURNS * (SAMPLED + OBSERVED)) * 24 + TURNS * SAMPLED * (24 + 28))


def _record(path: Path, groups: int) -> None:
    """Two steps as a rollout file: one group, then `groups`."""
    from igpo_megatron.observability.rollout_dump import write_rollouts

    rng = random.Random(0)
    parts = [path.with_suffix(f".{step}") for step in (1, 2)]
    for step, (part, count) in enumerate(zip(parts, (1, groups), strict=True), start=1):
        write_rollouts(part, step, [_group(rng, number) for number in range(count)])
    pq.write_table(pa.concat_tables([pq.read_table(part) for part in parts]), path)


def _group(rng: random.Random, number: int) -> Any:
    from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    group = RolloutGroup(Prompt(str(number), "?", ("a",), "bench"), [Node(None, "prompt", tokens(PROMPT))])
    for _ in range(SAMPLES):
        path = [0]
        for turn in range(1, TURNS + 1):
            sampled = tokens(SAMPLED)
            logprobs = [-rng.random() for _ in sampled]
            path.append(group.add(Node(path[-1], "action", sampled, turn, weight_version=0, behavior_logprobs=logprobs)))
            path.append(group.add(Node(path[-1], "observation", tokens(OBSERVED), turn)))
        group.trajectories.append(Trajectory(path, Status.TRUNCATED_TURNS))
    return group


def _rank_1(code: Path, folder: Path, policy: Path, ranks: int, size: int) -> dict[str, float]:
    """What rank 1 counted in a run of the code in `code`."""
    name = f"{code.name}_{ranks}_{size}"
    config, result = folder / f"{name}.yaml", folder / f"{name}.json"
    values = {
        "run": {"name": name, "folder": str(folder / "runs"), "steps": 2, "device": "cpu", "replay": str(folder / f"{size}.parquet")},
        "model": {"path": str(policy), "dtype": "fp32"},
        "parallel": {"data": ranks, "distributed_optimizer": False},
        "packing": {"row_tokens": ROW_TOKENS},
        "advantage": {"name": "grpo"},
        "reward": {"gain": "none"},
        "loss": {"kl_coef": 0.0},
        "track": {"dump_every": 0},
    }
    config.write_text(json.dumps(values), encoding="utf-8")
    place = {"PYTHONPATH": str(code), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    ended = subprocess.run(
        [*torchrun, __file__, "rank", str(config), str(result)], env={**os.environ, **place}, capture_output=True, text=True
    )
    assert not ended.returncode, ended.stdout + ended.stderr
    return {key: round(value / MIB, 2) for key, value in json.loads(result.read_text(encoding="utf-8")).items()}


@app.command()
def rank(config: Path, result: Path) -> None:
    """One rank of a run, which `measure` starts; rank 1 writes what it counted."""
    training = _module("igpo_megatron.training.main", "igpo_megatron.train")
    schedule = _module("igpo_megatron.policy.schedule", "igpo_megatron.actor.schedule")
    if os.environ["RANK"] == "1":
        _observe(importlib.import_module("igpo_megatron.observability.tracker").Tracker, schedule, result)
    raise SystemExit(training.main([str(config)]))


def _module(*names: str) -> ModuleType:
    """The first that the measured version has."""
    code = Path(os.environ["PYTHONPATH"])
    return importlib.import_module(next(name for name in names if (code / f"{name.replace('.', '/')}.py").is_file()))


def _observe(tracker: Any, schedule: Any, result: Path) -> None:
    """Count from the end of step 1 to that of step 2, and what is held as step 2 begins to train."""
    counted: dict[str, float] = {}
    log, schedule_of = tracker.log, schedule.get_forward_backward_func

    def logged(self: Any, step: int, metrics: Any) -> None:
        if step == 1:
            gc.collect()
            forget_peak()
            counted.update(received_mib=_received(), highest_mib=status_bytes("VmRSS"))
        elif not result.exists():
            counted.update(received_mib=_received() - counted["received_mib"], highest_mib=status_bytes("VmHWM") - counted["highest_mib"])
            result.write_text(json.dumps(counted), encoding="utf-8")
        log(self, step, metrics)

    def scheduled() -> Any:
        counted.update(_held())
        return schedule_of()

    tracker.log, schedule.get_forward_backward_func = logged, scheduled


def _received() -> int:
    """Bytes that the open TCP connections of this process have received."""
    total = 0
    for connection in psutil.Process().net_connections("tcp"):
        with socket.socket(fileno=os.dup(connection.fd)) as found:
            total += struct.unpack_from("Q", found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), BYTES_RECEIVED)[0]
    return total


def _held() -> dict[str, float]:
    """Bytes of the groups and of the rows that are there."""
    from igpo_megatron.packing.tree import PackedRow
    from igpo_megatron.types import Node

    everything = gc.get_objects()
    lists = [
        getattr(node, name) for node in everything if type(node) is Node for name in ("token_ids", "behavior_logprobs", "old_logprobs")
    ]
    groups = sum(sys.getsizeof(numbers) + sum(map(sys.getsizeof, numbers)) for numbers in lists)
    storages = {}
    for row in everything:
        for name in PackedRow.__slots__ if type(row) is PackedRow else ():
            if isinstance(tensor := getattr(row, name), torch.Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return {"groups_mib": groups, "rows_mib": sum(storages.values())}


if __name__ == "__main__":
    app()
