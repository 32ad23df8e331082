"""Attention over packed trees inside Megatron's layers: the mask is `subtree_end`, one integer per token.

Megatron hands its `attention_mask` argument through untouched, so it carries `subtree_end` [T]; a row holds one batch entry.
Trees in a row do not see each other, so attention runs tree by tree and costs the sum of squares, not the square of the sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.module import MegatronModule


def tree_spans(subtree_end: torch.Tensor) -> list[tuple[int, int]]:
    """[start, stop) of every tree in a row."""
    ends = subtree_end.tolist()
    spans, start = [], 0
    while start < len(ends):
        spans.append((start, ends[start]))
        start = ends[start]
    return spans


def tree_mask(subtree_end: torch.Tensor) -> torch.Tensor:
    """[T, T] bool, True where query i (rows) may see key j (columns): j <= i < subtree_end[j]."""
    index = torch.arange(len(subtree_end), device=subtree_end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])


class TreeAttention(MegatronModule):
    """Core attention (SDPA, grouped queries) for rows of packed trees."""

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
        outputs = []
        for start, stop in tree_spans(attention_mask):
            ends = attention_mask[start:stop] - start  # on the host: its values decide what is launched
            q, k, v = (x[start:stop].permute(1, 2, 0, 3) for x in (query, key, value))
            chain = bool((ends == stop - start).all())
            outputs.append(
                F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=None if chain else tree_mask(ends).to(query.device),
                    is_causal=chain,
                    scale=self.scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )
        return torch.cat(outputs, dim=2).permute(2, 0, 1, 3).flatten(2)


class TreeRotaryEmbedding(RotaryEmbedding):
    """Rotary angles for explicit positions; keeps whatever frequency scaling Megatron applied to `inv_freq`."""

    def at(self, position_ids: torch.Tensor) -> torch.Tensor:
        """position_ids [1, T] -> angles [T, 1, 1, d]."""
        angles = position_ids.t().float()[..., None] * self.inv_freq.to(position_ids.device)
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> torch.Tensor:
        """Sequential angles, as Megatron asks for them before the model replaces them by `at`."""
        return self.at(torch.arange(offset, offset + max_seq_len, device=self.inv_freq.device)[None])
