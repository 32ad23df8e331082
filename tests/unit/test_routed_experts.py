"""Experts from an engine's answer to the nodes of a tree, to a file and to rows: which token gets which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_rollouts import ANSWER, SEARCH, ScriptedEngine, completion, run

from igpo_megatron.engines.recorded_experts import first_unrouted, record_experts, routed_experts
from igpo_megatron.observability.metrics import routed_share
from igpo_megatron.observability.rollout_dump import read_rollouts, write_rollouts
from igpo_megatron.packing.tree import ExpertShape, expert_rows, pack_for_scoring, pack_for_training
from igpo_megatron.types import Completion, Node, Prompt, RolloutGroup, SamplingRequest, Status, Trajectory

SHAPE = ExpertShape(layers=2, top_k=2)


def mark(position: int) -> bytes:
    """Made-up experts that tell the token's position."""
    return bytes([position, position + 1, position + 2, position + 3])


def small_group() -> RolloutGroup:
    """prompt [1 2] -> action [3 4] -> observation [5] -> action [6]; and a second sample: action [7 8]; a probe at the prompt."""
    group = RolloutGroup(Prompt("q", "?", ("a",), "test"), [Node(None, "prompt", [1, 2])])
    group.add(Node(0, "action", [3, 4], 1))
    group.add(Node(1, "observation", [5], 1))
    group.add(Node(2, "action", [6], 2))
    group.add(Node(0, "action", [7, 8], 1))
    group.add(Node(0, "probe", [90, 91], 0, scored=(1, 2)))
    group.trajectories = [
        Trajectory([0, 1, 2, 3], Status.FINISHED, turn_advantages=[0.5, -2.0]),
        Trajectory([0, 4], Status.FINISHED, turn_advantages=[1.0]),
    ]
    return group


def answer(first: int, stop: int) -> Completion:
    return Completion([], [], "stop", 1, experts_from=first, experts=[mark(position) for position in range(first, stop)])


def test_a_turn_asks_from_the_last_token_of_the_turn_before_and_fills_what_lies_between() -> None:
    group = small_group()
    assert first_unrouted(group, 0) == 0
    record_experts(group, 1, answer(0, 3))  # prompt 0 1, action 2 3, whose last token nothing has computed yet
    assert group.nodes[1].experts == [mark(2), None]
    assert first_unrouted(group, 2) == 3
    record_experts(group, 3, answer(3, 5))
    assert [node.experts for node in group.nodes[:4]] == [[mark(0), mark(1)], [mark(2), mark(3)], [mark(4)], []]
    assert first_unrouted(group, 3) == 5 and first_unrouted(group, 4) == 2


def test_a_shared_token_keeps_the_experts_it_got_first() -> None:
    group = small_group()
    record_experts(group, 1, answer(0, 3))
    late = Completion([], [], "stop", 1, experts_from=0, experts=[b"\0\0\0\0"] * 3)
    record_experts(group, 4, late)
    assert group.nodes[0].experts == [mark(0), mark(1)] and group.nodes[4].experts == [b"\0\0\0\0", None]


def test_a_request_that_was_aborted_leaves_everything_unknown() -> None:
    group = small_group()
    record_experts(group, 1, Completion([3], [0.0], "abort", 1, experts=routed_experts(None, 3)))
    assert not any(node.experts for node in group.nodes)


def test_vllms_answer_for_another_number_of_tokens_is_refused() -> None:
    rows = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert routed_experts(rows, 3) == [bytes(range(0, 4)), bytes(range(4, 8)), bytes(range(8, 12))]
    with pytest.raises(ValueError, match="experts of 3 tokens instead of 4"):
        routed_experts(rows, 4)


