"""One vLLM engine inside its own Ray actor process: it samples turns, scores probes and takes new weights."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from igpo_megatron.config.schema import Config
from igpo_megatron.engines.recorded_experts import routed_experts
from igpo_megatron.types import Completion, ProbeScore, SamplingRequest
from igpo_megatron.weights.store import SharedWeights
from igpo_megatron.weights.transfer import BACKEND, POSITION_BYTES, as_plain

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_BATCH_TOKENS = 4096
_VLLM_LOGPROBS = 20
# A worker in a process of its own imports vLLM once more and takes half of every decoding step of a small model. By its path: vLLM replaces
# the name "uni" on CPU, because it cannot set the threads of a process that runs; ours start with them (`engine_environment`).
_IN_ENGINE_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
KILLED = re.compile(r"Failed core proc\(s\): \{(\}|[^}]*: -\d)")
"""vLLM's error if a signal ended a starting process, or its exit code is not known yet; a process that gives up has a positive code."""


class EngineLost(RuntimeError):
    """The engine's processes are gone; its requests must go to another engine."""


class EngineActor:
    """One AsyncLLM. Its methods are called concurrently."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.version = 0
        self._requests = itertools.count()
        self._engine: Any = None
        self._returns_experts = False
        self._turns: Mapping[str, Any] = {}
        self._copy: SharedWeights | None = None
        # Closed while weights are exchanged: a request in between would be tagged with the wrong weights.
        self._gate = asyncio.Event()

    async def start(self, options: dict[str, Any], weights_path: str | None, turns: Mapping[str, Any]) -> None:
        """Load the model; returns when requests can be served. Raises EngineLost if a signal ended vLLM meanwhile.

        `weights_path`: the file of later weights on this machine; None to keep a copy here. `turns`: SamplingParams of every turn: its
        stops, and the tokens that it may have.
        """
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        extension = {"worker_extension_cls": "igpo_megatron.weights.transfer.WorkerExtension"}
        self._returns_experts = "enable_return_routed_experts" in options
        self._turns = turns
        arguments = AsyncEngineArgs(**{**extension, **options}, weight_transfer_config=WeightTransferConfig(backend=BACKEND))
        try:
            self._engine = AsyncLLM.from_engine_args(arguments)
        except RuntimeError as error:
            if KILLED.search(str(error)):
                raise EngineLost(str(error)) from None
            raise
        if weights_path is None:
            self._copy = SharedWeights()
            weights_path = str(self._copy.path)
        self._position = SharedWeights()
        self._position.write_bytes(memoryview(b"before the first tensor".ljust(POSITION_BYTES)), 0)
        paths = {"path": weights_path, "position": str(self._position.path)}
        async with _lost_by_name():  # it may be killed here, too, when it has just started
            await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=paths))
        self._gate.set()

    # ---- requests

    async def generate(self, request: SamplingRequest) -> Completion:
        """As in `Engine`. The version is that of the first token; weights may change while the turn is sampled."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        length, first = len(request.token_ids), request.experts_from
        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=request.seed if request.temperature > 0 else None,
            logprobs=request.top_logprobs,
            output_kind=RequestOutputKind.FINAL_ONLY,  # nobody reads the tokens of an unfinished turn
            **self._turns,
            **self._experts_from(length if first is None else first),
        )
        await self._gate.wait()
        version = self.version
        output = (await self._last_output(request.token_ids, params)).outputs[0]
        ids = list(output.token_ids)
        logprobs = [position[token].logprob for token, position in zip(ids, output.logprobs, strict=True)]
        entropies = [entropy(entry.logprob for entry in position.values()) for position in output.logprobs] if request.top_logprobs else []
        experts = [] if first is None else routed_experts(output.routed_experts, length + len(ids) - 1 - first)
        finish = output.finish_reason
        return Completion(ids, logprobs, finish if finish in ("stop", "length") else "abort", version, entropies, first or 0, experts)

    async def score(self, token_ids: list[int], first: int = 1, *, cached: bool = False) -> tuple[ProbeScore, int]:
        """Raw log-probs of `token_ids[first:]`, with their weight version, and the number of prompt tokens taken from the prefix cache.

        With `cached` the prefix cache may be read. vLLM then leaves the rows of cached positions as uninitialised memory, without
        an error: a context that ends on a block boundary, or a probe that was scored before, loses rows. Row `first` comes from the
        hidden state of token first - 1, so it is computed iff at most first - 1 tokens were cached. Otherwise the request is repeated
        without the cache, and the last number returned is that of the first try. It is also repeated if the weights changed meanwhile.
        """
        assert 1 <= first < len(token_ids), f"tokens from {first} on of {len(token_ids)} cannot be scored"
        await self._gate.wait()
        version, nothing = self.version, self._experts_from(len(token_ids))
        output = await self._last_output(token_ids, _scoring_params(skip_cache=not cached, **nothing))
        hits = output.num_cached_tokens
        assert hits is not None, "vLLM does not report how much of a prompt came from its cache"
        if hits > first - 1:
            output = await self._last_output(token_ids, _scoring_params(skip_cache=True, **nothing))
        if self.version != version:  # it is set before requests resume, so results of new weights come after it
            return await self.score(token_ids, first)
        # Some versions of vLLM return computed rows only, so index from the end. Each row has one token, that of the prompt.
        return ProbeScore(tuple(output.prompt_logprobs.logprobs[first - len(token_ids) :]), version), hits

    def _experts_from(self, position: int) -> dict[str, int]:
        """SamplingParams for experts from `position` on; earlier versions of vLLM lack the parameter."""
        return {"routed_experts_prompt_start": position} if self._returns_experts else {}

    async def _last_output(self, token_ids: list[int], params: Any) -> Any:
        output = None
        request = f"{self.number}-{next(self._requests)}"
        async with _lost_by_name():
            async for partial in self._engine.generate({"prompt_token_ids": token_ids}, params, request):
                output = partial
        assert output is not None, "vLLM ended a request without an output"
        return output

    # ---- weights

    async def begin_update(self) -> None:
        """Freeze requests in flight, admit no new ones, and clear the caches of the old weights."""
        self._gate.clear()
        async with _lost_by_name():
            await self._engine.pause_generation(mode="keep", clear_cache=True)
            await self._engine.start_weight_update()

    async def join(self, native: str, native_info: dict[str, Any]) -> None:
        """Open vLLM's own back-end `native`; returns when the main rank has opened its end."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info = {"native": native, "native_info": native_info}
        async with _lost_by_name():
            await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def load_bucket(self, update_info: dict[str, Any], data: Any = None, begin: int = 0) -> list[list[tuple[Any, ...]]]:
        """Load one bucket; returns what each worker received. `data`: the bucket's bytes, if this engine keeps a copy of the file."""
        if data is not None:
            assert self._copy is not None, "this engine reads the main rank's file"
            self._copy.write_bytes(memoryview(data), begin)
        async with _lost_by_name():
            return await self._engine.collective_rpc("load_bucket", args=(as_plain(update_info),))

    async def finish_update(self, version: int) -> None:
        """Serve the new weights; requests in flight continue."""
        async with _lost_by_name():
            await self._engine.finish_weight_update()
            self.version = version
            await self._engine.resume_generation()
        self._gate.set()

    async def position(self) -> str:
        """The bucket and the tensor that the engine reached in a transfer."""
        return self._position.path.read_bytes()[:POSITION_BYTES].decode(errors="replace").strip()

    # ---- memory

    async def sleep(self, level: int) -> None:
        """Free the device's memory when the last request has ended (vLLM's sleep; a CPU worker has nothing to free)."""
        self._gate.clear()
        async with _lost_by_name():
            await self._engine.sleep(level, mode="wait")

    async def wake(self, part: str) -> None:
        """Allocate the memory of `weights` or of the `kv_cache` again. Weights must then be loaded before requests are served."""
        async with _lost_by_name():
            await self._engine.wake_up([part])

    # ---- life

    async def check_health(self) -> None:
        """Raises EngineLost if the engine cannot serve."""
        async with _lost_by_name():
            await self._engine.check_health()

    def place(self) -> tuple[int, str]:
        """Process id of this actor, whose children vLLM's processes are, and its Ray node."""
        import ray

        return os.getpid(), ray.get_runtime_context().get_node_id()

    async def stop(self) -> None:
        """End vLLM's processes and remove this engine's files."""
        if self._engine is not None:
            self._engine.shutdown()
            self._position.close()
        if self._copy is not None:
            self._copy.close()


