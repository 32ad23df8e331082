"""Settings of rollouts: how long, how many, in which format, and how a group branches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.engines.settings import Engine
from igpo_megatron.settings import Section


class BranchingSection(Section):
    """Shared by all ways to grow a group; the defaults are those of one that never forks."""

    name: str

    branches: ClassVar[bool] = False
    """Samples may share turns."""

    decides_by_gain: ClassVar[bool] = False
    """It needs probes that the engine scores while the group grows."""

    @property
    def top_logprobs(self) -> int:
        """Number of likeliest tokens whose log-probs it needs with every sampled token; -1 for all."""
        return 0

    def misfits(self, rollout: Rollout) -> Iterator[str]:
        """Why a group cannot grow this way under these settings."""
        yield from ()


class NoBranching(BranchingSection):
    """Independent samples."""

    name: Literal["none"] = "none"


class Forking(BranchingSection):
    """Shared by all ways to fork."""

    branches: ClassVar[bool] = True

    initial_rollouts: PositiveInt = 8
    """Samples that begin at the question. The rest of `samples_per_prompt` is for forks; what forks do not use begins there, too."""

    beam: Annotated[int, Field(ge=2)] = 2
    """Most paths behind a fork, the forking one included."""

    @property
    def budget_is_found(self) -> bool:
        """A first rollout determines `initial_rollouts`; the setting is ignored."""
        return False

    def misfits(self, rollout: Rollout) -> Iterator[str]:
        if not self.budget_is_found and self.initial_rollouts >= rollout.samples_per_prompt:
            yield (
                f"rollout.branching.initial_rollouts={self.initial_rollouts} leaves nothing of rollout.samples_per_prompt="
                f"{rollout.samples_per_prompt} to branch with; lower it (published: half), or set rollout.branching.name=none"
            )


class ArpoBranching(Forking):
    """ARPO (arXiv 2507.19849, section 3.1): a group starts as a few samples and forks behind tool results that leave the policy unsure.

    Entropy is that of the first `entropy_tokens` tokens of a turn, over ln(vocabulary); dH its rise over the question's initial entropy.
    """

    name: Literal["arpo"] = "arpo"
    variant: Literal["corrected", "published"] = "corrected"
    """`corrected` (the paper): entropy of the tokens behind the result, compared with the mean of the first samples' first turns; short
    turns are scaled up to `entropy_tokens`. `published` (the code): entropy of the turn that made the call, compared with the path's own
    first measured turn, as a plain sum. Neither has the code's stale initial entropies of earlier batches, or its rounds."""

    base_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """alpha: the chance of a fork where dH = 0."""

    entropy_weight: NonNegativeFloat = 0.2
    """beta: P = alpha + beta dH, clipped to [0, 1]."""

    decision: Literal["stochastic", "threshold"] = "stochastic"
    """Fork with chance P (code), or wherever P > `threshold` (paper)."""

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """tau, for decision=threshold."""

    entropy_tokens: PositiveInt = 20
    """Tokens measured at the beginning of a turn."""

    entropy: Literal["top_k", "full"] = "top_k"
    """Over the `top_k` likeliest tokens, ignoring the rest as published, or over the full vocabulary (slow in vLLM if it is large)."""

    top_k: PositiveInt = 10
    """Likeliest tokens, for entropy=top_k; the sampled one is added."""

    @property
    def top_logprobs(self) -> int:
        return -1 if self.entropy == "full" else self.top_k

    def misfits(self, rollout: Rollout) -> Iterator[str]:
        yield from super().misfits(rollout)
        if self.entropy_tokens > rollout.max_tokens_per_turn:
            yield (
                f"rollout.branching.entropy_tokens={self.entropy_tokens} is more than a turn has "
                f"(rollout.max_tokens_per_turn={rollout.max_tokens_per_turn}); lower it"
            )


