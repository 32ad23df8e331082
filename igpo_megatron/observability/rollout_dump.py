"""Rollout groups as parquet: one complete row per group, to look at or to train from again.

    step | prompt {id, ...} | nodes [{parent, kind, token_ids, ...}] | trajectories [{path, status, gains, ...}] | metrics {name: value}
         | branch_points [{node, entropy, ...}], value_points [{node, value, ...}] |
           experts [[bytes of a token, ...] of a node, ...]: older files lack the last three

Reading and writing work on columns: a file of 30 thousand demonstrations takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import accumulate, groupby, islice, pairwise
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.types import (
    SEARCH,
    BranchPoint,
    Node,
    Prompt,
    RolloutGroup,
    Status,
    ToolCall,
    Trajectory,
    UserError,
    ValuePoint,
    rename_search,
)

Point = TypeVar("Point", BranchPoint, ValuePoint)

ROWS = 1024
"""Groups per row group: as many are encoded or decoded at once."""

PROMPT = pa.struct([("id", pa.string()), ("question", pa.string()), ("answers", pa.list_(pa.string())), ("source", pa.string())])
CALL = pa.struct([("name", pa.string()), ("queries", pa.list_(pa.string()))])
# Log-probs are Python floats, which 64 bits store exactly; byte-stream-split compresses away the zero bits of a former float32.
LOGPROBS = pa.list_(pa.float64())
NUMBERS = pa.map_(pa.string(), pa.float64())

NODE = pa.struct(
    [
        ("parent", pa.int32()),
        ("kind", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("turn", pa.int32()),
        ("text", pa.string()),
        ("weight_version", pa.int64()),
        ("behavior_logprobs", LOGPROBS),
        ("old_logprobs", LOGPROBS),
        ("ref_logprobs", LOGPROBS),
        ("call", CALL),
        ("scored", pa.list_(pa.int32())),
    ]
)
TRAJECTORY = pa.struct(
    [
        ("path", pa.list_(pa.int32())),
        ("status", pa.string()),
        ("answer", pa.string()),
        ("reason", pa.string()),
        ("reward", pa.float64()),
        ("reward_parts", NUMBERS),
        ("gains", pa.list_(pa.float64())),
        ("turn_advantages", pa.list_(pa.float64())),
        ("evidence_gains", pa.list_(pa.float64())),
    ]
)
_OF_POINTS = {
    **{"int": pa.int32(), "float": pa.float64(), "str": pa.string(), "bool": pa.bool_()},
    "tuple[int, ...]": pa.list_(pa.int32()),
}
"""Annotation of a dataclass field -> its type in a file."""


def _points(name: str, kind: type[BranchPoint] | type[ValuePoint]) -> pa.Field:
    """The column of a group's decisions, with the fields of their class."""
    return pa.field(name, pa.list_(pa.struct([(one.name, _OF_POINTS[str(one.type).removesuffix(" | None")]) for one in fields(kind)])))


BRANCH_POINTS = _points("branch_points", BranchPoint)
VALUE_POINTS = _points("value_points", ValuePoint)
EXPERTS = pa.field("experts", pa.list_(pa.list_(pa.binary())))
"""One list per node, empty if it has none; the outer list is empty if no node has any."""

OUR_NAMES = {b"tool_names": b"canonical"}
"""Metadata of files whose calls have our names of tools; in older ones search has the policy's spelling."""

LATER = (BRANCH_POINTS, VALUE_POINTS, EXPERTS)
"""Columns that older files lack."""

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt", PROMPT),
        ("nodes", pa.list_(NODE)),
        ("trajectories", pa.list_(TRAJECTORY)),
        ("metrics", NUMBERS),
        BRANCH_POINTS,
        VALUE_POINTS,
        EXPERTS,
    ],
    metadata=OUR_NAMES,
)
SPLIT_COLUMNS = [f"nodes.list.element.{name}.list.element" for name in ("behavior_logprobs", "old_logprobs", "ref_logprobs")]
DICTIONARY_COLUMNS = [
    "prompt.source",
    "nodes.list.element.kind",
    "nodes.list.element.token_ids.list.element",
    "trajectories.list.element.status",
]


