"""The planner's parameters and memory: counted in the real model, worked by hand, and against what a real layer saves."""

from dataclasses import replace

import pytest
import torch
from conftest import make_config, make_hf_folder

from checkpoint_conversion.architectures import read_shape
from igpo_megatron.packing.tree import pack_for_training
from igpo_megatron.plan.memory import in_flight, layer_activations, layer_kept, stage_memory
from igpo_megatron.plan.model_shape import find_shape
from igpo_megatron.plan.parts import active_parameters, count_parts, total_parameters
from igpo_megatron.plan.types import Layout, PartSizes, Row, Settings
from igpo_megatron.policy import parallel, policy
from igpo_megatron.policy.meta import rank_parameters
from igpo_megatron.policy.settings import Parallel
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

FP32 = Settings(dtype_bytes=4, reference=False)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2.5-1.5B", 1.54),
        ("Qwen2.5-3B", 3.09),
        ("Qwen2.5-7B-Instruct", 7.62),
        ("Qwen2.5-14B", 14.77),
        ("Qwen2.5-32B", 32.76),
        ("Qwen2.5-72B", 72.71),
        ("Qwen3-8B", 8.19),
        ("Qwen3-14B", 14.77),
        ("Qwen3-32B", 32.76),
        ("Qwen3-30B-A3B", 30.53),
        ("Qwen3-235B-A22B", 235.09),
        ("Llama-3.1-8B", 8.03),
        ("Llama-3.1-70B", 70.55),
        ("Mixtral-8x7B", 46.70),
    ],
)
def test_known_models_have_their_published_number_of_parameters(name, billions):
    _, shape = find_shape(name)
    assert total_parameters(shape) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_active_parameters_are_those_of_the_name():
    assert active_parameters(find_shape("Qwen3-30B-A3B")[1]) / 1e9 == pytest.approx(3.3, abs=0.1)
    assert active_parameters(find_shape("Qwen3-235B-A22B")[1]) / 1e9 == pytest.approx(22.2, abs=0.2)


@pytest.mark.parametrize(
    ("model", "layout", "world", "stages"),
    [
        ("Qwen2.5-1.5B", Parallel(tensor=2, pipeline=4, sequence=True), 8, [7, 7, 7, 7]),
        ("Qwen2.5-7B", Parallel(tensor=4, pipeline=2, virtual_pipeline=2, sequence=True), 8, [14, 14]),
        ("Qwen2.5-7B", Parallel(pipeline=3, first_stage_layers=9, last_stage_layers=9), 3, [9, 10, 9]),
        ("Qwen3-30B-A3B", Parallel(tensor=2, pipeline=2, expert=8, sequence=True), 16, [24, 24]),
    ],
)
def test_one_layer_stands_for_every_stage_of_the_real_model(model, layout, world, stages):
    _, shape = find_shape(model)
    parts = count_parts(shape, layout.tensor, layout.expert)
    for stage, layers in enumerate(stages):
        rank = stage * world // len(stages)
        real = sum(size for _, size in rank_parameters(shape, layout, world, rank))
        assert sum(parts.stage(layers, first=stage == 0, last=stage == len(stages) - 1)) == real


def saved_by_a_layer(folder, recompute: str, dtype: str, tokens: int) -> float:
    """Bytes that autograd saves of one real layer: a model of two layers less one of one."""
    totals = []
    for layers in (1, 2):
        make_hf_folder(folder / str(layers), folder.name, layers)
        config = make_config(folder / str(layers), model__recompute=recompute, model__dtype=dtype)
        ranks = parallel.init(config)
        actor = policy.Policy(config, ranks)
        group = RolloutGroup(Prompt("0", "?", ("a",), "t"), [Node(None, "prompt", [1] * (tokens - 8)), Node(0, "action", [2] * 8, 1)])
        group.trajectories.append(Trajectory([0, 1], Status.FINISHED, turn_advantages=[1.0]))
        (row,) = pack_for_training([group], row_tokens=tokens, token_weight=lambda n: 1.0)
        own = {p.untyped_storage().data_ptr() for chunk in actor.chunks for p in chunk.parameters()}
        seen: dict[int, int] = {}
        alive = []

        def keep(tensor, own=own, seen=seen, alive=alive):
            place = tensor.untyped_storage().data_ptr()
            if place not in own:
                seen[place] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        actor.chunks[0].train()
        from igpo_megatron.policy.model import HeadInputs

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            actor.wrapped[0](
                input_ids=row.token_ids[None],
                position_ids=row.position_ids[None],
                attention_mask=row.subtree_end,
                labels=HeadInputs(row.predictor, row.targets, 1.0, need_entropy=True),
            )
        totals.append(sum(seen.values()))
        parallel.shutdown()
    return totals[1] - totals[0]


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_layer_saves_the_bytes_that_are_counted(name, dtype, tmp_path):
    # On CPU attention calls of up to 128 queries are in fp32, which is not counted.
    tokens, settings = 160, replace(FP32, dtype_bytes=4 if dtype == "fp32" else 2)
    real = saved_by_a_layer(tmp_path / name, "none", dtype, tokens)
    counted = layer_activations(read_shape(tmp_path / name / "1"), Layout(stages=(1,)), tokens, settings, fused_norm=False)
    assert counted == pytest.approx(real, rel=0.03 if "moe" in name or name == "mixtral" else 1e-3)


