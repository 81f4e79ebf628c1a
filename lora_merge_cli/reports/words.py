"""How figures are written, the same in every report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_merge_cli.report import (
    CombiningRecord,
    InterpolateReport,
    LayerRecord,
    LeafRecord,
    MixedRecord,
    MixingRecord,
    ModelReport,
    OutputReport,
    SiteRecord,
    SourceRecord,
    SurvivalRecord,
    SweepReport,
    VerifyReport,
)

STATUS_WORDS = {
    "adapter": "LoRA factors",
    "frozen": "frozen",
    "lora": "frozen + LoRA",
    "trained": "fully trained",
}
"""What a fine-tune did to a group of leaves, in words."""


_BROUGHT = ("replaced", "created")
_UNKNOWN = "unknown"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun, for example ``2 warnings``."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def byte_size(count: int) -> str:
    """A size with its binary unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes every size")


def quantity(count: int) -> str:
    """A count with its decimal suffix, for example ``2.5 B``."""
    for limit, suffix in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= limit:
            return f"{count / limit:.1f}{suffix}"
    return str(count)


def figure(value: float | None) -> str:
    """Three significant digits, or a dash where there is no figure."""
    if value is None:
        return "-"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def short_scale(site: SiteRecord) -> str:
    """The scale in a few characters; marked where it was assumed."""
    if site.scale is None:
        return "unknown"
    return f"{site.scale:.4g}{' (assumed)' if site.scale_assumed else ''}"


def survival_for(site: SiteRecord | LayerRecord | MixedRecord, dtype: str) -> SurvivalRecord | None:
    """The figures for one dtype, if measured."""
    return next((survival for survival in site.survival if survival.dtype == dtype), None)


def beside(report: ModelReport) -> tuple[SourceRecord, ...]:
    """The adapters that lie beside the checkpoint; none where they are inside."""
    return tuple(source for source in report.sources if source.role == "adapter")


def adapters_in_words(report: ModelReport) -> str:
    """How much was adapted: ``10 adapters``, or ``154 sites and 1 leaf of 1 adapter`` where adapters have files of their own."""
    adapters = beside(report)
    if not adapters:
        return counted(len(report.sites), "adapter")
    whole = len(brought(report.copied)) if isinstance(report, OutputReport) else 0
    parts = [counted(len(report.sites), "site")] if report.sites or not whole else []
    parts += [counted(whole, "leaf", "leaves")] if whole else []
    return f"{' and '.join(parts)} of {counted(len(adapters), 'adapter')}"


def model_name(report: ModelReport | SweepReport) -> str | None:
    """The model; None where nobody knows it."""
    return None if report.model == _UNKNOWN else report.model


def subject(report: ModelReport | SweepReport) -> str:
    """What a report is of: the model, or the directory of one that nobody knows."""
    merged_into = next((Path(source.path).name for source in report.sources if source.role == "checkpoint"), None)
    return model_name(report) or merged_into or "a checkpoint"


def source_names(sources: Sequence[SourceRecord]) -> list[str]:
    """Each source's role, with a number where there are several adapters."""
    several = sum(source.role == "adapter" for source in sources) > 1
    numbers = iter(range(1, len(sources) + 1))
    return [
        f"adapter {next(numbers)}"
        if several and source.role == "adapter"
        else source.role.upper()
        if source.role in ("a", "b")
        else source.role
        for source in sources
    ]


def weight_in_words(source: SourceRecord) -> str | None:
    """An adapter's weight, where it is not as trained."""
    return None if source.weight in (None, 1) else f"weight {source.weight:g}"


def adapter_mark(site: SiteRecord) -> str:
    """Which of several adapters a site is of, from 1, and its weight where that is not 1."""
    number = "-" if site.adapter is None else str(site.adapter + 1)
    return number if site.weight == 1 else f"{number}, weight {site.weight:g}"


def brought(leaves: Iterable[LeafRecord]) -> list[LeafRecord]:
    """The leaves whose values are an adapter's, or that the checkpoint does not have."""
    return [leaf for leaf in leaves if leaf.origin in _BROUGHT]


def untouched(leaves: Iterable[LeafRecord]) -> list[LeafRecord]:
    """The leaves that no adapter has to do with."""
    return [leaf for leaf in leaves if leaf.origin not in _BROUGHT]


def why(leaf: LeafRecord) -> str:
    """Why an adapter brings a leaf."""
    return leaf.reason or ("not in the checkpoint" if leaf.origin == "created" else "the adapter's own")


def gain_along_inputs(site: SiteRecord | LayerRecord, dtype: str) -> float | None:
    """What an input that the adapter reacts to sees of the delta in one dtype, if measured."""
    survival = survival_for(site, dtype)
    return survival.gain_along_inputs if survival else None


def alphas_in_words(alphas: tuple[float, ...]) -> str:
    """The alphas of a leaf or of a part, from the first layer to the last: ``0.5``, or ``0.2 to 0.9``; a dash without any."""
    if not alphas:
        return "-"
    first, last = f"{alphas[0]:g}", f"{alphas[-1]:g}"
    return first if first == last else f"{first} to {last}"


def mixing_of(report: ModelReport) -> MixingRecord | None:
    """Which alpha goes where, if the report is of an interpolation."""
    return report.mixing if isinstance(report, InterpolateReport | VerifyReport) else None


def mixing_in_words(mixing: MixingRecord) -> str:
    """Which alpha goes where: ``alpha 0.5; PaliGemma/img/**: 0; layers 0.2 to 0.9``."""
    return _mixing(f"alpha {mixing.alpha:g}", mixing)


def combining_in_words(combining: CombiningRecord) -> str:
    """How several adapters became one change: ``dare_ties_svd: density 0.5, seed 0, sign by total, rank 16``."""
    said = {
        "density": None if combining.density is None else f"{combining.density:g}",
        "seed": combining.seed,
        "sign by": combining.majority_sign,
        "rank": combining.svd_rank,
    }
    details = ", ".join(f"{word} {value}" for word, value in said.items() if value is not None)
    return f"{combining.method}: {details}" if details else combining.method


def sweep_in_words(report: SweepReport) -> str:
    """Which alphas a sweep has, and where they do not go: ``alpha 0, 0.5, 1; PaliGemma/img/**: 0``."""
    return _mixing(f"alpha {', '.join(f'{point.alpha:g}' for point in report.points)}", report.mixing)


def _mixing(alphas: str, mixing: MixingRecord) -> str:
    parts = [f"{alphas} of the adapters' deltas alone, for want of a base" if mixing.deltas_only else alphas]
    parts += [f"{override.glob}: {override.alpha:g}" for override in mixing.overrides]
    if mixing.schedule is not None:
        parts.append(f"layers {alphas_in_words(mixing.schedule)}")
    if mixing.only_common is not None:
        whose = "the base's" if mixing.only_common == "base" else "the fine-tune's"
        parts.append(f"leaves that are not common: {whose}")
    return "; ".join(parts)
