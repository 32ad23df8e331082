"""A folder of every supported family, exported from Megatron's format, gives the same greedy tokens in vLLM as in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCAB, make_hf_folder
from transformers import AutoModelForCausalLM

from checkpoint_conversion.convert import hf_to_megatron, megatron_to_hf

SCRIPT = Path(__file__).with_name("greedy_tokens.py")
PROMPT = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
NEW_TOKENS = 12
HIDDEN = 128
"""Four heads of 32: vLLM's CPU attention knows no smaller ones."""


def greedy(folder: Path) -> list[int]:
    """By transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return tokens[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {name: make_hf_folder(root / name, name, hidden=HIDDEN) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def served(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    root = tmp_path_factory.mktemp("exported")
    for name, folder in originals.items():
        hf_to_megatron(folder, root / "megatron" / name)
        megatron_to_hf(root / "megatron" / name, root / name)
    command = [sys.executable, str(SCRIPT), json.dumps(PROMPT), str(NEW_TOKENS), *(str(root / name) for name in originals)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(zip(originals, answers, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exported_folder_gives_the_same_greedy_tokens_in_vllm(
    served: dict[str, list[int]], originals: dict[str, Path], name: str
) -> None:
    assert served[name] == greedy(originals[name])


def test_the_tokens_tell_the_families_apart(served: dict[str, list[int]]) -> None:
    """Otherwise a folder that was mixed up with another would pass."""
    assert len({tuple(tokens) for tokens in served.values()}) == len(ARCHITECTURES)
