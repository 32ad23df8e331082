"""Train a policy: the table of contents of the project. Every rank runs this file (torchrun -m igpo_megatron.train CONFIG.yaml).

    questions ──rollout──> groups ──score──> rewards, gains ──advantage──> turn advantages ──train──> weights ──sync──> engines

The main rank talks to engines, files and people; all ranks score and train. They meet in `parallel.broadcast`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpo_megatron import evaluate
from igpo_megatron.algorithms import ADVANTAGES
from igpo_megatron.algorithms.info_gain import add_probes, rendered_probes, turn_gains
from igpo_megatron.algorithms.outcome_advantages import GREEDY_REWARD
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.algorithms.tree_advantages import entropy_stats
from igpo_megatron.config.check import require
from igpo_megatron.config.load import ConfigError, load
from igpo_megatron.config.schema import Aepo, Bapo, Config, Loss, PolicyLoss, Ppo
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.observability.metrics import logprob_gap, rollout_metrics
from igpo_megatron.observability.rollout_dump import read_rollouts, write_rollouts
from igpo_megatron.observability.tracker import Tracker, read_metrics
from igpo_megatron.protocols import PROTOCOLS
from igpo_megatron.run import RunFolder, claim, open_folder, summary_table
from igpo_megatron.types import Prompt, RolloutGroup, RunStopped

if TYPE_CHECKING:
    from igpo_megatron.actor.policy import Policy
    from igpo_megatron.packing.tree import PackedRow
    from igpo_megatron.rollout.chat import ChatFormat
    from igpo_megatron.rollout.engines import EnginePool
    from igpo_megatron.rollout.rollouter import Rollouter

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Side:
    """What only the main rank has; on the other ranks every field is None."""

    folder: RunFolder
    stream: PromptStream | None = None
    chat: ChatFormat | None = None
    engines: EnginePool | None = None
    rollouter: Rollouter | None = None
    replay: Iterator[list[RolloutGroup]] | None = None
    held_out: list[Prompt] = field(default_factory=list)


def train(config: Config, policy: Policy, side: Side, tracker: Tracker, first_step: int) -> None:
    """The training loop: every line is a stage of the picture above."""
    from igpo_megatron.actor import checkpoint, parallel

    main = policy.ranks.is_main
    if config.run.replay is None:
        with tracker.phase("sync"):
            sync_weights(policy, side, version=first_step - 1)
        if first_step == 1:
            parallel.on_main(policy.ranks, partial(evaluate_now, config, side, tracker, step=0, due=config.eval.at_ends))
    for step in range(first_step, config.run.steps + 1):
        started = time.monotonic()
        with tracker.phase("rollout"):
            groups = parallel.broadcast(parallel.on_main(policy.ranks, partial(collect, config, side, tracker, step)))
        metrics = rollout_metrics(groups, config.rollout.tool_name)
        if config.run.stop_after == "none":
            if isinstance(config.loss, PolicyLoss):
                with tracker.phase("score"):
                    score_tokens(policy, groups)
                with tracker.phase("advantage"):
                    assign_advantages(groups, config, progress=(step - 1) / max(config.run.steps - 1, 1))
                metrics = rollout_metrics(groups, config.rollout.tool_name) | logprob_gap(groups)
            with tracker.phase("train"):
                metrics |= update(policy, groups)
            if config.run.replay is None:
                with tracker.phase("sync"):
                    metrics |= sync_weights(policy, side, version=step)
        if main and config.track.dump_every and (step % config.track.dump_every == 0 or config.run.stop_after == "rollout"):
            with tracker.phase("rollout"):
                write_rollouts(side.folder.rollouts / f"step_{step:06d}.parquet", step, groups)
        if side.rollouter is not None:
            metrics |= side.rollouter.tool_metrics()
        metrics["tokens_per_s"] = sum(len(node.token_ids) for group in groups for node in group.nodes) / (time.monotonic() - started)
        tracker.log(step, metrics)
        last = step == config.run.steps
        if config.run.replay is None and config.run.stop_after == "none":
            due = (last and config.eval.at_ends) or _every(config.eval.every, step)
            parallel.on_main(policy.ranks, partial(evaluate_now, config, side, tracker, step=step, due=due))
        if config.run.stop_after == "none" and (last or _every(config.checkpoint.every, step)):
            with tracker.phase("checkpoint"):
                state = parallel.broadcast({"prompts": side.stream.state() if side.stream else None} if main else None)
                checkpoint.save(policy, side.folder.checkpoints, step, state, config.checkpoint.keep)
        tracker.log(step, {})


def collect(config: Config, side: Side, tracker: Tracker, step: int) -> list[RolloutGroup]:
    """This step's trajectories with rewards and probes, from the engines or from a replay file."""
    if side.replay is not None:
        groups = next(side.replay)
        if isinstance(config.loss, PolicyLoss):
            _score_all(groups, config)
    else:
        groups = roll_out(config, side, tracker, step)
    if isinstance(config.loss, PolicyLoss) and ADVANTAGES[config.advantage.name].needs_probes:
        assert side.chat is not None
        for group in groups:
            add_probes(group, side.chat.render_probe, config.reward, side.chat.render_hidden_probe)
    return groups


