"""Laws of the comparison and of reading side by side."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.compare import (
    Comparison,
    Tolerance,
    compare_blocks,
    count_non_finite,
    equals_rounded,
    same_bytes,
)
from lora_merge_cli.dtypes import holds_all_values_of, ulp
from lora_merge_cli.formats import open_checkpoint
from lora_merge_cli.records import full_region, region_shape
from lora_merge_cli.side_by_side import flat_pieces, pieces, side_by_side
from tests.checkpoints import save_item
from tests.trees import BFLOAT16

DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32)]
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.sampled_from(DTYPES), finite)
def test_ulp_is_the_gap_to_the_next_value(dtype: np.dtype, value: float) -> None:
    with np.errstate(over="ignore"):
        stored = np.abs(np.array([value]).astype(dtype))
    bits = stored.view(f"u{dtype.itemsize}") + 1
    following = bits.view(dtype)
    if not np.isfinite(following.astype(np.float64))[0]:
        return
    gap = following.astype(np.float64) - stored.astype(np.float64)
    assert ulp(stored.astype(np.float64), dtype)[0] == gap[0]


@given(st.sampled_from(DTYPES), st.integers(-200, 200), st.integers(-200, 200))
def test_ulp_distance_counts_representable_values(dtype: np.dtype, a: int, b: int) -> None:
    def value(steps: int) -> np.ndarray:
        magnitude = np.array([abs(steps)], f"u{dtype.itemsize}").view(dtype)
        return -magnitude if steps < 0 else magnitude

    found = compare_blocks(value(a), value(b))
    assert found.max_ulp == abs(a - b)
    assert bool(found.changed) == (a != b)


def test_ulp_distance_of_float64_does_not_overflow() -> None:
    a, b = np.array([-1e308]), np.array([1e308])
    assert compare_blocks(a, b).max_ulp == 2 * int(b.view(np.uint64)[0])


@given(st.lists(finite, min_size=2, max_size=40), st.integers(1, 39), st.floats(0, 1))
def test_a_comparison_of_parts_is_that_of_the_whole(values: list[float], cut: int, rtol: float) -> None:
    a = np.array(values, np.float32)
    b = np.roll(a, 1)
    tolerance = Tolerance(0.0, rtol)
    whole, parts = compare_blocks(a, b, tolerance), Comparison()
    for block in (slice(0, cut), slice(cut, None)):
        parts.merge(compare_blocks(a[block], b[block], tolerance))
    for name in ("entries", "changed", "beyond", "rounded", "max_abs", "non_finite"):
        assert getattr(parts, name) == getattr(whole, name), name
    assert parts.a_sq == pytest.approx(whole.a_sq)
    exact = sum(Fraction(float(y) - float(x)) ** 2 for x, y in zip(a, b, strict=True))
    assert whole.difference_sq == pytest.approx(float(exact))


def test_rounded_knows_bits() -> None:
    reference = np.array([1.00390625, -0.0, np.nan], np.float32)
    assert equals_rounded(reference.astype(BFLOAT16), reference)
    assert not equals_rounded(np.array([1.0, 0.0, np.nan]).astype(BFLOAT16), reference)
    found = compare_blocks(reference, reference.astype(BFLOAT16))
    assert found.rounded and found.changed == 1


def test_which_dtypes_hold_which() -> None:
    names = ["float16", "bfloat16", "float32", "float64"]
    held = {(w, n) for w in names for n in names if holds_all_values_of(_dtype(w), _dtype(n))}
    same = {(name, name) for name in names}
    assert held - same == {(w, n) for w, n in [("float32", "float16"), ("float32", "bfloat16")]} | {
        ("float64", n) for n in names[:3]
    }
    assert not holds_all_values_of(np.dtype(np.float32), np.dtype(np.int8))


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@given(shapes, st.integers(1, 60), st.integers(1, 8))
def test_pieces_cover_a_region_once(shape: list[int], entries: int, columns: int) -> None:
    seen = np.zeros(shape, int)
    for piece in pieces(full_region(shape), entries, columns):
        seen[piece] += 1
        assert region_shape(piece)[-1] <= columns
        assert np.prod(region_shape(piece)) <= max(2 * entries, columns)
    assert (seen == 1).all()


@given(shapes, st.integers(1, 20))
def test_flat_pieces_are_the_entries_in_order(shape: list[int], entries: int) -> None:
    values = np.arange(np.prod(shape)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_merge_cli.side_by_side._PIECE_ENTRIES", entries)
        cut = list(flat_pieces(values, -values))
    assert all(len(one) <= entries for one, _ in cut)
    assert np.concatenate([one for one, _ in cut]).tolist() == values.ravel().tolist()
    assert all((one == -other).all() for one, other in cut)


@given(st.binary(max_size=40), st.integers(0, 39), st.integers(1, 255))
def test_bytes_are_the_same_or_not(buffer: bytes, at: int, change: int) -> None:
    assert same_bytes(buffer, memoryview(bytearray(buffer)))
    assert not same_bytes(buffer, buffer + b"x")
    if at < len(buffer):
        assert not same_bytes(buffer, buffer[:at] + bytes([buffer[at] ^ change]) + buffer[at + 1 :])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "int32"])
def test_non_finite_entries_are_counted(dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(_dtype(dtype)) if _dtype(dtype).itemsize <= 2 else bits.view(np.uint8).view(_dtype(dtype))
    with np.errstate(all="ignore"):
        wanted = 0 if dtype == "int32" else int((~np.isfinite(values.astype(np.float64))).sum())
    assert count_non_finite(values) == wanted


@pytest.mark.parametrize("rows", [None, (0, 3), (4,)])
@pytest.mark.parametrize("chunks", [(None, None), (60, 200), (200, 60), (None, 60), (60, None)])
def test_blocks_side_by_side_cover_every_leaf_once(
    chunks: tuple[int | None, int | None],
    rows: tuple[int, ...] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lora_merge_cli.side_by_side.BLOCK_ENTRIES", 16)
    values = np.arange(5 * 6 * 4, dtype=np.float32).reshape(5, 6, 4)
    sources = []
    for number, chunk in enumerate(chunks):
        save_item(tmp_path / str(number), {"x": values + 1000 * number}, chunk_bytes=chunk)
        source = open_checkpoint(tmp_path / str(number)).source
        sources.append((source, source.index().tensors["x",]))
    seen = np.zeros(values.shape, int)
    for region, (first, second) in side_by_side(sources, rows):
        seen[region] += 1
        np.testing.assert_array_equal(first, values[region])
        np.testing.assert_array_equal(second, values[region] + 1000)
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
    wanted = np.isin(np.arange(5), range(5) if rows is None else rows)
    assert (seen[wanted] == 1).all() and not seen[~wanted].any()
