"""Parameters that a rank of any job holds, counted in the real model on the meta device: without memory and other ranks.

    with_rank(world, rank) ──> build_model on "meta" ──> named parameters

torch's fake process group answers for the other ranks. It is in a private module of torch, so only this file uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from checkpoint_conversion.architectures import ModelShape
from igpo_megatron.config.load import build
from igpo_megatron.policy.settings import Parallel


def rank_parameters(shape: ModelShape, parallel: Parallel, world: int, rank: int = 0, dtype: str = "bf16") -> list[tuple[str, int]]:
    """(name within the rank's part, number of elements) of every parameter that `rank` of `world` holds."""
    from igpo_megatron.policy import cpu, megatron_fixes

    cpu.install()
    megatron_fixes.install()
    from igpo_megatron.policy.model import build_model

    config = build({"model": {"path": ".", "dtype": dtype}, "run": {"device": "cpu"}, "parallel": parallel.model_dump()})
    with _pretended(parallel, world, rank), torch.device("meta"):
        chunks = build_model(shape, config, torch.device("meta"))
        return [(name, parameter.numel()) for chunk in chunks for name, parameter in chunk.named_parameters()]


@contextmanager
def _pretended(parallel: Parallel, world: int, rank: int) -> Iterator[None]:
    """Megatron's groups as `rank` of `world` would have them, without the others."""
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process is a rank of a real job"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
