"""Attention over packed trees inside Megatron's layers: the mask is `subtree_end`, one integer per token.

Megatron hands its `attention_mask` argument through untouched, so it carries `subtree_end` [T], on the host; a row holds one
batch entry. On CPU the chains of the row's plan are calls of SDPA with their keys gathered; on CUDA one compiled FlexAttention
runs over the whole row with a block mask. Neither works on pairs of tokens that do not see each other. A rank of a context-parallel
group has the queries of the tokens it holds, and gathers the keys and values of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.module import MegatronModule
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from igpo_megatron.policy.context import gather_tokens, zigzag
from igpo_megatron.policy.host_memory import upload
from igpo_megatron.policy.tree_plan import PLANS, Range, plan_of

BLOCK = 128
"""Tokens per side of a block of the block mask."""

SHORT = 128
"""Queries of a call up to which a bf16 row is attended to in fp32: in bf16 torch's backward pass on CPU takes three times as long at 60
tokens, and no longer from about 200 on. In every pass alike, trained on or not: otherwise the log-probs before a step would not be those
that the step begins with (on SmolLM2 by 0.025 on average)."""

GRAPHS = 256
"""Most compiled forms of FlexAttention in one process: one for every bucket of queries and of keys, with and without gradients."""

FlexAttention = Callable[..., torch.Tensor]
"""Called as torch's `flex_attention`."""


class TreeAttention(MegatronModule):
    """Core attention (grouped queries) for rows of packed trees."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.context = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query [t, 1, heads, d], key and value [t, 1, kv_heads, d], attention_mask = subtree_end [T] -> [t, 1, heads * d].

        t = T, or in a context-parallel group this rank's share of the row.
        """
        q, k, v, held = query[:, 0], key[:, 0], value[:, 0], None
        if self.context.size() > 1:
            held = zigzag(len(attention_mask), self.context.rank(), self.context.size())
            k, v = gather_tokens(torch.cat((k, v), -1), self.context).chunk(2, -1)
        attend = flex_tree_attention if q.is_cuda else chain_attention
        return attend(q, k, v, attention_mask, self.scale, held).flatten(1)[:, None]


def chain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor, scale: float, held: tuple[Range, ...] | None = None
) -> torch.Tensor:
    """SDPA call by call of the row's plan.

    q [t, heads, d] of the tokens `held` (None: all), k and v [T, kv_heads, d], subtree_end [T] -> [t, heads, d].
    """
    plan = plan_of(subtree_end, held)
    queries, keys = tuple(call.queries for call in plan.calls), tuple(call.keys for call in plan.calls)
    taken = zip(_TakeRows.apply(q, queries), _TakeRows.apply(k, keys), _TakeRows.apply(v, keys), strict=True)
    outputs = [_attend(*rows, call.mask, scale) for rows, call in zip(taken, plan.calls, strict=True)]
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return output if plan.order is None else output.index_select(0, plan.order)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """One call: q [m, heads, d], k and v [n, kv_heads, d], mask [m, n] as in the plan -> [m, heads, d]."""
    dtype = q.dtype
    if dtype == torch.bfloat16 and len(q) <= SHORT:
        q, k, v = q.float(), k.float(), v.float()
    backwards = mask is None and len(q) < len(k)
    if backwards:
        # Of the queries in reverse, number i sees the first n - i keys: one line of n zeros and then -inf, read from i on, is row i
        # of the mask, so the mask takes m + n numbers instead of m x n.
        line = torch.cat((q.new_zeros(len(k)), q.new_full((len(q) - 1,), -torch.inf)))
        q, mask = q.flip(0), line.as_strided((len(q), len(k)), (1, 1))
    output = F.scaled_dot_product_attention(
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        attn_mask=mask if mask is None or backwards else mask.to(q.dtype),
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )[0].transpose(0, 1)
    return (output.flip(0) if backwards else output).to(dtype)


