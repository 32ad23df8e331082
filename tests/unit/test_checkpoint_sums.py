"""A damaged checkpoint is named, and a run goes on from the newest one that is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
from test_conversion import hf_folder
from typer.testing import CliRunner

from checkpoint_conversion.convert import hf_to_megatron
from igpo_megatron.cli import app
from igpo_megatron.config.load import ConfigError, build, to_json
from igpo_megatron.config.schema import Config
from igpo_megatron.observability.run_folder import RunFolder, folder_for, forget_after, open_folder, read_summary, set_up
from igpo_megatron.policy import checkpoint, checkpoint_sums, parallel
from igpo_megatron.policy.checkpoint_sums import Found, damage, newest_whole, set_aside
from igpo_megatron.types import UserError

STATE = {"step": 1, "optimizer_steps": 2, "layout": [1, 1, 1], "run": {"prompts": None}}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    hf_to_megatron(hf_folder(folder / "hf", "qwen2"), folder / "megatron", max_shard_bytes=60_000)
    return folder / "megatron"


def make(weights: Path, checkpoints: Path, step: int, *, sums: bool = True) -> Path:
    """A checkpoint as a run leaves it; without `sums` as one before there were any."""
    folder = checkpoints / f"step_{step:06d}"
    shutil.copytree(weights, folder)
    (folder / "model" / "common.pt").write_bytes(b"common")
    (folder / "state.json").write_text(json.dumps({**STATE, "step": step, **({"checksums": True} if sums else {})}))
    if sums:
        checkpoint_sums.write(folder, checkpoint_sums.of_rank(folder, 0))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "part", ["model/__0_1.distcp", "model/.metadata", "model/common.pt", "hf/config.json", "state.json", "checksums.json"]
)
@pytest.mark.parametrize("harm", [cut, flip, empty, Path.unlink])
def test_a_file_that_is_not_what_was_written_is_named(weights: Path, tmp_path: Path, part: str, harm: Callable[[Path], None]) -> None:
    folder = make(weights, tmp_path, 1)
    assert damage(folder) == []
    harm(folder / part)
    problems = damage(folder)
    # A bit of checksums.json lies in the sum or the name of some other file.
    assert problems and (part in problems[0] or (part, harm) == ("checksums.json", flip))
    assert all("\n" not in problem for problem in problems)


def test_a_checkpoint_of_a_megatron_that_writes_no_common_file_is_whole(weights: Path, tmp_path: Path) -> None:
    folder = make(weights, tmp_path, 1, sums=False)
    (folder / "model/common.pt").unlink()
    assert damage(folder) == ["model/common.pt is missing"], "before there were sums, every Megatron wrote it"
    (folder / "state.json").write_text(json.dumps({**STATE, "step": 1, "checksums": True}))
    checkpoint_sums.write(folder, checkpoint_sums.of_rank(folder, 0))
    assert damage(folder) == []


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        ("{}", "checksums.json does not give hf/config.json"),
        ("[" * 100_000, "checksums.json cannot be read"),
        ('{"../../etc/passwd": [1, "0"]}', "checksums.json names '../../etc/passwd', which is no file of a checkpoint"),
        ('{"/dev/zero": [0, "0"]}', "checksums.json names '/dev/zero'"),
        ('{"model": [0, "0"]}', "checksums.json names 'model'"),
        ('{"state.json": null}', "checksums.json cannot be read"),
        ('{"a\\u0000b": [1, "0"]}', "checksums.json"),
    ],
)
def test_sums_that_no_run_wrote_are_not_believed(weights: Path, tmp_path: Path, sums: str, said: str) -> None:
    folder = make(weights, tmp_path, 1)
    (folder / "checksums.json").write_text(sums)
    (problem, *_) = damage(folder)
    assert said in problem and "\n" not in problem


def test_a_shard_without_a_sum_is_named(weights: Path, tmp_path: Path) -> None:
    folder = make(weights, tmp_path, 1)
    sums = json.loads((folder / "checksums.json").read_text())
    del sums["model/__0_1.distcp"]
    (folder / "checksums.json").write_text(json.dumps(sums))
    flip(folder / "model" / "__0_1.distcp")
    (folder / "notes.txt").write_text("not of the run")
    assert damage(folder) == ["checksums.json does not give model/__0_1.distcp"]


def test_the_ranks_shares_cover_every_file_once(weights: Path, tmp_path: Path) -> None:
    folder = make(weights, tmp_path, 1)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json"]
    assert len(files) > 6
    for path in files:
        flip(path)
    found = [problem.split()[0] for part in range(3) for problem in damage(folder, part, 3)]
    assert sorted(found) == sorted(path.relative_to(folder).as_posix() for path in files)


@pytest.mark.parametrize("part", ["model/__0_1.distcp", "model/.metadata", "hf/config.json", "state.json"])
@pytest.mark.parametrize("harm", [cut, empty, Path.unlink])
def test_of_a_checkpoint_without_sums_what_is_cut_or_lost_is_named(
    weights: Path, tmp_path: Path, part: str, harm: Callable[[Path], None]
) -> None:
    folder = make(weights, tmp_path, 1, sums=False)
    assert damage(folder) == []
    harm(folder / part)
    assert Path(part).name in damage(folder)[0] or Path(part).parent.name in damage(folder)[0]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, without a process group."""
    monkeypatch.setattr(parallel, "place", lambda: (0, 1))
    monkeypatch.setattr(parallel, "broadcast", lambda value: value)
    monkeypatch.setattr(parallel, "gather", lambda value: [value])


