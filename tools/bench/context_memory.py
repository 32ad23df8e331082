"""Claim: what a rank keeps of a long row for the backward pass shrinks with the context-parallel degree.

    python tools/bench/context_memory.py     under 3 minutes on two cores

One trajectory, every token of it trained, at each degree. Counted are the bytes that autograd has saved when the forward pass ends,
weights left out: no estimate, and the same whatever else the machine does. What does not shrink are the keys and values that each
layer gathers; `model.recompute=selective` gathers them again instead of keeping them. Time is not measured: on two cores there is
nothing to gain.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from common import finish
from models import config_for, hf_config, save_random
from ranks import on_ranks

from igpo_megatron.policy import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402

from igpo_megatron.algorithms.losses.tokens import Tokens  # noqa: E402
from igpo_megatron.packing.tree import PackedRow, pack_for_training  # noqa: E402
from igpo_megatron.policy import parallel  # noqa: E402
from igpo_megatron.policy.policy import Policy  # noqa: E402
from igpo_megatron.policy.weight_sync import canary_group  # noqa: E402

DEGREES = (1, 2, 4)
RECOMPUTE = ("none", "selective")
LAYERS, VOCAB = 2, 1024
MIB = 2**20


def main(
    shape: Annotated[str, typer.Option(help="demo, 0.5B, 1.5B or 7B: the shape of the layers, of which two are built.")] = "0.5B",
    tokens: Annotated[int, typer.Option(help="Tokens of the trajectory; a multiple of 8.")] = 2048,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/cpu/context_memory.json.")] = None,
) -> None:
    """Measure every degree, with and without recomputation of the attention."""
    at = hf_config(shape, LAYERS)
    figures: dict[str, Any] = {"shape": shape, "layers": LAYERS, "tokens": tokens, "saved_mib_per_rank": {}}
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        save_random(at | {"vocab_size": VOCAB}, folder)
        for degree in DEGREES:
            ranks = on_ranks(degree, partial(_saved_by_mode, degree, folder, tokens))
            figures["saved_mib_per_rank"][str(degree)] = {mode: round(max(found[mode] for found in ranks), 2) for mode in RECOMPUTE}
    saved = figures["saved_mib_per_rank"]
    for mode in RECOMPUTE:
        figures[f"share_of_one_rank_{mode}"] = {str(degree): round(saved[str(degree)][mode] / saved["1"][mode], 3) for degree in DEGREES}
    gathered = LAYERS * tokens * 2 * at["num_key_value_heads"] * (at["hidden_size"] // at["num_attention_heads"]) * 4 / MIB
    floors = {"share": {str(degree): 1 / degree for degree in DEGREES}, "keys_and_values_of_the_row_mib": round(gathered, 2)}
    finish("context_memory", figures, floors, ("torch", "megatron-core"), out)


def _saved_by_mode(degree: int, folder: str, tokens: int) -> dict[str, float]:
    """MiB that a rank saves, by recomputation mode."""
    found = {}
    for mode in RECOMPUTE:
        own = {"run": {"device": "cpu"}, "loss": {"kl_coef": 0.0}, "parallel": {"context": degree}}
        config = config_for(folder, dtype="fp32", model={"recompute": mode}, **own)
        policy = Policy(config, parallel.init(config))
        group = canary_group(VOCAB, tokens - 1, seed=0)
        rows = pack_for_training([group], row_tokens=tokens, multiple=policy.row_multiple, token_weight=lambda n: 1.0)
        found[mode] = _saved_bytes(policy, rows) / MIB
        parallel_state.destroy_model_parallel()
    parallel.shutdown()
    return found


def _saved_bytes(policy: Policy, rows: list[PackedRow]) -> int:
    """Bytes that autograd holds between the forward and the backward pass of the row."""
    weights = {parameter.untyped_storage().data_ptr() for chunk in policy.chunks for parameter in chunk.parameters()}
    saved: dict[int, int] = {}
    at_the_end_of_forward = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def loss(tokens: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nonlocal at_the_end_of_forward
        at_the_end_of_forward = sum(saved.values())
        return -tokens.logprobs.sum(), {}

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.forward_backward(rows, loss)
    return at_the_end_of_forward


if __name__ == "__main__":
    typer.run(main)
