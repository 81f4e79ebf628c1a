"""Verify, from paths to a report: open, say what is expected, examine, check."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from lora_merge_cli import __version__
from lora_merge_cli.errors import CorruptCheckpoint, InputError, InputNotFound, Refused, UsageError
from lora_merge_cli.fine_tunes import JoinRequest, joint_inputs, open_fine_tunes
from lora_merge_cli.formats import open_checkpoint
from lora_merge_cli.formats.interface import Checkpoint, Source
from lora_merge_cli.inputs import AdapterChoice, FineTune, Inputs, open_inputs, survey_inputs, tree_of
from lora_merge_cli.listening import Listener
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.recording import (
    group_records,
    joining_record,
    mixing_record,
    peak_rss,
    rounding_notes,
    rounding_record,
    site_record,
    source_record,
    source_records,
    versions,
    with_measurements,
)
from lora_merge_cli.records import AdapterSite
from lora_merge_cli.report import CheckRecord, ProofRecord, RoundingRecord, SiteRecord, VerifyReport
from lora_merge_cli.rounding import NEAREST
from lora_merge_cli.survival import finite
from lora_merge_cli.verification import checks
from lora_merge_cli.verification.beside import check_assets_of
from lora_merge_cli.verification.checks import CHECK_IDS, Judging
from lora_merge_cli.verification.claims import check_provenance, claimed_rounding, read_claims
from lora_merge_cli.verification.examination import Examination, Findings, SiteFinding
from lora_merge_cli.verification.expectation import ANY_DTYPE, Expectation, expect
from lora_merge_cli.verification.joint import JointSource
from lora_merge_cli.verification.judged_fused import JudgedFused
from lora_merge_cli.verification.site_judge import LayerVerdict, Terms

Damage: TypeAlias = InputError | UsageError | Refused
"""Why a result cannot be opened."""


@dataclass(frozen=True)
class VerifyRequest:
    """What to judge, and beside what."""

    merged: Path
    """The result: a run, step or item directory, a directory of shards or a file, of any tool's making."""
    against: Path | None = None
    """The checkpoint with the adapters that were merged, or the base of the adapters beside it. None with `several`."""
    adapters: tuple[AdapterChoice, ...] = ()
    """The adapters beside it."""
    base: Path | None = None
    """The float32 checkpoint that the fine-tune started from, if the merge was given it."""
    step: int | None = None
    """Which step of a run `against`; the newest if None."""
    dialect: str | None = None
    """The adapters' dialect; detected if None."""
    options: MergeOptions = field(default_factory=lambda: MergeOptions(dtype=ANY_DTYPE))
    """What the merge was asked for; the dtype ``any`` takes the kernels as they are stored."""
    judging: Judging = field(default_factory=Judging)
    """How strictly to judge."""
    several: JoinRequest | None = None
    """Instead of `against`: the fine-tunes of `base` that were joined, and how."""


@dataclass(frozen=True)
class Opened:
    """A request whose inputs are open."""

    request: VerifyRequest
    merged: Checkpoint | Damage
    """The result, or why it cannot be opened."""
    inputs: Inputs

    @property
    def paths(self) -> tuple[Path, ...]:
        """What must not be written to."""
        opened = [checkpoint for _, checkpoint in self.inputs.opened]
        if isinstance(self.merged, Checkpoint):
            opened.append(self.merged)
        return (*(checkpoint.directory.resolve() for checkpoint in opened), self.request.merged.resolve())


@dataclass(frozen=True)
class Verdict:
    """What a judgement found."""

    checks: tuple[CheckRecord, ...]
    """Every check, in the order of `CHECK_IDS`."""
    sites: tuple[SiteRecord, ...]
    """Every adapter that should be in a kernel, with what became of it."""
    notes: tuple[str, ...] = ()
    """What a reader should know of the inputs and the flags."""
    sampled: tuple[str, ...] = ()
    """Which layers were looked at, where not all were."""
    rounding: RoundingRecord | None = None
    """How results should be rounded; None for all to nearest."""


def open_request(request: VerifyRequest) -> Opened:
    """Open all that a verification reads. Damage inside the result is not an error, it is what a verification is for.

    Raises:
        InputError: A path leads nowhere, or to no checkpoint; an input of the merge is damaged.
    """
    inputs = _open(request)
    for _, opened in inputs.opened:
        opened.source.index()
    return Opened(request, open_result(request.merged, request.step), inputs)


def _open(request: VerifyRequest) -> Inputs:
    if request.several is not None:
        if request.against is not None or request.adapters:
            raise UsageError("one fine-tune, and several", hint="give one of the two")
        if request.base is None:
            raise UsageError("fine-tunes are joined around their base", hint="pass --base")
        joined = open_fine_tunes(request.base, request.several, request.step, request.dialect)
        return judged_inputs(joined, request.options)
    if request.against is None:
        raise UsageError("nothing to judge against", hint="pass --against")
    return open_inputs(request.against, request.adapters, base=request.base, step=request.step, dialect=request.dialect)


