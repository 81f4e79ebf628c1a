"""Delta survival and the fused numbers, against plain float64 NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.equation import Equation
from lora_merge_cli.lowrank import delta_singular_values, input_basis
from lora_merge_cli.operations import KernelUpdate, cut, cutting, operation_named
from lora_merge_cli.records import AdapterSite, Forward, LowRank, Scale, even_part, full_region, grid, slab
from lora_merge_cli.survival import Moments, Survival
from tests.checkpoints import save_step
from tests.command import run
from tests.test_openpi_merge import ALPHAS
from tests.trees import ACTION, PALIGEMMA, build, nest

EQUATIONS = {
    "ir,ro->io": {"i": 12, "r": 3, "o": 10},
    "ri,or->oi": {"i": 12, "r": 3, "o": 10},
    "lndr,lnrh->lndh": {"l": 2, "n": 3, "d": 9, "r": 2, "h": 5},
    "lnhr,lmrd->lnhd": {"l": 2, "n": 3, "m": 3, "h": 4, "r": 2, "d": 7},
    "lgdr,lgrf->lgdf": {"l": 3, "g": 2, "d": 6, "r": 8, "f": 5},
}
SERVING = np.dtype(ml_dtypes.bfloat16)


def update_of(site: AdapterSite, w: Any, a: Any, b: Any, dtype: Any) -> KernelUpdate:
    contribution = operation_named(site.operation).contribute(site, {"lora_a": a, "lora_b": b}, 1.0, None)
    return KernelUpdate("w", site.parameters.equation, w.shape, contribution, dtype, SERVING, jax.devices()[0])


def site_for(equation: str, rank: int, scale: float) -> AdapterSite:
    return AdapterSite(
        targets=(("w",),),
        operation="add_delta",
        factors={"lora_a": ("a",), "lora_b": ("b",)},
        parameters=LowRank(rank, Scale(scale, "test"), Equation(equation)),
        forward=Forward("", "", ""),
        group="",
        module="",
        label="w",
    )


def make(equation: str, seed: int, std: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    parsed, sizes = Equation(equation), EQUATIONS[equation]
    shapes = [tuple(sizes[dim] for dim in dims) for dims in (parsed.a, parsed.b, parsed.target)]
    a, b, w = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return a * np.float32(std), b * np.float32(std), (w * 0.02).astype(SERVING)


def compute(
    equation: str,
    a: np.ndarray,
    b: np.ndarray,
    w: np.ndarray,
    dtype: str,
    scale: float = 1.7,
    order: Any = None,
    base: np.ndarray | None = None,
) -> tuple[np.ndarray, tuple[Moments, ...]]:
    site = site_for(equation, EQUATIONS[equation]["r"], scale)
    update = update_of(site, w, a, b, dtype_named(dtype))
    result = np.empty(w.shape, dtype_named(dtype))
    blocks = list(grid(full_region(w.shape), cut(site.parameters.equation, w.shape).block))
    if order is not None:
        order.shuffle(blocks)
    for block in blocks:
        fused = update.compute(block, w[block], None if base is None else base[block])
        result[block] = update.take(block, w[block], fused)
    return result, (update.finish(),)


@pytest.fixture(params=["whole", "small", "ragged"])
def cutting_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny kernels in one block, in many, and in blocks that end in a part of a tile."""
    tile, block = {"whole": (2**19, 2**22), "small": (20, 60), "ragged": (30, 70)}[request.param]
    monkeypatch.setattr(cutting, "TILE_ENTRIES", tile)
    monkeypatch.setattr(cutting, "BLOCK_ENTRIES", block)


