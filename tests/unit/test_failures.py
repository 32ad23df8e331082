"""Tracebacks of what nobody expected are kept, and the console's sentence says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from igpo_megatron.supervision.failures import MOST_BYTES, MOST_CHARS, in_short, keep_failure


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:  # noqa: BLE001  (with its traceback)
        return caught


def test_tracebacks_of_one_name_follow_each_other_in_one_file_of_the_run(tmp_path: Path) -> None:
    sentence = keep_failure(tmp_path, "rank1", raised(RuntimeError("first\nmore of it")))
    keep_failure(tmp_path, "rank1", raised(KeyError("second \ud800")))
    path = tmp_path / "failures/rank1.txt"
    assert sentence == f"RuntimeError: first (traceback: {path})"
    text = path.read_text(encoding="utf-8")
    assert text.count("Traceback (most recent call last):") == 2 and text.index("more of it") < text.index("KeyError: 'second \\ud800'")


@pytest.mark.parametrize("known", [True, False])
def test_a_traceback_whose_folder_is_unknown_or_cannot_be_written_lies_in_a_temporary_file(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "run").write_text("a file where the folder should be")
    sentence = keep_failure(tmp_path / "run" if known else None, "rank0", raised(OSError("boom")))
    (path,) = tmp_path.glob("igpo-failure-*.txt")
    assert str(path) in sentence and "boom" in path.read_text(encoding="utf-8")


def test_a_traceback_that_no_file_takes_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent\0"))
    assert keep_failure(None, "rank0", raised(OSError("boom"))).endswith("(traceback: above)")
    assert "Traceback" in capsys.readouterr().err


def test_a_long_message_is_cut_and_an_empty_one_leaves_the_kind() -> None:
    assert in_short(ValueError()) == "ValueError"
    assert len(in_short(ValueError("x" * 10_000))) < 400


def test_a_secret_of_the_environment_is_in_no_traceback_and_no_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "s3cret/value")
    monkeypatch.setenv("SOME_OTHER_TOKEN", "s3cret/value/longer")
    sentence = keep_failure(tmp_path, "rank0", raised(RuntimeError("GET https://x?key=s3cret%2Fvalue and s3cret/value/longer")))
    kept = (tmp_path / "failures/rank0.txt").read_text(encoding="utf-8")
    for text in (sentence, kept):
        assert "s3cret" not in text and "longer" not in text and "GET https://x?key=*** and ***" in text


def test_a_file_of_tracebacks_is_bounded_and_what_it_does_not_take_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    sentences = [keep_failure(tmp_path, "rank0", ValueError("y" * 100_000)) for _ in range(MOST_BYTES // MOST_CHARS + 2)]
    assert MOST_BYTES // 2 < (tmp_path / "failures/rank0.txt").stat().st_size <= MOST_BYTES
    assert "rank0.txt" in sentences[0] and "elsewhere" in sentences[-1]


def test_an_exception_that_cannot_be_shown_is_no_second_one(tmp_path: Path) -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert keep_failure(tmp_path, "rank0", Broken()).startswith("Broken (traceback: ")
