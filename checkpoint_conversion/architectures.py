"""One table per architecture, keyed by `config.json: model_type`: which rule makes each Megatron tensor of which HF tensors.

folder/config.json --read_shape--> ModelShape --rules_for--> {Megatron name: Rule} --check_total--> nothing forgotten, nothing twice

The tables use the names of Megatron's local layers, and give the names in TransformerEngine's layers where they differ: it fuses a
norm into the linear layer after it, and the experts of a layer into one module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_conversion.hf_config import head_dim, read_config, with_defaults
from checkpoint_conversion.rules import ConversionError, Copy, GateUp, PadVocab, Qkv, Row, Rule, Tied

Table = Mapping[str, tuple[type[Rule], tuple[str, ...]]]
"""Megatron name -> (rule, HF names). In a layer's table both sides leave out the layer's prefix; `{e}` stands for each expert."""


@dataclass(frozen=True)
class Block:
    """The tensors of one part of a layer."""

    tensors: Table
    te_names: Mapping[str, str]
    """Local name -> TransformerEngine's, where they differ."""


@dataclass(frozen=True)
class Architecture:
    """The tensors of one model family: those outside the layers are the same in all."""

    attention: Block
    mlp: Block

    @property
    def layer(self) -> Table:
        """Tensors of every layer."""
        return {**self.attention.tensors, **self.mlp.tensors}

    @property
    def routed(self) -> bool:
        """A router sends each token to some experts."""
        return "mlp.router.weight" in self.layer

    @property
    def te_names(self) -> Mapping[str, str]:
        return {**self.attention.te_names, **self.mlp.te_names}


