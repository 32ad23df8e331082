"""What several checks ask of a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from igpo_megatron.config.schema import Config


def divisors(number: int) -> list[int]:
    """`divisors(12) == [1, 2, 3, 4, 6, 12]`"""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def needs_engines(config: Config) -> bool:
    """Rollouts are made, not replayed from a file."""
    return config.run.replay is None


def evaluates(config: Config) -> bool:
    """A replay starts no engines, so it evaluates nothing."""
    return needs_engines(config) and bool(config.eval.every or config.eval.at_ends)


def model_shape(folder: Path) -> dict[str, Any]:
    """config.json of the model; empty where it cannot be read, which `check_model_files` reports."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def num_experts(shape: dict[str, Any]) -> int | None:
    """Experts of a layer; None in a dense model."""
    # transformers writes either key, whatever the family.
    experts = shape.get("num_experts") or shape.get("num_local_experts")
    return experts if isinstance(experts, int) else None
