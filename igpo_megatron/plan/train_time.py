"""Seconds of scoring and training a step's rows, from FLOPs, bytes moved and the pipeline's shape.

A stage's time per row is the sum of its matmuls, attention, elementwise traffic, collectives inside the tensor-parallel group and the
fixed cost of each operation; what a rank computes itself is multiplied by the machine's factor, where passes were timed (plan/timed.py).
A pipeline of p stages in v chunks each takes (rows + (p - 1) / v) times its slowest stage. Where ranks share cores, the step takes no
less than all ranks' work over the cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from checkpoint_conversion.architectures import ModelShape
from igpo_megatron.plan.flops import head_flops, layer_flops, linear_widths
from igpo_megatron.plan.memory import head_workspace, layer_activations
from igpo_megatron.plan.types import Layout, Machine, PartSizes, Row, Settings

FORWARD_OPS, BACKWARD_OPS = 110, 190
"""Operations of one layer, counted in a profile of Megatron's local layers."""

ROW_OPS = 150
"""Operations around the layers: embedding, head, loss, schedule."""

FORWARD_TRAFFIC, BACKWARD_TRAFFIC = 2.5, 6.0
"""Bytes that elementwise operations move for each byte a layer saves: most are written once and read twice; backward also reads and
writes as many gradients, and frees memory that the next row must be given again."""

HEAD_FORWARD, HEAD_BACKWARD = 10, 18
"""Bytes moved per byte of logits; an exponential counts as several passes."""

GRADIENT_TRAFFIC = 24
"""Bytes moved per parameter and row: a gradient is cleared, written, read and added to its fp32 sum."""

ADAM_TRAFFIC = 80
"""Bytes moved per parameter by the norm, the clip and Adam without fusion."""


