"""The data that flows from a question to a training step: one question is one tree of token segments.

    prompt ── forced ── action ── observation ── forced ── action          a trajectory is a path, root to leaf
       │        └─ probe (v_0)         └───────────── └─ probe (v_1)       a probe is a leaf nobody samples from
       └──── forced ── action ...                                          samples of one question share the prompt

Tokens live on nodes, turns and rewards on trajectories. This module imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, Protocol, get_args

NodeKind = Literal["prompt", "forced", "asking", "action", "observation", "probe"]
"""Source of a node's tokens: rendered prompt, text forced at the start of a turn, text that asks a stopped path for its answer, sampled by
the policy, tool result, ground-truth probe."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with every accepted answer."""

    id: str
    """Unique within its file, e.g. `train-17`."""

    question: str
    answers: tuple[str, ...]
    """All aliases, in file order; never rewritten (the published code overwrites them with the first)."""

    source: str
    """Benchmark name, e.g. `hotpotqa`; evaluation averages per source."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One fact of the chain behind a question's answer, e.g. `Hop("Iran", "currency", "Iranian Rial")`."""

    entity: str
    relation: str
    value: str

    @property
    def query(self) -> str:
        """A search that asks for it, e.g. "currency of Iran"."""
        return f"{self.relation} of {self.entity}"


class Status(StrEnum):
    """How a trajectory ended."""

    FINISHED = "finished"
    """The policy gave an answer in the required format."""

    TRUNCATED_TOKENS = "truncated_tokens"
    """A turn reached `rollout.max_tokens_per_turn` before its end-of-turn token."""

    TRUNCATED_CONTEXT = "truncated_context"
    """No room was left in `rollout.max_context` for another turn."""

    TRUNCATED_TURNS = "truncated_turns"
    """The policy called a tool in its last allowed turn."""

    BAD_FORMAT = "bad_format"
    """A turn was neither a tool call nor an answer."""

    TOOL_FAILED = "tool_failed"
    """A tool failed after its retries, for reasons outside the policy, which never sees this as an empty result."""

    ENDED_BY_TOOL = "ended_by_tool"
    """The same where `rollout.failed_search=end` asks to train such a trajectory as it stands."""

    ENGINE_FAILED = "engine_failed"
    """The rollout engine failed or the trajectory's deadline passed."""

    CRASHED = "crashed"
    """It raised what nobody expected: a mistake of this project, whose traceback is in the run's folder."""

    LATE = "late"
    """Given up when enough others of its group had ended (`rollout.close_at`)."""

    @property
    def is_trainable(self) -> bool:
        """False for ends that say nothing about the policy: they are counted and left out of the loss."""
        return self not in (Status.TOOL_FAILED, Status.ENGINE_FAILED, Status.CRASHED, Status.LATE)

    @property
    def is_failure(self) -> bool:
        """True where a tool, an engine or this project failed, trained or not."""
        return self in (Status.TOOL_FAILED, Status.ENGINE_FAILED, Status.CRASHED, Status.ENDED_BY_TOOL)


SEARCH = "search"
"""Name of the search tool everywhere but in what the policy reads and writes, where it is `rollout.tool_name`."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A parsed tool call, e.g. `ToolCall("search", ("currency of Iran",))`."""

    name: str
    """As we call the tool, whatever the policy calls it (`renamed`)."""

    queries: tuple[str, ...]
    """Queries of a search; the address of a page and, maybe, what to look for on it; a piece of code."""


def renamed(name: str, search: str) -> str:
    """A tool's name from the policy's spelling to ours, or back; `search` is what the policy calls search.

    The two names of search change places, so a policy whose search is `web_search` and that calls `search` has called no tool.
    """
    return {search: SEARCH, SEARCH: search}.get(name, name)


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """What an engine is asked to sample: a turn, or a part of one."""

    token_ids: list[int]
    """[C], the context that it continues."""

    max_tokens: int
    temperature: float
    """0 takes the likeliest token."""

    seed: int
    key: str
    """Requests with the same key go to the same engine, to use its prefix cache."""

    top_logprobs: int = 0
    """Other than 0 requests entropies, over that many of the likeliest tokens or, if -1, over all."""

    experts_from: int | None = None
    """Requests the experts of the context's tokens from this position on, and of the sampled ones."""