MODEL: Table = {
    "embedding.word_embeddings.weight": (PadVocab, ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": (Copy, ("model.norm.weight",)),
    "output_layer.weight": (PadVocab, ("lm_head.weight",)),
}
TIED: Table = {"output_layer.weight": (Tied, ("model.embed_tokens.weight",))}

ATTENTION = Block(
    {
        "input_layernorm.weight": (Copy, ("input_layernorm.weight",)),
        "self_attention.linear_qkv.weight": (Qkv, ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),
        "self_attention.linear_proj.weight": (Row, ("self_attn.o_proj.weight",)),
    },
    {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"},
)
QKV_BIAS: Table = {"self_attention.linear_qkv.bias": (Qkv, ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"))}
QK_NORM: Table = {
    "self_attention.q_layernorm.weight": (Copy, ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": (Copy, ("self_attn.k_norm.weight",)),
}
BIASED_ATTENTION = Block({**ATTENTION.tensors, **QKV_BIAS}, ATTENTION.te_names)
NORMED_ATTENTION = Block({**ATTENTION.tensors, **QK_NORM}, ATTENTION.te_names)

MLP = Block(
    {
        "pre_mlp_layernorm.weight": (Copy, ("post_attention_layernorm.weight",)),
        "mlp.linear_fc1.weight": (GateUp, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        "mlp.linear_fc2.weight": (Row, ("mlp.down_proj.weight",)),
    },
    {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"},
)


def _mixture(module: str, gate: str, up: str, down: str) -> Block:
    """A mixture of experts that the HF model keeps in `module`. The norm in front is separate in TransformerEngine's layers as well."""
    expert = f"{module}.experts.{{e}}"
    return Block(
        {
            "pre_mlp_layernorm.weight": (Copy, ("post_attention_layernorm.weight",)),
            "mlp.router.weight": (Copy, (f"{module}.gate.weight",)),
            "mlp.experts.local_experts.{e}.linear_fc1.weight": (GateUp, (f"{expert}.{gate}.weight", f"{expert}.{up}.weight")),
            "mlp.experts.local_experts.{e}.linear_fc2.weight": (Row, (f"{expert}.{down}.weight",)),
        },
        {
            f"mlp.experts.local_experts.{{e}}.{linear}.weight": f"mlp.experts.{linear}.weight{{e}}"
            for linear in ("linear_fc1", "linear_fc2")
        },
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(ATTENTION, MLP),
    "mistral": Architecture(ATTENTION, MLP),
    "mixtral": Architecture(ATTENTION, _mixture("block_sparse_moe", "w1", "w3", "w2")),
    "qwen2": Architecture(BIASED_ATTENTION, MLP),
    "qwen3": Architecture(NORMED_ATTENTION, MLP),
    "qwen3_moe": Architecture(NORMED_ATTENTION, _mixture("mlp", "gate_proj", "up_proj", "down_proj")),
}
"""Supported families; each has a row in the parity test of tests/distributed/test_families.py."""

WHY_NOT = {
    "deepseek_v2": "Megatron-Core 0.16.1 builds multi-latent attention only where TransformerEngine is installed",
    "deepseek_v3": "Megatron-Core 0.16.1 builds multi-latent attention only where TransformerEngine is installed",
    "gemma": "its norms add one to their weight",
    "gemma2": "its attention caps logits and alternates sliding windows",
    "gemma3_text": "its layers alternate sliding windows",
    "gpt_oss": "its attention has sinks and sliding windows",
    "gpt2": "it has learned positions and no gated MLP",
    "phi3": "its attention reads one fused projection, and its long-context rope is not in Megatron-Core",
    "qwen2_moe": "its shared expert has a gate of its own",
    "qwen3_next": "most of its layers are linear attention",
}
"""Unsupported families that users ask for, and the reason."""

_LAYER_NAME = re.compile(r"(decoder\.layers\.)(\d+)(\..+)")
_LOCAL_EXPERT = re.compile(r"(.+\.local_experts\.)(\d+)(\..+)")
_GROUPED_EXPERT = re.compile(r"(.+\.experts)\.(linear_fc\d\.weight)(\d+)")
_LOCAL_NAMES = {te: local for architecture in ARCHITECTURES.values() for local, te in architecture.te_names.items() if "{e}" not in te}
# Buffers that old checkpoints carry and every implementation recomputes from the config.
_DERIVED = re.compile(r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# Endings of tensors that quantized formats store beside a weight, or in its place.
_SCALES = ("_scale_inv", ".weight_scale", ".input_scale", ".qweight", ".scales", ".absmax", ".qzeros", ".weight_packed")


@dataclass(frozen=True)
class Mixture:
    """The experts that take the place of each layer's MLP."""

    num_experts: int
    top_k: int
    """Experts that each token is sent to."""
    ffn_size: int
    """Of each expert."""
    sums_to_one: bool
    """The weights of a token's experts are scaled to sum to 1."""


@dataclass(frozen=True)
class ModelShape:
    """The contents of config.json that matter here, in one spelling for all versions of the format."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding in the HF folder, without padding."""
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: dict[str, float] | None
    """{"factor": ...} of llama3 rope scaling, whose other numbers are fixed; None for plain rope."""
    norm_eps: float
    max_positions: int
    dtype: str | None
    """Such as "bfloat16"; None where config.json has none."""
    mixture: Mixture | None
    """None for a dense model."""

    @property
    def active_ffn_size(self) -> int:
        """Inner width of the MLPs that one token passes in a layer."""
        return self.ffn_size if self.mixture is None else self.mixture.ffn_size * self.mixture.top_k


def read_shape(folder: str | Path) -> ModelShape:
    """The shape of the model in an HF folder.

    Raises ConversionError with everything that is wrong or unsupported: no folder, no config.json, a truncated config.json, an unknown
    architecture, a value of the wrong kind, a key that changes what the model computes and has no rule.
    """
    return shape_of(read_config(folder), where=str(Path(folder) / "config.json"))


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that a parsed config.json describes; raises as `read_shape` does."""
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(str(model_type))
    if architecture is None:
        why = WHY_NOT.get(str(model_type), "no table says how its tensors map to Megatron-Core")
        raise ConversionError(
            f"{where}: model_type {model_type!r} is not supported, because {why}; supported are {', '.join(ARCHITECTURES)}"
        )
    qkv_bias = "self_attention.linear_qkv.bias" in architecture.layer
    qk_norm = "self_attention.q_layernorm.weight" in architecture.layer
    built = {"qkv_bias": qkv_bias, "use_qk_norm": qk_norm}
    family = with_defaults(config, where, mixture=architecture.routed, built=built)
    rope = family.rope_parameters
    return ModelShape(
        model_type=family.model_type,
        num_layers=family.num_hidden_layers,
        hidden_size=family.hidden_size,
        ffn_size=family.intermediate_size,
        num_heads=family.num_attention_heads,
        num_kv_heads=family.num_key_value_heads,
        head_dim=head_dim(family),
        vocab_size=family.vocab_size,
        tied=family.tie_word_embeddings,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling={"factor": float(rope["factor"])} if rope["rope_type"] == "llama3" else None,
        norm_eps=family.rms_norm_eps,
        max_positions=family.max_position_embeddings,
        dtype=config.get("dtype") or config.get("torch_dtype"),
        mixture=_mixture_of(family) if architecture.routed else None,
    )


def _mixture_of(family: Any) -> Mixture:
    mixtral = family.model_type == "mixtral"  # its experts have the only MLP's size, and their weights always sum to 1
    return Mixture(
        num_experts=family.num_local_experts,
        top_k=family.num_experts_per_tok,
        ffn_size=family.intermediate_size if mixtral else family.moe_intermediate_size,
        sums_to_one=mixtral or family.norm_topk_prob,
    )


def rules_for(shape: ModelShape, vocab_multiple: int) -> dict[str, Rule]:
    """Every Megatron tensor of the model by its global name, with the rule that makes it.

    The vocabulary is padded to a multiple of `vocab_multiple`, which tensor parallelism must divide. A tied model has a rule for
    `output_layer.weight`, too: the last pipeline stage may hold a copy of the embedding; it exports nothing.
    """
    architecture = ARCHITECTURES[shape.model_type]
    model = {**MODEL, **TIED} if shape.tied else MODEL
    rules = [_bind(kind, name, hf, shape, vocab_multiple, te_name=name) for name, (kind, hf) in model.items()]
    experts = shape.mixture.num_experts if shape.mixture else 0
    for layer in range(shape.num_layers):
        for name, (kind, hf) in architecture.layer.items():
            te_name = architecture.te_names.get(name, name)
            for expert in range(experts) if "{e}" in name else (None,):
                local, te, *hf_names = (part.replace("{e}", str(expert)) for part in (name, te_name, *hf))
                rules.append(
                    _bind(
                        kind,
                        f"decoder.layers.{layer}.{local}",
                        tuple(f"model.layers.{layer}.{part}" for part in hf_names),
                        shape,
                        vocab_multiple,
                        te_name=f"decoder.layers.{layer}.{te}",
                        expert=expert,
                    )
                )
    return {rule.megatron_name: rule for rule in rules}


def _bind(kind: type[Rule], name: str, hf_names: tuple[str, ...], shape: ModelShape, vocab_multiple: int, **more: Any) -> Rule:
    if issubclass(kind, Qkv):
        return kind(name, hf_names, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, **more)
    if issubclass(kind, PadVocab):
        return kind(name, hf_names, vocab_size=shape.vocab_size, multiple=vocab_multiple, **more)
    return kind(name, hf_names, **more)


def check_total(rules: Mapping[str, Rule], *, hf_names: Iterable[str] | None = None, megatron_names: Iterable[str] | None = None) -> None:
    """Raise ConversionError with the full list unless every tensor of each side given is claimed by exactly one rule.

    Megatron names may be of either layer kind. Not counted are rotary buffers, which are recomputed, the `_extra_state` of
    TransformerEngine's modules, which is no weight, and on tied models a second copy of the embedding: `lm_head.weight` in the HF
    folder (compared when the folder is converted), `output_layer.weight` on the Megatron side, which only a last pipeline stage holds.
    """
    problems: list[str] = []
    tied = {name for name, rule in rules.items() if not rule.exports}
    if hf_names is not None:
        hf_names = list(hf_names)
        claims = Counter(name for rule in rules.values() for name in rule.exports)
        if cause := _one_cause(hf_names, claims):
            raise ConversionError(f"the tables do not cover this model: {cause}")
        copies = {"lm_head.weight"} if tied else set()
        found = {name for name in hf_names if not _DERIVED.fullmatch(name)} - copies
        problems += [f"{name}: in the HF folder, but no rule claims it" for name in sorted(found - set(claims))]
        problems += [f"{name}: expected by the table, but not in the HF folder" for name in sorted(set(claims) - found)]
        problems += [f"{name}: claimed by {count} rules" for name, count in sorted(claims.items()) if count > 1]
    if megatron_names is not None:
        counts = Counter(local_name(name) for name in megatron_names if not name.endswith("._extra_state"))
        problems += [f"{name}: in the Megatron model, but no rule claims it" for name in sorted(set(counts) - set(rules))]
        problems += [f"{name}: expected by the table, but not in the Megatron model" for name in sorted(set(rules) - tied - set(counts))]
        problems += [f"{name}: {count} times in the Megatron model" for name, count in sorted(counts.items()) if count > 1]
    if problems:
        raise ConversionError(f"the tables do not cover this model ({len(problems)} tensors):\n  " + "\n  ".join(problems))


def _one_cause(found: Collection[str], claims: Collection[str]) -> str | None:
    """The cause, if a single one makes all names differ."""
    if scale := next((name for name in found if name.endswith(_SCALES)), None):
        return f"{scale} belongs to quantized weights; convert the unquantized model"
    ending = "norm.weight"  # the one norm outside the layers
    prefixes = (name.removesuffix(ending) for name in found if name.endswith(ending) and not re.search(r"\d|layernorm", name))
    for prefix in prefixes:
        inside = {name.replace("model.", prefix, 1) for name in claims if name.startswith("model.")}
        if prefix != "model." and inside <= set(found):
            begin = f"begin with {prefix!r} where 'model.' is expected" if prefix else "lack 'model.' in front"
            return f"its names {begin}; save the text model alone, as its AutoModelForCausalLM"
    return None


def check_sizes(rules: Mapping[str, Rule], shape: ModelShape, hf_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ConversionError with the full list unless every HF tensor has the size that config.json gives it."""
    problems = [
        f"{name}: {list(hf_shapes[name])}, but config.json makes it {list(expected)}"
        for rule in rules.values()
        for name, expected in zip(rule.exports, _hf_shapes(rule, shape), strict=False)
        if tuple(hf_shapes[name]) != expected
    ]
    if problems:
        raise ConversionError(f"the config belongs to another model ({len(problems)} tensors differ in size):\n  " + "\n  ".join(problems))


def _hf_shapes(rule: Rule, shape: ModelShape) -> list[tuple[int, ...]]:
    """The shapes of a rule's HF tensors."""
    hidden, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    ffn = shape.mixture.ffn_size if shape.mixture is not None and rule.expert is not None else shape.ffn_size
    module, _, kind = rule.megatron_name.rpartition(".")
    match module.rpartition(".")[2]:
        case "word_embeddings" | "output_layer":
            return [(shape.vocab_size, hidden)]
        case "linear_qkv":
            return [(rows, hidden) if kind == "weight" else (rows,) for rows in (queries, keys, keys)]
        case "linear_proj":
            return [(hidden, queries)]
        case "q_layernorm" | "k_layernorm":
            return [(shape.head_dim,)]
        case "router":
            return [(shape.mixture.num_experts if shape.mixture else 0, hidden)]
        case "linear_fc1":
            return [(ffn, hidden), (ffn, hidden)]
        case "linear_fc2":
            return [(hidden, ffn)]
        case "input_layernorm" | "pre_mlp_layernorm" | "final_layernorm":
            return [(hidden,)]
    raise AssertionError(f"no size is known for {rule.megatron_name}")


def local_name(name: str, first_layer: int = 0, first_expert: int = 0) -> str:
    """The name in Megatron's local layers of a tensor that may have a TransformerEngine layer's.

    A rank numbers its layers and experts from 0: with the whole model's number of its first of each, the result is the global name.
    """
    layer = _LAYER_NAME.fullmatch(name)
    if layer is None:
        return name
    rest = _LOCAL_NAMES.get(layer[3][1:], layer[3][1:])
    if grouped := _GROUPED_EXPERT.fullmatch(rest):
        rest = f"{grouped[1]}.local_experts.{grouped[3]}.{grouped[2]}"
    if expert := _LOCAL_EXPERT.fullmatch(rest):
        rest = f"{expert[1]}{int(expert[2]) + first_expert}{expert[3]}"
    return f"{layer[1]}{int(layer[2]) + first_layer}.{rest}"
