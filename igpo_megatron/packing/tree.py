"""Flatten question trees into packed rows, and carry per-token results back to their nodes.

    RolloutGroup ──pieces──> trees under a token budget ──rows──> PackedRow ──actor──> log-probs ──per_node──> Node.old_logprobs

A tree is laid out depth first. One integer per token, `subtree_end`, is the whole attention mask:

    query i may see key j   <=>   j <= i < subtree_end[j]

so packed sequences, shared prompts, branches and probes are one mechanism. A token's position is its depth in the tree, and
the hidden state that predicts a token is its predecessor on its own path (`predictor`), so nothing is ever shifted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from igpo_megatron.packing.batches import level_fit
from igpo_megatron.types import Node, RolloutGroup, StepCounts, Trajectory, UserError

ProbeScorer = Literal["fold", "sequential", "batched", "engine"]
"""Who computes the log-probs of ground-truth probes, and how."""


class ExpertShape(NamedTuple):
    """What a model's routers choose for one token."""

    layers: int
    top_k: int


@dataclass(slots=True)
class PackedRow:
    """One row of one micro-batch: T packed tokens, of which N are scored or trained."""

    token_ids: torch.Tensor
    """[T] int64, depth first, padding at the end."""

    position_ids: torch.Tensor
    """[T] int64, depth in the tree."""

    subtree_end: torch.Tensor
    """[T] int64, one past the last token below token t: the attention mask."""

    predictor: torch.Tensor
    """[N] int64, index in [0, T) of the hidden state that predicts target n; repeats where branches start."""

    targets: torch.Tensor
    """[N] int64, the predicted token ids."""

    weight: torch.Tensor
    """[N] fp32, sum over the trajectories through the token of their loss weight; used by KL, entropy and SFT terms."""

    advantages: torch.Tensor
    """[N, 2] fp32, sums of the positive and of the negative parts (as a positive number) of weight x advantage."""

    old_logprobs: torch.Tensor
    """[N] fp32, by the policy before the step."""

    ref_logprobs: torch.Tensor
    """[N] fp32, by the reference policy; zeros where there is none."""

    behavior_logprobs: torch.Tensor
    """[N] fp32, by the engine that sampled the token; zeros for probes."""

    sequence: torch.Tensor
    """[N] int64, number within the row of the trajectory the token belongs to (the last one through it where several share it)."""

    sequences: int
    """Number of trajectories in the row."""

    old_entropies: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[N] fp32, nats, by the policy before the step; zeros where the loss uses none."""

    experts: torch.Tensor | None = None
    """[T, layers, top_k] int16, experts to send each token to, -1 where the router shall choose; None leaves it all choices."""

    probed: torch.Tensor | None = None
    """[N] bool, the targets that are a probe's; None where the row has no probes."""

    origin: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(group, node, start, stop): targets [start, stop) are that node's tokens, of a probe the scored ones."""

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return len(self.token_ids)

    def with_targets(self, which: slice | torch.Tensor) -> PackedRow:
        """The row with only some of its targets, for a loss on tokens; without `origin`."""
        return replace(
            self,
            predictor=self.predictor[which],
            targets=self.targets[which],
            weight=self.weight[which],
            advantages=self.advantages[which],
            old_logprobs=self.old_logprobs[which],
            ref_logprobs=self.ref_logprobs[which],
            behavior_logprobs=self.behavior_logprobs[which],
            sequence=self.sequence[which],
            old_entropies=self.old_entropies[which] if len(self.old_entropies) else self.old_entropies,
            probed=None if self.probed is None else self.probed[which],
            origin=[],
        )


@dataclass(slots=True)
class Piece:
    """The part of one group that goes into a row: some trajectories and probes, with all their ancestors."""

    group: int
    nodes: list[int]
    """Node indices, depth first; every parent comes before its children."""

    trajectories: list[Trajectory]
    num_tokens: int


def step_counts(groups: Sequence[RolloutGroup]) -> StepCounts:
    """Global sums that every loss is divided by, fixed before the first micro-batch so that packing cannot change the gradient."""
    trained = [(group, trajectory) for group in groups for trajectory in group.trained]
    return StepCounts(
        trained_tokens=sum(len(node.token_ids) for group, trajectory in trained for node in group.actions(trajectory)),
        trajectories=len(trained),
    )


