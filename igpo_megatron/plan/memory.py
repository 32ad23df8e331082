"""Bytes that each rank of a training job holds, term by term, at the fullest moment of a step.

    always:    weights, gradients (fp32), optimizer state, buffers for communication
    one of:    backward with all saved activations  |  optimizer step  |  scoring by the reference  |  export of the weights

What autograd saves of a layer is counted tensor by tensor for Megatron's local layers as `policy/model.py` builds them; a test compares
the count with what a real layer saves. All sizes are of one rank: widths are divided by the tensor-parallel size, tokens of the norms
by it too under sequence parallelism.
"""

from __future__ import annotations

from checkpoint_conversion.architectures import ModelShape
from igpo_megatron.plan.types import Layout, Memory, PartSizes, Row, Settings

CHUNK = 16 * 2**20
"""Bytes of one chunk of logits in the head on a CPU (kernels/torch_chunked.py); two are alive at a time. A GPU has its workspace, and in
16 bits half of that again (kernels/triton_head.py)."""

LIBRARIES = 10 * 2**20
"""Bytes that libraries take on a CPU rank in its first step, for any model: gloo's buffers, primitives, threads, modules. Measured
by tools/bench/plan.py. On a GPU `search.HEADROOM` covers them."""


def layer_activations(shape: ModelShape, layout: Layout, tokens: int, settings: Settings, *, fused_norm: bool) -> float:
    """Bytes that autograd saves of one layer for its backward pass, attention without copies of keys.

    `fused_norm`: norms of queries and keys read the projection's output where it is (CUDA); otherwise the queries are copied (CPU).
    """
    e = settings.dtype_bytes
    tokens = tokens // layout.context
    outer = tokens // layout.tensor if layout.sequence else tokens
    query, key, head_tokens = _widths(shape, layout)
    norm = shape.hidden_size * e + 4
    rotary = 4 * shape.head_dim * e
    # The projection's output (which holds the values), queries and keys after rotation, the output, its log-sum-exp.
    attention = e * ((query + 2 * key) + query + key + query) + 4 * head_tokens
    if shape.qk_norm:
        # A copy of the queries, and a scale per head; the keys are read where they stand beside the values.
        heads = head_tokens + shape.num_kv_heads // min(layout.tensor, shape.num_kv_heads)
        attention += 0 if fused_norm else 4 * heads + e * query
    saved = outer * 2 * (norm + shape.hidden_size * e) + tokens * (rotary + attention)
    return saved + (outer if shape.mixture else tokens) * _mlp(shape, layout, e)


def _mlp(shape: ModelShape, layout: Layout, e: int) -> float:
    """Bytes saved per token that the MLP of this rank is given."""
    if shape.mixture is None:
        # Gate and up projection, silu of the gate, a copy of up, their product.
        return 5 * shape.ffn_size / layout.tensor * e
    mixture = shape.mixture
    # Router: choices, their weights, and maps of all experts. A token visits top_k experts, whichever rank they are on.
    routing = 8 * mixture.top_k * 2 + 4 * mixture.top_k * 2 + 5 * mixture.num_experts
    return routing + mixture.top_k * (e * (shape.hidden_size + 6 * mixture.ffn_size) + 4)


def _widths(shape: ModelShape, layout: Layout) -> tuple[float, float, float]:
    """Width of queries, width of keys, and number of query heads on this rank."""
    return (
        shape.num_heads * shape.head_dim / layout.tensor,
        shape.num_kv_heads * shape.head_dim / layout.tensor,
        shape.num_heads / layout.tensor,
    )


def layer_kept(shape: ModelShape, layout: Layout, tokens: int, settings: Settings, *, fused_norm: bool) -> float:
    """Bytes of a layer that are kept from its forward to its backward pass, with recomputation taken into account."""
    whole = layer_activations(shape, layout, tokens, settings, fused_norm=fused_norm)
    if layout.recompute == "none":
        return whole
    tokens = tokens // layout.context
    if layout.recompute == "selective":
        return whole - tokens * 4 * _widths(shape, layout)[2]  # all that fused attention saves beyond its inputs and output
    outer = tokens // layout.tensor if layout.sequence else tokens
    return outer * shape.hidden_size * settings.dtype_bytes


def in_flight(layout: Layout, stage: int, rows: int) -> float:
    """Rows whose activations a stage holds at once, in units of the whole stage: 1F1B, interleaved where virtual > 1.

    1F1B holds min(rows, p - stage). Interleaved (Megatron's schedule): 2 (p - stage - 1) + (v - 1) p + 1 chunks of v.
    """
    p, v = layout.pipeline, layout.virtual
    if v == 1:
        return min(rows, p - stage)
    return min(rows * v, 2 * (p - stage - 1) + (v - 1) * p + 1) / v


