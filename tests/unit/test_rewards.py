"""Outcome rewards of trajectories and of whole texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from igpo_megatron.algorithms.rewards import exact_match, f1, score, score_lines
from igpo_megatron.config.schema import Reward
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

GOOD = "<think>x</think><answer>Rome</answer>"


def scored(text: str, *, observation: str = "", status: Status = Status.FINISHED, config: Reward | None = None) -> Trajectory:
    group = RolloutGroup(Prompt("q", "?", ("Rome", "Roma Capitale"), "test"), [Node(None, "prompt", [1], text="Use <answer> tags")])
    search = group.add(Node(0, "action", [2], 1, "<think>y</think><tool_call>{}</tool_call>"))
    seen = group.add(Node(search, "observation", [3], 1, observation))
    group.trajectories = [Trajectory([0, search, seen, group.add(Node(seen, "action", [4], 2, text))], status)]
    score(group, config or Reward())
    return group.trajectories[0]


def test_f1_is_on_sets_of_words_and_takes_the_best_alias() -> None:
    """{rome, italy} against {roma, capitale} and {rome}: P = 1/2, R = 1 -> 2/3; repeated words count once; articles stay."""
    assert f1("Rome, Italy", ("Roma Capitale", "Rome")) == pytest.approx(2 / 3)
    assert f1("rome rome", ("Rome",)) == 1.0
    assert f1("the Rome", ("Rome",)) == pytest.approx(2 / 3)
    assert f1("", ("Rome",)) == 0.0
    assert (exact_match("ROME.", ("Rome",)), exact_match("Rome Italy", ("Rome",))) == (1.0, 0.0)


def test_a_right_answer_in_the_right_format_earns_its_score() -> None:
    trajectory = scored(GOOD)
    assert trajectory.reward == 1.0 and trajectory.reward_parts == {"f1": 1.0, "em": 1.0, "format_ok": 1.0}


@pytest.mark.parametrize("hostile", ["<answer>", "</think>", "<tool_call>", "<answer>Paris</answer>"])
def test_tags_in_tool_text_do_not_break_the_format_or_answer_the_question(hostile: str) -> None:
    assert scored(GOOD, observation=hostile).reward == 1.0


@pytest.mark.parametrize("own", ["<think>x<answer>Rome</answer>", "<think>x</think><answer>Rome", "<think>x</think>Rome"])
def test_the_models_own_broken_tags_earn_the_penalty(own: str) -> None:
    trajectory = scored(own)
    assert trajectory.reward == -2.0 and trajectory.reward_parts["format_ok"] == 0.0


def test_an_unfinished_trajectory_earns_the_configured_penalty_and_a_failed_one_nothing() -> None:
    assert scored(GOOD, status=Status.TRUNCATED_TOKENS, config=Reward(format_penalty=-0.5)).reward == -0.5
    failed = scored(GOOD, status=Status.TOOL_FAILED)
    assert failed.reward == 0.0 and failed.reward_parts == {}


def test_scoring_a_file_gives_one_row_per_line(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [{"solution": GOOD, "ground_truth": "Paris<|answer_split|>Rome"}, {"solution": "Rome", "ground_truth": "Rome"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list(score_lines(file)) == [
        {"f1": 1.0, "em": 1.0, "format_ok": True, "reward": 1.0},
        {"f1": 0.0, "em": 0.0, "format_ok": False, "reward": -2.0},
    ]


@pytest.mark.parametrize(("line", "named"), [("not json", "2"), ('{"solution": "x"}', "ground_truth")])
def test_a_wrong_line_is_named(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"solution": "x", "ground_truth": "y"}) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=named):
        list(score_lines(file))
