"""Claim: scoring and training reach a stated share of the matmul rate (MFU), by model shape, recomputation and row length.

    python tools/bench/step.py --shape 7B,0.5B,1.5B     on a GPU, within --seconds; 7B with 4 layers, as all of it does not fit with Adam
    python tools/bench/step.py [--small]                the demo on a CPU core, a minute (20 seconds)

One rank, random weights, the policy as `igpo train` builds it, and rows as it packs them: a tree of four trajectories each, whose
prompt counts once. MFU counts what the model asks for (plan/flops.py): recomputation does not raise it, nor do logits that nobody trains
on. It is given against the fastest matmul measured in the same run, and against the data sheet where the device has one. Of a shape with
fewer layers than its own it is that of these layers and the whole head, no more. Peak memory: torch's allocator, weights and optimizer
included; on a CPU the rise of anonymous memory since before the policy was built. Seconds are medians: a GPU's own, a CPU's as this
process used it.

The result is also a calibration: `igpo plan --calibration RESULT.json`. It is written after every setting, so an interruption loses one.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, get_args

import torch
import typer
from common import finish, interleaved
from memory import anonymous_bytes, anonymous_peak
from models import SHAPES, config_for, hf_config, random_policy
from plan import row_shape
from tree_training import branched, train

from checkpoint_conversion.architectures import shape_of
from igpo_megatron.algorithms.losses.registry import token_weight
from igpo_megatron.packing.tree import PackedRow, pack_for_training, step_counts
from igpo_megatron.plan import machines
from igpo_megatron.plan.calibrate import calibrate
from igpo_megatron.plan.flops import model_flops
from igpo_megatron.plan.timed import corrected, modelled, timed_from
from igpo_megatron.plan.types import Machine, Recompute, Row
from igpo_megatron.policy import parallel
from igpo_megatron.supervision.freed_memory import give_back_freed_memory
from igpo_megatron.types import StepCounts

if TYPE_CHECKING:
    from igpo_megatron.policy.policy import Policy

LAYERS = {"7B": 4}
"""Of shapes whose weights, gradients and Adam state do not fit 80 GB."""

ROWS = {"cuda": (16384, 4096), "cpu": (512, 2048), "small": (256, 512)}
"""Tokens of the rows that are compared, multiples of 128; a step has as many of either as fill the longest. On a GPU those that are trained
on come first, for both may not find the time to be compiled."""

SAMPLES, TURNS = 4, 4
"""Trajectories of a row's tree, and turns of each: an eighth of the row is the prompt that they share, a third of the rest is sampled."""

GIB = 2**30


@dataclass(slots=True)
class Case:
    """A step of rows of one length under one setting: what was measured, or why nothing was."""

    model: str
    recompute: Recompute
    row_tokens: int
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Median of "train", of "update" (the optimizer's part of it), and of "score"."""

    peak: float = 0.0
    """Bytes."""

    left_out: str = ""


def main(
    shape: Annotated[str, typer.Option(help="demo, 0.5B, 1.5B or 7B, or several with commas.")] = "demo",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of each shape; default: all, of 7B 4.")] = None,
    small: Annotated[bool, typer.Option(help="Short rows, and what ranks exchange is not measured: shows that everything runs.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each pass at most.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="Time for all of it: fewer repetitions, then fewer settings.")] = 50,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Result file; default: results/DEVICE/step.json.")] = None,
) -> None:
    """Measure the machine, then every shape and setting."""
    deadline = time.monotonic() + seconds
    shapes = shape.split(",")
    if unknown := [name for name in shapes if name not in SHAPES]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(SHAPES)}, nor several with commas", param_hint="--shape")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = ROWS["small" if small else device]
    machine = calibrate(links=not small)
    models: dict[str, dict[str, Any]] = {}
    cases: list[Case] = []
    ranks = parallel.init(config_of("unused", "none", max(lengths)))
    for number, name in enumerate(shapes):
        # Each shape has its share of the time, so that none goes without: the first call of every length compiles.
        over = time.monotonic() + (deadline - time.monotonic()) / (len(shapes) - number)
        depth = layers or LAYERS.get(name)
        model = f"{name} x {depth} layers" if depth else name
        models[model] = hf_config(name, depth)
        with random_policy(name, depth) as folder:
            for place, recompute in enumerate(settings := get_args(Recompute)):
                until = time.monotonic() + (over - time.monotonic()) / (len(settings) - place)
                here = [Case(model, recompute, length) for length in lengths]
                measure(config_of(folder, recompute, max(lengths)), ranks, here, repeats, until, over)
                cases += here
                write(figures_of(cases, models, machine), machine, out)
    parallel.shutdown()
    # Only now: the planner counts parameters in ranks of its own, which a process that is a rank cannot have.
    figures = figures_of(cases, models, machine)
    write({**figures, "planner": planner_errors(machine, figures)}, machine, out)
    if not any(case.seconds for case in cases):
        sys.exit(1)


