"""Interpolate between a base and a fine-tune (Wise-FT, arXiv:2109.01903): at one alpha, or at several from one reading."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge_cli import __version__
from lora_merge_cli.errors import LoraMergeError, OutputExists, SomeFailed, UsageError
from lora_merge_cli.formats.interface import DEFAULT_SHARD_BYTES, PROVENANCE, Compression
from lora_merge_cli.inputs import AdapterChoice, Inputs, open_inputs
from lora_merge_cli.merging import prepare_opened
from lora_merge_cli.mixing import Mixing
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.placing import AUTO, placement
from lora_merge_cli.prepared import MergeRequest, Prepared
from lora_merge_cli.recording import peak_rss, versions
from lora_merge_cli.report import (
    InterpolateReport,
    MergeReport,
    OutputReport,
    PointRecord,
    SweepReport,
)
from lora_merge_cli.resuming import finished, refuse_unverified
from lora_merge_cli.staging import anchored
from lora_merge_cli.verification import Judging

if TYPE_CHECKING:
    from lora_merge_cli.fine_tunes import JoinRequest
    from lora_merge_cli.listening import Listener

_AT_A_TIME = 16  # outputs that one reading of the inputs is for: each takes its buffers, and threads of its own


@dataclass(frozen=True)
class InterpolateRequest:
    """What to interpolate between, and where to."""

    base: Path
    """The base: of one fine-tune or several, or of the adapters beside it. With `Mixing.deltas_only` the fine-tune itself."""
    tuned: Path | None = None
    """The fine-tune: a run, step or item directory with adapters inside, or a dense checkpoint."""
    output: Path | None = None
    """What to create: at one alpha as `MergeRequest.output`, else a directory of outputs. Only a dry run does without."""
    alphas: tuple[float, ...] = (1.0,)
    """0 is the base, 1 the fine-tune. Several write ``alpha-<value>`` below the output, one each."""
    mixing: Mixing = field(default_factory=lambda: Mixing(1.0))
    """All other rules; each of `alphas` takes the place of its own."""
    adapters: tuple[AdapterChoice, ...] = ()
    """The adapters beside the base."""
    several: JoinRequest | None = None
    """Instead of one fine-tune several, which are joined into one first."""
    step: int | None = None
    """Which step of a run; the newest if None."""
    dialect: str | None = None
    """The adapters' dialect; detected if None."""
    to: str = AUTO
    """The format to write: ``auto`` keeps that of the fine-tune, or of the base of adapters."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    """The largest size of one file of arrays."""
    overwrite: bool = False
    """Whether existing outputs may be replaced."""
    resume: bool = False
    """Whether to keep outputs that an earlier run of the same request finished."""
    device: str | None = None
    """The JAX device; see `MergeRequest.device`."""
    compression: Compression = "none"
    """How to keep the leaves that change, where the format can compress."""
    jobs: int | None = None
    """How many leaves are read, and how many blocks computed, at a time; see `jobs.jobs_or_default`. Changes no bit."""
    options: MergeOptions = field(default_factory=MergeOptions)
    """What to do with what; its `mixing` is made from the above."""
    verify: Judging | None = None
    """How strictly to verify each result before it appears; None not to."""


@dataclass(frozen=True)
class Point:
    """One output."""

    alpha: float
    """Its alpha."""
    prepared: Prepared
    """How it is made."""
    kept: InterpolateReport | None = None
    """What an earlier run that finished it reported."""


@dataclass(frozen=True)
class PreparedInterpolation:
    """A request whose inputs are open and whose outputs are planned."""

    request: InterpolateRequest
    inputs: Inputs
    points: tuple[Point, ...]
    """In the order of the request's alphas."""

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """What must not be written to."""
        return self.inputs.paths

    @property
    def output(self) -> Path | None:
        """What will be created, or the directory of all that will be."""
        return self.points[0].prepared.request.output if self.is_single else _anchored(self.request.output)

    @property
    def is_single(self) -> bool:
        """Whether there is one output, at the requested path itself."""
        return len(self.request.alphas) == 1

    def report(self) -> InterpolateReport | SweepReport:
        """What would be done."""
        if self.is_single:
            return _interpolation(self.points[0].prepared.report())
        points = (_point(point, "planned" if point.kept is None else "kept", point.kept) for point in self.points)
        return self.sweep_report("planned", points)

    def sweep_report(self, status: str, points: Iterable[PointRecord]) -> SweepReport:
        """The report of several outputs."""
        first = _interpolation(self.points[0].prepared.report())
        said: Any = status
        return SweepReport(
            status=said,
            tool_version=__version__,
            sources=first.sources,
            model=first.model,
            dialect=first.dialect,
            serving_dtype=first.serving_dtype,
            output=None if self.output is None else str(self.output),
            mixing=first.mixing,
            joining=first.joining,
            rounding=first.rounding,
            points=tuple(sorted(points, key=lambda point: point.alpha)),
            warnings=first.warnings,
            notes=(*first.notes, *_unmixed_note(first)),
            versions=versions(),
        )


