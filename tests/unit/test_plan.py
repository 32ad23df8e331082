"""`igpo plan` end to end: what is tried, ranked, refused and written, and the examples that it made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from igpo_megatron.cli import app
from igpo_megatron.config.load import load, parse
from igpo_megatron.plan import machines
from igpo_megatron.plan.command import plan_run
from igpo_megatron.plan.layouts import splits, stages_of, train_layouts
from igpo_megatron.plan.machines import GIB, gpu
from igpo_megatron.plan.memory import export_bytes
from igpo_megatron.plan.model_shape import KNOWN, find_shape
from igpo_megatron.plan.parts import count_parts
from igpo_megatron.plan.rollout_time import serve
from igpo_megatron.plan.search import ASLEEP, HEADROOM, Plan, estimate, search
from igpo_megatron.plan.train_time import pass_time, row_time
from igpo_megatron.plan.types import Layout, Row, Settings, Workload
from igpo_megatron.training.checks import check

SIZES = Path(__file__).resolve().parents[2] / "examples" / "sizes"
WORLD = {
    "qwen2.5_1.5b": 8,
    "qwen2.5_7b": 8,
    "qwen2.5_14b": 16,
    "qwen2.5_32b": 32,
    "qwen2.5_72b": 64,
    "qwen3_30b_a3b": 32,
    "qwen3_235b_a22b": 128,
}
SMALL = Workload(prompts=8, samples=4, max_context=8192)


def planned(model: str, gpus: int, name: str = "h100", workload: Workload = SMALL):
    return search(Plan(model, find_shape(model)[1], gpu(name), workload, Settings(), gpus))


def fake_folder(folder: Path, model: str) -> Path:
    """What the checks look at of a model's folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(KNOWN[model]), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    return folder


def test_plans_are_ranked_by_time_and_fit_their_machine():
    plan = planned("Qwen2.5-7B", 8)
    assert plan.fits and [one.step for one in plan.fits] == sorted(one.step for one in plan.fits)
    assert all(one.peak <= HEADROOM * plan.machine.memory for one in plan.fits)
    apart = [one for one in plan.fits if one.placement == "disaggregated"]
    assert all(one.layout.ranks + one.engines.count * one.engines.tensor == 8 for one in apart)
    assert {one.layout.ranks for one in apart} == {3, 4, 5, 6, 7}  # two cannot hold gradients and optimizer
    shared = [one for one in plan.fits if one.placement == "colocated"]
    assert shared and all(one.layout.ranks == one.engines.count * one.engines.tensor == 8 for one in shared)


def test_more_devices_and_faster_ones_take_less_time():
    eight = planned("Qwen2.5-7B", 8).fits[0].step
    assert planned("Qwen2.5-7B", 16).fits[0].step < eight < planned("Qwen2.5-7B", 8, "a100").fits[0].step


def test_what_does_not_fit_says_what_it_needs_and_what_to_change():
    plan = planned("Qwen2.5-72B", 8)
    assert plan.fits == []
    reasons = [miss.reason for miss in plan.misfits]
    assert any("GiB of weights leave 0.0 GiB for keys and values" in reason and "use larger engines" in reason for reason in reasons)
    assert any("needs" in reason and f"GiB of {HEADROOM * plan.machine.memory / GIB:.1f}" in reason and ";" in reason for reason in reasons)
    text = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    assert plan_run("Qwen2.5-72B", 8, workload=SMALL, console=text) == 1
    assert "does not fit" in text.export_text()


def test_recomputation_takes_longer_and_holds_less():
    by_recompute = {}
    for one in planned("Qwen2.5-1.5B", 8).fits:
        key = (one.layout.tensor, one.layout.pipeline, one.layout.virtual, one.layout.data, one.layout.row_tokens)
        by_recompute.setdefault(key, {})[one.layout.recompute] = one
    both = [found for found in by_recompute.values() if {"none", "full"} <= found.keys()]
    assert both
    for found in both:
        assert found["full"].train["train"] > found["none"].train["train"]
        assert found["full"].peak <= found["none"].peak
    assert any(found["full"].peak < 0.8 * found["none"].peak for found in both)


