"""Rollouts that run ahead of training: requests under way while weights change, a kill, and a resume.

With the torch engine, whose thread decodes beside the training rank. vLLM's requests across new weights are those of test_engines.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_runs import CONFIG, DemoRuns, end, family, wait_for

from igpo_megatron.config.load import load
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.types import Node, RolloutGroup

STEPS, QUESTIONS, AHEAD = 4, 3, 1
SETTINGS = (
    f"run.steps={STEPS}",
    f"rollout.prompts_per_step={QUESTIONS}",
    "rollout.samples_per_prompt=4",
    f"rollout.max_staleness={AHEAD}",
    "loss.mismatch=truncate",
    "rollout.engine.backend=torch",
    # Slow searches: rollouts are under way when weights change.
    "search.mode=chaos",
    "search.chaos.failed_fraction=0",
    "search.chaos.latency_s=1.5",
    "search.chaos.latency_sigma=0.7",
    "rollout.engine.kv_cache_mib=64",
    "checkpoint.every=2",
    "eval.at_ends=false",
)


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoRuns]:
    """A run of four steps, killed behind its second and then finished by the same command."""
    with tempfile.TemporaryDirectory(prefix="igpo-e2e-") as temporary:
        demo = DemoRuns(tmp_path_factory.mktemp("ahead"), Path(temporary))
        command = ["-m", "igpo_megatron.cli", "train", *demo.arguments("ahead", *SETTINGS)]
        first = demo.start(command)
        wait_for((demo.folder / "ahead/checkpoints/step_000002").is_dir, first)
        stored = json.loads((demo.folder / "ahead/checkpoints/step_000002/state.json").read_text())
        end(family(first.pid))
        first.communicate()
        assert stored["run"]["prompts"]["open"] == [6, 7, 8], "the third step's questions were under way"
        code, output = demo.train("ahead", *SETTINGS)
        assert code == 0, output
        yield demo


def turns(groups: list[RolloutGroup]) -> list[Node]:
    return [node for group in groups for node in group.nodes if node.kind == "action"]


def test_no_question_is_lost_or_trained_twice_by_a_kill_with_rollouts_under_way(ahead: DemoRuns) -> None:
    asked = [group.prompt.id for _, groups in ahead.rollouts("ahead") for group in groups]
    order = PromptStream([ahead.folder / "train.parquet"], seed=load(CONFIG).run.seed, shuffle=True, balance="source")
    assert asked == [order.question(ordinal).id for ordinal in range(STEPS * QUESTIONS)]
    assert [row["step"] for row in ahead.rows("ahead")] == [1, 2, 3, 4]


def test_rollouts_run_ahead_as_far_as_they_may_and_no_further(ahead: DemoRuns) -> None:
    versions = {step: {node.weight_version for node in turns(groups)} for step, groups in ahead.rollouts("ahead")}
    assert all(versions[step] <= {step - 1, step - 2} for step in versions)
    assert 0 in versions[2] and 2 in versions[4], "steps 2 and 4 began with the weights before the newest"
    rows = {row["step"]: row for row in ahead.rows("ahead")}
    assert rows[1]["staleness_max"] == rows[3]["staleness_max"] == 0.0, "the first step after a start has nothing older"
    assert 0.0 < rows[2]["staleness_mean"] <= rows[2]["staleness_max"] == 1.0


def test_every_turn_names_the_weights_it_began_with_and_none_is_lost_to_an_update(ahead: DemoRuns) -> None:
    groups = [group for _, groups in ahead.rollouts("ahead") for group in groups]
    for group in groups:
        for trajectory in group.trajectories:
            versions = [node.weight_version or 0 for node in group.actions(trajectory)]
            assert trajectory.status.is_trainable and versions == sorted(versions)


def test_engine_and_trainer_agree_on_turns_of_the_same_weights(ahead: DemoRuns) -> None:
    rows = ahead.rows("ahead")
    assert all(row["canary_gap"] < 1e-3 for row in rows)
    assert all(row["logprob_gap_max"] < 1e-3 for row in rows if row["staleness_max"] == 0.0)
    assert any("stale_gap_mean" in row and 0.0 < row["importance_ess"] <= 1.0 for row in rows)


def test_policy_and_engines_take_turns_on_the_same_devices(ahead: DemoRuns) -> None:
    """Engines sleep while the policy trains, the policy leaves while they roll out, and both are whole whenever they are used."""
    settings = ("run.steps=2", "placement.mode=colocated", "rollout.engine.kv_cache_mib=64", "rollout.prompts_per_step=3")
    code, output = ahead.train("turns", *settings, "rollout.samples_per_prompt=4", "checkpoint.every=1", "eval.at_ends=false")
    assert code == 0, output
    rows = ahead.rows("turns")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["canary_gap"] < 1e-3 and row["logprob_gap_max"] < 1e-3 for row in rows)
    assert all(row[f"memory/{phase}_mib"] > 0 for row in rows for phase in ("rollout", "score", "train"))
    versions = {step: {node.weight_version for node in turns(groups)} for step, groups in ahead.rollouts("turns")}
    assert versions == {1: {0}, 2: {1}}
    assert len(list((ahead.folder / "turns/checkpoints").glob("step_*"))) == 2
