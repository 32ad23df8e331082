"""vLLM engines as Ray actors: placed together, kept resident, fed new weights, watched.

    EnginePool (main rank) ──Ray──> EngineActor 0..n-1, each an AsyncLLM with prefix cache ──> vLLM workers

The only file that knows Ray and vLLM (beside weight_transfer.py). A Ray started here listens on loopback alone and ends with the pool.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import random
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from igpo_megatron.config.schema import Branching, Config, NoBranching
from igpo_megatron.leftovers import claim, remove_abandoned
from igpo_megatron.protocols import PROTOCOLS
from igpo_megatron.rollout.agent import EngineError
from igpo_megatron.rollout.weight_transfer import BACKEND, Entry, SharedWeights
from igpo_megatron.types import Completion, ProbeScore

logger = logging.getLogger(__name__)

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
_OBJECT_STORE_BYTES = 100 * 2**20
_RAY_PREFIX = "igpo-ray-"
_SOCKET_PATH_BYTES = 107
_RAY_SOCKET_BYTES = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_LOG_LINES = 12
_STOP_TIMEOUT_S = 20
_OPERATION_TIMEOUT_S = 600
_CPU_BATCH_TOKENS = 4096
_VLLM_LOGPROBS = 20
_SELF_TEST_CONTEXT, _SELF_TEST_PROBE = 128, 12  # 128 tokens are whole KV blocks of any size in use
_SELF_TEST_GAP = {"fp32": 1e-4, "bf16": 0.1}
# What torchrun tells its ranks must not reach the engines: vLLM makes process groups of its own.
_LAUNCHER_VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_.*|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*)"
)


class EngineActor:
    """One AsyncLLM. Runs inside a Ray actor process; its methods are called concurrently."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.version = 0
        self._requests = itertools.count()
        self._engine: Any = None

    async def start(self, options: dict[str, Any], weights_path: str) -> None:
        """Load the model; returns when requests can be served."""
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            **options,
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            worker_extension_cls="igpo_megatron.rollout.weight_transfer.WorkerExtension",
        )
        self._engine = AsyncLLM.from_engine_args(arguments)
        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={"path": weights_path}))

    async def generate(
        self,
        token_ids: list[int],
        max_tokens: int,
        temperature: float,
        seed: int,
        stop: int,
        stop_strings: tuple[str, ...] = (),
        top_logprobs: int = 0,
    ) -> tuple[list[int], list[float], str, int, list[float]]:
        """Token ids, log-probs, finish reason, weight version and, with `top_logprobs`, entropies of one sampled turn."""
        from vllm import SamplingParams

        version = self.version
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed if temperature > 0 else None,
            logprobs=top_logprobs,
            stop_token_ids=[stop],
            # Only a protocol of tags needs the engine to read along; the ids stay as sampled, those of the tag included.
            detokenize=bool(stop_strings),
            stop=list(stop_strings),
            include_stop_str_in_output=bool(stop_strings),
            skip_special_tokens=False,
        )
        output = (await self._last_output(token_ids, params)).outputs[0]
        ids = list(output.token_ids)
        logprobs = [position[token].logprob for token, position in zip(ids, output.logprobs, strict=True)]
        entropies = [entropy(entry.logprob for entry in position.values()) for position in output.logprobs] if top_logprobs else []
        return ids, logprobs, output.finish_reason or "abort", version, entropies

    async def score(self, token_ids: list[int], first: int = 1, *, cached: bool = False) -> tuple[list[float], int, int]:
        """Raw log-probs of `token_ids[first:]`, the weight version that computed them, and the prompt tokens taken from the prefix cache.

        With `cached` the prefix cache may be read. vLLM then leaves the rows of cached positions as uninitialised memory, without
        an error: a context that ends on a block boundary, or a probe that was scored before, loses rows. Row `first` comes from the
        hidden state of token first - 1, so it is computed iff at most first - 1 tokens were cached; otherwise the request is repeated
        without the cache, and the last number returned still says what the first try found there. It is repeated, too, where the
        weights changed meanwhile.
        """
        assert 1 <= first < len(token_ids), f"tokens from {first} on of {len(token_ids)} cannot be scored"
        version = self.version
        output = await self._last_output(token_ids, _scoring_params(skip_cache=not cached))
        hits = output.num_cached_tokens
        assert hits is not None, "vLLM does not say how much of a prompt it took from its cache"
        if hits > first - 1:
            output = await self._last_output(token_ids, _scoring_params(skip_cache=True))
        if self.version != version:
            return await self.score(token_ids, first)
        # Some versions of vLLM return computed rows only: the end is the same in all. One token a row, that of the prompt.
        return output.prompt_logprobs.logprobs[first - len(token_ids) :], version, hits

    async def update_weights(self, entries: list[tuple[Any, ...]], version: int) -> None:
        """Load what the shared file holds and forget everything cached under the old weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.pause_generation(mode="keep", clear_cache=True)
        await self._engine.start_weight_update()
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"entries": tuple(entries)}))
        await self._engine.finish_weight_update(weight_version=str(version))
        self.version = version
        await self._engine.resume_generation()

    async def check_health(self) -> None:
        """Raises if the engine cannot serve."""
        await self._engine.check_health()

    def process_id(self) -> int:
        """Process of this actor; vLLM's own processes are below it."""
        return os.getpid()

    async def stop(self) -> None:
        """End vLLM's processes."""
        if self._engine is not None:
            self._engine.shutdown()

    async def _last_output(self, token_ids: list[int], params: Any) -> Any:
        output = None
        request = f"{self.number}-{next(self._requests)}"
        async for partial in self._engine.generate({"prompt_token_ids": token_ids}, params, request):
            output = partial
        assert output is not None, "vLLM ended a request without an output"
        return output


