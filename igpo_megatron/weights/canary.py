"""The canary: whatever a transfer's fingerprints say, an engine serves the policy's weights when it says the same of fixed tokens.

It sees what fingerprints cannot: weights that arrived and were not loaded, were loaded into the wrong place, or are kept twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from igpo_megatron.types import Canary, SyncError


def check_canary(canary: Canary, served: Sequence[float], version: int, engine: int) -> float:
    """Largest |log-prob difference| of what engine number `engine` says. Raises SyncError where it is more than the canary allows."""
    gaps = [abs(left - right) for left, right in zip(canary.logprobs, served, strict=True)]
    gap = max(gaps) if all(map(math.isfinite, gaps)) else math.inf  # max() would lose a nan
    if not gap <= canary.max_gap:
        raise SyncError(
            f"engine {engine} does not serve the policy's weights: after sync {version} their log-probs differ by up to {gap:.3g} "
            f"on the canary, more than sync.max_gap={canary.max_gap:g}; a transfer was lost or the engine kept old weights"
        )
    return gap
