"""Advantage, loss, rewards, rollouts and schedule go together."""

from __future__ import annotations

from collections.abc import Iterator

from igpo_megatron.agent.settings import AepoBranching, GainBranching, NoBranching
from igpo_megatron.algorithms.settings import Aepo, Bapo, Igpo, IgpoLoo, Loss, PolicyLoss, ReinforcePp, ReMax, Sft
from igpo_megatron.config.check.common import evaluates, needs_engines
from igpo_megatron.config.schema import Config


def check_algorithm(config: Config) -> Iterator[str]:
    """Advantage, loss and rewards go together."""
    reward, advantage = config.reward, config.advantage
    reinforced = isinstance(config.loss, PolicyLoss)
    replayed = config.run.replay is not None
    if isinstance(config.loss, Sft) and not replayed:
        yield "loss.name=sft learns from demonstrations; set run.replay to a file of them"
    if replayed and config.run.stop_after == "rollout":
        yield "run.replay trains from recorded rollouts and run.stop_after=rollout writes new ones; set only one of them"
    samples = config.rollout.samples_per_prompt
    if reinforced and not replayed and samples < 2 and not isinstance(advantage, ReinforcePp | ReMax):
        yield f"rollout.samples_per_prompt={samples}: advantage.name={advantage.name} compares the samples of a question; use 2 or more"
    if reinforced and isinstance(advantage, Igpo | IgpoLoo) and reward.gain == "none":
        yield f"reward.gain=none leaves advantage.name={advantage.name} without gains; measure them, or set advantage.name=grpo"
    if isinstance(config.loss, PolicyLoss):
        yield from _policy_loss(config.loss)
    if config.model.head_backward == "in_forward" and (setting := _looks_beyond_a_token(config.loss)):
        yield (
            f"{setting} makes a token's loss depend on other tokens, which model.head_backward=in_forward has not seen when it forms the "
            "token's gradient; use model.head_backward=recompute"
        )
    if reward.overlong is not None and reward.overlong[0] >= reward.overlong[1]:
        yield f"reward.overlong={list(reward.overlong)}: expected [start, end] in tokens with start < end"
    if reward.gain == "none" and reward.scorer != "fold":
        yield f"reward.scorer={reward.scorer} scores probes, reward.gain=none asks for none; leave reward.scorer at its default"
    if reward.evidence and reward.gain == "none":
        yield "reward.evidence=true splits gains, reward.gain=none asks for none; set one of them differently"
    probed = reinforced and isinstance(advantage, Igpo | IgpoLoo) and reward.gain != "none"
    if probed and reward.scorer == "engine":
        yield from _engine_scorer(config)
    elif probed and isinstance(config.loss, PolicyLoss) and config.loss.old_logprobs == "engine":
        yield (
            f"loss.old_logprobs=engine runs no pass that reward.scorer={reward.scorer} could score probes in; "
            "use reward.scorer=engine, or loss.old_logprobs=recompute"
        )
    if isinstance(config.loss, PolicyLoss) and config.loss.uses_old_entropies and config.loss.old_logprobs == "engine":
        without = ", or entropy_advantage=none with balanced_tokens=all" if isinstance(config.loss, Aepo) else ""
        yield (
            f"loss.name={config.loss.name} uses entropies that loss.old_logprobs=engine runs no pass for; "
            f"use old_logprobs=recompute{without}"
        )
    if reward.gain != "none" and reward.probe_template.count("{answer}") != 1:
        found = reward.probe_template.count("{answer}")
        yield f"reward.probe_template={reward.probe_template!r}: expected {{answer}} exactly once, found it {found} times"
    if reinforced and not replayed and config.rollout.temperature == 0:
        yield "rollout.temperature=0 makes all samples of a question alike, so nothing can be learnt; use 1.0 (eval.greedy evaluates at 0)"


