"""Replay of successes: what is kept, what it replaces, and that a checkpoint and a resumed run agree."""

import base64
import json
import zlib

import pytest

from igpo_megatron.algorithms.advantages.outcome import Grpo
from igpo_megatron.algorithms.advantages.registry import set_advantages
from igpo_megatron.algorithms.replay import SuccessBuffer
from igpo_megatron.packing.tree import pack_for_training
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, ToolCall, Trajectory


def group_of(question: str, rewards: list[float], *, first_token: int = 10, prompt_tokens: tuple[int, ...] = (1, 2)) -> RolloutGroup:
    """A search and an answer per trajectory; the tokens of trajectory i are `first_token` + i."""
    group = RolloutGroup(Prompt(question, "Where?", ("Rome", "Roma"), "test"), [Node(None, "prompt", list(prompt_tokens))])
    for number, reward in enumerate(rewards):
        token = first_token + number
        call = ToolCall("search", ("capital", "Italy"))
        search = group.add(Node(0, "action", [token], 1, weight_version=3, behavior_logprobs=[-0.1], old_logprobs=[-0.2], call=call))
        found = group.add(Node(search, "observation", [7], 1))
        answer = group.add(Node(found, "action", [token, token], 2, weight_version=3, behavior_logprobs=[-0.3, -1 / 3]))
        group.trajectories.append(
            Trajectory([0, search, found, answer], Status.FINISHED, "Rome", reward=reward, reward_parts={"f1": reward})
        )
    return group


def sampled(group: RolloutGroup) -> list[list[int]]:
    """The sampled tokens of every trajectory."""
    return [[token for node in group.actions(trajectory) for token in node.token_ids] for trajectory in group.trajectories]


def rewards(group: RolloutGroup) -> list[float]:
    return [trajectory.reward for trajectory in group.trajectories]


def test_a_failed_group_gets_the_latest_success_of_its_own_question():
    buffer = SuccessBuffer(capacity=8, success_above=0.5)
    first = [group_of("a", [0.0, 1.0, 0.0]), group_of("b", [0.0, 0.0, 0.9])]
    assert buffer.exchange(first, 1) == first, "successes are kept, nothing is replaced"
    buffer.exchange([group_of("a", [0.75, 0.0, 0.0], first_token=20)], 2)

    failed = group_of("a", [0.0, 0.5, -2.0], first_token=30)
    mended, untouched = buffer.exchange([failed, group_of("c", [0.0, 0.0])], 3)
    assert rewards(mended).count(0.75) == 1 and len(mended.trajectories) == 3
    place = rewards(mended).index(0.75)
    assert sampled(mended)[place] == [20, 20, 20]
    others = [tokens for number, tokens in enumerate(sampled(failed)) if number != place]
    assert [tokens for number, tokens in enumerate(sampled(mended)) if number != place] == others
    assert mended.metrics == {"replayed": 1.0} and untouched.metrics == {} and rewards(failed) == [0.0, 0.5, -2.0]


def test_a_mended_group_is_a_tree_of_its_own_that_teaches_something():
    buffer = SuccessBuffer(8, 0.5)
    buffer.exchange([group_of("a", [1.0, 0.0])], 1)
    (mended,) = buffer.exchange([group_of("a", [0.0, 0.0, 0.0], first_token=30)], 2)
    assert len(mended.nodes) == 1 + 3 * 3 and [node.kind for node in mended.nodes].count("prompt") == 1
    assert all(node.parent is None or node.parent < number for number, node in enumerate(mended.nodes))
    (success,) = [trajectory for trajectory in mended.trajectories if trajectory.reward == 1.0]
    for node in mended.actions(success):
        assert node.weight_version is None and node.old_logprobs == [] and node.behavior_logprobs
    set_advantages([mended], Grpo(divide_by_std=False), 0.0)
    assert success.turn_advantages == pytest.approx([2 / 3, 2 / 3])
    (row,) = pack_for_training([mended], row_tokens=100, token_weight=lambda tokens: 1.0)
    assert len(row.targets) == 3 * 3 and row.token_ids[:2].tolist() == [1, 2]


def test_what_is_replaced_is_drawn_anew_at_every_step_and_the_same_again_after_a_resume():
    buffer = SuccessBuffer(8, 0.5)
    buffer.exchange([group_of("a", [1.0])], 1)
    places = [rewards(buffer.exchange([group_of("a", [0.0] * 4)], step)[0]).index(1.0) for step in range(2, 42)]
    assert set(places) == {0, 1, 2, 3}
    assert places == [rewards(buffer.exchange([group_of("a", [0.0] * 4)], step)[0]).index(1.0) for step in range(2, 42)]


def test_only_trained_trajectories_count_and_are_replaced():
    buffer = SuccessBuffer(8, 0.5)
    lost = group_of("a", [1.0, 0.0])
    lost.trajectories[0].status = Status.TOOL_FAILED
    buffer.exchange([lost], 1)
    assert buffer.successes == {}, "what is not trained is no success"
    buffer.exchange([group_of("a", [1.0])], 2)
    for step in range(3, 13):
        failed = group_of("a", [0.0, 0.0])
        failed.trajectories[1].status = Status.ENGINE_FAILED
        assert rewards(buffer.exchange([failed], step)[0]) == [1.0, 0.0]
    failed.trajectories[0].status = Status.TOOL_FAILED
    assert buffer.exchange([failed], 13) == [failed]


def test_a_success_behind_another_prompt_is_none():
    buffer = SuccessBuffer(8, 0.5)
    buffer.exchange([group_of("a", [1.0], prompt_tokens=(1, 2))], 1)
    assert rewards(buffer.exchange([group_of("a", [0.0], prompt_tokens=(1, 3))], 2)[0]) == [0.0]


def test_the_oldest_successes_make_room_and_no_room_keeps_nothing():
    buffer = SuccessBuffer(2, 0.5)
    buffer.exchange([group_of("a", [1.0]), group_of("b", [1.0]), group_of("a", [1.0]), group_of("c", [1.0])], 1)
    assert list(buffer.successes) == ["a", "c"]
    none = SuccessBuffer(0, 0.5)
    none.exchange([group_of("a", [1.0])], 1)
    assert none.successes == {}


def test_a_checkpoint_brings_back_every_success_exactly():
    buffer = SuccessBuffer(8, 0.5)
    buffer.exchange([group_of("a", [0.0, 1.0]), group_of("b", [0.9]), group_of("c", [0.8])], 1)
    state = json.loads(json.dumps(buffer.state()))
    restored, smaller = SuccessBuffer(8, 0.5), SuccessBuffer(2, 0.5)
    restored.load_state(state)
    smaller.load_state(state)
    assert restored.successes == buffer.successes and list(smaller.successes) == ["b", "c"]
    failed = group_of("a", [0.0] * 3)
    assert restored.exchange([failed], 5) == buffer.exchange([failed], 5)


def test_successes_of_an_older_checkpoint_get_our_name_of_search():
    buffer, restored, renamed = (SuccessBuffer(8, 0.5) for _ in range(3))
    group = group_of("a", [1.0])
    group.nodes[1].call = ToolCall("look_up", ("x",))
    buffer.exchange([group], 1)
    rows = json.loads(zlib.decompress(base64.b64decode(buffer.state())))
    for row in rows:
        del row["canonical_tool_names"]
    renamed.load_state(base64.b64encode(zlib.compress(json.dumps(rows).encode())).decode(), search="look_up")
    restored.load_state(buffer.state(), search="look_up")
    calls = [[node.call.name for node in kept.successes["a"].nodes if node.call] for kept in (renamed, restored)]
    assert calls == [["search"], ["look_up"]]
