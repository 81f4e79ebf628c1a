"""Write one output, or several at different alphas from one reading: stage, execute, measure, verify, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from lora_merge_cli.devices import find_device
from lora_merge_cli.errors import AlreadyMerged, LoraMergeError, VerificationFailed
from lora_merge_cli.execute import Execution, Outcome, delta_is_zero
from lora_merge_cli.fan_out import FanOut, Writer
from lora_merge_cli.formats.interface import PROVENANCE, LeafData
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.operations import is_row_operation
from lora_merge_cli.placing import companions_size, copy_companions
from lora_merge_cli.plan import Step
from lora_merge_cli.prepared import Prepared, parents_of, provenance_path
from lora_merge_cli.recording import (
    departure_note,
    directory_size,
    mixed_records,
    part_records,
    peak_rss,
    versions,
    with_departure,
    with_measurements,
    with_proofs,
)
from lora_merge_cli.records import display, first_names
from lora_merge_cli.report import InterpolateReport, MergeReport, OutputReport, SiteRecord
from lora_merge_cli.rounding import GRIDS
from lora_merge_cli.staging import check_space, filesystem, staged
from lora_merge_cli.survival import GAIN_WORTH_A_WARNING, Moments
from lora_merge_cli.verification import Judging, judge, open_result


def produce(
    outputs: Sequence[Prepared],
    listener: Listener | None = None,
    beside: Callable[[MergeReport | InterpolateReport, Path], None] | None = None,
) -> list[MergeReport | InterpolateReport | LoraMergeError]:
    """Write outputs of one checkpoint that differ in nothing but their alphas and places; the inputs are read once.

    Each output appears complete or not at all.

    Args:
        outputs: What to write. All are of the same inputs, and all have an output.
        listener: Who to tell of progress.
        beside: Called with each finished report and its staged directory before that is published; if it raises, it is not.

    Returns:
        A report per output, or why it failed where the others could go on.

    Raises:
        LoraMergeError: None can be made; see `lora_merge_cli.errors`.
    """
    run = _Run(outputs, listener or Silent(), beside)
    # Products of factors on the host are small: threads inside each would only wait for one another.
    with threadpool_limits(1, user_api="blas"):
        return run.all()


class _Run:
    """One call of `produce`."""

    def __init__(
        self,
        outputs: Sequence[Prepared],
        listener: Listener,
        beside: Callable[[MergeReport | InterpolateReport, Path], None] | None,
    ) -> None:
        self._started = time.monotonic()
        self._outputs, self._listener, self._beside = outputs, listener, beside
        first = outputs[0]
        self._inputs, self._place = first.inputs, first.placement
        self._targets = [_target(prepared) for prepared in outputs]
        self._device = find_device(first.request.device)
        self._fan = FanOut(len(outputs))
        destination = self._place.destination(Path(), self._targets[0], self._inputs.checkpoint, first.plan)
        self._execution = Execution(
            [prepared.plan for prepared in outputs],
            self._inputs,
            self._device,
            self._place.format.sink(destination, self._inputs.checkpoint).encodings,
            first.request.jobs,
            listener,
            lambda number: self._fan.alive[number],
        )
        self._judging = threading.Lock()

    def all(self) -> list[MergeReport | InterpolateReport | LoraMergeError]:
        """Write every output."""
        checkpoint = self._inputs.checkpoint
        companions = 0 if self._place.is_file else companions_size(checkpoint)
        check_space(self._targets[0], sum(prepared.plan.output_bytes + companions for prepared in self._outputs))
        self._execution.check()
        for prepared in self._outputs:
            _refuse_repeat(prepared, self._execution.factors.digests)
        # Seen here, before the first writer makes them: the last one that fails would otherwise leave them behind.
        missing = [folder for folder in self._targets[0].parents if not folder.exists()]
        try:
            return self._fan.run(self._execution.leaves(), list(map(self._writer, range(len(self._outputs)))))
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _writer(self, number: int) -> Writer[MergeReport | InterpolateReport]:
        """What writes one output, from its first leaf to its place."""
        prepared, target = self._outputs[number], self._targets[number]
        names = (target.name, provenance_path(target).name) if self._place.is_file else None

        def write(leaves: Iterator[LeafData]) -> MergeReport | InterpolateReport:
            with staged(target, overwrite=prepared.request.overwrite, files=names) as stage:
                destination = self._place.destination(stage, target, self._inputs.checkpoint, prepared.plan)
                sink = self._place.format.sink(destination, self._inputs.checkpoint)
                sink.write([step.output for step in prepared.plan.steps], leaves, prepared.plan.constants)
                return self._finished(number, stage)

        return write

    def _finished(self, number: int, stage: Path) -> MergeReport | InterpolateReport:
        """Write what stands beside the arrays, and verify them if that is asked for."""
        prepared, target = self._outputs[number], self._targets[number]
        if not self._place.is_file:
            copy_companions(self._inputs.checkpoint, prepared.plan, stage)
        report = self._timed(self._measured_report(number, stage))
        result = self._place.staged(stage, target)
        provenance = provenance_path(result) if self._place.is_file else stage / PROVENANCE
        _write_provenance(report, provenance)
        if prepared.request.verify is not None:
            # One at a time: each takes all processors, and its share of memory.
            with self._judging:
                report = self._timed(self._verified(report, prepared, prepared.request.verify, result))
            if report.failed:
                raise _rejection(report)
            _write_provenance(report, provenance)
        if self._beside is not None:
            self._beside(report, stage)
        return report

    def _timed(self, report: MergeReport | InterpolateReport) -> MergeReport | InterpolateReport:
        return dataclasses.replace(report, seconds=time.monotonic() - self._started, peak_rss_bytes=peak_rss())

    def _measured_report(self, number: int, stage: Path) -> MergeReport | InterpolateReport:
        """The report of an output whose arrays are written."""
        prepared, outcome, device = self._outputs[number], self._execution.outcomes[number], self._device
        report = prepared.report()
        said: dict[str, Any] = {
            "sites": tuple(self._measured_sites(prepared, outcome)),
            "warnings": (*prepared.warnings(), *_warnings(prepared, outcome)),
            "bytes_on_disk": directory_size(stage),
            "device": f"{device.device_kind} ({device.platform}:{device.id})",
            "versions": versions(),
        }
        if isinstance(report, MergeReport):
            combined = with_departure(report.combining, self._execution.departures)
            notes = (*report.notes, *departure_note(combined))
            return dataclasses.replace(report, status="merged", combining=combined, notes=notes, **said)
        dialect = self._inputs.dialect
        return dataclasses.replace(
            report,
            status="interpolated",
            mixed=mixed_records(prepared.plan, dialect, outcome.mixed),
            parts=part_records(
                prepared.plan,
                dialect,
                {path: Moments.total(each) for path, each in outcome.moments.items()} | outcome.mixed,
            ),
            **said,
        )

    def _measured_sites(self, prepared: Prepared, outcome: Outcome) -> Iterator[SiteRecord]:
        factors = self._execution.factors
        for number, site in enumerate(prepared.plan.sites):
            yield with_measurements(
                prepared.site_record(site),
                dict(enumerate(outcome.moments[site.targets[0]])),
                prepared.plan.serving_dtype.name,
                prepared.step_of(site).rounding,
                factors.spectra[number],
                factors.digests[number],
            )

    def _verified(
        self, report: MergeReport | InterpolateReport, prepared: Prepared, judging: Judging, result: Path
    ) -> MergeReport | InterpolateReport:
        """The report with the checks of the staged result."""
        published = str(report.output)
        listener = _Cancellable(self._listener, self._fan)
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


class _Cancellable:
    """A listener that ends the work of a thread that nobody waits for."""

    def __init__(self, listener: Listener, fan: FanOut) -> None:
        self._listener, self._fan = listener, fan

    def start(self, total_bytes: int) -> None:
        """See `Listener.start`."""
        self._listener.start(total_bytes)

    def advance(self, name: str, done_bytes: int) -> None:
        """See `Listener.advance`."""
        if self._fan.cancelled:
            raise LoraMergeError("given up, since the run ends")
        self._listener.advance(name, done_bytes)


def _target(prepared: Prepared) -> Path:
    assert prepared.request.output is not None, "what is produced has a place"
    return prepared.request.output


def _write_provenance(report: OutputReport, path: Path) -> None:
    with filesystem(path):
        path.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")


def _rejection(report: MergeReport | InterpolateReport) -> VerificationFailed:
    failed = report.failed
    error = VerificationFailed(
        f"the result failed {len(failed)} checks, and was not published",
        where=report.output,
        found="; ".join(f"{check.id}: {check.message}" for check in failed),
    )
    error.report = dataclasses.replace(report, status="rejected")
    return error


def _refuse_repeat(prepared: Prepared, digests: Sequence[str]) -> None:
    """Refuse an adapter that the checkpoint's provenance says is in its kernels already."""
    plan, checkpoint = prepared.plan, prepared.inputs.checkpoint
    merged: defaultdict[tuple[str, str], float] = defaultdict(float)
    for document in parents_of(checkpoint):
        for site in document.get("sites") or ():
            if isinstance(site, dict):
                key = str(site.get("target")), str(site.get("adapter_digest"))
                weight = _weight(site.get("weight", 1.0)) * _weight(document.get("multiplier", 1.0))
                merged[key] += weight * _largest_alpha(site.get("alphas"))
    # What takes a part of it out again is no repetition.
    again = [
        site.name
        for site, digest in zip(plan.sites, digests, strict=True)
        if site.weight * plan.multiplier * max(prepared.step_of(site).alphas) * merged[site.name, digest] > 0
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


def _largest_alpha(value: Any) -> float:
    """The largest alpha of a site that a provenance states; 1 where it states none."""
    return max(map(_weight, value)) if isinstance(value, list) and value else 1.0


def _warnings(prepared: Prepared, outcome: Outcome) -> Sequence[str]:
    """What was found on the way, and should make a reader stop."""
    warnings = [
        f"{name}: {count} non-finite entries in a leaf that no adapter touches"
        for name, count in outcome.not_finite.items()
    ]
    warnings += [
        f"{display(path)}: NaN or Inf on one side only; it is left out of the figures"
        for path, found in outcome.mixed.items()
        if not found.is_finite
    ]
    steps = {step.output.path: step for step in prepared.plan.steps if step.sites}
    moments = {path: layers for path, layers in outcome.moments.items() if any(steps[path].alphas)}
    zero = delta_is_zero(moments)
    if zero:
        warnings.append(f"{len(zero)} of {len(moments)} deltas are exactly zero: {first_names(zero, 3)}")
    by_dtype: dict[str, list[tuple[float, Step]]] = {}
    for path, layers in moments.items():
        total = Moments.total(layers)
        for dtype in total.realised:
            gain = total.survival(dtype).gain_along_inputs
            if gain is not None:
                by_dtype.setdefault(dtype, []).append((gain, steps[path]))
    stored = {step.output.dtype.name for step in steps.values()}
    method = prepared.plan.rounding.method
    others = "preserve" if method == "stochastic" else "preserve or stochastic"
    for dtype, gains in by_dtype.items():
        low = [(gain, step) for gain, step in gains if gain < GAIN_WORTH_A_WARNING]
        if not low:
            continue
        if dtype in stored:
            where, remedy = "stored", "store float32 with --dtype float32"
            preserving = f"--rounding {others}"
        else:
            where, remedy = "served", "serve in float32"
            preserving = f"--rounding {others} --serving-dtype {dtype}"
            if all(step.output.dtype.itemsize < 4 for _, step in low):
                preserving = f"--dtype float32 {preserving}"
        chosen = sum(step.rounding.grid is not None and step.rounding.grid.name == dtype for _, step in low)
        still = f"; --rounding {method} was used for {chosen} of them" if chosen else ""
        # Not where it was used, nor where there is nothing that it could preserve.
        mends = (
            method != "preserve"
            and dtype in GRIDS
            and any(not is_row_operation(site.operation) for _, step in low for site in step.sites)
        )
        warnings.append(
            f"{where} as {dtype}, {len(low)} of {len(gains)} deltas lose more than 2 % (least gain along the adapter's inputs "
            f"{min(gain for gain, _ in low):.3f}{still}): {f'merge with {preserving}, or ' if mends else ''}{remedy}"
        )
    return warnings