@dataclass(slots=True)
class Completion:
    """What an engine sampled for one request."""

    token_ids: list[int]
    """[L], the end-of-turn token included when it was sampled."""

    logprobs: list[float]
    """[L], nats, under the sampling temperature."""

    finish: Literal["stop", "length", "abort"]
    weight_version: int
    """Version of the weights that sampled these tokens."""

    entropies: list[float] = field(default_factory=list)
    """[L], nats, of the distributions they were sampled from; empty unless asked for."""

    experts_from: int = 0
    """Position in context + sampled tokens of the first of `experts`."""

    experts: list[bytes] = field(default_factory=list)
    """As `Node.experts`, of consecutive tokens; empty unless asked for. The last sampled token was never computed, so it has none."""


@dataclass(frozen=True, slots=True)
class ProbeScore:
    """What an engine says of one probe."""

    logprobs: tuple[float, ...]
    """[stop - start], nats, of its scored tokens, at temperature 1."""

    weight_version: int
    """Version of the weights that computed them, all of them."""


@dataclass(slots=True)
class Node:
    """A run of tokens with one source."""

    parent: int | None
    """Index of the parent in `RolloutGroup.nodes`; None for the prompt."""

    kind: NodeKind
    token_ids: list[int]
    """[L]"""

    turn: int = 0
    """1 for the first turn; 0 for the prompt. A probe that closes turn t (before turn t + 1) carries t."""

    text: str = ""
    """Decoded text, for people; never tokenised again."""

    weight_version: int | None = None
    """Weights that sampled an action, or by which an engine scored a probe; None elsewhere."""

    behavior_logprobs: list[float] = field(default_factory=list)
    """[L] for actions, by the engine; empty elsewhere."""

    old_logprobs: list[float] = field(default_factory=list)
    """[L] for actions, [stop - start] for the `scored` tokens of probes, once they were scored (before the step); empty until then."""

    ref_logprobs: list[float] = field(default_factory=list)
    """[L] for actions, by the reference policy; empty where no KL term is used."""

    call: ToolCall | None = None
    """The tool call an action makes."""

    scored: tuple[int, int] | None = None
    """Probes only: [start, stop) of the ground-truth tokens inside `token_ids`."""

    old_entropies: list[float] = field(default_factory=list)
    """[L] for actions, nats, by the policy before the step; empty where no loss term uses them."""

    experts: list[bytes | None] = field(default_factory=list)
    """[L] experts that the engine sent each token to: [layers, top_k] numbers of 1 byte (up to 256 experts) or 2, this machine's order;
    None where no engine computed the token. Empty unless `rollout.routing_replay` asks for them."""


@dataclass(slots=True)
class Trajectory:
    """One root-to-leaf path through a group's tree."""

    path: list[int]
    """Node indices from the prompt to the last segment; probes are not on a path."""

    status: Status
    answer: str | None = None
    """Text between the answer tags of the last turn; None where there is none."""

    reason: str = ""
    """One sentence for a failed end, e.g. the search provider's error."""

    reward: float = 0.0
    """Outcome reward (F1 or EM, or the format penalty)."""

    reward_parts: dict[str, float] = field(default_factory=dict)
    """f1, em, format_ok and, under its name, any other outcome behind the reward."""

    gains: list[float | None] = field(default_factory=list)
    """[num_turns] information gain of each turn; None where it was not measured (the answer turn), 0.0 means zero."""

    turn_advantages: list[float] = field(default_factory=list)
    """[num_turns]; every token sampled in turn t is trained with turn_advantages[t - 1]."""

    evidence_gains: list[float | None] = field(default_factory=list)
    """[num_turns] the part of each gain that the turn's tool result brought; the rest is the policy's own reasoning. Empty unless
    `reward.evidence` asks for it; None where the gain is None."""


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """One decision during the rollout whether to fork a path; kept whatever it was."""

    node: int
    """The node behind which new paths were, or might have been, started: a tool result."""

    trajectory: int
    """Number of the path that was measured."""

    turn: int
    """The turn whose first tokens were measured."""

    entropy: float
    """Of those tokens, on the scale of `rollout.branching` (about 0 to 1)."""

    initial: float
    """What it was compared with: the same at the beginning of the question."""

    kind: str
    """How entropies were computed: `full` vocabulary or `top_k`."""

    probability: float
    """Chance of each new path that was tried, or (by threshold) the number that was compared."""

    consecutive: int
    """Decisions just before this one, on the same path, that all branched."""

    children: tuple[int, ...]
    """Numbers of the trajectories that start here; empty where it did not branch."""


