"""The proof at the end of a soak trial sees a lost question and one trained twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import demo_data
import soak
import world_facts
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("soak")
    questions = [question for question in world_facts.build().questions if question.split == "train"][:60]
    demo_data.write_questions(questions, folder / "train.parquet")
    overrides = [f"data.train=[{folder / 'train.parquet'}]", f"run.steps={STEPS}", "rollout.prompts_per_step=3"]
    return load(soak.ROOT / "examples/quickstart/igpo.yaml", overrides)


def record(run: Path, steps: dict[int, list[Prompt]]) -> None:
    """Rollout files of a run: one trajectory for each question."""
    (run / "rollouts").mkdir(parents=True)
    for step, prompts in steps.items():
        groups = [
            RolloutGroup(prompt, [Node(None, "prompt", [1]), Node(0, "action", [2], 1)], [Trajectory([0, 1], Status.FINISHED)])
            for prompt in prompts
        ]
        write_rollouts(run / "rollouts" / f"step_{step:06d}.parquet", step, groups)


def drawn(config: Config) -> dict[int, list[Prompt]]:
    stream = PromptStream(config.data.train, seed=config.run.seed, shuffle=config.data.shuffle, balance=config.data.balance)
    return {step: [stream.question(ordinal) for ordinal in stream.draw(3)] for step in range(1, STEPS + 1)}


def test_a_run_that_trained_its_stream_lost_and_repeated_nothing(config: Config, tmp_path: Path) -> None:
    record(tmp_path, drawn(config))
    trained = soak.trained_questions(tmp_path, STEPS)
    assert sum(trained.values()) == 3 * STEPS
    assert soak.difference(trained, soak.expected_questions(config, STEPS)) == {"lost": [], "repeated": []}


def test_a_step_trained_with_the_questions_of_another_is_both_lost_and_repeated(config: Config, tmp_path: Path) -> None:
    steps = drawn(config)
    lost, repeated = (sorted(prompt.id for prompt in steps[step]) for step in (3, 2))
    steps[3] = steps[2]
    record(tmp_path, steps)
    found = soak.difference(soak.trained_questions(tmp_path, STEPS), soak.expected_questions(config, STEPS))
    assert found == {"lost": lost, "repeated": repeated}


def test_steps_that_were_not_saved_do_not_count(config: Config, tmp_path: Path) -> None:
    steps = drawn(config)
    record(tmp_path, {**steps, 4: steps[1]})
    found = soak.difference(soak.trained_questions(tmp_path, 3), soak.expected_questions(config, 3))
    assert found == {"lost": [], "repeated": []}


def test_every_time_too_often_counts() -> None:
    assert soak.difference(Counter(a=3, b=1), Counter(a=1, c=1)) == {"lost": ["c"], "repeated": ["a", "a", "b"]}


def test_the_newest_complete_checkpoint_is_the_progress_of_a_run(tmp_path: Path) -> None:
    assert soak.saved_step(tmp_path) == 0
    for name in ("step_000002", "step_000011", "step_000012.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").touch()
    assert soak.saved_step(tmp_path) == 11
