"""Training checkpoints: Megatron's resharding format and the state of the run. A checkpoint is complete or absent, never partial.

    <run>/checkpoints/step_000010/
        model/          dist_checkpointing: weights, optimizer, RNG state; loads at any TP x PP x CP x EP x DP
        hf/             config, tokenizer and chat template of the policy
        metadata.json   format and model of this folder (read by checkpoint_conversion)
        state.json      step, prompt stream, optimizer steps
        checksums.json  size and sum of every file; written last
    <run>/checkpoints/best -> step_000010    where a best one is known

A save goes to a `.partial` folder that is renamed when all ranks are done, so a killed save never hurts the last good one.

With `checkpoint.in_background` a save copies the state and returns, and a thread of each rank writes the copy. The ranks complete the
folder together in the next call of `finish` that finds all of them done. The threads that run beside training do no collectives.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from checkpoint_conversion.convert import write_metadata
from checkpoint_conversion.folders import copy_config, sync, sync_one
from igpo_megatron.policy import checkpoint_sums, megatron_fixes, parallel
from igpo_megatron.policy.checkpoint_sums import Sums
from igpo_megatron.policy.checkpoint_writer import write_in_thread
from igpo_megatron.policy.policy import Policy
from igpo_megatron.types import RunStopped

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def own_writer(save: Callable[..., Any]) -> dict[str, str]:
    """Options by which Megatron's `save` uses its own asynchronous writer: newer versions default to nvidia-resiliency-ext's."""
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


WRITER = own_writer(dist_checkpointing.save)


def complete(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder for folder in checkpoints.glob("step_??????") if (folder / "state.json").is_file())


@dataclass(slots=True)
class Pending:
    """A save that is planned, and whose part of this rank is being written."""

    final: Path
    keep: int
    best: int | None
    run: dict[str, Any]
    own: dict[str, Any]
    request: AsyncRequest
    writer: threading.Thread | None
    """None on a rank that has nothing to write."""
    sums: Sums
    """Of the files this rank wrote, once the writer is done."""


def save(policy: Policy, checkpoints: Path, step: int, state: dict[str, Any], keep: int, best: int | None = None) -> Path:
    """Write a checkpoint from all ranks and remove all but the newest `keep`. `state` is JSON-able and the same on every rank.

    The checkpoint of step `best` is kept, too, as long as it is the best; the link `best` leads to it.
    With `checkpoint.in_background` it is written in the background, and complete after a `finish`, with which the next save begins.
    """
    finish(policy, wait=True)
    final = checkpoints / f"step_{step:06d}"
    partial = final.with_suffix(".partial")
    if policy.ranks.is_main:
        for stale in checkpoints.glob("*.partial"):
            shutil.rmtree(stale)
        (partial / "model").mkdir(parents=True)
    dist.barrier()
    layout = [policy.ranks.tensor_size, policy.ranks.pipeline_size, policy.ranks.data_size]
    own = {"step": step, "optimizer_steps": policy.steps_taken, "layout": layout}
    sharded = _sharded_state(policy, loading=False)
    if policy.config.checkpoint.in_background:
        request = dist_checkpointing.save(sharded, str(partial / "model"), content_metadata=SHARDING, async_sharded_save=True, **WRITER)
        sums: Sums = {}
        writer = write_in_thread(request, lambda: sums.update(checkpoint_sums.of_rank(partial, policy.ranks.rank)))
        policy.pending_save = Pending(final, keep, best, state, own, request, writer, sums)
        return final
    with _failures_named(final):
        dist_checkpointing.save(sharded, str(partial / "model"), content_metadata=SHARDING, **WRITER)
    dist.barrier()
    _complete(policy, final, state, own, checkpoint_sums.of_rank(partial, policy.ranks.rank), keep, best)
    return final


def finish(policy: Policy, *, wait: bool) -> bool:
    """Complete the save that is under way if every rank has written its part; True when none is left. Collective while one is under way.

    `wait`: wait until all parts are written. Raises RunStopped on every rank if one of them could not write.
    """
    pending = policy.pending_save
    if pending is None:
        return True
    if wait and pending.writer:
        pending.writer.join()
    written = torch.tensor([pending.writer is None or not pending.writer.is_alive()], dtype=torch.int32, device=policy.ranks.device)
    dist.all_reduce(written, op=dist.ReduceOp.MIN)
    if not written.item():
        return False
    policy.pending_save = None
    with _failures_named(pending.final):
        for complete_part in pending.request.finalize_fns:
            complete_part()
    _complete(policy, pending.final, pending.run, pending.own, pending.sums, pending.keep, pending.best)
    return True


@contextmanager
def _failures_named(final: Path) -> Iterator[None]:
    """Turn what Megatron raises on every rank, when one could not write, into RunStopped.

    Only the main rank knows the reason. It tells the others first: one that ended without it could have the main rank killed before it
    has reported the reason.
    """
    try:
        yield
    except CheckpointException as error:
        raise RunStopped(parallel.broadcast(_reason(final, error) if error.failures else None)) from error


def _reason(final: Path, error: CheckpointException) -> str:
    rank, (problem, _) = min(error.failures.items())
    why = str(problem).removeprefix("Worker failure: ")
    # All that torch and Megatron-Core 0.19 report when a file system is full.
    if any(sign in why for sign in ("inline_container", "PytorchStreamWriter", "<class 'OSError'>")):
        free = shutil.disk_usage(final.parent).free
        why = f"a file was cut short; {final.parent} has {free:,} bytes free (otherwise a quota, or `ulimit -f`)"
    return f"{final.name} could not be written by rank {rank}: {why}"


def _complete(
    policy: Policy, final: Path, state: dict[str, Any], own: dict[str, Any], sums: Sums, keep: int, best: int | None = None
) -> None:
    """Add the policy's description, the run's state and the sums of all files to a folder, then rename it. Collective.

    `keep` and `best`: as for `save`.
    """
    partial = final.with_suffix(".partial")
    everyones = parallel.gather(sums)
    if policy.ranks.is_main:
        (partial / "hf").mkdir()
        copy_config(policy.config.model.path, partial / "hf")
        write_metadata(partial, model_type=policy.shape.model_type, vocab_multiple=policy.config.model.vocab_multiple)
        (partial / "state.json").write_text(json.dumps({**own, "checksums": True, "run": state}, indent=2), encoding="utf-8")
        checkpoint_sums.write(partial, {name: found for rank in everyones for name, found in rank.items()})
        sync(partial)
        gone = [_set_aside(final)] if final.exists() else []  # the same step saved again after a resume
        partial.rename(final)
        sync_one(final.parent)
        best_one = final.with_name(f"step_{best or 0:06d}")
        if best_one.is_dir():
            _link_best(best_one)
        old = (folder for folder in complete(final.parent)[:-keep] if folder != best_one)
        for folder in (*gone, *map(_set_aside, old)):
            shutil.rmtree(folder)
    dist.barrier()
    policy.give_back_memory()


def _link_best(folder: Path) -> None:
    """Let the link `best` beside a checkpoint lead to it, replacing the old one in one go."""
    link = folder.with_name("best")
    if link.is_symlink() and os.readlink(link) == folder.name:
        return
    new = folder.with_name(".best")
    with suppress(OSError):  # a file system without links; the summary names the step
        new.unlink(missing_ok=True)
        new.symlink_to(folder.name)
        new.replace(link)


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint that is to be removed, so that none is ever half removed; if this run is killed, the next save removes it."""
    return folder.rename(folder.with_suffix(".old.partial"))


