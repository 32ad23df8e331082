"""linear_logprob_with_gradients against fp64 autograd: the torch twin, and the kernels in Triton's interpreter.

The kernels' part runs in the process that test_linear_logprob starts; by hand: TRITON_INTERPRET=1 pytest tests/unit/test_token_loss.py
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from linear_logprob_checks import CASES, Setup
from token_loss_checks import BF16_CHECKS, every_check, run, upstream_of

from igpo_megatron.kernels import token_loss, torch_chunked
from igpo_megatron.kernels.token_loss import linear_logprob_with_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SETUPS = [Setup("torch"), Setup("torch", dtype=torch.bfloat16), *[Setup("triton")] * INTERPRETED]
"""On CPU the kernels are given bf16 widened, so that it is fp32 to them."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of columns, the last one ragged."""
    monkeypatch.setattr(token_loss, "COLUMNS", 100)
    if INTERPRETED:
        from igpo_megatron.kernels import triton_head

        monkeypatch.setattr(triton_head, "BLOCK", {"BLOCK_R": 32, "BLOCK": 128})
        monkeypatch.setattr(triton_head, "FOLD", {"BLOCK_R": 32, "BLOCK": 128})


@every_check
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_of(check: Callable[[Setup], None], setup: Setup) -> None:
    if setup.dtype == torch.bfloat16 and check not in BF16_CHECKS:
        pytest.skip("the dtype does not matter")
    check(setup)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
def test_triton_stores_dz_in_the_bits_of_the_inputs() -> None:
    from igpo_megatron.kernels import triton_head

    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(37, 300, generator=generator), torch.randint(-1, 300, (37,), generator=generator)
    coefficients = torch.randn(37, 4, generator=generator) + torch.tensor([6.0, 0.0, 0.0, 0.0])
    wanted = torch_chunked.block_dz(logits.clone(), targets, 0.7, coefficients, torch.float32)
    found = triton_head.block_dz(logits, targets, 0.7, coefficients, torch.bfloat16)
    # The interpreter cuts off where a GPU rounds.
    assert found.dtype == torch.bfloat16 and float(((found - wanted).abs() / wanted.abs().clamp(min=1e-3)).max()) < 2**-7
    in_place = triton_head.block_dz(logits, targets, 0.7, coefficients, torch.float32)
    assert in_place.data_ptr() == logits.data_ptr() and torch.allclose(in_place, wanted, atol=1e-6)


def test_blocks_are_as_few_as_the_workspace_allows_and_of_about_the_same_size() -> None:
    case, setup = CASES[0], Setup("torch")
    seen: list[slice] = []

    def upstream(block: slice, logp: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(block)
        return logp, entropy

    hidden = torch.randn(47, 8).requires_grad_()
    weight, targets = case.inputs(setup).weight, torch.zeros(47, dtype=torch.int64)
    for rows in (16, 15.9, 0.5):
        linear_logprob_with_gradients(hidden, weight, targets, upstream, workspace=int(4 * len(weight) * rows))
    assert seen[:3] == [slice(0, 16), slice(16, 32), slice(32, 47)]
    assert seen[3:7] == [slice(0, 12), slice(12, 24), slice(24, 36), slice(36, 47)]
    assert seen[7:] == [slice(row, row + 1) for row in range(47)], "a row is never cut"


def test_gradients_can_be_sent_back_once() -> None:
    given = CASES[1].inputs(Setup("torch"))
    hidden = given.hidden.requires_grad_()
    *_, carrier = linear_logprob_with_gradients(hidden, given.weight, given.targets, upstream_of(given))
    carrier.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run only once"):
        carrier.backward()


def test_without_gradients_the_loss_is_not_asked() -> None:
    given = CASES[1].inputs(Setup("torch"))
    logp, *_ = linear_logprob_with_gradients(given.hidden, given.weight, given.targets, None, temperature=0.5)  # type: ignore[arg-type]
    assert torch.equal(logp, run(CASES[1], Setup("torch"), rows=10**6).logp)
