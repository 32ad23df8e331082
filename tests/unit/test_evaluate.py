"""What an evaluation says of its groups: micro and macro averages, and pass@k from the samples that did not fail."""

import itertools
import json
import math
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from statistics import fmean
from unittest import mock

import pytest

from igpo_megatron.config.load import build
from igpo_megatron.observability.metrics import SCORES, headline
from igpo_megatron.observability.report.header import outcomes_of
from igpo_megatron.observability.summary import summary_table
from igpo_megatron.observability.tracker import Tracker
from igpo_megatron.training.evaluate import evaluate_checkpoint, metrics, pass_at_k, saved_after, summarise
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory, UserError

CONFIG = build({"model": {"path": "m"}})


def group_of(*marks: float | None, source: str = "s", part: str = "em") -> RolloutGroup:
    """A sample per mark: its exact match, or None where a tool failed."""
    group = RolloutGroup(Prompt("q", "?", ("a",), source), [Node(None, "prompt", [1])])
    for mark in marks:
        action = group.add(Node(0, "action", [2], 1, weight_version=0))
        parts = {} if mark is None else {"f1": mark, "em": mark, "format_ok": 1.0, part: mark}
        group.trajectories.append(Trajectory([0, action], Status.TOOL_FAILED if mark is None else Status.FINISHED, reward_parts=parts))
    return group


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    for n in (1, 3, 5):
        for marks in itertools.product((False, True), repeat=n):
            for k in range(1, n + 1):
                assert pass_at_k(marks, k) == pytest.approx(fmean(any(chosen) for chosen in itertools.combinations(marks, k)))


def test_pass_at_k_leaves_out_failures_as_exact_match_does():
    """Right and failed samples by turns; a failure that counted as wrong would make 0.5 of the first number."""
    found = summarise([group_of(1.0, None, 1.0, None) for _ in range(3)], CONFIG)
    assert found["em"] == found["pass_at_k"]["1"] == found["pass_at_k"]["2"] == 1.0
    assert "4" not in found["pass_at_k"], "no question has four samples that did not fail"


def test_a_question_with_too_few_samples_is_left_out_of_a_k_and_counted():
    groups = [
        group_of(1.0, 0.0, 0.0, None),
        group_of(1.0, None, None, None),
        group_of(None, None, None, None),
        group_of(0.0, 0.0, 0.0, 1.0),
    ]
    found = summarise(groups, CONFIG)
    assert found["pass_at_k"] == pytest.approx({"1": (1 / 3 + 1 + 1 / 4) / 3, "2": (2 / 3 + 1 / 2) / 2, "4": 1.0})
    assert found["pass_at_k_questions"] == {"1": 3, "2": 2, "4": 1}
    assert found["pass_at_k"]["1"] == pytest.approx(found["em"])


def test_pass_at_k_judges_by_the_exact_match_of_the_outcome():
    config = build({"model": {"path": "m"}}, ["reward.outcome=em_squad"])
    group = group_of(0.0, 0.0, part="em_squad")
    group.trajectories[0].reward_parts["em_squad"] = 1.0
    found = summarise([group], config)
    assert (found["em"], found["em_squad"], found["pass_at_k"]) == (0.0, 0.5, {"1": 0.5, "2": 1.0})


def macro_report() -> dict[str, object]:
    """Three questions of one source, all right, and one of another, wrong; a source of which all failed says nothing."""
    groups = [*(group_of(1.0, source="nq") for _ in range(3)), group_of(0.0, source="musique"), group_of(None, source="popqa")]
    scores = summarise(groups, CONFIG)
    return {"sampled": scores, "greedy": scores}


