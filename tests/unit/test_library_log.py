"""What libraries warn of is in a file of the run; what is ours is shown."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from igpo_megatron.engines.ray_cluster import RayCluster
from igpo_megatron.supervision import failures
from igpo_megatron.supervision.library_log import libraries_logged


def warn_from(file: str, text: str) -> None:
    warnings.warn_explicit(text, FutureWarning, file, 7)


def test_warnings_and_records_of_libraries_are_kept_and_ours_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hunter2-hunter2")
    log, root = tmp_path / "run" / "logs" / "rank0.txt", list(logging.root.handlers)
    with warnings.catch_warnings(), libraries_logged(log):
        warnings.simplefilter("always")
        assert not log.parent.exists(), "nothing was said yet"
        warn_from("/site-packages/megatron/core/x.py", "of Megatron, with hunter2-hunter2")
        warn_from("/site-packages/igpo_megatron/agent/x.py", "of ours")
        logging.getLogger("apex.normalisation").warning("no %s", "kernels")
        logging.getLogger("apex").info("unimportant")
        logging.getLogger("igpo_megatron.agent").warning("a question is left out")
    text = log.read_text(encoding="utf-8")
    assert "/site-packages/megatron/core/x.py:7: FutureWarning: of Megatron" in text and "hunter2" not in text
    assert "apex.normalisation WARNING: no kernels\n" in text and "unimportant" not in text and "ours" not in text
    ours = [str(warning.message) for warning in recwarn if warning.category is FutureWarning]  # not of sockets that other tests left
    assert ours == ["of ours"] and "a question is left out\n" in capsys.readouterr().err
    assert logging.root.handlers == root


def test_a_full_or_forbidden_log_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MOST_BYTES", 100)
    (tmp_path / "file").touch()
    for path in (tmp_path / "log.txt", tmp_path / "file" / "log.txt"):
        with libraries_logged(path):
            for number in range(20):
                logging.getLogger("megatron").warning("again %d", number)
    assert 0 < (tmp_path / "log.txt").stat().st_size <= 100


def test_a_command_without_a_folder_keeps_and_shows_nothing_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), libraries_logged(None):
        warnings.simplefilter("always")
        warn_from("/site-packages/megatron/core/x.py", "of Megatron")
        logging.getLogger("apex.normalisation").warning("no kernels")
    assert capsys.readouterr().err == ""


def test_engines_logs_are_kept_in_the_runs_folder_in_place_of_older_ones(tmp_path: Path) -> None:
    logs, run = tmp_path / "session_1" / "logs", tmp_path / "runs" / "a"
    logs.mkdir(parents=True)
    (logs / "worker-1-01-77.err").write_text("WARNING of vLLM\n")
    (logs / "worker-1-01-77.out").touch()
    (logs / "raylet.out").write_text("much")
    cluster = SimpleNamespace(_run=run)
    RayCluster._keep_logs(cluster, tmp_path)  # type: ignore[arg-type]
    assert not run.exists(), "no run, no folder"
    (run / "logs" / "engines").mkdir(parents=True)
    (run / "logs" / "engines" / "worker-old.err").touch()
    RayCluster._keep_logs(cluster, tmp_path)  # type: ignore[arg-type]
    assert {path.name: path.read_text() for path in (run / "logs" / "engines").iterdir()} == {"worker-1-01-77.err": "WARNING of vLLM\n"}
