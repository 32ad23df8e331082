"""A run's folder: its layout, and whether a run may start or resume, or is already finished.

runs/<name>/
    lock             held by the main rank while the run is active
    config.json      resolved configuration (no secrets)
    metrics.jsonl    one line per step
    failures/        tracebacks of unexpected errors: rank0.txt ..., and trajectories.txt of those that ended as `crashed`
    logs/            warnings of libraries, on each rank (rank0.txt ...) and in the engines
    rollouts/        step_000001.parquet ...    everything needed to replay a step
    eval/            step_000000.json and the rollouts behind each
    checkpoints/     step_000010/ ...
    summary.json     written last: its presence means the run is finished
    report.html
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from igpo_megatron.config.checks import planned_over_steps
from igpo_megatron.config.load import ConfigError, build, differing_keys, to_json
from igpo_megatron.config.schema import Config
from igpo_megatron.supervision.failures import FOLDER, in_short
from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import UserError

MAY_CHANGE = (
    *("parallel.", "rollout.engine.", "run.threads", "run.resume", "sync.max_gap", "track.", "checkpoint.keep", "checkpoint.in_background"),
    # A run that its search provider stopped may resume with another key, more slowly, or through a proxy.
    *("search.api_key_env", "search.attempts", "search.breaker_", "search.cache", "search.deadline_s", "search.max_concurrency"),
    *("search.rate_per_s", "search.timeout_s", "search.use_proxy", "search.vectors"),
)
"""Settings of how a run is executed, not of what it computes: they may differ when it resumes."""


class RunFolder:
    """Paths of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config, self.summary, self.report = root / "config.json", root / "summary.json", root / "report.html"
        self.metrics = root / "metrics.jsonl"
        self.rollouts, self.eval, self.checkpoints = root / "rollouts", root / "eval", root / "checkpoints"
        self.crashes = root / FOLDER / "trajectories.txt"


def folder_for(config: Config) -> RunFolder:
    """The folder a configuration names."""
    return RunFolder(config.run.folder / config.run.name)


def open_folder(config: Config) -> RunFolder:
    """Check that the run may start or resume in its folder. Raises ConfigError. Writes nothing.

    A folder made with other settings is refused, naming the keys that differ; with `run.resume=never` every used folder is refused. A key
    that is missing in the folder's settings, because it is newer, counts as its default. `run.steps` may be raised where no step depends on
    it: the run goes on like one of so many steps that was stopped. `model.dtype=auto` agrees with the dtype that the run began with.
    """
    folder = folder_for(config)
    try:
        os.stat(folder.config)
    except (FileNotFoundError, NotADirectoryError):
        return folder
    except (OSError, ValueError) as error:  # the name is too long, or has a zero byte
        raise ConfigError([f"run.folder and run.name: {str(folder.root)[:200]!r} cannot be a folder ({in_short(error)[:80]})"]) from None
    how = f"choose another run.name, or remove {folder.root} to start again"
    if config.run.resume == "never":
        raise ConfigError([f"run.resume=never, but {folder.root} already holds a run; {how}"])
    old = read_object(folder.config, f"write it from a copy, or {how}")
    try:
        old = json.loads(to_json(build(old)))
    except ConfigError as error:
        raise ConfigError([f"{folder.config} has settings that this version does not take ({how}):", *error.problems]) from None
    may_change = (*MAY_CHANGE, "run.steps:", *(("model.dtype:",) if config.model.dtype == "auto" else ()))
    changed = [row for row in differing_keys(old, json.loads(to_json(config))) if not row.startswith(may_change)]
    if changed := [*changed, *_steps_refused(config, old["run"]["steps"], folder)]:
        raise ConfigError([f"{folder.root} was made with other settings ({how}):", *changed])
    return folder


def begun_dtype(folder: RunFolder) -> str | None:
    """The `model.dtype` that the folder's run began with; None for a new run."""
    if not folder.config.is_file():
        return None
    dtype: str = build(read_object(folder.config, "write it from a copy")).model.dtype
    return None if dtype == "auto" else dtype


