"""Inspect a checkpoint: what it is, its adapters and their scales, what the fine-tune did to which part."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_merge_cli.assets import AssetCheck, check_assets
from lora_merge_cli.dialects import (
    DIALECTS,
    AdapterDialect,
    Dialect,
    ScaleOptions,
    adapter_dialects,
    detect_adapter_dialect,
    looks_like_adapter,
)
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import UnknownFormat, UnknownScale, UsageError
from lora_merge_cli.formats import open_adapter, open_checkpoint
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.inputs import AdapterChoice, Inputs, open_inputs, survey_inputs, tree_of
from lora_merge_cli.operations import is_row_operation, operation_named
from lora_merge_cli.recording import group_records
from lora_merge_cli.records import (
    AdapterRow,
    AdapterSite,
    AdapterSummary,
    Array,
    Index,
    KeyPath,
    ModelSummary,
    Survey,
    TensorSpec,
    display,
)
from lora_merge_cli.report import SCHEMA_VERSION, GroupRecord
from lora_merge_cli.survival import GAIN_WORTH_A_WARNING, finite

if TYPE_CHECKING:
    from lora_merge_cli.measurement import SiteStats
    from lora_merge_cli.nearest_sample import NearestGain, Product


@dataclass(frozen=True)
class InspectRequest:
    """What to inspect."""

    checkpoint: Path
    """A run, step or item directory, a model's directory or file, or an adapter alone."""
    adapters: tuple[AdapterChoice, ...] = ()
    """Adapters beside it."""
    step: int | None = None
    """Which step of a run; the newest if None."""
    base: Path | None = None
    """A checkpoint to compare every leaf with."""
    stats: bool = False
    """Whether to read the arrays and measure."""
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    """What is known about alphas."""
    dialect: str | None = None
    """The adapters' dialect; detected if None."""
    residual_base: bool = False
    """Whether the checkpoint is the residual that an adapter's initialisation left of the model."""


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter that lies beside its base, by itself."""

    path: str
    format: str
    dialect: str
    weight: float
    method: str
    base: str | None
    """The base that it names."""
    leaves: int
    parameters: int
    nbytes: int
    rows: tuple[AdapterRow, ...]
    """Every adapted module."""
    riding: tuple[str, ...]
    """What else it brings."""
    matched: int | None
    """How many of its leaves have their place in the base; None without a base."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SiteRow:
    """One site, as it stands in the checkpoint."""

    target: str
    label: str
    group: str
    module: str
    rank: int
    equation: str
    """From the factors' dims to the kernel's; the operation's name where that is no such product."""
    scale: float | None
    scale_source: str
    scale_assumed: bool
    layers: int | None
    """How many layers are stacked; None if none are."""
    dtype: str
    stats: SiteStats | None = None
    adapter: int | None = None
    """Which of the adapters beside the checkpoint it is of, from 0."""
    weight: float = 1.0
    """What that adapter's change is multiplied by."""


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
    adapters: tuple[AdapterRecord, ...] = ()
    """The adapters beside the checkpoint, or the one that was inspected alone."""
    warnings: tuple[str, ...] = ()
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
        UsageError: Options that do not go together.
    """
    alone = None if request.adapters else _adapter_alone(request)
    if alone is not None:
        return _inspect_adapter(request, *alone)
    inputs = open_inputs(
        request.checkpoint,
        request.adapters,
        base=request.base,
        step=request.step,
        dialect=request.dialect,
    )
    checkpoint, dialect = inputs.checkpoint, inputs.dialect
    index = checkpoint.source.index()
    survey = survey_inputs(inputs, request.scales, residual_base=request.residual_base)
    summary = dialect.summary(tree_of(checkpoint))
    groups = dialect.grouping(index, survey.sites)
    unscaled = [site for site in survey.sites if site.parameters.scale.value is None]
    problems = [str(problem) for problem in survey.problems]
    if unscaled:
        from lora_merge_cli.plan import refuse_unscaled

        try:
            refuse_unscaled(inputs, survey.sites)
        except UnknownScale as refusal:
            problems.append(str(refusal))
    notes = [*(note for _, opened in inputs.opened for note in opened.notes), *survey.notes]
    if "frozen" not in groups.values() and survey.sites:
        notes.append("no untouched leaf is in the dtype of frozen ones: frozen and trained look alike")
    if checkpoint.left_out:
        notes.append(f"beside it, not part of a merge: {', '.join(checkpoint.left_out)}")
    adapter_parameters = sum(index.tensors[path].size for path, group in groups.items() if group == "adapter")
    stats = _Stats(inputs, survey) if request.stats else None
    sites = tuple(_site_row(inputs, survey, site, stats) for site in survey.sites)
    adapters = tuple(_adapter_record(inputs, number, survey, request.scales) for number in range(len(inputs.adapters)))
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
        dtypes=_bytes_by_dtype(index),
        adapter_parameters=adapter_parameters + sum(adapter.parameters for adapter in adapters),
        sites=sites,
        groups=group_records(dialect, index, groups, {found.target for found in survey.replacements}),
        problems=tuple(problems),
        notes=tuple(notes),
        assets=_assets(checkpoint, summary),
        advice=_advice(
            dialect,
            request,
            checkpoint,
            bool(survey.sites or survey.replacements),
            bool(survey.problems),
            unscaled,
            summary.advice,
        ),
        base=() if inputs.base is None else _compare(dialect, checkpoint, inputs.base),
        adapters=adapters,
        warnings=(*survey.warnings, *_shrinking(sites, dialect.serving_dtype.name)),
    )


class _Stats:
    """Measures sites; what rounding to nearest would keep is that of all adapters on a kernel together."""

    def __init__(self, inputs: Inputs, survey: Survey) -> None:
        from lora_merge_cli.factors import FactorReader

        self._inputs = inputs
        self._reader = FactorReader(inputs)
        self._together: dict[KeyPath, list[AdapterSite]] = {}
        self._nearest: dict[KeyPath, tuple[NearestGain, ...]] = {}
        for site in survey.sites:
            self._together.setdefault(site.targets[0], []).append(site)

    def of(self, spec: TensorSpec, site: AdapterSite) -> SiteStats | None:
        """What is found of a site and of its kernel; None of what is no low-rank product: its factors say nothing of the delta."""
        from lora_merge_cli.measurement import site_stats
        from lora_merge_cli.nearest_sample import NearestSample, rounded_to

        if is_row_operation(site.operation):
            return None
        target, factors = site.targets[0], self._reader.read(site)
        if target in self._nearest:
            stats = site_stats(self._inputs.checkpoint, spec, site, factors)
            return dataclasses.replace(stats, nearest=self._nearest[target])
        dtypes = rounded_to(spec.dtype, self._inputs.dialect.serving_dtype)
        products = self._products(spec, site, factors) if dtypes else []
        sample = NearestSample(spec.shape, products, dtypes) if products else None
        stats = site_stats(self._inputs.checkpoint, spec, site, factors, sample)
        self._nearest[target] = stats.nearest
        return stats

    def _products(self, spec: TensorSpec, first: AdapterSite, factors_of_first: Mapping[str, Array]) -> list[Product]:
        """All that is added to a kernel; nothing where the factors do not say it."""
        from lora_merge_cli.nearest_sample import Product, axes

        sites = self._together[first.targets[0]]
        # DoRA's delta takes the norms of the whole kernel.
        if any(is_row_operation(site.operation) or operation_named(site.operation).needs_norms for site in sites):
            return []
        found = []
        for site in sites:
            equation, scale = site.parameters.equation, site.parameters.scale.value
            factors = factors_of_first if site is first else self._reader.read(site)
            a, b = factors["lora_a"], factors["lora_b"]
            fits = equation.sizes(a.shape, b.shape, spec.shape) is not None
            finite_factors = all(np.isfinite(values.astype(np.float64)).all() for values in (a, b))
            if scale is None or not (fits and finite_factors) or axes(equation) != axes(sites[0].parameters.equation):
                return []
            found.append(Product(equation, a, b, scale * site.weight))
        return found


def _shrinking(sites: Sequence[SiteRow], serving_dtype: str) -> Iterator[str]:
    """Where rounding to nearest would lose deltas, and what to do about it."""
    kernels = {site.target: site.stats.nearest for site in sites if site.stats is not None}
    for dtype in dict.fromkeys(found.dtype for nearest in kernels.values() for found in nearest):
        gains = [found.gain for nearest in kernels.values() for found in nearest if found.dtype == dtype]
        low = [gain for gain in gains if gain < GAIN_WORTH_A_WARNING]
        if low:
            used = "stored or served" if dtype == serving_dtype else "stored"
            yield (
                f"{used} as {dtype}, rounding to nearest would lose more than 2 % of {len(low)} of {len(gains)} deltas (least gain "
                f"{min(low):.3f}, estimated): merge with --rounding preserve or stochastic, or with --dtype float32 and serve in float32"
            )


def _adapter_alone(request: InspectRequest) -> tuple[Checkpoint, AdapterDialect] | None:
    """The adapter, if that is what the path leads to."""
    try:
        opened = open_checkpoint(request.checkpoint, request.step)
    except UnknownFormat:
        try:
            opened = open_adapter(request.checkpoint)
        except UnknownFormat:
            return None
        return opened, detect_adapter_dialect(tree_of(opened), request.dialect)
    tree = tree_of(opened)
    if any(dialect.matches(tree) for dialect in DIALECTS if dialect.name != "torch"):
        return None
    if not any(dialect.matches(tree) for dialect in adapter_dialects()):
        return None
    return opened, detect_adapter_dialect(tree, request.dialect)


def _inspect_adapter(request: InspectRequest, opened: Checkpoint, dialect: AdapterDialect) -> Inspection:
    if request.base is not None or request.stats:
        raise UsageError(
            "--base and --stats are not for an adapter alone",
            where=opened.source.path,
            hint="give its base, and the adapter after --adapter",
        )
    index = opened.source.index()
    summary = dialect.describe(tree_of(opened), request.scales)
    record = _described(opened, dialect, summary, 1.0, None)
    command = shlex.join(["lora-merge", "merge", summary.base or "BASE", "--adapter", str(request.checkpoint)])
    refused = ("a merge would be refused, see above",)
    return Inspection(
        path=str(opened.source.path),
        format=opened.format,
        dialect=dialect.name,
        model=f"{summary.method} adapter",
        item=None,
        step=None,
        steps=(),
        leaves=len(index.tensors),
        parameters=record.parameters,
        nbytes=index.nbytes,
        dtypes=_bytes_by_dtype(index),
        adapter_parameters=record.parameters,
        sites=(),
        groups=(),
        problems=tuple(map(str, summary.problems)),
        notes=(*opened.notes, *summary.notes),
        assets=AssetCheck((), (), ()),
        advice=refused if summary.problems else (f"{command} -o merged",),
        adapters=(record,),
    )


def _adapter_record(inputs: Inputs, number: int, survey: Survey, scales: ScaleOptions) -> AdapterRecord:
    adapter = inputs.adapters[number]
    summary = adapter.dialect.describe(tree_of(adapter.checkpoint), scales)
    matched = {f.path for site in survey.sites if site.adapter == number for f in site.factors.values()}
    matched |= {found.path for found in survey.replacements if found.adapter == number}
    matched |= {leaf.path for leaf in survey.dropped if leaf.adapter == number}
    return _described(adapter.checkpoint, adapter.dialect, summary, adapter.weight, len(matched))


def _described(
    opened: Checkpoint, dialect: AdapterDialect, summary: AdapterSummary, weight: float, matched: int | None
) -> AdapterRecord:
    index = opened.source.index()
    return AdapterRecord(
        path=str(opened.source.path),
        format=opened.format,
        dialect=dialect.name,
        weight=weight,
        method=summary.method,
        base=summary.base,
        leaves=len(index.tensors),
        parameters=sum(spec.size for spec in index.tensors.values()),
        nbytes=index.nbytes,
        rows=summary.rows,
        riding=summary.riding,
        matched=matched,
        notes=summary.notes,
    )


def _bytes_by_dtype(index: Index) -> tuple[tuple[str, int], ...]:
    by_dtype: Counter[str] = Counter()
    for spec in index.tensors.values():
        by_dtype[spec.dtype.name] += spec.nbytes
    return tuple(by_dtype.most_common())


def _assets(checkpoint: Checkpoint, summary: ModelSummary) -> AssetCheck:
    if summary.item is None and checkpoint.assets is None:
        return AssetCheck((), (), ())
    return check_assets(checkpoint.assets, quantiles=summary.needs_quantiles)


def _advice(
    dialect: Dialect,
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
    words = ["lora-merge", "merge", str(request.checkpoint)]
    for choice in request.adapters:
        words += ["--adapter", str(choice.path) + ("" if choice.weight == 1 else f"@{choice.weight:g}")]
    command = shlex.join([*words, "-o", str(output)])
    if request.step is not None:
        command += f" --step {request.step}"
    if unscaled:
        groups = dict.fromkeys(site.group for site in unscaled if site.group in dialect.groups)
        command += f" --lora-alpha {','.join(f'{group}=ALPHA' for group in groups) or 'ALPHA'}"
    elif request.scales.alpha:
        stated = request.scales.alpha.items()
        command += f" --lora-alpha {','.join(f'{g}={a:g}' if g else f'{a:g}' for g, a in stated)}"
    if request.scales.rslora:
        named = sorted(filter(None, request.scales.rslora))
        command += f" --rslora {','.join(named)}".rstrip()
    if request.base is not None:
        command += f" --base {shlex.quote(str(request.base))}"
    return (command, *serving)


def _site_row(inputs: Inputs, survey: Survey, site: AdapterSite, stats: _Stats | None) -> SiteRow:
    created = {leaf.path: leaf.source for leaf in survey.created}
    target = site.targets[0]
    spec = inputs.checkpoint.source.index().tensors[created.get(target, target)]
    scale = site.parameters.scale
    return SiteRow(
        target=site.name,
        label=site.label,
        group=site.group,
        module=site.module,
        rank=site.parameters.rank,
        equation=site.operation if is_row_operation(site.operation) else str(site.parameters.equation),
        scale=scale.value,
        scale_source=scale.source,
        scale_assumed=scale.assumed,
        layers=spec.shape[0] if site.parameters.equation.stacked else None,
        dtype=spec.dtype.name,
        stats=None if stats is None else stats.of(spec, site),
        adapter=site.adapter,
        weight=site.weight,
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
    from lora_merge_cli.compare import equals_rounded
    from lora_merge_cli.side_by_side import side_by_side

    equal, change_sq, base_sq = True, 0.0, 0.0
    leaves = [(checkpoint.source, spec), (base.source, base.source.index().tensors[partner])]
    for _, (values, reference) in side_by_side(leaves):
        equal = equal and equals_rounded(values, reference)
        if is_float(values.dtype):
            difference = values.astype(np.float32) - reference.astype(np.float32)
            change_sq += float(np.square(difference, dtype=np.float64).sum())
            base_sq += float(np.square(reference.astype(np.float32), dtype=np.float64).sum())
    if equal:
        return BaseRow(spec.name, "frozen", None)
    change = math.sqrt(change_sq / base_sq) if base_sq > 0 else math.nan
    return BaseRow(spec.name, "moved", finite(change))
