"""Diff: any two checkpoints, leaf by leaf. With a base as A it is the freeze audit: which leaves a fine-tune moved, and how far."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lora_merge_cli import __version__
from lora_merge_cli.compare import Comparison, Tolerance, compare_blocks
from lora_merge_cli.dialects import Dialect, detect_dialect
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import UsageError
from lora_merge_cli.formats import open_checkpoint
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.inputs import tree_of
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.recording import peak_rss, source_record, versions
from lora_merge_cli.records import KeyPath, TensorSpec, display
from lora_merge_cli.report import DifferenceRecord, DifferenceStatus, DiffReport, PrefixRecord
from lora_merge_cli.selection import matches_any
from lora_merge_cli.side_by_side import flat_pieces, side_by_side
from lora_merge_cli.survival import finite

_WHOLE_ROWS = 2**18
_STATUSES: tuple[DifferenceStatus, ...] = ("changed", "reshaped", "only-a", "only-b", "rounded", "within", "equal")


@dataclass(frozen=True)
class DiffRequest:
    """What to compare."""

    a: Path
    """The reference: a run, step or item directory."""
    b: Path
    """What is compared with it."""
    step: int | None = None
    """Which step of a run, for both; the newest of each if None."""
    atol: float | None = None
    """The absolute tolerance; without either tolerance only equal bits count."""
    rtol: float | None = None
    """The tolerance relative to A's entry."""
    include: tuple[str, ...] = ()
    """Globs of leaves to compare; all if empty."""
    exclude: tuple[str, ...] = ()
    """Globs of leaves not to compare."""
    top: int = 20
    """How many leaves people are shown."""
    depth: int = 3
    """How many parts of a path make the prefix that leaves are grouped by."""
    jobs: int | None = None
    """How many threads compare; see `jobs.jobs_or_default`."""


def diff(request: DiffRequest, listener: Listener | None = None) -> DiffReport:
    """Compare two checkpoints, whatever their formats and their spelling of paths; streaming, in bounded memory.

    Raises:
        UsageError: A tolerance is negative, the number of jobs below 1, or a glob matches no leaf.
        InputError: One of them cannot be opened or read.
    """
    started = time.monotonic()
    tolerance = _tolerance(request)
    a, b = (open_checkpoint(path, request.step) for path in (request.a, request.b))
    pairs = _chosen(_pairs(a, b), request)
    listener = listener or Silent()
    listener.start(sum(spec_b.nbytes for spec_a, spec_b in pairs.values() if spec_a is not None and spec_b is not None))
    records: list[DifferenceRecord] = []
    groups: dict[str, list[tuple[DifferenceRecord, Comparison]]] = {}
    with ThreadPoolExecutor(jobs_or_default(request.jobs)) as pool:
        for name, (spec_a, spec_b) in pairs.items():
            found = None
            if spec_a is not None and spec_b is not None and spec_a.shape == spec_b.shape:
                found = _compare(a, spec_a, b, spec_b, tolerance, pool)
                listener.advance(spec_b.name, spec_b.nbytes)
            record = _record(_prefix_of(name, request.depth), spec_a, spec_b, found, tolerance)
            records.append(record)
            groups.setdefault(record.prefix, []).append((record, found or Comparison()))
    counts = Counter(record.status for record in records)
    good = ("equal",) if tolerance is None else ("equal", "within")
    return DiffReport(
        status="equal" if all(record.status in good for record in records) else "different",
        tool_version=__version__,
        sources=(source_record("a", a), source_record("b", b)),
        notes=(*a.notes, *b.notes),
        atol=request.atol,
        rtol=request.rtol,
        top=request.top,
        counts={status: counts[status] for status in _STATUSES if counts[status]},
        prefixes=tuple(_prefix(prefix, found, good) for prefix, found in groups.items()),
        leaves=tuple(sorted(records, key=_importance)),
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss(),
        versions=versions(),
    )


_Pair = tuple[TensorSpec | None, TensorSpec | None]


