"""Weights on their way to engines: every fault, at every tensor, on every engine, is caught and named; no wait is without an end."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import astuple

import numpy as np
import pytest
import torch

from igpo_megatron.engines.actor import EngineLost
from igpo_megatron.types import SyncError
from igpo_megatron.weights.send import Rows, Transfer, deadline_s, export, fingerprints
from igpo_megatron.weights.settings import Sync
from igpo_megatron.weights.store import Bucket, SharedWeights, fingerprint, in_buckets, read, received

Tensors = list[tuple[str, torch.Tensor]]
Fault = Callable[[Tensors, int, Tensors], Tensors]

LIMITS = Sync(base_s=5, min_mib_per_s=10)
BUCKET_BYTES = 700


def model(seed: int) -> Tensors:
    """Small tensors of few shapes, as a model has: several buckets of several each."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"embed": (9, 8), **{f"layers.{layer}.{part}": shape for layer in range(3) for part, shape in LAYER.items()}, "norm": (8,)}
    return [(name, torch.randn(shape, generator=draw)) for name, shape in shapes.items()]


LAYER = {"q": (8, 8), "k": (8, 8), "experts.0": (4, 8), "experts.1": (4, 8), "bias": (8,)}
NAMES = [name for name, _ in model(0)]


class Scripted:
    """An engine, and the way to it: reads the file as a worker does, and says what it received after `fault` has been at it."""

    def __init__(self, store: SharedWeights, name: str = "engine 0", fault: Callable[[Bucket, Tensors], Tensors] | None = None) -> None:
        self.name, self._store, self._fault = name, store, fault
        self.receivers: Sequence[Scripted] = [self]
        self.version: int | None = None
        self.loaded: dict[str, torch.Tensor] = {}

    def begin(self) -> Future[None]:
        return done(None)

    def finish(self, version: int) -> Future[None]:
        self.version = version
        return done(None)

    def position(self) -> str:
        return "bucket 1, layers.0.k"

    def send(self, bucket: Bucket, tensors: Tensors) -> list[Future[Rows]]:
        arrived = [(name, tensor.clone()) for name, tensor in read(str(self._store.path), bucket.entries)]
        if self._fault:
            arrived = self._fault(bucket, arrived)
        self.loaded.update(arrived)
        return [done([[astuple(received(name, tensor)) for name, tensor in arrived]])]


def done(value: object) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


@pytest.fixture
def store() -> Iterator[SharedWeights]:
    weights = SharedWeights()
    yield weights
    weights.close()


def send(
    store: SharedWeights, weights: Tensors, engines: Sequence[Scripted], version: int = 2, before: dict[str, int] | None = None
) -> Transfer:
    transfer = Transfer(version, LIMITS, lambda error: isinstance(error, EngineLost), before or {})
    transfer.run(export(iter(weights), store, BUCKET_BYTES), engines)
    return transfer


def swapped(tensors: Tensors, at: int, old: Tensors) -> Tensors:
    """With the next of the same shape, or where there is none with the next."""
    twins = [other for other in range(len(tensors)) if other != at and tensors[other][1].shape == tensors[at][1].shape]
    other = twins[0] if twins else (at + 1) % len(tensors)
    found = list(tensors)
    found[at], found[other] = (tensors[at][0], tensors[other][1]), (tensors[other][0], tensors[at][1])
    return found


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    return lambda tensors, at, old: [(name, change(tensor) if place == at else tensor) for place, (name, tensor) in enumerate(tensors)]


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.clone().view(torch.int32)
    bits.view(-1)[-1] ^= 1
    return bits.view(tensor.dtype)


