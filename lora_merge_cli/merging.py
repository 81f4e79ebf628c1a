"""Merge, from paths to an output directory: open, plan, stage, execute, report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge_cli import __version__
from lora_merge_cli.assets import check_assets
from lora_merge_cli.dialects import detect_dialect, dialect_named
from lora_merge_cli.errors import AlreadyMerged, UsageError, VerificationFailed
from lora_merge_cli.formats import format_named, open_checkpoint
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.plan import MergeOptions, MergePlan, plan_merge
from lora_merge_cli.recording import (
    copied_records,
    directory_size,
    dropped_records,
    group_records,
    peak_rss,
    site_record,
    source_record,
    versions,
    with_measurements,
    with_proofs,
)
from lora_merge_cli.records import AdapterSite, first_names
from lora_merge_cli.report import GroupRecord, MergeReport, SiteRecord
from lora_merge_cli.staging import anchored, check_space, check_target, filesystem, staged
from lora_merge_cli.survival import Moments
from lora_merge_cli.verification import Judging, judge, open_result

if TYPE_CHECKING:
    from lora_merge_cli.execute import Execution
    from lora_merge_cli.listening import Listener

PROVENANCE = "lora_merge.json"

_GAIN_WORTH_A_WARNING = 0.98


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, and where to."""

    checkpoint: Path
    """A run, step or item directory with adapters inside."""
    output: Path | None = None
    """The directory to create; only a dry run does without."""
    base: Path | None = None
    """The float32 checkpoint that the fine-tune started from."""
    step: int | None = None
    """Which step of a run; the newest if None."""
    overwrite: bool = False
    """Whether an existing output may be replaced."""
    device: str | None = None
    """The JAX device, for example ``cpu`` or ``cuda:1``; JAX's default if None."""
    options: MergeOptions = field(default_factory=MergeOptions)
    """What to do with what."""
    verify: Judging | None = None
    """How strictly to verify the result before it appears; None not to."""


