"""Log-probability of chosen tokens straight from hidden states: hidden x weight -> log-prob, entropy, never an [N, V] tensor.

    hidden [M, H] --rows--> [N, H] --this shard (torch_chunked | triton_head)--> record [N, 4] --one all-gather--> logp, entropy, lse

Formulas are in torch_chunked. Backward recomputes the logits exactly. No atomics: two runs give the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from igpo_megatron.kernels import torch_chunked
from igpo_megatron.types import UserError

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "torch", "triton"]
Form = Literal["auto", "fused", "tma", "chunks", "specialised"]
FORMS: tuple[Form, ...] = get_args(Form)[1:]
"""Of the Triton forward (triton_stream, triton_head). The riskiest comes last, so that a trial of all forms in this order has the results
of the others by then."""

FORM_TABLE = Path(__file__).with_name("head_forms.json")
"""{"NVIDIA H100 80GB HBM3": {"source": "measured: ...", "rules": [{"max_rows": 256, "form": "fused"}, ...]}, "default": ...}

`tools/bench/head_kernel.py --write-table` writes a device's entry from measured medians."""

WORKSPACE = 128 * 2**20
"""Bytes of logits at a time."""


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    need_entropy: bool = True,
    implementation: Implementation = "auto",
    form: Form = "auto",
    workspace: int = WORKSPACE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-prob of each target, entropy of its distribution and log-sum-exp of its logits.

    Args:
        hidden: [M, H]; the same on every rank of `tp_group`.
        weight: [v, H] of the same dtype, this rank's vocabulary rows; shards may be unequal. Gradients are accumulated in fp32.
        targets: [N] int64, global token ids. Negative (-100): ignored, all three results are 0 and no gradient flows.
            A padding token's log-prob is -inf.
        rows: [N] int64, row of `hidden` that predicts each target, repeats allowed; None means N = M in order.
        vocab_start: global id of `weight[0]`.
        vocab_size: number of real tokens; columns from there on are padding and count as -inf. None: no padding.
        temperature: logits are divided by it, > 0.
        tp_group: ranks that share the vocabulary; None for one rank.
        need_entropy: if false, the entropies are zeros without a gradient.
        implementation: `auto` is triton on CUDA where it is importable, else torch.
        form: how triton runs forward: `fused`, `tma` and `specialised` stream the weight through one kernel (triton_stream.py), `chunks`
            lets cuBLAS write chunks of logits. `auto` asks head_forms.json. Ignored by torch.
        workspace: bytes of fp32 logits at a time, at most.

    Returns:
        (logp, entropy, lse), each [N] fp32, in nats.

    The gradient of `hidden` holds this rank's vocabulary shard only: the caller sums it over `tp_group`, as every
    column-parallel layer's caller does.
    """
    if rows is not None:
        hidden = gather_rows(hidden, rows)
    check_inputs(hidden, weight, targets, temperature)
    valid = valid_columns(weight, vocab_start, vocab_size)
    partials, gradients = _functions(implementation, form, hidden, weight)
    call = _Call(partials, gradients, vocab_start, valid, float(temperature), need_entropy, tp_group, workspace)
    return _LinearLogprob.apply(hidden, weight, targets, call)


def check_inputs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float) -> None:
    """Raise ValueError where a hidden row [N, H] for each target [N], one dtype or a positive temperature is missing."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a positive number")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}: expected one dtype")
    if len(hidden) != len(targets):
        raise ValueError(f"{len(hidden)} rows of hidden states for {len(targets)} targets")


def valid_columns(weight: torch.Tensor, vocab_start: int, vocab_size: int | None) -> int:
    """Number of this shard's leading columns that are tokens."""
    return len(weight) if vocab_size is None else max(0, min(len(weight), vocab_size - vocab_start))


def local_targets(targets: torch.Tensor, vocab_start: int, valid: int) -> torch.Tensor:
    """Global ids [N] as columns of this shard, -1 where they are not among them."""
    local = targets - vocab_start
    return torch.where((local >= 0) & (local < valid), local, -1)


