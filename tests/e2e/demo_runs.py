"""Runs of the demo in a folder of their own, and the processes they start: what the end-to-end tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import demo_data
import world_facts
from igpo_megatron.observability.metrics_file import read_metrics
from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.supervision.leftovers import is_alive
from igpo_megatron.types import RolloutGroup

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples/quickstart/igpo.yaml"
POLICY = ROOT / "examples/quickstart/policy"
PATIENCE_S = 600
"""The end of every wait: it ends a test that hangs, and none on a slow machine."""


class DemoRuns:
    """Starts the demo with questions and corpus of its own below `folder`; their temporary files lie in `temporary`."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder, self.temporary = folder, temporary
        demo_data.write(world_facts.build(), folder)

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """Configuration and overrides of the run `name`."""
        return [
            str(CONFIG),
            f"run.name={name}",
            f"run.folder={self.folder}",
            f"model.path={POLICY}",
            f"search.corpus={self.folder / 'corpus.jsonl'}",
            f"data.train=[{self.folder / 'train.parquet'}]",
            f"data.eval=[{self.folder / 'test.parquet'}]",
            *overrides,
        ]

    def start(self, arguments: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """`python ARGUMENTS` in a session of its own, with both streams kept."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), **environment},
            start_new_session=True,
        )

    def train(self, name: str, *overrides: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of a whole `igpo train`."""
        return outcome(self.start(["-m", "igpo_megatron.cli", "train", *self.arguments(name, *overrides)], **environment))

    def rows(self, name: str) -> list[dict[str, float]]:
        """Metrics of the training steps, step 0 (evaluation only) left out."""
        return [row for row in read_metrics(self.folder / name / "metrics.jsonl") if row["step"] > 0]

    def rollouts(self, name: str) -> list[tuple[int, list[RolloutGroup]]]:
        """(step, groups) of every rollout file of a run."""
        return [part for path in self.rollout_files(name) for part in read_rollouts(path)]

    def rollout_files(self, name: str) -> list[Path]:
        return sorted((self.folder / name / "rollouts").glob("step_*.parquet"))

    def recording(self, name: str) -> Path:
        """All recorded steps of a run in one file that can be replayed."""
        path = self.folder / f"{name}.parquet"
        pq.write_table(pa.concat_tables([pq.read_table(part) for part in self.rollout_files(name)]), path)
        return path


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output of a command, when it ends."""
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    finally:
        end_command(process)
    return process.returncode, output


def wait_for(happened: Callable[[], bool], *processes: subprocess.Popen[str]) -> None:
    """Poll every two milliseconds. Ends the processes, and raises AssertionError with their output, if one ends first, or too late."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            for process in processes:
                end_command(process)
            ends = [f"exit code {process.wait()}:\n{process.communicate()[0]}" for process in processes]
            raise AssertionError("\n--- ".join(["did not happen", *ends]))
        time.sleep(0.002)


def kill_while(happening: Callable[[], bool], process: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL a command, whose ranks are there, and all below it while something happens; returns them.

    They are stopped first: what happens could be over before the last of them is found and killed. If it is, the next time is awaited.
    """
    known = family(process.pid)
    while True:
        wait_for(happening, process)
        for one in known:
            signal_to(one, signal.SIGSTOP)
        while not all(map(stands_still, known)):
            time.sleep(0.001)
        if happening():
            break
        for one in known:
            signal_to(one, signal.SIGCONT)
    doomed = [*known, *family(process.pid)]
    end(doomed)
    process.communicate()
    return doomed


def family(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    parent = psutil.Process(pid)
    return [*parent.children(recursive=True), parent]


def listening(processes: Sequence[psutil.Process]) -> dict[str, str]:
    """Address -> command line of every socket on which these processes accept TCP connections."""
    found = {}
    for process in processes:
        try:
            sockets = process.net_connections("tcp")
            command = " ".join(process.cmdline())[:80]
        except psutil.NoSuchProcess:
            continue
        found.update({f"{row.laddr.ip}:{row.laddr.port}": command for row in sockets if row.status == psutil.CONN_LISTEN})
    return found


def signal_to(process: psutil.Process, number: int) -> None:
    """A signal to a process that may be gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def stands_still(process: psutil.Process) -> bool:
    """It is stopped, or has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return True


def end(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL all of them and wait until they are gone."""
    for process in processes:
        signal_to(process, signal.SIGKILL)
    alive(processes)


def end_command(process: subprocess.Popen[str]) -> None:
    """The same for a command, if it still runs, and everything below it."""
    end(family(process.pid) if process.poll() is None else [])


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run after a minute: one that ends takes a moment."""
    deadline = time.monotonic() + 60
    while (left := [one for one in processes if is_alive(one)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left