def judged_inputs(inputs: Inputs, options: MergeOptions) -> Inputs:
    """The inputs as a judge reads them: of several fine-tunes, what they are joined into is computed by formulas of its own.

    Args:
        inputs: What is merged, or interpolated between.
        options: The scales of adapters, if fine-tunes have any.

    Raises:
        Refused: A fine-tune cannot be merged, or they do not fit one another.
    """
    joining = inputs.joining
    if joining is None or isinstance(inputs.checkpoint.source, JointSource):
        return inputs

    def fused(part: FineTune) -> JudgedFused:
        return JudgedFused(part.inputs, options)

    def joined(inputs: Inputs, sources: Sequence[Source]) -> Source:
        return JointSource(inputs.anchor, sources, joining, inputs.dialect.canonical)

    return joint_inputs(inputs, fused, joined)


def open_result(path: Path, step: int | None = None) -> Checkpoint | Damage:
    """A result to judge, or why it cannot be opened; of a run that has the step, that one.

    Raises:
        InputNotFound: The path leads nowhere.
    """
    try:
        merged = open_checkpoint(path)
        if step is not None and step in merged.steps:
            merged = open_checkpoint(path, step)
        merged.source.index()
    except InputNotFound:
        raise
    except (InputError, UsageError, Refused) as error:
        return error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Metadata of a kind that no reader thought of is damage too: judging must not end in a traceback.
        return CorruptCheckpoint("metadata that makes no sense", where=path, found=f"{type(error).__name__}: {error}")
    return merged


def verify(request: VerifyRequest | Opened, listener: Listener | None = None) -> VerifyReport:
    """Judge a merged checkpoint, of any tool's making, beside the checkpoint whose adapters were merged.

    Args:
        request: What to judge; opened or not.
        listener: Who to tell of progress.

    Raises:
        LoraMergeError: The other inputs or the options are at fault; what is wrong inside the result is a failed check.
    """
    started = time.monotonic()
    opened = request if isinstance(request, Opened) else open_request(request)
    request, inputs, dialect = opened.request, opened.inputs, opened.inputs.dialect
    verdict = judge(opened.merged, inputs, request.options, request.judging, listener)
    index = inputs.checkpoint.source.index()
    survey = survey_inputs(inputs, request.options.scales, residual_base=request.options.residual_base)
    sources = list(source_records(inputs))
    notes = [note for _, checkpoint in inputs.opened for note in checkpoint.notes]
    if isinstance(opened.merged, Checkpoint):
        sources.insert(0, source_record("merged", opened.merged))
        notes = [*opened.merged.notes, *notes]
    groups = dialect.grouping(index, survey.sites)
    return VerifyReport(
        status="failed" if any(check.status == "fail" for check in verdict.checks) else "passed",
        tool_version=__version__,
        model=dialect.summary(tree_of(inputs.checkpoint)).name,
        dialect=dialect.name,
        sources=tuple(sources),
        multiplier=request.options.multiplier,
        serving_dtype=request.options.served(dialect.serving_dtype).name,
        groups=group_records(dialect, index, groups, {found.target for found in survey.replacements}),
        sites=verdict.sites,
        checks=verdict.checks,
        warnings=survey.warnings,
        notes=(*notes, *verdict.notes, *verdict.sampled),
        sample=request.judging.sample,
        min_gain=request.judging.min_gain,
        strict=request.judging.strict,
        mixing=None if request.options.mixing is None else mixing_record(request.options.mixing),
        joining=joining_record(inputs.joining),
        rounding=verdict.rounding,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss(),
        versions=versions(),
    )


