"""Forward of the Triton head that never writes logits: `torch_chunked.partials` by one kernel, in three forms.

A program multiplies a tile of rows by a run of vocabulary tiles and keeps (m, s, u, t) in registers:

    rows x vocabulary = row tiles x splits of the vocabulary --a program each--> [splits, N, 4] --_fold_splits--> [N, 4]

    fused         plain loads, at any alignment and in every dtype; few rows stream the weight at memory speed
    tma           Hopper's TMA fills shared memory, and as many programs as fit take one place after the other
    specialised   the same with warps of their own for the loads and two groups of four that multiply 64 rows each: while one folds its
                  logits, the other keeps the tensor cores busy

Places are numbered rows first, inside a group of rows that L2 holds beside the weight, then along the vocabulary, then the next group.
Row tiles beside each other thus share the weight's tiles, and a group is read from memory once.

Estimates for an H100 at N >= 4096, H = 3584 (nothing is measured): fused 0.6-0.7 of the matmul ceiling, as without groups at N = 4096 but
no longer falling with N; tma 0.70-0.80; specialised 0.75-0.85. At H = 896 folding a tile takes a quarter of its multiplication, which
only `specialised` hides. `tools/bench/head_aot.py` compiles every variant for Hopper without one; `tools/bench/head_kernel.py` measures.

Tried and left out, from what the compilers make of them: descriptors made on the host (of `specialised` Triton 3.6.0 halves the tile of
rows between the two groups but not the host's box, so that each load writes twice the bytes that its barrier expects; 3.9.0 refuses it);
specialised tiles of 64 rows (neither compiles); `flatten=True` on the loop over tiles (the code is the same); pairs of programs, num_ctas=2
(3.6.0 does not compile them, 3.9.0 does without multicast).
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from igpo_megatron.kernels.torch_chunked import Shard, empty_records

logger = logging.getLogger(__name__)

INTERPRETED = not isinstance(tl.max, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when triton was imported; later it has no effect."""

INTERPRETER_PROGRAMS = 4
"""Number of multiprocessors that the interpreter assumes."""

GROUP_BYTES = 16 * 2**20
"""Hidden states of one group of rows. An H100's L2 is two parts of 25 MB, and what both parts' programs read may be in both: 16 MiB leave
room for the weight, which is read from memory once per group (1.1 GB for Qwen2.5-7B, a tenth of what memory delivers meanwhile)."""

MOST_SPLITS = 256
"""Records of a row that `_fold_splits` has in registers at once."""

START = 0.25
"""Time of a program before and after its vocabulary tiles, in units of a tile. Assumed, so that runs are not needlessly short."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)
"""A masked column's logit: exp gives 0, and unlike with -inf 0 * logit is 0."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The tile that a program multiplies at a time, m rows x v columns in steps of k, and its launch options."""

    m: int
    v: int
    k: int
    warps: int
    stages: int
    resident: int = 1
    """Programs that a multiprocessor holds at once."""

    specialise: bool = False
    """Warps of their own for loads; `warps` are then those of one of three groups, and each multiplies m / 2 rows."""

    @property
    def launch(self) -> dict[str, Any]:
        """Arguments of the kernels."""
        return {"BLOCK_M": self.m, "BLOCK_V": self.v, "BLOCK_K": self.k, "num_warps": self.warps, "num_stages": self.stages}


TILES: dict[str, tuple[tuple[float, Tile], ...]] = {
    "fused": (
        (16, Tile(16, 128, 64, warps=4, stages=3, resident=2)),  # with 4 stages Triton 3.6.0 spills
        (32, Tile(32, 128, 64, warps=4, stages=4, resident=2)),
        (64, Tile(64, 128, 64, warps=4, stages=4, resident=2)),
        (128, Tile(128, 128, 64, warps=8, stages=4)),
        (math.inf, Tile(128, 256, 64, warps=8, stages=3)),
    ),
    "fused, fp32": ((math.inf, Tile(32, 64, 32, warps=4, stages=2, resident=2)),),
    "tma": (
        (64, Tile(64, 128, 64, warps=4, stages=4, resident=2)),
        (math.inf, Tile(128, 256, 64, warps=8, stages=4)),
    ),
    "specialised": ((math.inf, Tile(128, 256, 64, warps=4, stages=4, specialise=True)),),
}
"""Form -> (largest N, tile). Few rows: small tiles and a deep pipeline for bandwidth; many: as large as registers allow."""


