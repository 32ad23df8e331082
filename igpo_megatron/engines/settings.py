"""Settings of the engines that sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.settings import Section


class Engine(Section):
    """What generates: vLLM engines, placed by Ray, or one of this project's own."""

    backend: Literal["vllm", "torch"] = "vllm"
    """`torch`: transformers in the main rank's process, on its device, without vLLM and Ray: starts in a second, for small models, tests
    and machines where vLLM cannot be installed. One engine; each turn's context is computed anew."""

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
    """KV-cache size of each engine, on CPU, and of backend=torch on any device: there it holds whole sequences of `rollout.max_context`."""

    threads: PositiveInt = 1
    """CPU: OpenMP threads of each vLLM engine; backend=torch has those of its rank (`run.threads`)."""

    gpu_ids: tuple[NonNegativeInt, ...] = ()
    """CUDA: devices the engines may use on this node, counted from 0 among those that the run sees (its CUDA_VISIBLE_DEVICES, where a
    scheduler has set it); must not overlap the ranks' devices, which are the first ones."""

    ray_address: str | None = None
    """Ray cluster to join (host:port); null starts one on this machine, bound to loopback."""

    start_timeout_s: PositiveFloat = 600
    """An engine that is not ready by then counts as failed: at the start of the run it stops it, later it is started again."""

    request_timeout_s: PositiveFloat = 1800
    """Wall time of one turn or one probe, waiting for a sync and for a restarted engine included."""

    health_interval_s: PositiveFloat = 10
    """Time between health checks of each engine."""

    health_timeout_s: PositiveFloat = 60
    """An engine that does not answer a health check by then counts as dead."""

    max_restarts: NonNegativeInt = 3
    """Restarts of one engine in a run; one more death stops the run."""
