"""Rewards of trajectories: the outcome of the answer, and whether the text is well-formed.

The rules are those of the published IGPO code: set F1 on words, exact match after normalisation, tags that open as often as they close.
One difference in training: the format check reads the model's own text only, so a tool result that contains a tag is harmless.

Search-R1's (arXiv 2503.09516) is `reward.outcome=em_squad`, in which articles are ignored, unlike in IGPO's `em`.
ARPO's (arXiv 2507.19849) are `reward.outcome=f1_multiset` and `reward.tool_bonus`, with `rollout.protocol=arpo` for the boxed answer and
`reward.format_penalty=-1`. Its code looks for tags in the whole text, tool results included; here the bonus is for tools that ran.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from igpo_megatron.algorithms.outcomes import exact_match, f1, outcome_of
from igpo_megatron.chat.protocols.igpo import well_formed_answer
from igpo_megatron.chat.protocols.registry import protocol_of
from igpo_megatron.config.schema import Config
from igpo_megatron.types import SEARCH, Metric, RolloutGroup, Status, Trajectory, UserError
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

ALIAS_SEPARATOR = "<|answer_split|>"
"""Joins the accepted answers in the published ground-truth strings."""

PUBLISHED_FORMAT_PENALTY = -2.0
"""Reward of malformed text in the published rule (`reward.format_penalty` sets it for training)."""


@dataclass(frozen=True, slots=True)
class Score:
    """Result of the published rule on one text."""

    f1: float
    """0 where the format check fails."""

    em: float
    """0 where the format check fails."""

    format_ok: bool
    reward: float
    """f1, or `PUBLISHED_FORMAT_PENALTY` where the format check fails."""


def published_score(text: str, ground_truth: str) -> Score:
    """Score a whole response, tool results included, as the published code does; `ground_truth` joins aliases by `ALIAS_SEPARATOR`."""
    answer = well_formed_answer(text)
    if answer is None:
        return Score(f1=0.0, em=0.0, format_ok=False, reward=PUBLISHED_FORMAT_PENALTY)
    aliases = ground_truth.lower().split(ALIAS_SEPARATOR)
    value = f1(answer, aliases)
    return Score(f1=value, em=exact_match(answer, aliases), format_ok=True, reward=value)


def score_lines(path: str | Path) -> Iterator[dict[str, float | bool]]:
    """Score a JSON-lines file of `{"solution", "ground_truth"}`: one dict of f1, em, format_ok and reward per line, blank lines skipped.

    Raises UserError if the file cannot be read, or, with its number, for a line that is not a JSON object with both strings.
    """
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield asdict(published_score(*_solution_and_truth(line, where=f"{path}, line {number}")))
    except OSError as error:
        raise UserError(f"{path}: {os.strerror(error.errno or 0).lower()}; expected a file of JSON lines") from None


def _solution_and_truth(line: bytes, where: str) -> tuple[str, str]:
    expected = 'expected {"solution": "...", "ground_truth": "..."}'
    try:
        row = json_loads_untrusted(line)
    except BadJson as error:
        raise UserError(f"{where}: not JSON ({error}); {expected}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: found a JSON {type(row).__name__}; {expected}")
    problems = [
        f"{key!r} is a {type(row[key]).__name__}, not a string" if key in row else f"{key!r} is missing"
        for key in ("solution", "ground_truth")
        if not isinstance(row.get(key), str)
    ]
    if problems:
        raise UserError(f"{where}: {' and '.join(problems)}; {expected}")
    return row["solution"], row["ground_truth"]


def overlong_penalty(num_tokens: int, start: int, end: int) -> float:
    """Overlong shaping (DAPO, arXiv 2503.14476, eq. 13): 0 up to `start` tokens, linear down to -1 at `end`, -1 beyond."""
    return -min(max((num_tokens - start) / (end - start), 0.0), 1.0)


def own_turns(group: RolloutGroup, trajectory: Trajectory) -> list[str]:
    """The texts the format check may read, one per turn: forced and sampled segments, never the prompt or a tool result."""
    turns, opening = [], ""
    for node in (group.nodes[index] for index in trajectory.path):
        if node.kind in ("forced", "asking"):
            opening += node.text
        elif node.kind == "action":
            turns.append(opening + node.text)
            opening = ""
    return turns


def tools_that_returned(group: RolloutGroup, trajectory: Trajectory) -> set[str]:
    """Names of the tools whose results are in a trajectory, judged by its nodes and not by any text."""
    nodes = [group.nodes[index] for index in trajectory.path]
    return {before.call.name for before, after in pairwise(nodes) if before.call is not None and after.kind == "observation"}


def score(group: RolloutGroup, config: Config) -> None:
    """Fill `reward` and `reward_parts` of every trainable trajectory; the others keep 0 and no parts.

    Parts are format_ok, f1 and em by IGPO's rules, and the outcome under its own name where that is neither.

    Well-formed means: status FINISHED, and an answer by the protocol's own check of the model's own text. Anything else earns
    `reward.format_penalty`. `reward.overlong` is added to either.
    """
    answers, reward, protocol = group.prompt.answers, config.reward, protocol_of(config.rollout)
    for trajectory in group.trajectories:
        if not trajectory.status.is_trainable:
            continue
        answer = protocol.final_answer(own_turns(group, trajectory)) if trajectory.status == Status.FINISHED else None
        if answer is None:
            trajectory.reward = reward.format_penalty
            trajectory.reward_parts = {Metric.F1: 0.0, Metric.EM: 0.0, reward.outcome: 0.0, Metric.FORMAT_OK: 0.0}
        else:
            outcome = trajectory.reward = outcome_of(reward.outcome)(answer, answers)
            if trajectory.reward > 0 and {SEARCH, "python"} <= tools_that_returned(group, trajectory):
                trajectory.reward += reward.tool_bonus
            parts: dict[str, float] = {Metric.F1: f1(answer, answers), Metric.EM: exact_match(answer, answers)}
            trajectory.reward_parts = {**parts, reward.outcome: outcome, Metric.FORMAT_OK: 1.0}
        if reward.overlong is not None:
            trajectory.reward += overlong_penalty(sum(len(node.token_ids) for node in group.actions(trajectory)), *reward.overlong)
