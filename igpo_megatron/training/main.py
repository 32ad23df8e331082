"""Train a policy: the table of contents of the project. Every rank runs this file (torchrun -m igpo_megatron.training.main CONFIG.yaml).

    questions ──rollout──> groups ──score──> rewards, gains ──advantage──> turn advantages ──train──> weights ──sync──> engines

The main rank talks to engines, files and people, and has the groups; all ranks score and train the rows that it sends them.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpo_megatron.algorithms.advantages.registry import ADVANTAGES
from igpo_megatron.algorithms.info_gain import add_probes, rendered_probes
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.algorithms.settings import PolicyLoss
from igpo_megatron.chat.protocols.registry import PROTOCOLS
from igpo_megatron.config.checks import require
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.observability.memory import MemoryLedger, worst_rank
from igpo_megatron.observability.metrics import logprob_gap, rollout_metrics
from igpo_megatron.observability.rollout_dump import read_rollouts, write_rollouts
from igpo_megatron.observability.run_folder import RunFolder, claim, folder_for, forget_after, held, open_folder
from igpo_megatron.observability.summary import finish
from igpo_megatron.observability.tracker import Tracker
from igpo_megatron.supervision.endings import Ended, end_process, ending_of, interruptible, leave, reason_left, signals_restored
from igpo_megatron.supervision.leftovers import end_with_parent
from igpo_megatron.supervision.waits import ROLLOUTS, recording, waiting
from igpo_megatron.training import evaluate
from igpo_megatron.training.device_share import DeviceShare
from igpo_megatron.training.queue import RolloutQueue, staleness_metrics
from igpo_megatron.training.step import assign_advantages, routing_metrics, score_tokens, update
from igpo_megatron.types import Prompt, RolloutGroup, UserError

if TYPE_CHECKING:
    from igpo_megatron.agent.rollouter import Rollouter
    from igpo_megatron.chat.format import ChatFormat
    from igpo_megatron.engines.api import EngineService
    from igpo_megatron.policy.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Side:
    """What only the main rank has; on the other ranks every field is None."""

    folder: RunFolder
    chat: ChatFormat | None = None
    engines: EngineService | None = None
    rollouter: Rollouter | None = None
    queue: RolloutQueue | None = None
    replay: Iterator[list[RolloutGroup]] | None = None
    held_out: list[Prompt] = field(default_factory=list)


def train(config: Config, policy: Policy, side: Side, tracker: Tracker, share: DeviceShare, first_step: int) -> None:
    """The training loop: every line is a stage of the picture above."""
    from igpo_megatron.policy import checkpoint, parallel

    serves, learns = config.run.replay is None, config.run.stop_after == "none"
    if serves:
        share.policy_returns(side.engines)
        tracker.log(first_step - 1, sync_weights(policy, side, tracker, share, version=first_step - 1))
        parallel.on_main(policy.ranks, partial(evaluate_if_due, config, side, tracker, step=first_step - 1))
    for step in range(first_step, config.run.steps + 1):
        started = time.monotonic()
        with tracker.phase("rollout"):
            groups = parallel.on_main(policy.ranks, partial(collect, config, side, step)) or []
        if learns:
            share.policy_returns(side.engines)
            metrics = learn(policy, groups, tracker, step)
        else:
            metrics = rollout_metrics(groups, config.rollout.tool_name)
        if policy.ranks.is_main and config.track.dump_every and (step % config.track.dump_every == 0 or not learns):
            with tracker.phase("rollout"):
                write_rollouts(side.folder.rollouts / f"step_{step:06d}.parquet", step, groups)
        if side.queue is not None:
            metrics |= side.queue.done(step)
        metrics["tokens_per_s"] = sum(len(node.token_ids) for group in groups for node in group.nodes) / (time.monotonic() - started)
        tracker.log(step, metrics | worst_rank(parallel.gather(tracker.memory())))
        if learns and (step == config.run.steps or _every(config.checkpoint.every, step)):
            with tracker.phase("checkpoint"):  # before the weights leave: a policy that shares its device leaves with them
                state = parallel.broadcast(queue_state(side.queue))
                checkpoint.save(policy, side.folder.checkpoints, step, state, config.checkpoint.keep)
        if learns and serves:
            tracker.log(step, sync_weights(policy, side, tracker, share, version=step))
            parallel.on_main(policy.ranks, partial(evaluate_if_due, config, side, tracker, step=step))
        if learns:
            checkpoint.finish(policy, wait=step == config.run.steps)
        tracker.log(step, {})


def learn(policy: Policy, groups: list[RolloutGroup], tracker: Tracker, step: int) -> dict[str, float]:
    """One step's learning; its metrics, those of the groups with their gains among them."""
    config = policy.config
    routing: dict[str, float] = {}
    if isinstance(config.loss, PolicyLoss):
        with tracker.phase("score"):
            score_tokens(policy, groups)
            routing = routing_metrics(policy, groups, step)
        with tracker.phase("advantage"):
            assign_advantages(groups, config, progress=(step - 1) / max(config.run.steps - 1, 1))
    metrics = rollout_metrics(groups, config.rollout.tool_name)
    if config.run.replay is None:
        metrics |= staleness_metrics(groups, step)
    metrics |= logprob_gap(groups, step - 1 if config.run.replay is None else None) | routing
    with tracker.phase("train"):
        return metrics | update(policy, groups)


