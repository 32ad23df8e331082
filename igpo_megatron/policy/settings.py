"""Settings of the policy: model, layout, optimizer and checkpoints, and which layouts a model can have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.settings import Section


class Model(Section):
    """The policy's model."""

    path: Path
    """Hugging Face folder with config.json, safetensors and tokenizer."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Parameter and activation type; master weights are fp32, and gradients are accumulated and reduced in fp32. `auto`: bf16 on CUDA, and
    on CPU where the processor has AMX or AVX512-BF16, else fp32; a run that is resumed keeps the one it began with."""

    backend: Literal["auto", "local", "te"] = "auto"
    """Layer implementation: Megatron's local layers, or TransformerEngine; `auto` takes te on CUDA when importable."""

    head: Literal["auto", "torch", "triton"] = "auto"
    """Implementation that turns hidden states into log-probs; `auto` takes the Triton kernels on CUDA where triton is importable."""

    head_form: Literal["auto", "fused", "tma", "chunks", "specialised"] = "auto"
    """How the Triton forward runs: one kernel with plain loads (fused), with Hopper's TMA (tma), or also with warps specialised in loading;
    or cuBLAS chunks. `auto` looks the sizes up in kernels/head_forms.json."""

    head_workspace_mib: PositiveInt = 128
    """Logits (fp32) that the head holds at a time, at most; wider chunks rewrite the hidden states' gradient less often. On CPU never more
    than 16, which caches hold."""

    head_backward: Literal["recompute", "in_forward"] = "recompute"
    """How the head's gradients are formed: in the backward pass, which computes logits again (4 matmuls in all), or in forward (3).
    `in_forward` is for losses on tokens; on a GPU it wants a head_workspace_mib that holds about 1,000 rows of logits, each
    4 bytes x vocabulary / parallel.tensor."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: core attention only (selective) or every layer (full)."""

    vocab_multiple: PositiveInt = 128
    """Vocabulary rows are padded to a multiple of this, so that every tensor-parallel degree up to it can share them."""

    def shape(self) -> dict[str, Any]:
        """config.json of the model; empty where it cannot be read, which `problems` reports."""
        try:
            values = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

    def problems(self) -> Iterator[str]:
        folder = self.path
        if not folder.is_dir():
            yield f"model.path={folder}: no such folder; expected a Hugging Face model folder (config.json, *.safetensors, tokenizer)"
            return
        if not (folder / "config.json").is_file():
            yield f"model.path={folder}: no config.json in it; expected a Hugging Face model folder"
        elif not self.shape():
            yield f"model.path={folder}: config.json is not a JSON object; fetch the model again"
        if not any(folder.glob("*.safetensors")):
            yield f"model.path={folder}: no *.safetensors in it; older checkpoints in other formats must be saved as safetensors first"
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            yield f"model.path={folder}: no tokenizer.json or tokenizer_config.json in it; put the model's tokenizer files there"


class Parallel(Section):
    """How the policy is spread over ranks: world size = tensor x context x pipeline x data; experts share a stage's ranks."""

    tensor: PositiveInt = 1
    """Tensor-parallel degree."""

    pipeline: PositiveInt = 1
    """Pipeline-parallel degree (1F1B)."""

    virtual_pipeline: PositiveInt = 1
    """Parts of the model on each pipeline stage, run interleaved: smaller bubbles, more transfers. Needs pipeline of 2 or more."""

    first_stage_layers: PositiveInt | None = None
    """Layers on the first pipeline stage, which also holds the embedding; null shares the layers evenly."""

    last_stage_layers: PositiveInt | None = None
    """Layers on the last pipeline stage, which also holds the output layer; null shares the layers evenly."""

    context: PositiveInt = 1
    """Context-parallel degree: ranks share each row's tokens, for trajectories whose activations do not fit one rank."""

    expert: PositiveInt = 1
    """Expert-parallel degree: each rank holds 1/expert of every layer's experts, whole. A multiple of parallel.tensor."""

    data: PositiveInt | None = None
    """Data-parallel degree; null takes what the world size leaves (as few as parallel.expert allows when `igpo train` starts the ranks)."""

    sequence: bool = False
    """Sequence parallelism inside the tensor-parallel group."""

    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""

    timeout_s: PositiveFloat = 1800
    """The job ends when rollouts take longer than this, or half a minute later when a collective does."""

    def problems(self) -> Iterator[str]:
        if self.sequence and self.tensor == 1:
            yield "parallel.sequence=true needs parallel.tensor of 2 or more; set it to false"
        first, last, chunks = self.first_stage_layers, self.last_stage_layers, self.virtual_pipeline
        if self.pipeline == 1 and (first is not None or last is not None or chunks > 1):
            yield (
                f"parallel.pipeline=1 leaves nothing to split, but parallel.virtual_pipeline={chunks}, first_stage_layers={first}, "
                f"last_stage_layers={last}; raise parallel.pipeline, or leave the others at their defaults"
            )


