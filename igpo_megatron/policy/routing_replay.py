"""Send tokens to experts that were chosen elsewhere: routing replay.

Engine and trainer compute a router's logits in different orders, so near ties go to different experts, and a token's log-prob jumps.
With the choice given, Megatron's router still computes the weights (and gets their gradient); only which experts get them is fixed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from igpo_megatron.policy.model import PolicyModel


class GivenExperts:
    """Megatron's router asks this for its choice, in place of its own RouterReplay, which keeps one global list for all rows."""

    def __init__(self) -> None:
        self.experts: torch.Tensor | None = None
        """[tokens of this rank, top_k] for the next forward pass, negative where the router chooses; None leaves it all choices."""

        self.recomputes = False
        """Whether the layer is computed again in its backward pass, when a pipeline has already moved on to other rows."""

        # Rows go backward in the order in which they went forward, at every stage and in every chunk of a virtual pipeline.
        self.waiting: deque[torch.Tensor | None] = deque()

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores of the chosen experts, the experts), as Megatron's own choice returns them."""
        experts = self._of_this_pass()
        own_scores, own = choose(scores, topk, num_groups, group_topk)
        if experts is None:
            return own_scores, own
        expected = (len(scores), topk)
        assert tuple(experts.shape) == expected, f"experts {list(experts.shape)} for {expected[0]} tokens, {topk} each"
        chosen = torch.where(experts >= 0, experts.long(), own)
        return scores.gather(1, chosen), chosen

    def _of_this_pass(self) -> torch.Tensor | None:
        if not self.recomputes:
            return self.experts
        # A recomputed layer runs without gradients at first, and with them when it is computed again.
        if torch.is_grad_enabled():
            return self.waiting.popleft()
        self.waiting.append(self.experts)
        return self.experts


def replay(chunk: PolicyModel, experts: torch.Tensor | None) -> None:
    """Fix the choice of every router of a chunk for its next forward pass; None leaves it to the routers.

    experts: [T, layers of the whole model, top_k] of any integer type; negative where the router shall choose.
    """
    if chunk.config.num_moe_experts is None:
        return
    if experts is not None and chunk.config.sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        experts = experts.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
    recomputes = chunk.training and chunk.config.recompute_granularity == "full"
    for layer in chunk.decoder.layers:
        router = layer.mlp.router
        # Needed even if the router chooses: a row without experts has its place in the order of those that are computed again.
        if not isinstance(router.router_replay, GivenExperts):
            router.router_replay = GivenExperts()
        given = router.router_replay
        if given.recomputes != recomputes:
            given.recomputes = recomputes
            given.waiting.clear()
        given.experts = None if experts is None else experts[:, layer.layer_number - 1]
