"""Conversions that are killed, refused by the disk, begun twice or given damaged files; the classic layout; memory; `inspect`."""

import ctypes
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from test_conversion import CONFIGS, SMALL, assert_same_bits, hf_folder
from torch import Tensor
from typer.testing import CliRunner

from bench.memory import anonymous_peak
from checkpoint_conversion import folders, torch_dist_folder
from checkpoint_conversion import hf_folder as hf_files
from checkpoint_conversion.architectures import read_shape, rules_for, shape_of
from checkpoint_conversion.classic_folder import FILE, ClassicReader, Grid
from checkpoint_conversion.commands import app
from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf, verify
from checkpoint_conversion.folders import new_folder, partial_of
from checkpoint_conversion.hf_folder import HfReader
from checkpoint_conversion.inspection import inspect
from checkpoint_conversion.rules import ConversionError
from checkpoint_conversion.torch_dist_folder import MegatronReader
from checkpoint_conversion.torch_file import load_mapped, map_file, map_tensor

SHARD_BYTES = 60_000

DIRECTIONS = ["hf_to_megatron", "megatron_to_hf"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("faults") / "hf", "qwen3_moe")


@pytest.fixture(scope="module")
def megatron(hf):
    hf_to_megatron(hf, hf.parent / "megatron")
    return hf.parent / "megatron"


def convert(direction: str, hf: Path, megatron: Path, out: Path) -> None:
    if direction == "hf_to_megatron":
        hf_to_megatron(hf, out, max_shard_bytes=SHARD_BYTES)
    else:
        megatron_to_hf(megatron, out, max_shard_bytes=SHARD_BYTES)


