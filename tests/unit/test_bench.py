"""What the benchmarks compute from their timings, and that their committed results are whole."""

import asyncio
import gc
import itertools
import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import typer
from transformers import Qwen2ForCausalLM
from typer.testing import CliRunner

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
sys.path.insert(0, str(BENCH))

import algorithms  # noqa: E402
import attempts  # noqa: E402
import head_kernel  # noqa: E402
from common import finish, interleaved, ratio  # noqa: E402
from head_kernel import _in_forward_vs_recompute, rules  # noqa: E402
from heads import Head, load_heads  # noqa: E402
from models import random_policy  # noqa: E402
from search import IN_FLIGHT, Barrier, refilled  # noqa: E402

from igpo_megatron.kernels.linear_logprob import FORMS, choose_form  # noqa: E402


def test_a_ratio_is_one_of_medians_and_its_interval_follows_the_spread():
    assert ratio([2.0] * 5, [1.0] * 5) == {"median": 2.0, "low": 2.0, "high": 2.0}
    noisy = ratio([2.0, 3.0, 2.0, 9.0, 2.0], [1.0, 1.0, 1.0, 1.0, 2.0])
    assert noisy["median"] == 2.0
    assert noisy["low"] < 2.0 < noisy["high"]


def test_providers_take_turns_and_the_warm_up_is_not_counted():
    calls: list[str] = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_of_a_random_policy_only_its_folder_is_left():
    """What stays on the device would count in every peak of memory."""

    def models() -> int:
        gc.collect()
        return sum(type(found) is Qwen2ForCausalLM for found in gc.get_objects())

    before = models()
    with random_policy("demo", layers=1) as folder:
        assert (folder / "config.json").is_file() and models() == before


def test_the_last_line_is_the_result_that_is_written(tmp_path, capsys):
    finish("some", {"figure": 1.5}, {"floor": 1.0}, ("numpy", "not-installed-anywhere"), tmp_path / "some.json")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "some.json").read_text())
    assert printed.keys() == {"name", "device", "figures", "floors", "versions"}
    assert printed["versions"].keys() == {"python", "numpy"}


def test_heads_that_are_timed_against_each_other_form_the_same_gradients():
    heads, _ = load_heads(cuda=False)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, 16, generator=generator).requires_grad_() for size in (37, 90))
    targets, upstream = torch.randint(0, 90, (37,), generator=generator), torch.randn(37, generator=generator)
    found = {}
    for name in ("eager", "ours_torch", "ours_in_forward"):
        hidden.grad = weight.grad = None
        heads[name].train(hidden, weight, targets, upstream)
        found[name] = (hidden.grad, weight.grad)
        for got, wanted in zip(found[name], found["eager"], strict=True):
            assert torch.allclose(got, wanted, atol=1e-5), name
    assert [heads[name].matmuls for name in found] == [4, 4, 3]


def test_forming_gradients_forward_is_compared_with_our_fastest_head_that_does_not():
    heads, _ = load_heads(cuda=False)
    heads["ours_slow"] = heads["ours_torch"]
    seconds = {"eager": [0.1], "ours_torch": [4.0], "ours_slow": [5.0], "ours_in_forward": [3.0]}
    assert _in_forward_vs_recompute(seconds, heads) == {"median": 0.75, "low": 0.75, "high": 0.75}
    del seconds["ours_in_forward"]
    assert _in_forward_vs_recompute(seconds, heads) is None


def test_a_refilled_loop_keeps_as_many_in_flight_until_the_last_end_that_counts():
    running, seen = 0, []

    async def one(job):
        nonlocal running
        running += 1
        await asyncio.sleep(0.001 * (job[0] % 7 + 1))
        seen.append(running)
        running -= 1

    seconds = asyncio.run(refilled(one, ((number, None) for number in itertools.count()), batches=2))
    assert set(seen[: 2 * IN_FLIGHT]) == {IN_FLIGHT} and len(seen) >= 3 * IN_FLIGHT and 0 < seconds < 0.1


