"""Merge, from paths to an output directory: open, plan, stage, execute, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from lora_merge_cli import __version__
from lora_merge_cli.assets import check_assets
from lora_merge_cli.errors import AlreadyMerged, UsageError, VerificationFailed
from lora_merge_cli.formats.interface import DEFAULT_SHARD_BYTES, PROVENANCE, Checkpoint, Compression
from lora_merge_cli.inputs import AdapterChoice, Inputs, open_inputs
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.placing import (
    AUTO,
    Placement,
    companions_size,
    config_corrections,
    copy_companions,
    lost_config,
    placement,
)
from lora_merge_cli.plan import MergePlan, Step, plan_merge
from lora_merge_cli.recording import (
    directory_size,
    dropped_records,
    group_records,
    leaf_records,
    peak_rss,
    site_record,
    source_records,
    versions,
    with_measurements,
    with_proofs,
)
from lora_merge_cli.records import AdapterSite, KeyPath, first_names
from lora_merge_cli.report import GroupRecord, MergeReport, SiteRecord
from lora_merge_cli.staging import anchored, check_space, check_target, filesystem, staged
from lora_merge_cli.survival import Moments
from lora_merge_cli.verification import Judging, judge, open_result

if TYPE_CHECKING:
    from lora_merge_cli.execute import Execution
    from lora_merge_cli.listening import Listener

_GAIN_WORTH_A_WARNING = 0.98


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, and where to."""

    checkpoint: Path
    """A run, step or item directory with adapters inside, or the base of the adapters beside it."""
    output: Path | None = None
    """What to create: a file if it ends in .safetensors or .pth, else a directory. Only a dry run does without."""
    adapters: tuple[AdapterChoice, ...] = ()
    """The adapters beside the checkpoint."""
    base: Path | None = None
    """The float32 checkpoint that a fine-tune with adapters inside started from."""
    step: int | None = None
    """Which step of a run; the newest if None."""
    dialect: str | None = None
    """The adapters' dialect; detected if None."""
    to: str = AUTO
    """The format to write: ``auto`` keeps that of the checkpoint."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    """The largest size of one file of arrays."""
    overwrite: bool = False
    """Whether an existing output may be replaced."""
    device: str | None = None
    """The JAX device, for example ``cpu`` or ``cuda:1``; JAX's default if None."""
    compression: Compression = "none"
    """How to keep the leaves that change, where the format can compress."""
    jobs: int | None = None
    """How many leaves are read, and how many blocks computed, at a time; see `jobs.jobs_or_default`. Changes no bit."""
    options: MergeOptions = field(default_factory=MergeOptions)
    """What to do with what."""
    verify: Judging | None = None
    """How strictly to verify the result before it appears; None not to."""


@dataclass(frozen=True)
class Prepared:
    """A request whose inputs are open and whose plan is made."""

    request: MergeRequest
    inputs: Inputs
    placement: Placement
    plan: MergePlan

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """What must not be written to."""
        return self.inputs.paths

    @functools.cached_property
    def _targets(self) -> Mapping[KeyPath, Step]:
        return {step.output.path: step for step in self.plan.steps}

    def site_record(self, site: AdapterSite) -> SiteRecord:
        """A site before its merge."""
        step = self._targets[site.targets[0]]
        return site_record(site, step.source, step.output.dtype.name)

    def groups(self) -> tuple[GroupRecord, ...]:
        """What the fine-tune froze and trained."""
        dialect, index = self.inputs.dialect, self.inputs.checkpoint.source.index()
        replaced = {found.target for found in self.plan.replacements}
        return group_records(dialect, index, dialect.grouping(index, self.plan.sites), replaced)

    def warnings(self) -> tuple[str, ...]:
        """What is known before anything is computed, and should make a reader stop."""
        checkpoint, plan = self.inputs.checkpoint, self.plan
        return (
            *plan.warnings,
            *lost_config(checkpoint, plan, is_file=self.placement.is_file),
            *_asset_warnings(checkpoint, plan),
        )

    def report(self) -> MergeReport:
        """What would be done."""
        plan, checkpoint = self.plan, self.inputs.checkpoint
        output = self.request.output
        notes = [*plan.notes, *plan.model.advice]
        notes += [f"config.json: {key} becomes {value}" for key, value in config_corrections(checkpoint, plan).items()]
        if checkpoint.left_out:
            notes.append(f"left out: {', '.join(checkpoint.left_out)}")
        if self.placement.is_file and (checkpoint.companions or checkpoint.assets):
            notes.append("the output is one file: what stands beside the arrays of the checkpoint is not copied")
        return MergeReport(
            command="merge",
            tool_version=__version__,
            status="planned",
            model=plan.model.name,
            dialect=plan.dialect,
            sources=source_records(self.inputs),
            output=None if output is None else str(output),
            output_format=self.placement.format.name,
            multiplier=plan.multiplier,
            serving_dtype=plan.serving_dtype.name,
            groups=self.groups(),
            sites=tuple(map(self.site_record, plan.sites)),
            copied=leaf_records(plan),
            dropped=dropped_records(self.inputs, plan),
            warnings=self.warnings(),
            notes=tuple(notes),
            output_bytes=plan.output_bytes,
            peak_bytes_planned=plan.peak_bytes,
            parents=_parents(checkpoint),
        )


