"""Check that a checkpoint's files are unchanged: their sizes and CRC-32 sums are stored beside them and compared before a run resumes.

save      every rank: the files it wrote --of_rank--> sums      main rank: all sums, and those of the other files --> checksums.json
resume    newest folder first: every rank compares a share of the files --damage--> the problems that all ranks found

CRC-32 finds accidents (a cut or lost file, flipped bytes), not forgery. A core sums 1 to 2.5 GB/s of what was just written, several
times the speed of its disk, and lets other threads run. In the background, the thread that wrote a file also sums it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint_conversion.hf_config import read_config
from checkpoint_conversion.rules import ConversionError
from checkpoint_conversion.torch_dist_folder import MegatronReader
from igpo_megatron.policy import parallel
from igpo_megatron.types import UserError

NAME = "checksums.json"
STATE = "state.json"
_STATE_KEYS = {"step", "optimizer_steps", "layout", "run"}
_ALWAYS = (STATE, "model/.metadata", "model/metadata.json", "hf/config.json")
"""Not model/common.pt: Megatron-Core 0.19 keeps what it held in a shard."""

_PIECE = 2**22

Sums = dict[str, tuple[int, str]]
"""Path within the checkpoint -> (bytes, CRC-32 in hexadecimal)."""


def sums_of(folder: Path, paths: Iterable[Path]) -> Sums:
    """The sums of some files of a checkpoint, read piece by piece."""
    return {path.relative_to(folder).as_posix(): _sum(path) for path in sorted(paths)}


def of_rank(folder: Path, rank: int) -> Sums:
    """The sums of the files that a rank wrote, which Megatron names after it."""
    return sums_of(folder, (folder / "model").glob(f"__{rank}_*.distcp"))


def write(folder: Path, known: Mapping[str, tuple[int, str]]) -> None:
    """Write the sums of all files in a checkpoint: `known` are those that the ranks took of their own."""
    others = (path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() not in known)
    (folder / NAME).write_text(json.dumps({**known, **sums_of(folder, others)}, indent=1), encoding="utf-8")


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Problems of a checkpoint, file by file. Looks at every `parts`-th file from `part` on; part 0 also reads the indices.

    Checkpoints of earlier versions have no sums: for them part 0 checks that every file is there and long enough.
    """
    try:
        sums = json.loads((folder / NAME).read_text(encoding="utf-8")) if (folder / NAME).is_file() else None
        compared = _differing(folder, dict(sorted(sums.items())[part::parts])) if sums is not None else []
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return [f"{NAME} cannot be read ({error})"] if part == 0 else []
    if part or compared:
        return compared
    unlisted = _unlisted(folder, sums) if sums is not None else []
    return unlisted or _bad_state(folder, has_sums=sums is not None) or ([] if sums is not None else _bad_index(folder))


@dataclass(slots=True)
class Found:
    """The checkpoint that a run resumes from."""

    folder: Path | None = None
    """None for a run that has none yet."""

    passed_over: dict[Path, str] = field(default_factory=dict)
    """Newer ones, with the first problem of each."""


def newest_whole(checkpoints: Path) -> Found:
    """The newest checkpoint whose files are all as they were written. Collective: the ranks share the reading, and agree.

    Raises UserError on every rank if there are checkpoints and none is intact.
    """
    rank, world = parallel.place()
    folders = parallel.broadcast(sorted(checkpoints.glob("step_??????"), reverse=True) if rank == 0 else None)
    passed_over: dict[Path, str] = {}
    for folder in folders:
        problems = [problem for found in parallel.gather(damage(folder, rank, world)) for problem in found]
        if not problems:
            return Found(folder, passed_over)
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        passed_over[folder] = problems[0] + more
    if passed_over:
        named = "; ".join(f"{folder.name}: {problem}" for folder, problem in passed_over.items())
        raise UserError(
            f"no checkpoint in {checkpoints} is intact ({named}); restore one from a copy, on a disk that every machine sees, "
            "or choose another run.name to start again"
        )
    return Found()


def set_aside(found: Found) -> list[str]:
    """Rename the damaged checkpoints, so that none counts as the newest one kept; a sentence for each. Main rank only."""
    sentences = []
    for folder, problem in found.passed_over.items():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.damaged{f'-{number}' if number > 1 else ''}")).exists():
            number += 1
        try:
            folder.rename(aside)
        except OSError as error:
            raise UserError(f"{folder} is damaged ({problem}) and cannot be renamed to {aside.name}: {error.strerror}; move it") from error
        sentences.append(f"{folder} is damaged ({problem}): it is kept as {aside.name}, and the run goes on from {found.folder}")
    return sentences


def _sum(path: Path) -> tuple[int, str]:
    size = crc = 0
    piece = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            crc = zlib.crc32(piece[:count], crc)
            size += count
    return size, f"{crc:08x}"


def _differing(folder: Path, sums: Mapping[str, tuple[int, str]]) -> list[str]:
    problems = []
    for name, (size, crc) in sums.items():
        path = folder / name
        if not path.is_relative_to(folder) or ".." in Path(name).parts or (not path.is_file() and path.exists()):
            problems.append(f"{NAME} names {name!r}, which is no file of a checkpoint")
            continue
        try:
            found = path.stat().st_size
            if found != size:
                problems.append(f"{name} has {found:,} bytes where {size:,} were written")
            elif _sum(path)[1] != crc:
                problems.append(f"{name} does not hold what was written")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def _unlisted(folder: Path, sums: Mapping[str, tuple[int, str]]) -> list[str]:
    """Required files and shards that have no sum. Other files are allowed: a user or NFS may have put them there."""
    shards = (path.relative_to(folder).as_posix() for path in (folder / "model").glob("*.distcp"))
    return [f"{NAME} does not give {name}" for name in sorted({*_ALWAYS, *shards} - sums.keys())]


def _bad_state(folder: Path, *, has_sums: bool) -> list[str]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{STATE} is missing"]
    except (OSError, ValueError, RecursionError) as error:
        return [f"{STATE} cannot be read ({error})"]
    if not isinstance(state, dict) or not state.keys() >= _STATE_KEYS:
        return [f"{STATE} does not give {', '.join(sorted(_STATE_KEYS))}"]
    return [f"{NAME} is missing"] if state.get("checksums") and not has_sums else []


def _bad_index(folder: Path) -> list[str]:
    missing = [f"{name} is missing" for name in ("model/common.pt", "model/metadata.json") if not (folder / name).is_file()]
    try:
        MegatronReader(folder / "model")
        read_config(folder / "hf")
    except (ConversionError, OSError) as error:
        return [*missing, str(error)]
    return missing
