"""Answers stay answers, whatever stands where they are expected; layouts are told by what they certainly are; odd files get a sentence."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_megatron.algorithms.outcomes import exact_match, f1
from igpo_megatron.config.load import build
from igpo_megatron.data.answers import NotAnswers, as_answers
from igpo_megatron.data.corpus import read_corpus
from igpo_megatron.data.problems import Problem
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.data.question_files import check_file, read_prompts
from igpo_megatron.data.questions import convert
from igpo_megatron.data.records import read_records
from igpo_megatron.data.tsv import MOST_LINES, read_table
from igpo_megatron.types import UserError

LONG = "7" * 4301
"""More digits than Python turns into an integer."""


def row(truth: Any = "Rhine", question: str = "Which river?", system: bool = False, **extra: Any) -> dict[str, Any]:
    prompt = [{"role": "system", "content": "Be brief."}] if system else []
    return {
        "data_source": "qa",
        "prompt": [*prompt, {"role": "user", "content": question}],
        "reward_model": {"ground_truth": truth},
        "extra_info": {"index": "1", **extra},
    }


def write(path: Path, *rows: dict[str, Any], **columns: pa.Array) -> Path:
    table = pa.Table.from_pylist(list(rows))
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path / "q.parquet")
    return path / "q.parquet"


def problem(path: Path, **options: Any) -> str:
    """The one problem of a file, as `check` has it and as a run refuses it."""
    (found,) = check_file(path, **options).problems
    with pytest.raises(UserError) as refused:
        read_prompts(path, **options)
    assert str(path) in str(refused.value) and str(found) in str(refused.value)
    return str(found)


# ---- answers


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        (None, ()),
        ("Rhine", ("Rhine",)),
        (["Rhine", "the Rhine"], ("Rhine", "the Rhine")),
        ('["Rhine", "the Rhine"]', ("Rhine", "the Rhine")),
        ('"Rhine"', ("Rhine",)),
        ('"[\\"a\\", \\"b\\"]"', ("a", "b")),
        ("[]", ()),
        ({"target": "Rhine"}, ("Rhine",)),
        ('{"target": ["a", "b"]}', ("a", "b")),
        ({"text": ["a"], "answer_start": [3]}, ("a",)),
        ({"Value": "a", "Aliases": "b", "HumanAnswers": ["c"], "NormalizedAliases": ["x"]}, ("a", "b", "c")),
        ('"Weird Al" Yankovic', ('"Weird Al" Yankovic',)),
        ("[sic] and {so}", ("[sic] and {so}",)),
        ("[1998]", ("[1998]",)),
        (['["a", "b"]', "c"], ("a", "b", "c")),
        (["[0, 1]", "[", "[sic]"], ("[0, 1]", "[", "[sic]")),
        ("{so}", ("{so}",)),
        ("1998", ("1998",)),
    ],
)
def test_whatever_stands_where_answers_are_expected_becomes_them(value: Any, answers: tuple[str, ...]) -> None:
    assert as_answers(value) == answers


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (4, "found 4, expected a string or a list of strings"),
        (True, "found True"),
        (b"a", "found b'a'"),
        ([4], "found the answer 4, expected a string"),
        ([["a"]], "found the answer \\['a'\\]"),
        ("[0, 1]", "may be one answer or several"),
        ("['a', 'b']", "text of a Python list"),
        ("[\"O'Neill\", 'b']", "text of a Python list"),
        ("{'target': ['a']}", "text of a Python list or dict"),
        ("array(['a', 'b'], dtype=object)", "text of a Python list or dict"),
        ({"label": "a"}, "found an object with label; expected one of target"),
        ({"target": {"target": "a"}}, "inside an object"),
    ],
)
def test_what_is_no_answer_or_could_be_one_or_several_is_refused(value: Any, message: str) -> None:
    with pytest.raises(NotAnswers, match=message):
        as_answers(value)


SETS = {
    "hotpotqa_train": {"id": "train_0", "question": "q?", "golden_answers": "Jane Doe", "metadata": {}},
    "popqa_test": {"id": 1, "question": "q?", "possible_answers": '"Jane Doe"'},
    "popqa_dev": {"id": 1, "question": "q?", "possible_answers": "Jane Doe"},
    "trivia_train": {"QuestionId": "q", "Question": "q?", "Answer": {"Value": "Jane Doe", "Aliases": "J. Doe"}},
    "trivia_dev": {"question_id": "q", "question": "q?", "answer": {"value": "Jane Doe", "aliases": "J. Doe"}},
    "musique_dev": {"id": "2hop", "question": "q?", "paragraphs": [], "answer": "Jane Doe", "answer_aliases": "J. Doe"},
    "nq_dev": {"question": "q?", "answers": {"text": "Jane Doe", "answer_start": 0}},
    "nq_test": {"question": "q?", "answer": '["Jane Doe", "J. Doe"]', "aliases": "Doe"},
    "nq_train": {
        **{"id": "1", "document": {}, "question": {"text": "q?"}},
        "annotations": {"short_answers": [{"text": "Jane Doe"}], "yes_no_answer": [-1]},
    },
}


@pytest.mark.parametrize("name", SETS)
def test_a_string_where_a_list_is_usual_is_one_answer_and_never_its_letters(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(SETS[name]))
    convert([path], tmp_path / "o.parquet")
    (prompt,) = read_prompts(tmp_path / "o.parquet")
    assert prompt.answers[0] == "Jane Doe" and set(prompt.answers) <= {"Jane Doe", "J. Doe", "Doe"}


def test_answers_that_look_like_json_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    answers = [["[0, 1]"], ["[]"], ["{}"], ["['x']"], ['"Heroes"'], ['{"a": 1}'], ["[0, 1]", "0 and 1"], ["a"]]
    path = tmp_path / "nq_train.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"q{n}?", "golden_answers": given}) for n, given in enumerate(answers)))
    convert([path], tmp_path / "o.parquet")
    truths = [row["ground_truth"] for row in pq.read_table(tmp_path / "o.parquet")["reward_model"].to_pylist()]
    assert truths[6:] == ["[0, 1]<|answer_split|>0 and 1", "a"] and truths[0] == '["[0, 1]"]'
    assert [list(prompt.answers) for prompt in read_prompts(tmp_path / "o.parquet")] == [*answers[:1], *answers[3:]], "two have no letter"
    assert [found.row for found in check_file(tmp_path / "o.parquet").problems] == [1, 2]


@pytest.mark.parametrize("suffix", ["jsonl", "tsv"])
def test_bamboogle_is_not_taken_for_triviaqa(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bamboogle_test.{suffix}"
    path.write_text("Question\tAnswer\nq?\tYes\n" if suffix == "tsv" else '{"Question": "q?", "Answer": "Yes"}\n')
    (count,) = convert([path], tmp_path / "o.parquet")
    assert (count.layout, count.source) == ("Question and Answer", "Bamboogle")
    assert read_prompts(tmp_path / "o.parquet")[0].answers == ("Yes",)


def test_names_and_demonyms_of_an_entity_may_be_strings(tmp_path: Path) -> None:
    question = {"_id": "1", "question": "q?", "answer": "Ulm", "answer_id": "Q1", "evidences": []}
    (tmp_path / "2wiki_train.jsonl").write_text(json.dumps(question))
    aliases = tmp_path / "aliases.json"
    aliases.write_text(json.dumps({"Q_id": "Q1", "aliases": "Ulm, Germany", "demonyms": "Ulmer"}))
    convert([tmp_path / "2wiki_train.jsonl"], tmp_path / "o.parquet", aliases=aliases)
    assert read_prompts(tmp_path / "o.parquet")[0].answers == ("Ulm", "Ulm, Germany", "Ulmer")


def test_a_span_outside_the_document_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "nq-train.jsonl"
    for span in ({"start_token": -1, "end_token": -1}, {"start_token": None, "end_token": None}, {"start_token": 2, "end_token": 9}):
        annotation = {"short_answers": [span], "yes_no_answer": "NONE"}
        path.write_text(json.dumps({"example_id": 1, "question_text": "q", "document_text": "a b c", "annotations": [annotation]}))
        with pytest.raises(UserError):
            convert([path], tmp_path / "o.parquet")


# ---- layouts


def test_an_igpo_file_stays_one_whatever_columns_are_beside_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, row("Rhine<|answer_split|>the Rhine", answer="Rhine", question="Which river?"))
    assert read_prompts(path)[0].answers == ("Rhine", "the Rhine") and check_file(path).layout == "IGPO"
    one_alias = write(tmp_path, row("Rhine", answer="Rhine", question="Which river?"))
    assert read_prompts(one_alias)[0].answers == ("Rhine",) and check_file(one_alias).layout == "IGPO"


def extra(question: str, **others: Any) -> dict[str, Any]:
    return {**row("2", "Solve: 1+1?"), "extra_info": {"index": "1", "question": question, **others}}


def test_a_file_that_two_layouts_read_differently_is_refused_until_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, extra("1+1?"))
    assert "set data.layout (check: --layout) to arpo for the first or to igpo for the second" in problem(path)
    assert read_prompts(path, "arpo")[0].question == "1+1?" and read_prompts(path, "igpo")[0].question == "Solve: 1+1?"
    settings_of = build({"model": {"path": "m"}}, ["data.layout=arpo"])
    stream = PromptStream([path], seed=0, shuffle=False, balance="none", layout=settings_of.data.layout)
    assert stream.question(0).question == "1+1?"
    assert read_prompts(write(tmp_path, extra("1+1?", need_tools_kwargs=False)))[0].question == "1+1?", "what ARPO alone writes"


def test_the_separator_or_a_target_tells_a_layout_against_any_extra_column(tmp_path: Path) -> None:
    joined = {**extra("1+1?", need_tools_kwargs=True), "reward_model": {"ground_truth": "2<|answer_split|>two"}}
    assert read_prompts(write(tmp_path, joined))[0].answers == ("2", "two")
    for truth in ({"target": "2"}, {"target": ["2"]}, '{"target": ["2"]}'):
        path = write(tmp_path, {**extra("1+1?"), "reward_model": {"ground_truth": truth}})
        assert check_file(path).layout == "Search-R1" and read_prompts(path)[0].answers == ("2",)
    assert "without <|answer_split|>" in problem(write(tmp_path, joined), layout="arpo")


def test_a_list_in_brackets_is_one_answer_to_a_mathematical_question(tmp_path: Path) -> None:
    path = write(tmp_path, {**row("[0, 1]", "q?", system=True), "extra_info": {"question": "q?"}})
    assert read_prompts(path)[0].answers == ("[0, 1]",) and check_file(path).layout == "ARPO"
    assert "may be one answer or several" in problem(write(tmp_path, row("[0, 1]")))


# ---- odd columns


@pytest.mark.parametrize(
    "values",
    [
        pa.array(['{"index": "7", "split": "train"}']),
        pa.array([[("index", "7")]], pa.map_(pa.string(), pa.string())),
        pa.array([{"index": "7"}]),
        pa.array(["null"]),
    ],
)
def test_extra_info_may_be_json_text_a_map_or_a_struct(tmp_path: Path, values: pa.Array) -> None:
    assert read_prompts(write(tmp_path, row(), extra_info=values))[0].id == ("row#0" if values.to_pylist() == ["null"] else "7")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(['{"index": ']), "row 0, column extra_info: found text that is not JSON"),
        (pa.array([f'{{"index": {LONG}}}']), "row 0, column extra_info: found text that is not JSON (a number of 4,301 digits)"),
        (pa.array(["[1]"]), "row 0, column extra_info: found [1], expected a struct, a map or the JSON text"),
        (pa.array([[("a", "1"), ("a", "2")]], pa.map_(pa.string(), pa.string())), "row 0, column extra_info: found the key 'a' twice"),
        (pa.array([["a"]]), "column extra_info: found type list<"),
        (pa.array([3]), "column extra_info: found type int64"),
    ],
)
def test_other_extra_info_is_named_with_row_and_column(tmp_path: Path, values: pa.Array, message: str) -> None:
    assert problem(write(tmp_path, row(), extra_info=values)).startswith(message)


def test_categories_views_fixed_lists_and_lists_of_answers_are_used_as_what_they_are(tmp_path: Path) -> None:
    messages = pa.array(row()["prompt"])
    path = write(
        tmp_path,
        row(),
        data_source=pa.array(["qa"]).dictionary_encode(),
        prompt=pa.FixedSizeListArray.from_arrays(messages, 1),
        reward_model=pa.array([{"ground_truth": ["a", "b"]}]),
    )
    (prompt,) = read_prompts(path)
    assert (prompt.source, prompt.answers) == ("qa", ("a", "b"))
    view = write(tmp_path, row(), data_source=pa.array(["qa"], pa.string_view()), reward_model=pa.array(['{"ground_truth": "a"}']))
    assert read_prompts(view)[0].answers == ("a",)


def test_a_column_or_a_field_that_is_there_twice_is_named(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row()])
    path = tmp_path / "q.parquet"
    pq.write_table(table.append_column("prompt", table["prompt"]), path)
    assert problem(path) == "column prompt: it occurs twice; keep one"
    truth = pa.array(["a"])
    write(tmp_path, row(), reward_model=pa.StructArray.from_arrays([truth, truth], ["ground_truth", "ground_truth"]))
    assert problem(path) == "column reward_model.ground_truth: it occurs twice; keep one"
    (record,) = [found for _, found in read_records(path)]
    assert isinstance(record, Problem) and record.column == "reward_model.ground_truth"


def test_text_that_is_not_utf8_is_named_with_its_row_and_column(tmp_path: Path) -> None:
    source = pa.Array.from_buffers(pa.string(), 2, pa.array([b"qa", b"\xff"]).buffers())
    path = write(tmp_path, row(), row(), data_source=source)
    assert problem(path).startswith("row 1, column data_source: the value cannot be read")
    assert [isinstance(record, Problem) for _, record in read_records(path)] == [False, True]


# ---- answers that nothing can match


def test_an_answer_of_punctuation_only_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its exact match with an empty answer is 1, and its F1 with itself 0."""
    assert exact_match("", ["!!!"]) == 1.0 and f1("!!!", ["!!!"]) == 0.0
    path = write(tmp_path, row("!!!"), row("Rhine<|answer_split|>+/-"), row("+<|answer_split|>?"))
    (prompt,) = PromptStream([path], seed=0, shuffle=False, balance="none").prompts
    assert prompt.answers == ("Rhine",)
    (warning,) = caplog.records
    assert "2 of 3 questions are left out" in warning.getMessage() and "'!!!'" in warning.getMessage()
    report = check_file(path)
    assert [(found.row, found.costs) for found in report.problems] == [(0, "row"), (1, "answer"), (2, "row")]
    assert report.sources == {"qa": 1}
    with pytest.raises(UserError, match="1 of 1 questions are left out"):
        read_prompts(write(tmp_path, row("...")))


