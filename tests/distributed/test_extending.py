"""docs/extending.md: each of its files trains two steps with the settings beside it, and leaves what only it can leave."""

from __future__ import annotations

import importlib
import json
import math
import re
import runpy
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_config, run_ranks
from groups import random_groups
from markdown_it import MarkdownIt
from scripted_run import FORK, STARTED, Script, print_to, run
from test_layouts import reference_logprobs, scored_nodes, worst

from checkpoint_conversion import hf_config
from checkpoint_conversion.architectures import ARCHITECTURES
from igpo_megatron.config.load import parse
from igpo_megatron.observability.metrics_file import read_metrics
from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.types import RolloutGroup, Status, ToolCall

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
KINDS = ("advantage", "loss", "reward", "search back-end", "tool", "protocol")

LOOK_UP = '<think>I look it up.</think>\n<tool_call>\n{"name": "search", "arguments": {"query": ["capital of Italy"]}}\n</tool_call>'
COUNT = '<think>a</think>\n<tool_call>\n{"name": "calendar", "arguments": {"first": "1969-07-16", "second": "1969-07-24"}}\n</tool_call>'
RIGHT = "<think>I know.</think>\n<answer>Rome</answer>"
WRONG = "<think>I guess.</think>\n<answer>Milan</answer>"
ANSWERS = (RIGHT, WRONG)


class Example(NamedTuple):
    """What a section of the page shows."""

    file: str
    code: str
    settings: dict[str, dict[str, Any]]