def queue_state(queue: RolloutQueue | None) -> dict[str, Any]:
    """What a checkpoint keeps of the questions and of the successes to be replayed; None where rollouts are replayed from a file."""
    return {"prompts": queue.state() if queue else None, "successes": queue.successes.state() if queue else None}


def collect(config: Config, side: Side, step: int) -> list[RolloutGroup]:
    """This step's trajectories with rewards and probes, from the engines or from a replay file."""
    if side.replay is not None:
        groups = next(side.replay)
        if isinstance(config.loss, PolicyLoss):
            for group in groups:
                score(group, config.reward, PROTOCOLS[config.rollout.protocol], config.rollout.tool_name)
    else:
        assert side.queue is not None
        with waiting(f"the groups of step {step}", on=ROLLOUTS, deadline_s=config.parallel.timeout_s):
            groups = side.queue.take(step)
    if isinstance(config.loss, PolicyLoss) and ADVANTAGES[config.advantage.name].needs_probes:
        assert side.chat is not None
        for group in groups:
            add_probes(group, side.chat.render_probe, config.reward, side.chat.render_hidden_probe)
    return groups


def sync_weights(policy: Policy, side: Side, tracker: Tracker, share: DeviceShare, version: int) -> dict[str, float]:
    """Send the weights to the engines, which serve them once fingerprints and canary have proved that they arrived."""
    from igpo_megatron.policy import weight_sync

    config = policy.config
    with tracker.phase("sync"):
        canary = weight_sync.make_canary(policy, config.sync.canary_tokens, seed=config.run.seed, max_gap=config.sync.max_gap)
        metrics = weight_sync.push(policy, side.engines, version, canary, exported=share.policy_leaves)
    if side.queue is not None:
        side.queue.weights_arrived(version)
    return metrics


def evaluate_if_due(config: Config, side: Side, tracker: Tracker, step: int) -> None:
    """Evaluate on the held-out questions behind `step`, if that is due and was not done before an interruption."""
    at_end = step in (0, config.run.steps) and config.eval.at_ends
    due = at_end or (step > 0 and _every(config.eval.every, step))
    if not due or side.rollouter is None or (side.folder.eval / f"step_{step:06d}.json").is_file():
        return
    with tracker.phase("eval"):
        report = evaluate.evaluate(side.rollouter, side.held_out, config, step=step, folder=side.folder.eval, on_progress=tracker.progress)
    tracker.log(step, evaluate.metrics(report))


def engine_scores(config: Config) -> bool:
    """Probes are scored by the engines during the rollout."""
    wanted = isinstance(config.loss, PolicyLoss) and ADVANTAGES[config.advantage.name].needs_probes and config.reward.gain != "none"
    return wanted and config.reward.scorer == "engine"


def replayed(path: Path, config: Config, first_step: int, vocab_size: int | None = None) -> Iterator[list[RolloutGroup]]:
    """Groups of each step from `first_step` on: recorded steps whole, demonstrations by `prompts_per_step`, over and over.

    `vocab_size`: tokens that engines can sample. Raises UserError on the way where others were.
    """
    size = config.rollout.prompts_per_step if config.loss.name == "sft" else None

    def endless() -> Iterator[list[RolloutGroup]]:
        while True:
            for _, groups in read_rollouts(path, size):
                sampled = (token for group in groups for node in group.nodes if node.kind == "action" for token in node.token_ids)
                if vocab_size is not None and (last := max(sampled, default=0)) >= vocab_size:
                    raise UserError(
                        f"{path}: token {last} was sampled, the model's tokenizer ends at {vocab_size - 1}; record the step again"
                    )
                yield groups

    return islice(endless(), first_step - 1, None)


