"""A kernel that shows where triton_stream's programs work; imported in the interpreter's process only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from igpo_megatron.kernels.triton_stream import _place


@triton.jit
def _write_place(out, row_tiles, splits, group):
    work = tl.program_id(0)
    row_tile, split = _place(work, row_tiles, splits, group)
    tl.store(out + 2 * work, row_tile)
    tl.store(out + 2 * work + 1, split)


def places(row_tiles: int, splits: int, group: int) -> torch.Tensor:
    """[row_tiles * splits, 2] int64: (row tile, split) in the order of the programs."""
    out = torch.full((row_tiles * splits, 2), -1)
    _write_place[(row_tiles * splits,)](out, row_tiles, splits, group)
    return out