def prepare_interpolation(request: InterpolateRequest) -> PreparedInterpolation:
    """Open the inputs and plan every output; reads no arrays and writes nothing.

    Raises:
        UsageError: The request contradicts itself.
        InputError: An input is missing, unreadable or of unknown format.
        Refused: The result would be wrong or pointless.
        OutputExists: An output exists and may not be replaced.
    """
    _check(request)
    inputs = _open(request)
    place = placement(request.output, request.to, inputs.checkpoint, request.max_shard_bytes, request.compression)
    if place.is_file and len(request.alphas) > 1:
        raise UsageError(
            "several alphas, and an output that is one file", where=request.output, hint="name a directory"
        )
    return PreparedInterpolation(request, inputs, tuple(_prepared_point(request, inputs, a) for a in request.alphas))


def _open(request: InterpolateRequest) -> Inputs:
    if request.several is not None:
        from lora_merge_cli.joined_inputs import open_joined

        return open_joined(
            request.base,
            request.several,
            step=request.step,
            dialect=request.dialect,
            options=request.options,
            device=request.device,
        )
    return open_inputs(
        request.base if request.tuned is None else request.tuned,
        request.adapters,
        base=None if request.tuned is None else request.base,
        step=request.step,
        dialect=request.dialect,
    )


def interpolate(
    request: InterpolateRequest | PreparedInterpolation,
    listener: Listener | None = None,
    beside: Callable[[MergeReport | InterpolateReport, Path], None] | None = None,
) -> InterpolateReport | SweepReport:
    """Write ``(1 - alpha) * W_base + alpha * W_tuned``, once, or for each of several alphas from one reading of the inputs.

    Each output appears complete or not at all, and no input is ever changed.

    Args:
        request: What to interpolate between; prepared or not.
        listener: Who to tell of progress.
        beside: Called with a finished report and the staged directory before that is published; if it raises, nothing is. For a
            single output alone.

    Raises:
        SomeFailed: Some of several outputs could not be made; its `report` says which, and the others are there.
        VerificationFailed: A check of a single output failed; its `report` has them all.
        LoraMergeError: One subclass per way to fail; see `lora_merge_cli.errors`.
    """
    from lora_merge_cli.producing import produce

    started = time.monotonic()
    prepared = request if isinstance(request, PreparedInterpolation) else prepare_interpolation(request)
    if prepared.request.output is None:
        raise UsageError("an output is needed", hint="pass -o OUT")
    if prepared.is_single:
        (point,) = prepared.points
        if point.kept is not None:
            refuse_unverified(point.prepared, point.kept, listener)
            return point.kept
        (done,) = produce([point.prepared], listener, beside)
        if isinstance(done, LoraMergeError):
            raise done
        return _interpolation(done)
    points = [_kept(point, point.kept, listener) for point in prepared.points if point.kept is not None]
    waiting = [point for point in prepared.points if point.kept is None]
    for first in range(0, len(waiting), _AT_A_TIME):
        batch = waiting[first : first + _AT_A_TIME]
        try:
            results = produce([point.prepared for point in batch], listener)
        except LoraMergeError as error:
            # What earlier ones wrote is there, and is to be said.
            if not points:
                raise
            results = [error] * len(batch)
        points += [_outcome(point, result) for point, result in zip(batch, results, strict=True)]
    failed = [point for point in points if point.status == "failed"]
    report = dataclasses.replace(
        prepared.sweep_report("incomplete" if failed else "complete", points),
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss(),
    )
    if failed:
        refusal = SomeFailed(
            f"{len(failed)} of {len(points)} outputs failed",
            where=prepared.output,
            found="; ".join(f"alpha {alpha_name(point.alpha)}: {point.error}" for point in failed[:3]),
            hint="the others are there; --resume keeps them" if len(failed) < len(points) else None,
        )
        refusal.report = report
        raise refusal
    return report


