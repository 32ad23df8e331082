"""Every advantage by its name; and section `advantage`, which is made of the rows.

RolloutGroup ── score ── add_probes ──(actor scores probes)── turn_gains ── set_advantages ──> trajectory.turn_advantages
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from igpo_megatron.algorithms.advantages import anchor, outcome, tree, turn
from igpo_megatron.algorithms.advantages.base import AdvantageSection, HookedAdvantage
from igpo_megatron.settings import load_hook, one_of, ours_or
from igpo_megatron.types import RolloutGroup


class AdvantageEntry(NamedTuple):
    """One row of `ADVANTAGES`."""

    section: type[AdvantageSection] | type[HookedAdvantage]
    """Its settings, and what a run must prepare for it (probes, a greedy sample)."""

    function: Callable[[RolloutGroup, Any, float], None]
    """(group, its own section, progress in [0, 1] from the first step to the last): sets `turn_advantages` of all in `group.trained`,
    which hold a zero per turn before."""

    over_batch: Callable[[Sequence[RolloutGroup]], None] | None = None
    """Applied to all groups of the step, once each has its advantages."""


ADVANTAGES: dict[str, AdvantageEntry] = {
    "igpo": AdvantageEntry(turn.Igpo, turn.igpo),
    "igpo_loo": AdvantageEntry(turn.IgpoLoo, turn.igpo_loo),
    "grpo": AdvantageEntry(outcome.Grpo, outcome.grpo),
    "rloo": AdvantageEntry(outcome.Rloo, outcome.rloo),
    "arpo": AdvantageEntry(tree.Arpo, tree.arpo),
    "gigpo": AdvantageEntry(anchor.GiGpo, anchor.gigpo),
    "eapo": AdvantageEntry(turn.Eapo, turn.eapo),
    "rapo": AdvantageEntry(outcome.Rapo, outcome.rapo, over_batch=outcome.scale_by_informative),
    "reinforce_pp": AdvantageEntry(outcome.ReinforcePp, outcome.reinforce_pp, over_batch=outcome.whiten),
    "reinforce_pp_baseline": AdvantageEntry(outcome.ReinforcePpBaseline, outcome.reinforce_pp_baseline, over_batch=outcome.whiten),
    "remax": AdvantageEntry(outcome.ReMax, outcome.remax),
}

if TYPE_CHECKING:  # mypy cannot see a type that is made of rows
    Advantage = AdvantageSection | HookedAdvantage
else:
    Advantage = ours_or(HookedAdvantage, one_of(entry.section for entry in ADVANTAGES.values()))


def entry_of(config: Advantage) -> AdvantageEntry:
    """The row of an advantage; a user's own function is imported. Raises UserError if that fails."""
    if not isinstance(config, HookedAdvantage):
        return ADVANTAGES[config.name]
    over_batch = load_hook("advantage.over_batch", config.over_batch) if config.over_batch else None
    return AdvantageEntry(HookedAdvantage, load_hook("advantage.name", config.name), over_batch)


def set_advantages(groups: Sequence[RolloutGroup], config: Advantage, progress: float) -> None:
    """Set every `turn_advantages` of a step, zeros for untrained trajectories. `progress`: 0 at the first step, 1 at the last."""
    entry = entry_of(config)
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.turn_advantages = [0.0] * len(group.actions(trajectory))
        entry.function(group, config, progress)
    if entry.over_batch and groups:  # only the main rank has any
        entry.over_batch(groups)
