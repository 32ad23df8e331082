"""Layout of the drawing of a branched group: sampled turns from left to right, one row per trajectory, decisions between turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from igpo_megatron.types import BranchPoint, RolloutGroup, Trajectory, ValuePoint


def tree_picture(group: RolloutGroup, trajectories: Sequence[Trajectory]) -> dict[str, Any] | None:
    """Plain data for a drawing in units of turns (x, the prompt at 0) and rows (y); None for a group without branching decisions.

    nodes   {x, y, from: [x, y], tokens, samples}    sampled turns; `from` is the turn before, or the prompt
    forks   {x, y, samples, entropy or value, ...}   decisions, half a turn after the turn whose result they follow
    leaves  {x, y, sample}                           the end of each trajectory, whose number counts from 0
    """
    points: list[BranchPoint | ValuePoint] = [*group.branch_points, *group.value_points]
    if not points:
        return None
    # Sorted by path, trajectories that share most are neighbours, so lines do not cross.
    order = sorted(range(len(trajectories)), key=lambda number: (trajectories[number].path, number))
    turns = [[index for index in end.path if group.nodes[index].kind == "action"] for end in trajectories]
    rows: dict[int, list[int]] = {}
    for row, number in enumerate(order):
        for index in turns[number]:
            rows.setdefault(index, []).append(row)
    root = (0.0, (len(order) - 1) / 2)
    at = {index: (float(group.nodes[index].turn), fmean(below)) for index, below in rows.items()}
    before = {index: at[parent] for path in turns for parent, index in pairwise(path)}
    sampled = {number: index for number, index in ((n, _turn_of(group, n)) for n in range(len(group.nodes))) if index in at}
    return {
        "turns": max((group.nodes[index].turn for index in at), default=0),
        "rows": len(order),
        "root": root,
        "nodes": [
            {
                "x": x,
                "y": y,
                "from": before.get(index, root),
                "tokens": len(group.nodes[index].token_ids),
                "samples": [order[row] + 1 for row in rows[index]],
            }
            for index, (x, y) in at.items()
        ],
        "forks": [
            {
                "x": at[sampled[point.node]][0] + 0.5,
                "y": at[sampled[point.node]][1],
                "samples": [child + 1 for child in point.children],
                **(_by_entropy(point) if isinstance(point, BranchPoint) else _by_value(point)),
            }
            for point in points
            if point.node in sampled
        ],
        "leaves": [
            {"x": at[turns[number][-1]][0] if turns[number] else 0.0, "y": row, "sample": number} for row, number in enumerate(order)
        ],
    }


def _by_entropy(point: BranchPoint) -> dict[str, Any]:
    numbers = _rounded(entropy=point.entropy, initial=point.initial, probability=point.probability)
    return {**numbers, "kind": point.kind, "consecutive": point.consecutive}


def _by_value(point: ValuePoint) -> dict[str, Any]:
    measured = _rounded(value=point.value, spread=point.spread, change=point.change)
    drawn = _rounded(probability=point.probability, stop_probability=point.stop_probability)
    return {**measured, **drawn, "siblings": point.siblings, "stopped": point.stopped}


def _rounded(**numbers: float | None) -> dict[str, float | None]:
    """To four places; absent numbers stay None."""
    return {name: None if number is None else round(number, 4) for name, number in numbers.items()}


def _turn_of(group: RolloutGroup, number: int) -> int | None:
    """The sampled turn that a node belongs to or follows; None for the prompt."""
    cursor: int | None = number
    while cursor is not None and group.nodes[cursor].kind != "action":
        cursor = group.nodes[cursor].parent
    return cursor
