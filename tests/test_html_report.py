"""The HTML report: what it holds, that it fetches nothing, and that names from a checkpoint stay text."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from html import unescape
from typing import Any

import pytest

from lora_merge_cli.report import (
    CheckRecord,
    DifferenceRecord,
    DiffReport,
    DroppedRecord,
    GroupRecord,
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
from lora_merge_cli.reports.html import to_html

HOSTILE = "</script><script>alert(1)</script><b>&quot;\ud800\u202e"
SOURCE = SourceRecord("checkpoint", "/in/5", "orbax", 5, "sha256:0123456789abcdef0123456789abcdef")
CHECKS = (
    CheckRecord("readable", "pass", "All is read.", {"leaves": 12345}),
    CheckRecord("base", "skip", "There is no base."),
    CheckRecord("fused-exact", "fail", "Wrong by a factor.", {"worst_share": None}, tuple(f"key{n}" for n in range(9))),
)


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
        relative_norm=0.0123,
        max_abs=0.0456,
        spectrum=(0.5, 0.25, 0.0),
        survival=survival(0.789),
        proof=ProofRecord(0.432, 0, 1e-7, 0.1, 0.2),
        layers=tuple(LayerRecord(n, 0.01 * (n + 1), 0.04, survival(0.9)) for n in (0, 2)),
    )
    return dataclasses.replace(record, **changes)


def verified(**changes: Any) -> VerifyReport:
    report = VerifyReport(
        tool_version="1.2.3",
        status="failed",
        sources=(SOURCE,),
        model="pi0",
        dialect="openpi",
        multiplier=1.0,
        serving_dtype="bfloat16",
        groups=(GroupRecord("vision tower", "frozen", 3, 400, 800), GroupRecord("expert", "lora", 1, 100, 200)),
        sites=(site(), site("attn/q_1", "action_expert", scale_assumed=True)),
        checks=CHECKS,
        warnings=("Mind the scale.",),
        notes=("Serve it.",),
        sample=None,
        min_gain=0.98,
        strict=False,
    )
    return dataclasses.replace(report, **changes)


def merged(**changes: Any) -> MergeReport:
    judge = verified()
    shared = {name: getattr(judge, name) for name in ("tool_version", "sources", "model", "dialect", "multiplier")}
    report = MergeReport(
        **shared,
        serving_dtype="bfloat16",
        sites=judge.sites,
        status="merged",
        output="/out/5",
        output_format="orbax",
        copied=(LeafRecord("img/kernel", "copied", "float32", 2048),),
        dropped=(DroppedRecord("layers/q/lora_a", "merged into its kernel"),),
        output_bytes=4096,
        peak_bytes_planned=8192,
        parents=({"tool": "lora-merge 0.9"},),
    )
    return dataclasses.replace(report, **changes)


def differing(leaves: tuple[DifferenceRecord, ...]) -> DiffReport:
    return DiffReport(
        tool_version="1.2.3",
        sources=(dataclasses.replace(SOURCE, role="a"), dataclasses.replace(SOURCE, role="b")),
        status="different",
        atol=None,
        rtol=None,
        top=2,
        counts={"changed": len(leaves)},
        prefixes=(PrefixRecord("layers", 3, 1, 2, 0.321, None),),
        leaves=leaves,
    )


def page(html: str) -> str:
    """Without the source of plotly.js."""
    return re.sub(r'<script id="plotly">.*?</script>', "", html, flags=re.DOTALL)


def charts(html: str) -> dict[str, dict[str, Any]]:
    """By name, in the order of the page."""
    found = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', html, flags=re.DOTALL)
    return {chart["name"]: chart for chart in json.loads(found[0])} if found else {}


def ink(chart: dict[str, Any], property: str, layout: bool = False) -> Any:
    """What both themes set a property to."""
    light, dark = (chart["themes"][theme][layout][property] for theme in ("light", "dark"))
    assert light == dark
    return light


def notes(chart: dict[str, Any]) -> list[str]:
    return [note["text"] for note in chart["layout"]["annotations"]]


def rows(html: str) -> list[list[str]]:
    """The body of the sortable tables as text, row by row."""
    bodies = "".join(re.findall(r'<table class="sortable">.*?<tbody>(.*?)</tbody>', html, flags=re.DOTALL))
    cells = (re.findall(r"<t[hd][ >].*?</t[hd]>", row, flags=re.DOTALL) for row in bodies.split("</tr>")[:-1])
    return [[unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in cells]


DIFFERENT = differing(
    (DifferenceRecord("layers/w", "layers", "changed", (2,), (2,), "bfloat16", "float32", 0.111, 0.222),)
)


@pytest.mark.parametrize("report", [verified(), merged(), DIFFERENT], ids=lambda report: report.command)
def test_nothing_is_fetched(report: Any) -> None:
    html = to_html(report)
    assert ('id="plotly"' in html) == bool(charts(html))
    assert not re.findall(r"https?://|//cdn|@import|url\(|<link|<iframe|<img|\bsrc=", page(html))
    assert {target[0] for target in re.findall(r'href="([^"]*)"', page(html))} == {"#"}
    assert "default-src 'none'" in html


def test_a_verification_shows_its_checks_sites_and_charts() -> None:
    html = page(to_html(verified()))
    for check in CHECKS:
        assert all(text in html for text in (check.id, check.message, *check.where)), check.id
    assert html.index("Wrong by a factor.") < html.index("All is read.") < html.index("There is no base.")
    for text in ("12,345", "6 more", "Mind the scale.", "Serve it.", "frozen + LoRA", "vision tower", "step 5"):
        assert text in html, text
    figures = ["bfloat16 → float32", "0.012", "0.046", "0.789", "0.789", "0.432"]
    assert rows(html) == [
        ["attn/q", "paligemma", "4", "2", *figures],
        ["attn/q_1", "action_expert", "4", "2 (assumed)", *figures],
    ]
    assert html.count('class="number low"') == 4


@pytest.mark.parametrize(("warnings", "said"), [(0, "0 warnings"), (1, "1 warning"), (2, "2 warnings")])
def test_checks_are_counted(warnings: int, said: str) -> None:
    html = page(to_html(verified(checks=CHECKS + (CheckRecord("assets", "warn", "Odd."),) * warnings)))
    tally = re.findall(r"<strong>(\d+)</strong> (\w+)</li>", html)
    assert [" ".join(item) for item in tally] == ["1 passed", said, "1 failed", "1 skipped"]


def test_charts_keep_gaps_and_leave_zeros_out_of_a_logarithm() -> None:
    drawn = charts(to_html(verified()))
    by_expert = [f"{kind}-{number}" for kind in ("size", "gain", "spectrum") for number in (0, 1)]
    assert list(drawn) == [*by_expert, "shares", "parts"]
    size, gain, spectrum = (drawn[f"{kind}-0"] for kind in ("size", "gain", "spectrum"))
    assert size["data"][0]["x"] == [0, 1, 2]
    assert size["data"][0]["z"] == [[0.01, None, 0.03]]
    assert gain["data"][0]["z"] == [[0.9, None, 0.9]]
    assert size["layout"]["coloraxis"]["cmax"] == 0.03
    assert spectrum["data"][0]["y"] == [0.5, 0.25, None]
    assert spectrum["layout"]["yaxis"]["type"] == "log"
    for chart in drawn.values():
        assert set(chart["themes"]) == {"light", "dark"}
        assert chart["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"


def test_sites_without_a_delta_have_no_spectrum() -> None:
    blank = site(spectrum=(0.0, 0.0), survival=survival(None), layers=(LayerRecord(0, 0.0, 0.0, survival(None)),))
    assert list(charts(to_html(verified(sites=(blank,), groups=())))) == ["size-0", "shares"]


def test_parts_are_stacked_by_what_became_of_them() -> None:
    groups = (
        GroupRecord("projections", "trained", 4, 1, 4),
        GroupRecord("language model", "lora", 5, 1_980_000_000, 3_960_000_000),
        GroupRecord("language model", "frozen", 3, 527_000_000, 2048),
    )
    html = to_html(verified(groups=groups))
    chart = charts(html)["parts"]
    assert chart["layout"]["yaxis"]["ticktext"] == ["language model", "projections"]
    assert notes(chart) == ["2.5 B", "1"]
    frozen, lora, trained, rest = chart["data"]
    assert [trace["name"] for trace in (frozen, lora, trained)] == [
        "frozen <b>527.0 M</b>",
        "frozen + LoRA <b>2.0 B</b>",
        "fully trained <b>1</b>",
    ]
    assert (frozen["y"], frozen["x"], frozen["customdata"]) == ([0], [527_000_000], [[3, "527.0 M", "2.0 KiB"]])
    # A single parameter is seen beside billions, and every row is as long as the longest.
    assert trained["x"][0] > 10_000_000
    assert rest["x"] == [0, chart["layout"]["xaxis"]["range"][1] - trained["x"][0]]
    assert ink(chart, "marker.color") == ["--frozen", "--lora", "--trained", "--well"]
    assert "<h3>What the fine-tune trained</h3>" in html
    assert "language model: frozen + LoRA" in html and "1,980,000,000" in html


def test_kernels_beyond_their_bound_stand_out() -> None:
    shares = (0.432, 5123.4, None, 1.0)
    sites = tuple(site(proof=ProofRecord(share, 0, None, None, None)) for share in shares)
    html = to_html(verified(sites=sites, groups=()))
    chart = charts(html)["shares"]
    bars, rest = chart["data"]
    edge = chart["layout"]["xaxis"]["range"][1]
    assert bars["x"] == [0.432, edge, edge, 1.0]
    assert [bar + track for bar, track in zip(bars["x"], rest["x"], strict=True)] == [edge] * 4
    assert bars["marker"]["pattern"]["shape"] == ["", "", "/", ""]
    assert notes(chart) == ["0.432", "✕ 5.12e+03", "✕ not finite", "1.000"]
    assert ink(chart, "marker.color")[0] == ["--accent", "--fail", "--fail", "--accent"]
    assert [ink(chart, f"annotations[{number}].font.color", layout=True) for number in (1, 2)] == ["--fail"] * 2
    assert [(line["x0"], line["x1"]) for line in chart["layout"]["shapes"]] == [(1, 1)]
    assert html.count("✕ not finite</td>") == 1


def test_many_kernels_show_the_worst_of_them() -> None:
    shares = [number / 100 for number in range(70)]
    sites = tuple(site(f"{share}", proof=ProofRecord(share, 0, None, None, None)) for share in shares)
    html = to_html(verified(sites=sites, groups=()))
    assert charts(html)["shares"]["data"][0]["x"] == shares[:55:-1]
    assert "The 14 worst of 70." in html


@pytest.mark.parametrize(("looked_at", "said"), [((0, 2), True), ((0, 1, 2), False)])
def test_a_sample_says_how_many_layers_it_is_of(looked_at: tuple[int, ...], said: bool) -> None:
    layers = tuple(LayerRecord(number, 0.01, 0.04, survival(0.9)) for number in looked_at)
    html = page(to_html(verified(sites=(site(layers=layers),), sample=len(looked_at))))
    assert (f"same colours. {len(looked_at)} layers were looked at." in html) == said
    assert f"{len(looked_at)} layers of each site were looked at." in html


def test_hostile_names_stay_text() -> None:
    nasty = CheckRecord(HOSTILE, "warn", HOSTILE, {HOSTILE: HOSTILE}, (HOSTILE,) * 5)
    source = SourceRecord(HOSTILE, HOSTILE, HOSTILE, 1, HOSTILE)
    texts = {"model": HOSTILE, "warnings": (HOSTILE,), "notes": (HOSTILE,), "sources": (source,)}
    sites = (site(HOSTILE, HOSTILE, module=HOSTILE, scale_source=HOSTILE, equation=HOSTILE, adapter_digest=HOSTILE),)
    judged = to_html(verified(**texts, sites=sites, checks=(nasty,), groups=(GroupRecord(HOSTILE, HOSTILE, 1, 1, 1),)))
    left = {"copied": (LeafRecord(HOSTILE, HOSTILE, HOSTILE, 1),), "dropped": (DroppedRecord(HOSTILE, HOSTILE),)}
    done = to_html(merged(**texts, **left, sites=sites, output=HOSTILE, parents=({HOSTILE: HOSTILE},)))
    compared = to_html(differing((DifferenceRecord(HOSTILE, HOSTILE, "changed", relative_l2=0.5, dtype_a=HOSTILE),)))
    for html in (judged, done, compared):
        html.encode()
        assert "alert(1)" in page(html)
        assert "<script>alert" not in html
        assert "<b>&" not in html
        assert "\u202e" not in html
        assert page(html).count("</script") == page(html).count("<script")
        drawn = json.dumps(charts(html), ensure_ascii=False)
        assert "\u202e" not in drawn
        assert "alert(1)" in drawn
        assert "<" not in re.sub(r"</?(b|extra)>|<br>", "", drawn)
    assert {"size-0", "shares", "parts"} < set(charts(judged))
    assert list(charts(compared)) == ["farthest"]


def test_a_figure_that_is_not_there_is_a_dash() -> None:
    blank = site(
        relative_norm=None, max_abs=None, survival=survival(None), proof=ProofRecord(None, 1, None, None, None)
    )
    html = page(to_html(verified(sites=(site(), blank))))
    assert rows(html)[1][5:] == ["-"] * 5
    assert not re.search(r"\b(None|nan|Undefined)\b", html)


@pytest.mark.parametrize("groups", [(), verified().groups], ids=["nothing known", "groups known"])
def test_a_dry_run_has_no_charts_of_deltas(groups: tuple[GroupRecord, ...]) -> None:
    planned = site(relative_norm=None, max_abs=None, spectrum=(), survival=(), proof=None, layers=())
    html = to_html(merged(status="planned", output=None, sites=(planned,), groups=groups))
    assert list(charts(html)) == (["parts"] if groups else [])
    assert ("plotly" in html) == bool(groups)
    assert "<h2>Deltas" not in html
    assert "Planned" in html
    assert rows(html) == [["attn/q", "paligemma", "4", "2", "bfloat16 → float32"]]
    assert "img/" in html and "merged into its kernel" in html


def test_groups_without_parameters_have_no_chart() -> None:
    empty = GroupRecord("vision tower", "frozen", 0, 0, 0)
    assert "parts" not in charts(to_html(verified(groups=(empty,))))
    some = GroupRecord("expert", "frozen", 1, 5, 10)
    assert charts(to_html(verified(groups=(empty, some))))["parts"]["data"][0]["x"] == [5, 0]


def test_a_comparison_shows_its_leaves_and_says_when_there_are_too_many() -> None:
    html = to_html(DIFFERENT)
    text = ["layers/w", "changed", "0.222", "0.111", "-", "-", "-", "2", "bfloat16 → float32"]
    assert rows(html) == [["layers", "2", "1", "3", "0.321", "-"], text]
    assert "2,000 of" not in html
    many = to_html(differing(DIFFERENT.leaves * 2001))
    assert "The first 2,000 of 2,001" in many
    assert len(rows(many)) == 2001


def test_the_most_changed_leaves_are_bars() -> None:
    long = f"{'x' * 30}/llm/layers/attn/q_einsum/w"
    sizes = {"a/w": 0.1, long: 0.40006, "b/w": None, "c/w": 0.0, "y" * 50: 0.2, "d/w": 0.05}
    leaves = tuple(DifferenceRecord(path, "", "changed", relative_l2=size) for path, size in sizes.items())
    chart = charts(to_html(dataclasses.replace(differing(leaves), top=3)))["farthest"]
    bars, rest = chart["data"]
    assert bars["x"] == [0.4001, 0.2, 0.1]
    assert rest["x"] == pytest.approx([0.0, 0.20006, 0.30006])
    assert min(rest["x"]) >= 0
    assert notes(chart) == ["0.400", "0.200", "0.100", "…/llm/layers/attn/q_einsum/w", f"…{'y' * 41}", "a/w"]
    in_full = [note["hovertext"].replace("<br>", "") for note in chart["layout"]["annotations"][3:]]
    assert in_full == [data[0].replace("<br>", "") for data in bars["customdata"]] == [long, "y" * 50, "a/w"]
    assert all(len(line) <= 42 for line in bars["customdata"][0][0].split("<br>"))


def test_a_comparison_without_changes_has_no_chart() -> None:
    same = (DifferenceRecord("a/w", "a", "equal", relative_l2=0.0), DifferenceRecord("b/w", "b", "only-a"))
    html = to_html(differing(same))
    assert charts(html) == {}
    assert "plotly" not in html
    assert "Most changed leaves" not in html


def test_a_report_without_charts_does_not_import_plotly() -> None:
    code = "import sys, lora_merge_cli.reports.html; assert not any('plotly' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
