"""The second demo's stages: what runs, what is kept, and what is printed. No model is loaded."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import quickstart_llm  # noqa: E402
from igpo_megatron.config.load import load  # noqa: E402
from igpo_megatron.observability.rollout_dump import write_rollouts  # noqa: E402
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory  # noqa: E402

SCORES = {"sampled": {"f1": 0.25, "f1_se": 0.01, "format_ok": 0.9, "searches": 1.0, "questions": 2, "macro": {"sources": 1}}}


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Commands that the demo ran, each of which only leaves the file that the next looks for."""
    commands: list[list[str]] = []

    def igpo(*words: str) -> None:
        commands.append(list(words))
        if "--out" in words:
            out = tmp_path / words[words.index("--out") + 1]
            if words[:2] == ("data", "demonstrations"):
                out.write_bytes(b"demonstrations")
            else:
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
    monkeypatch.setattr(quickstart_llm, "igpo", igpo)
    igpo("demo-model", "--out", str(folder / "smollm2"))
    commands.clear()
    return commands


def test_a_cold_start_is_made_once_and_again_when_anything_that_makes_it_changes(stages):
    first = quickstart_llm.cold_started()
    assert [command[0] for command in stages] == ["data", "train", "convert"]
    stages.clear()
    assert quickstart_llm.cold_started() == first and stages == []
    for change in ("model", "settings"):
        file = quickstart_llm.MODEL / "model.safetensors" if change == "model" else quickstart_llm.COLD_START
        file.write_bytes(file.read_bytes() + b"\n")
        assert quickstart_llm.cold_started() != first and stages[0][0] != "convert", change
        stages.clear()


def test_the_settings_of_all_stages_fit_each_other():
    """The cold start reads the model and the demonstrations where the stages before it put them."""
    cold = load(quickstart_llm.COLD_START)
    assert cold.model.path == quickstart_llm.MODEL and cold.run.replay == quickstart_llm.DEMONSTRATIONS
    assert cold.loss.held_out == quickstart_llm.DEMONSTRATIONS.with_suffix(".held-out.parquet")
    words = quickstart_llm.MAKE_DEMONSTRATIONS
    made = int(words[words.index("--count") + 1])
    assert cold.run.steps * cold.rollout.prompts_per_step <= made, "one epoch"


def test_the_model_is_scored_before_anything_once(stages):
    assert json.loads(quickstart_llm.zero_shot().read_text()) == SCORES
    quickstart_llm.zero_shot()
    assert [command[0] for command in stages] == ["eval"]


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
