"""Chooses the engines of a run.

rollout.engine.backend = vllm    EnginePool: vLLM engines placed by Ray (pool.py)
                         torch   TorchEngine: transformers in the main rank's process (torch_engine/)
"""

from __future__ import annotations

from igpo_megatron.config.schema import Config
from igpo_megatron.engines.api import EngineService


def open_engines(config: Config) -> EngineService:
    """The engines that `rollout.engine.backend` names, to be entered. Raises UserError for a model that they cannot serve."""
    # Imported here, so that the library of an unused back-end need not be installed.
    if config.rollout.engine.backend == "torch":
        from igpo_megatron.engines.torch_engine.engine import TorchEngine

        return TorchEngine(config)
    from igpo_megatron.engines.pool import EnginePool

    return EnginePool(config)
