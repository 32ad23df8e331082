"""Simulate runs from one planned cell up to thousands of GPUs: step time, utilisation and staleness against size and `max_staleness`.

    python tools/scaling_study.py --model Qwen2.5-7B --gpus 16 --cells 1,4,16,64,256 --staleness 0,1,2,4 --out runs/scaling
        [--calibration FILE] [--rollouts runs/x/rollouts/step_000010.parquet ...] [--metrics runs/x/metrics.jsonl]

A cell is the fastest plan of `igpo plan` on --gpus devices. n cells have n times its engines, data-parallel ranks and questions (weak
scaling), so what grows with size is the tail of the slowest trajectory, the exchange of gradients and the installation of weights.
Writes scaling.json and scaling.html, which says of every number whether it was measured or modelled.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from jinja2 import Environment
from rich.console import Console
from rich.progress import track
from rich.table import Table

from igpo_megatron.plan import machines
from igpo_megatron.plan.asynchronous import Outcome, Setup, Simulation
from igpo_megatron.plan.model_shape import find_shape
from igpo_megatron.plan.parts import count_parts, total_parameters
from igpo_megatron.plan.rollout_time import pace_of
from igpo_megatron.plan.search import Plan, search
from igpo_megatron.plan.train_time import update_time
from igpo_megatron.plan.types import Settings, Workload
from igpo_megatron.plan.workload import draw, from_rollouts, shares_of
from igpo_megatron.supervision.endings import one_sentence
from igpo_megatron.types import UserError

TEMPLATE = Path(__file__).with_suffix(".html.j2")
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")
PANELS = (
    ("step", "Step time", "seconds", False),
    ("speedup", "Trajectories per second per GPU", "relative to one cell at staleness 0", False),
    ("engine_use", "Engines that decode", "share of the time", True),
    ("trainer_use", "Trainer at work", "share of the time", True),
    ("staleness", "Staleness of sampled turns", "updates, mean", False),
)
SPREAD_95 = 1.645
"""Standard deviations from the median to the 95th percentile of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Point:
    """One simulated run."""

    gpus: int
    cells: int
    max_staleness: int
    outcome: Outcome
    train: float
    simulated_s: float
    """Seconds the simulation took."""


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"{option} {text}: expected whole numbers with commas between them")
    return [int(part) for part in parts]


