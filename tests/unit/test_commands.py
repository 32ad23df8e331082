"""Everything that `igpo` can do is found from its help, in plain English, at once, in 80 columns; the scripts in tools/ do the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HELP = """
import json, sys
from typer.main import get_command
from typer.testing import CliRunner
from igpo_megatron import cli

def show(group, path):
    result = CliRunner().invoke(cli.app, [*path, "--help"], prog_name="igpo")
    assert result.exit_code == 0, result.output
    helps[" ".join(path)] = result.output
    if hasattr(group, "list_commands"):
        context = group.make_context("igpo", [], resilient_parsing=True)
        for name in group.list_commands(context):
            show(group.get_command(context, name), [*path, name])

helps = {}
show(get_command(cli.app), [])
heavy = {"torch", "ray", "vllm", "megatron", "transformers"} & sys.modules.keys()
print(json.dumps(helps))
sys.exit(f"loaded {sorted(heavy)}" if heavy else 0)
"""
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "COLUMNS": "80", "PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """Command -> its help, all made in one process that has loaded nothing heavy when it ends."""
    made = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert made.returncode == 0, made.stderr
    found: dict[str, str] = json.loads(made.stdout)
    return found


def test_every_command_helps_without_torch_in_80_columns_and_gives_an_example(helps: dict[str, str]) -> None:
    commands = {
        *("train", "launch", "eval", "score", "report", "plan", "config", "doctor", "doctor probes", "doctor chat", "doctor tools"),
        *("data", "data prepare", "data corpus", "data check", "data demonstrations", "serve", "serve retriever", "serve search"),
        *(
            "convert",
            "convert hf-to-megatron",
            "convert megatron-to-hf",
            "convert gguf-to-hf",
            "convert inspect",
            "convert verify",
            "demo-model",
        ),
    }
    assert set(helps) == {"", *commands}
    for name, text in helps.items():
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text, f"{name}: {text}"
    for name in commands - {"data", "serve", "convert"}:
        assert f"Example: igpo {name}" in helps[name], helps[name]
    assert all(f"│ {name} " in helps[""] for name in commands if " " not in name), helps[""]


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("prepare_data.py questions", "data prepare"),
        ("prepare_data.py corpus", "data corpus"),
        ("prepare_data.py check", "data check"),
        ("prepare_data.py world-facts", ""),
        ("serve_retriever.py", "serve retriever"),
        ("serve_search.py", "serve search"),
    ],
)
def test_scripts_are_thin_and_take_the_options_of_the_commands(helps: dict[str, str], script: str, command: str) -> None:
    name, *words = script.split()
    path = ROOT / "tools" / name
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 15
    shown = subprocess.run([sys.executable, path, *words, "--help"], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert shown.returncode == 0, shown.stderr
    options = [set(re.findall(r"--[a-z-]+", text)) for text in (shown.stdout, helps[command])]
    assert options[0] == options[1] if command else "--out" in options[0]
