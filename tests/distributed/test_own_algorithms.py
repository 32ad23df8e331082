"""An advantage, a loss and a reward of a user's own, in a package outside of this one, train two steps on two ranks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import test_ends
from groups import random_groups
from test_ends import Sink, run_ranks, settings

from igpo_megatron.training import services
from igpo_megatron.types import RolloutGroup

MINE = '''
def best_only(group, config, progress):
    """1 for the best trajectory of a group, 0 for the others, times an option."""
    best = max(end.reward for end in group.trained)
    for end in group.trained:
        end.turn_advantages = [config.options["weight"] * (end.reward == best)] * len(end.turn_advantages)

def policy_gradient(tokens, counts, config):
    positive, negative = tokens.signed.unbind(-1)
    return -((positive - negative) * tokens.logprobs).sum(), {"surprise": -tokens.logprobs.detach()}

def half_as_long(answer, truths):
    return len(answer) / 2
'''


def answered(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """Every trajectory ends with an answer: of three letters, so that its reward is 1.5."""
    for group in groups:
        for node in (node for node in group.nodes if node.kind == "action"):
            node.text, node.behavior_logprobs = "<think>x</think>", [-1.0] * len(node.token_ids)
        for end in group.trajectories:
            group.nodes[end.path[-1]].text = "<think>x</think>\n<answer>abc</answer>"
    return groups


def open_services(config: Any, folder: Any, stack: Any, *_: Any) -> services.Services:
    recorded = iter([answered(random_groups(step, probes=False)) for step in (1, 2)])
    return services.Services(folder, engines=Sink(), replay=recorded)  # type: ignore[arg-type]


def test_functions_of_ones_own_train_two_steps(hf_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/mine.py").write_text(MINE, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # inherited by the ranks, which are forked
    monkeypatch.setattr(test_ends, "open_services", open_services)
    path = settings(hf_folders["qwen2"], tmp_path, run__steps=2)
    values = json.loads(path.read_text(encoding="utf-8"))
    values["advantage"] = {"name": "my_package.mine:best_only", "options": {"weight": 0.5}}
    values["loss"] = {"name": "my_package.mine:policy_gradient", "kl_coef": 0.01, "mismatch": "truncate"}
    values["reward"] = {"outcome": "my_package.mine:half_as_long", "gain": "none"}
    path.write_text(json.dumps(values), encoding="utf-8")
    ending, printed = run_ranks(path, lambda rank: None)
    assert ending.kind == "done", (ending, printed)
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = {row["step"]: row for row in steps if "loss" in row}
    assert set(trained) == {1, 2}
    for row in trained.values():
        assert row["reward"] == 1.5 and row["surprise"] > 0 and row["grad_norm"] > 0 and math.isfinite(row["loss"])
        assert {"kl_ref", "kl_old"} <= set(row)
