"""Only rows travel: the main rank holds the groups, and every data-parallel part is sent its own rows and nothing else."""

from __future__ import annotations

import gc
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import held, random_groups
from test_ends import run_ranks as run_train
from test_ends import settings

from igpo_megatron.packing import tree
from igpo_megatron.packing.tree import PackedRow, pack_for_training
from igpo_megatron.policy import policy as policies
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import Node, RolloutGroup, UserError

LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "dp2": {"parallel__data": 2},
    "dp4": {"parallel__data": 4},
    "dp2_tp2": {"parallel__data": 2, "parallel__tensor": 2},
    "dp2_pp2": {"parallel__data": 2, "parallel__pipeline": 2},
    "dp2_cp2": {"parallel__data": 2, "parallel__context": 2},
    "tp2_pp2": {"parallel__tensor": 2, "parallel__pipeline": 2},
}


def packed(policy: Policy, groups: list[RolloutGroup], experts: bool) -> list[PackedRow]:
    """An odd number of rows with every kind of field, where there are groups."""
    rows = pack_for_training(held(policy, groups), row_tokens=40, multiple=policy.row_multiple, token_weight=lambda tokens: 1 / tokens)
    del rows[len(rows) - 1 + len(rows) % 2 :]
    for number, row in enumerate(rows):
        row.experts = torch.full((row.num_tokens, 2, 2), number, dtype=torch.int16) if experts else None
        row.probed = torch.arange(len(row.targets)) % 2 == 0 if number % 2 else None
    return rows


def dealt(policy: Policy, groups: list[RolloutGroup], experts: bool = True) -> tuple[int, list[int], list[PackedRow], list[PackedRow]]:
    """(data-parallel rank, places, rows that came, all rows as the main rank has them)."""
    rows = packed(policy, groups, experts)
    mine, places = policy._share(rows)
    return policy.ranks.data_rank, places, mine, rows


def same(left: PackedRow, right: PackedRow) -> bool:
    """Every field but `origin`, bit for bit and with its dtype."""

    def equal(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return all(equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(PackedRow) if field.name != "origin")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_data_rank_gets_its_own_rows_and_all_rows_are_dealt_once(hf_folders: dict[str, Path], layout: str) -> None:
    results = run_ranks(dealt, make_config(hf_folders["qwen3"], **LAYOUTS[layout]), random_groups(seed=2, count=5, probes=False))
    (*_, rows), parts = results[0], {}
    assert len(rows) > 4 and len(rows) % 2, "one part has to be filled up by a blank row"
    for number, (part, places, mine, others) in enumerate(results):
        assert others == [] or number == 0
        assert parts.setdefault(part, places) == places, "ranks of one part compute the same rows"
        for place, row in zip(places, mine, strict=True):
            assert same(row, rows[place]) if place >= 0 else not len(row.targets)
            assert number == 0 or row.origin == [], "where results belong is the main rank's business"
    assert sorted(place for places in parts.values() for place in places if place >= 0) == list(range(len(rows)))
    assert len({len(places) for places in parts.values()}) == 1, "parts step through their rows together"


def test_a_row_of_another_rank_would_be_noticed(hf_folders: dict[str, Path]) -> None:
    ((_, _, mine, rows),) = run_ranks(dealt, make_config(hf_folders["qwen3"]), random_groups(seed=2, count=5, probes=False))
    assert same(mine[0], rows[0]) != same(mine[0], rows[1])


def nothing_dealt(policy: Policy) -> tuple[Any, list[torch.Tensor]]:
    return policy._share([]), policy.log_probs([])


def test_where_the_main_rank_has_no_rows_no_rank_computes_anything(hf_folders: dict[str, Path]) -> None:
    config = make_config(hf_folders["qwen3"], parallel__data=2, parallel__tensor=2)
    assert run_ranks(nothing_dealt, config) == [(([], []), [])] * 4


def count_groups(path: Path) -> Any:
    """What a rank does before it starts: note how many groups and nodes it makes or receives until it trains."""

    def prepare(rank: int) -> None:
        def alive() -> int:
            gc.collect()
            return sum(isinstance(found, RolloutGroup | Node) for found in gc.get_objects())

        inherited, forward_backward = alive(), Policy.forward_backward

        def counted(self: Policy, *arguments: Any, **named: Any) -> Any:
            (path.parent / f"held{rank}.json").write_text(json.dumps(alive() - inherited))
            return forward_backward(self, *arguments, **named)

        policies.Policy.forward_backward = counted  # type: ignore[method-assign]

    return prepare


def test_no_group_is_on_another_rank_when_a_step_is_trained(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    path = settings(hf_folders["qwen2"], tmp_path, parallel__tensor=1, parallel__data=2)
    ending, printed = run_train(path, count_groups(path))
    assert ending.code == 0, printed
    main, other = (json.loads((tmp_path / f"held{rank}.json").read_text()) for rank in range(2))
    assert main > 3 and other == 0


@pytest.mark.parametrize("layout", [{"parallel__tensor": 1, "parallel__data": 2}, {"parallel__tensor": 2}], ids=["data", "tensor"])
@pytest.mark.parametrize("name", ["pack_for_scoring", "pack_for_training"])
def test_a_mistake_in_packing_ends_all_ranks_with_its_sentence(
    hf_folders: dict[str, Path], tmp_path: Path, layout: dict[str, int], name: str
) -> None:
    def prepare(rank: int) -> None:
        original = getattr(tree, name)

        def packs(groups: Any, **named: Any) -> Any:
            if groups and groups[0].prompt.source != "canary":
                raise UserError("recorded experts come from another model")
            return original(groups, **named)

        setattr(tree, name, packs)

    ending, printed = run_train(settings(hf_folders["qwen2"], tmp_path, **layout), prepare)
    assert (ending.kind, ending.code, ending.sentence) == ("error", 2, "recorded experts come from another model")
    assert "Traceback" not in printed
