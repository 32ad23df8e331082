"""Process groups, devices and seeds: the only initialisation code of the ranks."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from igpo_megatron.config import host
from igpo_megatron.config.schema import Config
from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.supervision.waits import waiting
from igpo_megatron.types import UserError

Value = TypeVar("Value")

MEETING_FOLDER = "IGPO_MEETING_FOLDER"
"""Environment variable of ranks that `igpo` started on one machine: a folder of their own, in which rank 0 says where they meet."""

_GRACE_S = 30.0
"""Collectives last this much longer than `parallel.timeout_s`, after which the main rank names what it waits for and ends (waits.py, in
22 s at most). Otherwise ranks that wait for it would end first, and their timeout would be reported as the cause."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands among the ranks."""

    rank: int
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    expert_size: int
    device: torch.device
    part: dist.ProcessGroup | None
    """The ranks that compute the same rows, its tensor, context and pipeline ranks; over gloo, None where there is no other."""

    @property
    def is_main(self) -> bool:
        """The one rank that talks to engines, files and people."""
        return self.rank == 0

    @property
    def reports(self) -> bool:
        """Among the ranks that share rows, the one whose results are counted: the others have none, or the same ones."""
        return self.pipeline_rank == self.pipeline_size - 1 and self.tensor_rank == self.context_rank == 0

    @property
    def leads_part(self) -> bool:
        """The first of the ranks that share rows."""
        return self.pipeline_rank == self.tensor_rank == self.context_rank == 0


def wants_cuda(device: str) -> bool:
    """Resolve `run.device`; asking for CUDA where there is none is an error."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch sees no GPU; use run.device=cpu or install a CUDA build of torch")
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def on_this_machine(config: Config, *, trains: bool = True) -> Config:
    """The configuration with `auto` replaced by what it is here: `run.device`, `model.dtype` and both sides' threads.

    Ranks that torchrun started on this machine count as LOCAL_WORLD_SIZE; without it the process is alone. `trains`: False for an
    evaluation, which has engines whatever `run.replay` says, and no ranks beside them.
    """
    run, model, engine = config.run, config.model, config.rollout.engine
    cuda = run.device == "cuda" or (run.device == "auto" and wants_cuda("auto"))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    serves = engine.backend == "vllm" and (run.replay is None or not trains)
    workers = engine.count * engine.tensor if serves else 0
    cores = 1 if host.is_small(model.shape()) else host.cpu_cores()
    for_ranks, for_engines = host.thread_counts(cores, ranks, workers, together=trains and config.rollout.max_staleness > 0)
    run = run.model_copy(update={"device": "cuda" if cuda else "cpu"})
    if run.threads == "auto":
        run = run.model_copy(update={"threads": 1 if cuda else for_ranks})
    if engine.threads == "auto":
        engine = engine.model_copy(update={"threads": for_engines})
    if model.dtype == "auto":
        model = model.model_copy(update={"dtype": host.best_dtype(cuda, host.cpu_flags())})
    return config.model_copy(update={"run": run, "model": model, "rollout": config.rollout.model_copy(update={"engine": engine})})


def choices(config: Config, chosen: Config) -> str | None:
    """What `on_this_machine` chose for `auto`, as a line for people; None where nothing was left to it."""
    rows = (
        ("model.dtype", config.model.dtype, chosen.model.dtype),
        ("run.threads", config.run.threads, chosen.run.threads),
        ("rollout.engine.threads", config.rollout.engine.threads, chosen.rollout.engine.threads),
    )
    found = [f"{key}={value}" for key, setting, value in rows if setting == "auto"]
    return f"auto: {', '.join(found)}" if found else None


def init(config: Config) -> Ranks:
    """Join the process group described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and make Megatron's groups.

    A process started without a launcher becomes a world of one.
    """
    cuda = wants_cuda(config.run.device)
    from igpo_megatron.policy import cpu

    if not cuda:
        cpu.install()
    assert not cuda or not cpu.is_installed(), "megatron.core runs on CPU in this process, which cannot be undone"
    from igpo_megatron.policy import megatron_fixes

    megatron_fixes.install()
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(int(on_this_machine(config).run.threads))
    timeout = timedelta(seconds=config.parallel.timeout_s + _GRACE_S)
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "nccl" if cuda else "gloo"
        if "RANK" not in os.environ:
            dist.init_process_group(backend, timeout=timeout, rank=0, world_size=1, store=dist.HashStore())
        elif _meets_on_loopback():
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=world, store=_loopback_store(rank, timeout))
        else:
            dist.init_process_group(backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline if config.parallel.virtual_pipeline > 1 else None,
        context_parallel_size=config.parallel.context,
        expert_model_parallel_size=config.parallel.expert,
        # Experts are never cut: small matrices, and gloo cannot gather their tokens unevenly.
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed + 1)
    return Ranks(
        rank=dist.get_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        part=_part_of_ranks(timeout),
    )


def _part_of_ranks(timeout: timedelta) -> dist.ProcessGroup | None:
    """The group of ranks with this process's data-parallel rank, in rank order; None where there is no other."""
    from megatron.core import parallel_state

    parts: dict[int, list[int]] = {}
    for rank, part in enumerate(gather(parallel_state.get_data_parallel_rank())):
        parts.setdefault(part, []).append(rank)
    if len(parts) == dist.get_world_size():
        return None
    group, _ = dist.new_subgroups_by_enumeration(list(parts.values()), timeout=timeout, backend="gloo")
    return group


