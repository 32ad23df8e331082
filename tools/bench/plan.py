"""Claim: the planner's peak memory and step time agree with what real ranks take, layout by layout.

    python tools/bench/plan.py [--fresh]     about ten minutes on two cores; an interrupted run goes on where it stopped

Every case starts its ranks twice, over gloo, on random weights and synthetic rollouts through `Policy.forward_backward`. Memory: the most
anonymous memory (RssAnon, read every 2 ms) of each rank above what it had before the policy was built, the fullest rank counts;
malloc gives freed blocks back at once in these ranks. Time: the least of several steps of the slowest rank, with malloc left alone:
only meaningful on a machine that does nothing else, where --fresh forgets what was measured before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from common import ROOT, finish, kept_cell
from memory import anonymous_peak
from models import config_for, qwen2, save_random
from ranks import on_ranks

from checkpoint_conversion.architectures import shape_of
from igpo_megatron.algorithms.losses.registry import objective
from igpo_megatron.packing.batches import balance
from igpo_megatron.packing.tree import PackedRow, pack_for_training, step_counts
from igpo_megatron.plan import machines
from igpo_megatron.plan.calibrate import calibrate
from igpo_megatron.plan.layouts import stages_of
from igpo_megatron.plan.memory import fullest_stage
from igpo_megatron.plan.parts import count_parts
from igpo_megatron.plan.train_time import pass_time, update_time
from igpo_megatron.plan.types import Layout, Machine, Memory, Row, Settings
from igpo_megatron.policy import cpu, parallel
from igpo_megatron.policy.tree_plan import plan_of
from igpo_megatron.supervision.freed_memory import give_back_freed_memory
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

CELLS = ROOT / "runs" / "bench-plan"
TIMED_STEPS = 6
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of these settings (malloc.h)."""

MIB = 2**20
CONTEXT = 4096
MODELS = {
    "tiny": qwen2(256, 768, 4, 4, 2, 8192, tied=True, context=CONTEXT),
    "small": qwen2(512, 1408, 6, 8, 4, 8192, tied=False, context=CONTEXT),
}
GROUPS, SAMPLES, PROMPT, SAMPLED, OBSERVED = 4, 2, 128, 128, 128
"""Questions, trajectories of each, and tokens: a prompt, a turn, a result, a turn, so 512 on a trajectory and 896 in a group."""


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    model: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    recompute: str = "none"
    row_tokens: int = 896

    @property
    def name(self) -> str:
        return f"{self.model} TP{self.tensor} PP{self.pipeline} DP{self.data} recompute {self.recompute} rows {self.row_tokens}"

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data


GRID = [
    *(
        case
        for model in MODELS
        for case in (
            Case(model),
            Case(model, recompute="full"),
            Case(model, row_tokens=1792),
            Case(model, tensor=2),
            Case(model, tensor=2, recompute="full"),
            Case(model, pipeline=2),
            Case(model, pipeline=2, recompute="full"),
            Case(model, data=2),
            Case(model, tensor=2, pipeline=2),
        )
    ),
    Case("small", row_tokens=3584),
    Case("small", recompute="full", row_tokens=3584),
]


def main(
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/cpu/plan.json.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="A calibration of this machine; default: measure it now.")] = None,
    fresh: Annotated[bool, typer.Option(help="Forget the cases measured so far.")] = False,
    only: Annotated[str, typer.Option(help="Only cases whose name holds this text.")] = "",
) -> None:
    """Measure every case, predict it, compare."""
    if fresh:
        shutil.rmtree(CELLS, ignore_errors=True)
    machine = machines.read(calibration) if calibration else calibrate()
    cpu.install()
    from igpo_megatron.policy import policy  # noqa: F401  imported before ranks are forked

    rows = []
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        for case in GRID:
            if only not in case.name:
                continue
            measured = kept_cell(CELLS / f"{case.name}.json", asdict(case), partial(measure, case, Path(folder)))
            rows.append(compare(case, measured, machine))
            print(json.dumps(rows[-1]), file=sys.stderr)
    finish("plan", summary(rows, machine), {"memory_error": 0.10, "median_time_error": 0.25}, ("torch", "megatron-core"), out)