def example(kind: str) -> Example:
    """The one Python file of the section about `kind`, and the one YAML block behind it."""
    (section,) = re.findall(rf"^## Add an? {kind}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    tokens = MarkdownIt().parse(section)
    (place,) = [place for place, token in enumerate(tokens) if token.type == "fence" and token.info == "python"]
    named = re.search(r"`([\w/]+\.py)`:$", tokens[place - 2].content)
    assert named, f"the file of a {kind} has no name in front of it"
    blocks = [token.content for token in tokens[place:] if token.type == "fence" and token.info == "yaml"]
    assert len(blocks) == (kind != "model family")
    return Example(named[1], tokens[place].content, parse(blocks[0]) if blocks else {})


def train(folder: Path, shown: Example | None, script: Script, *overrides: str, world: int = 1) -> tuple[list[int], str]:
    """Two steps of the quickstart's policy on one question, with the file of `shown` and its settings in my.yaml."""
    asked = {"prompt": [{"role": "user", "content": "What is the capital of Italy?"}], "reward_model": {"ground_truth": ["Rome"]}}
    pq.write_table(pa.Table.from_pylist([{"data_source": "test", **asked} for _ in range(4)]), folder / "questions.parquet")
    (folder / "corpus.jsonl").write_text(json.dumps({"id": "1", "title": "Italy", "text": "Rome is the capital of Italy."}) + "\n")
    values = parse((ROOT / "examples/quickstart/igpo.yaml").read_text(encoding="utf-8"))
    if shown is not None:
        (folder / "my_package").mkdir()
        (folder / "my_package/__init__.py").touch()
        (folder / shown.file).write_text(shown.code, encoding="utf-8")
        for section, settings in shown.settings.items():
            # `name` of an advantage or loss says whose settings the section has.
            values[section] = settings if "name" in settings else values.get(section, {}) | settings
    (folder / "my.yaml").write_text(json.dumps(values), encoding="utf-8")
    arguments = [
        *("my.yaml", "run.name=run", f"run.folder={folder}", f"model.path={ROOT / 'examples/quickstart/policy'}", "run.steps=2"),
        *("search.corpus=corpus.jsonl", "data.train=[questions.parquet]", "data.eval=[]", "eval.at_ends=false", "data.balance=none"),
        *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_tokens_per_turn=160", "packing.row_tokens=2048"),
        *(f"parallel.tensor={world}", "parallel.data=1", "checkpoint.every=0"),
        *overrides,
    ]
    return run(folder, arguments, script, world)


class Trained(NamedTuple):
    """What two steps have left."""

    rows: list[dict[str, Any]]
    groups: list[RolloutGroup]

    def observations(self) -> list[str]:
        """What tools have shown."""
        return [node.text for group in self.groups for node in group.nodes if node.kind == "observation"]


def trained(folder: Path, kind: str | None, script: Script, *overrides: str, world: int = 1) -> Trained:
    """Train, and see that both steps have changed the weights."""
    codes, printed = train(folder, example(kind) if kind else None, script, *overrides, world=world)
    assert codes == [0] * world and STARTED in printed, printed
    rows = [row for row in read_metrics(folder / "run/metrics.jsonl") if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(abs(row["loss"]) < 100 and 0 < row["grad_norm"] < 1e4 for row in rows)
    paths = sorted((folder / "run/rollouts").glob("*.parquet"))
    return Trained(rows, [group for path in paths for _, groups in read_rollouts(path) for group in groups])


def rewards(group: RolloutGroup) -> list[float]:
    return sorted(trajectory.reward for trajectory in group.trajectories)


def test_two_steps_are_trained_as_the_script_says(tmp_path: Path) -> None:
    done = trained(tmp_path, None, ((LOOK_UP,), ANSWERS))
    assert len(done.groups) == 4 and len(done.observations()) == 8
    for group in done.groups:
        assert rewards(group) == [0.0, 1.0]
        assert [node.call.name for node in group.nodes if node.call] == ["search", "search"]


def test_an_advantage(tmp_path: Path) -> None:
    """By the formula of its docstring."""
    done = trained(tmp_path, "advantage", ((LOOK_UP,), ANSWERS))
    assert any(gain for group in done.groups for trajectory in group.trajectories for gain in trajectory.gains)
    for group in done.groups:
        middle = median(rewards(group))
        for trajectory in group.trajectories:
            expected = [trajectory.reward - middle + 0.5 * (gain or 0.0) for gain in trajectory.gains]
            assert trajectory.turn_advantages == pytest.approx(expected) and len(expected) == 2


def test_a_loss_on_two_ranks_with_what_every_loss_gets(tmp_path: Path) -> None:
    """Before the only update of a step every ratio is 1, so a token's part is -scale x advantage x truncated weight, and the KL term."""
    done = trained(tmp_path, "loss", ((LOOK_UP,), ANSWERS), "loss.mismatch=truncate", "loss.kl_coef=0.1", world=2)
    for number, row in enumerate(done.rows):
        terms = []
        for group in done.groups[2 * number : 2 * number + 2]:
            for trajectory in group.trajectories:
                for node, advantage in zip(group.actions(trajectory), trajectory.turn_advantages, strict=True):
                    pairs = zip(node.old_logprobs, node.behavior_logprobs, strict=True)
                    terms += [-0.5 * advantage * min(math.exp(old - said), 2.0) for old, said in pairs]
        assert row["loss"] == pytest.approx(sum(terms) / len(terms) + 0.1 * row["kl_ref"], abs=1e-5) and abs(row["loss"]) > 1e-3
        assert row["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_a_reward(tmp_path: Path) -> None:
    """Half of the words are right: 2/3 by F1, and all by a rule that looks for the answer in the text."""
    longer = RIGHT.replace("Rome", "ROME today")
    done = trained(tmp_path, "reward", ((LOOK_UP,), (longer, WRONG)))
    for group in done.groups:
        assert rewards(group) == [0.0, 1.0]
        assert sorted(trajectory.reward_parts["f1"] for trajectory in group.trajectories) == pytest.approx([0.0, 2 / 3])


def test_a_search_back_end(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/rome.txt").write_text("Rome has been the capital of Italy since 1871.", encoding="utf-8")
    (tmp_path / "notes/snow.txt").write_text("Snow falls in winter.", encoding="utf-8")
    done = trained(tmp_path, "search back-end", ((LOOK_UP,), ANSWERS))
    assert len(shown := done.observations()) == 8
    assert all("since 1871" in text and "winter" not in text for text in shown)
    assert [row["search/ok"] for row in done.rows] == [4, 4]


def test_a_tool(tmp_path: Path) -> None:
    done = trained(tmp_path, "tool", ((COUNT,), ANSWERS))
    assert done.observations() == ["8 days"] * 8
    assert [row["calendar/calls"] for row in done.rows] == [4, 4]


def test_a_protocol(tmp_path: Path) -> None:
    lines = (("Thought: I look it up.\nSearch: capital of Italy",), ("Thought: I know.\nAnswer: Rome", "Thought: I guess.\nAnswer: Milan"))
    done = trained(tmp_path, "protocol", lines)
    for group in done.groups:
        assert rewards(group) == [0.0, 1.0]
        for trajectory in group.trajectories:
            assert trajectory.status is Status.FINISHED
            assert group.actions(trajectory)[0].call == ToolCall("search", ("capital of Italy",))


BROKEN = {
    "advantage": (
        ", progress: float)",
        ")",
        r"advantage\.name=my_package\.my_advantage:median_baseline has the signature .*expected a function of \(group, config, progress\)",
    ),
    "loss": (
        "return total, {",
        "return tokens.logprobs, {",
        r"loss\.name=my_package\.my_loss:unclipped .*expected a tensor of one finite number",
    ),
    "reward": ("return float(", "return str(", r"reward\.outcome=my_package\.my_judge:contains returned 'True'.*expected a finite number"),
    "search back-end": ("async def search", "async def find", r"search\.backend: my_package\.my_search:Notes has no `async def search`"),
    "tool": ("    async def use", "    def use", r"rollout\.extra_tools: my_package\.my_tool:Calendar has no `async def use`"),
    "protocol": (
        "return Malformed(",
        "return None and (",
        r"rollout\.protocol: my_package\.my_protocol:LINES\.parse gives None .*expected Malformed",
    ),
}
"""Kind -> what its file says, what a wrong one says instead, and what the user is told."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_one_is_refused_before_an_engine_starts(kind: str, tmp_path: Path) -> None:
    shown, (right, wrong, told) = example(kind), BROKEN[kind]
    assert right in shown.code
    codes, printed = train(tmp_path, shown._replace(code=shown.code.replace(right, wrong)), ((LOOK_UP,), ANSWERS))
    assert codes == [2] and re.search(told, printed, re.DOTALL), printed
    assert STARTED not in printed


# ---- parts of the project itself


def _run_file(path: Path) -> None:
    print_to(path.with_suffix(".txt"))
    runpy.run_path(str(path), run_name="__main__")


def run_file(path: Path, code: str) -> tuple[int | None, str]:
    """Exit code and what is printed."""
    path.write_text(code, encoding="utf-8")
    torch.set_num_threads(1)  # a pool of threads does not survive the fork
    process = FORK.Process(target=_run_file, args=(path,))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode, path.with_suffix(".txt").read_text(encoding="utf-8")


def test_a_model_family(tmp_path: Path) -> None:
    shown = example("model family")
    code, printed = run_file(tmp_path / "try_family.py", shown.code)
    assert code == 0 and re.search(r"^27 tensors are equal$", printed, re.MULTILINE), printed


def test_log_probs_of_that_family_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row is all that it takes."""
    (tmp_path / "try_family.py").write_text(example("model family").code, encoding="utf-8")
    monkeypatch.setitem(ARCHITECTURES, "seed_oss", None)  # so that the file's row is taken back
    runpy.run_path(str(tmp_path / "try_family.py"))["tiny_model"](tmp_path / "hf")
    groups = random_groups(1)
    (scores,) = run_ranks(scored_nodes, make_config(tmp_path / "hf"), groups)
    assert worst(scores, reference_logprobs(tmp_path / "hf", groups)) < 1e-4


def test_the_page_says_what_a_model_family_is_refused_for(tmp_path: Path) -> None:
    """Its keys that no rule knows, or not with the family's value."""
    lines = example("model family").code.splitlines(keepends=True)
    end = lines.index("def main() -> None:\n") - 2
    code, printed = run_file(tmp_path / "without_three_lines.py", "".join(lines[: end - 3] + lines[end:]))
    assert code == 1 and all(key in printed for key in ("attention_bias", "attention_out_bias", "residual_dropout")), printed
    assert "residual_dropout" not in hf_config._HARMLESS and "attention_bias" in hf_config._NEUTRAL  # the tables that the page names


def test_every_registry_that_the_page_names_has_the_row_that_it_shows() -> None:
    found = re.findall(r"^\| ([\w -]+) \| `([A-Z]+)` \| `([\w/]+)\.py` \| `(?:\"(\w+)\": )?(.+)` \|", PAGE, re.MULTILINE)
    assert [kind for kind, *_ in found] == [*KINDS, "model family"]
    for _, name, path, key, value in found:
        module = importlib.import_module(path.replace("/", "."))
        registry = getattr(module, name)
        row = eval(value, vars(module))
        assert registry[key or row.provider] == row, name
