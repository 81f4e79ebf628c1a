"""What people see of a choice of rounding: reports, warnings, and what inspect --stats estimates beforehand."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora_merge_cli import nearest_sample
from lora_merge_cli._cli.show_checks import print_verification
from lora_merge_cli._cli.show_interpolation import print_interpolation, print_sweep
from lora_merge_cli._cli.show_merge import print_merge
from lora_merge_cli.dtypes import BFLOAT16, FLOAT32, dtype_named
from lora_merge_cli.equation import Equation
from lora_merge_cli.nearest_sample import NearestSample, Product, rounded_to
from lora_merge_cli.producing import _warnings
from lora_merge_cli.records import full_region, grid
from lora_merge_cli.report import (
    LayerRecord,
    MixedRecord,
    RoundedRecord,
    RoundingRecord,
    SiteRecord,
    SurvivalRecord,
)
from lora_merge_cli.reports.escaping import prose
from lora_merge_cli.reports.html import to_html
from lora_merge_cli.reports.json_text import to_json
from lora_merge_cli.reports.junit import to_junit
from lora_merge_cli.reports.markdown import to_markdown
from lora_merge_cli.reports.rounding_rows import rounded_rows, rounding_in_words
from lora_merge_cli.rounding import NEAREST, LeafRounding, Rounding
from lora_merge_cli.survival import Moments, Realised
from tests.checkpoints import save_step
from tests.command import conforming, run
from tests.test_html_report import charts, merged, page, rows, site, verified
from tests.test_interpolate_reports import interpolated, swept
from tests.test_openpi_merge import ALPHAS
from tests.trees import ACTION, PALIGEMMA, build, nest

HOSTILE = "</script><b>&quot;|`\ud800"
GRIDS = ("bfloat16", "float16")
EQUATIONS = {
    "ir,ro->io": {"i": 12, "r": 3, "o": 10},
    "ri,or->oi": {"i": 12, "r": 3, "o": 10},
    "lndr,lnrh->lndh": {"l": 2, "n": 3, "d": 9, "r": 2, "h": 5},
    "lnhr,lmrd->lnhd": {"l": 2, "n": 3, "m": 3, "h": 4, "r": 2, "d": 7},
    "lgdr,lgrf->lgdf": {"l": 3, "g": 2, "d": 6, "r": 8, "f": 5},
    "r,or->o": {"r": 1, "o": 10},
}


def drawn(equation: str, std: float, kernel: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A kernel and two factors."""
    rng, sizes, parsed = np.random.default_rng(seed), EQUATIONS[equation], Equation(equation)

    def normal(dims: str, size: float) -> np.ndarray:
        return (rng.standard_normal([sizes[dim] for dim in dims]) * size).astype(np.float32)

    return normal(parsed.target, 0.02).astype(dtype_named(kernel)), normal(parsed.a, 1.0), normal(parsed.b, std)


def looked_at(kernel: np.ndarray, products: list[Product], dtypes: tuple[str, ...], rows: int = 2**30) -> Any:
    """What a sample finds of a kernel that comes in blocks of some rows."""
    sample = NearestSample(kernel.shape, products, dtypes)
    for region in grid(full_region(kernel.shape), (min(rows, kernel.shape[0]), *kernel.shape[1:])):
        sample.add(region, kernel[region])
    return sample.finish()


