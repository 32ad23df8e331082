"""Log-probs, draws and entropies by hand."""

from __future__ import annotations

import math

import pytest
import torch

from igpo_megatron.engines.torch_engine.sampling import choose, entropies, processed_logprobs

LOGITS = torch.tensor([[math.log(4.0), math.log(1.0), math.log(2.0), math.log(1.0)]])
BARRED = torch.tensor([False, False, False, True])


def rows(logits: torch.Tensor, *temperatures: float, barred: torch.Tensor | None = None) -> torch.Tensor:
    return processed_logprobs(logits.expand(len(temperatures), -1), torch.tensor(temperatures), barred)


def test_log_probs_are_those_of_the_temperature_among_tokens_that_are_not_barred() -> None:
    found = rows(LOGITS, 1.0, 0.5, 0.0).exp()
    assert torch.allclose(found[0], torch.tensor([4, 1, 2, 1]) / 8)
    assert torch.allclose(found[1], torch.tensor([16, 1, 4, 1]) / 22)
    assert torch.equal(found[2], found[0])  # greedy: nothing is scaled
    assert torch.allclose(rows(LOGITS, 1.0, barred=BARRED).exp(), torch.tensor([[4, 1, 2, 0]]) / 7)


def test_half_precision_logits_are_scaled_in_single_precision() -> None:
    logits = torch.tensor([[10.0, 9.9]], dtype=torch.bfloat16)
    assert torch.allclose(rows(logits, 0.7), torch.log_softmax(logits.double() / 0.7, -1).float(), atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_uniform_numbers_draw_every_token_as_often_as_its_probability_says(temperature: float) -> None:
    logprobs = rows(LOGITS, temperature, barred=BARRED).expand(7000, -1)
    uniforms = (torch.arange(7000, dtype=torch.float64) + 0.5) / 7000
    counts = choose(logprobs, torch.full((7000,), temperature), uniforms).bincount(minlength=4)
    assert (counts - logprobs[0].exp() * 7000).abs().max() <= 1 and counts[3] == 0


def test_the_ends_of_the_interval_draw_tokens_with_probability() -> None:
    """The first and the last token are barred: 0 and the largest number below 1 must not draw them."""
    logprobs = rows(LOGITS, 1.0, 1.0, barred=torch.tensor([True, False, False, True]))
    assert choose(logprobs, torch.ones(2), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 2]


def test_what_is_drawn_from_no_numbers_is_still_a_row() -> None:
    assert choose(torch.full((2, 4), torch.nan), torch.ones(2), torch.tensor([0.0, 0.9], dtype=torch.float64)).max() < 4


def test_temperature_zero_takes_the_likeliest_whatever_was_drawn() -> None:
    assert choose(rows(LOGITS, 0.0, 1.0), torch.tensor([0.0, 1.0]), torch.tensor([0.99, 0.99], dtype=torch.float64)).tolist() == [0, 3]


def test_entropies_cover_all_tokens_or_the_likeliest_and_the_sampled_one() -> None:
    logprobs = rows(LOGITS, 1.0, 1.0, barred=BARRED)
    terms = [-p * math.log(p) for p in (4 / 7, 1 / 7, 2 / 7)]
    tokens = torch.tensor([0, 1])
    assert entropies(logprobs, tokens, -1).tolist() == pytest.approx([sum(terms)] * 2)
    assert entropies(logprobs, tokens, 2).tolist() == pytest.approx([terms[0] + terms[2], sum(terms)])
    assert entropies(logprobs, tokens, 20).tolist() == pytest.approx([sum(terms)] * 2)
