"""Who may import whom, and which file is the door of each heavy dependency. Imports inside functions count too.

The tables are the architecture in dictionary form; the last tests plant violations to show that the check sees them.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT = {
    "types": set(),
    "untrusted": set(),
    "settings": {"types"},
    "algorithms.outcomes": set(),
    "algorithms.advantages": {"types"},
    "algorithms.losses": {"types"},
    "settings of every room": {"types", "algorithms.outcomes", "algorithms.advantages", "algorithms.losses"},
    "supervision": {"types", "untrusted", "checkpoint_conversion"},
    "kernels": {"types"},
    "packing": {"types"},
    "chat": {"types", "untrusted", "tools"},
    "config": {"types", "algorithms.advantages", "algorithms.losses"},
    "data": {"types", "untrusted", "supervision", "algorithms.outcomes"},
    "search": {"types", "untrusted", "supervision", "data"},
    "tools": {"types", "untrusted", "data", "search", "config"},
    "weights": {"types", "supervision"},
    "engines": {"types", "supervision", "config", "chat", "weights"},
    "agent": {"types", "untrusted", "supervision", "chat", "tools", "engines"},
    "algorithms": {"types", "untrusted", "config", "chat"},
    "observability": {"types", "untrusted", "supervision", "config", "data"},
    "policy": {"types", "supervision", "config", "packing", "algorithms", "kernels", "checkpoint_conversion"},
    "plan": {"types", "config", "checkpoint_conversion", "packing", "observability", "policy"},
    "training": {
        *("types", "untrusted", "supervision", "config", "data", "chat", "search", "tools", "engines", "agent", "algorithms"),
        *("observability", "packing", "policy", "checkpoint_conversion"),
    },
    "doctor": {
        *("types", "untrusted", "supervision", "config", "data", "chat", "search", "tools", "engines", "agent", "algorithms"),
        *("packing", "policy", "checkpoint_conversion"),
    },
    "launch": {"types", "untrusted", "supervision", "config", "engines", "policy", "training"},
    "serve": {"types", "untrusted", "supervision", "config", "data", "search", "tools"},
    "commands": {
        "types",
        "supervision",
        "config",
        "data",
        "chat",
        "search",
        "tools",
        "agent",
        "observability",
        "policy",
        "plan",
        "doctor",
        "serve",
        "training",
        "checkpoint_conversion",
    },
    "cli": {
        *("types", "supervision", "config", "algorithms", "observability", "policy", "training", "launch"),
        *("commands", "checkpoint_conversion"),
    },
    "__main__": {"cli"},
    "__init__": set(),
}
"""Room of igpo_megatron (a folder, or a module at its top) -> rooms it may import, `checkpoint_conversion` among them.

