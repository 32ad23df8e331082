"""Claim: converting a checkpoint is file copying: at least 0.6 of its speed, in memory that does not grow with the model.

    python tools/bench/convert.py [--gb 4] [--folder DIR]     about two minutes on two cores; needs four times --gb on the disk

A synthetic bf16 checkpoint in shards goes HF -> Megatron -> HF. The measure is a plain safetensors copy of the same files (load a shard,
save it); both have the disk hold what they wrote before they end. Every call is a process of its own. Its memory is the peak of
RssAnon in /proc/self/status, read every 5 ms, above what it was after imports: memory-mapped pages of files do not count.

Where mbridge and TransformerEngine, of whose layers all its models are made, are installed, mbridge reads the same folder into a model
beside them. It writes no files, so its time is a lower bound of a conversion. Where it did not run, the result says why.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import finish, in_a_process, ratio
from huggingface_hub import split_torch_state_dict_into_shards
from memory import anonymous_peak
from models import qwen2, random_model
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint_conversion.architectures import check_total, rules_for, shape_of
from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf, verify
from checkpoint_conversion.folders import sync
from checkpoint_conversion.hf_folder import HF_INDEX, HfReader
from checkpoint_conversion.torch_dist_folder import MegatronReader
from checkpoint_conversion.units import to_megatron

FLOOR = 0.6
SLACK_MB = 512
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 8192, 16, 4, 65536


def main(
    gb: Annotated[float, typer.Option(help="Size of the checkpoint.")] = 4.0,
    shard_gb: Annotated[float, typer.Option(help="Size of its shards.")] = 1.0,
    repeats: Annotated[int, typer.Option(help="Timed calls of each kind.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where to work, on the disk that matters; default: the temporary folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/convert.json.")] = None,
) -> None:
    """Convert there and back beside a plain copy."""
    with tempfile.TemporaryDirectory(prefix="igpo-bench-", dir=folder) as place:
        root = Path(place)
        hf = root / "hf"
        nbytes = make_checkpoint(hf, int(gb * 1e9), int(shard_gb * 1e9))
        rules = rules_for(shape_of(json.loads((hf / "config.json").read_text(encoding="utf-8"))), 128)
        largest = max(unit.nbytes for unit in to_megatron(rules, HfReader(hf)))
        # The copy and the conversion back write what the conversion there has read: all three move the same bytes.
        runs: dict[str, list[dict[str, float]]] = {"copy": [], "hf_to_megatron": [], "megatron_to_hf": []}
        for number in track(range(repeats + 1), description="copy, there, back", transient=True, console=Console(stderr=True)):
            for kind, found in runs.items():
                source = root / "hf_to_megatron" if kind == "megatron_to_hf" else hf
                shutil.rmtree(root / kind, ignore_errors=True)
                os.sync()  # what earlier calls wrote is not this one's to wait for
                measured = in_a_process(one, kind, source, root / kind)
                if number > 0:
                    found.append(measured)
        mbridge = mbridge_row(hf, nbytes)
        differing = verify(root / "megatron_to_hf", root / "hf_to_megatron").differences | verify(hf, root / "hf_to_megatron").differences
    seconds = {kind: [measured["seconds"] for measured in found] for kind, found in runs.items()}
    peaks = {kind: max(measured["peak_mb"] for measured in found) for kind, found in runs.items()}
    ratios = {kind: ratio(seconds["copy"], seconds[kind]) for kind in ("hf_to_megatron", "megatron_to_hf")}
    figures: dict[str, Any] = {
        "checkpoint_gb": round(nbytes / 1e9, 3),
        "gb_per_s": {kind: round(nbytes / 1e9 / median(values), 3) for kind, values in seconds.items()},
        "speed_of_copy": ratios,
        "copy_ratio": min(ratios.values(), key=lambda found: found["median"]),
        "peak_mb": peaks,
        "peak_rss_mb": max(peaks["hf_to_megatron"], peaks["megatron_to_hf"]),
        "rss_bound_mb": round(2 * largest / 1e6 + SLACK_MB, 1),
        "largest_tensor_mb": round(largest / 1e6, 1),
        "tensors_that_differ": len(differing),
        "mbridge": mbridge,
    }
    finish("convert", figures, {"copy_ratio": FLOOR, "peak_rss_mb": figures["rss_bound_mb"]}, ("torch", "safetensors"), out)


def make_checkpoint(folder: Path, nbytes: int, shard_bytes: int) -> int:
    """A random bf16 Qwen2 in safetensors shards, as near to `nbytes` as whole layers come; returns its size."""
    one, two = (sum(tensor.nbytes for tensor in tensors_of(layers).values()) for layers in (1, 2))
    layers = max(1, round((nbytes - one) / (two - one)) + 1)
    tensors = tensors_of(layers)
    check_total(rules_for(shape_of(config_of(layers)), 128), hf_names=tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(layers)), encoding="utf-8")
    noise = torch.randn(max(map(torch.Tensor.numel, tensors.values())), generator=torch.Generator().manual_seed(0)).bfloat16()
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        filled = {name: noise[: tensors[name].numel()].clone().roll(order).view(tensors[name].shape) for order, name in enumerate(names)}
        save_file(filled, folder / file, metadata={"format": "pt"})
    (folder / HF_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": split.tensor_to_filename}), encoding="utf-8")
    sync(folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def config_of(layers: int) -> dict[str, Any]:
    """config.json of a model with so many layers."""
    return qwen2(HIDDEN, FFN, layers, HEADS, KV_HEADS, VOCAB, tied=False) | {"dtype": "bfloat16"}


def tensors_of(layers: int) -> dict[str, torch.Tensor]:
    """Its tensors by name, without storage."""
    return random_model(config_of(layers), "meta", dtype=torch.bfloat16).state_dict()


def mbridge_row(hf: Path, nbytes: int) -> dict[str, float] | str:
    """GB/s and memory of mbridge, or why there are none."""
    for package in ("mbridge", "transformer_engine"):
        if importlib.util.find_spec(package) is None:
            return f"not run: {package} is not installed"
    try:
        found = in_a_process(one, "mbridge", hf, hf)
    except Exception as error:  # noqa: BLE001  a peer may fail in any way
        return f"not run: {type(error).__name__}: {error}"
    return {"load_gb_per_s": round(nbytes / 1e9 / found["seconds"], 3), "peak_mb": found["peak_mb"]}


def mbridge_load(source: Path, target: Path) -> None:
    """mbridge's way from an HF folder to a Megatron model of one rank."""
    from mbridge import AutoBridge
    from megatron.core import parallel_state
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    bridge = AutoBridge.from_pretrained(str(source))
    bridge.load_weights(bridge.get_model(), str(source))


def one(kind: str, source: Path, target: Path) -> dict[str, float]:
    """{"seconds", "peak_mb"} of one call."""
    # Opened once: what the libraries allocate on first use belongs to the imports.
    HfReader(source) if kind != "megatron_to_hf" else MegatronReader(source / "model")
    calls: dict[str, Callable[[Path, Path], None]] = {
        "copy": plain_copy,
        "hf_to_megatron": hf_to_megatron,
        "megatron_to_hf": megatron_to_hf,
        "mbridge": mbridge_load,
    }
    if kind == "mbridge":
        importlib.import_module("mbridge")
    with anonymous_peak() as peak:
        started = time.perf_counter()
        calls[kind](source, target)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mb": round(peak[0] / 1e6, 1)}


def plain_copy(source: Path, target: Path) -> None:
    """Every shard by safetensors alone: load, save."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
            continue
        with safe_open(path, framework="pt") as file:
            save_file({name: file.get_tensor(name) for name in file.keys()}, target / path.name, metadata={"format": "pt"})  # noqa: SIM118
    sync(target)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