@dataclass(frozen=True, slots=True)
class ValuePoint:
    """Two decisions of a gain-guided rollout at one state behind a tool result: to stop the path, and to fork it; kept whatever they were.

    Both were drawn with the probabilities given, so a path that was never stopped had the product of 1 - `stop_probability` over its states
    as its chance to be seen to its end.
    """

    node: int
    """The tool result behind which new paths were, or might have been, started."""

    trajectory: int
    """Number of the path that was decided on."""

    turn: int
    """The turn that continues the state."""

    value: float | None
    """exp(mean log-prob of the true answer) in the state, 0 to 1; None where it could not be measured."""

    siblings: int
    """First samples of the group that were measured at the same turn, by the same weights."""

    spread: float
    """Standard deviation of their values; 0 for fewer than two."""

    probability: float | None
    """Chance of each fork that was tried; None where none was: stopped, not measured, or no room left in the group."""

    children: tuple[int, ...]
    """Numbers of the trajectories that start here."""

    change: float | None
    """Largest change of the path's value over the last `stop_turns` turns; None where it had not as many, or may not stop."""

    stop_probability: float
    """Chance of a stop: 0 where the value was not saturated."""

    stopped: bool
    """The policy was asked for its answer at once."""


@dataclass(slots=True)
class RolloutGroup:
    """All trajectories of one question, as a tree that shares what they share."""

    prompt: Prompt
    nodes: list[Node]
    trajectories: list[Trajectory] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    probe_scores: dict[tuple[int, str], ProbeScore] = field(default_factory=dict)
    """(node a probe continues, answer) -> its log-probs, where an engine has scored probes during the rollout."""

    branch_points: list[BranchPoint] = field(default_factory=list)
    """Decisions of a rollout that branches by entropy, in the order in which they were made."""

    value_points: list[ValuePoint] = field(default_factory=list)
    """Decisions of a rollout that branches and stops by information gain, in the order in which they were made."""

    def add(self, node: Node) -> int:
        """Append a node and return its index."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def actions(self, trajectory: Trajectory) -> list[Node]:
        """The sampled turns of a trajectory, in order. [num_turns]"""
        return [self.nodes[index] for index in trajectory.path if self.nodes[index].kind == "action"]

    def path_to(self, index: int) -> list[int]:
        """Node indices from the root to node `index`."""
        path: list[int] = []
        cursor: int | None = index
        while cursor is not None:
            path.append(cursor)
            cursor = self.nodes[cursor].parent
        return path[::-1]

    def context(self, index: int) -> list[int]:
        """All token ids from the root up to and including node `index`."""
        return [token for number in self.path_to(index) for token in self.nodes[number].token_ids]

    @property
    def trained(self) -> list[Trajectory]:
        """The trajectories that a step learns from, in order: those that say something about the policy, with a token it sampled.

        One that never got to a turn (its prompt filled the context) has nothing to be trained and counts nowhere.
        """
        return [end for end in self.trajectories if end.status.is_trainable and any(node.token_ids for node in self.actions(end))]

    @property
    def is_branched(self) -> bool:
        """True where trained trajectories share a sampled turn."""
        paths = [end.path for end in self.trained]
        sampled = [index for path in paths for index in path if self.nodes[index].kind == "action"]
        return len(set(sampled)) < len(sampled)


def rename_search(group: RolloutGroup, search: str) -> None:
    """Give the calls of a group from before calls had our names of tools those names; `search` as for `renamed`."""
    for node in group.nodes:
        if node.call is not None:
            node.call = replace(node.call, name=renamed(node.call.name, search))


@dataclass(frozen=True, slots=True)
class EntropyStats:
    """Of the old entropies of all trained tokens of a step; a shared token counts once for every trajectory through it."""

    mean: float
    std: float
    """With n - 1; 1 where there is no spread."""

    threshold: float
    """High-entropy tokens are those above it."""

    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Sums over all ranks of one training step, fixed before its first micro-batch; losses are divided by them."""

    trained_tokens: int
    trajectories: int

    entropy: EntropyStats | None = None
    """None where the loss uses no entropies from before the step."""

    bounds: tuple[float, float] | None = None
    """Least and greatest ratio that count, where the loss finds them anew for every optimizer step."""


