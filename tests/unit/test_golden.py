"""The published code's own numbers: every recorded advantage and score is reproduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from igpo_megatron.algorithms.advantages.turn import igpo_turn_advantages
from igpo_megatron.algorithms.rewards import PUBLISHED_FORMAT_PENALTY, published_score

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
ADVANTAGES = json.loads((GOLDEN / "igpo_advantages.json").read_text(encoding="utf-8"))
SCORES = json.loads((GOLDEN / "outcome_scores.json").read_text(encoding="utf-8"))


def differences(cases: list[dict[str, Any]], **changed: Any) -> int:
    """Numbers that are off by more than 1e-4 relative."""
    wrong = 0
    for case in cases:
        settings = {key: case[key] for key in ("gamma", "normalise", "divide_by_std")} | changed
        found = igpo_turn_advantages(case["gains"], case["outcomes"], **settings)
        for row, expected in zip(found, case["turn_advantages"], strict=True):
            wrong += sum(left != pytest.approx(right, rel=1e-4, abs=1e-5) for left, right in zip(row, expected, strict=True))
    return wrong


def test_every_recorded_igpo_advantage_is_reproduced() -> None:
    assert len(ADVANTAGES) > 20 and differences(ADVANTAGES) == 0


@pytest.mark.parametrize("changed", [{"gamma": 0.5}, {"divide_by_std": False}])
def test_other_settings_do_not_pass_for_the_recorded_ones(changed: dict[str, Any]) -> None:
    assert differences([case for case in ADVANTAGES if case["divide_by_std"]], **changed) > 50


def test_every_recorded_outcome_score_is_reproduced() -> None:
    for case in SCORES:
        score = published_score(case["solution"], case["ground_truth"])
        f1, em = (score.f1, score.em) if score.format_ok else (PUBLISHED_FORMAT_PENALTY, PUBLISHED_FORMAT_PENALTY)
        assert (f1, em) == (pytest.approx(case["f1"]), case["em"]), case["solution"]
        assert score.reward == pytest.approx(case["f1"])
    assert {score["f1"] == PUBLISHED_FORMAT_PENALTY for score in SCORES} == {True, False}