def summary(rows: list[dict[str, Any]], machine: Machine) -> dict[str, Any]:
    """The figures: errors, and how often two cases of a model are ordered as measured."""
    memory = [abs(row["memory_error"]) for row in rows]
    seconds = [abs(row["time_error"]) for row in rows]
    right, pairs = ranking(rows)
    return {
        "largest_memory_error": round(max(memory), 3),
        "median_memory_error": round(median(memory), 3),
        "median_time_error": round(median(seconds), 3),
        "largest_time_error": round(max(seconds), 3),
        "ranked_right": right,
        "ranked_pairs": pairs,
        "machine": asdict(machine),
        "cases": rows,
    }


def ranking(rows: list[dict[str, Any]], clear: float = 1.15) -> tuple[int, int]:
    """(pairs of cases of one model predicted in the order measured, pairs that differ by more than `clear` as measured)."""
    pairs = [
        (a, b)
        for number, a in enumerate(rows)
        for b in rows[number + 1 :]
        if a["model"] == b["model"] and max(a["measured_s"], b["measured_s"]) > clear * min(a["measured_s"], b["measured_s"])
    ]
    right = sum((a["measured_s"] < b["measured_s"]) == (a["predicted_s"] < b["predicted_s"]) for a, b in pairs)
    return right, len(pairs)


