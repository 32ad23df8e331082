"""Numerical cores that know nothing of Megatron: plain tensors and process groups in, tensors out."""
