"""The policy: log-probs of packed rows, training steps, a reference copy. Owns the model, its gradients and its optimizer.

The main rank gives the rows and gets their results, in the same order; the other ranks give none, and are sent their data-parallel share.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from checkpoint_conversion.architectures import ModelShape, read_shape
from igpo_megatron.config.schema import Config
from igpo_megatron.packing.batches import balance, row_cost
from igpo_megatron.packing.tree import PackedRow, blank_row
from igpo_megatron.policy import parallel, schedule
from igpo_megatron.policy.host_memory import kept_on_host
from igpo_megatron.policy.model import PolicyModel, build_model, load_weights
from igpo_megatron.policy.parallel import Ranks
from igpo_megatron.policy.rows import Share, deal
from igpo_megatron.policy.schedule import Objective
from igpo_megatron.policy.settings import Optim
from igpo_megatron.supervision.freed_memory import give_back_freed_memory
from igpo_megatron.types import Metric, RunStopped


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step."""

    loss: float
    grad_norm: float
    """Global norm before clipping; NaN or inf where the step was skipped for it."""

    skipped: bool
    """The update was left out because loss or gradient was not finite."""

    metrics: dict[str, float]
    """Sums over all targets of all ranks, as the loss reports them."""


class NonFiniteSteps(RunStopped):
    """Too many steps in a row had a non-finite loss or gradient."""


def learning_rate(step: int, steps: int, optim: Optim) -> float:
    """Rate of optimizer step `step` (0-based) of `steps`: linear warm-up, then constant, then the chosen decay, to min_lr at the last step.

    `optim.warmup_steps` are training steps, of `optim.minibatches` optimizer steps each; the last of them has the peak rate.
    """
    warmup, last = optim.warmup_steps * optim.minibatches, steps - 1
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.decay == "constant" or last < 1:
        return optim.lr
    begin = min(max(optim.decay_from * steps, warmup), last - 1)
    progress = min(max((step - begin) / (last - begin), 0.0), 1.0)
    share = 1 - progress if optim.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * share


