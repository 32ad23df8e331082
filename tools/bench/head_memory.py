"""Claim: the log-prob head needs a fixed workspace beyond the gradients that any head returns; logits grow with rows x vocabulary.

    python tools/bench/head_memory.py     under 3 minutes on two cores

Peak memory of one forward + backward beyond the inputs and beyond dH and dW. On CPU every case runs in a process of its own and the
figure is the growth of its resident set; on a GPU it is torch's allocator peak.
"""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import finish, in_a_process
from heads import load_heads
from memory import forget_peak, status_bytes

ROWS, SHAPE = (1024, 4096, 16384, 65536), (896, 151936)
CPU_ROWS, CPU_SHAPE = (256, 4096), (64, 32768)
MIB = 2**20


def main(out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/head_memory.json.")] = None) -> None:
    """Measure every head at every number of rows."""
    cuda = torch.cuda.is_available()
    names, missing = load_heads(cuda)
    sizes, (hidden, vocab) = (ROWS, SHAPE) if cuda else (CPU_ROWS, CPU_SHAPE)
    figures: dict[str, Any] = {"hidden": hidden, "vocab": vocab, "extra_mib": {}, "not_loaded": missing}
    for name, head in names.items():
        if head.differentiable:
            figures["extra_mib"][name] = {str(rows): _measured(name, rows, hidden, vocab) for rows in sizes}
    ours = [value for name, by_rows in figures["extra_mib"].items() if name.startswith("ours") for value in by_rows.values()]
    figures["ours_largest_extra_mib"] = max(value for value in ours if value is not None)
    floors = {
        "logits_fp32_mib": {str(rows): rows * vocab * 4 / MIB for rows in sizes},
        "note": "16 bytes a row of statistics are unavoidable",
    }
    finish("head_memory", figures, floors, ("torch", "triton", "liger-kernel", "cut-cross-entropy"), out)


def _measured(name: str, rows: int, hidden: int, vocab: int) -> float | None:
    """MiB beyond inputs and gradients; None where it does not fit."""
    if torch.cuda.is_available():
        try:
            return _on_gpu(name, rows, hidden, vocab)
        except torch.OutOfMemoryError:
            return None
    try:
        return in_a_process(_on_cpu, name, rows, hidden, vocab)
    except BrokenProcessPool:
        return None


def _work(name: str, rows: int, hidden: int, vocab: int, device: str, dtype: torch.dtype) -> tuple[Any, int]:
    """(a call of the head with its backward, bytes of the gradients)."""
    head = load_heads(device == "cuda")[0][name]
    states = torch.randn(rows, hidden, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), device=device)

    def call(count: int) -> None:
        head.train(states[:count], weight, targets[:count], torch.ones(count, device=device))

    return call, states.nbytes + weight.nbytes


def _on_gpu(name: str, rows: int, hidden: int, vocab: int) -> float:
    call, gradients = _work(name, rows, hidden, vocab, "cuda", torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(rows)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before - gradients) / MIB, 1)


def _on_cpu(name: str, rows: int, hidden: int, vocab: int) -> float:
    call, gradients = _work(name, rows, hidden, vocab, "cpu", torch.float32)
    call(8)  # loads libraries and compiles, and makes the weight's gradient
    gradients = 4 * rows * hidden + 4 * vocab * hidden  # the second call's dW is added to the first's
    forget_peak()
    before = status_bytes("VmRSS")
    call(rows)
    return round((status_bytes("VmHWM") - before - gradients) / MIB, 1)


if __name__ == "__main__":
    typer.run(main)
