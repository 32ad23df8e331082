"""What a node of a job is, and the addresses and ports of this one."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import psutil

from igpo_megatron.types import UserError

Role = Literal["train", "rollout", "both"]
HEAD_PORT = 29400


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of a job, as its command line describes it."""

    rank: int
    """Place among the nodes; node 0 holds the meeting point and Ray's head."""

    nodes: int
    """How many nodes this one expects."""

    role: Role
    """`train`: ranks only; `rollout`: engines only; `both`."""

    ranks: int
    """Ranks on this node; 0 on a rollout node."""

    host: str
    """Name of this machine, for messages."""

    address: str
    """IP address by which the other nodes reach this one."""

    head: str
    """IP address of node 0."""

    port: int
    """TCP port of the meeting point on node 0. Ray's head takes the next one, torchrun's store the one after."""

    @property
    def is_head(self) -> bool:
        """This is node 0."""
        return self.rank == 0

    @property
    def ray_port(self) -> int:
        return self.port + 1

    @property
    def rendezvous_port(self) -> int:
        return self.port + 2

    @property
    def name(self) -> str:
        return named(self.rank, self.host, self.address)


def named(rank: int, host: str, address: str) -> str:
    """A node's name in messages."""
    return f"node {rank} ({host}, {address})"


def place(*, rank: int | None, nodes: int, head: str | None, role: str, ranks: int | None, world: int, address: str | None = None) -> Node:
    """This machine's node from its command line; `world` are the ranks that the configuration asks for.

    Raises UserError that says what was given and what is needed.
    """
    if role not in get_args(Role):
        raise UserError(f"--role {role}: expected one of {', '.join(get_args(Role))}")
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: a job has at least one node")
    if rank is None:
        if nodes > 1:
            raise UserError(f"--nodes {nodes} needs --node-rank 0 to {nodes - 1} (or NODE_RANK, or SLURM_NODEID)")
        rank = 0
    if not 0 <= rank < nodes:
        raise UserError(f"--node-rank {rank} is not one of 0 to {nodes - 1}, the ranks of --nodes {nodes}")
    if rank == 0 and role == "rollout":
        raise UserError("--role rollout on node 0, which must train: give the rollout nodes the higher node ranks")
    if role == "rollout":
        ranks = 0
    elif ranks is None:
        ranks, left = divmod(world, nodes)
        if left or not ranks:
            raise UserError(f"the layout has {world} ranks, which {nodes} nodes cannot share evenly; say on each node --ranks N")
    host = socket.gethostname()
    if nodes == 1:  # no other node has to reach it
        return Node(rank, nodes, cast(Role, role), ranks, host, "127.0.0.1", "127.0.0.1", HEAD_PORT)
    if head is None:
        raise UserError(f"--nodes {nodes} needs --head HOST[:PORT], the address of node 0 (or MASTER_ADDR)")
    name, _, port = head.partition(":")
    if port and not port.isdigit():
        raise UserError(f"--head {head}: expected HOST or HOST:PORT")
    number = int(port or HEAD_PORT)
    try:
        found = socket.gethostbyname(name)
    except OSError:
        raise UserError(f"--head {head}: this node cannot resolve the name {name}") from None
    own = address or (found if rank == 0 else _address_towards(found, number))
    if interface_of(own) is None:
        what = f"--head {head} is {found}, which is" if rank == 0 and not address else f"--address {own} is"
        raise UserError(f"{what} no address of this machine; it has {', '.join(addresses())}")
    return Node(rank, nodes, cast(Role, role), ranks, host, own, found, number)


def _address_towards(host: str, port: int) -> str:
    """The address this machine would send from; nothing is sent. Raises UserError where there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))
        except OSError as error:
            raise UserError(f"this node has no route to node 0 at {host}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def addresses() -> list[str]:
    """IPv4 addresses of this machine."""
    return [row.address for rows in psutil.net_if_addrs().values() for row in rows if row.family == socket.AF_INET]


def interface_of(address: str) -> str | None:
    """Network interface that has an address; None where no interface has it."""
    for name, rows in psutil.net_if_addrs().items():
        if any(row.address == address for row in rows):
            return name
    return None


def busy_ports(address: str, ports: Iterable[int]) -> list[int]:
    """The ports that are already taken."""
    busy = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                busy.append(port)
    return busy


def reachable(address: str, port: int, timeout_s: float) -> bool:
    """Whether a server accepts connections there."""
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError:
        return False
    return True
