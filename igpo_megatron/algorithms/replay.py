"""Replay of successes: a group in which every trajectory failed gets its question's latest success in place of one of them.

step 3:  question 7 ── 1, 0, 0, 0                     its success is kept
step 9:  question 7 ── 0, 0, 0, 0  ──> 0, 0, 1, 0     rewards differ again, so the group has a training signal
"""

from __future__ import annotations

import base64
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from igpo_megatron.types import SEARCH, Metric, Node, Prompt, RolloutGroup, Status, ToolCall, Trajectory, rename_search

OUR_NAMES = "canonical_tool_names"
"""Key in a stored group whose calls have our names of tools; older ones have the policy's spelling of search."""


@dataclass(slots=True)
class SuccessBuffer:
    """The latest success of each question (ARPO for GUI agents, arXiv 2505.16282; RAPO, arXiv 2509.24107, section 2.4)."""

    capacity: int
    """At most so many questions are kept; those with the oldest success are dropped first."""

    success_above: float
    """A trajectory whose reward is above this is a success; a group without one has failed."""

    successes: dict[str, RolloutGroup] = field(default_factory=dict)
    """Question id -> a group of that one trajectory, the oldest success first."""

    def exchange(self, groups: Sequence[RolloutGroup], step: int) -> list[RolloutGroup]:
        """Keep the successes of a step and put earlier ones into its failed groups, each in place of a trajectory drawn at random.

        The choice depends only on step and question, so a resumed run repeats it. Returns every group, in order.
        """
        return [self._exchange(group, step) for group in groups] if self.capacity else list(groups)

    def _exchange(self, group: RolloutGroup, step: int) -> RolloutGroup:
        learns = {id(trajectory) for trajectory in group.trained}
        trained = [number for number, trajectory in enumerate(group.trajectories) if id(trajectory) in learns]
        won = [number for number in trained if group.trajectories[number].reward > self.success_above]
        if won:
            self._keep(group, won[-1])
            return group
        success = self.successes.get(group.prompt.id)
        # A prompt that is rendered differently, e.g. with a new date, is another state, where the success does not apply.
        if not trained or success is None or success.nodes[0].token_ids != group.nodes[0].token_ids:
            return group
        paths = [(group, trajectory) for trajectory in group.trajectories]
        paths[random.Random(f"{step} {group.prompt.id}").choice(trained)] = (success, success.trajectories[0])
        return replace(of_paths(group.prompt, paths), metrics={**group.metrics, Metric.REPLAYED: 1.0})

    def _keep(self, group: RolloutGroup, number: int) -> None:
        kept = of_paths(group.prompt, [(group, group.trajectories[number])])
        for node in kept.nodes:
            # No later step asks for this weight version; that step computes log-probs of the trainer and probes anew.
            node.weight_version, node.old_logprobs, node.ref_logprobs, node.old_entropies = None, [], [], []
        self.successes.pop(group.prompt.id, None)
        self.successes[group.prompt.id] = kept
        while len(self.successes) > self.capacity:
            del self.successes[next(iter(self.successes))]

    def state(self) -> str:
        """For a checkpoint: compressed JSON as text, a few bytes per token."""
        rows = [{**asdict(group), OUR_NAMES: True} for group in self.successes.values()]
        return base64.b64encode(zlib.compress(json.dumps(rows, separators=(",", ":")).encode())).decode()

    def load_state(self, state: str, *, search: str = SEARCH) -> None:
        """Restore a `state`, with this buffer's own capacity. `search`: the name of search in states that are older than our names."""
        rows = json.loads(zlib.decompress(base64.b64decode(state)))
        rows = rows[max(len(rows) - self.capacity, 0) :]
        restored = [_group(row) for row in rows]
        for row, group in zip(rows, restored, strict=True):
            if OUR_NAMES not in row:
                rename_search(group, search)
        self.successes = {group.prompt.id: group for group in restored}


def of_paths(prompt: Prompt, paths: Sequence[tuple[RolloutGroup, Trajectory]]) -> RolloutGroup:
    """A group of only these trajectories, from several groups of one question; the prompt is shared, other nodes are copied."""
    merged = RolloutGroup(prompt, [])
    numbers: dict[tuple[int, int], int] = {}
    for group, trajectory in paths:
        path: list[int] = []
        for index in trajectory.path:
            node = group.nodes[index]
            own = (0, 0) if node.kind == "prompt" else (id(group), index)
            if own not in numbers:
                numbers[own] = merged.add(replace(node, parent=path[-1] if path else None))
            path.append(numbers[own])
        merged.trajectories.append(replace(trajectory, path=path))
    return merged


def _group(row: dict[str, Any]) -> RolloutGroup:
    """A group of one trajectory from its JSON form, made by `asdict`."""
    nodes = []
    for node in row["nodes"]:
        call = node["call"] and ToolCall(node["call"]["name"], tuple(node["call"]["queries"]))
        nodes.append(Node(**{**node, "call": call}))
    (trajectory,) = row["trajectories"]
    prompt = Prompt(**{**row["prompt"], "answers": tuple(row["prompt"]["answers"])})
    return RolloutGroup(prompt, nodes, [Trajectory(**{**trajectory, "status": Status(trajectory["status"])})])
