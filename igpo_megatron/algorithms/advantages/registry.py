"""Every advantage by its name.

RolloutGroup ── score ── add_probes ──(actor scores probes)── turn_gains ── ADVANTAGES[name] ──> trajectory.turn_advantages
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from igpo_megatron.algorithms.advantages.anchor import gigpo
from igpo_megatron.algorithms.advantages.outcome import (
    grpo,
    rapo,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
    scale_by_informative,
    whiten,
)
from igpo_megatron.algorithms.advantages.tree import arpo
from igpo_megatron.algorithms.advantages.turn import eapo, igpo, igpo_loo
from igpo_megatron.types import RolloutGroup

Advantage = Callable[[RolloutGroup, Any, float], None]
"""(group, its own config section, progress in [0, 1] from the first step to the last): sets every `trajectory.turn_advantages`."""


class AdvantageEntry(NamedTuple):
    """One row of `ADVANTAGES`."""

    function: Advantage
    needs_probes: bool
    """True where the function reads `trajectory.gains`."""

    needs_greedy: bool = False
    """True where the function reads the reward of a greedy trajectory (`GREEDY_REWARD` of the group's metrics)."""

    over_batch: Callable[[Sequence[RolloutGroup]], None] | None = None
    """What follows over all groups of the step, once each has its advantages."""


ADVANTAGES: dict[str, AdvantageEntry] = {
    "igpo": AdvantageEntry(igpo, needs_probes=True),
    "igpo_loo": AdvantageEntry(igpo_loo, needs_probes=True),
    "grpo": AdvantageEntry(grpo, needs_probes=False),
    "rloo": AdvantageEntry(rloo, needs_probes=False),
    "gigpo": AdvantageEntry(gigpo, needs_probes=False),
    "reinforce_pp": AdvantageEntry(reinforce_pp, needs_probes=False, over_batch=whiten),
    "reinforce_pp_baseline": AdvantageEntry(reinforce_pp_baseline, needs_probes=False, over_batch=whiten),
    "remax": AdvantageEntry(remax, needs_probes=False, needs_greedy=True),
    "arpo": AdvantageEntry(arpo, needs_probes=False),
    "eapo": AdvantageEntry(eapo, needs_probes=False),
    "rapo": AdvantageEntry(rapo, needs_probes=False, over_batch=scale_by_informative),
}
