"""One node's part of a job: meet, start Ray and the ranks, watch them, stop what was started, and report the same end as every node."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from igpo_megatron.config.schema import Config
from igpo_megatron.engines.ray_cluster import visible_devices
from igpo_megatron.launch.agent import RANK_MODULE
from igpo_megatron.launch.board import Board, PreflightFailed
from igpo_megatron.launch.messages import Verdict
from igpo_megatron.launch.node import Node, interface_of, reachable
from igpo_megatron.launch.preflight import Facts, busy_port, disagreements, facts_of, ray_token
from igpo_megatron.launch.processes import Child
from igpo_megatron.policy.parallel import on_this_machine, wants_cuda
from igpo_megatron.supervision.leftovers import claimed, remove_abandoned
from igpo_megatron.training.checks import check, unusable_questions
from igpo_megatron.types import UserError

_TEMPORARY_PREFIX = "igpo-node-"
_POLL_S = 0.3
_PATIENCE_S = 10.0
_RAY_IS_UP = "Ray runtime started"
_RAY_SERVERS = ("gcs_server", "raylet")


@dataclass(frozen=True, slots=True)
class Options:
    """How a job is supervised; the same on every node. Raises UserError for an unknown rendezvous, or one that cannot restart."""

    rendezvous: str
    max_restarts: int
    deadline_s: float
    lost_after_s: float

    def __post_init__(self) -> None:
        if self.rendezvous not in ("c10d", "static"):
            raise UserError(f"--rendezvous {self.rendezvous}: expected c10d or static")
        if self.rendezvous == "static" and self.max_restarts:
            raise UserError(f"--max-restarts {self.max_restarts} needs --rendezvous c10d: ranks that meet statically can do so once")


def run_node(node: Node, config: Config, arguments: list[str], options: Options) -> int:
    """Run one node's part of the job. Exit code: 0 finished, 2 a user's mistake, otherwise that of the cause."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with_ray = config.run.replay is None

    def judge(facts: list[Facts]) -> list[str]:
        problems = disagreements(facts)
        if not problems and len(facts) == node.nodes:
            world = sum(one.ranks for one in facts)
            problems = check(on_this_machine(config), world_size=world, local_world_size=node.ranks)
            problems = problems or unusable_questions(config, world_size=world)
        return problems

    try:
        board = Board(node, ray_token(), lost_after_s=options.lost_after_s)
        facts = board.meet(facts_of(node, config, asdict(options), with_ray=with_ray), options.deadline_s, judge)
    except PreflightFailed as problem:
        sys.stderr.write(f"error: {problem}\n")
        return 2
    verdict = _Job(node, config, arguments, options, board, facts).run()
    if verdict.code == 0:
        sys.stderr.write(f"{node.name}: finished\n")
    elif verdict.code == 2:
        sys.stderr.write(f"error: {verdict.sentence}\n")
    else:
        sys.stderr.write(f"stopped: {verdict.sentence}; the same command on every node resumes from the last checkpoint\n")
    sys.stderr.flush()
    return verdict.code


