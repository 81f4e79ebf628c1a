"""What a choice of rounding did: survival with rounding to nearest beside survival with what was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_merge_cli.records import first_names
from lora_merge_cli.report import (
    InterpolateReport,
    MixedRecord,
    ModelReport,
    RoundingRecord,
    SiteRecord,
    SweepReport,
)
from lora_merge_cli.reports.kinds import MANY_SITES, largest, least, site_kinds
from lora_merge_cli.reports.words import counted, survival_for

WORTH_FROM = (
    "worth from: the share of an input's energy that must lie along the adapter's inputs for an output to be nearer than with rounding "
    "to nearest"
)
_NAMES = 3


@dataclass(frozen=True)
class RoundedRow:
    """A kernel, or kernels that are alike, rounded other than to nearest."""

    name: str
    """Its label, or what their labels have in common with how many there are."""
    first: SiteRecord
    """The first of them."""
    dtype: str
    """The dtype that was rounded to."""
    gains: tuple[float | None, float | None]
    """Along the adapter's inputs, the least of them: to nearest, and as chosen."""
    errors: tuple[float | None, float | None]
    """Along the adapter's inputs, the largest of them: to nearest, and as chosen."""
    worth_from: float | None
    """See `SiteRecord.worth_from`, the largest of them; None if that of one of them is."""
    moved: float | None
    """The share of entries of wide leaves that are not the exact result; null where what is rounded is what is stored."""


def rounded_rows(report: ModelReport) -> list[RoundedRow]:
    """A row for each kernel with a choice of rounding, or for those that are alike where there are many; none before a run."""
    kernels = list(_measured(report.sites))
    if len(report.sites) <= MANY_SITES:
        return [_row(site.label, [site]) for site in kernels]
    return [_row(kind.counted, kind.members) for kind in site_kinds(kernels)]


def rounding_in_words(report: ModelReport | SweepReport) -> str | None:
    """What was rounded how, and what was not and why; None where all is to nearest.

    For example ``preserve, mu 1: 9 of 10 leaves that change, served as bfloat16; 1 to nearest: ...``.
    """
    rounding = report.rounding
    if rounding is None:
        return None
    given = sum(each.leaves for each in rounding.leaves if each.reason is None)
    total = sum(each.leaves for each in rounding.leaves)
    how: list[str] = [rounding.method]
    how += [] if rounding.mu is None else [f"mu {rounding.mu:g}"]
    how += [] if rounding.seed is None else [f"seed {rounding.seed}"]
    said = [
        f"{', '.join(how)}: {given} of {counted(total, 'leaf', 'leaves')} that change, served as {report.serving_dtype}"
    ]
    refused = [each for each in rounding.leaves if each.reason is not None]
    for each in refused:
        names = f" ({first_names(_to_nearest(report), _NAMES)})" if len(refused) == 1 and _to_nearest(report) else ""
        said.append(f"{each.leaves} to nearest: {each.reason}{names}")
    if rounding.serving_values is not None:
        said.append(_wide(rounding, report))
    return "; ".join(said)


def has_nearest(mixed: Iterable[MixedRecord]) -> bool:
    """Whether it is known of one of the leaves what rounding to nearest would have kept."""
    return any(leaf.nearest is not None for leaf in mixed)


def share_in_words(share: float | None) -> str:
    """A share as a percentage, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.3g} %"


def _measured(sites: Sequence[SiteRecord]) -> Iterator[SiteRecord]:
    """Once for each kernel: several adapters on one share its figures."""
    seen: set[str] = set()
    for site in sites:
        if site.nearest is not None and site.target not in seen:
            seen.add(site.target)
            yield site


def _row(name: str, sites: Sequence[SiteRecord]) -> RoundedRow:
    nearest = [site.nearest for site in sites if site.nearest is not None]
    chosen = [found for site in sites if site.nearest is not None and (found := survival_for(site, site.nearest.dtype))]
    return RoundedRow(
        name=name,
        first=sites[0],
        dtype=" / ".join(dict.fromkeys(found.dtype for found in nearest)),
        gains=(
            least(found.gain_along_inputs for found in nearest),
            least(found.gain_along_inputs for found in chosen),
        ),
        errors=(
            largest(found.error_along_inputs for found in nearest),
            largest(found.error_along_inputs for found in chosen),
        ),
        worth_from=_largest([site.worth_from for site in sites]),
        moved=_share_moved((math.prod(site.shape), site.moved) for site in sites),
    )


def _largest(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return max(known) if known and len(known) == len(shares) else None


def _wide(rounding: RoundingRecord, report: ModelReport | SweepReport) -> str:
    chosen = f"the {report.serving_dtype} value that was chosen"
    held = (
        f"exact values, moved only where servers would not cast them to {chosen}"
        if rounding.serving_values == "cell"
        else f"{chosen}, widened"
    )
    moved = _share_moved(_moved(report)) if isinstance(report, ModelReport) else None
    return f"what is stored wider holds {held} ({'' if moved is None else f'{share_in_words(moved)} of entries moved; '}--serving-values {rounding.serving_values})"


def _moved(report: ModelReport) -> Iterator[tuple[int, float | None]]:
    yield from ((math.prod(site.shape), site.moved) for site in _measured(report.sites))
    if isinstance(report, InterpolateReport):
        yield from ((leaf.parameters, leaf.moved) for leaf in report.mixed)


def _share_moved(leaves: Iterable[tuple[int, float | None]]) -> float | None:
    """The share of all entries of those leaves of which it is known."""
    known = [(size, moved) for size, moved in leaves if moved is not None]
    entries = sum(size for size, _ in known)
    return sum(size * moved for size, moved in known) / entries if entries else None


def _to_nearest(report: ModelReport | SweepReport) -> list[str]:
    """The leaves that change and are rounded to nearest, in spite of what was asked for."""
    if not isinstance(report, ModelReport):
        return []
    mixed = report.mixed if isinstance(report, InterpolateReport) else ()
    names = [site.label for site in report.sites if site.rounding == "nearest"]
    return list(dict.fromkeys([*names, *(leaf.path for leaf in mixed if leaf.rounding == "nearest")]))
