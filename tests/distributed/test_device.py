"""What a policy on a GPU does beside its matmuls, tried with a device that is made up: when it waits for the host, how it attends."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_config, run_ranks
from groups import random_groups
from test_layouts import row_loss, with_off_policy_logprobs

from igpo_megatron.actor import schedule
from igpo_megatron.actor.policy import Policy
from igpo_megatron.packing.tree import PackedRow, pack_for_training, step_counts
from igpo_megatron.types import RolloutGroup

WAITS = {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
"""Methods of a tensor that wait for its device."""

FOUND: Counter[str] = Counter()


class OnDevice(torch.Tensor):
    """A tensor on a device that is made up: whatever is computed from it is one too, and what waits for it is counted."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in WAITS:
            FOUND[function.__name__] += 1
            args = [value.as_subclass(torch.Tensor) if isinstance(value, OnDevice) else value for value in args]
        return super().__torch_function__(function, types, args, kwargs or {})


def to_made_up_device(row: PackedRow, device: torch.device) -> PackedRow:
    tensors = {field.name: getattr(row, field.name) for field in fields(row)}
    return replace(row, **{name: value.as_subclass(OnDevice) for name, value in tensors.items() if isinstance(value, torch.Tensor)})


def waits(policy: Policy, groups: list[RolloutGroup]) -> list[tuple[int, dict[str, int], dict[str, int]]]:
    """(rows, what was waited for in scoring, in training), of few and of many rows."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "to_device", to_made_up_device)
        for row_tokens in (400, 60):
            rows = pack_for_training(groups, row_tokens=row_tokens, token_weight=lambda tokens: 1.0)
            FOUND.clear()
            scores = schedule.forward_only(policy.wrapped, rows, temperature=1.0, device=policy.ranks.device)
            assert [len(score) for score in scores] == [len(row.targets) for row in rows]
            scoring = dict(FOUND)
            FOUND.clear()
            loss = partial(row_loss, step_counts(groups))
            sums = schedule.forward_backward(policy.wrapped, rows, loss, temperature=1.0, device=policy.ranks.device)
            assert sums["loss"] != 0
            found.append((len(rows), scoring, dict(FOUND)))
    return found


def test_the_host_waits_for_the_device_once_however_many_rows_there_are(hf_folders: dict[str, Path]) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    ((few, many),) = run_ranks(waits, make_config(hf_folders["qwen2_tied"]), groups)
    assert many[0] >= 2 * few[0]
    for rows, scoring, training in (few, many):
        assert (scoring, training) == ({"cpu": 1}, {"tolist": 1}), f"{rows} rows"


def test_metrics_are_summed_by_name() -> None:
    rows = [{"loss": torch.tensor(1.5), "tokens": torch.tensor(2)}, {"loss": torch.tensor(0.25), "tokens": torch.tensor(3)}]
    assert schedule.summed(rows) == {"loss": 1.75, "tokens": 5.0}
    assert schedule.summed([]) == {}
    assert schedule.summed([{"a": torch.tensor(1.0)}, {"b": torch.tensor(2.0)}]) == {"a": 1.0, "b": 2.0}