def load(policy: Policy, folder: Path) -> tuple[int, dict[str, Any]]:
    """Restore all ranks from a checkpoint taken at any layout; returns its step and the run's state."""
    stored = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    ranks = policy.ranks
    same_grid = stored["layout"][:2] == [ranks.tensor_size, ranks.pipeline_size]
    request = _sharded_state(policy, loading=True, with_rng=same_grid)
    loaded = dist_checkpointing.load(request, str(folder / "model"), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    for number, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded["model"][f"chunk{number}"], strict=False)
    policy.optimizer.load_state_dict(loaded["optimizer"])
    if same_grid:
        rng = loaded["rng_state"][0]
        torch.set_rng_state(rng["cpu"])
        if ranks.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"])
    policy.steps_taken = stored["optimizer_steps"]
    return stored["step"], stored["run"]


def _sharded_state(policy: Policy, *, loading: bool, with_rng: bool = True) -> dict[str, Any]:
    megatron_fixes.prime(policy.optimizer)  # before the first step there are no moments, which Megatron does not expect
    metadata = {**SHARDING, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    # The stored names are those of the complete model; the chunks are only keys of this rank.
    chunks = {f"chunk{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(policy.chunks)}
    state: dict[str, Any] = {"model": chunks}
    state["optimizer"] = policy.optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=metadata)
    if with_rng:
        ranks = policy.ranks
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if ranks.device.type == "cuda" else None}
        # One state for each place in the tensor x pipeline grid: at another grid there is nothing to restore.
        state["rng_state"] = ShardedObject(
            "rng_state",
            [rng],
            (ranks.pipeline_size, ranks.tensor_size),
            (ranks.pipeline_rank, ranks.tensor_rank),
            replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
    return state
