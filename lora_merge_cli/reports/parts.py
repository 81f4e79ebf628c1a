"""What an interpolation did to the parts of a model, beside one another and taken together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lora_merge_cli.report import MixedRecord, PartRecord, PointRecord


def part_names(points: Iterable[PointRecord]) -> tuple[str, ...]:
    """Every part of a sweep, in the order in which each comes first."""
    return tuple(dict.fromkeys(part.part for point in points for part in point.parts))


def part_of(point: PointRecord, name: str) -> PartRecord | None:
    """What one alpha did to a part; None where it failed."""
    return next((part for part in point.parts if part.part == name), None)


def share_of_base(length: float, part: PartRecord) -> float | None:
    """A length as a share of ``|W_base|``; None where the base is all zeros."""
    return length / part.base_norm if part.base_norm else None


def relative_distance(parts: Sequence[PartRecord]) -> float | None:
    """``|W_alpha - W_base| / |W_base|`` over all parts; None without any, or where the base is all zeros."""
    base = math.hypot(*(part.base_norm for part in parts))
    return math.hypot(*(part.distance for part in parts)) / base if base else None


def farthest_first(mixed: Iterable[MixedRecord]) -> list[MixedRecord]:
    """The leaves by how far they moved, those last of which that is not known."""
    return sorted(mixed, key=lambda leaf: -1 if leaf.relative_norm is None else leaf.relative_norm, reverse=True)
