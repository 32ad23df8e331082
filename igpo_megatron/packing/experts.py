"""Turn the experts that an engine recorded per token into a row's tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from igpo_megatron.types import UserError


class ExpertShape(NamedTuple):
    """What a model's routers choose for one token."""

    layers: int
    top_k: int


def expert_rows(recorded: Sequence[bytes | None], num_tokens: int, shape: ExpertShape) -> torch.Tensor:
    """`Node.experts` of a row's tokens -> [num_tokens, layers, top_k] int16; -1 for tokens without a record, and for padding.

    Raises UserError for records of a model of another shape.
    """
    rows = torch.full((num_tokens, *shape), -1, dtype=torch.int16)
    places = [place for place, experts in enumerate(recorded) if experts is not None]
    if not places:
        return rows
    numbers = shape.layers * shape.top_k
    sizes = {len(experts) for experts in recorded if experts is not None}
    if not sizes < {numbers, 2 * numbers}:
        raise UserError(
            f"recorded experts take {sorted(sizes)} bytes per token, the model's {shape.layers} layers of {shape.top_k} experts each would "
            f"take {numbers} or {2 * numbers}; they come from another model: record new rollouts, or set rollout.routing_replay=false"
        )
    joined = bytearray(b"".join(experts for experts in recorded if experts is not None))
    dtype = torch.uint8 if sizes == {numbers} else torch.int16  # no model has experts enough for the sign bit
    rows[places] = torch.frombuffer(joined, dtype=dtype).to(torch.int16).reshape(-1, *shape)
    return rows
