"""Plans, block masks and attention of packed trees against the mask written out pair by pair."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

from igpo_megatron.policy import attention, tree_plan
from igpo_megatron.policy.attention import BLOCK, block_mask, chain_attention, flex_tree_attention
from igpo_megatron.policy.context import zigzag
from igpo_megatron.policy.tree_plan import NEXT_BONUS, Chain, chains, grouped, plan_of


def random_row(seed: int, trees: int = 3, tokens: int = 40) -> list[int]:
    """subtree_end of a row of random trees with branches and leaves of random lengths."""
    rng = random.Random(seed)
    ends: list[int] = []

    def grow(budget: int) -> None:
        start = len(ends)
        own = rng.randint(1, max(1, budget // 2))
        ends.extend([0] * own)
        left = budget - own
        while left > 0 and rng.random() < 0.8:
            part = rng.randint(1, left)
            grow(part)
            left -= part
        ends[start : start + own] = [len(ends)] * own

    for _ in range(trees):
        grow(tokens)
    return ends


def seen(ends: torch.Tensor) -> torch.Tensor:
    """[T, T] bool by the definition: query i sees key j iff j <= i < subtree_end[j]."""
    index = torch.arange(len(ends), device=ends.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < ends[None, :])


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, scale: float) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(-1, -2)) * scale
    return (scores.masked_fill(~seen(ends), -torch.inf).softmax(-1) @ v).transpose(0, 1)


def inputs(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((length, 4, 16), (length, 2, 16), (length, 2, 16))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def test_a_trunk_with_probes_is_one_causal_chain_and_its_leaves() -> None:
    #        trunk 0 1 | probe 2 3 | trunk 4 .. 103 | probe 104 | trunk 105 .. 199
    ends = [200, 200, 4, 4, *[200] * 100, 105, *[200] * 95]
    assert chains(ends) == [
        Chain((), ((0, 2), (4, 104), (105, 200))),
        Chain(((0, 2),), ((2, 4),)),
        Chain(((0, 2), (4, 104)), ((104, 105),)),
    ]


def test_the_heaviest_child_continues_its_parent_and_a_little_lighter_one_that_follows_it_directly() -> None:
    # root 0 | 1 .. 10 | heavier by `more` | second tree of two
    for more, continued in ((NEXT_BONUS - 1, False), (NEXT_BONUS + 1, True)):
        size = 21 + more
        ends = [size, *[11] * 10, *[size] * (10 + more), size + 2, size + 2]
        light, heavy = (1, 11), (11, size)
        trunk, leaf = (((0, 1), heavy), light) if continued else (((0, 11),), heavy)
        assert [Chain((), tuple(_joined(trunk))), Chain(((0, 1),), (leaf,)), Chain((), ((size, size + 2),))] == [
            Chain(chain.prefix, tuple(_joined(chain.own))) for chain in chains(ends)
        ]


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjacent ranges as one."""
    found = [ranges[0]]
    for start, stop in ranges[1:]:
        found[-1:] = [(found[-1][0], stop)] if found[-1][1] == start else [found[-1], (start, stop)]
    return found


@pytest.mark.parametrize("seed", range(8))
def test_chains_hold_every_token_once_and_see_exactly_what_the_mask_allows(seed: int) -> None:
    ends = random_row(seed)
    pairs = torch.zeros(len(ends), len(ends), dtype=torch.bool)
    owned: list[int] = []
    for chain in chains(ends):
        before = [token for start, stop in chain.prefix for token in range(start, stop)]
        own = [token for start, stop in chain.own for token in range(start, stop)]
        owned += own
        for place, token in enumerate(own):
            pairs[token, before + own[: place + 1]] = True
    assert sorted(owned) == list(range(len(ends)))
    assert torch.equal(pairs, seen(torch.tensor(ends)))


def test_short_chains_that_read_the_same_share_a_call_and_long_ones_do_not() -> None:
    trunk = Chain((), ((0, 1000),))
    probes = [Chain(((0, cut),), ((start, start + 20),)) for cut, start in ((900, 1000), (880, 1020), (100, 1040))]
    assert grouped([trunk, *probes]) == [[trunk], probes[:2], probes[2:]]
    branches = [Chain(((0, 900),), ((start, start + 2000),)) for start in (1000, 3000)]
    assert grouped([trunk, *branches]) == [[trunk], *([branch] for branch in branches)]


@pytest.mark.parametrize("length", [60, 200])
def test_a_row_that_is_trained_on_has_the_values_it_was_scored_with(length: int) -> None:
    """Otherwise the policy would seem to have moved before the first update of a step."""
    ends = torch.full((length,), length)
    q, k, v = inputs(length, dtype=torch.bfloat16)
    scored = chain_attention(q.detach(), k.detach(), v.detach(), ends, 0.3)
    trained = chain_attention(q, k, v, ends, 0.3)
    assert scored.dtype == torch.bfloat16 and torch.equal(trained, scored)


