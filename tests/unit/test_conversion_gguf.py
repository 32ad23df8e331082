"""GGUF files become Hugging Face folders with the same numbers, tokens and template; damaged ones are refused in a sentence."""

import importlib.metadata
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from checkpoint_conversion.commands import app
from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf
from checkpoint_conversion.hf_folder import HfReader
from checkpoint_conversion.rules import ConversionError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (make venv-llm)")
pytest.importorskip("accelerate", reason="the package accelerate is not installed (make venv-llm)")

from checkpoint_conversion import gguf_to_hf as conversion  # noqa: E402
from checkpoint_conversion.gguf_file import read_gguf  # noqa: E402
from checkpoint_conversion.gguf_to_hf import gguf_to_hf, hf_names  # noqa: E402

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
MERGES = ["a b", "Ġ a", "1 2"]
TOKENS = [*SPECIAL, *LETTERS, "ab", "Ġa", "12"]
TOKENS += [f"unused{index}" for index in range(128 - len(TOKENS))]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "  ", "▁", *LETTERS[:94], "ab", "▁a"]
GEMMA_TOKENS += [f"<unused{index}>" for index in range(128 - len(GEMMA_TOKENS))]
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 2.0**-17,
}
THETA = 5000.0


def tiny(kind: str) -> Any:
    """A small random model of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_type": "default", "rope_theta": THETA}
    more: dict[str, Any] = {} if kind.startswith("gemma3") else {"rope_parameters": rope}
    if kind == "llama3":
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        more = {"rope_parameters": {"rope_type": "llama3", "rope_theta": THETA, **scaling}}
    tied = kind.startswith("gemma") or kind == "qwen2"
    model_type = {"llama3": "llama", "gemma3": "gemma3_text"}.get(kind, kind)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **more, tie_word_embeddings=tied)
    if kind.startswith("gemma"):
        config.query_pre_attn_scalar = SIZES["head_dim"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        # Sums with 1 are exact, so that Gemma's norms, which are stored with 1 added, come back bit by bit.
        parameter.data = torch.randint(-64, 64, parameter.shape) / 128
    return model.eval()


def write_gguf(path: Path, kind: str, model: Any, *, quantised: bool = False, **changes: Any) -> Path:
    """The model as llama.cpp's converter writes it; `changes` replace metadata."""
    name = "llama" if kind == "llama3" else kind
    writer = gguf.GGUFWriter(path, name)
    numbers = {
        "context_length": SIZES["max_position_embeddings"],
        "block_count": SIZES["num_hidden_layers"],
        "embedding_length": SIZES["hidden_size"],
        "feed_forward_length": SIZES["intermediate_size"],
        "attention.head_count": SIZES["num_attention_heads"],
        "attention.head_count_kv": SIZES["num_key_value_heads"],
        "attention.key_length": SIZES["head_dim"],
        "attention.value_length": SIZES["head_dim"],
        "rope.dimension_count": SIZES["head_dim"],
    }
    for key, value in {**numbers, **changes.pop("numbers", {})}.items():
        writer.add_uint32(f"{name}.{key}", value)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", SIZES["rms_norm_eps"])
    writer.add_float32(f"{name}.rope.freq_base", changes.pop("theta", 1e6 if kind == "gemma3" else THETA))
    gemma = name.startswith("gemma")
    writer.add_tokenizer_model("llama" if gemma else "gpt2")
    writer.add_tokenizer_pre(changes.pop("pre", "default" if gemma else "qwen2"))
    tokens = changes.pop("tokens", GEMMA_TOKENS if gemma else TOKENS)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    if not gemma:
        writer.add_token_merges(MERGES)
    for add, value in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, changes.pop("pad", 0))):
        add(value)
    if (template := changes.pop("template", TEMPLATE)) is not None:
        writer.add_chat_template(template)
    layer = {theirs: ours for ours, theirs in conversion.ARCHITECTURES[name].items()}
    outside = {theirs: ours for ours, theirs in conversion._MODEL.items()}
    skipped = changes.pop("without", "none")
    for hf, tensor in model.state_dict().items():
        part, _, ending = hf.rpartition(".")
        words = part.split(".")
        ours = f"blk.{words[2]}.{layer['.'.join(words[3:])]}" if "layers" in words else outside[part]
        if (hf == "lm_head.weight" and model.config.tie_word_embeddings) or ours == skipped:
            continue
        values = tensor.numpy()
        if name == "llama" and words[-1] in ("q_proj", "k_proj"):
            heads = SIZES["num_attention_heads" if words[-1] == "q_proj" else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if gemma and "norm" in part:
            values = values + 1
        if quantised and values.ndim == 2:
            kind_of = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{ours}.{ending}", gguf.quantize(values, kind_of), raw_dtype=kind_of)
        else:
            writer.add_tensor(f"{ours}.{ending}", np.ascontiguousarray(values))
    if kind == "llama3":
        plain = THETA ** -(np.arange(0, 16, 2) / 16)
        factors = plain / model.model.rotary_emb.inv_freq.numpy() * changes.pop("rope", 1.0)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    assert not changes, changes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_a_model_comes_back_from_gguf_bit_by_bit(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    model = tiny(kind)
    notes = gguf_to_hf(write_gguf(tmp_path / "m.gguf", kind, model), tmp_path / "hf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert {name: tensor.tolist() for name, tensor in back.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits)
    assert any("cannot be trained" in note for note in notes) == kind.startswith("gemma")


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("qwen2", "bfloat16")])
def test_gguf_to_hf_to_megatron_to_hf_is_bit_equal_after_dequantisation(tmp_path, kind, dtype):
    path = write_gguf(tmp_path / "m.gguf", kind, tiny(kind), quantised=True)
    gguf_to_hf(path, tmp_path / "hf", dtype)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    a, b = HfReader(tmp_path / "hf"), HfReader(tmp_path / "back")
    assert a.names() == b.names() and all(torch.equal(a.get(name), b.get(name)) for name in a.names())
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    down = stored["blk.1.ffn_down.weight"]
    values = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type)).to(getattr(torch, dtype))
    assert torch.equal(b.get("model.layers.1.mlp.down_proj.weight"), values)


