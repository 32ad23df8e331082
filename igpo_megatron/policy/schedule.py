"""Run packed rows through Megatron's pipeline schedules: one row is one micro-batch.

Every rank of a data-parallel part has the same rows. The ranks of a context-parallel group run a share of each row, and only the last
pipeline stage computes log-probs and losses. A rank holds one model, or the chunks of a virtual pipeline, which take the rows in turn.

Results stay on the device until the last row is done and are copied to the host once: a copy waits for the device, which then stands
idle until the next row's kernels are launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from igpo_megatron.algorithms.losses.tokens import Tokens
from igpo_megatron.packing.tree import PackedRow
from igpo_megatron.policy.context import RowPart, merge_of, part_of
from igpo_megatron.policy.host_memory import upload
from igpo_megatron.policy.model import HeadInputs, split_of
from igpo_megatron.policy.routing_replay import replay

Objective = Callable[[Tokens], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""The training objective of one row: (loss scalar, metric sums); both add up over rows and ranks."""


def tokens_of(row: PackedRow, logprobs: torch.Tensor, entropy: torch.Tensor | None = None) -> Tokens:
    """A row's targets as the input of a loss."""
    return Tokens(
        logprobs=logprobs,
        weight=row.weight,
        advantages=row.advantages,
        old_logprobs=row.old_logprobs,
        behavior_logprobs=row.behavior_logprobs,
        ref_logprobs=row.ref_logprobs,
        entropy=entropy,
        old_entropies=row.old_entropies,
        sequence=row.sequence,
        sequences=row.sequences,
    )


def forward_only(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[PackedRow],
    *,
    temperature: float,
    probe_temperature: float | None = None,
    sampled_vocab: int | None = None,
    device: torch.device,
    with_entropy: bool = False,
) -> list[torch.Tensor]:
    """[N] log-probs (or [N, 2] with entropies) of every target of every row, on the last stage; an empty list on the others.

    `probe_temperature`: of the targets that are a probe's, None for the same as all others'. `sampled_vocab`: as in `HeadInputs`.
    """
    settings = (temperature, temperature if probe_temperature is None else probe_temperature, sampled_vocab)

    def keep(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return (output if with_entropy else output[:, 0]).detach()

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        options: dict[str, Any] = {"forward_only": True, "collect_non_loss_data": True}
        results = pipelined(chunks, rows, lambda row: keep, settings, device, with_entropy)(**options)
    return list(torch.cat(results).cpu().split([len(result) for result in results])) if results else []


def derivatives(
    objective: Objective,
    row: PackedRow,
    numbers: torch.Tensor | None,
    which: slice | torch.Tensor,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of a loss on tokens by the log-probs [n] and entropies [n] of some targets: `which` of the row's targets `numbers`."""
    part = row.with_targets(which if numbers is None else numbers[which])
    with torch.enable_grad():
        leaves = (logprobs.detach().requires_grad_(), entropy.detach().requires_grad_())
        value, _ = objective(tokens_of(part, *leaves))
        g, h = torch.autograd.grad(value, leaves, allow_unused=True)
    return torch.zeros_like(logprobs) if g is None else g, torch.zeros_like(entropy) if h is None else h


def summed(per_row: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Scalars added up by name, in fp64 where they are; copied to the host at once."""
    if not per_row:
        return {}
    names = list(dict.fromkeys(name for metrics in per_row for name in metrics))
    totals = [torch.stack([metrics[name].double() for metrics in per_row if name in metrics]).sum() for name in names]
    return dict(zip(names, torch.stack(totals).tolist(), strict=True))


def pipelined(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[PackedRow],
    loss_for: Callable[[PackedRow], Callable[..., Any]],
    settings: tuple[float, float, int | None],
    device: torch.device,
    need_entropy: bool,
    upstream_of: Callable[..., Any] | None = None,
) -> Callable[..., list[Any]]:
    """Megatron's schedule over these rows, to be called with `forward_only`: one result of `loss_for(row)` per row, on the last stage.

    `settings`: the temperatures of sampled tokens and of probes, and the rows of the embedding that a sampled token can be.

    `upstream_of`: (row, numbers of this rank's targets) -> `HeadInputs.upstream`.
    """

    def step(iterator: Iterator[PackedRow], stage: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        on_host = next(iterator)
        model = get_attr_wrapped_model(stage, "decoder", return_model_obj=True)
        part = part_of(on_host, parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())
        head = _head_inputs(part, settings, need_entropy, model.config.sequence_parallel)
        row, part, head = upload((on_host, part, head), device)
        head.upstream = partial(upstream_of, row, part.numbers) if upstream_of else None
        replay(model, part.experts)
        output = stage(
            input_ids=part.token_ids[None], position_ids=part.position_ids[None], attention_mask=on_host.subtree_end, labels=head
        )
        return output, loss_for(row)

    return partial(
        get_forward_backward_func(),
        forward_step_func=step,
        data_iterator=[iter(rows) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(rows),
        seq_length=max(row.num_tokens for row in rows),
        micro_batch_size=1,
    )


def _head_inputs(part: RowPart, settings: tuple[float, float, int | None], need_entropy: bool, sequence_parallel: bool) -> HeadInputs:
    """What the last stage computes of this rank's part of a row, on the host."""
    sampled, probes, vocab = settings
    predictor, of_tensor = part.predictor, None
    if sequence_parallel:
        size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        held = len(part.token_ids) // size
        owner = predictor // held
        predictor, of_tensor = predictor[owner == rank] - rank * held, merge_of(owner, size)
    split = None if part.probed is None else split_of(part.probed)
    return HeadInputs(predictor, part.targets, sampled, need_entropy, vocab, split, probes, of_tensor, part.merge)
