"""What a run opens before its first step and uses in every step: policy and files on all ranks, engines and questions on the main rank.

opened(config) ──> Session ──> collect ──> groups;   sync_weights ──> engines;   evaluate_if_due ──> scores

While the ranks import Megatron and build the policy, the engines start in processes of their own:

    main rank    files ── Ray ── policy ── checkpoint ┐
    other ranks  policy ───────────────── checkpoint ┼── first sync
    engines                 start, load the model ───┘
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpo_megatron.algorithms.info_gain import add_probes, rendered_probes
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.config.schema import Config
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.observability.memory_ledger import MemoryLedger
from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.observability.run_folder import RunFolder, begun_dtype, forget_after, held, open_folder, set_up, step_name, step_of
from igpo_megatron.observability.summary import finish
from igpo_megatron.observability.tracker import Tracker
from igpo_megatron.supervision.endings import ending_of, interruptible, leave, reason_left, signals_restored
from igpo_megatron.supervision.waits import ROLLOUTS, recording, waiting
from igpo_megatron.training import evaluate
from igpo_megatron.training.device_share import DeviceShare
from igpo_megatron.training.queue import RolloutQueue
from igpo_megatron.training.supervised import Demonstrations, Supervision
from igpo_megatron.types import Prompt, RolloutGroup, UserError

if TYPE_CHECKING:
    from igpo_megatron.agent.rollouter import Rollouter
    from igpo_megatron.chat.format import ChatFormat
    from igpo_megatron.engines.api import EngineService
    from igpo_megatron.policy.policy import Policy
    from igpo_megatron.tools.base import Tool

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Services:
    """What only the main rank has: engines, search, questions or a replay. On the others every field but the folder is empty."""

    folder: RunFolder
    chat: ChatFormat | None = None
    engines: EngineService | None = None
    rollouter: Rollouter | None = None
    stream: PromptStream | None = None
    tools: Mapping[str, Tool] = field(default_factory=dict)
    queue: RolloutQueue | None = None
    replay: Iterator[list[RolloutGroup]] | None = None
    held_out: list[Prompt] = field(default_factory=list)


@dataclass(slots=True)
class Session:
    """What every rank has open during a run."""

    policy: Policy
    services: Services
    tracker: Tracker
    share: DeviceShare
    first_step: int
    """The step to begin with; above 1 where the run was resumed."""

    supervision: Supervision


@contextmanager
def opened(config: Config) -> Iterator[Session]:
    """Start or resume one rank; finish the run after the block. An early end raises `Ended` after everything is closed.

    The run's folder keeps the settings as they were given, but for the dtype; everything else sees what `auto` means here.
    """
    from igpo_megatron.policy import checkpoint, checkpoint_sums, parallel
    from igpo_megatron.policy.policy import Policy

    given, config = config, parallel.on_this_machine(config)
    ranks = parallel.init(config)
    folder, who = open_folder(given), f"rank {ranks.rank}"
    # One dtype for all ranks and engines, and for the whole run, whatever processor other machines have: it decides what is computed.
    dtype = parallel.broadcast(begun_dtype(folder) or config.model.dtype)
    config, kept = (each.model_copy(update={"model": each.model.model_copy(update={"dtype": dtype})}) for each in (config, given))
    with signals_restored(), ExitStack() as stack, reason_left(who, folder.root), interruptible() if ranks.is_main else nullcontext():
        if ranks.is_main:
            stack.enter_context(held(folder))
        found = checkpoint_sums.newest_whole(folder.checkpoints)
        damaged = parallel.on_main(ranks, partial(checkpoint_sums.set_aside, found))
        resumed = (found.folder and step_of(found.folder)) or 0
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
            if ranks.is_main and (chosen := parallel.choices(given, config)):
                tracker.message(chosen)
            # Not `on_main`: the others need not wait for it, and lose their connection to a main rank that fails here.
            services = open_services(config, folder, stack, tracker, resumed + 1) if ranks.is_main else Services(folder)
            tracker.progress("building the model")
            policy = Policy(config, ranks)
            share = DeviceShare(config, policy)
            state = None
            for sentence in damaged or ():
                tracker.message(sentence)
            if found.folder:
                tracker.message(f"resuming from {found.folder}")
                _, state = checkpoint.load(policy, found.folder)
            share.policy_leaves()
            parallel.on_main(ranks, partial(join_engines, config, services, stack, tracker, resumed + 1, state))
            policy.sampled_vocab = parallel.broadcast(services.chat.vocab_size if services.chat else None)
            if ranks.is_main:
                set_up(folder, kept)  # not before: a run that could not start leaves its name free for corrected settings
                if config.run.stop_after == "none":
                    forget_after(folder, resumed)
            supervision = Supervision(policy, tracker, services.replay, folder.checkpoints, state)
        yield Session(policy, services, tracker, share, resumed + 1, supervision)
        if ranks.is_main:
            finish(config, folder, tracker, supervision.state())
    parallel.shutdown()


def open_services(config: Config, folder: RunFolder, stack: ExitStack, tracker: Tracker, first_step: int) -> Services:
    """Open what the main rank needs, before there is a policy: chat format, questions, tools; engines begin to start."""
    services = Services(folder)
    needs_chat = config.loss.learns_from_rewards
    if needs_chat:
        from igpo_megatron.chat.format import ChatFormat
        from igpo_megatron.chat.tokenizer import load_tokenizer

        services.chat = ChatFormat(load_tokenizer(config.model.path), config.rollout, config.reward)
        probe = services.chat.probe_problem() if config.advantage.needs_probes else None
        for note in (*services.chat.notes, *([probe] if probe else ())):
            logger.warning("%s", note)
    if config.run.replay is not None:
        services.replay = replayed(config.run.replay, config, first_step, services.chat.vocab_size if services.chat else None)
        return services
    from igpo_megatron.engines.factory import open_engines
    from igpo_megatron.tools.registry import make_tools

    assert services.chat is not None
    # Problems of the user's files are found before an engine is started.
    services.stream = PromptStream(
        config.data.train,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        balance=config.data.balance,
        layout=config.data.layout,
        outcome=config.reward.outcome,
    )
    services.held_out = evaluate.questions(config)
    services.tools = make_tools(config, services.chat.count_tokens, services.chat.protocol.hit)
    tracker.progress("starting rollout engines")
    services.engines = open_engines(config)
    stack.callback(services.engines.close)
    if config.placement.mode != "colocated":  # there they get the memory that the policy leaves
        with waiting("the engines to begin", on=config.rollout.engine.backend):
            services.engines.begin()
    return services


def join_engines(
    config: Config, services: Services, stack: ExitStack, tracker: Tracker, first_step: int, state: dict[str, Any] | None
) -> None:
    """On the main rank, when there is a policy: wait for the engines; questions go on where the checkpoint's `state` says."""
    if services.engines is None:
        return  # a replay
    from igpo_megatron.agent.rollouter import Rollouter
    from igpo_megatron.chat.room import too_long

    assert services.chat is not None and services.stream is not None
    if state and state["prompts"]:
        services.stream.load_state(state["prompts"])
    tracker.progress("starting rollout engines")
    with waiting("the engines to start", on=config.rollout.engine.backend):
        stack.enter_context(services.engines)
    probes_of = partial(rendered_probes, render_probe=services.chat.render_probe, config=config.reward) if engine_scores(config) else None
    services.rollouter = stack.enter_context(
        Rollouter(
            services.engines,
            services.tools,
            services.chat,
            config.rollout,
            seed=config.run.seed,
            probes_of=probes_of,
            crashes=services.folder.crashes,
        )
    )
    # A tokenizer serves one thread at a time, and questions are drawn while rollouts use theirs.
    chat = copy.deepcopy(services.chat)
    services.queue = RolloutQueue(
        config,
        services.stream,
        services.rollouter,
        first_step=first_step,
        on_progress=tracker.progress,
        too_long=partial(too_long, chat=chat, config=config.rollout),
    )
    if state and state.get("successes"):  # absent from checkpoints written before successes were replayed
        services.queue.successes.load_state(state["successes"], search=config.rollout.tool_name)


