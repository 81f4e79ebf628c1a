"""The report as Markdown, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lora_merge_cli.report import MergeReport, SiteRecord
from lora_merge_cli.reports.words import byte_size, figure, short_scale, survival_for

_MANY = 40


def to_markdown(report: MergeReport) -> str:
    """The report, most important things first."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: MergeReport) -> Iterator[str]:
    done = "merged" if report.status == "merged" else "planned"
    yield f"# {report.model}: {len(report.sites)} adapters {done}"
    yield ""
    if report.warnings:
        yield "## Warnings"
        yield ""
        yield from (f"- **{warning}**" for warning in report.warnings)
        yield ""
    if report.notes:
        yield "## Notes"
        yield ""
        yield from (f"- {note}" for note in report.notes)
        yield ""
    yield "## Sites"
    yield ""
    yield from _site_table(report)
    yield ""
    yield "## Leaves"
    yield ""
    yield from _leaf_lines(report)
    yield ""
    yield "## Provenance"
    yield ""
    yield from _provenance(report)


def _site_table(report: MergeReport) -> Iterator[str]:
    stored = sorted({site.dtype for site in report.sites})
    header = ["target", "rank", "scale", "equation", "stored as"]
    if report.status == "merged":
        header += ["\\|delta\\|/\\|kernel\\|", "max abs", "non-finite"]
        header += [f"gain in {' / '.join(stored)}", f"gain in {report.serving_dtype}"]
    yield from _table(header, (_site_row(site, report) for site in report.sites))
    if report.status == "merged":
        yield ""
        yield (
            "Gain is along the adapter's inputs: 1 keeps the fine-tune, less shrinks it as a smaller scale would. "
            f"{report.serving_dtype} is what servers cast to."
        )


def _site_row(site: SiteRecord, report: MergeReport) -> list[str]:
    row = [
        f"`{site.target}`",
        str(site.rank),
        f"{short_scale(site)}",
        f"`{site.equation}`",
        site.dtype,
    ]
    if report.status == "merged":
        stored, served = (survival_for(site, name) for name in (site.dtype, report.serving_dtype))
        row += [figure(site.relative_norm), figure(site.max_abs), str(site.non_finite)]
        row += [figure(s.gain_along_inputs if s else None) for s in (stored, served)]
    return row


def _leaf_lines(report: MergeReport) -> Iterator[str]:
    origins = Counter(leaf.origin for leaf in report.copied)
    sizes = sum(leaf.nbytes for leaf in report.copied)
    parts = ", ".join(f"{count} {origin}" for origin, count in sorted(origins.items())) or "none"
    yield f"- untouched by adapters: {parts} ({byte_size(sizes)})"
    reasons: dict[str, list[str]] = {}
    for leaf in report.dropped:
        reasons.setdefault(leaf.reason, []).append(leaf.path)
    for reason, paths in reasons.items():
        yield f"- dropped, {reason}: {len(paths)}"
        yield from (f"  - `{path}`" for path in paths[:_MANY])
        if len(paths) > _MANY:
            yield f"  - and {len(paths) - _MANY} more"


def _provenance(report: MergeReport) -> Iterator[str]:
    rows = [
        [source.role, f"`{source.path}`", str(source.step or ""), f"`{source.fingerprint[:19]}`"]
        for source in report.sources
    ]
    yield from _table(["input", "path", "step", "fingerprint"], rows)
    yield ""
    sources = sorted({site.scale_source for site in report.sites})
    yield from (f"- scale: {source}" for source in sources)
    if report.multiplier != 1:
        yield f"- every delta multiplied by {report.multiplier:g}"
    yield f"- output: {byte_size(report.output_bytes)} of arrays"
    if report.bytes_on_disk is not None and report.output is not None:
        yield f"- on disk: {byte_size(report.bytes_on_disk)} at `{report.output}`"
    if report.seconds is not None and report.peak_rss_bytes is not None:
        yield f"- {report.seconds:.1f} s on {report.device}, peak {byte_size(report.peak_rss_bytes)} resident"
    if report.versions:
        yield f"- {', '.join(f'{name} {version}' for name, version in report.versions)}"
    if report.parents:
        yield f"- merged into a checkpoint that was merged before ({len(report.parents)} earlier)"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
