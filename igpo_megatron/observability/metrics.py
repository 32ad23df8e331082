"""One step's rollouts as numbers: plain floats for the tracker and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any, TypeVar

from igpo_megatron.types import SEARCH, Metric, Node, RolloutGroup, Status, Trajectory, gain_of_turn, standard_error

_SAME = 1e-9
_LARGEST_LOG_RATIO = 20.0

Thing = TypeVar("Thing")

TOOL_CALLS = {Metric.VISITS: "visit", Metric.PYTHON_CALLS: "python"}
"""Metric -> tool whose calls it counts; absent without calls."""


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over trained trajectories, shares of all trajectories, or means over groups; what was not measured is absent."""
    ends = [trajectory for group in groups for trajectory in group.trajectories]
    trained = [(group, trajectory) for group in groups for trajectory in group.trained]
    scored = [trajectory for _, trajectory in trained]
    metrics = {
        Metric.FAILED: _share(ends, lambda end: end.status.is_failure),
        Metric.CRASHED: _share(ends, lambda end: end.status is Status.CRASHED),
        "late": _share(ends, lambda end: end.status is Status.LATE),
        Metric.TRUNCATED: _share(ends, lambda end: end.status.value.startswith("truncated")),
        Metric.ZERO_STD_GROUPS: fmean(float(_identical(group)) for group in groups) if groups else 0.0,
        "prompt_questions": float(len(groups)),
        # The step's cost, summed over nodes: a turn that trajectories share counts once.
        Metric.GENERATED_TOKENS: float(sum(len(node.token_ids) for group in groups for node in group.nodes if node.kind == "action")),
        Metric.TOOL_CALLS: float(sum(node.kind == "observation" for group in groups for node in group.nodes)),
    }
    if not scored:
        return metrics
    metrics[Metric.REWARD] = fmean(end.reward for end in scored)
    for part in (Metric.F1, Metric.EM, Metric.FORMAT_OK):
        metrics[part] = fmean(end.reward_parts.get(part, 0.0) for end in scored)
    actions = [group.actions(end) for group, end in trained]
    metrics[Metric.TURNS] = fmean(len(nodes) for nodes in actions)
    metrics[Metric.SEARCHES] = fmean(num_calls(nodes, SEARCH) for nodes in actions)
    for name, tool in TOOL_CALLS.items():
        if calls := fmean(num_calls(nodes, tool) for nodes in actions):
            metrics[name] = calls
    metrics[Metric.RESPONSE_TOKENS] = fmean(sum(len(node.token_ids) for node in nodes) for nodes in actions)
    if values := [fmean(node.old_logprobs) for node in _first_probes(groups)]:
        metrics[Metric.VALUE_0] = fmean(values)
    gains = [gain for end in scored for gain in end.gains if gain is not None]
    if gains:
        metrics[Metric.GAIN] = fmean(gains)
        for turn, values in enumerate(_by_turn(scored), start=1):
            metrics[gain_of_turn(turn)] = fmean(values)
    evidence = [(part, gain) for end in scored for part, gain in zip(end.evidence_gains, end.gains, strict=False) if part is not None]
    if evidence:
        metrics[Metric.GAIN_EVIDENCE] = fmean(part for part, _ in evidence)
        metrics[Metric.GAIN_REASONING] = fmean((gain or 0.0) - part for part, gain in evidence)
    if points := [point for group in groups for point in group.branch_points]:
        metrics[Metric.BRANCHED] = _share(points, lambda point: bool(point.children))
        metrics[Metric.BRANCH_ENTROPY] = fmean(point.entropy for point in points)
        metrics[Metric.BRANCH_PROBABILITY] = fmean(point.probability for point in points)
    if states := [point for group in groups for point in group.value_points]:
        tried = [point.probability for point in states if point.probability is not None]
        metrics[Metric.BRANCHED] = _share(states, lambda point: bool(point.children))
        metrics[Metric.BRANCH_SPREAD] = fmean(point.spread for point in states)
        if tried:
            metrics[Metric.BRANCH_PROBABILITY] = fmean(tried)
        metrics[Metric.STOPPED] = sum(point.stopped for point in states) / len(ends)
    if points or states:
        metrics[Metric.SHARED_TOKENS] = _shared_tokens(groups)
        metrics[Metric.INITIAL_ROLLOUTS] = fmean(group.metrics.get(Metric.INITIAL_ROLLOUTS, len(group.trajectories)) for group in groups)
    for name in (Metric.NONFINITE_GAINS, Metric.MIXED_VERSION_GAINS, Metric.REPLAYED):
        if lost := sum(group.metrics.get(name, 0.0) for group in groups):
            metrics[name] = lost
    return metrics


def num_calls(actions: Sequence[Node], tool: str) -> int:
    """Turns in which a tool was called, whether or not it ran."""
    return sum(node.call is not None and node.call.name == tool for node in actions)


