"""Where the ranks of one machine meet: the port that torchrun chose for them may be taken by the time they come."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from igpo_megatron.policy.parallel import MEETING_FOLDER, _loopback_store


def meet() -> list[bytes]:
    """What each of two ranks reads in the store of rank 0. The second looks for it before it is there."""

    def read(rank: int) -> tuple[bytes, object]:
        store = _loopback_store(rank, timedelta(seconds=60))
        store.set(f"from {rank}", str(rank))
        return store.get("from 0") + store.get("from 1"), store

    with ThreadPoolExecutor(2) as pool:
        return [found for found, _ in list(pool.map(read, (1, 0)))]  # a list, because the store ends with rank 0's


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        yield port


def test_ranks_meet_though_another_process_took_their_port_and_anew_after_a_restart(
    taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MEETING_FOLDER, str(tmp_path))
    for attempt in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        assert meet() == [b"01", b"01"]
    ports = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert ports.keys() == {"port-0", "port-1"} and taken not in ports.values()


def test_a_rank_gives_up_when_rank_0_does_not_come(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEETING_FOLDER, str(tmp_path))
    with pytest.raises(TimeoutError, match=r"rank 0 did not open the ranks' store within 0.1 s \(see parallel.timeout_s\)"):
        _loopback_store(1, timedelta(seconds=0.1))


def test_without_a_folder_the_port_of_torchrun_is_taken(taken: int) -> None:
    with pytest.raises(OSError, match="in use"):
        _loopback_store(0, timedelta(seconds=1))
