"""What engines, ranks and checks are told about GPUs, tried without one."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from igpo_megatron import cli
from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config
from igpo_megatron.engines.actor import EngineActor, engine_options
from igpo_megatron.engines.ray_cluster import RayCluster, visible_devices
from igpo_megatron.launch import job
from igpo_megatron.launch.node import Node
from igpo_megatron.policy.parallel import on_this_machine
from igpo_megatron.training.checks import check
from igpo_megatron.types import UserError
from igpo_megatron.weights.transfer import WorkerExtension

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "examples/quickstart/policy"
QUESTIONS = ROOT / "tests/fixtures/igpo_dev_15.parquet"


def settings(*overrides: str) -> Config:
    return build({"model": {"path": str(POLICY), "dtype": "bf16"}, "run": {"device": "cuda"}}, overrides)


# ---- engines over several GPUs


@pytest.mark.parametrize("cuda", [True, False])
def test_an_engine_over_several_gpus_runs_them_by_processes_of_its_own(cuda: bool) -> None:
    """Inside a Ray actor vLLM would choose Ray's executor, which refuses a bundle of several GPUs."""
    options = engine_options(settings("rollout.engine.tensor=2"), cuda=cuda, stop_strings=False)
    assert (options["tensor_parallel_size"], options["distributed_executor_backend"]) == (2, "mp")
    single = engine_options(settings(), cuda=cuda, stop_strings=False).get("distributed_executor_backend")
    assert single == (None if cuda else "vllm.v1.executor.uniproc_executor.UniProcExecutor"), "on CPU one process less to import vLLM"


# ---- weights to engines


