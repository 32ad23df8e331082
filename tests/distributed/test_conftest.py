"""What the other tests begin with."""

from __future__ import annotations

import ast
import os
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import conftest
import language_model
import pytest
import torch
from conftest import make_config

from checkpoint_conversion import gguf_to_hf
from igpo_megatron.policy import cpu, parallel


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


def test_ranks_on_a_cpu_are_forked_where_no_gpu_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else each of them would die in its backward pass, on a machine that has a GPU."""
    seen: list[str | None] = []

    def started(*arguments: Any, method: str) -> list[list[str]]:
        assert method == "forkserver"
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return [["result"]]

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(conftest, "run_ranks_for_each", started)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert conftest.run_one_rank(len, make_config(tmp_path)) == "result"
    assert seen == [""] and os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_rank_that_dies_is_not_waited_for() -> None:
    asked = mock.Mock(side_effect=queue.Empty)
    with pytest.raises(AssertionError, match="Rank-2 ended without a word"):
        conftest._next(
            SimpleNamespace(get=asked), [SimpleNamespace(name="Rank-1", exitcode=None), SimpleNamespace(name="Rank-2", exitcode=-6)]
        )
    asked.assert_called_once_with(timeout=1)
    said: queue.Queue[str] = queue.Queue()
    said.put("its last words")
    assert conftest._next(said, [SimpleNamespace(name="Rank-2", exitcode=-6)]) == "its last words"


def test_the_language_model_is_made_once_and_again_when_the_code_that_makes_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, made = tmp_path / "model", []

    def make(gguf: Path, out: Path) -> None:
        made.append(gguf)
        out.mkdir()

    monkeypatch.setattr(language_model, "PLACE", place)
    monkeypatch.setattr(language_model, "demo_gguf", lambda: Path("m.gguf"))
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(language_model, "gguf_to_hf", make)
    with ThreadPoolExecutor(2) as workers:
        found = list(workers.map(lambda _: language_model.language_model(), range(2)))
    assert found == [place, place] and len(made) == 1 and place.is_dir()
    monkeypatch.setattr(language_model, "made_of", lambda: "other code")
    assert language_model.language_model() == place and len(made) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.lock", "model.txt"]


def test_without_its_package_the_language_model_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_to_hf, "DEMO_PACKAGE", "no-such-package")
    with pytest.raises(pytest.skip.Exception, match="no-such-package, which is not installed; `make venv-llm`"):
        language_model.language_model()
