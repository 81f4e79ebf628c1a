"""Interpolation of leaves without an adapter, against float64 NumPy."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dtypes import dtype_named, ulp
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable
from lora_merge_cli.mixing_numerics import BLOCK_ENTRIES, TILE_ENTRIES, mix_block
from lora_merge_cli.operations.mix import MixedLeaf
from lora_merge_cli.records import Array
from lora_merge_cli.survival import Moments

SERVING = np.dtype(ml_dtypes.bfloat16)
CASES = [
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float32", "float32", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float32", "bfloat16", "float16"),
    ("bfloat16", "float32", "bfloat16"),
]
"""Dtypes of the fine-tune, the base and the result."""
UNIT_ROUNDOFF = 2.0**-24
FLUSHED = 2.0**-126
"""XLA flushes what is smaller to 0."""
MAX = float(np.finfo(np.float32).max)
EXTREMES = [0.0, -0.0, 1.0, MAX, -MAX, 0.75 * MAX, -0.75 * MAX, 65504.0, -65504.0, 2.0**-126, 1e-40, -1e-40, 6e-8]
NOT_FINITE = [np.nan, np.inf, -np.inf]

finite = st.one_of(st.sampled_from(EXTREMES), st.floats(width=32, allow_nan=False, allow_infinity=False))
pairs = st.lists(
    st.one_of(st.tuples(finite, finite), finite.map(lambda value: (value, value))), min_size=1, max_size=40
)
held = st.lists(st.sampled_from(NOT_FINITE), max_size=3)
"""Entries that are the same on both sides."""


def leaf(dtype: str, serving: np.dtype = SERVING) -> MixedLeaf:
    return MixedLeaf("tuned :: w", "base :: w", dtype_named(dtype), serving, jax.devices()[0])


def cast(values: object, dtype: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values).astype(dtype_named(dtype))


def is_normal(alpha: float) -> bool:
    """Whether float32 has the number, or zero, without subnormals: devices may take those for zeros."""
    return alpha == 0 or abs(alpha) >= 2.0**-126


def mix(tuned: Array, base: Array, alpha: float, dtype: str) -> tuple[Array, Moments]:
    mixed = leaf(dtype)
    return mixed.take(mixed.compute(tuned, base, alpha)), mixed.finish()


def made(case: tuple[str, str, str], shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> tuple[Array, Array]:
    """A fine-tune and its base, every eighth entry of which did not move."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape) * 0.02
    moved = base + rng.standard_normal(shape) * 1e-3 * (rng.random(shape) > 1 / 8)
    return cast(moved * scale, case[0]), cast(base * scale, case[1])


def bits(values: Array) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def rounding_error(t: Array, b: Array, alpha: float) -> Array:
    """What float32 may lose of ``b + alpha * (t - b)``, each operand and each operation by one unit roundoff at most.

    alpha, the difference and the product: ``3 u |alpha (t - b)|``, and their sum with b: ``u |W|``. Where the difference overflows,
    each of two products of three roundings and their sum: ``3 u (|(1 - alpha) b| + |alpha t|) + u |W|``. ``4 u`` covers terms in
    ``u^2``.
    """
    difference = np.abs(alpha * (t - b))
    products = np.abs((1 - alpha) * b) + np.abs(alpha * t)
    overflows = (np.abs(t - b) >= MAX) | (difference >= MAX)
    result = np.abs(b + alpha * (t - b))
    return UNIT_ROUNDOFF * (4 * np.where(overflows, products, difference) + 2 * result) + 8 * FLUSHED


