"""The checks of tests/unit/test_linear_logprob.py on a GPU: compiled kernels and the torch twin, fp32 and bf16, and full-size shapes.

pytest tests/gpu/test_linear_logprob_gpu.py
TRITON_INTERPRET=1 pytest tests/gpu/test_linear_logprob_gpu.py     without a GPU: the same bodies, smaller, in Triton's interpreter
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from linear_logprob_checks import CHECKS, Case, Setup, differences, oracle, padding_columns_get_no_gradient, run

from igpo_megatron.kernels.linear_logprob import FORMS, linear_logprob, resolve

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a GPU, or TRITON_INTERPRET=1")

DTYPES = (torch.float32, torch.bfloat16)
SETUPS = [Setup(name, "auto", DEVICE, dtype) for name in ("torch", "triton") for dtype in DTYPES]
SETUPS += [Setup("triton", form, DEVICE, dtype) for form in FORMS for dtype in DTYPES]
CHECKED = CHECKS if CUDA else [padding_columns_get_no_gradient]
"""tests/unit runs all of them in the interpreter."""


@pytest.mark.parametrize("check", CHECKED, ids=lambda check: check.__name__)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_of(check: Callable[[Setup], None], setup: Setup) -> None:
    check(setup)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 10, 40, 100, 129, 300, 1000, 9000] if CUDA else [10, 129])
def test_many_tiles_and_chunks_of_bf16_equal_fp64(rows: int, form: str, record_property: Callable[[str, object], None]) -> None:
    """Every tile of the streaming kernels, two groups of rows, several row blocks and column chunks."""
    hidden, vocab = (1000, 20011) if CUDA else (72, 400)
    case, setup = Case("large", rows, hidden, vocab, temperature=1.3, padding=37), Setup("triton", form, DEVICE, torch.bfloat16)
    found, wanted = run(case, setup), oracle(case, setup)
    record_property("max_abs_dlogp", float((found.logp.double() - wanted.logp).abs().max()))
    assert differences(found, wanted, setup) == []


@pytest.mark.parametrize("form", FORMS)
def test_two_full_size_runs_give_the_same_bits(form: str) -> None:
    case = Case("large", 3000, 896, 151936, repeated=50) if CUDA else Case("small", 40, 24, 300, repeated=30)
    setup = Setup("triton", form, DEVICE, torch.bfloat16)
    first, second = run(case, setup), run(case, setup)
    for name in ("logp", "entropy", "lse", "grad_hidden", "grad_weight"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.skipif(not CUDA, reason="a CPU takes torch")
def test_auto_is_triton_here() -> None:
    pytest.importorskip("triton")
    assert resolve("auto", torch.device("cuda")) == "triton"


@pytest.mark.skipif(not CUDA, reason="CUDA counts its memory, a CPU does not")
@pytest.mark.parametrize("form", FORMS)
def test_workspace_does_not_grow_with_the_vocabulary(form: str) -> None:
    """Forward of 4096 rows: less than 64 MiB beyond the inputs, where the logits alone would take 2.3 GiB."""
    hidden = torch.randn(4096, 896, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(151936, 896, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 151936, (4096,), device="cuda")
    linear_logprob(hidden[:1], weight, targets[:1], form=form)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, targets, form=form)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.skipif(not CUDA, reason="CUDA counts its memory, a CPU does not")
def test_the_gradients_of_few_rows_need_no_copy_of_the_weights_in_fp32() -> None:
    """Backward of 128 rows: less than 192 MiB beyond inputs and gradients, where such a copy would take 519 MiB."""
    hidden = torch.randn(128, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151936, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        hidden.grad = weight.grad = None
        logp = linear_logprob(hidden, weight, torch.arange(128, device="cuda"))[0].sum()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logp.backward()
    assert torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes < 192 * 2**20


@pytest.mark.parametrize("form", ["tma", "specialised"])
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability()[0] != 9, reason="tiles for TMA are Hopper's")
def test_tma_is_what_runs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from igpo_megatron.kernels import triton_stream

    monkeypatch.setattr(triton_stream, "_stream", None)
    case, setup = Case("aligned", 200, 256, 3000), Setup("triton", form, "cuda", torch.bfloat16)
    assert differences(run(case, setup), oracle(case, setup), setup) == []
