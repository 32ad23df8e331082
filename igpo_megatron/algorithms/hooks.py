"""Try a user's own reward, advantage or loss function on a tiny example before anything expensive starts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from igpo_megatron.algorithms.advantages.base import HookedAdvantage
from igpo_megatron.algorithms.advantages.outcome import GREEDY_REWARD
from igpo_megatron.algorithms.advantages.registry import Advantage, set_advantages
from igpo_megatron.algorithms.losses.base import HookedLoss
from igpo_megatron.algorithms.losses.registry import Loss
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.settings import is_hook, load_hook
from igpo_megatron.types import Metric, Node, Prompt, RolloutGroup, Status, Trajectory, UserError


def check_hooks(reward: Reward, advantage: Advantage, loss: Loss) -> None:
    """Raise UserError if a hook cannot be imported, called or used, with the setting, what was found and what was expected."""
    if is_hook(reward.outcome):
        _check_reward(reward.outcome)
    if isinstance(advantage, HookedAdvantage) and loss.learns_from_rewards:
        _check_advantage(advantage)
    if isinstance(loss, HookedLoss):
        from igpo_megatron.algorithms.losses.tiny import result_on_tiny_tokens  # torch

        setting = f"loss.name={loss.name}"
        function = loaded("loss.name", loss.name, "tokens, counts, config")
        if problem := tried(setting, "four tokens", lambda: result_on_tiny_tokens(function, loss)):
            raise UserError(f"{setting} {problem}")


def loaded(key: str, name: str, expected: str) -> Callable[..., Any]:
    """The function that setting `key` names. Raises UserError if it does not take the arguments `expected`, e.g. `answer, truths`."""
    function: Callable[..., Any] = load_hook(key, name)
    try:
        signature = inspect.signature(function)
        signature.bind(*expected.split(", "))
    except ValueError:
        pass  # some functions written in C have no signature
    except TypeError as error:
        raise UserError(f"{key}={name} has the signature {signature}: {error}; expected a function of ({expected})") from None
    return function


def tried(setting: str, example: str, call: Callable[[], Any]) -> Any:
    """What the call returns. Raises UserError if it raises."""
    try:
        return call()
    except Exception as error:
        raise UserError(f"{setting} raised {type(error).__name__} when it was tried on {example}: {error}") from error


def _check_reward(name: str) -> None:
    function, setting = loaded("reward.outcome", name, "answer, truths"), f"reward.outcome={name}"
    for answer in ("Rome", ""):
        found = tried(setting, f"answer {answer!r}, truths ('Rome', 'Roma')", partial(function, answer, ("Rome", "Roma")))
        if not isinstance(found, float | int) or not math.isfinite(found):
            raise UserError(f"{setting} returned {found!r} for answer {answer!r}, truths ('Rome', 'Roma'); expected a finite number")


def _check_advantage(config: HookedAdvantage) -> None:
    loaded("advantage.name", config.name, "group, config, progress")
    if config.over_batch:
        loaded("advantage.over_batch", config.over_batch, "groups")
    setting, group = f"advantage.name={config.name}", tiny_group(with_gains=config.needs_probes)
    tried(setting, "a group of two trajectories, of two turns and of one", lambda: set_advantages([group], config, 0.0))
    for number, trajectory in enumerate(group.trajectories):
        found, turns = trajectory.turn_advantages, len(group.actions(trajectory))
        numbers = isinstance(found, list) and all(isinstance(one, float | int) and math.isfinite(one) for one in found)
        if not numbers or len(found) != turns:
            raise UserError(
                f"{setting} left turn_advantages={found!r} on trajectory {number}, which has {turns} turns; "
                "expected a list with one finite number per turn"
            )


def tiny_group(*, with_gains: bool) -> RolloutGroup:
    """Two trajectories of one question: a search and a right answer; a wrong answer at once."""
    group = RolloutGroup(Prompt("tiny", "Capital of Italy?", ("Rome", "Roma"), "tiny"), [Node(None, "prompt", [1, 2])])

    def action(parent: int, turn: int, text: str) -> int:
        values = [-0.5, -1.5]
        return group.add(Node(parent, "action", [3, 4], turn, text, 0, values, values, values, old_entropies=[0.5, 1.0]))

    search = action(0, 1, "search")
    result = group.add(Node(search, "observation", [5, 6, 7], 1, "Rome is the capital of Italy."))
    paths = [[0, search, result, action(result, 2, "Rome")], [0, action(0, 1, "Paris")]]
    for path, reward in zip(paths, (1.0, 0.0), strict=True):
        parts: dict[str, float] = {Metric.F1: reward, Metric.EM: reward, Metric.FORMAT_OK: 1.0}
        gains = [0.25, None][-(len(path) // 2) :] if with_gains else []
        group.trajectories.append(Trajectory(path, Status.FINISHED, group.nodes[path[-1]].text, "", reward, parts, [*gains]))
    group.metrics[GREEDY_REWARD] = 0.5
    return group
