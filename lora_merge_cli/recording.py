"""From what was planned, measured and found to the records of a report."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import resource
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_merge_cli import __version__
from lora_merge_cli.combining import Combining
from lora_merge_cli.dialects import Dialect, Group
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.joining.method import Joining
from lora_merge_cli.mixing import Mixing
from lora_merge_cli.records import AdapterSite, Index, KeyPath, TensorSpec, display
from lora_merge_cli.report import (
    CombiningRecord,
    DroppedRecord,
    GroupRecord,
    JoiningRecord,
    LayerRecord,
    LeafRecord,
    MixedRecord,
    MixingRecord,
    OverrideRecord,
    PartRecord,
    RoundedRecord,
    RoundingRecord,
    SiteRecord,
    SourceRecord,
    SurvivalRecord,
)
from lora_merge_cli.rounding import NEAREST, LeafRounding, Rounding
from lora_merge_cli.survival import Moments, Realised, finite

if TYPE_CHECKING:
    from lora_merge_cli.plan import MergePlan, Step

_PACKAGES = ("jax", "numpy", "ml_dtypes", "tensorstore")


def source_records(inputs: Inputs) -> tuple[SourceRecord, ...]:
    """The records of all that a merge reads."""
    weights = iter([*(part.weight for part in inputs.joined), *(part.weight for part in inputs.adapters)])
    return tuple(
        source_record(role, opened, next(weights) if role in ("adapter", "tuned") else None)
        for role, opened in inputs.opened
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


def site_record(
    site: AdapterSite,
    spec: TensorSpec,
    dtype: str,
    alphas: tuple[float, ...] = (1.0,),
    rounding: LeafRounding = NEAREST,
) -> SiteRecord:
    """The record of a site before anything is measured.

    Args:
        site: The site.
        spec: Its kernel before the merge.
        dtype: The name of the kernel's dtype after it.
        alphas: How much of the change an interpolation takes, see `LeafChange.alphas`.
        rounding: How the kernel is rounded.
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
        alphas=alphas,
        rounding=rounding.method,
    )


