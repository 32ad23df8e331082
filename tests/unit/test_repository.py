"""The repository speaks of the project alone: no paths of a machine, no hosts of a package registry."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The leading lookbehind lets addresses such as http://host/home/page pass.
MACHINE_PATH = re.compile(r"(?<![\w.\-/~$}])/(?:work|farm|root|tmp|home|opt|Users)/\w")
REGISTRY = re.compile(
    r"\b(?:[\w-]+\.)*(?:pypi|pythonhosted|pytorch|anaconda|npmjs)\.(?:org|com)\b|\b(?:mirrors?|artifactory|nexus|devpi)\.[\w-]+\.\w+"
)
TORCH_CPU_INDEX = "TORCH_CPU_INDEX ?= "


def tracked_or_new() -> list[Path]:
    """Files that git tracks or would track."""
    listing = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def foreign_words(text: str) -> Iterator[tuple[int, str]]:
    """(line number, line) of every line that names a machine's path or a package registry."""
    for number, line in enumerate(text.splitlines(), start=1):
        if MACHINE_PATH.search(line) or REGISTRY.search(line):
            yield number, line.strip()


def test_no_file_names_a_machine_path_or_a_package_registry():
    found = []
    for path in tracked_or_new():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in foreign_words(text):
            if not (path == ROOT / "Makefile" and line.startswith(TORCH_CPU_INDEX)) and path != Path(__file__).resolve():
                found.append(f"{path.relative_to(ROOT)}:{number} {line[:120]}")
    assert found == []


def test_the_check_sees_paths_and_registries_and_lets_the_rest_pass():
    bad = [
        "cd /root/x",
        "open('/tmp/file')",
        "--find-links=/opt/wheels",
        "https://pypi.org/simple",
        "see download.pytorch.org/whl",
        "mirror.corp.net",
    ]
    good = [
        "/dev/shm",
        "/etc/hosts",
        "runs/tmp/x",
        "http://127.0.0.1:8000/retrieve",
        "https://example.org/home/page",
        "$HOME/tmp/x",
        "PyPI",
    ]
    assert [line for line in bad if not list(foreign_words(line))] == []
    assert [line for line in good if list(foreign_words(line))] == []


def test_the_only_index_is_one_variable_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [line.partition(" ?=")[0] for _, line in foreign_words(makefile)] == ["TORCH_CPU_INDEX"]


def test_the_licence_is_apache_2():
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence
