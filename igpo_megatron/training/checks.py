"""Report everything that is wrong with a run at once, before any process starts: its settings, and the parts that they name."""

from __future__ import annotations

from igpo_megatron.algorithms.hooks import check_hooks
from igpo_megatron.chat.protocols import registry as protocols
from igpo_megatron.config import checks
from igpo_megatron.config.load import ConfigError
from igpo_megatron.config.schema import Config
from igpo_megatron.data.question_files import unusable
from igpo_megatron.search import registry as search
from igpo_megatron.tools import registry as tools
from igpo_megatron.types import UserError


def require(config: Config, world_size: int | None, local_world_size: int | None = None) -> None:
    """Raise ConfigError with every problem that `check` finds, or UserError where the user's own reward, advantage or loss, or a file of
    questions, is unusable."""
    problems = check(config, world_size=world_size, local_world_size=local_world_size)
    if problems:
        raise ConfigError(problems)
    check_hooks(config.reward, config.advantage, config.loss)
    if wrong := unusable_questions(config, world_size=world_size):
        raise UserError("\n".join(wrong))


def unusable_questions(config: Config, *, world_size: int | None) -> list[str]:
    """Why files of questions that the run reads cannot be used, as far as their columns and first rows tell."""
    train = config.data.train if world_size is not None else ()
    paths = dict.fromkeys((*train, *config.data.eval)) if world_size is None or checks.needs_engines(config) else {}
    return [wrong for path in paths if (wrong := unusable(path)) is not None]


def check(config: Config, *, world_size: int | None, local_world_size: int | None = None) -> list[str]:
    """Every problem that `config.checks.check` (same arguments) finds, and those of search back-end, tools and protocol."""
    asks = world_size is None or checks.needs_engines(config)
    of_tools = list(tools.problems(config.rollout))
    return [
        *checks.check(config, world_size=world_size, local_world_size=local_world_size),
        *(search.problems(config.search) if asks else ()),
        # A protocol is given the tools, so problems of the tools are reported only once.
        *(of_tools or protocols.problems(config.rollout)),
    ]
