"""FLOPs that a model needs however they are computed: the base of MFU, and the least that a plan costs.

    forward   2 per weight of a linear layer and token, 2 per weight of the head and target, 4 per width of the queries and pair
    backward  twice as many (PaLM, arXiv:2204.02311, appendix B: 6 N per token in all)

Pairs are those of a query and a key that see each other. What is computed again (activations, logits) is not counted.
"""

from __future__ import annotations

from checkpoint_conversion.architectures import ModelShape
from igpo_megatron.plan.types import Row


def linear_widths(shape: ModelShape) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(inner, outer) widths of the linear layers of attention, and of the MLP: of each expert, where a layer has experts."""
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    ffn = shape.mixture.ffn_size if shape.mixture else shape.ffn_size
    return [(shape.hidden_size, query + 2 * key), (query, shape.hidden_size)], [(shape.hidden_size, 2 * ffn), (ffn, shape.hidden_size)]


def layer_flops(shape: ModelShape, row: Row, *, backward: bool) -> float:
    """Of one layer, over a row; with `backward`, of both passes."""
    attention, mlp = (sum(inner * outer for inner, outer in part) for part in linear_widths(shape))
    visits, routing = (shape.mixture.top_k, shape.hidden_size * shape.mixture.num_experts) if shape.mixture else (1, 0)
    weights = attention + routing + visits * mlp
    forward = 2.0 * weights * row.tokens + 4.0 * shape.num_heads * shape.head_dim * row.pairs
    return forward * (3 if backward else 1)


def head_flops(shape: ModelShape, row: Row, *, backward: bool) -> float:
    """Of the log-probs of a row's targets."""
    return 2.0 * row.targets * shape.hidden_size * shape.vocab_size * (3 if backward else 1)


def model_flops(shape: ModelShape, row: Row, *, backward: bool) -> float:
    """Of the complete model, over a row."""
    return shape.num_layers * layer_flops(shape, row, backward=backward) + head_flops(shape, row, backward=backward)
