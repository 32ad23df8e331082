"""NVIDIA Apex's kernels are used where they are importable, and `igpo doctor` says of a machine what the actor does on it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from conftest import make_config

from checkpoint_conversion.architectures import read_shape
from igpo_megatron.doctor import machine as doctor
from igpo_megatron.policy import model
from igpo_megatron.policy.model import fuses_gradients, transformer_config

KERNEL = "fused_weight_gradient_mlp_cuda"


@pytest.fixture(params=[False, True], ids=["without", "with"])
def built(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a module of the kernel's name can be imported."""
    assert importlib.util.find_spec(KERNEL) is None
    if request.param:
        (tmp_path / f"{KERNEL}.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    return bool(request.param)


def test_weight_gradients_are_fused_on_a_gpu_where_the_kernel_is_built(built: bool) -> None:
    assert fuses_gradients(cuda=True) is built
    assert fuses_gradients(cuda=False) is False


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_megatron_is_told_so(hf_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, built: bool, cuda: bool) -> None:
    monkeypatch.setattr(model, "wants_cuda", lambda device: cuda)
    config = transformer_config(read_shape(hf_folders["qwen3"]), make_config(hf_folders["qwen3"]))
    assert config.gradient_accumulation_fusion is (built and cuda)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_doctor_says_what_the_actor_does(monkeypatch: pytest.MonkeyPatch, built: bool, gpu: bool) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: gpu)
    rows = {row.name: row for row in doctor.accelerations()}
    assert (rows["active: gradient accumulation"].found == "fused into the matmul") is fuses_gradients(cuda=gpu)
    assert ("github.com/NVIDIA/apex" in rows["active: gradient accumulation"].advice) is (gpu and not built)
    layers = "TransformerEngine" if model.resolve_backend("auto", cuda=gpu) == "te" else "local"
    assert layers in rows["active: layers"].found
