"""Hugging Face folders to Megatron-Core checkpoints and back, by tables of invertible rules. Imports nothing of igpo_megatron."""

from checkpoint_conversion.errors import ConversionError

__all__ = ["MAX_SHARD_BYTES", "ConversionError"]

MAX_SHARD_BYTES = 4 * 2**30
"""Largest file of weights, unless one tensor alone is larger."""