def assert_mixed(tuned: Array, base: Array, alpha: float, dtype: str) -> None:
    """The result lies within half a unit in the last place of the stored dtype, and float32's own rounding, of the exact one."""
    t, b = tuned.astype(np.float64), base.astype(np.float64)
    same = (t == b) | (np.isnan(t) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        exact = np.where(same, t, b + alpha * (t - b))
        lost = np.where(same, 0, rounding_error(t, b, alpha))
    stored = dtype_named(dtype)
    largest = float(ml_dtypes.finfo(stored).max)
    limit = largest * (1 + 2.0 ** -(ml_dtypes.finfo(stored).nmant + 2))
    try:
        result, _ = mix(tuned, base, alpha, dtype)
    except Unrepresentable:
        assert (np.isfinite(exact) & (np.abs(exact) + lost >= limit)).any()
        return
    assert result.dtype == stored
    assert result.shape == tuned.shape
    values, selected = result.astype(np.float64), cast(tuned, dtype)
    number = np.isfinite(exact)
    room = 0.5 * ulp(np.maximum(np.abs(exact[number]), np.abs(values[number])), stored) + lost[number]
    assert (np.abs(values[number] - exact[number]) <= room).all()
    np.testing.assert_array_equal(values[same], selected[same].astype(np.float64))
    zero = same & (t == 0) & (alpha != 0)
    assert (np.signbit(values[zero]) == np.signbit(t[zero])).all()


@pytest.mark.parametrize("case", CASES)
@given(pairs=pairs, held=held, alpha=st.floats(0.0, 1.0).filter(is_normal))
def test_inside_the_result_is_the_rounded_mean(
    case: tuple[str, str, str], pairs: list[tuple[float, float]], held: list[float], alpha: float
) -> None:
    tuned, base = (cast([pair[side] for pair in pairs] + held, name) for side, name in ((0, case[0]), (1, case[1])))
    # bfloat16 turns some of the largest into Inf, on one side alone.
    usable = (np.isfinite(tuned) == np.isfinite(base)) & ((tuned == base) | np.isfinite(base) | np.isnan(base))
    assert_mixed(tuned[usable], base[usable], alpha, case[2])


@pytest.mark.parametrize("case", CASES)
@given(
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-30, 1e-4, 1.0, 1e4]),
    alpha=st.floats(-3.0, 4.0).filter(is_normal),
)
def test_outside_it_is_the_rounded_extrapolation(
    case: tuple[str, str, str], seed: int, scale: float, alpha: float
) -> None:
    tuned, base = made(case, (7, 5), seed, scale)
    assert_mixed(tuned, base, alpha, case[2])


def test_differences_beyond_float32_do_not_spoil_the_result() -> None:
    tuned, base = np.float32([MAX, -MAX, 0.9 * MAX]), np.float32([-MAX, MAX, -0.8 * MAX])
    result, moments = mix(tuned, base, 0.25, "float32")
    np.testing.assert_allclose(result, [-0.5 * MAX, 0.5 * MAX, -0.375 * MAX], rtol=4 * UNIT_ROUNDOFF)
    d = 0.25 * (tuned.astype(np.float64) - base)
    assert moments.delta_sq == pytest.approx(np.square(d).sum(), rel=1e-5)
    assert moments.survival("float32").gain == pytest.approx(1, rel=1e-5)
    result, _ = mix(np.float32([1.6e38]), np.float32([-1.6e38]), 1.2, "float32")
    np.testing.assert_allclose(result, [2.24e38], rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("alpha", "side"), [(0.0, 1), (-0.0, 1), (1.0, 0)])
