"""A row cut over the ranks of a context-parallel group: nothing lost, nothing twice, everything in its place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from igpo_megatron.packing.tree import PackedRow
from igpo_megatron.policy.context import in_row_order, part_of, zigzag


def row(length: int) -> PackedRow:
    """One chain of `length` tokens, all but the first of them targets; every tensor tells where it comes from."""
    places = torch.arange(length)
    numbers = torch.zeros(length - 1)
    return PackedRow(
        token_ids=100 + places,
        position_ids=places,
        subtree_end=torch.full((length,), length),
        predictor=places[:-1],
        targets=101 + places[:-1],
        weight=numbers,
        advantages=torch.zeros(length - 1, 2),
        old_logprobs=numbers,
        ref_logprobs=numbers,
        behavior_logprobs=numbers,
        sequence=places[:-1],
        sequences=length - 1,
        experts=places[:, None, None].expand(-1, 2, 3),
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_and_every_target_is_one_ranks_own(size: int) -> None:
    whole = row(12 * size)
    parts = [part_of(whole, rank, size) for rank in range(size)]
    assert sorted(torch.cat([part.token_ids for part in parts]).tolist()) == whole.token_ids.tolist()
    assert sorted(torch.cat([part.targets for part in parts]).tolist()) == whole.targets.tolist()
    for part in parts:
        assert part.experts is not None and part.merge is not None
        assert torch.equal(part.position_ids, part.token_ids - 100)
        assert torch.equal(part.experts[:, 0, 0], part.position_ids)
        assert torch.equal(part.token_ids[part.predictor] + 1, part.targets)
        gathered = torch.cat([F.pad(other.targets, (0, part.merge.most - len(other.targets)), value=-1) for other in parts])
        assert torch.equal(gathered[part.merge.slot], whole.targets)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tokens_gathered_rank_by_rank_go_back_to_the_order_of_the_row(size: int) -> None:
    whole = row(8 * size)
    gathered = torch.cat([part_of(whole, rank, size).token_ids for rank in range(size)])
    assert torch.equal(in_row_order(gathered, size), whole.token_ids)
    assert not torch.equal(gathered, whole.token_ids)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_rank_sees_as_many_keys_of_a_long_chain(size: int) -> None:
    """Token i of a chain sees i + 1 keys. Consecutive shares would give the last rank of two three times the first one's."""
    keys = [sum(token + 1 for start, stop in zigzag(64 * size, rank, size) for token in range(start, stop)) for rank in range(size)]
    assert len(set(keys)) == 1


def test_one_rank_takes_the_row_as_it_is() -> None:
    whole = row(7)
    part = part_of(whole, 0, 1)
    assert part.token_ids is whole.token_ids and part.predictor is whole.predictor and part.merge is None


def test_a_row_that_does_not_divide_into_chunks_is_refused() -> None:
    with pytest.raises(AssertionError, match="10 tokens cannot be cut into 4"):
        part_of(row(10), 0, 2)
