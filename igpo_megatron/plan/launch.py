"""The YAML that launches a planned run: a complete configuration, with the planner's figures beside the settings that they decided."""

from __future__ import annotations

from igpo_megatron.plan.machines import GIB
from igpo_megatron.plan.parts import total_parameters
from igpo_megatron.plan.search import UTILISATION, Plan
from igpo_megatron.plan.types import Estimate, Layout

_OFF_AT_ONE = ("pipeline", "virtual_pipeline", "context", "expert")
"""Sizes that are left out where they are 1, the default."""


def launch_yaml(plan: Plan, one: Estimate, command: str, model_path: str) -> str:
    """A configuration for `one`'s ranks and engines; its first lines name `command` as the one that made it."""
    assert one.engines is not None
    layout, engines, workload = one.layout, one.engines, plan.workload
    per_node, colocated = plan.machine.ranks_per_node, one.placement == "colocated"
    nodes = -(-plan.gpus // per_node)
    if plan.machine.device == "cpu":
        place = f"    kv_cache_mib: {max(64, round(engines.cache_bytes / 2**20))}"
        start = "igpo train THIS_FILE"
    elif nodes == 1:
        own = list(range(layout.ranks, layout.ranks + engines.count * engines.tensor))
        place = "" if colocated else f"    gpu_ids: {own}"
        start = f"examples/train_1node.sh THIS_FILE    (RANKS={layout.ranks})"
    else:
        place = "    ray_address: head:29401              # `igpo launch` puts its own here"
        train = layout.ranks // per_node
        others = "" if train == nodes else f"; NODE_ROLE=train on the first {train}, NODE_ROLE=rollout on the others"
        start = f"NNODES={nodes} NODE_RANK=.. IGPO_HEAD=.. RANKS={per_node} examples/launch.sh THIS_FILE    (on every node{others})"
    place += "\n" if place else ""
    by_turns = " by turns on the same devices" if colocated else ""
    placement = "\nplacement:\n  mode: colocated\n" if colocated else ""
    staleness = f"  max_staleness: {plan.staleness}\n" if plan.staleness else ""
    memory = ", ".join(f"{name} {size / GIB:.1f}" for name, size in one.memory.items() if size >= 0.05 * GIB)
    times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in one.train.items())
    dtype = "bf16" if plan.settings.dtype_bytes == 2 else "fp32"
    drawn = f"{workload.trajectories} trajectories of {workload.turns:.3g} turns"
    turn = f"{workload.turn_tokens:.0f} sampled and {workload.observation_tokens:.0f} read tokens a turn"
    return f"""\
# {plan.model} ({total_parameters(plan.shape) / 1e9:.2f}B) on {plan.gpus} x {plan.machine.name}: {layout.ranks} ranks train \
({layout.describe()}), {engines.count} engines of TP{engines.tensor} roll out{by_turns}.
# Made by:  {command}
# Start by: {start}
#
# Predicted, not run. Machine: {plan.machine.source}. Workload, {workload.source}: {drawn},
# {turn}, tools of {workload.tool_median:.2g} s (median).
#   step {one.step:.1f} s: rollout {engines.seconds:.1f}, {times}
#   fullest rank {one.peak / GIB:.1f} of {plan.machine.memory / GIB:.1f} GiB: {memory}

run:
  name: {plan.model.lower()}-{plan.gpus}gpus
  device: {plan.machine.device}

model:
  path: {model_path}
  dtype: {dtype}
  recompute: {layout.recompute}

parallel:
{chr(10).join(_sizes(layout))}
{placement}
data:
  train: [data/train.parquet]
  eval: [data/dev.parquet]

search:
  backend: retriever
  url: http://127.0.0.1:8000/retrieve

rollout:
  prompts_per_step: {workload.prompts}
  samples_per_prompt: {workload.samples}
  max_turns: {workload.max_turns}
  max_context: {workload.max_context}
{staleness}  engine:
    count: {engines.count}
    tensor: {engines.tensor}                            # {engines.weights / GIB:.1f} GiB of weights on each device
    max_num_seqs: {engines.concurrent}                     # the cache holds {engines.cache_tokens} tokens
    gpu_memory_utilization: {UTILISATION}
{place}
loss:
  name: ppo
  kl_coef: {0.001 if plan.settings.reference else 0.0}

packing:
  row_tokens: {layout.row_tokens}

eval:
  every: 10
  questions: 512
"""


def _sizes(layout: Layout) -> list[str]:
    """Lines of the section `parallel`."""
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "virtual_pipeline": layout.virtual}
    if len(set(layout.stages)) > 1:
        sizes |= {"first_stage_layers": layout.stages[0], "last_stage_layers": layout.stages[-1]}
    sizes |= {"context": layout.context, "expert": layout.expert, "data": layout.data}
    shown = [f"  {name}: {size}" for name, size in sizes.items() if size > 1 or name not in _OFF_AT_ONE]
    return [*shown, "  sequence: true"] if layout.sequence else shown
