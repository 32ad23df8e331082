"""Try every layout, with engines on devices of their own or on those of the ranks, keep what fits, rank by the time of a step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from checkpoint_conversion.architectures import ModelShape
from igpo_megatron.config.schema import Config
from igpo_megatron.plan.layouts import splits, train_layouts
from igpo_megatron.plan.machines import GIB
from igpo_megatron.plan.memory import export_bytes, fullest_stage
from igpo_megatron.plan.parts import count_parts, total_parameters
from igpo_megatron.plan.rollout_time import serve
from igpo_megatron.plan.train_time import pass_time, update_time
from igpo_megatron.plan.types import Engines, Estimate, Layout, Machine, Memory, Misfit, Placement, Row, Settings, Workload
from igpo_megatron.plan.workload import shares_of
from igpo_megatron.policy.settings import stage_layers
from igpo_megatron.types import UserError

HEADROOM = 0.92
"""Share of a device's memory that a plan may fill: the rest is for the allocator's fragments, NCCL's buffers and the CUDA context."""

ASLEEP = 2.5 * 2**30
"""Bytes that a sleeping engine keeps on its device (context, kernels, graphs). Assumed, not measured."""

UTILISATION = 0.85
"""rollout.engine.gpu_memory_utilization of planned runs."""


@dataclass(slots=True)
class Plan:
    """What is planned, and everything that the search found."""

    model: str
    shape: ModelShape
    machine: Machine
    workload: Workload
    settings: Settings
    gpus: int
    staleness: int = 0
    fits: list[Estimate] = field(default_factory=list)
    """By time of a step, the fastest first."""

    misfits: list[Misfit] = field(default_factory=list)
    """One for each cut of the model and each kind of engine that does not fit, the nearest miss."""

    tried: int = 0


def search(plan: Plan, placement: Placement | None = None) -> Plan:
    """Fill in the plan; `placement` None tries both. Raises UserError for a number or a combination that cannot be used."""
    _check(plan, placement)
    shape, machine, workload, gpus, staleness = plan.shape, plan.machine, plan.workload, plan.gpus, plan.staleness
    misses: dict[str, Misfit] = {}
    shared = placement != "disaggregated" and not staleness and machine.device == "cuda"
    for training in [*(splits(gpus, machine.ranks_per_node) if placement != "colocated" else []), *([gpus] if shared else [])]:
        engines = _best_engines(plan, gpus - training or gpus, misses)
        if engines is None:
            continue
        sizes = (workload.max_context, 2 * workload.max_context)
        for layout in train_layouts(shape, training, machine, sizes):
            plan.tried += 1
            found = estimate(plan, layout, engines if training == gpus else None)
            if isinstance(found, Misfit):
                key = _cut(layout)
                if key not in misses or found.peak < misses[key].peak:
                    misses[key] = found
            else:
                plan.fits.append(_with_engines(found, engines, staleness))
    plan.fits.sort(key=lambda one: (one.step, one.peak))
    fitting = {_cut(one.layout) for one in plan.fits}
    plan.misfits = sorted((miss for key, miss in misses.items() if key not in fitting), key=lambda miss: miss.peak)
    return plan


def _cut(layout: Layout) -> str:
    return f"TP{layout.tensor} PP{layout.pipeline} EP{layout.expert}"


def plan_config(config: Config, model: str, shape: ModelShape, machine: Machine, workload: Workload) -> Plan:
    """A plan of the one layout of a configuration: in `fits`, or in `misfits` with the reason.

    `workload` gives the lengths; the configuration gives the number of trajectories and their limits. Raises UserError for stages that
    cannot share the layers, and for engines that are not modelled.
    """
    parallel, engine = config.parallel, config.rollout.engine
    if engine.backend == "torch":
        raise UserError(
            "rollout.engine.backend=torch: its speed, and its memory beside the main rank, are not modelled; set backend=vllm to predict "
            "all else"
        )
    workload = replace(
        workload,
        prompts=config.rollout.prompts_per_step,
        samples=config.rollout.samples_per_prompt,
        max_turns=config.rollout.max_turns,
        max_context=config.rollout.max_context,
    )
    stages = stage_layers(shape.num_layers, parallel.pipeline, parallel.first_stage_layers, parallel.last_stage_layers)
    if stages is None:
        raise UserError(f"parallel.pipeline={parallel.pipeline}: cannot share {shape.num_layers} layers; `igpo train` says what can")
    layout = Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        data=parallel.data or 1,
        recompute=config.model.recompute,
        row_tokens=config.packing.row_tokens,
        stages=tuple(stages),
        sequence=parallel.sequence,
    )
    settings = Settings(
        dtype_bytes=4 if config.model.dtype == "fp32" else 2,
        reference=config.loss.keeps_reference,
        distributed_optimizer=parallel.distributed_optimizer,
        minibatches=config.optim.minibatches,
        head_workspace=config.model.head_workspace_mib * 2**20,
        head_in_forward=config.model.head_backward == "in_forward",
    )
    shared, served = config.placement.mode == "colocated", engine.count * engine.tensor
    plan = Plan(model, shape, machine, workload, settings, layout.ranks + (0 if shared else served), config.rollout.max_staleness, tried=1)
    engines = serve(shape, machine, workload, engine.count, engine.tensor, engine.gpu_memory_utilization, settings.dtype_bytes)
    if isinstance(engines, str):
        plan.misfits.append(Misfit(layout, engines))
        return plan
    found = estimate(plan, layout, engines if shared else None)
    if isinstance(found, Misfit):
        plan.misfits.append(found)
    else:
        plan.fits.append(_with_engines(found, engines, plan.staleness))
    return plan


