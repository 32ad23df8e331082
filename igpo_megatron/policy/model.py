"""A Hugging Face folder as a Megatron `GPTModel` whose head returns log-probs of chosen tokens instead of logits.

    config.json ──ModelShape──> TransformerConfig ──> PolicyModel(GPTModel) <──shards── safetensors

Megatron-Core is used as it is. Ours are the norm, the attention (`TreeAttention`), explicit positions and the head.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from checkpoint_conversion.architectures import ModelShape, check_sizes, check_total, local_name, rules_for
from checkpoint_conversion.hf_folder import HfReader
from checkpoint_conversion.rules import Rule
from igpo_megatron.config.schema import Config
from igpo_megatron.kernels.linear_logprob import gather_rows, linear_logprob, resolve
from igpo_megatron.kernels.token_loss import linear_logprob_with_gradients
from igpo_megatron.policy.attention import TreeAttention, TreeRotaryEmbedding
from igpo_megatron.policy.context import Merge
from igpo_megatron.policy.parallel import wants_cuda
from igpo_megatron.policy.settings import Model
from igpo_megatron.types import UserError

logger = logging.getLogger(__name__)


class RMSNorm(torch.nn.RMSNorm):
    """RMS norm that takes part in sequence parallelism; Megatron's torch wrapper refuses to."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.is_cuda else _NormOnCpu.apply(x, self.weight, self.eps)


