"""Whether this version of vLLM may score probes from its prefix cache: the cases that are known to go wrong, tried at start-up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from igpo_megatron.engines.api import EngineError

_CONTEXT, _PROBE = 128, 12  # 128 tokens are whole KV blocks of any size in use
_GAP = {"fp32": 1e-4, "bf16": 0.1}


def self_test_scoring(number: int, score: Callable[..., tuple[list[float], int]], vocab_size: int, dtype: str) -> float:
    """Largest |difference| between scores of engine `number` with and without the prefix cache.

    `score(token_ids, first, cached=...)` gives log-probs and how many tokens the cache had. Raises EngineError where they differ by more
    than rounding, or where no cached token was ever used.
    """
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    bound = _GAP[dtype]
    worst, used = 0.0, False
    # A context of whole blocks, and one that ends inside a block; each with a probe, the same again, and another one.
    for first in (_CONTEXT, _CONTEXT + 5):
        context, probe, other = tokens(first), tokens(_PROBE), tokens(_PROBE)
        for ending in (probe, probe, other):
            # Rows that are not computed show freed memory, which must not happen to hold the right values.
            score(tokens(first + _PROBE), first, cached=False)
            found, hits = score(context + ending, first, cached=True)
            plain, _ = score(context + ending, first, cached=False)
            gaps = [abs(left - right) for left, right in zip(found, plain, strict=True)]
            gap = max(gaps) if all(map(math.isfinite, gaps)) else math.inf  # max() would lose a nan
            if not gap <= bound:
                raise EngineError(
                    f"engine {number} scores a probe differently by {gap:.3g} with its prefix cache, more than {bound:g}: "
                    "use reward.scorer=fold with this version of vLLM"
                )
            worst, used = max(worst, gap), used or 0 < hits < first
    if not used:
        raise EngineError(f"engine {number} did not use its prefix cache to score: use reward.scorer=fold with this version of vLLM")
    return worst