def roll_out(config: Config, side: Side, tracker: Tracker, step: int) -> list[RolloutGroup]:
    """New trajectories with their rewards; with `rollout.resample` groups of equal rewards are replaced (DAPO, arXiv 2503.14476)."""
    assert side.stream is not None and side.rollouter is not None
    sample = partial(side.rollouter.run_sync, step=step, on_progress=tracker.progress)
    wanted = config.rollout.prompts_per_step
    kept: list[RolloutGroup] = []
    spare: list[RolloutGroup] = []
    for _ in range(1 + config.rollout.resample):
        prompts = side.stream.next(wanted)
        groups = sample(prompts, samples=config.rollout.samples_per_prompt, temperature=None, probe=True, branch=True)
        _score_all(groups, config)
        replaceable = [config.rollout.resample > 0 and has_equal_rewards(group) for group in groups]
        kept += [group for group, equal in zip(groups, replaceable, strict=True) if not equal]
        spare += [group for group, equal in zip(groups, replaceable, strict=True) if equal]
        if len(kept) >= wanted:
            break
    groups = [*kept, *spare][:wanted]
    if ADVANTAGES[config.advantage.name].needs_greedy:
        greedy = sample([group.prompt for group in groups], samples=1, temperature=0.0)
        _score_all(greedy, config)
        for group, baseline in zip(groups, greedy, strict=True):
            (trajectory,) = baseline.trajectories
            group.metrics[GREEDY_REWARD] = trajectory.reward if trajectory.status.is_trainable else math.nan
    return groups


def has_equal_rewards(group: RolloutGroup) -> bool:
    """No trainable trajectory did better than another, so outcomes teach nothing."""
    return len({trajectory.reward for trajectory in group.trajectories if trajectory.status.is_trainable}) < 2


def _score_all(groups: Sequence[RolloutGroup], config: Config) -> None:
    for group in groups:
        score(group, config.reward, PROTOCOLS[config.rollout.protocol])


def score_tokens(policy: Policy, groups: Sequence[RolloutGroup]) -> None:
    """Fill old (and reference) log-probs of every action and probe token that has none yet."""
    from igpo_megatron.packing.tree import pack_for_scoring, scatter

    config = policy.config
    pack = partial(pack_for_scoring, groups, row_tokens=config.packing.row_tokens, multiple=policy.row_multiple)
    if takes_engine_logprobs(config):
        for group in groups:
            for node in group.nodes:
                if node.kind == "action":
                    node.old_logprobs = list(node.behavior_logprobs)
    elif rows := pack(scorer=config.reward.scorer):  # there are none where every trajectory failed and that was allowed
        if isinstance(config.loss, PolicyLoss) and config.loss.uses_old_entropies:
            pairs = policy.log_probs(rows, with_entropy=True)
            scatter(rows, [pair[:, 0] for pair in pairs], groups, "old_logprobs")
            scatter(rows, [pair[:, 1] for pair in pairs], groups, "old_entropies")
        else:
            scatter(rows, policy.log_probs(rows), groups, "old_logprobs")
    if policy.has_reference and (rows := pack(scorer=None)):
        with policy.as_reference():
            scatter(rows, policy.log_probs(rows), groups, "ref_logprobs")


