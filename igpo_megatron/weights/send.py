"""The policy's half of a weight transfer: a bucket is sent while the next one is exported, and every engine reports what it received.

    export bucket i + 1   ██████      ██████
    engines load bucket i       ██████      ██████ ──rows──> compare with what was exported

Every wait has a deadline; the error of a missed one says how far either side had come.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

from igpo_megatron.types import Canary, Metric, NamedTensors, SyncError
from igpo_megatron.weights.settings import Sync
from igpo_megatron.weights.store import Bucket, Entry, Received, SharedWeights, in_buckets

Export = tuple[Bucket, Sequence[tuple[str, torch.Tensor]]]
"""A bucket, already written to the file, and its tensors."""

Rows = list[list[tuple[Any, ...]]]
"""For each worker of an engine, the fields of `Received` of each tensor."""


class Receiver(Protocol):
    """One engine that receives weights. If the engine is gone, futures raise an error for which `Transfer.is_lost` is true."""

    name: str
    """For messages, e.g. `engine 0`."""

    def begin(self) -> Future[Any]:
        """Pause serving."""
        ...

    def finish(self, version: int) -> Future[Any]:
        """Serve the new weights."""
        ...

    def position(self) -> str:
        """How far it has come, for the error of a missed deadline."""
        ...


class Transport(Protocol):
    """A way to send bytes, and the engines that it reaches."""

    @property
    def receivers(self) -> Sequence[Receiver]:
        """The engines that it reaches."""
        ...

    def send(self, bucket: Bucket, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Future[Rows]]:
        """Start to send; one future per receiver. `tensors` is empty if a restarted engine is filled from the file."""
        ...


def export(named_tensors: NamedTensors, store: SharedWeights, bucket_bytes: int) -> Iterator[Export]:
    """Cut the stream into buckets and write each to the file."""
    end = 0
    for number, tensors in enumerate(in_buckets(named_tensors, bucket_bytes)):
        bucket = store.write(number, tensors, end)
        end = bucket.begin + bucket.nbytes
        yield bucket, tensors


@dataclass(slots=True)
class Transfer:
    """One transfer and its statistics."""

    version: int
    limits: Sync
    is_lost: Any
    """(error) -> True if the engine is gone, rather than wrong."""

    before: Mapping[str, int] = field(default_factory=dict)
    """Tensor -> its fingerprint in the previous transfer, to recognise stale tensors."""

    buckets: list[Bucket] = field(default_factory=list)
    lost: dict[str, BaseException] = field(default_factory=dict)
    """Receivers that were gone before the end, which says nothing about the weights."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """pause, export (writing the file included), wait (for engines, beyond the next export), finish."""

    def run(self, source: Iterable[Export], transports: Sequence[Transport]) -> None:
        """Send everything. Raises SyncError if an engine received something else, or if a deadline has passed."""
        receivers = [receiver for transport in transports for receiver in transport.receivers]
        self._each("pause", [(receiver, receiver.begin()) for receiver in receivers], "did not pause", 0)
        on_the_way: list[tuple[Receiver, Future[Rows]]] = []
        exports = iter(source)
        while True:
            started = time.monotonic()
            exported = next(exports, None)
            self.seconds["export"] += time.monotonic() - started
            if on_the_way:
                self._settle(self.buckets[-1], on_the_way, exported[0] if exported else None)
            if exported is None:
                break
            bucket, tensors = exported
            self.buckets.append(bucket)
            on_the_way = [
                (receiver, future)
                for transport in transports
                for receiver, future in zip(transport.receivers, transport.send(bucket, tensors), strict=True)
                if receiver.name not in self.lost
            ]
        total = sum(bucket.nbytes for bucket in self.buckets)
        rest = [(receiver, receiver.finish(self.version)) for receiver in receivers if receiver.name not in self.lost]
        self._each("finish", rest, "did not finish the update", total)

    def metrics(self) -> dict[str, float]:
        """Flat numbers of the transfer: `sync/...`."""
        return {
            Metric.SYNC_MIB: sum(bucket.nbytes for bucket in self.buckets) / 2**20,
            "sync/buckets": float(len(self.buckets)),
            "sync/tensors": float(sum(len(bucket.entries) for bucket in self.buckets)),
            **{f"sync/{phase}_s": seconds for phase, seconds in self.seconds.items()},
        }

    def _settle(self, bucket: Bucket, on_the_way: Sequence[tuple[Receiver, Future[Rows]]], newest: Bucket | None) -> None:
        first, last = bucket.entries[0].name, bucket.entries[-1].name
        what = f"did not load bucket {bucket.number} ({first} to {last}, {bucket.nbytes / 2**20:.1f} MiB)"
        at = newest or bucket
        reached = f"the policy's side had exported bucket {at.number} up to {at.entries[-1].name}"
        for receiver, rows in self._each("wait", on_the_way, what, bucket.nbytes, reached):
            for worker, found in enumerate(rows):
                problem = difference(bucket.entries, [Received(row[0], row[1], tuple(row[2]), row[3]) for row in found], self.before)
                if problem:
                    raise SyncError(
                        f"{receiver.name} (worker {worker}) received bucket {bucket.number} of sync {self.version} wrongly: {problem}"
                    )
            if not rows:
                raise SyncError(f"{receiver.name} does not report what it received of bucket {bucket.number} of sync {self.version}")

    def _each(
        self, phase: str, asked: Sequence[tuple[Receiver, Future[Any]]], what: str, nbytes: int, reached: str = ""
    ) -> list[tuple[Receiver, Any]]:
        """Results of one step from every receiver that is not lost."""
        started = time.monotonic()
        limit = deadline_s(self.limits, nbytes)
        results = []
        for receiver, future in asked:
            try:
                results.append((receiver, future.result(timeout=max(0.0, started + limit - time.monotonic()))))
            except TimeoutError:
                raise SyncError(
                    f"{receiver.name} {what} in sync {self.version} within {limit:g} s (sync.base_s={self.limits.base_s:g} and "
                    f"the bytes at sync.min_mib_per_s={self.limits.min_mib_per_s:g}); {reached + ', ' if reached else ''}"
                    f"the engine's side was at: {receiver.position()}"
                ) from None
            except Exception as error:
                if not self.is_lost(error):
                    raise SyncError(f"{receiver.name} {what} in sync {self.version}: {cause(error)}") from error
                self.lost[receiver.name] = error
        self.seconds[phase] += time.monotonic() - started
        return results


def deadline_s(limits: Sync, nbytes: int) -> float:
    """Seconds that a step which moves `nbytes` may take."""
    return limits.base_s + nbytes / 2**20 / limits.min_mib_per_s


def difference(sent: Sequence[Entry], arrived: Sequence[Received], before: Mapping[str, int]) -> str | None:
    """One sentence on the first tensor that differs from what was sent; None if all are equal."""
    for entry, found in zip(sent, arrived, strict=False):
        if found.name != entry.name:
            return f"{entry.name} did not arrive in its place, {found.name} did"
        if found.shape != entry.shape:
            return f"{entry.name} has shape {list(found.shape)} and was exported with {list(entry.shape)}"
        if found.dtype != entry.dtype:
            return f"{entry.name} is {found.dtype} and was exported as {entry.dtype}"
        if found.fingerprint != entry.fingerprint:
            others = [other.name for other in sent if other.fingerprint == found.fingerprint]
            if others:
                return f"{entry.name} has the values of {others[0]}"
            if before.get(entry.name) == found.fingerprint:
                return f"{entry.name} still has its values from the previous sync"
            return f"{entry.name} has other values than were exported"
    if len(arrived) != len(sent):
        short = len(arrived) < len(sent)
        return f"{sent[len(arrived)].name} did not arrive" if short else f"{arrived[len(sent)].name} was not sent"
    return None


def check_canary(canary: Canary, served: Sequence[float], version: int, engine: int) -> float:
    """Largest |log-prob difference| of engine number `engine` on the canary, or the median where one side computes in bf16.

    Raises SyncError if it is more than the canary allows.
    It finds what fingerprints cannot: weights that arrived but were not loaded, were loaded into the wrong place, or are kept twice.
    """
    gap = (median_gap if canary.rounded else largest_gap)(canary.logprobs, served)
    if not gap <= canary.max_gap:
        which = "median" if canary.rounded else "largest"
        raise SyncError(
            f"engine {engine} does not serve the policy's weights: after sync {version} their log-probs differ by {gap:.3g} ({which}) "
            f"on the canary, more than sync.max_gap={canary.max_gap:g}; a transfer was lost or the engine kept old weights"
        )
    return gap


def largest_gap(expected: Sequence[float], found: Sequence[float]) -> float:
    """Largest absolute difference; infinite if one is not a finite number, which max() could miss."""
    return max(_gaps(expected, found))


def median_gap(expected: Sequence[float], found: Sequence[float]) -> float:
    """Median absolute difference; infinite if any is not a finite number."""
    gaps = _gaps(expected, found)
    return median(gaps) if max(gaps) < math.inf else math.inf


def _gaps(expected: Sequence[float], found: Sequence[float]) -> list[float]:
    gaps = (abs(left - right) for left, right in zip(expected, found, strict=True))
    return [gap if math.isfinite(gap) else math.inf for gap in gaps]


def fingerprints(buckets: Iterable[Bucket]) -> dict[str, int]:
    """Tensor -> fingerprint."""
    return {entry.name: entry.fingerprint for bucket in buckets for entry in bucket.entries}


def cause(error: BaseException) -> str:
    """The line of a Ray error that says what happened: the last, after the traceback, or the first where memory ran out, before advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0 if type(error).__name__ == "OutOfMemoryError" else -1]
