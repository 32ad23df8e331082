"""Information gain (IGPO, arXiv 2510.14967): how much a turn raised the policy's log-probability of the true answer.

    prompt ── action 1 ── observation ── action 2 ── observation ── action 3 (answer)
       └ probe: v_0            └ probe: v_1              └ probe: v_2
             gain of turn 1 = v_1 - v_0,  gain of turn 2 = v_2 - v_1,  the last turn has none

A probe hangs at the node an action continues, so it sees exactly the context that the action saw. Samples that share that node share its
probe. The actor scores probes like any other leaf; nothing here depends on how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import fmean

from igpo_megatron.config.schema import Reward
from igpo_megatron.types import Node, RolloutGroup, Trajectory

RenderProbe = Callable[[str], tuple[list[int], tuple[int, int]]]
"""answer -> (token ids of the probe text, [start, stop) of the answer's tokens in them), already capped in length."""

NONFINITE_GAINS = "nonfinite_gains"
"""Key in `RolloutGroup.metrics`: gains lost to a log-probability that was not finite."""


def add_probes(group: RolloutGroup, render_probe: RenderProbe, config: Reward) -> None:
    """Hang probe leaves at the parent of every action of every trainable trajectory: one per parent and probed alias.

    Probes already there, as in a group read back from a rollout file, are replaced: policy and settings may have changed since.
    `config.gain == "none"` leaves none.
    """
    _drop_probes(group)
    if config.gain == "none":
        return
    probes = _rendered_aliases(group, render_probe, config)
    probed: set[int] = set()
    for trajectory in group.trajectories:
        if not trajectory.status.is_trainable:
            continue
        for finished_turns, parent in enumerate(_action_parents(group, trajectory)):
            if parent in probed:
                continue
            probed.add(parent)
            for alias, token_ids, scored in probes:
                node = Node(parent=parent, kind="probe", token_ids=list(token_ids), turn=finished_turns, text=alias, scored=scored)
                group.add(node)


def turn_gains(group: RolloutGroup, config: Reward) -> None:
    """Set `gains` [num_turns] of every trajectory from the `old_logprobs` [L] of its probes.

    The value v of a context is the mean log-prob of the answer's tokens (log_prob_diff) or its exponential (prob_diff), the best over the
    probed aliases; turn t gains v_t - v_(t-1). None for the last turn, for trajectories that are not trainable, for `config.gain == "none"`
    and next to a value that is not finite (counted in `group.metrics`).
    """
    for trajectory in group.trajectories:
        trajectory.gains = [None] * len(group.actions(trajectory))
    if config.gain == "none":
        return
    values = _context_values(group, config)
    lost = 0
    for trajectory in group.trajectories:
        if not trajectory.status.is_trainable:
            continue
        parents = list(_action_parents(group, trajectory))
        assert values.keys() >= set(parents), f"group {group.prompt.id} has actions without a probe; call add_probes first"
        seen = [values[parent] for parent in parents]
        for turn in range(len(seen) - 1):
            gain = seen[turn + 1] - seen[turn]
            if math.isfinite(gain):
                trajectory.gains[turn] = gain
            else:
                lost += 1
    group.metrics[NONFINITE_GAINS] = float(lost)


def _drop_probes(group: RolloutGroup) -> None:
    kinds = [node.kind for node in group.nodes]
    first = kinds.index("probe") if "probe" in kinds else len(kinds)
    # Paths and parents are indices, so only a tail can go.
    assert set(kinds[first:]) <= {"probe"}, f"group {group.prompt.id} grew after its probes were added"
    del group.nodes[first:]


def _action_parents(group: RolloutGroup, trajectory: Trajectory) -> Iterator[int]:
    """Index of the node each action of a trajectory continues, in turn order. [num_turns]"""
    for action in group.actions(trajectory):
        assert action.parent is not None, "an action cannot be the root of a group"
        yield action.parent


def _rendered_aliases(group: RolloutGroup, render_probe: RenderProbe, config: Reward) -> list[tuple[str, list[int], tuple[int, int]]]:
    """(alias, token ids, scored range) of the aliases that `config.probe_alias` selects."""
    # Duplicates after the first would only cost tokens.
    aliases = list(dict.fromkeys(group.prompt.answers))
    if config.probe_alias == "first":
        aliases = aliases[:1]
    rendered = [(alias, *render_probe(alias)) for alias in aliases]
    for alias, token_ids, (start, stop) in rendered:
        assert 0 <= start < stop <= len(token_ids), f"probe of {alias!r} scores [{start}, {stop}) of {len(token_ids)} tokens"
    if config.probe_alias == "shortest":
        rendered = [min(rendered, key=lambda probe: probe[2][1] - probe[2][0])]
    return rendered


def _context_values(group: RolloutGroup, config: Reward) -> dict[int, float]:
    """Value of every probed context, by the index of the node the probes hang at; nan if any alias there is not finite."""
    values: dict[int, float] = {}
    for node in group.nodes:
        if node.kind == "probe":
            assert node.parent is not None, "a probe cannot be the root of a group"
            value = _probe_value(node, config)
            # A plain max() would keep or drop nan depending on the order of aliases.
            known = values.get(node.parent, -math.inf)
            values[node.parent] = math.nan if math.isnan(value) or math.isnan(known) else max(value, known)
    return values


def _probe_value(probe: Node, config: Reward) -> float:
    """v of one probe; nan where the log-probs of its scored tokens are not finite."""
    assert probe.scored is not None, "a probe needs a scored range"
    assert len(probe.old_logprobs) == len(probe.token_ids), (
        f"probe at node {probe.parent} has {len(probe.old_logprobs)} log-probs for {len(probe.token_ids)} tokens; score probes first"
    )
    logprobs = probe.old_logprobs[slice(*probe.scored)]
    if not all(math.isfinite(logprob) for logprob in logprobs):
        return math.nan
    mean = fmean(logprobs)
    return math.exp(mean) if config.gain == "prob_diff" else mean
