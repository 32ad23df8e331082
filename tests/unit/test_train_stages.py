"""Stages of the training loop that need neither model nor engine: what is refused."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from igpo_megatron.algorithms.losses.clipped import Gspo
from igpo_megatron.algorithms.losses.registry import Ppo
from igpo_megatron.config.load import build
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.observability.run_folder import RunFolder, folder_for
from igpo_megatron.training.services import Services, collect, open_services, replayed
from igpo_megatron.training.step import refuse_shared_turns
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, ToolCall, Trajectory

ANSWER = "<think>I know.</think>\n<answer>{}</answer>"


def group_of(prompt: Prompt, answers: list[str], status: Status = Status.FINISHED) -> RolloutGroup:
    group = RolloutGroup(prompt, [Node(None, "prompt", [1])])
    for answer in answers:
        number = group.add(Node(0, "action", [2, 3], 1, text=ANSWER.format(answer)))
        group.trajectories.append(Trajectory([0, number], status))
    return group


def test_losses_on_sequences_refuse_trajectories_that_share_turns():
    group = group_of(Prompt("q", "?", ("a",), "t"), ["Rome"])
    refuse_shared_turns([group], Gspo())
    group.trajectories *= 2
    refuse_shared_turns([group], Ppo())
    with pytest.raises(ValueError, match=r"loss\.name=gspo judges whole trajectories"):
        refuse_shared_turns([group], Gspo())
    with pytest.raises(ValueError, match=r"loss\.mismatch=mask_sequence judges"):
        refuse_shared_turns([group], Ppo(mismatch="mask_sequence"))


@pytest.mark.parametrize(("name", "reward"), [("look_up", 1.1), ("search", 1.0)])
def test_a_replay_of_an_older_file_gives_the_tool_bonus_by_the_name_that_the_policy_knew(name: str, reward: float, tmp_path: Path):
    group = RolloutGroup(Prompt("q", "?", ("Rome",), "t"), [Node(None, "prompt", [1])])
    for tool in ("look_up", "python"):
        called = group.add(Node(len(group.nodes) - 1, "action", [2], 1, "<think>x</think>", call=ToolCall(tool, ("y",))))
        group.add(Node(called, "observation", [3], 1))
    last = group.add(Node(len(group.nodes) - 1, "action", [4], 3, ANSWER.format("Rome")))
    group.trajectories = [Trajectory(list(range(last + 1)), Status.FINISHED)]
    settings = ["advantage.name=grpo", "reward.gain=none", "reward.tool_bonus=0.1", "rollout.protocol=search_r1"]
    config = build({"model": {"path": "m"}}, [*settings, f"rollout.tool_name={name}"])
    for file, expected in (("old", reward), ("new", 1.0)):
        path = tmp_path / f"{file}.parquet"
        write_rollouts(path, 1, [group])
        if file == "old":  # from before calls had our names of tools
            pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
        (read,) = collect(config, Services(RunFolder(tmp_path), replay=replayed(path, config, 1)), step=1)
        assert read.trajectories[0].reward == pytest.approx(expected)
        assert [node.call.name for node in read.nodes if node.call] == ["search" if expected == 1.1 else "look_up", "python"]


@pytest.mark.parametrize(
    ("advantage", "probe", "warned"), [("igpo", "It is {answer}.", 1), ("igpo", None, 0), ("grpo", "It is {answer}.", 0)]
)
def test_a_run_warns_of_a_probe_in_another_form_than_its_protocols(
    advantage: str, probe: str | None, warned: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Path(__file__).parents[2] / "examples/quickstart/policy"
    given = [f"model.path={policy}", f"run.replay={tmp_path}/r.parquet", f"advantage.name={advantage}", "rollout.force_think=true"]
    config = build({}, [*given, *([f"reward.probe_template={probe!r}"] if probe else [])])
    with ExitStack() as stack:
        open_services(config, folder_for(config), stack, None, 1)  # type: ignore[arg-type]
    assert sum("reward.probe_template is no answer of rollout.protocol=igpo" in record.getMessage() for record in caplog.records) == warned


class BegunEngines:
    """Notes what is done to it."""

    def __init__(self, done: list[str]) -> None:
        self.begin, self.close = partial(done.append, "begin"), partial(done.append, "close")


@pytest.mark.parametrize(("mode", "begun"), [("disaggregated", ["begin"]), ("colocated", [])])
def test_engines_start_before_the_policy_unless_they_wait_for_its_memory_and_end_if_it_fails(
    mode: str, begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr("igpo_megatron.engines.factory.open_engines", lambda config: BegunEngines(done))
    monkeypatch.setattr("igpo_megatron.training.services.PromptStream", lambda *_, **named: None)
    monkeypatch.setattr("igpo_megatron.tools.registry.make_tools", lambda *_: {})
    policy = Path(__file__).parents[2] / "examples/quickstart/policy"
    config = build({}, [f"model.path={policy}", f"run.folder={tmp_path}", "rollout.force_think=true"])
    config = config.model_copy(update={"placement": config.placement.model_copy(update={"mode": mode})})
    tracker: Any = SimpleNamespace(progress=lambda state: None)
    stack = ExitStack()
    open_services(config, folder_for(config), stack, tracker, 1)
    assert done == begun
    stack.close()
    assert done == [*begun, "close"]