def estimate(plan: Plan, layout: Layout, colocated: Engines | None = None) -> Estimate | Misfit:
    """Memory and time of scoring and training under one layout; `colocated`: the engines that share its devices."""
    parts = count_parts(plan.shape, layout.tensor, layout.expert)
    multiple = layout.tensor if layout.sequence else 1
    shares = shares_of(plan.workload, layout.row_tokens, layout.data, multiple)
    rows = len(shares[0])
    largest = max(max((row.tokens for row in share), default=1) for share in shares)
    # The longest trajectory that is allowed must fit, not only the longest that was drawn.
    worst = Row(max(largest, plan.workload.max_context), 0.0, max(layout.row_tokens // 2, 1))
    cuda = plan.machine.device == "cuda"
    memory = fullest_stage(plan.shape, parts, layout, plan.settings, worst, rows, cuda=cuda)
    held = {name: memory[name] for name in ("weights", "gradients", "optimizer")}
    if colocated is not None:
        # New weights go from rank to engine while both are on the device; activations and the KV cache are not.
        handing_over: Memory = {
            **held,
            "export": export_bytes(parts, layout, plan.settings),
            "engine's weights": colocated.weights,
            "asleep": ASLEEP,
        }
        memory = max({**memory, "asleep": ASLEEP}, handing_over, key=lambda terms: sum(terms.values()))
    limit = plan.machine.memory * HEADROOM
    peak = sum(memory.values())
    if peak > limit:
        return Misfit(layout, _why(memory, limit, layout), peak)
    updates = plan.settings.minibatches
    forward = pass_time(plan.shape, layout, plan.settings, plan.machine, shares, backward=False)
    times = {
        "score": forward * (2 if plan.settings.reference else 1),
        "train": pass_time(plan.shape, layout, plan.settings, plan.machine, shares, backward=True),
        "update": updates * update_time(parts, layout, plan.settings, plan.machine, -(-rows // updates)),
        "sync": total_parameters(plan.shape) * plan.settings.dtype_bytes / layout.pipeline / plan.machine.network,
    }
    if colocated is not None:
        # Gradients are not kept while the policy is away.
        times["swap"] = 2 * (held["weights"] + held["optimizer"]) / plan.machine.host_link
    return Estimate(layout, None, memory, times, sum(times.values()), "disaggregated" if colocated is None else "colocated")


def _with_engines(found: Estimate, engines: Engines, staleness: int) -> Estimate:
    """A step takes rollout and training in turn; with staleness k up to k rollouts overlap with training: max(T, (R + T) / (k + 1))."""
    training = sum(found.train.values())
    step = max(training, (engines.seconds + training) / (staleness + 1))
    return replace(found, engines=engines, step=step)


def _best_engines(plan: Plan, gpus: int, misses: dict[str, Misfit]) -> Engines | None:
    best: Engines | None = None
    for tensor in (1, 2, 4, 8, 16):
        if tensor > gpus or tensor > plan.machine.ranks_per_node or gpus % tensor or plan.shape.num_heads % tensor:
            continue
        found = serve(plan.shape, plan.machine, plan.workload, gpus // tensor, tensor, UTILISATION, plan.settings.dtype_bytes)
        if isinstance(found, str):
            misses.setdefault(f"engine TP{tensor}", Misfit(Layout(), found))
        elif best is None or found.seconds < best.seconds:
            best = found
    return best


def _why(memory: Memory, limit: float, layout: Layout) -> str:
    name, size = max(memory.items(), key=lambda item: item[1])
    total = sum(memory.values())
    advice = {
        "activations": "recompute more, cut rows, or raise TP" if layout.recompute != "full" else "raise TP or cut packing.row_tokens",
        "optimizer": "use more ranks, so that its state is shared by more",
        "working set": "raise TP, which cuts vocabulary and layers",
        "engine's weights": "give the engines devices of their own",
    }.get(name, "raise TP or PP (of experts: EP), which share the weights")
    others = ", ".join(f"{term} {value / GIB:.1f}" for term, value in sorted(memory.items(), key=lambda item: -item[1])[1:4])
    return f"needs {total / GIB:.1f} GiB of {limit / GIB:.1f}: {name} {size / GIB:.1f} GiB ({others}); {advice}"


def _check(plan: Plan, placement: Placement | None) -> None:
    gpus, machine, workload, staleness = plan.gpus, plan.machine, plan.workload, plan.staleness
    if placement == "colocated" and staleness:
        raise UserError(f"--placement colocated lets ranks and engines take turns, which --staleness {staleness} does not; use 0")
    if placement == "colocated" and machine.device == "cpu":
        raise UserError("--placement colocated: on a CPU there is no device memory to give back; use --placement disaggregated")
    by_turns = machine.device == "cuda" and not staleness and placement != "disaggregated"
    if gpus < (1 if by_turns else 2):
        raise UserError(f"--gpus {gpus}: training and rollouts need a device each; use 2 or more")
    if gpus > machine.ranks_per_node and gpus % machine.ranks_per_node:
        below = gpus // machine.ranks_per_node * machine.ranks_per_node
        raise UserError(
            f"--gpus {gpus}: several machines are used with all {machine.ranks_per_node} devices each; use {below} or "
            f"{below + machine.ranks_per_node}"
        )
    if workload.max_context > plan.shape.max_positions:
        raise UserError(f"--max-context {workload.max_context}: the model has {plan.shape.max_positions} positions; use at most that")
