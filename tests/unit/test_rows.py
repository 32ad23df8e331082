"""A built-in advantage, loss or reward is one file and one row: a copy of the package gets one of each, and nothing else is changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FILES = {
    "advantages/median.py": '''
from statistics import median as middle
from typing import ClassVar, Literal

from igpo_megatron.algorithms.advantages.base import AdvantageSection


class Median(AdvantageSection):
    """Outcome minus the median of the group."""

    needs_probes: ClassVar[bool] = True

    name: Literal["median"] = "median"
    weight: float = 2.0
    """Weight of the outcome."""


def median(group, config, progress):
    center = middle(one.reward for one in group.trained)
    for one in group.trained:
        one.turn_advantages = [config.weight * (one.reward - center) for _ in one.turn_advantages]
''',
    "losses/plain.py": '''
from typing import Literal

from igpo_megatron.algorithms.losses.base import PolicyLoss


class Plain(PolicyLoss):
    """REINFORCE."""

    name: Literal["plain"] = "plain"
    scale: float = 0.5
    """Factor of the loss."""


def plain(tokens, counts, config):
    positive, negative = tokens.signed.unbind(-1)
    return config.scale * ((negative - positive) * tokens.logprobs).sum(), {}
''',
    "judge.py": """
def first_letter(answer, accepted):
    return float(any(answer[:1] == one[:1] for one in accepted))
""",
}

ROWS = {
    "advantages/registry.py": ("advantages.median", "Median, median", "ADVANTAGES", '"median": AdvantageEntry(Median, median)'),
    "losses/registry.py": ("losses.plain", "Plain, plain", "LOSSES", '"plain": LossEntry(Plain, plain)'),
    "outcomes.py": ("judge", "first_letter", "REWARDS", '"first_letter": OutcomeEntry(first_letter, str.lower)'),
}
"""Registry -> (module, what is imported of it, table, row)."""

USE = """
import sys
from igpo_megatron.algorithms.advantages.registry import set_advantages
from igpo_megatron.algorithms.hooks import tiny_group
from igpo_megatron.algorithms.outcomes import normal_form
from igpo_megatron.algorithms.rewards import outcome_of
from igpo_megatron.config.load import ConfigError, build, explain, parse, to_json

chosen = ["advantage.name=median", "loss.name=plain", "loss.kl_coef=0", "reward.outcome=first_letter"]
config = build({"model": {"path": "m"}}, chosen)
assert build(parse(to_json(config))) == config
assert "torch" not in sys.modules, "a configuration is read without torch"

shown = {"advantage": "weight  (float, default 2.0)", "loss": "scale  (float, default 0.5)", "reward.outcome": "(first_letter |"}
for section, said in shown.items():
    assert said in explain(section), explain(section)
mistakes = {"advantage.name=medan": "median", "loss.name=plane": "plain", "reward.outcome=first_leter": "first_letter"}
for wrong, right in mistakes.items():
    try:
        build({"model": {"path": "m"}}, [wrong])
    except ConfigError as error:
        assert str(error).endswith(f"did you mean {right!r}?"), error
    else:
        raise AssertionError(f"{wrong} was accepted")

group = tiny_group(with_gains=True)
set_advantages([group], config.advantage, 0.0)
assert [one.turn_advantages for one in group.trajectories] == [[1.0, 1.0], [-1.0]]
assert outcome_of(config.reward.outcome)("Rome", ["Rhodes"]) == 1.0 and normal_form("R.", "first_letter") == "r."

from igpo_megatron.algorithms.losses.registry import objective
from igpo_megatron.algorithms.losses.tiny import tiny_tokens
from igpo_megatron.types import StepCounts

tokens = tiny_tokens()
total, _ = objective(tokens, StepCounts(4, 2), config.loss)
total.backward()
assert tokens.logprobs.grad.tolist() == [-0.125, -0.125, 0.125, 0.125]  # scale (A- - A+) / 2 trajectories
"""


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of `igpo_megatron` that has the files and the rows."""
    rooms = tmp_path / "igpo_megatron/algorithms"
    shutil.copytree(ROOT / "igpo_megatron", tmp_path / "igpo_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        (rooms / name).write_text(text.lstrip(), encoding="utf-8")
    for name, (module, names, table, row) in ROWS.items():
        before, start, after = (rooms / name).read_text(encoding="utf-8").partition(f"{table}: dict[")
        head, brace, rows = after.partition("{\n")
        future = "from __future__ import annotations\n"
        before = before.replace(future, f"{future}\nfrom igpo_megatron.algorithms.{module} import {names}\n")
        (rooms / name).write_text(f"{before}{start}{head}{brace}    {row},\n{rows}", encoding="utf-8")
    return tmp_path


def test_an_advantage_a_loss_and_a_reward_are_found_by_their_rows_alone(package):
    command = [sys.executable, "-c", USE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=package, env={**os.environ, "PYTHONPATH": str(package)})
    assert done.returncode == 0, done.stderr
