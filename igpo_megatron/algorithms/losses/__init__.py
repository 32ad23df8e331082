"""Losses: per-token tensors in, sums out; the only files of this room that need torch. registry.py lists them. Begin there."""
