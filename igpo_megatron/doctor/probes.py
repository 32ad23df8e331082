"""`igpo doctor probes`: score the same ground-truth probes by every scorer and show that they agree.

synthetic trajectories ──> fold, batched, sequential (this process, no launcher) and engine ──> largest difference, tokens, time
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from igpo_megatron.config.schema import Config
from igpo_megatron.policy.settings import Parallel
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

if TYPE_CHECKING:
    from igpo_megatron.engines.api import EngineService
    from igpo_megatron.packing.tree import ProbeScorer
    from igpo_megatron.policy.policy import Policy

TRAINER_BOUND = {"fp32": 1e-5, "bf16": 5e-2}
"""Largest relative difference of a log-prob between schemes of the same model in the trainer; in bf16 a rounding of a logit of 8."""

ENGINE_BOUND = {"fp32": 1e-3, "bf16": 0.15}
"""The same between engine and trainer, whose kernels differ. A canary's `sync.max_gap` is for absolute differences."""

TURNS, PROMPT_TOKENS, TURN_TOKENS, PROBE_TOKENS, SCORED_TOKENS = 4, 30, 40, 12, 6


@dataclass(frozen=True, slots=True)
class Result:
    """One scorer on the same probes."""

    scorer: str
    tokens: int
    """Tokens forwarded for the probes alone; for an engine all are counted, because its cache hits are unknown."""

    seconds: float
    gap: float
    """Largest difference to `sequential` over all scored tokens, relative to the log-prob where that is beyond one nat."""

    bound: float


