"""Rebuild the demo's starting policy from scratch: tokenizer, initial weights, demonstrations, warm start, export.

    python tools/make_demo_policy.py [--out examples/quickstart/policy]     about 15 minutes on two cores (`make warmstart`)

The training in the middle is `igpo train examples/quickstart/warmstart.yaml`: the project's own loop on a replay file.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from transformers import PreTrainedTokenizerFast

import demo_policy
import world_facts
from demo_data import write_corpus
from demonstrations import Demonstrator, copy_exercises
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.types import RolloutGroup

COPY_STEPS = 90
"""Steps of pure copy exercises before the demonstrations."""

DATA = Path("runs/warmstart-data")


def main(
    out: Annotated[Path, typer.Option(help="Folder of the policy; replaced when training has succeeded.")] = Path(
        "examples/quickstart/policy"
    ),
    config: Annotated[Path, typer.Option(help="Settings of the warm start.")] = Path("examples/quickstart/warmstart.yaml"),
) -> None:
    """Rebuild the demo's starting policy."""
    if not (DATA / "demonstrations.parquet").exists():
        world = world_facts.build()
        DATA.mkdir(parents=True, exist_ok=True)
        write_corpus(world.passages, DATA / "corpus.jsonl")
        tokenizer = demo_policy.make_tokenizer(world)
        demo_policy.save(demo_policy.initial_model(tokenizer, seed=0), tokenizer, DATA / "initial")
        warm = load(config)
        write_rollouts(DATA / "demonstrations.parquet", 0, demonstrations(world, tokenizer, warm))
    igpo = [sys.executable, "-m", "igpo_megatron.cli"]
    subprocess.run([*igpo, "train", str(config)], check=True)
    settings = load(config)
    checkpoints = sorted((settings.run.folder / settings.run.name / "checkpoints").glob("step_??????"))
    exported = DATA / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    subprocess.run([*igpo, "convert", "megatron-to-hf", "--megatron", str(checkpoints[-1]), "--out", str(exported)], check=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(exported, out)
    typer.echo(f"the starting policy is in {out}")


def demonstrations(world: world_facts.World, tokenizer: PreTrainedTokenizerFast, warm: Config) -> Iterable[RolloutGroup]:
    """All groups of the warm start in the order of training: copy exercises, then demonstrations."""
    demo = load(Path("examples/quickstart/igpo.yaml"), [f"search.corpus={DATA / 'corpus.jsonl'}"])
    rng = random.Random(warm.run.seed)
    copies = COPY_STEPS * warm.rollout.prompts_per_step
    total = warm.run.steps * warm.rollout.prompts_per_step
    demonstrator = Demonstrator(world, tokenizer, demo)
    exercises = islice(copy_exercises(demo_policy.name_tokens(tokenizer), rng), copies)
    demos = (demonstrator.demonstrate(rng, number) for number in range(total - copies))
    return track(chain(exercises, demos), total=total, description="demonstrations")


if __name__ == "__main__":
    typer.run(main)
