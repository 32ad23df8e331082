"""`igpo convert verify`: files bit by bit, and the log-probs of a text by transformers and by our Megatron model."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoint_conversion.classic_folder import Grid
from checkpoint_conversion.convert import hf_to_megatron
from igpo_megatron import cli
from igpo_megatron.doctor import verify
from igpo_megatron.doctor.verify import MAX_GAP, compare


def run_verify(*folders: Path) -> tuple[int, str]:
    """(exit code, output) of the command, in a process of its own: it joins a process group."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work() -> None:
        result = CliRunner().invoke(cli.app, ["convert", "verify", "--hf", str(folders[0]), "--megatron", str(folders[1])])
        queue.put((result.exit_code, result.output + (repr(result.exception) if result.exit_code not in (0, 1) else "")))

    torch.set_num_threads(1)  # a pool of threads does not survive the fork
    process = context.Process(target=work)
    process.start()
    found: tuple[int, str] = queue.get(timeout=300)
    process.join()
    return found


@pytest.mark.parametrize(("name", "classic"), [("qwen2_tied", None), ("qwen3_moe", None), ("llama3", Grid(tensor=2, pipeline=2))])
def test_a_converted_folder_is_bit_equal_and_scores_alike(
    hf_folders: dict[str, Path], tmp_path: Path, name: str, classic: Grid | None
) -> None:
    hf_to_megatron(hf_folders[name], tmp_path / "megatron", classic=classic)
    code, output = run_verify(hf_folders[name], tmp_path / "megatron")
    assert code == 0, output
    assert "0 differ" in output and "log-probs of 63 tokens" in output and " agree;" in output


def test_one_wrong_tensor_is_named_and_its_log_probs_differ(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(hf_folders["qwen3"], wrong)
    tensors = load_file(wrong / "model.safetensors")
    norm = "model.layers.1.self_attn.q_norm.weight"
    save_file({**tensors, norm: tensors[norm].roll(1)}, wrong / "model.safetensors", {"format": "pt"})
    hf_to_megatron(wrong, tmp_path / "megatron")
    code, output = run_verify(hf_folders["qwen3"], tmp_path / "megatron")
    assert code == 1
    assert f"1 differ; worst {norm}" in output and "DIFFER" in output


def test_the_gap_is_that_of_the_worst_token_and_what_is_no_number_never_agrees() -> None:
    gap = compare(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -3.0]))
    assert (gap.worst, gap.position, gap.num_tokens, gap.agrees) == (0.5, 1, 3, False)
    assert not compare(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, float("nan")])).agrees
    assert compare(torch.tensor([-1.0]), torch.tensor([-1.0 + MAX_GAP / 2])).agrees


def test_a_text_is_scored_without_a_tokenizer_too(hf_folders: dict[str, Path]) -> None:
    tokens = verify.text_tokens(hf_folders["qwen3"])
    assert len(tokens) == 64 and max(tokens) < 150
