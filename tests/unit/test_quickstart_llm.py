"""The second demo's stages: what runs, what is kept, and what is printed. No model is loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import quickstart_llm  # noqa: E402
from igpo_megatron.config.load import load, to_json  # noqa: E402
from igpo_megatron.observability.rollout_dump import write_rollouts  # noqa: E402
from igpo_megatron.observability.run_folder import folder_for  # noqa: E402
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory, UserError  # noqa: E402

SCORES = {"sampled": {"f1": 0.25, "f1_se": 0.01, "format_ok": 0.9, "searches": 1.0, "questions": 2, "macro": {"sources": 1}}}


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Commands that the demo ran, each of which only leaves what the next looks for; demonstrations are what they are made of."""
    commands: list[list[str]] = []

    def igpo(*words: str) -> None:
        commands.append(list(words))
        out = tmp_path / words[words.index("--out") + 1] if "--out" in words else None
        if words[:2] == ("data", "demonstrations"):
            made_of = f"{Path(words[2]).read_text()} {[word for word in words if word.startswith('rollout.')]}"
            out.write_text(made_of)
            out.with_suffix(".held-out.parquet").write_text(made_of)
        elif out is not None:
            out.mkdir(parents=True)
        if words[0] == "demo-model":
            (out / "model.safetensors").write_bytes(b"weights")
        if words[0] == "eval":
            (out / "step_000000.json").write_text(json.dumps(SCORES))

    for name in ("SETTINGS", "COLD_START"):
        copy = tmp_path / getattr(quickstart_llm, name).name
        copy.write_bytes((ROOT / getattr(quickstart_llm, name)).read_bytes())
        monkeypatch.setattr(quickstart_llm, name, copy)
    folder = tmp_path / "start"
    monkeypatch.setattr(quickstart_llm, "FOLDER", folder)
    monkeypatch.setattr(quickstart_llm, "MODEL", folder / "smollm2")
    monkeypatch.setattr(quickstart_llm, "DEMONSTRATIONS", folder / "demonstrations.parquet")
    monkeypatch.setattr(quickstart_llm, "HELD_OUT", folder / "demonstrations.held-out.parquet")
    monkeypatch.setattr(quickstart_llm, "igpo", igpo)
    monkeypatch.setattr(quickstart_llm, "forecast", lambda: "")
    monkeypatch.chdir(tmp_path)
    return commands


def names(commands: list[list[str]]) -> list[str]:
    found = [" ".join(word for word in command[:2] if not word.endswith(".yaml")) for command in commands]
    commands.clear()
    return found


def test_stages_are_run_once_and_again_when_anything_that_makes_them_changes(stages):
    quickstart_llm.main()
    assert names(stages) == ["demo-model --out", "data demonstrations", "eval", "train", "convert megatron-to-hf", "train"]
    quickstart_llm.main(["run.steps=30"])
    assert names(stages) == ["data demonstrations", "train"]
    again = ["data demonstrations", "train", "convert megatron-to-hf", "train"]
    for name in ("model.safetensors", "tokenizer.json"):
        (quickstart_llm.MODEL / name).write_bytes(b"other")
        quickstart_llm.main()
        assert names(stages) == again, name
    quickstart_llm.COLD_START.write_text(quickstart_llm.COLD_START.read_text() + "\n")
    quickstart_llm.main()
    assert names(stages) == again


def test_the_settings_of_the_run_reach_what_is_shown_and_scored_before_it(stages):
    quickstart_llm.main()
    stages.clear()
    quickstart_llm.main(["rollout.protocol=hermes"])
    made, scored, cold, _, run = stages
    assert all("rollout.protocol=hermes" in command for command in (made, scored, run))
    assert [command[0] for command in (scored, cold)] == ["eval", "train"]


def test_every_cold_start_has_a_run_folder_of_its_own_and_the_newest_policy_a_fixed_name(stages):
    found = set()
    for settings in ([], ["rollout.protocol=hermes"]):
        quickstart_llm.main(settings)
        policy = quickstart_llm.FOLDER / "policy"
        found.add(policy.resolve())
        cold = next(command for command in stages if command[0] == "train")
        assert f"run.name=cold-start-{policy.resolve().name}" in cold and stages[-1][-1] == f"model.path={policy.resolve()}"
        stages.clear()
    assert len(found) == 2


def test_a_mistake_in_the_settings_is_reported_before_anything_is_made(stages):
    with pytest.raises(UserError, match=r"run\.stepz"):
        quickstart_llm.main(["run.stepz=5"])
    assert stages == []