def pack_for_scoring(
    groups: Sequence[RolloutGroup],
    *,
    row_tokens: int,
    multiple: int = 1,
    scorer: ProbeScorer | None = "fold",
    experts: ExpertShape | None = None,
    ranks: int = 1,
) -> list[PackedRow]:
    """Rows whose targets are all action tokens, and the scored tokens of the probes where this pass scores them.

    `fold`: probes are leaves of the trees they hang from. The two published schemes repeat the context of every probe:
    `sequential` in a row per probe, one forward pass each; `batched` ("vectorised") in rows filled up with such sequences.
    With `engine` (the engines have scored the probes) and with None no probe is packed. `experts`: replay those of the nodes.
    `ranks`: how many data-parallel ranks share the rows, which are then equally long (`level_fit`).
    """
    pieces = [piece for index, group in enumerate(groups) for piece in _pieces(index, group, row_tokens, with_probes=scorer == "fold")]
    repeated = [
        Piece(index, nodes := group.path_to(number), [], _num_tokens(group, nodes))
        for index, group in enumerate(groups)
        for number, node in enumerate(group.nodes)
        if node.kind == "probe" and scorer in ("sequential", "batched")
    ]

    def wanted(piece: Piece, number: int, node: Node) -> bool:
        return node.kind == "probe" or (node.kind == "action" and bool(piece.trajectories))

    def rows(pieces: Sequence[Piece]) -> list[PackedRow]:
        return _rows(groups, pieces, row_tokens, multiple, wanted, lambda trajectory, tokens: 1.0, experts, ranks)

    if scorer == "sequential":
        return [*rows(pieces), *(row for piece in repeated for row in rows([piece]))]
    return rows([*pieces, *repeated])


def pack_for_training(
    groups: Sequence[RolloutGroup],
    *,
    row_tokens: int,
    multiple: int = 1,
    token_weight: Callable[[int], float],
    experts: ExpertShape | None = None,
    ranks: int = 1,
) -> list[PackedRow]:
    """Rows whose targets are the action tokens of trained trajectories, with their weights and advantages.

    `token_weight(n)` is the loss weight of each token of a trajectory with n trained tokens. `experts` and `ranks` as for scoring.
    """
    pieces = [piece for index, group in enumerate(groups) for piece in _pieces(index, group, row_tokens, with_probes=False)]
    return _rows(
        groups,
        pieces,
        row_tokens,
        multiple,
        lambda piece, number, node: node.kind == "action",
        lambda trajectory, tokens: token_weight(tokens),
        experts,
        ranks,
    )


def per_node(
    rows: Sequence[PackedRow], results: Sequence[torch.Tensor], groups: Sequence[RolloutGroup]
) -> Iterator[tuple[Node, list[float]]]:
    """Every node that rows have targets of, with its part of the results, which are [N] for each row."""
    for row, values in zip(rows, results, strict=True):
        flat = values.tolist()
        assert len(flat) == len(row.targets), f"{len(flat)} results for {len(row.targets)} targets"
        for group, node, start, stop in row.origin:
            yield groups[group].nodes[node], flat[start:stop]


def _pieces(index: int, group: RolloutGroup, row_tokens: int, *, with_probes: bool) -> Iterable[Piece]:
    """Cut a group into trees within the budget, repeating the path to each cut; a single longer trajectory is not cut."""
    probes: dict[int, list[int]] = {}
    for number, node in enumerate(group.nodes):
        if with_probes and node.kind == "probe" and node.parent is not None:
            probes.setdefault(node.parent, []).append(number)
    done: set[int] = set()  # probes already in a piece: their parents may be repeated in a later one
    chosen: dict[int, None] = {}
    members: list[Trajectory] = []
    tokens = 0
    # Sorted by path, the trajectories that share most are neighbours, and a cut repeats least.
    for trajectory in sorted(group.trained, key=lambda trajectory: trajectory.path):
        whole = [*trajectory.path, *(probe for number in trajectory.path for probe in probes.get(number, []))]
        new = [number for number in whole if number not in chosen and number not in done]
        size = _num_tokens(group, new)
        if members and tokens + size > row_tokens:
            yield Piece(index, _depth_first(group, chosen), members, tokens)
            done |= {number for number in chosen if group.nodes[number].kind == "probe"}
            chosen, members, tokens = {}, [], 0
            new = [number for number in whole if number not in done]
            size = _num_tokens(group, new)
        chosen |= dict.fromkeys(new)
        members = [*members, trajectory]
        tokens += size
    if members:
        yield Piece(index, _depth_first(group, chosen), members, tokens)