def test_macro_averages_count_every_source_once():
    scores = macro_report()["sampled"]
    assert (scores["f1"], scores["macro"]["f1"], scores["macro"]["em"], scores["macro"]["sources"]) == (0.75, 0.5, 0.5, 2)
    spread = summarise([*(group_of(value, source="nq") for value in (0.0, 1.0)), group_of(0.5, source="tq")], CONFIG)
    assert spread["macro"]["f1_se"] == pytest.approx(math.sqrt(spread["per_source"]["nq"]["f1_se"] ** 2 / 4))
    assert summarise([], CONFIG)["macro"] == {"sources": 0}


def test_macro_averages_stand_beside_the_others_wherever_these_are_shown(tmp_path, capsys):
    report = macro_report()
    logged = metrics(report)
    assert (logged["eval/sampled/f1"], logged["eval/sampled/macro_f1"], logged["eval/greedy/macro_em"]) == (0.75, 0.5, 0.5)
    with Tracker(tmp_path, CONFIG.track, name="r", total_steps=1) as tracker:
        tracker.log(1, logged)
        tracker.log(1, {})
    assert "F1 0.750  EM 0.750  over sources F1 0.500  EM 0.500" in capsys.readouterr().out
    ends = headline(report)
    labels = [row["label"] for row in outcomes_of({"before": ends, "after": ends}, [])]
    assert [label for label in labels if "mean over sources" in label] == [
        "F1, sampled, mean over sources",
        "F1, greedy, mean over sources",
        "Exact match, greedy, mean over sources",
    ]
    table = summary_table({"steps": 1, "wall_s": 1.0, "phases_s": {}, "max_logprob_gap": 0.0, "before": ends, "after": ends})
    assert table.row_count == len(SCORES) + 1


def test_a_single_source_is_not_shown_twice():
    scores = summarise([group_of(1.0), group_of(0.0)], CONFIG)
    report = {"sampled": scores, "greedy": {}}
    assert scores["macro"]["f1"] == scores["f1"] == 0.5
    assert not any("macro" in name for name in metrics(report))
    ends = headline(report)
    assert not any("sources" in row["label"] for row in outcomes_of({"before": ends, "after": ends}, []))


def test_scores_of_a_checkpoint_carry_the_step_after_which_it_was_saved(tmp_path):
    checkpoint, converted = tmp_path / "step_000002", tmp_path / "exported"
    (checkpoint / "model").mkdir(parents=True)
    converted.mkdir()
    (converted / "config.json").touch()
    (checkpoint / "state.json").write_text('{"step": 2}')
    config = build({"model": {"path": "m"}, "data": {"eval": ["q.parquet"]}})
    with ExitStack() as stack:
        for name in (
            "checkpoint_conversion.convert.megatron_to_hf",
            "igpo_megatron.training.checks.require",
            "igpo_megatron.training.evaluate.questions",
        ):
            stack.enter_context(mock.patch(name))
        for name in (
            "chat.tokenizer.load_tokenizer",
            "chat.format.ChatFormat",
            "tools.registry.make_tools",
            "engines.factory.open_engines",
        ):
            stack.enter_context(mock.patch(f"igpo_megatron.{name}", return_value=mock.MagicMock(notes=[])))
        rollouter = mock.Mock()
        answered: Future[list[RolloutGroup]] = Future()
        answered.set_result([group_of(1.0)])
        rollouter.start.return_value = answered
        stack.enter_context(mock.patch("igpo_megatron.agent.rollouter.Rollouter", return_value=nullcontext(rollouter)))
        stack.enter_context(mock.patch("igpo_megatron.training.evaluate.score"))
        assert evaluate_checkpoint(config, checkpoint, tmp_path / "out")["step"] == 2
        assert json.loads((tmp_path / "out/step_000002.json").read_text())["step"] == 2
        assert evaluate_checkpoint(config, converted, tmp_path / "out")["step"] == 0, "a model that no run saved"


def test_a_checkpoint_of_the_converter_has_no_step_and_a_damaged_one_is_named(tmp_path):
    assert saved_after(tmp_path) == 0
    for text in ("{", "[]", '{"step": null}', '{"step": Infinity}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json is damaged"):
            saved_after(tmp_path)
