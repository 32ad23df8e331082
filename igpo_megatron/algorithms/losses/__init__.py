"""Losses: per-token tensors in, sums out. Their settings are read without torch. registry.py lists them. Begin there."""
