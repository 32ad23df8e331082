"""What a run optimises: outcome rewards, information gains, advantages (plain lists here) and losses (torch, in `losses` only).

RolloutGroup ── score ── add_probes ──(actor scores probes)── turn_gains ── ADVANTAGES[name] ──> trajectory.turn_advantages
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from igpo_megatron.algorithms.outcome_advantages import grpo, grpo_advantages, rloo, rloo_advantages
from igpo_megatron.algorithms.tree_advantages import arpo
from igpo_megatron.algorithms.turn_advantages import igpo, igpo_loo, igpo_loo_turn_advantages, igpo_turn_advantages
from igpo_megatron.types import RolloutGroup

Advantage = Callable[[RolloutGroup, Any, float], None]
"""(group, its own config section, progress in [0, 1] from the first step to the last): sets every `trajectory.turn_advantages`."""


class AdvantageEntry(NamedTuple):
    """One row of `ADVANTAGES`."""

    function: Advantage
    needs_probes: bool
    """True where the function reads `trajectory.gains`."""


ADVANTAGES: dict[str, AdvantageEntry] = {
    "igpo": AdvantageEntry(igpo, needs_probes=True),
    "igpo_loo": AdvantageEntry(igpo_loo, needs_probes=True),
    "grpo": AdvantageEntry(grpo, needs_probes=False),
    "rloo": AdvantageEntry(rloo, needs_probes=False),
    "arpo": AdvantageEntry(arpo, needs_probes=False),
}

__all__ = [
    "ADVANTAGES",
    "Advantage",
    "AdvantageEntry",
    "grpo_advantages",
    "igpo_loo_turn_advantages",
    "igpo_turn_advantages",
    "rloo_advantages",
]
