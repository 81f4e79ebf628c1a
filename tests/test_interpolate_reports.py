"""Reports of interpolations and of sweeps, in each format."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lora_merge_cli.report import (
    CheckRecord,
    DroppedRecord,
    GroupRecord,
    InterpolateReport,
    LayerRecord,
    LeafRecord,
    MixedRecord,
    MixingRecord,
    OverrideRecord,
    PartRecord,
    PointRecord,
    SiteRecord,
    SourceRecord,
    SurvivalRecord,
    SweepReport,
    VerifyReport,
)
from lora_merge_cli.reports.github import append_step_summary
from lora_merge_cli.reports.html import to_html
from lora_merge_cli.reports.junit import to_junit
from lora_merge_cli.reports.markdown import to_markdown
from lora_merge_cli.reports.parts import farthest_first, relative_distance, share_of_base
from lora_merge_cli.reports.words import alphas_in_words, mixing_in_words, sweep_in_words

HOSTILE = "</script><script>alert(1)</script><b>&quot;%{y}\ud800\u202e"
ERROR = "a chunk is damaged: /tuned/5 :: params/q (expected 16 bytes, found 3)"
SOURCES = (
    SourceRecord("checkpoint", "/tuned/5", "orbax", 5, "sha256:0123456789abcdef0123456789abcdef"),
    SourceRecord("base", "/base", "orbax", None, "sha256:89abcdef0123456789abcdef01234567"),
)
MIXING = MixingRecord(0.5, (OverrideRecord("PaliGemma/img/**", 0.0),), (0.2, 0.9))
SHARED: dict[str, Any] = {
    "tool_version": "1.2.3",
    "sources": SOURCES,
    "model": "pi0",
    "dialect": "openpi",
    "serving_dtype": "bfloat16",
    "warnings": ("Mind the scale.",),
    "notes": ("Serve it.",),
    "seconds": 12.5,
    "peak_rss_bytes": 2**30,
}
SIZES = {
    "vision tower": (400.0, 0.012, 1.0),
    "language model": (1500.0, 0.03, 0.8),
    "action expert": (300.0, 0.07, 0.97),
}
"""Of each part: the norm of its base, how far the fine-tune moved it relative to that, and what rounding keeps."""


def survival(gain: float | None) -> tuple[SurvivalRecord, ...]:
    return tuple(SurvivalRecord(name, *[gain] * 6) for name in ("float32", "bfloat16"))


def site(label: str = "attn/q", group: str = "paligemma", **changes: Any) -> SiteRecord:
    record = SiteRecord(
        target=f"layers/{label}/w",
        label=label,
        group=group,
        module="q",
        operation="add_delta",
        equation="lr,rm->lm",
        rank=4,
        scale=2.0,
        scale_source="alpha 8 / rank",
        scale_assumed=False,
        shape=(3, 8, 8),
        source_dtype="bfloat16",
        dtype="float32",
        alphas=(0.2, 0.55, 0.9),
        relative_norm=0.0123,
        max_abs=0.0456,
        spectrum=(0.5, 0.25, 0.0),
        survival=survival(0.789),
        layers=tuple(LayerRecord(n, 0.01 * (n + 1), 0.04, survival(0.9)) for n in range(3)),
    )
    return dataclasses.replace(record, **changes)


def unmoved(label: str = "attn/k") -> SiteRecord:
    """A site of which alpha 0 leaves nothing to measure."""
    return site(label, alphas=(0.0,), relative_norm=0.0, max_abs=0.0, spectrum=(), survival=(), layers=())


def part(name: str, alpha: float) -> PartRecord:
    base, moved, kept = SIZES[name]
    wanted = alpha * moved * base
    gain = 1 - (1 - kept) * (1.3 - alpha) if alpha else None
    distance = wanted * (gain or 0)
    gains = (gain, None if gain is None else gain - 0.05)
    return PartRecord(name, 12, 400_000_000, (alpha, alpha), base, wanted, distance, *gains)


def parts(alpha: float) -> tuple[PartRecord, ...]:
    return tuple(part(name, alpha) for name in SIZES)


def mixed(number: int, norm: float | None, **changes: Any) -> MixedRecord:
    record = MixedRecord(f"img/block_{number}/kernel", "vision tower", (0.5,), "float32", 4096, norm, survival(0.876))
    return dataclasses.replace(record, **changes)


def interpolated(**changes: Any) -> InterpolateReport:
    """One alpha, with a schedule and an override."""
    report = InterpolateReport(
        **SHARED,
        status="interpolated",
        multiplier=1.0,
        groups=(GroupRecord("vision tower", "trained", 3, 400, 800), GroupRecord("expert", "lora", 1, 100, 200)),
        sites=(site(), unmoved()),
        output="/soup",
        output_format="orbax",
        copied=(LeafRecord("head/ids", "copied", "int32", 2048),),
        dropped=(DroppedRecord("layers/q/lora_a", "adapter factor, merged into its kernel"),),
        output_bytes=4096,
        peak_bytes_planned=8192,
        bytes_on_disk=5000,
        mixing=MIXING,
        mixed=(mixed(0, 0.01), mixed(1, None, alphas=(0.0,), survival=()), mixed(2, 0.04)),
        parts=(dataclasses.replace(part("vision tower", 0.5), alphas=(0.2, 0.9)), part("action expert", 0.0)),
        not_interpolated=tuple(f"new_head_{number}/kernel" for number in range(7)),
    )
    return dataclasses.replace(report, **changes)


def swept(**changes: Any) -> SweepReport:
    """Five alphas, three parts; one alpha failed."""
    points = tuple(
        PointRecord(
            alpha,
            f"/sweep/alpha-{alpha}",
            "written",
            parts=parts(alpha),
            least_gain_stored=0.99 if alpha else None,
            least_gain_served=0.6 + 0.3 * alpha if alpha else None,
            bytes_on_disk=3 * 2**30,
        )
        for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    failed = PointRecord(0.75, "/sweep/alpha-0.75", "failed", ERROR)
    report = SweepReport(
        **SHARED,
        status="incomplete",
        output="/sweep",
        mixing=MixingRecord(0.0, (OverrideRecord("PaliGemma/img/pos_embedding", 0.0),)),
        points=(*points[:3], failed, points[4]),
    )
    return dataclasses.replace(report, **changes)


def planned(report: SweepReport) -> SweepReport:
    points = tuple(PointRecord(point.alpha, point.output, "planned") for point in report.points)
    return dataclasses.replace(report, status="planned", points=points)


def verified(**changes: Any) -> VerifyReport:
    report = VerifyReport(
        **SHARED,
        status="passed",
        multiplier=1.0,
        sites=(site(), unmoved()),
        sample=None,
        min_gain=0.98,
        strict=False,
        mixing=MIXING,
    )
    return dataclasses.replace(report, **changes)


def page(html: str) -> str:
    """Without the source of plotly.js, which takes long to search."""
    before, _, rest = html.partition('<script id="plotly">')
    return before + rest.partition("</script>")[2]


def charts(html: str) -> dict[str, dict[str, Any]]:
    """By name, in the order of the page."""
    document = html.partition('<script type="application/json" id="charts">')[2].partition("</script>")[0]
    return {chart["name"]: chart for chart in json.loads(document or "[]")}


def traces(chart: dict[str, Any]) -> dict[tuple[str, bool], dict[str, Any]]:
    """By name, and whether it is dashed."""
    return {(trace["name"], trace.get("line", {}).get("dash") == "dash"): trace for trace in chart["data"]}


def table(html: str, label: str) -> list[list[str]]:
    """The body of the sortable table with that label, as text."""
    (body,) = re.findall(rf'aria-label="{label}".*?<tbody>(.*?)</tbody>', page(html), flags=re.DOTALL)
    cells = (re.findall(r"<t[hd][ >].*?</t[hd]>", row, flags=re.DOTALL) for row in body.split("</tr>")[:-1])
    return [[unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in cells]


def near(found: list[float | None], expected: list[float | None]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-3) for a, b in pairs)


def cases(report: Any) -> list[ET.Element]:
    suite = ET.fromstring(to_junit(report).encode()).find("testsuite")
    assert suite is not None and suite.get("name") == f"lora-merge {report.command}"
    return list(suite)


def line_with(text: str, words: str) -> str:
    (line,) = [line for line in text.splitlines() if words in line]
    return line


# Words


@pytest.mark.parametrize(
    ("alphas", "said"),
    [
        ((0.5,), "0.5"),
        ((1.0,), "1"),
        ((0.2, 0.9), "0.2 to 0.9"),
        ((0.9, 0.5, 0.1), "0.9 to 0.1"),
        ((0.3, 0.3), "0.3"),
        ((), "-"),
    ],
)
def test_alphas_in_words(alphas: tuple[float, ...], said: str) -> None:
    assert alphas_in_words(alphas) == said


@pytest.mark.parametrize(
    ("mixing", "said"),
    [
        (MixingRecord(0.3), "alpha 0.3"),
        (MIXING, "alpha 0.5; PaliGemma/img/**: 0; layers 0.2 to 0.9"),
        (MixingRecord(1.5, deltas_only=True), "alpha 1.5 of the adapters' deltas alone, for want of a base"),
        (MixingRecord(0.0, only_common="base"), "alpha 0; leaves that are not common: the base's"),
        (MixingRecord(0.0, only_common="tuned"), "alpha 0; leaves that are not common: the fine-tune's"),
    ],
)
def test_mixing_in_words(mixing: MixingRecord, said: str) -> None:
    assert mixing_in_words(mixing) == said


def test_a_sweep_in_words_has_all_alphas() -> None:
    assert sweep_in_words(swept()) == "alpha 0, 0.25, 0.5, 0.75, 1; PaliGemma/img/pos_embedding: 0"


# Parts


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2**32 - 1)), min_size=1, max_size=4))
def test_the_distance_of_all_parts_is_that_of_one_long_vector(sizes: list[tuple[int, int]]) -> None:
    pairs = [np.random.default_rng(seed).normal(size=(2, size)) for size, seed in sizes]
    found = [
        PartRecord(str(n), 1, 1, (0.5, 0.5), float(np.linalg.norm(base)), 9.0, float(np.linalg.norm(moved)), None, None)
        for n, (base, moved) in enumerate(pairs)
    ]
    base, moved = (np.concatenate([pair[row] for pair in pairs]) for row in (0, 1))
    assert relative_distance(found) == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(base))


def test_a_base_of_zeros_has_no_share() -> None:
    zeros = PartRecord("new", 1, 1, (0.5, 0.5), 0.0, 1.0, 1.0, 1.0, 1.0)
    assert share_of_base(1.0, zeros) is None
    assert relative_distance([zeros]) is relative_distance([]) is None


def test_leaves_of_unknown_distance_come_last() -> None:
    found = farthest_first([mixed(0, None), mixed(1, 0.0), mixed(2, 0.5)])
    assert [leaf.relative_norm for leaf in found] == [0.5, 0.0, None]


# Markdown


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (interpolated(), "# pi0: interpolated at alpha 0.5"),
        (interpolated(status="planned"), "# pi0: interpolation at alpha 0.5 planned"),
        (
            interpolated(checks=(CheckRecord("layout", "pass", "fine"),)),
            "# pi0: interpolated and verified at alpha 0.5, 1 passed",
        ),
        (
            interpolated(status="rejected", checks=(CheckRecord("layout", "fail", "bad"),)),
            "# pi0: interpolation at alpha 0.5 REJECTED, 1 check failed",
        ),
        (swept(), "# pi0: sweep of 5 alphas INCOMPLETE, 1 failed"),
        (swept(status="complete", points=swept().points[:3]), "# pi0: sweep of 3 alphas complete"),
        (planned(swept(model="unknown")), "# sweep of 5 alphas planned"),
    ],
)
def test_the_headline_is_the_verdict(report: Any, said: str) -> None:
    assert to_markdown(report).splitlines()[0] == said


def test_markdown_of_an_interpolation() -> None:
    text = to_markdown(interpolated())
    order = [
        "Mixing: alpha 0.5; `PaliGemma/img/**`: 0; layers 0.2 to 0.9.",
        "**NOT interpolated: 7 trained leaves without a base. At every alpha they are the fine-tune's.**",
        "- `new_head_6/kernel`",
        "**Mind the scale.**",
        "## Parts",
        "## Sites",
        "## Interpolated leaves",
        "1 neither adapted nor interpolated, 1 dropped",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "| vision tower | 12 | 400.0 M | 0.2 to 0.9 | 400.000 | 2.400 | 2.400 | 0.006 | 1.000 | 0.950 |" in text
    assert "| action expert | 12 | 400.0 M | 0 | 300.000 | 0 | 0 | 0 | - | - |" in text
    assert line_with(text, "layers/attn/q/w").startswith("| `layers/attn/q/w` | 0.2 to 0.9 | 4 |")
    assert line_with(text, "layers/attn/k/w").endswith("| 0 | 0 | 0 | - | - |")
    leaves = [line for line in text.splitlines() if line.startswith("| `img/")]
    assert leaves == [
        "| `img/block_2/kernel` | vision tower | 0.5 | float32 | 4.1 k | 0.040 | 0.876 | 0.876 |",
        "| `img/block_0/kernel` | vision tower | 0.5 | float32 | 4.1 k | 0.010 | 0.876 | 0.876 |",
        "| `img/block_1/kernel` | vision tower | 0 | float32 | 4.1 k | - | - | - |",
    ]


def test_markdown_shows_the_first_of_many_leaves() -> None:
    many = interpolated(
        mixed=tuple(mixed(number, number / 100) for number in range(100)),
        not_interpolated=tuple(f"head_{number}" for number in range(45)),
    )
    text = to_markdown(many)
    assert (
        "img/block_99/" in text and "img/block_60/" in text and "img/block_59/" not in text and "And 60 more." in text
    )
    assert "head_39`" in text and "head_40`" not in text and "- and 5 more" in text


def test_markdown_of_a_sweep() -> None:
    text = to_markdown(swept())
    assert f"**FAIL** alpha 0.75: {ERROR[:18]}" in text
    assert text.index("**FAIL**") < text.index("Mind the scale.") < text.index("## Outputs")
    row = "| 0.25 | `/sweep/alpha-0.25` | written | 0.00652 | 0.990 | 0.675 | 3.0 GiB | - |"
    assert row in text
    assert line_with(text, "| FAILED |").startswith("| 0.75 | `/sweep/alpha-0.75` | FAILED | - | - | - | - | a chunk")
    _, distance, gains = (re.split(r"\n## ", text)[n].splitlines() for n in (-3, -2, -1))
    assert distance[2] == "| alpha | vision tower | language model | action expert |"
    assert [line for line in distance if line.startswith("| 1 ")] == ["| 1 | 0.012 | 0.028 | 0.069 |"]
    assert [line for line in gains if line.startswith("| 0 ")] == ["| 0 | - / - | - / - | - / - |"]
    assert [line for line in gains if line.startswith("| 1 ")] == [
        "| 1 | 1.000 / 0.950 | 0.940 / 0.890 | 0.991 / 0.941 |"
    ]
    assert not [line for line in distance + gains if line.startswith("| 0.75")]


def test_markdown_of_a_planned_sweep_measures_nothing() -> None:
    text = to_markdown(planned(swept()))
    assert "| 0.75 | `/sweep/alpha-0.75` | planned | - |" in text
    assert "## Distance" not in text and "## Survival" not in text


def test_hostile_names_leave_the_markdown_of_a_sweep_whole() -> None:
    nasty = "a|b`c``d <img src=x> @team [x](http://e.vil) *_\u202e"
    points = tuple(
        dataclasses.replace(
            point,
            output=nasty,
            error=point.error and nasty,
            parts=tuple(dataclasses.replace(found, part=f"{nasty}{n}") for n, found in enumerate(point.parts)),
        )
        for point in swept().points
    )
    reader = MarkdownIt("commonmark").enable("table")
    plain = [token.type for token in reader.parse(to_markdown(swept()))]
    tokens = reader.parse(to_markdown(swept(points=points)))
    assert [token.type for token in tokens] == plain
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {"text", "code_inline", "strong_open", "strong_close"}


def test_a_verification_says_which_alpha_it_expects() -> None:
    text = to_markdown(verified())
    assert "Mixing: alpha 0.5; `PaliGemma/img/**`: 0; layers 0.2 to 0.9." in text
    assert line_with(text, "| `attn/q`").startswith("| `attn/q` | 0.2 to 0.9 | 4 |")
    html = to_html(verified())
    assert page(html).count("PaliGemma/") == 2
    assert [row[2] for row in table(html, "Adapters")] == ["0.2 to 0.9", "0"]
    plain = to_html(verified(mixing=None))
    assert "mixing" not in page(plain)
    assert [row[2] for row in table(plain, "Adapters")] == ["4", "4"]


# JUnit


def test_junit_of_an_interpolation() -> None:
    (case,) = cases(interpolated())
    lines = str(case.findtext("system-out")).splitlines()
    assert case.get("name") == "interpolate"
    assert lines[0] == "interpolated: alpha 0.5; PaliGemma/img/**: 0; layers 0.2 to 0.9"
    assert "NOT interpolated: new_head_0/kernel, it has no base" in lines
    assert lines[-1] == "warning: Mind the scale."
    checked = interpolated(checks=(CheckRecord("layout", "pass", "fine"), CheckRecord("fused", "fail", "bad")))
    assert [(case.get("name"), case.find("failure") is None) for case in cases(checked)] == [
        ("layout", True),
        ("fused", False),
    ]


def test_junit_of_a_sweep_has_one_case_per_alpha() -> None:
    found = cases(swept())
    assert [case.get("name") for case in found] == [f"alpha {alpha}" for alpha in ("0", "0.25", "0.5", "0.75", "1")]
    assert [case.find("failure") is not None for case in found] == [False, False, False, True, False]
    failure = found[3].find("failure")
    assert failure is not None and failure.get("message") == ERROR and failure.text == "/sweep/alpha-0.75"
    lines = str(found[2].findtext("system-out")).splitlines()
    assert lines[0] == "written: /sweep/alpha-0.5, 3.0 GiB"
    assert lines[1] == "vision tower: distance / |W_base| = 0.006, gain stored = 1, gain served = 0.95"
    assert not [case for case in cases(planned(swept())) if case.find("failure") is not None]


def test_a_failure_without_a_reason_is_a_failure() -> None:
    point = PointRecord(0.5, "/out", "failed")
    (case,) = cases(swept(points=(point,)))
    assert case.find("failure") is not None
    assert "**FAIL** alpha 0.5: no reason is known" in to_markdown(swept(points=(point,)))
    assert "alpha 0.5: no reason is known" in to_html(swept(points=(point,)))


# HTML


@pytest.mark.parametrize("report", [interpolated(), swept(), planned(swept())], ids=lambda report: report.status)
def test_nothing_is_fetched(report: Any) -> None:
    html = to_html(report)
    assert ('id="plotly"' in html) == bool(charts(html))
    assert not re.findall(r"https?://|//cdn|@import|url\(|<link|<iframe|<img|\bsrc=", page(html))
    assert not re.search(r"\b(None|nan|Undefined)\b", page(html))


def test_html_of_an_interpolation() -> None:
    html = to_html(interpolated())
    text = page(html)
    order = [
        "Interpolated\n",
        "Not interpolated",
        "Mind the scale.",
        "<dt>mixing",
        "<h2>Parts",
        "<h2>Deltas",
        "<h2>Adapters",
    ]
    order += ["<h2>Interpolated leaves", "1 neither adapted nor interpolated", "1 dropped"]
    places = [text.replace("</span>", "\n").index(words) for words in order]
    assert places == sorted(places)
    assert "7 trained leaves have no base" in text and "2 more</summary>" in text
    assert all(f"new_head_{number}/<wbr>kernel" in text for number in range(7))
    assert table(html, "Parts") == [
        ["vision tower", "0.2 to 0.9", "12", "400.0 M", *["400.000", "2.400", "2.400", "0.006", "1.000", "0.950"]],
        ["action expert", "0", "12", "400.0 M", "300.000", "0", "0", "0", "-", "-"],
    ]
    assert table(html, "Adapters") == [
        ["attn/q", "paligemma", "0.2 to 0.9", "4", "2", "bfloat16 → float32", "0.012", "0.046", "0.789", "0.789"],
        ["attn/k", "paligemma", "0", "4", "2", "bfloat16 → float32", "0", "0", "-", "-"],
    ]
    assert [[row[0], *row[5:]] for row in table(html, "Interpolated leaves")] == [
        ["img/block_2/kernel", "0.040", "0.876", "0.876"],
        ["img/block_0/kernel", "0.010", "0.876", "0.876"],
        ["img/block_1/kernel", "-", "-", "-"],
    ]
    assert {"size-0", "gain-0", "spectrum-0", "parts"} == set(charts(html))


def test_html_of_an_interpolation_of_dense_checkpoints() -> None:
    html = to_html(interpolated(sites=(), not_interpolated=(), groups=()))
    assert charts(html) == {} and "Not interpolated" not in html
    assert "adapters</dt>" not in html and "<dt>alpha</dt>" in html


def test_many_sites_share_rows_and_tell_their_alphas() -> None:
    sites = tuple(site(f"layers.{n}.q", alphas=(n / 40,)) for n in range(41))
    ((_, _, alpha, count, layers),) = [row[:5] for row in table(to_html(interpolated(sites=sites)), "Sites by kind")]
    assert (alpha, count, layers) == ("0 to 1", "41", "0-40")
    assert "| `q` | 0 to 1 | 41 | 0-40 |" in to_markdown(interpolated(sites=sites))


def test_html_says_when_there_are_too_many_leaves() -> None:
    html = to_html(interpolated(mixed=tuple(mixed(number, number / 1e4) for number in range(2001))))
    assert "The first 2,000 of 2,001" in html
    assert len(table(html, "Interpolated leaves")) == 2000
    assert "img/<wbr>block_0/<wbr>" not in html and "img/<wbr>block_2000/<wbr>" in html


def test_html_of_a_sweep_shows_its_outputs() -> None:
    html = to_html(swept())
    text = page(html)
    assert "<strong>1</strong> failed" in text and "<strong>4</strong> written" in text and "Incomplete" in text
    assert text.index(ERROR) < text.index("Mind the scale.") < text.index("<h2>Over alpha") < text.index("<h2>Outputs")
    found = table(html, "Outputs")
    assert [row[:2] for row in found] == [[a, "written"] for a in ("0", "0.25", "0.5")] + [
        ["0.75", "failed"],
        ["1", "written"],
    ]
    assert found[1][2:] == ["/sweep/alpha-0.25", "0.00652", "0.990", "0.675", "3.0 GiB", "-"]
    assert found[3][2:] == ["/sweep/alpha-0.75", "-", "-", "-", "-", ERROR]
    fine = to_html(swept(status="complete", points=swept().points[:3]))
    assert "Failed" not in page(fine) and {len(row) for row in table(fine, "Outputs")} == {7}


def test_distances_are_relative_and_wanted_is_dashed_where_it_differs() -> None:
    drawn = traces(charts(to_html(swept()))["distance"])
    tower, model = drawn["vision tower", False], drawn["language model", False]
    assert tower["x"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    # The failed alpha is a gap, no point between its neighbours.
    assert tower["y"] == [0.0, 0.003, 0.006, None, 0.012]
    assert near(model["y"], [0.0, 0.25 * 0.03 * 0.79, 0.5 * 0.03 * 0.84, None, 0.03 * 0.94])
    wanted = drawn["language model", True]
    assert near(wanted["y"], [0.0, 0.0075, 0.015, None, 0.03]) and not wanted["showlegend"]
    assert ("vision tower", True) not in drawn


def test_survival_is_of_parts_and_of_adapters() -> None:
    drawn = traces(charts(to_html(swept()))["survival"])
    model = drawn["language model", False]["y"], drawn["language model", True]["y"]
    assert near(model[0], [None, 0.79, 0.84, None, 0.94]) and near(model[1], [None, 0.74, 0.79, None, 0.89])
    adapters = drawn["least of the adapters", False]["y"], drawn["least of the adapters", True]["y"]
    assert adapters == ([None, 0.99, 0.99, None, 0.99], [None, 0.675, 0.75, None, 0.9])
    without = tuple(
        dataclasses.replace(point, least_gain_stored=None, least_gain_served=None) for point in swept().points
    )
    assert ("least of the adapters", False) not in traces(charts(to_html(swept(points=without)))["survival"])


def test_a_failed_alpha_is_a_cross_on_the_axis() -> None:
    found = charts(to_html(swept()))
    for chart in found.values():
        *_, cross = chart["data"]
        assert (cross["name"], cross["x"], cross["marker"]["symbol"]) == ("failed", [0.75], "x")
        low, high = chart["layout"]["yaxis"]["range"]
        assert low < cross["y"][0] < low + 0.1 * (high - low)
        assert cross["customdata"][0].replace("<br>", " ") == ERROR
        for theme in ("light", "dark"):
            colours = chart["themes"][theme][0]["line.color"]
            assert len(colours) == len(chart["data"]) and colours[-1] == "--fail"
    assert "failed" not in {
        trace["name"] for trace in charts(to_html(swept(points=swept().points[:3])))["distance"]["data"]
    }


def test_what_nothing_was_measured_of_is_not_drawn() -> None:
    assert charts(to_html(planned(swept()))) == {}
    at_zero = PointRecord(0.0, "/out", "written", parts=parts(0.0))
    assert list(charts(to_html(swept(points=(at_zero,))))) == ["distance"]
    zeros = dataclasses.replace(part("vision tower", 0.5), base_norm=0.0)
    assert list(charts(to_html(swept(points=(PointRecord(0.5, "/out", "written", parts=(zeros,)),))))) == ["survival"]


FIGURE = st.none() | st.floats(-2, 3)
LENGTH = st.floats(0, 1e6)
# The least length of a float32 vector that is not zero.
BASE_LENGTH = st.just(0.0) | st.floats(2.0**-149, 1e6)
PART = st.builds(
    PartRecord,
    st.sampled_from(["a", "b"]),
    st.just(1),
    st.just(1),
    st.just((0.0, 1.0)),
    BASE_LENGTH,
    LENGTH,
    LENGTH,
    FIGURE,
    FIGURE,
)
POINT = st.builds(
    PointRecord,
    st.sampled_from([-0.5, 0.0, 0.1, 0.11, 0.5, 1.0, 1.5]),
    st.just("/out"),
    st.sampled_from(["written", "kept", "failed"]),
    st.none(),
    st.lists(PART, max_size=2, unique_by=lambda found: found.part).map(tuple),
    FIGURE,
    FIGURE,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(POINT, min_size=1, max_size=5, unique_by=lambda point: point.alpha))
def test_every_point_lies_on_its_axes(points: list[PointRecord]) -> None:
    from lora_merge_cli.reports.charts import sweep_charts

    ascending = tuple(sorted(points, key=lambda point: point.alpha))
    for chart in sweep_charts(swept(points=ascending)):
        layout = chart.document["layout"]
        x, y = (layout[axis]["range"] for axis in ("xaxis", "yaxis"))
        assert x[0] < x[1] and y[0] < y[1] and all(map(math.isfinite, (*x, *y)))
        seen = [pair for trace in chart.document["data"] for pair in zip(trace["x"], trace["y"], strict=True)]
        assert all(x[0] <= at <= x[1] and (value is None or y[0] <= value <= y[1]) for at, value in seen)
        assert all(len(figures) == len(chart.columns) for _, figures in chart.rows)


@pytest.mark.parametrize("count", [2, 11, 40])
def test_ticks_are_the_alphas_as_long_as_there_is_room(count: int) -> None:
    alphas = [number / (count - 1) for number in range(count)]
    points = tuple(PointRecord(alpha, "/out", "written", parts=parts(alpha)) for alpha in alphas)
    axis = charts(to_html(swept(points=points)))["distance"]["layout"]["xaxis"]
    assert axis.get("tickvals") == (alphas if count <= 11 else None)


def test_hostile_names_stay_text() -> None:
    texts = {"model": HOSTILE, "warnings": (HOSTILE,), "notes": (HOSTILE,), "output": HOSTILE}
    mixing = MixingRecord(0.5, (OverrideRecord(HOSTILE, 0.0),))
    named = tuple(dataclasses.replace(found, part=f"{HOSTILE}{n}") for n, found in enumerate(parts(0.5)))
    leaf = mixed(0, 0.5, path=HOSTILE, part=HOSTILE, dtype=HOSTILE)
    failed = PointRecord(0.75, HOSTILE, "failed", HOSTILE)
    points = (PointRecord(0.5, HOSTILE, "written", parts=named), failed)
    one = interpolated(**texts, mixing=mixing, parts=named, mixed=(leaf,), not_interpolated=(HOSTILE,) * 7)
    for html in (to_html(one), to_html(swept(**texts, mixing=mixing, points=points)), to_html(verified(mixing=mixing))):
        html.encode()
        assert "alert(1)" in page(html)
        assert "<script>alert" not in html and "<b>&" not in html and "\u202e" not in html
        assert page(html).count("</script") == page(html).count("<script")
        drawn = json.dumps(charts(html), ensure_ascii=False)
        assert "\u202e" not in drawn and "<" not in re.sub(r"</?(b|extra)>|<br>", "", drawn)
        templates = re.findall(r'"hovertemplate": "([^"]*)"', drawn)
        assert templates and not any("alert" in template for template in templates)


# GitHub


def test_a_step_summary_holds_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    append_step_summary(interpolated())
    append_step_summary(swept())
    assert path.read_text() == f"{to_markdown(interpolated())}\n\n{to_markdown(swept())}"