@triton.jit
def _place(work, row_tiles, splits, group):
    """(row tile, split) number `work`: rows first inside a group of `group` row tiles, then splits, then the next group."""
    start = work // (group * splits) * group
    size = tl.minimum(row_tiles - start, group)
    within = work - start * splits
    return start + within % size, within // size


@triton.jit
def _fold_tile(logits, column, target, valid, scale, top, total, product, picked, ENTROPY: tl.constexpr):
    """A tile of logits into its rows' (m, s, u, t), which are in units of log 2, for exp2."""
    z = tl.where(column[None, :] < valid, logits * scale, MASKED)
    picked = tl.maximum(picked, tl.max(tl.where(column[None, :] == target[:, None], z, float("-inf")), 1))
    new_top = tl.maximum(top, tl.max(z, 1))
    shift = top - new_top
    rescale = tl.exp2(shift)
    z -= new_top[:, None]
    p = tl.exp2(z)
    if ENTROPY:
        product = (product + total * shift) * rescale + tl.sum(p * z, 1)
    total = total * rescale + tl.sum(p, 1)
    return new_top, total, product, picked


@triton.jit
def _write(records, split, row, rows, top, total, product, picked):
    at = records + (split.to(tl.int64) * rows + row) * 4
    tl.store(at, top * LN2, mask=row < rows)
    tl.store(at + 1, total, mask=row < rows)
    tl.store(at + 2, product * LN2, mask=row < rows)
    tl.store(at + 3, picked * LN2, mask=row < rows)


