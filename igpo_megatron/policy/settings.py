"""Settings of the policy: model, layout, optimizer and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.settings import Section


class Model(Section):
    """The policy."""

    path: Path
    """Hugging Face folder with config.json, safetensors and tokenizer."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Parameter and activation type; gradients are accumulated and reduced in fp32."""

    backend: Literal["auto", "local", "te"] = "auto"
    """Layer implementation: Megatron's local layers, or TransformerEngine; `auto` takes te on CUDA when importable."""

    head: Literal["auto", "torch", "triton"] = "auto"
    """What turns hidden states into log-probs; `auto` takes the Triton kernels on CUDA where triton is importable."""

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
    """A collective that waits longer than this ends the job."""


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


class Checkpoint(Section):
    """Saving."""

    every: NonNegativeInt = 10
    """Steps between checkpoints; 0 saves only at the end."""

    keep: PositiveInt = 2
    """Newest checkpoints kept."""

    in_background: bool = False
    """Training goes on from a copy of the state in host memory while it is written; the folder counts once all of it is."""
