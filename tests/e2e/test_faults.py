"""Ranks that are killed or started on several nodes: nothing is lost, nothing is trained twice. No engines: steps come from a file."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.observability.tracker import read_metrics
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def settings(folder: Path, name: str) -> list[str]:
    """Supervised steps on recorded sequences, a checkpoint after each."""
    return [
        str(ROOT / "examples/quickstart/warmstart.yaml"),
        f"run.name={name}",
        f"run.folder={folder}",
        f"run.steps={STEPS}",
        f"run.replay={folder / 'recorded.parquet'}",
        f"model.path={ROOT / 'examples/quickstart/policy'}",
        "rollout.prompts_per_step=2",
        "parallel.tensor=2",
        "parallel.data=1",
        "optim.warmup_steps=0",
        "checkpoint.every=1",
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of different sequences for each step."""
    folder = tmp_path_factory.mktemp("faults")
    rng = random.Random(0)
    groups = []
    for number in range(2 * STEPS):
        nodes = [
            Node(None, "prompt", [rng.randrange(600) for _ in range(9)]),
            Node(0, "action", [rng.randrange(600) for _ in range(20)], 1),
        ]
        groups.append(RolloutGroup(Prompt(str(number), "?", ("a",), "test"), nodes, [Trajectory([0, 1], Status.FINISHED)]))
    write_rollouts(folder / "recorded.parquet", 0, groups)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[float]:
    """Losses of a run that nobody disturbs."""
    finish(start(["-m", "igpo_megatron.cli", "train", *settings(folder, "calm")]))
    return [row["loss"] for row in read_metrics(folder / "calm" / "metrics.jsonl")]


def kill_while_saving(process: subprocess.Popen[str], checkpoints: Path) -> None:
    """SIGKILL every process of the run as soon as a half-written checkpoint of a later step is there."""
    deadline = time.monotonic() + 100
    while not any(path.name >= "step_000003" for path in checkpoints.glob("*.partial")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.001)
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)


def test_a_run_killed_while_saving_resumes_from_the_last_good_checkpoint_and_repeats_nothing(
    folder: Path, uninterrupted: list[float]
) -> None:
    arguments = ["-m", "igpo_megatron.cli", "train", *settings(folder, "killed")]
    checkpoints = folder / "killed" / "checkpoints"
    kill_while_saving(start(arguments), checkpoints)
    assert list(checkpoints.glob("*.partial")) and not (folder / "killed" / "summary.json").exists()
    finish(start(arguments))
    rows = read_metrics(folder / "killed" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # Every step has its own sequences, so equal losses mean that the same sequences were trained in the same order from the same weights.
    assert [row["loss"] for row in rows] == pytest.approx(uninterrupted, rel=1e-5)
    assert len({round(loss, 4) for loss in uninterrupted}) == STEPS
    assert not list(checkpoints.glob("*.partial"))


def test_two_torchrun_agents_train_as_one_node_does(folder: Path, uninterrupted: list[float]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    agents = []
    for node in (0, 1):
        launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "t", "--local-addr", "127.0.0.1"]
        is_host = ["--rdzv-conf", f"is_host={'true' if node == 0 else 'false'}"]
        agents.append(start([*launch, *meeting, *is_host, "-m", "igpo_megatron.train", *settings(folder, "two-nodes")]))
    for agent in agents:
        finish(agent)
    losses = [row["loss"] for row in read_metrics(folder / "two-nodes" / "metrics.jsonl")]
    assert losses == pytest.approx(uninterrupted, rel=1e-5)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("loss.name=ppoo", "did you mean 'ppo'"),
        ("parallel.tensor=3", "does not divide the model's 4 attention heads"),
        ("model.path=nowhere", "no such folder"),
        ("run.replay=nowhere.parquet", "no such file"),
    ],
)
def test_bad_settings_are_answered_in_words_before_anything_starts(folder: Path, override: str, named: str) -> None:
    process = start(["-m", "igpo_megatron.cli", "train", *settings(folder, "bad"), override])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and named in output and "Traceback" not in output
    assert not (folder / "bad").exists()