@pytest.mark.parametrize(("rows", "pipeline", "virtual"), [(4, 2, 1), (8, 4, 1), (8, 4, 2), (1, 4, 1)])
def test_a_pipelines_bubble_is_its_depth_less_one_over_the_chunks(rows, pipeline, virtual):
    # 28 layers and no head to speak of: stages take the same time, so a pass takes rows + (p - 1) / v of them.
    shape = replace(find_shape("Qwen2.5-7B")[1], vocab_size=1)
    machine = replace(gpu("h100"), link=1e30, network=1e30, link_latency=0.0, network_latency=0.0, call=0.0)
    layout = Layout(pipeline=pipeline, virtual=virtual, stages=(28 // pipeline,) * pipeline)
    row = Row(4096, 4096**2 / 2, 0)
    one = row_time(shape, layout, Settings(), machine, row, 0, backward=True)
    whole = pass_time(shape, layout, Settings(), machine, [[row] * rows], backward=True)
    assert whole == pytest.approx(one * (rows + (pipeline - 1) / virtual))


def test_gradients_of_the_head_in_forward_save_a_matmul_and_cost_the_weights_gradient_once_per_block():
    shape, layout = find_shape("Qwen2.5-7B")[1], Layout(tensor=2, sequence=True, stages=(28,))
    row = Row(8192, 8192**2 / 2, 2000)

    def seconds(*, backward: bool = True, matmul: float = 1e15, stream: float = 1e30, **settings: object) -> float:
        machine = replace(gpu("h100"), matmul=((1.0, matmul),), stream=stream)
        return row_time(shape, layout, replace(Settings(), **settings), machine, row, 0, backward=backward)

    one = 2 * 2000 * shape.hidden_size * shape.vocab_size / 2 / 1e15
    assert seconds() - seconds(head_in_forward=True) == pytest.approx(one)
    assert seconds(backward=False) == seconds(backward=False, head_in_forward=True)
    moved = 8 * shape.hidden_size * shape.vocab_size / 2 / 1e12
    blocks = {512: 2, 128: 5, 4096: 1}  # of 1,765, 441 and all rows
    for mib, count in blocks.items():
        settings = {"head_workspace": mib * 2**20, "stream": 1e12, "matmul": 1e30}
        assert seconds(head_in_forward=True, **settings) - seconds(**settings) == pytest.approx(count * moved), mib


def test_ranks_that_share_cores_wait_for_one_another():
    shape = find_shape("Qwen2.5-1.5B")[1]
    machine = replace(gpu("h100"), device="cpu", cores=2, call=0.0)
    shares = [[Row(512, 512**2 / 2, 100)] for _ in range(4)]
    layout = Layout(data=4, stages=(28,))
    alone = pass_time(shape, layout, Settings(), replace(machine, cores=4), shares, backward=True)
    assert pass_time(shape, layout, Settings(), machine, shares, backward=True) == pytest.approx(2 * alone)


@pytest.mark.parametrize(
    ("layers", "pipeline", "virtual", "expected"),
    [(28, 4, 1, (7, 7, 7, 7)), (28, 4, 2, None), (94, 2, 1, (47, 47)), (94, 4, 1, (23, 24, 24, 23)), (28, 1, 1, (28,))],
)
def test_layers_are_shared_as_the_trainer_can(layers, pipeline, virtual, expected):
    assert stages_of(layers, pipeline, virtual) == expected


@pytest.mark.parametrize(("model", "ranks"), [("Qwen2.5-7B", 12), ("Qwen3-30B-A3B", 16), ("Qwen3-235B-A22B", 64), ("Mixtral-8x7B", 24)])
def test_the_trainer_accepts_every_layout_that_is_tried(model, ranks, tmp_path):
    folder = fake_folder(tmp_path, model)
    shape = find_shape(model)[1]
    layouts = list(train_layouts(shape, ranks, gpu("h100"), (8192,)))
    assert any(layout.pipeline > 1 and layout.tensor > 1 for layout in layouts)
    assert any(layout.expert > 1 for layout in layouts) == (shape.mixture is not None)
    for layout in layouts:
        if layout.recompute != "none":
            continue
        settings = {"tensor": layout.tensor, "pipeline": layout.pipeline, "virtual_pipeline": layout.virtual, "expert": layout.expert}
        settings |= {"data": layout.data, "sequence": str(layout.sequence).lower()}
        if layout.context > 1:
            settings["context"] = layout.context
        if len(set(layout.stages)) > 1:
            settings |= {"first_stage_layers": layout.stages[0], "last_stage_layers": layout.stages[-1]}
        config = load(SIZES / "qwen2.5_7b.yaml", [f"model.path={folder}", *(f"parallel.{key}={value}" for key, value in settings.items())])
        problems = [
            problem for problem in check(config, world_size=ranks) if problem.startswith(("parallel", "model.vocab")) or "ranks" in problem
        ]
        assert [problem for problem in problems if "overlaps" not in problem] == [], layout


def test_context_parallelism_is_tried_also_with_experts():
    for model in ("Qwen2.5-7B", "Qwen3-30B-A3B"):
        layouts = train_layouts(find_shape(model)[1], 8, gpu("h100"), (8192,))
        assert any(layout.context > 1 and (layout.expert > 1 or "A3B" not in model) for layout in layouts)


def test_on_shared_devices_both_take_all_of_them_and_pay_for_the_exchange():
    shape, machine = find_shape("Qwen2.5-1.5B")[1], gpu("h100")

    def best(gpus, staleness=0, placement=None, link=machine.host_link):
        plan = search(Plan("m", shape, replace(machine, host_link=link), SMALL, Settings(), gpus, staleness), placement)
        return plan.fits[0] if plan.fits else None

    (one,) = {best(1).layout}
    assert one.ranks == 1  # nothing else can run on a single device
    shared = best(8, placement="colocated")
    held = shared.memory["weights"] + shared.memory["optimizer"]
    assert shared.train["swap"] == pytest.approx(2 * held / machine.host_link)
    assert best(8, placement="colocated", link=1e9).step > shared.step + held / 1e9
    assert best(8, staleness=1).placement == best(8, placement="disaggregated").placement == "disaggregated"


def test_weights_must_fit_beside_the_engines_while_they_are_handed_over():
    roomy = search(Plan("m", find_shape("Qwen2.5-32B")[1], gpu("h200"), SMALL, Settings(), 8), "colocated")
    assert roomy.fits and all(one.peak <= HEADROOM * roomy.machine.memory for one in roomy.fits)
    assert all({"asleep", "optimizer"} < set(one.memory) for one in roomy.fits)
    # With engines whose weights dwarf all else, the fullest moment is that of the exchange.
    one = roomy.fits[0]
    found = estimate(roomy, one.layout, replace(one.engines, weights=200.0 * GIB))
    export = export_bytes(count_parts(roomy.shape, one.layout.tensor, 1), one.layout, roomy.settings)
    held = sum(one.memory[name] for name in ("weights", "gradients", "optimizer"))
    assert export > 1e8 and found.peak == pytest.approx(held + export + 200 * GIB + ASLEEP)
    tight = search(Plan("m", find_shape("Qwen2.5-32B")[1], gpu("h100"), SMALL, Settings(), 8), "colocated")
    assert not tight.fits and "weights" in tight.misfits[0].reason


def test_a_plan_for_several_machines_says_who_does_what_on_them(tmp_path):
    said = {}
    for placement in ("colocated", "disaggregated"):
        out = tmp_path / f"{placement}.yaml"
        assert plan_run("Qwen2.5-7B", 16, out=out, workload=SMALL, console=Console(quiet=True), placement=placement) == 0
        config = load(out, [f"model.path={fake_folder(tmp_path / placement, 'Qwen2.5-7B')}"])
        layout = config.parallel
        ranks = layout.tensor * layout.pipeline * layout.data * layout.context
        assert ranks == (16 if placement == "colocated" else 8) and config.rollout.engine.gpu_ids == ()
        assert all("no such file" in problem for problem in check(config, world_size=ranks, local_world_size=8))
        (said[placement],) = [line for line in out.read_text().splitlines() if "Start by" in line]
    assert "NNODES=2" in said["colocated"] and "RANKS=8" in said["colocated"] and "NODE_ROLE" not in said["colocated"]
    assert "NODE_ROLE=train on the first 1, NODE_ROLE=rollout on the others" in said["disaggregated"]


def test_a_colocated_and_a_stale_plan_load_as_such(tmp_path):
    for name, options in {"colocated": {"placement": "colocated"}, "stale": {"staleness": 2}}.items():
        out = tmp_path / f"{name}.yaml"
        assert plan_run("Qwen2.5-1.5B", 8, out=out, workload=SMALL, console=Console(quiet=True), **options) == 0
        config = load(out, [f"model.path={fake_folder(tmp_path / name, 'Qwen2.5-1.5B')}"])
        assert (config.placement.mode == "colocated") == (name == "colocated") and config.rollout.max_staleness == options.get(
            "staleness", 0
        )
        layout, engine = config.parallel, config.rollout.engine
        ranks = layout.tensor * layout.pipeline * layout.data * layout.context
        assert (ranks == 8) == (name == "colocated") and bool(engine.gpu_ids) == (name == "stale")
        assert all("no such file" in problem for problem in check(config, world_size=ranks, local_world_size=min(ranks, 8)))


def test_devices_are_split_singly_on_one_machine_and_by_machines_on_several():
    assert splits(4, 8) == [1, 2, 3] and splits(24, 8) == [8, 16]
    assert len(splits(4096, 8)) <= 16


def test_an_engine_needs_room_for_one_whole_trajectory():
    shape, workload = find_shape("Qwen2.5-32B")[1], Workload(prompts=2, samples=2)
    assert "61.0 GiB of weights" in str(serve(shape, gpu("h100"), workload, 1, 1, 0.85))
    two = serve(shape, gpu("h100"), workload, 1, 2, 0.85)
    room = gpu("h100").memory * 0.85 - 3 * GIB - 32.76e9
    assert two.cache_tokens == pytest.approx(room / (2 * 64 * 4 * 128 * 2), rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "Qwen2.5-71B", "--gpus", "8"], "did you mean Qwen2.5-7"),
        (["--model", "GPT-9", "--gpus", "8"], "neither a folder nor a known name"),
        (["--model", "Qwen2.5-7B", "--gpus", "12"], "all 8 devices each; use 8 or 16"),
        (["--model", "Qwen2.5-7B", "--gpus", "1", "--placement", "disaggregated"], "use 2 or more"),
        (["--model", "Qwen2.5-7B", "--gpus", "8", "--placement", "colocated", "--staleness", "1"], "take turns, which --staleness 1"),
        (["--model", "Qwen2.5-7B", "--gpus", "8", "--placement", "beside"], "'beside' is not one of"),
        (["--model", "Qwen2.5-7B", "--gpus", "8", "--gpu", "h1000"], "did you mean h100"),
        (["--model", "Qwen2.5-7B", "--gpus", "8", "--max-context", "99999999"], None),
        (["--model", "Qwen2.5-7B", "--gpus", "8", "--calibration", "missing.json"], "not a file written by"),
        (["--gpus", "8"], "needs --model and --gpus"),
        (["--run", str(SIZES / "qwen2.5_7b.yaml"), "--no-reference"], "leave --reference out"),
        (["--run", str(SIZES / "qwen2.5_7b.yaml"), "--gpus", "8"], "leave --gpus out, or plan without --run"),
        (["--run", str(SIZES / "qwen2.5_7b.yaml"), "--staleness", "0", "--max-context", "999"], "leave --max-context, --staleness out"),
        (["--run", str(SIZES / "qwen2.5_7b.yaml"), "--turn-tokens", "inf"], "Invalid value for '--turn-tokens'"),
        (["--run", "missing.yaml"], "no such configuration file"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, problem):
    result = CliRunner().invoke(app, ["plan", *arguments])
    if problem is None:  # cut to what the model can do
        assert result.exit_code == 0
    else:
        assert result.exit_code == 2 and problem in result.output


def test_a_calibration_comes_back_as_it_was_written(tmp_path):
    machine = replace(gpu("h200"), name="measured", source="measured")
    machines.write(machine, tmp_path / "machine.json")
    assert machines.read(tmp_path / "machine.json") == machine
    (tmp_path / "other.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="expected the keys"):
        machines.read(tmp_path / "other.json")


def test_a_measured_cpu_gets_a_plan_that_its_checks_accept(tmp_path):
    machine = replace(gpu("h100"), name="cpu", device="cpu", memory=8e9, cores=2, crowd=1.1, ranks_per_node=64, source="measured")
    machines.write(machine, tmp_path / "machine.json")
    model = fake_folder(tmp_path / "model", "Qwen2.5-0.5B")
    workload = Workload(prompts=2, samples=2, max_context=4096)
    arguments = {"calibration": tmp_path / "machine.json", "out": tmp_path / "run.yaml", "workload": workload, "reference": False}
    assert plan_run(str(model), 3, **arguments, console=Console(quiet=True)) == 0
    config = load(tmp_path / "run.yaml")
    assert (config.run.device, config.model.dtype, config.loss.kl_coef) == ("cpu", "fp32", 0.0)
    assert config.rollout.engine.kv_cache_mib >= 64 and config.rollout.engine.gpu_ids == ()
    ranks = config.parallel.tensor * config.parallel.pipeline * config.parallel.data
    assert all("no such file" in problem for problem in check(config, world_size=ranks))


def test_a_matmuls_rate_lies_between_its_neighbours():
    machine = replace(gpu("h100"), matmul=((1e6, 10.0), (1e8, 30.0)))
    assert [machine.matmul_rate(flops) for flops in (1e3, 1e6, 1e7, 1e8, 1e12)] == pytest.approx([10, 10, 20, 30, 30])


@pytest.mark.parametrize("name", WORLD)
def test_every_example_by_size_passes_the_checks_for_its_ranks(name, tmp_path):
    path = SIZES / f"{name}.yaml"
    model = parse(path.read_text())["model"]["path"].removeprefix("models/").removesuffix("-Instruct")
    config = load(path, [f"model.path={fake_folder(tmp_path, model)}"])
    layout, engine = config.parallel, config.rollout.engine
    ranks = layout.tensor * layout.pipeline * layout.data * getattr(layout, "context", 1)
    assert ranks + engine.count * engine.tensor == WORLD[name]
    assert all("no such file" in problem for problem in check(config, world_size=ranks, local_world_size=min(ranks, 8)))


def test_a_written_plan_is_the_example_that_is_committed(tmp_path):
    import plan_examples

    plan_examples.main(only="7b", folder=tmp_path)
    assert (tmp_path / "qwen2.5_7b.yaml").read_text() == (SIZES / "qwen2.5_7b.yaml").read_text()
