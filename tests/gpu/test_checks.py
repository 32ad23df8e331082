"""tools/gpu/checks.sh on a CPU: every part that a GPU will run has run here first, small, and left the figures that it is run for.

`make test` leaves tests/gpu/test_policy_gpu.py, the longest of what the parts test, to this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "smoke": {"chunk_tflops", "chunk_relative_error", "memory_gib"},
    "head_parity": {"passed", "failed", "skipped", "largest", "properties"},
    "trees": {"passed", "failed", "skipped", "largest", "properties"},
    "head_speed": {"by_shape", "not_loaded"},
    "fold": {"shape", "by_turns"},
    "step": {"machine", "passes", "planner"},
    "learn": {"igpo", "grpo"},
    "learn_model": {"igpo", "grpo"},
}
"""Part -> figures that its JSON has, among others."""

CURVES = {"step", "seconds", "f1", "gain"}
"""What learn.py has of every step of either algorithm, among others."""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_part_runs_small_on_a_cpu_and_leaves_its_figures(tmp_path: Path) -> None:
    # On a busy machine it has taken five minutes instead of one.
    command = [
        ROOT / "tools/gpu/checks.sh",
        "--device",
        "cpu",
        "--small",
        "--model",
        ROOT / "examples/quickstart/policy",
        "--out",
        tmp_path,
    ]
    result = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=850)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = read(tmp_path / "summary.json")
    assert {part["name"]: part["state"] for part in summary["parts"]} == dict.fromkeys(FIGURES, "ok")
    assert all(part["headline"] and part["seconds"] > 0 for part in summary["parts"])
    results = {name: read(tmp_path / f"{name}.json") for name in FIGURES}
    assert {name: result["device"] for name, result in results.items()} == dict.fromkeys(FIGURES, "cpu")
    for name in ("learn", "learn_model"):
        learnt = results.pop(name)
        assert learnt["result"].keys() >= FIGURES[name], name
        assert all(row.keys() >= CURVES for curve in learnt["curves"].values() for row in curve), name
    assert [name for name, result in results.items() if not result["figures"].keys() >= FIGURES[name]] == []
    for name in ("head_parity", "trees"):
        figures = results[name]["figures"]
        assert figures["passed"] > 3 and figures["failed"] == 0 and figures["largest"], name
