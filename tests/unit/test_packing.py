"""Trees to rows: masks, positions, predictors, weights and the way back, against small trees worked out by hand."""

from __future__ import annotations

import random
from dataclasses import fields
from typing import Any, Literal

import pytest
import torch

from igpo_megatron.packing.batches import balance, first_fit, level_fit
from igpo_megatron.packing.tree import PackedRow, blank_row, pack_for_scoring, pack_for_training, per_node, step_counts
from igpo_megatron.packing.wire import from_bytes, to_bytes
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory


def small_group() -> RolloutGroup:
    """prompt [1 2] -> probe [90 91], action A [3 4] -> observation [5] -> action B [6], and a second sample: action C [7 8 9].

    depth first: 1 2 | 90 91 | 3 4 5 6 | 7 8 9
    """
    group = RolloutGroup(Prompt("q", "?", ("a",), "test"), [Node(None, "prompt", [1, 2])])
    group.add(Node(0, "action", [3, 4], 1))
    group.add(Node(1, "observation", [5], 1))
    group.add(Node(2, "action", [6], 2))
    group.add(Node(0, "action", [7, 8, 9], 1))
    group.add(Node(0, "probe", [90, 91], 0, scored=(1, 2)))
    group.trajectories = [
        Trajectory([0, 1, 2, 3], Status.FINISHED, turn_advantages=[0.5, -2.0]),
        Trajectory([0, 4], Status.FINISHED, turn_advantages=[1.0]),
    ]
    return group


def mask(row: PackedRow) -> torch.Tensor:
    index = torch.arange(row.num_tokens)
    return (index[None] <= index[:, None]) & (index[:, None] < row.subtree_end[None])


def test_a_tree_is_laid_out_depth_first_with_depth_as_position() -> None:
    (row,) = pack_for_scoring([small_group()], row_tokens=100)
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 90, 91]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 2, 3]
    assert row.subtree_end.tolist() == [11, 11, 6, 6, 6, 6, 9, 9, 9, 11, 11]
    assert row.targets.tolist() == [3, 4, 6, 7, 8, 9, 91]
    assert row.predictor.tolist() == [1, 2, 4, 1, 6, 7, 9]


def test_a_token_sees_exactly_its_ancestors() -> None:
    (row,) = pack_for_scoring([small_group()], row_tokens=100)
    seen = {row.token_ids[i].item(): row.token_ids[mask(row)[i]].tolist() for i in range(row.num_tokens)}
    assert seen[6] == [1, 2, 3, 4, 5, 6]
    assert seen[9] == [1, 2, 7, 8, 9]
    assert seen[91] == [1, 2, 90, 91]


def test_two_trees_in_a_row_do_not_see_each_other_and_padding_sees_nothing_of_them() -> None:
    (row,) = pack_for_scoring([small_group(), small_group()], row_tokens=100, multiple=8)
    assert row.num_tokens == 24
    visible = mask(row)
    assert not visible[11:22, :11].any() and not visible[22:, :22].any()
    assert visible.diagonal().all()


def test_a_cut_keeps_a_branch_beside_the_trajectory_that_it_left() -> None:
    """First trajectory, an independent one, then a branch of the first: two fit into a piece."""
    group = RolloutGroup(Prompt("q", "?", ("a",), "test"), [Node(None, "prompt", [1])])
    for parent, tokens in ((0, [2] * 10), (0, [3] * 10), (1, [4] * 3), (1, [5] * 3)):
        group.add(Node(parent, "action", tokens, 1))
    group.trajectories = [Trajectory(path, Status.FINISHED, turn_advantages=[0.0]) for path in ([0, 1, 3], [0, 2], [0, 1, 4])]
    for trajectory in group.trajectories:
        trajectory.turn_advantages = [0.0] * len(group.actions(trajectory))
    rows = pack_for_training([group], row_tokens=17, token_weight=lambda tokens: 1.0)
    assert [row.token_ids.tolist() for row in rows] == [[1, *[2] * 10, *[4] * 3, *[5] * 3], [1, *[3] * 10]]


def test_training_targets_are_actions_with_the_parts_of_weight_times_advantage() -> None:
    (row,) = pack_for_training([small_group()], row_tokens=100, token_weight=lambda tokens: 1.0 / tokens)
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert row.targets.tolist() == [3, 4, 6, 7, 8, 9]
    third = 1 / 3
    assert torch.allclose(row.weight, torch.tensor([third] * 6))
    expected = [[0.5 * third, 0.0]] * 2 + [[0.0, 2.0 * third]] + [[third, 0.0]] * 3
    assert torch.allclose(row.advantages, torch.tensor(expected))