def gain_of(kernel: np.ndarray, delta: np.ndarray, dtype: str) -> float:
    """<q, d> / <d, d> over all entries, in float64."""
    cast, wide = dtype_named(dtype), kernel.astype(np.float64)
    q = (wide + delta).astype(np.float32).astype(cast).astype(np.float64) - kernel.astype(cast).astype(np.float64)
    return float((q * delta).sum() / np.square(delta).sum())


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("kernel", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("block", [1, 2, 2**30])
def test_a_small_kernel_is_looked_at_whole(equation: str, kernel: str, block: int) -> None:
    w, a, b = drawn(equation, 2e-5, kernel)
    delta = 1.7 * np.einsum(equation, a.astype(np.float64), b.astype(np.float64))
    found = looked_at(w, [Product(Equation(equation), a, b, 1.7)], GRIDS, block)
    assert [each.dtype for each in found] == list(GRIDS)
    for each in found:
        assert each.gain == pytest.approx(gain_of(w, delta, each.dtype), rel=1e-6, abs=1e-9)
        assert each.standard_error == 0 and each.entries == w.size


@pytest.mark.parametrize("equation", EQUATIONS)
def test_adapters_on_one_kernel_are_added_up(equation: str) -> None:
    w, a, b = drawn(equation, 2e-5, "bfloat16")
    _, other_a, other_b = drawn(equation, 3e-5, "bfloat16", seed=1)
    parsed = Equation(equation)
    wide = [values.astype(np.float64) for values in (a, b, other_a, other_b)]
    delta = 0.5 * np.einsum(equation, *wide[:2]) - 3 * np.einsum(equation, *wide[2:])
    (found,) = looked_at(w, [Product(parsed, a, b, 0.5), Product(parsed, other_a, other_b, -3.0)], ("bfloat16",))
    assert found.gain == pytest.approx(gain_of(w, delta, "bfloat16"), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("std", [3e-5, 1e-4, 4e-4])
@pytest.mark.parametrize("entries", [300, 3000])
def test_a_sample_is_as_far_off_as_it_says(std: float, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_sample, "ENTRIES", entries)
    offs = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        w = (rng.standard_normal((90, 120)) * 0.02).astype(BFLOAT16)
        a, b = rng.standard_normal((90, 4)), rng.standard_normal((4, 120)) * std
        (found,) = looked_at(w, [Product(Equation("ir,ro->io"), a, b, 0.5)], ("bfloat16",), 7)
        assert entries / 2 < found.entries <= entries and found.standard_error > 0
        offs.append((found.gain - gain_of(w, 0.5 * a @ b, "bfloat16")) / found.standard_error)
    # Entries of a row are not independent, and the few large ones of a small sample are rarely in it.
    assert 0.4 < np.std(offs) < 2 and abs(np.mean(offs)) < 0.7


@pytest.mark.parametrize("share", [0.15, 0.25, 0.4, 1.0])
def test_the_estimate_is_the_closed_form(share: float) -> None:
    """On entries with one step u and d ~ N(0, s^2): gain = 2 u / s * sum over k of phi((k + 1/2) u / s)."""
    step = 2.0**-8
    rng = np.random.default_rng(3)
    w = (rng.choice([-1, 1], (400, 400)) * rng.uniform(0.52, 0.98, (400, 400))).astype(BFLOAT16)
    std = share * step
    # An identity makes the delta's entries those of the other factor, which are normal.
    delta = np.clip(rng.standard_normal((400, 400)) * std, -0.015, 0.015)
    (found,) = looked_at(w, [Product(Equation("ir,ro->io"), np.eye(400), delta, 1.0)], ("bfloat16",), 64)
    edges = (np.arange(200) + 0.5) / share
    expected = 2 / share * np.sum(np.exp(-(edges**2) / 2)) / math.sqrt(2 * math.pi)
    assert found.gain == pytest.approx(expected, abs=max(0.01, 5 * found.standard_error))


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    block=st.tuples(*[st.integers(1, 12)] * 3),
    entries=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_blocks_do_not_change_a_sample(shape: tuple[int, ...], block: tuple[int, ...], entries: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(shape) * 0.02).astype(BFLOAT16)
    a, b = rng.standard_normal((*shape[:2], 2)), rng.standard_normal((shape[0], 2, shape[2])) * 1e-4
    products = [Product(Equation("lir,lro->lio"), a, b, 1.0)]
    before, nearest_sample.ENTRIES = nearest_sample.ENTRIES, entries
    try:
        whole, parts = (NearestSample(shape, products, ("bfloat16",)) for _ in range(2))
        whole.add(full_region(shape), w)
        for region in grid(full_region(shape), tuple(map(min, block, shape))):
            parts.add(region, w[region])
    finally:
        nearest_sample.ENTRIES = before
    (one,), (other,) = whole.finish(), parts.finish()
    assert one.entries == other.entries <= max(entries, shape[0])
    assert one.gain == pytest.approx(other.gain, abs=1e-9)


def test_nothing_is_said_of_zeros_and_of_what_overflows() -> None:
    w, a, b = drawn("ir,ro->io", 1.0, "float32")
    assert looked_at(w, [Product(Equation("ir,ro->io"), a, 0 * b, 1.0)], GRIDS) == ()
    (found,) = looked_at(w, [Product(Equation("ir,ro->io"), a, b, 1e6)], GRIDS)
    assert found.dtype == "bfloat16"
    assert rounded_to(FLOAT32, BFLOAT16, BFLOAT16) == ("bfloat16",) and rounded_to(FLOAT32) == ()


def checkpoint(tmp_path: Path, delta: float) -> Path:
    return save_step(tmp_path / "7", nest(build(PALIGEMMA, ACTION, delta=delta).leaves))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_inspect_knows_what_a_merge_to_nearest_will_leave(dtype: str, tmp_path: Path) -> None:
    step = checkpoint(tmp_path, 0.004)
    found = run("inspect", step, "--stats", "--lora-alpha", ALPHAS, "--json").json
    flags = ("--lora-alpha", ALPHAS, "--dtype", dtype, "--json")
    report = run("merge", step, "-o", tmp_path / "out", *flags).json
    left = {site["target"]: site["survival"][-1]["gain"] for site in report["sites"]}
    assert len(left) == 10 and min(left.values()) < 0.9
    for each in found["sites"]:
        (nearest,) = each["stats"]["nearest"]
        assert nearest["dtype"] == "bfloat16"
        assert nearest["gain"] == pytest.approx(left[each["target"]], abs=1e-4)
    (warning,) = found["warnings"]
    low = sum(gain < 0.98 for gain in left.values())
    assert (
        f"stored or served as bfloat16, rounding to nearest would lose more than 2 % of {low} of 10 deltas" in warning
    )
    assert f"least gain {min(left.values()):.3f}" in warning
    assert "--rounding preserve" in warning and "--dtype float32 and serve in float32" in warning
    (said,) = [line for line in report["warnings"] if "lose more than" in line]
    remedy = (
        "stored as bfloat16, X: merge with --rounding preserve or stochastic, or store float32 with --dtype float32"
        if dtype == "bfloat16"
        else "served as bfloat16, X: merge with --rounding preserve or stochastic --serving-dtype bfloat16, or serve in float32"
    )
    assert re.fullmatch(re.escape(remedy).replace("X", ".*"), said)


def test_inspect_does_not_warn_of_what_is_kept(tmp_path: Path) -> None:
    found = run("inspect", checkpoint(tmp_path, 0.5), "--stats", "--lora-alpha", ALPHAS, "--json").json
    assert not found["warnings"] and all(each["stats"]["nearest"][0]["gain"] > 0.98 for each in found["sites"])


def test_inspect_shows_what_is_kept(tmp_path: Path) -> None:
    step = checkpoint(tmp_path, 0.004)
    text = " ".join(run("inspect", step, "--stats", "--lora-alpha", ALPHAS).stdout.split())
    assert "eff.rank kept attn/attn_vec_einsum" in text
    assert "kept: the share of all that is added to a kernel that rounding to nearest bfloat16 keeps; 1 is all" in text
    assert "nearest" not in run("inspect", step, "--lora-alpha", ALPHAS).stdout
    leaves = build(PALIGEMMA, ACTION).leaves
    for path, values in leaves.items():
        if path[-1] == "lora_a":
            values[:] = np.nan
    found = run("inspect", save_step(tmp_path / "8", nest(leaves)), "--stats", "--lora-alpha", ALPHAS)
    assert found.code == 0 and "NaN" in found.stdout


def beside(tmp_path: Path) -> list[object]:
    """A base of torch's names in bfloat16 with two adapters on one kernel."""
    rng = np.random.default_rng(5)
    name = "model.layers.0.self_attn.q_proj"
    (tmp_path / "base").mkdir()
    kernel = (rng.standard_normal((24, 32)) * 0.02).astype(BFLOAT16)
    save_file({f"{name}.weight": kernel}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    words: list[object] = [tmp_path / "base"]
    for number, rank in enumerate((2, 3)):
        folder = tmp_path / f"adapter{number}"
        folder.mkdir()
        a, b = rng.standard_normal((rank, 32)), rng.standard_normal((24, rank)) * 5e-6
        stem = f"base_model.model.{name}"
        factors = {f"{stem}.lora_A.weight": a.astype(np.float32), f"{stem}.lora_B.weight": b.astype(np.float32)}
        save_file(factors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 5, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        words += ["--adapter", f"{folder}@{0.6 + number}"]
    return words


def test_inspect_adds_up_the_adapters_beside_a_base(tmp_path: Path) -> None:
    words = beside(tmp_path)
    found = run("inspect", *words, "--stats", "--json").json
    report = run("merge", *words, "-o", tmp_path / "out", "--dtype", "bfloat16", "--json").json
    gains = [each["stats"]["nearest"][0]["gain"] for each in found["sites"]]
    assert len(gains) == 2 and gains[0] == gains[1]
    assert gains[0] == pytest.approx(report["sites"][0]["survival"][0]["gain"], abs=1e-4)
    assert "of 1 of 1 deltas" in found["warnings"][-1]


def survival(dtype: str, gain: float | None, error: float | None) -> SurvivalRecord:
    return SurvivalRecord(dtype, gain, 0.9, error, 0.1, gain, error)


def mended(label: str, number: int = 0, *, wide: bool = False, **changes: Any) -> SiteRecord:
    """A site that was preserved: in a bfloat16 file, or for the servers of a float32 one."""
    chosen = survival("bfloat16", 0.984 + number / 1000, 0.024)
    shown = {
        "dtype": "float32" if wide else "bfloat16",
        "survival": (survival("float32", 1.0, 1e-5), chosen) if wide else (chosen,),
        "rounding": "preserve",
        "nearest": survival("bfloat16", 0.293 + number / 1000, 0.71),
        "worth_from": 0.03,
        "moved": 0.25 if wide else None,
        "layers": (LayerRecord(0, 0.1, 0.2, (chosen,), survival("bfloat16", 0.293, 0.71)),),
    }
    return site(label, **shown | changes)


LEFT_OUT = RoundedRecord("nearest", 1, "loha has no low-rank input space")
PRESERVE = RoundingRecord("preserve", mu=1.0, leaves=(RoundedRecord("preserve", 2), LEFT_OUT))
SITES = (mended("attn/q"), mended("attn/k", 5), site("attn/loha", dtype="bfloat16", rounding="nearest"))
NARROW = merged(sites=SITES, rounding=PRESERVE)
WIDE = merged(
    sites=(mended("attn/q", wide=True), mended("attn/k", wide=True, shape=(3, 8, 24), moved=0.75)),
    rounding=dataclasses.replace(PRESERVE, serving_values="cell", leaves=(RoundedRecord("preserve", 2),)),
)
STOCHASTIC = RoundingRecord("stochastic", seed=7, serving_values="widened", leaves=(RoundedRecord("stochastic", 3),))
SOUP = interpolated(
    rounding=STOCHASTIC,
    mixed=(
        MixedRecord(
            path="img/kernel",
            part="vision tower",
            alphas=(0.5,),
            dtype="float32",
            parameters=400,
            relative_norm=0.02,
            survival=(survival("float32", 1.0, 0.0), survival("bfloat16", 0.999, 0.3)),
            rounding="stochastic",
            nearest=survival("bfloat16", 0.654, 0.5),
            moved=1.0,
        ),
    ),
)
REPORTS = (NARROW, WIDE, SOUP, verified(sites=SITES, rounding=PRESERVE), swept(rounding=STOCHASTIC))


def printed(report: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """What a terminal shows of it, on one line."""
    show = {
        "merge": print_merge,
        "interpolate": print_interpolation,
        "verify": print_verification,
        "sweep": print_sweep,
    }
    show[report.command](report)
    return " ".join(capsys.readouterr().out.split())


def test_one_line_says_who_got_what() -> None:
    assert rounding_in_words(NARROW) == (
        "preserve, mu 1: 2 of 3 leaves that change, served as bfloat16; 1 to nearest: loha has no low-rank input space (attn/loha)"
    )
    # Of 192 entries a quarter was moved, of 576 three quarters.
    assert rounding_in_words(WIDE) == (
        "preserve, mu 1: 2 of 2 leaves that change, served as bfloat16; what is stored wider holds exact values, moved only where "
        "servers would not cast them to the bfloat16 value that was chosen (62.5 % of entries moved; --serving-values cell)"
    )
    assert rounding_in_words(SOUP) == (
        "stochastic, seed 7: 3 of 3 leaves that change, served as bfloat16; what is stored wider holds the bfloat16 value that was "
        "chosen, widened (100 % of entries moved; --serving-values widened)"
    )
    planned = dataclasses.replace(WIDE, sites=(site(rounding="preserve", survival=(), layers=()),))
    assert str(rounding_in_words(planned)).endswith("chosen (--serving-values cell)")
    assert rounding_in_words(merged()) is None


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.command)
def test_every_report_has_the_line(report: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = rounding_in_words(report)
    assert words is not None
    assert f"rounding: {words}" in printed(report, capsys)
    assert f"\n\nRounding: {prose(words)}.\n\n" in to_markdown(report)
    assert f"<dt>rounding</dt><dd>{words}</dd>" in to_html(report)
    conforming(json.loads(to_json(report)))


@pytest.mark.parametrize("report", REPORTS[:4], ids=lambda report: report.command)
def test_nothing_is_said_where_all_is_to_nearest(report: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sites = tuple(dataclasses.replace(each, rounding="nearest", nearest=None, moved=None) for each in report.sites)
    plain = dataclasses.replace(report, sites=sites, rounding=None, notes=())
    if report is SOUP:
        plain = dataclasses.replace(plain, mixed=(dataclasses.replace(SOUP.mixed[0], nearest=None),))
    for text in (printed(plain, capsys), to_markdown(plain), page(to_html(plain))):
        assert "nearest" not in text and "ounding</" not in text and "ounding:" not in text
    assert not [name for name in charts(to_html(plain)) if "rounding" in name]


def test_junit_stays_as_it_is() -> None:
    assert to_junit(verified(sites=SITES, rounding=PRESERVE)) == to_junit(verified(sites=SITES))


def test_before_and_after_by_site(capsys: pytest.CaptureFixture[str]) -> None:
    narrow = printed(NARROW, capsys)
    assert "attn/q 0.293 0.984 0.710 0.024 3 % attn/k 0.298 0.989 0.710 0.024 3 % gain, error" in narrow
    assert "attn/q 0.293 0.984 0.710 0.024 3 % 25 % attn/k 0.293 0.984 0.710 0.024 3 % 75 %" in printed(WIDE, capsys)
    text = to_markdown(WIDE)
    assert (
        "| site | in | gain to nearest | gain, preserve | error to nearest | error, preserve | worth from | moved |"
        in text
    )
    assert "| `attn/k` | bfloat16 | 0.293 | 0.984 | 0.710 | 0.024 | 3 % | 75 % |" in text
    html = to_html(WIDE)
    assert ["attn/k", "bfloat16", "0.293", "0.984", "0.710", "0.024", "3 %", "75 %"] in rows(html)
    assert "0.293 to nearest" in html and "0.710 to nearest" in html
    drawn_charts = charts(html)
    lines, before, after = drawn_charts["rounding-gains"]["data"]
    assert before["x"] == [0.293, 0.293] and after["x"] == [0.984, 0.984]
    assert lines["x"] == [0.293, 0.984, None] * 2 and lines["y"] == [0, 0, None, 1, 1, None]
    assert drawn_charts["rounding-errors"]["layout"]["xaxis"]["type"] == "log"


def test_leaves_without_factors_have_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert "img/kernel 0.5 0.020 1.000 0.999 0.654" in printed(SOUP, capsys)
    assert "1.000 | 0.999 | 0.654 |" in to_markdown(SOUP)
    assert next(row for row in rows(to_html(SOUP)) if row[0] == "img/kernel")[-3:] == ["1.000", "0.999", "0.654"]


def test_adapters_on_one_kernel_share_a_row() -> None:
    twice = tuple(mended("attn/q", adapter=number) for number in range(2))
    assert len(rounded_rows(merged(sites=twice, rounding=PRESERVE))) == 1


def test_many_kernels_show_the_worst_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    many = tuple(mended(f"layers.{number}.q", number) for number in range(31))
    report = merged(sites=many, rounding=PRESERVE)
    (row,) = rounded_rows(report)
    assert row.name == "q x31" and row.gains == (0.293, 0.984) and row.errors == (0.71, 0.024)
    assert "q x31 0.293 0.984 0.710 0.024" in printed(report, capsys)
    assert "least gain and the largest error" in to_markdown(report)


def test_what_is_not_known_is_a_dash_and_zeros_are_not_drawn() -> None:
    blank = mended("attn/q", survival=(survival("bfloat16", None, None),), nearest=survival("bfloat16", None, None))
    exact = mended("attn/k", survival=(survival("bfloat16", 1.0, 0.0),))
    assert "| `attn/q` | bfloat16 | - | - | - | - | 3 % |" in to_markdown(merged(sites=(blank,), rounding=PRESERVE))
    assert not [name for name in charts(to_html(merged(sites=(blank,), rounding=PRESERVE))) if "rounding" in name]
    found = charts(to_html(merged(sites=(blank, exact), rounding=PRESERVE)))
    assert None in found["rounding-errors"]["data"][2]["x"] and 0 not in found["rounding-errors"]["data"][2]["x"]


def test_hostile_names_stay_text(capsys: pytest.CaptureFixture[str]) -> None:
    rounding = dataclasses.replace(PRESERVE, leaves=(RoundedRecord("nearest", 1, HOSTILE),))
    report = merged(sites=(mended(HOSTILE), site(HOSTILE, rounding="nearest")), rounding=rounding)
    html = to_html(report)
    html.encode()
    assert "<b>&quot;" not in html and "</script><b>" not in html
    to_markdown(report).encode()
    printed(report, capsys).encode()


def test_a_row_fits_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_merge_cli._cli.console._OFF_TERMINAL_WIDTH", 80)
    wide = dataclasses.replace(WIDE, sites=(mended("mlp/attn_vec_einsum_long_1", wide=True),))
    print_merge(wide)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert re.search(r"einsum_long_1 +0\.293 +0\.984 +0\.710 +0\.024 +3 % +25 %", out)


def warned(
    gain: float,
    *,
    stored: str,
    measured: str = "bfloat16",
    method: Any = "nearest",
    rounding: LeafRounding = NEAREST,
    operation: str = "add_delta",
) -> list[str]:
    """What is said of one kernel."""
    path = ("w",)
    step = SimpleNamespace(
        output=SimpleNamespace(path=path, dtype=dtype_named(stored)),
        sites=(SimpleNamespace(operation=operation),),
        alphas=(1.0,),
        rounding=rounding,
    )
    sums = Realised(q_dot_d=gain, inputs_q_dot_d=gain, inputs_d_sq=1.0)
    layer = Moments(delta_sq=1.0, kernel_sq=1.0, max_abs=1.0, entries=4, realised={measured: sums})
    plan = SimpleNamespace(steps=[step], rounding=Rounding(method))
    outcome: Any = SimpleNamespace(not_finite={}, mixed={}, moments={path: [layer]})
    prepared: Any = SimpleNamespace(plan=plan)
    return list(_warnings(prepared, outcome))


GOT = LeafRounding("preserve", BFLOAT16)


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("merge with --rounding preserve or stochastic, or store float32 with --dtype float32", {"stored": "bfloat16"}),
        (
            "merge with --rounding preserve or stochastic --serving-dtype bfloat16, or serve in float32",
            {"stored": "float32"},
        ),
        (
            "merge with --dtype float32 --rounding preserve or stochastic --serving-dtype bfloat16, or serve in float32",
            {"stored": "float16"},
        ),
        (
            "; --rounding preserve was used for 1 of them): store float32 with --dtype float32",
            {"stored": "bfloat16", "method": "preserve", "rounding": GOT},
        ),
        (
            "; --rounding preserve was used for 1 of them): serve in float32",
            {"stored": "float32", "method": "preserve", "rounding": GOT},
        ),
        (
            "0.500): store float32 with --dtype float32",
            {"stored": "bfloat16", "method": "preserve", "operation": "loha"},
        ),
        ("0.500): store float32 with --dtype float32", {"stored": "bfloat16", "operation": "loha"}),
        (
            "; --rounding stochastic was used for 1 of them): merge with --rounding preserve, or store float32 with --dtype float32",
            {"stored": "bfloat16", "method": "stochastic", "rounding": LeafRounding("stochastic", BFLOAT16)},
        ),
        ("0.500): store float32 with --dtype float32", {"stored": "float8_e5m2", "measured": "float8_e5m2"}),
    ],
)
def test_a_low_gain_names_what_would_help(said: str, given: dict[str, Any]) -> None:
    (warning,) = warned(0.5, **given)
    assert warning.endswith(said)
    assert not warned(0.99, **given)
