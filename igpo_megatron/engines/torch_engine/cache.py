"""Keys and values of running sequences: one slot each, filled from position 0, in preallocated tensors.

    slot 0  a a a a a a . . . .      running sequences have the slots 0 to n - 1, so a decoding step reads a view, not a copy;
    slot 1  b b b . . . . . . .      the one that ends is replaced by the last
    slot 2  . . . . . . . . . .

transformers' DynamicCache copies everything with every token and knows one length for all rows; its StaticCache has one length, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(slots=True)
class Window:
    """Describes the next forward pass, for all layers."""

    first_slot: int = 0
    positions: torch.Tensor | None = None
    """[n] positions of the one new token of each slot from 0 on; None if full contexts are written from position 0."""

    length: int = 0
    """Positions that the new tokens attend to, where `positions` are given."""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's slots: keys and values [slots, key-value heads, capacity, head size]."""

    is_sliding = False

    def __init__(self, window: Window, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._window = window
        # Zeros: masked positions have weight 0, and 0 times an uninitialised inf would be NaN.
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' [rows, heads, tokens, size]; returns what they attend to."""
        window, (rows, _, tokens, _) = self._window, key_states.shape
        if window.positions is None:
            slots = slice(window.first_slot, window.first_slot + rows)
            self.keys[slots, :, :tokens], self.values[slots, :, :tokens] = key_states, value_states
            return key_states, value_states
        slots = torch.arange(rows, device=key_states.device)
        self.keys[slots, :, window.positions], self.values[slots, :, window.positions] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[:rows, :, : window.length], self.values[:rows, :, : window.length]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def get_seq_length(self) -> int:
        """Full contexts begin at 0; for single tokens the mask is given, so this is not used."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, first key's position) of full contexts."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Positions of a slot."""
        return int(self.keys.shape[2])


class SlotCache(Cache):  # type: ignore[misc]
    """The slots of all layers."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.window = Window()
        super().__init__(layers=[SlotLayer(self.window, shape, dtype, device) for _ in range(layers)])

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor[target, :, :length] = tensor[source, :, :length]