def prepare(request: MergeRequest) -> Prepared:
    """Open the inputs and plan the merge; reads no arrays and writes nothing.

    Raises:
        InputError: An input is missing, unreadable or of unknown format.
        Refused: The merge would be wrong or pointless.
        OutputExists: The output exists and may not be replaced.
    """
    inputs = open_inputs(
        request.checkpoint, request.adapters, base=request.base, step=request.step, dialect=request.dialect
    )
    place = placement(request.output, request.to, inputs.checkpoint, request.max_shard_bytes, request.compression)
    jobs_or_default(request.jobs)
    if request.output is not None:
        output = anchored(request.output)
        for path in [output, provenance_path(output)] if place.is_file else [output]:
            check_target(path, inputs.paths, overwrite=request.overwrite)
        request = dataclasses.replace(request, output=output)
    return Prepared(request, inputs, place, plan_merge(inputs, request.options))


def merge(
    request: MergeRequest | Prepared,
    listener: Listener | None = None,
    beside: Callable[[MergeReport, Path], None] | None = None,
) -> MergeReport:
    """Merge the adapters of a checkpoint into its kernels and write a dense checkpoint.

    The output appears complete or not at all, and no input is ever changed.

    Args:
        request: What to merge; prepared or not.
        listener: Who to tell of progress.
        beside: Called with the finished report and the staged directory before that is published; if it raises, nothing is.

    Raises:
        VerificationFailed: A check failed; its `report` has them all.
        LoraMergeError: One subclass per way to fail; see `lora_merge_cli.errors`.
    """
    started = time.monotonic()
    prepared = request if isinstance(request, Prepared) else prepare(request)
    request = prepared.request
    output = request.output
    if output is None:
        raise UsageError("an output is needed", hint="pass -o OUT")
    inputs, plan, place = prepared.inputs, prepared.plan, prepared.placement
    checkpoint = inputs.checkpoint
    check_space(output, plan.output_bytes + (0 if place.is_file else companions_size(checkpoint)))

    from lora_merge_cli.devices import find_device
    from lora_merge_cli.execute import Execution

    device = find_device(request.device)
    names = (output.name, provenance_path(output).name) if place.is_file else None
    # Products of factors on the host are small: threads inside each would only wait for one another.
    blas = threadpool_limits(1, user_api="blas")
    with blas, staged(output, overwrite=request.overwrite, files=names) as stage:
        destination = place.destination(stage, output, checkpoint, plan)
        sink = place.format.sink(destination, checkpoint)
        execution = Execution(plan, inputs, device, sink.encodings, request.jobs, listener)
        execution.check()
        _refuse_repeat(checkpoint, plan, execution.factors.digests)
        # Closed on any error: what reads ahead must not outlive the merge.
        with contextlib.closing(execution.leaves()) as leaves:
            sink.write([step.output for step in plan.steps], leaves, plan.constants)
        if not place.is_file:
            copy_companions(checkpoint, plan, stage)
        report = dataclasses.replace(
            prepared.report(),
            status="merged",
            sites=tuple(_measured(prepared, execution)),
            warnings=(*prepared.warnings(), *_execution_warnings(execution, plan)),
            bytes_on_disk=directory_size(stage),
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss(),
            device=f"{device.device_kind} ({device.platform}:{device.id})",
            versions=versions(),
        )
        result = place.staged(stage, output)
        provenance = provenance_path(result) if place.is_file else stage / PROVENANCE
        _write_provenance(report, provenance)
        if request.verify is not None:
            report = _verified(report, prepared, request.verify, result, listener)
            report = dataclasses.replace(report, seconds=time.monotonic() - started, peak_rss_bytes=peak_rss())
            if report.failed:
                raise _rejection(report)
            _write_provenance(report, provenance)
        if beside is not None:
            beside(report, stage)
    return report


def provenance_path(file: Path) -> Path:
    """The provenance of an output that is one file: it stands beside it."""
    return file.with_name(f"{file.name}.{PROVENANCE}")


def _write_provenance(report: MergeReport, path: Path) -> None:
    with filesystem(path):
        path.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")