@pytest.mark.parametrize("costs", [(0, 0), (10**9, 0), (100, 3)])
def test_any_grouping_gives_the_same_attention(costs: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a call for every chain to as few calls as can be."""
    monkeypatch.setattr(tree_plan, "CALL_COST", costs[0])
    monkeypatch.setattr(tree_plan, "KEY_COST", costs[1])
    tree_plan._plan.cache_clear()
    ends = torch.tensor(random_row(5, trees=4))
    tensors = inputs(len(ends))
    found = chain_attention(*tensors, ends, 0.3)
    alone = len(chains(ends.tolist()))
    together = 4 + -(-(alone - 4) // tree_plan.GROUP)
    assert len(plan_of(ends).calls) == {0: alone, 10**9: together}.get(costs[0], len(plan_of(ends).calls))
    tree_plan._plan.cache_clear()
    assert float((found - dense_attention(*tensors, ends, 0.3)).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_attention_by_chains_equals_dense_attention_in_values_and_gradients(seed: int) -> None:
    ends = torch.tensor(random_row(seed))
    tensors = inputs(len(ends), seed)
    upstream = torch.randn(len(ends), 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    results = []
    for attend in (chain_attention, dense_attention):
        output = attend(*tensors, ends, 0.3)
        results.append((output, *torch.autograd.grad((output * upstream).sum(), tensors)))
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).detach().abs().max()) < 1e-12


@pytest.mark.parametrize(("seed", "ranks"), [(0, 2), (1, 3), (2, 4)])
def test_shares_of_a_row_together_attend_as_the_whole_row_does(seed: int, ranks: int) -> None:
    """Trees, and one long chain: outputs side by side, gradients of keys and values summed, as the ranks of a group do."""
    trees = random_row(seed)
    trees = trees[: len(trees) // (2 * ranks) * 2 * ranks]
    for row in ([min(end, len(trees)) for end in trees], [24 * ranks] * (24 * ranks)):
        ends, tensors = torch.tensor(row), inputs(len(row), seed)
        upstream = torch.randn(len(row), 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        output = dense_attention(*tensors, ends, 0.3)
        expected = (output.detach(), *torch.autograd.grad((output * upstream).sum(), tensors))
        found = [torch.zeros_like(x) for x in expected]
        for rank in range(ranks):
            held = zigzag(len(row), rank, ranks)
            tokens = torch.cat([torch.arange(start, stop) for start, stop in held])
            share = chain_attention(tensors[0][tokens], *tensors[1:], ends, 0.3, held)
            found[0][tokens] = share.detach()
            for total, part in zip(found[1:], torch.autograd.grad((share * upstream[tokens]).sum(), tensors), strict=True):
                total += part
        for here, there in zip(found, expected, strict=True):
            assert float((here - there).abs().max()) < 1e-12


def test_a_share_of_one_chain_needs_no_mask_of_its_pairs() -> None:
    plan = plan_of(torch.full((64,), 64), zigzag(64, 0, 2))
    assert [(call.queries, call.keys, call.mask) for call in plan.calls] == [
        (slice(0, 16), slice(0, 16), None),
        (slice(16, 32), slice(0, 64), None),
    ]


def test_another_ranks_share_gives_other_values() -> None:
    ends, tensors = torch.full((64,), 64), inputs(64)
    own = zigzag(64, 0, 2)
    tokens = torch.cat([torch.arange(start, stop) for start, stop in own])
    found = chain_attention(tensors[0][tokens], *tensors[1:], ends, 0.3, zigzag(64, 1, 2))
    assert float((found - dense_attention(*tensors, ends, 0.3)[tokens]).detach().abs().max()) > 1e-2


def test_a_wrong_tree_gives_other_values() -> None:
    ends = torch.tensor(random_row(1))
    tensors = inputs(len(ends))
    causal = torch.full_like(ends, len(ends))
    assert float((chain_attention(*tensors, causal, 0.3) - chain_attention(*tensors, ends, 0.3)).detach().abs().max()) > 1e-2


def test_a_plan_is_made_once_for_equal_rows_and_anew_for_others() -> None:
    ends = torch.tensor(random_row(2))
    assert plan_of(ends) is plan_of(ends.clone())
    assert plan_of(ends) is not plan_of(torch.full_like(ends, len(ends)))


@pytest.mark.parametrize("ends", [[1, 1], [3, 2], [2, 3, 3]])
def test_numbers_that_are_no_trees_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match=r"subtree_end\[\d\]"):
        chains(ends)


@pytest.mark.parametrize("seed", range(3))
def test_block_masks_are_those_of_the_pairwise_rule(seed: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    row = random_row(seed, trees=2, tokens=420)
    size = -(-len(row) // BLOCK) * BLOCK
    ends = torch.tensor(row + [size] * (size - len(row)))
    found = block_mask(ends)
    expected = create_block_mask(lambda b, h, i, j: (j <= i) & (i < ends[j]), 1, 1, size, size, device="cpu", BLOCK_SIZE=BLOCK)
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        for query in range(size // BLOCK):
            number = int(getattr(found, counts)[0, 0, query])
            assert number == int(getattr(expected, counts)[0, 0, query])
            assert set(getattr(found, indices)[0, 0, query, :number].tolist()) == set(
                getattr(expected, indices)[0, 0, query, :number].tolist()
            )


def test_flex_attention_with_that_mask_equals_dense_attention() -> None:
    ends = torch.tensor(random_row(5, trees=2, tokens=150))
    with torch.no_grad():
        tensors = [x.detach().float() for x in inputs(len(ends))]
        assert float((flex_tree_attention(*tensors, ends, 0.3) - dense_attention(*tensors, ends, 0.3)).abs().max()) < 1e-5


def test_flex_attention_of_a_share_equals_dense_attention() -> None:
    row = random_row(5, trees=2, tokens=400)
    ends = torch.tensor([min(end, len(row) // 4 * 4) for end in row[: len(row) // 4 * 4]])
    with torch.no_grad():
        tensors = [x.detach().float() for x in inputs(len(ends))]
        expected = dense_attention(*tensors, ends, 0.3)
        for rank in range(2):
            held = zigzag(len(ends), rank, 2)
            tokens = torch.cat([torch.arange(start, stop) for start, stop in held])
            found = flex_tree_attention(tensors[0][tokens], *tensors[1:], ends, 0.3, held)
            assert float((found - expected[tokens]).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 128), (128, 128), (129, 256), (1000, 1024), (1025, 1536), (2049, 3072), (14240, 16384)]
)
def test_lengths_come_in_few_buckets(length: int, expected: int) -> None:
    assert attention.bucket(length) == expected


def test_there_are_two_buckets_to_each_doubling() -> None:
    assert {attention.bucket(length) for length in range(4097, 8193)} == {6144, 8192}
    lengths = {attention.bucket(length) for length in range(1, 2**17 + 1, attention.BLOCK)}
    # Queries and keys of a row that ranks share are of two lengths each; all of it with and without gradients.
    assert len(lengths) * 2 * 2 < attention.GRAPHS


@pytest.mark.parametrize("held", [None, ((0, 512), (3584, 4098))])
def test_padding_attends_to_next_to_nothing(held: tuple[tuple[int, int], ...] | None) -> None:
    """A row just beyond a bucket: of the blocks of what was padded only one is computed for each."""
    row = torch.full((4098,), 4098)
    mask = attention._block_mask(row.numpy().tobytes(), held, torch.device("cpu"))
    computed = mask.kv_num_blocks[0, 0] + mask.full_kv_num_blocks[0, 0]
    tokens = len(row) if held is None else sum(stop - start for start, stop in held)
    padded = computed[-(-tokens // attention.BLOCK) :]
    assert len(padded) == (6144 - 4224 if held is None else 1536 - 1152) // attention.BLOCK
    assert set(padded.tolist()) == {1}


@pytest.fixture
def no_graphs() -> Iterator[None]:
    """dynamo counts the forms of a function in one account for all that compile it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_graphs")
def test_every_bucket_is_compiled_once_and_none_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve lengths, which are more than dynamo compiles of one function by default, with several rows of each."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)  # it refuses gradients on CPU
    attention._block_mask.cache_clear()
    counter = CompileCounter()
    attend = attention.compiled_flex_attention(counter)
    buckets = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for graphs, (size, learns) in enumerate([*((size, False) for size in buckets), (32, True)], start=1):
        for seed, length in enumerate((size, size - 3)):
            assert attention.bucket(length) == size
            ends = torch.tensor([min(end, length) for end in (random_row(seed, trees=4, tokens=size) + [length] * length)[:length]])
            tensors = [x.detach().float().requires_grad_(learns) for x in inputs(length, seed)]
            found = attention.flex_tree_attention(*tensors, ends, 0.3, attend=attend)
            assert float((found - dense_attention(*tensors, ends, 0.3)).detach().abs().max()) < 1e-5
        assert counter.frame_count == graphs
    attention._block_mask.cache_clear()


@pytest.mark.usefixtures("no_graphs")
def test_a_form_too_many_is_an_error_and_no_slow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GRAPHS", 1)
    attend = attention.compiled_flex_attention(CompileCounter())
    row = torch.full((256,), 256)
    attention.flex_tree_attention(*(x.detach().float() for x in inputs(128)), row[:128].clamp(max=128), 0.3, attend=attend)
    with pytest.raises(FailOnRecompileLimitHit):
        attention.flex_tree_attention(*(x.detach().float() for x in inputs(256)), row, 0.3, attend=attend)
