"""Runs of the demo in a folder of their own, and the processes they start: what the end-to-end tests share."""

from __future__ import annotations

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
from igpo_megatron.types import RolloutGroup

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples/quickstart/igpo.yaml"
POLICY = ROOT / "examples/quickstart/policy"


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

    def train(self, name: str, *overrides: str, timeout_s: float = 280, **environment: str) -> tuple[int, str]:
        """Exit code and output of a whole `igpo train`."""
        process = self.start(["-m", "igpo_megatron.cli", "train", *self.arguments(name, *overrides)], **environment)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            end(family(process.pid))
            raise
        return process.returncode, output

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


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float) -> None:
    """Poll every two milliseconds. Raises AssertionError with the process's output if it ends first, or at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            end(family(process.pid) if process.poll() is None else [])
            raise AssertionError(f"did not happen; exit code {process.returncode}:\n{process.communicate()[0]}")
        time.sleep(0.002)


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


def end(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL all of them and wait until they are gone."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=20)


def alive(processes: Sequence[psutil.Process]) -> list[str]:
    """Command lines of those that still run."""
    return [" ".join(row.cmdline()) for row in processes if row.is_running() and row.status() != psutil.STATUS_ZOMBIE]