def _num_tokens(group: RolloutGroup, numbers: Iterable[int]) -> int:
    return sum(len(group.nodes[number].token_ids) for number in numbers)


def _depth_first(group: RolloutGroup, chosen: Iterable[int]) -> list[int]:
    children: dict[int | None, list[int]] = {}
    for number in sorted(chosen):
        children.setdefault(group.nodes[number].parent, []).append(number)
    order: list[int] = []
    stack = children[None][::-1]
    while stack:
        number = stack.pop()
        order.append(number)
        stack.extend(children.get(number, [])[::-1])
    return order


class _RowBuilder:
    """Collects one row's tokens and targets as plain lists."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.position_ids: list[int] = []
        self.subtree_end: list[int] = []
        self.predictor: list[int] = []
        self.targets: list[int] = []
        self.weight: list[float] = []
        self.advantages: list[tuple[float, float]] = []
        self.old_logprobs: list[float] = []
        self.ref_logprobs: list[float] = []
        self.behavior_logprobs: list[float] = []
        self.old_entropies: list[float] = []
        self.sequence: list[int] = []
        self.trajectories = 0
        self.probed: list[bool] = []
        self.experts: list[bytes | None] = []
        self.origin: list[tuple[int, int, int, int]] = []

    def add_piece(
        self,
        group: RolloutGroup,
        piece: Piece,
        wanted: Callable[[Piece, int, Node], bool],
        token_weight: Callable[[Trajectory, int], float],
    ) -> None:
        shares = _shares(group, piece, token_weight)
        owners = {number: self.trajectories + place for place, trajectory in enumerate(piece.trajectories) for number in trajectory.path}
        self.trajectories += len(piece.trajectories)
        ends: dict[int, tuple[int, int]] = {}  # node -> (index of its last token, depth after it)
        spans: dict[int, tuple[int, int]] = {}
        for number in piece.nodes:
            node = group.nodes[number]
            before, depth = ends[node.parent] if node.parent is not None else (-1, 0)
            start, length = len(self.token_ids), len(node.token_ids)
            self.token_ids += node.token_ids
            self.experts += node.experts or [None] * length
            self.position_ids += range(depth, depth + length)
            self.subtree_end += [0] * length
            spans[number] = (start, start + length)
            ends[number] = (start + length - 1 if length else before, depth + length)
            if length and wanted(piece, number, node):
                self._add_targets(piece.group, number, node, before, start, shares.get(number, (0.0, 0.0, 0.0)))
                self.sequence += [owners.get(number, 0)] * (len(self.targets) - len(self.sequence))
        # Children follow their parents, so walking backwards closes every subtree before the one around it.
        last: dict[int, int] = {}
        for number in reversed(piece.nodes):
            start, stop = spans[number]
            end = max(stop, last.get(number, 0))
            self.subtree_end[start:stop] = [end] * (stop - start)
            parent = group.nodes[number].parent
            if parent is not None:
                last[parent] = max(last.get(parent, 0), end)

    def _add_targets(self, group: int, number: int, node: Node, before: int, start: int, share: tuple[float, float, float]) -> None:
        assert before >= 0, "a root token has no predictor and cannot be a target"
        begin, end = node.scored if node.kind == "probe" and node.scored else (0, len(node.token_ids))
        length, first = end - begin, len(self.targets)
        self.predictor += [start + place - 1 if place else before for place in range(begin, end)]
        self.targets += node.token_ids[begin:end]
        weight, positive, negative = share
        self.weight += [weight] * length
        self.advantages += [(positive, negative)] * length
        absent = [0.0] * length
        self.old_logprobs += node.old_logprobs or absent
        self.ref_logprobs += node.ref_logprobs or absent
        self.behavior_logprobs += node.behavior_logprobs or absent
        self.old_entropies += node.old_entropies or absent
        self.probed += [node.kind == "probe"] * length
        self.origin.append((group, number, first, first + length))

    def build(self, multiple: int, experts: ExpertShape | None = None) -> PackedRow:
        padding = -len(self.token_ids) % multiple
        total = len(self.token_ids) + padding
        return PackedRow(
            token_ids=torch.tensor(self.token_ids + [0] * padding, dtype=torch.int64),
            position_ids=torch.tensor(self.position_ids + list(range(padding)), dtype=torch.int64),
            subtree_end=torch.tensor(self.subtree_end + [total] * padding, dtype=torch.int64),
            predictor=torch.tensor(self.predictor, dtype=torch.int64),
            targets=torch.tensor(self.targets, dtype=torch.int64),
            weight=torch.tensor(self.weight, dtype=torch.float32),
            advantages=torch.tensor(self.advantages, dtype=torch.float32).reshape(-1, 2),
            old_logprobs=torch.tensor(self.old_logprobs, dtype=torch.float32),
            ref_logprobs=torch.tensor(self.ref_logprobs, dtype=torch.float32),
            behavior_logprobs=torch.tensor(self.behavior_logprobs, dtype=torch.float32),
            old_entropies=torch.tensor(self.old_entropies, dtype=torch.float32),
            sequence=torch.tensor(self.sequence, dtype=torch.int64),
            sequences=self.trajectories,
            experts=None if experts is None else expert_rows(self.experts, total, experts),
            probed=torch.tensor(self.probed) if any(self.probed) else None,
            origin=self.origin,
        )


def _shares(group: RolloutGroup, piece: Piece, token_weight: Callable[[Trajectory, int], float]) -> dict[int, tuple[float, float, float]]:
    """Per action node: summed weight, and summed positive and negative parts of weight x advantage, over the piece's trajectories."""
    shares: dict[int, tuple[float, float, float]] = {}
    for trajectory in piece.trajectories:
        actions = [number for number in trajectory.path if group.nodes[number].kind == "action"]
        weight = token_weight(trajectory, sum(len(group.nodes[number].token_ids) for number in actions))
        advantages = trajectory.turn_advantages or [0.0] * len(actions)
        for number, advantage in zip(actions, advantages, strict=True):
            total, positive, negative = shares.get(number, (0.0, 0.0, 0.0))
            shares[number] = (total + weight, positive + max(weight * advantage, 0.0), negative + max(-weight * advantage, 0.0))
    return shares


