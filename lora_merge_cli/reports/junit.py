"""The report as JUnit XML, for continuous integration: a check is a test case, and so is a prefix of a comparison."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping

from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite

from lora_merge_cli.report import CheckRecord, DifferenceRecord, DiffReport, MergeReport, ModelReport, VerifyReport
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.words import adapters_in_words, brought, model_name, why

_AGREEING = ("equal", "within")


def to_junit(report: MergeReport | VerifyReport | DiffReport) -> str:
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


def _cases(report: MergeReport | VerifyReport | DiffReport) -> Iterator[TestCase]:
    if isinstance(report, DiffReport):
        yield from _prefix_cases(report)
    elif isinstance(report, MergeReport) and not report.checks:
        yield _merge_case(report)
    else:
        yield from (_check_case(check, _place(report)) for check in report.checks)


def _place(report: ModelReport) -> str:
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


def _merge_case(report: MergeReport) -> TestCase:
    case = _case("merge", _place(report))
    warnings = (f"warning: {visible(warning)}" for warning in report.warnings)
    case.system_out = "\n".join((f"{report.status}: {adapters_in_words(report)}", *_leaves(report), *warnings))
    return case


def _leaves(report: MergeReport) -> Iterator[str]:
    for leaf in brought(report.copied):
        yield visible(f"{leaf.origin}: {leaf.path}, {why(leaf)}")


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