def test_a_turn_shared_by_two_trajectories_sums_their_parts_also_when_the_tree_is_cut_between_them() -> None:
    group = small_group()
    group.add(Node(2, "action", [10, 11], 2))
    group.trajectories.append(Trajectory([0, 1, 2, 6], Status.FINISHED, turn_advantages=[-3.0, 4.0]))
    for row_tokens in (100, 6):
        rows = pack_for_training([group], row_tokens=row_tokens, token_weight=lambda tokens: 1.0)
        parts = {3: torch.zeros(2), 6: torch.zeros(2), 10: torch.zeros(2)}
        for row in rows:
            for target, advantages in zip(row.targets.tolist(), row.advantages, strict=True):
                if target in parts:
                    parts[target] += advantages
        assert parts[3].tolist() == [0.5, 3.0]
        assert parts[6].tolist() == [0.0, 2.0] and parts[10].tolist() == [4.0, 0.0]
    assert len(rows) > 1


def test_a_cut_tree_scores_every_probe_once() -> None:
    rows = pack_for_scoring([small_group()], row_tokens=8)
    assert len(rows) == 2
    assert sorted(token for row in rows for token in row.targets.tolist()) == [3, 4, 6, 7, 8, 9, 91]


def test_published_schemes_repeat_the_context_of_every_probe() -> None:
    for scorer in ("sequential", "batched"):
        rows = pack_for_scoring([small_group()], row_tokens=5, scorer=scorer)
        probe = next(row for row in rows if 91 in row.targets.tolist())
        assert probe.token_ids.tolist() == [1, 2, 90, 91] and probe.position_ids.tolist() == [0, 1, 2, 3]


def test_sequential_scoring_takes_a_row_per_probe_and_batched_fills_rows() -> None:
    groups = [small_group(), small_group()]
    for scorer, count in (("sequential", 3), ("batched", 1)):
        rows = pack_for_scoring(groups, row_tokens=100, scorer=scorer)
        assert len(rows) == count
        assert sorted(token for row in rows for token in row.targets.tolist()) == sorted([3, 4, 6, 7, 8, 9, 91] * 2)


@pytest.mark.parametrize("scorer", ["engine", None])
def test_probes_scored_elsewhere_are_not_packed(scorer: Literal["engine"] | None) -> None:
    (row,) = pack_for_scoring([small_group()], row_tokens=100, scorer=scorer)
    assert row.num_tokens == 9 and not {90, 91} & set(row.token_ids.tolist())


def test_results_find_their_way_back_to_the_nodes() -> None:
    groups = [small_group(), small_group()]
    rows = pack_for_scoring(groups, row_tokens=12)
    for node, values in per_node(rows, [-row.targets.float() for row in rows], groups):
        node.old_logprobs = values
    for group in groups:
        for node in group.nodes:
            wanted = {"action": node.token_ids, "probe": node.token_ids[1:]}.get(node.kind, [])
            wanted = [-float(token) for token in wanted]
            assert node.old_logprobs == wanted


def test_failed_trajectories_are_not_packed_and_not_counted() -> None:
    group = small_group()
    group.trajectories[0].status = Status.TOOL_FAILED
    (row,) = pack_for_training([group], row_tokens=100, token_weight=lambda tokens: 1.0)
    assert row.targets.tolist() == [7, 8, 9]
    counts = step_counts([group])
    assert (counts.trained_tokens, counts.trajectories) == (3, 1)


def test_weights_add_up_to_the_counts_whatever_the_row_size() -> None:
    rng = random.Random(0)
    groups = []
    for number in range(5):
        group = RolloutGroup(Prompt(str(number), "?", ("a",), "t"), [Node(None, "prompt", [1] * rng.randint(1, 5))])
        for _ in range(4):
            action = group.add(Node(0, "action", [2] * rng.randint(1, 9), 1))
            group.trajectories.append(Trajectory([0, action], Status.FINISHED, turn_advantages=[rng.gauss(0, 1)]))
        groups.append(group)
    for row_tokens in (4, 16, 1000):
        rows = pack_for_training(groups, row_tokens=row_tokens, token_weight=lambda tokens: 1.0 / tokens)
        assert abs(sum(float(row.weight.sum()) for row in rows) - step_counts(groups).trajectories) < 1e-4


def test_a_blank_row_has_no_targets() -> None:
    row = blank_row(4)
    assert row.num_tokens == 4 and len(row.targets) == 0 and mask(row).diagonal().all()


def test_first_fit_fills_bins_and_gives_an_oversized_item_its_own() -> None:
    assert first_fit([5, 3, 9, 2, 4], 7) == [[2], [0, 3], [4, 1]]


def test_level_fit_gives_every_rank_as_many_bins_that_are_equally_full() -> None:
    sizes = [6, 5, 4, 3, 3, 3]
    assert [len(bins) for bins in (first_fit(sizes, 10), level_fit(sizes, 10, 2))] == [3, 4]
    assert sorted(sum(sizes[index] for index in members) for members in level_fit(sizes, 10, 2)) == [5, 6, 6, 7]
    assert level_fit(sizes, 10, 1) == first_fit(sizes, 10)
    assert level_fit([7, 20, 1], 10, 2) == [[1], [0, 2]], "an oversized item is alone"
    # The largest first would fill a bin with 5 + 3 + 3, for which the oversized item is no excuse.
    sizes = [20, 5, 5, 4, 4, 3, 3, 3]
    assert max(sum(sizes[index] for index in members) for members in level_fit(sizes, 9, 2) if members != [0]) <= 9
    assert level_fit([4], 10, 3) == [[0]] and level_fit([], 10, 3) == []


