"""Real Megatron-Core ranks over gloo: forked from a process that has imported Megatron once, so four of them start in a second.

Importing this changes nothing: the ranks alone are kept off CUDA, each by its own `parallel.init`, so that a test on a GPU may run beside.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from tiny_models import ARCHITECTURES, MIXTURES, VOCAB, make_hf_folder  # noqa: F401  (tests import them from here)

from igpo_megatron.cli import world_size
from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config
from igpo_megatron.policy import checkpoint, parallel, policy, weight_sync  # noqa: F401  (imported before forking)


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture name -> folder."""
    root = tmp_path_factory.mktemp("hf")
    return {name: make_hf_folder(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def deep_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with six layers, for pipelines of many parts."""
    root = tmp_path_factory.mktemp("deep")
    return {name: make_hf_folder(root / name, name, layers=6) for name in ("qwen2_tied", "qwen3_moe")}


def make_config(model: Path, **overrides: Any) -> Config:
    """A small fp32 CPU configuration; keyword `parallel__tensor=2` means `parallel.tensor=2`."""
    values: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "fp32"},
        "run": {"device": "cpu", "steps": 10, "threads": 1},
        "loss": {"kl_coef": 0.0},
        "optim": {"lr": 1e-2, "weight_decay": 0.01},
        "parallel": {"timeout_s": 300},
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return build(values)


def run_ranks(function: Callable[..., Any], config: Config, *arguments: Any) -> list[Any]:
    """Call `function(policy, *arguments)` on every rank of the configuration's layout; the results in rank order."""
    (results,) = run_ranks_for_each(function, [config], *arguments)
    return results


def run_ranks_beside_autograd(function: Callable[..., Any], config: Config, *arguments: Any) -> list[Any]:
    """`run_ranks` for a process that computes gradients itself, for a function that can be pickled by its name.

    Once a torch built for CUDA has done so no fork can: autograd has threads then. Ranks fork from a server that never does.
    """
    if torch.version.cuda is None:
        return run_ranks(function, config, *arguments)
    multiprocessing.set_forkserver_preload(["conftest"])  # found by PYTHONPATH; elsewhere every rank imports it, in seconds
    with pytest.MonkeyPatch.context() as patch:
        # Megatron asks how many GPUs there are as it is imported. That readies CUDA in the server, and a process that is forked from
        # one where CUDA is ready dies as soon as its autograd starts a thread for a GPU: so the server, which keeps this, sees none.
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        (results,) = run_ranks_for_each(function, [config], *arguments, method="forkserver")
    return results


def run_one_rank(function: Callable[..., Any], config: Config, *arguments: Any) -> Any:
    """`run_ranks_beside_autograd` of one rank; with run.device=cuda in this process, which no rank can be forked from afterwards."""
    if config.run.device == "cpu":
        return run_ranks_beside_autograd(function, config, *arguments)[0]
    try:
        return function(policy.Policy(config, parallel.init(config)), *arguments)
    finally:
        parallel.shutdown()


def run_ranks_for_each(function: Callable[..., Any], configs: Sequence[Config], *arguments: Any, method: str = "fork") -> list[list[Any]]:
    """The same for several configurations of as many ranks each, one after the other in one process group."""
    (world,) = {world_size(config) for config in configs}
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    torch.set_num_threads(1)  # a pool of threads does not survive the fork, and a rank would wait for it
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [context.Process(target=_rank, args=(rank, world, meeting, configs, function, arguments, queue)) for rank in range(world)]
        for process in ranks:
            process.start()
        try:
            for _ in ranks:
                rank, value, error = _next(queue, ranks)
                if error:
                    raise AssertionError(f"rank {rank} failed:\n{error}")
                results[rank] = pickle.loads(value)
        finally:
            for process in ranks:
                process.join(timeout=10)
                process.kill()
                process.join()
    return [[results[rank][number] for rank in range(world)] for number in range(len(configs))]


def _next(queue: Any, ranks: Sequence[Any], timeout: float = 300) -> Any:
    """What the next rank has to say. Raises AssertionError at once where one died without a word, instead of waiting for it."""
    deadline = time.monotonic() + timeout
    while True:
        died = [process.name for process in ranks if process.exitcode]
        try:
            return queue.get(timeout=1)
        except Empty:
            assert not died, f"{', '.join(died)} ended without a word"
            assert time.monotonic() < deadline, f"no rank has said anything for {timeout:g} s"


def become_rank(rank: int, world: int, meeting: str) -> None:
    """Let this process be one of the ranks of a machine, which meet as those of `igpo train` do: at a port that no other test can take."""
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", parallel.MEETING_FOLDER: meeting})


def _rank(
    rank: int, world: int, meeting: str, configs: Sequence[Config], function: Callable[..., Any], arguments: tuple[Any, ...], queue: Any
) -> None:
    become_rank(rank, world, meeting)
    try:
        values = []
        for config in configs:
            ranks = parallel.init(config)
            values.append(function(policy.Policy(config, ranks), *arguments))
            parallel_state.destroy_model_parallel()
        parallel.shutdown()
        queue.put((rank, pickle.dumps(values), None))  # as bytes: tensors would be shared by handles that die with this process
    except BaseException:  # noqa: BLE001  the parent reports whatever it was
        queue.put((rank, None, traceback.format_exc()))
