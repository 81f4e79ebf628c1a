"""What the Markdown of a merge, of an interpolation and of their judge says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lora_merge_cli.report import (
    CheckRecord,
    InterpolateReport,
    LeafRecord,
    OutputReport,
    SiteRecord,
    VerifyReport,
)
from lora_merge_cli.reports import AnyModelReport, markdown_interpolation
from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.kinds import (
    MANY_SITES,
    MOST_KINDS,
    alpha_spread,
    largest,
    least,
    middle,
    rank_spread,
    scale_spread,
    site_kinds,
)
from lora_merge_cli.reports.markdown_blocks import bullets, details, folded_table, table
from lora_merge_cli.reports.markdown_inputs import inputs_table, made_with
from lora_merge_cli.reports.rounding_rows import WORTH_FROM, rounded_rows, rounding_in_words, share_in_words
from lora_merge_cli.reports.words import (
    adapter_mark,
    adapters_in_words,
    alphas_in_words,
    beside,
    brought,
    byte_size,
    counted,
    figure,
    gain_along_inputs,
    mixing_in_words,
    mixing_of,
    model_name,
    short_scale,
    untouched,
    why,
)

_MANY = 40
_FIRST_KEYS = 3

_BY_KIND = "Sites that are alike share a row; the JSON and HTML reports have each of them."
_GAIN = (
    "Gain is along the adapter's inputs: 1 keeps the fine-tune, less shrinks it as a smaller scale would. "
    "{served} is what servers cast to."
)

_BEFORE_AND_AFTER = (
    "Gain and relative error along the adapter's inputs, with rounding to nearest and as chosen: 1 and 0 keep all of the fine-tune; "
    + WORTH_FROM
    + "."
)


def verdict(report: AnyModelReport) -> str:
    """The outcome in a few words."""
    name = model_name(report)
    if isinstance(report, VerifyReport):
        outcome = "verified" if report.status == "passed" else "NOT verified"
        if beside(report):
            outcome = f"{adapters_in_words(report)} {outcome}"
    elif isinstance(report, InterpolateReport):
        outcome = markdown_interpolation.outcome(report)
    elif report.status == "rejected":
        outcome = "merge REJECTED"
    else:
        outcome = f"{adapters_in_words(report)} {report.status}{' and verified' if report.checks else ''}"
    return ", ".join([f"{prose(name)}: {outcome}" if name else outcome, *_tally(report.checks)])


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


def findings(report: AnyModelReport) -> Iterator[str]:
    """The checks, those first that somebody has to act upon, and which alpha went where."""
    if report.status == "rejected":
        yield "Nothing was written to the output."
    mixing = mixing_of(report)
    if mixing is not None:
        yield f"Mixing: {prose(mixing_in_words(mixing))}."
    if isinstance(report, InterpolateReport) and report.not_interpolated:
        yield from markdown_interpolation.not_interpolated(report)
    rounding = rounding_in_words(report)
    if rounding is not None:
        yield f"Rounding: {prose(rounding)}."
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


def tables(report: AnyModelReport) -> Iterator[str]:
    """The sites, and what is folded away: the other leaves, the inputs, and how the result came about."""
    if isinstance(report, InterpolateReport):
        yield from markdown_interpolation.parts(report)
    if report.sites:
        yield from _sites(report)
        yield from _rounding(report)
    if isinstance(report, InterpolateReport):
        yield from markdown_interpolation.mixed(report)
    if isinstance(report, OutputReport):
        yield from _brought(report)
        yield _leaves(report)
    yield details("Inputs and provenance", inputs_table(report.sources), bullets(_provenance(report)))


def _sites(report: AnyModelReport) -> Iterator[str]:
    yield "## Sites"
    header, rows = (_by_kind if len(report.sites) > MANY_SITES else _site_by_site)(report)
    yield folded_table("rows" if len(report.sites) > MANY_SITES else "sites", header, rows[:MOST_KINDS])
    if len(report.sites) > MANY_SITES:
        yield _BY_KIND
        if len(rows) > MOST_KINDS:
            yield f"And {len(rows) - MOST_KINDS} more rows."
    if report.status != "planned":
        yield _GAIN.format(served=prose(report.serving_dtype))
        if len(beside(report)) > 1:
            yield "The figures of a kernel are of all adapters on it together."


def _rounding(report: AnyModelReport) -> Iterator[str]:
    """Survival with rounding to nearest, and with what was chosen."""
    rows = rounded_rows(report)
    if report.rounding is None or not rows:
        return
    yield "## Rounding"
    method, wide = report.rounding.method, any(row.moved is not None for row in rows)
    header = ["site", "in", "gain to nearest", f"gain, {method}", "error to nearest", f"error, {method}", "worth from"]
    cells = [
        [
            code(row.name),
            prose(row.dtype),
            *map(figure, (*row.gains, *row.errors)),
            share_in_words(row.worth_from),
            *([share_in_words(row.moved)] if wide else []),
        ]
        for row in rows[:MOST_KINDS]
    ]
    yield folded_table("rows", [*header, *(["moved"] if wide else [])], cells)
    if len(rows) > MOST_KINDS:
        yield f"And {len(rows) - MOST_KINDS} more rows."
    yield _BEFORE_AND_AFTER
    if len(report.sites) > MANY_SITES:
        yield "Of a row the least gain and the largest error."


def _site_by_site(report: AnyModelReport) -> tuple[list[str], list[list[str]]]:
    if isinstance(report, VerifyReport):
        header = ["site", "rank", "scale", "|delta|/|kernel|", "worst share of its bound", "forward error"]
        header += ["gain stored", "gain served"]
        rows = [
            [code(site.label), str(site.rank), short_scale(site), *_proof(site), *_gains(site, report)]
            for site in report.sites
        ]
    else:
        header = ["target", "rank", "scale", "equation", "stored as"]
        rows = [
            [code(site.target), str(site.rank), short_scale(site), code(site.equation), prose(site.dtype)]
            for site in report.sites
        ]
        if report.status != "planned":
            header += ["|delta|/|kernel|", "max abs", "non-finite", *_gain_header(report)]
            for row, site in zip(rows, report.sites, strict=True):
                row += [figure(site.relative_norm), figure(site.max_abs), str(site.non_finite), *_gains(site, report)]
    if mixing_of(report) is not None:
        header, rows = _with_column("alpha", header, rows, [alphas_in_words(site.alphas) for site in report.sites])
    return _with_adapters(report, header, rows, report.sites)


def _by_kind(report: AnyModelReport) -> tuple[list[str], list[list[str]]]:
    found = site_kinds(report.sites)
    header = ["sites", "count", "layers", "rank", "scale"]
    rows = [
        [
            code(kind.name),
            str(len(kind.members)),
            kind.layers,
            rank_spread(kind.members),
            scale_spread(kind.members, " (assumed)"),
        ]
        for kind in found
    ]
    if report.status == "planned":
        header += ["equation", "stored as"]
        for row, kind in zip(rows, found, strict=True):
            row += [", ".join(map(code, dict.fromkeys(site.equation for site in kind.members)))]
            row += [", ".join(map(prose, dict.fromkeys(site.dtype for site in kind.members)))]
    else:
        header += ["|delta|/|kernel|, median", "largest", "max abs"]
        if isinstance(report, VerifyReport):
            header += ["worst share of its bound", "forward error"]
        header += [f"least {name}" for name in _gain_header(report)]
        for row, kind in zip(rows, found, strict=True):
            row.extend(_kind_figures(kind.members, report))
    if mixing_of(report) is not None:
        header, rows = _with_column("alpha", header, rows, [alpha_spread(kind.members) for kind in found])
    return _with_adapters(report, header, rows, [kind.members[0] for kind in found])


def _kind_figures(sites: Sequence[SiteRecord], report: AnyModelReport) -> Iterator[str]:
    norms = [site.relative_norm for site in sites]
    yield figure(middle(norms))
    yield figure(largest(norms))
    yield figure(largest(site.max_abs for site in sites))
    if isinstance(report, VerifyReport):
        yield _worst_share(sites)
        yield figure(largest(site.proof.forward_error for site in sites if site.proof))
    yield figure(least(gain_along_inputs(site, site.dtype) for site in sites))
    yield figure(least(gain_along_inputs(site, report.serving_dtype) for site in sites))


def _worst_share(sites: Sequence[SiteRecord]) -> str:
    shares = [site.proof.worst_share for site in sites if site.proof]
    # A proof without a share is of an entry that is not finite, which is worse than any share.
    return "not finite" if None in shares else figure(largest(shares))


def _gain_header(report: AnyModelReport) -> list[str]:
    stored = " / ".join(sorted({prose(site.dtype) for site in report.sites}))
    return [f"gain in {stored}", f"gain in {prose(report.serving_dtype)}"]


def _with_adapters(
    report: AnyModelReport, header: list[str], rows: list[list[str]], sites: Sequence[SiteRecord]
) -> tuple[list[str], list[list[str]]]:
    """The table with a column that says which adapter a row is of, if there are several."""
    if len(beside(report)) < 2:
        return header, rows
    return _with_column("adapter", header, rows, [prose(adapter_mark(site)) for site in sites])


def _with_column(
    name: str, header: list[str], rows: list[list[str]], cells: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """The table with a column more after the first."""
    return [header[0], name, *header[1:]], [[row[0], cell, *row[1:]] for row, cell in zip(rows, cells, strict=True)]


def _proof(site: SiteRecord) -> tuple[str, ...]:
    shares = (site.proof.worst_share, site.proof.forward_error) if site.proof else (None, None)
    return tuple(map(figure, (site.relative_norm, *shares)))


def _gains(site: SiteRecord, report: AnyModelReport) -> Iterator[str]:
    for dtype in (site.dtype, report.serving_dtype):
        yield figure(gain_along_inputs(site, dtype))


def _brought(report: OutputReport) -> Iterator[str]:
    leaves = brought(report.copied)
    if leaves:
        yield "## Replaced and created leaves"
        rows = [
            [code(leaf.path), prose(leaf.origin), prose(why(leaf)), prose(leaf.dtype), byte_size(leaf.nbytes)]
            for leaf in leaves
        ]
        yield folded_table("leaves", ["leaf", "origin", "why", "stored as", "size"], rows)


def _leaves(report: OutputReport) -> str:
    kept, others = untouched(report.copied), brought(report.copied)
    origins = Counter(leaf.origin for leaf in kept)
    parts = ", ".join(f"{count} {prose(origin)}" for origin, count in sorted(origins.items())) or "none"
    word = "neither adapted nor interpolated" if isinstance(report, InterpolateReport) else "untouched by adapters"
    lines = [f"{word}: {parts} ({byte_size(sum(leaf.nbytes for leaf in kept))})"]
    reasons: dict[str, list[str]] = {}
    for leaf in report.dropped:
        reasons.setdefault(leaf.reason, []).append(leaf.path)
    for reason, paths in reasons.items():
        more = [f"and {len(paths) - _MANY} more"] if len(paths) > _MANY else []
        shown = "".join(f"\n  - {line}" for line in [*map(code, paths[:_MANY]), *more])
        lines.append(f"dropped, {prose(reason)}: {len(paths)}{shown}")
    summary = [f"{len(kept)} {word}", *(_count_origins(others)), f"{len(report.dropped)} dropped"]
    return details(f"Leaves: {', '.join(summary)}", bullets(lines))


def _count_origins(leaves: Sequence[LeafRecord]) -> Iterator[str]:
    for origin, count in sorted(Counter(leaf.origin for leaf in leaves).items()):
        yield f"{count} {origin}"


def _provenance(report: AnyModelReport) -> Iterator[str]:
    yield from (f"scale: {prose(source)}" for source in sorted({site.scale_source for site in report.sites}))
    if report.multiplier != 1:
        yield f"every delta multiplied by {report.multiplier:g}"
    mixing = mixing_of(report)
    if mixing is not None:
        yield f"mixing: {prose(mixing_in_words(mixing))}"
    if isinstance(report, VerifyReport):
        yield f"layers looked at per site: {'all' if report.sample is None else report.sample}"
        yield f"a gain below {report.min_gain:g} {'fails' if report.strict else 'warns'}"
    else:
        yield from _output(report)
    yield from made_with(report, report.device if isinstance(report, OutputReport) else None)


def _output(report: OutputReport) -> Iterator[str]:
    yield f"output: {byte_size(report.output_bytes)} of arrays"
    if report.bytes_on_disk is not None and report.output is not None:
        yield f"on disk: {byte_size(report.bytes_on_disk)} at {code(report.output)}"
    if report.parents:
        yield f"merged into a checkpoint that was merged before ({len(report.parents)} earlier)"