def _policy_loss(loss: PolicyLoss) -> Iterator[str]:
    low, high = loss.mismatch_bounds
    if not low < 1 < high:
        yield f"loss.mismatch_bounds={[low, high]}: expected [low, high] around 1, such as [0.5, 2.0]"
    if isinstance(loss, Bapo):
        for name, (first, last) in (("lower", loss.lower), ("upper", loss.upper)):
            if first > last:
                yield f"loss.{name}={[first, last]}: expected [first, last] with first <= last"
        if loss.lower[1] > 1 or loss.upper[0] < 1:
            yield f"loss.lower={list(loss.lower)} and loss.upper={list(loss.upper)}: expected bounds below and above 1"
    if loss.mismatch != "none" and loss.old_logprobs == "engine":
        yield (
            f"loss.mismatch={loss.mismatch} compares the engine with a pass before the step, which loss.old_logprobs=engine leaves out; "
            "use loss.old_logprobs=recompute, or loss.mismatch=none"
        )


def _looks_beyond_a_token(loss: Loss) -> str | None:
    """The setting with which a token's part of the loss is not a function of its own log-prob and entropy; None where it is one."""
    if isinstance(loss, PolicyLoss) and loss.sequence_level:
        return f"loss.name={loss.name}"
    if isinstance(loss, PolicyLoss) and loss.mismatch == "mask_sequence":
        return "loss.mismatch=mask_sequence"
    return "loss.entropy_advantage=published" if isinstance(loss, Aepo) and loss.entropy_advantage == "published" else None


def check_branching(config: Config) -> Iterator[str]:
    """Groups can grow as they are asked to, and be trained so."""
    rollout, branching = config.rollout, config.rollout.branching
    if isinstance(branching, NoBranching) or not needs_engines(config):
        return
    if isinstance(config.loss, PolicyLoss) and config.loss.sequence_level:
        yield (
            f"loss.name={config.loss.name} weighs whole sequences, which cannot be taken apart over the turns that branches share; "
            "use loss.name=ppo, or rollout.branching.name=none"
        )
    premonitored = isinstance(branching, AepoBranching) and branching.premonitor
    if not premonitored and branching.initial_rollouts >= rollout.samples_per_prompt:
        yield (
            f"rollout.branching.initial_rollouts={branching.initial_rollouts} leaves nothing of rollout.samples_per_prompt="
            f"{rollout.samples_per_prompt} to branch with; lower it (published: half), or set rollout.branching.name=none"
        )
    if isinstance(config.loss, PolicyLoss) and config.loss.mismatch == "mask_sequence":
        yield (
            "loss.mismatch=mask_sequence judges whole trajectories, which cannot be taken apart over the turns that branches share; "
            "use loss.mismatch=mask, or rollout.branching.name=none"
        )
    if isinstance(branching, GainBranching):
        yield from _gain_branching(config)
    elif branching.entropy_tokens > rollout.max_tokens_per_turn:
        yield (
            f"rollout.branching.entropy_tokens={branching.entropy_tokens} is more than a turn has "
            f"(rollout.max_tokens_per_turn={rollout.max_tokens_per_turn}); lower it"
        )


def check_ahead(config: Config) -> Iterator[str]:
    """Rollouts may run ahead and close early."""
    rollout = config.rollout
    if rollout.max_staleness and config.reward.scorer == "engine" and isinstance(config.loss, PolicyLoss):
        yield (
            f"rollout.max_staleness={rollout.max_staleness} lets weights change while a trajectory grows, so that reward.scorer=engine "
            "would take the gains of its turns from different weights; use reward.scorer=fold, or rollout.max_staleness=0"
        )
    if rollout.close_at is None:
        return
    if rollout.close_at > rollout.samples_per_prompt:
        yield (
            f"rollout.close_at={rollout.close_at} is more than rollout.samples_per_prompt={rollout.samples_per_prompt}; "
            "use at most that many, or null to wait for all"
        )
    if not isinstance(rollout.branching, NoBranching):
        yield (
            f"rollout.close_at gives up independent samples, but rollout.branching.name={rollout.branching.name} grows a tree, whose "
            "branches depend on all of them; set rollout.close_at to null"
        )


def _gain_branching(config: Config) -> Iterator[str]:
    found = []
    if not isinstance(config.advantage, Igpo | IgpoLoo):
        found.append(f"advantage.name={config.advantage.name}, which has no probes")
    elif config.reward.gain == "none":
        found.append("reward.gain=none")
    if config.reward.scorer != "engine":
        found.append(f"reward.scorer={config.reward.scorer}, which scores after the rollout")
    if found:
        yield (
            f"rollout.branching.name=gain decides by probes during the rollout; found {' and '.join(found)}; set reward.scorer=engine with "
            "advantage.name=igpo or igpo_loo, or another rollout.branching.name"
        )


def check_replay_of_successes(config: Config) -> Iterator[str]:
    """Earlier successes can take a sample's place."""
    if not config.rollout.replay_successes:
        return
    if not isinstance(config.rollout.branching, NoBranching):
        yield (
            f"rollout.replay_successes={config.rollout.replay_successes} replaces single samples, rollout.branching.name="
            f"{config.rollout.branching.name} makes them share turns; use one of them"
        )
    if config.reward.scorer == "engine":
        yield (
            f"rollout.replay_successes={config.rollout.replay_successes} brings samples that no engine has scored probes of in this step; "
            "use reward.scorer=fold"
        )


def check_bonus(config: Config) -> Iterator[str]:
    """The tool bonus can be earned."""
    if config.reward.tool_bonus and needs_engines(config) and "python" not in config.rollout.extra_tools:
        yield (
            f"reward.tool_bonus={config.reward.tool_bonus:g} is for trajectories that search and run python, rollout.extra_tools="
            f"{list(config.rollout.extra_tools)} offers no python; add it, or set reward.tool_bonus=0"
        )


def _engine_scorer(config: Config) -> Iterator[str]:
    if config.run.replay is not None:
        yield "reward.scorer=engine needs engines, run.replay starts none; use reward.scorer=fold"
    if config.reward.probe_temperature == "sampling" and config.rollout.temperature != 1:
        yield (
            "reward.scorer=engine scores at temperature 1, the only one at which vLLM does, reward.probe_temperature=sampling asks for "
            f"rollout.temperature={config.rollout.temperature:g}; use reward.scorer=fold, or reward.probe_temperature=1"
        )
    if config.reward.evidence:
        yield "reward.evidence=true hides tool results in the trainer's pass; use reward.scorer=fold"


def check_schedule(config: Config) -> Iterator[str]:
    """Batches, learning rate and evaluation make sense for so many steps."""
    optim, steps = config.optim, config.run.steps
    if optim.minibatches > config.rollout.prompts_per_step:
        yield (
            f"optim.minibatches={optim.minibatches} is more than rollout.prompts_per_step={config.rollout.prompts_per_step}: "
            "each optimizer step needs at least one question"
        )
    rollout = config.rollout
    if needs_engines(config) and config.packing.row_tokens < rollout.max_tokens_per_turn:
        yield (
            f"packing.row_tokens={config.packing.row_tokens} is less than one turn "
            f"(rollout.max_tokens_per_turn={rollout.max_tokens_per_turn}), so turns could not share a row; use a few turns' worth"
        )
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr} is above optim.lr={optim.lr}"
    if optim.warmup_steps > steps:
        yield f"optim.warmup_steps={optim.warmup_steps} is more than run.steps={steps}; the peak would never be reached"
    elif optim.warmup_steps == steps and optim.decay != "constant":
        yield f"optim.warmup_steps={steps} is all of run.steps, which leaves none for optim.decay={optim.decay}; warm up for fewer"
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas={list(optim.betas)}: expected two numbers from 0 up to, not including, 1"
    if evaluates(config) and not config.eval.samples and not config.eval.greedy:
        yield "eval.samples=0 and eval.greedy=false leave nothing to evaluate; set one of them"