def finished(folder: Path) -> dict[str, int]:
    """Complete weight files of an unfinished folder, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".distcp", ".safetensors")}


def assert_right(direction: str, hf: Path, megatron: Path, out: Path) -> None:
    if direction == "hf_to_megatron":
        assert verify(hf, out).differences == {}
    else:
        assert_same_bits(hf, out)
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.json.tmp")) and not (out / "job.json").exists()
    assert not partial_of(out).exists()


def halfway(direction: str, hf: Path, megatron: Path, out: Path) -> None:
    """Convert until three files are complete, and wait with the fourth one open."""
    original = folders.complete_file

    @contextmanager
    def held(path):
        with original(path) as file:
            yield file
            while len(finished(partial_of(out))) == 3:
                time.sleep(1)

    torch_dist_folder.complete_file = hf_files.complete_file = held
    convert(direction, hf, megatron, out)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_conversion_killed_halfway_leaves_nothing_that_looks_complete_and_resumes(hf, megatron, tmp_path, direction):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=halfway, args=(direction, hf, megatron, out))
    process.start()
    while process.is_alive() and len(finished(partial_of(out))) < 3:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    before = finished(partial_of(out))
    assert len(before) >= 3
    with pytest.raises(ConversionError):
        HfReader(partial_of(out))
    assert next(inspect(partial_of(out))).startswith("kind: unfinished conversion")
    convert(direction, hf, megatron, out)
    after = finished(out)
    assert len(after) > len(before) and {name: after[name] for name in before} == before, "finished shards must not be written again"
    assert_right(direction, hf, megatron, out)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_full_disk_is_a_clear_error_and_the_same_command_resumes(hf, megatron, tmp_path, direction, monkeypatch):
    out = tmp_path / "out"
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(ConversionError, match=r"out could not be written: .*No space left on device.*the same command"):
        convert(direction, hf, megatron, out)
    monkeypatch.undo()
    before = finished(partial_of(out))
    assert not out.exists() and before and not list(partial_of(out).rglob("*.tmp"))
    convert(direction, hf, megatron, out)
    assert {name: finished(out)[name] for name in before} == before
    assert_right(direction, hf, megatron, out)


def message_where_files_may_have(limit: int, function, *arguments, **options) -> str:
    """What a conversion says in a process in which the system itself refuses to write beyond `limit` bytes of a file."""

    def work(queue) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write raises OSError, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            function(*arguments, **options)
            queue.put("nothing")
        except (ConversionError, OSError, RuntimeError) as error:
            queue.put(f"{type(error).__name__}: {error}")

    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=work, args=(queue,))
    process.start()
    message = queue.get()
    process.join()
    return message


@pytest.mark.parametrize("limit", [3_000, 20_000, 150_001])
@pytest.mark.parametrize("target", ["torch_dist", "classic", "hf"])
def test_a_disk_that_fills_within_a_tensor_is_a_clear_error_in_every_layout(hf, megatron, tmp_path, target, limit):
    out = tmp_path / "out"
    source, function = (megatron, megatron_to_hf) if target == "hf" else (hf, hf_to_megatron)
    options = {"classic": Grid()} if target == "classic" else {}
    message = message_where_files_may_have(limit, function, source, out, **options)
    assert message.startswith("ConversionError") and "File too large" in message and "the same command" in message
    assert not out.exists() and partial_of(out).exists() and not list(partial_of(out).rglob("*.tmp"))
    function(source, out, **options)
    if target == "hf":
        assert_same_bits(hf, out)
    else:
        assert verify(hf, out).differences == {}


def test_what_was_begun_from_another_source_is_not_resumed(tmp_path):
    hf, out = hf_folder(tmp_path / "hf", "qwen2"), tmp_path / "out"

    def interrupted(path):
        if path.name == "__0_3.distcp":
            raise KeyboardInterrupt
        return folders.complete_file(path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch_dist_folder, "complete_file", interrupted)
        hf_to_megatron(hf, out, max_shard_bytes=SHARD_BYTES)
    assert len(finished(partial_of(out))) == 3
    tensors = load_file(hf / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(hf, out, max_shard_bytes=SHARD_BYTES)
    assert verify(hf, out).differences == {}


def test_two_processes_do_not_write_one_folder(tmp_path):
    with new_folder(tmp_path / "out", {"to": "here"}) as partial:
        (partial / "begun").touch()
        with pytest.raises(ConversionError, match="another process is writing"), new_folder(tmp_path / "out", {"to": "here"}):
            pass
        assert (partial / "begun").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["begun"]
    with pytest.raises(ConversionError, match="exists already"), new_folder(tmp_path / "out", {}):
        pass
    with (tmp_path / "out" / "begun").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing holds on to the finished folder


def test_a_mistake_found_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(ConversionError, match="wrong"), new_folder(tmp_path / "out", {}) as partial:
        (partial / "begun").touch()
        raise ConversionError("wrong")
    assert list(tmp_path.iterdir()) == []


def test_layers_of_different_dtypes_are_refused_before_anything_is_written(tmp_path):
    hf = hf_folder(tmp_path / "hf", "qwen2")
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].bfloat16()}, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"linear_fc2.weight is torch.bfloat16 .* stores all layers in one tensor"):
        hf_to_megatron(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_config_of_another_size_is_refused_before_anything_is_written(tmp_path):
    hf = hf_folder(tmp_path / "hf", "qwen2")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 1}))
    with pytest.raises(ConversionError, match="config belongs to another model"):
        hf_to_megatron(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_damage_inside_a_file_of_the_right_length_is_named(hf, tmp_path):
    hf_to_megatron(hf, tmp_path / "megatron")
    data = tmp_path / "megatron" / "model" / "__0_0.distcp"
    data.write_bytes(b"\0" * data.stat().st_size)
    with pytest.raises(ConversionError, match=r"__0_0.distcp is damaged at embedding"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not partial_of(tmp_path / "back").exists()


@pytest.mark.parametrize("key, value", [("hidden_size", 128), ("intermediate_size", 128), ("head_dim", 16), ("num_attention_heads", 8)])
def test_a_config_of_other_sizes_is_refused_in_both_directions(hf, megatron, tmp_path, key, value):
    changes = {key: value, **({"moe_intermediate_size": value} if key == "intermediate_size" else {})}
    for direction, source, config in (("hf_to_megatron", hf, "config.json"), ("megatron_to_hf", megatron, "hf/config.json")):
        folder = tmp_path / direction
        shutil.copytree(source, folder)
        (folder / config).write_text(json.dumps({**json.loads((folder / config).read_text()), **changes}))
        with pytest.raises(ConversionError, match="config belongs to another model"):
            convert(direction, folder, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not partial_of(tmp_path / "out").exists()


def archives(folder: Path, *contents: object) -> tuple[BinaryIO, Tensor, list[tuple[int, int]]]:
    """A file with files of torch.save in it, one behind the other, at odd places; (the open file, its bytes, where each lies)."""
    whole, spans = b"odd", []
    for content in contents:
        stream = io.BytesIO()
        torch.save(content, stream)
        spans.append((len(whole), stream.tell()))
        whole += stream.getvalue() + b"!"
    (folder / "file").write_bytes(whole)
    return (folder / "file").open("rb"), map_file(folder / "file"), spans


def test_tensors_inside_a_file_are_mapped_whatever_their_strides(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    large = torch.arange(10**5)
    tensors = [
        base,
        base.T,
        base[1:3, 2:],
        base.bfloat16(),
        base.byte()[1:],
        base.long(),
        torch.tensor(3.0),
        torch.empty(0, 5),
        base[:1].expand(4, 6),
        large,
    ]
    file, content, spans = archives(tmp_path, *tensors)
    with file:
        found = [map_tensor(file, content, *span) for span in spans]
    for tensor, mapped in zip(tensors, found, strict=True):
        assert mapped.dtype == tensor.dtype and mapped.shape == tensor.shape and torch.equal(mapped, tensor)


def test_what_is_no_tensor_in_a_file_is_refused(tmp_path):
    file, content, spans = archives(tmp_path, {"a": torch.ones(2)}, [1], torch.ones(200))
    with file:
        for start, length in [*spans[:2], (0, 10), (spans[2][0], spans[2][1] - 60), (spans[2][0] + 7, spans[2][1] - 7)]:
            with pytest.raises(ValueError):
                map_tensor(file, content, start, length)


class Liar:
    """To torch.load a tensor of 200 numbers, in the memory of four."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (torch.ones(4)._typed_storage(), 0, (200,), (1,), False, OrderedDict())