def test_the_ends_are_selected_not_computed(case: tuple[str, str, str], alpha: float, side: int) -> None:
    numbers = [value for value in EXTREMES if abs(value) <= 1]
    odd = np.arange(1, 4, dtype=np.uint32)
    tuned = cast([*numbers, *NOT_FINITE, *NOT_FINITE, 1.0, 2.0, 3.0], case[0])
    base = cast([*reversed(numbers), 1.0, 2.0, 3.0, *NOT_FINITE, *reversed(NOT_FINITE)], case[1])
    for values in (tuned, base):
        kind = f"u{values.dtype.itemsize}"
        # Some NaN and some subnormal numbers of the dtype, by their bits.
        np.copyto(values.view(kind)[:3], odd.astype(kind))
        np.copyto(values.view(kind)[3:6], cast([np.nan] * 3, values.dtype.name).view(kind) + odd.astype(kind))
    result, _ = mix(tuned.reshape(2, -1), base.reshape(2, -1), alpha, case[2])
    assert bits(result) == bits(cast((tuned, base)[side], case[2]))
    assert result.shape == (2, tuned.size // 2)


def test_the_device_too_ends_where_it_should() -> None:
    """The figures at alpha 1 are those of the values that are stored."""
    rng = np.random.default_rng(1)
    tuned, base = (np.float32(rng.standard_normal(500) * 10.0 ** rng.integers(-30, 30, 500)) for _ in range(2))
    for alpha, side in ((1.0, tuned), (0.0, base)):
        result, _ = mix_block(tuned, base, alpha, dtype="float32", serving_dtype="bfloat16", device=jax.devices()[0])
        assert bits(result) == bits(side)


def test_one_entry_moves_a_block() -> None:
    base = np.float32(np.random.default_rng(0).standard_normal(50_000))
    tuned = cast(base, "bfloat16")
    tuned[-1] += cast(1.0, "bfloat16")
    result, moments = mix(tuned, base, 0.5, "float32")
    ideal = 0.5 * (tuned.astype(np.float64) + base)
    np.testing.assert_allclose(result, ideal, rtol=4 * UNIT_ROUNDOFF)
    assert moments.max_abs == pytest.approx(0.5, rel=0.1)


@given(st.lists(finite, min_size=1, max_size=20), st.floats(0.0, 1.0).filter(bool))
def test_a_block_that_equals_the_rounded_base_is_the_fine_tunes(values: list[float], alpha: float) -> None:
    base = np.array([*values, np.inf, np.nan], np.float32)
    tuned = cast(base, "bfloat16")
    result, moments = mix(tuned, base, alpha, "bfloat16")
    assert bits(result) == bits(tuned)
    assert moments.delta_sq == moments.max_abs == 0
    assert moments.realised["bfloat16"].unchanged == base.size


@pytest.mark.parametrize(("dtype", "alpha"), [("float32", 0.5), ("bfloat16", -1.0), ("float32", 2.0)])
def test_what_rounding_moved_is_interpolated_where_it_shows(dtype: str, alpha: float) -> None:
    """In a finer dtype than the fine-tune's, and outside [0, 1]."""
    base = np.float32(np.random.default_rng(3).standard_normal(1000))
    tuned = cast(base, "bfloat16")
    assert_mixed(tuned, base, alpha, dtype)
    assert (mix(tuned, base, alpha, dtype)[0] != tuned).any()


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]])
def test_blocks_change_no_bit(case: tuple[str, str, str]) -> None:
    """A leaf of several programs' sizes, whole, and in pieces that tiles and programs do not divide evenly."""
    size = 8 * TILE_ENTRIES + 12_345
    tuned, base = made(case, (size,))
    tuned[:1_003] = cast(base[:1_003], case[0])
    whole, moments = mix(tuned, base, 0.3, case[2])
    edges = [0, 1, 8, 1_003, TILE_ENTRIES - 1, TILE_ENTRIES + 5, 3 * TILE_ENTRIES, size]
    mixed = leaf(case[2])
    pieces = [slice(*ends) for ends in itertools.pairwise(edges)]
    with ThreadPoolExecutor(2) as pool:
        computed = list(pool.map(lambda piece: mixed.compute(tuned[piece], base[piece], 0.3), pieces))
    assert bits(np.concatenate([mixed.take(one) for one in computed])) == bits(whole)
    for name, sums in mixed.finish().realised.items():
        assert sums.unchanged == moments.realised[name].unchanged
        assert sums.q_dot_d == pytest.approx(moments.realised[name].q_dot_d, rel=1e-5)


