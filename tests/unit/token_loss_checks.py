"""fp64 oracle and checks of linear_logprob_with_gradients, shared by tests/unit (torch, Triton interpreter) and tests/gpu (compiled)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from linear_logprob_checks import CASES, Answer, Case, Inputs, Setup, differences

from igpo_megatron.kernels.linear_logprob import gather_rows
from igpo_megatron.kernels.token_loss import Upstream, linear_logprob_with_gradients

SCALE = 2.5
"""What the loss is multiplied by on its way back, as by Megatron's loss scaling."""

ROWS = 7
"""Of a block, so that most cases have several and a ragged last one."""


def loss_of(logp: torch.Tensor, entropy: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """A loss on tokens whose derivatives depend on the log-prob and on the entropy. [N], [N], [3, N] -> scalar"""
    return (upstream[0] * logp * (1 + 0.05 * logp) + upstream[1] * entropy * (1 + 0.2 * entropy)).sum()


def upstream_of(given: Inputs) -> Upstream:
    def derivatives(block: slice, logp: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, h = given.upstream[0, block], given.upstream[1, block]
        return g * (1 + 0.1 * logp), h * (1 + 0.4 * entropy)

    return derivatives


def run(
    case: Case,
    setup: Setup,
    given: Inputs | None = None,
    *,
    rows: int = ROWS,
    wrap: Callable[[Upstream], Upstream] = lambda upstream: upstream,
    scale: float = SCALE,
    **options: object,
) -> Answer:
    """Ours. `wrap` makes a mistake."""
    given = given or case.inputs(setup)
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    logp, entropy, carrier = linear_logprob_with_gradients(
        hidden if given.rows is None else gather_rows(hidden, given.rows),
        weight,
        given.targets,
        wrap(upstream_of(given)),
        vocab_size=case.vocab,
        temperature=case.temperature,
        implementation=setup.implementation,
        workspace=4 * len(weight) * rows,
        **options,
    )
    assert not logp.requires_grad and not entropy.requires_grad and carrier.item() == 0.0
    (scale * carrier).backward()
    return Answer(logp, entropy, torch.zeros_like(logp), hidden.grad, weight.grad)


def oracle(case: Case, setup: Setup) -> Answer:
    """Autograd through a log-softmax of the same (rounded) inputs, in fp64."""
    given = case.inputs(setup)
    hidden, weight = given.hidden.double().requires_grad_(), given.weight.double().requires_grad_()
    z = (hidden if given.rows is None else hidden[given.rows]) @ weight[: case.vocab].t() / case.temperature
    logprobs = torch.log_softmax(z, -1)
    kept = (given.targets >= 0).double()
    logp = logprobs.gather(-1, given.targets.clamp(min=0)[:, None])[:, 0] * kept
    entropy = -(logprobs.exp() * logprobs).sum(-1) * kept
    (SCALE * loss_of(logp, entropy, given.upstream.double())).backward()
    return Answer(logp.detach(), entropy.detach(), torch.logsumexp(z, -1).detach(), hidden.grad, weight.grad)


def each_case_equals_autograd_in_fp64(setup: Setup) -> None:
    for case in CASES:
        wanted = oracle(case, setup)
        for rows in (ROWS, 1000):
            assert differences(at_its_own_lse(run(case, setup, rows=rows), wanted), wanted, setup) == [], (case.name, rows)


def at_its_own_lse(found: Answer, wanted: Answer) -> Answer:
    """lse is not returned."""
    return replace(found, lse=wanted.lse.to(found.logp.dtype))


def _neighbours(upstream: Upstream) -> Upstream:
    """Two rows of a block change coefficients."""

    def derivatives(block: slice, logp: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, h = upstream(block, logp, entropy)
        return g.roll(1), h.roll(1)

    return derivatives


def _another_block(upstream: Upstream) -> Upstream:
    """Every block takes the coefficients of the first rows."""

    def derivatives(block: slice, logp: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return upstream(slice(0, len(logp)), logp, entropy)

    return derivatives


def _loses_last(upstream: Upstream) -> Upstream:
    """The last, ragged block sends nothing back."""

    def derivatives(block: slice, logp: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, h = upstream(block, logp, entropy)
        return (g, h) if block.start < 42 else (0 * g, 0 * h)

    return derivatives


def _without_entropy(upstream: Upstream) -> Upstream:
    def derivatives(block: slice, logp: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, h = upstream(block, logp, entropy)
        return g, 0 * h

    return derivatives


def _as_if_ignored(upstream: Upstream) -> Upstream:
    """As if log-prob and entropy were 0."""
    return lambda block, logp, entropy: upstream(block, 0 * logp, 0 * entropy)


def wrong_gradients_are_outside_the_tolerances(setup: Setup) -> None:
    case = CASES[-1]
    wanted = oracle(case, setup)
    for name, mistake in {
        "scale": {"scale": 1.05 * SCALE},
        "neighbours": {"wrap": _neighbours},
        "another block": {"wrap": _another_block},
        "last block": {"wrap": _loses_last},
        "entropy": {"wrap": _without_entropy},
        "linear": {"wrap": _as_if_ignored},
    }.items():
        found = run(case, setup, **mistake)
        assert set(differences(at_its_own_lse(found, wanted), wanted, setup)) == {"grad_hidden", "grad_weight"}, name


def padding_columns_get_no_gradient(setup: Setup) -> None:
    assert float(run(Case("padded", 19, 32, 260, padding=40), setup).grad_weight[260:].abs().max()) == 0.0


def no_rows_give_empty_results_and_zero_gradients(setup: Setup) -> None:
    case = Case("empty", 4, 8, 20)
    given = case.inputs(setup)
    none = torch.zeros(0, dtype=torch.int64, device=setup.device)
    found = run(case, setup, replace(given, targets=none, rows=none, upstream=given.upstream[:, :0]))
    assert found.logp.shape == found.entropy.shape == (0,)
    assert float(found.grad_hidden.abs().max()) == float(found.grad_weight.abs().max()) == 0.0


def a_shard_of_padding_alone_has_no_gradient(setup: Setup) -> None:
    case = Case("padding", 9, 8, 20, padding=12)
    given = case.inputs(setup)
    found = run(case, setup, replace(given, weight=given.weight[20:]), vocab_start=20)
    assert float(found.grad_hidden.abs().max()) == float(found.grad_weight.abs().max()) == 0.0


def a_frozen_side_gets_no_gradient_and_leaves_the_other_alone(setup: Setup) -> None:
    case = CASES[1]
    given = case.inputs(setup)
    both = run(case, setup, given, scale=1.0)
    for frozen in ("hidden", "weight"):
        hidden, weight = given.hidden.clone(), given.weight.clone()
        (weight if frozen == "hidden" else hidden).requires_grad_()
        settings = {"temperature": case.temperature, "implementation": setup.implementation, "workspace": 4 * len(weight) * ROWS}
        linear_logprob_with_gradients(hidden, weight, given.targets, upstream_of(given), **settings)[2].backward()
        assert (hidden if frozen == "hidden" else weight).grad is None
        grad, wanted = (weight.grad, both.grad_weight) if frozen == "hidden" else (hidden.grad, both.grad_hidden)
        assert torch.equal(grad, wanted)


def an_entropy_that_is_not_computed_has_no_gradient(setup: Setup) -> None:
    found, wanted = run(CASES[1], setup, need_entropy=False), run(CASES[1], setup, wrap=_without_entropy)
    assert not found.entropy.any() and torch.equal(found.logp, wanted.logp)
    assert torch.equal(found.grad_hidden, wanted.grad_hidden) and torch.equal(found.grad_weight, wanted.grad_weight)


def two_runs_give_the_same_bits(setup: Setup) -> None:
    case = Case("repeats", 60, 24, 280, repeated=4)
    first, second = run(case, setup), run(case, setup)
    for name in ("logp", "entropy", "grad_hidden", "grad_weight"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


CHECKS: list[Callable[[Setup], None]] = [
    each_case_equals_autograd_in_fp64,
    wrong_gradients_are_outside_the_tolerances,
    padding_columns_get_no_gradient,
    no_rows_give_empty_results_and_zero_gradients,
    a_shard_of_padding_alone_has_no_gradient,
    a_frozen_side_gets_no_gradient_and_leaves_the_other_alone,
    an_entropy_that_is_not_computed_has_no_gradient,
    two_runs_give_the_same_bits,
]

BF16_CHECKS = (each_case_equals_autograd_in_fp64, wrong_gradients_are_outside_the_tolerances)
"""Those in which the dtype matters."""

every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