def test_what_can_be_scored_depends_on_the_score(tmp_path: Path) -> None:
    path = write(tmp_path, row("The"), row("Rhine"))
    assert len(read_prompts(path)) == 2 and len(read_prompts(path, outcome="f1_multiset")) == 1


# ---- records


def test_a_byte_order_mark_is_passed_over_in_every_text_format(tmp_path: Path) -> None:
    passage = {"id": "1", "text": "It flows.", "title": "Rhine"}
    line = json.dumps(passage)
    for name, text in {"a.jsonl": line, "b.json": line, "c.json": f"[{line}]", "d.tsv": "id\ttext\ttitle\n1\tIt flows.\tRhine\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [record for _, record in read_records(tmp_path / name)] == [passage], name
    assert next(read_corpus(tmp_path / "a.jsonl")).title == "Rhine"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_number_too_long_to_read_is_named_and_the_next_record_is_read(tmp_path: Path, name: str) -> None:
    lines = [f'{{"id": 1, "n": {{"deep": [{LONG}]}}}}', '{"id": 2}', '{"id": 3, "id": 4}']
    path = tmp_path / name
    path.write_text(f"[{', '.join(lines)}]" if name == "a.json" else "\n".join(lines))
    first, second, third = [record for _, record in read_records(path)]
    assert str(first).startswith("row 0, column n: found a number of 4,301 digits, expected at most 300")
    assert second == {"id": 2} and str(third) == "row 2, column id: the field occurs twice in one object; keep one"
    with pytest.raises(UserError, match=r"a\.json.?:1: field 'n': found a number of 4,301 digits"):
        list(read_corpus(tmp_path / "a.jsonl" if name == "a.jsonl" else _one_line(path, lines[0])))


def _one_line(path: Path, line: str) -> Path:
    path.write_text(line)
    return path


def table(text: str) -> list[Any]:
    return [str(found) if isinstance(found, Problem) else list(found.values()) for _, found in read_table(io.BytesIO(text.encode()))]


def test_a_quote_that_never_closes_does_not_swallow_the_rows_behind_it() -> None:
    text = 'id\ttext\ttitle\n1\t"The ""Rhine"" flows."\tRhine\n2\t"Open\tA\n3\tThird.\tB\n4\t"Also open\tC\n5\t"Said" he\tD\n'
    rows = [
        *(["1", 'The "Rhine" flows.', "Rhine"], ["2", '"Open', "A"], ["3", "Third.", "B"]),
        *(["4", '"Also open', "C"], ["5", '"Said" he', "D"]),
    ]
    assert table(text) == rows
    assert table(f'1\t"open{chr(10) * 2 * MOST_LINES}2\tb\tB\n') == ["row 0: found 2 fields, expected 3 (id, text, title)", ["2", "b", "B"]]


def test_a_quoted_field_may_run_over_lines_and_a_header_may_not_repeat_a_name() -> None:
    assert table('\n1\t"a\n\nb ""c"""\tA\n\n2\td\tB\n') == [["1", 'a\n\nb "c"', "A"], ["2", "d", "B"]]
    assert table("id\ttext\ttext\n1\ta\tb\n") == ["column text: the column occurs twice; keep one"] and table("") == []


# ---- any input at all

ODD_TEXTS = ["", " ", "Rhine", "a<|answer_split|>b", "!!!", '["a"]', "[1, 2]", "{", "['a']", LONG]
TEXT = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=8))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["target", "text", "Value", "aliases", "question", "index", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)
FIELDS = (
    *("question", "answer", "answers", "golden_answers", "possible_answers", "aliases", "answer_aliases", "id", "question_id"),
    *("Question", "Answer", "annotations", "question_text", "document_text", "document", "supporting_facts", "answerable"),
)
ANSWERS = st.one_of(TEXT, st.lists(TEXT, max_size=3), VALUE)
QUESTION = st.sampled_from(["q?", "r?", "s?", " "])
RECORDS = st.one_of(
    st.lists(st.one_of(VALUE, st.dictionaries(st.sampled_from(FIELDS), VALUE, max_size=5)), max_size=3),
    *(
        st.lists(st.fixed_dictionaries({"question": QUESTION, name: ANSWERS}, optional={"aliases": ANSWERS, "id": VALUE}), max_size=3)
        for name in ("golden_answers", "possible_answers", "answer", "answers")
    ),
    st.lists(st.fixed_dictionaries({"Question": QUESTION, "Answer": ANSWERS, "QuestionId": TEXT}), max_size=3),
)


