"""The interface of all engines, and their errors."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from igpo_megatron.types import Completion, ProbeScore, RunStopped, WeightSink


class EngineError(RunStopped):
    """An engine cannot serve; the message names it and says why."""


class EnginesEnded(RunStopped):
    """No engine can serve any more; this ends the run, not only a trajectory."""


class Engine(Protocol):
    """Continues token sequences and scores probes."""

    async def generate(
        self,
        token_ids: list[int],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        key: str,
        top_logprobs: int = 0,
        experts_from: int | None = None,
    ) -> Completion:
        """Sample one turn. Requests with the same `key` go to the same engine, to use its prefix cache. Raises EngineError.

        `top_logprobs` other than 0 requests entropies, over that many of the likeliest tokens or, if -1, over all. `experts_from` requests
        the experts of the context's tokens from there on, and of the sampled ones.
        """
        ...

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        """Log-probs of `token_ids[first:]` after those before them; `key` as for `generate`. Raises EngineError."""
        ...


class EngineService(Engine, WeightSink, Protocol):
    """All engines of a run: they continue token sequences, score probes and take new weights. Entered and left on the main rank."""

    def __enter__(self) -> Self:
        """Start; returns when requests are served with the weights of the model's folder. Raises RunStopped."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    def sleep(self) -> None:
        """Leave the device to the policy until the next weights arrive. Call it between rollouts."""
        ...