def _steps_refused(config: Config, before: int, folder: RunFolder) -> Iterator[str]:
    """Why `run.steps`, which was `before`, may not be what it is now."""
    row = f"run.steps: {before} -> {config.run.steps}"
    if config.run.steps < before:
        yield f"{row} (it may be raised, not lowered)"
    elif config.run.steps > before and config.run.stop_after == "rollout":
        yield f"{row}, but run.stop_after=rollout keeps no checkpoint to go on from"
    elif config.run.steps > before and (planned := planned_over_steps(config)):
        newest = max(folder.checkpoints.glob("step_??????"), default=folder.checkpoints / "step_N")
        yield (
            f"{row}, but the steps so far depend on it by {' and '.join(planned)}; to train on, start a new run from the newest checkpoint "
            f"(its optimizer and KL reference begin anew): `igpo convert megatron-to-hf --megatron {newest} --out hf/`, then `igpo train` "
            "with another run.name and model.path=hf/"
        )


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Lock the folder, which is made if missing, for this process until the block or the process ends.

    Raises UserError if another run holds it, on this machine or on one that shares the disk, or if it cannot be written.
    """
    path = folder.root / "lock"
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise UserError(f"{error.filename or path} cannot be written ({why}): choose another run.folder, or make it writable") from None
    os.register_at_fork(after_in_child=file.close)  # Megatron's writers are forked: one that outlives a killed run must not hold its folder
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"{folder.root} is in use by {holder}: wait for its end, stop it, or choose another run.name") from None
        except OSError:
            pass  # a file system without locks
        with suppress(OSError):  # a full disk is reported when there is something to save
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def set_up(folder: RunFolder, config: Config) -> None:
    """Make the folder and save the resolved configuration in it; the run is unfinished from here on."""
    for path in (folder.rollouts, folder.eval, folder.checkpoints):
        path.mkdir(parents=True, exist_ok=True)
    folder.summary.unlink(missing_ok=True)  # of a finished run that goes on to more steps
    write_whole(folder.config, to_json(config))


def step_name(step: int) -> str:
    """How names of a step's files and folders begin, e.g. `step_000010`."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int | None:
    """The step of a file or folder that is named after one; None for another."""
    match = re.match(r"step_(\d{6,})", path.name)
    return int(match[1]) if match else None


def forget_after(folder: RunFolder, step: int) -> None:
    """Remove rollouts and evaluations of steps after `step`: the run resumes there and will repeat those steps."""
    for path in (*folder.rollouts.glob("step_*"), *folder.eval.glob("step_*")):
        if (step_of(path) or 0) > step:
            path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write a file completely, or, if the disk is full, leave it as it was."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def read_summary(folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a finished run; None while it is not finished."""
    return read_object(folder.summary, "remove it, and the same command writes it again") if folder.summary.is_file() else None


def read_object(path: Path, what_to_do: str) -> dict[str, Any]:
    """The object in a JSON file of the run. Raises UserError with `what_to_do` if the file is damaged, OSError if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged (not JSON: {error}); {what_to_do}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds a {type(value).__name__}, expected an object); {what_to_do}")
    return value


def public_config(values: Any, key: str = "") -> Any:
    """A configuration fit to be shown: values of secret keys and credentials inside URLs become `***`.

    The schema stores no secrets, only names of environment variables (`*_env`), which stay; this is a second safeguard.
    """
    if isinstance(values, dict):
        return {name: public_config(value, name) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [public_config(value, key) for value in values]
    if isinstance(values, str):
        return "***" if SECRET_KEY.search(key) else URL_QUERY.sub(r"\1?***", URL_USER.sub(r"\1***@", values))
    return values


SECRET_KEY = re.compile(r"(^|_)(api_?key|token|secret|password)$", re.IGNORECASE)
URL_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/?#\s]+@", re.IGNORECASE)
URL_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^?#\s]*)\?\S+", re.IGNORECASE)
