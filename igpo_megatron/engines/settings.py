"""Settings of the engines that sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.settings import Section, Threads

Dtype = Literal["auto", "fp32", "bf16"]
"""Of a configuration whose `auto`s are replaced (policy/parallel.py) it is one of the other two."""


class Engine(Section):
    """The engines that generate: vLLM, placed by Ray, or one of this project's own."""

    backend: Literal["vllm", "torch"] = "vllm"
    """`torch`: transformers in the main rank's process, on its device, without vLLM and Ray: starts in a second, for small models, tests
    and machines where vLLM cannot be installed. One engine; each turn's context is computed again."""

    count: PositiveInt = 1
    """Engines."""

    tensor: PositiveInt = 1
    """Tensor-parallel degree of each engine."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes the model's."""

    max_num_seqs: PositiveInt = 256
    """Sequences decoded at once per engine."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    """CUDA: share of each engine GPU that vLLM may take."""

    kv_cache_mib: PositiveInt = 256
    """KV-cache size of each engine, on CPU, and of backend=torch on any device: there it holds full sequences of `rollout.max_context`."""

    threads: Threads = "auto"
    """CPU: OpenMP threads of each vLLM engine, of each of its `tensor` workers; backend=torch uses those of its rank (`run.threads`).
    `auto`: 1 for models below 20 M parameters; else the machine's cores shared by the engines, which work while the ranks wait, or half of
    the cores where the ranks do not wait (`rollout.max_staleness` above 0)."""

    gpu_ids: tuple[NonNegativeInt, ...] = ()
    """CUDA: devices the engines may use on this node, counted from 0 among those that the run sees (its CUDA_VISIBLE_DEVICES, if a
    scheduler has set it); must not overlap the ranks' devices, which are the first ones."""

    ray_address: str | None = None
    """Ray cluster to join (host:port); null starts one on this machine, bound to loopback."""

    start_timeout_s: PositiveFloat = 600
    """An engine that is not ready by then has failed: at the start of the run this ends the run, later the engine is restarted."""

    request_timeout_s: PositiveFloat = 1800
    """Wall time of one turn or one probe, waiting for a sync and for a restarted engine included."""

    health_interval_s: PositiveFloat = 10
    """Time between health checks of each engine."""

    health_timeout_s: PositiveFloat = 60
    """An engine that does not answer a health check by then counts as dead."""

    max_restarts: NonNegativeInt = 3
    """Restarts of one engine in a run; one more death stops the run."""

    def problems(self) -> Iterator[str]:
        repeated = sorted({gpu for gpu in self.gpu_ids if self.gpu_ids.count(gpu) > 1})
        if repeated:
            yield f"rollout.engine.gpu_ids names {repeated} more than once; name each GPU once"
        if self.backend != "torch":
            return
        for name, expected in {"count": 1, "tensor": 1, "gpu_ids": (), "ray_address": None}.items():
            found = getattr(self, name)
            if found != expected:
                yield (
                    f"rollout.engine.{name}={found if isinstance(found, str) else json.dumps(found)} with rollout.engine.backend=torch, "
                    f"which is one engine in the main rank's process, on its device; set it to {json.dumps(expected)}, or use backend=vllm"
                )

    def dtype_for(self, model_dtype: Dtype) -> Dtype:
        """Of the engines' weights and caches, for a model of `model_dtype`."""
        return model_dtype if self.dtype == "auto" else self.dtype

    def cache_slots(self, max_context: int, model_dtype: Dtype, shape: dict[str, Any]) -> int:
        """backend=torch: sequences of `max_context` tokens that `kv_cache_mib` holds, `max_num_seqs` at most; 0 where none fits.

        `shape`: config.json of the model.
        """
        return min(self.max_num_seqs, self.kv_cache_mib * 2**20 // self.sequence_bytes(max_context, model_dtype, shape))

    def sequence_bytes(self, max_context: int, model_dtype: Dtype, shape: dict[str, Any]) -> int:
        """Keys and values of one sequence of `max_context` tokens."""
        heads = shape["num_attention_heads"]
        head_size = shape.get("head_dim") or shape["hidden_size"] // heads
        bytes_each = {"fp32": 4, "bf16": 2}[self.dtype_for(model_dtype)]
        per_token = 2 * shape["num_hidden_layers"] * (shape.get("num_key_value_heads") or heads) * head_size * bytes_each
        return int(per_token * max_context)
