"""What `rollout.engine.backend=torch` can do, and how many sequences fit its cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from igpo_megatron.config.check.common import needs_engines
from igpo_megatron.config.schema import Config


def cache_slots(config: Config, shape: dict[str, Any]) -> int:
    """Sequences of `rollout.max_context` tokens that `rollout.engine.kv_cache_mib` holds, `max_num_seqs` at most; 0 where none fits.

    `shape`: config.json of the model.
    """
    return min(config.rollout.engine.max_num_seqs, config.rollout.engine.kv_cache_mib * 2**20 // _sequence_bytes(config, shape))


def check_torch_engine(config: Config, shape: dict[str, Any]) -> Iterator[str]:
    """There is one such engine, in the main rank's process."""
    engine = config.rollout.engine
    if engine.backend != "torch" or not needs_engines(config):
        return
    wanted = {
        "rollout.engine.count": (engine.count, 1),
        "rollout.engine.tensor": (engine.tensor, 1),
        "rollout.engine.gpu_ids": (list(engine.gpu_ids), []),
        "rollout.engine.ray_address": (engine.ray_address, None),
        "rollout.routing_replay": (config.rollout.routing_replay, False),
    }
    for name, (found, expected) in wanted.items():
        if found != expected:
            shown = found if isinstance(found, str) else json.dumps(found)
            yield (
                f"{name}={shown} with rollout.engine.backend=torch, which is one engine in the main rank's process, on its "
                f"device, and returns no experts; set it to {json.dumps(expected)}, or use backend=vllm"
            )
    if config.sync.transport not in ("auto", "shared_memory"):
        yield f"sync.transport={config.sync.transport} with rollout.engine.backend=torch, which takes weights where they are; use auto"
    if _is_known(shape) and not cache_slots(config, shape):
        need = -(-_sequence_bytes(config, shape) // 2**20)
        yield (
            f"rollout.engine.kv_cache_mib={engine.kv_cache_mib} is too small for backend=torch: one sequence of rollout.max_context="
            f"{config.rollout.max_context} takes {need} MiB; set it to a multiple of that, or lower rollout.max_context"
        )


def _is_known(shape: dict[str, Any]) -> bool:
    sizes = (shape.get(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    return all(isinstance(size, int) for size in sizes)


def _sequence_bytes(config: Config, shape: dict[str, Any]) -> int:
    """Keys and values of one sequence of `rollout.max_context` tokens."""
    heads = shape["num_attention_heads"]
    head_size = shape.get("head_dim") or shape["hidden_size"] // heads
    dtype = config.model.dtype if config.rollout.engine.dtype == "auto" else config.rollout.engine.dtype
    per_token = 2 * shape["num_hidden_layers"] * (shape.get("num_key_value_heads") or heads) * head_size * {"fp32": 4, "bf16": 2}[dtype]
    return int(per_token * config.rollout.max_context)