def write_rollouts(path: Path, step: int, groups: Iterable[RolloutGroup]) -> None:
    """Write all groups of a step. `path` appears complete or not at all: a killed write leaves only a `.part` file."""
    remaining = iter(groups)
    options: dict[str, Any] = {"use_dictionary": DICTIONARY_COLUMNS, "use_byte_stream_split": SPLIT_COLUMNS}
    with whole(path) as part, pq.ParquetWriter(part, SCHEMA, compression="zstd", **options) as writer:
        while chunk := list(islice(remaining, ROWS)):
            writer.write_batch(_columns(step, chunk))


def read_rollouts(path: Path, max_groups: int | None = None, *, search: str = SEARCH) -> Iterator[tuple[int, list[RolloutGroup]]]:
    """Yield `(step, groups)` in file order, decoding about a thousand groups at a time.

    Consecutive groups of one step come together; with `max_groups`, in parts of at most that many. `search`: the name of search in older
    files, whose calls do not have our names (`rollout.tool_name`). Raises UserError at once for a file that is missing, not parquet, or
    not a rollout file, and while iterating for a damaged group.
    """
    return _steps(_rows(path, _open(path), min(ROWS, max_groups or ROWS), search), max_groups)


class RolloutRows:
    """The groups of a rollout file in any order: its columns stay in memory as they are, and a group is decoded when it is asked for."""

    def __init__(self, path: Path, *, search: str = SEARCH) -> None:
        """`search` and errors as for `read_rollouts`."""
        self._path, self._search = path, search
        self._places: list[tuple[pa.RecordBatch, int]] = []
        """Batch and row within it, of every group."""
        self.steps: list[int] = []
        """The step that a group is of."""
        self.num_tokens: list[int] = []
        """Tokens of all of a group's nodes."""
        self.last_token = -1
        """The greatest id of all tokens."""
        with _open(path) as file, _damage_named(path, 0):
            self._is_old = _is_old(file)
            for batch in file.iter_batches(batch_size=ROWS, columns=_names(file)):
                self._places += [(batch, row) for row in range(batch.num_rows)]
                self.steps += batch.column("step").to_pylist()
                nodes = batch.column("nodes")
                tokens = nodes.values.field("token_ids")
                self.num_tokens += np.diff(tokens.offsets.to_numpy()[nodes.offsets.to_numpy()]).tolist()
                self.last_token = max(self.last_token, pc.max(tokens.values).as_py() or 0)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> RolloutGroup:
        """A new group each time. Raises UserError for a damaged one."""
        batch, place = self._places[row]
        with _damage_named(self._path, row):
            (group,) = _groups(batch.slice(place, 1))
            _check_tree(group)
        if self._is_old:
            rename_search(group, self._search)
        return group


def _steps(rows: Iterable[tuple[int, RolloutGroup]], max_groups: int | None) -> Iterator[tuple[int, list[RolloutGroup]]]:
    for step, pairs in groupby(rows, key=itemgetter(0)):
        while part := [group for _, group in islice(pairs, max_groups)]:
            yield step, part


def _rows(path: Path, file: pq.ParquetFile, batch_size: int, search: str) -> Iterator[tuple[int, RolloutGroup]]:
    """(step, group) of every row."""
    is_old = _is_old(file)
    row = 0
    with file:
        try:
            for batch in file.iter_batches(batch_size=batch_size, columns=_names(file)):
                for step, group in zip(batch.column("step").to_pylist(), _groups(batch), strict=True):
                    _check_tree(group)
                    if is_old:
                        rename_search(group, search)
                    yield step, group
                    row += 1
        except DAMAGE as error:
            raise _damaged(path, row, error) from None


def _is_old(file: pq.ParquetFile) -> bool:
    return not OUR_NAMES.items() <= (file.schema_arrow.metadata or {}).items()


