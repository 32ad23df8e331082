"""Every command ends with one sentence and its exit code, whatever is raised in it; a run's folder has one trainer."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from typer.testing import CliRunner

from checkpoint_conversion import ConversionError
from checkpoint_conversion.folders import new_folder
from igpo_megatron import cli
from igpo_megatron.config.load import build
from igpo_megatron.launch import agent
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.observability.run_folder import RunFolder, held, read_summary, write_whole
from igpo_megatron.plan import machines
from igpo_megatron.policy.parallel import MEETING_FOLDER
from igpo_megatron.supervision.endings import LAUNCHED, Ended, Ending, ending_of, interruptible, leave, reason_left, signals_restored
from igpo_megatron.types import Node, Prompt, RolloutGroup, RunStopped, Status, Trajectory, UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "examples/quickstart/igpo.yaml")
NCCL_REMOTE = "remote process exited or there was a network error, NCCL version 2.28.8\nncclRemoteError: A call failed"
"""As NCCL says it; the other words are got from torch itself."""


@pytest.mark.parametrize(
    ("error", "kind", "code", "sentence"),
    [
        (UserError("no such file"), "error", 2, "no such file"),
        (ConversionError("no such folder"), "error", 2, "no such folder"),
        (RunStopped("engine 0 died"), "error", 1, "engine 0 died"),
        (KeyboardInterrupt(), "interrupted", 130, "rank 1 was interrupted by SIGINT"),
        (KeyboardInterrupt("SIGTERM"), "interrupted", 143, "rank 1 was interrupted by SIGTERM"),
        (SystemExit(15), "interrupted", 143, "rank 1 was interrupted by SIGTERM"),  # Ray's answer to SIGTERM
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4"), "peer", 1, "rank 1 lost its connection to another rank"),
        (RuntimeError("an engine: Connection reset by peer"), "error", 1, "rank 1 failed: RuntimeError: an engine: Connection reset by"),
        (torch.distributed.DistBackendError(f"NCCL error: {NCCL_REMOTE}"), "peer", 1, "rank 1 lost its connection to another rank"),
        (torch.distributed.DistBackendError("NCCL error: unhandled cuda error"), "error", 1, "rank 1 failed: DistBackendError: NCCL error"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "error", 1, "a/b: no space left on device; free some space there"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "error", 1, "a/b: read-only file system; choose another folder"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "error", 1, "a/b: permission denied; choose another folder"),
        (PermissionError(errno.EPERM, "Operation not permitted"), "error", 1, "rank 1 failed: PermissionError: [Errno 1]"),
        (ValueError("zip() argument 2 is shorter"), "error", 1, "rank 1 failed: ValueError: zip() argument 2 is shorter (traceback: "),
        (KeyError("absent"), "error", 1, "rank 1 failed: KeyError: 'absent' (traceback: "),
    ],
)
def test_only_what_a_user_did_is_told_as_that_and_the_rest_by_what_it_is(
    error: BaseException, kind: str, code: int, sentence: str, tmp_path: Path
) -> None:
    ending = ending_of(error, "rank 1", tmp_path)
    assert (ending.kind, ending.code) == (kind, code) and ending.sentence.startswith(sentence)
    assert (tmp_path / "failures/rank1.txt").exists() == ("traceback" in ending.sentence)


def test_a_peer_that_gloo_has_lost_is_never_the_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.HashStore()

    def join(rank: int) -> torch.distributed.ProcessGroup:
        return torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))

    with ThreadPoolExecutor(2) as threads:
        left, gone = threads.map(join, range(2))
    del gone
    with pytest.raises(RuntimeError) as caught:
        left.allreduce([torch.ones(1)]).wait()
    assert ending_of(caught.value, "rank 0", tmp_path).kind == "peer"


def test_a_lost_store_counts_as_a_lost_peer_and_a_port_in_use_does_not(tmp_path: Path) -> None:
    serve = partial(torch.distributed.TCPStore, "127.0.0.1", is_master=True, wait_for_workers=False)
    store = serve(0)
    client = torch.distributed.TCPStore("127.0.0.1", store.port)
    with pytest.raises(torch.distributed.DistNetworkError) as taken:
        serve(store.port)
    assert ending_of(taken.value, "rank 0", tmp_path).kind == "error"
    del store
    for _ in range(2):  # torch reports the connection's end first, a broken pipe from then on
        with pytest.raises(torch.distributed.DistNetworkError) as lost:
            client.get("anything")
        assert ending_of(lost.value, "rank 1", tmp_path).kind == "peer"


def test_a_full_disk_behind_a_library_s_error_is_told() -> None:
    error = RuntimeError("enforce fail")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert ending_of(error, "rank 0", Path("runs/a")).sentence == "runs/a: no space left on device; free some space there"


def test_a_permission_that_was_done_without_is_not_the_reason_of_a_later_failure(tmp_path: Path) -> None:
    later = ValueError("of its own")
    later.__context__ = PermissionError(errno.EACCES, "Permission denied", "/optional")
    assert "ValueError: of its own (traceback: " in ending_of(later, "rank 1", tmp_path).sentence
    later.__cause__ = later.__context__
    assert ending_of(later, "rank 1", tmp_path).sentence.startswith("/optional: permission denied; ")


def test_the_first_reason_counts_and_not_what_closing_raises_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv(LAUNCHED, "1")
    with pytest.raises(Ended) as caught, reason_left("rank 0", tmp_path):
        try:
            with reason_left("rank 0", tmp_path):
                raise RunStopped("engine 0 died")
        finally:
            raise OSError("the engine is already gone")
    assert caught.value.ending.sentence == "engine 0 died"


def test_a_second_signal_does_not_cut_closing_short() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where a shell started this in the background
    closed = []
    with signals_restored():
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            try:
                with interruptible():
                    signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                closed.append("in order")
        assert closed
    assert signal.getsignal(signal.SIGINT) is before


COMMANDS = {
    "train": (["train", CONFIG], "igpo_megatron.cli.load"),
    "launch": (["launch", CONFIG], "igpo_megatron.cli.load"),
    "eval": (["eval", CONFIG], "igpo_megatron.training.evaluate.evaluate_checkpoint"),
    "score": (["score", "lines.jsonl"], "igpo_megatron.algorithms.rewards.score_lines"),
    "report": (["report", "runs/a"], "igpo_megatron.observability.report.page.write_report"),
    "plan": (["plan", "--model", "m", "--gpus", "8"], "igpo_megatron.plan.command.plan_run"),
    "config": (["config"], "igpo_megatron.cli.explain"),
    "doctor": (["doctor"], "igpo_megatron.doctor.machine.main"),
    "doctor probes": (["doctor", "probes", CONFIG], "igpo_megatron.doctor.commands.load"),
    "doctor tools": (["doctor", "tools", CONFIG], "igpo_megatron.doctor.tools.main"),
    "data prepare": (["data", "prepare", "a.json", "--out", "b.parquet"], "igpo_megatron.data.commands.convert"),
    "data corpus": (["data", "corpus", "a.jsonl", "--out", "b.jsonl"], "igpo_megatron.data.commands.read_passages"),
    "data check": (["data", "check", "a.parquet"], "igpo_megatron.data.commands.check_file"),
    "serve retriever": (["serve", "retriever", "--corpus", "a.jsonl", "--port", "0"], "igpo_megatron.serve.retriever.listen"),
    "serve search": (
        ["serve", "search", "--port", "0", "--cache", "a", "--budget", "0", "a=b"],
        "igpo_megatron.serve.search.read_settings",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("what was found"), 2, "error: what was found\n"),
        (RunStopped("who is to blame"), 1, "error: who is to blame\n"),
        (ValueError("math domain error"), 1, "error: ValueError: math domain error (traceback: "),
        (KeyError("query"), 1, "error: KeyError: 'query' (traceback: "),
        (KeyboardInterrupt(), 130, "interrupted by SIGINT\n"),
    ],
)
def test_every_command_ends_with_one_sentence(
    command: str, error: BaseException, code: int, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments, where = COMMANDS[command]
    with mock.patch(where, side_effect=error):
        result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == code and result.output.startswith(printed) and "Traceback" not in result.output
    kept = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.txt")]
    assert len(kept) == ("traceback" in printed) and all("Traceback (most recent call last)" in text for text in kept)


def test_output_that_nobody_reads_any_more_ends_a_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "igpo_megatron", "config", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with os.fdopen(writer, "wb") as output:
        ended = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, env=environment, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_another_pipe_that_breaks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with mock.patch("igpo_megatron.cli.explain", side_effect=BrokenPipeError(errno.EPIPE, "Broken pipe")):
        result = CliRunner().invoke(cli.app, ["config"])
    assert result.exit_code == 1 and result.output.startswith("error: BrokenPipeError: [Errno 32] Broken pipe (traceback: ")


def test_a_rank_whose_reason_cannot_be_left_says_it_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCHED, "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    leave(Ending("error", 1, "engine 0 died"))
    assert capsys.readouterr().err == "" and (tmp_path / "error.json").is_file()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json/error.json"))
    leave(Ending("error", 1, "engine 0 died"))
    assert capsys.readouterr().err.startswith("stopped: engine 0 died")


CUT_SHORT = """
import os, resource, sys
from igpo_megatron.supervision.endings import Ending, leave
how = sys.argv[1]
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
else:
    os.replace = os.rename = lambda *_: os.kill(os.getpid(), 9)
