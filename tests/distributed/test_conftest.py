"""What the other tests begin with."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from conftest import make_config

from igpo_megatron.actor import cpu, parallel


def test_conftest_does_nothing_when_it_is_imported() -> None:
    """Tests on a GPU import it, too, and then build models there."""
    found = ast.parse((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8")).body[1:]
    assert {type(statement) for statement in found} == {ast.ImportFrom, ast.Import, ast.FunctionDef}
    assert not cpu.is_installed() and not hasattr(torch.Tensor.cuda, "__wrapped__")


def test_a_process_whose_megatron_was_kept_off_cuda_does_not_pretend_to_use_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "is_installed", lambda: True)
    config = make_config(tmp_path, run__device="cuda")
    with pytest.raises(AssertionError, match="runs on CPU in this process"):
        parallel.init(config)