def test_a_block_larger_than_a_call_is_computed_in_several() -> None:
    case = ("bfloat16", "bfloat16", "bfloat16")
    tuned, base = made(case, (3, BLOCK_ENTRIES // 3 + 5))
    whole, moments = mix(tuned, base, 0.7, case[2])
    rows = [mix(one, other, 0.7, case[2]) for one, other in zip(tuned, base, strict=True)]
    assert bits(whole) == b"".join(bits(row) for row, _ in rows)
    assert moments.entries == tuned.size
    assert moments.delta_sq == pytest.approx(sum(found.delta_sq for _, found in rows), rel=1e-5)


@pytest.mark.parametrize("case", [*CASES, ("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn")])
@pytest.mark.parametrize(
    ("alpha", "size", "scale"), [(0.3, 70_001, 1.0), (1.0, 70_001, 1.0), (-0.5, 9, 1.0), (1.7, 1, 1.0)]
)
def test_moments_are_the_defined_ones(case: tuple[str, str, str], alpha: float, size: int, scale: float) -> None:
    tuned, base = made(case, (size,), seed=2, scale=scale)
    check_moments(tuned, base, alpha, case[2])


@pytest.mark.parametrize(("size_of_base", "size_of_change"), [(1e30, 1e28), (1e-30, 1e-30), (1.0, 1e-25), (0.0, 1e-33)])
def test_moments_hold_for_any_size(size_of_base: float, size_of_change: float) -> None:
    rng = np.random.default_rng(5)
    base = np.float32(rng.standard_normal(5000) * size_of_base)
    base[::2] = 0
    tuned = np.float32(base + rng.standard_normal(5000) * size_of_change)
    check_moments(tuned, base, 0.5, "float32")


def check_moments(tuned: Array, base: Array, alpha: float, dtype: str) -> None:
    result, moments = mix(tuned, base, alpha, dtype)
    t, b = tuned.astype(np.float64), base.astype(np.float64)
    d = alpha * (t - b)
    assert moments.entries == t.size
    assert moments.delta_sq == pytest.approx(np.square(d).sum(), rel=1e-5)
    assert moments.kernel_sq == pytest.approx(np.square(b).sum(), rel=1e-5)
    assert moments.max_abs == pytest.approx(np.abs(d).max(), rel=1e-6)
    assert set(moments.realised) == {dtype, SERVING.name}
    for name, sums in moments.realised.items():
        q = cast(result, name).astype(np.float64) - cast(base, name).astype(np.float64)
        size = np.linalg.norm(q) * np.linalg.norm(d)
        assert sums.q_dot_d == pytest.approx((q * d).sum(), rel=1e-5, abs=1e-5 * size)
        # What float32 rounds is an error too, and one that float32 sums do not see exactly.
        noise = np.square(4 * UNIT_ROUNDOFF * (np.abs(b) + np.abs(d))).sum()
        assert sums.error_sq == pytest.approx(np.square(q - d).sum(), rel=1e-3, abs=4 * noise)
        assert sums.unchanged == np.count_nonzero(q == 0)
        assert (sums.inputs_q_dot_d, sums.inputs_d_sq, sums.inputs_error_sq) == (0, 0, 0)


@pytest.mark.parametrize("case", CASES)
def test_no_step_is_no_change(case: tuple[str, str, str]) -> None:
    tuned, base = made(case, (50_001,), scale=1e3)
    _, moments = mix(tuned, base, 0.0, case[2])
    assert moments.kernel_sq == pytest.approx(np.square(base.astype(np.float64)).sum(), rel=1e-5)
    assert (moments.delta_sq, moments.max_abs, moments.entries) == (0, 0, base.size)
    assert {sums.unchanged for sums in moments.realised.values()} == {base.size}
    assert moments.survival(SERVING.name).gain is None


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_base_is_measured_where_nothing_is_computed(scale: float) -> None:
    base = np.float32(np.random.default_rng(0).standard_normal(40_000) * scale)
    expected = np.square(base.astype(np.float64)).sum()
    assert mix(base, base, 0.5, "float32")[1].kernel_sq == pytest.approx(expected, rel=1e-5)
    base[::1000] = np.inf
    finite_only = np.square(base[np.isfinite(base)].astype(np.float64)).sum()
    assert mix(base, base, 0.5, "float32")[1].kernel_sq == pytest.approx(finite_only, rel=1e-5)


def test_what_is_not_finite_on_both_sides_adds_to_no_sum() -> None:
    tuned = np.float32([np.nan, np.inf, -np.inf, 1.5, 2.0])
    base = np.float32([np.nan, np.inf, -np.inf, 1.0, 2.0])
    result, moments = mix(tuned, base, 0.5, "float32")
    np.testing.assert_array_equal(result, np.float32([np.nan, np.inf, -np.inf, 1.25, 2.0]))
    assert (moments.delta_sq, moments.kernel_sq, moments.max_abs) == (0.0625, 5.0, 0.25)
    stored = moments.realised["float32"]
    assert (stored.q_dot_d, stored.error_sq, stored.unchanged) == (0.0625, 0, 4)


@pytest.mark.parametrize("alpha", [0.5, -1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("tuned", "base", "named"),
    [
        (np.nan, 1.0, "tuned"),
        (np.inf, 1.0, "tuned"),
        (1.0, np.nan, "base"),
        (1.0, -np.inf, "base"),
        (np.inf, -np.inf, "tuned"),
        (np.nan, np.inf, "tuned"),
        (MAX, np.inf, "base"),
    ],
)
def test_what_is_not_finite_on_one_side_is_refused_by_name(
    tuned: float, base: float, named: str, alpha: float, dtype: str
) -> None:
    t, b = np.full((3, 4), 1.25, np.float32), np.ones((3, 4), np.float32)
    t[0, 0] = b[0, 0] = np.nan
    t[1, 2], b[1, 2] = tuned, base
    mixed = leaf(dtype)
    computed = mixed.compute(t, b, alpha)
    with pytest.raises(NonFiniteInput, match=f"{named} :: w .*found 1 entries"):
        mixed.take(computed)
    assert mixed.finish() == Moments()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("tuned", "base"), [(1e6, 1e6), (9e5, 1e6), (9e5, 9e5)])
def test_what_the_stored_dtype_cannot_hold_is_refused(tuned: float, base: float, alpha: float) -> None:
    t, b = np.float32([1.0, tuned, np.inf]), np.float32([2.0, base, np.inf])
    where = "base" if alpha == 0 else "tuned"
    with pytest.raises(Unrepresentable, match=f"overflows float16: {where} :: w .*found 1 results.*--dtype float32"):
        mix(t, b, alpha, "float16")


def test_a_fine_tune_that_did_not_move_and_does_not_fit_is_refused() -> None:
    values = np.float32([1e6])
    with pytest.raises(Unrepresentable, match="tuned :: w"):
        mix(values, values, 0.5, "float16")


@pytest.mark.parametrize("alpha", [1e3, 1e200, -1e200])
def test_an_extrapolation_beyond_float32_is_refused(alpha: float) -> None:
    with pytest.raises(Unrepresentable, match="nearer to"):
        mix(np.float32([1e37]), np.float32([1.0]), alpha, "float32")


def test_a_result_that_fits_is_no_matter_of_what_serving_rounds_it_to() -> None:
    result, moments = mix(np.float32([MAX]), np.float32([0.5 * MAX]), 1 - 2.0**-20, "float32")
    assert result[0] == pytest.approx(MAX, rel=1e-5)
    assert not np.isfinite(moments.realised["bfloat16"].error_sq)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1), (2, 3, 4)])
def test_any_shape_will_do(shape: tuple[int, ...]) -> None:
    tuned, base = np.full(shape, 2, np.float32), np.full(shape, 1, np.float32)
    for alpha in (0.0, 0.5, 1.0):
        result, moments = mix(tuned, base, alpha, "float32")
        np.testing.assert_array_equal(result, np.full(shape, 1 + alpha, np.float32))
        assert moments.entries == tuned.size


def test_a_transposed_block_keeps_its_places() -> None:
    tuned, base = made(("float32", "float32", "float32"), (6, 4))
    turned, _ = mix(tuned.T, base.T, 0.5, "float32")
    np.testing.assert_array_equal(turned, mix(tuned, base, 0.5, "float32")[0].T)
