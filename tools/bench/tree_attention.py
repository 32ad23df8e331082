"""Claim: attention over a trajectory with its probes costs about what plain causal attention over the trajectory alone does.

    python tools/bench/tree_attention.py [--turns 10]     under a minute on two cores

One trunk with a 24-token probe after every turn, in the form the policy uses on this device (chains of SDPA on CPU, one compiled
FlexAttention on a GPU) and in the other forms behind the same plan, against causal SDPA of the trunk alone and against a causal call
for every probe with its whole context. Also: how long the plan or block mask of a row takes to make.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from common import finish, interleaved, ratio

from igpo_megatron.doctor.probes import synthetic_group
from igpo_megatron.packing.tree import pack_for_scoring
from igpo_megatron.policy import attention, tree_plan
from igpo_megatron.types import RolloutGroup

PROMPT, TURN, PROBE = 500, 1500, 24
HEADS, KV_HEADS, DIM = 28, 4, 128
CPU_HEADS, CPU_KV_HEADS, CPU_DIM = 4, 4, 32
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def main(
    turns: Annotated[int, typer.Option(help="Turns of the trajectory; prompt and turns have a tenth of 500 and 1500 tokens on CPU.")] = 10,
    repeats: Annotated[int, typer.Option(help="Timed calls of each.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/tree_attention.json.")] = None,
) -> None:
    """Time forward, and forward + backward."""
    cuda = torch.cuda.is_available()
    scale = 1 if cuda else 10
    shape = {"prompt_tokens": PROMPT // scale, "turn_tokens": TURN // scale, "probe_tokens": PROBE}
    group = synthetic_group(turns=turns, **shape, vocab_size=600, seed=0)
    (tree,) = (row.subtree_end for row in pack_for_scoring([group], row_tokens=10**9))
    (trunk,) = (row.subtree_end for row in pack_for_scoring([group], row_tokens=10**9, scorer=None))
    contexts = [len(group.context(number)) for number, node in enumerate(group.nodes) if node.kind == "probe"]
    forms: dict[str, Attend] = {"chains": attention.chain_attention}
    if cuda:
        forms["flex"] = attention.flex_tree_attention
    used = "flex" if cuda else "chains"
    figures: dict[str, Any] = {"trunk_tokens": len(trunk), "row_tokens": len(tree), "form": used}
    q, k, v = inputs(len(tree))
    reference = forms["chains"](q, k, v, tree, 1.0)
    figures["max_abs_diff"] = max(float((form(q, k, v, tree, 1.0) - reference).abs().max()) for form in forms.values())
    for mode in ("forward", "forward_backward"):
        calls = {name: partial(run, over(form, tree), len(tree), mode) for name, form in forms.items()}
        calls["causal_trunk"] = partial(run, causal, len(trunk), mode)
        calls["causal_per_probe"] = partial(each, contexts, mode)
        seconds = interleaved(calls, repeats, warmup=3)
        figures[mode] = {
            "seconds": {name: round(median(values), 6) for name, values in seconds.items()},
            "tree_vs_causal_trunk": {name: ratio(seconds[name], seconds["causal_trunk"]) for name in forms},
            "per_probe_vs_tree": ratio(seconds["causal_per_probe"], seconds[used]),
        }
    figures["plan_ms"] = round(1000 * median(interleaved({"plan": partial(new_plan, tree)}, 5)["plan"]), 3)
    padded = attention.padded_row(tree)
    padded = padded.cuda() if cuda else padded
    figures["block_mask_ms"] = round(1000 * median(interleaved({"mask": partial(attention.block_mask, padded)}, 5)["mask"]), 3)
    floors = {
        "extra_pairs": extra_pairs(group),
        "note": "tokens that see each other, probes over trunk: the least that the tree can add",
    }
    finish("tree_attention", figures, floors, ("torch", "triton"), out)


def extra_pairs(group: RolloutGroup) -> float:
    """Pairs of tokens that see each other because of the probes, over those of the trajectory alone."""
    trunk = sum(len(node.token_ids) for node in group.nodes if node.kind != "probe")
    extra = 0
    for number, node in enumerate(group.nodes):
        if node.kind == "probe":
            whole, own = len(group.context(number)), len(node.token_ids)
            extra += own * (whole - own) + own * (own + 1) // 2
    return round(extra / (trunk * (trunk + 1) // 2), 4)


@cache
def inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    """q [T, heads, d], k and v [T, kv_heads, d]; the same for the same length, so that making them is not timed."""
    cuda = torch.cuda.is_available()
    heads, kv_heads, dim = (HEADS, KV_HEADS, DIM) if cuda else (CPU_HEADS, CPU_KV_HEADS, CPU_DIM)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    generator = torch.Generator("cuda" if cuda else "cpu").manual_seed(0)
    return tuple(torch.randn(tokens, count, dim, generator=generator, **options) for count in (heads, kv_heads, kv_heads))


def over(form: Attend, tree: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The form bound to one row."""
    return lambda q, k, v: form(q, k, v, tree, q.shape[-1] ** -0.5)


def run(attend: Callable[..., torch.Tensor], tokens: int, mode: str) -> None:
    """One call on fresh leaves."""
    q, k, v = (tensor.detach().requires_grad_(mode != "forward") for tensor in inputs(tokens))
    output = attend(q, k, v)
    if mode != "forward":
        output.sum().backward()


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain causal attention, [T, heads, d] -> [T, heads, d]."""
    first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return F.scaled_dot_product_attention(*first, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


def each(contexts: list[int], mode: str) -> None:
    """What the published schemes do: every probe behind its whole context."""
    for tokens in contexts:
        run(causal, tokens, mode)


def new_plan(subtree_end: torch.Tensor) -> None:
    """A plan, made anew."""
    tree_plan._plan.cache_clear()
    tree_plan.plan_of(subtree_end)


if __name__ == "__main__":
    typer.run(main)