def test_a_recomputed_layer_keeps_its_input_alone(tmp_path):
    real = saved_by_a_layer(tmp_path / "qwen2", "full", "fp32", 60)
    shape = read_shape(tmp_path / "qwen2" / "1")
    assert layer_kept(shape, Layout(recompute="full", stages=(1,)), 60, FP32, fused_norm=False) == real == 60 * 64 * 4


SHAPE = find_shape("Qwen2.5-7B")[1]
PARTS = PartSizes(embedding=1000, layer=100, layer_experts=0, final_norm=10, head=2000, largest=60, tied=False)


def test_the_terms_of_a_stage_are_the_ones_worked_by_hand():
    layout = Layout(pipeline=2, data=4, stages=(14, 14), row_tokens=1024)
    terms = stage_memory(SHAPE, PARTS, layout, Settings(reference=False), Row(1024, 0, 100), 8, 0, cuda=True)
    held = 14 * 100 + 1000
    assert terms["weights"] == held * 2 and terms["gradients"] == held * 4
    assert terms["optimizer"] == held / 4 * 12  # fp32 weights and two moments, shared by four ranks
    # bf16, 28 heads of 128, 4 of keys, 3584 wide, MLP 18944: 2 norms with their outputs, 4 rotary tables, attention, 5 of the MLP
    per_token = 2 * (3584 * 2 + 4) + 2 * 3584 * 2 + 4 * 128 * 2 + 2 * (3 * 3584 + 3 * 512) + 4 * 28 + 5 * 18944 * 2
    assert terms["activations"] == 2 * 14 * 1024 * per_token
    whole = stage_memory(SHAPE, PARTS, replace(layout, data=1, pipeline=1, stages=(28,)), Settings(), Row(1024, 0, 100), 8, 0, cuda=True)
    assert whole["optimizer"] == (28 * 100 + 1000 + 10 + 2000) * 12


def test_a_larger_workspace_of_the_head_is_counted_with_its_dz_and_only_on_a_gpu():
    parts = replace(PARTS, head=20000 * 3584)

    def working_set(*, cuda: bool, mib: int, targets: int = 4096) -> float:
        settings = Settings(reference=False, head_workspace=mib * 2**20)
        row = Row(512, 0, targets)
        return stage_memory(SHAPE, parts, Layout(stages=(1,)), settings, row, 1, 0, cuda=cuda)["working set"]

    assert working_set(cuda=True, mib=256) - working_set(cuda=True, mib=128) == 1.5 * 128 * 2**20
    assert working_set(cuda=False, mib=256) == working_set(cuda=False, mib=128)
    assert working_set(cuda=True, mib=256, targets=10) == working_set(cuda=True, mib=128, targets=10)  # few logits fill neither


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stage", "rows", "expected"),
    [(1, 1, 0, 8, 1), (4, 1, 0, 8, 4), (4, 1, 3, 8, 1), (4, 1, 0, 2, 2), (4, 2, 0, 8, 11 / 2), (4, 2, 3, 8, 5 / 2), (2, 2, 0, 1, 1)],
)
def test_as_many_rows_are_in_flight_as_the_schedule_starts(pipeline, virtual, stage, rows, expected):
    assert in_flight(Layout(pipeline=pipeline, virtual=virtual), stage, rows) == expected


def test_tensor_parallelism_with_sequences_cut_divides_what_a_layer_saves():
    one = layer_activations(SHAPE, Layout(), 4096, Settings(), fused_norm=True)
    two = layer_activations(SHAPE, Layout(tensor=2, sequence=True), 4096, Settings(), fused_norm=True)
    rotary = 4096 * 4 * 128 * 2
    assert two - rotary == pytest.approx((one - rotary) / 2)
