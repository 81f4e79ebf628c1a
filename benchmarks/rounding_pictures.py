"""Draw the pictures of docs/precision.md.

    python benchmarks/rounding_pictures.py [--out DIR] [--chromium COMMAND]

DIR, docs/ if not given, gets ``rounding_survival.svg``, of results/rounding.json, and ``rounding_walk.svg``, of merges made here.
Needs Chromium, in which plotly draws.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots
from rounding_table import FEW, basis_of
from rounding_table_cases import Case, Matrix, Peft

from lora_merge_cli import MergeOptions, merge

HERE = Path(__file__).parent
WIDTH = 800
COLOURS = {"nearest": "#b3261e", "stochastic": "#8a6d00", "preserve, mu 1": "#3b5bdb"}
DASHES = {"nearest": "dot", "stochastic": "dash", "preserve, mu 1": "solid"}
LABELS = {"nearest": "nearest", "stochastic": "stochastic", "preserve, mu 1": "preserve, μ = 1"}
WALKED = Case(2048, 64, 16, 5e-4)
"""The size at which a delta of std 1e-5 changes a kernel of std 0.02."""
EVERY = 8


def survival(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Gain, and error along the adapter's inputs, over the size of the delta: medians over the ranks, with their range."""
    figure = make_subplots(1, 2, subplot_titles=("gain", "error along the adapter's inputs"), horizontal_spacing=0.12)
    sizes = sorted({row["size"] for row in rows})
    for name, label in LABELS.items():
        line = {"color": COLOURS[name], "dash": DASHES[name], "width": 2.5}
        for column, key in enumerate(("gain", "error_along"), 1):
            found = [[row[key] for row in rows if row["rounding"] == name and row["size"] == size] for size in sizes]
            band = [max(values) for values in found] + [min(values) for values in reversed(found)]
            figure.add_scatter(
                x=[*sizes, *reversed(sizes)],
                y=band,
                mode="lines",
                fill="toself",
                fillcolor=COLOURS[name],
                opacity=0.13,
                line={"width": 0},
                showlegend=False,
                row=1,
                col=column,
            )
            middle = [statistics.median(values) for values in found]
            figure.add_scatter(x=sizes, y=middle, name=label, line=line, showlegend=column == 1, row=1, col=column)
    figure.update_xaxes(type="log", dtick=1, exponentformat="power", title_text="|delta| / |kernel|")
    figure.update_yaxes(range=[0, 1.1], row=1, col=1)
    figure.update_yaxes(type="log", dtick=1, exponentformat="power", row=1, col=2)
    return _dressed(figure, 380)


def walk() -> go.Figure:
    """The running sum of ``u_i e_i`` along the inputs, for one output in each rounding, as a share of the adapter's effect."""
    figure = go.Figure()
    for name, lengths in _walks().items():
        figure.add_scatter(
            x=list(range(EVERY, len(lengths) + 1, EVERY)),
            y=[float(f"{length:.4g}") for length in lengths[EVERY - 1 :: EVERY]],
            name=LABELS[name],
            line={"color": COLOURS[name], "dash": DASHES[name], "width": 2},
        )
    figure.update_xaxes(title_text="inputs so far")
    figure.update_yaxes(title_text="|s| / |Uᵀd|", rangemode="tozero")
    return _dressed(figure, 340)


def _walks() -> Mapping[str, Matrix]:
    """Of the output whose walk ends in the middle among all outputs of that rounding."""
    checkpoint = Peft([WALKED], 0, "bfloat16")
    ((case, values),) = checkpoint.values()
    basis, found = basis_of(values), {}
    with tempfile.TemporaryDirectory(prefix="rounding-") as place:
        root = Path(place)
        checkpoint.write(root)
        for number, (name, rounding) in enumerate(FEW.items()):
            output = root / str(number)
            merge(checkpoint.request(root, output, MergeOptions(dtype="bfloat16", rounding=rounding)))
            merged = checkpoint.merged(output)[case.name].astype(np.float64)
            error = merged - values.kernel.astype(np.float64) - values.delta
            sums = np.cumsum(basis[:, :, None] * error[:, None, :], axis=0)
            lengths = np.linalg.norm(sums, axis=1) / np.linalg.norm(basis.T @ values.delta, axis=0)
            found[name] = lengths[:, np.argsort(lengths[-1])[lengths.shape[1] // 2]]
    return found


def _dressed(figure: go.Figure, height: int) -> go.Figure:
    figure.update_xaxes(title_font_size=14, tickfont_size=13)
    figure.update_yaxes(title_font_size=14, tickfont_size=13)
    figure.update_layout(
        template="plotly_white",
        width=WIDTH,
        height=height,
        paper_bgcolor="white",
        font={"size": 14, "family": "sans-serif", "color": "#1f2328"},
        margin={"l": 60, "r": 20, "t": 40, "b": 85},
        legend={"orientation": "h", "x": 0.5, "xanchor": "center", "y": -0.22, "yanchor": "top"},
    )
    return figure


def svg(figure: go.Figure, chromium: str) -> str:
    """The figure as plotly draws it in a browser.

    Raises:
        RuntimeError: The browser drew nothing.
    """
    draw = f"Plotly.toImage({figure.to_json()}, {{format: 'svg', width: {WIDTH}, height: {figure.layout.height}}})"
    script = f"{draw}.then(url => document.body.textContent = url)"
    with tempfile.TemporaryDirectory(prefix="picture-") as place:
        document = Path(place) / "picture.html"
        library = get_plotlyjs().replace("</script", "<\\/script")
        document.write_text(f"<meta charset=utf-8><body><script>{library}</script><script>{script}</script>")
        flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={place}/profile")
        command = (chromium, *flags, "--virtual-time-budget=20000", "--dump-dom", document.as_uri())
        drawn = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"data:image/svg\+xml,([^<\s]+)", drawn)
    if found is None:
        raise RuntimeError(f"no picture in what {chromium} shows")
    return unquote(found.group(1)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", metavar="DIR")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "rounding.json", metavar="JSON")
    parser.add_argument("--chromium", default="chromium", metavar="COMMAND")
    options = parser.parse_args()
    rows = [row for row in json.loads(options.results.read_text())["rows"] if row["table"] == "grid"]
    for name, figure in (("survival", survival(rows)), ("walk", walk())):
        (options.out / f"rounding_{name}.svg").write_text(svg(figure, options.chromium))


if __name__ == "__main__":
    main()