def open_side(config: Config, folder: RunFolder, stack: ExitStack, tracker: Tracker, first_step: int, state: dict[str, Any] | None) -> Side:
    """Start what the main rank needs: question stream, chat format, engines, search."""
    side = Side(folder)
    needs_chat = isinstance(config.loss, PolicyLoss)
    if needs_chat:
        from igpo_megatron.chat.format import ChatFormat
        from igpo_megatron.chat.tokenizer import load_tokenizer

        side.chat = ChatFormat(load_tokenizer(config.model.path), config.rollout, config.reward)
        for note in side.chat.notes:
            logger.warning(note)
    if config.run.replay is not None:
        side.replay = replayed(config.run.replay, config, first_step, side.chat.vocab_size if side.chat else None)
        return side
    from igpo_megatron.agent.rollouter import Rollouter
    from igpo_megatron.chat.room import too_long
    from igpo_megatron.engines.factory import open_engines
    from igpo_megatron.search.client import make_client
    from igpo_megatron.tools.factory import make_tools

    assert side.chat is not None
    # What can be wrong with the user's files shows before an engine is started.
    stream = PromptStream(
        config.data.train,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        balance=config.data.balance,
        layout=config.data.layout,
        outcome=config.reward.outcome,
    )
    if state and state["prompts"]:
        stream.load_state(state["prompts"])
    side.held_out = evaluate.questions(config)
    search = make_client(config.search)
    tools = make_tools(config, side.chat.count_tokens)
    tracker.progress("starting rollout engines")
    with waiting("the engines to start", on=config.rollout.engine.backend):
        side.engines = stack.enter_context(open_engines(config))
    probes_of = partial(rendered_probes, render_probe=side.chat.render_probe, config=config.reward) if engine_scores(config) else None
    side.rollouter = stack.enter_context(
        Rollouter(
            side.engines,
            search,
            side.chat,
            config.rollout,
            seed=config.run.seed,
            probes_of=probes_of,
            tools=tools,
            crashes=folder.crashes,
        )
    )
    # A tokenizer serves one thread at a time, and questions are drawn while rollouts use theirs.
    chat = copy.deepcopy(side.chat)
    side.queue = RolloutQueue(
        config,
        stream,
        side.rollouter,
        first_step=first_step,
        on_progress=tracker.progress,
        too_long=partial(too_long, chat=chat, config=config.rollout),
    )
    if state and state.get("successes"):  # absent from checkpoints written before successes were replayed
        side.queue.successes.load_state(state["successes"])
    return side


def run(config: Config) -> None:
    """One rank's whole run: start, resume, train, finish. What ends it early raises `Ended`, when all that was open is closed."""
    from igpo_megatron.policy import checkpoint, checkpoint_sums, parallel
    from igpo_megatron.policy.policy import Policy

    ranks = parallel.init(config)
    folder, who = open_folder(config), f"rank {ranks.rank}"
    with signals_restored(), ExitStack() as stack, reason_left(who, folder.root), interruptible() if ranks.is_main else nullcontext():
        if ranks.is_main:
            stack.enter_context(held(folder))
        found = checkpoint_sums.newest_whole(folder.checkpoints)
        damaged = parallel.on_main(ranks, partial(checkpoint_sums.set_aside, found))
        resumed = int(found.folder.name.removeprefix("step_")) if found.folder else 0
        stack.enter_context(recording(who, folder.root / "waits", last_words=lambda expired: leave(ending_of(expired, who, None))))
        tracker = stack.enter_context(
            Tracker(
                folder.root,
                config.track,
                name=config.run.name,
                total_steps=config.run.steps,
                resumed_step=resumed,
                quiet=not ranks.is_main,
                memory=MemoryLedger(partial(parallel.memory_in_use, ranks.device), config.placement.leak_mib),
            )
        )
        if ranks.is_main:
            stack.enter_context(tracker.shows_log("igpo_megatron"))
        with tracker.phase("startup"):
            policy = Policy(config, ranks)
            share = DeviceShare(config, policy)
            state = None
            for sentence in damaged or ():
                tracker.message(sentence)
            if found.folder:
                tracker.message(f"resuming from {found.folder}")
                _, state = checkpoint.load(policy, found.folder)
            share.policy_leaves()
            opening = partial(open_side, config, folder, stack, tracker, resumed + 1, state)
            side = parallel.on_main(ranks, opening) or Side(folder)
            policy.sampled_vocab = parallel.broadcast(side.chat.vocab_size if side.chat else None)
            if ranks.is_main:
                claim(folder, config)  # not before: a run that could not start leaves its name free for corrected settings
                if config.run.stop_after == "none":
                    forget_after(folder, resumed)
        train(config, policy, side, tracker, share, resumed + 1)
        if ranks.is_main:
            finish(config, folder, tracker)
    parallel.shutdown()


def _every(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0


def main(arguments: Sequence[str]) -> int:
    """`CONFIG.yaml [section.key=value ...]` on every rank; the exit code (see endings.py): 0 finished, 2 for a mistake of the user's."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    if not arguments:
        sys.stderr.write("usage: python -m igpo_megatron.training.main CONFIG.yaml [section.key=value ...]\n")
        return 2
    from igpo_megatron.policy.parallel import on_this_machine

    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # torchrun's agent: without it nobody would notice how this rank ends
    who = f"rank {os.environ.get('RANK', 0)}"
    try:
        with reason_left(who, None):
            config = load(arguments[0], arguments[1:])
        with reason_left(who, folder_for(config).root):
            require(on_this_machine(config), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            run(config)
    except Ended as end:
        return end.ending.code
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
