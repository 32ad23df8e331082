"""Two real ranks of which one raises, or is interrupted: whatever the phase, the launcher tells the cause and the traceback is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import become_rank, make_config
from groups import random_groups
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import to_json
from igpo_megatron.launch.agent import ending_of_ranks
from igpo_megatron.policy import checkpoint, parallel, policy, weight_sync
from igpo_megatron.supervision.endings import LAUNCHED, Ending
from igpo_megatron.training import main as train
from igpo_megatron.training import services
from igpo_megatron.types import UserError

FORK = multiprocessing.get_context("fork")


class Sink:
    """Takes weights as engines do."""

    def update_weights(self, named_tensors: Any, version: int, canary: Any = None, exported: Any = None) -> dict[str, float]:
        for _ in named_tensors:
            pass
        return {}


class Queue:
    """Has the groups of every step, and nothing to remember."""

    successes = SimpleNamespace(state=lambda: None)

    def take(self, step: int) -> Any:
        return random_groups(step, probes=False)

    def done(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> None:
        return None

    def weights_arrived(self, version: int) -> None:
        return None


def open_services(config: Any, folder: Any, stack: Any, *_: Any) -> services.Services:
    def close() -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # what torchrun's agent sends when another rank has failed
        (folder.root.parent / "closed").write_text("in order")

    stack.callback(close)
    return services.Services(folder, engines=Sink(), queue=Queue())  # type: ignore[arg-type]


def settings(hf_folder: Path, folder: Path, **overrides: Any) -> Path:
    """A run of two ranks and one step, as a file."""
    common = {"run__folder": str(folder), "run__name": "run", "run__steps": 1, "parallel__tensor": 2, "checkpoint__every": 1}
    config = make_config(hf_folder, **{**common, **overrides})
    values = json.loads(to_json(config))
    values |= {"advantage": {"name": "grpo"}, "reward": {"gain": "none"}, "track": {"dump_every": 0}}
    path = folder / "run.yaml"
    path.write_text(json.dumps({key: values[key] for key in values if key != "eval"}), encoding="utf-8")
    return path


def run_ranks(path: Path, prepare: Callable[[int], None], world: int = 2) -> tuple[Ending, str]:
    """What torchrun's agent does with the ranks of one machine: the first that fails ends the others. The cause, and what they printed.

    The bounds are for ranks that hang: they end by themselves within seconds, or a minute on a busy machine.
    """
    meeting = tempfile.mkdtemp(dir=path.parent)
    processes = [FORK.Process(target=_rank, args=(rank, world, meeting, path, prepare)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 300
        while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
            assert time.monotonic() < deadline, "the ranks go on"
            time.sleep(0.02)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(120)
            assert not process.is_alive(), "a rank goes on after SIGTERM"
        failures = {
            rank: ProcessFailure(rank, process.pid or 0, process.exitcode, str(path.parent / f"error{rank}.json"))
            for rank, process in enumerate(processes)
            if process.exitcode
        }
        printed = "".join((path.parent / f"out{rank}.txt").read_text() for rank in range(world))
        return (ending_of_ranks(failures) if failures else Ending("done", 0)), printed
    finally:
        for process in processes:
            process.kill()
            process.join()  # before its files are looked at, or their disk is unmounted


def _rank(rank: int, world: int, meeting: str, path: Path, prepare: Callable[[int], None]) -> None:
    output = os.open(path.parent / f"out{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    become_rank(rank, world, meeting)
    os.environ.update({"TORCHELASTIC_ERROR_FILE": str(path.parent / f"error{rank}.json"), LAUNCHED: "1"})
    services.open_services = open_services
    services.join_engines = lambda *_: None
    train.require = lambda *_: None
    prepare(rank)
    code = 99
    try:
        code = train.main([str(path)])
    finally:
        os._exit(code)


class Fault:
    """Raises, or interrupts its process, where a rank enters a phase."""

    def __init__(self, phase: str, act: Callable[[str], None]) -> None:
        module, name = PHASES[phase]
        original = getattr(module, name)

        def entered(*arguments: Any, **named: Any) -> Any:
            work = getattr(arguments[-1], "func", None) if arguments else None
            if name != "on_main" or getattr(work, "__name__", "") == ON_MAIN[phase]:
                act(phase)
            return original(*arguments, **named)

        setattr(module, name, entered)


PHASES: dict[str, tuple[Any, str]] = {
    "starting": (policy, "build_model"),
    "rollout": (parallel, "on_main"),
    "scoring": (train, "score_tokens"),
    "advantages": (train, "assign_advantages"),
    "training": (policy.Policy, "forward_backward"),
    "saving": (checkpoint, "_sharded_state"),
    "sync": (weight_sync, "push"),
    "evaluation": (parallel, "on_main"),
    "closing": (parallel, "shutdown"),
    "finish": (services, "finish"),
}
ON_MAIN = {"rollout": "collect", "evaluation": "evaluate_if_due"}


def raises(phase: str) -> None:
    raise ValueError(f"zip() argument 2 is shorter than argument 1 in {phase}")


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "finish"])
def test_a_rank_that_raises_in_any_phase_is_the_cause_and_keeps_its_traceback(
    phase: str, hf_folders: dict[str, Path], tmp_path: Path
) -> None:
    ending, printed = run_ranks(settings(hf_folders["qwen2"], tmp_path), lambda rank: Fault(phase, raises) if rank == 1 else None)
    path = tmp_path / "run/failures/rank1.txt"
    assert (ending.kind, ending.code) == ("error", 1)
    assert ending.sentence == f"rank 1 failed: ValueError: zip() argument 2 is shorter than argument 1 in {phase} (traceback: {path})"
    assert "in raises" in path.read_text(encoding="utf-8") and "Traceback" not in printed


@pytest.mark.parametrize("phase", ["rollout", "advantages", "evaluation", "finish"])
def test_a_main_rank_that_raises_closes_what_is_open_and_is_the_cause(phase: str, hf_folders: dict[str, Path], tmp_path: Path) -> None:
    ending, printed = run_ranks(settings(hf_folders["qwen2"], tmp_path), lambda rank: Fault(phase, raises) if rank == 0 else None)
    assert (ending.kind, ending.code) == ("error", 1) and ending.sentence.startswith("rank 0 failed: ValueError: zip()")
    assert (tmp_path / "run/failures/rank0.txt").is_file() and "Traceback" not in printed
    assert (tmp_path / "closed").is_file()


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "closing"])
def test_an_interruption_in_any_phase_is_one_sentence_and_what_was_opened_is_closed(
    phase: str, hf_folders: dict[str, Path], tmp_path: Path
) -> None:
    def interrupts(phase: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    ending, printed = run_ranks(settings(hf_folders["qwen2"], tmp_path), lambda rank: Fault(phase, interrupts) if rank == 0 else None)
    assert (ending.kind, ending.code, ending.sentence) == ("interrupted", 130, "rank 0 was interrupted by SIGINT")
    assert "Traceback" not in printed and not (tmp_path / "run/failures/rank0.txt").exists()
    assert (tmp_path / "closed").is_file() or phase == "starting"


def test_rollouts_that_hang_are_the_cause_and_not_the_rank_that_waits_for_them(
    hf_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks wait since the same moment."""
    monkeypatch.setattr(Queue, "take", lambda self, step: time.sleep(600))
    ending, printed = run_ranks(settings(hf_folders["qwen2"], tmp_path, parallel__timeout_s=1), lambda rank: None)
    sentence = r"rank 0 has waited \d+ s for the groups of step 1 \(from the rollouts\); held up by the rollouts \(record: .*\)"
    assert (ending.kind, ending.code) == ("error", 1) and re.fullmatch(sentence, ending.sentence), ending
    assert (tmp_path / "closed").is_file() and "Traceback" not in printed


