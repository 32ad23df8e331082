"""Claim: our log-prob head is near the speed of the matmul it contains, and ahead of the heads that people would pick instead.

    python tools/bench/head_kernel.py [--rows 10,128,4096] [--write-table]     under 3 minutes on two cores

Forward, and forward + backward with an own weight for every token. Heads take turns within one run; a head is timed only after its
log-probs agreed with fp64. Floors: 2NHV operations forward, and in all 8NHV with the recomputing backward or 6NHV with gradients formed
in the forward pass, at the matmul speed measured here, or reading the weight once at the copy speed measured here, whichever takes longer.
On a GPU our forms first run once in a process of their own: a kernel that hangs, or breaks the process's GPU, would cost all other times.
`--write-table` makes kernels/head_forms.json choose between our forms on this device by what was measured, once every case was. The
result is written after every case, so an interruption loses one.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import copy_gb_per_s, device_name, finish, interleaved, matmul_tflops, ratio, versions
from heads import Head, exact, load_heads

from igpo_megatron.kernels.linear_logprob import FORM_TABLE, FORMS, linear_logprob

SHAPES = {"7B": (3584, 152064), "0.5B": (896, 151936), "4096x131072": (4096, 131072)}
CPU_SHAPES = {"128x16384": (128, 16384)}
"""(H, V): Qwen2.5's, the one that published figures use, and one small enough for two cores."""

ROWS = "10,32,128,512,2048,4096,16384"
CPU_ROWS = "8,64,512"
AGREES = 0.3
"""Heads that round logits to bf16 are off by about 0.1; a wrong one by nats."""

START_S, ANSWER_S = 45.0, 25.0
"""A trial's process may take as long to start, and then as long for a form, compiling included."""


def main(
    rows: Annotated[str | None, typer.Option(help="Comma-separated numbers of targets.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of every head.")] = 15,
    seconds: Annotated[float, typer.Option(help="Start no further case after so many seconds.")] = float("inf"),
    uncompiled: Annotated[bool, typer.Option(help="Run the compiled peer as it is written; compiling takes a CPU half a minute.")] = False,
    write_table: Annotated[bool, typer.Option(help="Write this device's entry of head_forms.json, if every case was timed.")] = False,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Result file; default: results/DEVICE/head_kernel.json.")] = None,
) -> None:
    """Time every head on every shape, the first rows on all shapes before the next."""
    started = time.monotonic()
    cuda = torch.cuda.is_available()
    counts = (rows or (ROWS if cuda else CPU_ROWS)).split(",")
    if wrong := [count for count in counts if not count.strip().isdecimal() or int(count) < 1]:
        raise typer.BadParameter(f"{wrong[0]!r} is not a number above 0, nor several with commas", param_hint="--rows")
    if uncompiled:
        torch.compiler.set_stance("force_eager")
    with ThreadPoolExecutor(1) as pool:
        trial = pool.submit(unfit, FORMS if cuda else (), partial(try_forms, counts=tuple(map(int, counts))))
        heads, missing = load_heads(cuda)
    for form, problem in trial.result().items():
        missing[f"ours_{form}"] = problem
        heads.pop(f"ours_{form}", None)
    ceilings = {"matmul_tflops": matmul_tflops(cuda), "copy_gb_per_s": copy_gb_per_s(cuda)}
    by_shape: dict[str, Any] = {}
    forms_measured: dict[tuple[int, int, int], dict[str, float]] = {}
    shapes = SHAPES if cuda else CPU_SHAPES
    for count in map(int, counts):
        for shape, (hidden, vocab) in shapes.items():
            case = f"{shape}, N={count}"
            if time.monotonic() - started > seconds:
                missing[case] = f"not begun after {seconds:g} s"
                continue
            by_shape[case] = measure(heads, count, hidden, vocab, repeats, ceilings, missing)
            report(by_shape, missing, ceilings, out)
            forward = by_shape[case]["forward"]["seconds"] if "forward" in by_shape[case] else {}
            of_forms: dict[str, float] = {form: forward[f"ours_{form}"] for form in FORMS if f"ours_{form}" in forward}
            if of_forms:
                forms_measured[count, hidden, vocab] = of_forms
    if write_table and (wanted := len(counts) * len(shapes)) == len(forms_measured):
        table = json.loads(FORM_TABLE.read_text(encoding="utf-8"))
        table[device_name()] = {"source": f"measured: {json.dumps(versions('torch', 'triton'))}", "rules": rules(forms_measured)}
        FORM_TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    elif write_table:
        # Rules are for all sizes: from a few of them they would promise too much.
        print(f"{FORM_TABLE.name} is as it was: our forms were timed in {len(forms_measured)} of {wanted} cases", file=sys.stderr)
    report(by_shape, missing, ceilings, out)


