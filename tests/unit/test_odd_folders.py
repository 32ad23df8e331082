"""Model folders as people have them: converted bit by bit, or one clear sentence from `inspect` and from the conversion alike."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion import hf_folder
from torch import Tensor

from checkpoint_conversion.convert import hf_to_megatron, verify
from checkpoint_conversion.folders import new_folder
from checkpoint_conversion.inspection import inspect
from checkpoint_conversion.rules import ConversionError

EMBEDDING = "model.embed_tokens.weight"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("odd") / "hf", "qwen2_tied")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "hf"))


def convert(folder: Path, out: Path) -> int:
    """Converts and verifies; the number of tensors."""
    hf_to_megatron(folder, out)
    result = verify(folder, out)
    assert result.differences == {}
    return result.num_tensors


def eight_bits(weights: Weights, scale: str | None) -> Weights:
    found = {name: tensor.to(torch.float8_e4m3fn) if "proj.weight" in name else tensor for name, tensor in weights.items()}
    return {**found, **{name + scale: torch.ones(1) for name in weights if scale and "proj.weight" in name}}


def renamed(weights: Weights, prefix: str) -> Weights:
    return {name.replace("model.", prefix, 1): tensor for name, tensor in weights.items()}


REFUSED: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a head that is not the embedding": (lambda w: {**w, "lm_head.weight": w[EMBEDDING] * 2}, "lm_head.weight differs from"),
    "8 bits with scales": (lambda w: eight_bits(w, "_scale_inv"), "quantized weights; convert the unquantized model"),
    "8 bits without": (lambda w: eight_bits(w, None), "F8_E4M3: quantized weights; convert the unquantized model"),
    "packed weights": (lambda w: {**w, "model.layers.0.mlp.up_proj.qweight": torch.ones(1)}, "belongs to quantized weights"),
    "the language half of a model that sees": (lambda w: renamed(w, "model.language_model."), "names begin with 'model.language_model.'"),
    "another nesting": (lambda w: renamed(w, "language_model.model."), "names begin with 'language_model.model.'"),
    "no model in front": (lambda w: renamed(w, ""), "names lack 'model.' in front"),
    "a padded vocabulary": (lambda w: {**w, EMBEDDING: torch.cat([w[EMBEDDING], torch.zeros(84, 64)])}, r"\[384, 64\], but .* \[300, 64\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_said_by_the_conversion_and_by_inspect(name: str, folder: Path, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=message) as error:
        hf_to_megatron(folder, tmp_path / "out")
    assert len(str(error.value).splitlines()) <= 2
    if name != "a head that is not the embedding":  # inspect reads no values
        lines = list(inspect(folder))
        assert any(line.startswith("problem: ") for line in lines) and not any(line.startswith("complete") for line in lines)


def test_an_adapter_is_called_one(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=r"holds an adapter \(LoRA\), not a model; merge it"):
        hf_to_megatron(folder, tmp_path / "out")


def test_an_untied_flag_without_a_head_is_named(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ConversionError, match=r"lm_head.weight: expected by the table, but not in the HF folder"):
        hf_to_megatron(folder, tmp_path / "out")


CONVERTED: dict[str, Callable[[Weights], Weights]] = {
    "a second copy of the embedding": lambda w: {**w, "lm_head.weight": w[EMBEDDING].clone()},
    "a buffer of rope": lambda w: {
        **w,
        "model.rotary_emb.inv_freq": torch.ones(16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
    },
    "norms in another precision": lambda w: {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in w.items()},
    "a number that is none": lambda w: {**w, EMBEDDING: w[EMBEDDING].index_fill(0, torch.tensor(3), float("nan"))},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_what_can_be_converted_is_bit_equal(name: str, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(CONVERTED[name](weights), folder / "model.safetensors", {"format": "pt"})
    assert convert(folder, tmp_path / "out") == len(weights)


def test_of_a_tensor_in_two_shards_the_one_that_the_index_names_is_read(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "base.safetensors", {"format": "pt"})
    save_file({EMBEDDING: weights[EMBEDDING] + 1}, folder / "overlay.safetensors", {"format": "pt"})
    index = {**dict.fromkeys(weights, "base.safetensors"), EMBEDDING: "overlay.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert convert(folder, tmp_path / "out") == len(weights)


def test_a_cache_of_links_in_a_path_with_spaces_is_read(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub cache" / "models--acme--tiny search" / "snapshots" / "0f1e"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert convert(snapshot, tmp_path / "out folder") > 20


def test_a_place_where_nothing_can_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = pytest.raises(ConversionError, match=r"file/out cannot be made \(Not a directory: .*\); choose a folder")
    with said, new_folder(tmp_path / "file" / "out", {}):
        pass
    with pytest.raises(ConversionError, match=r"cannot be made"), new_folder(Path("/proc/igpo/out"), {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