def _verified(
    report: MergeReport, prepared: Prepared, judging: Judging, result: Path, listener: Listener | None
) -> MergeReport:
    """The report with the checks of the staged result."""
    published = str(report.output)
    verdict = judge(open_result(result), prepared.inputs, prepared.request.options, judging, listener)
    return dataclasses.replace(
        report,
        sites=with_proofs(report.sites, verdict.sites),
        checks=tuple(
            dataclasses.replace(
                check,
                message=check.message.replace(str(result), published),
                where=tuple(key.replace(str(result), published) for key in check.where),
            )
            for check in verdict.checks
        ),
        notes=(*report.notes, *verdict.sampled),
    )


def _rejection(report: MergeReport) -> VerificationFailed:
    failed = report.failed
    error = VerificationFailed(
        f"the merged checkpoint failed {len(failed)} checks, and was not published",
        where=report.output,
        found="; ".join(f"{check.id}: {check.message}" for check in failed),
    )
    error.report = dataclasses.replace(report, status="rejected")
    return error


def _measured(prepared: Prepared, execution: Execution) -> Iterator[SiteRecord]:
    for number, site in enumerate(prepared.plan.sites):
        yield with_measurements(
            prepared.site_record(site),
            dict(enumerate(execution.moments[site.targets[0]])),
            prepared.plan.serving_dtype.name,
            execution.factors.spectra[number],
            execution.factors.digests[number],
        )


def _refuse_repeat(checkpoint: Checkpoint, plan: MergePlan, digests: Sequence[str]) -> None:
    """Refuse an adapter that the checkpoint's provenance says is in its kernels already."""
    merged: defaultdict[tuple[str, str], float] = defaultdict(float)
    for document in _parents(checkpoint):
        for site in document.get("sites") or ():
            if isinstance(site, dict):
                key = str(site.get("target")), str(site.get("adapter_digest"))
                merged[key] += _weight(site.get("weight", 1.0)) * _weight(document.get("multiplier", 1.0))
    # What takes a part of it out again is no repetition.
    again = [
        site.name
        for site, digest in zip(plan.sites, digests, strict=True)
        if site.weight * plan.multiplier * merged[site.name, digest] > 0
    ]
    if again:
        raise AlreadyMerged(
            "already merged: the same adapter was merged into these kernels before",
            where=f"{checkpoint.provenance} :: {first_names(again, 3)}",
            hint="serve the merged checkpoint, merge the base once at the weight wanted, or remove the provenance file if it belongs "
            "to another one",
        )


def _weight(value: Any) -> float:
    """A weight that a provenance states; 1 for what is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 1.0


def _parents(checkpoint: Checkpoint) -> tuple[dict[str, Any], ...]:
    """The provenance of what is merged into: a chain, so that merging a merged checkpoint forgets nothing."""
    if checkpoint.provenance is None:
        return ()
    try:
        document = json.loads(checkpoint.provenance.read_text(), parse_constant=lambda _: None)
        older = tuple(entry for entry in document.pop("parents", ()) if isinstance(entry, dict))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return ({"unreadable": str(checkpoint.provenance)},)
    return (document, *older)


def _asset_warnings(checkpoint: Checkpoint, plan: MergePlan) -> tuple[str, ...]:
    if plan.model.item is None and checkpoint.assets is None:
        return ()
    return check_assets(checkpoint.assets, quantiles=plan.model.needs_quantiles).problems


def _execution_warnings(execution: Execution, plan: MergePlan) -> Sequence[str]:
    from lora_merge_cli.execute import delta_is_zero

    warnings = [
        f"{name}: {count} non-finite entries in a leaf that no adapter touches"
        for name, count in execution.not_finite.items()
    ]
    zero = delta_is_zero(execution.moments)
    if zero:
        warnings.append(f"{len(zero)} of {len(execution.moments)} deltas are exactly zero: {first_names(zero, 3)}")
    by_dtype: dict[str, list[float]] = {}
    for layers in execution.moments.values():
        total = Moments.total(layers)
        for dtype in total.realised:
            gain = total.survival(dtype).gain_along_inputs
            if gain is not None:
                by_dtype.setdefault(dtype, []).append(gain)
    stored = {step.output.dtype.name for step in plan.steps if step.sites}
    for dtype, gains in by_dtype.items():
        low = [gain for gain in gains if gain < _GAIN_WORTH_A_WARNING]
        if low:
            where = "stored" if dtype in stored else "served"
            advice = "store float32 with --dtype float32" if where == "stored" else "serve in float32"
            warnings.append(
                f"{where} as {dtype}, {len(low)} of {len(gains)} deltas lose more than 2 % "
                f"(least gain along the adapter's inputs {min(low):.3f}): {advice}"
            )
    return warnings
