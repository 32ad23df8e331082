"""Two steps each of ARPO, AEPO and gain-guided rollouts on the demo, with one real engine: what grew as a tree is trained as one.

Three more runs share the engine: one replays successes, and two take the same step with probes scored by the trainer and in the engine.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from demo_runs import ROOT, DemoRuns, outcome

from igpo_megatron.types import RolloutGroup, Status

QUESTIONS, SAMPLES = 3, 6
SMALL = (
    "run.steps=2",
    "parallel.data=1",
    f"rollout.prompts_per_step={QUESTIONS}",
    f"rollout.samples_per_prompt={SAMPLES}",
    "rollout.engine.kv_cache_mib=64",
    "eval.at_ends=false",
    "checkpoint.every=0",
)
RUNS = {
    "arpo": ("arpo", "rollout.branching.initial_rollouts=3", "rollout.branching.entropy_weight=2.0"),
    "aepo": ("aepo", "rollout.branching.entropy_weight=2.0"),
    # The demo's values move much and disagree little in so few samples; these settings make both decisions happen.
    "gain": (
        "igpo",
        "reward.scorer=engine",
        "rollout.branching.name=gain",
        "rollout.branching.initial_rollouts=3",
        "rollout.branching.base_probability=0.3",
        "rollout.branching.stop_turns=1",
        "rollout.branching.stop_change=0.5",
        "rollout.branching.stop_value=0.0",
        "rollout.branching.stop_probability=0.6",
    ),
}


FEW = 3
"""Questions of the run that replays: every step asks all of them, so what failed may have succeeded before."""

REPLAYING = (
    "igpo",
    "run.steps=6",
    f"rollout.prompts_per_step={FEW}",
    "rollout.samples_per_prompt=2",
    "rollout.replay_successes=8",
    "loss.mismatch=truncate",
)

SCORED = ("igpo", "run.steps=1", "rollout.samples_per_prompt=4")
MORE_RUNS = {
    "replay": REPLAYING,
    "folded": SCORED,
    "in-engine": (*SCORED, "reward.scorer=engine", "loss.old_logprobs=engine"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoRuns]:
    with tempfile.TemporaryDirectory(prefix="igpo-e2e-") as temporary:
        demo = DemoRuns(tmp_path_factory.mktemp("branching"), Path(temporary))
        few = demo.folder / "few.parquet"
        pq.write_table(pq.read_table(demo.folder / "train.parquet").slice(0, FEW), few)
        arguments: list[str] = []
        for name, (recipe, *overrides) in (RUNS | MORE_RUNS).items():
            _, *common = demo.arguments(name, *SMALL, *overrides, *([f"data.train=[{few}]"] if name == "replay" else []))
            arguments += [*(["--"] if arguments else []), str(ROOT / f"examples/quickstart/{recipe}.yaml"), *common]
        code, output = outcome(demo.start([str(ROOT / "tests/e2e/branching_runs.py"), *arguments]))
        assert code == 0, output
        yield demo


def groups_of(demo: DemoRuns, name: str) -> list[RolloutGroup]:
    return [group for _, groups in demo.rollouts(name) for group in groups]


@pytest.mark.parametrize("name", RUNS)
def test_trees_are_grown_and_trained(demo: DemoRuns, name: str) -> None:
    rows, groups = demo.rows(name), groups_of(demo, name)
    assert [row["step"] for row in rows] == [1, 2] and len(groups) == 2 * QUESTIONS
    for row in rows:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["skipped"] == 0
        # fp32 on both sides: a turn whose state was taken from the wrong place would be off by whole nats.
        assert row["logprob_gap_max"] < 1e-3 and row["canary_gap"] < 1e-3
    assert sum(row["shared_tokens"] for row in rows) > 0 and any(group.is_branched for group in groups)
    for group in groups:
        assert len(group.trajectories) == SAMPLES and all(end.status.is_trainable for end in group.trajectories)
        for end_ in group.trajectories:
            parents = [group.nodes[index].parent for index in end_.path]
            assert parents == [None, *end_.path[:-1]], "a path is a walk down the tree"
            assert len(end_.turn_advantages) == len(group.actions(end_))


@pytest.mark.parametrize("name", RUNS)
def test_a_shared_turn_is_sampled_and_scored_once(demo: DemoRuns, name: str) -> None:
    for group in groups_of(demo, name):
        actions = [index for index, node in enumerate(group.nodes) if node.kind == "action"]
        assert set(actions) == {index for end_ in group.trajectories for index in end_.path if group.nodes[index].kind == "action"}
        for index in actions:
            node = group.nodes[index]
            assert len(node.behavior_logprobs) == len(node.old_logprobs) == len(node.token_ids)


@pytest.mark.parametrize("name", ["arpo", "aepo"])
def test_decisions_by_entropy_stand_in_the_rollout_file(demo: DemoRuns, name: str) -> None:
    points = [(group, point) for group in groups_of(demo, name) for point in group.branch_points]
    assert any(point.children for _, point in points) and not all(point.children for _, point in points)
    for group, point in points:
        assert group.nodes[point.node].kind == "observation" and point.kind == "top_k" and 0 <= point.probability <= 1
        if name == "arpo":
            assert point.probability == pytest.approx(min(max(0.5 + 2.0 * (point.entropy - point.initial), 0.0), 1.0))
        for child in point.children:
            assert point.node in group.trajectories[child].path


def test_decisions_by_gain_stand_in_the_rollout_file_and_are_what_the_probes_say(demo: DemoRuns) -> None:
    groups = groups_of(demo, "gain")
    points = [(group, point) for group in groups for point in group.value_points]
    assert {bool(point.children) for _, point in points} == {point.stopped for _, point in points} == {True, False}
    for group, point in points:
        assert point.value is not None and (point.siblings > 0 or point.spread == 0.0)
        probes = [node for node in group.nodes if node.kind == "probe" and node.parent == point.node]
        assert [point.value] == pytest.approx([math.exp(sum(node.old_logprobs) / len(node.old_logprobs)) for node in probes])
        assert point.stop_probability in (0.0, 0.6) and (point.stop_probability == 0.6 or not point.stopped)
        assert point.probability is None or point.probability == pytest.approx(min(0.3 + 2.0 * point.spread, 1.0))
        for child in point.children:
            assert point.node in group.trajectories[child].path
    stopped = [group.trajectories[point.trajectory] for group, point in points if point.stopped]
    asked = [end_ for group in groups for end_ in group.trajectories if any(group.nodes[index].kind == "asking" for index in end_.path)]
    assert len(stopped) == len(asked) and {id(end_) for end_ in stopped} == {id(end_) for end_ in asked}
    # A policy that is asked within its answer tag answers, unless it rambles past its tokens.
    assert sum(end_.status is Status.FINISHED for end_ in stopped) > len(stopped) / 2


def test_a_group_that_fails_is_trained_with_its_questions_earlier_success(demo: DemoRuns) -> None:
    succeeded: dict[str, list[list[int]]] = {}
    replayed = 0
    for step, groups in demo.rollouts("replay"):
        for group in groups:
            rewards = [end_.reward for end_ in group.trajectories]
            tokens = [[token for index in end_.path for token in group.nodes[index].token_ids] for end_ in group.trajectories]
            if group.metrics.get("replayed"):
                replayed += 1
                assert sorted(reward > 0.5 for reward in rewards) == [False, True], "one of two failures was replaced"
                assert tokens[rewards.index(max(rewards))] == succeeded[group.prompt.id][-1], f"step {step}: not the latest success"
            elif max(rewards) > 0.5:
                succeeded.setdefault(group.prompt.id, []).append(tokens[max(n for n, reward in enumerate(rewards) if reward > 0.5)])
    rows = demo.rows("replay")
    assert replayed > 0 and sum(row.get("replayed", 0.0) for row in rows) > 0
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] >= 0 for row in rows)


def test_probes_scored_in_the_engine_give_the_same_step_without_a_pass_for_old_log_probs(demo: DemoRuns) -> None:
    (row,), (folded,) = demo.rows("in-engine"), demo.rows("folded")
    assert [row["gain"], row["value_0"]] == pytest.approx([folded["gain"], folded["value_0"]], abs=1e-4)
    assert row["loss"] == pytest.approx(folded["loss"], rel=1e-2, abs=1e-4)
    # No pass was run: old log-probs are the engine's own numbers, which a pass of the trainer's does not repeat bit for bit.
    groups = {name: groups_of(demo, name) for name in ("in-engine", "folded")}
    turns = {name: [node for group in groups[name] for node in group.nodes if node.kind == "action"] for name in groups}
    assert turns["in-engine"] and all(node.old_logprobs == node.behavior_logprobs for node in turns["in-engine"])
    assert any(node.old_logprobs != node.behavior_logprobs for node in turns["folded"])


def test_the_reports_draw_the_trees(demo: DemoRuns) -> None:
    for name in RUNS:
        page = (demo.folder / name / "report.html").read_text(encoding="utf-8")
        assert "How the group branched" in page and '"forks": [{' in page
