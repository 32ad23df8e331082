"""What this machine is, told without importing torch: a result names its device even where torch does not start."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "megatron-core", "liger-kernel", "cut-cross-entropy", "transformer-engine")
GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "power.limit")


def gpu() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU that this process may use: GPU_FIELDS with their units; None without one."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader", f"--id={first}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return dict(zip(GPU_FIELDS, found.stdout.strip().split(", "), strict=True)) if found.returncode == 0 else None


def torch_gpu() -> str | None:
    """The GPU's name as torch says it, in a process of its own; None where torch sees none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    asked = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"], capture_output=True, text=True)
    return asked.stdout.strip() or None


def device_name() -> str:
    """The GPU's name, from nvidia-smi if it knows because that is fast; or `cpu`."""
    found = gpu()
    return (found["name"] if found else torch_gpu()) or "cpu"


def versions() -> dict[str, str]:
    """Python's and those of the PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the working tree, with `+` where files differ from it; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
