"""Stages of the training loop that need neither model nor engine: what is sampled, replaced and refused."""

import math
from types import SimpleNamespace

import pytest

from igpo_megatron.algorithms.outcome_advantages import GREEDY_REWARD
from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Gspo, Ppo
from igpo_megatron.learn import refuse_shared_turns
from igpo_megatron.train import Side, collect
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

ANSWER = "<think>I know.</think>\n<answer>{}</answer>"


def group_of(prompt: Prompt, answers: list[str], status: Status = Status.FINISHED) -> RolloutGroup:
    group = RolloutGroup(prompt, [Node(None, "prompt", [1])])
    for answer in answers:
        number = group.add(Node(0, "action", [2, 3], 1, text=ANSWER.format(answer)))
        group.trajectories.append(Trajectory([0, number], status))
    return group


def side_with(hits: list[bool], greedy: list[Status] | None = None) -> tuple[Side, list[str]]:
    """Question n has one right and one wrong sample where hits[n], else two wrong ones; greedy trajectories are right."""
    prompts = [Prompt(f"q{number}", "Where?", ("Rome",), "test") for number in range(len(hits))]
    asked: list[str] = []
    waiting = list(prompts)

    def run_sync(wanted, *, samples, temperature, **_):
        asked.extend(prompt.id for prompt in wanted)
        if temperature == 0.0:
            return [group_of(prompt, ["Rome"], status) for prompt, status in zip(wanted, greedy or [], strict=True)]
        return [group_of(prompt, ["Rome" if hits[int(prompt.id[1:])] else "Oslo", "Oslo"]) for prompt in wanted]

    side = Side(SimpleNamespace())
    side.stream = SimpleNamespace(next=lambda count: [waiting.pop(0) for _ in range(count)])
    side.rollouter = SimpleNamespace(run_sync=run_sync)
    side.chat = SimpleNamespace()
    return side, asked


def collected(side: Side, *overrides: str) -> list[RolloutGroup]:
    config = build({"model": {"path": "m"}}, ["advantage.name=grpo", "rollout.prompts_per_step=2", *overrides])
    return collect(config, side, SimpleNamespace(progress=None), step=1)


def test_without_resampling_every_group_is_kept():
    side, asked = side_with([False, True, True])
    assert [group.prompt.id for group in collected(side)] == ["q0", "q1"] == asked


def test_groups_of_equal_rewards_are_replaced_as_long_as_batches_are_left():
    side, asked = side_with([False, True, False, True, True, True])
    assert [group.prompt.id for group in collected(side, "rollout.resample=2")] == ["q1", "q3"]
    assert asked == ["q0", "q1", "q2", "q3"]
    side, _ = side_with([False, False, False, True])
    assert [group.prompt.id for group in collected(side, "rollout.resample=1")] == ["q3", "q0"]


def test_remax_samples_one_greedy_trajectory_per_question():
    side, _ = side_with([True, True], greedy=[Status.FINISHED, Status.TOOL_FAILED])
    first, second = collected(side, "advantage.name=remax")
    assert first.metrics[GREEDY_REWARD] == 1.0
    assert math.isnan(second.metrics[GREEDY_REWARD])


def test_losses_on_sequences_refuse_trajectories_that_share_turns():
    group = group_of(Prompt("q", "?", ("a",), "t"), ["Rome"])
    refuse_shared_turns([group], Gspo())
    group.trajectories *= 2
    refuse_shared_turns([group], Ppo())
    with pytest.raises(ValueError, match=r"loss\.name=gspo judges whole trajectories"):
        refuse_shared_turns([group], Gspo())
    with pytest.raises(ValueError, match=r"loss\.mismatch=mask_sequence judges"):
        refuse_shared_turns([group], Ppo(mismatch="mask_sequence"))
