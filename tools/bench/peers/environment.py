"""A virtual environment for a peer, so that what it needs cannot change ours: .venv-peers/NAME from tools/bench/peers/NAME.lock.

Made as `make venv` makes .venv, with the machine's own pip configuration; tools/install.py does the work. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]


def python_of(peer: str) -> Path:
    """The interpreter of the peer's environment, which is made or completed first. Raises InstallError, whose message says what failed."""
    install = _installer()
    lock, folder = Path(__file__).with_name(f"{peer}.lock"), ROOT / ".venv-peers" / peer
    state = f"{hashlib.sha256(lock.read_bytes()).hexdigest()} {folder}\n"
    stamp = folder / install.STAMP
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != state:
        folder.parent.mkdir(exist_ok=True)
        uv = install.bring_uv(install.make_venv(folder), install.LOCK)
        install.install_cpu(uv, lock, torch_cpu_index())
        stamp.write_text(state, encoding="utf-8")
    return folder / "bin" / "python"


def torch_cpu_index() -> str:
    """Where torch's CPU build is where no configured index has it: as `make venv` takes it."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    default = next(line.partition("?=")[2] for line in makefile.splitlines() if line.startswith("TORCH_CPU_INDEX"))
    return os.environ.get("TORCH_CPU_INDEX", default.strip())


def _installer() -> ModuleType:
    """tools/install.py, a script whose folder nobody has on the path who starts a peer."""
    sys.path.append(str(ROOT / "tools"))
    return importlib.import_module("install")
