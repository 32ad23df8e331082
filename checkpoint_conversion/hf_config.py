"""Read a model's config.json as every engine does, and refuse what the tables would silently get wrong.

config.json --keys it may have--> transformers' config class (defaults of the family) --what must hold--> its object

Each key is used, or is known not to change the forward pass, or has a value at which it does not; any other key is refused by name.
"""

from __future__ import annotations

import copy
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint_conversion.rules import ConversionError

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""Never taken from a family's defaults: a file without them is no description of a model."""

_USED = {
    *(*_SIZES, "model_type", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("mlp_only_layers", "decoder_sparse_step"),
}

_HARMLESS = {
    # Where the file comes from and who reads it.
    *("architectures", "auto_map", "transformers_version", "name_or_path", "tokenizer_class", "vocab_file", "license", "tags", "language"),
    *("base_model", "library_name", "datasets", "trust_remote_code", "transformers.js_config", "is_llama_config"),
    # Training only: dropout, initial values, auxiliary losses.
    *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attn_pdrop"),
    *("embd_pdrop", "resid_pdrop", "embd_dropout", "resid_dropout", "initializer_range", "initializer_factor", "init_std"),
    *("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "output_router_logits", "aux_loss_alpha", "z_loss_coef"),
    *("gradient_checkpointing", "use_gradient_checkpointing", "neftune_noise_alpha"),
    # How the same function is computed. `pretraining_tp` cuts a product into parts and adds them up again.
    *("use_cache", "pretraining_tp", "attn_implementation", "experts_implementation", "use_flash_attention", "use_flash_attn"),
    *("use_bfloat16", "torchscript", "chunk_size_feed_forward", "keys_to_ignore_at_inference"),
    # What is returned, and heads that are not there.
    *("output_hidden_states", "output_attentions", "return_dict", "use_return_dict", "id2label", "label2id", "num_labels"),
    *("problem_type", "finetuning_task", "task_specific_params", "prefix", "is_decoder", "tie_encoder_decoder", "tf_legacy_loss"),
    *("cross_attention_hidden_size", "remove_invalid_values"),
    # Tokens and lengths that the tokenizer and the caller handle. Those of generation_config.json are known to transformers.
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "mask_token_id", "decoder_start_token_id"),
    *("max_sequence_length", "max_seq_len", "seq_length", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"),
}
_HARMLESS_PREFIXES = ("_", "unsloth_")

_QUANTIZED = "quantized weights; convert the unquantized model"
_NEUTRAL: dict[str, tuple[Any, str]] = {
    # Qwen2's query, key and value biases are in its table and need no key; this key adds one to o_proj as well.
    "attention_bias": (False, "bias on the attention's output projection has no rule"),
    "mlp_bias": (False, "bias in the MLP has no rule"),
    "hidden_act": ("silu", "the gated MLP is built with silu"),
    "partial_rotary_factor": (1, "every part of a head is rotated"),
    "rope_interleaved": (False, "a head's halves are rotated against each other"),
    "use_mrope": (False, "positions are one number each"),
    "dual_chunk_attention_config": (None, "attention in chunks is not built; remove the key to use the model at its original length"),
    "is_causal": (True, "attention looks back only"),
    "logits_scaling": (1, "logits are not scaled"),
    "logit_scale": (1, "logits are not scaled"),
    "embedding_multiplier": (1, "embeddings are not scaled"),
    "residual_multiplier": (1, "residuals are not scaled"),
    "attention_multiplier": (None, "attention is scaled by the root of head_dim"),
    "attn_logit_softcapping": (None, "attention's logits are not capped"),
    "final_logit_softcapping": (None, "logits are not capped"),
    "shared_expert_intermediate_size": (0, "experts are routed to, never shared"),
    "n_shared_experts": (0, "experts are routed to, never shared"),
    "num_nextn_predict_layers": (0, "no layers predict further tokens"),
    "per_layer_config": (None, "all layers are alike"),
    "quantization_config": (None, _QUANTIZED),
    "compression_config": (None, _QUANTIZED),
    "quantization": (None, _QUANTIZED),
    "is_encoder_decoder": (False, "the model is a decoder"),
    "add_cross_attention": (False, "the model is a decoder"),
}
"""Key -> (value at which it changes nothing, what is built in any case)."""

_DTYPES = ("bfloat16", "float16", "float32", "float64")
MOST_LAYERS = 10_000
"""transformers makes a list with an item per layer: an unbounded number of layers would fill the memory."""

# Megatron-Core's rope_scaling is Llama 3's with these three written into its code.
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed config.json of an HF folder. Raises ConversionError where there is no folder, no file, or no object in it."""
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise ConversionError(f"model folder {folder} does not exist; give a folder with config.json and *.safetensors")
    if not path.is_file():
        raise ConversionError(f"{folder} holds no config.json; give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        raise ConversionError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path} holds a {type(config).__name__}; expected the object of a model's settings")
    return config


def with_defaults(config: Mapping[str, Any], where: str, *, mixture: bool, built: Mapping[str, bool]) -> Any:
    """transformers' object for a config.json, with the family's default for every absent key.

    `mixture`: the family is a mixture of experts. `built`: keys that the family fixes, with their values.
    Raises ConversionError with everything that is wrong or unsupported.
    """
    missing = [key for key in _SIZES if not _is_size(config.get(key))]
    if missing:
        given = ", ".join(f"{key} is {_show(config[key])}" for key in missing if key in config)
        raise ConversionError(f"{where} does not give {', '.join(missing)} as integers above 0" + (f" ({given})" if given else ""))
    if config["num_hidden_layers"] > MOST_LAYERS:
        raise ConversionError(f"{where}: num_hidden_layers is {_show(config['num_hidden_layers'])}; no model has more than {MOST_LAYERS:,}")
    _refuse(where, [*_unknown(config, built), *_unsupported_rope(config), *(_unsupported_mixture(config) if mixture else ())])
    family = _family(config, where)
    _refuse(where, [*_wrong_numbers(family), *_windows(config, family)])
    return family


def _family(config: Mapping[str, Any], where: str) -> Any:
    from transformers import AutoConfig

    known = {key: copy.deepcopy(value) for key, value in config.items() if key != "model_type" and not key.startswith("_")}
    try:
        return AutoConfig.for_model(config["model_type"], **known)
    except Exception as error:
        reason = textwrap.shorten(str(error).rsplit("Error: ", 1)[-1], 200, placeholder="...")
        key = next((key for key in known if f"'{key}'" in reason), None)
        value = f"{key} is {_show(known[key])}, which" if key else "a setting that"
        raise ConversionError(f"{where}: {value} transformers does not take ({reason}); give what the model was trained with") from error


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        raise ConversionError(f"{where} asks for what is not supported: " + "; ".join(problems))


def _unknown(config: Mapping[str, Any], built: Mapping[str, bool]) -> Iterator[str]:
    """Keys that may change the model, and values that no engine accepts."""
    from transformers import GenerationConfig

    harmless = _USED | _HARMLESS | set(GenerationConfig().to_dict())
    for key, value in config.items():
        if value is None or value == {} or value == [] or key in harmless or key.startswith(_HARMLESS_PREFIXES):
            continue
        if key in built:
            if value is not built[key]:
                yield f"{key}={_show(value)} ({config['model_type']} is built with {_show(built[key])})"
        elif key not in _NEUTRAL:
            yield f"{key}={_show(value)} (no rule knows this key; remove it if it does not change what the model computes)"
        elif value != _NEUTRAL[key][0]:
            yield f"{key}={_show(value)} ({_NEUTRAL[key][1]})"
    width = config.get("head_dim")
    if width is not None and (not _is_size(width) or width % 2):
        yield f"head_dim={_show(width)} (expected an even integer above 0: rope rotates pairs)"
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None and dtype not in _DTYPES:
        yield f"dtype={_show(dtype)} (give one of {', '.join(_DTYPES)})"


def _unsupported_rope(config: Mapping[str, Any]) -> Iterator[str]:
    """transformers 5 writes `rope_parameters`, where earlier versions had `rope_theta` and `rope_scaling`; a file may have both."""
    spellings = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) not in (None, {})}
    for key, rope in spellings.items():
        if not isinstance(rope, Mapping):
            yield f"{key}={_show(rope)} (expected an object such as {{'rope_type': 'default', 'rope_theta': 10000.0}})"
            return
    theta = config.get("rope_theta")
    read = [_plain_rope(rope, theta) for rope in spellings.values()]
    if len(read) == 2 and read[0] != read[1]:
        both = " beside ".join(f"{key} {_show(rope)}" for key, rope in spellings.items())
        yield f"{both} (they differ; keep the one that the model was trained with)"
        return
    rope = read[0] if read else {"rope_type": "default"}
    if None not in (theta, rope.get("rope_theta")) and theta != rope["rope_theta"]:
        yield f"rope_theta={_show(theta)} beside rope_theta={_show(rope['rope_theta'])} in {next(iter(spellings))} (keep one)"
    yield from _unsupported_rope_type(rope)


def _plain_rope(rope: Mapping[str, Any], theta: Any) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    others = {key: value for key, value in rope.items() if key not in ("rope_type", "type") and value is not None}
    if "type" in rope and rope["type"] != kind:
        others["type"] = rope["type"]
    return {"rope_theta": theta, **others, "rope_type": kind}


def _unsupported_rope_type(rope: Mapping[str, Any]) -> Iterator[str]:
    kind = rope["rope_type"]
    if kind not in ("default", "llama3"):
        yield f"rope scaling {kind!r} (Megatron-Core's GPTModel has plain rope and llama3 scaling)"
        return
    if nested := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        yield f"rope settings per kind of layer ({', '.join(nested)}; one for all layers is supported)"
        return
    known = {"rope_type", "rope_theta"}
    if kind == "llama3":
        known |= {"factor", *_LLAMA3}
        for key, value in _LLAMA3.items():
            if rope.get(key) != value:
                yield f"llama3 rope scaling with {key}={rope.get(key)} (Megatron-Core has {value} written into its code)"
        if not _is_positive(rope.get("factor")) or rope["factor"] < 1:
            yield f"llama3 rope scaling with factor={_show(rope.get('factor'))} (expected a number of at least 1)"
    for key in sorted(set(rope) - known):
        if (key, rope[key]) != ("partial_rotary_factor", 1):
            yield f"rope scaling {kind!r} with {key}={_show(rope[key])} (it is not part of {kind} rope)"


def _unsupported_mixture(config: Mapping[str, Any]) -> Iterator[str]:
    # transformers 5 writes Mixtral's spelling for every family; Qwen's own folders have the other.
    experts = [config[key] for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    top_k = config.get("num_experts_per_tok")
    if not experts or not all(map(_is_size, [*experts, top_k])):
        yield "a mixture of experts without num_experts (or num_local_experts) and num_experts_per_tok as integers above 0"
        return
    if len(set(experts)) == 2:
        yield f"num_experts={experts[0]} beside num_local_experts={experts[1]} (keep one)"
    elif top_k > experts[0]:
        yield f"num_experts_per_tok={top_k} of {experts[0]} experts"
    if top_k == 1 and (config["model_type"] == "mixtral" or config.get("norm_topk_prob")):
        yield "one expert per token whose weight is scaled to 1 (its router would get no gradient)"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        yield "a mixture of experts in some layers only (mlp_only_layers, decoder_sparse_step; every layer must have it)"


def head_dim(family: Any) -> Any:
    """Width of an attention head."""
    given = getattr(family, "head_dim", None)
    return family.hidden_size // family.num_attention_heads if given is None else given


def _wrong_numbers(family: Any) -> Iterator[str]:
    """Numbers of the right type that describe no model."""
    heads, groups, width = family.num_attention_heads, family.num_key_value_heads, head_dim(family)
    for key, value in (("num_key_value_heads", groups), ("max_position_embeddings", family.max_position_embeddings)):
        if not _is_size(value):
            yield f"{key}={_show(value)} (expected an integer above 0)"
    if _is_size(groups) and heads % groups:
        yield f"num_attention_heads={heads} with num_key_value_heads={groups} (each key-value head serves equally many heads)"
    if getattr(family, "head_dim", None) is None and family.hidden_size % heads:
        yield f"hidden_size={family.hidden_size} with num_attention_heads={heads} and no head_dim (it must divide)"
    elif width % 2:
        yield f"hidden_size={family.hidden_size} with num_attention_heads={heads} (rope rotates pairs, so a head's width must be even)"
    for key, value in (("rope_theta", family.rope_parameters.get("rope_theta")), ("rms_norm_eps", family.rms_norm_eps)):
        if not _is_positive(value):
            yield f"{key}={_show(value)} (expected a number above 0; give what the model was trained with, or remove the key)"


def _windows(config: Mapping[str, Any], family: Any) -> Iterator[str]:
    """Sliding windows in force: transformers has set the window to None where it is switched off."""
    window = getattr(family, "sliding_window", None)
    others = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if others:
        yield f"layers with {', '.join(map(str, others))} (every layer must attend to all earlier tokens)"
    elif window is None:
        return
    elif config.get("sliding_window") is None:
        yield f"no sliding_window, for which {family.model_type} has {window} (set it to null if the model was trained without)"
    # A window as long as the context hides nothing.
    elif window < family.max_position_embeddings:
        yield f"a sliding window of {window} tokens (every layer must attend to all earlier tokens)"


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _show(value: Any) -> str:
    """A value as its file has it, short enough for a sentence."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
