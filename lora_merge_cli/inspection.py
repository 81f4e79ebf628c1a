"""Inspect a checkpoint: what it is, its adapters and their scales, what the fine-tune did to which part."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli.assets import AssetCheck, check_assets
from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dialects import Dialect, ScaleOptions, detect_dialect, looks_like_adapter
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.formats import open_checkpoint
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.measurement import SiteStats, chunk_regions, site_stats
from lora_merge_cli.recording import group_records
from lora_merge_cli.records import (
    AdapterSite,
    Index,
    KeyPath,
    TensorSpec,
    display,
)
from lora_merge_cli.report import SCHEMA_VERSION, GroupRecord
from lora_merge_cli.survival import finite


@dataclass(frozen=True)
class InspectRequest:
    """What to inspect."""

    checkpoint: Path
    """A run, step or item directory."""
    step: int | None = None
    """Which step of a run; the newest if None."""
    base: Path | None = None
    """A checkpoint to compare every leaf with."""
    stats: bool = False
    """Whether to read the arrays and measure."""
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    """What is known about alphas."""


@dataclass(frozen=True)
class SiteRow:
    """One site, as it stands in the checkpoint."""

    target: str
    label: str
    group: str
    module: str
    rank: int
    equation: str
    scale: float | None
    scale_source: str
    scale_assumed: bool
    layers: int | None
    """How many layers are stacked; None if none are."""
    dtype: str
    stats: SiteStats | None = None


@dataclass(frozen=True)
class BaseRow:
    """One leaf beside the base's."""

    path: str
    status: str
    """``frozen`` (equals the base, rounded to its dtype), ``moved``, ``adapter``, ``new``, ``reshaped`` or ``missing``
    (in the base only)."""
    relative_change: float | None
    """``|leaf - base| / |base|``, Frobenius, for moved leaves."""


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    path: str
    format: str
    dialect: str
    model: str
    item: str | None
    step: int | None
    steps: tuple[int, ...]
    leaves: int
    parameters: int
    nbytes: int
    dtypes: tuple[tuple[str, int], ...]
    """Bytes per dtype."""
    adapter_parameters: int
    sites: tuple[SiteRow, ...]
    groups: tuple[GroupRecord, ...]
    problems: tuple[str, ...]
    """Why a merge would be refused."""
    notes: tuple[str, ...]
    assets: AssetCheck
    advice: tuple[str, ...]
    """What to do next."""
    base: tuple[BaseRow, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able values."""
        document = dataclasses.asdict(self)
        document["dtypes"] = dict(self.dtypes)
        return {"schema_version": document.pop("schema_version"), **document}


def inspect(request: InspectRequest) -> Inspection:
    """Inspect a checkpoint; reads metadata only unless `stats` or `base` is given.

    Raises:
        InputError: The checkpoint, or the base, is missing, unreadable or of unknown format.
    """
    checkpoint = open_checkpoint(request.checkpoint, request.step)
    index = checkpoint.source.index()
    dialect = detect_dialect(index)
    survey = dialect.survey(index, request.scales, str(checkpoint.source.path))
    summary = dialect.summary(index)
    groups = dialect.grouping(index, survey.sites)
    unscaled = [site for site in survey.sites if site.parameters.scale.value is None]
    problems = [str(problem) for problem in survey.problems]
    if unscaled:
        problems.append(str(dialect.unknown_scale(unscaled, str(checkpoint.source.path))))
    by_dtype: Counter[str] = Counter()
    for spec in index.tensors.values():
        by_dtype[spec.dtype.name] += spec.nbytes
    notes = [*checkpoint.notes, *survey.notes]
    if "frozen" not in groups.values() and survey.sites:
        notes.append("no untouched leaf is in the dtype of frozen ones: frozen and trained look alike")
    if checkpoint.left_out:
        notes.append(f"beside it, not part of a merge: {', '.join(checkpoint.left_out)}")
    base = None if request.base is None else open_checkpoint(request.base)
    return Inspection(
        path=str(checkpoint.source.path),
        format=checkpoint.format,
        dialect=dialect.name,
        model=summary.name,
        item=checkpoint.item,
        step=checkpoint.step,
        steps=checkpoint.steps,
        leaves=len(index.tensors),
        parameters=sum(spec.size for spec in index.tensors.values()),
        nbytes=index.nbytes,
        dtypes=tuple(by_dtype.most_common()),
        adapter_parameters=sum(index.tensors[path].size for path, group in groups.items() if group == "adapter"),
        sites=tuple(_site_row(checkpoint, index, site, request.stats) for site in survey.sites),
        groups=group_records(dialect, index, groups),
        problems=tuple(problems),
        notes=tuple(notes),
        assets=check_assets(checkpoint.assets, quantiles=summary.needs_quantiles),
        advice=_advice(request, checkpoint, bool(survey.sites), bool(survey.problems), unscaled, summary.advice),
        base=() if base is None else _compare(dialect, checkpoint, base),
    )


def _advice(
    request: InspectRequest,
    checkpoint: Checkpoint,
    has_sites: bool,
    refused: bool,
    unscaled: list[AdapterSite],
    serving: tuple[str, ...],
) -> tuple[str, ...]:
    if refused:
        return ("a merge would be refused, see above",)
    if not has_sites:
        merged = "it was merged before" if checkpoint.provenance else "nothing to merge"
        return (f"no adapters: {merged}; serve it as it is",)
    output = Path("merged") / checkpoint.directory.name
    command = shlex.join(["lora-merge", "merge", str(request.checkpoint), "-o", str(output)])
    if request.step is not None:
        command += f" --step {request.step}"
    if unscaled:
        groups = dict.fromkeys(site.group for site in unscaled)
        command += f" --lora-alpha {','.join(f'{group}=ALPHA' for group in groups)}"
    elif request.scales.alpha:
        stated = request.scales.alpha.items()
        command += f" --lora-alpha {','.join(f'{g}={a:g}' if g else f'{a:g}' for g, a in stated)}"
    if request.scales.rslora:
        named = sorted(filter(None, request.scales.rslora))
        command += f" --rslora {','.join(named)}".rstrip()
    if request.base is not None:
        command += f" --base {shlex.quote(str(request.base))}"
    return (command, *serving)


def _site_row(checkpoint: Checkpoint, index: Index, site: AdapterSite, stats: bool) -> SiteRow:
    spec = index.tensors[site.targets[0]]
    scale = site.parameters.scale
    return SiteRow(
        target=site.name,
        label=site.label,
        group=site.group,
        module=site.module,
        rank=site.parameters.rank,
        equation=str(site.parameters.equation),
        scale=scale.value,
        scale_source=scale.source,
        scale_assumed=scale.assumed,
        layers=spec.shape[0] if site.parameters.equation.stacked else None,
        dtype=spec.dtype.name,
        stats=site_stats(checkpoint, site) if stats else None,
    )


def _compare(dialect: Dialect, checkpoint: Checkpoint, base: Checkpoint) -> tuple[BaseRow, ...]:
    index = checkpoint.source.index()
    other = {dialect.canonical(path): spec for path, spec in base.source.index().tensors.items()}
    rows = []
    for path, spec in index.tensors.items():
        partner = other.pop(dialect.canonical(path), None)
        if partner is None:
            rows.append(BaseRow(spec.name, "adapter" if looks_like_adapter(path) else "new", None))
        elif partner.shape != spec.shape:
            rows.append(BaseRow(spec.name, "reshaped", None))
        else:
            rows.append(_compare_leaf(checkpoint, base, spec, partner.path))
    rows += [BaseRow(display(path), "missing", None) for path in other]
    return tuple(rows)


def _compare_leaf(checkpoint: Checkpoint, base: Checkpoint, spec: TensorSpec, partner: KeyPath) -> BaseRow:
    equal, change_sq, base_sq = True, 0.0, 0.0
    for region in chunk_regions(checkpoint, spec):
        values = checkpoint.source.read(spec.path, region)
        reference = base.source.read(partner, region)
        equal = equal and equals_rounded(values, reference)
        if is_float(values.dtype):
            difference = values.astype(np.float32) - reference.astype(np.float32)
            change_sq += float(np.square(difference, dtype=np.float64).sum())
            base_sq += float(np.square(reference.astype(np.float32), dtype=np.float64).sum())
    if equal:
        return BaseRow(spec.name, "frozen", None)
    change = math.sqrt(change_sq / base_sq) if base_sq > 0 else math.nan
    return BaseRow(spec.name, "moved", finite(change))