class Optim(Section):
    """Optimizer (Adam with decoupled weight decay) and schedule."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""

    min_lr: NonNegativeFloat = 0.0
    """Learning rate of the last optimizer step, where `decay` is not constant."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's moment decay rates."""

    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, of matrices only: norms and biases do not decay."""

    clip_grad: NonNegativeFloat = 1.0
    """Global gradient-norm clip; 0 turns it off."""

    warmup_steps: NonNegativeInt = 0
    """Training steps of linear warm-up, each of `minibatches` optimizer steps; the last of them has the peak rate."""

    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay from `lr` to `min_lr`."""

    decay_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps after which the decay begins."""

    minibatches: PositiveInt = 1
    """Optimizer steps per training step, each on as many of its questions as the others, give or take one; the order is shuffled."""

    max_skipped: PositiveInt = 3
    """This many steps in a row skipped for a non-finite loss or gradient stop the run."""

    def problems(self) -> Iterator[str]:
        if self.min_lr > self.lr:
            yield f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}"
        if not all(0 <= beta < 1 for beta in self.betas):
            yield f"optim.betas={list(self.betas)}: expected two numbers from 0 up to, not including, 1"


class Checkpoint(Section):
    """When and how checkpoints are saved."""

    every: NonNegativeInt = 10
    """Steps between checkpoints; 0 saves only at the end. A run with `loss.held_out` also saves after each new best measurement."""

    keep: PositiveInt = 2
    """Newest checkpoints kept, beside the best one of a run with `loss.held_out`."""

    in_background: bool = False
    """Write a copy of the state in host memory while training goes on; incomplete folders are ignored."""


def layout_problems(model: Model, layout: Parallel, world_size: int) -> Iterator[str]:
    """Why `world_size` ranks cannot share the model as `layout` says."""
    model_ranks = layout.tensor * layout.context * layout.pipeline
    shared = f" x parallel.context={layout.context}" if layout.context > 1 else ""
    product = f"parallel.tensor={layout.tensor}{shared} x parallel.pipeline={layout.pipeline}"
    if model.vocab_multiple % layout.tensor:
        yield (
            f"model.vocab_multiple={model.vocab_multiple} is no multiple of parallel.tensor={layout.tensor}, "
            f"so the vocabulary cannot be shared evenly; use {model.vocab_multiple * layout.tensor}"
        )
    if world_size % model_ranks:
        yield f"{world_size} ranks are no multiple of {product} = {model_ranks}; start a multiple of it, or change the layout"
    elif layout.data is not None and model_ranks * layout.data != world_size:
        yield (
            f"{product} x parallel.data={layout.data} = {model_ranks * layout.data} ranks, but {world_size} were started; "
            f"set parallel.data to {world_size // model_ranks} or null"
        )
    shape = model.shape()
    heads, layers, experts = shape.get("num_attention_heads"), shape.get("num_hidden_layers"), num_experts(shape)
    for count, name in ((heads, "attention heads"), (shape.get("num_key_value_heads") or heads, "key-value heads")):
        if isinstance(count, int) and count % layout.tensor:
            yield f"parallel.tensor={layout.tensor} does not divide the model's {count} {name}; use one of {divisors(count)}"
            break
    if isinstance(layers, int) and layout.pipeline > 1:
        yield from _stages(layout, layers)
    if experts is not None:
        yield from _experts(layout, experts, world_size)
    elif layout.expert > 1 and shape:
        yield f"parallel.expert={layout.expert}, but the model has no experts; set it to 1"


def _stages(layout: Parallel, layers: int) -> Iterator[str]:
    first, last, chunks = layout.first_stage_layers, layout.last_stage_layers, layout.virtual_pipeline
    stages = stage_layers(layers, layout.pipeline, first, last)
    if stages is None and first is None and last is None:
        yield (
            f"parallel.pipeline={layout.pipeline} does not divide the model's {layers} layers; use one of {divisors(layers)}, "
            "or set parallel.first_stage_layers and parallel.last_stage_layers"
        )
    elif stages is None:
        yield (
            f"parallel.first_stage_layers={first} and last_stage_layers={last} leave layers of the model's {layers} that its other "
            f"pipeline stages (parallel.pipeline={layout.pipeline}) cannot share evenly, at least one each; change one of them"
        )
    elif any(number % chunks for number in stages):
        yield f"parallel.virtual_pipeline={chunks} does not divide every pipeline stage's layers, {stages}; use a common divisor of them"


def _experts(layout: Parallel, experts: int, world_size: int) -> Iterator[str]:
    if experts % layout.expert:
        yield f"parallel.expert={layout.expert} does not divide the model's {experts} experts; use one of {divisors(experts)}"
    if layout.tensor > 1 and not layout.sequence:
        yield f"parallel.tensor={layout.tensor} with experts needs sequence parallelism; set parallel.sequence=true"
    if layout.expert % layout.tensor:
        yield (
            f"parallel.expert={layout.expert} is no multiple of parallel.tensor={layout.tensor}, but experts are spread over "
            f"tensor-parallel ranks first; use {layout.tensor * max(1, layout.expert // layout.tensor)}"
        )
    elif (world_size // layout.pipeline) % layout.expert:
        yield (
            f"parallel.expert={layout.expert} does not divide the {world_size // layout.pipeline} ranks of a pipeline stage; "
            f"set parallel.data to a multiple of {layout.expert // math.gcd(layout.expert, layout.tensor * layout.context)}"
        )


def stage_layers(layers: int, pipeline: int, first: int | None, last: int | None) -> list[int] | None:
    """Layers of each pipeline stage; None where they cannot be shared: `stage_layers(8, 3, 2, None) == [2, 3, 3]`."""
    if pipeline == 1:
        return [layers]
    given = [number for number in (first, last) if number is not None]
    others, left = pipeline - len(given), layers - sum(given)
    if left < others or (left % others if others else left):
        return None
    ends = [number if number is not None else left // others for number in (first, last)]
    return [ends[0], *[left // others if others else 0] * (pipeline - 2), ends[1]]


def divisors(number: int) -> list[int]:
    """`divisors(12) == [1, 2, 3, 4, 6, 12]`"""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def num_experts(shape: dict[str, Any]) -> int | None:
    """Experts of a layer, by the model's config.json; None in a dense model."""
    # transformers writes either key, whatever the family.
    experts = shape.get("num_experts") or shape.get("num_local_experts")
    return experts if isinstance(experts, int) else None