# Numbers that change from call to call do not make variants: a kernel is compiled once per tile, and of H only its divisors matter.
_UNSPECIALISED = ["rows", "valid", "tiles_per_split", "row_tiles", "splits", "group"]


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _stream(
    hidden,  # [N, H]
    weight,  # [v, H]
    targets,  # [N] int64
    records,  # [splits, N, 4] fp32
    rows,  # N
    valid,
    hidden_stride,
    weight_stride,
    inverse_temperature,
    tiles_per_split,
    row_tiles,
    splits,
    group,
    hidden_size,  # H
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides H
):
    row_tile, split = _place(tl.program_id(0), row_tiles, splits, group)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets + row, mask=row < rows, other=-1).to(tl.int32)
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns past the end are clamped, not masked: their results are dropped. Offsets in a tile have 32 bits to save registers.
    a_start = hidden + row_tile.to(tl.int64) * BLOCK_M * hidden_stride
    a_offset = (tl.minimum(row, rows - 1) - row_tile * BLOCK_M)[:, None] * hidden_stride + inner[None, :]
    scale = inverse_temperature * LOG2E
    top = tl.full((BLOCK_M,), MASKED, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_M,), tl.float32)
    picked = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(valid, BLOCK_V))
    b_start = weight + first.to(tl.int64) * BLOCK_V * weight_stride
    for tile in range(first, last):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        a_at = a_start
        b_at = b_start
        b_offset = (tl.minimum(column, valid - 1) - tile * BLOCK_V)[None, :] * weight_stride + inner[:, None]
        logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for start in range(0, hidden_size, BLOCK_K):
            if EVEN:
                a = tl.load(a_at + a_offset)
                b = tl.load(b_at + b_offset)
            else:
                a = tl.load(a_at + a_offset, mask=inner[None, :] < hidden_size - start, other=0.0)
                b = tl.load(b_at + b_offset, mask=inner[:, None] < hidden_size - start, other=0.0)
            logits = tl.dot(a, b, logits, input_precision=PRECISION)
            a_at += BLOCK_K
            b_at += BLOCK_K
        b_start += BLOCK_V * weight_stride
        top, total, product, picked = _fold_tile(logits, column, target, valid, scale, top, total, product, picked, ENTROPY)
    _write(records, split, row, rows, top, total, product, picked)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _stream_tma(
    hidden,  # [N, H]
    weight,  # [v, H]
    targets,  # [N] int64
    records,  # [splits, N, 4] fp32
    rows,  # N
    valid,
    hidden_stride,
    weight_stride,
    inverse_temperature,
    tiles_per_split,
    row_tiles,
    splits,
    group,
    hidden_size,  # H
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALISE: tl.constexpr,
):
    # What lies past the end of a descriptor reads as zero.
    hidden_tiles = tl.make_tensor_descriptor(hidden, [rows, hidden_size], [hidden_stride, 1], [BLOCK_M, BLOCK_K])
    weight_tiles = tl.make_tensor_descriptor(weight, [valid, hidden_size], [weight_stride, 1], [BLOCK_V, BLOCK_K])
    scale = inverse_temperature * LOG2E
    for work in tl.range(tl.program_id(0), row_tiles * splits, tl.num_programs(0)):
        row_tile, split = _place(work, row_tiles, splits, group)
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        target = tl.load(targets + row, mask=row < rows, other=-1).to(tl.int32)
        top = tl.full((BLOCK_M,), MASKED, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        product = tl.zeros((BLOCK_M,), tl.float32)
        picked = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        first = split * tiles_per_split
        last = tl.minimum(first + tiles_per_split, tl.cdiv(valid, BLOCK_V))
        for tile in tl.range(first, last, warp_specialize=SPECIALISE):
            logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            for start in range(0, hidden_size, BLOCK_K):
                a = hidden_tiles.load([row_tile * BLOCK_M, start])
                b = weight_tiles.load([tile * BLOCK_V, start])
                logits = tl.dot(a, b.T, logits, input_precision=PRECISION)
            column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            top, total, product, picked = _fold_tile(logits, column, target, valid, scale, top, total, product, picked, ENTROPY)
        _write(records, split, row, rows, top, total, product, picked)


@triton.jit(do_not_specialize=["rows", "splits"])
def _fold_splits(records, record, rows, splits, BLOCK_R: tl.constexpr, SPLITS: tl.constexpr):
    """[splits, N, 4] -> [N, 4]; splits are folded in one tree whose shape depends on their number alone."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.arange(0, SPLITS)
    at = records + (split[:, None].to(tl.int64) * rows + row[None, :]) * 4
    mask = (split[:, None] < splits) & (row[None, :] < rows)
    tops = tl.load(at, mask=mask, other=MASKED)
    sums = tl.load(at + 1, mask=mask, other=0.0)
    products = tl.load(at + 2, mask=mask, other=0.0)
    picked = tl.load(at + 3, mask=mask, other=float("-inf"))
    top = tl.max(tops, 0)
    shift = tops - top[None, :]
    scale = tl.exp(shift)
    out = record + row * 4
    tl.store(out, top, mask=row < rows)
    tl.store(out + 1, tl.sum(sums * scale, 0), mask=row < rows)
    tl.store(out + 2, tl.sum((products + sums * shift) * scale, 0), mask=row < rows)
    tl.store(out + 3, tl.max(picked, 0), mask=row < rows)


def partials(form: str, shard: Shard, need_entropy: bool) -> torch.Tensor:
    """`torch_chunked.partials` in one of TILES' forms; scratch is [splits, N, 4], so `workspace` goes unused.

    Where TMA cannot be used for these tensors, `fused` runs, and the reason is logged.
    """
    hidden, weight, valid = shard.hidden, shard.weight, shard.valid
    rows = len(hidden)
    if not valid or not rows:
        return empty_records(hidden)
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        hidden, weight = hidden.float(), weight.float()  # numpy has no bf16: the interpreter's dot would multiply bit patterns
    hidden, weight = _unit_stride(hidden), _unit_stride(weight)
    problem = None if form == "fused" else why_no_tma(hidden, weight)
    if problem:
        _log_once(form, problem)
        form = "fused"
    wide = form == "fused" and hidden.dtype == torch.float32
    tile = next(tile for most, tile in TILES["fused, fp32" if wide else form] if rows <= most)
    row_tiles, tiles = triton.cdiv(rows, tile.m), triton.cdiv(valid, tile.v)
    programs = tile.resident * _multiprocessors(hidden.device)
    tiles_per_split, splits = split_vocabulary(row_tiles, tiles, programs)
    records = hidden.new_empty((splits, rows, 4), dtype=torch.float32)
    numbers = (rows, valid, hidden.stride(0), weight.stride(0), 1.0 / shard.temperature, tiles_per_split, row_tiles, splits)
    arguments = (hidden, weight, shard.targets, records, *numbers, _group(hidden, tile), hidden.shape[1])
    constants = {"ENTROPY": need_entropy, "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32"}
    if form == "fused":
        _stream[(row_tiles * splits,)](*arguments, **constants, EVEN=hidden.shape[1] % tile.k == 0, **tile.launch)
    else:
        triton.set_allocator(_scratch)
        grid = (min(row_tiles * splits, programs),)
        _stream_tma[grid](*arguments, **constants, SPECIALISE=tile.specialise, **tile.launch)
    if splits == 1:
        return records[0]
    record = torch.empty_like(records[0])
    _fold_splits[(triton.cdiv(rows, 4),)](records, record, rows, splits, BLOCK_R=4, SPLITS=triton.next_power_of_2(splits))
    return record


def why_no_tma(hidden: torch.Tensor, weight: torch.Tensor) -> str | None:
    """None where TMA can read both tensors [., H], whose rows are contiguous, and is useful."""
    if hidden.is_cuda and (capability := torch.cuda.get_device_capability(hidden.device))[0] != 9:
        # Before it there is no TMA; after it Triton 3.6.0 does not compile `specialised`, and RTX cards lack the shared memory.
        name = torch.cuda.get_device_name(hidden.device)
        return f"its tiles are for Hopper, compute capability 9.0, and {name} has {'.'.join(map(str, capability))}"
    if hidden.dtype == torch.float32 and not INTERPRETED:
        return "fp32 is multiplied without tensor cores, and TMA only serves to feed those"
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        apart = tensor.stride(0) * tensor.element_size()
        if apart % 16 or tensor.data_ptr() % 16:
            return f"TMA needs rows at multiples of 16 bytes, those of {name} are {apart} bytes apart from {tensor.data_ptr() % 16} on"
    return None


@functools.cache
def split_vocabulary(row_tiles: int, tiles: int, programs: int) -> tuple[int, int]:
    """(vocabulary tiles per split, number of splits) that end first where `programs` run at a time, one per row tile and split.

    No split is empty.
    """

    def time(per_split: int) -> float:
        rounds = triton.cdiv(row_tiles * triton.cdiv(tiles, per_split), programs)
        return rounds * (per_split + START)

    lengths = {triton.cdiv(tiles, splits) for splits in range(1, min(tiles, MOST_SPLITS) + 1)}
    per_split = min(sorted(lengths, reverse=True), key=time)
    return per_split, triton.cdiv(tiles, per_split)


def _group(hidden: torch.Tensor, tile: Tile) -> int:
    """Row tiles of a group."""
    return max(1, GROUP_BYTES // (tile.m * hidden.shape[1] * hidden.element_size()))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETER_PROGRAMS


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for a kernel's descriptors, on the current device; torch aligns to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@functools.cache
def _log_once(form: str, problem: str) -> None:
    logger.warning("model.head_form=%s: %s; fused runs instead", form, problem)
