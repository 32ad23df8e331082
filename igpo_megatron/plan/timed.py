"""Passes of the trainer that were timed on a machine, and the machine corrected by them: one factor for each direction.

tools/bench/step.py ──figures──> Timed ──median of measured / modelled──> Machine.score_factor, .train_factor

The model keeps its form (what grows with tokens, pairs, targets); the factors take up what it gets wrong on this machine. What ranks
exchange with each other is not in a pass of one rank, and is not corrected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import median
from typing import Any, get_args

from checkpoint_conversion.architectures import ModelShape, shape_of
from igpo_megatron.plan.flops import model_flops
from igpo_megatron.plan.parts import count_parts
from igpo_megatron.plan.train_time import pass_time, update_time
from igpo_megatron.plan.types import Direction, Layout, Machine, Recompute, Row, Settings

SLACK = 1.25
"""A pass may be this many times as fast as the fastest matmul of the same file, since clocks vary. More is a mistake in the file."""

MOST_WRONG = 20.0
"""A factor beyond this, either way, is no property of the machine."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A pass of one rank over some rows."""

    direction: Direction
    shape: ModelShape
    recompute: Recompute
    rows: tuple[Row, ...]
    dtype_bytes: int
    seconds: float

    @property
    def flops(self) -> float:
        """Operations that the model itself needs."""
        return sum(model_flops(self.shape, row, backward=self.direction == "train") for row in self.rows)


def timed_from(figures: Mapping[str, Any]) -> list[Timed]:
    """The passes in the result of tools/bench/step.py. Raises KeyError, TypeError or ValueError for anything else."""
    shapes = {name: shape_of(config, where=f"models: {name}") for name, config in figures["models"].items()}
    found = []
    for number, entry in enumerate(figures["passes"]):
        one = Timed(
            entry["direction"],
            shapes[entry["model"]],
            entry["recompute"],
            tuple(Row(**row) for row in entry["rows"]),
            entry["dtype_bytes"],
            float(entry["seconds"]),
        )
        if one.direction not in get_args(Direction) or one.recompute not in get_args(Recompute):
            raise ValueError(f"passes[{number}]: unknown direction {one.direction!r} or recompute {one.recompute!r}")
        if not one.rows or not all(row.tokens > 0 and all(number >= 0 for number in astuple(row)) for row in one.rows):
            raise ValueError(f"passes[{number}]: expected rows with tokens, pairs and targets")
        if one.dtype_bytes not in (2, 4):
            raise ValueError(f"passes[{number}]: expected dtype_bytes 2 or 4, found {one.dtype_bytes!r}")
        if not (math.isfinite(one.seconds) and one.seconds > 0):
            raise ValueError(f"passes[{number}]: expected positive seconds, found {entry['seconds']}")
        found.append(one)
    return found


def modelled(one: Timed, machine: Machine) -> float:
    """Seconds that the planner predicts for a pass on this machine."""
    train = one.direction == "train"
    layout = Layout(recompute=one.recompute, row_tokens=max(row.tokens for row in one.rows), stages=(one.shape.num_layers,))
    settings = Settings(dtype_bytes=one.dtype_bytes, reference=False)
    seconds = pass_time(one.shape, layout, settings, machine, [one.rows], backward=train)
    if train:
        seconds += update_time(count_parts(one.shape, 1, 1), layout, settings, machine, len(one.rows))
    return seconds


def corrected(machine: Machine, passes: Sequence[Timed]) -> Machine:
    """The machine with the median of measured over modelled seconds as the factor of each direction that was timed.

    Raises ValueError for times that cannot be this machine's.
    """
    plain = replace(machine, score_factor=1.0, train_factor=1.0)
    factors: dict[str, float] = dict.fromkeys(get_args(Direction), 1.0)
    notes = []
    for direction in get_args(Direction):
        of_direction = [one for one in passes if one.direction == direction]
        for one in of_direction:
            if one.flops / one.seconds > SLACK * machine.ceiling:
                reached, most = one.flops / one.seconds / 1e12, machine.ceiling / 1e12
                raise ValueError(
                    f"a pass of {one.seconds:.4g} s ({direction}) would reach {reached:.4g} TFLOP/s, the fastest matmul {most:.4g}"
                )
        if not of_direction:
            notes.append(f"{direction} not timed")
            continue
        ratios = [one.seconds / modelled(one, plain) for one in of_direction]
        factor = median(ratios)
        if not 1 / MOST_WRONG < factor < MOST_WRONG:
            raise ValueError(f"passes ({direction}) take {factor:.3g} times as long as modelled; is it the same machine?")
        factors[direction] = factor
        notes.append(f"{direction} x{factor:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} passes)")
    source = f"{machine.source}; modelled times corrected by timed passes: {', '.join(notes)}"
    return replace(plain, score_factor=factors["score"], train_factor=factors["train"], source=source)
