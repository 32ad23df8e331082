"""vLLM engines as one service: requests go to engines with the newest weights, and survive the loss of an engine.

    generate, score_probe ──> a HEALTHY engine (fleet.py) ──Ray──> EngineActor: an AsyncLLM with prefix cache ──> vLLM workers
    update_weights ──> Transfer (weights/send.py) over transports ──> fingerprints ──> canary ──> HEALTHY

A turn whose engine dies is generated again with the same seed, by another engine or after the restart.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from igpo_megatron.chat.protocols.registry import protocol_of
from igpo_megatron.chat.tokenizer import embedding_rows, load_tokenizer
from igpo_megatron.chat.turn_ends import sampling_limits, stop_tokens
from igpo_megatron.config.schema import Config
from igpo_megatron.engines.actor import EngineLost
from igpo_megatron.engines.api import EngineError, require_logprobs
from igpo_megatron.engines.fleet import EngineState, Fleet, Member, is_lost
from igpo_megatron.engines.ray_cluster import RayCluster
from igpo_megatron.supervision.waits import ENGINES, waiting
from igpo_megatron.types import Canary, Completion, Metric, NamedTensors, ProbeScore, SamplingRequest, SyncError
from igpo_megatron.weights.send import Transfer, Transport, cause, check_canary, export, fingerprints, largest_gap
from igpo_megatron.weights.store import Bucket, SharedWeights
from igpo_megatron.weights.transports import EngineReceiver, FileTransport

_OPERATION_TIMEOUT_S = 600
_TEST_CONTEXT, _TEST_PROBE = 128, 12  # 128 tokens fill complete KV blocks of any size in use
_TEST_GAP = {"fp32": 1e-4, "bf16": 0.1}


@dataclass(frozen=True, slots=True)
class Synced:
    """The newest weights, whose bytes are in the shared file, for restarted engines."""

    version: int
    buckets: tuple[Bucket, ...]
    canary: Canary | None


class EnginePool:
    """All engines of a run. Use as a context manager on the main rank; receives weights as a `types.WeightSink`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._engine = config.rollout.engine
        self._cuda = _uses_cuda(config)
        tokenizer = load_tokenizer(config.model.path)
        self._vocab_size = len(tokenizer)
        embedding = embedding_rows(config.model.path)
        stops = protocol_of(config.rollout).stop
        self._turns: dict[str, Any] = {
            "stop_token_ids": list(stop_tokens(tokenizer, embedding)),
            # Only tag protocols need text in the engine; the ids stay as sampled, those of the tag included.
            "detokenize": bool(stops),
            "stop": list(stops),
            "include_stop_str_in_output": bool(stops),
            "skip_special_tokens": False,
            **sampling_limits(tokenizer, embedding),
        }
        """vLLM's SamplingParams of every turn."""

        self._opened, self._begun = ExitStack(), False
        self._weights: SharedWeights  # these two from `begin` on
        self._fleet: Fleet
        self._native: Any = None
        self._synced: Synced | None = None
        self._versions = {0}  # 0: the weights of the model's folder
        self._asleep = False
        self._sync_lock = threading.Lock()

    # ---- life

    def begin(self) -> None:
        """Start Ray and let the engines start beside what follows; entering the pool waits for them. `close` ends them before that, too."""
        with ExitStack() as opened:
            self._weights = SharedWeights()
            opened.callback(self._weights.close)
            cluster = RayCluster(self._config, cuda=self._cuda)
            opened.callback(cluster.close)
            self._fleet = Fleet(self._config, cluster, self._weights.path, cuda=self._cuda, turns=self._turns, fill=self._fill)
            opened.callback(self._fleet.close)
            opened.callback(self._close_native)
            self._fleet.begin()
            self._opened, self._begun = opened.pop_all(), True

    def __enter__(self) -> Self:
        if not self._begun:
            self.begin()
        with ExitStack() as opened:
            opened.callback(self.close)
            self._fleet.wait()
            if self._config.reward.scorer == "engine":
                self.self_test_scoring()
            opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines and everything this pool started."""
        self._opened.close()

    def _close_native(self) -> None:
        if self._native is not None:
            self._native.close()
            self._native = None

    # ---- requests

    async def generate(self, request: SamplingRequest) -> Completion:
        """Sample one turn, on the engine of its key if that can serve. Raises EngineError if none can in time."""
        number, completion = await self._ask(request.key, "a turn", lambda actor: actor.generate.remote(request))
        self._require_known(completion.weight_version, number)
        return completion

    async def score_probe(self, token_ids: list[int], first: int, *, key: str, cached: bool = True) -> ProbeScore:
        """Log-probs of `token_ids[first:]` by the engine of `key`; with `cached` its prefix cache is used if that is safe.

        Raises EngineError if none can serve in time, or if a result is not a valid log-prob.
        """
        number, (score, _) = await self._ask(key, "a probe", lambda actor: actor.score.remote(token_ids, first, cached=cached))
        self._require_known(score.weight_version, number)
        return require_logprobs(score, f"engine {number}")

    async def _ask(self, key: str, what: str, call: Callable[[Any], Any]) -> tuple[int, Any]:
        """(number of the engine that answered, its answer); repeated if an engine is lost meanwhile."""
        import ray

        limit = self._engine.request_timeout_s
        deadline = asyncio.get_running_loop().time() + limit
        while True:
            member = await self._serving(key, what, deadline)
            actor = member.actor
            try:
                with waiting(what, on=f"engine {member.number}", who=ENGINES):
                    async with asyncio.timeout_at(deadline):
                        return member.number, await self._unless_stopped(call(actor))
            except TimeoutError:
                raise EngineError(
                    f"engine {member.number} did not answer {what} within rollout.engine.request_timeout_s={limit:g}"
                ) from None
            except (ray.exceptions.RayError, EngineLost) as error:
                if not is_lost(error):
                    raise EngineError(f"engine {member.number} refused {what}: {cause(error)}") from None
                self._fleet.lost(member, actor, error)

    async def _unless_stopped(self, asked: Any) -> Any:
        """The answer; raises the run's problem if that comes first."""
        answer = asyncio.ensure_future(asked)
        try:
            while True:
                change = self._fleet.changes.next()
                try:
                    if self._fleet.problem is not None:
                        raise self._fleet.problem
                    await asyncio.wait((answer, change), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
                if answer.done():
                    return answer.result()
        finally:
            answer.cancel()

    async def _serving(self, key: str, what: str, deadline: float) -> Member:
        """The engine of a key, always the same one to use its prefix cache; another one while it cannot serve."""
        members = self._fleet.members
        first = zlib.crc32(key.encode()) % len(members)
        while True:
            change = self._fleet.changes.next()
            try:
                if self._fleet.problem is not None:
                    raise self._fleet.problem
                for member in [*members[first:], *members[:first]]:
                    if member.state is EngineState.HEALTHY:
                        return member
                with waiting(what, on="engines that are started or take weights", who=ENGINES):
                    async with asyncio.timeout_at(deadline):
                        await change
            except TimeoutError:
                states = ", ".join(f"engine {member.number} is {member.state}" for member in members)
                raise EngineError(
                    f"{what} found no engine within rollout.engine.request_timeout_s={self._engine.request_timeout_s:g}: {states}"
                ) from None
            finally:
                change.cancel()

    def _require_known(self, version: int, number: int) -> None:
        if version not in self._versions:
            raise EngineError(f"engine {number} answered with weights {version}, which it was never given: {sorted(self._versions)[-3:]}")

    # ---- blocking scores

    def score_on_each(self, token_ids: Sequence[int]) -> list[list[float]]:
        """Raw log-probs of a sequence by every engine, 0.0 for the first token. Raises EngineError naming one that cannot."""
        numbers = range(len(self._fleet.members))
        return [[0.0, *self.score_on(number, list(token_ids), 1, cached=False)[0]] for number in numbers]

    def score_on(self, number: int, token_ids: list[int], first: int, *, cached: bool) -> tuple[list[float], int]:
        """Blocking `score_probe` on engine `number`: log-probs, and the prompt tokens found in its prefix cache."""
        member = self._fleet.members[number]
        reference = member.actor.score.remote(token_ids, first, cached=cached)
        score, hits = self._fleet.wait_for(member, reference, "could not score a probe", _OPERATION_TIMEOUT_S)
        return list(score.logprobs), hits

    def self_test_scoring(self) -> float:
        """Largest |difference| that the prefix cache makes to scores, over all engines. Raises EngineError if it is too large."""
        dtype = self._engine.dtype_for(self._config.model.dtype)
        numbers = range(len(self._fleet.members))
        return max(check_prefix_cache(number, partial(self.score_on, number), self._vocab_size, dtype) for number in numbers)

    # ---- weights

    def sleep(self) -> None:
        """Leave the device to the policy: engines get no requests before the next weights arrive. Call it between rollouts."""
        with self._sync_lock:
            for member in self._awake():
                self._fleet.set_state(member, EngineState.STALE)
                self._tell(member, member.actor.sleep.remote(self._config.placement.sleep_level), "did not go to sleep")
            self._asleep = True

    def _wake(self, part: str) -> None:
        for member in self._awake():
            self._tell(member, member.actor.wake.remote(part), f"did not take the memory of its {part} again")

    def _awake(self) -> list[Member]:
        """Engines that are running, asleep or not."""
        return [member for member in self._fleet.members if member.state in (EngineState.HEALTHY, EngineState.STALE)]

    def _tell(self, member: Member, reference: Any, what: str) -> None:
        actor = member.actor
        try:
            self._fleet.wait_for(member, reference, what, self._config.sync.base_s)
        except EngineError as error:
            self._fleet.lost(member, actor, error)

    def update_weights(
        self, named_tensors: NamedTensors, version: int, canary: Canary | None = None, exported: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """Replace all weights in all engines; returns metrics when they serve `version` and have passed the canary, if one is given.

        Sleeping engines first allocate memory for the weights. `exported` is called when all tensors have been sent, and then the engines
        allocate the rest: on a shared device the policy leaves in between.

        Requests in flight are frozen meanwhile and continue afterwards; new ones wait. An engine that dies meanwhile is restarted and
        filled later. Raises SyncError naming the engine and the first tensor that differs from its export, or the run's own problem.
        """
        with self._sync_lock:
            if self._fleet.problem is not None:
                raise self._fleet.problem
            before = fingerprints(self._synced.buckets) if self._synced else {}
            self._synced = None  # the file is about to change
            if self._asleep:
                self._wake("weights")
            members = self._awake()
            actors = [member.actor for member in members]
            for member in members:
                self._fleet.set_state(member, EngineState.STALE)
            self._versions.add(version)
            transfer = Transfer(version, self._config.sync, is_lost, before)
            source = export(named_tensors, self._weights, self._config.sync.bucket_mib * 2**20)
            try:
                transfer.run(source, self._transports(members))
                if exported is not None:
                    exported()
                if self._asleep:
                    self._wake("kv_cache")
                    self._asleep = False
                self._synced = Synced(version, tuple(transfer.buckets), canary)
                started, worst = time.monotonic(), 0.0
                for member, actor in zip(members, actors, strict=True):
                    lost = transfer.lost.get(f"engine {member.number}")
                    try:
                        if lost is not None:
                            raise EngineError(f"it was lost in sync {version}: {cause(lost)}")
                        worst = max(worst, self._ask_canary(member))
                    except EngineError as error:
                        self._fleet.lost(member, actor, error)
            except SyncError as error:
                self._fleet.stop(error)  # wakes requests that wait for these weights
                assert self._fleet.problem is not None
                raise self._fleet.problem from None  # Ray may have ended first
            for member, actor in zip(members, actors, strict=True):
                if member.actor is actor and member.state is EngineState.STALE:
                    self._fleet.set_state(member, EngineState.HEALTHY)
            return {
                **transfer.metrics(),
                Metric.SYNC_CANARY_S: time.monotonic() - started,
                **({Metric.CANARY_GAP: worst} if canary else {}),
                **self.metrics(),
            }

    def metrics(self) -> dict[str, float]:
        """`engine_restarts`: restarts so far."""
        return {"engine_restarts": float(sum(member.restarts for member in self._fleet.members))}

    def _fill(self, member: Member) -> None:
        """Give a started engine the newest weights from the file, if there are any yet, and check the canary."""
        with self._sync_lock:
            if member.state is not EngineState.STALE:
                return  # a sync has filled it already
            if self._synced is not None:
                transfer = Transfer(self._synced.version, self._config.sync, is_lost)
                transfer.run(((bucket, ()) for bucket in self._synced.buckets), self._files([member]))
                for error in transfer.lost.values():
                    raise EngineError(f"engine {member.number} was lost when it was given weights {self._synced.version}: {cause(error)}")
                self._ask_canary(member)
            self._fleet.set_state(member, EngineState.HEALTHY)

    def _ask_canary(self, member: Member) -> float:
        """The gap to the policy that `check_canary` returns. Raises SyncError, or EngineError if the engine does not answer."""
        assert self._synced is not None
        canary = self._synced.canary
        if canary is None:
            return 0.0
        reference = member.actor.score.remote(list(canary.token_ids))
        score, _ = self._fleet.wait_for(member, reference, "could not score the canary", self._config.sync.base_s)
        version = self._synced.version
        assert score.weight_version == version, f"engine {member.number} reports that it serves {score.weight_version}"
        return check_canary(canary, score.logprobs, version, member.number)

    def _transports(self, members: Sequence[Member]) -> list[Transport]:
        kind = self._config.sync.transport
        if kind not in ("nccl", "ipc"):
            return self._files(members)
        from igpo_megatron.weights.cuda_transports import Native

        receivers = _receivers(members)
        if self._native is None or not self._native.reaches(receivers):
            self._close_native()
            self._native = Native(kind, receivers, self._engine.tensor, self._config.sync)
        return [self._native]

    def _files(self, members: Sequence[Member]) -> list[Transport]:
        """Transports for the bytes of the shared file."""
        kind = self._config.sync.transport
        away = [member.number for member in members if not member.is_local]
        if away and kind == "shared_memory":
            raise EngineError(f"sync.transport=shared_memory reaches engines on this machine only; {away} are not: use auto")
        near = [member for member in members if member.is_local and kind != "object_store"]
        far = [member for member in members if member not in near]
        return [FileTransport(_receivers(some), copied) for some, copied in ((near, None), (far, self._weights)) if some]


def _receivers(members: Sequence[Member]) -> list[EngineReceiver]:
    return [EngineReceiver(member.number, member.actor) for member in members]


def check_prefix_cache(number: int, score: Callable[..., tuple[list[float], int]], vocab_size: int, dtype: str) -> float:
    """Try the cases in which vLLM is known to score wrongly; returns the largest |difference| that engine `number`'s prefix cache makes.

    `score(token_ids, first, cached=...)` returns log-probs and the number of cached tokens. Raises EngineError if they differ by more than
    rounding, or if no cached token was ever used.
    """
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    bound = _TEST_GAP[dtype]
    worst, used = 0.0, False
    # A context of complete blocks, and one that ends inside a block; each with a probe, the same again, and another one.
    for first in (_TEST_CONTEXT, _TEST_CONTEXT + 5):
        context, probe, other = tokens(first), tokens(_TEST_PROBE), tokens(_TEST_PROBE)
        for ending in (probe, probe, other):
            # Rows that are not computed are freed memory, which must not contain the right values by chance.
            score(tokens(first + _TEST_PROBE), first, cached=False)
            found, hits = score(context + ending, first, cached=True)
            plain, _ = score(context + ending, first, cached=False)
            gap = largest_gap(plain, found)
            if not gap <= bound:
                raise EngineError(
                    f"engine {number} scores a probe differently by {gap:.3g} with its prefix cache, more than {bound:g}: "
                    "use reward.scorer=fold with this version of vLLM"
                )
            worst, used = max(worst, gap), used or 0 < hits < first
    if not used:
        raise EngineError(f"engine {number} did not use its prefix cache to score: use reward.scorer=fold with this version of vLLM")
    return worst


def _uses_cuda(config: Config) -> bool:
    if config.run.device != "auto":
        return config.run.device == "cuda"
    import torch

    return torch.cuda.is_available()
