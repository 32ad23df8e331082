"""The experts that an engine sent tokens to: requested once per token, and kept on the nodes of the tree.

vLLM returns them for every computed token, from the requested position up to the last sampled token but one (the last one is computed
by the request that continues it, if any). Tokens found in its prefix cache are included: it keeps the experts of a cached block with the
block, so they are those of the request that computed the keys and values now attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from igpo_megatron.types import Completion, RolloutGroup, UserError


def routed_experts(rows: Any, expected: int) -> list[bytes]:
    """vLLM's answer, an array [tokens, layers, top_k] of 1 or 2 bytes each, as `Node.experts`; empty if there are none (an abort).

    Raises UserError unless it has as many tokens as expected: experts of other positions must not be used.
    """
    if rows is None:
        return []
    if len(rows) != expected:
        raise UserError(f"vLLM returned the experts of {len(rows)} tokens instead of {expected}; set rollout.routing_replay=false")
    return [row.tobytes() for row in rows]


def first_unrouted(group: RolloutGroup, index: int) -> int:
    """Position in the context of node `index` of the first token whose experts are unknown; the context's length if all are known."""
    position = 0
    for number in group.path_to(index):
        node = group.nodes[number]
        known = node.experts.index(None) if None in node.experts else len(node.experts)
        position += known
        if known < len(node.token_ids):
            break
    return position


def record_experts(group: RolloutGroup, index: int, completion: Completion) -> None:
    """Store the completion's experts on the nodes from the root to node `index`.

    Tokens that have experts keep them. Only samples that computed a shared prompt at the same moment can disagree, at a near tie.
    """
    start = 0
    for number in group.path_to(index):
        node = group.nodes[number]
        stop = start + len(node.token_ids)
        found = _between(completion, start, stop)
        if any(experts is not None for experts in found):
            node.experts = [old or new for old, new in zip(node.experts or [None] * len(found), found, strict=True)]
        start = stop


def _between(completion: Completion, start: int, stop: int) -> list[bytes | None]:
    """The completion's experts of positions [start, stop); None for positions without."""
    places: Sequence[int] = range(start - completion.experts_from, stop - completion.experts_from)
    return [completion.experts[place] if 0 <= place < len(completion.experts) else None for place in places]
