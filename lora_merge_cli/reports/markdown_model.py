"""What the Markdown of a merge and of its judge says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lora_merge_cli.report import CheckRecord, MergeReport, SiteRecord, VerifyReport
from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.markdown_blocks import bullets, counted, details, folded_table, table
from lora_merge_cli.reports.words import byte_size, figure, short_scale, survival_for

_MANY = 40
_FIRST_KEYS = 3

_GAIN = (
    "Gain is along the adapter's inputs: 1 keeps the fine-tune, less shrinks it as a smaller scale would. "
    "{served} is what servers cast to."
)


def verdict(report: MergeReport | VerifyReport) -> str:
    """The outcome in a few words."""
    if isinstance(report, VerifyReport):
        outcome = "verified" if report.status == "passed" else "NOT verified"
    elif report.status == "rejected":
        outcome = "merge REJECTED"
    else:
        outcome = f"{counted(len(report.sites), 'adapter')} {report.status}{' and verified' if report.checks else ''}"
    return ", ".join([f"{prose(report.model)}: {outcome}", *_tally(report.checks)])


def _tally(checks: Sequence[CheckRecord]) -> Iterator[str]:
    counts = Counter(check.status for check in checks)
    if counts["fail"]:
        yield f"{counted(counts['fail'], 'check')} failed"
    if counts["pass"]:
        yield f"{counts['pass']} passed"
    if counts["warn"]:
        yield counted(counts["warn"], "warning")
    if counts["skip"]:
        yield f"{counts['skip']} skipped"


def findings(report: MergeReport | VerifyReport) -> Iterator[str]:
    """The checks, those first that somebody has to act upon."""
    if isinstance(report, MergeReport) and report.status == "rejected":
        yield "Nothing was written to the output."
    if not report.checks:
        return
    remarks = [check for status in ("fail", "warn") for check in report.checks if check.status == status]
    if remarks:
        yield bullets(
            f"**{_status(check)}** {code(check.id)}: {prose(check.message)}{_keys(check)}" for check in remarks
        )
    yield "## Checks"
    rows = [[code(check.id), _status(check), prose(check.message)] for check in report.checks]
    yield table(["check", "status", "message"], rows)


def _status(check: CheckRecord) -> str:
    return check.status.upper() if check.status == "fail" else check.status


def _keys(check: CheckRecord) -> str:
    if not check.where:
        return ""
    more = ", and more" if len(check.where) > _FIRST_KEYS else ""
    return f" ({', '.join(map(code, check.where[:_FIRST_KEYS]))}{more})"


def tables(report: MergeReport | VerifyReport) -> Iterator[str]:
    """The sites, and what is folded away: the other leaves, the inputs, and how the result came about."""
    yield "## Sites"
    if isinstance(report, VerifyReport):
        yield _verified_sites(report)
    else:
        yield _merged_sites(report)
    if report.status != "planned":
        yield _GAIN.format(served=prose(report.serving_dtype))
    if isinstance(report, MergeReport):
        yield _leaves(report)
    yield details("Inputs and provenance", _inputs(report), bullets(_provenance(report)))


def _verified_sites(report: VerifyReport) -> str:
    header = ["site", "rank", "scale", "|delta|/|kernel|", "worst share of its bound", "forward error"]
    rows = [
        [code(site.label), str(site.rank), short_scale(site), *_proof(site), *_gains(site, report)]
        for site in report.sites
    ]
    return folded_table("sites", [*header, "gain stored", "gain served"], rows)


def _merged_sites(report: MergeReport) -> str:
    header = ["target", "rank", "scale", "equation", "stored as"]
    rows = [
        [code(site.target), str(site.rank), short_scale(site), code(site.equation), prose(site.dtype)]
        for site in report.sites
    ]
    if report.status != "planned":
        stored = " / ".join(sorted({prose(site.dtype) for site in report.sites}))
        header += ["|delta|/|kernel|", "max abs", "non-finite"]
        header += [f"gain in {stored}", f"gain in {prose(report.serving_dtype)}"]
        for row, site in zip(rows, report.sites, strict=True):
            row += [figure(site.relative_norm), figure(site.max_abs), str(site.non_finite), *_gains(site, report)]
    return folded_table("sites", header, rows)


def _proof(site: SiteRecord) -> tuple[str, ...]:
    shares = (site.proof.worst_share, site.proof.forward_error) if site.proof else (None, None)
    return tuple(map(figure, (site.relative_norm, *shares)))


def _gains(site: SiteRecord, report: MergeReport | VerifyReport) -> Iterator[str]:
    for dtype in (site.dtype, report.serving_dtype):
        survival = survival_for(site, dtype)
        yield figure(survival.gain_along_inputs if survival else None)


def _leaves(report: MergeReport) -> str:
    origins = Counter(leaf.origin for leaf in report.copied)
    parts = ", ".join(f"{count} {prose(origin)}" for origin, count in sorted(origins.items())) or "none"
    lines = [f"untouched by adapters: {parts} ({byte_size(sum(leaf.nbytes for leaf in report.copied))})"]
    reasons: dict[str, list[str]] = {}
    for leaf in report.dropped:
        reasons.setdefault(leaf.reason, []).append(leaf.path)
    for reason, paths in reasons.items():
        more = [f"and {len(paths) - _MANY} more"] if len(paths) > _MANY else []
        shown = "".join(f"\n  - {line}" for line in [*map(code, paths[:_MANY]), *more])
        lines.append(f"dropped, {prose(reason)}: {len(paths)}{shown}")
    return details(f"Leaves: {len(report.copied)} untouched by adapters, {len(report.dropped)} dropped", bullets(lines))


def _inputs(report: MergeReport | VerifyReport) -> str:
    rows = [
        [source.role, code(source.path), prose(source.format), _step(source.step), code(source.fingerprint[:19])]
        for source in report.sources
    ]
    return table(["input", "path", "format", "step", "fingerprint"], rows)


def _step(step: int | None) -> str:
    return "-" if step is None else str(step)


def _provenance(report: MergeReport | VerifyReport) -> Iterator[str]:
    yield from (f"scale: {prose(source)}" for source in sorted({site.scale_source for site in report.sites}))
    if report.multiplier != 1:
        yield f"every delta multiplied by {report.multiplier:g}"
    if isinstance(report, VerifyReport):
        yield f"layers looked at per site: {'all' if report.sample is None else report.sample}"
        yield f"a gain below {report.min_gain:g} {'fails' if report.strict else 'warns'}"
    else:
        yield from _output(report)
    if report.seconds is not None and report.peak_rss_bytes is not None:
        place = f" on {prose(report.device)}" if isinstance(report, MergeReport) and report.device else ""
        yield f"{report.seconds:.1f} s{place}, peak {byte_size(report.peak_rss_bytes)} resident"
    if report.versions:
        yield ", ".join(f"{prose(name)} {prose(version)}" for name, version in report.versions.items())


def _output(report: MergeReport) -> Iterator[str]:
    yield f"output: {byte_size(report.output_bytes)} of arrays"
    if report.bytes_on_disk is not None and report.output is not None:
        yield f"on disk: {byte_size(report.bytes_on_disk)} at {code(report.output)}"
    if report.parents:
        yield f"merged into a checkpoint that was merged before ({len(report.parents)} earlier)"
