"""Peer: seconds of a step of TRL's GRPOTrainer on CPU, sampling with transformers' generate, in an environment of its own.

    python tools/bench/peers/trl_step.py --model FOLDER [--dtype bf16] [--prompts FILE.json]     about 3 minutes on two cores

A step: 8 prompts, 4 single turns each of at most 96 tokens, one optimizer step. The settings are TRL's own but for those that make it
faster here: no gradient checkpointing, which saves memory that nobody lacks. `--dtype bf16` is TRL's mixed precision (fp32 weights,
autocast), `bf16-weights` has weights and Adam's state in bf16 too, and `fp32` is neither. No reference model, no pass for old log-probs.

`--prompts`: {"text": rendered prompt, "answers": [...]} of every question, in order; tools/bench/llm_step.py writes its own there. The
environment (.venv-peers/trl) is made by the first call. The first step is a warm-up. The last line is one JSON object: seconds of every
further step, of its generation (rewards included) and of the rest, and the tokens of its completions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import environment

DTYPES = ("fp32", "bf16", "bf16-weights")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TRACKIO_DISABLED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}

CAPITALS = ("France", "Japan", "Egypt", "Kenya", "Chile", "Norway", "India", "Canada")
"""Of the questions that are asked without --prompts."""


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Seconds of a GRPO step of TRL on CPU.")
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--prompts", type=Path, help="JSON list of {text, answers}; default: capitals of eight countries")
    parser.add_argument("--questions", type=int, default=8, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a completion")
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=32, help="completions of a forward and backward pass")
    options = parser.parse_args(words)
    if options.steps < 2:
        parser.error("--steps: at least 2, the first is not counted")
    if (options.questions * options.samples) % options.batch:
        parser.error(f"--batch {options.batch} does not divide the {options.questions * options.samples} completions of a step")
    return options


def main(words: Sequence[str]) -> None:
    """In any Python: make the environment, and run this file there. In that environment: the steps."""
    options = arguments_of(words)
    try:
        python = environment.python_of("trl")
    except RuntimeError as error:
        sys.exit(f"trl_step: {error}")
    if Path(sys.executable).absolute() != python:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        sys.stdout.flush()
        os.execve(python, [str(python), __file__, *words], {**kept, **OFFLINE, "OMP_NUM_THREADS": str(options.threads)})
    print(json.dumps(measure(options)))


def questions_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of TRL's data set, enough for all steps, in order and from the start again where there are too few."""
    if options.prompts is None:
        rows = [{"prompt": [{"role": "user", "content": f"What is the capital of {name}?"}], "answers": [""]} for name in CAPITALS]
    else:
        found = json.loads(options.prompts.read_text(encoding="utf-8"))
        rows = [{"prompt": row["text"], "answers": row["answers"]} for row in found]
    return [rows[place % len(rows)] for place in range(options.steps * options.questions)]


def overlap(text: str, answers: Sequence[str]) -> float:
    """Best share of an answer's words that the text has: a reward that differs within a group."""
    said = set(re.findall(r"\w+", text.lower()))
    wanted = [set(re.findall(r"\w+", answer.lower())) for answer in answers]
    return max((len(said & words) / max(len(words), 1) for words in wanted), default=0.0) - 0.001 * len(said)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train; the result that is printed."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    completions = options.questions * options.samples
    with tempfile.TemporaryDirectory(prefix="trl-step-") as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=options.dtype != "fp32",
            model_init_kwargs={"dtype": "bfloat16" if options.dtype == "bf16-weights" else "float32"},
            gradient_checkpointing=False,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=completions // options.batch,
            num_generations=options.samples,
            max_completion_length=options.max_tokens,
            temperature=1.0,
            max_steps=options.steps,
            shuffle_dataset=False,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )

        def reward(completions: list[Any], answers: list[list[str]], **_: Any) -> list[float]:
            texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
            return [overlap(text, accepted) for text, accepted in zip(texts, answers, strict=True)]

        trainer = trl.GRPOTrainer(
            model=str(options.model), reward_funcs=reward, args=settings, train_dataset=Dataset.from_list(questions_of(options))
        )
        steps = timed_steps(trainer, transformers.TrainerCallback)
    packages = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    return {"dtype": options.dtype, "threads": torch.get_num_threads(), "completions": completions, **summary(steps), "versions": packages}


def timed_steps(trainer: Any, callback: type) -> list[dict[str, float]]:
    """Train; of every step: seconds of all, of generation with rewards, and tokens of prompts and completions."""
    steps: list[dict[str, float]] = []
    generate = trainer._generate_and_score_completions

    def timed_generate(inputs: Any) -> Any:
        started = time.perf_counter()
        found = generate(inputs)
        steps[-1]["generate_s"] += time.perf_counter() - started
        steps[-1]["generated_tokens"] += int(found["completion_mask"].sum())
        # Each prompt once, as a tree has it.
        steps[-1]["prompt_tokens"] += int(found["prompt_mask"][:: trainer.num_generations].sum())
        return found

    class Clock(callback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append({"started": time.perf_counter(), "generate_s": 0.0, "generated_tokens": 0, "prompt_tokens": 0})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps[-1]["step_s"] = time.perf_counter() - steps[-1].pop("started")

    trainer._generate_and_score_completions = timed_generate
    trainer.add_callback(Clock())
    trainer.train()
    return steps


def summary(steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over all steps but the first; seconds, and tokens per second of sampling and of training (prompts once)."""
    counted = [{**step, "train_s": step["step_s"] - step["generate_s"]} for step in steps[1:]]
    middle = {name: median(step[name] for step in counted) for name in ("step_s", "generate_s", "train_s")}
    sampled = [step["generated_tokens"] / step["generate_s"] for step in counted]
    trained = [(step["generated_tokens"] + step["prompt_tokens"]) / step["train_s"] for step in counted]
    return {
        **{name: round(value, 3) for name, value in middle.items()},
        "rollout_tokens_per_s": round(median(sampled), 1),
        "train_tokens_per_s": round(median(trained), 1),
        "steps": [{name: round(value, 3) for name, value in step.items()} for step in counted],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