def test_the_tokenizer_and_the_template_are_those_of_the_file(tmp_path):
    from transformers import AutoTokenizer

    gguf_to_hf(write_gguf(tmp_path / "m.gguf", "llama", tiny("llama"), pre="smollm"), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == TOKENS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.chat_template == TEMPLATE
    # The rule "smollm" cuts every digit off, so that 1 and 2 do not merge although the table would allow it.
    assert tokenizer.tokenize("ab12<|im_end|>") == ["ab", "1", "2", "<|im_end|>"]


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ({"chat_template": "another"}, "the chat template is another one"),
        ({"pad_token": "<|im_start|>"}, "pad_token_id is 1 instead of 0"),
        ("permuted", "token 5 is '\\$' instead of '#'"),
        ("numbers", "other values than the package gguf"),
    ],
)
def test_what_transformers_reads_otherwise_is_noticed(tmp_path, monkeypatch, planted, message):
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny("llama"))
    read = conversion._read

    def off(*arguments: Any) -> Any:
        config, state, tokenizer = read(*arguments)
        if planted == "numbers":
            state["model.layers.1.self_attn.q_proj.weight"][3, 4] += 2.0**-10
        elif planted == "permuted":
            text = tokenizer.backend_tokenizer.to_str().replace('"#":5', '"#":6').replace('"$":6', '"$":5')
            tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(text)
        else:
            for key, value in planted.items():
                setattr(tokenizer, key, value)
        return config, state, tokenizer

    monkeypatch.setattr(conversion, "_read", off)
    with pytest.raises(ConversionError, match=message):
        gguf_to_hf(path, tmp_path / "hf")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.gguf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": {"block_count": 2**31}}, "block_count is 2147483648, but it has tensors of 2 layers"),
        ({"numbers": {"feed_forward_length": 2**31}}, "contradicts its metadata"),
        ({"numbers": {"attention.head_count": 0}}, "has no attention heads"),
        ({"numbers": {"expert_count": 8}}, "nothing is known of llama.expert_count"),
        ({"numbers": {"rope.dimension_count": 8}}, "rotates 8 of 16 dimensions"),
        ({"numbers": {"attention.sliding_window": 8}}, "sliding window shorter"),
        ({"pad": 5000}, "padding_token_id is 5000, but there are 128 tokens"),
        ({"tokens": [*TOKENS[:-1], "ab"]}, "instead of"),
        ({"tokens": TOKENS * 2}, "has 256 tokens for 128 rows"),
        ({"pre": "klingon"}, "by the rule 'klingon'"),
        ({"without": "blk.1.ffn_up"}, "mlp.up_proj.weight is missing in the file"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_before_anything_is_written(tmp_path, changes, message):
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny("llama"), **changes)
    with pytest.raises(ConversionError, match=message):
        gguf_to_hf(path, tmp_path / "hf")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.gguf"]


def test_another_scaling_than_llama_3_s_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama3", tiny("llama3"), rope=np.linspace(1, 2, 8))
    with pytest.raises(ConversionError, match="other than Llama 3 does"):
        gguf_to_hf(path, tmp_path / "hf")


HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
KEY = struct.pack("<Q", 1) + b"k"
HUGE = 2**62


