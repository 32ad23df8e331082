"""The path from `igpo train` to the loss: what training/main.py lists is the real call stack, and it stays short."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_ends import run_ranks, settings
from torch.distributed.launcher import api
from typer.testing import CliRunner

from igpo_megatron import cli
from igpo_megatron.algorithms.losses import registry
from igpo_megatron.launch import agent
from igpo_megatron.training import main as training

ROOT = Path(__file__).parents[2]
MOST_FILES, MOST_CALLS = 4, 7

Call = tuple[str, str]
"""(file, function)."""


def listed() -> list[Call]:
    """THE PATH, as training/main.py has it."""
    lines = (training.__doc__ or "").partition("THE PATH")[2].splitlines()
    return [found.groups() for line in lines if (found := re.match(r" +(igpo_megatron/\S+\.py) (\w+)  ", line))]  # type: ignore[misc]


def calls(frame: FrameType | None) -> list[Call]:
    """Functions of ours that are being called, the outermost first."""
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if (ROOT / "igpo_megatron") in path.parents:
            found.append((path.relative_to(ROOT).as_posix(), frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def test_the_path_is_short() -> None:
    path = listed()
    assert path[0] == ("igpo_megatron/cli.py", "train") and path[-1] == ("igpo_megatron/algorithms/losses/registry.py", "ppo")
    assert len(path) <= MOST_CALLS and len({file for file, _ in path}) <= MOST_FILES


@pytest.mark.parametrize("hop", [False, True])
def test_the_path_in_a_rank_is_the_one_that_is_listed(hop: bool, hf_folders: dict[str, Path], tmp_path: Path) -> None:
    """From `main` to the loss, as the process of a rank runs it. With a hop more it is another."""
    seen = tmp_path / "calls.json"

    def prepare(rank: int) -> None:
        inner, objective = registry.clipped_surrogate, registry.objective

        def recorded(*arguments: Any, **named: Any) -> Any:
            # What is below is the loss: the function that is being replaced belongs to no path.
            seen.write_text(json.dumps(calls(sys._getframe(1))), encoding="utf-8")
            return inner(*arguments, **named)

        registry.clipped_surrogate = recorded
        if hop:
            source = "def added(*arguments, **named):\n    return objective(*arguments, **named)"
            names: dict[str, Any] = {"objective": objective}
            exec(compile(source, str(ROOT / "igpo_megatron/training/step.py"), "exec"), names)
            registry.objective = names["added"]

    path = settings(hf_folders["qwen2"], tmp_path, parallel__tensor=1)
    ending, printed = run_ranks(path, prepare, world=1)
    assert ending.kind == "done", (ending, printed)
    found = [(file, function) for file, function in json.loads(seen.read_text(encoding="utf-8"))]
    assert (found == listed()[1:]) is not hop, found


def test_the_command_calls_torchruns_launcher_itself_and_a_rank_calls_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No function of ours is between `cli.train` and the process of a rank, which has one line of its own."""
    started: list[tuple[list[Call], tuple[str, ...]]] = []

    class Launcher:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, *command: str) -> None:
            started.append((calls(sys._getframe(1)), command))

    monkeypatch.setattr(api, "elastic_launch", Launcher)
    monkeypatch.setattr("igpo_megatron.training.checks.require", lambda *_: None)
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: m}}\nrun: {{folder: {tmp_path}, name: run, device: cpu}}\n", encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["train", str(file), "run.steps=2"])
    assert result.exit_code == 0, result.output
    ((path, command),) = started
    assert path[path.index(listed()[0]) :] == listed()[:1]
    assert command == ("-u", "-m", agent.RANK_MODULE, str(file), "run.steps=2")
    rank = ast.parse((ROOT / (agent.RANK_MODULE.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    called = [ast.unparse(node) for node in ast.walk(rank) if isinstance(node, ast.Call)]
    assert "end_process(train.main(sys.argv[1:]))" in called and not [node for node in ast.walk(rank) if isinstance(node, ast.FunctionDef)]
