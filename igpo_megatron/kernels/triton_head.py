"""One vocabulary shard of `linear_logprob` in Triton; formulas, arguments and the torch twin are in torch_chunked.

Forward has two forms; `forms.choose` says which one runs:

    fused    a program owns a tile of rows and a run of vocabulary tiles, multiplies, and keeps (m, s, u, t) in registers; the weight
             is read once per row tile, so for few rows this streams the weight at memory speed:  [splits, N, 4] --fold--> [N, 4]
    chunks   cuBLAS writes a chunk of fp32 logits that stays in L2, one kernel folds it into the record:  chunk by chunk [N, 4]

Backward is shared: cuBLAS recomputes a chunk of logits, a kernel turns it into dz in place, cuBLAS adds dz to both gradients in fp32.
For low-precision inputs dz is rounded to their dtype before it is multiplied, as in every linear layer.
No atomics: folds happen in the order of the columns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from igpo_megatron.kernels.torch_chunked import accumulate, empty_records, matmul

INTERPRETED = not isinstance(tl.max, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when triton was imported; later it has no effect."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK_BYTES = 32 * 2**20
"""Workspace of the `chunks` form and of backward: fp32 logits; backward with low precision adds half of it again for dz."""
ROW_BLOCK = 4096
"""Rows of a chunk at most: with 2048 columns a chunk is full and its GEMM about two waves of an H100."""
BLOCK = {"BLOCK_R": 4, "BLOCK": 512}
"""Tile of the kernels that read a chunk: a row for each of the four warps."""
INTERPRETER_PROGRAMS = 4
"""What the interpreter pretends the number of multiprocessors to be."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1e30)
"""A masked column's logit: exp gives 0, and unlike with -inf 0 * logit is 0."""


@triton.jit
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
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Row tiles are the fast axis: programs that run together share a panel of the weight through L2.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns past the end are clamped, not masked: their results are dropped.
    a_start = hidden + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * hidden_stride + inner[None, :]
    scale = inverse_temperature * LOG2E  # logits in units of log 2, for exp2
    top = tl.full((BLOCK_M,), MASKED, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_M,), tl.float32)
    picked = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(valid, BLOCK_V))
    for tile in range(first, last):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        a_at = a_start
        b_at = weight + tl.minimum(column, valid - 1).to(tl.int64)[None, :] * weight_stride + inner[:, None]
        logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for start in range(0, H, BLOCK_K):
            if H % BLOCK_K == 0:
                a = tl.load(a_at)
                b = tl.load(b_at)
            else:
                a = tl.load(a_at, mask=inner[None, :] < H - start, other=0.0)
                b = tl.load(b_at, mask=inner[:, None] < H - start, other=0.0)
            logits = tl.dot(a, b, logits, input_precision=PRECISION)
            a_at += BLOCK_K
            b_at += BLOCK_K
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
        top = new_top
    at = records + (split.to(tl.int64) * rows + row) * 4
    tl.store(at, top * LN2, mask=row < rows)
    tl.store(at + 1, total, mask=row < rows)
    tl.store(at + 2, product * LN2, mask=row < rows)
    tl.store(at + 3, picked * LN2, mask=row < rows)


@triton.jit
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


