"""Stages of the training loop that need neither model nor engine: what is refused."""

import pytest

from igpo_megatron.config.schema import Gspo, Ppo
from igpo_megatron.learn import refuse_shared_turns
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

ANSWER = "<think>I know.</think>\n<answer>{}</answer>"


def group_of(prompt: Prompt, answers: list[str], status: Status = Status.FINISHED) -> RolloutGroup:
    group = RolloutGroup(prompt, [Node(None, "prompt", [1])])
    for answer in answers:
        number = group.add(Node(0, "action", [2, 3], 1, text=ANSWER.format(answer)))
        group.trajectories.append(Trajectory([0, number], status))
    return group


def test_losses_on_sequences_refuse_trajectories_that_share_turns():
    group = group_of(Prompt("q", "?", ("a",), "t"), ["Rome"])
    refuse_shared_turns([group], Gspo())
    group.trajectories *= 2
    refuse_shared_turns([group], Ppo())
    with pytest.raises(ValueError, match=r"loss\.name=gspo judges whole trajectories"):
        refuse_shared_turns([group], Gspo())
    with pytest.raises(ValueError, match=r"loss\.mismatch=mask_sequence judges"):
        refuse_shared_turns([group], Ppo(mismatch="mask_sequence"))
