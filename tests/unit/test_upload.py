"""A row goes to the device from one page-locked buffer: every tensor once, unchanged; the device is the CPU's memory here."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import pytest
import torch

from igpo_megatron.packing.tree import ExpertShape, PackedRow, pack_for_scoring
from igpo_megatron.policy import host_memory as module
from igpo_megatron.policy.context import part_of
from igpo_megatron.policy.host_memory import ALIGNMENT, rounded, upload
from igpo_megatron.policy.model import HeadInputs, split_of
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

HOST = torch.device("cpu")


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The buffers that were page-locked, of memory that is full of something else."""
    buffers: list[torch.Tensor] = []

    def lock(size: int) -> torch.Tensor:
        buffers.append(torch.full((size,), 255, dtype=torch.uint8))
        return buffers[-1]

    monkeypatch.setattr(module, "_staging", lock)
    return buffers


def row() -> PackedRow:
    """A prompt, two turns and a probe, with experts for some tokens."""
    group = RolloutGroup(Prompt("0", "?", ("a",), "test"), [Node(None, "prompt", [5, 6, 7])])
    group.add(Node(0, "probe", [1, 2, 3], 0, scored=(1, 3)))
    turn = Node(0, "action", [8, 9], 1, old_logprobs=[-0.5, -0.25])
    turn.experts = [bytes([0, 1, 2, 3]), None]
    group.trajectories.append(Trajectory([0, group.add(turn)], Status.FINISHED, turn_advantages=[1.5]))
    (found,) = pack_for_scoring([group], row_tokens=64, multiple=8, experts=ExpertShape(2, 2))
    assert found.probed is not None and found.experts is not None
    return found


def tensors(record: object) -> dict[str, torch.Tensor]:
    return {field.name: value for field in fields(record) if isinstance(value := getattr(record, field.name), torch.Tensor)}  # type: ignore[arg-type]


def test_every_tensor_arrives_as_it_was(locked: list[torch.Tensor]) -> None:
    held = list(tensors(row()).values())
    found = module._copied(held, HOST)
    for here, there in zip(held, found, strict=True):
        assert there.dtype == here.dtype and torch.equal(there, here)
        assert there.data_ptr() % here.element_size() == 0
    (buffer,) = locked
    places = sorted((there.data_ptr() - buffer.data_ptr(), there.nbytes) for there in found if there.nbytes)
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    assert all(start + size <= later for (start, size), (later, _) in pairwise(places))


def test_a_row_its_part_and_its_head_take_one_buffer_and_each_tensor_once(locked: list[torch.Tensor]) -> None:
    whole = row()
    part = part_of(whole, 0, 1)
    assert part.probed is not None
    split = split_of(part.probed)
    head = HeadInputs(part.predictor, part.targets, 1.0, need_entropy=True, split=split)
    there, part_there, head_there = upload((whole, part, head), torch.device("meta"))
    (buffer,) = locked
    once = [*tensors(whole).values(), split.sampled, split.probed, split.order]
    assert len(buffer) == sum(rounded(tensor.nbytes) for tensor in once)
    assert part_there.token_ids is there.token_ids and head_there.targets is there.targets
    for found, expected in ((there, whole), (part_there, part), (head_there, head)):
        shapes, wanted = ({name: tensor.shape for name, tensor in tensors(record).items()} for record in (found, expected))
        assert shapes == wanted
        assert all(tensor.device.type == "meta" for tensor in tensors(found).values())
    assert head_there.split is not None and head_there.split.order.device.type == "meta"
    assert (there.origin, there.sequences, head_there.temperature, part_there.merge) == (whole.origin, whole.sequences, 1.0, None)


def test_on_cpu_nothing_is_copied(locked: list[torch.Tensor]) -> None:
    whole = row()
    assert upload(whole, HOST) is whole and locked == []