@pytest.mark.parametrize(("rank", "in_background"), [(0, False), (1, True)])
def test_a_save_that_is_cut_short_is_one_sentence_on_whichever_rank_it_happens(
    rank: int, in_background: bool, hf_folders: dict[str, Path], tmp_path: Path
) -> None:
    def slow(path: Path) -> Any:
        time.sleep(0.5)  # the other rank, which is told of the failure first, would end meanwhile, and thereby this one
        return disk_usage(path)

    disk_usage = shutil.disk_usage

    def prepare(number: int) -> None:
        if number == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        if number == 0:
            shutil.disk_usage = slow  # type: ignore[assignment]

    ending, printed = run_ranks(settings(hf_folders["qwen2"], tmp_path, checkpoint__in_background=in_background), prepare)
    assert (ending.kind, ending.code) == ("error", 1)
    assert ending.sentence.startswith(f"step_000001 could not be written by rank {rank}: a file was cut short; {tmp_path}")
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("free_kib", "sentence"),
    [
        (0, "disk.*: no space left on device; free some space there"),
        (300, r"step_000001 could not be written by rank \d: (a file was cut short|.*No space left on device)"),
    ],
)
def test_a_full_disk_is_one_sentence(free_kib: int, sentence: str, hf_folders: dict[str, Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        path = settings(hf_folders["qwen2"], tmp_path, run__folder=str(disk))
        (disk / "ballast").write_bytes(b"x" * (396 - free_kib) * 1024)  # 4 for the lock
        ending, printed = run_ranks(path, lambda rank: None)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert (ending.kind, ending.code) == ("error", 1) and re.search(sentence, ending.sentence)
    assert "Traceback" not in ending.sentence + printed


def test_a_damaged_tokenizer_is_the_users_mistake(tmp_path: Path) -> None:
    for content in ("{", '{"model": 5}', "", '{"version": "1.0", "model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="its tokenizer cannot be read"):
            load_tokenizer(tmp_path)


def test_a_finished_run_that_goes_on_to_more_steps_trains_as_one_that_had_them_from_the_beginning(
    hf_folders: dict[str, Path], tmp_path: Path
) -> None:
    losses = {}
    for name, lengths in (("at_once", [4]), ("raised", [2, 4])):
        for steps in lengths:
            run = {"run__name": name, "run__steps": steps, "checkpoint__every": 0, "loss__entropy_coef": 0.1}
            ending, printed = run_ranks(settings(hf_folders["qwen2"], tmp_path, parallel__tensor=1, **run), lambda rank: None, world=1)
            assert ending.kind == "done", printed
            assert json.loads((tmp_path / name / "summary.json").read_text())["steps"] == steps
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses["raised"].keys() == {1, 2, 3, 4} and len(set(losses["raised"].values())) == 4
    assert losses["raised"] == pytest.approx(losses["at_once"], rel=1e-6)