class _TakeRows(torch.autograd.Function):
    """[T, heads, d] -> the rows of every call. Torch's own indexing would give each call a gradient of all T rows, zero but for its own."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, calls: Sequence[slice | torch.Tensor]) -> tuple[torch.Tensor, ...]:
        ctx.calls, ctx.shape = calls, tokens.shape
        # Whole rows are copied at once, which indexing a transposed tensor would not do.
        return tuple(tokens[rows] if isinstance(rows, slice) else tokens.index_select(0, rows) for rows in calls)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for rows, grad in zip(ctx.calls, grads, strict=True):
            if isinstance(rows, slice):
                total[rows] += grad
            else:
                total.index_add_(0, rows, grad)
        return total, None


def _heads_first(tokens: torch.Tensor) -> torch.Tensor:
    """[T, heads, d] -> [1, heads, T, d]"""
    return tokens.transpose(0, 1)[None]


def flex_tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    subtree_end: torch.Tensor,
    scale: float,
    held: tuple[Range, ...] | None = None,
    attend: FlexAttention | None = None,
) -> torch.Tensor:
    """The same by one call of FlexAttention, padded to one of a few lengths so that few kernels are compiled.

    `attend`: the function that runs it; None: compiled on CUDA, uncompiled on CPU.
    """
    length = len(q)
    mask = _block_mask(subtree_end.to("cpu", torch.int64).numpy().tobytes(), held, q.device)
    queries, keys = mask.seq_lengths
    padded = (_heads_first(_padded(x, size)) for x, size in ((q, queries), (k, keys), (v, keys)))
    attend = attend or (compiled_flex_attention() if q.is_cuda else flex_attention)
    return attend(*padded, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)[:length]


def _padded(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """[T, heads, d] -> [size, heads, d]"""
    return F.pad(tokens, (0, 0, 0, 0, 0, size - len(tokens))) if size > len(tokens) else tokens


def bucket(length: int) -> int:
    """Smallest allowed length that holds `length` tokens: multiples of BLOCK, at most two to each doubling.

    Each length is a kernel to compile. Padding costs little, since it attends to nothing but itself (`padded_row`).
    """
    step = max(BLOCK, 1 << max((length - 1).bit_length() - 2, 0))
    return -(-length // step) * step


def padded_row(subtree_end: torch.Tensor) -> torch.Tensor:
    """[T] -> [bucket(T)]: a token of the padding sees itself only, so that of its blocks only those on the diagonal are computed."""
    return torch.cat((subtree_end, torch.arange(len(subtree_end), bucket(len(subtree_end))) + 1))


def block_mask(subtree_end: torch.Tensor, held: torch.Tensor | None = None) -> BlockMask:
    """FlexAttention's mask of a row [S], S a multiple of BLOCK, on its device, from S / BLOCK numbers instead of S^2.

    `held` [Q] int64, Q a multiple of BLOCK: the tokens whose queries there are; None: all of the row.
    With lo_j and hi_j the least and greatest subtree_end in key block j: no pair of query block i and j is seen unless j begins at or
    before i's last token and hi_j > i's first token, and all pairs are iff j ends before i's first token and lo_j > i's last token.
    """
    length = len(subtree_end)
    ends = subtree_end.view(-1, BLOCK)
    tokens = torch.arange(length, device=subtree_end.device) if held is None else held
    first, last = (bound[:, None] for bound in tokens.view(-1, BLOCK).aminmax(dim=1))
    key = torch.arange(0, length, BLOCK, device=subtree_end.device)[None, :]
    seen = (key <= last) & (ends.amax(1)[None, :] > first)
    full = (key + BLOCK <= first) & (ends.amin(1)[None, :] > last)

    def allowed(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i < subtree_end[j])

    def allowed_to_held(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return allowed(batch, head, tokens[i], j)

    partial_count, partial_index = _listed(seen & ~full)
    full_count, full_index = _listed(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=allowed if held is None else allowed_to_held,
        seq_lengths=(len(tokens), length),
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[m, n] bool -> counts [1, 1, m] and, per query block, its key blocks first in ascending order [1, 1, m, n], int32."""
    order = torch.argsort((~blocks).to(torch.int8), dim=1, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@lru_cache(maxsize=PLANS)
def _block_mask(subtree_end: bytes, held: tuple[Range, ...] | None, device: torch.device) -> BlockMask:
    """By content, like the plans: once per row, not once per layer."""
    row = torch.frombuffer(bytearray(subtree_end), dtype=torch.int64)
    ends = padded_row(row)
    if held is None:
        return block_mask(upload(ends, device))
    tokens = torch.cat([torch.arange(start, stop) for start, stop in held])
    # Queries of the padding see what the first token sees, which is least, and are dropped.
    padding = tokens[:1].expand(bucket(len(tokens)) - len(tokens))
    return block_mask(*upload((ends, torch.cat((tokens, padding))), device))


@cache
def compiled_flex_attention(backend: str | Callable[..., Any] = "inductor") -> FlexAttention:
    """FlexAttention, compiled anew for every bucket; raises torch's FailOnRecompileLimitHit beyond GRAPHS of them.

    By default dynamo stops at 8 and runs the rest uncompiled with only a line in the log: [heads, S, S] in fp32, 30 GB at 16k x 28.
    `fullgraph` makes it raise. `dynamic=True` would need one graph, but inductor assumes that an unknown length is no multiple of 128,
    and its kernels then check the edges of every block (IS_DIVISIBLE). The limit is set for our calls only, so that Megatron's own compiled
    functions keep theirs.
    """
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)

    @wraps(flex_attention)
    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
            return compiled(*args, **kwargs)

    return attend


class TreeRotaryEmbedding(RotaryEmbedding):
    """Rotary angles for explicit positions; keeps whatever frequency scaling Megatron applied to `inv_freq`."""

    inv_freq: torch.Tensor

    def at(self, position_ids: torch.Tensor) -> torch.Tensor:
        """position_ids [1, T] -> angles [T, 1, 1, d]."""
        # Megatron makes it on the host and keeps it out of the module's buffers: moved here, once, not for every row.
        self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids.t().float()[..., None] * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> torch.Tensor:
        """Sequential angles, as Megatron asks for them before the model replaces them by `at`."""
        return self.at(torch.arange(offset, offset + max_seq_len, device=self.inv_freq.device)[None])
