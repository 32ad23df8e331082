"""Parameters that a rank holds of each part of the model, counted once per tensor- and expert-parallel size.

All layers of a supported model are alike. One layer, built on the meta device, therefore stands for any stage of any pipeline.
"""

from __future__ import annotations

from dataclasses import replace

from checkpoint_conversion.architectures import ModelShape
from igpo_megatron.plan.types import PartSizes
from igpo_megatron.policy.settings import Parallel

_COUNTED: dict[str, PartSizes] = {}
"""By the text of (shape, tensor, expert): a shape may hold a dictionary, which cannot be hashed."""


def count_parts(shape: ModelShape, tensor: int, expert: int) -> PartSizes:
    """Parameters per rank of the embedding, a layer, its experts, and the head."""
    key = repr((shape, tensor, expert))
    if key not in _COUNTED:
        _COUNTED[key] = _count(shape, tensor, expert)
    return _COUNTED[key]


def _count(shape: ModelShape, tensor: int, expert: int) -> PartSizes:
    from igpo_megatron.policy.meta import rank_parameters

    one_layer = replace(shape, num_layers=1)
    layout = Parallel(tensor=tensor, expert=expert, sequence=tensor > 1)
    sizes = dict(rank_parameters(one_layer, layout, world=max(tensor, expert)))
    layer = {name: size for name, size in sizes.items() if ".layers." in name}
    experts = {name: size for name, size in layer.items() if ".experts." in name}
    embedding = sizes["embedding.word_embeddings.weight"]
    return PartSizes(
        embedding=embedding,
        layer=sum(layer.values()) - sum(experts.values()),
        layer_experts=sum(experts.values()),
        final_norm=sizes["decoder.final_layernorm.weight"],
        head=sizes.get("output_layer.weight", embedding),
        largest=max(layer.values()),
        tied=shape.tied,
    )


def total_parameters(shape: ModelShape) -> int:
    """Of the whole model, the vocabulary padded as the trainer pads it."""
    dense, experts = count_parts(shape, 1, 1).stage(shape.num_layers, first=True, last=True)
    return dense + experts


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token passes through."""
    parts = count_parts(shape, 1, 1)
    share = shape.mixture.top_k / shape.mixture.num_experts if shape.mixture else 0.0
    dense, experts = parts.stage(shape.num_layers, first=True, last=True)
    return dense + round(experts * share)
