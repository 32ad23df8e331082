"""What a policy on a GPU does beside its matmuls, tried without one: when the host waits for the device, what is copied there.

A policy on the meta device has weights, activations and gradients of the right sizes, and none of them has a value. So whatever would
wait for a GPU's answer raises, wherever it stands, in Megatron and in torch's backward pass as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_config, run_ranks
from groups import random_groups
from host_waits import Operations, host_waits, place
from test_layouts import ROW_TOKENS, with_off_policy_logprobs

from igpo_megatron.algorithms.losses.clipped import Bapo, Cispo, Gspo
from igpo_megatron.algorithms.losses.entropy import Aepo, Hapo
from igpo_megatron.algorithms.losses.registry import LOSSES, Loss, Ppo, Sft, objective
from igpo_megatron.algorithms.losses.tokens import Tokens
from igpo_megatron.packing.tree import ExpertShape, pack_for_scoring, pack_for_training, step_counts
from igpo_megatron.policy import attention, cpu, host_memory, schedule
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import EntropyStats, RolloutGroup

META = torch.device("meta")
ALL: dict[str, Any] = {"kl_coef": 0.01, "entropy_coef": 0.003}
CASES: dict[str, Loss] = {
    "ppo": Ppo(**ALL),
    "ppo, truncated": Ppo(**ALL, mismatch="truncate"),
    "ppo, masked": Ppo(**ALL, mismatch="mask"),
    "ppo, whole sequences masked": Ppo(**ALL, mismatch="mask_sequence"),
    "bapo": Bapo(**ALL),
    "aepo": Aepo(**ALL, balanced_tokens="high_entropy"),
    "aepo, as published": Aepo(**ALL, entropy_advantage="published"),
    "hapo": Hapo(**ALL),
    "gspo": Gspo(**ALL),
    "cispo": Cispo(**ALL),
    "sft": Sft(),
}


def loss_of(config: Loss, groups: list[RolloutGroup]) -> Callable[..., Any]:
    """As `step.minibatches` makes it. BAPO's bounds are found on the host, of log-probs that are there, before the step."""
    entropy = EntropyStats(mean=1.0, std=0.5, threshold=1.5, lowest=0.1, highest=3.0)
    return partial(objective, counts=replace(step_counts(groups), entropy=entropy, bounds=(0.8, 1.2)), config=config)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: Any, scale: float, enable_gqa: bool) -> torch.Tensor:
    """In place of FlexAttention, which has no form for meta tensors."""
    assert block_mask.kv_indices.device == q.device
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=enable_gqa)


class Copies:
    """What goes to the meta device."""

    def __init__(self) -> None:
        self.locked: list[torch.Tensor] = []
        """Page-locked buffers that were asked for."""

        self.others: list[str] = []
        """Where a copy was made from other memory, or one that is waited for."""

    def lock(self, size: int) -> torch.Tensor:
        self.locked.append(torch.empty(size, dtype=torch.uint8))
        return self.locked[-1]

    def see(self, operation: Any, args: Any, kwargs: Any) -> None:
        name = operation.overloadpacket.__name__
        target, source = {"_to_copy": (kwargs.get("device"), args[0]), "copy_": args[:2]}.get(name, (None, None))
        if source is not None and source.device != META and getattr(target, "device", target) == META:
            asynchronous = kwargs.get("non_blocking") and any(source.data_ptr() == buffer.data_ptr() for buffer in self.locked)
            self.others += [] if asynchronous else [place()]


@contextmanager
def valueless(policy: Policy) -> Iterator[tuple[Policy, Copies]]:
    """The policy again, on the meta device."""
    copies = Copies()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_CPU", META)
        patch.setattr(host_memory, "_staging", copies.lock)
        patch.setattr(attention, "chain_attention", partial(attention.flex_tree_attention, attend=sdpa))
        found = Policy(policy.config, replace(policy.ranks, device=META))
        # Over the ranks, once the last row is done; gloo does not know the meta device.
        found.chunks[0].config.finalize_model_grads_func = lambda *args, **kwargs: None
        with Operations(copies.see):
            yield found, copies


def stopped_in(work: Callable[[], Any]) -> str:
    """`file.function` of ours that asked for a value which is not there."""
    with pytest.raises((NotImplementedError, RuntimeError), match=r"meta|nonzero|data.dependent") as error:
        work()
    ours = [entry for entry in error.traceback if "igpo_megatron" in str(entry.path)]
    return f"{Path(ours[-1].path).stem}.{ours[-1].name}"


def waits(policy: Policy, groups: list[RolloutGroup], names: list[str]) -> tuple[dict[str, str], int, int, list[str]]:
    """(where scoring and each loss first wait; rows run, buffers copied and other copies after the first rows)."""
    with valueless(policy) as (meta, copies):
        scoring = pack_for_scoring(groups, row_tokens=ROW_TOKENS)
        rows = pack_for_training(groups, row_tokens=ROW_TOKENS, token_weight=lambda tokens: 1.0)
        assert len(rows) > 2 and any(row.probed is not None for row in scoring)

        def score() -> Any:
            return schedule.forward_only(meta.wrapped, scoring, temperature=1.0, probe_temperature=0.5, device=META, with_entropy=True)

        def learn(loss: Callable[..., Any]) -> Any:
            return meta.forward_backward(rows, loss)

        places = {"scoring": stopped_in(score)}
        copies.locked.clear(), copies.others.clear()  # what the first row moves there stays there
        places |= {name: stopped_in(partial(learn, loss_of(CASES[name], groups))) for name in names}
        return places, len(rows), len(copies.locked), copies.others