def _tolerance(request: DiffRequest) -> Tolerance | None:
    for flag, value in (("--atol", request.atol), ("--rtol", request.rtol)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{flag} must be finite and not negative", found=value)
    for flag, count in (("--top", request.top), ("--depth", request.depth)):
        if count < 1:
            raise UsageError(f"{flag} must be at least 1", found=count)
    if request.atol is None and request.rtol is None:
        return None
    return Tolerance(request.atol or 0.0, request.rtol or 0.0)


def _pairs(a: Checkpoint, b: Checkpoint) -> dict[KeyPath, _Pair]:
    """The leaves of both, by their path without what differs between the spellings of one model."""
    dialect = detect_dialect(tree_of(a))
    named_a, named_b = (_by_name(checkpoint, dialect) for checkpoint in (a, b))
    if named_a is None or named_b is None:
        named_a, named_b = (dict(checkpoint.source.index().tensors) for checkpoint in (a, b))
    return {name: (named_a.get(name), named_b.get(name)) for name in {**named_a, **named_b}}


def _by_name(checkpoint: Checkpoint, dialect: Dialect) -> dict[KeyPath, TensorSpec] | None:
    """None if two leaves differ in nothing but their spelling, so that only whole paths tell them apart."""
    tensors = checkpoint.source.index().tensors
    named = {dialect.canonical(path): spec for path, spec in tensors.items()}
    return named if len(named) == len(tensors) else None


def _chosen(pairs: Mapping[KeyPath, _Pair], request: DiffRequest) -> dict[KeyPath, _Pair]:
    names = {name: {name, *(spec.path for spec in pair if spec is not None)} for name, pair in pairs.items()}

    def matches(name: KeyPath, patterns: Sequence[str]) -> bool:
        return matches_any(names[name], patterns)

    for flag, patterns in (("--include", request.include), ("--exclude", request.exclude)):
        for pattern in patterns:
            if not any(matches(name, (pattern,)) for name in pairs):
                raise UsageError(f"{flag} {pattern!r} matches no leaf")
    chosen = {
        name: pair
        for name, pair in pairs.items()
        if (not request.include or matches(name, request.include)) and not matches(name, request.exclude)
    }
    if not chosen:
        raise UsageError("--include and --exclude leave no leaf to compare")
    return chosen


def _compare(
    a: Checkpoint,
    spec_a: TensorSpec,
    b: Checkpoint,
    spec_b: TensorSpec,
    tolerance: Tolerance | None,
    pool: ThreadPoolExecutor,
) -> Comparison:
    total = Comparison()
    for _, blocks in side_by_side([(a.source, spec_a), (b.source, spec_b)], pool=pool):
        for found in pool.map(lambda pair: compare_blocks(pair[0], pair[1], tolerance), flat_pieces(*blocks)):
            total.merge(found)
    return total


def _record(
    prefix: str, a: TensorSpec | None, b: TensorSpec | None, found: Comparison | None, tolerance: Tolerance | None
) -> DifferenceRecord:
    spec = a or b
    assert spec is not None, "a pair has at least one side"
    record = DifferenceRecord(
        path=spec.name,
        prefix=prefix,
        status=_status(a, b, found, tolerance),
        shape_a=None if a is None else a.shape,
        shape_b=None if b is None else b.shape,
        dtype_a=None if a is None else a.dtype.name,
        dtype_b=None if b is None else b.dtype.name,
    )
    if found is None:
        return record
    return dataclasses.replace(
        record,
        max_abs=finite(found.max_abs),
        relative_l2=found.relative_l2 if found.changed else 0.0,
        cosine=found.cosine,
        max_ulp=found.max_ulp,
        changed=found.changed / max(found.entries, 1),
        non_finite=found.non_finite,
    )


def _status(
    a: TensorSpec | None, b: TensorSpec | None, found: Comparison | None, tolerance: Tolerance | None
) -> DifferenceStatus:
    if b is None:
        return "only-a"
    if a is None:
        return "only-b"
    if found is None:
        return "reshaped"
    if a.dtype == b.dtype and not found.changed:
        return "equal"
    if tolerance is not None and not found.beyond:
        return "within"
    return "rounded" if found.rounded and is_float(a.dtype) and is_float(b.dtype) else "changed"


def _importance(record: DifferenceRecord) -> tuple[int, float, str]:
    """What differs most comes first."""
    change = math.inf if record.relative_l2 is None or record.non_finite else record.relative_l2
    return _STATUSES.index(record.status), -change, record.path


def _prefix_of(name: KeyPath, depth: int) -> str:
    """The start of a path, without the leaf's own name."""
    return display(name[: max(1, min(depth, len(name) - 1))])


def _prefix(prefix: str, found: Sequence[tuple[DifferenceRecord, Comparison]], good: Sequence[str]) -> PrefixRecord:
    a_sq = sum(comparison.a_sq for _, comparison in found)
    difference_sq = sum(comparison.difference_sq for _, comparison in found)
    return PrefixRecord(
        prefix=prefix,
        leaves=len(found),
        changed=sum(record.status == "changed" for record, _ in found),
        differing=sum(record.status not in good for record, _ in found),
        relative_l2=finite(math.sqrt(difference_sq / a_sq)) if a_sq > 0 else (None if difference_sq else 0.0),
        max_abs=finite(max(comparison.max_abs for _, comparison in found)),
    )
