import io
import json
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from igpo_megatron.observability import console, metrics_file, tracker
from igpo_megatron.observability.metrics_file import read_metrics, sum_phases
from igpo_megatron.observability.run_folder import public_config
from igpo_megatron.observability.settings import Track
from igpo_megatron.observability.tracker import Tracker


class Clock:
    """`time` for the tracker: moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_700_000_000.0 + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (tracker, console, metrics_file):
        monkeypatch.setattr(module, "time", clock)
    return clock


def open_tracker(folder, *, terminal=False, **options):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, highlight=False, _environ={})
    options = {"name": "demo", "total_steps": 4, **options}
    return Tracker(folder, Track(), console=console, **options), output


def test_every_step_is_one_row_with_its_metrics_and_phase_times(tmp_path, clock):
    tracker, _ = open_tracker(tmp_path)
    for step in (1, 2):
        with tracker.phase("rollout"):
            clock.now += 2
        with tracker.phase("train"):
            clock.now += step
        tracker.log(step, {"reward": 0.25 * step})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "time": 1_700_000_103.0, "phases_s": {"rollout": 2.0, "train": 1.0}, "reward": 0.25},
        {"step": 2, "time": 1_700_000_107.0, "phases_s": {"rollout": 2.0, "train": 2.0}, "reward": 0.5},
    ]
    assert tracker.phases_total() == {"rollout": 4.0, "train": 3.0}


def test_a_second_log_of_a_step_joins_its_row(tmp_path, clock):
    tracker, _ = open_tracker(tmp_path)
    tracker.log(1, {"reward": 1.0})
    with tracker.phase("train"):
        clock.now += 1
    tracker.log(2, {"reward": 0.5})
    with tracker.phase("eval"):
        clock.now += 3
    tracker.log(2, {"eval/sampled/f1": 0.25})
    tracker.log(2, {})
    tracker.log(3, {"reward": 0.75})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1] | {"time": 0} == {"step": 2, "time": 0, "phases_s": {"train": 1.0, "eval": 3.0}, "reward": 0.5, "eval/sampled/f1": 0.25}


def test_a_row_that_grows_shorter_leaves_no_end_of_the_longer_one_for_a_reader_to_find(tmp_path):
    """The rest was cut off behind the write: a reader in between, or a run that resumed after a kill in between, took it for a row."""
    tracker, _ = open_tracker(tmp_path)
    tracker.log(1, {"loss": 0.123456789})
    longer = (tmp_path / "metrics.jsonl").stat().st_size
    tracker.log(1, {"loss": 0.5})
    tracker.log(2, {"loss": 0.25})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 0.5), (2, 0.25)]
    first, _ = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(first) == longer


def test_a_nested_phase_takes_its_time_from_the_outer_one(tmp_path, clock):
    tracker, _ = open_tracker(tmp_path)
    with tracker.phase("eval"):
        clock.now += 1
        with tracker.phase("sync"):
            clock.now += 5
        clock.now += 2
    assert tracker.phases_total() == {"sync": 5.0, "eval": 3.0}


def test_a_phase_that_fails_is_closed_and_counted(tmp_path, clock):
    tracker, _ = open_tracker(tmp_path)
    with pytest.raises(OSError), tracker.phase("rollout"):
        clock.now += 2
        raise OSError
    clock.now += 50
    assert tracker.phases_total() == {"rollout": 2.0}


def test_resuming_drops_the_steps_that_will_run_again_and_a_torn_line(tmp_path, clock):
    tracker, _ = open_tracker(tmp_path)
    for step in (1, 2, 3):
        with tracker.phase("train"):
            clock.now += 10 * step
        tracker.log(step, {"reward": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    tracker, _ = open_tracker(tmp_path, resumed_step=2)
    assert tracker.phases_total() == {"train": 30.0}
    tracker.log(2, {"eval/greedy/f1": 0.5})
    tracker.log(3, {"reward": 33.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("reward"), row.get("eval/greedy/f1")) for row in rows] == [(1, 1.0, None), (2, 2.0, 0.5), (3, 33.0, None)]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_steps_never_go_back(tmp_path):
    tracker, _ = open_tracker(tmp_path, resumed_step=3)
    with pytest.raises(AssertionError, match="step 2 after step 3"):
        tracker.log(2, {})


def test_a_value_that_is_not_finite_becomes_null_and_the_file_stays_json(tmp_path):
    tracker, output = open_tracker(tmp_path)
    tracker.log(1, {"grad_norm": float("nan"), "loss": float("inf"), "reward": 1.0, "skipped": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["grad_norm"] is None and row["loss"] is None and row["reward"] == 1.0
    assert "skipped 1" in output.getvalue()


def test_a_damaged_row_is_named_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(path)
    path.write_text('{"step": "one"}\n')
    with pytest.raises(ValueError, match="line 1: expected an object with an integer 'step'"):
        read_metrics(path)


def test_without_a_terminal_there_is_a_line_per_step_and_per_long_phase(tmp_path, clock):
    tracker, output = open_tracker(tmp_path)
    with tracker:
        with tracker.phase("startup"):
            tracker.progress("starting engine")
            tracker.progress("starting engine")
            clock.now += 65
        for step in (1, 2):
            with tracker.phase("rollout"):
                for percent in range(20):
                    clock.now += 1
                    tracker.progress(percent / 20)
            tracker.log(step, {"reward": 0.5, "gain": -0.25, "f1": 0.125, "tokens_per_s": 1234.5, "skipped": 0.0})
        tracker.log(2, {"eval/sampled/f1": 0.31, "eval/sampled/em": 0.25, "eval/sampled/format_ok": 0.9})
    assert output.getvalue().splitlines() == [
        "demo: startup ...",
        "demo: startup: starting engine",
        "demo: startup took 1:05 min",
        "demo: rollout: 45%",
        "demo: rollout: 95%",
        "step 1/4  reward +0.500  gain -0.250  F1 0.125  1,234 tok/s  20.0 s  ETA 4 min",
        "demo: rollout: 45%",
        "demo: rollout: 95%",
        "step 2/4  reward +0.500  gain -0.250  F1 0.125  1,234 tok/s  20.0 s  ETA 105 s",
        "step 2/4  held-out, sampled:  F1 0.310  EM 0.250  format 0.90",
    ]


def test_lines_of_a_step_are_broken_between_figures_where_the_console_is_narrow(tmp_path, clock):
    figures = {"reward": -0.5, "gain": 11.25, "f1": 0.125, "tokens_per_s": 1234567.0, "skipped": 12.0, "crashed": 0.25}
    scores = {"f1": 0.31, "em": 0.25, "macro_f1": 0.3, "macro_em": 0.2, "format_ok": 0.9}
    for width, lines in ((80, [2, 2]), (160, [1, 1])):
        output = io.StringIO()
        console = Console(file=output, width=width, highlight=False, _environ={})
        tracker = Tracker(tmp_path / str(width), Track(), name="demo", total_steps=2000, console=console)
        with tracker.phase("rollout"):
            clock.now += 1000
        tracker.log(1, figures)
        tracker.log(1, {f"eval/greedy/{name}": value for name, value in scores.items()})
        shown = [line for line in output.getvalue().splitlines() if not line.startswith("demo:")]
        assert len(shown) == sum(lines) and max(map(len, shown)) <= width, shown
        said = " ".join(output.getvalue().split())
        assert "step 1/2000 reward -0.500 gain +11.250 F1 0.125 1,234,567 tok/s skipped 12 crashed 25.0% 1000.0 s ETA 555.3 h" in said
        assert "step 1/2000 held-out, greedy: F1 0.310 EM 0.250 over sources F1 0.300 EM 0.200 format 0.90" in said


def test_means_over_sources_that_are_those_over_questions_are_not_said_again(tmp_path):
    tracker, output = open_tracker(tmp_path)
    tracker.log(0, {f"eval/greedy/{name}": 0.5 for name in ("f1", "em", "macro_f1", "macro_em", "format_ok")})
    assert output.getvalue() == "step 0/4  held-out, greedy:  F1 0.500  EM 0.500  format 0.50\n"


def test_the_time_to_the_end_is_not_reckoned_from_start_up_and_the_first_evaluation(tmp_path, clock):
    tracker, output = open_tracker(tmp_path)
    clock.now += 1000
    tracker.log(0, {"eval/greedy/f1": 0.5})
    clock.now += 10
    tracker.log(1, {"reward": 0.5})
    assert output.getvalue().splitlines()[-1].endswith("ETA 30 s")


def test_a_terminal_shows_phase_progress_numbers_and_eta_in_place(tmp_path, clock):
    tracker, output = open_tracker(tmp_path, terminal=True)
    with tracker:
        clock.now += 8
        tracker.log(1, {"reward": 0.5, "f1": 0.125})
        with tracker.phase("rollout"):
            tracker.progress(0.5)
            clock.now += 3
            view = Console(file=io.StringIO(), width=120, highlight=False, _environ={})
            view.print(tracker._display.render())
        tracker.message("resuming from [step 1]")
        with tracker.phase("startup"):
            clock.now += 65
    first, second = view.file.getvalue().splitlines()
    assert first.startswith("demo") and first.rstrip().endswith("step 1/4 ETA 24 s")
    assert second.rstrip() == "rollout 50% 3.0 s  reward +0.500  F1 0.125"
    assert "step 1/4  reward +0.500" in output.getvalue() and "resuming from [step 1]" in output.getvalue()
    assert "demo: startup" not in output.getvalue() and "startup took 1:05 min" in output.getvalue()
    assert "step 1/4  reward +0.500  F1 0.125  0.0 s\n" in output.getvalue(), "the live display has the ETA"


def test_a_terminal_shows_the_last_numbers_of_a_run_that_resumes(tmp_path):
    open_tracker(tmp_path)[0].log(1, {"reward": 0.5})
    tracker, _ = open_tracker(tmp_path, resumed_step=1, terminal=True)
    view = Console(file=io.StringIO(), width=120, highlight=False, _environ={})
    view.print(tracker._display.render())
    assert view.file.getvalue().splitlines()[1].strip() == "reward +0.500"


def test_what_the_project_logs_is_printed_while_asked_for(tmp_path):
    tracker, output = open_tracker(tmp_path)
    log = logging.getLogger("igpo_megatron.kernels.somewhere")
    with tracker.shows_log("igpo_megatron"):
        log.info("log-probs on cpu: %s", "torch")
        log.debug("details")
    log.warning("nobody asked")
    assert output.getvalue() == "log-probs on cpu: torch\n"


def test_a_quiet_tracker_keeps_time_and_writes_nothing(tmp_path, clock):
    tracker, output = open_tracker(tmp_path / "run", quiet=True, terminal=True)
    with tracker:
        with tracker.phase("startup"):
            tracker.progress("loading")
            clock.now += 1
        tracker.log(1, {"reward": 1.0})
        tracker.message("hello")
    assert tracker.phases_total() == {"startup": 1.0}
    assert not (tmp_path / "run").exists() and output.getvalue() == ""


def test_phases_are_summed_over_rows_in_their_order():
    rows = [
        {"step": 0, "phases_s": {"startup": 2.0}},
        {"step": 1, "phases_s": {"train": 1.0, "rollout": 2.0}},
        {"step": 2, "phases_s": {"train": 0.5}},
    ]
    assert list(sum_phases(rows).items()) == [("startup", 2.0), ("rollout", 2.0), ("train", 1.5)]


def test_a_shown_configuration_holds_no_secret():
    config = {
        "search": {"api_key_env": "SERPER_API_KEY", "url": "http://user:pw@host:8000/retrieve?key=abc", "api_key": "abc"},
        "lists": ["https://token@host/x", "plain"],
        "password": "abc",
        "rollout": {"max_tokens": 3},
    }
    assert public_config(config) == {
        "search": {"api_key_env": "SERPER_API_KEY", "url": "http://***@host:8000/retrieve?***", "api_key": "***"},
        "lists": ["https://***@host/x", "plain"],
        "password": "***",
        "rollout": {"max_tokens": 3},
    }


WANDB_SCRIPT = """
import sys
from pathlib import Path
from igpo_megatron.config.schema import Track
from igpo_megatron.observability.tracker import Tracker
from igpo_megatron.types import Metric

folder = Path(sys.argv[1])
with Tracker(folder, Track(wandb="online"), name="demo", total_steps=1) as tracker:
    with tracker.phase("train"):
        pass
    tracker.log(1, {Metric.REWARD: 0.5})
"""


def test_wandb_online_without_a_key_stays_offline_inside_the_run_folder_and_silent(tmp_path):
    folder, home = tmp_path / "run", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    (folder / "config.json").write_text(json.dumps({"search": {"url": "http://user:hunter2@host/x"}}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {"HOME": str(home)}
    result = subprocess.run(
        [sys.executable, "-c", WANDB_SCRIPT, str(folder)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    (record,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"reward" in content and b"***@host" in content and b"hunter2" not in content
    assert "wandb" not in (result.stdout + result.stderr).lower()
    assert [path for path in home.rglob("*") if path.is_file()] == []