leave(Ending("error", 1, "engine 0 died"))
"""


@pytest.mark.parametrize("how", ["full", "killed"])
def test_a_reason_that_could_not_be_written_whole_is_absent_for_the_agent_of_torchrun(how: str, tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    environment = {**os.environ, LAUNCHED: "1", "TORCHELASTIC_ERROR_FILE": str(path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", CUT_SHORT, how], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == (0 if how == "full" else -9), ended.stderr
    assert ProcessFailure(0, 1, 1, str(path)).message, "it raises on half a file"
    assert how == "killed" or ended.stderr.startswith("stopped: engine 0 died")


def test_a_rank_that_a_signal_without_a_name_ended_is_told_too() -> None:
    failure = mock.Mock(error_file_data={}, exitcode=-40, timestamp=1)
    assert agent.ending_of_ranks({3: failure}).sentence == "rank 3 was ended by signal 40"


RANK = """
import os, sys, time
from pathlib import Path
from igpo_megatron.supervision.endings import Ended, Ending, leave, reason_left
folder = Path(sys.argv[1])
if os.environ["RANK"] == "0":
    while not (folder / "reason is left").exists():
        time.sleep(0.01)
    leave(Ending("peer", 1, "rank 0 lost its connection to another rank", time.time()))
    sys.exit(1)
