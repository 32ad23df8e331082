"""Settings of what carries a run: its folder, the policy and its layout, data, optimizer, checkpoints, evaluation, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.config.schema.section import Section


class Run(Section):
    """Where a run lives and how long it goes on."""

    name: str = "run"
    """Name of the run; its folder is `<folder>/<name>`."""

    folder: Path = Path("runs")
    """Parent of all run folders."""

    seed: NonNegativeInt = 0
    """Seed of question order, sampling and initial state."""

    steps: PositiveInt = 100
    """Training steps."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA when torch sees a GPU. `cpu` also works on a machine that has GPUs."""

    threads: PositiveInt = 1
    """CPU threads of each rank; 1 is safest when ranks and engines share cores."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest complete checkpoint of this run; `never` refuses a folder that already holds a run."""

    replay: Path | None = None
    """Train from this rollout file (parquet) without engines: RL on recorded rollouts, or supervised on demonstrations."""

    stop_after: Literal["none", "rollout"] = "none"
    """`rollout` writes the rollouts of each step and trains nothing: the other half of `replay`."""


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


class Data(Section):
    """Questions."""

    train: tuple[Path, ...] = ()
    """Parquet files of training questions, in the layout of IGPO, ARPO or Search-R1."""

    eval: tuple[Path, ...] = ()
    """Parquet files of held-out questions."""

    layout: Literal["auto", "igpo", "arpo", "search_r1"] = "auto"
    """Layout of all these files. `auto` tells each file's by what it certainly is, and refuses a file that two layouts read differently."""

    shuffle: bool = True
    """Shuffle each epoch with `run.seed`; the order depends on seed and epoch only."""

    balance: Literal["none", "source"] = "none"
    """`source` draws every source equally often instead of in proportion to its rows."""


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


class Packing(Section):
    """Rows of the packed batch."""

    row_tokens: PositiveInt = 8192
    """Token budget of a row; a tree longer than this is cut by repeating the path to the cut."""


class Sync(Section):
    """Weight transfer to the engines."""

    canary_tokens: PositiveInt = 64
    """Fixed tokens scored by policy and engine after every sync."""

    max_gap: PositiveFloat = 0.15
    """Largest |log-prob difference| allowed on the canary; a larger one stops the run. fp32 on both sides: about 1e-5."""

    transport: Literal["auto", "shared_memory", "object_store", "nccl", "ipc"] = "auto"
    """How weights travel. `shared_memory`: a file that engines on this machine map. `object_store`: Ray's, over TCP, to any machine.
    `auto`: the first for engines on the main rank's machine, the second for others. CUDA only: `nccl`, a broadcast from the main rank's
    GPU, and `ipc`, for the one engine that shares the GPU of the only rank."""

    bucket_mib: PositiveInt = 256
    """Tensors are sent in buckets of at most this size; one that is larger travels alone. Two buckets are in memory at a time."""

    base_s: PositiveFloat = 60
    """Any step of a transfer may take this long, plus the time of its bytes at `min_mib_per_s`; then the run stops."""

    min_mib_per_s: PositiveFloat = 50
    """The slowest transfer that is not taken for a hang."""


class Placement(Section):
    """Whether engines and ranks share devices. How many devices each have is said by `parallel` and by `rollout.engine`."""

    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    """`disaggregated`: the engines have devices, or nodes, of their own. `colocated`: they take turns with the ranks on the same GPUs; the
    engines sleep while the policy trains, and the policy waits in host memory while they roll out."""

    sleep_level: Literal[1, 2] = 2
    """What a sleeping engine does with its weights: keeps them in host memory (1), or drops them (2), since new ones come anyway."""

    leak_mib: PositiveFloat = 1024
    """A warning is given when the memory in use at the end of a phase has grown by more than this over three steps."""


class Checkpoint(Section):
    """Saving."""

    every: NonNegativeInt = 10
    """Steps between checkpoints; 0 saves only at the end."""

    keep: PositiveInt = 2
    """Newest checkpoints kept."""

    in_background: bool = False
    """Training goes on from a copy of the state in host memory while it is written; the folder counts once all of it is."""


class Eval(Section):
    """Held-out evaluation."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only where `at_ends` says so."""

    at_ends: bool = False
    """Evaluate before the first and after the last step."""

    questions: NonNegativeInt = 0
    """Questions used, the first of a fixed shuffle; 0 uses all."""

    samples: NonNegativeInt = 1
    """Samples per question at `rollout.temperature` (pass@k needs k of them); 0 for none."""

    greedy: bool = True
    """Also answer every question once at temperature 0."""


class Track(Section):
    """Metrics."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; `online` without WANDB_API_KEY falls back to offline."""

    project: str = "igpo-megatron"
    """Weights & Biases project."""

    dump_every: NonNegativeInt = 1
    """Steps between rollout files; 0 writes none."""
