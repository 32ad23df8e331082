"""What a run asks of its engines, whichever they are, and the one place that chooses them.

rollout.engine.backend = vllm    EnginePool: vLLM engines placed by Ray (engines.py)
                         torch   TorchEngine: transformers in the main rank's process (torch_engine.py)
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from igpo_megatron.config.schema import Config
from igpo_megatron.rollout.agent import Engine
from igpo_megatron.types import WeightSink


class EngineService(Engine, WeightSink, Protocol):
    """All engines of a run: they continue token sequences, score probes and take new weights. Entered and left on the main rank."""

    def __enter__(self) -> Self:
        """Start; returns when requests are served, with the weights of the model's folder. Raises RunStopped."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    def sleep(self) -> None:
        """Give the device to the policy until the next weights arrive. Call it between rollouts."""
        ...


def open_engines(config: Config) -> EngineService:
    """The engines that `rollout.engine.backend` names, to be entered. Raises UserError for a model that they cannot serve."""
    # Imported here: a machine needs only what it uses.
    if config.rollout.engine.backend == "torch":
        from igpo_megatron.rollout.torch_engine import TorchEngine

        return TorchEngine(config)
    from igpo_megatron.rollout.engines import EnginePool

    return EnginePool(config)