@contextlib.asynccontextmanager
async def _lost_by_name() -> AsyncIterator[None]:
    """Translate vLLM's error to EngineLost: processes without vLLM cannot unpickle it."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineLost(str(error)) from None


def engine_options(config: Config, *, cuda: bool, stop_strings: bool) -> dict[str, Any]:
    """vLLM's arguments; `stop_strings`: turns may end at a text, so the engine needs the tokenizer."""
    rollout, engine = config.rollout, config.rollout.engine
    top_logprobs = rollout.branching.top_logprobs
    device: dict[str, Any] = (
        {"gpu_memory_utilization": engine.gpu_memory_utilization, "enable_sleep_mode": config.placement.mode == "colocated"}
        if cuda
        else {
            "enforce_eager": True,
            **({"distributed_executor_backend": _IN_ENGINE_CORE} if engine.tensor == 1 else {}),
            "kv_cache_memory_bytes": engine.kv_cache_mib * 2**20,
            # A seeded request with a chunked prefill crashes vLLM 0.32's CPU worker, which cannot reset its generators.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(rollout.max_context, _CPU_BATCH_TOKENS),
            # The smallest that its CPU attention supports. With the default of 128, a turn recomputes half a block on average.
            "block_size": 32,
        }
    )
    return {
        "model": str(config.model.path),
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[engine.dtype_for(config.model.dtype)],
        "tensor_parallel_size": engine.tensor,
        # By default vLLM uses "ray" inside an actor, and that executor refuses a bundle of more than one GPU.
        **({"distributed_executor_backend": "mp"} if engine.tensor > 1 else {}),
        "max_model_len": rollout.max_context,
        "max_num_seqs": engine.max_num_seqs,
        "seed": config.run.seed,
        "skip_tokenizer_init": not stop_strings,
        "enable_prefix_caching": True,
        **({"enable_return_routed_experts": True} if rollout.routing_replay else {}),
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1 if top_logprobs == -1 else max(top_logprobs, _VLLM_LOGPROBS),
        "disable_log_stats": True,
        **device,
    }