def figures_of(cases: Sequence[Case], models: Mapping[str, Mapping[str, Any]], machine: Machine) -> dict[str, Any]:
    """What has been measured so far."""
    passes = [one for case in cases for one in passes_of(case, 2 if machine.device == "cuda" else 4)]
    sheet = machines.sheet_flops(machine.name)
    table = [table_row(case, models[case.model], machine, sheet) for case in cases]
    return {"machine": asdict(machine), "models": models, "passes": passes, "table": table}


def write(figures: dict[str, Any], machine: Machine, out: Path | None) -> None:
    """The result with these figures."""
    sheet = machines.sheet_flops(machine.name)
    floors = {"mfu": 1.0, "ceiling_tflops": round(machine.ceiling / 1e12, 4), "sheet_tflops": sheet and sheet / 1e12}
    finish("step", figures, floors, ("torch", "megatron-core", "triton"), out, headline(figures["table"], machine))


def config_of(path: Path | str, recompute: str, row_tokens: int) -> Any:
    """A run's configuration as far as the policy reads it."""
    return config_for(path, model={"recompute": recompute}, loss={"name": "ppo", "kl_coef": 0.0}, packing={"row_tokens": row_tokens})


def measure(config: Any, ranks: parallel.Ranks, cases: Sequence[Case], repeats: int, until: float, deadline: float) -> None:
    """Fill in cases of one setting. Repetitions end about `until`; after `deadline` (both of time.monotonic) nothing is begun."""
    from igpo_megatron.policy.policy import Policy

    free()
    before = anonymous_bytes()
    policy = attempt(cases, deadline, lambda: Policy(config, ranks))
    calls: dict[str, Callable[[], Any]] = {}
    took = 0.0
    for case in cases if policy else ():
        begun = time.monotonic()
        rows, counts = packed(case.row_tokens, max(one.row_tokens for one in cases), policy.shape.vocab_size)
        case.rows = [row_shape(row) for row in rows]
        passes: dict[str, Callable[[], Any]] = {"train": partial(train, policy, rows, counts), "update": partial(update, policy)}
        if case.recompute == "none":  # which changes nothing without gradients
            passes["score"] = partial(policy.log_probs, rows)
        # The first call compiles, and makes the optimizer's state. What would take until after the deadline, as the last did, is not begun.
        if attempt([case], deadline - took, partial(each, list(passes.values()))):
            case.peak = peak_of(passes["train"], before)
            calls |= {f"{case.row_tokens} {name}": call for name, call in passes.items()}
        took = time.monotonic() - begun
    if calls:
        time_calls = partial(interleaved, calls, warmup=0, clock=time.process_time)  # as calibrate() does
        started = time.monotonic()
        taken = time_calls(repeats=1)
        more = min(repeats - 1, int((until - time.monotonic()) / (time.monotonic() - started)))
        for name, times in time_calls(repeats=max(0, more)).items():
            taken[name] += times
        for case in cases:
            found = {
                name.removeprefix(f"{case.row_tokens} "): times for name, times in taken.items() if name.startswith(f"{case.row_tokens} ")
            }
            case.seconds = {name: median(times) for name, times in found.items()}
    del policy, calls
    free()


def attempt(cases: Sequence[Case], deadline: float, call: Callable[[], Any]) -> Any:
    """What the call returns; None where there is no time or no memory for it, which the cases then say."""
    reason = "the time was over"
    if time.monotonic() < deadline:
        try:
            return call()
        except torch.OutOfMemoryError:
            reason = "out of memory"
    # Behind the except clause, whose traceback holds what filled the memory.
    free()
    for case in cases:
        case.left_out = reason
    return None


def each(calls: Sequence[Callable[[], Any]]) -> bool:
    """One call of each."""
    for call in calls:
        call()
    return True


def free() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        give_back_freed_memory(above=0)


