"""The norm of CPU ranks against its formula in fp64, in values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from igpo_megatron.policy.model import RMSNorm


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("shape", [(7, 1, 48), (7, 1, 3, 16)])
def test_values_and_gradients_are_those_of_the_formula(dtype: torch.dtype, bound: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), shape[-1], eps=0.1)  # type: ignore[arg-type]
    norm.weight.data = (1 + torch.rand(shape[-1], generator=generator)).to(dtype)
    x, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 0.1).rsqrt() * weight
    expected.backward(upstream.double())
    found = norm(x)
    found.backward(upstream)
    for one, other in ((found, expected), (x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert one is not None and other is not None and one.dtype == dtype
        assert (one - other).abs().max() < bound * other.abs().max()
