"""One engine in the main rank's process, without vLLM and Ray: a thread that decodes all running turns together.

    generate ──> waiting turns ──prefill──> running turns, a slot each ──one token for all──> done
    score_probe ──> waiting probes ──────── scored together between two tokens ──────────────> done
    update_weights ──> the thread stops between two tokens ──> load ──> canary ──> it continues

As with vLLM's pause, turns in flight are frozen while weights are exchanged. Their caches are dropped, and recomputed with the new weights
when the turns continue. A turn's version is that of its first token. An error in the thread ends the run.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from igpo_megatron.chat.protocols.registry import protocol_of
from igpo_megatron.chat.tokenizer import embedding_rows, load_tokenizer
from igpo_megatron.chat.turn_ends import barred_rows, stop_tokens
from igpo_megatron.config.schema import Config
from igpo_megatron.engines.api import EngineError, EnginesEnded, require_logprobs
from igpo_megatron.engines.torch_engine.model import TorchModel
from igpo_megatron.engines.torch_engine.sampling import choose, entropies, processed_logprobs
from igpo_megatron.supervision.waits import ENGINES, waiting
from igpo_megatron.types import Canary, Completion, Metric, NamedTensors, ProbeScore, RunStopped, SamplingRequest, SyncError
from igpo_megatron.weights.send import check_canary

_NAME = "engine 0"
_BATCH_TOKENS = 8192
"""Most padded tokens of a prefill or a batch of probes with more than one sequence."""

_END_TIMEOUT_S = 20


@dataclass(eq=False, slots=True)
class _Turn:
    """One turn being sampled."""

    request: SamplingRequest
    """Its `max_tokens` fit the context."""

    draws: random.Random
    done: Future[Completion] = field(default_factory=Future)
    version: int = -1
    """Version of the weights that sampled the first token; -1 before it."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None
    """Why it has ended; None while it is running."""

    @property
    def length(self) -> int:
        """Tokens whose keys and values are, or will be, cached when the next one is sampled."""
        return len(self.request.token_ids) + len(self.token_ids)


@dataclass(eq=False, slots=True)
class _Probe:
    """One sequence to score from `first` on."""

    token_ids: list[int]
    first: int
    done: Future[ProbeScore] = field(default_factory=Future)