def row_time(shape: ModelShape, layout: Layout, settings: Settings, machine: Machine, row: Row, stage: int, *, backward: bool) -> float:
    """Seconds of the forward pass (and backward, with its recomputation) of one row on one stage, collectives included."""
    layers = layout.stages[stage]
    tokens, tensor = row.tokens / layout.context, layout.tensor
    # Experts share a row's tokens, so each call is smaller than their sum.
    visits, calls = (shape.mixture.top_k, max(1, shape.mixture.num_experts // layout.expert)) if shape.mixture else (1, 1)
    in_attention, in_mlp = linear_widths(shape)
    matmul = 0.0
    for inner, outer, copies, parts in [*((*widths, 1, 1) for widths in in_attention), *((*widths, visits, calls) for widths in in_mlp)]:
        flops = 2.0 * tokens * inner * outer / tensor * copies
        matmul += flops / machine.matmul_rate(flops / parts)
    attention = 4.0 * shape.num_heads * shape.head_dim / tensor / layout.context * row.pairs / machine.attention
    saved = layer_activations(shape, layout, row.tokens, settings, fused_norm=machine.device == "cuda")
    forward = matmul + attention + FORWARD_TRAFFIC * saved / machine.stream + FORWARD_OPS * machine.call
    own = layers * forward
    if backward:
        again = {"none": 0.0, "selective": attention, "full": forward}[layout.recompute]
        per_layer = 2 * matmul + 2.5 * attention + BACKWARD_TRAFFIC * saved / machine.stream + BACKWARD_OPS * machine.call
        own += layers * (per_layer + again)
    if stage == layout.pipeline - 1:
        own += _head_time(shape, layout, settings, machine, row, backward=backward)
    own += ROW_OPS * machine.call * (2.5 if backward else 1) * layout.virtual
    crowd = machine.crowd if layout.ranks > 1 else 1.0
    # A factor that was fitted to other shapes must not promise more than the fastest matmul.
    least = layers * layer_flops(shape, row, backward=backward)
    if stage == layout.pipeline - 1:
        least += head_flops(shape, row, backward=backward)
    factor = machine.train_factor if backward else machine.score_factor
    own = max(own * factor, least / tensor / layout.context / machine.ceiling)
    return own * crowd + layers * _collectives(shape, layout, settings, machine, tokens, backward=backward)


def _head_time(shape: ModelShape, layout: Layout, settings: Settings, machine: Machine, row: Row, *, backward: bool) -> float:
    """Seconds of the log-probs of a row's targets, and of their gradients."""
    vocabulary, targets = shape.vocab_size / layout.tensor, row.targets / layout.context
    flops = 2.0 * targets * shape.hidden_size * vocabulary
    logits = 4.0 * row.targets * vocabulary  # bytes of all, which pass through memory in chunks
    if not backward:
        return flops / machine.matmul_rate(flops) + HEAD_FORWARD * logits / machine.stream
    moved = (HEAD_FORWARD + HEAD_BACKWARD) * logits
    matmuls = 4  # the logits twice, and both gradients
    if settings.head_in_forward:
        matmuls = 3
        # Each block of rows reads and writes the weight's whole gradient in fp32 (kernels/token_loss.py).
        blocks = ceil(logits / layout.context / head_workspace(settings, cuda=machine.device == "cuda"))
        moved += 8.0 * blocks * vocabulary * shape.hidden_size
    return matmuls * flops / machine.matmul_rate(flops) + moved / machine.stream


def _collectives(shape: ModelShape, layout: Layout, settings: Settings, machine: Machine, tokens: float, *, backward: bool) -> float:
    """Seconds of a layer's collectives: two all-reduces (or their two halves) each way, and the exchange of tokens for experts."""
    seconds = 0.0
    size = tokens * shape.hidden_size * settings.dtype_bytes
    again = 1 if layout.recompute == "full" else 0
    if layout.tensor > 1:
        volume = 2 * (layout.tensor - 1) / layout.tensor * size
        calls = 2 * (1 + again) + (2 if backward else 0)
        seconds += calls * (volume / machine.link + machine.link_latency * (2 if layout.sequence else 1))
        if layout.sequence and backward:
            seconds += 2 * (volume / 2 / machine.link + machine.link_latency)  # inputs gathered again for the weights' gradients
    if shape.mixture and layout.expert > 1:
        rate, latency = _reach(machine, layout.expert * layout.pipeline)
        volume = size / layout.tensor * shape.mixture.top_k * (layout.expert - 1) / layout.expert
        seconds += 2 * (1 + again + backward) * (volume / rate + latency)
    if layout.context > 1:
        rate, latency = _reach(machine, layout.tensor * layout.context)
        keys = 2.0 * tokens * shape.num_kv_heads * shape.head_dim / layout.tensor * settings.dtype_bytes * (layout.context - 1)
        seconds += (1 + again + 2 * backward) * (keys / rate + latency)
    return seconds


def _reach(machine: Machine, ranks: int) -> tuple[float, float]:
    """(bytes/s, latency) among `ranks` neighbours: within a machine, or across where they do not fit on one."""
    if ranks <= machine.ranks_per_node:
        return machine.link, machine.link_latency
    return machine.network, machine.network_latency


def pass_time(
    shape: ModelShape, layout: Layout, settings: Settings, machine: Machine, shares: Sequence[Sequence[Row]], *, backward: bool
) -> float:
    """Seconds of one pass over the rows; `shares` are the rows of each data-parallel rank."""
    slowest, work = 0.0, 0.0
    rate, latency = _reach(machine, layout.ranks)
    # Stages with as many layers take the same time, unless they hold the head.
    kinds = {(layers, stage == layout.pipeline - 1): stage for stage, layers in enumerate(layout.stages)}
    # Where every rank has a device of its own, the data-parallel rank with most tokens decides.
    busy = shares if machine.cores else [max(shares, key=lambda rows: sum(row.tokens for row in rows))]
    for rows in busy:
        times = {
            kind: [row_time(shape, layout, settings, machine, row, stage, backward=backward) for row in rows]
            for kind, stage in kinds.items()
        }
        busiest = max(map(sum, times.values()))
        longest = max(max(of_kind, default=0.0) for of_kind in times.values())
        hand_over = 0.0
        if layout.pipeline > 1:
            mean = sum(row.tokens for row in rows) / max(1, len(rows))
            size = mean * shape.hidden_size * settings.dtype_bytes / (layout.tensor if layout.sequence else 1) / layout.context
            hand_over = (2 if backward else 1) * layout.virtual * (len(rows) + layout.pipeline - 1) * (size / rate + latency)
        bubble = (layout.pipeline - 1) / layout.virtual * longest
        slowest = max(slowest, busiest + bubble + hand_over)
        for stage, layers in enumerate(layout.stages):
            # A rank that waits in a collective of gloo keeps its core busy.
            work += layout.tensor * layout.context * sum(times[layers, stage == layout.pipeline - 1])
    return slowest if machine.cores is None else max(slowest, work / machine.cores)


def update_time(parts: PartSizes, layout: Layout, settings: Settings, machine: Machine, rows: int) -> float:
    """Seconds of reducing gradients, the optimizer and gathering weights, on the stage that holds most."""
    copies = layout.data * layout.context
    seconds = 0.0
    for stage in range(layout.pipeline):
        dense, experts = parts.stage(layout.stages[stage], first=stage == 0, last=stage == layout.pipeline - 1)
        held = dense + experts
        expert_copies = max(1, layout.tensor * copies // layout.expert)
        shard = dense / copies + experts / expert_copies if settings.distributed_optimizer else held
        # Each row adds its gradients to the fp32 sums; zeroing them comes once.
        local = (held * (4 + GRADIENT_TRAFFIC * rows) + shard * ADAM_TRAFFIC) / machine.stream
        crowd = 1.0 if machine.cores is None or layout.ranks == 1 else machine.crowd * max(1.0, layout.ranks / machine.cores)
        exchange = 0.0
        if copies > 1:
            rate, latency = _reach(machine, layout.ranks)
            volume = (copies - 1) / copies * held * (4 + settings.dtype_bytes)
            exchange = volume / rate + 2 * latency
        seconds = max(seconds, local * machine.train_factor * crowd + exchange)
    return seconds