def main(
    model: Annotated[str, typer.Option(help="Folder with config.json, or a known name.")] = "Qwen2.5-7B",
    gpus: Annotated[int, typer.Option(help="Devices of one cell.")] = 16,
    cells: Annotated[str, typer.Option(help="Numbers of cells, comma-separated.")] = "1,4,16,64",
    staleness: Annotated[str, typer.Option(help="Values of max_staleness, comma-separated.")] = "0,1,2,4",
    steps: Annotated[int, typer.Option(help="Steps simulated, a third of them warm-up.")] = 9,
    gpu: Annotated[str, typer.Option(help="As for igpo plan.")] = "h100",
    calibration: Annotated[Path | None, typer.Option(help="A measured machine instead of --gpu.")] = None,
    rollouts: Annotated[list[Path] | None, typer.Option(help="Rollout files whose lengths replace the assumed ones.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="A run's metrics.jsonl, whose search latency replaces the assumed one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for scaling.json and scaling.html.")] = Path("runs/scaling"),
) -> None:
    """Plan a cell, simulate the grid, write and draw it."""
    name, shape = find_shape(model)
    workload = replace(Workload(), max_context=min(32768, shape.max_positions))
    if rollouts:
        workload = from_rollouts(rollouts, workload)
    if metrics:
        workload = with_latency(workload, metrics)
    machine = machines.read(calibration) if calibration else machines.gpu(gpu)
    settings = Settings(dtype_bytes=2 if machine.device == "cuda" else 4)
    # Rollouts run beside training here, so each has devices of its own.
    plan = search(Plan(name, shape, machine, workload, settings, gpus), "disaggregated")
    if not plan.fits:
        raise UserError(f"{name} does not fit on {gpus} devices; `igpo plan --model {model} --gpus {gpus}` says why")
    grid = [(size, k) for size in _numbers("--cells", cells) for k in _numbers("--staleness", staleness)]
    points = [point(plan, size, k, steps) for size, k in track(grid, console=Console(stderr=True), transient=True)]
    out.mkdir(parents=True, exist_ok=True)
    facts = provenance(plan, measured_lengths=bool(rollouts), measured_latency=metrics is not None)
    rows = [as_row(one, points[0]) for one in points]
    (out / "scaling.json").write_text(json.dumps({"model": name, "facts": facts, "points": rows}, indent=1) + "\n", encoding="utf-8")
    (out / "scaling.html").write_text(page(name, plan, rows, facts), encoding="utf-8")
    Console().print(table(rows))
    print(f"wrote {out}/scaling.json and {out}/scaling.html")


def with_latency(workload: Workload, metrics: Path) -> Workload:
    """The lognormal through a run's median and 95th percentile of search latency."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.is_file() else []
    pairs = [(row["search/p50_s"], row["search/p95_s"]) for row in lines if row.get("search/p50_s") and row.get("search/p95_s")]
    if not pairs:
        raise UserError(f"--metrics {metrics}: no line with search/p50_s and search/p95_s; give the metrics.jsonl of a run with searches")
    middle, high = fmean(pair[0] for pair in pairs), fmean(pair[1] for pair in pairs)
    return replace(workload, tool_median=middle, tool_sigma=max(0.0, math.log(high / middle) / SPREAD_95))


def point(plan: Plan, cells: int, staleness: int, steps: int) -> Point:
    """Simulate `cells` cells."""
    best = plan.fits[0]
    assert best.engines is not None
    layout = replace(best.layout, data=best.layout.data * cells)
    parts = count_parts(plan.shape, layout.tensor, layout.expert)
    rows = len(shares_of(plan.workload, layout.row_tokens, best.layout.data, layout.tensor if layout.sequence else 1)[0])
    train = best.train["score"] + best.train["train"] + update_time(parts, layout, plan.settings, plan.machine, rows)
    workload = replace(plan.workload, prompts=plan.workload.prompts * cells)
    setup = Setup(
        batches=lambda step: draw(replace(workload, seed=step)),
        engines=best.engines.count * cells,
        concurrent=best.engines.concurrent,
        pace=cache(pace_of(plan.shape, plan.machine, plan.workload, best.engines.tensor, plan.settings.dtype_bytes)),
        train=train,
        install=install_seconds(plan, best.engines.count * cells),
        staleness=staleness,
        steps=steps,
        warm_up=steps // 3,
    )
    started = time.perf_counter()
    return Point(plan.gpus * cells, cells, staleness, Simulation(setup).run(), train, time.perf_counter() - started)


def install_seconds(plan: Plan, engines: int) -> float:
    """Weights to all engines: a pipelined chain or tree sends them once over the network, each hop adds its latency."""
    size = total_parameters(plan.shape) * plan.settings.dtype_bytes
    return size / plan.machine.network + math.ceil(math.log2(engines + 1)) * plan.machine.network_latency


def as_row(one: Point, base: Point) -> dict[str, Any]:
    return {
        "gpus": one.gpus,
        "max_staleness": one.max_staleness,
        **{name: round(value, 4) for name, value in asdict(one.outcome).items()},
        "speedup": round(base.outcome.step / one.outcome.step, 4),
        "train": round(one.train, 3),
        "simulated_s": round(one.simulated_s, 2),
    }


def provenance(plan: Plan, *, measured_lengths: bool, measured_latency: bool) -> list[tuple[str, str]]:
    """What was measured and what modelled."""
    machine, workload = plan.machine, plan.workload
    sampled = f"{workload.turns:.1f} turns of {workload.turn_tokens:.0f} tokens, results of {workload.observation_tokens:.0f}"
    tool = f"median {workload.tool_median:.2f} s, sigma {workload.tool_sigma:.2f}"
    return [
        ("lengths of trajectories", f"{'measured' if measured_lengths else 'modelled'}: {sampled}"),
        ("tool latency", f"{'measured' if measured_latency else 'modelled'}: lognormal, {tool}"),
        ("rates of the machine", machine.source),
        ("decoding pace, training and gradient exchange", "modelled from those rates"),
        ("installation of weights", "modelled: size over the network's rate"),
        ("order of events, queues, staleness", "simulated event by event"),
        ("failures, resampling, evaluation, checkpoints", "left out"),
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The grid on a terminal."""
    found = Table(title="simulated", title_justify="left")
    headings = ("gpus", "max_staleness", "step", "speedup", "engine_use", "trainer_use", "staleness", "largest_staleness")
    for heading in headings:
        found.add_column(heading, justify="right")
    for row in rows:
        found.add_row(*(f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in headings))
    return found


def page(model: str, plan: Plan, rows: Sequence[dict[str, Any]], facts: Sequence[tuple[str, str]]) -> str:
    """One page that loads nothing."""
    best = plan.fits[0]
    assert best.engines is not None
    cell = (
        f"One cell: {plan.gpus} x {plan.machine.name}, {best.layout.ranks} ranks train ({best.layout.describe()}), "
        f"{best.engines.count} engines of TP{best.engines.tensor}; {plan.workload.trajectories} trajectories a step. "
        "More cells have more of each."
    )
    keys = sorted({row["max_staleness"] for row in rows})
    colours = {k: COLOURS[number % len(COLOURS)] for number, k in enumerate(keys)}
    panels = [
        (title, unit, curves([(colours[k], [(r["gpus"], r[name]) for r in rows if r["max_staleness"] == k]) for k in keys], share))
        for name, title, unit, share in PANELS
    ]
    names = [name for name in rows[0] if name != "simulated_s"]
    environment = Environment(autoescape=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=model, cell=cell, keys=list(colours.items()), panels=panels, facts=facts, rows=rows, names=names
    )


def curves(series: Sequence[tuple[str, Sequence[tuple[int, float]]]], share: bool) -> str:
    """An SVG of lines over the logarithm of the size, from zero up."""
    width, height, left, bottom, top = 480, 240, 46, 28, 10
    sizes = sorted({x for _, line in series for x, _ in line})
    most = 1.0 if share else nice_top(max(y for _, line in series for _, y in line))
    low, high = math.log(sizes[0]), math.log(max(sizes[-1], sizes[0] + 1))

    def x_of(size: int) -> float:
        return left + (math.log(size) - low) / (high - low) * (width - left - 12)

    def y_of(value: float) -> float:
        return height - bottom - value / most * (height - bottom - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" font-size="11" fill="#6b7280" role="img">']
    for number in range(5):
        value = most * number / 4
        y = y_of(value)
        parts.append(f'<line x1="{left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts += [f'<text x="{x_of(size):.1f}" y="{height - 8}" text-anchor="middle">{size}</text>' for size in sizes]
    parts.append(f'<text x="{width - 12}" y="{height - bottom - 4}" text-anchor="end">GPUs, log scale</text>')
    for colour, line in series:
        places = [(x_of(size), y_of(value)) for size, value in line]
        parts.append(f'<polyline points="{_points(places)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return "".join([*parts, "</svg>"])


def nice_top(value: float) -> float:
    """The least of 1, 2, 4, 6, 8 times a power of ten that is not below `value`, so that its quarters are short numbers; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


if __name__ == "__main__":
    with one_sentence():
        typer.run(main)
