"""Weights from GPU to GPU through vLLM's own back-ends, into a real engine; skipped where there is no GPU or no CUDA build of vLLM.

pytest tests/gpu/test_native_transfer_gpu.py        nccl takes a second GPU, for the engine
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.config.load import build
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.types import Canary

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"
TOKENS = [(7 * number + number**2) % 600 + 20 for number in range(65)]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("transport", ["ipc", "nccl", "shared_memory", "object_store"])
def test_new_weights_arrive_bit_by_bit_and_are_served(transport: str) -> None:
    from transformers import AutoModelForCausalLM

    gpu = 1 if transport == "nccl" else 0
    if torch.cuda.device_count() <= gpu:
        pytest.skip("nccl needs a GPU for the engine beside the policy's")
    config = build(
        {
            "model": {"path": str(POLICY), "dtype": "bf16"},
            "run": {"device": "cuda"},
            "rollout": {"max_context": 512, "engine": {"gpu_ids": [gpu], "gpu_memory_utilization": 0.3, "max_restarts": 0}},
            "sync": {"transport": transport, "bucket_mib": 1},
        }
    )
    reader = HfReader(POLICY)
    with EnginePool(config) as pool:
        for version, scale in enumerate((0.8, 1.0, 0.8), start=1):
            model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.bfloat16).cuda()
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(scale)
            logits = model(torch.tensor([TOKENS], device="cuda")).logits[0, :-1].float()
            expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(TOKENS[1:], device="cuda")[:, None])[:, 0].tolist()
            scales = {name: scale if "embed_tokens" in name else 1.0 for name in reader.names()}
            weights = ((name, reader.get(name).to("cuda", torch.bfloat16) * scales[name]) for name in reader.names())
            # Fingerprints are compared inside; what an engine holds after loading is the canary's part.
            metrics = pool.update_weights(weights, version, Canary(tuple(TOKENS), tuple(expected), max_gap=0.3))
            assert metrics["sync/buckets"] > 1 and metrics["canary_gap"] < 0.3