def _kept(point: Point, report: InterpolateReport, listener: Listener | None) -> PointRecord:
    """An output that is there already, verified again if that is asked for."""
    try:
        refuse_unverified(point.prepared, report, listener)
    except LoraMergeError as error:
        return _outcome(point, error)
    return _point(point, "kept", report)


def alpha_name(alpha: float) -> str:
    """An alpha as it is called in paths: ``0.25``, ``1``."""
    return repr(alpha).removesuffix(".0")


def _check(request: InterpolateRequest) -> None:
    if not request.alphas:
        raise UsageError("no alpha", hint="pass --alpha 0.5, or a range as in --alpha 0:1:0.25")
    if len(set(request.alphas)) < len(request.alphas):
        raise UsageError("one alpha twice", found=", ".join(map(alpha_name, request.alphas)))
    tuned = request.tuned is not None or request.several is not None
    if request.tuned is not None and request.several is not None:
        raise UsageError("one fine-tune, and several", hint="give one of the two")
    if tuned and request.adapters:
        raise UsageError("a fine-tune and adapters", hint="give TUNED, or --adapter, and not both")
    if request.mixing.deltas_only and (tuned or request.adapters):
        raise UsageError("--deltas-only is for a fine-tune without its base", hint="leave it out")
    if request.overwrite and request.resume:
        raise UsageError("--resume keeps what --overwrite replaces", hint="pass one of them")
    output = _anchored(request.output)
    if len(request.alphas) == 1 or output is None:
        return
    if os.path.lexists(output) and not output.is_dir():
        raise OutputExists(
            "the directory for several outputs is something else", where=output, hint="choose another -o"
        )
    if (output / PROVENANCE).exists():
        raise OutputExists(
            "the directory for several outputs is a checkpoint itself", where=output, hint="choose another -o"
        )


def _prepared_point(request: InterpolateRequest, inputs: Inputs, alpha: float) -> Point:
    output = request.output
    if output is not None and len(request.alphas) > 1:
        output = output / f"alpha-{alpha_name(alpha)}"
    mixing = dataclasses.replace(request.mixing, alpha=alpha)
    merge = MergeRequest(
        checkpoint=inputs.checkpoint.given,
        output=output,
        adapters=request.adapters,
        base=None if inputs.base is None else request.base,
        step=request.step,
        dialect=request.dialect,
        to=request.to,
        max_shard_bytes=request.max_shard_bytes,
        overwrite=request.overwrite,
        device=request.device,
        compression=request.compression,
        jobs=request.jobs,
        options=dataclasses.replace(request.options, mixing=mixing),
        verify=request.verify,
    )
    if request.resume and output is not None and output.exists():
        # What is there is not to be replaced, whatever it is.
        prepared = prepare_opened(dataclasses.replace(merge, overwrite=True), inputs)
        return Point(alpha, prepared, finished(prepared, _interpolation(prepared.report()), output))
    return Point(alpha, prepare_opened(merge, inputs))


def _outcome(point: Point, result: OutputReport | LoraMergeError) -> PointRecord:
    if isinstance(result, LoraMergeError):
        return dataclasses.replace(_point(point, "failed", None), error=str(result))
    return _point(point, "written", _interpolation(result))


def _point(point: Point, status: Any, report: InterpolateReport | None) -> PointRecord:
    record = PointRecord(point.alpha, str(point.prepared.request.output or ""), status)
    if report is None:
        return record
    return dataclasses.replace(
        record,
        parts=report.parts,
        least_gain_stored=min(_gains(report, 0), default=None),
        least_gain_served=min(_gains(report, -1), default=None),
        bytes_on_disk=report.bytes_on_disk,
    )


def _gains(report: InterpolateReport, which: int) -> Iterator[float]:
    """The gains along the adapters' inputs of all sites: in the stored dtype, which comes first, or in the serving one."""
    for site in report.sites:
        if site.survival and (gain := site.survival[which].gain_along_inputs) is not None:
            yield gain


def _unmixed_note(report: InterpolateReport) -> Sequence[str]:
    count = len(report.not_interpolated)
    return [f"{count} leaves are the fine-tune's own at every alpha: they have no base"] if count else []


def _interpolation(report: OutputReport) -> InterpolateReport:
    assert isinstance(report, InterpolateReport), "a plan with alphas is an interpolation's"
    return report


def _anchored(path: Path | None) -> Path | None:
    return None if path is None else anchored(path)
