"""The planner's data: machines, workloads, layouts, and the estimate of each.

    model_shape ─┐
    machines ────┼──layouts──> Layout ──memory, train_time, rollout_time──> Estimate ──search──> ranked ──show, launch──> table, YAML
    workload ────┘

Sizes are bytes, times seconds, rates per second and per rank. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

Recompute = Literal["none", "selective", "full"]
Placement = Literal["disaggregated", "colocated"]
Direction = Literal["score", "train"]
"""A forward pass for log-probs, or a training step."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one rank has to itself. Rates are those that programs reach, not those of a data sheet."""

    name: str
    device: Literal["cpu", "cuda"]
    memory: float
    """Bytes of one device that a program may fill."""

    matmul: tuple[tuple[float, float], ...]
    """(FLOPs of one call, FLOP/s reached), by size of call; between two the rate is interpolated over the logarithm of the size."""

    attention: float
    """FLOP/s of fused attention."""

    stream: float
    """Bytes/s read and written by elementwise operations."""

    link: float
    """Bytes/s of one rank to its neighbours on the machine, in a collective."""

    link_latency: float
    """Seconds before the first byte of a collective arrives."""

    network: float
    """Bytes/s of one rank across machines."""

    network_latency: float
    host_link: float
    """Bytes/s between a device's memory and its host's, each way, while all ranks of a machine use it."""

    call: float
    """Seconds that one operation costs however small it is."""

    decode_call: float
    """Seconds that one decoding step of an engine costs beyond reading weights and keys."""

    ranks_per_node: int
    cores: int | None = None
    """CPU: cores that all ranks of a machine share; None where every rank has a device of its own."""

    crowd: float = 1.0
    """CPU: how much longer a rank computes while the other cores are busy, too."""

    score_factor: float = 1.0
    """Measured over modelled seconds of what one rank computes in a forward pass; 1 where no pass was timed."""

    train_factor: float = 1.0
    """The same of a training step: forward, backward and update."""

    source: str = "modelled"
    """Where the figures come from."""

    @property
    def ceiling(self) -> float:
        """FLOP/s of the fastest matmul."""
        return max(rate for _, rate in self.matmul)

    def matmul_rate(self, flops: float) -> float:
        """FLOP/s of calls of this size."""
        below = self.matmul[0]
        for above in self.matmul:
            if flops <= above[0]:
                if above is below:
                    return above[1]
                share = (log(flops) - log(below[0])) / (log(above[0]) - log(below[0]))
                return below[1] + share * (above[1] - below[1])
            below = above
        return below[1]


@dataclass(frozen=True, slots=True)
class Workload:
    """A training step's trajectories, by their means and spreads."""

    prompts: int = 32
    samples: int = 16
    """Trajectories per question; they share the prompt's tokens."""

    prompt_tokens: int = 600
    turns: float = 4.0
    """Mean turns; geometric up to `max_turns`."""

    max_turns: int = 10
    turn_tokens: float = 300.0
    """Mean sampled tokens of a turn; lognormal with `turn_sigma`."""

    turn_sigma: float = 0.6
    observation_tokens: float = 800.0
    """Mean tokens of a tool result."""

    tool_median: float = 0.5
    """Seconds; lognormal with `tool_sigma`, whose tail makes stragglers."""

    tool_sigma: float = 1.2
    max_context: int = 32768
    """Longest trajectory that must fit, whatever the mean."""

    seed: int = 0
    source: str = "assumed"

    @property
    def trajectories(self) -> int:
        return self.prompts * self.samples


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: what its forward pass costs depends on these three."""

    tokens: int
    pairs: float
    """Pairs of a query and a key that see each other."""

    targets: int
    """Tokens with a log-prob."""

    gathered: int = 0
    """CPU: keys copied so that branches see what they share (policy/tree_plan.py)."""

    masked: int = 0
    """CPU: elements of those branches' masks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks that train share the model and the rows."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    recompute: Recompute = "none"
    row_tokens: int = 8192
    stages: tuple[int, ...] = ()
    """Layers of each pipeline stage."""

    sequence: bool = False
    """Sequence parallelism inside the tensor-parallel group."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def describe(self) -> str:
        """`TP4 PP2 DP2`; sizes of 1 are left out."""
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("VPP", self.virtual), ("CP", self.context), ("EP", self.expert))
        return " ".join([*(f"{name}{size}" for name, size in sizes if size > 1), f"DP{self.data}"])


@dataclass(frozen=True, slots=True)
class PartSizes:
    """Parameters that one rank holds of each part of the model, counted in the real model."""

    embedding: int
    layer: int
    """Of one layer, without its experts."""

    layer_experts: int
    """This rank's experts of one layer; 0 in a dense model."""

    final_norm: int
    head: int
    """The output layer; as large as the embedding where the two are tied, and then held twice only by a pipeline."""

    largest: int
    """The largest tensor of a layer."""

    tied: bool

    def stage(self, layers: int, *, first: bool, last: bool) -> tuple[int, int]:
        """(parameters without experts, experts') of a stage with `layers` layers."""
        dense = layers * self.layer + (self.embedding if first else 0) + (self.final_norm if last else 0)
        if last and not (self.tied and first):
            dense += self.head
        return dense, layers * self.layer_experts


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of training beside the layout."""

    dtype_bytes: int = 2
    """Of parameters and activations."""

    reference: bool = True
    """A copy of the first weights is kept on the host for a KL term."""

    distributed_optimizer: bool = True
    minibatches: int = 1
    """Optimizer steps over a step's trajectories."""

    head_workspace: int = 128 * 2**20
    """Bytes of logits that the head holds at a time on a GPU (`model.head_workspace_mib`)."""

    head_in_forward: bool = False
    """The head forms its gradients in the forward pass (`model.head_backward`)."""


Memory = dict[str, float]
"""Term -> bytes of one rank."""


@dataclass(frozen=True, slots=True)
class Engines:
    """How the other devices serve rollouts."""

    count: int
    tensor: int
    seconds: float
    """Of one step's rollout."""

    weights: float
    """Bytes of weights on each engine device."""

    cache_tokens: int
    """Tokens that the KV cache of one engine holds."""

    cache_bytes: float
    """Bytes of it on each device."""

    concurrent: int
    """Trajectories that one engine decodes at once at most."""

    straggler: float
    """Seconds at the end in which fewer than a tenth of the trajectories still run."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One way to run, and what it costs."""

    layout: Layout
    engines: Engines | None
    memory: Memory
    """Terms of the fullest rank at its fullest moment; they sum to its peak."""

    train: dict[str, float]
    """Parts of the time of scoring and training; they sum."""

    step: float
    placement: Placement = "disaggregated"

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True)
class Misfit:
    """A layout that does not fit, and why."""

    layout: Layout
    reason: str
    peak: float = 0.0