def engine_scores(config: Config) -> bool:
    """Probes are scored by the engines during the rollout."""
    wanted = config.loss.learns_from_rewards and config.advantage.needs_probes and config.reward.gain != "none"
    return wanted and config.reward.scorer == "engine"


def replayed(path: Path, config: Config, first_step: int, vocab_size: int | None = None) -> Iterator[list[RolloutGroup]]:
    """Groups of each step from `first_step` on, in an endless loop: recorded steps as they are, or `Demonstrations`.

    `vocab_size`: number of tokens that engines can sample. Raises UserError where a recorded token is beyond it.
    """
    if config.loss.name == "sft":
        return Demonstrations(path, config, first_step)

    def endless() -> Iterator[list[RolloutGroup]]:
        while True:
            for _, groups in read_rollouts(path, search=config.rollout.tool_name):
                sampled = (token for group in groups for node in group.nodes if node.kind == "action" for token in node.token_ids)
                if vocab_size is not None and (last := max(sampled, default=0)) >= vocab_size:
                    raise UserError(
                        f"{path}: token {last} was sampled, the model's tokenizer ends at {vocab_size - 1}; record the step again"
                    )
                yield groups

    return islice(endless(), first_step - 1, None)


def collect(config: Config, services: Services, step: int) -> list[RolloutGroup]:
    """This step's trajectories with rewards and probes, from the engines or from a replay file."""
    if services.replay is not None:
        groups = next(services.replay)
        if config.loss.learns_from_rewards:
            for group in groups:
                score(group, config)
    else:
        assert services.queue is not None
        with waiting(f"the groups of step {step}", on=ROLLOUTS, deadline_s=config.parallel.timeout_s):
            groups = services.queue.take(step)
    if config.loss.learns_from_rewards and config.advantage.needs_probes:
        assert services.chat is not None
        for group in groups:
            add_probes(group, services.chat.render_probe, config.reward, services.chat.render_hidden_probe)
    return groups