@dataclass(frozen=True)
class Prepared:
    """A request whose inputs are open and whose plan is made."""

    request: MergeRequest
    checkpoint: Checkpoint
    base: Checkpoint | None
    plan: MergePlan
    inputs: tuple[Path, ...]
    """The directories that must not be written to."""

    def site_record(self, site: AdapterSite) -> SiteRecord:
        """A site before its merge."""
        step = next(step for step in self.plan.steps if step.site is site)
        return site_record(site, step.source, step.output.dtype.name)

    def groups(self) -> tuple[GroupRecord, ...]:
        """What the fine-tune froze and trained."""
        dialect, index = dialect_named(self.plan.dialect), self.checkpoint.source.index()
        return group_records(dialect, index, dialect.grouping(index, self.plan.sites))

    def report(self) -> MergeReport:
        """What would be done."""
        plan, checkpoint = self.plan, self.checkpoint
        sources = [source_record("checkpoint", checkpoint)]
        if self.base is not None:
            sources.append(source_record("base", self.base))
        output = self.request.output
        notes = [*plan.notes, *plan.model.advice]
        if checkpoint.left_out:
            notes.append(f"left out: {', '.join(checkpoint.left_out)}")
        return MergeReport(
            command="merge",
            tool_version=__version__,
            status="planned",
            model=plan.model.name,
            dialect=plan.dialect,
            sources=tuple(sources),
            output=None if output is None else str(output),
            multiplier=plan.multiplier,
            serving_dtype=plan.serving_dtype.name,
            groups=self.groups(),
            sites=tuple(map(self.site_record, plan.sites)),
            copied=copied_records(plan),
            dropped=dropped_records(plan, checkpoint.left_out),
            warnings=_asset_warnings(checkpoint, plan),
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
    checkpoint = open_checkpoint(request.checkpoint, request.step)
    base = None if request.base is None else open_checkpoint(request.base)
    inputs = tuple(
        path
        for opened in (checkpoint, base)
        if opened is not None
        for path in (opened.given, opened.directory, opened.source.path)
    )
    if request.output is not None:
        output = anchored(request.output)
        check_target(output, inputs, overwrite=request.overwrite)
        request = dataclasses.replace(request, output=output)
    dialect = detect_dialect(checkpoint.source.index())
    plan = plan_merge(checkpoint, dialect, request.options, base)
    return Prepared(request, checkpoint, base, plan, inputs)


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
    output = prepared.request.output
    if output is None:
        raise UsageError("an output directory is needed", hint="pass -o OUT")
    checkpoint, base, plan = prepared.checkpoint, prepared.base, prepared.plan
    assets_bytes = 0 if checkpoint.assets is None else directory_size(checkpoint.assets)
    check_space(output, plan.output_bytes + assets_bytes)

    from lora_merge_cli.devices import find_device
    from lora_merge_cli.execute import Execution

    device = find_device(prepared.request.device)
    item = checkpoint.item or plan.model.item
    with staged(output, overwrite=prepared.request.overwrite) as stage:
        sink = format_named(checkpoint.format).sink(stage, checkpoint, item)
        execution = Execution(
            plan,
            checkpoint.source,
            None if base is None else base.source,
            device,
            sink.encodings,
            listener,
        )
        execution.check_factors()
        _refuse_repeat(checkpoint, execution.adapter_digests)
        sink.write(execution.leaves(), plan.constants)
        if checkpoint.assets is not None:
            _copy_assets(checkpoint.assets, stage)
        report = dataclasses.replace(
            prepared.report(),
            status="merged",
            sites=tuple(_measured(prepared.site_record(site), site, execution, plan) for site in plan.sites),
            warnings=(
                *_asset_warnings(checkpoint, plan),
                *_execution_warnings(execution, plan),
            ),
            bytes_on_disk=directory_size(stage),
            seconds=time.monotonic() - started,
            peak_rss_bytes=peak_rss(),
            device=f"{device.device_kind} ({device.platform}:{device.id})",
            versions=versions(),
        )
        _write_provenance(report, stage)
        if prepared.request.verify is not None:
            report = _verified(report, prepared, prepared.request.verify, stage, listener)
            report = dataclasses.replace(report, seconds=time.monotonic() - started, peak_rss_bytes=peak_rss())
            if report.failed:
                raise _rejection(report)
            _write_provenance(report, stage)
        if beside is not None:
            beside(report, stage)
    return report


def _write_provenance(report: MergeReport, stage: Path) -> None:
    with filesystem(stage):
        (stage / PROVENANCE).write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")


def _verified(
    report: MergeReport, prepared: Prepared, judging: Judging, stage: Path, listener: Listener | None
) -> MergeReport:
    """The report with the checks of the staged result."""
    published = str(report.output)
    verdict = judge(open_result(stage), prepared.checkpoint, prepared.base, prepared.request.options, judging, listener)
    return dataclasses.replace(
        report,
        sites=with_proofs(report.sites, verdict.sites),
        checks=tuple(
            dataclasses.replace(
                check,
                message=check.message.replace(str(stage), published),
                where=tuple(key.replace(str(stage), published) for key in check.where),
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


def _measured(record: SiteRecord, site: AdapterSite, execution: Execution, plan: MergePlan) -> SiteRecord:
    return with_measurements(
        record,
        dict(enumerate(execution.moments[site.name])),
        plan.serving_dtype.name,
        execution.spectra[site.name],
        execution.adapter_digests[site.name],
    )


def _refuse_repeat(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Refuse an adapter that the checkpoint's provenance says is in its kernels already."""
    merged = {
        site.get("adapter_digest")
        for document in _parents(checkpoint)
        for site in document.get("sites") or ()
        if isinstance(site, dict)
    }
    again = [name for name, digest in digests.items() if digest in merged]
    if again:
        raise AlreadyMerged(
            "already merged: the same adapter was merged into these kernels before",
            where=f"{checkpoint.provenance} :: {first_names(again, 3)}",
            hint="serve the merged checkpoint, or remove the provenance file if it belongs to another one",
        )


def _copy_assets(assets: Path, stage: Path) -> None:
    with filesystem(assets):
        shutil.copytree(assets, stage / assets.name, ignore_dangling_symlinks=True)


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
    if plan.model.name == "unknown" and checkpoint.assets is None:
        return ()
    return check_assets(checkpoint.assets, quantiles=plan.model.needs_quantiles).problems


def _execution_warnings(execution: Execution, plan: MergePlan) -> Sequence[str]:
    from lora_merge_cli.execute import delta_is_zero

    warnings = [
        f"{name}: {count} non-finite entries in a leaf that no adapter touches"
        for name, count in execution.not_finite.items()
    ]
    warnings += [f"{name}: the delta is exactly zero" for name in delta_is_zero(execution.moments)]
    by_dtype: dict[str, list[float]] = {}
    for layers in execution.moments.values():
        total = Moments.total(layers)
        for dtype in total.realised:
            gain = total.survival(dtype).gain_along_inputs
            if gain is not None:
                by_dtype.setdefault(dtype, []).append(gain)
    stored = {step.output.dtype.name for step in plan.steps if step.site is not None}
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