@triton.jit
def _fold_chunk(
    logits,  # [n, width] fp32, hidden . weight^T of columns first .. first + width
    targets,  # [n] int64
    record,  # [n, 4] fp32
    rows,  # n
    width,
    first,
    inverse_temperature,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """A chunk of logits into its rows' records."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    at = record + row * 4
    top = tl.maximum(tl.load(at, mask=inside, other=0.0), MASKED)
    total = tl.load(at + 1, mask=inside, other=0.0)
    product = tl.load(at + 2, mask=inside, other=0.0)
    picked = tl.load(at + 3, mask=inside, other=0.0)
    target = tl.load(targets + row, mask=inside, other=-1) - first
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column[None, :] < width)
        z = tl.load(logits + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0) * inverse_temperature
        z = tl.where(mask, z, MASKED)
        picked = tl.maximum(picked, tl.max(tl.where(mask & (column[None, :] == target[:, None]), z, float("-inf")), 1))
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = top - new_top
        rescale = tl.exp(shift)
        z -= new_top[:, None]
        p = tl.exp(z)
        if ENTROPY:
            product = (product + total * shift) * rescale + tl.sum(p * z, 1)
        total = total * rescale + tl.sum(p, 1)
        top = new_top
    tl.store(at, top, mask=inside)
    tl.store(at + 1, total, mask=inside)
    tl.store(at + 2, product, mask=inside)
    tl.store(at + 3, picked, mask=inside)


@triton.jit
def _logits_to_dz(
    logits,  # [n, width] fp32
    dz,  # [n, width], `logits` itself or a buffer of the inputs' dtype
    targets,  # [n] int64
    coefficients,  # [n, 4] fp32: lse, g, a, h
    rows,  # n
    width,
    first,
    inverse_temperature,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    mask = inside[:, None] & (column[None, :] < width)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    lse = tl.load(coefficients + row * 4, mask=inside, other=0.0)
    g = tl.load(coefficients + row * 4 + 1, mask=inside, other=0.0)
    a = tl.load(coefficients + row * 4 + 2, mask=inside, other=0.0)
    h = tl.load(coefficients + row * 4 + 3, mask=inside, other=0.0)
    target = tl.load(targets + row, mask=inside, other=-1) - first
    log_p = tl.load(logits + at, mask=mask, other=0.0) * inverse_temperature - lse[:, None]
    slope = tl.exp(log_p) * (a[:, None] - h[:, None] * log_p) + tl.where(column[None, :] == target[:, None], g[:, None], 0.0)
    tl.store(dz + at, (slope * inverse_temperature).to(dz.dtype.element_ty), mask=mask)


def fused_partials(
    hidden: torch.Tensor, weight: torch.Tensor, local_targets: torch.Tensor, valid: int, temperature: float, need_entropy: bool
) -> torch.Tensor:
    """`torch_chunked.partials` by the streaming kernel; scratch is [splits, N, 4]."""
    rows = len(hidden)
    if not valid or not rows:
        return empty_records(hidden)
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        hidden, weight = hidden.float(), weight.float()  # numpy has no bf16: the interpreter's dot would multiply bit patterns
    hidden, weight = _unit_stride(hidden), _unit_stride(weight)
    blocks = _stream_blocks(rows, hidden.dtype)
    row_tiles, tiles = triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(valid, blocks["BLOCK_V"])
    tiles_per_split, splits = _splits(row_tiles, tiles, _programs(hidden.device, blocks["BLOCK_M"]))
    records = hidden.new_empty((splits, rows, 4), dtype=torch.float32)
    _stream[(row_tiles, splits)](
        hidden,
        weight,
        local_targets,
        records,
        rows,
        valid,
        hidden.stride(0),
        weight.stride(0),
        1.0 / temperature,
        tiles_per_split,
        H=hidden.shape[1],
        ENTROPY=need_entropy,
        PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
        **blocks,
    )
    if splits == 1:
        return records[0]
    record = torch.empty_like(records[0])
    _fold_splits[(triton.cdiv(rows, 4),)](records, record, rows, splits, BLOCK_R=4, SPLITS=triton.next_power_of_2(splits))
    return record


def chunked_partials(
    hidden: torch.Tensor, weight: torch.Tensor, local_targets: torch.Tensor, valid: int, temperature: float, need_entropy: bool
) -> torch.Tensor:
    """`torch_chunked.partials` by GEMMs into a workspace of CHUNK_BYTES at most."""
    record = empty_records(hidden)
    workspace = _workspace(hidden, valid, torch.float32)
    for rows, columns in _chunks(len(hidden), valid):
        logits = _matmul_into(workspace, hidden[rows], weight[columns].t())
        count, width = logits.shape
        _fold_chunk[(triton.cdiv(count, BLOCK["BLOCK_R"]),)](
            logits, local_targets[rows], record[rows], count, width, columns.start, 1.0 / temperature, ENTROPY=need_entropy, **BLOCK
        )
    return record


FORWARDS = {"fused": fused_partials, "chunks": chunked_partials}


def gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    local_targets: torch.Tensor,
    valid: int,
    temperature: float,
    coefficients: torch.Tensor,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`torch_chunked.gradients`, chunk by chunk of columns, so that a chunk of the weight's gradient is written once."""
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if need_hidden else None
    grad_weight = torch.zeros_like(weight) if need_weight else None
    workspace = _workspace(hidden, valid, torch.float32)
    narrow = None if hidden.dtype == torch.float32 else _workspace(hidden, valid, hidden.dtype)
    chunk: torch.Tensor | None = None
    for rows, columns in _chunks(len(hidden), valid):
        logits = _matmul_into(workspace, hidden[rows], weight[columns].t())
        count, width = logits.shape
        dz = logits if narrow is None else narrow[: count * width].view(count, width)
        grid = (triton.cdiv(count, BLOCK["BLOCK_R"]), triton.cdiv(width, BLOCK["BLOCK"]))
        _logits_to_dz[grid](logits, dz, local_targets[rows], coefficients[rows], count, width, columns.start, 1.0 / temperature, **BLOCK)
        if grad_hidden is not None:
            accumulate(grad_hidden[rows], dz, weight[columns])
        if grad_weight is not None:
            if rows.start == 0:
                chunk = matmul(dz.t(), hidden[rows])
            else:
                assert chunk is not None, "row blocks of a column chunk come in order"
                accumulate(chunk, dz.t(), hidden[rows])
            if rows.stop == len(hidden):
                grad_weight[columns] = chunk
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def block_records(logits: torch.Tensor, local_targets: torch.Tensor, temperature: float, need_entropy: bool) -> torch.Tensor:
    """`torch_chunked.block_records`."""
    count, width = logits.shape
    record = empty_records(logits)
    grid = (triton.cdiv(count, BLOCK["BLOCK_R"]),)
    _fold_chunk[grid](logits, local_targets, record, count, width, 0, 1.0 / temperature, ENTROPY=need_entropy, **BLOCK)
    return record


def block_dz(
    logits: torch.Tensor, local_targets: torch.Tensor, temperature: float, coefficients: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`torch_chunked.block_dz`; in place where `dtype` is that of the logits."""
    count, width = logits.shape
    dz = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    grid = (triton.cdiv(count, BLOCK["BLOCK_R"]), triton.cdiv(width, BLOCK["BLOCK"]))
    _logits_to_dz[grid](logits, dz, local_targets, coefficients, count, width, 0, 1.0 / temperature, **BLOCK)
    return dz


def _stream_blocks(rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile of the streaming kernel. Few rows: small, deep pipeline for bandwidth; many: as large as registers allow."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_V": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if rows <= 64:
        block = max(16, triton.next_power_of_2(rows))
        return {"BLOCK_M": block, "BLOCK_V": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    if rows <= 128:
        return {"BLOCK_M": 128, "BLOCK_V": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
    return {"BLOCK_M": 128, "BLOCK_V": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _splits(row_tiles: int, tiles: int, programs: int) -> tuple[int, int]:
    """(vocabulary tiles per program, splits) so that row_tiles x splits programs about fill the device; no split is empty."""
    splits = min(tiles, max(1, programs // row_tiles))
    per_split = triton.cdiv(tiles, splits)
    return per_split, triton.cdiv(tiles, per_split)


@functools.cache
def _programs(device: torch.device, block_m: int) -> int:
    """Programs that run at once: two small tiles fit on a multiprocessor, one large."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * (2 if block_m <= 64 else 1)


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _chunk_shape(rows: int, valid: int) -> tuple[int, int]:
    """(rows, columns) of a chunk: at most CHUNK_BYTES of fp32, columns a multiple of 128 unless they are all."""
    block = min(rows, ROW_BLOCK)
    columns = max(128, CHUNK_BYTES // (4 * max(block, 1)) // 128 * 128)
    return block, min(columns, valid)


def _chunks(rows: int, valid: int) -> Iterator[tuple[slice, slice]]:
    """Column chunks in order, and within one the row blocks in order."""
    block, columns = _chunk_shape(rows, valid)
    for first in range(0, valid if rows else 0, max(columns, 1)):
        for row in range(0, rows, block):
            yield slice(row, min(row + block, rows)), slice(first, min(first + columns, valid))


def _workspace(hidden: torch.Tensor, valid: int, dtype: torch.dtype) -> torch.Tensor:
    block, columns = _chunk_shape(len(hidden), valid)
    return hidden.new_empty(block * columns, dtype=dtype)


def _matmul_into(workspace: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in the front of the fp32 workspace, contiguous."""
    out = workspace[: len(a) * b.shape[1]].view(len(a), b.shape[1])
    return matmul(a, b, out=out)