try:
    with reason_left("rank 1", folder):
        [*zip([1], [], strict=True)]
except Ended:
    (folder / "reason is left").touch()
    time.sleep(600)  # it closes slowly: rank 0 ends first, and torchrun ends this one
"""


def test_the_launcher_tells_the_first_cause_of_a_rank_that_failed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing_rank.py").write_text(RANK, encoding="utf-8")
    monkeypatch.setattr(agent, "RANK_MODULE", "failing_rank")
    environment = mock.patch.dict(os.environ, PYTHONPATH=f"{tmp_path}:{ROOT}")
    with environment:  # which forgets what is set inside
        with signals_restored(), pytest.raises(typer.Exit) as ended, cli._torchrun(2) as start:
            assert Path(os.environ[MEETING_FOLDER]).is_dir()
            start(str(tmp_path))
        assert MEETING_FOLDER not in os.environ, "ranks that are started otherwise would look for a folder that is gone"
    assert ended.value.exit_code == 1
    said = "ValueError: zip() argument 2 is shorter than argument 1"
    why = f"stopped: rank 1 failed: {said} (traceback: {tmp_path}/failures/rank1.txt); the same command resumes from the last checkpoint\n"
    assert capfd.readouterr() == ("", why)
    assert "zip([1], []" in (tmp_path / "failures/rank1.txt").read_text(encoding="utf-8")


def test_an_ending_says_what_was_wrong_or_how_to_go_on() -> None:
    assert Ending("error", 2, "no such file").text == "error: no such file\n"
    assert Ending("error", 1, "engine 0 died").text == "stopped: engine 0 died; the same command resumes from the last checkpoint\n"
    assert Ending("interrupted", 130, "interrupted by SIGINT").text.startswith("interrupted by SIGINT; the same command resumes")


def test_the_command_is_interrupted_in_one_sentence_from_its_first_moment(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "igpo_megatron", "plan"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "interrupted by SIGINT\n")


# ---- the run's folder


def test_a_second_trainer_on_a_folder_is_told_who_has_it_and_a_third_may_follow(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with held(folder), pytest.raises(UserError, match=f"run is in use by process {os.getpid()} on .*: wait for its end"), held(folder):
        pass
    with held(folder):
        pass


LEAVES_A_CHILD = """
import os, sys
from pathlib import Path
from igpo_megatron.observability.run_folder import RunFolder, held
with held(RunFolder(Path(sys.argv[1]))):
    if os.fork():
        os._exit(0)
    print("forked", flush=True)
    sys.stdin.read()