def logprob_gap(groups: Sequence[RolloutGroup], version: int | None = None) -> dict[str, float]:
    """|engine - trainer| over sampled tokens that both scored with the same weights: `logprob_gap_mean` and `logprob_gap_max`.

    `version`: weights that the trainer scored with; None takes all turns as sampled with them. Turns of older weights, where the two also
    differ by what was learned since, give `stale_gap_mean` and `importance_ess` instead: the effective share of their tokens under
    importance sampling, (sum w)^2 / (n sum w^2) with w = exp(trainer - engine). Names are absent where there is nothing to compare.
    """
    turns = {
        fresh: [
            (trained - sampled)
            for group in groups
            for node in group.nodes
            if node.kind == "action" and len(node.old_logprobs) == len(node.behavior_logprobs)
            if (version is None or node.weight_version == version) is fresh
            for sampled, trained in zip(node.behavior_logprobs, node.old_logprobs, strict=True)
        ]
        for fresh in (True, False)
    }
    metrics: dict[str, float] = {}
    if gaps := [abs(difference) for difference in turns[True]]:
        metrics |= {Metric.LOGPROB_GAP_MEAN: fmean(gaps), Metric.LOGPROB_GAP_MAX: max(gaps)}
    if stale := turns[False]:
        weights = [math.exp(min(difference, _LARGEST_LOG_RATIO)) for difference in stale]
        metrics["stale_gap_mean"] = fmean(abs(difference) for difference in stale)
        metrics["importance_ess"] = math.fsum(weights) ** 2 / (len(weights) * math.fsum(weight**2 for weight in weights))
    return metrics


def max_gap(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Largest gap between engine and trainer in a run's metric rows, including the canary's; None where none was measured."""
    return max(
        (row[name] for row in rows for name in (Metric.LOGPROB_GAP_MAX, Metric.CANARY_GAP) if row.get(name) is not None), default=None
    )


def routed_share(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """`routed_tokens`: share of the tokens of trained trajectories whose experts an engine recorded; empty without such tokens."""
    known = [
        experts is not None
        for group in groups
        for index in {index for end in group.trained for index in end.path}
        for experts in group.nodes[index].experts or [None] * len(group.nodes[index].token_ids)
    ]
    return {"routed_tokens": fmean(map(float, known))} if known else {}


def status_counts(groups: Sequence[RolloutGroup]) -> dict[str, int]:
    """Trajectories per status; statuses without any are absent."""
    return {
        status.value: count
        for status in Status
        if (count := sum(trajectory.status is status for group in groups for trajectory in group.trajectories))
    }


def _first_probes(groups: Sequence[RolloutGroup]) -> list[Node]:
    """Scored probes before the first turn."""
    return [node for group in groups for node in group.nodes if node.kind == "probe" and node.turn == 0 and node.old_logprobs]


def _by_turn(ends: Sequence[Trajectory]) -> list[list[float]]:
    longest = max(len(end.gains) for end in ends)
    columns = [[gain for end in ends if turn < len(end.gains) and (gain := end.gains[turn]) is not None] for turn in range(longest)]
    return [column for column in columns if column]


def _identical(group: RolloutGroup) -> bool:
    rewards = [trajectory.reward for trajectory in group.trained]
    return len(rewards) < 2 or pstdev(rewards) < _SAME


def _shared_tokens(groups: Sequence[RolloutGroup]) -> float:
    """Share of all sampled tokens, counted along trajectories, that branching saved from being sampled again."""
    along = [(number, index) for number, group in enumerate(groups) for end in group.trajectories for index in end.path]
    tokens = [len(groups[number].nodes[index].token_ids) * (groups[number].nodes[index].kind == "action") for number, index in along]
    once = sum(dict(zip(along, tokens, strict=True)).values())
    return 1.0 - once / sum(tokens) if sum(tokens) else 0.0


def _share(things: Sequence[Thing], test: Callable[[Thing], bool]) -> float:
    return fmean(float(test(thing)) for thing in things) if things else 0.0


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers that a run's summary quotes from an evaluation; None for what was not run."""
    sampled, greedy = report.get("sampled", {}), report.get("greedy", {})
    shown = sampled or greedy
    sampled_macro, greedy_macro = differing_macro(sampled), differing_macro(greedy)
    return {
        "f1_sampled": sampled.get(Metric.F1),
        "f1_greedy": greedy.get(Metric.F1),
        "em_greedy": greedy.get(Metric.EM),
        "format_valid": shown.get(Metric.FORMAT_OK),
        "searches_per_question": shown.get(Metric.SEARCHES),
        "questions": shown.get("questions"),
        standard_error("f1_sampled"): sampled.get(standard_error(Metric.F1)),
        "f1_sampled_macro": sampled_macro.get(Metric.F1),
        standard_error("f1_sampled_macro"): sampled_macro.get(standard_error(Metric.F1)),
        "f1_greedy_macro": greedy_macro.get(Metric.F1),
        "em_greedy_macro": greedy_macro.get(Metric.EM),
    }


def differing_macro(scores: Mapping[str, Any]) -> Mapping[str, float]:
    """Means over sources; empty for one source or sources of equal size, where they would repeat the means over questions."""
    sizes = {source["questions"] for source in scores.get("per_source", {}).values() if source["questions"]}
    return scores.get("macro", {}) if len(sizes) > 1 else {}  # evaluations of earlier versions have none


SCORES = (
    ("f1_sampled", "F1, sampled at training temperature", True),
    ("f1_sampled_macro", "F1, sampled, mean over sources", True),
    ("f1_greedy", "F1, greedy", True),
    ("f1_greedy_macro", "F1, greedy, mean over sources", True),
    ("em_greedy", "Exact match, greedy", True),
    ("em_greedy_macro", "Exact match, greedy, mean over sources", True),
    ("format_valid", "Format-valid share", True),
    ("searches_per_question", "Searches per question", False),
)
"""Rows of the before/after tables: key in `headline`, label, whether more is better."""


def outcomes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a before/after table of two headlines: label, (score, standard error) of both sides, change; None for what is missing."""
    rows = []
    for key, label, more_is_better in SCORES:
        left, right = before.get(key), after.get(key)
        if left is not None or right is not None:
            change = None if left is None or right is None else right - left
            sides = [(side.get(key), side.get(standard_error(key))) for side in (before, after)]
            rows.append({"label": label, "sides": sides, "change": change, "judged": more_is_better})
    return rows