def _names(file: pq.ParquetFile) -> list[str]:
    """The columns that the file has."""
    return [name for name in SCHEMA.names if name in file.schema_arrow.names]


DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError)
"""What reading a damaged file raises."""


def _damaged(path: Path, row: int, error: Exception) -> UserError:
    why = f"{type(error).__name__}: {error}"[:200]
    return UserError(f"{path}: row {row} or one behind it cannot be read as a group ({why}); write or download the file again")


@contextmanager
def _damage_named(path: Path, row: int) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise _damaged(path, row, error) from None


def _check_tree(group: RolloutGroup) -> None:
    """Raises ValueError if a node's parent does not precede it, or a path names a node that does not exist."""
    for index, node in enumerate(group.nodes):
        if node.parent is not None and not 0 <= node.parent < index:
            raise ValueError(f"node {index} has the parent {node.parent}")
    for trajectory in group.trajectories:
        if not all(0 <= index < len(group.nodes) for index in trajectory.path):
            raise ValueError(f"a path is {trajectory.path}, there are {len(group.nodes)} nodes")


def count_groups(path: Path) -> int:
    """Groups in a rollout file, from its footer. Raises UserError as `read_rollouts` does."""
    with _open(path) as file:
        return file.metadata.num_rows


def _open(path: Path) -> pq.ParquetFile:
    """Open a parquet file and check that it is a rollout file."""
    if not path.is_file():
        raise UserError(f"{path}: no such rollout file; training writes them to <run>/rollouts/step_*.parquet")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({error}); expected a rollout file written by a run or by write_rollouts") from None
    found = file.schema_arrow
    problems = []
    for field in SCHEMA:
        if field.name not in found.names:
            if field in LATER:
                continue
            problems.append(f"column {field.name!r} is missing")
        elif not found.field(field.name).type.equals(field.type):
            problems.append(f"column {field.name!r} is {found.field(field.name).type}, expected {field.type}")
    if problems:
        file.close()
        columns = ", ".join(found.names)
        raise UserError(
            f"{path}: not a rollout file: {'; '.join(problems)} (its columns: {columns}). Questions go to data.train, not run.replay"
        )
    return file


# ---- groups -> columns


def _columns(step: int, groups: Sequence[RolloutGroup]) -> pa.RecordBatch:
    """One record batch of `len(groups)` rows."""
    prompts = [{"id": p.id, "question": p.question, "answers": p.answers, "source": p.source} for p in (group.prompt for group in groups)]
    nodes = [node for group in groups for node in group.nodes]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    return pa.record_batch(
        [
            pa.array([step] * len(groups), pa.int64()),
            pa.array(prompts, PROMPT),
            _nested([len(group.nodes) for group in groups], _struct(NODE, [_node_row(node) for node in nodes])),
            _nested([len(group.trajectories) for group in groups], _struct(TRAJECTORY, [_trajectory_row(t) for t in trajectories])),
            pa.array([list(group.metrics.items()) for group in groups], NUMBERS),
            pa.array([[asdict(point) for point in group.branch_points] for group in groups], BRANCH_POINTS.type),
            pa.array([[asdict(point) for point in group.value_points] for group in groups], VALUE_POINTS.type),
            pa.array([_experts_of(group) for group in groups], EXPERTS.type),
        ],
        schema=SCHEMA,
    )


def _experts_of(group: RolloutGroup) -> list[list[bytes | None]]:
    return [node.experts for node in group.nodes] if any(node.experts for node in group.nodes) else []


_plain_fields = attrgetter(*(field.name for field in NODE if field.name not in ("call", "scored")))


def _node_row(node: Node) -> tuple[Any, ...]:
    """The fields of NODE, in order."""
    return (*_plain_fields(node), node.call and {"name": node.call.name, "queries": node.call.queries}, node.scored)


def _trajectory_row(end: Trajectory) -> tuple[Any, ...]:
    """The fields of TRAJECTORY, in order."""
    before, parts = (end.path, end.status.value, end.answer, end.reason, end.reward), list(end.reward_parts.items())
    return (*before, parts, end.gains, end.turn_advantages, end.evidence_gains)