def stage_memory(
    shape: ModelShape, parts: PartSizes, layout: Layout, settings: Settings, row: Row, rows: int, stage: int, *, cuda: bool
) -> Memory:
    """Terms of a rank of `stage` at its fullest moment; `row` is the largest of the `rows` it works through."""
    e = settings.dtype_bytes
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = layout.stages[stage]
    dense, experts = parts.stage(layers, first=first, last=last)
    held = dense + experts
    # Experts are whole on their rank: their copies are the ranks of the stage over the expert-parallel size.
    copies = layout.data * layout.context
    expert_copies = max(1, layout.tensor * copies // layout.expert)
    sharded = settings.distributed_optimizer
    state = (dense / copies + experts / expert_copies) if sharded else float(held)
    always: Memory = {"weights": held * e, "gradients": held * 4.0, "optimizer": state * (8 + (4 if e == 2 else 0))}
    if not cuda:
        always["libraries"] = float(LIBRARIES)
    if settings.reference and not cuda:
        always["reference"] = float(held * e)
    moments = [
        _backward(shape, parts, layout, settings, row, rows, stage, cuda=cuda),
        {"optimizer step": 4.0 * state if cuda else 8.0 * _largest(parts, first, last)},
        {"export": export_bytes(parts, layout, settings, first, last)},
    ]
    if settings.reference:
        forward = layer_activations(shape, layout, row.tokens, settings, fused_norm=cuda) / 2
        moments.append({"policy's copy": float(held * e), "activations": forward})
    fullest = max(moments, key=lambda terms: sum(terms.values()))
    return {**always, **fullest}


def _backward(
    shape: ModelShape, parts: PartSizes, layout: Layout, settings: Settings, row: Row, rows: int, stage: int, *, cuda: bool
) -> Memory:
    """Activations of the rows in flight, and the head's or a layer's working set beside them."""
    e = settings.dtype_bytes
    first, last = stage == 0, stage == layout.pipeline - 1
    tokens = row.tokens / layout.context
    outer = tokens / layout.tensor if layout.sequence else tokens
    kept = layer_kept(shape, layout, row.tokens, settings, fused_norm=cuda)
    branches = 0.0
    if not cuda:
        query, key, _ = _widths(shape, layout)
        # Branches read copies of the keys they share, and their outputs are put together in one more tensor.
        branches = e * (2 * key * row.gathered + (query * row.tokens if row.gathered else 0))
        if layout.recompute == "none":
            kept += branches
    held = in_flight(layout, stage, rows) * layout.stages[stage] * kept + 4.0 * row.masked * min(rows, 16)
    hidden = outer * shape.hidden_size * e
    ffn = shape.ffn_size / layout.tensor if shape.mixture is None else shape.mixture.ffn_size * shape.mixture.top_k / layout.tensor
    # In backward a layer's gradients: of the residual stream twice, of the MLP's two inner tensors, and a weight's before it is added.
    work = 2 * hidden + 2 * tokens * ffn * e + 4.0 * parts.largest
    if layout.recompute == "full":
        work += layer_activations(shape, layout, row.tokens, settings, fused_norm=cuda) + branches
    head = always_head = 0.0
    if last:
        targets = row.targets / layout.context
        held += outer * shape.hidden_size * (e if cuda else 8) + targets * shape.hidden_size * e  # the last norm, and the chosen rows
        gradient = parts.head * (4.0 + (e if e == 2 else 0))
        copies = (1.5 if e == 2 else 1.0) if cuda else 2.0
        logits = copies * min(head_workspace(settings, cuda=cuda), 4.0 * targets * parts.head / shape.hidden_size)
        head = logits + 2 * targets * shape.hidden_size * e + hidden + gradient
        if parts.tied and first:
            always_head = gradient  # waits for the embedding's, to which it is added
    return {"activations": held, "working set": max(head, work + always_head)}


def head_workspace(settings: Settings, *, cuda: bool) -> int:
    """Bytes of logits that the head holds at a time, at most."""
    return settings.head_workspace if cuda else min(CHUNK, settings.head_workspace)


def export_bytes(parts: PartSizes, layout: Layout, settings: Settings, first: bool = True, last: bool = True) -> float:
    """Bytes of the buffers in which a rank gathers and converts the largest tensor of a stage for the engines; by default of all stages."""
    return 2.0 * settings.dtype_bytes * layout.tensor * _largest(parts, first, last)


def _largest(parts: PartSizes, first: bool, last: bool) -> int:
    """Elements of the largest tensor of a stage."""
    return max(parts.largest, parts.embedding if first else 0, parts.head if last else 0)


def fullest_stage(shape: ModelShape, parts: PartSizes, layout: Layout, settings: Settings, row: Row, rows: int, *, cuda: bool) -> Memory:
    """Terms of the rank that holds most."""
    return max(
        (stage_memory(shape, parts, layout, settings, row, rows, stage, cuda=cuda) for stage in range(layout.pipeline)),
        key=lambda terms: sum(terms.values()),
    )