def carried(value: Any) -> Any:
    """As vLLM's encoder (msgpack) delivers it. With the real one: tests/e2e/test_engines.py."""
    if isinstance(value, dict):
        return {carried(key): carried(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [carried(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise TypeError(f"Object of type {type(value)} is not serializable")


class Encoder:
    """vLLM's engine as far as a bucket is concerned: what it is asked is encoded, then decoded for the worker."""

    def __init__(self) -> None:
        self.received: Any = None
        self.finished: list[dict[str, Any]] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        (info,) = carried(args)
        return [getattr(WorkerExtension, method)(self, info)]

    def update_weights(self, info: dict[str, Any]) -> None:
        self.received, self.weight_transfer_engine = info, SimpleNamespace(rows=[])

    async def finish_weight_update(self) -> None:
        self.finished.append({})

    async def resume_generation(self) -> None: ...


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> EngineActor:
    """An actor over `Encoder`; of vLLM only the error is there that ends it."""
    exceptions = ModuleType("vllm.v1.engine.exceptions")
    exceptions.EngineDeadError = type("EngineDeadError", (Exception,), {})  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, exceptions.__name__, exceptions)
    actor = EngineActor(0)
    actor._engine = Encoder()
    return actor


def test_a_handle_of_cuda_ipc_reaches_the_worker_as_it_was(actor: EngineActor) -> None:
    handle = (torch.Tensor, (2,), (1,), 0, torch.storage.UntypedStorage, torch.bfloat16, 0, b"h", 4, 0, b"r", 0, b"e", False, False)
    native_info = {"names": ["w"], "ipc_handles": [{"GPU-0a1b": handle}]}
    asyncio.run(actor.load_bucket({"number": 3, "native_info": native_info}))
    assert actor._engine.received == {"number": 3, "native_info": native_info}


def test_a_bucket_from_the_file_holds_no_pickle(actor: EngineActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "loads", lambda data: pytest.fail("unpickled"))
    asyncio.run(actor.load_bucket({"number": 3, "entries": [["w", "bfloat16"]]}))
    assert actor._engine.received == {"number": 3, "entries": [["w", "bfloat16"]]}


def test_an_update_is_finished_as_every_version_of_vllm_lets_it_be(actor: EngineActor) -> None:
    """Before 0.32 there was no version to give; ours is our own."""
    asyncio.run(actor.finish_update(7))
    assert actor._engine.finished == [{}] and actor.version == 7


# ---- which GPUs


@pytest.mark.parametrize(
    ("given", "gpu_ids", "expected"),
    [("4,5,6,7", (2, 3), "6,7"), ("4, 5", (1,), "5"), ("3", (0,), "3"), (None, (2, 3), "2,3"), ("7,6,5", (0, 2), "7,5")],
)
def test_gpu_ids_count_among_the_gpus_that_the_run_was_given(
    monkeypatch: pytest.MonkeyPatch, given: str | None, gpu_ids: tuple[int, ...], expected: str
) -> None:
    set_visible(monkeypatch, given)
    assert visible_devices(gpu_ids) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("4,5", r"gpu_ids=\[1, 2, 3\] counts among the 2 GPUs that this process sees \(CUDA_VISIBLE_DEVICES=4,5\), so \[2, 3\] are none"),
        ("", r"among the 0 GPUs"),
        ("GPU-8c1f0c5e-9a7b,GPU-11", r"CUDA_VISIBLE_DEVICES=GPU-8c1f0c5e-9a7b,GPU-11 does not name GPUs by number"),
        ("MIG-3e1b", r"does not name GPUs by number"),
        ("0,-1,2", r"does not name GPUs by number"),
    ],
)
def test_gpus_that_the_run_was_not_given_are_one_sentence(monkeypatch: pytest.MonkeyPatch, given: str, expected: str) -> None:
    set_visible(monkeypatch, given)
    with pytest.raises(UserError, match=expected) as caught:
        visible_devices((1, 2, 3))
    assert "\n" not in str(caught.value)


def test_a_node_without_engines_shows_ray_no_gpu_however_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    set_visible(monkeypatch, "GPU-8c1f0c5e-9a7b")
    assert visible_devices(()) == ""


def test_more_gpus_than_the_machine_has_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    set_visible(monkeypatch, None)
    with pytest.raises(UserError, match=r"among the 4 GPUs that this process sees \(CUDA_VISIBLE_DEVICES=unset\), so \[8\] are none"):
        visible_devices((8,))


def set_visible(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """CUDA_VISIBLE_DEVICES, on a machine of four GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environment = {name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    monkeypatch.setattr(os, "environ", environment if value is None else {**environment, "CUDA_VISIBLE_DEVICES": value})


@pytest.mark.parametrize("before", ["4,5,6,7", None])
def test_only_ray_is_shown_the_engines_gpus(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    import ray

    set_visible(monkeypatch, before)
    seen = []
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    RayCluster(settings("rollout.engine.gpu_ids=[2,3]"), cuda=True).close()
    RayCluster(settings(), cuda=True).close()
    assert seen == (["6,7", before] if before else ["2,3", None])
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_a_node_of_many_shows_its_ray_the_engines_gpus_by_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    set_visible(monkeypatch, "4,5,6,7")
    monkeypatch.setattr(job, "wants_cuda", lambda device: True)
    node = Node(0, 2, "both", 2, "a", "10.0.0.1", "10.0.0.1", 29400)
    part: Any = SimpleNamespace(node=node, config=settings("rollout.engine.gpu_ids=[2,3]"))
    assert job._Job._ray_devices(part) == {"CUDA_VISIBLE_DEVICES": "6,7"}


# ---- run.device=auto


@pytest.mark.parametrize(("gpu", "expected"), [(True, "needs 1 GPUs, gpu_ids names 0"), (False, "goes from GPU to GPU, run.device=cpu")])
def test_auto_is_decided_before_settings_are_checked(monkeypatch: pytest.MonkeyPatch, gpu: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = on_this_machine(settings("run.device=auto", *([] if gpu else ["sync.transport=nccl"])))
    assert config.run.device == ("cuda" if gpu else "cpu")
    assert any(expected in problem for problem in check(config, world_size=1))
    assert on_this_machine(settings("run.device=cpu")).run.device == "cpu"


def test_a_run_with_auto_is_refused_where_its_engines_would_find_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "_torchrun", lambda *arguments: pytest.fail("the ranks were started"))
    monkeypatch.chdir(ROOT)
    arguments = ["train", "examples/quickstart/igpo.yaml", "run.device=auto", f"run.folder={tmp_path}/run", "search.backend=retriever"]
    result = CliRunner().invoke(cli.app, [*arguments, "search.url=http://127.0.0.1:1/retrieve", f"data.train=[{QUESTIONS}]"])
    assert result.exit_code == 2 and "needs 1 GPUs, gpu_ids names 0" in result.output
