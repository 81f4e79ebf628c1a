"""How far each fused kernel is from the sum that it should be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lora_merge_cli.report import SiteRecord
from lora_merge_cli.reports.charts.base import THEMES, TITLE_FONT, Chart, row_ticks, safe
from lora_merge_cli.reports.charts.tracks import on_tracks, track_bars
from lora_merge_cli.reports.kinds import MANY_SITES
from lora_merge_cli.reports.words import figure

_ROW = 25
_EDGE = 1.25
_WORST = 14


def kernel_errors(sites: Sequence[SiteRecord]) -> Iterator[Chart]:
    """The worst entry of each kernel as a share of its bound, if any was judged."""
    judged = [(site, _share(site)) for site in _kernels(sites) if site.proof is not None]
    if not judged:
        return
    caption = "The worst entry of each kernel as a share of what rounding allows it. Right up to 1, the line."
    shown = judged
    if len(judged) > MANY_SITES:
        shown = sorted(judged, key=lambda found: -found[1])[:_WORST]
        caption += f" The {len(shown)} worst of {len(judged)}."
    words = [_share_in_words(share) for _, share in shown]
    bars, layout = track_bars([share for _, share in shown], _EDGE, words, row=_ROW)
    bars.update(
        customdata=[[safe(site.label), safe(site.group), word] for (site, _), word in zip(shown, words, strict=True)],
        hovertemplate="<b>%{customdata[0]}</b> %{customdata[1]}<br>share of its bound: %{customdata[2]}<extra></extra>",
        # Without a hatch it would look like a share that is as large as the axis.
        marker_pattern_shape=["" if math.isfinite(share) else "/" for _, share in shown],
        marker_pattern_size=5,
    )
    layout |= {
        "height": layout["height"] + 40,
        "margin": layout["margin"] | {"b": 40},
        "xaxis": layout["xaxis"]
        | {"visible": True, "tickvals": [0, 0.5, 1], "ticktext": ["0", "0.5", "<b>1</b>"], "tickangle": 0}
        | {"title": {"text": "share of its bound", "standoff": 4, "font": TITLE_FONT}},
        "yaxis": layout["yaxis"] | row_ticks([site.label for site, _ in shown]),
        "shapes": [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": {"width": 2}}],
    }
    wrong = [number for number, (_, share) in enumerate(shown) if share > 1]
    colours = ["--fail" if share > 1 else "--accent" for _, share in shown]
    painted = {f"annotations[{number}].font.color": "--fail" for number in wrong} | {"shapes[0].line.color": "--text"}
    yield Chart(
        "shares",
        "Error of the fused kernels",
        "",
        caption,
        on_tracks(bars, layout),
        dict.fromkeys(THEMES, ({"marker.color": [colours, "--well"]}, painted)),
        ["share of its bound"],
        [(site.label, [word]) for (site, _), word in zip(shown, words, strict=True)],
    )


def _kernels(sites: Sequence[SiteRecord]) -> Iterator[SiteRecord]:
    """A site for each kernel: several adapters on one share its error."""
    seen: set[str] = set()
    for site in sites:
        if site.adapter is None or site.target not in seen:
            seen.add(site.target)
            yield site


def _share(site: SiteRecord) -> float:
    share = site.proof.worst_share if site.proof is not None else None
    return math.inf if share is None else share


def _share_in_words(share: float) -> str:
    if not math.isfinite(share):
        return "✕ not finite"
    return f"✕ {figure(share)}" if share > 1 else figure(share)