def test_a_tensor_that_says_it_is_larger_than_its_bytes_is_refused(tmp_path):
    file, content, (span,) = archives(tmp_path, Liar())
    with file, pytest.raises(ValueError, match="a tensor of 800 bytes does not fit into 16 bytes"):
        map_tensor(file, content, *span)
    whole = io.BytesIO()
    torch.save(torch.ones(200)[:150], whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "short", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:8] if name.endswith("data/0") else old.read(name))
    with (tmp_path / "short").open("rb") as file, pytest.raises(ValueError, match="a tensor of 800 bytes does not fit into 8 bytes"):
        map_tensor(file, map_file(tmp_path / "short"), 0, (tmp_path / "short").stat().st_size)


def test_damaged_bytes_of_a_tensor_are_a_tensor_or_one_kind_of_error(tmp_path):
    stream = io.BytesIO()
    torch.save(torch.arange(12.0).reshape(3, 4), stream)
    whole, path = stream.getvalue(), tmp_path / "file"
    described = whole.index(b"\x80\x02", whole.index(b"data.pkl"))
    refused = 0
    for place in range(described, whole.index(b"PK", described), 3):
        for value in b"\x00BJR\xff":
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                with path.open("rb") as file:
                    map_tensor(file, map_file(path), 0, len(whole))
            except ValueError as error:
                assert "weights_only" not in str(error), "torch's advice to load damaged bytes without care"
                refused += 1
    assert refused > 50
    path.write_bytes(whole.replace(b"_rebuild_tensor_v2", b"\xffrebuild_tensor_v2"))
    with pytest.raises(ConversionError, match=r"file is not a complete file of torch\.save \('utf-8' codec can't decode byte 0xff"):
        load_mapped(path)


