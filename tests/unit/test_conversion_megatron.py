"""Converted folders, torch_dist and classic, in a real GPTModel at TP1, TP2, PP2 and EP2, and back from what Megatron saves there.

Megatron runs in a process of its own (this file as a script), which imports it once and forks the ranks of each layout.
"""

import math
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from checkpoint_conversion.architectures import check_total, local_name, read_shape, rules_for
from checkpoint_conversion.classic_folder import Grid
from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf, verify
from checkpoint_conversion.folders import copy_config
from checkpoint_conversion.hf_folder import HfReader

LAYOUTS = {"qwen2_tied": [(1, 1, 1), (2, 1, 1), (1, 2, 1)], "qwen3": [(2, 2, 1)], "qwen3_moe": [(1, 2, 1), (1, 1, 2)]}
"""(tensor, pipeline, expert) parallel sizes. Experts at TP2 need sequence parallelism: tests/distributed has them."""

CASES = [(kind, layout) for kind, layouts in LAYOUTS.items() for layout in layouts]
NAMES = [f"{kind}-{'x'.join(map(str, layout))}" for kind, layout in CASES]
# Megatron pads to 384 rows when converting; the model below has 512.
MODEL_VOCAB_MULTIPLE = 512


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """hf/, megatron/ and, from each layout of a real model, saved_LAYOUT/ (torch_dist) and classic_saved_LAYOUT/ for each kind."""
    from test_conversion import hf_folder

    root = tmp_path_factory.mktemp("conversion")
    for kind, layouts in LAYOUTS.items():
        hf = hf_folder(root / kind / "hf", kind)
        hf_to_megatron(hf, root / kind / "megatron")
        for layout in layouts:
            classic = Grid(*layout)
            hf_to_megatron(hf, root / kind / f"classic_{suffix(layout)}", vocab_multiple=512, classic=classic, te_names=False)
    repository = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": repository}
    result = subprocess.run([sys.executable, __file__, str(root)], env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return root


def suffix(layout):
    return "x".join(map(str, layout))


@pytest.mark.parametrize("kind, layout", CASES, ids=NAMES)
def test_a_real_model_holds_the_tensors_of_the_folder_it_loaded(folders, kind, layout):
    compared = (folders / kind / f"compared_{suffix(layout)}").read_text().split()
    shape = read_shape(folders / kind / "hf")
    names = {local_name(name) for name in compared}
    check_total(rules_for(shape, 128), megatron_names=names)


@pytest.mark.parametrize("kind, layout", CASES, ids=NAMES)
def test_a_checkpoint_that_megatron_saved_beside_optimizer_state_exports_bit_equal(folders, kind, layout):
    saved, hf = folders / kind / f"saved_{suffix(layout)}", folders / kind / "hf"
    copy_config(hf, saved / "hf")
    assert verify(hf, saved).differences == {}
    megatron_to_hf(saved, saved / "back")
    a, b = HfReader(hf), HfReader(saved / "back")
    assert a.names() == b.names()
    assert all(torch.equal(a.get(name), b.get(name)) for name in a.names())


@pytest.mark.parametrize("kind, layout", CASES, ids=NAMES)
def test_files_per_rank_that_megatron_saved_export_bit_equal_with_the_config_of_another_folder(folders, kind, layout):
    saved, hf = folders / kind / f"classic_saved_{suffix(layout)}", folders / kind / "hf"
    assert verify(hf, saved).differences == {}
    megatron_to_hf(saved, saved.parent / f"back_{suffix(layout)}", config=hf)
    a, b = HfReader(hf), HfReader(saved.parent / f"back_{suffix(layout)}")
    assert a.names() == b.names()
    assert all(torch.equal(a.get(name), b.get(name)) for name in a.names())


# ---- the Megatron process


def gpt_model(shape):
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    mixture = {}
    if shape.mixture is not None:
        mixture = {
            "num_moe_experts": shape.mixture.num_experts,
            "moe_ffn_hidden_size": shape.mixture.ffn_size,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        }
    spec = get_gpt_layer_local_spec(mixture.get("num_moe_experts"), qk_layernorm=shape.qk_norm, normalization="RMSNorm")
    if mixture:
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]  # as in layer_spec of igpo_megatron/policy/model.py
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **mixture,
    )
    return GPTModel(
        config,
        spec,
        vocab_size=MODEL_VOCAB_MULTIPLE,
        max_sequence_length=shape.max_positions,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
    )


