"""Hundreds of things whose names differ in numbers alone, as a few kinds: for tables of a model that keeps its layers apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Generic, TypeVar

from lora_merge_cli.report import SiteRecord
from lora_merge_cli.reports.words import alphas_in_words

if TYPE_CHECKING:
    from lora_merge_cli.inspection import SiteRow

MANY_SITES = 30
"""More are told of by kind."""
MOST_KINDS = 40
"""More rows nobody reads; the JSON report has all."""

_SEPARATOR = re.compile(r"([./])")

T = TypeVar("T")
S = TypeVar("S", "SiteRow", SiteRecord)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What is alike but for the numbers in its name."""

    name: str
    """The name after its layer, or all of it with ``*`` for its numbers where that would not tell kinds apart."""
    layers: str
    """Which layers, for example ``0-21``; a dash where the names have no numbers."""
    members: tuple[T, ...]
    """All of them."""

    @property
    def counted(self) -> str:
        """The name, and how many there are of it."""
        return self.name if len(self.members) == 1 else f"{self.name} x{len(self.members)}"


def kinds(
    items: Sequence[T],
    name_of: Callable[[T], str],
    likeness: Callable[[T], Hashable],
    *coarser: Callable[[T], Hashable],
) -> list[Kind[T]]:
    """The items by kind, in the order in which each kind comes first.

    Args:
        items: What to sort.
        name_of: A dotted or slashed name.
        likeness: What members of one kind must have in common besides.
        coarser: What they must have in common where there would be more kinds than anybody reads.
    """
    found: dict[tuple[str, Hashable], list[T]] = {}
    for item in items:
        found.setdefault((pattern(name_of(item)), likeness(item)), []).append(item)
    if coarser and len(found) > MOST_KINDS:
        return kinds(items, name_of, *coarser)
    short = short_patterns(name for name, _ in found)
    return [
        Kind(short[name], ranges([_numbers(name_of(member)) for member in members]), tuple(members))
        for (name, _), members in found.items()
    ]


def site_kinds(sites: Sequence[S]) -> list[Kind[S]]:
    """The sites by name, adapter, rank, scale and who says so; where that is too much, by name and adapter."""
    return kinds(
        sites,
        lambda site: site.label,
        lambda site: (site.group, site.adapter, site.weight, site.rank, site.scale, source_pattern(site.scale_source)),
        lambda site: (site.group, site.adapter, site.weight),
    )


def source_pattern(source: str) -> str:
    """Who says what a scale is, without the layer's number where it is said of each layer by name."""
    return re.sub(r"'[^']*'", lambda quoted: re.sub(r"\d+", "*", quoted.group()), source)


def pattern(name: str) -> str:
    """The name with ``*`` for each part that is a number."""
    return "".join("*" if part.isdecimal() else part for part in _SEPARATOR.split(name))


def layer_of(name: str) -> int | None:
    """The first number of the name, which is the layer's in the names of torch modules."""
    return next(iter(_numbers(name)), None)


def layer_pattern(name: str) -> str:
    """The name with ``*`` for its layer alone."""
    parts = _SEPARATOR.split(name)
    layer = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return "".join("*" if place == layer else part for place, part in enumerate(parts))


def short_patterns(patterns: Iterable[str]) -> dict[str, str]:
    """Each pattern with what is left of it after its layer, or all of it where two would look alike."""
    distinct = dict.fromkeys(patterns)
    tails = {name: re.split(r"\*[./]", name, maxsplit=1)[-1] for name in distinct}
    seen = Counter(tails.values())
    return {name: tail if seen[tail] == 1 else name for name, tail in tails.items()}


def ranges(numbers: Iterable[Sequence[int]]) -> str:
    """Which layers: the first number of each name."""
    layers = sorted({found[0] for found in numbers if found})
    if not layers:
        return "-"
    first, last = layers[0], layers[-1]
    if len(layers) == last - first + 1:
        return str(first) if first == last else f"{first}-{last}"
    return ",".join(map(str, layers)) if len(layers) <= 3 else f"{len(layers)} of {first}-{last}"


def spread(values: Iterable[float], mark: str = "") -> str:
    """One value, or from the least to the largest."""
    distinct = sorted(set(values))
    ends = distinct if len(distinct) < 2 else (distinct[0], distinct[-1])
    return "-".join(f"{value:.4g}" for value in ends) + mark


def alpha_spread(sites: Iterable[SiteRecord]) -> str:
    """The alphas of sites that share a row."""
    alphas = [alpha for site in sites for alpha in site.alphas]
    return alphas_in_words((min(alphas), max(alphas)))


def rank_spread(sites: Iterable[S]) -> str:
    """The rank of sites that share a row."""
    return spread(site.rank for site in sites)


def scale_spread(sites: Sequence[S], mark: str) -> str:
    """The scale of sites that share a row, with a mark where nobody stated one of them."""
    known = [site.scale for site in sites if site.scale is not None]
    if len(known) < len(sites):
        return "unknown"
    return spread(known, mark if any(site.scale_assumed for site in sites) else "")


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the known values."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def largest(values: Iterable[float | None]) -> float | None:
    """The largest of the known values."""
    return max((value for value in values if value is not None), default=None)


def least(values: Iterable[float | None]) -> float | None:
    """The least of the known values."""
    return min((value for value in values if value is not None), default=None)


def _numbers(name: str) -> list[int]:
    return [int(part) for part in _SEPARATOR.split(name) if part.isdecimal()]
