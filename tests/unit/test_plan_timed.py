"""FLOPs against torch's counter and against counted parameters; the planner corrected by timed passes, and never below the floor."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "gpu"))

import checks
import step

import scaling_study
from checkpoint_conversion.architectures import shape_of
from igpo_megatron.cli import app
from igpo_megatron.config.load import load
from igpo_megatron.plan import machines
from igpo_megatron.plan.command import plan_run
from igpo_megatron.plan.flops import model_flops
from igpo_megatron.plan.machines import gpu
from igpo_megatron.plan.model_shape import KNOWN, find_shape
from igpo_megatron.plan.parts import active_parameters, count_parts
from igpo_megatron.plan.search import Plan, plan_config, search
from igpo_megatron.plan.timed import Timed, corrected, modelled
from igpo_megatron.plan.train_time import pass_time, update_time
from igpo_megatron.plan.types import Layout, Row, Settings, Workload
from igpo_megatron.plan.workload import shares_of
from igpo_megatron.policy import policy

ROOT = Path(__file__).resolve().parents[2]
MEASURED = replace(gpu("h100"), name="NVIDIA H100 80GB HBM3", source="measured on NVIDIA H100 80GB HBM3, 2026-12-01")
H100_PEAK = 989e12
SMALL = Workload(prompts=8, samples=4, max_context=8192)
ROWS = (Row(4096, 3e6, 1200), Row(2048, 1e6, 600))


def timed(direction="train", model="Qwen2.5-1.5B", recompute="none", factor=1.0, rows=ROWS):
    """A pass that takes `factor` times what is modelled."""
    one = Timed(direction, find_shape(model)[1], recompute, rows, 2, 1.0)
    return replace(one, seconds=factor * modelled(one, MEASURED))


def result_of(passes, machine=MEASURED) -> dict:
    """The result of tools/bench/step.py with these passes of Qwen2.5-1.5B."""
    entries = [
        {
            "direction": one.direction,
            "model": "m",
            "recompute": one.recompute,
            "rows": [asdict(row) for row in one.rows],
            "dtype_bytes": 2,
            "seconds": one.seconds,
        }
        for one in passes
    ]
    return {"name": "step", "figures": {"machine": asdict(machine), "models": {"m": KNOWN["Qwen2.5-1.5B"]}, "passes": entries}}


def write(folder: Path, result: object) -> Path:
    path = folder / "step.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def test_flops_are_those_that_torch_counts_in_a_dense_model():
    config = Qwen2Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=101
    )
    config._attn_implementation = "eager"  # which computes all pairs of a row
    model = Qwen2ForCausalLM(config)
    tokens = torch.randint(0, 101, (1, 37))
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    shape, row = shape_of(config.to_dict()), Row(37, 37 * 37, 37)
    assert model_flops(shape, row, backward=False) == forward.get_total_flops()
    assert model_flops(shape, row, backward=True) == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-30B-A3B", "Mixtral-8x7B"])
def test_without_attention_a_trained_token_costs_six_flops_per_active_weight(name):
    shape = find_shape(name)[1]
    embedding = 0 if shape.tied else count_parts(shape, 1, 1).embedding  # a look-up; where the two are tied, it is the head
    weights = active_parameters(shape) - embedding
    assert model_flops(shape, Row(1000, 0, 1000), backward=True) == pytest.approx(6000 * weights, rel=1e-3)  # norms, biases, padding


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-72B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_no_prediction_is_faster_than_the_data_sheet_allows(model, factor):
    """Also where passes of another shape have made the planner an optimist."""
    shape = find_shape(model)[1]
    machine = replace(gpu("h100"), score_factor=factor, train_factor=factor)
    for tensor, data in ((1, 1), (4, 1), (2, 4)):
        layout = Layout(tensor=tensor, data=data, stages=(shape.num_layers,), sequence=tensor > 1)
        for row in (Row(4096, 3e6, 1200), Row(32768, 5e8, 9000), Row(32768, 5e8, 32768)):
            for backward in (False, True):
                floor = data * 3 * model_flops(shape, row, backward=backward) / layout.ranks / H100_PEAK
                seconds = pass_time(shape, layout, Settings(), machine, [[row] * 3] * data, backward=backward)
                assert floor <= seconds
                if factor == 1 and tensor == 1 and model != "Qwen2.5-0.5B":  # whose calls are small
                    assert seconds < 6 * floor  # a bound far from every prediction would hold nothing


def test_passes_that_take_longer_than_modelled_make_predictions_as_much_longer():
    passes = [timed(direction, recompute=how, factor=1.3) for direction in ("score", "train") for how in ("none", "full")]
    machine = corrected(MEASURED, passes)
    assert (machine.score_factor, machine.train_factor) == pytest.approx((1.3, 1.3))
    shape, layout, other = find_shape("Qwen2.5-7B")[1], Layout(stages=(28,)), [[Row(8192, 2e7, 4000)]]
    for backward in (False, True):
        plain, now = (pass_time(shape, layout, Settings(), one, other, backward=backward) for one in (MEASURED, machine))
        assert now == pytest.approx(1.3 * plain)
    parts = count_parts(shape, 1, 1)
    assert update_time(parts, layout, Settings(), machine, 2) == pytest.approx(1.3 * update_time(parts, layout, Settings(), MEASURED, 2))


def test_each_direction_has_the_median_of_its_own_passes_and_one_that_was_not_timed_stays():
    machine = corrected(MEASURED, [timed(factor=factor) for factor in (1.1, 1.5, 4.0)])
    assert (machine.score_factor, machine.train_factor) == pytest.approx((1.0, 1.5))
    assert machine.source.endswith("by timed passes: score not timed, train x1.50 (1.10 to 4.00, 3 passes)")
    assert corrected(machine, [timed(factor=1.2)]).train_factor == pytest.approx(1.2)  # anew, not on top


def test_what_ranks_exchange_is_not_corrected():
    shape, row = find_shape("Qwen2.5-7B")[1], [[Row(8192, 2e7, 4000)]]
    layout = Layout(tensor=4, stages=(28,), sequence=True)
    alone, linked = (replace(MEASURED, link=link, link_latency=0.0) for link in (1e30, 1e9))
    exchange = [
        pass_time(shape, layout, Settings(), replace(linked, train_factor=factor), row, backward=True)
        - pass_time(shape, layout, Settings(), replace(alone, train_factor=factor), row, backward=True)
        for factor in (1.0, 2.0)
    ]
    assert exchange[0] > 0.1 and exchange[1] == pytest.approx(exchange[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"seconds": "soon"}, "could not convert"),
        ({"seconds": -1.0}, "expected positive seconds, found -1.0"),
        ({"seconds": float("nan")}, "expected positive seconds, found nan"),
        ({"seconds": 1e-5}, "TFLOP/s, the fastest matmul"),
        ({"seconds": 1e6}, "times as long as modelled; is it the same machine?"),
        ({"direction": "sideways"}, "unknown direction 'sideways'"),
        ({"rows": []}, "expected rows"),
        ({"rows": [{"tokens": 4096, "pairs": 1e6, "targets": 9, "gathered": float("nan")}]}, "expected rows"),
        ({"dtype_bytes": 0}, "expected dtype_bytes 2 or 4, found 0"),
        ({"rows": [{"tokens": 5}]}, "missing 2 required positional arguments"),
        ({"model": "other"}, "'other'"),
    ],
)
def test_a_result_with_an_impossible_pass_is_refused(change, problem, tmp_path):
    result = result_of([timed()])
    result["figures"]["passes"][0] |= change
    with pytest.raises(machines.UserError, match=r"no result of tools/bench/step\.py") as caught:
        machines.read(write(tmp_path, result))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"stream": 0.0}, "expected positive numbers for stream"),
        ({"matmul": []}, "expected positive numbers for matmul"),
        ({"crowd": float("nan")}, "expected positive numbers for crowd"),
        ({"decode_call": -3e-3}, "expected positive numbers for decode_call"),
        ({"ranks_per_node": 0}, "expected positive numbers for ranks_per_node"),
        ({"cores": 0}, "expected positive numbers for cores"),
        ({"memory": 10**400}, "too large"),
        ({"device": "rocm"}, "expected device cuda or cpu, found 'rocm'"),
        ({"wheels": 4}, "keys"),
    ],
)
def test_a_result_without_a_usable_machine_is_refused(change, problem, tmp_path):
    result = result_of([timed()])
    result["figures"]["machine"] |= change
    with pytest.raises(machines.UserError, match=problem):
        machines.read(write(tmp_path, result))


def test_a_calibration_from_before_there_were_factors_is_read(tmp_path):
    values = {name: value for name, value in asdict(MEASURED).items() if not name.endswith("_factor")}
    assert machines.read(write(tmp_path, values)) == MEASURED


def test_one_result_of_the_benchmark_calibrates_and_table_file_and_page_say_so(tmp_path):
    path = write(tmp_path, result_of([timed("score", factor=1.2), timed(factor=1.6)]))
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    assert plan_run("Qwen2.5-1.5B", 2, calibration=path, out=tmp_path / "run.yaml", workload=SMALL, console=console) == 0
    plan = search(Plan("Qwen2.5-1.5B", find_shape("Qwen2.5-1.5B")[1], machines.read(path), SMALL, Settings(), 2))
    facts = scaling_study.provenance(plan, measured_lengths=False, measured_latency=False)
    point = scaling_study.point(plan, 1, 0, 6)
    page = scaling_study.page("Qwen2.5-1.5B", plan, [scaling_study.as_row(point, point)], facts)
    for text in (console.export_text(), (tmp_path / "run.yaml").read_text(), page):
        assert "measured on NVIDIA H100 80GB HBM3, 2026-12-01; modelled times corrected by timed passes: score x1.20" in text
        assert "data sheet" not in text
    assert plan_run("Qwen2.5-1.5B", 2, workload=SMALL, out=tmp_path / "sheet.yaml", console=Console(quiet=True)) == 0
    assert "Machine: modelled from the data sheet" in (tmp_path / "sheet.yaml").read_text()


def test_a_single_gpu_says_what_it_could_not_measure(monkeypatch):
    from igpo_megatron.plan import calibrate

    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_name=lambda: "NVIDIA H100 80GB HBM3",
        get_device_properties=lambda index: SimpleNamespace(total_memory=85e9),
    )
    monkeypatch.setattr(calibrate.torch, "cuda", fake)
    for name in ("_attention", "_stream", "_call"):
        monkeypatch.setattr(calibrate, name, lambda device, dtype: 1e12)
    monkeypatch.setattr(calibrate, "_matmul", lambda shape, device, dtype: (1e9, 7e14))
    machine = calibrate.calibrate()
    assert machine.source.startswith("measured on NVIDIA H100 80GB HBM3, 20")
    assert machine.source.endswith("; not measured but an H100's: decode_call, host_link, network, link")
    assert machine.link == gpu("h100").link


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H20", 148),
        ("NVIDIA H100 PCIe", None),
        ("cpu (x86_64, 2 cores)", None),
    ],
)
def test_the_data_sheet_is_found_by_the_name_that_cuda_gives(device, tflops):
    assert machines.sheet_flops(device) == (tflops and tflops * 1e12)


def test_the_committed_result_of_this_kind_of_machine_calibrates_the_planner():
    path = ROOT / "tools/bench/results/cpu/step.json"
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    machine = machines.read(path)
    assert machine.source.startswith("measured on cpu (")
    assert machine.train_factor == pytest.approx(figures["planner"]["train"]["factor"], abs=1e-3)
    assert {(row["recompute"], row["row_tokens"]) for row in figures["table"] if 0 < row["train_mfu"] < 1} == {
        (recompute, tokens) for recompute in ("none", "selective", "full") for tokens in step.ROWS["cpu"]
    }


def test_what_finds_no_memory_or_no_time_is_a_row_that_says_so():
    def full():
        raise torch.OutOfMemoryError

    late, large, fine = (step.Case("m", "none", 512) for _ in range(3))
    assert step.attempt([late], deadline=0.0, call=lambda: 1) is None
    assert step.attempt([large], deadline=float("inf"), call=full) is None
    assert step.attempt([fine], deadline=float("inf"), call=lambda: 1) == 1
    assert [case.left_out for case in (late, large, fine)] == ["the time was over", "out of memory", ""]
    fine.rows, fine.seconds, fine.peak = [Row(4096, 8e6, 1024)], {"train": 0.5, "update": 0.1, "score": 0.1}, 2 * 2**30
    large.model = "n"
    table = [step.table_row(case, KNOWN["Qwen2.5-0.5B"], MEASURED, H100_PEAK) for case in (late, large, fine)]
    assert table[1] == {"model": "n", "recompute": "none", "row_tokens": 512, "left_out": "out of memory"}
    # 24 layers of 14.9 M weights, and a head of 896 x 151,936 on a quarter of the tokens; 896 wide queries
    flops = 6 * 4096 * 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864) + 6 * 1024 * 896 * 151936 + 12 * 24 * 896 * 8e6
    assert table[2]["train_tokens_per_s"] == 8192 and table[2]["train_mfu_of_sheet"] == round(flops / 0.5 / H100_PEAK, 4)
    assert table[2]["train_mfu"] == round(flops / 0.5 / (0.6 * H100_PEAK), 4) and table[2]["peak_gib"] == 2
    said = step.headline(table, MEASURED)
    assert said.startswith("m trains 8,192 tokens/s, MFU ") and "; n out of memory; ceiling 593 TFLOP/s" in said


def test_settings_measured_before_a_kill_are_in_the_result_which_calibrates(tmp_path, monkeypatch):
    one = timed(factor=1.5)

    def measure(config, ranks, cases, *limits):
        if config.model.recompute == "full":
            raise KeyboardInterrupt
        for case in cases:
            case.rows, case.seconds = list(one.rows), {"train": one.seconds, "update": 0.1}

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "calibrate", lambda links: MEASURED)
    monkeypatch.setattr(step, "random_policy", lambda name, depth: nullcontext("folder"))
    monkeypatch.setattr(step, "hf_config", lambda name, depth: KNOWN["Qwen2.5-1.5B"])
    monkeypatch.setattr(step.parallel, "init", lambda config: None)
    with pytest.raises(KeyboardInterrupt):
        step.main("demo", None, False, 1, 60, tmp_path / "step.json")
    figures = json.loads((tmp_path / "step.json").read_text())["figures"]
    assert [row["recompute"] for row in figures["table"]] == ["none", "none", "selective", "selective"]
    assert len(figures["passes"]) == 4 and machines.read(tmp_path / "step.json").train_factor > 1


def test_on_a_gpu_every_shape_is_timed_on_its_longest_rows_in_the_time_that_its_part_has(monkeypatch):
    """If a length takes 8.5 s to compile, with a gradient and without, as is reckoned with elsewhere."""
    (words,) = [part.on_gpu.split() for part in checks.PARTS if part.name == "step"]
    shapes, seconds = words[words.index("--shape") + 1], float(words[words.index("--seconds") + 1])
    now, compiled, found = [0.0], set(), []

    def takes(seconds, result=None):
        now[0] += seconds
        return result

    def run_both(passes):
        key = (place["model"], place["row_tokens"])
        return takes(1 if key in compiled else compiled.add(key) or 8.5, True)

    place = {}
    monkeypatch.setattr(step, "time", SimpleNamespace(monotonic=lambda: now[0], process_time=None))
    monkeypatch.setattr(step, "calibrate", lambda links: takes(4, MEASURED))
    monkeypatch.setattr(step, "random_policy", lambda name, depth: takes(4, nullcontext(place.setdefault("folder", name))))
    monkeypatch.setattr(step, "hf_config", lambda name, depth: place.update(model=name) or KNOWN["Qwen2.5-1.5B"])
    monkeypatch.setattr(step.parallel, "init", lambda config: None)
    monkeypatch.setattr(step.parallel, "shutdown", lambda: None)
    monkeypatch.setattr(policy, "Policy", lambda *_: takes(5, SimpleNamespace(shape=SimpleNamespace(vocab_size=9), log_probs=len)))
    monkeypatch.setattr(step, "packed", lambda tokens, *_: place.update(row_tokens=tokens) or ((), None))
    monkeypatch.setattr(step, "free", lambda: None)
    monkeypatch.setattr(step, "each", run_both)
    monkeypatch.setattr(step, "peak_of", lambda *_: takes(0.5, 1.0))
    monkeypatch.setattr(step, "interleaved", lambda calls, repeats, **_: takes(repeats, {name: [1.0] * repeats for name in calls}))
    monkeypatch.setattr(step, "figures_of", lambda cases, *_: found.append(list(cases)) or {})
    monkeypatch.setattr(step, "write", lambda *_: None)
    monkeypatch.setattr(step, "planner_errors", lambda *_: {})
    monkeypatch.setitem(step.ROWS, "cpu", step.ROWS["cuda"])
    step.main(shapes, None, False, 5, seconds, None)
    assert {(case.model.split()[0], case.row_tokens) for case in found[-1] if case.seconds} >= {
        (name, 16384) for name in ("0.5B", "1.5B", "7B")
    }
    assert now[0] < seconds + 15


def test_passes_that_no_factor_corrects_are_a_result_all_the_same():
    figures = result_of([timed(factor=50.0)])["figures"]
    found = step.planner_errors(MEASURED, figures)
    assert found == {"refused": "passes (train) take 50 times as long as modelled; is it the same machine?"}


def test_a_steps_rows_are_trees_that_fill_their_length():
    rows, counts = step.packed(512, 2048, 656)
    assert [row.num_tokens for row in rows] == [512] * 4
    shaped = [step.row_shape(row) for row in rows]
    assert shaped[0].pairs < 512 * 513 / 2 and sum(row.targets for row in shaped) == counts.trained_tokens


def test_search_r1_as_skyrl_timed_it_is_predicted_as_its_file_says():
    path = ROOT / "examples/bench/search_r1_7b_8xh100.yaml"
    text = path.read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if "igpo plan --run" in line).split()[2:]
    command[command.index("--run") + 1] = str(path)
    result = CliRunner().invoke(app, command)
    output = " ".join(result.output.split())
    assert result.exit_code == 0 and "8 ranks train (DP8, recompute full, rows of 8192), 2560 trajectories of 999 tokens" in output
    predicted = output[output.index("forward (old and reference") :].split(":")[0]
    assert predicted in " ".join(text.replace("#", "").split())
    forward, training = (float(words.split()[-2]) for words in predicted.split(","))
    assert skyrl_row("policy training") == [93, training, *floor_and_at_their_share(93, 1, backward=True)]
    assert skyrl_row("forward") == [46, forward, *floor_and_at_their_share(46, 2, backward=False)]


def skyrl_row(name: str) -> list[float]:
    """Numbers of a row of the planner's page: SkyRL's seconds, ours as predicted, the floor, ours at SkyRL's share of the peak."""
    (row,) = [line for line in (ROOT / "docs/planner.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name}")]
    return [float(cell.split()[0]) for cell in row.strip("|").split("|")[1:]]