def test_level_fit_keeps_to_the_budget_and_loses_nothing() -> None:
    rng = random.Random(3)
    for _ in range(50):
        sizes = [rng.randint(1, 9) for _ in range(rng.randint(1, 30))]
        bins = level_fit(sizes, 10, 3)
        assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
        assert max(sum(sizes[index] for index in members) for members in bins) <= 10
        assert len(bins) % 3 == 0 or len(bins) == len(sizes)


def test_balance_gives_every_rank_as_many_rows_and_about_as_much_work() -> None:
    shares = balance([8.0, 1.0, 7.0, 2.0, 3.0], 2)
    assert sorted(index for share in shares for index in share) == [-1, 0, 1, 2, 3, 4]
    assert {len(share) for share in shares} == {3}
    loads = [sum([8.0, 1.0, 7.0, 2.0, 3.0][index] for index in share if index >= 0) for share in shares]
    assert max(loads) - min(loads) <= 3.0


def test_tokens_know_their_trajectory_and_what_the_engine_said_of_them() -> None:
    first, second = small_group(), small_group()
    first.nodes[4].behavior_logprobs = [-0.5, -0.25, -0.125]
    (row,) = pack_for_training([first, second], row_tokens=100, token_weight=lambda tokens: 1.0)
    # Depth first: two turns of the first trajectory (3 tokens), then the second (3 tokens); then the other group.
    assert row.sequence.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert row.behavior_logprobs.tolist() == [0.0] * 3 + [-0.5, -0.25, -0.125] + [0.0] * 6


def test_a_shared_turn_is_seen_unless_the_other_trajectory_is_not_trained() -> None:
    group = small_group()
    assert not group.is_branched
    group.trajectories.append(Trajectory([0, 1], Status.TRUNCATED_TURNS))
    assert group.is_branched
    group.trajectories[-1].status = Status.TOOL_FAILED
    assert not group.is_branched


# ---- rows as bytes


def same_rows(left: list[PackedRow], right: list[PackedRow]) -> bool:
    """Every field but `origin`, bit for bit and with its dtype."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        return a == b

    names = [field.name for field in fields(PackedRow) if field.name != "origin"]
    return len(left) == len(right) and all(
        same(getattr(a, name), getattr(b, name)) for a, b in zip(left, right, strict=True) for name in names
    )


def recorded_rows() -> list[PackedRow]:
    """Rows with every optional field in some of them, a blank one, and numbers that a careless encoding would change."""
    groups = [small_group(), small_group()]
    rows = [*pack_for_scoring(groups, row_tokens=8), *pack_for_training(groups, row_tokens=12, token_weight=lambda n: 1 / n), blank_row(4)]
    generator = torch.Generator().manual_seed(0)
    for number, row in enumerate(rows):
        row.behavior_logprobs = torch.randn(len(row.targets), generator=generator)
        row.token_ids = row.token_ids + 2**33 * (number % 2)
        row.experts = torch.randint(-1, 300, (row.num_tokens, 3, 2), generator=generator).short() if number % 3 else None
    rows[0].old_logprobs = torch.full_like(rows[0].old_logprobs, torch.nan)
    rows[1].old_logprobs = torch.full_like(rows[1].old_logprobs, -0.0)
    rows[2].old_logprobs = torch.full_like(rows[2].old_logprobs, -torch.inf)
    return rows


def test_rows_come_back_from_their_bytes_bit_for_bit() -> None:
    rows = recorded_rows()
    assert same_rows(from_bytes(to_bytes(rows)), rows) and from_bytes(to_bytes([])) == []
    assert same_rows(from_bytes(to_bytes(rows[-1:])), rows[-1:]), "a blank row alone"
    assert all(row.origin == [] for row in from_bytes(to_bytes(rows)))
    assert not same_rows(from_bytes(to_bytes(rows[:-1])), [*rows[1:-1], rows[0]])


def test_bytes_of_rows_are_little_more_than_what_cannot_be_derived() -> None:
    """Of a sampled token its id, twice (it is a target), and two log-probs; of any other its id alone."""
    rng = random.Random(0)
    group = RolloutGroup(Prompt("q", "?", ("a",), "test"), [Node(None, "prompt", [rng.randrange(10**5) for _ in range(2000)])])
    sampled = [rng.randrange(10**5) for _ in range(2000)]
    logprobs = [[-rng.random() for _ in sampled] for _ in range(2)]
    group.add(Node(0, "action", sampled, 1, behavior_logprobs=logprobs[0], old_logprobs=logprobs[1]))
    group.trajectories = [Trajectory([0, 1], Status.FINISHED, turn_advantages=[0.5])]
    rows = pack_for_training([group], row_tokens=4000, token_weight=lambda n: 1 / n)
    derivable = len(to_bytes(rows)) - 2000 * 4 - 2000 * (4 + 4 + 4 + 4)
    assert 0 < derivable < 4000