def packed(row_tokens: int, step_tokens: int, vocab: int) -> tuple[list[PackedRow], StepCounts]:
    """A step's rows, each a tree of its own."""
    prompt, turn = row_tokens // 8, row_tokens * 7 // 8 // (SAMPLES * TURNS)
    groups = [branched(SAMPLES, SAMPLES, prompt, turn, TURNS, vocab, seed) for seed in range(step_tokens // row_tokens)]
    rows = pack_for_training(groups, row_tokens=row_tokens, token_weight=partial(token_weight, "token_mean"))
    return rows, step_counts(groups)


def update(policy: Policy) -> None:
    """The end of an optimizer step, with the gradients that are there."""
    policy.optimizer.prepare_grads()
    policy.optimizer.get_grad_norm()
    policy.optimizer.step_with_ready_grads()


def peak_of(call: Callable[[], Any], before: int) -> float:
    """Most bytes in use during a call; on a CPU above `before`."""
    free()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    held = anonymous_bytes() - before
    with anonymous_peak() as peak:
        call()
    return held + peak[0]


def passes_of(case: Case, dtype_bytes: int) -> list[dict[str, Any]]:
    """What plan/timed.py reads of a case."""
    common = {"model": case.model, "recompute": case.recompute, "rows": [asdict(row) for row in case.rows], "dtype_bytes": dtype_bytes}
    return [{"direction": name, "seconds": case.seconds[name], **common} for name in ("score", "train") if name in case.seconds]


def table_row(case: Case, hf: Mapping[str, Any], machine: Machine, sheet: float | None) -> dict[str, Any]:
    """The figures of a case that people read."""
    found: dict[str, Any] = {"model": case.model, "recompute": case.recompute, "row_tokens": case.row_tokens}
    if case.left_out:
        return {**found, "left_out": case.left_out}
    tokens = sum(row.tokens for row in case.rows)
    found |= {"rows": len(case.rows), "targets": sum(row.targets for row in case.rows), "peak_gib": round(case.peak / GIB, 3)}
    for name in ("score", "train"):
        if name in case.seconds:
            rate = sum(model_flops(shape_of(hf), row, backward=name == "train") for row in case.rows) / case.seconds[name]
            found |= {
                f"{name}_s": round(case.seconds[name], 5),
                f"{name}_tokens_per_s": round(tokens / case.seconds[name]),
                f"{name}_tflops": round(rate / 1e12, 4),
                f"{name}_mfu": round(rate / machine.ceiling, 4),
                f"{name}_mfu_of_sheet": sheet and round(rate / sheet, 4),
            }
    return {**found, "update_s": round(case.seconds["update"], 5)}


def planner_errors(machine: Machine, figures: Mapping[str, Any]) -> dict[str, Any]:
    """By direction: the factor that corrects the planner, and its median error before and after on the passes it was fitted to.

    Where no factor does, only the reason, under "refused": `igpo plan` will not take this result as a calibration.
    """
    passes = timed_from(figures)
    try:
        fitted = corrected(machine, passes)
    except ValueError as error:
        return {"refused": str(error)}
    found = {}
    for name, factor in (("score", fitted.score_factor), ("train", fitted.train_factor)):
        errors = [[abs(modelled(one, on) / one.seconds - 1) for one in passes if one.direction == name] for on in (machine, fitted)]
        if errors[0]:
            found[name] = {
                "factor": round(factor, 4),
                "error_before": round(median(errors[0]), 3),
                "error_after": round(median(errors[1]), 3),
            }
    return found


def headline(table: Sequence[Mapping[str, Any]], machine: Machine) -> str:
    """One line: of each model the setting that trains most tokens a second."""
    said = []
    for model in dict.fromkeys(row["model"] for row in table):
        measured = [row for row in table if row["model"] == model and "left_out" not in row]
        if not measured:
            said.append(f"{model} {next(row['left_out'] for row in table if row['model'] == model)}")
            continue
        best = max(measured, key=lambda row: row["train_tokens_per_s"])
        said.append(
            f"{model} trains {best['train_tokens_per_s']:,} tokens/s, MFU {best['train_mfu']:.1%} of the matmul ceiling, "
            f"{best['peak_gib']:.2f} GiB (recompute {best['recompute']}, rows of {best['row_tokens']})"
        )
    return f"{'; '.join(said)}; ceiling {machine.ceiling / 1e12:.3g} TFLOP/s"


if __name__ == "__main__":
    typer.run(main)