class _Job:
    """The processes of one node, started in this order and stopped in reverse."""

    def __init__(self, node: Node, config: Config, arguments: list[str], options: Options, board: Board, facts: list[Facts]) -> None:
        self.node, self.config, self.arguments, self.options, self.board = node, config, arguments, options, board
        self.trainers = sorted(one.rank for one in facts if one.ranks)
        self.ray: Child | None = None
        self.agent: Child | None = None
        self.store: object = None
        """torchrun's store, while it is open."""

        self.signal: int | None = None

    def run(self) -> Verdict:
        """Start everything, wait for the verdict, stop everything; returns the verdict."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note_signal)
        with ExitStack() as stack:
            remove_abandoned(Path(tempfile.gettempdir()), _TEMPORARY_PREFIX)
            folder, descriptor = claimed(lambda: Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX)))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.callback(os.close, descriptor)
            stack.callback(self._stop)
            self._start(folder)
            while (verdict := self.board.verdict) is None:
                self._watch(folder)
                time.sleep(_POLL_S)
            if verdict.code not in (0, 2) and self.agent:
                # Ranks then record what they are waiting for (waits.py), to explain a hang.
                self.agent.signal_descendants(signal.SIGUSR1, RANK_MODULE)
                time.sleep(_POLL_S)
        self.board.leave()
        return verdict

    def _note_signal(self, number: int, frame: Any) -> None:
        self.signal = number

    def _start(self, folder: Path) -> None:
        """Ray, then the ranks; returns early when there is a verdict."""
        if self.config.run.replay is None:
            if not self.node.is_head and not self._until(lambda: self.board.has("ray"), "node 0 has not started Ray", folder):
                return
            if not self.node.is_head and not reachable(self.node.head, self.node.ray_port, 10.0):
                self.board.report("ray", f"{self.node.name} cannot reach Ray's head at {self.node.head}:{self.node.ray_port}", 1)
                return
            token = ray_token()
            assert token is not None, "preflight has seen a token"
            environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
            # Otherwise Ray's own limit of 30 s for a node to register would apply.
            environment["RAY_raylet_start_wait_time_s"] = str(round(self.options.deadline_s))
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
            try:
                devices = self._ray_devices()
            except UserError as mistake:
                self.board.report("error", f"{mistake} ({self.node.name})", 2)
                return
            self.ray = Child(ray_command(self.node, self.config, folder), {**environment, **devices}, folder / "ray.log")
            if not self._until(lambda: self.ray is not None and self.ray.says(_RAY_IS_UP), "Ray did not start", folder):
                return
            if self.node.is_head:
                self.board.post("ray")
        if self.node.ranks and self.board.verdict is None:
            if self.node.is_head and self.options.rendezvous == "c10d":
                try:
                    self.store = open_store(self.node)
                except OSError:
                    self.board.report("error", busy_port(self.node.rendezvous_port, self.node.name), 1)
                    return
            ray_override = [f"rollout.engine.ray_address={self.node.head}:{self.node.ray_port}"] if self.ray else []
            spec = {
                "launch": launch_arguments(self.node, self.trainers, self.options),
                "arguments": [*self.arguments, *ray_override],
                "outcome": str(folder / "outcome.json"),
            }
            interface = interface_of(self.node.address) or ""
            environment = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
            self.agent = Child([sys.executable, "-m", "igpo_megatron.launch.agent", json.dumps(spec)], environment)

    def _until(self, happened: Callable[[], bool], problem: str, folder: Path) -> bool:
        """Wait for a step of the start; False if there is a verdict first, which a passed deadline causes."""
        deadline = time.monotonic() + self.options.deadline_s
        while not happened():
            if self.board.verdict is not None:
                return False
            if time.monotonic() > deadline:
                self.board.report("ray", f"{problem} within {self.options.deadline_s:g} s on {self.node.name}", 1)
            self._watch(folder)
            time.sleep(_POLL_S)
        return True

    def _watch(self, folder: Path) -> None:
        """Report a process that ended on this node."""
        if self.signal is not None:
            self.board.report("interrupted", f"{self.node.name} was interrupted by {signal.Signals(self.signal).name}", 128 + self.signal)
        # `ray start` waits for its raylet until its deadline, even for a dead one.
        if self.ray and (self.ray.poll() is not None or self.ray.ended(_RAY_SERVERS)):
            server = self.ray.ended(_RAY_SERVERS)
            which = f": its {server} died" if server else ""
            reason = "" if self.ray.says(_RAY_IS_UP) else f" before it was up; its log ends with:\n  {self.ray.last_lines()}\n"
            self.board.report("ray", f"Ray ended on {self.node.name}{which}{reason}", 1)
        code = self.agent.poll() if self.agent else None
        if code is None:
            return
        outcome = folder / "outcome.json"
        if not outcome.is_file():
            self.board.report("signal", f"torchrun's agent ended with code {code} on {self.node.name}", 1)
            return
        ended = json.loads(outcome.read_text(encoding="utf-8"))
        place = f" on {self.node.name}" if ended["kind"] in ("signal", "interrupted") else f" ({self.node.name})"
        self.board.report(ended["kind"], ended["sentence"] + place, ended["code"])

    def _stop(self) -> None:
        for child in (self.agent, self.ray):
            if child:
                child.stop(_PATIENCE_S)
        self.store = None

    def _ray_devices(self) -> dict[str, str]:
        gpus = engine_gpus(self.node, self.config) if wants_cuda(self.config.run.device) else None
        return {} if gpus is None else {"CUDA_VISIBLE_DEVICES": visible_devices(gpus)}


def open_store(node: Node) -> object:
    """torchrun's own store on node 0, in which its agents meet; it closes when nothing refers to it. Raises OSError if the port is taken.

    It requires no secret, and its readers unpickle its contents. So it is open only while ranks run, on its own port, on the address by
    which the nodes reach node 0; otherwise a firewall must protect it.
    """
    import torch.distributed as dist

    # Our own socket: by default torch listens on every interface.
    listener = socket.create_server((node.address, node.rendezvous_port), backlog=1024)
    place = node.address, node.rendezvous_port
    return dist.TCPStore(*place, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def engine_gpus(node: Node, config: Config) -> Sequence[int] | None:
    """The GPUs of a node that Ray may see; None for all of them."""
    if node.role == "rollout":
        return config.rollout.engine.gpu_ids or None
    if config.placement.mode == "colocated":
        return range(node.ranks)  # engines take turns with the ranks
    return () if node.role == "train" else config.rollout.engine.gpu_ids


def ray_command(node: Node, config: Config, folder: Path) -> list[str]:
    """`ray start` for this node. A training node joins without room for engines: rank 0 connects to Ray on its own node."""
    engine = config.rollout.engine
    room = 0 if node.role == "train" else engine.count + 1  # logical CPUs: an engine really uses its `threads`
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", node.address, "--num-cpus", str(room)]
    gpus = engine_gpus(node, config) if wants_cuda(config.run.device) else ()
    if gpus is not None:
        command += ["--num-gpus", str(len(gpus))]
    # By default every node puts its sockets in a folder named after the head's, so two nodes that share a disk would collide.
    command += ["--temp-dir", str(folder / "ray")]
    if node.is_head:
        return [*command, "--head", "--port", str(node.ray_port), "--include-dashboard", "false"]
    return [*command, "--address", f"{node.head}:{node.ray_port}"]


def launch_arguments(node: Node, trainers: list[int], options: Options) -> dict[str, Any]:
    """Arguments of torchrun's LaunchConfig for this node. c10d meets in the store of node 0's launcher, static in one of its agent's."""
    rendezvous: dict[str, Any]
    if options.rendezvous == "static":
        rendezvous = {"rank": trainers.index(node.rank), "timeout": options.deadline_s}
    else:
        rendezvous = {"is_host": "false", "join_timeout": int(options.deadline_s)}
    return {
        "min_nodes": len(trainers),
        "max_nodes": len(trainers),
        "nproc_per_node": node.ranks,
        "run_id": "igpo",
        "local_addr": node.address,
        "max_restarts": options.max_restarts,
        "monitor_interval": 0.2,
        "rdzv_backend": options.rendezvous,
        "rdzv_endpoint": f"{node.head}:{node.rendezvous_port}",
        "rdzv_configs": rendezvous,
    }