def naive(
    equation: str, a: np.ndarray, b: np.ndarray, w: np.ndarray, result: np.ndarray, scale: float, dtype: str
) -> dict[str, float]:
    """The figures as survival.py defines them, one matrix at a time, in float64."""
    parsed = Equation(equation)
    d = scale * np.einsum(equation, a.astype(np.float64), b.astype(np.float64))
    cast = dtype_named(dtype)
    q = result.astype(cast).astype(np.float64) - w.astype(cast).astype(np.float64)
    order = [parsed.target.index(dim) for dim in parsed.batch + parsed.inputs + parsed.outputs]
    a_order = [parsed.a.index(dim) for dim in parsed.batch + parsed.inputs + parsed.rank]
    lead = [EQUATIONS[equation][dim] for dim in parsed.batch]
    inputs = int(np.prod([EQUATIONS[equation][dim] for dim in parsed.inputs]))

    def matrices(x: np.ndarray, axes: list[int]) -> np.ndarray:
        return np.transpose(x, axes).reshape(int(np.prod(lead)), inputs, -1)

    uq, ud = [], []
    for mq, md, ma in zip(matrices(q, order), matrices(d, order), matrices(a.astype(np.float64), a_order), strict=True):
        u, s, _ = np.linalg.svd(ma, full_matrices=False)
        u = u[:, s > s[0] * 1e-5]
        uq.append((u.T @ mq).ravel())
        ud.append((u.T @ md).ravel())
    q_in, d_in = np.concatenate(uq), np.concatenate(ud)
    return {
        "gain": float((q * d).sum() / (d * d).sum()),
        "cosine": float((q * d).sum() / np.sqrt((q * q).sum() * (d * d).sum())),
        "relative_error": float(np.sqrt(((q - d) ** 2).sum() / (d * d).sum())),
        "unchanged": float((q == 0).mean()),
        "gain_along_inputs": float((q_in * d_in).sum() / (d_in * d_in).sum()),
        "error_along_inputs": float(np.sqrt(((q_in - d_in) ** 2).sum() / (d_in * d_in).sum())),
    }


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(
    ("dtype", "std"), [("float32", 0.05), ("bfloat16", 0.01), ("bfloat16", 0.05), ("float16", 0.05)]
)
@pytest.mark.usefixtures("cutting_sizes")
def test_figures_are_the_defined_ones(equation: str, dtype: str, std: float) -> None:
    a, b, w = make(equation, 3, std)
    result, layers = compute(equation, a, b, w, dtype)
    total = Moments.total(layers)
    for name in {dtype, SERVING.name}:
        expected = naive(equation, a, b, w, result, 1.7, name)
        measured: Survival = total.survival(name)
        for key, value in expected.items():
            assert getattr(measured, key) == pytest.approx(value, rel=2e-4, abs=2e-6), (name, key)
    d = 1.7 * np.einsum(equation, a.astype(np.float64), b.astype(np.float64))
    norm = np.linalg.norm(w.astype(np.float64))
    assert total.relative_norm == pytest.approx(np.linalg.norm(d) / norm, rel=1e-5)
    assert total.max_abs == pytest.approx(np.abs(d).max(), rel=1e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.usefixtures("cutting_sizes")
def test_order_of_blocks_changes_no_bit(equation: str) -> None:
    a, b, w = make(equation, 4, 0.05)
    first, layers = compute(equation, a, b, w, "bfloat16")
    again, shuffled = compute(equation, a, b, w, "bfloat16", order=np.random.default_rng(1))
    assert first.tobytes() == again.tobytes()
    one, other = Moments.total(layers).survival("bfloat16"), Moments.total(shuffled).survival("bfloat16")
    assert one.gain_along_inputs == pytest.approx(other.gain_along_inputs, rel=1e-9)


def test_a_base_takes_the_kernels_place() -> None:
    equation = "lndr,lnrh->lndh"
    a, b, w = make(equation, 5, 0.05)
    base = w.astype(np.float32) * np.float32(1.001)
    result, _ = compute(equation, a, b, w, "float32", base=base)
    ideal = base.astype(np.float64) + 1.7 * np.einsum(equation, a.astype(np.float64), b.astype(np.float64))
    assert np.abs(result - ideal).max() <= 1e-6 * np.abs(ideal).max()


def test_small_deltas_shrink_in_bfloat16_as_published() -> None:
    """Kernel std 0.02: a delta of std 1e-5 keeps 0.29 of itself, 5e-5 0.88, 2e-4 all (docs/precision of the figures)."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((512, 512)) * 0.02).astype(SERVING)
    for std, gain in ((1e-5, 0.293), (5e-5, 0.884), (2e-4, 1.0)):
        a = rng.standard_normal((512, 16)).astype(np.float32) * np.float32(std / 4)
        b = rng.standard_normal((16, 512)).astype(np.float32)
        EQUATIONS["ir,ro->io"], kept = {"i": 512, "r": 16, "o": 512}, EQUATIONS["ir,ro->io"]
        try:
            _, layers = compute("ir,ro->io", a, b, w, "bfloat16", scale=1.0)
        finally:
            EQUATIONS["ir,ro->io"] = kept
        assert Moments.total(layers).survival("bfloat16").gain_along_inputs == pytest.approx(gain, abs=0.02)


@given(rows=st.integers(1, 12), rank=st.integers(1, 6), true_rank=st.integers(0, 6), seed=st.integers(0, 99))
def test_basis_is_orthonormal_and_spans_the_factor(rows: int, rank: int, true_rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    true_rank = min(true_rank, rank, rows)
    a = (rng.standard_normal((2, rows, true_rank)) @ rng.standard_normal((2, true_rank, rank))).astype(np.float32)
    basis = input_basis(a, 1).astype(np.float64)
    assert basis.shape == a.shape
    for u, factor in zip(basis, a.astype(np.float64), strict=True):
        gram = u.T @ u
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-5
        assert set(np.round(np.diag(gram), 4)) <= {0.0, 1.0}
        assert round(np.trace(gram)) == true_rank
        assert np.abs(u @ (u.T @ factor) - factor).max() <= 1e-4 * max(1.0, np.abs(factor).max())


@pytest.mark.parametrize("equation", EQUATIONS)
def test_singular_values_come_from_the_factors(equation: str) -> None:
    a, b, _ = make(equation, 6, 0.3)
    parsed = Equation(equation)
    singular = delta_singular_values(parsed, a.astype(np.float64), b.astype(np.float64))
    d = np.einsum(equation, a.astype(np.float64), b.astype(np.float64))
    assert np.square(singular).sum() == pytest.approx(np.square(d).sum(), rel=1e-9)
    sizes = EQUATIONS[equation]
    axes = [parsed.target.index(dim) for dim in parsed.batch + parsed.inputs + parsed.outputs]
    inputs = int(np.prod([sizes[dim] for dim in parsed.inputs]))
    matrices = np.transpose(d, axes).reshape(len(singular), inputs, -1)
    for values, matrix in zip(singular, matrices, strict=True):
        full = np.linalg.svd(matrix, compute_uv=False)
        count = min(len(full), len(values))
        assert values[:count] == pytest.approx(full[:count], abs=1e-9 * full[0])


def test_a_small_factor_beside_a_large_one_counts_in_full() -> None:
    """Two adapters on one kernel, the second with its size in lora_b: its direction is below any tolerance of lora_a's columns."""
    rng = np.random.default_rng(0)
    n, w = 300, (rng.standard_normal((300, 40)) * 0.02).astype(SERVING)
    a = rng.standard_normal((n, 4)).astype(np.float32) * np.float32([1e-2, 1e-2, 1e-8, 1e-8])
    b = rng.standard_normal((4, 40)).astype(np.float32) * np.float32([[1e-2], [1e-2], [1e4], [1e4]])
    EQUATIONS["ir,ro->io"], kept = {"i": n, "r": 4, "o": 40}, EQUATIONS["ir,ro->io"]
    try:
        result, layers = compute("ir,ro->io", a, b, w, "bfloat16", scale=1.0)
    finally:
        EQUATIONS["ir,ro->io"] = kept
    d = a.astype(np.float64) @ b.astype(np.float64)
    q = result.astype(np.float64) - w.astype(np.float64)
    total = Moments.total(layers)
    assert total.delta_sq == pytest.approx(np.square(d).sum(), rel=1e-5)
    survival = total.survival("bfloat16")
    assert survival.gain == pytest.approx((q * d).sum() / np.square(d).sum(), rel=1e-4)
    assert survival.relative_error == pytest.approx(np.linalg.norm(q - d) / np.linalg.norm(d), rel=1e-4)


def test_unfinished_updates_are_noticed() -> None:
    a, b, w = make("ir,ro->io", 0, 0.1)
    site = site_for("ir,ro->io", 3, 1.0)
    update = update_of(site, w, a, b, np.dtype(np.float32))
    half = (slice(0, 6), slice(0, 10))
    update.take(half, w[half], update.compute(half, w[half], None))
    with pytest.raises(RuntimeError, match="not every block"):
        update.finish()


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=5))
def test_a_cut_covers_the_kernel_in_whole_rows(shape: list[int]) -> None:
    dims = "lnhd"[-len(shape) :] if len(shape) < 5 else "lcndh"
    equation = f"{dims[:-1]}r,{dims[0]}r{dims[-1]}->{dims}" if len(shape) > 2 else "nr,rd->nd"
    made = cut(Equation(equation), shape)
    assert made.matrices * made.rows * made.columns == int(np.prod(shape))
    assert made.block[-1] == shape[-1]
    assert made.block_rows % made.tile_rows == 0
    one_row = shape[-1]
    assert int(np.prod(made.block)) <= max(cutting.BLOCK_ENTRIES, one_row)
    assert made.tile_rows * one_row <= max(cutting.TILE_ENTRIES, one_row)
    if int(np.prod(made.block)) > made.rows * made.columns:
        assert made.rows % made.tile_rows == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 200))
