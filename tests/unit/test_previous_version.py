"""What the version before has written is read as it was meant: rollouts, settings, a finished run, stored answers."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from previous_version import PREVIOUS, unpack_stopped_run
from rich.console import Console
from test_report import Page

from checkpoint_conversion.convert import megatron_to_hf
from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.algorithms.losses.registry import Ppo
from igpo_megatron.algorithms.replay import SuccessBuffer
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.config.load import ConfigError, build, load, parse, to_json
from igpo_megatron.config.schema import Config
from igpo_megatron.data.corpus import Passage
from igpo_megatron.observability.metrics import rollout_metrics
from igpo_megatron.observability.report.page import write_report
from igpo_megatron.observability.rollout_dump import count_groups, read_rollouts, write_rollouts
from igpo_megatron.observability.run_folder import folder_for, open_folder, read_summary
from igpo_megatron.observability.summary import summary_table
from igpo_megatron.policy import checkpoint_sums
from igpo_megatron.policy.settings import Checkpoint
from igpo_megatron.search.client import make_client
from igpo_megatron.search.local.dense import DenseIndex
from igpo_megatron.search.local.index_place import digest, place
from igpo_megatron.search.results import SearchStatus, SearchStopped
from igpo_megatron.tools.registry import make_tools
from igpo_megatron.training.step import assign_advantages
from igpo_megatron.types import BranchPoint, Prompt, RolloutGroup, Status, Trajectory, UserError, ValuePoint

ROLLOUTS = PREVIOUS / "rollouts.parquet"
FINISHED = PREVIOUS / "finished"
EXAMPLES = sorted((PREVIOUS / "yaml").rglob("*.yaml"))
RESOLVED = sorted((PREVIOUS / "configs").glob("*.json"))
ALGORITHMS = [json.loads(line) for line in (PREVIOUS / "configs/algorithms.jsonl").read_text(encoding="utf-8").splitlines()]
ALGORITHM_DEFAULTS = [json.loads(line) for line in (PREVIOUS / "configs/algorithm_defaults.jsonl").read_text(encoding="utf-8").splitlines()]
NAMED = (("advantage",), ("loss",), ("rollout", "branching"))
"""Sections whose keys depend on their name."""
NEW_DEFAULTS = {("model", "dtype"): "auto", ("run", "threads"): "auto", ("rollout", "engine", "threads"): "auto", ("sync", "max_gap"): None}
"""Of what the machine decides, which the version before did not ask."""


def groups_of(path: Path, search: str = "search") -> tuple[int, list[RolloutGroup]]:
    ((step, groups),) = read_rollouts(path, search=search)
    return step, groups


# ---- rollouts


def test_every_part_of_a_rollout_file_comes_back():
    step, (igpo, arpo, gain, empty) = groups_of(ROLLOUTS)
    assert step == 3 and count_groups(ROLLOUTS) == 4 and empty == RolloutGroup(empty.prompt, [])
    assert (igpo.prompt.id, igpo.prompt.answers, igpo.prompt.source) == ("train-17", ("Iranian Rial", "Rial"), "world")
    assert igpo.metrics == {"nonfinite_gains": 1.0, "replayed": 1.0}
    assert [node.kind for node in igpo.nodes] == [
        *("prompt", "forced", "probe", "action", "observation", "probe", "action", "observation", "action", "observation"),
        *("asking", "action"),
    ]
    first, second = igpo.nodes[2], igpo.nodes[5]
    assert [(p.parent, p.turn, p.token_ids, p.scored, p.weight_version, p.old_logprobs) for p in (first, second)] == [
        (1, 0, [9, 10, 11, 12], (1, 3), 6, [-0.5, -2.25]),
        (4, 1, [9, 10, 11, 12], (1, 3), 7, [-0.25, -0.75]),
    ]
    search = igpo.nodes[3]
    assert (search.parent, search.turn, search.token_ids, search.text, search.weight_version) == (1, 1, [5, 6], "search", 7)
    assert (search.behavior_logprobs, search.old_logprobs, search.ref_logprobs) == ([-0.125, -1e-30], [-0.25, -0.375], [-0.5, -0.625])
    assert igpo.nodes[4].text == "(1) Rial \U0001f600\x00"
    won = igpo.trajectories[0]
    assert (won.path, won.answer, won.reward) == ([0, 1, 3, 4, 6, 7, 8, 9, 10, 11], "Rial", 1.0)
    assert won.reward_parts == {"f1": 1.0, "em": 1.0, "format_ok": 1.0}
    assert (won.gains, won.evidence_gains) == ([0.875, 0.0, -0.25, None], [0.5, 0.0, -0.125, None])
    assert won.turn_advantages == [1.5, 1.0, 0.5, 0.25]
    assert arpo.branch_points == [
        BranchPoint(2, 0, 2, 0.375, 0.25, "top_k", 0.525, 0, (1,)),
        BranchPoint(2, 1, 2, 0.125, 0.25, "full", 0.475, 1, ()),
    ]
    assert gain.value_points == [
        ValuePoint(2, 0, 2, 0.75, 2, 0.125, None, (), 0.015625, 0.9, True),
        ValuePoint(2, 1, 2, None, 1, 0.0, 0.25, (1,), None, 0.0, False),
    ]
    assert [node.experts for node in gain.nodes] == [
        [b"\x00\x01\x02\x03", b"\x01\x00\x03\x02"],
        [b"\x02\x03\x00\x01", None],
        [b"\x03\x02\x01\x00"],
        [],
        [None],
        [],
    ]


def test_every_way_of_ending_is_known():
    _, (group, *_) = groups_of(ROLLOUTS)
    assert [end.status.value for end in group.trajectories] == [
        *("finished", "truncated_tokens", "truncated_context", "truncated_turns", "bad_format", "tool_failed", "ended_by_tool"),
        *("engine_failed", "crashed", "late"),
    ]
    assert [end.reason for end in group.trajectories if end.reason] == [
        *("bm25: timeout", "engine 0 is gone", "ValueError: zip() argument 2 is shorter", "4 of 8 had ended")
    ]
    assert [end.turn_advantages for end in group.trajectories[1:]] == [[-0.75]] * 4 + [[], [-0.75], [], [], []]


def test_calls_of_the_search_tool_count_as_searches_whatever_the_policy_called_it():
    _, (igpo, *_) = groups_of(ROLLOUTS, "web_search")
    calls = [node.call for node in igpo.nodes if node.call]
    assert [call.name for call in calls] == ["search", "visit", "python"]
    assert [call.queries for call in calls] == [("currency of Iran", "Rial"), ("http://example.org/rial", "currency"), ("print(1)",)]
    assert rollout_metrics([igpo])["searches"] == 1.0


def test_a_file_that_is_written_again_holds_the_same(tmp_path):
    step, groups = groups_of(ROLLOUTS)
    write_rollouts(tmp_path / "again.parquet", step, groups)
    assert groups_of(tmp_path / "again.parquet") == (step, groups)


def test_recorded_steps_teach_what_they_taught():
    config = build(json.loads((FINISHED / "config.json").read_text(encoding="utf-8")))
    expected = {1: [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], 2: [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]]}
    for number, rewards in expected.items():
        step, groups = groups_of(FINISHED / f"rollouts/step_{number:06d}.parquet")
        before = [[(end.reward, end.gains, end.turn_advantages) for end in group.trajectories] for group in groups]
        for group in groups:
            score(group, config)
            for end in group.trajectories:
                end.gains, end.turn_advantages = [], []
        assign_advantages(groups, config, progress=0.0)
        assert step == number and [[end.reward for end in group.trajectories] for group in groups] == rewards
        assert [[(end.reward, end.gains, end.turn_advantages) for end in group.trajectories] for group in groups] == before
    assert [round(advantage, 4) for advantage in groups[1].trajectories[0].turn_advantages] == [1.8541, 2.5648, 1.0]


def test_a_file_whose_columns_are_named_otherwise_is_refused_with_their_names(tmp_path):
    table = pq.read_table(ROLLOUTS)
    pq.write_table(table.rename_columns({"trajectories": "paths"}), tmp_path / "renamed.parquet")
    with pytest.raises(UserError, match=r"renamed\.parquet: not a rollout file: column 'trajectories' is missing \(its columns: .*paths"):
        read_rollouts(tmp_path / "renamed.parquet")
    nodes = table["nodes"].combine_chunks()
    fields = list(nodes.values.type)
    values = pa.StructArray.from_arrays(nodes.values.flatten()[:-1], fields=fields[:-1])
    pq.write_table(table.set_column(2, "nodes", pa.ListArray.from_arrays(nodes.offsets, values)), tmp_path / "fewer.parquet")
    with pytest.raises(UserError, match=r"fewer\.parquet: not a rollout file: column 'nodes' is .*, expected .*scored"):
        read_rollouts(tmp_path / "fewer.parquet")


def test_successes_in_a_checkpoint_can_be_replayed():
    kept = SuccessBuffer(4, 0.5)
    kept.load_state((PREVIOUS / "successes.txt").read_text(encoding="utf-8"), search="web_search")
    success = kept.successes["train-17"]
    assert success.prompt == Prompt("train-17", "Währung von Iran?", ("Iranian Rial", "Rial"), "world")
    assert [(node.kind, node.token_ids) for node in success.nodes][:3] == [("prompt", [1, 2, 3]), ("forced", [4]), ("action", [5, 6])]
    assert [node.call.name for node in success.nodes if node.call] == ["search", "visit", "python"]
    assert (success.trajectories[0].status, success.trajectories[0].gains) == (Status.FINISHED, [0.875, 0.0, -0.25, None])
    failed = RolloutGroup(success.prompt, success.nodes[:3], [Trajectory([0, 1, 2], Status.BAD_FORMAT, reward=-2.0)])
    (exchanged,) = kept.exchange([failed], step=2)
    assert exchanged.trajectories[0].reward == 1.0 and exchanged.metrics == {"replayed": 1.0}


# ---- settings


def resolved(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(to_json(config))
    return values


def leaves(values: Any, *path: str) -> dict[tuple[str, ...], Any]:
    """Path of keys -> value, of every value that is no section."""
    if not isinstance(values, dict):
        return {path: values}
    return {key: value for name, inner in values.items() for key, value in leaves(inner, *path, name).items()}


def of_then(found: Any, stored: Any) -> Any:
    """`found` without the keys that have been added since."""
    return {key: of_then(found.get(key), value) for key, value in stored.items()} if isinstance(stored, dict) else found


DEFAULTS = leaves(json.loads((PREVIOUS / "configs/defaults.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", EXAMPLES, ids=[str(path.relative_to(PREVIOUS)) for path in EXAMPLES])
def test_an_example_of_then_means_what_it_meant(path):
    given = leaves(parse(path.read_text(encoding="utf-8")))
    found = leaves(resolved(load(path)))
    assert {key: found.get(key) for key in given} == given
    kept = [key for key in DEFAULTS if key not in given and not any(key[: len(section)] == section for section in NAMED)]
    assert {key: found.get(key) for key in kept} == {key: (DEFAULTS | NEW_DEFAULTS)[key] for key in kept} and len(kept) > 100


def test_spellings_of_yaml_mean_what_they_meant():
    """Files of users have `no`, `0x10`, `1_000`, anchors and empty sections, whatever version of YAML reads them."""
    config = load(PREVIOUS / "spellings.yaml", ["eval.greedy=on", "optim.warmup_steps=1_0", "reward.overlong=[100, 2e2]", "run.replay="])
    files = (Path("a.parquet"), Path("b,c.parquet"))
    assert (config.data.train, config.data.eval, config.data.shuffle) == (files, files, False)
    assert (config.run.steps, config.run.seed, config.run.replay, config.run.name) == (5, 16, None, "yes")
    assert (config.eval.every, config.eval.greedy, config.eval.at_ends) == (1000, True, True)
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.eps, optim.weight_decay, optim.clip_grad, optim.warmup_steps) == (1e-6, 1e-7, 0.5, 0.01, 1.0, 10)
    assert (config.loss, config.checkpoint) == (Ppo(dual_clip=None, clip_low=0.2), Checkpoint())
    assert (config.rollout.tool_in_prompt, config.rollout.force_think, config.rollout.system_prompt) == (False, True, "Two\nlines\n")
    assert config.reward.overlong == (100, 200)


@pytest.mark.parametrize("name", ["igpo_qwen2.5_7b", "arpo_qwen2.5_7b", "aepo_qwen2.5_7b", "search_r1_qwen2.5_7b"])
def test_an_example_of_then_resolves_to_what_its_runs_have_stored(name):
    stored = json.loads((PREVIOUS / f"configs/{name}.json").read_text(encoding="utf-8"))
    path = PREVIOUS / f"yaml/{name}.yaml"
    given = leaves(parse(path.read_text(encoding="utf-8")))
    expected = leaves(stored) | {key: value for key, value in NEW_DEFAULTS.items() if key not in given}
    assert leaves(of_then(resolved(load(path)), stored)) == expected


def test_every_key_can_still_be_given():
    stored = json.loads((PREVIOUS / "configs/every_key.json").read_text(encoding="utf-8"))
    differing = [key for key, value in leaves(stored).items() if value != DEFAULTS.get(key)]
    assert sorted(set(leaves(stored)) - set(differing)) == [
        ("advantage", "name"), ("loss", "name"), ("model", "path"), ("run", "resume")
    ]  # fmt: skip
    assert of_then(resolved(build(stored)), stored) == stored


@pytest.mark.parametrize("then", ALGORITHMS, ids=[row["advantage"]["name"] for row in ALGORITHMS])
def test_every_algorithm_has_the_settings_it_had(then):
    sections = {name: then[name] for name in ("advantage", "loss")}
    found = resolved(build({"model": {"path": "policy"}, **sections, "rollout": {"branching": then["branching"]}}))
    assert of_then({**found, "branching": found["rollout"]["branching"]}, then) == then


@pytest.mark.parametrize("then", ALGORITHM_DEFAULTS, ids=["-".join((key, row[key]["name"])) for row in ALGORITHM_DEFAULTS for key in row])
def test_every_algorithm_has_the_defaults_it_had(then):
    ((section, expected),) = then.items()
    given = {section: {"name": expected["name"]}}
    found = resolved(build({"model": {"path": "policy"}, **({"rollout": given} if section == "branching" else given)}))
    assert of_then((found["rollout"] if section == "branching" else found)[section], expected) == expected


def test_every_algorithm_of_then_is_among_the_stored_settings():
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in RESOLVED]
    names = {
        "advantage": {row["advantage"]["name"] for row in [*ALGORITHMS, *stored]},
        "loss": {row["loss"]["name"] for row in [*ALGORITHMS, *stored]},
        "branching": {row["branching"]["name"] for row in ALGORITHMS} | {row["rollout"]["branching"]["name"] for row in stored},
    }
    assert names == {
        "advantage": {"igpo", "igpo_loo", "grpo", "rloo", "gigpo", "eapo", "rapo", "arpo", "remax"}
        | {"reinforce_pp", "reinforce_pp_baseline"},
        "loss": {"ppo", "aepo", "hapo", "bapo", "gspo", "cispo", "sft"},
        "branching": {"none", "arpo", "aepo", "gain"},
    }


def run_with(config: Config, stored: str) -> Config:
    """`config`, in whose folder a run has stored that text as its settings."""
    folder = folder_for(config)
    folder.root.mkdir(parents=True)
    folder.config.write_text(stored, encoding="utf-8")
    return config


@pytest.mark.parametrize("path", [*RESOLVED, FINISHED / "config.json"], ids=lambda path: path.stem)
def test_a_run_of_then_may_go_on(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = path.read_text(encoding="utf-8")
    source = PREVIOUS / f"yaml/{path.stem}.yaml"
    config = run_with(load(source) if source.is_file() else build(json.loads(stored)), stored)
    assert open_folder(config).config.read_text(encoding="utf-8") == stored


def test_a_key_that_does_not_exist_is_refused_by_its_name_and_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (PREVIOUS / "yaml/igpo_qwen2.5_7b.yaml").read_text(encoding="utf-8")
    Path("old.yaml").write_text(text.replace("clip_grad:", "clip_gradient:"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optim\.clip_gradient: unknown key; did you mean 'optim\.clip_grad'\?"):
        load("old.yaml")


def test_a_run_whose_settings_have_a_key_that_is_gone_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = json.loads((FINISHED / "config.json").read_text(encoding="utf-8"))
    config = build(stored)
    stored["optim"]["clip_gradient"] = stored["optim"].pop("clip_grad")
    with pytest.raises(ConfigError) as refused:
        open_folder(run_with(config, json.dumps(stored)))
    assert "runs/finished/config.json has settings that this version does not take (choose another run.name, or " in str(refused.value)
    assert "optim.clip_gradient: unknown key; did you mean 'optim.clip_grad'?" in str(refused.value)


def test_a_run_that_is_older_than_a_key_ran_with_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = json.loads((FINISHED / "config.json").read_text(encoding="utf-8"))
    config = build(stored)
    del stored["optim"]["clip_grad"], stored["placement"], stored["loss"]["mismatch"]
    run_with(config, json.dumps(stored))
    assert open_folder(config).root == folder_for(config).root
    with pytest.raises(ConfigError, match=r"made with other settings .*\n  - optim\.clip_grad: 1\.0 -> 0\.5$"):
        open_folder(build(json.loads(to_json(config)), ["optim.clip_grad=0.5"]))


# ---- a finished run, and one that was stopped


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FINISHED, tmp_path / "runs/finished"))


def test_the_report_of_a_finished_run_can_be_written_again(tmp_path):
    page = Page(write_report(copied(tmp_path)).read_text(encoding="utf-8"))
    rows = [row.strip() for row in page.rows]
    assert "F1, sampled at training temperature 0.125 ± 0.125 0.000 ± 0.000 -0.125" in rows
    assert "Format-valid share 0.875 0.625 -0.250" in rows and "Searches per question 2.000 1.750 -0.250" in rows
    assert "startup 4.0 s 56%" in rows
    assert "2 of 2" in page.text and "igpo, ppo loss" in page.text and "on 8 questions" in page.text
    files = {file["label"]: file["groups"] for file in page.data["files"]}
    assert list(files) == ["Training, step 1", "Training, step 2", "Held-out, sampled, after step 0", "Held-out, sampled, after step 2"]
    assert [len(groups) for groups in files.values()] == [2, 2, 8, 8]
    second = files["Training, step 1"][1]
    assert second["question"] == "What is the main language of the country that uses the Yuan Renminbi?"
    assert second["samples"][0]["gains"] == [-0.1465, 6.326, None]
    reward = next(panel for panel in page.data["charts"] if panel["title"] == "Reward")
    assert reward["series"][0]["points"] == [[1, 0.375, None], [2, 0.25, None]]


def test_no_metric_of_then_is_lost_from_the_charts(tmp_path):
    """Compared by the last value of each line: lines may be named otherwise."""
    charts = Page(write_report(copied(tmp_path)).read_text(encoding="utf-8")).data["charts"]
    last = {line["points"][-1][1] for panel in charts for line in panel["series"]}
    phases = {0.3328, 0.1501, 0.0003, 0.2353, 0.0398, 0.6083}
    learned = {0.25, 0.70075, 0.43216, 1.417, 0.43835, 0.875, 0.625, -2.0652, 0.18154}
    checked = {4.3887e-07, 7.689e-06, 9.5367e-07, 1.1198, -0.28318, 0.00022412, 0.0003, 2252.9}
    agents = {2.375, 1.375, 11.0, 0.00075237, 0.0032009, 58.25, 0.125, 0.5}
    assert last == phases | learned | checked | agents | {0.0}


def test_the_table_of_a_finished_run_is_shown_again(tmp_path, monkeypatch):
    copied(tmp_path)
    monkeypatch.chdir(tmp_path)
    summary = read_summary(open_folder(build(json.loads((FINISHED / "config.json").read_text(encoding="utf-8")))))
    console = Console(width=120, record=True, file=io.StringIO())
    assert summary is not None
    console.print(summary_table(summary))
    shown = console.export_text()
    assert "2 steps in 0.1 min" in shown and "-0.125" in shown and "+2.899" in shown and "1.2e-05" in shown


def test_the_report_of_a_stopped_run_says_how_far_it_came(tmp_path):
    folder = unpack_stopped_run(tmp_path) / "runs/stopped"
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "not finished, step 3 so far" in page.text
    assert [file["label"] for file in page.data["files"]] == ["Training, step 1", "Training, step 2", "Training, step 3"]


def test_no_file_of_a_checkpoint_names_a_module_of_this_project(tmp_path):
    """Modules move, and what was pickled by their names could not be loaded any more."""
    (checkpoint,) = (unpack_stopped_run(tmp_path) / "runs/stopped/checkpoints").iterdir()
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) == 13 and [path for path in files if b"igpo_megatron" in path.read_bytes()] == []


def test_a_state_with_a_key_named_otherwise_is_refused(tmp_path):
    (checkpoint,) = (unpack_stopped_run(tmp_path) / "runs/stopped/checkpoints").iterdir()
    assert checkpoint_sums.damage(checkpoint) == []
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    state["updates"] = state.pop("optimizer_steps")
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    (checkpoint / "checksums.json").unlink()
    checkpoint_sums.write(checkpoint, {})
    assert checkpoint_sums.damage(checkpoint) == ["state.json does not give layout, optimizer_steps, run, step"]


def test_a_checkpoint_of_then_is_exported(tmp_path):
    (checkpoint,) = (unpack_stopped_run(tmp_path) / "runs/stopped/checkpoints").iterdir()
    megatron_to_hf(checkpoint, tmp_path / "hf")
    reader, whole = HfReader(tmp_path / "hf"), 0
    for name in sorted(reader.names()):
        whole = zlib.crc32(reader.get(name).contiguous().numpy().tobytes(), whole)
    assert whole == 2873756324, "a weight differs in some bit from what the version before exported"


# ---- stored answers


def tools_of(tmp_path: Path, *overrides: str) -> Config:
    shutil.copy(PREVIOUS / "cache.sqlite", tmp_path / "cache.sqlite")
    values = {
        "model": {"path": "policy"},
        "search": {"backend": "serper", "top_k": 3, "mode": "replay", "cache": str(tmp_path / "cache.sqlite")},
        "rollout": {"extra_tools": ["visit"]},
    }
    return build(values, overrides)


def test_stored_searches_answer_a_replay(tmp_path):
    config = tools_of(tmp_path)

    async def ask(queries: Sequence[str]) -> Any:
        client = make_client(config.search)
        try:
            return await client.search(queries)
        finally:
            await client.close()

    found, nothing = asyncio.run(ask(["capital  of Iran", "nothing at all"]))
    assert (found.status, found.provider, found.query) == (SearchStatus.OK, "serper", "capital  of Iran")
    assert [(p.doc_id, p.title, p.text) for p in found.passages] == [
        ("u1", "Tehran", "Tehran is the capital of Iran."),
        ("u2", "Íran", "A country."),
    ]
    assert (nothing.status, nothing.passages) == (SearchStatus.EMPTY, ())
    with pytest.raises(SearchStopped, match="has no answer of serper"):
        asyncio.run(ask(["capital of Peru"]))


def test_stored_visits_answer_a_replay(tmp_path):
    config = tools_of(tmp_path)

    async def use(*arguments: str) -> Any:
        visit = make_tools(config, len, "{text}")["visit"]
        try:
            return await visit.use(arguments)
        finally:
            await visit.close()

    page, gone = asyncio.run(use("http://example.org/tehran", "population")), asyncio.run(use("http://example.org/gone"))
    assert (page.text, page.status, page.failure, page.cached) == ("The page's text.", "ok", None, True)
    assert (gone.text, gone.status) == ("This page does not exist.", "unreadable")


# ---- what was computed from a corpus


PASSAGES = (Passage("1", "Iran", "The capital of Iran is Tehran."), Passage("2", "Peru", "The capital of Peru is Lima."))


def test_embeddings_of_then_are_not_computed_again(tmp_path):
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> Any:
        asked.extend(texts)
        return np.array([[1.0, 0.0, 4.0]])

    path = Path(shutil.copy(PREVIOUS / "vectors.npz", tmp_path / "vectors.npz"))
    index = DenseIndex(PASSAGES, encode, query_prefix="q: ", passage_prefix="p: ", vectors=path, encoder="models/e5")
    np.testing.assert_allclose(index.vectors, [[0.997199, 0.07479, 0.0], [0.991454, 0.078273, 0.104364]], atol=1e-6)
    assert index.search(["Peru"], 1)[0][0][0].title == "Peru" and asked == ["q: Peru"]


def test_the_index_of_a_corpus_is_looked_for_where_it_was():
    """What names its folder: an index of all of Wikipedia takes an hour."""
    found = place(Path("wiki.jsonl"), "bm25", digest(PASSAGES, "0.2"))
    assert found == Path("wiki.jsonl.index/bm25-311f96cb0e27359f")