def _meets_on_loopback() -> bool:
    """Whether the ranks share one machine and there is no launcher's store to join."""
    return os.environ["MASTER_ADDR"].startswith("127.") and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _loopback_store(rank: int, timeout: timedelta) -> dist.TCPStore:
    """The ranks' meeting point, listening on loopback only; by default torch listens on every interface.

    MASTER_PORT was free when torchrun chose it, but ranks import for seconds before they come here: `MEETING_FOLDER` spares them that.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    folder = os.environ.get(MEETING_FOLDER)
    said = Path(folder, f"port-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}") if folder else None
    if rank > 0:
        return dist.TCPStore(host, port if said is None else _read_port(said, timeout), is_master=False, timeout=timeout)
    listener = socket.create_server((host, port if said is None else 0), backlog=1024)
    port = listener.getsockname()[1]
    if said is not None:
        with whole(said) as part:
            part.write_text(str(port), encoding="ascii")
    return dist.TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def _read_port(said: Path, timeout: timedelta) -> int:
    """The port that rank 0 says in this file, once it does."""
    until = time.monotonic() + timeout.total_seconds()
    while not said.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"rank 0 did not open the ranks' store within {timeout.total_seconds():g} s (see parallel.timeout_s)")
        time.sleep(0.02)
    return int(said.read_text(encoding="ascii"))


def shutdown() -> None:
    """Leave all groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(value: Any) -> Any:
    """The main rank's value, on every rank; the others' values are ignored."""
    if _is_alone():
        return value
    box = [value]
    with waiting("a broadcast from rank 0", on="rank 0" if dist.get_rank() else "the other ranks"):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(ranks: Ranks, work: Callable[[], Value]) -> Value | None:
    """Do `work` on the main rank while the others wait. An error in it ends the main rank, and thereby the others."""
    value = work() if ranks.is_main else None
    broadcast(None)
    return value


def memory_in_use(device: torch.device) -> int:
    """Bytes in use on the GPU by any process, or by this process on CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return psutil.Process().memory_info().rss


def place() -> tuple[int, int]:
    """(rank, number of ranks)."""
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    """Return when every rank is here."""
    dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if _is_alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_main(value: Value) -> list[Value]:
    """Every rank's value, in rank order, on the main rank; none on the others."""
    if _is_alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, dst=0)
    return values


def _is_alone() -> bool:
    """A process outside all groups is a world of one as well."""
    return not dist.is_initialized() or dist.get_world_size() == 1