def queue_state(queue: RolloutQueue | None) -> dict[str, Any]:
    """Questions and successes to replay, for a checkpoint; None where rollouts are replayed from a file."""
    return {"prompts": queue.state() if queue else None, "successes": queue.successes.state() if queue else None}


def sync_weights(session: Session, version: int) -> dict[str, float]:
    """Send the weights to the engines, which serve them after fingerprints and canary have confirmed their arrival."""
    from igpo_megatron.policy import weight_sync

    policy, services, tracker = session.policy, session.services, session.tracker
    with tracker.phase("sync"):
        canary = weight_sync.make_canary(policy)
        metrics = weight_sync.push(policy, services.engines, version, canary, exported=session.share.policy_leaves)
    if services.queue is not None:
        services.queue.weights_arrived(version)
    return metrics


def evaluate_if_due(session: Session, step: int) -> None:
    """On the main rank: evaluate on the held-out questions after `step`, if that is due and was not done before an interruption."""
    config, services, tracker = session.policy.config, session.services, session.tracker
    at_end = step in (0, config.run.steps) and config.eval.at_ends
    due = at_end or (step > 0 and is_due(config.eval.every, step))
    if not due or services.rollouter is None or (services.folder.eval / f"{step_name(step)}.json").is_file():
        return
    with tracker.phase("eval"):
        report = evaluate.evaluate(
            services.rollouter,
            services.held_out,
            config,
            step=step,
            version=step,
            folder=services.folder.eval,
            on_progress=tracker.progress,
        )
    tracker.log(step, evaluate.metrics(report))


def is_due(interval: int, step: int) -> bool:
    """Whether something done every `interval` steps is due after this one; 0 means never."""
    return bool(interval) and step % interval == 0