def _struct(kind: pa.StructType, rows: Sequence[tuple[Any, ...]]) -> pa.StructArray:
    """Rows -> struct array, one field after the other."""
    columns: Iterable[tuple[Any, ...]] = zip(*rows, strict=True) if rows else [()] * kind.num_fields
    return pa.StructArray.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, kind, strict=True)], fields=list(kind)
    )


def _nested(lengths: Sequence[int], values: pa.Array) -> pa.ListArray:
    """Cut `values` into consecutive lists of the given lengths."""
    return pa.ListArray.from_arrays(pa.array(accumulate(lengths, initial=0), pa.int32()), values)


# ---- columns -> groups


def _groups(batch: pa.RecordBatch) -> Iterator[RolloutGroup]:
    """The groups of a record batch."""
    prompts = [Prompt(p["id"], p["question"], tuple(p["answers"]), p["source"]) for p in batch.column("prompt").to_pylist()]
    metrics = [dict(pairs) for pairs in batch.column("metrics").to_pylist()]
    nodes = _cut(batch.column("nodes"), _nodes)
    trajectories = _cut(batch.column("trajectories"), _trajectories)
    branch_points, value_points = _decisions(batch, BRANCH_POINTS, BranchPoint), _decisions(batch, VALUE_POINTS, ValuePoint)
    experts = batch.column(EXPERTS.name).to_pylist() if EXPERTS.name in batch.schema.names else [[]] * len(prompts)
    columns = zip(prompts, nodes, trajectories, metrics, branch_points, value_points, experts, strict=True)
    for prompt, group_nodes, ends, numbers, by_entropy, by_value, routed in columns:
        for node, recorded in zip(group_nodes, routed, strict=False):
            node.experts = recorded
        yield RolloutGroup(prompt, group_nodes, ends, numbers, branch_points=by_entropy, value_points=by_value)


def _decisions(batch: pa.RecordBatch, column: pa.Field, kind: Callable[..., Point]) -> list[list[Point]]:
    """The decisions of every group; empty if the file has no such column."""
    rows = batch.column(column.name).to_pylist() if column.name in batch.schema.names else [[]] * batch.num_rows
    return [[kind(**{**point, "children": tuple(point["children"])}) for point in row] for row in rows]


def _nodes(array: pa.StructArray) -> list[Node]:
    """All nodes of a batch."""
    columns: list[Any] = [
        _cut(array.field(place), _plain) if pa.types.is_list(field.type) and field.name != "scored" else array.field(place).to_pylist()
        for place, field in enumerate(NODE)
    ]
    *plain, calls, scored = columns
    tool_calls = [call and ToolCall(call["name"], tuple(call["queries"])) for call in calls]
    return [Node(*row) for row in zip(*plain, tool_calls, [span and (span[0], span[1]) for span in scored], strict=True)]


def _trajectories(array: pa.StructArray) -> list[Trajectory]:
    """All trajectories of a batch."""
    columns = [array.field(position).to_pylist() for position in range(len(TRAJECTORY))]
    return [
        Trajectory(path, Status(status), answer, reason, reward, dict(parts), gains, advantages, evidence)
        for path, status, answer, reason, reward, parts, gains, advantages, evidence in zip(*columns, strict=True)
    ]


def _plain(values: pa.Array) -> list[Any]:
    """Numbers without nulls, ten times faster than `to_pylist`."""
    return values.to_numpy(zero_copy_only=False).tolist()


def _cut(array: pa.ListArray, decode: Callable[[Any], list[Any]]) -> list[list[Any]]:
    """Decode the values of a list column in one go, then cut them into its lists."""
    offsets = array.offsets.to_pylist()
    first = offsets[0]
    values = decode(array.values.slice(first, offsets[-1] - first))
    return [values[start - first : stop - first] for start, stop in pairwise(offsets)]
