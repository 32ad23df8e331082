"""A converted folder in a real GPTModel at TP1, TP2 and PP2, and back from what Megatron itself saves there.

Megatron runs in a process of its own (this file as a script), which imports it once and forks the ranks of each layout.
"""

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
from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf, verify
from checkpoint_conversion.streams import HfReader, copy_config

LAYOUTS = [(1, 1), (2, 1), (1, 2)]
# Megatron pads to 384 rows when converting; the model below has 512.
MODEL_VOCAB_MULTIPLE = 512


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """hf/, megatron/ and, from each layout of a real model, saved_tpX_ppY/ for one tied and one untied architecture."""
    from test_conversion import hf_folder

    root = tmp_path_factory.mktemp("conversion")
    for kind in ("qwen2_tied", "qwen3"):
        hf_to_megatron(hf_folder(root / kind / "hf", kind), root / kind / "megatron")
    repository = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": repository}
    result = subprocess.run([sys.executable, __file__, str(root)], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return root


@pytest.mark.parametrize("tp, pp", LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3"])
def test_a_real_model_holds_the_tensors_of_the_folder_it_loaded(folders, kind, tp, pp):
    compared = (folders / kind / f"compared_tp{tp}_pp{pp}").read_text().split()
    shape = read_shape(folders / kind / "hf")
    names = {local_name(name) for name in compared}
    check_total(rules_for(shape, 128), megatron_names=names)


@pytest.mark.parametrize("tp, pp", LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen3"])
def test_a_checkpoint_that_megatron_saved_beside_optimizer_state_exports_bit_equal(folders, kind, tp, pp):
    saved, hf = folders / kind / f"saved_tp{tp}_pp{pp}", folders / kind / "hf"
    copy_config(hf, saved / "hf")
    assert verify(hf, saved).differences == {}
    megatron_to_hf(saved, saved / "back")
    a, b = HfReader(hf), HfReader(saved / "back")
    assert a.names() == b.names()
    assert all(torch.equal(a.get(name), b.get(name)) for name in a.names())


# ---- the Megatron process


def gpt_model(shape):
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

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
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm"),
        vocab_size=MODEL_VOCAB_MULTIPLE,
        max_sequence_length=shape.max_positions,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
    )


def load_compare_and_save(folder: Path, tp: int, pp: int) -> None:
    """On every rank: load megatron/, compare each parameter with its shard of hf/, save the model and something beside it."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(1)
    shape = read_shape(folder / "hf")
    rules, reader = rules_for(shape, MODEL_VOCAB_MULTIPLE), HfReader(folder / "hf")
    model = gpt_model(shape)
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
    }
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(folder / "megatron" / "model"))
    model.load_state_dict(loaded["model"])
    rank = parallel_state.get_tensor_model_parallel_rank()
    names = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if name.startswith("decoder.layers."):
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        rule = rules[".".join(parts)]
        expected = rule.shard(rule.to_megatron([reader.get(hf_name) for hf_name in rule.hf_names]), tp, rank)
        assert torch.equal(parameter.data, expected), f"{name} differs at TP{tp} PP{pp}"
        names.append(rule.megatron_name)
    saved = model.sharded_state_dict(metadata=metadata)
    other = {
        name: replace(part, key=f"optimizer.state.exp_avg.{part.key}") for name, part in saved.items() if hasattr(part, "global_shape")
    }
    out = folder / f"saved_tp{tp}_pp{pp}" / "model"
    dist_checkpointing.save({"model": saved, "optimizer": other, "iteration": 3}, str(out))
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, names)
    if torch.distributed.get_rank() == 0:
        (folder / f"compared_tp{tp}_pp{pp}").write_text("\n".join(sorted({name for part in everyone for name in part})))


def run_rank(rank: int, world: int, folder: Path, tp: int, pp: int) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / f"store_tp{tp}_pp{pp}"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    load_compare_and_save(folder, tp, pp)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(root: Path) -> None:
    from igpo_megatron.actor import cpu, megatron_fixes

    cpu.install()
    megatron_fixes.install()
    import megatron.core.models.gpt.gpt_model  # noqa: F401 (once, before the ranks fork)

    fork = multiprocessing.get_context("fork")
    for folder in sorted(root.iterdir()):
        for tp, pp in LAYOUTS:
            (folder / f"saved_tp{tp}_pp{pp}" / "model").mkdir(parents=True)
            ranks = [fork.Process(target=run_rank, args=(rank, tp * pp, folder, tp, pp)) for rank in range(tp * pp)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                sys.exit(f"{folder.name} at TP{tp} PP{pp} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
