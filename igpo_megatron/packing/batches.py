"""Choose which trees share a row, and which data-parallel rank gets which rows. Plain numbers in, indices out."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing bin packing: lists of indices whose sizes sum to at most `budget`; a larger item gets a bin alone.

    Ties and bins keep the order of `sizes`, so equal input gives equal rows.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for number, free in enumerate(room):
            if sizes[index] <= free:
                bins[number].append(index)
                room[number] -= sizes[index]
                break
        else:
            bins.append([index])
            room.append(budget - sizes[index])
    return bins


def level_fit(sizes: Sequence[int], budget: int, multiple: int) -> list[list[int]]:
    """Bins as `first_fit` needs them, but equally full, and a multiple of `multiple` of them: then as many ranks have the same to do.

    The largest item goes first, each to the emptiest bin. A bin over the budget asks for more bins, unless its item is larger alone.
    There are fewer bins where there are fewer items.
    """
    tightest = first_fit(sizes, budget)
    if multiple == 1 or not sizes:
        return tightest
    count = -(-len(tightest) // multiple) * multiple
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, number) for number in range(count)]
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            load, number = heapq.heappop(loads)
            bins[number].append(index)
            heapq.heappush(loads, (load + sizes[index], number))
        if all(load <= budget or len(bins[number]) == 1 for load, number in loads):
            return [members for members in bins if members]
        count += multiple


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Share items among ranks: the costliest first, each to the rank that has least; every rank gets the same number.

    Returns indices per rank, padded with -1 (a blank row) where the items run out, because ranks step through rows together.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    per_rank = max(1, -(-len(costs) // ranks))
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(shares[r]) < per_rank), key=lambda r: (loads[r], r))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return [share + [-1] * (per_rank - len(share)) for share in shares]


def row_cost(num_tokens: int, hidden_size: int, layers_flops_per_token: float) -> float:
    """FLOPs of one forward pass of a row: linear layers plus attention over the row's own tokens."""
    return num_tokens * layers_flops_per_token + 2.0 * hidden_size * num_tokens**2
