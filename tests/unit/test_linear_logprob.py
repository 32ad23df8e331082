"""linear_logprob against a plain fp64 log-softmax, in values and gradients."""

from __future__ import annotations

import pytest
import torch

from igpo_megatron.kernels import linear_logprob as module
from igpo_megatron.kernels.linear_logprob import linear_logprob


def inputs(rows: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + hidden + vocab)
    return (
        (scale * torch.randn(rows, hidden, generator=generator, dtype=torch.float64)).to(dtype),
        torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(0, vocab, (rows,), generator=generator),
    )


def oracle(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, -1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize(("rows", "hidden", "vocab"), [(1, 8, 11), (47, 31, 123), (130, 16, 500)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_values_and_gradients_equal_log_softmax_in_fp64(
    rows: int, hidden: int, vocab: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * vocab * 7)  # several chunks, the last one ragged
    h, w, targets = inputs(rows, hidden, vocab)
    h.requires_grad_(), w.requires_grad_()
    logp, entropy, lse = linear_logprob(h, w, targets, temperature=temperature)
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    expected, expected_entropy = oracle(h64, w64, targets, temperature)
    assert torch.allclose(logp.double(), expected, atol=2e-5)
    assert torch.allclose(entropy.double(), expected_entropy, atol=2e-5)
    assert torch.allclose(lse.double(), torch.logsumexp(h64 @ w64.t() / temperature, -1), atol=2e-5)
    upstream = torch.randn(2, rows, generator=torch.Generator().manual_seed(0))
    (upstream[0] @ logp + upstream[1] @ entropy).backward()
    (upstream[0].double() @ expected + upstream[1].double() @ expected_entropy).backward()
    for found, wanted in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_a_gradient_without_the_entropy_term_would_be_noticed() -> None:
    h, w, targets = inputs(5, 8, 20)
    h.requires_grad_()
    logp, entropy, _ = linear_logprob(h, w, targets)
    (partial,) = torch.autograd.grad(logp.sum(), h, retain_graph=True)
    (whole,) = torch.autograd.grad((logp + entropy).sum(), h)
    assert float((whole - partial).abs().max()) > 1e-2


def test_vocabulary_shards_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two unequal shards, the second with padding, merged by hand the way the all-gather merges them."""
    h, w, targets = inputs(9, 8, 30)
    expected, expected_entropy = oracle(h, w, targets, 1.0)
    parts = [(w[:17], 0), (torch.cat((w[17:], torch.full((5, 8), 50.0))), 17)]
    records: list[torch.Tensor] = []
    monkeypatch.setattr(module, "_all_gather", lambda record, group: records.append(record) or record[None])
    for shard, start in parts:
        linear_logprob(h, shard, targets, vocab_start=start, vocab_size=30)
    monkeypatch.setattr(module, "_all_gather", lambda record, group: torch.stack(records))
    logp, entropy, _ = linear_logprob(h, parts[0][0], targets, vocab_start=0, vocab_size=30)
    assert torch.allclose(logp.double(), expected, atol=1e-5)
    assert torch.allclose(entropy.double(), expected_entropy, atol=1e-5)


def test_padding_columns_count_as_minus_infinity() -> None:
    h, w, targets = inputs(6, 8, 20)
    padded = torch.cat((w, 100 * torch.ones(12, 8)))
    padded.requires_grad_()
    logp, _, _ = linear_logprob(h, padded, targets, vocab_size=20)
    assert torch.allclose(logp, linear_logprob(h, w, targets)[0], atol=1e-6)
    logp.sum().backward()
    assert float(padded.grad[20:].abs().max()) == 0.0
    assert float((linear_logprob(h, padded, targets)[0] - logp).detach().abs().max()) > 1.0


def test_rows_may_repeat_and_their_gradients_add() -> None:
    h, w, _ = inputs(3, 8, 20)
    h.requires_grad_()
    targets = torch.tensor([4, 9, 4, 1])
    logp, _, _ = linear_logprob(h, w, targets, torch.tensor([2, 2, 0, 1]))
    expected, _ = oracle(h.detach()[[2, 2, 0, 1]], w, targets, 1.0)
    assert torch.allclose(logp.double(), expected, atol=1e-5)
    (one,) = torch.autograd.grad(logp[0] + logp[1], h)
    parts = [torch.autograd.grad(linear_logprob(h, w, targets[i : i + 1], torch.tensor([2]))[0].sum(), h)[0] for i in (0, 1)]
    assert torch.allclose(one, parts[0] + parts[1], atol=1e-6)


def test_huge_logits_stay_finite_and_no_rows_are_allowed() -> None:
    h, w, targets = inputs(4, 8, 20, scale=40.0)
    logp, entropy, _ = linear_logprob(h, w, targets)
    expected, expected_entropy = oracle(h, w, targets, 1.0)
    assert torch.allclose(logp.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.allclose(entropy.double(), expected_entropy, atol=1e-4)
    empty, _, _ = linear_logprob(h.requires_grad_(), w, targets[:0], targets[:0])
    empty.sum().backward()
    assert float(h.grad.abs().max()) == 0.0


def test_low_precision_inputs_are_accumulated_in_fp32() -> None:
    h, w, targets = inputs(20, 64, 300, torch.bfloat16)
    logp, _, _ = linear_logprob(h, w, targets)
    expected, _ = oracle(h, w, targets, 1.0)
    assert logp.dtype == torch.float32
    assert float((logp.double() - expected).abs().max()) < 1e-4
    rounded = torch.log_softmax((h @ w.t()).float(), -1).gather(-1, targets[:, None])[:, 0]
    assert float((rounded.double() - expected).abs().max()) > 1e-2


def test_gradcheck_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, targets = inputs(3, 4, 7, torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(module, "_logits", lambda hidden, weight, temperature: (hidden @ weight.t()) / temperature)

    def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logp, entropy, lse = linear_logprob(hidden, weight, targets, temperature=0.7)
        return torch.stack((logp, entropy, lse))

    original = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else original(self))
    assert torch.autograd.gradcheck(function, (h.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize(("temperature", "rows"), [(0.0, 4), (1.0, 3)])
def test_bad_arguments_are_named(temperature: float, rows: int) -> None:
    h, w, targets = inputs(4, 8, 20)
    with pytest.raises(ValueError, match=r"temperature=0.0|3 rows of hidden states for 4 targets"):
        linear_logprob(h[:rows], w, targets, temperature=temperature)
