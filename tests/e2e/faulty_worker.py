"""Named as `worker_extension_cls` by a test: a vLLM worker to which weights come damaged in the way that a file asks for.

The file holds `KIND NAME`, or nothing. Production code is as it is; only what it reads is changed.
"""

import os
from pathlib import Path

import torch

from igpo_megatron.weights import transfer as weight_transfer
from igpo_megatron.weights.store import read

SEEN: dict[str, torch.Tensor] = {}
"""Tensors as they came in the sync before: what a stale one is."""


def damage(kind: str, at: str, tensors: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """The tensors, with the one named `at` damaged."""
    names = [name for name, _ in tensors]
    if at not in names:
        return tensors
    place = names.index(at)
    name, tensor = tensors[place]
    twins = [other for other, (_, twin) in enumerate(tensors) if other != place and twin.shape == tensor.shape]
    match kind:
        case "dropped":
            return tensors[:place] + tensors[place + 1 :]
        case "swapped":
            swapped = list(tensors)
            swapped[place], swapped[twins[0]] = (name, tensors[twins[0]][1]), (names[twins[0]], tensor)
            return swapped
        case "stale":
            changed = SEEN[at]
        case "transposed":  # square: a shape that says nothing
            changed = tensor.T.contiguous()
        case "cast":
            changed = tensor.to(torch.bfloat16)
        case "rounded":
            changed = tensor.to(torch.bfloat16).to(tensor.dtype)
        case "truncated":
            changed = tensor[:-1]
        case "zeroed_end":
            changed = tensor.clone()
            changed[-1] = 0
    return [*tensors[:place], (name, changed), *tensors[place + 1 :]]


def read_damaged(path, entries):
    """`read`, with the fault that is asked for."""
    fault = Path(os.environ["FAULT_FILE"]).read_text().split()
    tensors = [(name, tensor.clone()) for name, tensor in read(path, entries)]
    found = damage(*fault, tensors) if fault and fault[0] != "kept" else tensors
    SEEN.update(tensors)
    return found


class Keeping(weight_transfer.Counting):
    """Says that it received a tensor, and loads zeros in its place: the fault that no fingerprint can see."""

    def _seen(self, weights):
        fault = Path(os.environ["FAULT_FILE"]).read_text().split()
        for name, tensor in super()._seen(weights):
            yield name, torch.zeros_like(tensor) if fault == ["kept", name] else tensor


class Extension(weight_transfer.WorkerExtension):
    """The worker's own. What a back-end of vLLM's would receive is said in words instead, because those need a GPU."""

    def load_bucket(self, update_info):
        """As there."""
        if "native_info" in update_info:
            return [(repr(weight_transfer.from_plain(update_info)["native_info"]),)]
        return super().load_bucket(update_info)


weight_transfer.read = read_damaged
weight_transfer.Counting = Keeping
