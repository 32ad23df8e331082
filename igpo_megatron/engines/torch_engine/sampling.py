"""From logits to a sampled token, its log-prob and its entropy. Rows are independent of each other.

logits ──barred rows, temperature──> log-probs ──argmax, or one uniform number per row──> tokens
"""

from __future__ import annotations

import torch


def processed_logprobs(logits: torch.Tensor, temperatures: torch.Tensor, barred: torch.Tensor | None) -> torch.Tensor:
    """[N, V] fp32 log-probs that tokens are sampled from, as vLLM's `processed_logprobs`.

    `logits` [N, V]; `temperatures` [N], 0 (greedy) does not scale; `barred` [V], True for rows of the embedding without a token.
    """
    scaled = logits.float() / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    if barred is not None:
        scaled = scaled.masked_fill(barred, -torch.inf)
    return torch.log_softmax(scaled, -1)


def choose(logprobs: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """[N] tokens: the likeliest at temperature 0, else the one at which the summed probabilities pass `uniforms` [N], fp64 in [0, 1).

    One number per token, drawn from a generator of the request's own, makes a turn independent of its batch and of the device's generator.
    """
    summed = logprobs.exp().cumsum(-1, dtype=torch.float64)
    # The first sum above the target: a token with probability 0 adds nothing, so it is never chosen.
    drawn = torch.searchsorted(summed, (uniforms * summed[:, -1])[:, None], right=True)[:, 0]
    # Beyond the last one only if the sums are NaN. The caller detects that; on a GPU an invalid index would end the process.
    drawn = drawn.clamp(max=logprobs.shape[-1] - 1)
    return torch.where(temperatures > 0, drawn, logprobs.argmax(-1))


def entropies(logprobs: torch.Tensor, tokens: torch.Tensor, top: int) -> torch.Tensor:
    """[N] -sum p ln p, nats, over all tokens (`top` -1) or over the `top` likeliest and the sampled one, as vLLM returns them."""
    terms = -(logprobs.exp() * logprobs).nan_to_num(0.0)  # 0 ln 0 = 0
    if top == -1:
        return terms.sum(-1)
    likeliest = logprobs.topk(min(top, logprobs.shape[-1])).indices
    sampled = torch.where((likeliest == tokens[:, None]).any(-1), 0.0, terms.gather(-1, tokens[:, None])[:, 0])
    return terms.gather(-1, likeliest).sum(-1) + sampled
