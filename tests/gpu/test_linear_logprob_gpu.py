"""The checks of tests/unit/test_linear_logprob.py on a GPU: compiled kernels and the torch twin, fp32 and bf16, and full-size shapes.

pytest tests/gpu/test_linear_logprob_gpu.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_logprob_checks import Case, Setup, differences, every_check, oracle, run

from igpo_megatron.kernels import forms
from igpo_megatron.kernels.linear_logprob import linear_logprob, resolve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = (torch.float32, torch.bfloat16)
SETUPS = [Setup(name, "auto", "cuda", dtype) for name in ("torch", "triton") for dtype in DTYPES]
SETUPS += [Setup("triton", form, "cuda", dtype) for form in forms.FORMS for dtype in DTYPES]


@every_check
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_of(check: Callable[[Setup], None], setup: Setup) -> None:
    check(setup)


@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize("rows", [1, 10, 40, 100, 129, 300, 1000, 9000])
def test_many_tiles_and_chunks_of_bf16_equal_fp64(rows: int, form: str) -> None:
    """Every tile of the streaming kernels, two groups of rows, several row blocks and column chunks."""
    case, setup = Case("large", rows, 1000, 20011, temperature=1.3, padding=37), Setup("triton", form, "cuda", torch.bfloat16)
    assert differences(run(case, setup), oracle(case, setup), setup) == []


@pytest.mark.parametrize("form", forms.FORMS)
def test_two_full_size_runs_give_the_same_bits(form: str) -> None:
    case, setup = Case("large", 3000, 896, 151936, repeated=50), Setup("triton", form, "cuda", torch.bfloat16)
    first, second = run(case, setup), run(case, setup)
    for name in ("logp", "entropy", "lse", "grad_hidden", "grad_weight"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_auto_is_triton_here() -> None:
    pytest.importorskip("triton")
    assert resolve("auto", torch.device("cuda")) == "triton"


@pytest.mark.parametrize("form", forms.FORMS)
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


@pytest.mark.parametrize("form", ["tma", "specialised"])
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="TMA came with compute capability 9.0")
def test_tma_is_what_runs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from igpo_megatron.kernels import triton_stream

    monkeypatch.setattr(triton_stream, "_stream", None)
    case, setup = Case("aligned", 200, 256, 3000), Setup("triton", form, "cuda", torch.bfloat16)
    assert differences(run(case, setup), oracle(case, setup), setup) == []
