import math
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpo_megatron.observability import rollout_dump
from igpo_megatron.observability.rollout_dump import count_groups, read_rollouts, write_rollouts
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, ToolCall, Trajectory, UserError


def full_group(name: str = "q-1") -> RolloutGroup:
    """Every field set, every optional field both absent and present."""
    group = RolloutGroup(Prompt(name, "Währung von Iran?", ("Iranian Rial", "Rial"), "world"), [], metrics={"nonfinite_gains": 0.0})
    prompt = group.add(Node(None, "prompt", [1, 2, 3], text="Währung?"))
    forced = group.add(Node(prompt, "forced", [4], 1, "<think>"))
    group.add(Node(forced, "probe", [9, 10, 11, 12], 0, "Rial", old_logprobs=[-0.1, -2.25], scored=(1, 3)))
    search = ToolCall("search", ("currency of Iran", ""))
    logprobs = [-0.1, -1e-30]
    action = group.add(Node(forced, "action", [5, 6], 1, "x", 7, logprobs, [-0.2, -0.3], [-0.4, -0.5], search))
    seen = group.add(Node(action, "observation", [7], 1, "(1) Rial \U0001f600\x00"))
    last = group.add(Node(seen, "action", [8], 2, "", 7, [-math.inf]))
    group.trajectories.append(
        Trajectory([prompt, forced, action, seen, last], Status.FINISHED, "Rial", "", 1.0, {"f1": 1.0}, [0.0, None], [0.5])
    )
    group.trajectories.append(Trajectory([prompt, forced, action], Status.TOOL_FAILED, None, "bm25: timeout", -2.0))
    return group


def test_groups_come_back_exactly(tmp_path):
    groups = [full_group("a"), RolloutGroup(Prompt("empty", "", (), ""), []), full_group("b")]
    write_rollouts(tmp_path / "rollouts" / "step_000003.parquet", 3, groups)
    assert list(read_rollouts(tmp_path / "rollouts" / "step_000003.parquet")) == [(3, groups)]
    assert count_groups(tmp_path / "rollouts" / "step_000003.parquet") == 3


def test_a_file_from_before_groups_could_branch_is_read(tmp_path):
    write_rollouts(tmp_path / "new.parquet", 3, [full_group()])
    for count in (1, 2):
        dropped = ["value_points", "branch_points"][:count]
        pq.write_table(pq.read_table(tmp_path / "new.parquet").drop_columns(dropped), tmp_path / "old.parquet")
        assert list(read_rollouts(tmp_path / "old.parquet")) == [(3, [full_group()])]


def test_a_node_without_weights_and_a_gain_of_zero_stay_what_they_are(tmp_path):
    write_rollouts(tmp_path / "x.parquet", 0, [full_group()])
    ((_, (group,)),) = read_rollouts(tmp_path / "x.parquet")
    assert group.nodes[0].parent is None and group.nodes[0].weight_version is None and group.nodes[0].scored is None
    assert group.trajectories[0].gains == [0.0, None] and group.trajectories[0].gains[0] is not None
    assert group.nodes[2].scored == (1, 3) and isinstance(group.nodes[2].scored, tuple)
    assert isinstance(group.trajectories[1].status, Status)


def test_a_file_of_no_groups_reads_as_no_steps(tmp_path):
    write_rollouts(tmp_path / "x.parquet", 1, [])
    assert list(read_rollouts(tmp_path / "x.parquet")) == []


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda group: setattr(group.nodes[1], "parent", 3), "node 1 has the parent 3"),
        (lambda group: setattr(group.nodes[0], "parent", 0), "node 0 has the parent 0"),
        (lambda group: group.trajectories[0].path.append(77), "a path is"),
        (lambda group: setattr(group.trajectories[0], "status", type("Odd", (), {"value": "stoned"})), "'stoned' is not a valid Status"),
    ],
)
def test_a_damaged_group_is_one_sentence_and_no_endless_walk(tmp_path, damage, why):
    group = full_group()
    damage(group)
    write_rollouts(tmp_path / "x.parquet", 1, [full_group(), group])
    with pytest.raises(UserError, match=rf"x\.parquet: row \d or one behind it.*{why}"):
        list(read_rollouts(tmp_path / "x.parquet"))


def test_a_file_with_a_damaged_middle_is_one_sentence(tmp_path):
    path = tmp_path / "x.parquet"
    write_rollouts(path, 1, [full_group(str(number)) for number in range(50)])
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet: row 0 or one behind it"):
        list(read_rollouts(path))


def test_a_large_step_can_be_read_in_parts_across_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_dump, "ROWS", 4)
    groups = [full_group(str(number)) for number in range(10)]
    write_rollouts(tmp_path / "x.parquet", 5, iter(groups))
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    assert [[group.prompt.id for group in part] for _, part in read_rollouts(tmp_path / "x.parquet", 3)] == [
        ["0", "1", "2"],
        ["3", "4", "5"],
        ["6", "7", "8"],
        ["9"],
    ]
    ((step, whole),) = read_rollouts(tmp_path / "x.parquet")
    assert (step, whole) == (5, groups)


def test_steps_of_a_joined_file_are_kept_apart(tmp_path):
    for step in (1, 2):
        write_rollouts(tmp_path / f"{step}.parquet", step, [full_group("a"), full_group("b")])
    pq.write_table(pa.concat_tables([pq.read_table(tmp_path / f"{step}.parquet") for step in (1, 2)]), tmp_path / "all.parquet")
    assert [(step, len(groups)) for step, groups in read_rollouts(tmp_path / "all.parquet")] == [(1, 2), (2, 2)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.parquet"
    write_rollouts(path, 1, [full_group()])

    def breaks():
        yield full_group()
        raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        write_rollouts(path, 2, breaks())
    assert [step for step, _ in read_rollouts(path)] == [1]
    assert os.listdir(tmp_path) == ["x.parquet"]


def test_wrong_files_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"no\.parquet: no such rollout file"):
        read_rollouts(tmp_path / "no.parquet")

    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.parquet: not a parquet file"):
        read_rollouts(tmp_path / "text.parquet")

    pq.write_table(pa.table({"prompt": ["Who?"], "reward_model": ["x"]}), tmp_path / "questions.parquet")
    with pytest.raises(
        ValueError, match=r"column 'step' is missing.*column 'prompt' is string, expected struct.*its columns: prompt, reward_model"
    ):
        read_rollouts(tmp_path / "questions.parquet")

    write_rollouts(tmp_path / "x.parquet", 1, [full_group()])
    table = pq.read_table(tmp_path / "x.parquet").drop_columns(["metrics"])
    pq.write_table(table, tmp_path / "cut.parquet")
    with pytest.raises(ValueError, match="column 'metrics' is missing"):
        count_groups(tmp_path / "cut.parquet")
