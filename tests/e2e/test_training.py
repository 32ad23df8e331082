"""The whole stack on the demo: ranks by torchrun, Ray, vLLM and real search; killed in the middle of a save, resumed, finished, replayed.

The engines are slow to start, so one run serves most tests: it is killed while it saves its second checkpoint and then started again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from demo_runs import CONFIG, POLICY, DemoRuns, alive, end, end_command, family, kill_while, listening, outcome, wait_for
from ports import free_port
from typer.testing import CliRunner

from igpo_megatron.cli import app
from igpo_megatron.config.load import load
from igpo_megatron.data.prompts import PromptStream

STEPS, QUESTIONS, SAMPLES = 3, 3, 4
SMALL = (
    f"run.steps={STEPS}",
    f"rollout.prompts_per_step={QUESTIONS}",
    f"rollout.samples_per_prompt={SAMPLES}",
    "rollout.engine.kv_cache_mib=64",
    "checkpoint.every=1",
    "checkpoint.keep=3",
    "eval.questions=6",
    "eval.samples=2",
)

LOOPBACK = ("127.", "::1:", "::ffff:127.")


@dataclass
class Finished:
    """What was seen while the run called `whole` was killed and resumed."""

    demo: DemoRuns
    sockets: dict[str, str]
    left_after_kill: list[Path]
    output: str
    processes: list[psutil.Process]

    @property
    def folder(self) -> Path:
        return self.demo.folder / "whole"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoRuns]:
    # Ray's sockets lie in the temporary folder, and the path of a socket has at most 107 bytes: pytest's own folder is too deep.
    with tempfile.TemporaryDirectory(prefix="igpo-e2e-") as temporary:
        yield DemoRuns(tmp_path_factory.mktemp("demo"), Path(temporary))


@pytest.fixture(scope="module")
def finished(demo: DemoRuns) -> Iterator[Finished]:
    checkpoints = demo.folder / "whole" / "checkpoints"
    command = ["-m", "igpo_megatron.cli", "train", *demo.arguments("whole", *SMALL)]
    first = demo.start(command)
    wait_for((checkpoints / "step_000001").is_dir, first)
    sockets = listening(family(first.pid))
    doomed = kill_while((checkpoints / "step_000002.partial").is_dir, first)
    left = sorted(checkpoints.iterdir())
    damage_newest(checkpoints)
    second = demo.start(command)
    wait_for((checkpoints / "step_000002.damaged").is_dir, second)
    wait_for((checkpoints / "step_000002").is_dir, second)
    processes = family(second.pid)
    code, output = outcome(second)
    assert code == 0, output
    yield Finished(demo, sockets, left, output, processes)
    end([*processes, *doomed])


def damage_newest(checkpoints: Path) -> None:
    """A checkpoint of step 2 whose shard is cut, and an evaluation of the steps behind it."""
    shutil.copytree(checkpoints / "step_000001", checkpoints / "step_000002")
    os.truncate(next((checkpoints / "step_000002" / "model").glob("*.distcp")), 1000)
    (checkpoints.parent / "eval" / f"step_{STEPS:06d}.json").write_text("{}", encoding="utf-8")


def test_a_killed_run_resumes_and_leaves_everything_a_run_should(finished: Finished) -> None:
    assert [path.name for path in finished.left_after_kill] == ["step_000001", "step_000002.partial"]
    assert "step_000002 is damaged (model/__" in finished.output and "bytes where" in finished.output
    assert "resuming from" in finished.output and "step_000001" in finished.output
    summary = json.loads((finished.folder / "summary.json").read_text())
    for moment in ("before", "after"):
        assert summary[moment]["questions"] == 6 and 0.0 <= summary[moment]["f1_sampled"] <= 1.0
        assert summary[moment].keys() >= {"f1_greedy", "em_greedy", "format_valid", "searches_per_question", "f1_sampled_se"}
    assert summary["steps"] == STEPS and summary["wall_s"] > 0
    assert summary["phases_s"].keys() >= {"rollout", "score", "train", "sync", "eval", "checkpoint"}
    assert 0 < summary["max_logprob_gap"] < 1e-3
    rows = finished.demo.rows("whole")
    assert [row["step"] for row in rows] == [1, 2, 3]
    # fp32 on both sides: engine and trainer may differ by rounding only, before and after every sync.
    assert all(math.isfinite(row["loss"]) and row["canary_gap"] < 1e-3 and row["logprob_gap_max"] < 1e-3 for row in rows)
    kept = [path.name for path in sorted((finished.folder / "checkpoints").iterdir())]
    assert kept == ["step_000001", "step_000002", "step_000002.damaged", "step_000003"]
    assert (finished.folder / "report.html").stat().st_size > 10_000


def test_a_killed_and_resumed_run_trains_every_question_once_and_in_order(finished: Finished) -> None:
    asked = [group.prompt.id for _, groups in finished.demo.rollouts("whole") for group in groups]
    order = PromptStream([finished.demo.folder / "train.parquet"], seed=load(CONFIG).run.seed, shuffle=True, balance="source")
    assert asked == [order.question(ordinal).id for ordinal in range(STEPS * QUESTIONS)]
    for step, groups in finished.demo.rollouts("whole"):
        assert all(len(group.trajectories) == SAMPLES for group in groups)
        assert {node.weight_version for group in groups for node in group.nodes if node.kind == "action"} == {step - 1}


def test_everything_listens_on_loopback_only(finished: Finished) -> None:
    assert len(finished.sockets) > 5
    assert {address: command for address, command in finished.sockets.items() if not address.startswith(LOOPBACK)} == {}


def test_nothing_of_a_finished_run_or_of_the_killed_one_before_it_is_left_behind(finished: Finished) -> None:
    assert len(finished.processes) > 5 and alive(finished.processes) == []
    assert list(finished.demo.temporary.glob("igpo-*")) == []


def test_a_second_call_prints_the_table_again_and_starts_nothing(finished: Finished) -> None:
    before = (finished.folder / "metrics.jsonl").read_bytes()
    code, output = finished.demo.train("whole", *SMALL)
    assert code == 0 and "held-out" in output and "this run is finished; to train again" in output
    assert (finished.folder / "metrics.jsonl").read_bytes() == before


def test_changed_settings_are_refused_with_both_values(finished: Finished) -> None:
    code, output = finished.demo.train("whole", *SMALL, "optim.lr=0.5")
    assert code == 2 and "optim.lr: 0.0003 -> 0.5" in output and "Traceback" not in output


def test_recorded_steps_train_on_one_rank_without_engines_to_the_same_losses(finished: Finished, tmp_path: Path) -> None:
    for name in ("ray", "vllm"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} must not be imported by a replay')")
    replay = f"run.replay={finished.demo.recording('whole')}"
    settings = [*SMALL, replay, "parallel.data=1", "reward.evidence=true"]
    code, output = finished.demo.train("one-rank", *settings, PYTHONPATH=str(tmp_path))
    assert code == 0, output
    rows = finished.demo.rows("one-rank")
    assert_same_training(rows, finished.demo.rows("whole"))
    assert all(row["gain_evidence"] + row["gain_reasoning"] == pytest.approx(row["gain"], abs=1e-6) for row in rows)


def test_two_torchrun_agents_with_tensor_parallelism_train_to_the_same_losses(finished: Finished) -> None:
    port = free_port()
    settings = [*SMALL, f"run.replay={finished.demo.recording('whole')}", "parallel.tensor=2", "parallel.data=1"]
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "pair"]
    launch += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    script = ["-m", "igpo_megatron.training.main", *finished.demo.arguments("two-agents", *settings)]
    agents = [finished.demo.start([*launch, "--node-rank", str(rank), *script], GLOO_SOCKET_IFNAME="lo") for rank in (0, 1)]
    try:
        ends = [outcome(agent) for agent in agents]
    finally:
        for agent in agents:
            end_command(agent)
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_training(finished.demo.rows("two-agents"), finished.demo.rows("whole"))


def assert_same_training(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """The first step starts from equal weights; later ones show that updates, and what a resume restored, were equal too."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for left, right in zip(found, expected, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4, abs=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lrr=1"], "optim.lr"),
        (["advantage.name=igpoo"], "did you mean 'igpo'"),
        (["parallel.tensor=3"], "parallel.tensor=3 does not divide the model's"),
        (["model.path=nowhere"], "model.path=nowhere: no such folder"),
        (["run.replay=nowhere.parquet"], "run.replay=nowhere.parquet: no such file"),
    ],
)
def test_a_mistake_in_the_settings_is_one_sentence_and_exit_code_2(demo: DemoRuns, overrides: list[str], expected: str) -> None:
    done = CliRunner().invoke(app, ["train", *demo.arguments("mistake", *SMALL, *overrides)])
    assert done.exit_code == 2 and expected in done.output and "Traceback" not in done.output
    assert not (demo.folder / "mistake").exists()


def test_igpo_score_prints_a_line_for_a_line(tmp_path: Path) -> None:
    file = tmp_path / "solutions.jsonl"
    file.write_text(json.dumps({"solution": "no tags", "ground_truth": "Paris"}) + "\n")
    done = CliRunner().invoke(app, ["score", str(file)])
    row = json.loads(done.output)
    assert done.exit_code == 0 and (row["f1"], row["em"], row["reward"]) == (0, 0, -2.0) and not row["format_ok"]


def test_igpo_eval_without_questions_says_so(demo: DemoRuns, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(CONFIG), "--model", str(POLICY), "--data", str(tmp_path / "none.parquet")])
    assert done.exit_code == 2 and "none.parquet: no such file" in done.output and "Traceback" not in done.output
