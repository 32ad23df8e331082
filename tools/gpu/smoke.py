"""Claim: this GPU multiplies, copies and rounds as the head's kernels assume; its ceilings, which all other figures are held against.

python tools/gpu/smoke.py --out FILE     seconds, on a CPU too
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from common import copy_gb_per_s, finish, interleaved, matmul_tflops

from igpo_megatron.kernels.torch_chunked import accumulate, matmul

CHUNK = {"cuda": (4096, 3584, 2048), "cpu": (64, 96, 128)}
"""(N, H, columns) of one chunk of the head."""

BOUND = 1e-3
"""Relative error of fp32 sums of bf16 products. Sums in bf16 are off by 2e-3 and more."""


def main(out: Annotated[Path, typer.Option(help="Result file.")]) -> None:
    """Measure the ceilings, then the two matmuls of a chunk, whose fp32 results lie in memory that is already there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    floors = {"matmul_tflops": matmul_tflops(device == "cuda"), "copy_gb_per_s": copy_gb_per_s(device == "cuda")}
    rows, hidden_size, columns = CHUNK[device]
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(n, hidden_size, device=device, generator=generator).bfloat16() for n in (rows, columns))
    total = torch.randn(rows, hidden_size, device=device, generator=generator)
    logits = torch.empty(rows, columns, device=device)
    matmul(hidden, weight.t(), out=logits)
    dz, before = logits.bfloat16(), total.clone()
    accumulate(total, dz, weight)
    errors = {
        "logits_into_workspace": relative_error(logits, hidden.double() @ weight.double().t()),
        "gradient_accumulated_in_place": relative_error(total, before.double() + dz.double() @ weight.double()),
    }
    calls = {
        "logits_into_workspace": partial(matmul, hidden, weight.t(), out=logits),
        "gradient_accumulated_in_place": partial(accumulate, total, dz, weight),
    }
    operations = 2 * rows * hidden_size * columns
    speeds = {name: round(operations / median(seconds) / 1e12, 4) for name, seconds in interleaved(calls, 20, warmup=3).items()}
    memory = round(torch.cuda.mem_get_info()[1] / 2**30, 1) if device == "cuda" else None
    figures = {"chunk_tflops": speeds, "chunk_relative_error": errors, "memory_gib": memory}
    ceilings = f"matmul {floors['matmul_tflops']:.4g} TFLOP/s, copy {floors['copy_gb_per_s']:.4g} GB/s"
    shares = ", ".join(f"{name} {speed / floors['matmul_tflops']:.2f} of it" for name, speed in speeds.items())
    finish("smoke", figures, floors, ("torch", "triton", "transformers", "numpy", "megatron-core"), out, f"{ceilings}; {shares}")
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error < BOUND]
    if wrong:
        sys.exit("; ".join(wrong))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the Frobenius norms."""
    return float((found.double() - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    typer.run(main)