def merge(record: torch.Tensor, need_entropy: bool, tp_group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp, entropy, lse) [N] from the records [N, 4] of this shard and, after one all-gather, of the others."""
    top, total, product, picked = torch_chunked.fold(_all_gather(record, tp_group)).unbind(-1)
    log_total = total.log()
    lse = top + log_total
    entropy = log_total - product / total if need_entropy else torch.zeros_like(lse)
    return picked - lse, entropy, lse


@functools.cache
def resolve(implementation: str, device: torch.device) -> str:
    """`torch` or `triton` for tensors on `device`; logged once per process. UserError where triton is demanded and cannot run."""
    if implementation not in ("auto", "torch", "triton"):
        raise UserError(f"model.head={implementation}: expected auto, torch or triton")
    # The interpreter also runs on CPU, but only if it is demanded by name.
    wanted = implementation == "triton" or (implementation == "auto" and device.type == "cuda")
    problem = _why_no_triton(device.type) if wanted else None
    if implementation == "triton" and problem:
        raise UserError(f"model.head=triton on {device.type}: {problem}; use auto or torch")
    chosen = "triton" if wanted and not problem else "torch"
    logger.info("log-probs (model.head=%s) on %s: %s", implementation, device.type, chosen)
    return chosen


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """hidden[rows], [M, H], [N] -> [N, H], whose gradient is the same bits every time however often a row repeats."""
    # On CUDA indexing's own backward sorts the rows before it adds; index_put_ would do so too, but first waits to check their range.
    return hidden[rows] if hidden.is_cuda else _GatherRows.apply(hidden, rows)


@dataclass(frozen=True, slots=True)
class _Call:
    """Arguments, other than tensors, that forward and backward of one call share."""

    partials: Callable[..., torch.Tensor]
    gradients: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None]]
    vocab_start: int
    valid: int
    temperature: float
    need_entropy: bool
    tp_group: dist.ProcessGroup | None
    workspace: int


class _LinearLogprob(torch.autograd.Function):
    """Merges the shards' records forward; hands every row's coefficients to the shard backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, call: _Call
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        local = local_targets(targets, call.vocab_start, call.valid)
        shard = torch_chunked.Shard(hidden, weight, local, call.valid, call.temperature, call.workspace)
        record = call.partials(shard, call.need_entropy)
        logp, entropy, lse = merge(record, call.need_entropy, call.tp_group)
        ignored = targets < 0
        ctx.save_for_backward(hidden, weight, local, ignored, lse, entropy)
        ctx.call = call
        ctx.set_materialize_grads(False)
        outputs = (logp.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0))
        if not call.need_entropy:
            ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, local, ignored, lse, entropy = ctx.saved_tensors
        g, h, e = (torch.zeros_like(lse) if grad is None else grad.masked_fill(ignored, 0.0) for grad in grads)
        coefficients = torch.stack((lse, g, e - g - h * entropy, h), -1)
        call = ctx.call
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        shard = torch_chunked.Shard(hidden, weight, local, call.valid, call.temperature, call.workspace)
        return *call.gradients(shard, coefficients, need_hidden, need_weight), None, None


class _GatherRows(torch.autograd.Function):
    """index_select whose backward adds the rows one after the other; that of indexing adds in parallel on CPU, in any order."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = hidden.shape
        return hidden.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        (grad,) = grads
        return grad.new_zeros(ctx.shape).index_add_(0, rows, grad), None


def _functions(implementation: str, form: str, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(partials, gradients) of one vocabulary shard."""
    if form not in ("auto", *FORMS):
        raise UserError(f"model.head_form={form}: expected auto or one of {', '.join(FORMS)}")
    if resolve(implementation, hidden.device) == "torch":
        return torch_chunked.partials, torch_chunked.gradients
    from igpo_megatron.kernels import triton_head

    if hidden.dtype not in triton_head.DTYPES:
        raise UserError(f"hidden is {hidden.dtype}: the triton implementation takes bf16, fp16 or fp32; use model.head=torch")
    if form == "auto":
        device = torch.cuda.get_device_name(hidden.device) if hidden.is_cuda else "cpu"
        form = choose_form(device, len(hidden), hidden.shape[1], len(weight))
    return triton_head.FORWARDS[form], triton_head.gradients


def choose_form(device_name: str, rows: int, hidden: int, vocab: int, table: dict[str, Any] | None = None) -> str:
    """Form for N `rows`, H `hidden`, v `vocab` rows of weight on this rank; a device that is not listed uses `default`.

    The first rule whose bounds hold decides; a bound that is left out always holds. Never a race at run time: that would change the order
    of summation between runs.
    """
    table = table or _table()
    entry = table.get(device_name) or table["default"]
    sizes = {"max_rows": rows, "max_hidden": hidden, "max_vocab": vocab}
    for rule in entry["rules"]:
        if all(size <= rule[bound] for bound, size in sizes.items() if bound in rule):
            return rule["form"]
    raise ValueError(f"head_forms.json, {device_name}: no rule covers N={rows}, H={hidden}, v={vocab}; the last rule must have no bounds")


@functools.cache
def _table() -> dict[str, Any]:
    """The committed table."""
    return json.loads(FORM_TABLE.read_text(encoding="utf-8"))


def _why_no_triton(device_type: str) -> str | None:
    """None where the kernels can run."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not importable"
    from igpo_megatron.kernels import triton_stream

    if device_type != "cuda" and not triton_stream.INTERPRETED:
        return "the kernels are compiled for CUDA; set TRITON_INTERPRET=1 before Python starts to run them on CPU"
    return None


def _all_gather(record: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[N, 4] -> [ranks, N, 4], in one collective."""
    if group is None or group.size() == 1:
        return record[None]
    gathered = record.new_empty((group.size() * len(record), 4))
    dist.all_gather_into_tensor(gathered, record, group=group)
    return gathered.view(group.size(), *record.shape)