def report(by_shape: Mapping[str, Any], missing: Mapping[str, str], ceilings: Mapping[str, float], out: Path | None) -> None:
    """Write what has been measured so far."""
    floors = {**ceilings, "note": "the fraction of the floor is floor time / measured time; peers that only form logits in 16 bits do less"}
    fractions = {case: " and ".join(f"{mode['fraction_of_floor']:.2f}" for mode in modes.values()) for case, modes in by_shape.items()}
    shares = ", ".join(f"{case} {share or 'none'}" for case, share in fractions.items())
    headline = f"floor / time, forward and with backward: {shares}; not timed: {', '.join(missing) or 'nothing'}"
    packages = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
    finish("head_kernel", {"by_shape": by_shape, "not_loaded": missing}, floors, packages, out, headline)


def measure(
    heads: Mapping[str, Head],
    count: int,
    hidden_size: int,
    vocab: int,
    repeats: int,
    ceilings: Mapping[str, float],
    missing: dict[str, str],
) -> dict[str, Any]:
    """Seconds, ratios to ours and fractions of the floor, "forward" and "forward_backward"; without a mode in which no head of ours works.

    `missing` gets a reason for each head that fails.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    generator = torch.Generator(device).manual_seed(count)
    hidden = torch.randn(count, hidden_size, device=device, dtype=dtype, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, hidden_size, device=device, dtype=dtype, generator=generator) / hidden_size**0.5).requires_grad_()
    targets = torch.randint(0, vocab, (count,), device=device, generator=generator)
    upstream = torch.randn(count, device=device, generator=generator)
    true = exact(hidden[:64].detach(), weight.detach(), targets[:64])

    def forward(head: Head) -> torch.Tensor:
        with torch.no_grad():
            return head.logprobs(hidden, weight, targets)

    def both(head: Head) -> None:
        hidden.grad = weight.grad = None
        head.train(hidden, weight, targets, upstream)

    def agree(head: Head) -> None:
        wrong = float((forward(head)[:64].double() - true).abs().max())
        if not wrong <= AGREES:
            raise ArithmeticError(f"log-probs are off by {wrong:.2g} nats")

    def working(chosen: Mapping[str, Head], call: Callable[[Head], object]) -> dict[str, Head]:
        problems = {name: problem for name, head in chosen.items() if (problem := failure(partial(call, head)))}
        missing.update({f"{name} at N={count}, H={hidden_size}": problem for name, problem in problems.items()})
        return {name: head for name, head in chosen.items() if name not in problems}

    good = working(heads, agree)
    operations = 2.0 * count * hidden_size * vocab
    read = weight.nbytes / (ceilings["copy_gb_per_s"] * 1e9)
    result = {}
    for mode, call in (("forward", forward), ("forward_backward", both)):
        fitting = {name: head for name, head in good.items() if (head.carrier is None if mode == "forward" else head.differentiable)}
        chosen = working(fitting, call)
        if not any(name.startswith("ours") for name in chosen):
            continue
        seconds = interleaved({name: partial(call, head) for name, head in chosen.items()}, repeats, warmup=1)
        medians = {name: median(values) for name, values in seconds.items()}
        ours = min((name for name in medians if name.startswith("ours")), key=medians.__getitem__)
        share = 1 if mode == "forward" else chosen[ours].matmuls
        floor = max(share * operations / (ceilings["matmul_tflops"] * 1e12), read)
        result[mode] = {
            "seconds": {name: round(value, 6) for name, value in medians.items()},
            "ours": ours,
            "peer_vs_ours": {name: ratio(values, seconds[ours]) for name, values in seconds.items() if not name.startswith("ours")},
            "floor_s": round(floor, 6),
            "fraction_of_floor": round(floor / medians[ours], 3),
        }
        if mode == "forward_backward":
            result[mode]["in_forward_vs_recompute"] = _in_forward_vs_recompute(seconds, chosen)
    return result


def unfit(names: Sequence[str], attempt: Callable[[Connection, Sequence[str]], None]) -> dict[str, str]:
    """Which of `names` fail, hang or end the process that tries them, and how; whatever comes after one is tried in the next process.

    `attempt` sends None once it is ready, then for each name None or what went wrong, after which it returns.
    """
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        passed, problem = _trial(waiting, attempt)
        waiting = waiting[passed:]
        if problem:
            found[waiting.pop(0)] = problem
    return found


def _trial(names: Sequence[str], attempt: Callable[[Connection, Sequence[str]], None]) -> tuple[int, str | None]:
    """How many of `names` passed, and what is wrong with the one after them; all pass where the process does not even start."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=attempt, args=(there, names), daemon=True)
    process.start()
    there.close()
    passed = -1  # ready comes first
    try:
        while passed < len(names):
            if not here.poll(ANSWER_S if passed >= 0 else START_S):
                problem = f"hung for {ANSWER_S:g} s in a process of its own"
                break
            problem = here.recv()
            if problem:
                break
            passed += 1
    except EOFError:
        process.join(10)
        problem = f"ended the process that tried it, exit code {process.exitcode}"
    finally:
        process.kill()
        process.join(10)
    return (passed, problem) if passed >= 0 else (len(names), None)