def compare(case: Case, measured: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """One case, predicted beside measured."""
    rows = [Row(**row) for row in measured["rows"]]
    memory, seconds = predict(case, machine, rows)
    peak = sum(memory.values()) / MIB
    return {
        "case": case.name,
        "model": case.model,
        "measured_mib": round(measured["mib"], 1),
        "predicted_mib": round(peak, 1),
        "memory_error": round(peak / measured["mib"] - 1, 3),
        "measured_s": round(measured["seconds"], 4),
        "measured_cpu_s": round(measured["cpu"], 4),
        "predicted_s": round(seconds, 4),
        "predicted_cpu_s": round(predict(case, replace(machine, cores=1), rows)[1], 4),
        "time_error": round(seconds / measured["seconds"] - 1, 3),
        "terms_mib": {name: round(size / MIB, 1) for name, size in memory.items()},
    }


def predict(case: Case, machine: Machine, rows: list[Row]) -> tuple[Memory, float]:
    """The planner's answer for these very rows."""
    shape = shape_of(MODELS[case.model])
    parts = count_parts(shape, case.tensor, 1)
    stages = stages_of(shape.num_layers, case.pipeline, 1)
    assert stages is not None
    layout = Layout(
        case.tensor,
        case.pipeline,
        data=case.data,
        recompute=case.recompute,  # type: ignore[arg-type]
        row_tokens=case.row_tokens,
        stages=stages,
        sequence=case.tensor > 1,
    )
    settings = Settings(dtype_bytes=4, reference=False)
    shares = [[rows[index] for index in share if index >= 0] for share in balance([row.tokens for row in rows], case.data)]
    largest = max(rows, key=lambda row: row.tokens)
    memory = fullest_stage(shape, parts, layout, settings, largest, len(shares[0]), cuda=False)
    seconds = pass_time(shape, layout, settings, machine, shares, backward=True)
    return memory, seconds + update_time(parts, layout, settings, machine, len(shares[0]))


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Start the ranks twice: {mib, seconds, rows}."""
    model = folder / case.model
    if not model.exists():
        save_random(MODELS[case.model], model)
    memory = run_ranks(case, model, 3, lean=True)
    timed = run_ranks(case, model, TIMED_STEPS, lean=False)
    steps = [max(rank["seconds"][step] for rank in timed) for step in range(1, TIMED_STEPS)]
    busy = [sum(rank["cpu"][step] for rank in timed) for step in range(1, TIMED_STEPS)]
    return {"mib": max(rank["peak"] for rank in memory) / MIB, "seconds": min(steps), "cpu": min(busy), "rows": memory[0]["rows"]}


def run_ranks(case: Case, model: Path, steps: int, *, lean: bool) -> list[dict[str, Any]]:
    """What every rank reports."""

    def work() -> dict[str, Any]:
        if lean:
            # Blocks of 64 KiB and more are mapped, and unmapped when they are freed: what is resident is what is alive.
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, 65536)
            libc.mallopt(M_TRIM_THRESHOLD, 65536)
        return rank_main(case, model, steps)

    try:
        return on_ranks(case.world, work)
    except SystemExit as failed:
        sys.exit(f"{case.name} failed:\n{failed}")


def rank_main(case: Case, model: Path, steps: int) -> dict[str, Any]:
    """One rank: build the policy, take the steps, say what they took."""
    from igpo_megatron.policy.policy import Policy

    config = config_for(
        model,
        dtype="fp32",
        model={"recompute": case.recompute},
        run={"device": "cpu"},
        loss={"kl_coef": 0.0},
        parallel={"tensor": case.tensor, "pipeline": case.pipeline, "data": case.data, "sequence": case.tensor > 1},
        packing={"row_tokens": case.row_tokens},
    )
    ranks = parallel.init(config)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the matmul library's own buffers
    # What the parent had freed would be filled first, without a trace.
    gc.collect()
    give_back_freed_memory(above=0)
    with anonymous_peak(0.002) as peak:
        policy = Policy(config, ranks)
        groups = synthetic_groups()
        rows = pack_for_training(groups, row_tokens=case.row_tokens, multiple=policy.row_multiple, token_weight=lambda n: 1 / n)
        counts = step_counts(groups)

        def loss(tokens: Any) -> Any:
            return objective(replace(tokens, old_logprobs=tokens.logprobs.detach()), counts, config.loss)

        seconds, busy_s = [], []
        for _ in range(steps):
            torch.distributed.barrier()
            started, busy = time.perf_counter(), time.process_time()
            policy.optimizer_step(policy.forward_backward(rows, loss))
            seconds.append(time.perf_counter() - started)
            busy_s.append(time.process_time() - busy)
    return {"peak": peak[0], "seconds": seconds, "cpu": busy_s, "rows": [asdict(row_shape(row)) for row in rows]}


def row_shape(row: PackedRow) -> Row:
    """What the planner reckons with of a packed row, with what its attention plan copies."""
    calls = plan_of(row.subtree_end).calls
    gathered = sum(len(call.keys) for call in calls if isinstance(call.keys, torch.Tensor))
    masked = sum(call.mask.numel() for call in calls if call.mask is not None)
    pairs = int((row.subtree_end - torch.arange(row.num_tokens)).sum())
    return Row(row.num_tokens, pairs, len(row.targets), gathered, masked)


def synthetic_groups() -> list[Any]:
    """Rollouts of fixed lengths: questions whose samples share the prompt alone."""
    groups = []
    for number in range(GROUPS):
        group = RolloutGroup(Prompt(str(number), "?", ("a",), "bench"), [Node(None, "prompt", [7] * PROMPT)])
        for sample in range(SAMPLES):
            path = [0]
            for turn, (kind, length) in enumerate((("action", SAMPLED), ("observation", OBSERVED), ("action", SAMPLED))):
                path.append(group.add(Node(path[-1], kind, [11 + sample] * length, 1 + turn // 2)))  # type: ignore[arg-type]
            group.trajectories.append(Trajectory(path, Status.FINISHED, turn_advantages=[0.5 - sample, sample - 0.5]))
        groups.append(group)
    return groups


if __name__ == "__main__":
    typer.run(main)
