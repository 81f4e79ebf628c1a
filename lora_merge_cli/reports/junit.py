"""The report as JUnit XML, for continuous integration: a check, a prefix of a comparison and an alpha of a sweep are test cases."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from lora_merge_cli.report import (
    CheckRecord,
    DifferenceRecord,
    DiffReport,
    InterpolateReport,
    MergeReport,
    ModelReport,
    PointRecord,
    Report,
    SweepReport,
    VerifyReport,
)
from lora_merge_cli.reports import AnyReport
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.parts import share_of_base
from lora_merge_cli.reports.words import (
    adapters_in_words,
    brought,
    byte_size,
    mixing_in_words,
    mixing_of,
    model_name,
    why,
)

_AGREEING = ("equal", "within")


def to_junit(report: AnyReport) -> str:
    """One test suite, with a final newline."""
    suite = TestSuite(f"lora-merge {report.command}")
    suite.add_testcases(list(_cases(report)))
    if report.seconds is not None:
        # After the cases: adding them sets the sum of their times, and they have none.
        suite.time = round(report.seconds, 3)
    document = JUnitXml()
    document.add_testsuite(suite)
    text = io.BytesIO()
    document.write(text, pretty=True)
    return text.getvalue().decode()


def _cases(report: AnyReport) -> Iterator[TestCase]:
    if isinstance(report, DiffReport):
        yield from _prefix_cases(report)
    elif isinstance(report, SweepReport):
        yield from (_point_case(point, report) for point in report.points)
    elif not isinstance(report, VerifyReport) and not report.checks:
        yield _output_case(report)
    else:
        yield from (_check_case(check, _place(report)) for check in report.checks)


def _place(report: ModelReport | SweepReport) -> str:
    return model_name(report) or report.dialect


def _check_case(check: CheckRecord, model: str) -> TestCase:
    case = _case(check.id, model)
    message = visible(check.message)
    evidence = [*_figures(check.figures), *map(visible, check.where)]
    if check.status == "fail":
        case.result = _failure(message, evidence)
    elif check.status == "skip":
        case.result = Skipped(message)
    else:
        mark = "warning: " if check.status == "warn" else ""
        case.system_out = "\n".join((f"{mark}{message}", *evidence))
    return case


def _output_case(report: MergeReport | InterpolateReport) -> TestCase:
    case = _case(report.command, _place(report))
    mixing = mixing_of(report)
    done = adapters_in_words(report) if mixing is None else visible(mixing_in_words(mixing))
    case.system_out = "\n".join((f"{report.status}: {done}", *_leaves(report), *_warnings(report)))
    return case


def _leaves(report: MergeReport | InterpolateReport) -> Iterator[str]:
    for leaf in brought(report.copied):
        yield visible(f"{leaf.origin}: {leaf.path}, {why(leaf)}")
    if isinstance(report, InterpolateReport):
        yield from (visible(f"NOT interpolated: {path}, it has no base") for path in report.not_interpolated)


def _warnings(report: Report) -> Iterator[str]:
    yield from (f"warning: {visible(warning)}" for warning in report.warnings)


def _point_case(point: PointRecord, report: SweepReport) -> TestCase:
    case = _case(f"alpha {point.alpha:g}", _place(report))
    if point.status == "failed":
        case.result = _failure(visible(point.error or "no reason is known"), [visible(point.output)])
    else:
        case.system_out = "\n".join((*_point(point), *_warnings(report)))
    return case


def _point(point: PointRecord) -> Iterator[str]:
    size = "" if point.bytes_on_disk is None else f", {byte_size(point.bytes_on_disk)}"
    yield f"{point.status}: {visible(point.output)}{size}"
    for part in point.parts:
        figures = {
            "distance / |W_base|": share_of_base(part.distance, part),
            "gain stored": part.gain_stored,
            "gain served": part.gain_served,
        }
        known = {name: value for name, value in figures.items() if value is not None}
        yield f"{visible(part.part)}: {', '.join(_figures(known))}"


def _prefix_cases(report: DiffReport) -> Iterator[TestCase]:
    differing: dict[str, list[DifferenceRecord]] = {record.prefix: [] for record in report.prefixes}
    for leaf in report.leaves:
        if report.status == "different" and leaf.status not in _AGREEING:
            differing[leaf.prefix].append(leaf)
    for prefix, leaves in differing.items():
        case = _case(prefix, report.command)
        if leaves:
            lines = [_difference(leaf) for leaf in leaves[: report.top]]
            more = [f"and {len(leaves) - report.top} more"] if len(leaves) > report.top else []
            case.result = _failure(f"{len(leaves)} leaves differ", lines + more)
        yield case


def _difference(leaf: DifferenceRecord) -> str:
    figures = {
        "max_abs": leaf.max_abs,
        "relative_l2": leaf.relative_l2,
        "max_ulp": leaf.max_ulp,
        "changed": leaf.changed,
        "non_finite": leaf.non_finite or None,
    }
    known = {name: value for name, value in figures.items() if value is not None}
    return ", ".join((f"{visible(leaf.path)}: {leaf.status}", *_figures(known)))


def _figures(figures: Mapping[str, float | int | str | None]) -> Iterator[str]:
    for name, value in figures.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        yield f"{visible(name)} = {visible(text)}"


def _case(name: str, place: str) -> TestCase:
    # A dot would begin another package.
    return TestCase(visible(name), f"lora_merge.{re.sub(r'[^A-Za-z0-9-]+', '_', place)}")


def _failure(message: str, evidence: Iterable[str]) -> Failure:
    failure = Failure(message)
    failure.text = "\n".join(evidence)
    return failure
