"""Hugging Face folders to Megatron-Core checkpoints and back, by tables of invertible rules; knows nothing of igpo_megatron."""

from checkpoint_conversion.errors import ConversionError

__all__ = ["ConversionError"]