class Policy:
    """This rank's part of the policy."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.shape: ModelShape = read_shape(config.model.path)
        self.chunks: list[PolicyModel] = build_model(self.shape, config, ranks.device)
        """What this rank holds of the model: one part, or several in a virtual pipeline."""

        load_weights(self.chunks, self.shape, config.model.path, config.model.vocab_multiple)
        self.wrapped, self.optimizer = _for_training(self.chunks, config)
        self.steps_taken = 0
        """Optimizer steps since the run's start, skipped ones included; the learning-rate schedule is a function of it."""

        self.sampled_vocab: int | None = None
        """Number of leading rows of the embedding that engines can sample; the others are padding. None for all."""

        self.pending_save: Any = None
        """What checkpoint.py is writing in the background."""

        self.total_steps = config.run.steps * config.optim.minibatches
        self._skipped_in_a_row = 0
        needs_reference = config.loss.keeps_reference
        locked = ranks.device.type == "cuda"  # they are copied to the device in every step
        self._reference = kept_on_host([p.detach() for p in _parameters(self.chunks)], locked=locked) if needs_reference else None

    @property
    def has_reference(self) -> bool:
        """A copy of the first weights is kept for the KL term."""
        return self._reference is not None

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of this many tokens."""
        layout = self.config.parallel
        chunks = 2 * layout.context if layout.context > 1 else 1
        return chunks * (layout.tensor if layout.sequence else 1)

    def log_probs(self, rows: Sequence[PackedRow], temperature: float | None = None, *, with_entropy: bool = False) -> list[torch.Tensor]:
        """[N] log-probs per row of the main rank, there, in the order of `rows`; nothing on the other ranks, whose `rows` are ignored.

        temperature None: sampled tokens at `rollout.temperature` among `sampled_vocab`, probes at `reward.probe_temperature`.
        A given temperature holds for all targets, each among all rows of the embedding.
        `with_entropy`: [N, 2], log-probs and entropies.
        """
        mine, places = self._share(rows)
        if not mine:
            return []
        of_probes = 1.0 if temperature is None and self.config.reward.probe_temperature == 1 else None
        vocab = self.sampled_vocab if temperature is None else None
        temperature = temperature or self.config.rollout.temperature or 1.0
        results = schedule.forward_only(
            self.wrapped,
            mine,
            temperature=temperature,
            probe_temperature=of_probes,
            sampled_vocab=vocab,
            device=self.ranks.device,
            with_entropy=with_entropy,
        )
        self.give_back_memory()
        # Copies, because sending a view sends all of its storage.
        found = {place: result.clone() for place, result in zip(places, results, strict=True) if place >= 0} if self.ranks.reports else {}
        merged = {place: result for part in parallel.gather_on_main(found) for place, result in part.items()}
        return [merged[place] for place in sorted(merged)]

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within the block the model has the weights that the run began with."""
        assert self._reference is not None, "no reference was kept: loss.kl_coef is 0"
        current = [p.detach().clone() for p in _parameters(self.chunks)]
        _copy_weights(self.chunks, self._reference)
        try:
            yield
        finally:
            _copy_weights(self.chunks, current)

    def forward_backward(self, rows: Sequence[PackedRow], objective: Objective) -> dict[str, float]:
        """Replace the gradients by those of all rows; returns this rank's sums of `loss` and of the objective's metrics.

        With `model.head_backward=in_forward` the head forms its gradients in the forward pass (kernels/token_loss.py): the objective must
        be a sum over tokens, of which each depends on its own log-prob and entropy alone.
        """

        def loss_of(row: PackedRow, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Any]:
            output, carrier = output if isinstance(output, tuple) else (output, 0.0)
            value, metrics = objective(schedule.tokens_of(row, output[:, 0], output[:, 1]))
            value = value + carrier
            sums = {name: metric.detach() for name, metric in metrics.items()}
            # The second item is Megatron's token count, which is not used: losses are already divided by global counts.
            return value, torch.zeros((), dtype=torch.int, device=output.device), {**sums, Metric.LOSS: value.detach()}

        self.optimizer.zero_grad()
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
            chunk.train()
        temperature = self.config.rollout.temperature or 1.0
        upstream_of = partial(schedule.derivatives, objective) if self.config.model.head_backward == "in_forward" else None
        run = schedule.pipelined(
            self.wrapped,
            self._share(rows)[0],
            lambda row: partial(loss_of, row),
            (temperature, temperature, self.sampled_vocab),
            self.ranks.device,
            True,
            upstream_of,
        )
        return schedule.summed(run(forward_only=False))

    def optimizer_step(self, sums: dict[str, float]) -> StepResult:
        """Use the gradients of `forward_backward`, which returned `sums` on this rank.

        Raises NonFiniteSteps after `optim.max_skipped` skipped steps in a row.
        """
        metrics = self._sum_metrics(sums)
        value = metrics.pop(Metric.LOSS)
        overflow = bool(self.optimizer.prepare_grads())
        grad_norm = float(self.optimizer.get_grad_norm())
        finite = not overflow and math.isfinite(grad_norm) and math.isfinite(value)
        if finite:
            _set_rates(self.optimizer, learning_rate(self.steps_taken, self.total_steps, self.config.optim), self.config.optim.weight_decay)
            if self.config.optim.clip_grad > 0:
                _clip(self.optimizer, self.config.optim.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()
        self.give_back_memory()
        self.steps_taken += 1
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self.config.optim.max_skipped:
            raise NonFiniteSteps(
                f"{self._skipped_in_a_row} steps in a row had a non-finite loss ({value}) or gradient norm ({grad_norm}); "
                "lower optim.lr, or look at the last rollouts for extreme log-probs"
            )
        return StepResult(loss=value, grad_norm=grad_norm, skipped=not finite, metrics=metrics)

    def give_back_memory(self) -> None:
        """After a pass or a checkpoint on CPU, where engines and other ranks use the same memory in their turn."""
        if self.ranks.device.type == "cpu":
            give_back_freed_memory()

    def _share(self, rows: Sequence[PackedRow]) -> tuple[list[PackedRow], list[int]]:
        """This rank's rows of those that the main rank gives, and their places among them, -1 for a blank row. Collective."""
        share = deal(self._shares(rows) if self.ranks.is_main else [], self.ranks)
        return share.rows, share.places

    def _shares(self, rows: Sequence[PackedRow]) -> list[Share]:
        """The rows of each data-parallel rank, equally many; blank ones fill up."""
        shape = self.shape
        width = shape.num_heads * shape.head_dim
        per_token = 2.0 * shape.num_layers * (2 * shape.hidden_size * width + 3 * shape.hidden_size * shape.active_ffn_size)
        costs = [row_cost(row.num_tokens, 2 * shape.num_layers * width, per_token) for row in rows]
        parts = balance(costs, self.ranks.data_size) if rows else [[] for _ in range(self.ranks.data_size)]
        if self.config.parallel.virtual_pipeline > 1:
            # The interleaved schedule takes rows in groups of one per stage.
            parts = [[*part, *[-1] * (-len(part) % self.ranks.pipeline_size)] for part in parts]
        return [Share([rows[place] if place >= 0 else blank_row(self.row_multiple) for place in part], part) for part in parts]

    def _sum_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Over all ranks whose results count."""
        total: dict[str, float] = {}
        for part in parallel.gather(sums if self.ranks.reports else {}):
            for name, number in part.items():
                total[name] = total.get(name, 0.0) + number
        return total


def _for_training(chunks: Sequence[PolicyModel], config: Config) -> tuple[list[DistributedDataParallel], Any]:
    """Wrap the model for data parallelism and make its optimizer."""
    megatron = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    wrapped = [DistributedDataParallel(megatron, ddp, Float16Module(megatron, chunk) if megatron.bf16 else chunk) for chunk in chunks]
    if dist.get_world_size() > 1:
        for chunk in wrapped:
            chunk.broadcast_params()
    optim = config.optim
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=megatron.bf16,
            params_dtype=megatron.params_dtype,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        wrapped,
    )
    # Gradients are sums already divided by global counts: finalising must not divide by a token count again.
    megatron.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(model, None, **kwargs)
    megatron.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def _set_rates(optimizer: Any, rate: float, weight_decay: float) -> None:
    """Set rate, decay and form of every group of parameters, in place of Megatron's OptimizerParamScheduler.

    Megatron gives norms and biases a `wd_mult` of 0. Done before every step, because a checkpoint brings its own values. The groups'
    `max_lr` and `min_lr` are those of the schedule, because nothing overrides them.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
        if "fused" in group and all(parameter.is_cpu for parameter in group["params"]):
            # torch's Adam in one pass over the numbers instead of ten. On CUDA it would want its step counts on the device, where
            # checkpoints do not put them; TransformerEngine's and Apex's are fused anyway.
            group["fused"] = True


def _clip(optimizer: Any, max_norm: float, grad_norm: float) -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=max_norm, total_norm=grad_norm)


def _parameters(chunks: Sequence[PolicyModel]) -> list[torch.nn.Parameter]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]


@torch.no_grad()
def _copy_weights(chunks: Sequence[PolicyModel], source: Sequence[torch.Tensor]) -> None:
    for parameter, tensor in zip(_parameters(chunks), source, strict=True):
        parameter.copy_(tensor, non_blocking=True)