@pytest.mark.usefixtures("alone")
def test_the_newest_whole_checkpoint_is_found_and_the_damaged_ones_are_set_aside(weights: Path, tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "none") == Found()
    for step in (2, 4, 6, 8):
        make(weights, tmp_path, step)
    shutil.copytree(tmp_path / "step_000008", tmp_path / "step_000010.partial")
    flip(tmp_path / "step_000006" / "model" / "__0_0.distcp")
    cut(tmp_path / "step_000008" / "state.json")
    found = newest_whole(tmp_path)
    assert found.folder == tmp_path / "step_000004"
    (tmp_path / "step_000008.damaged").mkdir()
    first, second = set_aside(found)
    assert "step_000008 is damaged (state.json has" in first and "step_000008.damaged-2" in first and "goes on from" in first
    assert "step_000006 is damaged (model/__0_0.distcp does not hold what was written)" in second
    assert (tmp_path / "step_000006.damaged" / "model" / "__0_0.distcp").is_file()
    assert newest_whole(tmp_path) == Found(tmp_path / "step_000004")


@pytest.mark.usefixtures("alone")
def test_without_a_whole_checkpoint_the_run_stops_and_touches_nothing(weights: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        (make(weights, tmp_path, step) / "model" / "__0_0.distcp").unlink()
    (tmp_path / "step_000006").mkdir()
    with pytest.raises(UserError) as error:
        newest_whole(tmp_path)
    said = str(error.value)
    assert "step_000006: state.json is missing" in said and "step_000002: model/__0_0.distcp is missing" in said and "\n" not in said
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000002", "step_000004", "step_000006"]


def test_steps_that_a_run_goes_back_behind_leave_no_rollouts_and_no_evaluation(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = ("step_000004.parquet", "step_000005.parquet"), ("step_000000.json", "step_000004.json", "step_000006_greedy.parquet", "notes")
    for place, files in zip((folder.rollouts, folder.eval), names, strict=True):
        place.mkdir()
        for name in files:
            (place / name).touch()
    forget_after(folder, 4)
    assert [path.name for path in folder.rollouts.iterdir()] == ["step_000004.parquet"]
    assert sorted(path.name for path in folder.eval.iterdir()) == ["notes", "step_000000.json", "step_000004.json"]


@pytest.mark.parametrize("content", ["", '{"run": {"na', "[1]"])
def test_half_a_file_of_the_run_is_one_sentence(tmp_path: Path, content: str) -> None:
    config = build({"model": {"path": "m"}, "run": {"folder": str(tmp_path), "name": "x"}})
    folder = folder_for(config)
    set_up(folder, config)
    assert open_folder(config).root == folder.root and read_summary(folder) is None
    assert not list(folder.root.glob("*.tmp"))
    folder.config.write_text(content)
    with pytest.raises(UserError, match=r"x/config\.json is damaged"):
        open_folder(config)
    folder.summary.write_text(content)
    with pytest.raises(UserError, match=r"x/summary\.json is damaged .*remove it"):
        read_summary(folder)


def of_steps(folder: Path, steps: int, *more: str) -> Config:
    return build({"model": {"path": "m"}}, [f"run.folder={folder}", "run.name=x", f"run.steps={steps}", "run.device=cpu", *more])


def finished(folder: Path, *more: str) -> RunFolder:
    """A run that has finished its 40 steps."""
    config = of_steps(folder, 40, *more)
    set_up(found := folder_for(config), config)
    (found.checkpoints / "step_000040").mkdir()
    found.summary.write_text(json.dumps({"steps": 40, "wall_s": 1, "phases_s": {}, "max_logprob_gap": 0, "gain_by_turn": []}))
    return found


def test_a_finished_run_goes_on_to_more_steps_where_none_depends_on_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(tmp_path, "optim.warmup_steps=5", "advantage.gain_weight=[0.5,0.5]")
    same = ["optim.warmup_steps=5", "advantage.gain_weight=[0.5,0.5]"]
    assert open_folder(of_steps(tmp_path, 80, *same)).root == folder.root
    started: list[int] = []
    monkeypatch.setattr("igpo_megatron.cli._launcher", lambda settings, ranks: nullcontext(lambda *_: started.append(settings.run.steps)))
    path = tmp_path / "run.yaml"
    path.write_text(to_json(of_steps(tmp_path, 40, *same)))
    again = CliRunner().invoke(app, ["train", str(path)])
    assert again.exit_code == 0 and started == []
    assert "this run is finished; to train again choose another run.name" in again.output and "to go on raise run.steps" in again.output
    assert CliRunner().invoke(app, ["train", str(path), "run.steps=80"]).exit_code == 0 and started == [80]
    set_up(folder, of_steps(tmp_path, 80, *same))
    assert read_summary(folder) is None, "it is unfinished until step 80"
    with pytest.raises(ConfigError, match=r"\n  - run\.steps: 80 -> 40 \(it may be raised, not lowered\)$"):
        open_folder(of_steps(tmp_path, 40, *same))


@pytest.mark.parametrize(("setting", "advised"), [("run.seed=1", True), ("optim.decay=linear", False), ("run.stop_after=rollout", False)])
def test_more_steps_are_advised_only_where_they_are_accepted(setting: str, advised: bool, tmp_path: Path) -> None:
    finished(tmp_path, setting)
    path = tmp_path / "run.yaml"
    path.write_text(to_json(of_steps(tmp_path, 40, setting)))
    again = CliRunner().invoke(app, ["train", str(path)])
    assert "this run is finished" in again.output and ("to go on raise run.steps" in again.output) == advised


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("optim.decay=linear", "optim.decay=linear; to train on"),
        ("advantage.gain_weight=[1.0,0.5]", "advantage.gain_weight=[1.0, 0.5]; to train on"),
        ("advantage.outcome_weight=[0.0,1.0]", "advantage.outcome_weight=[0.0, 1.0]; to train on"),
        ("advantage.name=my_package.mine:advantage", "advantage.name=my_package.mine:advantage (it is given its progress); to train on"),
        ("run.stop_after=rollout", "run.steps: 40 -> 80, but run.stop_after=rollout keeps no checkpoint to go on from"),
    ],
)
def test_a_run_whose_steps_depend_on_their_number_says_how_to_train_on(setting: str, why: str, tmp_path: Path) -> None:
    folder = finished(tmp_path, setting)
    assert open_folder(of_steps(tmp_path, 40, setting)).root == folder.root
    with pytest.raises(ConfigError) as refused:
        open_folder(of_steps(tmp_path, 80, setting))
    assert why in str(refused.value)
    if "to train on" in why:
        command = f"`igpo convert megatron-to-hf --megatron {folder.checkpoints}/step_000040 --out hf/`"
        assert command in str(refused.value) and "another run.name and model.path=hf/" in str(refused.value)


def test_a_checkpoint_that_is_replaced_or_not_kept_is_renamed_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is killed meanwhile leaves none that is half removed."""
    removed: list[str] = []

    def remove(folder: Path) -> None:
        removed.append(folder.name)
        folder.rename(tmp_path / f"removed {len(removed)}")

    monkeypatch.setattr("shutil.rmtree", remove)
    for name in ("dist.barrier", "copy_config", "write_metadata"):
        monkeypatch.setattr(f"igpo_megatron.policy.checkpoint.{name}", mock.Mock())
    for step in (1, 2, 3, 3):
        (tmp_path / f"step_{step:06d}.partial").mkdir()
        checkpoint._complete(mock.Mock(), tmp_path / f"step_{step:06d}", {}, {}, {}, keep=2)
    monkeypatch.undo()
    assert removed == ["step_000001.old.partial", "step_000003.old.partial"]
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000002", "step_000003"]
