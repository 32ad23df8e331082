"""What a plan looks like on a terminal: the ranked table, where its first row's memory and time go, and what does not fit."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from igpo_megatron.plan.machines import GIB
from igpo_megatron.plan.parts import active_parameters, total_parameters
from igpo_megatron.plan.rollout_time import mean_tokens
from igpo_megatron.plan.search import HEADROOM, Plan
from igpo_megatron.plan.types import Estimate


def show(plan: Plan, console: Console, rows: int = 10) -> None:
    """Print all of it."""
    console.print(heading(plan))
    console.print(f"{plan.tried} layouts tried, {len(plan.fits)} fit")
    if plan.fits:
        console.print(ranked_table(plan, rows))
        console.print(details(plan.fits[0], plan))
    if plan.misfits:
        console.print(misfit_table(plan, rows))


def show_run(plan: Plan, console: Console) -> None:
    """Print the one layout of a configuration."""
    console.print(heading(plan))
    for one in plan.fits:
        workload, layout = plan.workload, one.layout
        console.print(
            f"{layout.ranks} ranks train ({layout.describe()}, recompute {layout.recompute}, rows of {layout.row_tokens}), "
            f"{workload.trajectories} trajectories of {mean_tokens(workload):.0f} tokens"
        )
        console.print(details(one, plan))
        passes = "old and reference log-probs" if plan.settings.reference else "old log-probs"
        console.print(
            f"forward ({passes}) {one.train['score']:.1f} s, policy training {one.train['train'] + one.train['update']:.1f} s: "
            "a prediction until it has been run"
        )
    for miss in plan.misfits:
        console.print(f"does not fit: {miss.reason}")


def heading(plan: Plan) -> str:
    """The model, the machine and the workload, and where their figures come from."""
    total, active = total_parameters(plan.shape), active_parameters(plan.shape)
    active_text = "" if active == total else f", {active / 1e9:.1f}B active"
    return (
        f"[bold]{plan.model}[/]: {total / 1e9:.2f}B parameters{active_text}, on {plan.gpus} x {plan.machine.name} "
        f"({plan.machine.memory * HEADROOM / GIB:.1f} GiB used at most; machine {plan.machine.source}; workload {plan.workload.source})"
    )


def ranked_table(plan: Plan, rows: int) -> Table:
    title = "fastest first; GiB of the fullest rank; seconds of rollout, of all the rest and of a step; + engines on the ranks' devices"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in ("", "ranks", "layout", "recompute", "rows", "engines", "GiB", "rollout", "train", "step"):
        table.add_column(heading, justify="left" if heading in ("layout", "recompute") else "right", no_wrap=heading != "layout")
    for number, one in enumerate(distinct(plan.fits)[:rows], start=1):
        assert one.engines is not None
        table.add_row(
            str(number),
            str(one.layout.ranks),
            one.layout.describe(),
            one.layout.recompute,
            str(one.layout.row_tokens),
            f"{one.engines.count}xTP{one.engines.tensor}{'+' if one.placement == 'colocated' else ''}",
            f"{one.peak / GIB:.0f}",
            f"{one.engines.seconds:.0f}",
            f"{sum(one.train.values()):.0f}",
            f"{one.step:.1f}",
        )
    return table


def distinct(fits: list[Estimate]) -> list[Estimate]:
    """The fastest estimate of each cut and split; the same with other recomputation or rows is left out."""
    kept: dict[tuple[object, ...], Estimate] = {}
    for one in fits:
        cut = (one.layout.tensor, one.layout.pipeline, one.layout.context, one.layout.expert, one.layout.ranks, one.placement)
        kept.setdefault(cut, one)
    return list(kept.values())


def details(best: Estimate, plan: Plan) -> str:
    """Terms of memory and time of one estimate, in three lines."""
    assert best.engines is not None
    memory = ", ".join(f"{name} {size / GIB:.1f}" for name, size in best.memory.items() if size >= 0.05 * GIB)
    times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in best.train.items())
    engines = best.engines
    return (
        f"memory of the fullest rank, GiB: {memory}\n"
        f"time, s: rollout {engines.seconds:.1f} (of it the last tenth of trajectories {engines.straggler:.1f}), {times}\n"
        f"each engine: {engines.weights / GIB:.1f} GiB of weights per device, {engines.cache_tokens:,} cached tokens, "
        f"{engines.concurrent} trajectories at once"
    )


def misfit_table(plan: Plan, rows: int) -> Table:
    table = Table(title="does not fit, nearest misses first", title_justify="left")
    table.add_column("layout")
    table.add_column("why")
    for miss in plan.misfits[:rows]:
        table.add_row("" if not miss.peak else f"{miss.layout.describe()} {miss.layout.recompute}", miss.reason)
    return table