class TorchEngine:
    """The policy in transformers on the main rank's device (`engines.api.EngineService`)."""

    def __init__(self, config: Config) -> None:
        self._config, self._engine = config, config.rollout.engine
        self._tokenizer = load_tokenizer(config.model.path)
        self._stop_strings = protocol_of(config.rollout).stop
        # Every token is at least one byte, so a stop string that ends in the newest token spans at most so many tokens.
        self._stop_window = max((len(stop.encode()) for stop in self._stop_strings), default=0)
        rows = embedding_rows(config.model.path)
        self._stop_tokens = frozenset(stop_tokens(self._tokenizer, rows))
        self._barred_rows = barred_rows(self._tokenizer, rows)
        self._barred: torch.Tensor | None = None
        self._slots = self._engine.cache_slots(config.rollout.max_context, config.model.dtype, config.model.shape())
        self._device = torch.device("cpu")
        self._model: TorchModel | None = None
        self._version = 0
        self._asleep = False
        # The following belongs to the thread while it steps, and otherwise to the holder of the condition.
        self._state = threading.Condition()
        self._open: set[_Turn | _Probe] = set()
        """Requests whose callers wait."""

        self._waiting: deque[_Turn] = deque()
        self._probes: deque[_Probe] = deque()
        self._running: list[_Turn] = []
        self._stepping = self._frozen = self._closing = False
        self._problem: RunStopped | None = None
        self._thread = threading.Thread(target=self._work, name=_NAME, daemon=True)

    # ---- life

    def begin(self) -> None:
        """Nothing: it starts in this process, when it is entered."""

    def __enter__(self) -> Self:
        device = self._device = _device(self._config)
        self._model = TorchModel(
            self._config.model.path,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[self._engine.dtype_for(self._config.model.dtype)],
            device=device,
            slots=self._slots,
            capacity=self._config.rollout.max_context,
        )
        if self._barred_rows:
            self._barred = torch.zeros(self._model.vocab_size, dtype=torch.bool, device=device)
            self._barred[self._barred_rows] = True
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; waiting requests fail."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        if self._thread.is_alive():
            self._thread.join(_END_TIMEOUT_S)
        self._stop(EnginesEnded("the engines were closed"))

    def _stop(self, problem: RunStopped) -> None:
        """The run cannot go on: fail all waiting and all future requests."""
        with self._state:
            self._problem = self._problem or problem
            left = list(self._open)
            self._state.notify_all()
        for request in left:
            with suppress(InvalidStateError):
                request.done.set_exception(self._problem)

    def _answer(self, request: Any, answer: Any) -> None:
        """Answer a request, unless its caller has given up or been told of a problem."""
        with suppress(InvalidStateError):
            request.done.set_result(answer)

    # ---- requests

    async def generate(self, request: SamplingRequest) -> Completion:
        """Sample one turn. Raises EngineError if it does not fit the context or takes too long."""
        assert request.experts_from is None, "this engine returns no experts"
        room = self._config.rollout.max_context - len(request.token_ids)
        self._require("a turn", request.token_ids, room)
        turn = _Turn(replace(request, max_tokens=min(request.max_tokens, room)), random.Random(request.seed))
        return await self._ask("a turn", turn, self._waiting)

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        """Raw log-probs of `token_ids[first:]`. Raises EngineError if they are not valid, or take too long."""
        assert 1 <= first < len(token_ids), f"tokens from {first} on of {len(token_ids)} cannot be scored"
        self._require("a probe", token_ids, self._config.rollout.max_context + 1 - len(token_ids))
        probe = _Probe(list(token_ids), first)
        return require_logprobs(await self._ask("a probe", probe, self._probes), _NAME)

    async def _ask(self, what: str, request: Any, queue: deque[Any]) -> Any:
        with self._state:
            if self._problem is not None:
                raise self._problem
            queue.append(request)
            self._open.add(request)
            self._state.notify_all()
        limit = self._engine.request_timeout_s
        try:
            with waiting(what, on=_NAME, who=ENGINES):
                async with asyncio.timeout(limit):
                    return await asyncio.wrap_future(request.done)
        except TimeoutError:
            raise EngineError(f"{_NAME} did not answer {what} within rollout.engine.request_timeout_s={limit:g}") from None
        finally:
            with self._state:
                self._open.discard(request)

    def _require(self, what: str, token_ids: Sequence[int], room: int) -> None:
        """Refuse a request that would make its batch fail."""
        rows = self._served.vocab_size
        if room < 1:
            raise EngineError(f"{_NAME} refused {what}: {len(token_ids)} tokens leave no room in rollout.max_context")
        if not token_ids or not all(0 <= token < rows for token in token_ids):
            raise EngineError(f"{_NAME} refused {what}: its context is empty, or has tokens beyond the {rows} rows of the embedding")

    # ---- the thread

    def _work(self) -> None:
        try:
            # A new thread uses the first GPU, whatever its parent uses.
            with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
                while self._may_step():
                    try:
                        self._step()
                    finally:
                        with self._state:
                            self._stepping = False
                            self._state.notify_all()
        except Exception as error:  # noqa: BLE001  (otherwise all requests would wait for ever)
            self._stop(EnginesEnded(f"{_NAME} failed: {type(error).__name__}: {error}"))

    def _may_step(self) -> bool:
        """Wait for work; False at the end."""
        with self._state:
            self._state.wait_for(lambda: self._closing or self._problem or (not self._frozen and self._has_work))
            self._stepping = not self._closing and self._problem is None
            return self._stepping

    @property
    def _has_work(self) -> bool:
        return bool(self._waiting or self._probes or self._running)

    def _step(self) -> None:
        """Sample one token for every new and running turn, and score the waiting probes."""
        if admitted := self._take(self._waiting, self._slots - len(self._running)):
            logits = self._served.prefill([turn.request.token_ids + turn.token_ids for turn in admitted], len(self._running))
            self._running += admitted
            self._append(admitted, logits)
            self._retire()
        if self._running:
            tokens, positions = [turn.token_ids[-1] for turn in self._running], [turn.length - 1 for turn in self._running]
            self._append(self._running, self._served.decode(tokens, positions))
            self._retire()
        if probes := self._take(self._probes, len(self._probes)):
            scores = self._served.score([probe.token_ids for probe in probes], [probe.first for probe in probes])
            for probe, logprobs in zip(probes, scores, strict=True):
                self._answer(probe, ProbeScore(tuple(logprobs), self._version))

    def _take(self, queue: deque[Any], most: int) -> list[Any]:
        """The first requests of a queue, as many as fit into one batch; cancelled ones are dropped."""
        taken: list[Any] = []
        longest = 0
        with self._state:
            while queue and len(taken) < most:
                if queue[0].done.cancelled():
                    queue.popleft()
                    continue
                longest = max(longest, _tokens(queue[0]))
                if taken and longest * (len(taken) + 1) > _BATCH_TOKENS:
                    break
                taken.append(queue.popleft())
        return taken

    def _append(self, turns: Sequence[_Turn], logits: torch.Tensor) -> None:
        """Sample the next token of each turn."""
        device = logits.device
        temperatures = torch.tensor([turn.request.temperature for turn in turns], device=device)
        uniforms = torch.tensor([turn.draws.random() for turn in turns], dtype=torch.float64, device=device)
        logprobs = processed_logprobs(logits, temperatures, self._barred)
        tokens = choose(logprobs, temperatures, uniforms)
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
        if not all(map(math.isfinite, chosen)):
            raise ArithmeticError("it computed logits that are not finite numbers")
        spread = {top: entropies(logprobs, tokens, top).tolist() for top in {turn.request.top_logprobs for turn in turns} - {0}}
        for row, (turn, token, logprob) in enumerate(zip(turns, tokens.tolist(), chosen, strict=True)):
            turn.version = self._version if turn.version < 0 else turn.version
            turn.token_ids.append(token)
            turn.logprobs.append(logprob)
            if top := turn.request.top_logprobs:
                turn.entropies.append(spread[top][row])
            turn.finish = self._finish(turn)

    def _retire(self) -> None:
        """Answer the turns that have ended, and move the last turns into their slots."""
        for slot in reversed(range(len(self._running))):
            turn = self._running[slot]
            if turn.finish is None and not turn.done.cancelled():
                continue
            last = self._running.pop()
            if slot < len(self._running):
                self._running[slot] = last
                self._served.move(len(self._running), slot, last.length - 1)
            if turn.finish is not None:
                self._answer(turn, Completion(turn.token_ids, turn.logprobs, turn.finish, turn.version, turn.entropies))

    def _finish(self, turn: _Turn) -> Literal["stop", "length"] | None:
        """Why a turn ends here; None if it continues."""
        if turn.token_ids[-1] in self._stop_tokens:
            return "stop"
        if self._stop_strings:
            text = self._tokenizer.decode(turn.token_ids[-self._stop_window :], skip_special_tokens=False)
            if any(stop in text for stop in self._stop_strings):
                return "stop"
        return "length" if len(turn.token_ids) >= turn.request.max_tokens else None

    # ---- weights

    def update_weights(
        self, named_tensors: NamedTensors, version: int, canary: Canary | None = None, exported: Callable[[], None] | None = None
    ) -> dict[str, float]:
        """Replace all weights and serve them as `version` once they have passed the canary; returns metrics. Raises SyncError.

        New requests wait meanwhile, and turns in flight continue afterwards. A sleeping engine first allocates memory for the weights,
        and for its cache when `exported` has returned.
        """
        started = time.monotonic()
        self._freeze()
        try:
            if self._asleep:
                self._served.take_weights()
            nbytes = self._served.load(named_tensors, version, _NAME)
            if exported is not None:
                exported()
            if self._asleep:
                self._served.take_cache()
                self._asleep = False
            loaded, gap = time.monotonic(), None
            if canary is not None:
                (served,) = self._served.score([canary.token_ids], [1])
                gap = check_canary(canary, served, version, 0)
        except SyncError as error:
            self._stop(error)
            raise
        self._version = version
        self._resume()
        return {
            Metric.SYNC_MIB: nbytes / 2**20,
            "sync/load_s": loaded - started,
            Metric.SYNC_CANARY_S: time.monotonic() - loaded,
            **({} if gap is None else {Metric.CANARY_GAP: gap}),
        }

    def sleep(self) -> None:
        """Free the device's memory when the last request has ended; the next weights end the sleep."""
        with self._state:
            limit = self._config.sync.base_s
            if not self._state.wait_for(lambda: self._problem or not (self._has_work or self._stepping), timeout=limit):
                raise EnginesEnded(f"{_NAME} did not go to sleep within sync.base_s={limit:g}: it still has requests")
            if self._problem is not None:
                raise self._problem
            self._frozen = self._asleep = True
        self._served.leave()

    def _freeze(self) -> None:
        """Stop the thread between two tokens; turns in flight will be prefilled again."""
        with self._state:
            if self._problem is not None:
                raise self._problem
            self._frozen = True
            limit = self._config.sync.base_s
            if not self._state.wait_for(lambda: not self._stepping, timeout=limit):
                self._stop(EnginesEnded(f"{_NAME} did not stop for new weights within sync.base_s={limit:g}: a forward pass of it hangs"))
            if self._problem is not None:
                raise self._problem
            self._waiting.extendleft(reversed(self._running))
            self._running = []

    def _resume(self) -> None:
        with self._state:
            self._frozen = False
            self._state.notify_all()

    @property
    def _served(self) -> TorchModel:
        assert self._model is not None, "the engine was not entered"
        return self._model


def _tokens(request: _Turn | _Probe) -> int:
    return request.length if isinstance(request, _Turn) else len(request.token_ids)


def _device(config: Config) -> torch.device:
    """The main rank's device."""
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
