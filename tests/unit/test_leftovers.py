"""What a killed run leaves behind goes at the next start; what a living one uses stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from igpo_megatron.config.load import build
from igpo_megatron.engines import ray_cluster
from igpo_megatron.supervision import leftovers
from igpo_megatron.types import RunStopped

OLD = time.time() - 3600


def make(folder: Path, name: str, age: float = OLD) -> Path:
    path = folder / name
    path.write_text("x")
    os.utime(path, (age, age))
    return path


def test_only_abandoned_paths_of_that_prefix_go(tmp_path: Path) -> None:
    abandoned, claimed = make(tmp_path, "igpo-weights-a"), make(tmp_path, "igpo-weights-b")
    young, other = make(tmp_path, "igpo-weights-c", time.time() + 3600), make(tmp_path, "weights-d")
    (tmp_path / "igpo-weights-e").mkdir()
    make(tmp_path / "igpo-weights-e", "inside")
    os.utime(tmp_path / "igpo-weights-e", (OLD, OLD))
    descriptor = leftovers.claim(claimed)
    leftovers.remove_abandoned(tmp_path, "igpo-weights-")
    assert sorted(tmp_path.iterdir()) == sorted([claimed, young, other])
    os.close(descriptor)
    leftovers.remove_abandoned(tmp_path, "igpo-weights-")
    assert sorted(tmp_path.iterdir()) == sorted([young, other])
    assert not abandoned.exists()


def test_the_claim_of_a_killed_process_ends_with_it(tmp_path: Path) -> None:
    path = make(tmp_path, "igpo-weights-a")
    code = f"from igpo_megatron.supervision import leftovers; leftovers.claim({str(path)!r}); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        leftovers.remove_abandoned(tmp_path, "igpo-weights-")
        assert path.exists()
        owner.kill()
    leftovers.remove_abandoned(tmp_path, "igpo-weights-")
    assert not path.exists()


def test_what_another_process_removes_before_it_is_claimed_is_made_anew(tmp_path: Path) -> None:
    made: list[Path] = []

    def slowly() -> Path:
        made.append(make(tmp_path, f"igpo-weights-{len(made)}"))
        if len(made) == 1:
            leftovers.remove_abandoned(tmp_path, "igpo-weights-")
        return made[-1]

    path, descriptor = leftovers.claimed(slowly)
    leftovers.remove_abandoned(tmp_path, "igpo-weights-")
    assert [path] == made[1:] == list(tmp_path.iterdir())
    os.close(descriptor)


def test_a_temporary_folder_too_deep_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(RunStopped, match="set TMPDIR to a shorter one"):
        ray_cluster._new_folder()
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize(("raised", "seen"), [(KeyboardInterrupt("SIGINT"), KeyboardInterrupt), (OSError("no port"), RunStopped)])
def test_a_ray_that_is_interrupted_while_it_starts_leaves_nothing(
    raised: BaseException, seen: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its servers' own children would live on without them."""
    import ray

    started: list[psutil.Process] = []

    def init(_temp_dir: str, **_: object) -> None:
        server = subprocess.Popen(["bash", "-c", "sleep 600 & echo $!; wait", _temp_dir], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        started.extend((psutil.Process(server.pid), psutil.Process(int(server.stdout.readline()))))
        raise raised

    folders: list[Path] = []
    monkeypatch.setattr(ray_cluster, "_new_folder", lambda make=ray_cluster._new_folder: folders.append(make()) or folders[-1])
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(seen):
        ray_cluster.RayCluster(build({"model": {"path": "m"}}), cuda=False)
    assert len(folders) == 1 and not folders[0].exists()
    assert len(started) == 2 and not any(map(leftovers.is_alive, started))
