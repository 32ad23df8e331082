"""Demonstrations dealt to steps, the held-out loss's verdict, and what a run says of it."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config
from igpo_megatron.observability.rollout_dump import RolloutRows, read_rollouts, write_rollouts
from igpo_megatron.observability.summary import held_out_loss
from igpo_megatron.training.supervised import Demonstrations, Progress, dealt, in_order
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory, UserError


def demonstration(number: int, tokens: int) -> RolloutGroup:
    group = RolloutGroup(Prompt(str(number), "?", ("a",), "t"), [Node(None, "prompt", [1])])
    group.add(Node(0, "action", [2] * (tokens - 1), 1))
    group.trajectories.append(Trajectory([0, 1], Status.FINISHED))
    return group


def written(path: Path, count: int, step: int = 0) -> Path:
    """`count` demonstrations of 5 to 90 tokens."""
    rng = random.Random(1)
    write_rollouts(path, step, [demonstration(number, rng.randint(5, 90)) for number in range(count)])
    return path


def settings(folder: Path, *overrides: str) -> Config:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 3}), encoding="utf-8")
    return build({"model": {"path": str(folder)}}, ["loss.name=sft", "rollout.prompts_per_step=4", *overrides])


def names(steps: list[list[RolloutGroup]]) -> list[list[str]]:
    return [[group.prompt.id for group in groups] for groups in steps]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_demonstration_once_and_the_next_one_again(shuffle: bool, tmp_path: Path) -> None:
    given = Demonstrations(written(tmp_path / "d.parquet", 30), settings(tmp_path, f"data.shuffle={str(shuffle).lower()}"))
    steps, epochs = [], []
    for groups in islice(given, 16):
        steps.append(groups)
        epochs.append(given.epoch)
    first, second = names(steps)[:8], names(steps)[8:]
    for epoch in (first, second):
        assert sorted(int(name) for step in epoch for name in step) == list(range(30))
    assert (first != second) is shuffle
    assert epochs == [number / 8 for number in range(1, 17)]
    if not shuffle:
        assert first[0] == ["0", "1", "2", "3"] and first[-1] == ["28", "29"]


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path, config = written(tmp_path / "d.parquet", 30), settings(tmp_path)
    whole = names([*islice(Demonstrations(path, config), 20)])
    for first in (1, 5, 8, 9, 14):
        assert names([*islice(Demonstrations(path, config, first), 20 - first + 1)]) == whole[first - 1 :]
    assert names([*islice(Demonstrations(path, settings(tmp_path, "run.seed=1")), 20)]) != whole


def test_steps_are_alike_in_tokens_where_they_are_dealt() -> None:
    rng = random.Random(0)
    tokens = [rng.randint(30, 480) for _ in range(160)]
    dealt_loads = [sum(tokens[row] for row in rows) for rows in dealt(tokens, 10, "key")]
    drawn_loads = [sum(tokens[start : start + 10]) for start in range(0, 160, 10)]
    assert len(dealt_loads) == 16
    assert (max(dealt_loads) - min(dealt_loads)) * 2 < max(drawn_loads) - min(drawn_loads)


def test_recorded_steps_stay_apart_in_the_order_of_the_file() -> None:
    assert in_order([1, 1, 1, 2, 2, 1], 2) == [[0, 1], [2], [3, 4], [5]]


def test_rows_of_a_file_are_its_groups(tmp_path: Path) -> None:
    path = written(tmp_path / "d.parquet", 1500, step=7)
    rows = RolloutRows(path)
    ((_, groups),) = read_rollouts(path)
    assert len(rows) == 1500 and set(rows.steps) == {7} and rows.last_token == 2
    assert rows.num_tokens == [sum(len(node.token_ids) for node in group.nodes) for group in groups]
    assert [rows[row] for row in (1499, 0, 1024, 1023)] == [groups[row] for row in (1499, 0, 1024, 1023)]


def test_demonstrations_of_another_vocabulary_and_empty_files_are_refused(tmp_path: Path) -> None:
    group = demonstration(0, 4)
    group.nodes[0].token_ids = [3]
    write_rollouts(tmp_path / "d.parquet", 0, [demonstration(1, 4), group])
    write_rollouts(tmp_path / "none.parquet", 0, [])
    with pytest.raises(UserError, match=r"it has token 3, the vocabulary of model\.path=.* ends at 2"):
        Demonstrations(tmp_path / "d.parquet", settings(tmp_path))
    with pytest.raises(UserError, match="no demonstrations in it"):
        Demonstrations(tmp_path / "none.parquet", settings(tmp_path))


def test_a_best_loss_is_a_lower_one_and_the_others_are_counted() -> None:
    progress = Progress()
    found = []
    for step, nll in enumerate((2.0, 1.0, 1.0, float("nan"), 0.5, 0.75)):
        progress = progress.after(step, nll)
        found.append((progress.best_step, progress.best_nll, progress.worse))
    assert found == [(0, 2.0, 0), (1, 1.0, 0), (1, 1.0, 1), (1, 1.0, 2), (4, 0.5, 0), (4, 0.5, 1)]
    assert Progress().after(0, float("nan")) == Progress(None, None, 1)


def test_a_summary_says_where_the_least_loss_was_and_that_the_run_stopped_for_it() -> None:
    found = {"best_step": 8, "best_nll": 0.25, "worse": 3}
    assert held_out_loss({"steps": 40}) is None
    assert held_out_loss({"steps": 40, "held_out": found}) == "the least held-out loss is 0.2500, after step 8 (checkpoints/best)"
    early = held_out_loss({"steps": 40, "stopped_at": 14, "held_out": found})
    assert early == f"stopped early after step 14 of 40: {held_out_loss({'steps': 40, 'held_out': found})}"
    assert "(the model that it began with)" in str(held_out_loss({"steps": 4, "held_out": found | {"best_step": 0}}))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["loss.held_out=no.parquet"], "loss.held_out=no.parquet: no such file"),
        (["loss.patience=2"], "loss.patience=2 waits for a better held-out loss"),
    ],
)
def test_wrong_settings_are_named(given: list[str], problem: str, tmp_path: Path) -> None:
    (found,) = settings(tmp_path, *given).loss.problems()
    assert found.startswith(problem)