def test_a_refilled_loop_ends_with_the_first_failure():
    async def one(job):
        await asyncio.sleep(0)
        if job[0] == 100:
            raise RuntimeError("job 100 failed")

    with pytest.raises(RuntimeError, match="job 100 failed"):
        asyncio.run(refilled(one, ((number, None) for number in itertools.count()), batches=2))


def test_the_barrier_opens_when_all_that_still_run_have_come():
    order = []

    async def trajectory(barrier, name, turns):
        for turn in range(turns):
            await asyncio.sleep(0.001 * (ord(name) - ord("a")))
            await barrier.meet()
            order.append((turn, name))
        barrier.leave()

    async def call():
        barrier = Barrier(3)
        await asyncio.gather(trajectory(barrier, "a", 3), trajectory(barrier, "b", 1), trajectory(barrier, "c", 2))

    asyncio.run(asyncio.wait_for(call(), 60))
    assert [turn for turn, _ in order] == [0, 0, 0, 1, 1, 2] and order[-1] == (2, "a")


@pytest.mark.parametrize("rows", ["8,abc", "0", "8,,64", "-5"])
def test_rows_that_are_no_numbers_are_refused_before_anything_is_timed(rows, tmp_path):
    with pytest.raises(typer.BadParameter, match="is not a number above 0, nor several with commas"):
        head_kernel.main(rows=rows, out=tmp_path / "out.json")


@pytest.mark.parametrize("words", [["--out", "."], ["--repeats", "0"]])
def test_options_that_would_fail_at_the_end_are_refused_at_the_beginning(words):
    app = typer.Typer()
    app.command()(head_kernel.main)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and f"Invalid value for '{words[0]}'" in result.output


def test_rules_of_the_form_table_follow_the_measured_winners():
    measured = {
        (8, 64, 1000): {"fused": 1.0, "chunks": 2.0},
        (128, 64, 1000): {"fused": 3.0, "chunks": 2.0},
        (512, 64, 1000): {"fused": 1.0, "chunks": 2.0},  # after a loss a win is noise
        (8, 128, 1000): {"fused": 3.0, "chunks": 2.0},
        (8, 256, 1000): {"fused": 1.0, "chunks": 2.0},
        (128, 256, 1000): {"fused": 1.0, "chunks": 2.0},
        (8, 512, 1000): {"fused": 1.0, "tma": 1.1, "chunks": 2.0},
        (64, 512, 1000): {"fused": 2.0, "tma": 1.1, "chunks": 2.0},
        (64, 512, 2000): {"fused": 2.0, "tma": 2.2, "chunks": 2.0},  # nearest to the best at both
        (512, 512, 1000): {"fused": 2.0, "chunks": 1.9},  # tma failed
    }
    table = {"default": {"rules": rules(measured)}}
    assert table["default"]["rules"][-1].keys() == {"form"}
    chosen = {size: choose_form("any", *size, table) for size in measured}
    assert chosen == {
        (8, 64, 1000): "fused",
        (128, 64, 1000): "chunks",
        (512, 64, 1000): "chunks",
        (8, 128, 1000): "chunks",
        (8, 256, 1000): "fused",
        (128, 256, 1000): "fused",
        (8, 512, 1000): "fused",
        (64, 512, 1000): "tma",
        (64, 512, 2000): "tma",
        (512, 512, 1000): "chunks",
    }


def tiny_head_kernel(monkeypatch, heads: dict[str, Head]) -> None:
    """The benchmark with these heads, on one tiny shape."""
    monkeypatch.setattr(head_kernel, "load_heads", lambda cuda: (heads, {}))
    monkeypatch.setattr(head_kernel, "CPU_SHAPES", {"tiny": (16, 90)})
    for name in ("matmul_tflops", "copy_gb_per_s"):
        monkeypatch.setattr(head_kernel, name, lambda cuda: 1.0)