class Metric(StrEnum):
    """Metrics that several places know, by their names in metrics.jsonl; one that is only written is named where it is measured.

    They are of one step. Means are over trained trajectories, shares (0 to 1) of all trajectories, unless said otherwise.
    """

    REWARD = "reward"
    """Mean reward, after penalties and bonuses."""
    F1 = "f1"
    """Mean F1 of the answers, 0 to 1; also a part of a trajectory's reward, and a score of an evaluation, like the next two."""
    EM = "em"
    """Mean exact match, 0 to 1."""
    FORMAT_OK = "format_ok"
    """Share of well-formed trajectories among those trained."""
    GAIN = "gain"
    """Mean information gain of all turns where it was measured, in the unit of `reward.gain`."""
    GAIN_EVIDENCE = "gain_evidence"
    """Part of it that tool results brought, with `reward.evidence`."""
    GAIN_REASONING = "gain_reasoning"
    """The rest of it: the policy's own reasoning."""
    VALUE_0 = "value_0"
    """Mean log-prob of the true answer before the first turn, nats per token."""
    TURNS = "turns"
    """Mean number of turns."""
    SEARCHES = "searches"
    """Mean number of turns that call search; also a score of an evaluation."""
    VISITS = "visits"
    """Mean number of turns that open a page; absent without any."""
    PYTHON_CALLS = "python_calls"
    """Mean number of turns that run code; absent without any."""
    RESPONSE_TOKENS = "response_tokens"
    """Mean number of sampled tokens."""
    GENERATED_TOKENS = "generated_tokens"
    """Sampled tokens of the step, those that trajectories share once."""
    TOOL_CALLS = "tool_calls"
    """Tool results of the step, counted likewise."""
    FAILED = "failed"
    """Share that a tool, an engine or this project failed."""
    CRASHED = "crashed"
    """Share that ended by a mistake of this project."""
    TRUNCATED = "truncated"
    """Share that reached a limit of tokens, context or turns."""
    ZERO_STD_GROUPS = "zero_std_groups"
    """Share of groups whose trained trajectories have equal rewards."""
    INITIAL_ROLLOUTS = "initial_rollouts"
    """Samples that began at the question before any fork, of a group, or their mean over groups; it varies in AEPO."""
    BRANCHED = "branched"
    """Share of the decisions to fork that did."""
    BRANCH_ENTROPY = "branch_entropy"
    """Mean entropy behind tool results, on the scale of `rollout.branching`."""
    BRANCH_SPREAD = "branch_spread"
    """Mean standard deviation of the values behind tool results."""
    BRANCH_PROBABILITY = "branch_probability"
    """Mean chance of a fork that was tried, or the number that was compared."""
    SHARED_TOKENS = "shared_tokens"
    """Share of sampled tokens, counted along trajectories, that branching saved."""
    STOPPED = "stopped"
    """Share that was asked for its answer at once."""
    NONFINITE_GAINS = "nonfinite_gains"
    """Gains lost to a log-prob that was not finite, of a group or of the step."""
    MIXED_VERSION_GAINS = "mixed_version_gains"
    """Gains lost because the weights changed between their two values, of a group or of the step."""
    REPLAYED = "replayed"
    """Trajectories that come from an earlier step, of a group or of the step."""
    LOGPROB_GAP_MEAN = "logprob_gap_mean"
    """Mean |engine - trainer| over sampled tokens that both scored by the same weights, nats."""
    LOGPROB_GAP_MAX = "logprob_gap_max"
    """The largest of them."""
    CANARY_GAP = "canary_gap"
    """Largest |engine - trainer| over the canary's tokens after a weight transfer, nats; in bf16 the median."""
    STALENESS_MEAN = "staleness_mean"
    """Mean over sampled tokens of the updates between sampling and training."""
    LOSS = "loss"
    """Mean over the optimizer steps."""
    NLL = "nll"
    """Mean negative log-likelihood of the trained tokens, nats; supervised only."""
    HELD_OUT_NLL = "held_out_nll"
    """The same of all action tokens of `loss.held_out`, at temperature 1."""
    EPOCH = "epoch"
    """Passes through the file of demonstrations, this step included; supervised only."""
    ENTROPY = "entropy"
    """Mean entropy at the trained tokens, nats."""
    TRAINED_TOKENS = "tokens"
    """Trained tokens, by which the sums over them are divided; not in metrics.jsonl."""
    KL_OLD = "kl_old"
    """Mean KL (k3) from the policy to that before the step, nats per trained token."""
    KL_REF = "kl_ref"
    """Mean KL (k3) from the policy to the reference, nats per trained token."""
    CLIP_FRACTION = "clip_fraction"
    """Share of the trained tokens that the loss clips."""
    GRAD_NORM = "grad_norm"
    """Mean norm of the gradient before clipping."""
    SKIPPED = "skipped"
    """Optimizer steps that were not taken: nothing to train, or a gradient that was not finite."""
    LR = "lr"
    """Learning rate of the first optimizer step."""
    TOKENS_PER_S = "tokens_per_s"
    """All tokens of the step over its seconds."""
    SYNC_MIB = "sync/mib"
    """Size of the weights that a transfer moved, MiB."""
    SYNC_CANARY_S = "sync/canary_s"
    """Seconds that the check of a transfer by the canary took."""


