"""What a merge did: the record that every report is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge_cli.plan import MergePlan
from lora_merge_cli.records import AdapterSite
from lora_merge_cli.survival import Moments, Survival

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SourceRecord:
    """One input."""

    role: str
    """``checkpoint`` or ``base``."""
    path: str
    """Where it was read from."""
    format: str
    """The format's name."""
    step: int | None
    """The training step, where known."""
    fingerprint: str
    """A digest of its metadata and of the names and sizes of its files."""


@dataclass(frozen=True)
class SiteRecord:
    """One site: what it is, and, once merged, what became of its delta."""

    target: str
    label: str
    group: str
    module: str
    operation: str
    equation: str
    rank: int
    scale: float | None
    scale_source: str
    scale_assumed: bool
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    relative_norm: float | None = None
    """``|delta| / |kernel|``, Frobenius."""
    max_abs: float | None = None
    """The largest entry of the delta, absolute."""
    adapter_digest: str | None = None
    """A digest of the factors' names, shapes, dtypes and values."""
    non_finite: int = 0
    """Entries of the result that are NaN or Inf: a merge with any is refused."""
    survival: tuple[Survival, ...] = ()
    """For the stored dtype, then for the serving one where it is another."""
    layers: tuple[LayerRecord, ...] = ()
    """The same figures per stacked layer."""


@dataclass(frozen=True)
class LayerRecord:
    """One stacked layer of a site."""

    relative_norm: float | None
    max_abs: float
    survival: tuple[Survival, ...]


@dataclass(frozen=True)
class LeafRecord:
    """An output leaf that no adapter touched."""

    path: str
    origin: str
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class DroppedRecord:
    """An input leaf, or a folder, that the output does not have."""

    path: str
    reason: str


@dataclass(frozen=True)
class MergeReport:
    """All that a merge, or its dry run, has to say."""

    command: str
    tool_version: str
    status: str
    """``planned`` or ``merged``."""
    model: str
    dialect: str
    sources: tuple[SourceRecord, ...]
    output: str | None
    multiplier: float
    serving_dtype: str
    sites: tuple[SiteRecord, ...]
    copied: tuple[LeafRecord, ...]
    dropped: tuple[DroppedRecord, ...]
    warnings: tuple[str, ...]
    """What should make a reader stop."""
    notes: tuple[str, ...]
    """What a reader should know."""
    output_bytes: int
    """The size of all output arrays before compression."""
    peak_bytes_planned: int
    """The plan's estimate of the largest resident size."""
    bytes_on_disk: int | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    device: str | None = None
    versions: tuple[tuple[str, str], ...] = ()
    parents: tuple[dict[str, Any], ...] = ()
    """The provenance of the checkpoint that was merged into, oldest last."""
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able values."""
        document = dataclasses.asdict(self)
        document["versions"] = dict(self.versions)
        return {"schema_version": document.pop("schema_version"), **document}


def site_record(
    site: AdapterSite, plan: MergePlan, layers: tuple[Moments, ...] = (), digest: str | None = None
) -> SiteRecord:
    """The record of one site; with `layers` and `digest`, of what became of its delta."""
    step = next(s for s in plan.steps if s.source.path == site.targets[0])
    scale = site.parameters.scale
    record = SiteRecord(
        target=site.name,
        label=site.label,
        group=site.group,
        module=site.module,
        operation=site.operation,
        equation=str(site.parameters.equation),
        rank=site.parameters.rank,
        scale=scale.value,
        scale_source=scale.source,
        scale_assumed=scale.assumed,
        shape=step.source.shape,
        source_dtype=step.source.dtype.name,
        dtype=step.output.dtype.name,
    )
    if not layers:
        return record
    total = Moments.total(layers)
    dtypes = tuple(dict.fromkeys((record.dtype, plan.serving_dtype.name)))
    return dataclasses.replace(
        record,
        relative_norm=total.relative_norm,
        max_abs=total.max_abs,
        adapter_digest=digest,
        survival=tuple(map(total.survival, dtypes)),
        layers=tuple(
            LayerRecord(layer.relative_norm, layer.max_abs, tuple(map(layer.survival, dtypes))) for layer in layers
        ),
    )


def copied_records(plan: MergePlan) -> tuple[LeafRecord, ...]:
    """The leaves that no adapter touches."""
    return tuple(
        LeafRecord(s.output.name, s.origin, s.output.dtype.name, s.output.nbytes)
        for s in plan.steps
        if s.origin != "changed"
    )


def dropped_records(plan: MergePlan, left_out: Mapping[str, str]) -> tuple[DroppedRecord, ...]:
    """The factors that were merged, the leaves that were dropped, and the folders that were left out."""
    factors = (
        DroppedRecord("/".join(map(str, path)), "adapter factor, merged into its kernel") for path in plan.factors
    )
    leaves = (DroppedRecord("/".join(map(str, leaf.path)), leaf.reason) for leaf in plan.dropped)
    folders = (DroppedRecord(f"{name} (beside the parameters)", reason) for name, reason in left_out.items())
    return (*factors, *leaves, *folders)


def directory_size(path: Path) -> int:
    """The bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
