"""From what was planned, measured and found to the records of a report."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge_cli import __version__
from lora_merge_cli.dialects import Dialect, Group
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.inputs import Inputs
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

if TYPE_CHECKING:
    from lora_merge_cli.plan import MergePlan, Step

_PACKAGES = ("jax", "numpy", "ml_dtypes", "tensorstore")


def source_records(inputs: Inputs) -> tuple[SourceRecord, ...]:
    """The records of all that a merge reads."""
    weights = iter(adapter.weight for adapter in inputs.adapters)
    return tuple(
        source_record(role, opened, next(weights) if role == "adapter" else None) for role, opened in inputs.opened
    )


def source_record(role: str, checkpoint: Checkpoint, weight: float | None = None) -> SourceRecord:
    """The record of one input."""
    return SourceRecord(
        role=role,
        path=str(checkpoint.source.path),
        format=checkpoint.format,
        step=checkpoint.step,
        fingerprint=checkpoint.source.fingerprint(),
        weight=weight,
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
        adapter=site.adapter,
        weight=site.weight,
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


def group_records(
    dialect: Dialect, index: Index, groups: Mapping[KeyPath, Group], replaced: Collection[KeyPath] = ()
) -> tuple[GroupRecord, ...]:
    """What the fine-tune did to which part of the model; what an adapter replaces it trained."""
    cells: dict[tuple[str, str], list[TensorSpec]] = {}
    for path, spec in index.tensors.items():
        status: Group = "trained" if path in replaced and groups[path] == "frozen" else groups[path]
        cells.setdefault((dialect.part(path), status), []).append(spec)
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


def leaf_records(plan: MergePlan) -> tuple[LeafRecord, ...]:
    """The leaves that no delta is added to."""
    created = {leaf.path: leaf.reason for leaf in plan.created}

    def reasons(step: Step) -> str | None:
        found = [replacement.reason for replacement in step.replacements]
        return ", ".join(dict.fromkeys([*found, *filter(None, [created.get(step.output.path)])])) or None

    return tuple(
        LeafRecord(step.output.name, step.origin, step.output.dtype.name, step.output.nbytes, reasons(step))
        for step in plan.steps
        if not step.sites
    )


def dropped_records(inputs: Inputs, plan: MergePlan) -> tuple[DroppedRecord, ...]:
    """The factors that were merged, the leaves that were dropped, and the folders that were left out."""

    def name(adapter: int | None, path: KeyPath) -> str:
        return display(path) if adapter is None else f"{inputs.source(adapter).path} :: {display(path)}"

    factors = (DroppedRecord(name(*key), "adapter factor, merged into its kernel") for key in plan.factors)
    leaves = (DroppedRecord(name(leaf.adapter, leaf.path), leaf.reason) for leaf in plan.dropped)
    left_out = inputs.checkpoint.left_out.items()
    folders = (DroppedRecord(f"{entry} (beside the parameters)", reason) for entry, reason in left_out)
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
    import importlib.metadata
    import platform

    installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"lora-merge": __version__, "python": platform.python_version()} | installed
