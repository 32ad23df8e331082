"""Give the device to the engines while they roll out: the policy moves to host memory and comes back bit for bit.

Tensors stay where they are and keep their shapes and views; only the storage behind them is emptied. Megatron's main parameters may be
views of the model's own, and its gradients are views of one buffer: moving such tensors one by one would separate them without an error.

On the host they lie side by side in one buffer of just their size, page-locked once and used again (host_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from igpo_megatron.policy.host_memory import page_locked, rounded
from igpo_megatron.policy.policy import Policy


class Offload:
    """The policy's weights, gradients and optimizer state, on the device or off it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._away: list[tuple[torch.UntypedStorage, torch.Tensor | int]] = []
        self._host: torch.Tensor | None = None
        self._page_locks = policy.ranks.device.type == "cuda"

    @property
    def is_away(self) -> bool:
        """The policy cannot be used now."""
        return bool(self._away)

    @torch.no_grad()
    def leave(self) -> int:
        """Empty the device of the policy; returns the bytes given back. Gradients are forgotten."""
        assert not self._away, "the policy has left the device already"
        gradients = {storage.data_ptr() for storage in _gradients(self._policy)}
        leaving = _distinct(_gradients(self._policy), _kept(self._policy))
        room = self._room(sum(rounded(storage.nbytes()) for storage in leaving if storage.data_ptr() not in gradients))
        for storage in leaving:
            size = storage.nbytes()
            host: torch.Tensor | int = size
            if storage.data_ptr() not in gradients:
                host, room = room[:size].copy_(_bytes_of(storage)), room[rounded(size) :]
            storage.resize_(0)
            self._away.append((storage, host))
        if self._policy.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        return sum(host if isinstance(host, int) else host.numel() for _, host in self._away)

    @torch.no_grad()
    def come_back(self) -> None:
        """Put everything back where it was; gradients are zero."""
        away, self._away = self._away, []
        for storage, host in away:
            if isinstance(host, int):
                storage.resize_(host)
                _bytes_of(storage).zero_()
            else:
                storage.resize_(host.numel())
                _bytes_of(storage).copy_(host, non_blocking=True)
        if self._policy.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        if not self._page_locks:
            self._host = None

    def _room(self, size: int) -> torch.Tensor:
        """At least `size` bytes of host memory: the last buffer where it is large enough, since locking pages takes long."""
        if self._host is not None and len(self._host) >= size:
            return self._host
        self._host = None  # freed before the next is made
        self._host = page_locked(size) if self._page_locks else torch.empty(size, dtype=torch.uint8)
        return self._host


def _gradients(policy: Policy) -> Iterator[torch.UntypedStorage]:
    for chunk in policy.wrapped:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            yield buffer.grad_data.untyped_storage()


def _kept(policy: Policy) -> Iterator[torch.UntypedStorage]:
    """Storages whose contents must be kept: weights, main parameters, moments."""
    device = policy.ranks.device.type
    tensors = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in part.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        if tensor.device.type == device:
            yield tensor.untyped_storage()


def _distinct(*sources: Iterator[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
    """Every storage once, however many tensors refer to it; without empty ones."""
    found = {storage.data_ptr(): storage for source in sources for storage in source if storage.nbytes()}
    return list(found.values())


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
