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
from lora_merge_cli.dialects import Dialect, ScaleOptions, detect_dialect, looks_like_adapter
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.equation import Equation
from lora_merge_cli.formats import open_checkpoint
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.records import (
    AdapterSite,
    Array,
    Index,
    KeyPath,
    Region,
    TensorSpec,
    display,
    full_region,
    grid,
)
from lora_merge_cli.report import SCHEMA_VERSION
from lora_merge_cli.survival import finite

_BLOCK_BYTES = 64 * 2**20


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
class SiteStats:
    """Measured from the factors and the kernel; the delta is never formed."""

    relative_norm: float | None
    """``|delta| / |kernel|``, Frobenius; None where the scale is unknown or the kernel is zero."""
    relative_norm_worst: float | None
    """The largest over the stacked layers."""
    effective_rank: float
    """Mean over layers and heads of exp(entropy of the normalised singular values) (Roy and Vetterli, 2007)."""
    non_finite: int
    """NaN or Inf in the factors and the kernel."""


@dataclass(frozen=True)
class SiteRow:
    """One site, as it stands in the checkpoint."""

    target: str
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
class GroupRow:
    """The leaves of one part of the model that the fine-tune treated alike."""

    part: str
    status: str
    leaves: int
    parameters: int
    nbytes: int


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
    groups: tuple[GroupRow, ...]
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
        groups=_group_rows(dialect, index, groups),
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


def _group_rows(dialect: Dialect, index: Index, groups: Any) -> tuple[GroupRow, ...]:
    cells: dict[tuple[str, str], list[TensorSpec]] = {}
    for path, spec in index.tensors.items():
        cells.setdefault((dialect.part(path), groups[path]), []).append(spec)
    return tuple(
        GroupRow(
            part,
            status,
            len(specs),
            sum(spec.size for spec in specs),
            sum(spec.nbytes for spec in specs),
        )
        for (part, status), specs in sorted(cells.items())
    )


def _site_row(checkpoint: Checkpoint, index: Index, site: AdapterSite, stats: bool) -> SiteRow:
    spec = index.tensors[site.targets[0]]
    scale = site.parameters.scale
    return SiteRow(
        target=site.name,
        group=site.group,
        module=site.module,
        rank=site.parameters.rank,
        equation=str(site.parameters.equation),
        scale=scale.value,
        scale_source=scale.source,
        scale_assumed=scale.assumed,
        layers=spec.shape[0] if site.parameters.equation.target.startswith("l") else None,
        dtype=spec.dtype.name,
        stats=_site_stats(checkpoint, index, site) if stats else None,
    )


def _site_stats(checkpoint: Checkpoint, index: Index, site: AdapterSite) -> SiteStats:
    equation = site.parameters.equation
    spec = index.tensors[site.targets[0]]
    a, b = (
        checkpoint.source.read(path, full_region(index.tensors[path].shape)).astype(np.float64)
        for path in (site.factors["lora_a"], site.factors["lora_b"])
    )
    bad = int(np.sum(~np.isfinite(a))) + int(np.sum(~np.isfinite(b)))
    stacked = equation.target.startswith("l")
    kernel_sq = np.zeros(spec.shape[0] if stacked else 1)
    for region in _regions(checkpoint, spec):
        values = checkpoint.source.read(spec.path, region).astype(np.float32)
        bad += int(np.sum(~np.isfinite(values)))
        squares = np.square(values, dtype=np.float64)
        if stacked:
            kernel_sq[region[0]] += squares.reshape(squares.shape[0], -1).sum(axis=1)
        else:
            kernel_sq += squares.sum()
    if bad:
        return SiteStats(None, None, 0.0, bad)
    singular = delta_singular_values(equation, a, b)
    delta_sq = np.square(singular).sum(axis=-1)
    per_layer = delta_sq.reshape(len(kernel_sq), -1).sum(axis=1)
    scale = site.parameters.scale.value
    ratios = None
    if scale is not None and np.all(kernel_sq > 0):
        ratios = abs(scale) * np.sqrt(per_layer / kernel_sq)
    total = None if ratios is None or scale is None else float(abs(scale) * np.sqrt(per_layer.sum() / kernel_sq.sum()))
    return SiteStats(
        relative_norm=total,
        relative_norm_worst=None if ratios is None else float(ratios.max()),
        effective_rank=_effective_rank(singular),
        non_finite=0,
    )


def delta_singular_values(equation: Equation, a: Array, b: Array) -> Array:
    """Singular values of the unscaled delta, per index of the batch dims, from the factors alone.

    With QR factors ``A = Q_a R_a`` and ``B^T = Q_b R_b`` the delta is ``Q_a (R_a R_b^T) Q_b^T``, whose singular values are those of
    the small matrix in the middle.

    Args:
        equation: Which dims are batch, inputs, rank and outputs.
        a: lora_a, float64.
        b: lora_b, float64.

    Returns:
        float64, dims batch (flattened) and rank, descending.
    """
    summed = tuple(equation.b.index(dim) for dim in equation.summed)
    b = b.sum(axis=summed)
    b_dims = [dim for dim in equation.b if dim not in equation.summed]
    left = _matrices(a, list(equation.a), equation.batch, equation.inputs, equation.rank)
    right = _matrices(b, b_dims, equation.batch, equation.outputs, equation.rank)
    middle = np.linalg.qr(left, mode="r") @ np.swapaxes(np.linalg.qr(right, mode="r"), -1, -2)
    return np.linalg.svd(middle, compute_uv=False)


def _matrices(values: Array, dims: list[str], batch: str, rows: str, rank: str) -> Array:
    order = [dims.index(dim) for dim in (*batch, *(d for d in dims if d in rows), rank)]
    moved = np.transpose(values, order)
    lead = int(np.prod(moved.shape[: len(batch)]))
    return moved.reshape(lead, -1, moved.shape[-1])


def _effective_rank(singular: Array) -> float:
    total = singular.sum(axis=-1, keepdims=True)
    used = singular[total[:, 0] > 0]
    if not len(used):
        return 0.0
    share = used / used.sum(axis=-1, keepdims=True)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1)
    return float(np.exp(entropy).mean())


def _regions(checkpoint: Checkpoint, spec: TensorSpec) -> list[Region]:
    """Whole chunks, several at a time along the first axis where they are small."""
    chunk = [max(1, n) for n in checkpoint.source.chunk(spec.path)]
    block = list(chunk)
    for axis in reversed(range(len(block))):
        size = int(np.prod(block)) * spec.dtype.itemsize
        room = max(1, _BLOCK_BYTES // max(1, size))
        block[axis] = min(max(1, spec.shape[axis]), block[axis] * room)
        if block[axis] < spec.shape[axis]:
            break
    return list(grid(full_region(spec.shape), block))


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
    for region in _regions(checkpoint, spec):
        values = checkpoint.source.read(spec.path, region)
        reference = base.source.read(partner, region)
        with np.errstate(over="ignore"):
            rounded = reference.astype(values.dtype)
        equal = equal and np.array_equal(rounded.reshape(-1).view(np.uint8), values.reshape(-1).view(np.uint8))
        if is_float(values.dtype):
            difference = values.astype(np.float32) - reference.astype(np.float32)
            change_sq += float(np.square(difference, dtype=np.float64).sum())
            base_sq += float(np.square(reference.astype(np.float32), dtype=np.float64).sum())
    if equal:
        return BaseRow(spec.name, "frozen", None)
    change = math.sqrt(change_sq / base_sq) if base_sq > 0 else math.nan
    return BaseRow(spec.name, "moved", finite(change))
