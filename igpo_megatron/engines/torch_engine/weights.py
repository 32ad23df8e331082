"""Maps the weights of a Hugging Face folder to transformers' parameters, and loads new ones.

Names are the folder's, as the policy exports them; transformers keeps the experts of a layer in one tensor. A tied head has no weight of
its own: it is the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from igpo_megatron.types import NamedTensors, SyncError

_EXPERTS = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
_USUAL_EXPERTS = ("mlp", "gate_proj", "up_proj", "down_proj")


def places(model: Any) -> dict[str, torch.Tensor]:
    """HF name -> its parameter, or part of one."""
    module, *experts = _EXPERTS.get(model.config.model_type, _USUAL_EXPERTS)
    return {
        name: tensor for kept, parameter in model.named_parameters() for name, tensor in _names(kept, parameter.detach(), module, *experts)
    }


def _names(kept: str, tensor: torch.Tensor, module: str, gate: str, up: str, down: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The folder's names, and tensors, of transformers' parameter `kept`."""
    name = kept.replace(".mlp.gate.weight", f".{module}.gate.weight")
    layer, experts, kind = name.partition(".mlp.experts.")
    if not experts:
        yield name, tensor
    elif kind == "gate_up_proj":  # [experts, 2 x size, hidden]
        for number, both in enumerate(tensor):
            yield from zip((f"{layer}.{module}.experts.{number}.{part}.weight" for part in (gate, up)), both.chunk(2), strict=True)
    else:
        yield from ((f"{layer}.{module}.experts.{number}.{down}.weight", one) for number, one in enumerate(tensor))


@torch.no_grad()
def load(named_tensors: NamedTensors, held: Mapping[str, torch.Tensor], version: int, engine: str) -> int:
    """Copy a complete model into `held`; returns its bytes. Raises SyncError naming the first tensor that is missing or wrong."""
    missing, nbytes = dict(held), 0
    for name, tensor in named_tensors:
        place = missing.pop(name, None)
        if place is None:
            why = "was sent twice" if name in held else "its model does not have"
            raise SyncError(f"sync {version}: {engine} received {name}, which {why}")
        if tensor.shape != place.shape:
            raise SyncError(f"sync {version}: {engine} received {name} of shape {list(tensor.shape)}; its model has {list(place.shape)}")
        place.copy_(tensor)
        nbytes += tensor.nbytes
        if not bool(place.isfinite().all()):
            raise SyncError(f"sync {version}: {engine} received {name} with values that are not finite numbers")
    if missing:
        raise SyncError(
            f"sync {version}: {engine} received {len(held) - len(missing)} of {len(held)} tensors; {next(iter(missing))} is missing"
        )
    return nbytes