def gain_of_turn(turn: int | Literal["*"]) -> str:
    """Name of the metric with the mean gain of one turn, the first of which is 1; of every turn where a pattern is asked for."""
    return f"gain_turn_{turn}"


EvaluationKind = Literal["sampled", "greedy"]
"""How the questions of an evaluation are answered: at `rollout.temperature`, or at 0."""

EVALUATION_KINDS: tuple[EvaluationKind, ...] = get_args(EvaluationKind)


def evaluated(kind: EvaluationKind, score: str) -> str:
    """Name of the metric with a score of an evaluation: `eval/sampled/f1`."""
    return f"eval/{kind}/{score}"


def over_sources(score: str) -> str:
    """The same score as a mean over sources instead of questions."""
    return f"macro_{score}"


def standard_error(name: str) -> str:
    """Name of a metric's or a score's standard error."""
    return f"{name}_se"


def without_replay(name: str) -> str:
    """Name of a metric as it would be if the engine's choice of experts were not replayed."""
    return f"{name}_free"


def of_tool(tool: str, name: str) -> str:
    """Name of the metric with a count or a time of a tool's calls: `search/ok`, `visit/p95_s`."""
    return f"{tool}/{name}"


class UserError(ValueError):
    """What the user gave cannot be used; the message says what was found, what was expected and what to change.

    It alone is shown without a traceback: any other exception is a mistake of ours.
    """


class RunStopped(RuntimeError):
    """The run cannot go on; the message names the culprit in one sentence. What was saved stays, and the run can be resumed."""


class SyncError(RunStopped):
    """A weight transfer did not bring the policy's weights; the message names the engine and the first tensor that shows it."""


@dataclass(frozen=True, slots=True)
class Canary:
    """What the policy says of fixed tokens: whoever claims to serve its weights has to say the same."""

    token_ids: tuple[int, ...]
    """[n + 1]"""

    logprobs: tuple[float, ...]
    """[n], nats, of `token_ids[1:]` at temperature 1."""

    max_gap: float
    """Largest |difference| allowed, nats."""

    rounded: bool = False
    """Either side computes in bf16, which moves single tokens by 2 nats, as far as a lost matrix does: `max_gap` is for the median."""


NamedTensors = Iterable[tuple[str, Any]]
"""(name in the Hugging Face folder, tensor), once each."""


class WeightSink(Protocol):
    """Whatever receives new weights: the engine pool, or a test."""

    def update_weights(
        self, named_tensors: NamedTensors, version: int, canary: Canary | None = None, exported: Callable[[], None] | None = None
    ) -> Mapping[str, float]:
        """Replace all weights and serve them as `version` from now on; returns metrics.

        `exported` is called when all tensors were taken. With `canary`, whoever serves them is asked before others may. Raises SyncError.
        """
        ...