def judge(
    merged: Checkpoint | Damage,
    inputs: Inputs,
    options: MergeOptions,
    judging: Judging,
    listener: Listener | None = None,
) -> Verdict:
    """Judge an opened result.

    Raises:
        LoraMergeError: The other inputs or the options are at fault.
    """
    inputs = judged_inputs(inputs, options)
    dialect, has_base = inputs.dialect, inputs.base is not None
    claims = read_claims(merged) if isinstance(merged, Checkpoint) else None
    expectation = expect(inputs, options, {} if claims is None else claims.scales)
    combining = options.combining.of(len(inputs.adapters), expectation.sites)
    serving_dtype = options.served(dialect.serving_dtype)
    terms = Terms(serving_dtype, 1.0 if judging.any_rounding else 0.5, options.multiplier, combining, options.rounding)
    if not isinstance(merged, Checkpoint):
        return Verdict(_unopened(merged), _site_records(expectation, Findings(), terms), expectation.notes)
    findings = Examination(merged, inputs, terms, judging.sample, judging.jobs, listener).run(expectation)
    serving = serving_dtype.name
    summary = dialect.summary(tree_of(inputs.checkpoint))
    rounding = _rounding(expectation, findings, terms)
    stated = claimed_rounding(None if rounding is None else dataclasses.asdict(rounding), serving)
    found = (
        checks.readable(findings),
        checks.structure(findings),
        checks.adapters_stripped(findings),
        checks.finite(findings, judging),
        checks.untouched_bits(findings),
        checks.replaced(findings),
        checks.interpolated(findings, asked=options.mixing is not None),
        checks.fused_exact(findings, judging, has_base=has_base),
        checks.forward(findings, judging, serving),
        checks.delta_survival(findings, judging, serving),
        checks.base(findings, judging, given=has_base),
        check_assets_of(merged, inputs.checkpoint, summary, expectation),
        check_provenance(claims, inputs, expectation, findings, options, None if judging.any_rounding else stated),
    )
    notes = [*expectation.notes, *rounding_notes(rounding, serving)]
    records = _site_records(expectation, findings, terms)
    based = [site for site in findings.sites.values() if site.leaf.base is not None and not site.leaf.mixed]
    if any(site.rounding.method == "preserve" for site in based):
        notes.append("judged by what --rounding preserve aims at also with a base: the function that was trained")
    if has_base and expectation.sites and not all(site.rounding.method == "preserve" for site in based):
        notes.append("judged as the base's own values plus each delta, not as the function that was trained")
    return Verdict(found, records, tuple(notes), _sampled(findings, judging), rounding)


def _rounding(expectation: Expectation, findings: Findings, terms: Terms) -> RoundingRecord | None:
    """How all leaves that are computed should be rounded, in what they are stored in."""
    leaves = (
        (leaf, findings.stored.get(path, leaf.dtype or leaf.source.dtype))
        for path, leaf in expectation.leaves.items()
        if leaf.is_computed
    )
    given = ((leaf.rounding(dtype, terms.serving_dtype, terms.rounding), dtype) for leaf, dtype in leaves)
    return rounding_record(terms.rounding, given)


def _unopened(error: Damage) -> tuple[CheckRecord, ...]:
    """The checks of a result that cannot be opened."""
    first = CheckRecord("readable", "fail", str(error), where=() if error.where is None else (error.where,))
    skipped = (CheckRecord(name, "skip", "the result cannot be opened") for name in CHECK_IDS[1:])
    return (first, *skipped)


def _sampled(findings: Findings, judging: Judging) -> tuple[str, ...]:
    if judging.sample is None:
        return ()
    looked_at = {tuple(found.layers) for found in findings.sites.values() if found.stacked}
    layers = " and ".join(", ".join(map(str, numbers)) for numbers in sorted(looked_at))
    return (f"--sample {judging.sample}: of each site, only layers {layers} were looked at",)


def _site_records(expectation: Expectation, findings: Findings, terms: Terms) -> tuple[SiteRecord, ...]:
    by_target = {leaf.change.path: leaf for leaf in expectation.leaves.values()}
    records = []
    for site in expectation.sites:
        found = findings.sites.get(site.name)
        leaf = by_target[site.targets[0]]
        dtype = leaf.source.dtype if found is None else found.dtype
        rounding = NEAREST if found is None else found.rounding
        record = site_record(site, leaf.source, dtype.name, leaf.change.alphas, rounding)
        records.append(record if found is None else _measured(record, site, found, terms))
    return tuple(records)


def _measured(record: SiteRecord, site: AdapterSite, found: SiteFinding, terms: Terms) -> SiteRecord:
    moments = {layer: verdict.moments for layer, verdict in found.layers.items()}
    record = with_measurements(record, moments, terms.serving_dtype.name, found.rounding, *found.of(site))
    verdicts = list(found.layers.values())
    return dataclasses.replace(
        record,
        non_finite=sum(verdict.non_finite for verdict in verdicts),
        proof=_proof(verdicts),
        layers=tuple(dataclasses.replace(layer, proof=_proof([found.layers[layer.layer]])) for layer in record.layers),
    )


def _proof(verdicts: Sequence[LayerVerdict]) -> ProofRecord:
    """The worst of each figure."""
    return ProofRecord(
        worst_share=finite(max(verdict.worst_share for verdict in verdicts)),
        beyond=sum(verdict.beyond for verdict in verdicts),
        forward_error=_worst(verdict.forward.error for verdict in verdicts),
        forward_share=finite(max(verdict.forward.share for verdict in verdicts)),
        served_error=_worst(verdict.forward.served for verdict in verdicts),
    )


def _worst(errors: Iterable[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return finite(max(known)) if known else None