def engine_environment(config: Config, *, cuda: bool) -> dict[str, str]:
    """Environment of an engine's processes."""
    threads = config.rollout.engine.threads
    cpu = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # A run has replaced `auto`; an engine that is opened otherwise is the only one who knows what it shares its cores with.
        "OMP_NUM_THREADS": str(1 if threads == "auto" else threads),
        "VLLM_TARGET_DEVICE": "cpu",
        # Eager models still compile a small function with g++ when the first probe is scored: 7 s.
        "TORCH_COMPILE_DISABLE": "1",
    }
    routed = {"VLLM_USE_V2_MODEL_RUNNER": "1"} if config.rollout.routing_replay else {}
    return {**_QUIET, "IGPO_ENGINE_PROCESS": "1", "VLLM_HOST_IP": "127.0.0.1", **routed, **({} if cuda else cpu)}


def entropy(logprobs: Iterable[float]) -> float:
    """-sum p ln p over the given tokens, nats; other tokens are ignored."""
    return -math.fsum(math.exp(logprob) * logprob for logprob in logprobs if logprob > -math.inf)


def _scoring_params(*, skip_cache: bool, **more: Any) -> Any:
    """One token is sampled because vLLM requires it; `detokenize` must stay off, since uninitialised rows have invalid ids."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        flat_logprobs=True,  # not a dict for every token of the context
        detokenize=False,
        skip_reading_prefix_cache=skip_cache,
        **more,
    )
