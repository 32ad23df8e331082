"""Send tokens to experts that were chosen elsewhere: routing replay.

Engine and trainer compute a router's logits in different orders, so near ties go to different experts, and a token's log-prob jumps.
With the choice given, Megatron's router still computes the weights (and gets their gradient); only which experts get them is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from igpo_megatron.actor.model import PolicyModel


class GivenExperts:
    """What Megatron's router asks for its choice, in place of its own RouterReplay, which keeps one global list for all rows."""

    def __init__(self, experts: torch.Tensor) -> None:
        self.experts = experts
        """[tokens of this rank, top_k] int64"""

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores of the chosen experts, the experts), as Megatron's own choice returns them."""
        expected = (len(scores), topk)
        assert tuple(self.experts.shape) == expected, f"experts {list(self.experts.shape)} for {expected[0]} tokens, {topk} each"
        return scores.gather(1, self.experts), self.experts


def replay(chunk: PolicyModel, experts: torch.Tensor | None) -> None:
    """Fix the choice of every router of a chunk for its next forward pass; None leaves it to the routers.

    experts: [T, layers of the whole model, top_k] int64.
    """
    if chunk.config.num_moe_experts is None:
        return
    pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
    # A recomputed layer asks again during its backward pass, when a pipeline has gone on to other rows.
    assert experts is None or not pipelined or chunk.config.recompute_granularity != "full", "replay with recompute=full needs pipeline=1"
    if experts is not None and chunk.config.sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        experts = experts.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
    for layer in chunk.decoder.layers:
        layer.mlp.router.router_replay = None if experts is None else GivenExperts(experts[:, layer.layer_number - 1])
