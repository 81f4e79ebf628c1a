"""Reports in each format: what is told, and that no checkpoint's string can break a document."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from markdown_it import MarkdownIt

from lora_merge_cli.errors import ResourceError, UsageError
from lora_merge_cli.report import (
    CheckRecord,
    DifferenceRecord,
    DiffReport,
    DroppedRecord,
    LayerRecord,
    LeafRecord,
    MergeReport,
    PrefixRecord,
    ProofRecord,
    SiteRecord,
    SourceRecord,
    SurvivalRecord,
    VerifyReport,
)
from lora_merge_cli.reports.escaping import prose
from lora_merge_cli.reports.github import append_step_summary, check_step_summary
from lora_merge_cli.reports.json_text import to_json
from lora_merge_cli.reports.junit import to_junit
from lora_merge_cli.reports.markdown import to_markdown
from lora_merge_cli.reports.schema import report_schema
from tests.test_interpolate_reports import interpolated, swept

HOSTILE = "a|b`c``d <img src=x onerror=y> @team #1 [x](http://e.vil)\n# head\x1b\x00\ud800\ufffe\u202e$x$ & end`"

SURVIVAL = tuple(
    SurvivalRecord(dtype, 1.0, 1.0, 0.0, 0.25, gain, None) for dtype, gain in [("float32", 0.75), ("bfloat16", 0.5)]
)
PROOF = ProofRecord(0.125, 0, 1e-7, 0.0625, 2e-3)
SITE = SiteRecord(
    target="params/q/kernel",
    label="q",
    group="expert",
    module="attn",
    operation="add_delta",
    equation="ir,ro->io",
    rank=4,
    scale=None,
    scale_source="nobody",
    scale_assumed=False,
    shape=(8, 8),
    source_dtype="bfloat16",
    dtype="float32",
    relative_norm=0.03125,
    max_abs=0.5,
    spectrum=(2.0, 1.0),
    survival=SURVIVAL,
    proof=PROOF,
    layers=(LayerRecord(0, None, 0.5, SURVIVAL, proof=PROOF),),
)
CHECKS = (
    CheckRecord("layout", "pass", "all leaves are there", {"leaves": 12, "note": "x", "nothing": None}),
    CheckRecord("gain", "warn", "a delta is lost", {"least": 0.5}, ("params/q",)),
    CheckRecord("fused", "fail", "2 kernels are wrong", {"worst": 12.345678}, ("k1", "k2", "k3", "k4")),
    CheckRecord("assets", "skip", "the model is unknown"),
)
SOURCES = (
    SourceRecord("checkpoint", "/in/5", "orbax", 5, "sha256:0123"),
    SourceRecord("merged", "/out", "orbax", None, "sha256:4567"),
)
COMMON: dict[str, Any] = {
    "tool_version": "1.0",
    "sources": SOURCES,
    "seconds": 1.5,
    "peak_rss_bytes": 2**20,
    "versions": {"jax": "0.5"},
}
MODEL: dict[str, Any] = {
    "model": "pi0.5",
    "dialect": "openpi",
    "multiplier": 0.5,
    "serving_dtype": "bfloat16",
    "sites": (SITE,),
}
VERIFY = VerifyReport(
    **COMMON, **MODEL, status="failed", sample=None, min_gain=0.98, strict=False, checks=CHECKS, warnings=("careful",)
)
MERGE = MergeReport(
    **COMMON,
    **MODEL,
    status="merged",
    output="/out",
    output_format="orbax",
    copied=(LeafRecord("params/bias", "copied", "float32", 32),),
    dropped=(DroppedRecord("params/q/lora_a", "merged"),),
    output_bytes=64,
    peak_bytes_planned=128,
    bytes_on_disk=99,
    parents=({"tool_version": "0.9"},),
    warnings=("careful",),
)
DIFF = DiffReport(
    **COMMON,
    status="different",
    atol=None,
    rtol=None,
    top=2,
    counts={"changed": 2, "only-b": 1, "equal": 2},
    prefixes=(PrefixRecord("a/x", 2, 0, 0, 0.0, 0.0), PrefixRecord("a/x/deep", 3, 2, 3, 0.25, 0.5)),
    leaves=(
        DifferenceRecord(
            "params/a/x/deep/w", "a/x/deep", "changed", (2, 3), (2, 3), "float32", "bfloat16", 0.5, 0.25, 0.9, 7, 0.125
        ),
        DifferenceRecord("a/x/deep/v", "a/x/deep", "changed", (2,), (2,), "float32", "float32", 0.25),
        DifferenceRecord("a/x/deep/u", "a/x/deep", "only-b", None, (2,), None, "float32"),
        DifferenceRecord("a/x/b", "a/x", "equal", (2,), (2,), "float32", "float32", 0.0),
        DifferenceRecord("a/x/c", "a/x", "equal", (2,), (2,), "float32", "float32", 0.0),
    ),
)
PASSED = replace(VERIFY, status="passed", checks=CHECKS[:2])
BESIDE: dict[str, Any] = {
    "sources": (
        *SOURCES,
        *(SourceRecord("adapter", f"/a{n}", "safetensors", None, "sha256:89", 0.5) for n in range(2)),
    ),
    "sites": tuple(replace(SITE, label=f"layers.{n}.q", adapter=n % 2, weight=0.5) for n in range(40)),
}
BROUGHT = (LeafRecord("head", "replaced", "float32", 32, "modules_to_save"), LeafRecord("new", "created", "float32", 8))
SWEPT = swept()
# Parts of one name would share a column, and hostile names are all alike.
ONE_PART = tuple(replace(point, parts=point.parts[:1]) for point in SWEPT.points)
REPORTS = [
    MERGE,
    VERIFY,
    DIFF,
    interpolated(),
    replace(SWEPT, points=ONE_PART),
    replace(MERGE, **BESIDE, copied=BROUGHT),
    replace(VERIFY, **BESIDE),
]


def hostile(value: Any) -> Any:
    """The record with every string that a checkpoint, or what is said of one, could be made of, turned hostile."""
    kept = {"command", "status", "dtype", "serving_dtype", "origin", "role", "rounding"}
    if hasattr(value, "__dataclass_fields__"):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        return replace(value, **{name: hostile(field) for name, field in fields.items() if name not in kept})
    if isinstance(value, tuple):
        return tuple(map(hostile, value))
    if isinstance(value, dict):
        return {hostile(key) if isinstance(item, str) else key: hostile(item) for key, item in value.items()}
    return HOSTILE if isinstance(value, str) else value


def suite_of(report: Any) -> ET.Element:
    text = to_junit(report)
    assert text.endswith(">\n")
    suite = ET.fromstring(text.encode()).find("testsuite")
    assert suite is not None
    return suite


def case_of(suite: ET.Element, name: str) -> ET.Element:
    (case,) = [case for case in suite if case.get("name") == name]
    return case


def test_junit_has_one_case_per_check() -> None:
    suite = suite_of(VERIFY)
    counts = {name: suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped", "time")}
    assert list(counts.values()) == ["lora-merge verify", "4", "1", "0", "1", "1.5"]
    assert {case.get("classname") for case in suite} == {"lora_merge.pi0_5"}
    failure = case_of(suite, "fused").find("failure")
    assert failure is not None and failure.get("message") == "2 kernels are wrong"
    assert failure.text == "worst = 12.3457\nk1\nk2\nk3\nk4"
    assert [child.attrib for child in case_of(suite, "assets")] == [{"message": "the model is unknown"}]
    assert case_of(suite, "gain").findtext("system-out") == "warning: a delta is lost\nleast = 0.5\nparams/q"
    assert str(case_of(suite, "layout").findtext("system-out")).startswith("all leaves are there\nleaves = 12\n")


def test_junit_of_merges() -> None:
    (case,) = suite_of(MERGE)
    assert (case.get("name"), case.find("failure")) == ("merge", None)
    assert "warning: careful" in str(case.findtext("system-out"))
    rejected = suite_of(replace(MERGE, status="rejected", checks=CHECKS))
    assert [rejected.get(name) for name in ("name", "tests", "failures")] == ["lora-merge merge", "4", "1"]


def test_junit_of_a_comparison_has_one_case_per_prefix() -> None:
    suite = suite_of(DIFF)
    assert [suite.get(name) for name in ("name", "tests", "failures")] == ["lora-merge diff", "2", "1"]
    assert len(case_of(suite, "a/x")) == 0
    lines = str(case_of(suite, "a/x/deep").findtext("failure")).splitlines()
    assert lines[0].startswith("params/a/x/deep/w: changed, max_abs = 0.5, relative_l2 = 0.25")
    assert lines[2:] == ["and 1 more"]
    within = replace(DIFF, leaves=tuple(replace(leaf, status="within") for leaf in DIFF.leaves))
    assert suite_of(within).get("failures") == suite_of(replace(DIFF, status="equal")).get("failures") == "0"


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.command)
def test_hostile_names_leave_junit_valid(report: Any) -> None:
    text = "".join(ET.tostring(suite_of(hostile(report)), encoding="unicode"))
    assert "head\\x1b\\x00\\ud800\\ufffe\\u202e" in text


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.command)
def test_hostile_names_leave_markdown_whole(report: Any) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(to_markdown(hostile(report)))
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {"text", "code_inline", "strong_open", "strong_close"}
    loose = "".join(child.content for child in inline if child.type == "text")
    assert not re.search(r"[@<#`\[$\x00-\x1f]|://", loose)
    html = " ".join(token.content for token in tokens if token.type == "html_block")
    assert set(re.findall(r"<(/?\w+)", html)) <= {"details", "summary", "/summary", "/details"}
    assert "img" not in html
    name = HOSTILE.replace("\n", "\\n").replace("\x1b\x00\ud800\ufffe\u202e", "\\x1b\\x00\\ud800\\ufffe\\u202e")
    assert name in [child.content for child in inline if child.type == "code_inline"]
    kinds = [token.type for token in tokens]
    plain = [token.type for token in MarkdownIt("commonmark").enable("table").parse(to_markdown(report))]
    assert kinds == plain


def test_prose_marks_only_what_could_be_markup() -> None:
    assert prose("store float32 with --dtype float32 (least 0.9), 2 % / more") == (
        "store float32 with --dtype float32 (least 0.9), 2 % / more"
    )
    assert prose("(params/q): www.x.y and a|b.") == "(`params/q`): `www.x.y` and `a|b`."


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (PASSED, "# pi0.5: verified, 1 passed, 1 warning"),
        (VERIFY, "# pi0.5: NOT verified, 1 check failed, 1 passed, 1 warning, 1 skipped"),
        (MERGE, "# pi0.5: 1 adapter merged"),
        (replace(MERGE, checks=CHECKS[:1]), "# pi0.5: 1 adapter merged and verified, 1 passed"),
        (replace(MERGE, status="planned", sites=(SITE, SITE)), "# pi0.5: 2 adapters planned"),
        (
            replace(MERGE, status="rejected", checks=CHECKS[2:]),
            "# pi0.5: merge REJECTED, 1 check failed, 1 skipped",
        ),
        (DIFF, "# A and B DIFFER: 2 changed, 1 only-b, 2 equal"),
        (replace(DIFF, status="equal", counts={"equal": 5, "changed": 0}), "# A and B are equal: 5 equal"),
    ],
)
def test_the_headline_is_the_verdict(report: Any, expected: str) -> None:
    assert to_markdown(report).splitlines()[0] == expected


def test_markdown_tells_the_worst_first_and_folds_what_is_long() -> None:
    text = to_markdown(replace(VERIFY, sites=(SITE,) * 13))
    order = [
        "**FAIL** `fused`",
        "(`k1`, `k2`, `k3`, and more)",
        "**warn** `gain`",
        "| `layout` | pass |",
        "**careful**",
    ]
    order += ["<summary>13 sites<", "| `q` | 4 | unknown | 0.031 | 0.125 | 1e-07 | 0.750 | 0.500 |", "Inputs and"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "12 sites" not in to_markdown(replace(VERIFY, sites=(SITE,) * 12))


def test_markdown_of_a_comparison_shows_the_top_leaves() -> None:
    text = to_markdown(DIFF)
    assert "| `a/x/deep` | 3 | 2 | 3 | 0.250 | 0.500 |" in text
    row = "| `params/a/x/deep/w` | changed | `float32[2, 3]` | `bfloat16[2, 3]` | 0.250 | 0.500 | 7 | 0.125 | 0 |"
    assert row in text and "a/x/deep/v" in text and "a/x/deep/u" not in text and "And 1 more." in text
    assert "Tolerance: 0.01 absolute, 0 relative to A." in to_markdown(replace(DIFF, atol=0.01, rtol=0.0))


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    return path


def test_a_step_summary_keeps_what_was_there(summary: Path) -> None:
    assert append_step_summary(VERIFY) == append_step_summary(DIFF) == summary
    assert summary.read_text() == f"{to_markdown(VERIFY)}\n\n{to_markdown(DIFF)}"


def test_a_step_summary_stays_below_the_limit(summary: Path) -> None:
    # Sites that are alike share a row, and what is said of their scales does not.
    append_step_summary(
        replace(VERIFY, sites=tuple(replace(SITE, scale_source=f"{'word ' * 9}{n}") for n in range(30_000)))
    )
    short = summary.read_text()
    assert "# pi0.5: NOT verified" in short and "**FAIL**" in short
    assert "the tables" in short and "## Sites" not in short
    for used, grows in ((2**20 - 500, True), (2**20 - 50, False)):
        summary.write_text("x" * used)
        append_step_summary(replace(VERIFY, warnings=("careful",) * 99))
        text = summary.read_text()
        assert (len(text) > used) == ("all else" in text) == grows and len(text) <= 2**20


def test_a_step_summary_that_cannot_be_written(summary: Path) -> None:
    summary.mkdir()
    with pytest.raises(ResourceError, match=r"summary\.md"):
        check_step_summary()


@pytest.mark.parametrize("environment", [{}, {"GITHUB_STEP_SUMMARY": ""}])
def test_a_step_summary_that_nobody_named(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", environment)
    for write in (check_step_summary, lambda: append_step_summary(VERIFY)):
        with pytest.raises(UsageError, match="--github needs GITHUB_STEP_SUMMARY"):
            write()


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def without(document: Any, name: str) -> Any:
    return {key: value for key, value in document.items() if key != name}


@pytest.mark.parametrize("report", [*REPORTS, hostile(VERIFY)], ids=lambda report: report.command)
def test_the_schema_takes_the_reports_and_nothing_else(report: Any, validator: Any) -> None:
    document = json.loads(to_json(report))
    validator.validate(document)
    (source, *_), status = document["sources"], document["status"]
    wrong = [without(document, name) for name in document]
    wrong += [document | {"surplus": 1}, document | {"status": "fine"}, document | {"command": "inspect"}]
    wrong += [document | {"seconds": "1"}, document | {"sources": [source | {"surplus": 1}]}]
    wrong += [document | {"sources": [without(source, "step")]}]
    assert status != "fine" and not [other for other in wrong if validator.is_valid(other)]


def test_the_schema_tells_what_each_field_is() -> None:
    schema = report_schema()
    commands = {"merge", "interpolate", "sweep", "verify", "diff", "extract", "resize"}
    assert schema["discriminator"]["mapping"].keys() == commands
    for record in schema["$defs"].values():
        assert record["description"] and all(field["description"] for field in record["properties"].values())
        assert record["required"] == list(record["properties"]) and record["additionalProperties"] is False
    inherited = schema["$defs"]["VerifyReport"]["properties"]["warnings"]
    assert inherited["description"] == "What should make a reader stop."
    assert "``" not in json.dumps(schema)