FAULTS: dict[str, Fault] = {
    "dropped": lambda tensors, at, old: tensors[:at] + tensors[at + 1 :],
    "sent twice": lambda tensors, at, old: tensors[: at + 1] + tensors[at:],
    "under another name": lambda tensors, at, old: [(f"{n}.x" if place == at else n, t) for place, (n, t) in enumerate(tensors)],
    "swapped": swapped,
    "stale": lambda tensors, at, old: [(name, dict(old)[name] if place == at else t) for place, (name, t) in enumerate(tensors)],
    "transposed": changed(lambda tensor: tensor.T.contiguous() if tensor.dim() == 2 else tensor.flip(0)),
    "cast": changed(lambda tensor: tensor.bfloat16()),
    "cast and back": changed(lambda tensor: tensor.bfloat16().float()),
    "truncated": changed(lambda tensor: tensor[:-1]),
    "zeroed at the end": changed(lambda tensor: torch.cat([tensor[:-1], torch.zeros_like(tensor[-1:])])),
    "negated": changed(torch.neg),
    "one bit": changed(one_bit),
    "another shape": changed(lambda tensor: tensor.reshape(-1, 4)),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("at", NAMES)
def test_every_fault_is_caught_at_every_tensor_and_named(store: SharedWeights, kind: str, at: str) -> None:
    old, new = model(1), model(2)

    def fault(bucket: Bucket, tensors: Tensors) -> Tensors:
        names = [name for name, _ in tensors]
        return FAULTS[kind](tensors, names.index(at), old) if at in names else tensors

    sound, bad = Scripted(store), Scripted(store, "engine 1", fault)
    with pytest.raises(SyncError, match=r"engine 1 \(worker 0\) received bucket \d of sync 2 wrongly: ") as caught:
        send(store, new, [sound, bad], before={name: fingerprint(tensor) for name, tensor in old})
    assert bad.version is None and sound.version is None  # neither serves
    bucket = int(str(caught.value).split("bucket ")[1].split()[0])
    assert at in dict(list(in_buckets(new, BUCKET_BYTES))[bucket])
    if kind not in ("sent twice", "swapped"):  # those show first at the tensor beside it
        assert f"wrongly: {at}" in str(caught.value)
    if kind == "stale":
        assert str(caught.value).endswith(f"{at} still has its values from the previous sync")


def test_a_bucket_that_nobody_confirms_is_not_taken_for_delivered(store: SharedWeights) -> None:
    engine = Scripted(store)
    engine.send = lambda bucket, tensors: [done([])]  # type: ignore[method-assign]
    with pytest.raises(SyncError, match="engine 0 does not report what it received of bucket 0 of sync 2"):
        send(store, model(1), [engine])


def test_without_a_fault_every_tensor_arrives_bit_by_bit_and_the_engine_serves(store: SharedWeights) -> None:
    weights, engine = model(3), Scripted(store)
    weights.append(("odd", torch.arange(7).bfloat16()))
    transfer = send(store, weights, [engine], version=7)
    assert engine.version == 7 and list(engine.loaded) == [name for name, _ in weights]
    assert all(torch.equal(engine.loaded[name], tensor) and engine.loaded[name].dtype == tensor.dtype for name, tensor in weights)
    assert len(transfer.buckets) > 3 and transfer.metrics()["sync/tensors"] == len(weights)
    # An engine that is started again is filled from the file alone.
    late = Scripted(store)
    again = Transfer(7, LIMITS, lambda error: False)
    again.run(((bucket, ()) for bucket in transfer.buckets), [late])
    assert late.version == 7 and all(torch.equal(late.loaded[name], tensor) for name, tensor in weights)


def test_an_engine_whose_copy_is_of_an_older_sync_is_caught_when_it_is_filled(store: SharedWeights) -> None:
    """A restarted engine that would go on with old weights: what it receives is compared with the newest export."""
    other = SharedWeights()
    old = send(other, model(1), [])
    newest = send(store, model(2), [Scripted(store)])
    stale = Scripted(other)
    transfer = Transfer(2, LIMITS, lambda error: False, fingerprints(old.buckets))
    with pytest.raises(SyncError, match="embed still has its values from the previous sync"):
        transfer.run(((bucket, ()) for bucket in newest.buckets), [stale])
    other.close()


def test_the_next_bucket_is_exported_while_engines_load_the_one_before(store: SharedWeights) -> None:
    """Each bucket is only ever loaded once the one behind it was exported: without the overlap this would not end."""
    waiting: list[tuple[Future, Rows]] = []

    class Slow(Scripted):
        def send(self, bucket: Bucket, tensors: Tensors) -> list[Future[Rows]]:
            (finished,) = super().send(bucket, tensors)
            future: Future[Rows] = Future()
            waiting.append((future, finished.result()))
            return [future]

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        yield from model(1)
        release()

    def release() -> None:
        while waiting:
            future, rows = waiting.pop()
            future.set_result(rows)

    def exports() -> Iterator:
        for exported in export(weights(), store, BUCKET_BYTES):
            release()
            yield exported
        release()

    engine = Slow(store)
    Transfer(1, LIMITS, lambda error: False).run(exports(), [engine])
    assert len(engine.loaded) == len(NAMES)


def test_a_deadline_that_passes_says_how_far_either_side_came(store: SharedWeights) -> None:
    class Hanging(Scripted):
        def send(self, bucket: Bucket, tensors: Tensors) -> list[Future[Rows]]:
            return [Future()] if bucket.number == 1 else super().send(bucket, tensors)

    transfer = Transfer(4, Sync(base_s=0.05, min_mib_per_s=1), lambda error: False)
    with pytest.raises(SyncError) as caught:
        transfer.run(export(iter(model(1)), store, BUCKET_BYTES), [Hanging(store)])
    message = str(caught.value)
    assert "engine 0 did not load bucket 1" in message and "sync.base_s=0.05" in message
    assert "the policy's side had exported bucket 2 up to" in message and "engine's side was at: bucket 1, layers.0.k" in message


def test_deadlines_grow_with_the_bytes() -> None:
    assert deadline_s(Sync(base_s=2, min_mib_per_s=10), 100 * 2**20) == 12


def test_an_engine_that_dies_on_the_way_leaves_the_others_their_weights(store: SharedWeights) -> None:
    class Dying(Scripted):
        def send(self, bucket: Bucket, tensors: Tensors) -> list[Future[Rows]]:
            gone: Future[Rows] = Future()
            gone.set_exception(EngineLost("gone"))
            return [gone]

    dying, sound = Dying(store, "engine 0"), Scripted(store, "engine 1")
    transfer = send(store, model(1), [dying, sound], version=3)
    assert list(transfer.lost) == ["engine 0"] and dying.version is None
    assert sound.version == 3 and len(sound.loaded) == len(NAMES)


def test_an_engine_that_refuses_is_named_with_its_reason(store: SharedWeights) -> None:
    class Refusing(Scripted):
        def begin(self) -> Future[None]:
            future: Future[None] = Future()
            future.set_exception(ValueError("first line\nno room for it"))
            return future

    with pytest.raises(SyncError, match="engine 0 did not pause in sync 2: no room for it"):
        send(store, model(1), [Refusing(store)])


def test_buckets_hold_at_most_their_size_and_a_larger_tensor_travels_alone() -> None:
    sizes = [30, 30, 50, 200, 10, 90, 100]
    weights = [(str(number), torch.zeros(size, dtype=torch.uint8)) for number, size in enumerate(sizes)]
    assert [[t.nbytes for _, t in bucket] for bucket in in_buckets(weights, 100)] == [[30, 30], [50], [200], [10, 90], [100]]
    assert list(in_buckets([], 100)) == []


@pytest.mark.parametrize("tensor", [torch.randn(3, 5), torch.randn(2**18 + 3), torch.arange(7).bfloat16(), torch.randn(6, 4).T])
def test_a_fingerprint_is_the_documented_sum(tensor: torch.Tensor) -> None:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    lanes = np.frombuffer(data + b"\0" * (-len(data) % 4), dtype=np.uint32)
    places = (np.arange(1, len(lanes) + 1, dtype=np.uint64) * (2**32 - 1640531527)).astype(np.uint32)
    mixed = (lanes ^ places) * np.uint32(2**32 - 2048144789)
    mixed ^= (mixed.view(np.int32) >> 15).view(np.uint32)
    mixed *= np.uint32(2**32 - 1028477387)
    assert fingerprint(tensor) == int(mixed.view(np.int32).astype(np.int64).sum())


def test_fingerprints_of_neighbours_differ() -> None:
    tensor = torch.randn(64, 64)
    views = [tensor, -tensor, tensor.T, tensor.flip(0), tensor[:-1], tensor + 1e-6, torch.zeros(64, 64), torch.zeros(64, 65), torch.ones(3)]
    assert len({fingerprint(view) for view in views}) == len(views)
    odd = torch.randn(9).bfloat16()
    assert fingerprint(odd[1:]) == fingerprint(odd[1:].clone())  # where the bytes lie does not matter


def test_a_full_file_system_is_named_with_what_to_change(store: SharedWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(SyncError, match=r"do not fit into .* \(No space left on device at byte 0\).*--shm-size"):
        store.write(0, model(1), 0)