def pairs(*values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Two values of one of these kinds: a column."""
    return st.one_of(*(st.lists(value, min_size=2, max_size=2) for value in values))


STRINGS = st.one_of(TEXT, st.none())
TRUTHS = pairs(
    TEXT, STRINGS, st.lists(STRINGS, max_size=2), st.builds(lambda target: {"target": target}, st.lists(TEXT, max_size=2)), VALUE
)
EXTRAS = pairs(
    st.fixed_dictionaries({"index": STRINGS, "question": STRINGS}), st.dictionaries(st.sampled_from(["index", "split"]), VALUE), VALUE
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "user", "system", None]), "content": STRINGS})
PROMPTS = pairs(st.just([{"role": "user", "content": "q?"}]), st.lists(MESSAGE, max_size=2), st.lists(st.none() | MESSAGE, max_size=2))
MESSAGES_TYPE = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
ANY = settings(max_examples=100, deadline=None, database=None, derandomize=True)
"""Nothing is kept in a folder of hypothesis, and every run sees the same inputs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


def as_array(values: list[Any]) -> pa.Array:
    """A column of `values`, as text where Arrow has no type for them together."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, UnicodeEncodeError):
        return pa.array([json.dumps(value) for value in values])


@ANY
@given(truths=TRUTHS, extras=EXTRAS, prompts=PROMPTS, name=st.sampled_from(["auto", "igpo", "arpo", "search_r1"]))
def test_any_parquet_layout_gives_questions_or_one_sentence(
    folder: Path, truths: list[Any], extras: list[Any], prompts: list[Any], name: Any
) -> None:
    columns = {
        "data_source": pa.array(["qa", "qa"]),
        "prompt": pa.array(prompts, MESSAGES_TYPE),
        "reward_model": as_array([{"ground_truth": truth} for truth in truths]),
        "extra_info": as_array(extras),
    }
    try:
        pq.write_table(pa.table(columns), folder / "any.parquet")
    except pa.ArrowNotImplementedError:  # a struct without fields has no parquet
        return
    usable = sum(check_file(folder / "any.parquet", name).sources.values())
    try:
        questions = read_prompts(folder / "any.parquet", name)
    except UserError:
        return
    assert usable == len(questions) and all(answer.strip() for question in questions for answer in question.answers)


@ANY
@given(rows=RECORDS, cut=st.sampled_from([0, 0, 0, 1]), suffix=st.sampled_from(["jsonl", "json"]))
def test_any_records_in_any_layout_give_questions_or_one_sentence(folder: Path, rows: list[Any], cut: int, suffix: str) -> None:
    text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    path = folder / f"nq_train.{suffix}"
    path.write_text(text[: len(text) - cut])
    try:
        (count,) = convert([path], folder / "any_out.parquet", skip_problems=True)
    except UserError:
        return
    assert count.written == pq.ParquetFile(folder / "any_out.parquet").metadata.num_rows > 0


@ANY
@given(st.text(alphabet='"ab\t\n\r\ufeff\0', max_size=40))
def test_any_table_layout_gives_rows_or_problems(text: str) -> None:
    for found in table(text):
        assert found if isinstance(found, str) else all(isinstance(value, str) for value in found)
