"""Named waits: the culprit at the end of the chain, the record, the end of a wait that lasts too long."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from igpo_megatron.supervision.waits import Recorder, Wait, WaitExpired, culprit, oldest, recording, waiting

FIRST = Wait("rank 1", "the groups of step 3", "rank 0", 100.0)
SECOND = Wait("rank 0", "the rollouts of step 3", "engine 1", 101.0)


def test_the_culprit_is_the_end_of_the_chain_of_waits():
    assert culprit([FIRST, SECOND], FIRST) == "engine 1"
    assert culprit([FIRST], FIRST) == "rank 0"
    assert culprit([SECOND, Wait("engine 2", "a GPU", "nobody", 1.0)], SECOND) == "engine 1"


def test_a_hundred_requests_to_one_engine_are_one_edge_and_the_slow_tool_is_named():
    turns = [Wait("the rollouts", f"turn {number}", "the engines", 200.0 + number) for number in range(100)]
    search = Wait("the rollouts", "a result", "the tool search", 150.0)
    main = Wait("rank 0", "the rollouts of step 3", "the rollouts", 140.0)
    assert oldest([*turns, search]) == [search, turns[0]]
    assert culprit([FIRST, main, *oldest([*turns, search])], FIRST) == "the tool search"


def test_a_circle_of_waits_is_called_one():
    back = Wait("rank 0", "a gradient", "rank 1", 99.0)
    assert culprit([FIRST, back], FIRST) == "a circle: rank 1 waits for rank 0 waits for rank 1"


def test_a_sentence_says_who_what_whom_and_how_long():
    assert FIRST.sentence(now=130.0) == "rank 1 has waited 30 s for the groups of step 3 (from rank 0)"


def test_a_wait_without_a_recorder_and_one_that_ends_in_time_cost_nothing(tmp_path: Path):
    with waiting("nothing", on="nobody", deadline_s=0.0):
        pass
    with recording("rank 0", tmp_path), waiting("a moment", on="the clock", deadline_s=60.0):
        pass
    assert list(tmp_path.iterdir()) == []


def until_expired(recorder: Recorder) -> None:
    """The end of a wait that comes after its deadline has been noticed."""
    while not any(entry.expired for entry in recorder._open.values()):
        time.sleep(0.01)


def test_a_wait_on_another_thread_is_ended_when_it_returns_and_not_before(tmp_path: Path):
    caught: list[str] = []
    returned: list[bool] = []

    def other() -> None:
        with recorder.waiting("a slow answer", on="the tool search", deadline_s=0.2):
            until_expired(recorder)
            returned.append(True)

    def outer() -> None:
        try:
            other()
        except WaitExpired as problem:
            caught.append(str(problem))

    recorder = Recorder("rank 0", tmp_path, look_s=0.05)
    thread = threading.Thread(target=outer)
    thread.start()
    thread.join(60)
    recorder.close()
    assert returned and len(caught) == 1 and "held up by the tool search" in caught[0]


def test_a_wait_that_passes_its_deadline_is_ended_by_a_sentence_and_leaves_a_record(tmp_path: Path, capfd):
    expected = pytest.raises(WaitExpired, match="held up by engine 1")
    with recording("rank 0", tmp_path), expected, waiting("the rollouts of step 3", on="engine 1", deadline_s=0.5):
        threading.Event().wait()
    (record,) = tmp_path.glob("record_rank_0_*.txt")
    text = record.read_text()
    assert text.startswith("rank 0 has waited") and "who waits for whom:\n  rank 0 has waited" in text
    assert "test_waits.py" in text and "wait" in text.split("stacks of this process")[1]
    assert "held up by engine 1" in capfd.readouterr().err


def test_the_signal_for_a_wait_that_ends_meanwhile_reaches_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By default it would end the process."""
    send, strays = signal.pthread_kill, []

    def late(thread: int, number: int) -> None:
        time.sleep(0.3)
        send(thread, number)

    monkeypatch.setattr("signal.pthread_kill", late)
    before = signal.signal(signal.SIGUSR2, lambda number, frame: strays.append(number))
    try:
        with pytest.raises(WaitExpired), recording("rank 0", tmp_path) as recorder, waiting("a parcel", on="the post", deadline_s=0.1):
            until_expired(recorder)
        recorder._thread.join()
        assert strays == []
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_records_know_what_other_ranks_wait_for(tmp_path: Path):
    main, other = (Recorder(who, tmp_path, look_s=0.05, posted_after_s=0.1) for who in ("rank 0", "rank 1"))
    with main.waiting("the rollouts of step 3", on="engine 1", deadline_s=None):
        deadline = time.monotonic() + 60
        while not (tmp_path / "rank_0.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with other.waiting("the groups of step 3", on="rank 0", deadline_s=None):
            sentence = other.record()
    assert "rank 1 has waited" in sentence and "held up by engine 1" in sentence
    main.close()
    other.close()
    assert not list(tmp_path.glob("*.json"))


def test_a_signal_writes_a_record_and_ends_nothing(tmp_path: Path, capfd):
    with recording("rank 7", tmp_path), waiting("a parcel", on="the post", deadline_s=60.0):
        os.kill(os.getpid(), signal.SIGUSR1)
    (record,) = tmp_path.glob("record_rank_7_*.txt")
    assert "held up by the post" in record.read_text() and "held up by the post" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def expired(recorder: Recorder, last: Callable[[], object]) -> str:
    """What a thread is told that waits on `rank 0` until `last` returns, past its deadline."""

    def wait() -> str:
        with pytest.raises(WaitExpired) as caught, recorder.waiting("a collective", on="rank 0", deadline_s=0.05):
            last()
        return str(caught.value)

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(wait).result(60)


def test_a_process_that_ends_itself_because_a_wait_cannot_be_interrupted_says_why_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ended, said = threading.Event(), []
    monkeypatch.setattr("igpo_megatron.supervision.waits._UNINTERRUPTED_S", 0.1)
    monkeypatch.setattr("os._exit", lambda code: ended.set())
    recorder = Recorder("rank 1", tmp_path, look_s=0.02, last_words=lambda why: said.append(str(why)))
    sentence = expired(recorder, lambda: ended.wait(60))
    recorder.close()
    assert said[0] == sentence and "rank 1 has waited" in sentence and "held up by rank 0" in sentence


def test_the_watch_over_the_waits_outlives_a_disk_that_takes_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    recorder = Recorder("rank 1", tmp_path / "file/waits", look_s=0.02, posted_after_s=0.0)
    assert "held up by rank 0" in expired(recorder, lambda: until_expired(recorder))
    assert recorder._thread.is_alive()
    recorder.close()