def floor_and_at_their_share(seconds: float, passes: int, *, backward: bool) -> list[float]:
    """Of Search-R1's step on 8 H100s at their peak; theirs is 6 N or 2 N per token of 2,560 trajectories of 999 tokens."""
    name, shape = find_shape("Qwen2.5-7B")
    lengths = Workload(prompt_tokens=180, turns=2.65, turn_tokens=130, observation_tokens=430)
    plan = plan_config(load(ROOT / "examples/bench/search_r1_7b_8xh100.yaml"), name, shape, gpu("h100"), lengths)
    rows = [row for share in shares_of(plan.workload, 8192, 8, 1) for row in share]
    floor = passes * sum(model_flops(shape, row, backward=backward) for row in rows) / 8 / H100_PEAK
    theirs = passes * (6 if backward else 2) * active_parameters(shape) * 2560 * 999 / 8 / H100_PEAK
    return [round(floor, 1), round(floor / (theirs / seconds))]


def test_a_configuration_pays_for_each_of_its_optimizer_steps():
    name, shape = find_shape("Qwen2.5-7B")
    once, twice = (
        plan_config(load(ROOT / "examples/bench/search_r1_7b_8xh100.yaml", [f"optim.minibatches={n}"]), name, shape, gpu("h100"), SMALL)
        for n in (1, 2)
    )
    assert twice.settings.minibatches == 2 and twice.workload.trajectories == 2560 and twice.gpus == 8
    (one,), (two,) = once.fits, twice.fits
    rows = len(shares_of(once.workload, 8192, 8, 1)[0])
    parts = count_parts(shape, 1, 1)
    assert two.train["update"] == pytest.approx(2 * update_time(parts, two.layout, twice.settings, gpu("h100"), -(-rows // 2)))
    assert two.train["update"] > one.train["update"] and two.train["train"] == one.train["train"]


def test_a_configuration_whose_head_forms_gradients_in_forward_is_timed_so():
    name, shape = find_shape("Qwen2.5-7B")
    found = {
        how: plan_config(
            load(ROOT / "examples/bench/search_r1_7b_8xh100.yaml", [f"model.head_backward={how}", "model.head_workspace_mib=1024"]),
            name,
            shape,
            gpu("h100"),
            SMALL,
        )
        for how in ("recompute", "in_forward")
    }
    (recomputed,), (in_forward,) = (plan.fits for plan in found.values())
    assert in_forward.train["train"] < recomputed.train["train"] and in_forward.train["score"] == recomputed.train["score"]


def test_an_engine_that_is_not_modelled_is_not_predicted_as_another():
    config = load(ROOT / "examples/bench/search_r1_7b_8xh100.yaml", ["rollout.engine.backend=torch"])
    with pytest.raises(machines.UserError, match="backend=torch: its speed, and its memory beside the main rank, are not modelled"):
        plan_config(config, *find_shape("Qwen2.5-7B"), gpu("h100"), SMALL)


def test_a_configuration_that_does_not_fit_says_why():
    path = ROOT / "examples/bench/search_r1_7b_8xh100.yaml"
    result = CliRunner().invoke(app, ["plan", "--run", str(path), "--gpu", "a100-40gb"])
    assert result.exit_code == 1 and "does not fit: needs" in " ".join(result.output.split())
