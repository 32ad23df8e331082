"""What the machine that a process runs on allows: the model's dtype and the number of threads where the settings say `auto`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
"""Flags of processors that multiply bf16 faster than fp32. Others emulate it, several times slower."""


SMALL_MODEL = 20_000_000
"""Parameters below which `auto` is one thread: the products of such a model are too short to share. A model of 135 M gains from two
threads, in training and in vLLM."""


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets of the first processor in a file like /proc/cpuinfo; empty where it cannot be read."""
    if not path.is_file():
        return set()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def cpu_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: those it may run on, or fewer where its control group (`docker run --cpus`) gives it less time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.floor(cpu_quota(cgroup) or cores)))


def cpu_quota(cgroup: Path) -> float | None:
    """Cores' worth of time that a control group is limited to, as version 2 or 1 of cgroups writes it; None for no limit."""
    files = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
    for names in files:
        with suppress(OSError):
            quota, period = " ".join((cgroup / name).read_text(encoding="ascii") for name in names).split()
            return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


def best_dtype(cuda: bool, flags: Set[str]) -> Literal["fp32", "bf16"]:
    """`model.dtype=auto`: bf16 on a GPU and on a processor with these flags if it has instructions for it."""
    return "bf16" if cuda or BF16_FLAGS & flags else "fp32"


def is_small(shape: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json, counted roughly as a dense one, has less than `SMALL_MODEL` parameters; no if it does not say."""
    hidden, layers, vocab = (shape.get(key) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if not (isinstance(hidden, int) and isinstance(layers, int) and isinstance(vocab, int)):
        return False
    return 12 * layers * hidden**2 + vocab * hidden < SMALL_MODEL


def thread_counts(cores: int, ranks: int, engines: int, together: bool) -> tuple[int, int]:
    """`auto` threads of each of the `ranks` and of the `engines`' processes on a machine.

    Where they take turns both sides have all `cores`; where they work at the same time (`together`) each has about half of them.
    """
    if together and engines:
        for_ranks = max(1, cores // 2)
        return max(1, for_ranks // ranks), max(1, (cores - for_ranks) // engines)
    return max(1, cores // ranks), max(1, cores // max(1, engines))
