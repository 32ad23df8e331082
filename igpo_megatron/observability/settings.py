"""Settings of metrics and rollout files."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt

from igpo_megatron.settings import Section


class Track(Section):
    """Metrics."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; `online` without WANDB_API_KEY falls back to offline."""

    project: str = "igpo-megatron"
    """Weights & Biases project."""

    dump_every: NonNegativeInt = 1
    """Steps between rollout files; 0 writes none."""