def test_blocks_are_runs_of_rows(shape: list[int], limit: int) -> None:
    extents = slab(shape, limit)
    assert int(np.prod(extents)) <= limit
    flat = np.arange(int(np.prod(shape))).reshape(shape)
    seen = [flat[region].ravel() for region in grid(full_region(shape), extents)]
    assert np.concatenate(seen).tolist() == flat.ravel().tolist()


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_even_parts_are_few_and_fit(extent: int, limit: int) -> None:
    part = even_part(extent, limit)
    assert 1 <= part <= min(extent, limit)
    assert -(-extent // part) <= 2 * -(-extent // limit)


def test_the_spectrum_is_that_of_the_merged_delta(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    step = save_step(tmp_path / "in" / "5", nest(tree.leaves))
    outcome = run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "--scale", "0.5", "--json")
    for site in outcome.json["sites"]:
        path = tuple(site["target"].split("/")[1:-1])
        delta = 0.5 * (tree.expected[path] - tree.leaves[path].astype(np.float64))
        # attn_vec sums over its heads, so its inputs are heads and head dims together.
        heads = delta.shape[-3] if site["module"] == "attn_vec_einsum" else 1
        matrices = delta.reshape(-1, heads * delta.shape[-2], delta.shape[-1])
        values = np.sqrt(np.mean(np.square(np.linalg.svd(matrices, compute_uv=False)), axis=0))
        assert len(site["spectrum"]) == site["rank"]
        np.testing.assert_allclose(site["spectrum"], values[: site["rank"]], rtol=1e-5)
