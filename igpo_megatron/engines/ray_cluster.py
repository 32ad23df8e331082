"""Ray for the engines: started here, bound to loopback and ended with the pool, or an existing cluster that is joined."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import torch

from igpo_megatron.config.schema import Config
from igpo_megatron.engines.api import EngineError
from igpo_megatron.supervision.blotting import blot_environment
from igpo_megatron.supervision.failures import MOST_BYTES
from igpo_megatron.supervision.leftovers import claimed, is_alive, remove_abandoned
from igpo_megatron.supervision.library_log import LOGS
from igpo_megatron.types import UserError
from igpo_megatron.weights.send import cause

_OBJECT_STORE_BYTES = 100 * 2**20
_BUCKETS_IN_FLIGHT = 3  # one being written, one being read, one being let go
_RAY_PREFIX = "igpo-ray-"
_SOCKET_PATH_BYTES = 107
_RAY_SOCKET_BYTES = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_LOG_LINES = 12
_END_S = 20.0
_SERVERS = {"gcs_server": "its head (gcs_server)", "raylet": "its raylet"}
# torchrun's variables must not reach the engines: vLLM makes its own process groups.
_LAUNCHER_VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_.*|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*)"
)


class RayCluster:
    """Ray for one pool; `close` ends what was started here and leaves a joined cluster."""

    def __init__(self, config: Config, *, cuda: bool) -> None:
        """Raises EngineError if Ray does not start or the cluster to join does not answer, UserError for missing GPUs."""
        self.folder: Path | None = None
        """Folder of sockets and logs of the Ray started here; None for a joined one."""

        self._run = config.run.folder / config.run.name
        self._servers: dict[str, psutil.Process] = {}
        self._family: list[psutil.Process] = []
        engine = config.rollout.engine
        # Read when ray is imported: without it Ray replaces 127.0.0.1 by the machine's address and listens there.
        address = engine.ray_address
        if address is None or address.startswith("127."):
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets whatever else runs here go before the engines
        if address is None:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = _token()  # otherwise Ray writes a token into the home folder
        import ray

        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        variables: dict[str, str | None] = dict.fromkeys(filter(_LAUNCHER_VARIABLES.fullmatch, os.environ))
        if address is not None:
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # of RAY_AUTH_TOKEN, or the one Ray keeps in the home folder
            try:
                with _environment(variables):
                    ray.init(address=address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise EngineError(f"no Ray cluster answers at rollout.engine.ray_address={address}: {error}") from None
            return
        if cuda and engine.gpu_ids:
            variables["CUDA_VISIBLE_DEVICES"] = visible_devices(engine.gpu_ids)
        self.folder, self._claim = claimed(_new_folder)
        carried = _BUCKETS_IN_FLIGHT * config.sync.bucket_mib * 2**20 if config.sync.transport == "object_store" else 0
        try:
            with _environment(variables):
                ray.init(
                    address="local",
                    num_cpus=engine.count + 1,  # logical CPUs; an engine really uses its `threads`
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES + carried,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(self.folder),
                    **quiet,
                )
        except BaseException as error:  # an interrupt, too: what has started so far would outlive this process
            self._family = _of_folder(self.folder)
            self.close()
            if not isinstance(error, Exception):
                raise
            raise EngineError(f"Ray did not start on this machine: {cause(error)}") from None
        # Only living ones: the servers of an earlier Ray of this process may not have been reaped yet.
        children = [child for child in psutil.Process().children() if is_alive(child)]
        self._servers = {child.name(): child for child in children if child.name() in _SERVERS}

    def remember(self) -> None:
        """Record the raylet's children: its agents survive it if it is killed, and could not be found then."""
        if "raylet" in self._servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                # A raylet that has just died has no children any more: keep the earlier list.
                self._family = self._servers["raylet"].children(recursive=True) or self._family

    def ended(self) -> str | None:
        """Why the Ray started here can no longer serve; None while it can, and always for a joined cluster.

        Ray itself silently tries to reconnect for a minute and then ends this process.
        """
        gone = [words for name, words in _SERVERS.items() if name in self._servers and not is_alive(self._servers[name])]
        return f"Ray ended on this machine: {' and '.join(gone)} died" if gone else None

    def close(self) -> None:
        """Leave Ray; if it was started here, end it and remove its files."""
        import ray

        ray.shutdown()
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        until = time.monotonic() + _END_S
        while any(map(is_alive, self._family)) and time.monotonic() < until:  # until they are gone they may write to the folder
            time.sleep(0.01)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self._keep_logs(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._claim)
            self.folder = None

    def _keep_logs(self, folder: Path) -> None:
        """Copy the output of the engines' processes into the run's folder, if it exists, replacing that of the previous start."""
        kept = self._run / LOGS / "engines"
        shutil.rmtree(kept, ignore_errors=True)
        for path in folder.glob("session_*/logs/worker-*") if self._run.is_dir() else ():
            if text := path.read_bytes()[-MOST_BYTES:].decode(errors="replace"):
                kept.mkdir(parents=True, exist_ok=True)
                (kept / path.name).write_text(blot_environment(text), encoding="utf-8")

    def last_log_lines(self, process: int | None) -> str:
        """The end of the error output of actor process `process` (None: of all), for a message; empty if Ray was not started here."""
        if self.folder is None:
            return ""
        pattern = "session_*/logs/worker-*.err" if process is None else f"session_*/logs/worker-*-{process}.err"
        files = sorted(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        lines = [line for path in files for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return "\nlast lines of the engine's log:\n  " + "\n  ".join(lines[-_LOG_LINES:]) if lines else ""


def _of_folder(folder: Path) -> list[psutil.Process]:
    """Children of this process that were started with this folder in their arguments, and their descendants."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(str(folder) in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def visible_devices(gpu_ids: Sequence[int]) -> str:
    """CUDA_VISIBLE_DEVICES for a process that may see `gpu_ids`, numbered as torch does among the GPUs that this process sees.

    If a scheduler gave this process GPUs 4 to 7 of the machine, number 2 is GPU 6. Raises UserError for a GPU that it does not see.
    """
    if not gpu_ids:
        return ""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(gpu) for gpu in range(torch.cuda.device_count())] if given is None else [name.strip() for name in given.split(",") if name]
    if not all(name.isdecimal() for name in names):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={given} does not name GPUs by number, so rollout.engine.gpu_ids={list(gpu_ids)} cannot count them; "
            "set it to their numbers in `nvidia-smi -L`"
        )
    beyond = [gpu for gpu in gpu_ids if gpu >= len(names)]
    if beyond:
        raise UserError(
            f"rollout.engine.gpu_ids={list(gpu_ids)} counts among the {len(names)} GPUs that this process sees "
            f"(CUDA_VISIBLE_DEVICES={'unset' if given is None else given}), so {beyond} are none of them; use numbers below {len(names)}"
        )
    return ",".join(names[gpu] for gpu in gpu_ids)


def _new_folder() -> Path:
    """A new folder for Ray's sockets and logs; folders of killed runs are removed."""
    temporary = Path(tempfile.gettempdir())
    remove_abandoned(temporary, _RAY_PREFIX)
    folder = Path(tempfile.mkdtemp(prefix=_RAY_PREFIX))
    length, room = len(os.fsencode(folder)), _SOCKET_PATH_BYTES - _RAY_SOCKET_BYTES
    if length > room:
        folder.rmdir()
        raise EngineError(f"{folder} is too long a path for Ray's sockets ({length} bytes, at most {room}); set TMPDIR to a shorter one")
    return folder


@functools.cache
def _token() -> str:
    """One token for all pools of this process: Ray reads it once and keeps it."""
    return secrets.token_hex(16)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Inside, these variables have these values, or (None) do not exist; afterwards they are as before."""
    before = {name: os.environ.pop(name, None) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