@pytest.mark.parametrize(("seconds", "fails_from", "written"), [(60, 100, True), (0, 100, False), (60, 64, False)])
def test_the_form_table_is_written_once_our_forms_were_timed_in_every_case(tmp_path, monkeypatch, capsys, seconds, fails_from, written):
    """A table from a few sizes would decide about all."""
    right, table = load_heads(cuda=False)[0]["ours_torch"], tmp_path / "head_forms.json"

    def fails(hidden, weight, targets):
        if len(targets) >= fails_from:
            raise torch.OutOfMemoryError
        return right.logprobs(hidden, weight, targets)

    tiny_head_kernel(monkeypatch, {"ours_chunks": Head(fails), "eager": right})
    monkeypatch.setattr(head_kernel, "FORM_TABLE", table)
    table.write_text('{"default": {}}')
    head_kernel.main(rows="8,64", repeats=1, seconds=seconds, uncompiled=False, write_table=True, out=tmp_path / "result.json")
    rules_of = {name: entry.get("rules") for name, entry in json.loads(table.read_text()).items()}
    assert rules_of == {"default": None, **({"cpu": [{"form": "chunks"}]} if written else {})}
    assert written or "of 2 cases" in capsys.readouterr().err


def test_a_head_that_fails_costs_only_its_own_times_and_a_case_is_written_when_it_ends(tmp_path, monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("no room")

    right, result, seen = load_heads(cuda=False)[0]["ours_torch"], tmp_path / "head_kernel.json", []

    def wrong_at_last(hidden, weight, targets):
        seen.append(result.is_file() and len(json.loads(result.read_text())["figures"]["by_shape"]))
        return right.logprobs(hidden, weight, targets) + (len(targets) > 8)

    heads = {"ours_a": Head(wrong_at_last), "ours_b": Head(full), "peer": Head(right.logprobs, carrier=full), "eager": right}
    tiny_head_kernel(monkeypatch, heads)
    head_kernel.main(rows="8,64", repeats=1, seconds=60, uncompiled=False, write_table=False, out=result)
    figures = json.loads(result.read_text())["figures"]
    timed, untimed = figures["by_shape"]["tiny, N=8"], figures["by_shape"]["tiny, N=64"]
    assert (timed["forward"]["seconds"].keys(), timed["forward_backward"]["seconds"].keys()) == ({"ours_a", "eager"}, {"ours_a", "eager"})
    assert untimed == {} and "off by 1 nats" in figures["not_loaded"]["ours_a at N=64, H=16"]
    assert {name.split()[0] for name, why in figures["not_loaded"].items() if why == "OutOfMemoryError: no room"} == {"ours_b", "peer"}
    assert seen[0] is False and seen[-1] == 1


def test_a_form_that_fails_hangs_or_ends_its_process_is_found_out_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(head_kernel, "ANSWER_S", 5.0)
    names = ["good", "fails", "crashes", "as good", "hangs", "best"]
    assert head_kernel.unfit(names, attempts.as_named) == {
        "fails": "it failed",
        "crashes": "ended the process that tried it, exit code 3",
        "hangs": "hung for 5 s in a process of its own",
    }
    assert head_kernel.unfit(names, attempts.not_at_all) == {}  # nothing was learnt


def test_every_form_is_tried_at_every_size(monkeypatch):
    seen, connection = [], Mock()

    def head(hidden, weight, targets, **options):
        seen.append((options["form"], *hidden.shape))
        if options["form"] == "tma":
            raise RuntimeError("no")

    for name in ("init", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(head_kernel, "linear_logprob", head)
    monkeypatch.setattr(head_kernel, "SHAPES", {"a": (16, 90), "b": (8, 80)})
    head_kernel.try_forms(connection, FORMS, counts=(8, 64), device="cpu")
    assert seen == [("fused", 8, 16), ("fused", 64, 16), ("fused", 8, 8), ("fused", 64, 8), ("tma", 8, 16)]
    assert [call.args for call in connection.send.call_args_list] == [(None,), (None,), ("RuntimeError: no",)]


def test_an_unfit_form_is_not_timed_and_the_result_says_why(tmp_path, monkeypatch):
    right, result = load_heads(cuda=False)[0]["ours_torch"], tmp_path / "head_kernel.json"
    tiny_head_kernel(monkeypatch, {"ours_chunks": right, "ours_tma": right})
    monkeypatch.setattr(head_kernel, "unfit", lambda names, attempt: {"tma": "hung"})
    head_kernel.main(rows="8", repeats=1, seconds=60, uncompiled=False, write_table=False, out=result)
    figures = json.loads(result.read_text())["figures"]
    assert figures["by_shape"]["tiny, N=8"]["forward"]["seconds"].keys() == {"ours_chunks"}
    assert figures["not_loaded"] == {"ours_tma": "hung"}


@pytest.mark.parametrize("path", sorted((BENCH / "results").glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_committed_result_is_whole_and_has_its_script(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result.keys() == {"name", "device", "figures", "floors", "versions"}
    assert result["name"] == path.stem
    assert any((folder / f"{path.stem}.py").is_file() for folder in (BENCH, BENCH.parent))
    assert re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-") == path.parent.name


def test_every_result_that_the_documents_name_is_there():
    root = BENCH.parents[1]
    text = "".join(path.read_text(encoding="utf-8") for path in (root / "README.md", *(root / "docs").glob("*.md")))
    named = re.findall(r"tools/bench/results/[a-z0-9_/.]+\.json", text)
    assert named and [path for path in named if not (root / path).is_file()] == []


def test_the_stated_bounds_hold_in_the_committed_results_of_the_cpu():
    def figures(name: str):
        return json.loads((BENCH / "results" / "cpu" / f"{name}.json").read_text(encoding="utf-8"))["figures"]

    probes, engine = figures("probe_cost"), figures("vllm_score")
    assert probes["fold_overhead"]["median"] <= 0.30
    assert probes["fold_vs_sequential"] >= 4
    assert engine["cached_vs_uncached_800"]["median"] >= 4
    assert engine["invalid_rows_accepted"] == 0
    tree = figures("tree_training")
    assert tree["speedup"] >= 1.2 and tree["token_ratio"] >= 1.2 and tree["max_grad_diff"] <= 1e-5
    conversion = figures("convert")
    assert conversion["checkpoint_gb"] >= 4 and conversion["copy_ratio"]["median"] >= 0.6 and conversion["tensors_that_differ"] == 0
    assert conversion["peak_rss_mb"] <= conversion["rss_bound_mb"]
    engines = figures("engines")
    assert engines["start_s"]["vllm"] >= 10 * engines["start_s"]["torch"] and engines["torch_over_vllm"]["median"] >= 0.8
    plan = figures("plan")
    assert plan["largest_memory_error"] <= 0.10 and plan["median_time_error"] <= 0.25 and plan["ranked_right"] == plan["ranked_pairs"]
    soak = figures("soak")
    assert len(soak["hosts_2"]["kills"]) >= 20 and soak["hosts_3"]["kills"]
    for trial in soak.values():
        assert trial["finished"] and trial["lost"] == trial["repeated"] == trial["left_behind"] == []
    ahead = figures("async")
    assert ahead["speedup_staleness_1"] >= 1.5
    exact, stale = ahead["staleness_0"], ahead["staleness_1"]
    assert abs(exact["f1_sampled"] - stale["f1_sampled"]) <= 2 * (exact["f1_sampled_se"] ** 2 + stale["f1_sampled_se"] ** 2) ** 0.5


def test_ranks_receive_and_hold_their_own_rows_alone_in_the_committed_result():
    """What rank 1 receives and holds grows with its share of the batch; before it grew with the batch, and faster."""
    result = json.loads((BENCH / "results" / "cpu" / "rows_travel.json").read_text(encoding="utf-8"))
    before, after, share = result["figures"]["before"], result["figures"]["after"], result["floors"]["rows_mib"]
    assert share.keys() == {"2_ranks", "4_ranks"} and share["2_ranks"].keys() == {"1", "4", "16"}

    def growth(found: dict, of: str) -> float:
        return found["16"][of] - found["1"][of]

    for ranks, sizes in share.items():
        for size, mib in sizes.items():
            assert after[ranks][size]["groups_mib"] == 0 < before[ranks][size]["groups_mib"]
            assert after[ranks][size]["rows_mib"] == pytest.approx(mib, abs=0.01)
            assert before[ranks][size]["rows_mib"] == pytest.approx(mib * int(ranks[0]), rel=0.01), "all rows, on every rank"
        # A row is sent twice, to be scored and to be trained, each time as few bytes.
        assert 0 < growth(after[ranks], "received_mib") <= 0.25 * (sizes["16"] - sizes["1"])
        assert growth(before[ranks], "received_mib") >= 20 * growth(after[ranks], "received_mib")
        assert growth(before[ranks], "highest_mib") >= 5 * growth(after[ranks], "highest_mib")
    half = growth(after["4_ranks"], "received_mib") / growth(after["2_ranks"], "received_mib")
    assert half == pytest.approx(0.5, abs=0.02), "half the share on twice the ranks"


def test_the_stated_bounds_hold_in_the_committed_result_of_search():
    figures = json.loads((BENCH / "results" / "cpu" / "search.json").read_text(encoding="utf-8"))["figures"]
    assert figures["passages"] >= 100_000 and figures["in_flight"] == 64 and figures["batches_per_turn"] >= 4
    assert figures["agent_loop_vs_barrier"]["low"] >= 2
    assert figures["retriever_vs_plain"]["128"]["median"] >= 1.5 and figures["p95_plain_vs_retriever"]["128"]["median"] >= 1


def curve(*points):
    """(tool calls, generated tokens, F1) of every evaluation."""
    keys = ("tool_calls", "generated_tokens", "f1_sampled", "f1_greedy")
    return [{"step": step, **dict(zip(keys, (*point, point[-1]), strict=True))} for step, point in enumerate(points)]


def test_algorithms_are_compared_where_they_have_spent_the_same():
    """At 150 calls the first seed is half way from 0.4 to 0.6, the second a quarter of the way from 0.2 to 1.8: 0.5 and 0.6."""
    seeds = [curve((0, 0, 0.0), (100, 10, 0.4), (200, 40, 0.6)), curve((0, 0, 0.2), (600, 40, 1.8))]
    figures = algorithms.at_budgets(seeds, {"tool_calls": 150, "generated_tokens": 20})
    assert figures["f1_sampled_at_tool_calls"] == pytest.approx((0.5 + 0.6) / 2)
    assert figures["f1_sampled_at_tool_calls_se"] == pytest.approx(0.05)
    assert figures["f1_greedy_at_generated_tokens"] == pytest.approx(((0.4 + 0.2 / 3) + 1.0) / 2)
    with pytest.raises(ValueError, match="beyond a cell that spent 200"):
        algorithms.value_at(seeds[0], "tool_calls", 201, "f1_greedy")


def test_a_cell_is_kept_and_refused_for_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms, "CELLS", tmp_path)
    cell = {"algorithm": "igpo", "seed": 0, "steps": 40, "every": 10, "curve": curve((0, 0, 0.1))}
    (tmp_path / "igpo_0.json").write_text(json.dumps(cell), encoding="utf-8")
    assert algorithms.run_cell("igpo", 0, 40, 10) == cell
    with pytest.raises(ValueError, match=r"holds a cell of .*'steps': 40.*expected .*'steps': 20"):
        algorithms.run_cell("igpo", 0, 20, 10)


def test_an_algorithm_runs_by_its_own_file_or_as_a_name_on_the_demos(tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms, "QUICKSTART", tmp_path)
    assert algorithms.config_of("igpo_loo") == (tmp_path / "igpo.yaml", ["advantage.name=igpo_loo"])
    assert algorithms.config_of("grpo") == (tmp_path / "igpo.yaml", ["advantage.name=grpo", "reward.gain=none"])
    (tmp_path / "arpo.yaml").touch()
    assert algorithms.config_of("arpo") == (tmp_path / "arpo.yaml", [])


def test_what_a_run_has_spent_is_summed_over_its_steps():
    rows = [{"step": 0}, {"step": 1, "generated_tokens": 5.0, "tool_calls": 2.0}, {"step": 2, "generated_tokens": 7.0, "tool_calls": 1.0}]
    assert algorithms.spent_until(rows, 1) == (5, 2)
    assert algorithms.spent_until(rows, 2) == (12, 3)
