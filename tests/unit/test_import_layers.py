"""Who may import whom, and which file is the door of each heavy dependency. Imports inside functions count too.

The tables are the architecture in dictionary form; the last tests plant violations to show that the check sees them.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BELOW = {
    "types",
    "untrusted",
    "blotting",
    "failures",
    "normalisation",
    "leftovers",
    "waits",
    "protocols",
    "config",
    "data",
    "search",
    "packing",
    "kernels",
    "algorithms",
    "observability",
    "rollout",
    "actor",
}
TOP = {
    "__main__",
    "cli",
    "endings",
    "doctor",
    "chat_check",
    "probe_check",
    "tool_check",
    "train",
    "launch",
    "rollout_queue",
    "device_share",
    "learn",
    "summary",
    "evaluate",
    "plan",
    "report",
    "run",
    "verify",
}
MAY_IMPORT = {
    "__init__": set(),
    "untrusted": set(),
    "blotting": set(),
    "failures": {"blotting", "untrusted"},
    "normalisation": set(),
    "types": set(),
    "leftovers": set(),
    "waits": {"types"},
    "protocols": {"types", "untrusted"},
    "config": {"types", "untrusted"},
    "data": {"types", "untrusted", "normalisation", "config"},
    "search": {"types", "untrusted", "blotting", "config", "data"},
    "observability": {"types", "untrusted", "config"},
    "kernels": {"types"},
    "packing": {"types"},
    "algorithms": {"types", "untrusted", "normalisation", "protocols", "config"},
    "rollout": {"types", "untrusted", "failures", "leftovers", "waits", "protocols", "config", "search"},
    "actor": {"types", "waits", "config", "packing", "kernels", "checkpoint_conversion"},
    **{module: BELOW | TOP | {"checkpoint_conversion"} for module in TOP},
}
"""Part of igpo_megatron -> parts it may import, `checkpoint_conversion` among them."""

TOOLS_MAY_IMPORT = {"types", "untrusted", "config", "data", "search", "rollout", "observability", "plan", "leftovers", "endings"}
"""tools/bench and tools/gpu may import anything. rollout and observability are there for the demonstrations that warm-start the demo
policy, plan for the scaling study and the examples by size, leftovers for the soak trials."""

ENGINE_FILES = tuple(
    f"igpo_megatron/rollout/{name}.py"
    for name in (
        "engines",
        "engine_actor",
        "fleet",
        "ray_cluster",
        "transports",
        "cuda_transports",
        "weight_send",
        "weight_store",
        "weight_transfer",
    )
)
TORCH_ENGINE_FILES = tuple(
    f"igpo_megatron/rollout/{name}.py" for name in ("sampling", "slot_cache", "torch_engine", "torch_model", "torch_weights")
)
DOORS = {
    "megatron": ("igpo_megatron/actor/", "tools/bench/"),
    "vllm": (*ENGINE_FILES, "tools/bench/"),
    "ray": (*ENGINE_FILES, "tools/bench/"),
    "triton": ("igpo_megatron/kernels/", "tools/bench/", "tools/gpu/"),
    "torch": (
        "igpo_megatron/actor/",
        "igpo_megatron/kernels/",
        "igpo_megatron/packing/",
        "igpo_megatron/algorithms/losses.py",
        *ENGINE_FILES,
        *TORCH_ENGINE_FILES,
        *(f"igpo_megatron/{module}.py" for module in sorted(TOP)),
        "igpo_megatron/plan/calibrate.py",
        "igpo_megatron/launch/",
        "checkpoint_conversion/",
        "tools/",
    ),
}
"""Heavy dependency -> the files (or folders, with a slash at the end) that may import it."""


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from a import b` counts as a.b, a relative import begins with a dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                yield node.lineno, node.args[0].value


def violations(root: Path) -> list[str]:
    """Every import below `root` that the tables do not allow."""
    tool_names = {"tools", "tests", "examples", *(path.stem for path in (root / "tools").glob("*.py"))}
    found = []
    for top in ("igpo_megatron", "checkpoint_conversion", "tools"):
        for path in sorted((root / top).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for line, module in imported_modules(path):
                problem = _problem(name, module, tool_names)
                if problem:
                    found.append(f"{name}:{line} {problem}")
    return found


def _problem(name: str, module: str, tool_names: set[str]) -> str | None:
    """Why file `name` may not import `module`; None if it may."""
    if module.startswith("."):
        return f"uses the relative import {module}"
    package, *rest = module.split(".")
    if package in DOORS and not any(name == door or (door.endswith("/") and name.startswith(door)) for door in DOORS[package]):
        return f"imports {package}, whose doors are {', '.join(DOORS[package])}"
    top = name.split("/")[0]
    if top == "tools":
        allowed = TOOLS_MAY_IMPORT
        if package == "igpo_megatron" and rest and rest[0] not in allowed and not name.startswith(("tools/bench/", "tools/gpu/")):
            return f"imports igpo_megatron.{rest[0]}; tools may import {', '.join(sorted(allowed))}"
        return None
    if package in tool_names:
        return f"imports {package}; packages never import tools, tests or examples"
    if top == "checkpoint_conversion":
        return "imports igpo_megatron; checkpoint_conversion stands alone" if package == "igpo_megatron" else None
    part = name.split("/")[1].removesuffix(".py")
    if part not in MAY_IMPORT:
        return f"belongs to igpo_megatron.{part}, which has no row in the table of layers"
    target = rest[0] if package == "igpo_megatron" and rest else package
    known = package == "igpo_megatron" or package == "checkpoint_conversion"
    if known and target not in MAY_IMPORT[part] | {part, "igpo_megatron"}:
        return f"imports {target}; {part} may import {', '.join(sorted(MAY_IMPORT[part])) or 'nothing of ours'}"
    return None


def test_every_import_goes_down_and_through_its_door():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("igpo_megatron/rollout/agent.py", "from igpo_megatron.algorithms.rewards import f1", "imports algorithms"),
        ("igpo_megatron/algorithms/losses.py", "def f():\n    from igpo_megatron import actor", "imports actor"),
        ("igpo_megatron/actor/policy.py", "import igpo_megatron.rollout.engines", "imports rollout"),
        ("igpo_megatron/config/load.py", "from ..types import Prompt", "relative import"),
        ("igpo_megatron/rollout/chat.py", "import vllm", "imports vllm"),
        ("igpo_megatron/rollout/chat.py", "import importlib\nimportlib.import_module('ray')", "imports ray"),
        ("igpo_megatron/train.py", "from megatron.core import parallel_state", "imports megatron"),
        ("igpo_megatron/actor/model.py", "import triton.language as tl", "imports triton"),
        ("igpo_megatron/algorithms/rewards.py", "import torch", "imports torch"),
        ("igpo_megatron/search/client.py", "import torch.nn", "imports torch"),
        ("igpo_megatron/rollout/chat.py", "from checkpoint_conversion import rules", "imports checkpoint_conversion"),
        ("igpo_megatron/data/prompts.py", "import prepare_data", "never import tools"),
        ("igpo_megatron/helpers.py", "import json", "no row in the table"),
        ("checkpoint_conversion/rules.py", "from igpo_megatron.types import Prompt", "stands alone"),
        ("checkpoint_conversion/rules.py", "import megatron.core", "imports megatron"),
        ("tools/serve_retriever.py", "from igpo_megatron.actor import policy", "tools may import"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, source, expected):
    for name, text in ((path, source), ("tools/prepare_data.py", "import json\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (problem,) = violations(tmp_path)
    assert problem.startswith(path) and expected in problem


def test_allowed_imports_pass(tmp_path):
    for name, text in {
        "igpo_megatron/actor/model.py": "import torch\nfrom megatron.core import x\nfrom checkpoint_conversion.rules import Copy\n",
        "igpo_megatron/rollout/engines.py": "import ray\nimport vllm\nimport torch\nfrom igpo_megatron.types import Completion\n",
        "igpo_megatron/cli.py": "import igpo_megatron\nfrom igpo_megatron import train\n",
        "checkpoint_conversion/hf_folder.py": "import torch\nfrom checkpoint_conversion import rules\n",
        "tools/bench/run.py": "import vllm\nfrom igpo_megatron.actor import policy\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert violations(tmp_path) == []


@pytest.mark.parametrize("packages", ["types untrusted normalisation", "protocols", "config", "data", "search", "config doctor"])
def test_light_packages_load_nothing_heavy(packages):
    script = """
import importlib, pkgutil, sys
import igpo_megatron
for name in sys.argv[1].split():
    module = importlib.import_module(f"igpo_megatron.{name}")
    for inner in pkgutil.iter_modules(getattr(module, "__path__", [])):
        importlib.import_module(f"igpo_megatron.{name}.{inner.name}")
heavy = {"torch", "ray", "vllm", "megatron", "triton", "transformers"} & sys.modules.keys()
sys.exit(f"loaded {sorted(heavy)}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", script, packages], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
