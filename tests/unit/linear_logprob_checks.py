"""Cases, fp64 oracle and checks of linear_logprob, shared by tests/unit (torch, Triton interpreter) and tests/gpu (compiled)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from unittest import mock

import pytest
import torch

from igpo_megatron.kernels import linear_logprob as module
from igpo_megatron.kernels.linear_logprob import WORKSPACE, linear_logprob


@dataclass(frozen=True)
class Setup:
    """What is under test."""

    implementation: str
    form: str = "auto"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    workspace: int = WORKSPACE

    def __str__(self) -> str:
        return "-".join((self.implementation, self.form, self.device, str(self.dtype).removeprefix("torch.")))

    def tolerances(self) -> tuple[float, float]:
        """(absolute error of values in nats beside a 4e-7 relative one, error of gradients relative to the largest entry).

        Inputs are rounded before the oracle sees them, so bf16 widens only the gradients, which are returned in it.
        """
        return 1e-5, 1e-5 if self.dtype == torch.float32 else 2e-2


@dataclass(frozen=True)
class Case:
    """One problem; tensors follow from it alone."""

    name: str
    rows: int
    hidden: int
    vocab: int
    temperature: float = 1.0
    padding: int = 0
    """Weight rows behind the vocabulary, large enough to dominate if they were counted."""
    ignored: tuple[int, ...] = ()
    """Positions whose target is -100."""
    repeated: int = 0
    """Rows of the hidden states when targets share them; 0: one each, no `rows`."""
    scale: float = 1.0

    def inputs(self, setup: Setup) -> Inputs:
        generator = torch.Generator().manual_seed(self.rows + 7 * self.hidden + 11 * self.vocab)
        hidden = self.scale * torch.randn(self.repeated or self.rows, self.hidden, generator=generator, dtype=torch.float64)
        weight = torch.randn(self.vocab, self.hidden, generator=generator, dtype=torch.float64) / self.hidden**0.5
        weight = torch.cat((weight, torch.full((self.padding, self.hidden), 3.0)))
        targets = torch.randint(0, self.vocab, (self.rows,), generator=generator)
        targets[:1] = self.vocab - 1
        targets[list(self.ignored)] = -100
        rows = torch.randint(0, self.repeated, (self.rows,), generator=generator) if self.repeated else None
        upstream = torch.randn(3, self.rows, generator=generator)
        to = {"device": setup.device}
        return Inputs(
            hidden.to(setup.dtype).to(**to),
            weight.to(setup.dtype).to(**to),
            targets.to(**to),
            None if rows is None else rows.to(**to),
            upstream.to(**to),
        )


@dataclass(frozen=True)
class Inputs:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor | None
    upstream: torch.Tensor
    """[3, N], gradients of logp, entropy and lse."""


@dataclass(frozen=True)
class Answer:
    """logp, entropy, lse [N] and the gradients of their sum weighted by `upstream`."""

    logp: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor


CASES = [
    Case("one_row", 1, 8, 11),
    Case("odd", 47, 31, 123, temperature=0.5),
    Case("several_tiles", 70, 40, 420, temperature=0.7),
    Case("whole_tiles", 32, 64, 256, temperature=2.0),
    Case("padded_vocabulary", 19, 32, 260, padding=40),
    Case("ignored_targets", 21, 16, 150, ignored=(0, 5, 20)),
    Case("all_ignored", 3, 16, 40, ignored=(0, 1, 2)),
    Case("repeated_rows", 40, 16, 90, repeated=6),
    Case("logits_about_80", 33, 24, 301, scale=24.0),
    Case("everything", 50, 20, 270, temperature=1.3, padding=51, ignored=(1, 2, 49), repeated=9),
]


def run(case: Case, setup: Setup, given: Inputs | None = None, **options: object) -> Answer:
    """Ours."""
    given = given or case.inputs(setup)
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    settings = {"vocab_size": case.vocab, "temperature": case.temperature, "workspace": setup.workspace, **options}
    values = linear_logprob(hidden, weight, given.targets, given.rows, implementation=setup.implementation, form=setup.form, **settings)
    sum((upstream * value).sum() for upstream, value in zip(given.upstream, values, strict=True)).backward()
    return Answer(*(value.detach() for value in values), hidden.grad, weight.grad)


@dataclass(frozen=True)
class Mistake:
    """A way to be wrong that the tolerances have to notice."""

    temperature: float = 1.0
    """Factor on the temperature."""
    dropped: tuple[int, ...] = ()
    """Upstream gradients that are lost: 0 logp, 1 entropy, 2 lse."""
    counts_padding: bool = False
    rounds_logits: bool = False
    loses_column: bool = False
    """The last column is not counted, as with a wrong edge mask."""
    trains_ignored: bool = False


NO_MISTAKE = Mistake()


def oracle(case: Case, setup: Setup, mistake: Mistake = NO_MISTAKE) -> Answer:
    """fp64 log-softmax of the same (rounded) inputs; with `mistake`, a wrong answer."""
    given = case.inputs(setup)
    hidden, weight = given.hidden.double().requires_grad_(), given.weight.double().requires_grad_()
    columns = weight if mistake.counts_padding else weight[: case.vocab - mistake.loses_column]
    z = (hidden if given.rows is None else hidden[given.rows]) @ columns.t() / (case.temperature * mistake.temperature)
    if mistake.rounds_logits:
        z = z + (z.bfloat16().double() - z).detach()
    logprobs = torch.log_softmax(z, -1)
    kept = (given.targets >= 0).double()
    picked = logprobs.gather(-1, given.targets.clamp(0, len(columns) - 1)[:, None])[:, 0]
    values = [value * kept for value in (picked, -(logprobs.exp() * logprobs).sum(-1), torch.logsumexp(z, -1))]
    trained = [picked if mistake.trains_ignored else values[0], *values[1:]]
    parts = zip(given.upstream.double(), trained, strict=True)
    sum((upstream * value).sum() for index, (upstream, value) in enumerate(parts) if index not in mistake.dropped).backward()
    return Answer(*(value.detach() for value in values), hidden.grad, weight.grad)


def differences(found: Answer, wanted: Answer, setup: Setup) -> list[str]:
    """Fields that are further apart than the tolerances allow."""
    absolute, relative = setup.tolerances()
    wrong = []
    for name in ("logp", "entropy", "lse"):
        got, true = getattr(found, name).double(), getattr(wanted, name).double()
        # Both terms of logp = t - lse are rounded where |lse| is.
        allowed = absolute + 4e-7 * wanted.lse.abs().double()
        if got.shape != true.shape or not bool(((got - true).abs() <= allowed).all()):
            wrong.append(name)
    for name in ("grad_hidden", "grad_weight"):
        got, true = getattr(found, name).double(), getattr(wanted, name).double()
        if got.shape != true.shape or not float((got - true).abs().max()) <= relative * float(true.abs().max()):
            wrong.append(name)
    return wrong


def each_case_equals_log_softmax_in_fp64(setup: Setup) -> None:
    for case in CASES:
        assert differences(run(case, setup), oracle(case, setup), setup) == [], case.name


def wrong_answers_are_outside_the_tolerances(setup: Setup) -> None:
    case = CASES[-1]
    found = run(case, setup)
    everything = {"logp", "entropy", "lse", "grad_hidden", "grad_weight"}
    gradients = {"grad_hidden", "grad_weight"}
    for mistake, noticed in (
        (Mistake(temperature=1.001), {"logp", "entropy", "lse"}),
        (Mistake(temperature=1.05), everything),
        (Mistake(dropped=(0,)), gradients),
        (Mistake(dropped=(1,)), gradients),
        (Mistake(dropped=(2,)), gradients),
        (Mistake(counts_padding=True), everything),
        (Mistake(loses_column=True), everything),
        (Mistake(rounds_logits=True), {"logp", "entropy", "lse"}),
        (Mistake(trains_ignored=True), gradients),
    ):
        assert noticed <= set(differences(found, oracle(case, setup, mistake), setup)), mistake


def padding_columns_get_no_gradient(setup: Setup) -> None:
    case = Case("padded", 19, 32, 260, padding=40)
    assert float(run(case, setup).grad_weight[260:].abs().max()) == 0.0


def a_padding_target_has_probability_zero(setup: Setup) -> None:
    case = Case("padded", 3, 16, 40, padding=8)
    given = case.inputs(setup)
    targets = torch.tensor([3, 45, 39], device=setup.device)
    options = {"implementation": setup.implementation, "form": setup.form}
    logp, entropy, lse = linear_logprob(given.hidden, given.weight, targets, vocab_size=40, **options)
    assert logp.isinf().tolist() == [False, True, False]
    assert bool((entropy.isfinite() & lse.isfinite()).all())


def equal_logits_are_uniform(setup: Setup) -> None:
    case = Case("equal", 9, 16, 300)
    given = replace(case.inputs(setup), weight=torch.zeros(300, 16, dtype=setup.dtype, device=setup.device))
    found = run(case, setup, given)
    log_v = torch.full((9,), 300.0, device=setup.device).log()
    for value, wanted in ((found.logp, -log_v), (found.entropy, log_v), (found.lse, log_v)):
        assert torch.allclose(value, wanted, atol=1e-5)


def no_rows_give_empty_results_and_zero_gradients(setup: Setup) -> None:
    case = Case("empty", 4, 8, 20)
    given = case.inputs(setup)
    none = torch.zeros(0, dtype=torch.int64, device=setup.device)
    found = run(case, setup, replace(given, targets=none, rows=none, upstream=given.upstream[:, :0]))
    assert found.logp.shape == found.entropy.shape == found.lse.shape == (0,)
    assert float(found.grad_hidden.abs().max()) == float(found.grad_weight.abs().max()) == 0.0


def without_entropy_the_rest_is_the_same(setup: Setup) -> None:
    case = CASES[-1]
    given = case.inputs(setup)
    given = replace(given, upstream=given.upstream * torch.tensor([1.0, 0.0, 1.0], device=setup.device)[:, None])
    whole, bare = run(case, setup, given), run(case, setup, given, need_entropy=False)
    assert float(bare.entropy.abs().max()) == 0.0
    assert differences(replace(bare, entropy=whole.entropy), whole, setup) == []
    hidden = given.hidden.clone().requires_grad_()
    options = {"implementation": setup.implementation, "form": setup.form}
    logp, entropy, _ = linear_logprob(hidden, given.weight, given.targets, given.rows, need_entropy=False, **options)
    assert logp.requires_grad and not entropy.requires_grad


def a_frozen_side_gets_no_gradient_and_leaves_the_other_alone(setup: Setup) -> None:
    case = CASES[1]
    given = case.inputs(setup)
    both = run(case, setup, given)
    options = {"implementation": setup.implementation, "form": setup.form, "temperature": case.temperature}
    for frozen in ("hidden", "weight"):
        hidden, weight = given.hidden.clone(), given.weight.clone()
        (weight if frozen == "hidden" else hidden).requires_grad_()
        values = linear_logprob(hidden, weight, given.targets, **options)
        sum((upstream * value).sum() for upstream, value in zip(given.upstream, values, strict=True)).backward()
        assert (hidden if frozen == "hidden" else weight).grad is None
        grad, wanted = (weight.grad, both.grad_weight) if frozen == "hidden" else (hidden.grad, both.grad_hidden)
        assert torch.equal(grad, wanted)


def two_runs_give_the_same_bits(setup: Setup) -> None:
    case = Case("repeats", 60, 24, 280, repeated=4)
    first, second = run(case, setup), run(case, setup)
    for name in ("logp", "entropy", "lse", "grad_hidden", "grad_weight"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def the_order_of_rows_does_not_matter(setup: Setup) -> None:
    case = CASES[2]
    given = case.inputs(setup)
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(0)).to(setup.device)
    shuffled = replace(given, hidden=given.hidden[order], targets=given.targets[order], upstream=given.upstream[:, order])
    straight, found = run(case, setup, given), run(case, setup, shuffled)
    for name in ("logp", "entropy", "lse"):
        assert torch.allclose(getattr(straight, name)[order], getattr(found, name), rtol=1e-6, atol=2e-6), name
    assert torch.allclose(straight.grad_hidden[order], found.grad_hidden, rtol=1e-2 if setup.dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def vocabulary_shards_add_up_to_the_whole(setup: Setup) -> None:
    """2 and 4 ranks played by one: unequal shards, padding inside one, a shard of nothing but padding."""
    case = Case("sharded", 37, 20, 290, temperature=0.8, padding=60, ignored=(3,))
    given, wanted = case.inputs(setup), oracle(case, setup)
    for cuts in ((0, 170, 350), (0, 100, 101, 300, 350)):
        found = run_shards(case, setup, given, cuts)
        assert differences(found, wanted, setup) == [], cuts


def run_shards(case: Case, setup: Setup, given: Inputs, cuts: tuple[int, ...]) -> Answer:
    """The first pass collects every shard's record, the second gives each shard all of them, as the all-gather does."""
    shards = [(start, replace(given, weight=given.weight[start:stop])) for start, stop in pairwise(cuts)]
    records: list[torch.Tensor] = []
    with mock.patch.object(module, "_all_gather", lambda record, group: records.append(record) or record[None]):
        for start, shard in shards:
            linear_logprob(
                shard.hidden,
                shard.weight,
                shard.targets,
                vocab_start=start,
                vocab_size=case.vocab,
                temperature=case.temperature,
                implementation=setup.implementation,
                form=setup.form,
            )
    with mock.patch.object(module, "_all_gather", lambda record, group: torch.stack(records)):
        answers = [run(case, setup, shard, vocab_start=start) for start, shard in shards]
    return replace(
        answers[-1],
        grad_hidden=sum(answer.grad_hidden.double() for answer in answers),
        grad_weight=torch.cat([answer.grad_weight for answer in answers]),
    )


def non_contiguous_hidden_states_are_fine(setup: Setup) -> None:
    case = CASES[3]
    given = case.inputs(setup)
    wide = torch.stack((given.hidden, given.hidden + 1), 1)
    strided = replace(given, hidden=wide[:, 0])
    transposed = replace(given, weight=given.weight.t().contiguous().t())
    for variant in (strided, transposed):
        assert differences(run(case, setup, variant), oracle(case, setup), setup) == []


CHECKS: list[Callable[[Setup], None]] = [
    each_case_equals_log_softmax_in_fp64,
    wrong_answers_are_outside_the_tolerances,
    padding_columns_get_no_gradient,
    a_padding_target_has_probability_zero,
    equal_logits_are_uniform,
    no_rows_give_empty_results_and_zero_gradients,
    without_entropy_the_rest_is_the_same,
    a_frozen_side_gets_no_gradient_and_leaves_the_other_alone,
    two_runs_give_the_same_bits,
    the_order_of_rows_does_not_matter,
    vocabulary_shards_add_up_to_the_whole,
    non_contiguous_hidden_states_are_fine,
]

BF16_CHECKS = (each_case_equals_log_softmax_in_fp64, wrong_answers_are_outside_the_tolerances)
"""Those in which the dtype matters."""

every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
