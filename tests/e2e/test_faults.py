"""Ranks that are killed or started on several nodes: nothing is lost, nothing is trained twice. No engines: steps come from a file."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from demo_runs import alive, end_command, family, kill_while, outcome, wait_for

import hosts
from igpo_megatron.observability.metrics_file import read_metrics
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_AUTH_TOKEN": "a secret of the test",
}


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
    code, output = outcome(process)
    assert code == 0, output


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
    """SIGKILL every process of the run while a half-written checkpoint of a later step is there."""
    wait_for(lambda: any(checkpoints.glob("step_*")), process)
    kill_while(lambda: any(path.name >= "step_000003" for path in checkpoints.glob("*.partial")), process)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_killed_while_saving_resumes_from_the_last_good_checkpoint_and_repeats_nothing(
    folder: Path, uninterrupted: list[float], in_background: bool
) -> None:
    name = f"killed-{in_background}"
    arguments = ["-m", "igpo_megatron.cli", "train", *settings(folder, name), f"checkpoint.in_background={str(in_background).lower()}"]
    checkpoints = folder / name / "checkpoints"
    kill_while_saving(start(arguments), checkpoints)
    assert list(checkpoints.glob("*.partial")) and not (folder / name / "summary.json").exists()
    finish(start(arguments))
    rows = read_metrics(folder / name / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # Every step has its own sequences, so equal losses mean that the same sequences were trained in the same order from the same weights.
    assert [row["loss"] for row in rows] == pytest.approx(uninterrupted, rel=1e-5)
    assert len({round(loss, 4) for loss in uninterrupted}) == STEPS
    assert not list(checkpoints.glob("*.partial"))


def test_a_second_trainer_is_refused_and_an_interruption_is_one_sentence_and_leaves_no_process(folder: Path) -> None:
    arguments = ["-m", "igpo_megatron", "train", *settings(folder, "stopped"), "run.steps=1000000", "checkpoint.every=0"]
    first = start(arguments)
    try:
        wait_for((folder / "stopped" / "config.json").is_file, first)
        code, refused = outcome(start(arguments))
        assert code == 2 and refused.startswith(f"error: {folder / 'stopped'} is in use by process ") and refused.count("\n") == 1
        processes = family(first.pid)
        os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to the command and to every rank
        code, output = outcome(first)
    finally:
        end_command(first)
    assert code == 130, output
    assert output.splitlines()[-1] == "interrupted by SIGINT; the same command resumes from the last checkpoint"
    assert "Traceback" not in output and not re.search(r"rank \d", output) and not (folder / "stopped" / "failures").exists()
    assert len(processes) > 2 and not alive(processes)


def start_on(network: hosts.Hosts, number: int, arguments: list[str], *how: str) -> subprocess.Popen[str]:
    """`igpo launch` on a host of two; a signal or a cut link between them must be noticed within 25 s on a busy machine."""
    options = ["--nodes", "2", "--node-rank", str(number), "--head", network.address(0), "--lost-after-s", "25"]
    command = network.command(number, [sys.executable, "-m", "igpo_megatron.cli", "launch", *arguments, *options, *how])
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "GLOO_SOCKET_IFNAME"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def test_two_hosts_survive_a_killed_rank_and_a_cut_link_and_train_what_one_node_trains(folder: Path, uninterrupted: list[float]) -> None:
    reason = hosts.available()
    if reason:
        pytest.skip(f"this machine makes no network namespaces: {reason}")
    arguments = settings(folder, "hosts")
    checkpoints = folder / "hosts" / "checkpoints"
    with hosts.Hosts(2) as network:
        first, second = (start_on(network, number, arguments, "--max-restarts", "1") for number in (0, 1))
        wait_for((checkpoints / "step_000002").is_dir, first, second)
        (agent,) = [one for one in psutil.Process(second.pid).children() if "igpo_megatron.launch.agent" in one.cmdline()]
        (rank,) = agent.children()
        rank.kill()  # torchrun starts both ranks again, once
        wait_for((checkpoints / "step_000005").is_dir, first, second)
        network.cut(1)
        cut = time.monotonic()
        codes, outputs = zip(*map(outcome, (first, second)), strict=True)
        assert codes == (1, 1), outputs
        assert time.monotonic() - cut < 300  # ranks would wait for each other six times as long
        assert "stopped: node 1 (" in outputs[0] and "has not been heard of for" in outputs[0], outputs[0]
        assert "has not answered node 1" in outputs[1] and "one of them is down or cut off" in outputs[1], outputs[1]
        assert all(text.rstrip().endswith("the same command on every node resumes from the last checkpoint") for text in outputs)
        assert not (folder / "hosts" / "summary.json").exists()
        network.join(1)
        again = [start_on(network, number, arguments, "--rendezvous", "static") for number in (0, 1)]
        for process in again:
            finish(process)
    rows = read_metrics(folder / "hosts" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == pytest.approx(uninterrupted, rel=1e-5)


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
    code, output = outcome(process)
    assert code == 2 and named in output and "Traceback" not in output
    assert not (folder / "bad").exists()