def test_a_reader_holds_no_file_open_however_many_tensors_it_has_given(tmp_path):
    state = {f"decoder.layers.{layer}.input_layernorm.weight": torch.full((8,), float(layer), dtype=torch.uint8) for layer in range(64)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    reader = MegatronReader(tmp_path)
    held = [reader.get(name) for name in reader.names()]
    opened = [file.path for file in psutil.Process().open_files()]  # others may be there, and go meanwhile
    assert not any(Path(path).is_relative_to(tmp_path) for path in opened) and sum(int(tensor[0]) for tensor in held) == 63 * 32


# ---- classic layout


@pytest.mark.parametrize("te_names", [True, False])
@pytest.mark.parametrize(
    "kind, grid",
    [
        ("qwen2_tied", Grid()),
        ("qwen2_tied", Grid(tensor=2, pipeline=2)),
        ("qwen3", Grid(tensor=2)),
        ("llama3", Grid(pipeline=2)),
        ("mixtral", Grid(expert=2)),
        ("qwen3_moe", Grid(tensor=2, pipeline=2, expert=2)),
    ],
)
def test_the_classic_layout_round_trips_bit_equal(tmp_path, kind, grid, te_names):
    hf = hf_folder(tmp_path / "hf", kind)
    hf_to_megatron(hf, tmp_path / "classic", classic=grid, te_names=te_names)
    assert len(list((tmp_path / "classic" / "model" / "release").glob(f"mp_rank_*/{FILE}"))) == len(grid.ranks())
    assert verify(hf, tmp_path / "classic").differences == {}
    megatron_to_hf(tmp_path / "classic", tmp_path / "back")
    assert_same_bits(hf, tmp_path / "back")
    facts = list(inspect(tmp_path / "classic"))
    assert f"ranks: tensor {grid.tensor}, pipeline {grid.pipeline}, expert {grid.expert}" in facts
    assert any(fact.startswith("complete") for fact in facts)


def one_rank(tmp_path: Path, layers: int) -> tuple[Path, dict, dict]:
    """(HF folder, its rules, state dict as one rank has it)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SMALL, **CONFIGS["qwen3"], "num_hidden_layers": layers}
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).save_pretrained(tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "one", classic=Grid())
    state = torch.load(tmp_path / "one" / "model" / "release" / "mp_rank_00" / FILE, weights_only=False)["model"]
    return tmp_path / "hf", settings, state


def stage(state: dict, layers: list[int], *, first: bool = False, last: bool = False) -> dict:
    """The part of a state dict that holds some layers, numbered from 0."""
    part = {}
    for name, tensor in state.items():
        if name.startswith("decoder.layers."):
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            if int(number) in layers:
                part[f"decoder.layers.{layers.index(int(number))}.{rest}"] = tensor
        elif (first and name.startswith("embedding.")) or (last and not name.startswith("embedding.")):
            part[name] = tensor
    return {**part, "decoder.final_layernorm._extra_state": None}


def save_ranks(folder: Path, ranks: dict[str, dict]) -> Path:
    for name, content in ranks.items():
        (folder / "release" / name).mkdir(parents=True)
        torch.save(content, folder / "release" / name / FILE)
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    return folder


def test_uneven_stages_and_virtual_stages_are_numbered_as_megatron_does(tmp_path):
    hf, _, state = one_rank(tmp_path, layers=4)
    uneven = {
        "mp_rank_00_000": {"model": stage(state, [0], first=True)},
        "mp_rank_00_001": {"model": stage(state, [1, 2, 3], last=True)},
    }
    # Two virtual stages on two ranks: rank 0 has layers 0 and 2, rank 1 layers 1 and 3.
    virtual = {
        "mp_rank_00_000": {"model0": stage(state, [0], first=True), "model1": stage(state, [2])},
        "mp_rank_00_001": {"model0": stage(state, [1]), "model1": stage(state, [3], last=True)},
    }
    for name, ranks in (("uneven", uneven), ("virtual", virtual)):
        save_ranks(tmp_path / name, ranks)
        assert verify(hf, tmp_path / name).differences == {}, name
    swapped = {"mp_rank_00_000": virtual["mp_rank_00_001"], "mp_rank_00_001": virtual["mp_rank_00_000"]}
    save_ranks(tmp_path / "swapped", swapped)
    assert verify(hf, tmp_path / "swapped").differences != {}


def test_experts_that_tensor_parallelism_does_not_cut_are_read_whole(tmp_path):
    """Expert-tensor parallel 1: rank t of two holds its half of attention and, whole, its half of the experts."""
    hf = hf_folder(tmp_path / "hf", "qwen3_moe")
    hf_to_megatron(hf, tmp_path / "tp2", classic=Grid(tensor=2))
    hf_to_megatron(hf, tmp_path / "ep2", classic=Grid(expert=2))
    ranks = {}
    for rank in range(2):
        attention = torch.load(tmp_path / "tp2" / "model" / "release" / f"mp_rank_{rank:02d}" / FILE, weights_only=False)["model"]
        experts = torch.load(tmp_path / "ep2" / "model" / "release" / f"mp_rank_00_{rank:03d}" / FILE, weights_only=False)["model"]
        model = {name: tensor for name, tensor in attention.items() if ".experts." not in name}
        ranks[f"mp_rank_{rank:02d}_{rank:03d}"] = {"model": {**model, **{k: v for k, v in experts.items() if ".experts." in k}}}
    save_ranks(tmp_path / "mixed", ranks)
    assert verify(hf, tmp_path / "mixed").differences == {}


def test_damaged_classic_folders_are_clear_errors(tmp_path):
    hf = hf_folder(tmp_path / "hf", "qwen3")
    shape = shape_of(json.loads((hf / "config.json").read_text()))
    rules = rules_for(shape, 128)

    def release(name: str) -> Path:
        hf_to_megatron(hf, tmp_path / name, classic=Grid(tensor=2, pipeline=2))
        return tmp_path / name / "model" / "release"

    folder = release("cut")
    path = folder / "mp_rank_01_001" / FILE
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConversionError, match=r"mp_rank_01_001.*is not a complete file of torch.save"):
        ClassicReader(folder, rules, shape)
    path.unlink()
    with pytest.raises(ConversionError, match="lacks the files of ranks mp_rank_01_001"):
        ClassicReader(folder, rules, shape)
    torch.save({"args": 1}, path)
    with pytest.raises(ConversionError, match="holds no model; its keys are args"):
        ClassicReader(folder, rules, shape)
    torch.save({"model": {"language_model": {}}}, path)
    with pytest.raises(ConversionError, match="before Megatron-Core"):
        ClassicReader(folder, rules, shape)
    with pytest.raises(ConversionError, match=r"pipeline 3 does not divide its 2 layers; tensor 4 .* 2 key-value heads"):
        hf_to_megatron(hf, tmp_path / "x", classic=Grid(tensor=4, pipeline=3))
    assert not (tmp_path / "x").exists()


class Runs:
    """Pickled, it asks for a command to be run when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_asks_for_code_to_be_run_is_read_without_running_it(tmp_path):
    hf, _, state = one_rank(tmp_path, layers=2)
    save_ranks(tmp_path / "classic", {"mp_rank_00": {"args": Runs(tmp_path / "ran"), "model": state}})
    assert verify(hf, tmp_path / "classic").differences == {}
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Runs(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "the trap itself must work"


def test_an_index_that_asks_for_code_to_be_run_runs_none(tmp_path):
    hf, _, _ = one_rank(tmp_path, layers=2)
    hf_to_megatron(hf, tmp_path / "megatron")
    (index,) = (tmp_path / "megatron").rglob(".metadata")
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = Runs(tmp_path / "ran")
    index.write_bytes(pickle.dumps(metadata))
    assert verify(hf, tmp_path / "megatron").differences == {}
    index.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(ConversionError, match="metadata is damaged"):
        verify(hf, tmp_path / "megatron")
    assert not (tmp_path / "ran").exists()


# ---- memory


def big_checkpoint(folder: Path, layers: int = 12) -> int:
    """About 300 MB in bf16; returns the bytes of the largest tensor."""
    config = {**SMALL, "model_type": "llama", "rope_theta": 1e4, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
    config |= {"num_attention_heads": 8, "vocab_size": 8192, "num_hidden_layers": layers}
    shapes = {"model.embed_tokens.weight": (8192, 1024), "lm_head.weight": (8192, 1024), "model.norm.weight": (1024,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.{part}_proj.weight": (rows, 1024) for part, rows in (("q", 1024), ("k", 256), ("v", 256), ("o", 1024))
        }
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (3072, 1024) for part in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (1024, 3072)}
        shapes |= {f"{prefix}{norm}_layernorm.weight": (1024,) for norm in ("input", "post_attention")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / "model.safetensors")
    return 8192 * 1024 * 2


M_MMAP_THRESHOLD = -3  # of malloc.h


def peaks_in_a_process(*calls) -> list[int]:
    """Of each (function, arguments), the most bytes that were in use above those at its start."""
    # A new process: in the heap of this one are holes that earlier tests left, which are filled before the system is asked.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return [process.submit(peak_of, *call).result(timeout=400) for call in calls]


def peak_of(function, *arguments) -> int:
    torch.set_num_threads(1)
    # Each tensor is a mapping of its own, gone when it is freed: the allocator keeps none of it for later.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    with anonymous_peak(every_s=0.001) as peak:
        function(*arguments)
    return peak[0]


def load_all(folder: Path) -> None:
    tensors = {name: HfReader(folder).get(name).clone() for name in HfReader(folder).names()}
    time.sleep(0.5)  # long enough for the watcher to look, on a busy machine too
    assert tensors


def test_memory_is_bounded_by_the_largest_tensors_whatever_the_model_holds(tmp_path):
    largest = big_checkpoint(tmp_path / "hf")
    bound = 2 * largest + 48 * 2**20
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    _, *converted, whole = peaks_in_a_process(
        (read_shape, hf),  # what is imported at its first use
        (hf_to_megatron, hf, megatron),
        (megatron_to_hf, megatron, back),
        (megatron_to_hf, megatron, tmp_path / "fp32", torch.float32),
        (load_all, hf),
    )
    assert max(converted) < bound, converted
    assert whole > 2 * bound, "the whole model in memory must fail"
    assert_same_bits(tmp_path / "hf", tmp_path / "back")


# ---- inspect


def test_inspect_says_what_a_folder_is_and_what_it_lacks(hf, megatron, tmp_path):
    facts = list(inspect(hf))
    assert facts[0] == "kind: Hugging Face"
    assert "model: qwen3_moe, 2 layers, hidden 64, vocabulary 300" in facts
    assert "experts: 4 of 48, 2 per token" in facts
    assert any(fact.startswith(f"tensors: {len(HfReader(hf).names())}, 0.000 B in float32") for fact in facts), facts
    assert facts[-1].startswith("complete")
    facts = list(inspect(megatron))
    assert facts[0].startswith("kind: Megatron-Core, torch_dist") and facts[-1].startswith("complete")
    listed = list(inspect(megatron, list_tensors=True))
    assert "  decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight float32 [96, 64]" in listed
    bare = list(inspect(megatron / "model"))  # without hf/ beside it there is nothing to compare with
    assert bare[0].startswith("kind: Megatron-Core") and not any(fact.startswith("complete") for fact in bare)
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text(json.dumps({**SMALL, "model_type": "gemma2"}))
    facts = "\n".join(inspect(tmp_path / "gemma"))
    assert "problem:" in facts and "caps logits" in facts and "holds neither model.safetensors" in facts
    shown = CliRunner().invoke(app, ["inspect", str(hf), "--tensors"])
    assert shown.exit_code == 0 and "model.layers.0.mlp.gate.weight float32 [4, 64]" in shown.output
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert shown.exit_code == 2 and "neither a Hugging Face folder" in shown.output


def test_the_command_line_writes_and_reads_the_classic_layout(hf, tmp_path):
    def run(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    classic = tmp_path / "classic"
    command = ("hf-to-megatron", "--hf", hf, "--out", classic, "--layout", "classic", "--tensor", 2, "--expert", 2)
    assert run(*command).exit_code == 0
    assert run("megatron-to-hf", "--megatron", classic / "model", "--config", hf, "--out", tmp_path / "back").exit_code == 0
    assert_same_bits(hf, tmp_path / "back")
    assert "by --config" in run("megatron-to-hf", "--megatron", classic / "model" / "release", "--out", tmp_path / "x").output
    assert "leave the sizes out" in run("hf-to-megatron", "--hf", hf, "--out", tmp_path / "x", "--tensor", 2).output
    assert "use torch_dist or classic" in run("hf-to-megatron", "--hf", hf, "--out", tmp_path / "x", "--layout", "old").output
    assert not (tmp_path / "x").exists()