def try_forms(connection: Connection, names: Sequence[str], *, counts: Sequence[int], device: str = "cuda") -> None:
    """Every form's forward pass at every size, for `unfit`."""

    def run(form: Any) -> None:
        for hidden_size, vocab in SHAPES.values():
            weight = torch.zeros(vocab, hidden_size, device=device, dtype=torch.bfloat16)
            for count in counts:
                targets = torch.zeros(count, device=device, dtype=torch.int64)
                linear_logprob(weight[:count], weight, targets, need_entropy=False, form=form)
        torch.cuda.synchronize()

    torch.cuda.init()
    connection.send(None)
    for name in names:
        problem = failure(partial(run, name))
        connection.send(problem)
        if problem:
            return


def failure(call: Callable[[], object]) -> str | None:
    """Why a call fails: out of memory, a wrong result, or a head that does not take these sizes; None where it does not fail."""
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"[:200]
    return None


def _in_forward_vs_recompute(seconds: Mapping[str, list[float]], heads: Mapping[str, Head]) -> dict[str, float] | None:
    """Our fastest head that forms gradients forward over our fastest that recomputes; 3/4 where matmuls are all there is to it."""

    def fastest(matmuls: int) -> list[float] | None:
        ours = [values for name, values in seconds.items() if name.startswith("ours") and heads[name].matmuls == matmuls]
        return min(ours, key=median, default=None)

    new, old = fastest(3), fastest(4)
    return None if new is None or old is None else ratio(new, old)


def rules(measured: Mapping[tuple[int, int, int], Mapping[str, float]]) -> list[dict[str, Any]]:
    """Rules of head_forms.json from {(N, H, V): {form: seconds}}: per H the fastest form at each N, up to the N before it first loses.

    A form that has lost does not come back at a larger N: such a win is noise. Where one (N, H) was measured at several V, the fastest is
    the form whose times, each over the best at that V, have the least sum.
    """
    found: list[dict[str, Any]] = []
    sizes = sorted({hidden for _, hidden, _ in measured})
    for hidden in sizes:
        bound = {} if hidden == sizes[-1] else {"max_hidden": hidden}
        counts = sorted({count for count, size, _ in measured if size == hidden})
        best = [_fastest([times for (rows, size, _), times in measured.items() if (rows, size) == (count, hidden)]) for count in counts]
        current, beaten = best[0], set[str]()
        for before, form in zip(counts, best[1:], strict=False):
            if form not in (current, *beaten):
                found.append({"max_rows": before, **bound, "form": current})
                beaten.add(current)
                current = form
        found.append({**bound, "form": current})
    return found


def _fastest(times: Sequence[Mapping[str, float]]) -> str:
    """Form that is nearest to the best of each measurement; a form that failed in one of them is out."""
    forms_of_all = [form for form in times[0] if all(form in each for each in times)]
    return min(forms_of_all, key=lambda form: sum(each[form] / min(each.values()) for each in times))


if __name__ == "__main__":
    typer.run(main)
