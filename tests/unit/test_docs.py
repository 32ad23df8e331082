"""README and docs/: they build, every link leads somewhere, and what they name exists."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from igpo_megatron.config.load import explain
from igpo_megatron.config.schema import Config
from igpo_megatron.types import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
AROUND = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]

QUESTIONS = {
    "train on my own questions": "docs/getting-started.md#train-on-my-own-questions",
    "resume": "docs/training.md#resume",
    "add a back-end": "docs/extending.md#add-a-search-back-end",
    "two nodes": "docs/multi-node.md#two-nodes",
    "my GPU ran out of memory": "docs/gpus.md#my-gpu-ran-out-of-memory",
    "what does gain mean": "docs/algorithms.md#what-does-gain-mean",
    "convert a checkpoint": "docs/models-and-checkpoints.md#convert-a-checkpoint",
    "why did my run stop": "docs/training.md#why-did-my-run-stop",
    "use my own judge": "docs/tools-and-search.md#use-my-own-judge",
    "read the report": "docs/report.md#from-top-to-bottom",
}
"""What newcomers ask -> the section that answers it."""


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does it."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@cache
def anchors(path: Path) -> frozenset[str]:
    """What a link into a Markdown file may name behind `#`, as GitHub makes it of headings."""
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    titles = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    return frozenset(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)


@cache
def links(path: Path) -> tuple[str, ...]:
    """Targets of all links and images of a Markdown file."""
    tokens = MarkdownIt().enable("table").parse(path.read_text(encoding="utf-8"))
    inner = [child for token in tokens for child in token.children or ()]
    return tuple(str(child.attrs.get("href", child.attrs.get("src"))) for child in inner if child.type in ("link_open", "image"))


def problem(path: Path, link: str) -> str | None:
    """What is wrong with a link of the file `path`."""
    if link.startswith(("http://", "https://")):
        return None if re.fullmatch(r"https?://[\w.-]+\.\w+(/[\w./~%+-]*)?(#[\w-]+)?", link) else "is no address"
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.exists():
        return "is not there"
    return f"has no section #{anchor}" if anchor and anchor not in anchors(target) else None


def targets(path: Path) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of every link to a Markdown file."""
    for link in links(path):
        name, _, anchor = link.partition("#")
        if name.endswith(".md") and "://" not in name:
            yield (path.parent / name).resolve(), anchor


def test_the_site_builds_without_a_warning(tmp_path):
    result = build(DOCS, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert all((tmp_path / "site" / f"{page.stem}.html").is_file() for page in PAGES)


def test_broken_links_fail_the_build(tmp_path):
    broken = ["[x](absent.md)", "[x](faq.md#absent-there)", "[x](#absent-here)", "![x](absent.png)", "[x](../absent.py)"]
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "conf.py", tmp_path / "docs")
    (tmp_path / "docs/index.md").write_text("# Index\n\n" + "\n\n".join(broken) + "\n\n```{toctree}\nfaq\n```\n", encoding="utf-8")
    (tmp_path / "docs/faq.md").write_text("# Questions\n\n[back](index.md#index)\n", encoding="utf-8")
    result = build(tmp_path / "docs", tmp_path / "site")
    assert result.returncode != 0
    assert len(re.findall(r"index\.md:\d+: WARNING", result.stderr)) == len(broken), result.stderr
    assert "faq.md:" not in result.stderr


@pytest.mark.parametrize("path", [*AROUND, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path):
    assert [f"{link} {wrong}" for link in links(path) if (wrong := problem(path, link))] == []


def test_broken_links_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title: of `code`\n", encoding="utf-8")
    good = ["page.md", "#a-title-of-code", "page.md#a-title-of-code", "https://example.org/a/b.html#c", "."]
    assert [link for link in good if problem(page, link)] == []
    bad = ["absent.md", "#absent", "page.md#a-title", "https://no-host", "https://example.org/two words"]
    assert [link for link in bad if not problem(page, link)] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("start", ["README.md", "docs/index.md"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_every_common_question_is_two_clicks_away(start, question):
    name, _, anchor = QUESTIONS[question].partition("#")
    wanted = (ROOT / name, anchor)
    assert anchor in anchors(ROOT / name)
    first = set(targets(ROOT / start))
    second = {target for page, _ in first for target in targets(page)}
    assert wanted in first | second


def test_every_page_begins_with_what_the_reader_can_do_after_it():
    for page in (*PAGES, *AROUND[1:3]):
        text = page.read_text(encoding="utf-8")
        if not text.startswith("```{include}"):
            _, beginning, *_ = text.split("\n\n")
            assert beginning.startswith("After this page you"), page


PATH = re.compile(r"(?<![\w./-])((?:igpo_megatron|checkpoint_conversion|tools|tests|examples)/[\w./-]*\w)")
PLACEHOLDER = re.compile(r"/[A-Z]+\b")


@pytest.mark.parametrize("path", [*AROUND[:2], *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_is_named_exists(path):
    named = [name for name in PATH.findall(path.read_text(encoding="utf-8")) if not PLACEHOLDER.search(name)]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", [*AROUND[:3], *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":  # its tables begin with what was
        text = "\n".join(line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| `"))
    named: list[str] = []
    for line in text.splitlines():
        whole = ""
        for name in re.findall(r"`((?:igpo_megatron)?(?:\.[a-z0-9_]+)+)`", line):
            if not name.startswith("."):
                whole = name
            if whole:  # `.queue` behind `igpo_megatron.training.step` is its neighbour
                named.append(name if name == whole else whole.rpartition(".")[0] + name)
    files = [ROOT / name.replace(".", "/") for name in named]
    assert [str(file) for file in files if not file.is_dir() and not file.with_suffix(".py").is_file()] == []


@pytest.mark.parametrize("path", [*AROUND[:2], *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_setting_that_is_named_exists(path):
    tokens = [child for token in MarkdownIt().enable("table").parse(path.read_text(encoding="utf-8")) for child in token.children or ()]
    words = [word for token in tokens if token.type == "code_inline" for word in token.content.split()]
    keys = {word.partition("=")[0].rstrip(":") for word in words if word.partition(".")[0] in Config.model_fields and "." in word}
    unknown = []
    for key in sorted(keys):
        try:
            explain(key)
        except UserError as error:
            unknown.append(str(error))
    assert unknown == []


def test_code_fits_the_page():
    for page in PAGES:
        blocks = [token.content for token in MarkdownIt().parse(page.read_text(encoding="utf-8")) if token.type == "fence"]
        wide = [line for block in blocks for line in block.splitlines() if len(line) > 90]
        assert wide == [], page


def test_the_order_of_rooms_is_that_of_the_import_test():
    from test_import_layers import MAY_IMPORT

    text = (DOCS / "architecture.md").read_text(encoding="utf-8").split("## Who may import whom")[1]
    lines = text.split("```text\n")[1].split("```")[0].replace("commands of every room", "commands").splitlines()
    level = {room: number for number, line in enumerate(lines) for room in re.split(r", |   +", line)}
    assert level.keys() == {room for room in MAY_IMPORT if not room.startswith("__")}
    pairs = [(room, used) for room, rooms in MAY_IMPORT.items() for used in rooms if room in level and used in level]
    assert [(room, used) for room, used in pairs if level[used] >= max(level[room], 1)] == []
    rows = re.findall(r"^\| `(\w+)/` \|", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) == {init.parent.name for init in (ROOT / "igpo_megatron").glob("*/__init__.py")}