def takes_engine_logprobs(config: Config) -> bool:
    """No old-log-prob pass is run."""
    return isinstance(config.loss, PolicyLoss) and config.loss.old_logprobs == "engine"


def assign_advantages(groups: Sequence[RolloutGroup], config: Config, progress: float) -> None:
    """Turn gains from the probes' log-probs, then the chosen advantage."""
    advantage = ADVANTAGES[config.advantage.name]
    for group in groups:
        if advantage.needs_probes:
            turn_gains(group, config.reward)
        advantage.function(group, config.advantage, progress)
    if advantage.over_batch:
        advantage.over_batch(groups)


def update(policy: Policy, groups: list[RolloutGroup]) -> dict[str, float]:
    """`optim.minibatches` optimizer steps over the groups; returns their mean metrics. A part without trainable tokens is skipped."""
    from igpo_megatron.actor.policy import learning_rate
    from igpo_megatron.algorithms.losses import LOSSES, aggregation_of, token_weight
    from igpo_megatron.packing.tree import pack_for_training, step_counts

    config = policy.config
    refuse_shared_turns(groups, config.loss)
    per_minibatch = -(-len(groups) // config.optim.minibatches)
    rate = learning_rate(policy.steps_taken, policy.total_steps, config.optim)
    results, empty = [], 0
    for start in range(0, len(groups), per_minibatch):
        part = groups[start : start + per_minibatch]
        counts = step_counts(part)
        if not counts.trained_tokens:
            empty += 1
            continue
        rows = pack_for_training(
            part,
            row_tokens=config.packing.row_tokens,
            multiple=policy.row_multiple,
            token_weight=partial(token_weight, aggregation_of(config.loss)),
        )
        if isinstance(config.loss, Aepo) and config.loss.uses_old_entropies:
            counts = replace(counts, entropy=entropy_stats(part, config.loss.high_entropy_share))
        settings = balance_bounds(policy, rows, config.loss) if isinstance(config.loss, Bapo) else config.loss
        loss = partial(LOSSES[config.loss.name], counts=counts, config=settings)
        results.append(policy.train_step(rows, partial(_row_loss, loss, config.loss, policy.has_reference)))
    metrics = {"skipped": float(empty + sum(result.skipped for result in results)), "lr": rate}
    if not results:
        return metrics
    metrics["loss"] = sum(result.loss for result in results) / len(results)
    metrics["grad_norm"] = sum(result.grad_norm for result in results) / len(results)
    tokens = sum(result.metrics["tokens"] for result in results)
    names = {"clipped": "clip_fraction", "approx_kl": "kl_old", "ref_kl": "kl_ref", "entropy": "entropy", "nll": "nll"}
    for name, shown in names.items():
        if name in results[0].metrics:
            metrics[shown] = sum(result.metrics[name] for result in results) / max(tokens, 1.0)
    return metrics


def balance_bounds(policy: Policy, rows: Sequence[PackedRow], config: Bapo) -> Ppo:
    """BAPO's bounds from the ratios of the whole optimizer step, so that packing cannot change them; one more forward pass."""
    from igpo_megatron.algorithms.losses import balanced_clip

    log_ratios = [now - row.old_logprobs for now, row in zip(policy.log_probs(rows), rows, strict=True)]
    return balanced_clip(log_ratios, [row.advantages for row in rows], config)


def refuse_shared_turns(groups: Sequence[RolloutGroup], loss: Loss) -> None:
    """Raise ValueError where a loss on whole sequences meets trajectories that share sampled tokens."""
    if not isinstance(loss, PolicyLoss):
        return
    by_mismatch = loss.mismatch == "mask_sequence"
    if (loss.sequence_level or by_mismatch) and any(group.is_branched for group in groups):
        setting = "loss.mismatch=mask_sequence" if by_mismatch else f"loss.name={loss.name}"
        raise ValueError(
            f"{setting} judges whole trajectories, but trajectories of this step share sampled turns; "
            "use a loss on tokens such as loss.name=ppo, or rollouts without branches"
        )


def _row_loss(loss: Callable[..., Any], config: Loss, with_reference: bool, row: PackedRow, logprobs: Any, entropy: Any) -> Any:
    from igpo_megatron.algorithms.losses import mismatch_factor

    advantages = row.advantages
    if isinstance(config, PolicyLoss) and config.mismatch != "none":
        advantages = advantages * mismatch_factor(row.old_logprobs, row.behavior_logprobs, row.sequence, config)[:, None]
    return loss(
        logprobs=logprobs,
        entropy=entropy,
        old_logprobs=row.old_logprobs,
        ref_logprobs=row.ref_logprobs if with_reference else None,
        advantages=advantages,
        weight=row.weight,
        **({"sequence": row.sequence} if isinstance(config, PolicyLoss) and config.sequence_level else {}),
        **({"old_entropies": row.old_entropies} if isinstance(config, Aepo) and config.uses_old_entropies else {}),
    )


def sync_weights(policy: Policy, side: Side, version: int) -> dict[str, float]:
    """Send the weights to the engines and prove by the canary that they arrived."""
    from igpo_megatron.actor import parallel, weight_sync

    config = policy.config
    weight_sync.push(policy, side.engines, version)
    canary = weight_sync.canary_group(policy.shape.vocab_size, config.sync.canary_tokens, seed=config.run.seed)
    expected = weight_sync.canary_logprobs(policy, canary)

    def compare() -> dict[str, float]:
        assert side.engines is not None
        served = [scores[1:] for scores in side.engines.score_on_each(canary.context(1))]
        return {"canary_gap": weight_sync.check_canary(expected, served, config.sync.max_gap, version)}

    return parallel.on_main(policy.ranks, compare) or {}


def evaluate_now(config: Config, side: Side, tracker: Tracker, step: int, due: bool) -> None:
    """Evaluate on the held-out questions if it is due and was not done before an interruption."""
    if not due or side.rollouter is None or (side.folder.eval / f"step_{step:06d}.json").is_file():
        return
    with tracker.phase("eval"):
        report = evaluate.evaluate(side.rollouter, side.held_out, config, step=step, folder=side.folder.eval, on_progress=tracker.progress)
    tracker.log(
        step,
        {
            f"eval/{run}/{name}": value
            for run in ("sampled", "greedy")
            for name, value in report.get(run, {}).items()
            if isinstance(value, float)
        },
    )


def engine_scores(config: Config) -> bool:
    """Probes are scored by the engines during the rollout."""
    wanted = isinstance(config.loss, PolicyLoss) and ADVANTAGES[config.advantage.name].needs_probes and config.reward.gain != "none"
    return wanted and config.reward.scorer == "engine"


def replayed(path: Path, config: Config, first_step: int) -> Iterator[list[RolloutGroup]]:
    """Groups of each step from `first_step` on: recorded steps whole, demonstrations by `prompts_per_step`, over and over."""
    size = config.rollout.prompts_per_step if config.loss.name == "sft" else None

    def endless() -> Iterator[list[RolloutGroup]]:
        while True:
            for _, groups in read_rollouts(path, size):
                yield groups

    return islice(endless(), first_step - 1, None)


def finish(config: Config, side: Side, tracker: Tracker) -> None:
    """Write summary and report, and print the table."""
    from igpo_megatron.report import write_report

    rows = read_metrics(side.folder.root / "metrics.jsonl")
    ends = {}
    for name, step in (("before", 0), ("after", config.run.steps)):
        path = side.folder.eval / f"step_{step:06d}.json"
        ends[name] = evaluate.headline(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    phases = tracker.phases_total()
    gaps = [row[name] for row in rows for name in ("logprob_gap_max", "canary_gap") if row.get(name) is not None]
    summary = {
        **ends,
        "steps": config.run.steps,
        "wall_s": round(sum(phases.values()), 1),
        "phases_s": {name: round(seconds, 1) for name, seconds in phases.items()},
        "max_logprob_gap": max(gaps, default=0.0),
        "gain_by_turn": gain_by_turn(rows),
    }
    side.folder.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    report = write_report(side.folder.root)
    tracker.close()
    show_finished(summary, report)


def gain_by_turn(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean gain of each turn over the first and the last five steps."""
    result = []
    for turn in range(1, 100):
        values = [row[f"gain_turn_{turn}"] for row in rows if row.get(f"gain_turn_{turn}") is not None]
        if not values:
            break
        first, last = values[:5], values[-5:]
        result.append({"first": sum(first) / len(first), "last": sum(last) / len(last)})
    return result


def show_finished(summary: dict[str, Any], report: Path) -> None:
    """The table at the end of a run, and where to look next."""
    from rich.console import Console

    console = Console()
    console.print(summary_table(summary))
    console.print(f"report: {report}", soft_wrap=True)


def open_side(config: Config, folder: RunFolder, stack: ExitStack, tracker: Tracker, first_step: int, state: dict[str, Any] | None) -> Side:
    """Start what the main rank needs: question stream, chat format, engines, search."""
    side = Side(folder)
    needs_chat = isinstance(config.loss, PolicyLoss)
    if needs_chat:
        from transformers import AutoTokenizer

        from igpo_megatron.rollout.chat import ChatFormat

        side.chat = ChatFormat(AutoTokenizer.from_pretrained(config.model.path), config.rollout, config.reward)
    if config.run.replay is not None:
        side.replay = replayed(config.run.replay, config, first_step)
        return side
    from igpo_megatron.rollout.engines import EnginePool
    from igpo_megatron.rollout.rollouter import Rollouter
    from igpo_megatron.search.client import make_client
    from igpo_megatron.search.tools import make_tools

    assert side.chat is not None
    # What can be wrong with the user's files shows before an engine is started.
    side.stream = PromptStream(config.data.train, seed=config.run.seed, shuffle=config.data.shuffle, balance=config.data.balance)
    if state and state["prompts"]:
        side.stream.load_state(state["prompts"])
    side.held_out = evaluate.questions(config)
    search = make_client(config.search)
    tools = make_tools(config, side.chat.count_tokens)
    tracker.progress("starting rollout engines")
    side.engines = stack.enter_context(EnginePool(config))
    probes_of = partial(rendered_probes, render_probe=side.chat.render_probe, config=config.reward) if engine_scores(config) else None
    side.rollouter = stack.enter_context(
        Rollouter(side.engines, search, side.chat, config.rollout, seed=config.run.seed, probes_of=probes_of, tools=tools)
    )
    return side


def run(config: Config) -> None:
    """One rank's whole run: start, resume, train, finish."""
    from igpo_megatron.actor import checkpoint, parallel
    from igpo_megatron.actor.policy import Policy

    ranks = parallel.init(config)
    folder = open_folder(config)
    saved = parallel.broadcast(checkpoint.complete(folder.checkpoints) if ranks.is_main else None)
    resumed = int(saved[-1].name.removeprefix("step_")) if saved else 0
    with ExitStack() as stack:
        tracker = stack.enter_context(
            Tracker(
                folder.root, config.track, name=config.run.name, total_steps=config.run.steps, resumed_step=resumed, quiet=not ranks.is_main
            )
        )
        if ranks.is_main:
            stack.enter_context(tracker.shows_log("igpo_megatron"))
        with tracker.phase("startup"):
            policy = Policy(config, ranks)
            state = None
            if saved:
                tracker.message(f"resuming from {saved[-1]}")
                _, state = checkpoint.load(policy, saved[-1])
            opening = partial(open_side, config, folder, stack, tracker, resumed + 1, state)
            side = parallel.on_main(ranks, opening) or Side(folder)
            if ranks.is_main:
                claim(folder, config)  # not before: a run that could not start leaves its name free for corrected settings
        train(config, policy, side, tracker, resumed + 1)
        if ranks.is_main:
            finish(config, side, tracker)
    parallel.shutdown()


def _every(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0


def main(arguments: Sequence[str]) -> int:
    """`CONFIG.yaml [section.key=value ...]` on every rank; the exit code: 0 finished, 2 for a mistake of the user's."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    if not arguments:
        sys.stderr.write("usage: python -m igpo_megatron.train CONFIG.yaml [section.key=value ...]\n")
        return 2
    try:
        config = load(arguments[0], arguments[1:])
        require(config, int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        run(config)
    except (ConfigError, ValueError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            sys.stderr.write(f"error: {error}\n")
        return 2
    except RunStopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            sys.stderr.write(f"stopped: {stop}\nthe same command resumes from the last checkpoint\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