def _rows(
    groups: Sequence[RolloutGroup],
    pieces: Sequence[Piece],
    row_tokens: int,
    multiple: int,
    wanted: Callable[[Piece, int, Node], bool],
    token_weight: Callable[[Trajectory, int], float],
    experts: ExpertShape | None,
    ranks: int,
) -> list[PackedRow]:
    rows = []
    for members in level_fit([piece.num_tokens for piece in pieces], row_tokens, ranks):
        builder = _RowBuilder()
        for member in members:
            builder.add_piece(groups[pieces[member].group], pieces[member], wanted, token_weight)
        rows.append(builder.build(multiple, experts))
    return rows


def expert_rows(recorded: Sequence[bytes | None], num_tokens: int, shape: ExpertShape) -> torch.Tensor:
    """`Node.experts` of a row's tokens -> [num_tokens, layers, top_k] int16; -1 for tokens without a record, and for padding.

    Raises UserError for records of a model of another shape.
    """
    rows = torch.full((num_tokens, *shape), -1, dtype=torch.int16)
    places = [place for place, experts in enumerate(recorded) if experts is not None]
    if not places:
        return rows
    numbers = shape.layers * shape.top_k
    sizes = {len(experts) for experts in recorded if experts is not None}
    if not sizes < {numbers, 2 * numbers}:
        raise UserError(
            f"recorded experts take {sorted(sizes)} bytes per token, the model's {shape.layers} layers of {shape.top_k} experts each would "
            f"take {numbers} or {2 * numbers}; they come from another model: record new rollouts, or set rollout.routing_replay=false"
        )
    joined = bytearray(b"".join(experts for experts in recorded if experts is not None))
    dtype = torch.uint8 if sizes == {numbers} else torch.int16  # no model has experts enough for the sign bit
    rows[places] = torch.frombuffer(joined, dtype=dtype).to(torch.int16).reshape(-1, *shape)
    return rows


def blank_row(multiple: int) -> PackedRow:
    """A row without targets, for a data-parallel rank that would otherwise have fewer rows than the others."""
    builder = _RowBuilder()
    builder.token_ids, builder.position_ids, builder.subtree_end = [0], [0], [max(multiple, 1)]
    return builder.build(multiple)
