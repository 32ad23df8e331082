"""Information gain (IGPO, arXiv 2510.14967): how much a turn raised the policy's log-probability of the true answer.

    prompt ── action 1 ── observation ── action 2 ── observation ── action 3 (answer)
       └ probe: v_0            └ probe: v_1              └ probe: v_2
             gain of turn 1 = v_1 - v_0,  gain of turn 2 = v_2 - v_1,  the last turn has none

A probe hangs at the node an action continues, so it sees exactly the context that the action saw. Samples that share that node share its
probe. The actor scores probes like any other leaf, or an engine does during the rollout; nothing here depends on how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean

from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.types import Metric, Node, Prompt, RolloutGroup, Trajectory

RenderProbe = Callable[[str], tuple[list[int], tuple[int, int]]]
"""answer -> (token ids of the probe text, [start, stop) of the answer's tokens in them), already capped in length."""

RenderHidden = Callable[[str, int], tuple[list[int], tuple[int, int]]]
"""(answer, last token of the turn before) -> the same, behind an empty tool message."""


def add_probes(group: RolloutGroup, render_probe: RenderProbe, config: Reward, render_hidden: RenderHidden | None = None) -> None:
    """Hang probe leaves at the parent of every action of every trained trajectory: one per parent and probed alias.

    With `config.evidence` a second one hangs at every action but the last, rendered by `render_hidden`: an empty tool result, then the
    probe. It sees what the policy knew and wrote, but not what the tool returned.

    Scores by an engine during the rollout are filled in. Existing probes, as in a group read from a rollout file, are replaced: policy
    and settings may have changed since. `config.gain == "none"` leaves none.
    """
    _drop_probes(group)
    if config.gain == "none":
        return
    probes = rendered_probes(group.prompt, render_probe, config)
    probed: set[int] = set()

    def hidden(last_token: int) -> Sequence[tuple[str, list[int], tuple[int, int]]]:
        assert render_hidden is not None, "evidence needs a way to hide a result"
        return rendered_probes(group.prompt, lambda answer: render_hidden(answer, last_token), config)

    def hang(parent: int, finished_turns: int, leaves: Sequence[tuple[str, list[int], tuple[int, int]]]) -> None:
        if parent in probed:
            return
        probed.add(parent)
        for alias, token_ids, scored in leaves:
            node = Node(parent=parent, kind="probe", token_ids=list(token_ids), turn=finished_turns, text=alias, scored=scored)
            score = group.probe_scores.get((parent, alias))
            if score is not None:
                node.old_logprobs, node.weight_version = list(score.logprobs), score.weight_version
            group.add(node)

    for trajectory in group.trained:
        actions = [number for number in trajectory.path if group.nodes[number].kind == "action"]
        for finished_turns, parent in enumerate(_action_parents(group, trajectory)):
            hang(parent, finished_turns, probes)
        for turn, action in enumerate(actions[:-1] if config.evidence and render_hidden else (), start=1):
            hang(action, turn, hidden(group.nodes[action].token_ids[-1]))


def turn_gains(group: RolloutGroup, config: Reward) -> None:
    """Set `gains` [num_turns] of every trajectory from the `old_logprobs` of its probes.

    The value v of a context is the mean log-prob of the answer's tokens at `config.probe_temperature` (log_prob_diff) or its exponential
    (prob_diff), the best over the probed aliases; turn t gains v_t - v_(t-1). None for the last turn, for trajectories that are not
    trained, for `config.gain == "none"` and, counted in `group.metrics`, next to a value that is not finite and between values of
    different weights.

    With `config.evidence`, `evidence_gains` [num_turns] is v_t - h_t, h_t the value with the newest tool result hidden; h_t - v_(t-1) is
    what the policy's own reasoning added.
    """
    for trajectory in group.trajectories:
        trajectory.gains = [None] * len(group.actions(trajectory))
        trajectory.evidence_gains = [None] * len(trajectory.gains) if config.evidence else []
    if config.gain == "none":
        return
    values = _context_values(group, config)
    versions: dict[int | None, set[int | None]] = {}
    for node in group.nodes:
        if node.kind == "probe":
            versions.setdefault(node.parent, set()).add(node.weight_version)
    lost = mixed = 0
    for trajectory in group.trained:
        parents = list(_action_parents(group, trajectory))
        assert values.keys() >= set(parents), f"group {group.prompt.id} has actions without a probe; call add_probes first"
        actions = [number for number in trajectory.path if group.nodes[number].kind == "action"]
        for turn, (before, after) in enumerate(pairwise(parents)):
            gain = values[after] - values[before]
            if len(versions[before] | versions[after]) > 1:
                mixed += 1
            elif not math.isfinite(gain):
                lost += 1
            else:
                trajectory.gains[turn] = gain
                hidden = values.get(actions[turn], math.nan)
                if config.evidence and math.isfinite(hidden):
                    trajectory.evidence_gains[turn] = values[after] - hidden
    group.metrics[Metric.NONFINITE_GAINS] = float(lost)
    group.metrics[Metric.MIXED_VERSION_GAINS] = float(mixed)


def _drop_probes(group: RolloutGroup) -> None:
    kinds = [node.kind for node in group.nodes]
    first = kinds.index("probe") if "probe" in kinds else len(kinds)
    # Paths and parents are indices, so only a tail can go.
    assert set(kinds[first:]) <= {"probe"}, f"group {group.prompt.id} grew after its probes were added"
    del group.nodes[first:]


def _action_parents(group: RolloutGroup, trajectory: Trajectory) -> Iterator[int]:
    """Index of the node each action of a trajectory continues, in turn order. [num_turns]

    Text that asks a stopped path for its answer does not count: the probed state is the one before it.
    """
    for action in group.actions(trajectory):
        parent = action.parent
        while parent is not None and group.nodes[parent].kind == "asking":
            parent = group.nodes[parent].parent
        assert parent is not None, "an action cannot be the root of a group"
        yield parent


def rendered_probes(prompt: Prompt, render_probe: RenderProbe, config: Reward) -> list[tuple[str, list[int], tuple[int, int]]]:
    """(alias, token ids up to its last scored one, scored range) of the aliases that `config.probe_alias` selects."""
    # Duplicates after the first would only cost tokens.
    aliases = list(dict.fromkeys(prompt.answers))
    if config.probe_alias == "first":
        aliases = aliases[:1]
    rendered = [(alias, *render_probe(alias)) for alias in aliases]
    for alias, token_ids, (start, stop) in rendered:
        assert 0 <= start < stop <= len(token_ids), f"probe of {alias!r} scores [{start}, {stop}) of {len(token_ids)} tokens"
    if config.probe_alias == "shortest":
        rendered = [min(rendered, key=lambda probe: probe[2][1] - probe[2][0])]
    # The template's end comes after the answer and cannot change its log-probs.
    return [(alias, token_ids[:stop], (start, stop)) for alias, token_ids, (start, stop) in rendered]


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
    wanted = probe.scored[1] - probe.scored[0]
    assert len(probe.old_logprobs) == wanted, (
        f"probe at node {probe.parent} has {len(probe.old_logprobs)} log-probs for {wanted} scored tokens; score probes first"
    )
    if not all(math.isfinite(logprob) for logprob in probe.old_logprobs):
        return math.nan
    mean = fmean(probe.old_logprobs)
    return math.exp(mean) if config.gain == "prob_diff" else mean
