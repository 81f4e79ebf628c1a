"""From what was planned, measured and found to the records of a report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_merge_cli import __version__
from lora_merge_cli.dialects import Dialect, Group
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.plan import MergePlan
from lora_merge_cli.records import AdapterSite, Index, KeyPath, TensorSpec, display
from lora_merge_cli.report import (
    DroppedRecord,
    GroupRecord,
    LayerRecord,
    LeafRecord,
    SiteRecord,
    SourceRecord,
    SurvivalRecord,
)
from lora_merge_cli.survival import Moments, finite

_PACKAGES = ("jax", "numpy", "ml_dtypes", "tensorstore")


def source_record(role: str, checkpoint: Checkpoint) -> SourceRecord:
    """The record of one input."""
    return SourceRecord(
        role=role,
        path=str(checkpoint.source.path),
        format=checkpoint.format,
        step=checkpoint.step,
        fingerprint=checkpoint.source.fingerprint(),
    )


def site_record(site: AdapterSite, spec: TensorSpec, dtype: str) -> SiteRecord:
    """The record of a site before anything is measured.

    Args:
        site: The site.
        spec: Its kernel before the merge.
        dtype: The name of the kernel's dtype after it.
    """
    scale = site.parameters.scale
    return SiteRecord(
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
        shape=spec.shape,
        source_dtype=spec.dtype.name,
        dtype=dtype,
    )


def with_measurements(
    record: SiteRecord, layers: Mapping[int, Moments], serving_dtype: str, spectrum: Sequence[float], digest: str
) -> SiteRecord:
    """The record with what became of the delta, layer by layer and in all."""
    total = Moments.total(layers.values())
    dtypes = tuple(dict.fromkeys((record.dtype, serving_dtype)))
    return dataclasses.replace(
        record,
        relative_norm=total.relative_norm,
        max_abs=finite(total.max_abs),
        spectrum=tuple(spectrum),
        adapter_digest=digest,
        survival=_survival(total, dtypes),
        layers=tuple(
            LayerRecord(number, layer.relative_norm, finite(layer.max_abs), _survival(layer, dtypes))
            for number, layer in layers.items()
        ),
    )


def with_proofs(records: Sequence[SiteRecord], judged: Sequence[SiteRecord]) -> tuple[SiteRecord, ...]:
    """The records of a merge with the proofs of its judge, both in one order."""
    return tuple(
        dataclasses.replace(
            record,
            proof=other.proof,
            layers=tuple(
                dataclasses.replace(layer, proof=next((o.proof for o in other.layers if o.layer == layer.layer), None))
                for layer in record.layers
            ),
        )
        for record, other in zip(records, judged, strict=True)
    )


def _survival(moments: Moments, dtypes: Sequence[str]) -> tuple[SurvivalRecord, ...]:
    return tuple(SurvivalRecord(**dataclasses.asdict(moments.survival(dtype))) for dtype in dtypes)


def group_records(dialect: Dialect, index: Index, groups: Mapping[KeyPath, Group]) -> tuple[GroupRecord, ...]:
    """What the fine-tune did to which part of the model."""
    cells: dict[tuple[str, str], list[TensorSpec]] = {}
    for path, spec in index.tensors.items():
        cells.setdefault((dialect.part(path), groups[path]), []).append(spec)
    return tuple(
        GroupRecord(
            part,
            status,
            len(specs),
            sum(spec.size for spec in specs),
            sum(spec.nbytes for spec in specs),
        )
        for (part, status), specs in sorted(cells.items())
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
    factors = (DroppedRecord(display(path), "adapter factor, merged into its kernel") for path in plan.factors)
    leaves = (DroppedRecord(display(leaf.path), leaf.reason) for leaf in plan.dropped)
    folders = (DroppedRecord(f"{name} (beside the parameters)", reason) for name, reason in left_out.items())
    return (*factors, *leaves, *folders)


def directory_size(path: Path) -> int:
    """The bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def peak_rss() -> int:
    """The process's largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Of the tool and of what it computes with."""
    installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"lora-merge": __version__, "python": platform.python_version()} | installed