def with_measurements(
    record: SiteRecord,
    layers: Mapping[int, Moments],
    serving_dtype: str,
    rounding: LeafRounding,
    spectrum: Sequence[float],
    digest: str,
) -> SiteRecord:
    """The record with what became of the delta, layer by layer and in all; where alpha is 0 there is none to measure.

    Args:
        record: The site before.
        layers: The sums of each stacked layer.
        serving_dtype: The name of the dtype that servers cast to.
        rounding: How the kernel is rounded.
        spectrum: Singular values of its product of factors.
        digest: That of its factors.
    """
    total = Moments.total(layers.values())
    dtypes = tuple(dict.fromkeys((record.dtype, serving_dtype)))
    if not total.entries:
        return dataclasses.replace(record, spectrum=tuple(spectrum), adapter_digest=digest)
    return dataclasses.replace(
        record,
        relative_norm=total.relative_norm,
        max_abs=finite(total.max_abs),
        spectrum=tuple(spectrum),
        adapter_digest=digest,
        survival=_survival(total, dtypes),
        nearest=_to_nearest(total, rounding),
        worth_from=None if rounding.grid is None else total.break_even(rounding.grid.name),
        moved=_moved(total, record.dtype, rounding),
        layers=tuple(
            LayerRecord(
                number,
                layer.relative_norm,
                finite(layer.max_abs),
                _survival(layer, dtypes),
                _to_nearest(layer, rounding),
            )
            for number, layer in layers.items()
            if layer.entries
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


def mixing_record(mixing: Mixing) -> MixingRecord:
    """The record of an interpolation's rules."""
    schedule = mixing.schedule
    return MixingRecord(
        alpha=mixing.alpha,
        overrides=tuple(OverrideRecord(found.glob, found.alpha) for found in mixing.overrides),
        schedule=None if schedule is None else (schedule.first, schedule.last),
        only_common=mixing.only_common,
        deltas_only=mixing.deltas_only,
    )


def combining_record(combining: Combining) -> CombiningRecord | None:
    """The record of how several adapters become one change; None for the sum of their deltas.

    Args:
        combining: What `Combining.of` makes of the user's choice.
    """
    if combining.is_sum:
        return None
    return CombiningRecord(
        method=combining.method,
        density=combining.density,
        seed=combining.seed if combining.draws else None,
        svd_rank=combining.svd_rank,
        majority_sign=combining.majority_sign if combining.elects else None,
    )


def joining_record(joining: Joining | None) -> JoiningRecord | None:
    """The record of how several fine-tunes become one; None where there is one."""
    if joining is None:
        return None
    return JoiningRecord(
        method=joining.method,
        weights=joining.effective,
        density=joining.density,
        seed=joining.seed if joining.draws else None,
        sequential=joining.sequential,
    )


def joining_notes(joining: Joining | None) -> Sequence[str]:
    """How several fine-tunes become one, in words."""
    if joining is None:
        return []
    said = [f"weights {', '.join(f'{weight:g}' for weight in joining.effective)}"]
    said += [f"density {joining.density:g}"] if joining.density is not None else []
    said += [f"seed {joining.seed}"] if joining.draws else []
    said += ["each from the one before it"] if joining.sequential else []
    count = len(joining.weights)
    return [f"{count} fine-tune{'s'[: count - 1]} joined by {joining.method}: {'; '.join(said)}"]


def with_departure(record: CombiningRecord | None, departures: Mapping[str, float]) -> CombiningRecord | None:
    """The record with the largest of some departures, by kernel."""
    known = {name: off for name, off in departures.items() if math.isfinite(off)}
    if record is None or not known:
        return record
    worst = max(known, key=lambda name: known[name])
    return dataclasses.replace(record, departure=known[worst], departure_of=worst)


def rounding_record(asked: Rounding, leaves: Iterable[tuple[LeafRounding, np.dtype[Any]]]) -> RoundingRecord | None:
    """The record of how results are rounded; None for all to nearest.

    Args:
        asked: What the user asks for.
        leaves: What each leaf that changes gets, and what it is stored in.
    """
    if asked.method == "nearest":
        return None
    given = list(leaves)
    counts = Counter((rounding.method, rounding.reason) for rounding, _ in given)
    is_wide = any(rounding.grid not in (None, stored) for rounding, stored in given)
    return RoundingRecord(
        method=asked.method,
        mu=asked.mu if asked.method == "preserve" else None,
        seed=asked.seed if asked.method == "stochastic" else None,
        serving_values=asked.serving_values if is_wide else None,
        leaves=tuple(RoundedRecord(method, count, reason) for (method, reason), count in counts.items()),
    )


def rounding_notes(record: RoundingRecord | None, serving_dtype: str) -> Sequence[str]:
    """What who reads a wide file as it is should know, in words."""
    if record is None or record.serving_values is None:
        return []
    sees = {
        "cell": "the exact result, but for entries that were moved for their sake (`moved` counts them)",
        "widened": f"what {serving_dtype} holds, and no more",
    }
    return [
        f"leaves that are stored wider than {serving_dtype} are made for servers that cast them: who reads the file as it is sees "
        + sees[record.serving_values]
    ]


def departure_note(record: CombiningRecord | None) -> Sequence[str]:
    """How far a combination is from the weighted sum of the deltas, in words."""
    if record is None or record.departure is None:
        return []
    return [
        f"--combine {record.method}: the change of a kernel is up to {100 * record.departure:.3g} % off the weighted sum of the "
        f"adapters' deltas ({record.departure_of})"
    ]


def combining_notes(combining: Combining) -> Sequence[str]:
    """What a reader should know of a combination that is not the sum of the deltas; see `combining_record`."""
    if combining.crosses:
        return [
            f"--combine {combining.method} combines lora_A and lora_B each by itself, as PEFT does: their product has cross terms, one "
            "adapter's B times another's A, and is not the sum of the adapters' changes (--combine sum)"
        ]
    if combining.is_svd:
        return [
            f"--combine {combining.method} truncates what the adapters make of a kernel together to rank {combining.svd_rank}, "
            "as PEFT does: what is beyond is lost (--combine sum loses nothing)"
        ]
    return []


def mixed_records(plan: MergePlan, dialect: Dialect, moments: Mapping[KeyPath, Moments]) -> tuple[MixedRecord, ...]:
    """The leaves without a site that are interpolated, with what was measured of them."""
    return tuple(
        _mixed_record(step, dialect.part(step.output.path), plan.serving_dtype.name, moments.get(step.output.path))
        for step in plan.steps
        if step.is_mixture
    )


def _mixed_record(step: Step, part: str, serving_dtype: str, moments: Moments | None) -> MixedRecord:
    rounding = step.rounding
    name, dtype = step.output.name, step.output.dtype.name
    record = MixedRecord(name, part, step.alphas, dtype, step.output.size, rounding=rounding.method)
    if moments is None:
        return record
    dtypes = tuple(dict.fromkeys((record.dtype, serving_dtype)))
    return dataclasses.replace(
        record,
        relative_norm=moments.relative_norm,
        survival=_survival(moments, dtypes),
        nearest=_to_nearest(moments, rounding),
        moved=_moved(moments, dtype, rounding),
    )


def part_records(plan: MergePlan, dialect: Dialect, moments: Mapping[KeyPath, Moments]) -> tuple[PartRecord, ...]:
    """What an interpolation did to each part of the model.

    Args:
        plan: What was done.
        dialect: Who knows the parts.
        moments: Of each leaf that could move; those with figures that are not finite are left out.
    """
    parts: dict[str, list[tuple[Step, Moments]]] = {}
    for step in plan.steps:
        if step.mixed and step.output.path in moments and moments[step.output.path].is_finite:
            parts.setdefault(dialect.part(step.output.path), []).append((step, moments[step.output.path]))
    return tuple(_part_record(part, leaves, plan.serving_dtype.name) for part, leaves in sorted(parts.items()))


def _part_record(part: str, leaves: Sequence[tuple[Step, Moments]], serving_dtype: str) -> PartRecord:
    alphas = [alpha for step, _ in leaves for alpha in step.alphas]
    wanted_sq = sum(moments.delta_sq for _, moments in leaves)
    stored = [moments.realised_of(step.output.dtype.name) for step, moments in leaves]
    served = [moments.realised_of(serving_dtype) for _, moments in leaves]
    distance_sq = sum(moments.realised_sq(step.output.dtype.name) for step, moments in leaves)

    def gain(sums: Sequence[Realised]) -> float | None:
        return finite(sum(each.q_dot_d for each in sums) / wanted_sq) if wanted_sq > 0 else None

    return PartRecord(
        part=part,
        leaves=len(leaves),
        parameters=sum(step.output.size for step, _ in leaves),
        alphas=(min(alphas), max(alphas)),
        base_norm=math.sqrt(sum(moments.kernel_sq for _, moments in leaves)),
        wanted=math.sqrt(wanted_sq),
        distance=math.sqrt(distance_sq),
        gain_stored=gain(stored),
        gain_served=gain(served),
    )


def plan_digest(inputs: Inputs, plan: MergePlan, output_format: str) -> str:
    """A digest of all that decides the output's values: two runs with one digest write the same arrays."""
    how = (plan.multiplier, plan.combining, inputs.joining, plan.rounding, plan.serving_dtype.name)
    digest = hashlib.sha256(f"{__version__} {output_format} {how!r}".encode())
    if inputs.joined:
        # The fine-tunes' own adapters, with their scales, are in no step of the plan.
        digest.update(inputs.checkpoint.source.fingerprint().encode())
    for role, opened in inputs.opened:
        digest.update(f"{role} {opened.source.fingerprint()}".encode())
        for file in _files_of(opened):
            # A file that was trained on has the size of the one before; only when it was written tells the two apart.
            found = file.stat()
            digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}".encode())
    for step in plan.steps:
        sites = [(site.adapter, site.weight, site.operation, site.parameters) for site in step.sites]
        brought = [(found.adapter, found.weight, found.path, found.rows) for found in step.replacements]
        said = (step.output.path, step.output.shape, step.output.dtype.name, step.origin, step.alphas, sites, brought)
        digest.update(repr(said).encode())
    return digest.hexdigest()


def _files_of(checkpoint: Checkpoint) -> list[Path]:
    """Every file that a checkpoint consists of, or that stands beside its arrays."""
    arrays = checkpoint.source.path
    folders = {arrays, checkpoint.directory, *([checkpoint.assets] if checkpoint.assets is not None else [])}
    found = {file for folder in folders if folder.is_dir() for file in folder.rglob("*") if file.is_file()}
    return sorted(found | ({arrays} if arrays.is_file() else set()))


def _survival(moments: Moments, dtypes: Sequence[str]) -> tuple[SurvivalRecord, ...]:
    return tuple(SurvivalRecord(**dataclasses.asdict(moments.survival(dtype))) for dtype in dtypes)


def _to_nearest(moments: Moments, rounding: LeafRounding) -> SurvivalRecord | None:
    survival = None if rounding.grid is None else moments.survival_to_nearest(rounding.grid.name)
    return None if survival is None else SurvivalRecord(**dataclasses.asdict(survival))


def _moved(moments: Moments, dtype: str, rounding: LeafRounding) -> float | None:
    if rounding.grid is None or rounding.grid.name == dtype or not moments.entries:
        return None
    return moments.moved / moments.entries


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
        if not step.sites and not step.is_mixture
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


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files below a directory."""
    return path.stat().st_size if path.is_file() else directory_size(path)


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
