"""Checks across settings: what one field cannot know, looked at before any process starts. Imports no torch.

Config + world size + config.json of the model ──check──> every problem at once, each saying what was found and what to change

What only the actor can know (which architectures it builds) is checked there.
"""

from __future__ import annotations

from igpo_megatron.config.check.algorithm import (
    check_ahead,
    check_algorithm,
    check_bonus,
    check_branching,
    check_replay_of_successes,
    check_schedule,
)
from igpo_megatron.config.check.common import model_shape
from igpo_megatron.config.check.devices import check_context, check_devices, check_engine_heads
from igpo_megatron.config.check.files import check_model_files, check_question_files, check_training_files
from igpo_megatron.config.check.layout import check_experts, check_heads, check_layout, check_routing
from igpo_megatron.config.check.tools import check_search, check_tools
from igpo_megatron.config.check.torch_engine import check_torch_engine
from igpo_megatron.config.schema import Config


def check(config: Config, *, world_size: int | None, local_world_size: int | None = None) -> list[str]:
    """Every problem between settings, files and machine; empty when the run may start.

    `world_size`: ranks that train; None where none do (evaluation), which asks only for what engines, search and questions need.
    `local_world_size`: ranks on this machine, `world_size` if None.
    """
    shape = model_shape(config.model.path)
    if world_size is None:
        config = config.model_copy(update={"run": config.run.model_copy(update={"replay": None})})
        return [
            *check_model_files(config.model.path),
            *check_question_files("data.eval", config.data.eval),
            *check_engine_heads(config, shape),
            *check_routing(config, shape),
            *check_context(config, shape),
            *check_torch_engine(config, shape),
            *check_devices(config, 0),
            *check_search(config),
            *check_tools(config),
        ]
    return [
        *check_model_files(config.model.path),
        *check_training_files(config),
        *check_layout(config, world_size),
        *check_heads(config, shape),
        *check_experts(config, shape, world_size),
        *check_engine_heads(config, shape),
        *check_routing(config, shape),
        *check_context(config, shape),
        *check_torch_engine(config, shape),
        *check_devices(config, local_world_size or world_size),
        *check_search(config),
        *check_tools(config),
        *check_algorithm(config),
        *check_branching(config),
        *check_ahead(config),
        *check_replay_of_successes(config),
        *check_bonus(config),
        *check_schedule(config),
    ]
