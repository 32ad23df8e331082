"""How much of a run the page takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a run is put into the page."""

    groups: int = 20
    """Questions per rollout file, the first ones."""

    samples: int = 16
    """Trajectories per question, the first ones."""

    action_tokens: int = 600
    """Sampled tokens shown per turn."""

    text_chars: int = 3000
    """Characters shown per prompt and search result."""

    file_bytes: int = 800_000
    """A file's questions stop where they pass this size as JSON; the first one is always kept."""

    points: int = 400
    """Points per curve; longer runs are averaged over neighbouring steps."""


STANDARD = Limits()
"""A page of a few megabytes."""