class RoutingEngine(ScriptedEngine):
    """Answers with experts that tell each token's position modulo 250, as vLLM does: all but the last sampled token's."""

    def __init__(self, *script: str) -> None:
        super().__init__(*script)
        self.asked: list[int | None] = []

    async def generate(self, request: SamplingRequest) -> Completion:
        self.asked.append(request.experts_from)
        result = await super().generate(request)
        if request.experts_from is None:
            return result
        known = range(request.experts_from, len(request.token_ids) + len(result.token_ids) - 1)
        return replace(result, experts_from=request.experts_from, experts=[mark(place % 250) for place in known])


def experts_along(group: RolloutGroup, trajectory: Trajectory) -> list[bytes | None]:
    return [experts for index in trajectory.path for experts in group.nodes[index].experts]


def test_a_rollout_knows_the_experts_of_every_token_but_the_last() -> None:
    engine = RoutingEngine(SEARCH, ANSWER)
    (group,) = run(engine, samples=2, routing_replay=True)
    for trajectory in group.trajectories:
        length = len(group.context(trajectory.path[-1]))
        assert experts_along(group, trajectory) == [*(mark(place % 250) for place in range(length - 1)), None]
    turn = len(group.nodes[0].token_ids) + len(completion(SEARCH).token_ids)
    assert engine.asked == [0, 0, turn - 1, turn - 1]


def test_a_rollout_without_replay_asks_for_no_experts() -> None:
    engine = RoutingEngine(SEARCH, ANSWER)
    (group,) = run(engine)
    assert engine.asked == [None, None] and not any(node.experts for node in group.nodes)


def test_rows_carry_the_nodes_experts_and_leave_the_rest_to_the_routers() -> None:
    group = small_group()
    record_experts(group, 1, answer(0, 3))
    (row,) = pack_for_scoring([group], row_tokens=100, multiple=4, experts=SHAPE)
    assert row.experts is not None and row.experts.shape == (row.num_tokens, 2, 2) and row.experts.dtype == torch.int16
    places = {token: row.experts[place].flatten().tolist() for place, token in enumerate(row.token_ids.tolist()) if token}
    assert places[1] == list(mark(0)) and places[2] == list(mark(1)) and places[3] == list(mark(2))
    assert all(places[token] == [-1] * 4 for token in (4, 5, 6, 7, 8, 90, 91))
    assert (row.experts[row.token_ids == 0] == -1).all(), "padding"
    (row,) = pack_for_training([group], row_tokens=100, token_weight=lambda tokens: 1.0, experts=SHAPE)
    assert row.experts is not None and row.experts[0].flatten().tolist() == list(mark(0))
    assert pack_for_scoring([group], row_tokens=100)[0].experts is None
    assert routed_share([group]) == {"routed_tokens": 3 / 8}


def test_experts_beyond_256_take_two_bytes_each() -> None:
    wide = np.array([[[300, 2], [3, 400]]], dtype=np.uint16)
    (recorded,) = routed_experts(wide, 1)
    assert expert_rows([None, recorded], 3, SHAPE).tolist() == [[[-1, -1]] * 2, [[300, 2], [3, 400]], [[-1, -1]] * 2]


def test_experts_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[4\] bytes per token, the model's 3 layers of 2 experts each would take 6 or 12"):
        expert_rows([mark(0), None], 2, ExpertShape(3, 2))
    with pytest.raises(ValueError, match=r"\[4, 8\] bytes"):
        expert_rows([mark(0), mark(0) * 2], 2, SHAPE)


def test_experts_come_back_from_a_file_and_files_from_before_them_are_read(tmp_path: Path) -> None:
    group, plain = small_group(), small_group()
    record_experts(group, 1, answer(0, 3))
    write_rollouts(tmp_path / "new.parquet", 1, [group, plain])
    assert list(read_rollouts(tmp_path / "new.parquet")) == [(1, [group, plain])]
    pq.write_table(pq.read_table(tmp_path / "new.parquet").drop_columns(["experts"]), tmp_path / "old.parquet")
    assert list(read_rollouts(tmp_path / "old.parquet")) == [(1, [plain, plain])]