def load_compare_and_save(folder: Path, layout: tuple[int, int, int]) -> None:
    """On every rank: load megatron/ and classic/, compare each parameter with its shard of hf/, save the model in both ways."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    tp, pp, ep = layout
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep)
    model_parallel_cuda_manual_seed(1)
    shape = read_shape(folder / "hf")
    rules, reader = rules_for(shape, MODEL_VOCAB_MULTIPLE), HfReader(folder / "hf")
    model = gpt_model(shape)
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
    }
    rank = parallel_state.get_tensor_model_parallel_rank()
    first_layer = model.decoder.layers[0].layer_number - 1
    first_expert = parallel_state.get_expert_model_parallel_rank() * ((model.config.num_moe_experts or 0) // ep)
    grid, place = Grid(*layout), (rank, parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank())
    names = []

    def compare() -> None:
        names.clear()
        for name, parameter in model.named_parameters():
            rule = rules[local_name(name, first_layer, first_expert)]
            expected = rule.shard(rule.to_megatron([reader.get(hf_name) for hf_name in rule.hf_names]), tp, rank)
            assert torch.equal(parameter.data, expected), f"{name} differs at {layout}"
            names.append(rule.megatron_name)
            parameter.data.zero_()

    own = Path(grid.folder_name(*place)) / "model_optim_rng.pt"
    state = torch.load(folder / f"classic_{suffix(layout)}" / "model" / "release" / own, weights_only=False)
    model.load_state_dict(state["model"], strict=False)
    assert set(state["model"]) == {name for name, _ in model.named_parameters()}
    compare()
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(folder / "megatron" / "model"))
    model.load_state_dict(loaded["model"])
    classic = folder / f"classic_saved_{suffix(layout)}"
    (classic / "iter_0000007" / own).parent.mkdir(parents=True)
    (classic / "latest_checkpointed_iteration.txt").write_text("7")
    content = {"model": model.state_dict_for_save_checkpoint(), "args": model.config, "iteration": 7}
    torch.save(content, classic / "iter_0000007" / own)
    saved = model.sharded_state_dict(metadata=metadata)
    other = {
        name: replace(part, key=f"optimizer.state.exp_avg.{part.key}") for name, part in saved.items() if hasattr(part, "global_shape")
    }
    out = folder / f"saved_{suffix(layout)}" / "model"
    dist_checkpointing.save({"model": saved, "optimizer": other, "iteration": 3}, str(out))
    compare()
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, names)
    if torch.distributed.get_rank() == 0:
        (folder / f"compared_{suffix(layout)}").write_text("\n".join(sorted({name for part in everyone for name in part})))


def run_rank(rank: int, world: int, folder: Path, layout: tuple[int, int, int]) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / f"store_{suffix(layout)}"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    load_compare_and_save(folder, layout)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(root: Path) -> None:
    from igpo_megatron.policy import cpu, megatron_fixes

    cpu.install()
    megatron_fixes.install()
    import megatron.core.models.gpt.gpt_model  # noqa: F401 (once, before the ranks fork)

    fork = multiprocessing.get_context("fork")
    for folder in sorted(root.iterdir()):
        for layout in LAYOUTS[folder.name]:
            world = math.prod(layout)
            (folder / f"saved_{suffix(layout)}" / "model").mkdir(parents=True)
            ranks = [fork.Process(target=run_rank, args=(rank, world, folder, layout)) for rank in range(world)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                sys.exit(f"{folder.name} at {layout} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