The `settings.py` of all rooms are the ground floor, a room of their own: they import each other and `types`, and every room may import
them. So `config` assembles them, and every room may take a `Config`, without a cycle. What they are made of lies below them: parts of
`algorithms` in which settings stand beside the functions that read them. Such a part has a row of its own; who may import its room may
import it, too. The `commands.py` of all rooms are the top floor, below `cli` alone: no room knows that there is a command line.
"""

SETTINGS = {"settings of every room", *MAY_IMPORT["settings of every room"]} - {"types"}
"""Where the sections of rooms are."""

MOST_TOP_MODULES = 5

TOOLS_MAY_IMPORT = {
    *(
        "types",
        "untrusted",
        "settings",
        "config",
        "data",
        "search",
        "tools",
        "chat",
        "agent",
        "engines",
        "observability",
        "plan",
        "serve",
        "supervision",
    ),
}
"""Scripts in tools/; those in tools/bench and tools/gpu may import anything. chat, agent, engines and observability are there for the
demonstrations that warm-start the demo policy, plan for the scaling study and the examples by size, supervision for the soak trials."""

ENGINES = ("igpo_megatron/engines/", "igpo_megatron/weights/")
DOORS = {
    "megatron": ("igpo_megatron/policy/", "tools/bench/"),
    "vllm": (*ENGINES, "tools/bench/"),
    "ray": (*ENGINES, "tools/bench/"),
    "triton": ("igpo_megatron/kernels/", "tools/bench/", "tools/gpu/"),
    "torch": (
        *ENGINES,
        "igpo_megatron/policy/",
        "igpo_megatron/kernels/",
        "igpo_megatron/packing/",
        "igpo_megatron/algorithms/losses/",
        "igpo_megatron/training/",
        "igpo_megatron/doctor/",
        "igpo_megatron/plan/",
        "igpo_megatron/launch/",
        "igpo_megatron/cli.py",
        "checkpoint_conversion/",
        "tools/",
    ),
}
"""Heavy dependency -> the folders (or files) that may import it."""


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


def room(module: str) -> str:
    """Room of a dotted name such as igpo_megatron.search.http or igpo_megatron.search.http.HttpClient."""
    _, first, *rest = module.split(".")
    if rest[:1] == ["commands"]:
        return "commands"
    if rest[:1] == ["settings"] or rest[1:2] == ["settings"]:
        return "settings of every room"
    part = ".".join([first, *rest[:1]])
    return part if part in MAY_IMPORT else first


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Sets of nodes that reach each other, sorted."""

    def reach(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            new = set(graph.get(ahead.pop(), ())) - found
            found |= new
            ahead += new
        return found

    reached = {node: reach(node) for node in graph}
    together = {frozenset(other for other in reached[node] if node in reached.get(other, ())) for node in graph if node in reached[node]}
    return sorted(sorted(circle) for circle in together)


def file_graph(root: Path, top: str) -> dict[str, set[str]]:
    """Module -> modules it imports, wherever in the file; packages are their `__init__`."""
    paths = {
        path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for path in (root / top).rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = [name for _, name in imported_modules(path)]
        targets = {name if name in paths else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & paths.keys()) - {module}
    return graph


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
    part = room(name.removesuffix(".py").replace("/", "."))
    if part not in MAY_IMPORT:
        return f"belongs to igpo_megatron.{part}, which has no row in the table of layers"
    target = room(module) if package == "igpo_megatron" and rest else package
    known = package == "igpo_megatron" or package == "checkpoint_conversion"
    allowed = MAY_IMPORT[part] | {part, "igpo_megatron", "settings", "settings of every room"}
    if known and not {target, target.split(".")[0]} & allowed:
        return f"imports {target}; {part} may import {', '.join(sorted(MAY_IMPORT[part])) or 'nothing of ours'}"
    return None


def test_every_import_goes_down_and_through_its_door():
    assert violations(ROOT) == []


@pytest.mark.parametrize("top", ["igpo_megatron", "checkpoint_conversion"])
def test_no_files_import_each_other_in_a_circle(top):
    assert circles(file_graph(ROOT, top)) == []


def test_no_rooms_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for module, targets in file_graph(ROOT, "igpo_megatron").items():
        if module != "igpo_megatron":
            graph.setdefault(room(module), set()).update(room(target) for target in targets if target != "igpo_megatron")
    assert circles({name: targets - {name} for name, targets in graph.items()}) == []


def test_circles_are_found(tmp_path):
    for name, text in {
        "p/a.py": "from p.b import x",
        "p/b.py": "def f():\n    from p.c import y",
        "p/c.py": "import p.a",
        "p/d.py": "import p.a",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert circles(file_graph(tmp_path, "p")) == [["p.a", "p.b", "p.c"]]


def test_the_top_of_the_package_stays_small():
    top = {path.name for path in (ROOT / "igpo_megatron").glob("*.py")} - {"__init__.py"}
    assert len(top) <= MOST_TOP_MODULES, sorted(top)


def test_every_room_says_what_it_holds_in_ten_lines():
    for init in sorted((ROOT / "igpo_megatron").rglob("__init__.py")):
        tree = ast.parse(init.read_text(encoding="utf-8"))
        said = ast.get_docstring(tree) or ""
        assert said and len(said.splitlines()) <= 10, init
        assert len(tree.body) == 1 or init.parent.name == "igpo_megatron", f"{init} holds more than a docstring"


def asked_classes(path: Path, own: str) -> Iterator[str]:
    """Settings of rooms other than `own` whose class a file asks for: by isinstance, issubclass or a pattern of `match`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    foreign = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("igpo_megatron.")
        if room(str(node.module)) in SETTINGS and str(node.module).split(".")[1] != own
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked: list[ast.AST] = [node.args[1]]
        else:
            asked = [node.cls] if isinstance(node, ast.MatchClass) else []
        names = {part.id for top in asked for part in ast.walk(top) if isinstance(part, ast.Name)}
        yield from (f"{path.name}:{getattr(node, 'lineno', 0)} {name}" for name in sorted(names & foreign))


def test_only_a_room_itself_asks_of_which_class_its_settings_are():
    """Others ask the section for a property, so that a new algorithm, or a user's own, needs no change of theirs."""
    files = {path: path.relative_to(ROOT / "igpo_megatron").parts[0] for path in (ROOT / "igpo_megatron").rglob("*.py")}
    assert [found for path, own in files.items() for found in asked_classes(path, own)] == []


def test_a_question_for_a_foreign_class_is_found(tmp_path):
    path = tmp_path / "step.py"
    path.write_text(
        "from igpo_megatron.algorithms.losses.entropy import Aepo\nfrom igpo_megatron.settings import Section\n"
        "from igpo_megatron.algorithms.settings import Bapo, Ppo as P\n"
        "isinstance(loss, Section)\nisinstance(loss, Aepo | P)\nmatch loss:\n    case Bapo():\n        pass\n",
        encoding="utf-8",
    )
    assert list(asked_classes(path, "algorithms")) == []
    assert sorted(asked_classes(path, "training")) == ["step.py:5 Aepo", "step.py:5 P", "step.py:7 Bapo"]


LONGEST, P90 = 90, 21


def test_functions_stay_short():
    lengths = {}
    for path in (ROOT / "igpo_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{path.relative_to(ROOT)}:{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    longest = max(lengths, key=lengths.__getitem__)
    assert lengths[longest] < LONGEST, f"{longest} has {lengths[longest]} lines"
    assert sorted(lengths.values())[int(0.9 * len(lengths))] <= P90


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("igpo_megatron/agent/trajectory.py", "from igpo_megatron.algorithms.rewards import f1", "imports algorithms"),
        ("igpo_megatron/algorithms/losses/clipped.py", "def f():\n    from igpo_megatron import policy", "imports policy"),
        ("igpo_megatron/agent/trajectory.py", "from igpo_megatron.algorithms.losses.base import PolicyLoss", "imports algorithms.losses"),
        ("igpo_megatron/config/load.py", "from igpo_megatron.algorithms.rewards import score", "imports algorithms"),
        ("igpo_megatron/algorithms/outcomes.py", "from igpo_megatron.algorithms import rewards", "imports algorithms"),
        ("igpo_megatron/algorithms/losses/base.py", "from igpo_megatron.config.schema import Config", "imports config"),
        ("igpo_megatron/algorithms/settings.py", "from igpo_megatron.algorithms.replay import SuccessBuffer", "imports algorithms"),
        ("igpo_megatron/policy/policy.py", "import igpo_megatron.engines.pool", "imports engines"),
        ("igpo_megatron/config/load.py", "from ..types import Prompt", "relative import"),
        ("igpo_megatron/chat/format.py", "import vllm", "imports vllm"),
        ("igpo_megatron/chat/format.py", "import importlib\nimportlib.import_module('ray')", "imports ray"),
        ("igpo_megatron/training/main.py", "from megatron.core import parallel_state", "imports megatron"),
        ("igpo_megatron/policy/model.py", "import triton.language as tl", "imports triton"),
        ("igpo_megatron/algorithms/rewards.py", "import torch", "imports torch"),
        ("igpo_megatron/search/client.py", "import torch.nn", "imports torch"),
        ("igpo_megatron/chat/format.py", "from checkpoint_conversion import rules", "imports checkpoint_conversion"),
        ("igpo_megatron/data/prompts.py", "import prepare_data", "never import tools"),
        ("igpo_megatron/helpers.py", "import json", "no row in the table"),
        ("checkpoint_conversion/rules.py", "from igpo_megatron.types import Prompt", "stands alone"),
        ("checkpoint_conversion/rules.py", "import megatron.core", "imports megatron"),
        ("igpo_megatron/data/prompts.py", "import igpo_megatron.data.commands", "imports commands"),
        ("igpo_megatron/search/client.py", "from igpo_megatron.serve import http", "imports serve"),
        ("tools/serve_retriever.py", "from igpo_megatron.policy import policy", "tools may import"),
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
        "igpo_megatron/policy/model.py": "import torch\nfrom megatron.core import x\nfrom checkpoint_conversion.rules import Copy\n",
        "igpo_megatron/engines/pool.py": "import ray\nimport vllm\nimport torch\nfrom igpo_megatron.types import Completion\n",
        "igpo_megatron/cli.py": "import igpo_megatron\nfrom igpo_megatron.training import main\n",
        "checkpoint_conversion/hf_folder.py": "import torch\nfrom checkpoint_conversion import rules\n",
        "tools/bench/run.py": "import vllm\nfrom igpo_megatron.policy import policy\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    "packages", ["types untrusted settings", "chat.protocols", "config", "data", "search", "tools", "serve", "doctor.machine"]
)
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