"""


def test_a_child_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES_A_CHILD, str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline() == b"forked\n" and run.wait(timeout=60) == 0
        with held(RunFolder(tmp_path)):
            pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with (
        pytest.raises(UserError, match=r"file/run cannot be written \(not a directory\): choose another run.folder"),
        held(RunFolder(tmp_path / "file/run")),
    ):
        pass


def test_a_read_only_folder_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igpo_megatron.training.checks.require", lambda *_: None)
    closed = tmp_path / "closed"
    closed.mkdir()
    is_root = os.geteuid() == 0
    if is_root and subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=64k", "none", str(closed)], capture_output=True).returncode:
        pytest.skip("root may write everywhere, and cannot mount here")
    try:
        if not is_root:
            closed.chmod(0o500)
        result = CliRunner().invoke(cli.app, ["train", CONFIG, f"run.folder={closed}"])
    finally:
        if is_root:
            subprocess.run(["umount", str(closed)], check=True)
    assert result.exit_code == 2 and "Traceback" not in result.output
    why = "read-only file system" if is_root else "permission denied"
    assert f"cannot be written ({why}): choose another run.folder, or make it writable" in result.output


@pytest.mark.parametrize("text", ["", "{", '["a"]', "\xff", "[" * 100_000])
def test_a_half_written_file_of_a_run_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"summary.json is damaged \(.*\); remove it, and the same command writes it again"):
        read_summary(RunFolder(tmp_path))


# ---- a user's mistakes, where they are read


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("run: {name: 2024-13-45}", "not valid YAML: month must be in 1..12"),
        ("run: {seed: !!int abc}", "not valid YAML: invalid literal for int()"),
        ("run: {resume: !!bool maybe}", "not valid YAML: 'maybe'"),
        ("run: {name: !!timestamp x}", "not valid YAML: "),
        (f"run: {{seed: {'9' * 5000}}}", "not valid YAML: Exceeds the limit"),
        (f"run: {'[' * 3000}", "not valid YAML: maximum recursion depth exceeded"),
        ('model: {path: m}\nrun: {name: "a\\0b"}', "cannot be a folder (ValueError: embedded null byte)"),
        (f"model: {{path: m}}\nrun: {{folder: ., name: {'x' * 300}}}", "cannot be a folder (OSError: [Errno 36] File name too long"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_the_users_mistake(value: str, sentence: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["train", write(tmp_path, "run.yaml", value)])
    assert result.exit_code == 2 and result.output.startswith("error: ") and sentence in result.output


def test_an_override_that_is_no_yaml_is_text() -> None:
    with pytest.raises(UserError, match=r"run\.seed='2024-13-45': input should be a valid integer"):
        build({"model": {"path": "m"}}, ["run.seed=2024-13-45"])


def test_files_that_are_absent_or_damaged_are_the_users_mistake(tmp_path: Path) -> None:
    deep, plan = "[" * 100_000, ["plan", "--model", "Qwen2.5-7B", "--gpus", "8"]
    (tmp_path / "m").mkdir()
    damaged = tmp_path / "rollouts/step_000001.parquet"
    nodes = [Node(None, "prompt", [1] * 500), Node(0, "action", list(range(500)), 1)]
    write_rollouts(damaged, 1, [RolloutGroup(Prompt("q", "?", ("a",), "t"), nodes, [Trajectory([0, 1], Status.FINISHED)])])
    content = damaged.read_bytes()
    damaged.write_bytes(content[:4] + b"\xff" * 60 + content[64:])
    for arguments, sentence in (
        (["score", str(tmp_path / "absent")], "absent: no such file or directory"),
        (["score", str(tmp_path)], "is a directory"),
        (["score", write(tmp_path, "deep.jsonl", deep)], "line 1: not JSON (nested deeper than 64 levels)"),
        (["score", write(tmp_path, "long.jsonl", f'{{"ground_truth": {"9" * 5000}}}')], "line 1: not JSON (a number of 5,000 digits)"),
        (["plan", "--model", str(Path(write(tmp_path, "m/config.json", deep)).parent), "--gpus", "8"], "is not JSON: maximum recursion"),
        ([*plan, "--calibration", write(tmp_path, "c.json", deep)], "not a file written by `igpo plan --calibrate`"),
        ([*plan, "--rollouts", str(damaged)], "step_000001.parquet: row 0 or one behind it cannot be read as a group ("),
        (["report", str(tmp_path)], "step_000001.parquet: row 0 or one behind it cannot be read as a group ("),
        (["train", str(tmp_path)], "is a directory; expected a configuration file"),
    ):
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 2 and sentence in result.output.replace("\n", ""), (arguments, result.output)
    for name in ("summary.json", "config.json", "metrics.jsonl", "eval/step_000000.json"):
        write(tmp_path, "run/metrics.jsonl", "")
        write(tmp_path, f"run/{name}", deep + "\n")
        result = CliRunner().invoke(cli.app, ["report", str(tmp_path / "run")])
        assert result.exit_code == 2 and f"{name}" in result.output and re.search(r"not JSON(: | \()maximum recursion", result.output)
        (tmp_path / "run" / name).unlink()


def test_a_conversion_to_a_place_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, "file", "")
    expected = pytest.raises(ConversionError, match=r"file/out cannot be made \(Not a directory: .*\); choose a folder that you may write")
    with expected, new_folder(tmp_path / "file/out", {}):
        pass


def test_a_plan_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out .*: cannot be written \(is a directory\); name another file"):
        machines.write_asked(tmp_path, "text", "--out")


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "summary.json", "before"))
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "no UTF-8 file holds \ud800")
    assert path.read_text(encoding="utf-8") == "before" and list(tmp_path.iterdir()) == [path]
