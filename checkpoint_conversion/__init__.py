"""Hugging Face folders to Megatron-Core checkpoints and back, by tables of invertible rules. Imports nothing of igpo_megatron."""

MAX_SHARD_BYTES = 4 * 2**30
"""Largest file of weights, unless one tensor alone is larger."""


class ConversionError(ValueError):
    """A folder, a name or a tensor that cannot be converted; the message says what was found, expected, and what to change."""
