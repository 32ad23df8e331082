"""Reading a corpus: both line formats, and every mistake named by file and line."""

import pytest

from igpo_megatron.data.corpus import Passage, join_contents, read_corpus


def write(folder, *lines):
    path = folder / "corpus.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def test_both_line_formats_give_the_same_passage_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path, '{"id": "7", "title": "Iran", "text": "In Asia."}', "", r'{"id": 7, "contents": "\"Iran\"\nIn Asia."}')
    assert list(read_corpus(path)) == [Passage("7", "Iran", "In Asia.")] * 2


def test_contents_of_one_line_have_no_title_and_later_lines_stay_in_the_text(tmp_path):
    path = write(tmp_path, '{"id": "a", "contents": "just text"}', r'{"id": "b", "contents": "\"T\"\none\ntwo"}')
    assert list(read_corpus(path)) == [Passage("a", "", "just text"), Passage("b", "T", "one\ntwo")]


def test_joining_contents_is_the_inverse_of_splitting_them(tmp_path):
    passage = Passage("1", "Rio de Janeiro", "A city.\nIn Brazil.")
    assert join_contents(passage) == '"Rio de Janeiro"\nA city.\nIn Brazil.'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"corpus\.jsonl:2: not JSON .*found 'not json', expected one object per line"),
        ('["a list"]', r"corpus\.jsonl:2: found a JSON list, expected an object; a line holds id, title and text, or id and contents"),
        ('{"id": "2", "title": "x"}', r"corpus\.jsonl:2: field 'text' is missing \(found id, title\)"),
        ('{"contents": "x"}', r"corpus\.jsonl:2: field 'id' is missing"),
        ('{"id": "2", "title": "x", "text": null}', r"corpus\.jsonl:2: field 'text' is null, expected a string"),
        (b'{"id": "2", "title": "\xff", "text": "x"}', r"corpus\.jsonl:2: not UTF-8 text .*save the file as UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_what_was_found_and_expected(tmp_path, line, message):
    path = write(tmp_path, '{"id": "1", "title": "a", "text": "b"}', line)
    with pytest.raises(ValueError, match=message):
        list(read_corpus(path))


def test_a_missing_corpus_says_what_a_corpus_is(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such corpus file; expected JSON lines"):
        list(read_corpus(tmp_path / "nowhere.jsonl"))
