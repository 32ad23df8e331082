"""The interface of all engines, and their errors."""

from __future__ import annotations

import math
from typing import Protocol, Self

from igpo_megatron.types import Completion, ProbeScore, RunStopped, SamplingRequest, WeightSink


class EngineError(RunStopped):
    """An engine cannot serve; the message names it and says why."""


class EnginesEnded(RunStopped):
    """No engine can serve any more; this ends the run, not only a trajectory."""


class Engine(Protocol):
    """Continues token sequences and scores probes."""

    async def generate(self, request: SamplingRequest) -> Completion:
        """Sample one turn, or a part of one. Raises EngineError."""
        ...

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        """Log-probs of `token_ids[first:]` after those before them; `key` as in `SamplingRequest`. Raises EngineError."""
        ...


class EngineService(Engine, WeightSink, Protocol):
    """All engines of a run: they continue token sequences, score probes and take new weights. Entered and left on the main rank."""

    def begin(self) -> None:
        """Let engines in processes of their own start beside what follows; entering waits for them. Raises RunStopped."""
        ...

    def close(self) -> None:
        """End the engines, entered or not; a second call does nothing."""
        ...

    def __enter__(self) -> Self:
        """Start; returns when requests are served with the weights of the model's folder. Raises RunStopped."""
        ...

    def __exit__(self, *_: object) -> None: ...

    def sleep(self) -> None:
        """Leave the device to the policy until the next weights arrive. Call it between rollouts."""
        ...


def require_logprobs(score: ProbeScore, engine: str) -> ProbeScore:
    """The score itself. Raises EngineError naming the engine if it is not made of log-probs."""
    if not all(-math.inf < logprob <= 0.0 for logprob in score.logprobs):
        raise EngineError(f"{engine} scored a probe with {score.logprobs}, which are no log-probs")
    return score