def test_a_run_folder_of_other_settings_is_refused_before_the_cold_start(stages):
    old = folder_for(load(quickstart_llm.SETTINGS, []))
    old.root.mkdir(parents=True)
    old.config.write_text(to_json(load(quickstart_llm.SETTINGS, ["model.path=other"])))
    with pytest.raises(UserError, match=r"model\.path"):
        quickstart_llm.main()
    assert names(stages) == ["demo-model --out", "data demonstrations"]


def test_with_a_model_of_the_users_own_nothing_is_shown_and_no_score_is_a_cold_starts(stages, capsys):
    scores = folder_for(load(quickstart_llm.SETTINGS)).eval
    scores.mkdir(parents=True)
    (scores / "step_000000.json").write_text(json.dumps(SCORES))
    quickstart_llm.main(["model.path=mine"])
    assert names(stages) == ["train"]
    shown = capsys.readouterr().out
    assert "before" in shown and "cold start" not in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_ends_itself(tmp_path, number):
    """It has ranks and engines to end, and takes its time."""
    command = tmp_path / "command"
    waits = "for i in {1..600}; do sleep 0.1; done"
    command.write_text(f"#!/bin/bash\ntrap 'sleep 1; touch {tmp_path}/ended; exit 130' INT TERM\ntouch {tmp_path}/ready\n{waits}")
    command.chmod(0o755)
    begin = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import quickstart_llm as it"
    code = f"{begin}; sys.executable = {str(command)!r}; it.igpo()"
    demo = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    while not (tmp_path / "ready").exists():
        assert demo.poll() is None
        time.sleep(0.05)
    os.killpg(demo.pid, number) if number == signal.SIGINT else demo.send_signal(number)
    assert demo.wait(60) != 0 and (tmp_path / "ended").exists()


def test_the_settings_of_all_stages_fit_each_other():
    """The cold start reads the model and the demonstrations where the stages before it put them."""
    cold = load(quickstart_llm.COLD_START)
    assert cold.model.path == quickstart_llm.MODEL and cold.run.replay == quickstart_llm.DEMONSTRATIONS
    assert cold.loss.held_out == quickstart_llm.HELD_OUT == quickstart_llm.DEMONSTRATIONS.with_suffix(".held-out.parquet")
    assert load(quickstart_llm.SETTINGS).model.path == quickstart_llm.FOLDER / "policy"
    words = quickstart_llm.MAKE_DEMONSTRATIONS
    made = int(words[words.index("--count") + 1])
    assert cold.run.steps * cold.rollout.prompts_per_step <= made, "one epoch"


def test_a_column_for_each_evaluation():
    shown = {"f1_sampled": 0.25, "f1_sampled_se": 0.01, "f1_greedy": None, "format_valid": 0.5}
    console = Console(width=100, record=True)
    console.print(quickstart_llm.scores_table({"as it comes": {**shown, "f1_sampled": 0.0}, "cold start": shown, "20 steps": shown}))
    text = console.export_text()
    assert "as it comes" in text and "0.250 ± 0.010" in text and "0.000" in text


def _group(question: str, f1: float, said: str) -> RolloutGroup:
    nodes = [Node(None, "prompt", [1], text="?"), Node(0, "action", [2], 1, said)]
    end = Trajectory([0, 1], Status.FINISHED, reward_parts={"f1": f1})
    return RolloutGroup(Prompt(question, f"{question}?", ("x",), "kind"), nodes, [end])


def test_the_transcript_is_of_a_question_that_training_put_right(tmp_path):
    for step, scores in ((0, (0.0, 1.0)), (3, (1.0, 1.0))):
        groups = [_group(name, f1, f"{name} at {step}") for name, f1 in zip(("wrong", "right"), scores, strict=True)]
        write_rollouts(tmp_path / f"step_{step:06d}_greedy.parquet", step, groups)
    assert quickstart_llm.chosen(tmp_path, 3) == "wrong"
    assert quickstart_llm.transcript(tmp_path, 0, "wrong") == "Question: wrong?  (answer: x)\nwrong at 0"
    assert quickstart_llm.transcript(tmp_path, 3, "wrong").endswith("wrong at 3")


@pytest.mark.parametrize(("rate", "said"), [(1e15, "about 0 minutes"), (1e9, "run.steps=5")])
def test_the_forecast_follows_the_machine_and_offers_fewer_steps(monkeypatch, rate, said):
    monkeypatch.setattr(quickstart_llm, "matmul_rate", lambda dtype: rate)
    assert said in quickstart_llm.forecast()
