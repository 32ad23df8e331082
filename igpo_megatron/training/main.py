"""Train a policy: the table of contents of the project. Every rank runs this file (torchrun -m igpo_megatron.training.main CONFIG.yaml).

    questions ──rollout──> groups ──score──> rewards, gains ──advantage──> turn advantages ──train──> weights ──sync──> engines

The main rank talks to engines, files and people, and has the groups; all ranks score and train the rows that it sends them.

THE PATH from the command to the loss; tests/distributed/test_path.py compares it with a real call stack:

    igpo_megatron/cli.py train                             starts the ranks by torchrun: launch/rank.py calls `main` below
    igpo_megatron/training/main.py main                    settings, checks, and how this rank ended
    igpo_megatron/training/main.py run                     every step, stage by stage
    igpo_megatron/policy/policy.py forward_backward        gives the rows to Megatron's schedule
    igpo_megatron/policy/policy.py loss_of                 called back with each row's log-probs and entropies
    igpo_megatron/algorithms/losses/registry.py objective  mismatch, KL term, entropy bonus, division by the step's count
    igpo_megatron/algorithms/losses/registry.py ppo        the loss
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import partial

from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.observability.memory_ledger import worst_rank
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.observability.run_folder import folder_for, step_name
from igpo_megatron.supervision.endings import Ended, end_process, reason_left
from igpo_megatron.supervision.leftovers import end_with_parent
from igpo_megatron.supervision.library_log import LOGS, libraries_logged
from igpo_megatron.training.checks import require
from igpo_megatron.training.services import collect, evaluate_if_due, is_due, opened, queue_state, sync_weights
from igpo_megatron.training.step import assign_advantages, group_metrics, minibatches, routing_metrics, score_tokens, update_metrics
from igpo_megatron.types import Metric


def run(config: Config) -> None:
    """One rank's whole run: the training loop, in which every line is a stage of the picture above."""
    from igpo_megatron.policy import checkpoint, parallel

    with opened(config) as session:
        policy, services, tracker, share = session.policy, session.services, session.tracker, session.share
        serves, learns = config.run.replay is None, config.run.stop_after == "none"
        if serves:
            share.policy_returns(services.engines)
            tracker.log(session.first_step - 1, sync_weights(session, version=session.first_step - 1))
            parallel.on_main(policy.ranks, partial(evaluate_if_due, session, step=session.first_step - 1))
        if session.first_step == 1 and (measured := session.supervision.metrics(0)):
            tracker.log(0, measured)
        for step in range(session.first_step, config.run.steps + 1):
            if session.supervision.is_over:
                break
            started = time.monotonic()
            metrics: dict[str, float] = {}
            with tracker.phase("rollout"):
                groups = parallel.on_main(policy.ranks, partial(collect, config, services, step)) or []
            if learns:
                share.policy_returns(services.engines)
            if learns and config.loss.learns_from_rewards:
                with tracker.phase("score"):
                    score_tokens(policy, groups)
                    metrics |= routing_metrics(policy, groups, step)
                with tracker.phase("advantage"):
                    assign_advantages(groups, config, progress=(step - 1) / max(config.run.steps - 1, 1))
            metrics |= group_metrics(groups, config, step)
            if learns:
                with tracker.phase("train"):
                    results = []
                    for rows, objective in minibatches(policy, groups):
                        results.append(policy.optimizer_step(policy.forward_backward(rows, objective)))
                    metrics |= update_metrics(policy, results)
            if policy.ranks.is_main and config.track.dump_every and (step % config.track.dump_every == 0 or not learns):
                with tracker.phase("rollout"):
                    write_rollouts(services.folder.rollouts / f"{step_name(step)}.parquet", step, groups)
            if services.queue is not None:
                metrics |= services.queue.done(step)
            tokens = sum(len(node.token_ids) for group in groups for node in group.nodes)
            metrics[Metric.TOKENS_PER_S] = tokens / (time.monotonic() - started)
            metrics |= session.supervision.metrics(step)
            tracker.log(step, metrics | worst_rank(parallel.gather(tracker.memory())))
            is_last, is_best = step == config.run.steps or session.supervision.is_over, session.supervision.is_best(step)
            if learns and (is_last or is_best or is_due(config.checkpoint.every, step)):
                with tracker.phase("checkpoint"):  # before the weights leave: a policy that shares its device leaves with them
                    state = parallel.broadcast(queue_state(services.queue)) | session.supervision.state()
                    best = session.supervision.progress.best_step
                    checkpoint.save(policy, services.folder.checkpoints, step, state, config.checkpoint.keep, best)
            if learns and serves:
                tracker.log(step, sync_weights(session, version=step))
                parallel.on_main(policy.ranks, partial(evaluate_if_due, session, step=step))
            if learns:
                checkpoint.finish(policy, wait=is_last)
            tracker.log(step, {})


def main(arguments: Sequence[str]) -> int:
    """`CONFIG.yaml [section.key=value ...]` on every rank; the exit code (see endings.py): 0 finished, 2 for a mistake of the user's."""
    if not arguments:
        sys.stderr.write("usage: python -m igpo_megatron.training.main CONFIG.yaml [section.key=value ...]\n")
        return 2
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # torchrun's agent: without it nobody would notice how this rank ends
    who = f"rank {os.environ.get('RANK', 0)}"
    try:
        with reason_left(who, None):
            config = load(arguments[0], arguments[1:])
        root = folder_for(config).root
        with reason_left(who, root), libraries_logged(root / LOGS / f"{who.replace(' ', '')}.txt"):
            from igpo_megatron.policy.parallel import on_this_machine

            require(on_this_machine(config), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            run(config)
    except Ended as end:
        return end.ending.code
    return 0


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
