"""Corrections to Megatron-Core 0.16.1, whose torch-Adam path needs them on every device without TransformerEngine and Apex.

1. Loading a distributed optimizer looks for Adam's `step` among the sharded tensors, where it never is (KeyError).
2. After loading, one `step` tensor is shared by all parameters, so torch's Adam counts it up once per parameter: the first
   resumed loss is right and every later one silently wrong.
3. A fresh optimizer has no state to load into (AssertionError); `prime` gives it one.
4. Every checkpoint save starts a spawned Manager process, which costs seconds and re-runs an unguarded `__main__`.
5. A router of experts uses a name that only an import of TransformerEngine defines (NameError).
"""

from __future__ import annotations

import queue
from typing import Any

import torch


def install() -> None:
    """Apply the corrections once per process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.moe import moe_utils

    optimizer = distrib_optimizer.DistributedOptimizer
    if getattr(optimizer, "_igpo_fixed", False):
        return
    set_states, load_state_dict = optimizer._set_main_param_and_optimizer_states, optimizer.load_state_dict

    def set_states_with_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> Any:
        if "step" not in tensors and not distrib_optimizer.HAVE_APEX_OR_TE:
            group, order = self.model_param_group_index_map[model_param]
            main_param = self.optimizer.param_groups[group]["params"][order]
            step = torch.as_tensor(self.optimizer.state[main_param]["step"]).clone()
            tensors = {**tensors, "step": step}
        return set_states(self, model_param, tensors)

    def load_state_dict_with_own_steps(self: Any, state_dict: Any) -> Any:
        result = load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        return result

    optimizer._set_main_param_and_optimizer_states = set_states_with_step
    optimizer.load_state_dict = load_state_dict_with_own_steps
    optimizer._igpo_fixed = True
    # A save is waited for, or written by a thread of this process, so a queue of this process replaces the Manager's.
    filesystem_async._results_queue = queue.Queue()
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def prime(optimizer: Any) -> None:
    """Give a fresh (chained) optimizer zero moments, so that a checkpoint can be loaded into it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter].update(
                        step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter.data), exp_avg_sq=torch.zeros_like(parameter.data)
                    )