class EnginePool:
    """All engines of a run. Use as a context manager on the main rank; receives weights as a `types.WeightSink`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._engine = config.rollout.engine
        self._cuda = _uses_cuda(config)
        self._actors: list[Any] = []
        self._weights: SharedWeights | None = None
        self._ray_folder: Path | None = None
        self._group: Any = None
        self._stop_token, self._vocab_size = _end_of_turn(config.model.path)
        self._stop_strings = PROTOCOLS[config.rollout.protocol].stop

    # ---- life

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        self._start_ray()
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle: dict[str, float] = {"CPU": 1, **({"GPU": self._engine.tensor} if self._cuda else {})}
        self._group = placement_group([bundle] * self._engine.count, strategy="PACK")
        try:
            ray.get(self._group.ready(), timeout=self._engine.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise EngineError(
                f"Ray could not place {self._engine.count} engines of {bundle} within {self._engine.start_timeout_s:g} s; "
                f"the cluster has {ray.cluster_resources()}"
            ) from None
        self._weights = SharedWeights()
        remote = ray.remote(EngineActor)
        self._actors = [
            remote.options(
                num_cpus=1,
                num_gpus=self._engine.tensor if self._cuda else 0,
                max_concurrency=4096,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number),
                runtime_env={"env_vars": self._environment()},
            ).remote(number)
            for number in range(self._engine.count)
        ]
        started = [actor.start.remote(self._options(), str(self._weights.path)) for actor in self._actors]
        self._wait_for(started, "did not start", self._engine.start_timeout_s)
        if self._config.reward.scorer == "engine":
            self.self_test_scoring()

    def _start_ray(self) -> None:
        # Read when ray is imported: without it Ray replaces 127.0.0.1 by the machine's own address and listens on it.
        address = self._engine.ray_address
        if address is None or address.startswith("127."):
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = _ray_token()  # otherwise Ray writes one into the home folder
        import ray

        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        with _without_launcher_variables():
            if address is not None:
                os.environ.setdefault("RAY_AUTH_MODE", "token")  # of RAY_AUTH_TOKEN, or the one Ray keeps in the home folder
                try:
                    ray.init(address=address, **quiet)
                except (ConnectionError, ValueError, RuntimeError) as error:
                    raise EngineError(f"no Ray cluster answers at rollout.engine.ray_address={address}: {error}") from None
                return
            self._ray_folder = _ray_folder()
            self._ray_claim = claim(self._ray_folder)
            if self._cuda and self._engine.gpu_ids:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._engine.gpu_ids))
            ray.init(
                address="local",
                num_cpus=self._engine.count + 1,  # logical: what an engine really uses is its `threads`
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self._ray_folder),
                **quiet,
            )

    def close(self) -> None:
        """End the engines and everything this pool started."""
        import ray

        if ray.is_initialized():
            stopping = [actor.stop.remote() for actor in self._actors]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_TIMEOUT_S) if stopping else None
            for actor in self._actors:
                ray.kill(actor)
            if self._group is not None:
                from ray.util.placement_group import remove_placement_group

                remove_placement_group(self._group)
            ray.shutdown()
        self._actors, self._group = [], None
        if self._weights is not None:
            self._weights.close()
            self._weights = None
        if self._ray_folder is not None:
            shutil.rmtree(self._ray_folder, ignore_errors=True)
            os.close(self._ray_claim)
            self._ray_folder = None

    # ---- requests

    async def generate(
        self, token_ids: list[int], *, max_tokens: int, temperature: float, seed: int, key: str, top_logprobs: int = 0
    ) -> Completion:
        """Sample one turn on the engine that serves `key`. Raises EngineError when that engine cannot serve."""
        import ray

        number = self._serving(key)
        try:
            ids, logprobs, finish, version, entropies = await self._actors[number].generate.remote(
                token_ids, max_tokens, temperature, seed, self._stop_token, self._stop_strings, top_logprobs
            )
        except ray.exceptions.RayError as error:
            raise EngineError(f"engine {number} died or refused: {_cause(error)}") from None
        return Completion(ids, logprobs, finish if finish in ("stop", "length") else "abort", version, entropies)

    async def score_probe(self, token_ids: list[int], first: int, *, key: str, cached: bool = True) -> ProbeScore:
        """Log-probs of `token_ids[first:]` by the engine that serves `key`, from its prefix cache where that is safe and `cached`.

        Raises EngineError when that engine cannot serve, or says something that no log-prob can be.
        """
        import ray

        number = self._serving(key)
        try:
            logprobs, version, _ = await self._actors[number].score.remote(token_ids, first, cached=cached)
        except ray.exceptions.RayError as error:
            raise EngineError(f"engine {number} died or refused: {_cause(error)}") from None
        if not all(-math.inf < logprob <= 0.0 for logprob in logprobs):
            raise EngineError(f"engine {number} scored a probe with {logprobs}, which are no log-probs")
        return ProbeScore(tuple(logprobs), version)

    def score_on_each(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Raw log-probs of a sequence by every engine; the first token counts 0.0."""
        found = self._wait_for([actor.score.remote(list(token_ids)) for actor in self._actors], "could not score the canary")
        return [[0.0, *logprobs] for logprobs, _, _ in found]

    def score_on(self, number: int, token_ids: list[int], first: int, *, cached: bool) -> tuple[list[float], int]:
        """`score_probe` on engine `number`, waited for: log-probs, and the prompt tokens found in its prefix cache."""
        reference = self._actors[number].score.remote(token_ids, first, cached=cached)
        ((logprobs, _, hits),) = self._wait_for([reference], "could not score a probe", start=number)
        return logprobs, hits

    def self_test_scoring(self) -> float:
        """Largest |difference| between scores with and without the prefix cache, over the cases that are known to go wrong.

        Raises EngineError naming the engine where they differ by more than `_SELF_TEST_GAP`, or where no cached token was ever used.
        """
        draw = random.Random(0)

        def tokens(count: int) -> list[int]:
            return [draw.randrange(self._vocab_size) for _ in range(count)]

        bound = _SELF_TEST_GAP[self._config.model.dtype if self._engine.dtype == "auto" else self._engine.dtype]
        worst = 0.0
        for number in range(len(self._actors)):
            used = False
            # A context of whole blocks, and one that ends inside a block; each with a probe, the same again, and another one.
            for first in (_SELF_TEST_CONTEXT, _SELF_TEST_CONTEXT + 5):
                context, probe, other = tokens(first), tokens(_SELF_TEST_PROBE), tokens(_SELF_TEST_PROBE)
                for ending in (probe, probe, other):
                    # Rows that are not computed show freed memory, which must not happen to hold the right values.
                    self.score_on(number, tokens(first + _SELF_TEST_PROBE), first, cached=False)
                    found, hits = self.score_on(number, context + ending, first, cached=True)
                    plain, _ = self.score_on(number, context + ending, first, cached=False)
                    gaps = [abs(left - right) for left, right in zip(found, plain, strict=True)]
                    gap = max(gaps) if all(map(math.isfinite, gaps)) else math.inf  # max() would lose a nan
                    if not gap <= bound:
                        raise EngineError(
                            f"engine {number} scores a probe differently by {gap:.3g} with its prefix cache, more than {bound:g}: "
                            "use reward.scorer=fold with this version of vLLM"
                        )
                    worst, used = max(worst, gap), used or 0 < hits < first
            if not used:
                raise EngineError(
                    f"engine {number} did not use its prefix cache to score: use reward.scorer=fold with this version of vLLM"
                )
        return worst

    def _serving(self, key: str) -> int:
        """Engine of a key: always the same, so that its prefix cache knows the context."""
        return zlib.crc32(key.encode()) % len(self._actors)

    def update_weights(self, named_tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Replace all weights in all engines; returns when they serve `version`."""
        assert self._weights is not None
        entries: list[Entry] = self._weights.write(named_tensors)
        rows = [astuple(entry) for entry in entries]
        self._wait_for([actor.update_weights.remote(rows, version) for actor in self._actors], f"did not take weights {version}")

    def check_health(self) -> None:
        """Raises EngineError naming the first engine that cannot serve."""
        self._wait_for([actor.check_health.remote() for actor in self._actors], "is not healthy", 60)

    def process_ids(self) -> list[int]:
        """Process id of every actor, for tests and for people who look for them."""
        return self._wait_for([actor.process_id.remote() for actor in self._actors], "does not answer", 60)

    def _wait_for(self, references: list[Any], what: str, timeout_s: float = _OPERATION_TIMEOUT_S, start: int = 0) -> list[Any]:
        """Results of one call to each engine from number `start` on. Raises EngineError naming the first that fails."""
        import ray

        results = []
        for number, reference in enumerate(references, start):
            try:
                results.append(ray.get(reference, timeout=timeout_s))
            except ray.exceptions.GetTimeoutError:
                raise EngineError(f"engine {number} {what} within {timeout_s:g} s{self._last_log_lines()}") from None
            except ray.exceptions.RayError as error:
                raise EngineError(f"engine {number} {what}: {_cause(error)}{self._last_log_lines()}") from None
        return results

    # ---- settings

    def _options(self) -> dict[str, Any]:
        rollout, engine = self._config.rollout, self._engine
        dtype = self._config.model.dtype if engine.dtype == "auto" else engine.dtype
        device: dict[str, Any] = (
            {"gpu_memory_utilization": engine.gpu_memory_utilization}
            if self._cuda
            else {
                "enforce_eager": True,
                "kv_cache_memory_bytes": engine.kv_cache_mib * 2**20,
                # A seeded request whose prefill is cut in chunks kills vLLM 0.32's CPU worker: its generators cannot be set back.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(rollout.max_context, _CPU_BATCH_TOKENS),
                # The smallest that its CPU attention takes; by default 128, of which a turn computes half a block again.
                "block_size": 32,
            }
        )
        return {
            "model": str(self._config.model.path),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
            "tensor_parallel_size": engine.tensor,
            "max_model_len": rollout.max_context,
            "max_num_seqs": engine.max_num_seqs,
            "seed": self._config.run.seed,
            "skip_tokenizer_init": not self._stop_strings,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": _most_logprobs(rollout.branching),
            "disable_log_stats": True,
            **device,
        }

    def _environment(self) -> dict[str, str]:
        threads = str(self._engine.threads)
        cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads, "VLLM_TARGET_DEVICE": "cpu"}
        return {**_QUIET, "IGPO_ENGINE_PROCESS": "1", "VLLM_HOST_IP": "127.0.0.1", **({} if self._cuda else cpu)}

    def _last_log_lines(self) -> str:
        """The end of the engine processes' error output, for a message; empty where Ray was not started here."""
        if self._ray_folder is None:
            return ""
        files = sorted(self._ray_folder.glob("session_*/logs/worker-*.err"), key=lambda path: path.stat().st_mtime)
        lines = [line for path in files for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return "\nlast lines of the engine's log:\n  " + "\n  ".join(lines[-_LOG_LINES:]) if lines else ""


def entropy(logprobs: Iterable[float]) -> float:
    """-sum p ln p of the tokens given, nats; what they leave out counts nothing."""
    return -math.fsum(math.exp(logprob) * logprob for logprob in logprobs if logprob > -math.inf)


def _most_logprobs(branching: Branching) -> int:
    """Log-probs per token that vLLM must be ready to give; -1 for all."""
    if isinstance(branching, NoBranching):
        return _VLLM_LOGPROBS
    return -1 if branching.entropy == "full" else max(branching.top_k, _VLLM_LOGPROBS)


def _cause(error: BaseException) -> str:
    """The last line of a Ray error says what happened; the rest is where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _uses_cuda(config: Config) -> bool:
    if config.run.device != "auto":
        return config.run.device == "cuda"
    import torch

    return torch.cuda.is_available()


def _ray_folder() -> Path:
    """A new folder for Ray's sockets and logs; those of runs that were killed are removed."""
    temporary = Path(tempfile.gettempdir())
    remove_abandoned(temporary, _RAY_PREFIX)
    folder = Path(tempfile.mkdtemp(prefix=_RAY_PREFIX))
    length, room = len(os.fsencode(folder)), _SOCKET_PATH_BYTES - _RAY_SOCKET_BYTES
    if length > room:
        folder.rmdir()
        raise EngineError(f"{folder} is too long a path for Ray's sockets ({length} bytes, at most {room}); set TMPDIR to a shorter one")
    return folder


@functools.cache
def _ray_token() -> str:
    """One for all pools of this process: Ray reads its token once and keeps it."""
    return secrets.token_hex(16)


def _scoring_params(*, skip_cache: bool) -> Any:
    """One token is sampled because vLLM wants to; `detokenize` must stay off, since garbage rows have garbage ids."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        flat_logprobs=True,  # not a dict for every token of the context
        detokenize=False,
        skip_reading_prefix_cache=skip_cache,
    )


def _end_of_turn(model: Path) -> tuple[int, int]:
    """End-of-turn token and number of tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer.eos_token_id, len(tokenizer)


@contextlib.contextmanager
def _without_launcher_variables() -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _LAUNCHER_VARIABLES.fullmatch(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)