def synthetic_group(*, turns: int, prompt_tokens: int, turn_tokens: int, probe_tokens: int, vocab_size: int, seed: int) -> RolloutGroup:
    """One trajectory of random tokens with a probe before every turn and one after the last.

    Each turn has `turn_tokens` tokens, a third of them the policy's; the last half of each probe is scored.
    """
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    group = RolloutGroup(Prompt(f"synthetic-{seed}", "?", ("answer",), "synthetic"), [Node(None, "prompt", tokens(prompt_tokens))])
    probe, path, parents = tokens(probe_tokens), [0], [0]
    for turn in range(1, turns + 1):
        sampled = max(1, turn_tokens // 3)
        path.append(group.add(Node(path[-1], "action", tokens(sampled), turn)))
        path.append(group.add(Node(path[-1], "observation", tokens(turn_tokens - sampled), turn)))
        parents.append(path[-1])
    path.append(group.add(Node(path[-1], "action", tokens(1), turns + 1)))
    for finished, parent in enumerate(parents):
        group.add(Node(parent, "probe", list(probe), finished, text="answer", scored=(probe_tokens // 2, probe_tokens)))
    group.trajectories = [Trajectory(path, Status.FINISHED)]
    return group


def probe_logprobs(groups: Sequence[RolloutGroup]) -> list[float]:
    """Log-probs of the scored tokens of all probes, in order."""
    return [value for group in groups for node in group.nodes if node.kind == "probe" for value in node.old_logprobs]


def score_in_trainer(policy: Policy, groups: Sequence[RolloutGroup], scorer: ProbeScorer | None) -> int:
    """Fill the log-probs of all probes by one of the trainer's schemes; tokens forwarded, those of the trajectories included."""
    from igpo_megatron.packing.tree import pack_for_scoring, per_node

    rows = pack_for_scoring(groups, row_tokens=policy.config.packing.row_tokens, multiple=policy.row_multiple, scorer=scorer)
    for node, values in per_node(rows, policy.log_probs(rows), groups):
        node.old_logprobs = values
    return sum(row.num_tokens for row in rows)


def compare(config: Config, *, say: Callable[[str], None] = lambda message: None) -> list[Result]:
    """Score synthetic probes with the configuration's model by all four scorers, at temperature 1, as the engine knows no other.

    Runs in this process, whatever `parallel` asks for; engines are started as `rollout.engine` says.
    """
    from igpo_megatron.engines.factory import open_engines
    from igpo_megatron.policy import parallel
    from igpo_megatron.policy.policy import Policy

    reward = config.reward.model_copy(update={"probe_temperature": 1, "scorer": "engine"})
    config = config.model_copy(update={"parallel": Parallel(), "reward": reward})
    say("loading the model")
    policy = Policy(config, parallel.init(config))
    shape = {"turns": TURNS, "prompt_tokens": PROMPT_TOKENS, "turn_tokens": TURN_TOKENS, "probe_tokens": PROBE_TOKENS}
    groups = [synthetic_group(**shape, vocab_size=policy.shape.vocab_size, seed=seed) for seed in range(4)]
    trunk = sum(len(node.token_ids) for group in groups for node in group.nodes if node.kind != "probe")
    results: list[Result] = []
    expected: list[float] = []
    schemes: tuple[ProbeScorer, ...] = ("sequential", "batched", "fold")
    for scorer in schemes:
        say(f"scoring: {scorer}")
        started = time.perf_counter()
        tokens = score_in_trainer(policy, groups, scorer) - trunk
        seconds = time.perf_counter() - started
        expected = expected or probe_logprobs(groups)
        results.append(Result(scorer, tokens, seconds, relative_gap(probe_logprobs(groups), expected), TRAINER_BOUND[config.model.dtype]))
    say("starting the engine")
    with open_engines(config) as engines:
        say("scoring: engine")
        started = time.perf_counter()
        tokens = asyncio.run(_score_in_engine(engines, groups))
        seconds = time.perf_counter() - started
        bound = engine_bound(config.model.dtype, config.rollout.engine.dtype_for(config.model.dtype))
        results.append(Result("engine", tokens, seconds, relative_gap(probe_logprobs(groups), expected), bound))
    parallel.shutdown()
    return results


def gap(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest absolute difference; infinite where a value is missing or not a number."""
    if len(found) != len(expected) or not found:
        return float("inf")
    gaps = [abs(left - right) for left, right in zip(found, expected, strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else float("inf")  # max() would lose a nan


def engine_bound(*dtypes: str) -> float:
    """For trainer and engine of these dtypes."""
    return ENGINE_BOUND["bf16" if "bf16" in dtypes else "fp32"]


def relative_gap(found: Sequence[float], expected: Sequence[float]) -> float:
    """As `gap`, but relative to expected log-probs beyond one nat, with which rounding errors grow."""
    scale = [max(1.0, abs(value)) for value in expected]
    if len(found) != len(expected):
        return float("inf")
    return gap([value / size for value, size in zip(found, scale, strict=True)], [v / s for v, s in zip(expected, scale, strict=True)])


async def _score_in_engine(engines: EngineService, groups: Sequence[RolloutGroup]) -> int:
    """As a run does it: turn by turn, every context in the cache of the one before."""
    tokens = 0
    for group in groups:
        for node in group.nodes:
            if node.kind == "probe" and node.parent is not None and node.scored:
                context = group.context(node.parent)
                score = await engines.score_probe(context + node.token_ids, len(context) + node.scored[0], key=group.prompt.id)
                node.old_logprobs, node.weight_version = list(score.logprobs), score.weight_version
                tokens += len(context) + len(node.token_ids)
    return tokens


def as_table(results: Sequence[Result]) -> Table:
    table = Table(
        "scorer", "tokens for the probes", "seconds", "largest difference", "bound", "", title="igpo doctor probes", title_justify="left"
    )
    for result in results:
        verdict = "[green]agrees[/green]" if result.gap <= result.bound else "[red]differs[/red]"
        table.add_row(result.scorer, f"{result.tokens:,}", f"{result.seconds:.3f}", f"{result.gap:.2g}", f"{result.bound:.0e}", verdict)
    return table


def main(config: Config) -> int:
    """Print the comparison; 1 if a scorer is beyond its bound, else 0."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    console = Console()
    with console.status("probes") as status:
        results = compare(config, say=lambda message: status.update(message))
    console.print(as_table(results))
    return int(any(not result.gap <= result.bound for result in results))
