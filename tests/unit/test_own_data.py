"""Public question sets and corpora, as published, into this project's files; rows are hand-made in the documented layouts."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from igpo_megatron import cli
from igpo_megatron.data import json_rows
from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.data.problems import Problem
from igpo_megatron.data.prompts import read_prompts
from igpo_megatron.data.qa_sets import source_of, split_of
from igpo_megatron.data.question_files import check_file
from igpo_megatron.data.questions import Refused, convert
from igpo_megatron.data.records import read_records
from igpo_megatron.search.local import bm25_build
from igpo_megatron.search.local.bm25 import Bm25Index
from igpo_megatron.search.local.bm25_build import build_index
from igpo_megatron.search.local.index_place import Digest, bm25_settings
from igpo_megatron.supervision.leftovers import whole


def lines(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def one_list(path: Path, *rows: Any) -> Path:
    path.write_text(json.dumps(list(rows), indent=1))
    return path


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def span(start: int, end: int) -> dict[str, int]:
    return {"start_token": start, "end_token": end}


CONTEXT = [["Oslo", ["Oslo is a city."]]]
HOTPOT = {"_id": "5a8b", "question": "Which city?", "answer": "Oslo", "supporting_facts": [["Oslo", 0]], "context": CONTEXT}
TWO_WIKI = {
    **{"_id": "13f5", "type": "compositional", "question": "Where was he born?", "answer": "Ulm", "answer_id": "Q3012"},
    **{"supporting_facts": [], "context": CONTEXT, "evidences": [["Einstein", "place of birth", "Ulm"]], "evidences_id": []},
}
MUSIQUE = {
    **{"id": "2hop__1_2", "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "P", "is_supporting": True}]},
    **{"question": "Who founded it?", "question_decomposition": [], "answer": "Ann", "answer_aliases": ["Anne", "Ann"], "answerable": True},
}
SIMPLE_NQ = {
    **{"example_id": 797803103760793766, "question_text": "who founded google", "document_url": "u", "long_answer_candidates": []},
    "document_text": "<P> Larry Page and Sergey Brin founded it </P>",
    "annotations": [
        {"annotation_id": 1, "long_answer": span(0, 9), "short_answers": [span(1, 3), span(4, 6)], "yes_no_answer": "NONE"},
        {"annotation_id": 2, "long_answer": span(0, 9), "short_answers": [span(1, 3)], "yes_no_answer": "YES"},
    ],
}
FULL_NQ = {
    **{"example_id": 5, "question_text": "is it so"},
    "document_tokens": [{"token": "so", "html_token": False}],
    "annotations": [{"short_answers": [span(0, 1)], "yes_no_answer": "NO"}],
}
HUB_NQ = {
    **{"id": "797", "document": {"title": "Google"}, "question": {"text": "who founded google", "tokens": []}},
    "annotations": {"short_answers": [{"text": ["Larry Page", "Sergey Brin"]}, {"text": []}], "yes_no_answer": [-1, 1]},
}
TRIVIA = {
    "Data": [
        {
            "Answer": {"Aliases": ["Sunset Blvd", "Sunset Boulevard"], "NormalizedAliases": [], "Type": "W", "Value": "Sunset Bvd"},
            **{"EntityPages": [], "Question": "Which musical?", "QuestionId": "tc_1", "QuestionSource": "http://s", "SearchResults": []},
        }
    ],
    **{"Domain": "unfiltered-web", "Split": "train", "VerifiedEval": False, "Version": 1.0},
}
HUB_TRIVIA = {
    **{"question": "Which musical?", "question_id": "tc_1", "question_source": "s"},
    "answer": {"value": "Sunset Bvd", "aliases": ["Sunset Blvd"], "normalized_aliases": ["sunset blvd"], "type": "W"},
}
POPQA = {"id": 4222362, "obj": "politician", "question": "What is his job?", "possible_answers": '["politician", "pol"]'}


def published(folder: Path) -> dict[str, tuple[Path, str, str, tuple[str, ...]]]:
    """Layout -> (file, source, id, answers)."""
    hub_hotpot = {**HOTPOT, "id": "5a8b", "supporting_facts": {"title": ["Oslo"], "sent_id": [0]}}
    del hub_hotpot["_id"], hub_hotpot["context"]
    nq_ids = ("Larry Page", "Sergey Brin", "yes")
    (folder / "t.json").write_text(json.dumps(TRIVIA, indent=4))
    (folder / "triviaqa-train.json").write_text((folder / "t.json").read_text())
    packed = folder / "v1.0_nq-dev.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(FULL_NQ).encode() + b"\n"))
    flash = {"id": "train_0", "question": "who?", "golden_answers": ["Ann", "Anne"], "metadata": {}}
    return {
        "FlashRAG": (lines(folder / "nq" / "train.jsonl", flash), "nq", "nq-train-0", ("Ann", "Anne")),
        "HotpotQA": (one_list(folder / "hotpot_train_v1.1.json", HOTPOT), "hotpotqa", "hotpotqa-train-5a8b", ("Oslo",)),
        "HotpotQA (Hugging Face)": (parquet(folder / "validation-0.parquet", hub_hotpot), "hotpotqa", "hotpotqa-dev-5a8b", ("Oslo",)),
        "2WikiMultihopQA": (one_list(folder / "dev.json", TWO_WIKI), "2wiki", "2wiki-dev-13f5", ("Ulm",)),
        "MuSiQue": (
            lines(folder / "musique_ans_v1.0_train.jsonl", MUSIQUE),
            *("musique", "musique-train-2hop__1_2", ("Ann", "Anne")),
        ),
        "Natural Questions": (lines(folder / "simplified-nq-train.jsonl", SIMPLE_NQ), "nq", "nq-train-797803103760793766", nq_ids),
        "original": (packed, "nq", "nq-dev-5", ("so", "no")),
        "Natural Questions (Hugging Face)": (parquet(folder / "train-1.parquet", HUB_NQ), "nq", "nq-train-797", nq_ids),
        "question and answer": (
            lines(folder / "NQ-open.dev.jsonl", {"question": "when", "answer": ["1988", "in 1988"]}),
            *("nq", "nq-dev-", ("1988", "in 1988")),
        ),
        "question and answers": (
            parquet(folder / "nq-test.parquet", {"id": "s", "question": "when", "answers": {"text": ["1988"] * 2, "answer_start": [1, 9]}}),
            *("nq", "nq-test-s", ("1988",)),
        ),
        "TriviaQA": (folder / "triviaqa-train.json", "tq", "tq-train-tc_1", ("Sunset Bvd", "Sunset Blvd", "Sunset Boulevard")),
        "TriviaQA (Hugging Face)": (lines(folder / "tq_test.json", HUB_TRIVIA), "tq", "tq-test-tc_1", ("Sunset Bvd", "Sunset Blvd")),
        "PopQA": (parquet(folder / "test.parquet", POPQA), "popqa", "popqa-test-4222362", ("politician", "pol")),
    }


def test_every_published_layout_is_recognised_and_keeps_all_aliases_source_split_and_id(tmp_path: Path) -> None:
    for layout, (path, source, name, answers) in published(tmp_path).items():
        (count,) = convert([path], tmp_path / "out.parquet")
        assert count.problems == [] and layout in (count.layout, "original"), (layout, count)
        (prompt,) = read_prompts(tmp_path / "out.parquet")
        assert (prompt.source, prompt.answers) == (source, answers), layout
        assert prompt.id == name or (name.endswith("-") and prompt.id.startswith(name)), layout
        assert pq.read_table(tmp_path / "out.parquet")["extra_info"][0]["split"].as_py() == name.split("-")[1]
    assert check_file(tmp_path / "out.parquet").layout == "IGPO"


def test_aliases_of_2wiki_are_added_by_entity(tmp_path: Path) -> None:
    aliases = lines(tmp_path / "id_aliases.json", {"Q_id": "Q3012", "aliases": ["Ulm, Germany"], "demonyms": ["Ulmer"]})
    convert([one_list(tmp_path / "train.json", TWO_WIKI)], tmp_path / "o.parquet", aliases=aliases)
    assert read_prompts(tmp_path / "o.parquet")[0].answers == ("Ulm", "Ulm, Germany", "Ulmer")


def test_a_question_is_kept_once_and_ids_do_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = [{"question": text, "answer": "x"} for text in ("Who is it?", "who  is it", "Where", "held out?")]
    held_out = tmp_path / "test.parquet"
    convert([lines(tmp_path / "nq-test.jsonl", rows[3])], held_out)
    ids = []
    for ordered in (rows, rows[:1] + rows[:0:-1]):
        (count,) = convert([lines(tmp_path / "nq-train.jsonl", *ordered)], tmp_path / "o.parquet", exclude=[held_out])
        assert (count.written, count.repeated, count.excluded) == (2, 1, 1)
        ids.append({prompt.question: prompt.id for prompt in read_prompts(tmp_path / "o.parquet")})
    assert ids[0] == ids[1] and len(set(ids[0].values())) == 2


def test_records_without_a_short_answer_by_design_are_counted_and_left_out(tmp_path: Path) -> None:
    no_span = {**SIMPLE_NQ, "question_text": "other", "annotations": [{"short_answers": [], "yes_no_answer": "NONE"}]}
    (count,) = convert([lines(tmp_path / "nq-train.jsonl", SIMPLE_NQ, no_span)], tmp_path / "o.parquet")
    assert (count.written, count.without_answer) == (1, 1)
    unanswerable = {**MUSIQUE, "question": "other", "answerable": False}
    (count,) = convert([lines(tmp_path / "musique_full_train.jsonl", MUSIQUE, unanswerable)], tmp_path / "o.parquet")
    assert (count.written, count.without_answer) == (1, 1)


BAD = (
    {"id": "1", "question": " ", "golden_answers": ["a"]},
    "{broken",
    {"id": "2", "question": "q2", "golden_answers": []},
    {"id": "3", "question": "q3", "golden_answers": ["a<|answer_split|>b"]},
    {"id": "4", "question": "q4", "golden_answers": [4]},
    {"id": "5", "question": "q5 \ud800", "golden_answers": ["a"]},
    {"id": "6", "question": "good", "golden_answers": ["a"]},
)


def test_every_problem_has_row_and_column_and_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    path = lines(tmp_path / "nq" / "dev.jsonl", {"id": "0", "question": "q", "golden_answers": ["a"]}, *BAD)
    out = tmp_path / "out" / "o.parquet"
    with pytest.raises(Refused) as refused:
        convert([path], out)
    found = [str(problem) for problem in refused.value.args[1][0].problems]
    assert [line.partition(":")[0] for line in found] == [
        *("row 1, column question", "row 2", "row 3, column golden_answers", "row 4, column golden_answers"),
        *("row 5, column golden_answers", "row 6, column question"),
    ]
    assert "not JSON" in found[1] and "expected at least one" in found[2]
    assert "<|answer_split|>" in found[3] and "found the answer 4" in found[4]
    assert list(out.parent.iterdir()) == [], "neither the file nor a part of it"
    assert convert([path], out, skip_problems=True)[0].written == 2
    assert [prompt.question for prompt in read_prompts(out)] == ["q", "good"]


def test_what_concerns_a_whole_file_is_said_with_the_option_that_helps(tmp_path: Path) -> None:
    unknown = lines(tmp_path / "a" / "some.jsonl", {"question": "q", "answer": "a"})
    strange = lines(tmp_path / "nq-train.jsonl", {"prompt": "q", "label": "a"})
    empty = lines(tmp_path / "nq-dev.jsonl")
    with pytest.raises(Refused) as refused:
        convert([unknown, strange, empty, tmp_path / "gone.jsonl", lines(tmp_path / "x.csv", "a")], tmp_path / "o.parquet")
    said = [" ".join(problem.message for problem in count.problems) for count in refused.value.args[1]]
    assert "--source" in said[0] and "--split" in said[0]
    assert "found a record with prompt, label; expected the fields question and answer" in said[1]
    assert "no records" in said[2] and "no such file" in said[3] and "expected one that ends in .jsonl" in said[4]
    assert convert([unknown], tmp_path / "o.parquet", source="mine", split="train")[0].written == 1


def test_sets_and_splits_are_told_by_names_of_files_and_folders() -> None:
    names = ("data/hotpotqa/dev.jsonl", "x/NQ-open.efficientqa.dev.1.1.jsonl", "2wikimultihopqa/train.jsonl", "bamboogle/test.jsonl")
    assert [source_of(Path(name)) for name in names] == ["hotpotqa", "nq", "2wiki", "Bamboogle"]
    assert [split_of(Path(name)) for name in names] == ["dev", "dev", "train", "test"]
    assert split_of(Path("x/training.jsonl")) is None and source_of(Path("x/conquer.jsonl")) is None


def test_what_a_killed_run_left_is_removed_and_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path, part = tmp_path / "a.jsonl", tmp_path / f"a.jsonl.{socket.gethostname()}-{2**22 + 1}.part"  # no process has this number
    part.mkdir()
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(path) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with whole(path) as new:
        new.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_two_processes_write_at_once_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / "a"

    def inside(part: Path) -> Path:
        part.mkdir(exist_ok=True) if kind == "folder" else None
        return part / "file" if kind == "folder" else part

    with whole(path) as ours:
        inside(ours).write_text("ha")
        with monkeypatch.context() as other:
            other.setattr("os.getpid", os.getppid)
            with whole(path) as theirs:
                inside(theirs).write_text("theirs")
        assert inside(path).read_text() == "theirs"
        inside(ours).write_text("half")
    assert inside(path).read_text() == "half" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_another_process_writes_while_it_is_replaced_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace, moved = tmp_path / "a", Path.replace, []

    def then_another_writes(source: Path, target: Path) -> None:
        replace(source, target)
        if source == path and len(moved) < 2:
            moved.append(target)
            path.mkdir()
            (path / "file").write_text("theirs")

    monkeypatch.setattr(Path, "replace", then_another_writes)
    for text in ("old", "new"):
        with whole(path) as part:
            part.mkdir()
            (part / "file").write_text(text)
    assert len(moved) == 2 and (path / "file").read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/kept").write_text("mine")
    with pytest.raises(IsADirectoryError), whole(tmp_path / "data") as part:
        part.write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "kept"]


# ---- containers


def values(path: Path) -> list[Any]:
    return [str(record) if isinstance(record, Problem) else record for _, record in read_records(path)]


@pytest.mark.parametrize("chunk", [32, 2**16])
def test_a_list_is_read_record_by_record_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    rows = [{"text": "é" * size, "deep": [{"x": "]}, {"}]} for size in (0, 5, 200)]
    one_list(tmp_path / "a.json", *rows)
    assert values(tmp_path / "a.json") == rows
    (tmp_path / "b.json").write_text(json.dumps({"Data": rows, "Version": 1}, ensure_ascii=False), encoding="utf-8-sig")
    assert values(tmp_path / "b.json") == rows
    (tmp_path / "c.json").write_text(json.dumps(rows)[:-8])
    assert values(tmp_path / "c.json")[:-1] == rows[:2] and "cut off, in record 2" in values(tmp_path / "c.json")[-1]


def test_other_containers_and_their_damages(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": 'a "quoted" thing', "title": "A"}, {"id": "2", "text": "b", "title": "B"}]
    table = 'id\ttext\ttitle\n1\t"a ""quoted"" thing"\tA\n2\tb\tB\n'
    (tmp_path / "a.tsv").write_text(table)
    (tmp_path / "b.tsv").write_text(table.partition("\n")[2])
    (tmp_path / "c.tsv.gz").write_bytes(gzip.compress(table.encode()))
    assert values(tmp_path / "a.tsv") == values(tmp_path / "b.tsv") == values(tmp_path / "c.tsv.gz") == rows
    assert values(parquet(tmp_path / "d.parquet", *rows)) == rows
    (tmp_path / "e.tsv").write_text("id\ttext\ttitle\n1\ta\n")
    assert values(tmp_path / "e.tsv") == ["row 0: found 2 fields, expected 3 (id, text, title)"]
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(os.urandom(2000).hex().encode())[:-900])
    assert "truncated or damaged" in values(tmp_path / "f.jsonl.gz")[-1]
    (tmp_path / "g.parquet").write_bytes(b"PAR1 not")
    assert "not a parquet file" in values(tmp_path / "g.parquet")[0]
    assert values(lines(tmp_path / "h.jsonl", "[1]", '{"a": 1}')) == ["row 0: found a JSON list, expected an object", {"a": 1}]
    (tmp_path / "i.tsv").write_bytes(b"id\ttext\ttitle\n1\t\xff\tA\n")
    assert "not UTF-8" in values(tmp_path / "i.tsv")[0]


def test_memory_does_not_grow_with_a_file_and_progress_adds_up_to_its_size(tmp_path: Path) -> None:
    row = {"question": "q" * 100, "answer": "a" * 100}
    (tmp_path / "a.json").write_text(json.dumps([row] * 30_000))
    told: list[int] = []
    tracemalloc.start()
    assert sum(1 for _ in read_records(tmp_path / "a.json", told.append)) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(told) == (tmp_path / "a.json").stat().st_size > 6_000_000 and len(told) > 50
    assert peak < 1_500_000


# ---- corpora

PASSAGES = [
    Passage("1", "Oslo", "Oslo is the capital of Norway."),
    Passage("2", "Lima", "Lima, capital of Peru: the capital."),
    Passage("3", "", "Of the"),
    Passage("4", "Rice", "rice " * 50),
]


def test_an_index_built_in_small_blocks_scores_as_the_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bm25s

    monkeypatch.setattr(bm25_build, "PASSAGES", 2)
    monkeypatch.setattr(bm25_build, "BLOCK", 3)
    told: list[tuple[int, int]] = []
    assert build_index(iter(PASSAGES), tmp_path / "index", lambda done, total: told.append((done, total))) == 4
    kept, expected = bm25s.BM25.load(tmp_path / "index", mmap=True, show_progress=False), Bm25Index(PASSAGES)._scorer
    assert kept.scores["num_docs"] == 4 and told[-1][0] == told[-1][1] and len(told) > 2
    for word in ("capital", "oslo", "peru", "rice", "norway"):
        assert kept.get_scores([word]).tolist() == expected.get_scores([word]).tolist() and kept.get_scores([word]).max() > 0


def test_nothing_but_stopwords_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no words to search for"):
        build_index([PASSAGES[2]], tmp_path / "index")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["data", *[str(argument) for argument in arguments]])


def test_corpus_command_reads_every_form_and_puts_the_index_beside_the_corpus(tmp_path: Path) -> None:
    wiki = lines(tmp_path / "wiki.jsonl", {"id": 1, "contents": '"Oslo"\nOslo is the capital of Norway.'})
    (tmp_path / "psgs.tsv").write_text('id\ttext\ttitle\n2\t"Lima, capital of Peru: the capital."\tLima\n')
    table = parquet(tmp_path / "p.parquet", {"_id": "4", "title": "Rice", "text": "rice " * 50})
    out = tmp_path / "new" / "corpus.jsonl"
    result = run("corpus", wiki, tmp_path / "psgs.tsv", table, "--out", out)
    assert result.exit_code == 0, result.output
    assert list(read_corpus(out)) == [PASSAGES[0], PASSAGES[1], PASSAGES[3]]
    digest = Digest(*bm25_settings())
    assert len(list(digest.of(read_corpus(out)))) == 3
    assert sorted(str(path.relative_to(out.parent)) for path in out.parent.glob("*.index/*")) == [f"corpus.jsonl.index/bm25-{digest.hex}"]
    assert not list(tmp_path.rglob("*.part")) and "3 passages" in result.output


def test_corpus_command_names_every_problem_and_leaves_nothing(tmp_path: Path) -> None:
    rows = [{"id": "1", "contents": "fine"}, {"id": "2"}, {"contents": "x"}, {"id": True, "text": "x"}, {"id": "3", "text": ""}]
    bad = lines(tmp_path / "w.jsonl", *rows)
    out = tmp_path / "new" / "corpus.jsonl"
    result = run("corpus", bad, "--out", out)
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "4 problems" in said and not list(out.parent.iterdir())
    for words in ("row 1, column text: found the fields id", "row 2, column id", "row 3, column id: found True", "row 4, column text"):
        assert words in said and "w.jsonl: row" in said


def test_an_existing_folder_is_refused_as_a_file_to_write_before_anything_is_read(tmp_path: Path) -> None:
    for command in ("prepare", "corpus"):
        result = run(command, tmp_path / "absent", "--out", tmp_path)
        assert result.exit_code == 2 and "is a directory" in " ".join(result.output.replace("│", "").split())
        assert not list(tmp_path.iterdir())


def test_questions_command_shows_counts_and_refuses_in_one_sentence(tmp_path: Path) -> None:
    good = one_list(tmp_path / "hotpot_train_v1.1.json", HOTPOT)
    result = run("prepare", good, "--out", tmp_path / "o.parquet")
    assert result.exit_code == 0 and "HotpotQA layout, hotpotqa, train: 1 kept\n1 questions in" in result.output
    result = run("prepare", lines(tmp_path / "nq" / "dev.jsonl", *BAD), "--out", tmp_path / "p.parquet")
    assert result.exit_code == 2 and "6 problems" in result.output and "--skip-problems" in result.output
    assert not (tmp_path / "p.parquet").exists()
