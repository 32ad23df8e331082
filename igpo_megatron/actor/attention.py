"""Attention over packed trees inside Megatron's layers: the mask is `subtree_end`, one integer per token.

Megatron hands its `attention_mask` argument through untouched, so it carries `subtree_end` [T], on the host; a row holds one
batch entry. On CPU the chains of the row's plan are calls of SDPA with their keys gathered; on CUDA one compiled FlexAttention
runs over the whole row with a block mask. Neither works on pairs of tokens that do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from igpo_megatron.actor.tree_plan import PLANS, plan_of

BLOCK = 128
"""Tokens per side of a block of the block mask."""


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
        """query [T, 1, heads, d], key and value [T, 1, kv_heads, d], attention_mask = subtree_end [T] -> [T, 1, heads * d]."""
        attend = flex_tree_attention if query.is_cuda else chain_attention
        return attend(query[:, 0], key[:, 0], value[:, 0], attention_mask, self.scale).flatten(1)[:, None]


def chain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor, scale: float) -> torch.Tensor:
    """q [T, heads, d], k and v [T, kv_heads, d], subtree_end [T] -> [T, heads, d]: SDPA call by call of the row's plan."""
    plan = plan_of(subtree_end)
    outputs = [
        F.scaled_dot_product_attention(
            _heads_first(_rows(q, call.queries)),
            _heads_first(_rows(k, call.keys)),
            _heads_first(_rows(v, call.keys)),
            attn_mask=None if call.mask is None else call.mask.to(q.dtype),
            is_causal=call.mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )[0].transpose(0, 1)
        for call in plan.calls
    ]
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return output if plan.order is None else output.index_select(0, plan.order)


def _rows(tokens: torch.Tensor, which: slice | torch.Tensor) -> torch.Tensor:
    """Rows of [T, heads, d]; whole rows are copied at once, which indexing a transposed tensor would not do."""
    return tokens[which] if isinstance(which, slice) else tokens.index_select(0, which)


def _heads_first(tokens: torch.Tensor) -> torch.Tensor:
    """[T, heads, d] -> [1, heads, T, d]"""
    return tokens.transpose(0, 1)[None]


def flex_tree_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor, scale: float) -> torch.Tensor:
    """The same by FlexAttention over the whole row, padded to one of a few lengths so that few kernels are compiled."""
    length = len(q)
    mask = _block_mask(subtree_end.to("cpu", torch.int64).numpy().tobytes(), q.device)
    padding = mask.seq_lengths[0] - length
    padded = (_heads_first(F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x) for x in (q, k, v))
    attend = _compiled_flex_attention() if q.is_cuda else flex_attention
    return attend(*padded, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)[:length]


def bucket(length: int) -> int:
    """Smallest of the allowed lengths that holds `length` tokens: multiples of BLOCK, at most four to each doubling."""
    step = max(BLOCK, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def block_mask(subtree_end: torch.Tensor) -> BlockMask:
    """FlexAttention's mask of a row [S], S a multiple of BLOCK, on its device, from S / BLOCK numbers instead of S^2.

    Of query block i and key block j, with lo_j and hi_j the least and greatest subtree_end in j: a pair is seen iff
    j <= i and hi_j > first query of i, and all pairs are iff j < i and lo_j > last query of i.
    """
    length = len(subtree_end)
    ends = subtree_end.view(-1, BLOCK)
    number = torch.arange(len(ends), device=subtree_end.device)
    query, key = number[:, None], number[None, :]
    seen = (key <= query) & (ends.amax(1)[None, :] > query * BLOCK)
    full = (key < query) & (ends.amin(1)[None, :] > query * BLOCK + BLOCK - 1)

    def allowed(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & (i < subtree_end[j])

    partial_count, partial_index = _listed(seen & ~full)
    full_count, full_index = _listed(full)
    return BlockMask.from_kv_blocks(
        partial_count, partial_index, full_count, full_index, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, n] bool -> counts [1, 1, n] and, per query block, its key blocks first in ascending order [1, 1, n, n], int32."""
    order = torch.argsort((~blocks).to(torch.int8), dim=1, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@lru_cache(maxsize=PLANS)
def _block_mask(subtree_end: bytes, device: torch.device) -> BlockMask:
    """By content, like the plans: once per row, not once per layer."""
    row = torch.frombuffer(bytearray(subtree_end), dtype=torch.int64)
    size = bucket(len(row))
    padded = F.pad(row, (0, size - len(row)), value=size)
    return block_mask(padded.to(device))


@cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=False)


class TreeRotaryEmbedding(RotaryEmbedding):
    """Rotary angles for explicit positions; keeps whatever frequency scaling Megatron applied to `inv_freq`."""

    def at(self, position_ids: torch.Tensor) -> torch.Tensor:
        """position_ids [1, T] -> angles [T, 1, 1, d]."""
        angles = position_ids.t().float()[..., None] * self.inv_freq.to(position_ids.device)
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> torch.Tensor:
        """Sequential angles, as Megatron asks for them before the model replaces them by `at`."""
        return self.at(torch.arange(offset, offset + max_seq_len, device=self.inv_freq.device)[None])
