"""The checks of tests/unit/test_token_loss.py on a GPU, full-size blocks, and a policy's step with model.head_backward=in_forward.

pytest tests/gpu/test_token_loss_gpu.py        tests/distributed/test_head_backward.py runs the policy's step on CPU
TRITON_INTERPRET=1 pytest tests/gpu/test_token_loss_gpu.py     without a GPU: the full-size blocks, smaller, in Triton's interpreter
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_config, make_hf_folder, run_one_rank
from linear_logprob_checks import Case, Setup, differences
from test_head_backward import LOSS, both, same, small_blocks, trees  # noqa: F401  (small_blocks is a fixture of every test here)
from token_loss_checks import at_its_own_lse, every_check, oracle, run

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
pytestmark = pytest.mark.skipif(not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"), reason="needs a GPU, or TRITON_INTERPRET=1")

DTYPES = (torch.float32, torch.bfloat16)
SETUPS = [Setup(name, device="cuda", dtype=dtype) for name in ("torch", "triton") for dtype in DTYPES]


@needs_gpu
@every_check
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_of(check: Callable[[Setup], None], setup: Setup) -> None:
    check(setup)


@pytest.mark.parametrize("rows", [300, 1024, 5000] if CUDA else [100])
def test_blocks_of_full_size_equal_fp64(rows: int) -> None:
    """1,300 rows of 20,011 logits; the last case has four blocks, as that of a CPU has."""
    hidden, vocab, block = (1000, 20011, 1300) if CUDA else (70, 400, 30)
    case = Case("large", rows, hidden, vocab, temperature=1.3, padding=37)
    setup = Setup("triton", device="cuda" if CUDA else "cpu", dtype=torch.bfloat16)
    wanted = oracle(case, setup)
    assert differences(at_its_own_lse(run(case, setup, rows=block), wanted), wanted, setup) == []


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_of_a_policy_is_that_of_recompute(tmp_path: Path, dtype: str) -> None:
    folder = make_hf_folder(tmp_path / "qwen2_tied", "qwen2_tied")
    config = make_config(folder, model__backend="local", model__dtype=dtype, run__device="cuda", parallel__distributed_optimizer=False)
    same(run_one_rank(both, config, trees(), [LOSS], 2.5), tolerance={"fp32": 1e-4, "bf16": 5e-2}[dtype])
