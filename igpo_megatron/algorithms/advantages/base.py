"""What the sections of all advantages share, and the section of one of your own."""

from __future__ import annotations

from typing import ClassVar

from igpo_megatron.settings import Hooked, HookName, Section


class AdvantageSection(Section):
    """What a run asks of every advantage."""

    name: str

    needs_probes: ClassVar[bool] = False
    """It reads `trajectory.gains`, so that probes are scored."""

    needs_greedy: ClassVar[bool] = False
    """It reads the reward of a greedy trajectory, which is sampled beside the group."""

    compares_samples: ClassVar[bool] = True
    """It is zero for a question with a single sample."""


class HookedAdvantage(Hooked):
    """An advantage of your own: (group, these settings, progress in [0, 1]) sets the `turn_advantages` of all in `group.trained`."""

    needs_probes: bool = False
    """It reads `trajectory.gains`, so that probes are scored."""

    needs_greedy: bool = False
    """It reads the reward of a greedy trajectory (`group.metrics["greedy_reward"]`), which is sampled beside the group."""

    compares_samples: bool = True
    """It is zero for a question with a single sample."""

    over_batch: HookName | None = None
    """Another function, which is called with all groups of the step once each has its advantages."""