class _NormOnCpu(torch.autograd.Function):
    """x r w with r = 1 / sqrt(mean x^2 + eps), in fp32, with fewer passes over memory than torch makes, which has no kernel for it on CPU.

    With n = x r and u = g w:  dL/dw = sum g n,  dL/dx = r (u - n mean(u n)).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, upstream = x.float() * scale, grads[0].float()
        products = upstream * normed
        grad_weight = products.flatten(0, -2).sum(0).to(weight.dtype)
        mean = torch.mv(products.flatten(0, -2), weight.float()).div_(x.shape[-1]).view(scale.shape)
        grad = (upstream * weight.float()).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad.to(x.dtype), grad_weight, None


@dataclass(frozen=True, slots=True)
class Split:
    """Targets by how they are scored."""

    sampled: torch.Tensor
    """[s] int64, places among the targets."""

    probed: torch.Tensor
    """[n - s] int64"""

    order: torch.Tensor
    """[n] int64, where each target stands in (sampled, probed)."""


def split_of(probed: torch.Tensor) -> Split:
    """probed [n] bool, on the host."""
    sampled, others = torch.nonzero(~probed)[:, 0], torch.nonzero(probed)[:, 0]
    return Split(sampled, others, torch.argsort(torch.cat((sampled, others))))


@dataclass(slots=True)
class HeadInputs:
    """Input of the last stage: the log-probs to compute, of `targets`, each predicted by hidden row `predictor`.

    Everything that depends on the values of tensors, such as how many of them a rank has, was computed on the host.
    """

    predictor: torch.Tensor
    """[n] int64, index into the tokens given to the model; under sequence parallelism [m], into those that this rank holds."""

    targets: torch.Tensor
    """[n] int64"""

    temperature: float
    """What logits are divided by."""

    need_entropy: bool
    """Without it the entropies are 0."""

    sampled_vocab: int | None = None
    """Rows of the embedding that a sampled token can be; None for all."""

    split: Split | None = None
    """Probed targets have the logits of all rows, divided by `probe_temperature`; None where there are none."""

    probe_temperature: float = 1.0

    of_tensor: Merge | None = None
    """Of the rows that the tensor-parallel ranks hold under sequence parallelism, into the order of `targets`."""

    of_context: Merge | None = None
    """Of the targets that the context-parallel ranks compute, into the order of the row's; None where this one computes all."""

    upstream: Callable[[slice | torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    """(which of the n targets, their log-probs, their entropies) -> the loss's derivatives by these. With it the head forms gradients in
    the forward pass (kernels/token_loss.py)."""


class PolicyModel(GPTModel):
    """GPTModel with tree positions; `labels` takes `HeadInputs` and the output is [N, 2]: log-prob and entropy, fp32.

    With `HeadInputs.upstream` the output is a pair: the [N, 2] without a gradient, and the `carrier` of token_loss.
    """

    def __init__(self, config: TransformerConfig, spec: Any, shape: ModelShape, padded_vocab: int, settings: Model, **stage: Any) -> None:
        super().__init__(
            config,
            spec,
            vocab_size=padded_vocab,
            max_sequence_length=shape.max_positions,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            rope_scaling=shape.rope_scaling is not None,
            rope_scaling_factor=shape.rope_scaling["factor"] if shape.rope_scaling else 1.0,
            share_embeddings_and_output_weights=shape.tied,
            parallel_output=True,
            **stage,
        )
        self.real_vocab = shape.vocab_size
        self.settings = settings
        self.rotary_pos_emb.__class__ = TreeRotaryEmbedding

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        # Megatron computes angles for 0..T-1 whatever position_ids says; a tree needs the depth of each token.
        output = list(super()._preprocess(input_ids, position_ids, *args, **kwargs))
        output[1] = self.rotary_pos_emb.at(position_ids)
        return tuple(output)

    def _postprocess(
        self, hidden_states: torch.Tensor, *args: Any, labels: HeadInputs | None = None, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if not self.post_process or labels is None:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        hidden = select_rows(hidden_states[:, 0], labels.predictor, labels.of_tensor)

        carriers: list[torch.Tensor] = []

        def head(rows: torch.Tensor, which: slice | torch.Tensor, temperature: float, vocab: int) -> torch.Tensor:
            settings: dict[str, Any] = {
                "vocab_start": parallel_state.get_tensor_model_parallel_rank() * weight.shape[0],
                "vocab_size": vocab,
                "temperature": temperature,
                "tp_group": parallel_state.get_tensor_model_parallel_group(),
                "need_entropy": labels.need_entropy,
                "implementation": self.settings.head,
                "workspace": self.settings.head_workspace_mib * 2**20,
            }
            if labels.upstream is None:
                logp, entropy, _ = linear_logprob(rows, weight, labels.targets[which], form=self.settings.head_form, **settings)
            else:
                upstream = labels.upstream if isinstance(which, slice) else partial(_of_part, labels.upstream, which)
                logp, entropy, carrier = linear_logprob_with_gradients(rows, weight, labels.targets[which], upstream, **settings)
                carriers.append(carrier)
            return torch.stack((logp, entropy), dim=-1)

        of_sampled = (labels.temperature, labels.sampled_vocab or self.real_vocab)
        of_probes = (labels.probe_temperature, self.real_vocab)
        if labels.split is None or of_probes == of_sampled:
            output = head(hidden, slice(None), *of_sampled)
        else:
            parts = ((labels.split.sampled, of_sampled), (labels.split.probed, of_probes))
            found = torch.cat([head(gather_rows(hidden, at), at, *how) for at, how in parts])
            output = gather_rows(found, labels.split.order)
        if labels.of_context is not None:
            # Every rank computes the loss of the whole row, so each keeps the gradient of its own targets.
            output = gather_merged(output, labels.of_context, parallel_state.get_context_parallel_group(), sum_gradients=False)
        return (output, torch.stack(carriers).sum()) if carriers else output


def _of_part(
    upstream: Callable[..., tuple[torch.Tensor, torch.Tensor]], which: torch.Tensor, block: slice, *values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`upstream` of targets `which[block]`."""
    return upstream(which[block], *values)


def select_rows(hidden: torch.Tensor, rows: torch.Tensor, merge: Merge | None) -> torch.Tensor:
    """Rows of the hidden states as every tensor-parallel rank needs them for its vocabulary shard: [M, H], [N] -> [N, H].

    Under sequence parallelism each rank holds T / tp rows, selects [n] of them, and these are gathered as `merge` says. The gradient is
    summed over the group either way, because every rank's head sees the same rows.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return gather_rows(hidden, rows)
    if merge is None:
        return tensor_parallel.copy_to_tensor_model_parallel_region(gather_rows(hidden, rows))
    return gather_merged(gather_rows(hidden, rows), merge, parallel_state.get_tensor_model_parallel_group(), sum_gradients=True)


def gather_merged(mine: torch.Tensor, merge: Merge, group: dist.ProcessGroup, *, sum_gradients: bool) -> torch.Tensor:
    """Rows that the ranks of a group hold, in one order on all of them: [n, H] of this rank -> [N, H].

    The gradient of a row is the sum over the group where its ranks use the rows differently, and the owner's where all do the same.
    """
    padded = F.pad(mine, (0, 0, 0, merge.most - len(mine)))
    gathered = tensor_parallel.gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=sum_gradients, group=group)
    return gather_rows(gathered, merge.slot)


def transformer_config(shape: ModelShape, config: Config) -> TransformerConfig:
    """Megatron's description of the model and its layout."""
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    recompute: dict[str, Any] = {}
    if config.model.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif config.model.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
    experts: dict[str, Any] = {}
    if shape.mixture is not None:
        experts = {
            "num_moe_experts": shape.mixture.num_experts,
            "moe_ffn_hidden_size": shape.mixture.ffn_size,
            "moe_router_topk": shape.mixture.top_k,
            # A softmax over the chosen logits alone sums to 1; one over all of them, before choosing, does not.
            "moe_router_pre_softmax": not shape.mixture.sums_to_one,
            # Reinforcement learning keeps the router as it was trained: no load-balancing loss pulls at it.
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": resolve_backend(config.model.backend, wants_cuda(config.run.device)) == "te",
            "expert_model_parallel_size": config.parallel.expert,
            "expert_tensor_parallel_size": 1,
        }
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_size,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        context_parallel_size=config.parallel.context,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline if config.parallel.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=config.parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=config.parallel.last_stage_layers,
        sequence_parallel=config.parallel.sequence,
        variable_seq_lengths=True,
        # The one dispatcher for rows of any length; Megatron demands it even for dense models.
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        # Without it the interleaved schedule deadlocks on rows of different lengths.
        overlap_p2p_comm=config.parallel.virtual_pipeline > 1,
        # Summed losses: what they are divided by is known before the first micro-batch.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fuses_gradients(wants_cuda(config.run.device)),
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **recompute,
        **experts,
    )


def fuses_gradients(cuda: bool) -> bool:
    """Whether weight gradients are added to their fp32 sums inside the matmul, by NVIDIA Apex's kernel, where it is installed."""
    return cuda and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def layer_spec(config: TransformerConfig, backend: str, chunk: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this rank (of one of its chunks, in a virtual pipeline), with our attention (and, in the local backend, our norm)."""
    if backend == "te":
        spec = get_gpt_layer_with_transformer_engine_spec(config.num_moe_experts, config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        if config.num_moe_experts:
            # TransformerEngine's layers keep the norm in front of experts apart, so checkpoints of both must name it so.
            del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = spec.submodules.self_attention
    attention.params = {**attention.params, "attn_mask_type": AttnMaskType.arbitrary}
    attention.submodules.core_attention = TreeAttention
    if config.qk_layernorm and backend == "local":
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config, chunk), layer_norm=RMSNorm)


def resolve_backend(backend: str, cuda: bool) -> str:
    """`auto` takes TransformerEngine on CUDA where it can be imported. Raises UserError for `te` where it cannot."""
    available = importlib.util.find_spec("transformer_engine") is not None
    if backend == "te" and not available:
        raise UserError("model.backend=te, but transformer_engine is not importable; install the [te] extra or use model.backend=local")
    chosen = ("te" if cuda and available else "local") if backend == "auto" else backend
    logger.info("layers (model.backend=%s): %s", backend, chosen)
    return chosen


def build_model(shape: ModelShape, config: Config, device: torch.device) -> list[PolicyModel]:
    """This rank's part of the policy, on `device`, with uninitialised weights: one model, or the chunks of a virtual pipeline."""
    megatron = transformer_config(shape, config)
    backend = resolve_backend(config.model.backend, device.type == "cuda")
    resolve(config.model.head, device)  # an error here comes before engines are started
    chunks = range(config.parallel.virtual_pipeline) if config.parallel.virtual_pipeline > 1 else (None,)
    return [_build_chunk(shape, config, megatron, backend, chunk).to(device) for chunk in chunks]


def _build_chunk(shape: ModelShape, config: Config, megatron: TransformerConfig, backend: str, chunk: int | None) -> PolicyModel:
    model = PolicyModel(
        megatron,
        layer_spec(megatron, backend, chunk),
        shape,
        padded_vocab(shape, config),
        config.model,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Megatron's mark of parameters with an optimizer of their own. It leaves it out at expert parallel 1, whose
            # checkpoints would then load at no other size.
            parameter.allreduce = False
    return model


def padded_vocab(shape: ModelShape, config: Config) -> int:
    """Vocabulary rows including padding; the same at every tensor-parallel degree, so checkpoints reshard."""
    multiple = config.model.vocab_multiple
    return -(-shape.vocab_size // multiple) * multiple


def global_names(chunks: Sequence[PolicyModel]) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters of this rank under their names in the whole model, whatever the layer backend calls them."""
    experts = (chunks[0].config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    first_expert = experts * parallel_state.get_expert_model_parallel_rank()
    return [
        (local_name(name, chunk.decoder.layers[0].layer_number - 1, first_expert), parameter)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    ]


def tensor_shards(rule: Rule) -> int:
    """How many tensor-parallel ranks a tensor is cut over; experts are not cut."""
    return 1 if rule.split_dim is None or rule.expert is not None else parallel_state.get_tensor_model_parallel_world_size()


def load_weights(chunks: Sequence[PolicyModel], shape: ModelShape, folder: Path, vocab_multiple: int) -> None:
    """Stream this rank's shards out of a Hugging Face folder, one tensor at a time; every tensor of the folder must have a rule."""
    rules = rules_for(shape, vocab_multiple)
    reader = HfReader(folder)
    check_total(rules, hf_names=reader.names())
    check_sizes(rules, shape, {name: reader.shape(name) for name in reader.names()})
    fill_weights(chunks, rules, lambda rule: rule.to_megatron([reader.get(hf_name) for hf_name in rule.hf_names]))


@torch.no_grad()
def fill_weights(chunks: Sequence[PolicyModel], rules: dict[str, Rule], full: Callable[[Rule], torch.Tensor]) -> None:
    """Copy this rank's shard of `full(rule)` into every parameter, one tensor at a time."""
    named = global_names(chunks)
    held = [name for name, _ in named]
    check_total({name: rules[name] for name in held if name in rules}, megatron_names=held)
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in named:
        rule = rules[name]
        size = tensor_shards(rule)
        shard = rule.shard(full(rule), size, rank % size)
        assert shard.shape == parameter.shape, f"{name}: shard {tuple(shard.shape)} for parameter {tuple(parameter.shape)}"
        parameter.copy_(shard)
        # Megatron sets these while initialising, which we skip; without them the gradient norm counts shards as duplicates.
        split = rule.split_dim is not None
        parameter.tensor_model_parallel = split  # type: ignore[attr-defined]
        parameter.partition_dim = rule.split_dim if split else -1  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