def text(value):
    """A text as the format has it."""
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 and more", "is no GGUF file"),
        (b"GGUF", "cut short"),
        (struct.pack("<4sIQQ", b"GGUF", 9, 0, 0), "version 9"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, HUGE, 0), "cut short"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, HUGE), "cut short"),
        (HEADER + struct.pack("<Q", HUGE), "cut short"),
        (HEADER + KEY + struct.pack("<I", 99), "type 99"),
        (HEADER + KEY + struct.pack("<IQ", 8, HUGE), "cut short"),
        (HEADER + KEY + struct.pack("<IIQ", 9, 0, HUGE), "cut short"),
        (HEADER + KEY + struct.pack("<IIQ", 9, 8, HUGE), "cut short"),
        (HEADER + KEY + struct.pack("<IIQ", 9, 9, 1) * 500, "type 9"),
        (HEADER + KEY + struct.pack("<IQ", 8, 1) + b"\xff", "not UTF-8"),
        (HEADER + KEY + struct.pack("<IB", 0, 1), "does not name its architecture"),
        (HEADER + text("\x1b[2J"), "cannot be printed"),
        (HEADER + text("general.architecture") + struct.pack("<I", 8) + text("\x1b[2J"), "cannot be printed"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + text("\x1b[2J"), "cannot be printed"),
    ],
)
def test_a_hostile_header_is_one_sentence(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    for arguments in (
        ["inspect", str(tmp_path / "m.gguf")],
        ["gguf-to-hf", "--gguf", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "hf")],
    ):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 2 and message in shown.output, shown.output
        assert "Traceback" not in shown.output and isinstance(shown.exception, SystemExit)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.gguf"]


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", "qwen2", tiny("qwen2")).read_bytes()
    for length in [*range(0, 4000, 97), len(whole) // 2, len(whole) - 33]:
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(ConversionError):
            read_gguf(tmp_path / "m.gguf")


def test_a_flipped_byte_of_the_header_never_raises_anything_else(tmp_path):
    whole = bytearray(write_gguf(tmp_path / "m.gguf", "llama", tiny("llama")).read_bytes())
    random = np.random.default_rng(0)
    for place in random.integers(0, 6000, 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        (tmp_path / "m.gguf").write_bytes(damaged)
        try:
            conversion._check_header(read_gguf(tmp_path / "m.gguf"))
        except ConversionError:
            continue


def test_inspect_describes_a_file_and_a_folder_that_holds_one(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny("llama"), quantised=True)
    shown = CliRunner().invoke(app, ["inspect", str(path), "--tensors"])
    assert shown.exit_code == 0
    for line in (
        "model: llama, 2 layers, hidden 64, vocabulary 128",
        "context: 64 tokens",
        "tokenizer: gpt2, text cut as qwen2",
        f"chat template: {len(TEMPLATE)} characters",
        "tensors: 21 (16 in Q8_0, 5 in F32)",
        "  blk.0.attn_k.weight Q8_0 [32, 64]",
    ):
        assert line in shown.output
    assert "problem" not in shown.output
    assert CliRunner().invoke(app, ["inspect", str(tmp_path)]).output == CliRunner().invoke(app, ["inspect", str(path)]).output
    other = write_gguf(tmp_path / "m.gguf", "llama", tiny("llama"), template=None, numbers={"expert_count": 8})
    shown = CliRunner().invoke(app, ["inspect", str(other)])
    assert "chat template: none" in shown.output and "problem: " in shown.output


def test_other_architectures_and_missing_packages_are_named(tmp_path, monkeypatch):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    def convert() -> str:
        return CliRunner().invoke(app, ["gguf-to-hf", "--gguf", str(tmp_path / "m.gguf"), "--out", str(tmp_path / "hf")]).output

    assert "has architecture falcon; supported are llama, qwen2, qwen3, gemma2, gemma3" in convert()
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny("llama"))
    (tmp_path / "hf").mkdir()
    assert "hf exists already" in convert()
    (tmp_path / "hf").rmdir()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConversionError, match=r"accelerate, which is missing; pip install igpo-megatron\[llm\]"):
            gguf_to_hf(path, tmp_path / "hf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "gguf is missing; pip install igpo-megatron[llm]" in convert()
    monkeypatch.setattr(conversion, "DEMO_PACKAGE", "no-such-package")
    with pytest.raises(ConversionError, match=r"no-such-package, which is not installed; `make venv-llm`, or pip install igpo"):
        conversion.demo_gguf()


def test_igpo_demo_model_converts_the_file_of_the_package(tmp_path, monkeypatch):
    from igpo_megatron.cli import app as igpo

    path = write_gguf(tmp_path / "m.gguf", "llama", tiny("llama"))
    monkeypatch.setattr(conversion, "demo_gguf", lambda: path)
    shown = CliRunner().invoke(igpo, ["demo-model", "--out", str(tmp_path / "hf"), "--dtype", "bfloat16"])
    assert shown.exit_code == 0 and shown.stderr == ""
    assert shown.output.splitlines() == [
        "reading m.gguf: weights are dequantised to bfloat16 and compared",
        f"wrote {tmp_path / 'hf'}",
    ]
    assert HfReader(tmp_path / "hf").dtype("model.norm.weight") == torch.bfloat16
    shown = CliRunner().invoke(igpo, ["demo-model", "--out", str(tmp_path / "x"), "--dtype", "int4"])
    assert shown.exit_code == 2 and "use one of float32, bfloat16" in shown.output


def test_the_demo_model_s_file_is_what_it_says():
    try:
        importlib.metadata.distribution(conversion.DEMO_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{conversion.DEMO_PACKAGE} is not installed (make venv-llm)")
    file = read_gguf(conversion.demo_gguf())
    conversion._check_header(file)
    assert len(hf_names(file)) == len(file.tensors) == 272
    assert file.texts("tokenizer.ggml.tokens")[:3] == SPECIAL and "<|im_start|>assistant" in (file.text("tokenizer.chat_template") or "")
