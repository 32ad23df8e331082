"""Measure this machine: matmul, attention and memory rates of one rank, the cost of a call, and two ranks' collectives (gloo, or NCCL).

Each figure is the best of several repetitions, because other programs can only slow it down. Collectives on CPU are a mean, because a
rank waits for the slower one. Takes less than a minute on two cores.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

from igpo_megatron.plan.machines import gpu
from igpo_megatron.plan.types import Machine
from igpo_megatron.types import UserError

REPEATS = 7
MATMULS = ((128, 64, 64), (256, 128, 256), (512, 256, 512), (512, 256, 1024), (1024, 512, 2048), (1024, 1024, 2816))
"""Tokens, inner and outer width: from the calls of a toy to those of a small model."""

CUDA_MATMULS = ((1024, 1024, 1024), (4096, 2048, 2048), (8192, 4096, 4096), (16384, 8192, 8192))
STREAM_ELEMENTS = 2**20
"""Of an elementwise call: an activation's size, written to fresh memory as activations are."""


def calibrate(*, links: bool = True) -> Machine:
    """This machine as the planner sees it: CUDA where there is a GPU, else the CPU with one thread per rank.

    `links` False, or a single GPU: what ranks exchange is not measured but taken from the data sheet of an H100.
    """
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    single = cuda and torch.cuda.device_count() < 2
    known = gpu("h100")
    pair = links and not single
    link, latency, crowd = _pair(cuda) if pair else (known.link, known.link_latency, 1.0)
    assumed = ["decode_call", *["host_link", "network"] * cuda, *["link"] * (not pair)]
    cores = len(os.sched_getaffinity(0))
    name = torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()}, {cores} cores)"
    return Machine(
        name=name,
        device="cuda" if cuda else "cpu",
        memory=float(torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().available / cores),
        matmul=tuple(sorted(_matmul(shape, device, dtype) for shape in (CUDA_MATMULS if cuda else MATMULS))),
        attention=_attention(device, dtype),
        stream=_stream(device, dtype),
        link=link,
        link_latency=latency,
        network=known.network if cuda else link,
        network_latency=known.network_latency if cuda else latency,
        host_link=known.host_link,
        call=_call(device, dtype),
        decode_call=3e-3,
        ranks_per_node=8 if single else torch.cuda.device_count() if cuda else 64,
        crowd=crowd,
        cores=None if cuda else cores,
        source=f"measured on {name}, {time.strftime('%Y-%m-%d')}; not measured but an H100's: {', '.join(assumed)}",
    )


def best_of(call: Callable[[], object], device: torch.device, repeats: int = REPEATS, inner: int = 1) -> float:
    """Least seconds of a call, of `repeats` times `inner` of them."""
    call()
    # On CPU, time that other programs take of the core is not counted.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = clock()
        for _ in range(inner):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((clock() - started) / inner)
    return min(times)


def _matmul(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """A linear layer's three products: forward, and the gradients of its input and of its weight, each at a rate of its own."""
    tokens, inner, outer = shape
    x, weight = torch.randn(tokens, inner, device=device, dtype=dtype), torch.randn(outer, inner, device=device, dtype=dtype)
    gradient = torch.randn(tokens, outer, device=device, dtype=dtype)
    flops = 2.0 * tokens * inner * outer
    seconds = sum(best_of(call, device) for call in (lambda: x @ weight.t(), lambda: gradient @ weight, lambda: gradient.t() @ x))
    return flops, 3 * flops / seconds


def _attention(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s over the pairs that causal attention needs."""
    tokens = 4096 if device.type == "cuda" else 512
    q, k, v = (torch.randn(1, 8, tokens, 64, device=device, dtype=dtype) for _ in range(3))
    seconds = best_of(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device)
    return 4.0 * 8 * 64 * tokens * tokens / 2 / seconds


def _stream(device: torch.device, dtype: torch.dtype) -> float:
    elements = STREAM_ELEMENTS * (64 if device.type == "cuda" else 1)
    a, b = torch.randn(elements, device=device, dtype=dtype), torch.randn(elements, device=device, dtype=dtype)
    return 3.0 * a.nbytes / best_of(lambda: a * b, device)


def _call(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one operation on a few numbers, forward and backward; half of it is spent in Python and autograd."""
    x = torch.randn(4, 8, device=device, dtype=dtype, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(50):
            y = y * 1.01
        y.sum().backward()

    return best_of(chain, device) / 100


def _pair(cuda: bool) -> tuple[float, float, float]:
    """Two ranks of this machine: (bytes/s of one in an all-reduce by halves, seconds of a small half, slowdown while both compute)."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    ranks = [context.Process(target=_rank, args=(rank, port, cuda, there)) for rank in range(2)]
    for process in ranks:
        process.start()
    there.close()
    try:
        link, latency, crowd = here.recv()
        if not 0 < latency < math.inf or not 0 < link < math.inf:
            raise UserError("--calibrate: collectives took no longer than the computing around them; measure again when nothing else runs")
        return link, latency, crowd
    except EOFError:
        raise UserError("--calibrate: two ranks on this machine could not meet on 127.0.0.1; is the loopback interface up?") from None
    finally:
        for process in ranks:
            process.join()


def _rank(rank: int, port: int, cuda: bool, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    device = torch.device("cuda" if cuda else "cpu")
    small, large = _halves(256, device), _halves(2**19, device)
    link = 2**19 * 4 / (large - small) if large > small else math.inf  # of n bytes each half moves n / 2 to the other rank
    crowd = 1.0 if cuda else _crowd(rank, device)
    if rank == 0:
        connection.send((link, small / 2, crowd))
    dist.destroy_process_group()


def _halves(elements: int, device: torch.device) -> float:
    """Seconds of a reduce-scatter and an all-gather, which is what the trainer's collectives are, each after some computing.

    On CPU ranks that compute keep the cores from the threads that communicate, so that a collective in a step takes many times as long
    as one alone: the mean counts, since a rank waits for the slowest.
    """
    whole, part = torch.ones(elements, device=device), torch.ones(elements // 2, device=device)
    a, b = torch.randn(512, 256, device=device), torch.randn(256, 1024, device=device)

    def compute() -> None:
        (a @ b).mul_(0.5)

    def step() -> None:
        compute()
        dist.reduce_scatter_tensor(part, whole)
        compute()
        dist.all_gather_into_tensor(whole, part)

    def communicate() -> None:
        dist.reduce_scatter_tensor(part, whole)
        dist.all_gather_into_tensor(whole, part)

    if device.type == "cuda":
        return best_of(communicate, device, 20, 2)
    return _mean(step) - 2 * _mean(compute)


def _mean(call: Callable[[], object], repeats: int = 100) -> float:
    """Mean wall-clock seconds of a call; both ranks begin together."""
    call()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _crowd(rank: int, device: torch.device) -> float:
    """A rank's computing time while another computes, over its time alone: cores may share caches, memory and execution units."""

    def work() -> float:
        # Each repetition lasts a tenth of a second, so that the other rank computes during all of it.
        a, b = torch.randn(512, 256), torch.randn(256, 1024)
        x = torch.randn(STREAM_ELEMENTS)
        return best_of(lambda: (a @ b, x * x), device, REPEATS, 60)

    alone = work() if rank == 0 else 0.0
    dist.barrier()
    together = work()
    dist.barrier()
    return max(1.0, together / alone) if rank == 0 else 1.0