class AepoBranching(ArpoBranching):
    """AEPO (arXiv 2510.14545): ARPO's forks, less likely if the path has just forked, with a budget that a first rollout can set."""

    name: Literal["aepo"] = "aepo"  # type: ignore[assignment]
    variant: Literal["corrected", "published"] = "corrected"
    """As for arpo, and `corrected`: P = (alpha + beta dH) (1 - penalty l); `published`: P = 1 - (1 - alpha) / (1 - penalty l) + beta dH,
    which is what the code's comparison amounts to. l counts along each path (the code counts all forks of a question together)."""

    penalty: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Penalty per directly preceding decision of the same path that forked."""

    premonitor: bool = True
    """One rollout goes first and sets initial_rollouts to n sigmoid(budget_scale (H_root - H_tool)), H_tool its mean entropy behind tool
    results; it stays in the group, and is forked like the others (the code throws it away, and its scripts leave this off)."""

    budget_scale: NonNegativeFloat = 0.5
    """Steepness of the budget."""

    @property
    def budget_is_found(self) -> bool:
        return self.premonitor


class GainBranching(Forking):
    """Forks and stops by information gain (this project's own method). Needs `reward.scorer=engine` to measure values during the rollout.

    The value v_t of a path behind t turns is exp(mean log-prob of the true answer), from 0 to 1, whatever `reward.gain` is.
    """

    decides_by_gain: ClassVar[bool] = True

    name: Literal["gain"] = "gain"
    base_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    """alpha: the chance of a fork where the first samples agree."""

    spread_weight: NonNegativeFloat = 2.0
    """beta: P = alpha + beta std(v_t over the first samples), clipped to [0, 1]; that std is at most 0.5."""

    stop_probability: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Chance that a saturated path is asked for its answer at once, with the probe's text before `{answer}`. Below 1 some paths go on,
    which any correction for the stopping needs; 0 never stops."""

    stop_turns: PositiveInt = 2
    """Saturated: none of the last so many turns moved the value by more than `stop_change`, and it is at least `stop_value`."""

    stop_change: NonNegativeFloat = 0.02
    """Largest change that counts as no change."""

    stop_value: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least value of a saturated path; 0 also stops paths that learn nothing more."""


Branching = Annotated[NoBranching | ArpoBranching | AepoBranching | GainBranching, Field(discriminator="name")]


class Rollout(Section):
    """Multi-turn trajectories."""

    prompts_per_step: PositiveInt = 32
    """Questions per training step."""

    samples_per_prompt: PositiveInt = 16
    """Trajectories per question (the group)."""

    max_turns: PositiveInt = 10
    """Turns per trajectory; a tool call in the last one ends it without running the tool."""

    max_tokens_per_turn: PositiveInt = 2000
    """Sampled tokens per turn."""

    max_context: PositiveInt = 32768
    """Tokens of prompt and all turns together, the probe included."""

    max_observation_tokens: PositiveInt = 4096
    """Tokens of one tool result; longer text is cut at a token, and the closing frame is kept."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; policy log-probs are taken at the same temperature."""

    force_think: bool = True
    """Append `<think>` to every turn's prompt, as published; forced tokens are never trained. If the chat template opens `<think>` itself,
    no second one is added, and the template's counts as forced with either setting."""

    system_prompt: str | None = None
    """System message; null sends none. `{date}` becomes the date of the run's start. If the chat template accepts no system message, the
    text is put into the first user message."""

    protocol: str = "igpo"
    """How the policy writes calls and answers: `igpo` (think + tool_call or answer), `search_r1` and `arpo` (tags), `hermes` (native tool
    calls of Qwen and Hermes models), or `package.module:name` of a ToolProtocol of yours, or of a function without arguments that
    returns one."""

    tool_name: str = "web_search"
    """Name of the search tool in the prompt and in tool calls; protocols of tags (search_r1, arpo) always write `<search>`."""

    extra_tools: tuple[str, ...] = ()
    """Tools beside search: `visit` reads web pages (section `visit`), `python` runs code (section `python`), and
    `package.module:name` is a tool of yours."""

    tool_options: dict[str, dict[str, Any]] = Field(default={})
    """Name of a tool of yours -> its options, e.g. `rollout.tool_options.calculator.digits=3`."""

    max_queries: PositiveInt = 3
    """Queries of one tool call that are used; further ones are dropped."""

    resample: NonNegativeInt = 0
    """Dynamic sampling (DAPO, arXiv 2503.14476): up to this many further batches of questions replace groups whose rewards are all equal;
    if they are not enough, such groups fill the step. 0 keeps every group."""

    replay_successes: NonNegativeInt = 0
    """Questions whose latest success is kept, to replace a trajectory where all of a later group fail (ARPO for GUI agents, arXiv
    2505.16282; RAPO, arXiv 2509.24107). Kept in checkpoints; counts in the step's metrics like any other. It is trained as if it had just
    been sampled, as in the published code; `loss.mismatch` weighs it by how likely it still is. 0 replays nothing."""

    success_above: float = 0.5
    """For replay_successes: a trajectory whose reward is above this is a success."""

    tool_in_prompt: bool = True
    """Describe the tools in the prompt, through the chat template's `tools`, or in the instruction if the template or the protocol
    shows none; false for a policy that already knows the format."""

    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """A step in which more than this share of trajectories, or of searches, fails for reasons outside the policy stops the run.
    Trajectories that crash by an error in this project are included; their tracebacks are in `failures/trajectories.txt` in the
    run's folder."""

    failed_search: Literal["mask", "end"] = "mask"
    """A search, or another tool, that fails after its retries ends its trajectory. `mask` excludes it from the loss and from its group's
    baseline; `end` trains it, and counts it in evaluations, with the reward of a malformed one."""

    deadline_s: PositiveFloat = 1800
    """Wall time of one trajectory."""

    close_at: PositiveInt | None = None
    """A training group closes when this many of its trajectories have ended; the others are cancelled, counted as `late`, and never
    trained. Null waits for all. This avoids waiting for stragglers, but prefers short trajectories if long ones are slow."""

    max_staleness: NonNegativeInt = 0
    """Steps that rollouts may run ahead: every token that a step trains was sampled by weights at most this many updates older than those
    it updates. 0 rolls out and trains in turn. With 1 or more, choose a `loss.mismatch`."""

    routing_replay: bool = False
    """Mixtures of experts: the engine's choice of experts is recorded per token, and the trainer's scoring and training passes repeat it.
    Tokens that no engine computed (probes, the end of a last turn) and the reference policy are routed freely."""

    routing_gap_every: NonNegativeInt = 10
    """With routing_replay, steps between measurements of the log-prob gap as it would be without, by one more scoring pass; 0 never."""

    branching: Branching = NoBranching()
    """How a training group grows: independent samples, or forks of them. Evaluations always draw independent samples."""

    engine: Engine = Engine()
    """The engines."""

    def group_problems(self) -> Iterator[str]:
        """Conflicts between settings of training groups; evaluations draw independent samples."""
        branching = self.branching
        yield from branching.misfits(self)
        if self.replay_successes and branching.branches:
            yield (
                f"rollout.replay_successes={self.replay_successes} replaces single samples, rollout.branching.name="
                f"{branching.name} makes them share turns; use one of them"
            )
        if self.close_at is None:
            return
        if self.close_at > self.samples_per_prompt:
            yield (
                f"rollout.close_at={self.close_at} is more than rollout.samples_per_prompt={self.samples_per_prompt}; "
                "use at most that many, or null to wait for all"
            )
        if branching.branches:
            yield (
                f"rollout.close_at gives up independent samples, but rollout.branching.name={branching.name} grows a tree, whose "
                "branches depend on all of them; set rollout.close_at to null"
            )
