"""The files that the version before has left (tests/fixtures/previous), where a test may change them."""

from __future__ import annotations

import tarfile
from pathlib import Path

PREVIOUS = Path(__file__).resolve().parents[1] / "fixtures/previous"


def unpack_stopped_run(folder: Path) -> Path:
    """The folder in which `igpo train config.yaml` was stopped behind its second checkpoint, as it was then, below `folder`."""
    with tarfile.open(PREVIOUS / "stopped.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder
