"""Invertible rules between the tensors of a Hugging Face model and those of a Megatron-Core model.

HF tensors --to_megatron--> full Megatron tensor --shard--> one tensor-parallel rank's part
HF tensors <----to_hf------ full Megatron tensor <-unshard- all ranks' parts, in rank order

"Full" means as at tensor parallel 1, with the vocabulary padded: also the layout in which Megatron's `torch_dist` checkpoints
store a tensor. Rules are pure functions of tensors; they neither copy to a device nor change a dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from checkpoint_conversion import ConversionError as ConversionError  # all converters import it from here


@dataclass(frozen=True)
class Rule:
    """What one Megatron tensor is made of. Subclasses say how; this one is one HF tensor, unchanged."""

    megatron_name: str
    """Global name as in Megatron's local layer spec, with the layer's index in the whole model."""

    hf_names: tuple[str, ...]
    """The HF tensors it is made of, in the order that `to_megatron` takes and `to_hf` returns them."""

    te_name: str = field(default="", kw_only=True)
    """The same name in TransformerEngine's layers; equal to `megatron_name` for most tensors."""

    expert: int | None = field(default=None, kw_only=True)
    """Its expert's number in the layer. Expert parallelism gives each rank a range of experts; tensor parallelism does not cut them."""

    split_dim: ClassVar[int | None] = None
    """The dimension that tensor parallelism cuts; None where every rank holds the whole tensor."""

    @property
    def exports(self) -> tuple[str, ...]:
        """The HF names that `to_hf` returns tensors for: all of `hf_names`, or none where another rule owns them."""
        return self.hf_names

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """The full Megatron tensor of the HF tensors named by `hf_names`."""
        (tensor,) = self._checked(tensors)
        return tensor

    def to_hf(self, full: Tensor) -> list[Tensor]:
        """The HF tensors named by `exports`."""
        return [full]

    def shard(self, full: Tensor, tp: int, rank: int) -> Tensor:
        """Tensor-parallel rank `rank`'s part, of `tp` parts."""
        if self.split_dim is None:
            return full
        return self._chunks(full, tp)[rank]

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor of all ranks' parts, in rank order."""
        if self.split_dim is None:
            return shards[0]
        return joined(shards, self.split_dim)

    def _chunks(self, full: Tensor, parts: int) -> tuple[Tensor, ...]:
        assert self.split_dim is not None
        if full.shape[self.split_dim] % parts:
            raise ConversionError(
                f"{self.megatron_name} has shape {list(full.shape)}: tensor parallel {parts} does not divide its dimension {self.split_dim}"
            )
        return full.chunk(parts, self.split_dim)

    def _checked(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        assert len(tensors) == len(self.hf_names), f"{self.megatron_name} is made of {len(self.hf_names)} tensors, got {len(tensors)}"
        if len({tensor.dtype for tensor in tensors}) > 1:
            found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in zip(self.hf_names, tensors, strict=True))
            raise ConversionError(f"{self.megatron_name} is one tensor of one dtype, but its parts differ: {found}; save the model in one")
        return tensors


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, which on tensors without data ("meta") would import seconds' worth of torch."""
    sizes = [part.shape[dim] for part in parts]
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)
    full = parts[0].new_empty(shape)
    for window, part in zip(full.split(sizes, dim), parts, strict=True):
        window.copy_(part)
    return full


class Copy(Rule):
    """Replicated on every tensor-parallel rank (norms)."""


class Column(Rule):
    """Cut by output features: rows of the weight, elements of the bias."""

    split_dim = 0


class Row(Rule):
    """Cut by input features: columns of the weight."""

    split_dim = 1


@dataclass(frozen=True)
class Qkv(Column):
    """Query, key and value, interleaved per key-value group: [q of group 0, k 0, v 0, q of group 1, ...]."""

    num_kv_heads: int
    head_dim: int

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        query, key, value = self._checked(tensors)
        kv_rows = self.num_kv_heads * self.head_dim
        if key.shape[0] != kv_rows or value.shape[0] != kv_rows or query.shape[0] % kv_rows:
            raise ConversionError(
                f"{', '.join(self.hf_names)} have {query.shape[0]}, {key.shape[0]}, {value.shape[0]} rows, but config.json says "
                f"{self.num_kv_heads} key-value heads of {self.head_dim}; the config belongs to another model"
            )
        grouped = [tensor.reshape(self.num_kv_heads, -1, *tensor.shape[1:]) for tensor in (query, key, value)]
        return joined(grouped, 1).flatten(0, 1)

    def to_hf(self, full: Tensor) -> list[Tensor]:
        grouped = full.reshape(self.num_kv_heads, -1, *full.shape[1:])
        parts = grouped.split([grouped.shape[1] - 2 * self.head_dim, self.head_dim, self.head_dim], 1)
        return [part.flatten(0, 1) for part in parts]

    def shard(self, full: Tensor, tp: int, rank: int) -> Tensor:
        if self.num_kv_heads % tp:
            raise ConversionError(
                f"{self.megatron_name}: tensor parallel {tp} does not divide the model's {self.num_kv_heads} key-value heads"
            )
        return self._chunks(full, tp)[rank]


class GateUp(Column):
    """Gate above up projection in one matrix; each rank holds its part of the gate above its part of the up projection."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return joined(self._checked(tensors), 0)

    def to_hf(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(2, 0))

    def shard(self, full: Tensor, tp: int, rank: int) -> Tensor:
        return joined([self._chunks(half, tp)[rank] for half in full.chunk(2, 0)], 0)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        gates, ups = zip(*(shard.chunk(2, 0) for shard in shards), strict=True)
        return joined([*gates, *ups], 0)


@dataclass(frozen=True)
class PadVocab(Column):
    """One row per token of the vocabulary, filled up with zero rows to a multiple that tensor parallelism divides."""

    vocab_size: int
    multiple: int

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = self._checked(tensors)
        if tensor.shape[0] != self.vocab_size:
            raise ConversionError(f"{self.hf_names[0]} has {tensor.shape[0]} rows, but config.json says vocab_size={self.vocab_size}")
        padding = -self.vocab_size % self.multiple
        return joined([tensor, tensor.new_zeros(padding, *tensor.shape[1:])], 0) if padding else tensor

    def to_hf(self, full: Tensor) -> list[Tensor]:
        # With any padding: a checkpoint saved with another multiple can be exported as well.
        if full.shape[0] < self.vocab_size:
            raise ConversionError(f"{self.megatron_name} has {full.shape[0]} rows, fewer than config.json's vocab_size={self.vocab_size}")
        return [full[: self.vocab_size]]


class Tied(PadVocab):
    """An output layer that is the embedding: read from it where a pipeline stage holds its own copy, never exported."""

    @property
    def exports(self) -> tuple[str, ...]:
        return ()

    def to_hf(self, full: Tensor) -> list[Tensor]:
        return []