@pytest.mark.parametrize(("recompute", "names"), [("none", list(CASES)), ("full", ["ppo"])])
def test_no_loss_keeps_the_host_waiting_before_the_last_row(hf_folders: dict[str, Path], recompute: str, names: list[str]) -> None:
    assert {config.name for config in CASES.values()} == set(LOSSES)
    config = make_config(hf_folders["qwen2_tied"], parallel__distributed_optimizer=False, model__recompute=recompute)
    ((places, rows, copied, others),) = run_ranks(waits, config, with_off_policy_logprobs(random_groups(seed=2)), names)
    assert places == {"scoring": "schedule.forward_only", **dict.fromkeys(names, "schedule.summed")}
    # A buffer for each row, and one for the mask of each, which is kept.
    assert copied == rows * len(names) + rows
    assert others == []


def mistakes(policy: Policy, groups: list[RolloutGroup]) -> tuple[list[str], list[str]]:
    """(where losses that wait do so, copies from ordinary memory)."""
    with valueless(policy) as (meta, copies):
        rows = pack_for_training(groups, row_tokens=ROW_TOKENS, token_weight=lambda tokens: 1.0)

        def by_mask(tokens: Tokens) -> Any:
            return tokens.logprobs[tokens.weight > 0].sum(), {}

        def by_number(tokens: Tokens) -> Any:
            return tokens.logprobs.sum() / float(tokens.weight.sum()), {}

        def by_copy(tokens: Tokens) -> Any:
            return (tokens.logprobs * torch.ones(len(tokens.logprobs)).to(tokens.logprobs.device)).sum(), {}

        run = partial(meta.forward_backward, rows)
        places = [stopped_in(partial(run, loss)) for loss in (by_mask, by_number)]
        copies.others.clear()
        places.append(stopped_in(partial(run, by_copy)))
        return places, copies.others


def test_what_waits_in_a_loss_is_found(hf_folders: dict[str, Path]) -> None:
    groups = with_off_policy_logprobs(random_groups(seed=2, probes=False))
    ((places, others),) = run_ranks(mistakes, make_config(hf_folders["qwen2_tied"], parallel__distributed_optimizer=False), groups)
    assert places == ["policy.loss_of", "policy.loss_of", "schedule.summed"]
    assert set(others) == {"test_device.by_copy"}


COUNTED_ON_HOST = {"context.merge_of", "context.part_of", "model.split_of", "schedule._head_inputs"}
"""What a row holds, before it is uploaded."""

HELD_BY_HOST = {"tree_plan._plan", "tree_plan._slice_or", "random.fork"}
"""The plan of a row, which CUDA does without, and the state of Megatron's generators."""

ON_THE_WAY = ("rows.", "wire.")
"""Rows travel as bytes of the host, before the first of them is computed."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "sequence": {"parallel__tensor": 2, "parallel__sequence": True},
    "context": {"parallel__context": 2},
    "experts": {},
    "experts, replayed": {"rollout__routing_replay": True},
}


def waits_by_place(policy: Policy, groups: list[RolloutGroup]) -> list[dict[str, int]]:
    """Of scoring and of learning, where `host_waits` sees them."""
    experts = ExpertShape(2, 2) if policy.config.rollout.routing_replay else None
    many = {"row_tokens": ROW_TOKENS, "multiple": policy.row_multiple, "experts": experts}
    scoring, rows = pack_for_scoring(groups, **many), pack_for_training(groups, **many, token_weight=lambda tokens: 1.0)
    settings = {"temperature": 1.0, "device": policy.ranks.device}
    with host_waits(policy.ranks.device) as scored:
        schedule.forward_only(policy.wrapped, scoring, probe_temperature=0.5, **settings)
    with host_waits(policy.ranks.device) as learnt:
        policy.forward_backward(rows, loss_of(CASES["gspo"], groups))
    return [dict(scored), dict(learnt)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_other_layouts_only_megatrons_experts_wait(hf_folders: dict[str, Path], layout: str) -> None:
    """Where a rank holds part of a row its share is counted on the host.

    Megatron's permutation of tokens to experts, 0.16's without TransformerEngine, asks each layer how many there are.
    """
    architecture = "qwen3_moe" if "experts" in layout else "qwen3"
    ranks = run_ranks(
        waits_by_place, make_config(hf_folders[architecture], **LAYOUTS[layout]), with_off_policy_logprobs(random_groups(seed=2))
    )
    for found in ranks:
        places = {name for counts in found for name in counts if not name.startswith(ON_THE_WAY)}
        others = places - COUNTED_ON_HOST - HELD_BY_HOST
        assert others <= ({"moe_utils.permute"} if "experts" in layout else set())


def test_metrics_are_summed_by_name() -> None:
    rows = [{"loss": torch.tensor(1.5), "tokens": torch.tensor(2)}, {"loss": torch.tensor(0.25), "tokens": torch.tensor(3)}]
    assert schedule.summed(rows) == {"loss": 1.75, "tokens": 5.0}
    assert schedule.summed([]) == {}
    assert schedule.summed([{"a": torch.tensor(1.0)}, {"b": torch.tensor(2.0)}]) == {"a": 1.0, "b": 2.0}
