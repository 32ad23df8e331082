"""Nothing of ours warns when it is imported or compiled; what libraries warn of counts where no heavy one is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

IMPORT = """
import importlib, pkgutil, sys, warnings

def modules(names):
    for name in names:
        module = importlib.import_module(name)
        yield from (inner.name for inner in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."))

def keep(message, category, filename, line, *rest):
    if filename.startswith(tuple(ours.split(":"))):
        found.append(f"{filename}:{line} {category.__name__}: {message}")

found, ours = [], sys.argv[1]
if ours:  # those of other files are let through
    warnings.simplefilter("always")
    warnings.showwarning = keep
for name in modules(sys.argv[2:]):
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(sys.modules))
sys.exit(chr(10).join(found) or 0)
"""

LIGHT = ("chat", "config", "data", "search", "tools", "agent", "supervision", "observability", "serve", "cli")


def imported(*arguments: str, ours: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments[:-1], "-c", IMPORT, ours, *arguments[-1].split()]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=ROOT)


def test_light_rooms_are_imported_with_every_warning_an_error() -> None:
    result = imported("-W", "error", " ".join(f"igpo_megatron.{room}" for room in LIGHT), ours="")
    assert result.returncode == 0, result.stderr


def test_no_module_of_ours_warns_when_everything_is_imported() -> None:
    result = imported("igpo_megatron checkpoint_conversion", ours=f"{ROOT}/igpo_megatron/:{ROOT}/checkpoint_conversion/")
    assert result.returncode == 0 and int(result.stdout.splitlines()[-1]) > 1000, result.stderr


@pytest.mark.parametrize("top", ["igpo_megatron", "checkpoint_conversion", "tools", "tests"])
def test_no_file_of_ours_warns_when_it_is_compiled(top: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (ROOT / top).rglob("*.py"):
            compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_a_planted_warning_is_found(tmp_path: Path) -> None:
    package = tmp_path / "igpo_planted"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "old.py").write_text("import warnings\nwarnings.warn('old', DeprecationWarning)\n")
    command = [sys.executable, "-c", IMPORT, str(package), "igpo_planted"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert result.returncode == 1 and "old.py:2 DeprecationWarning: old" in result.stderr
