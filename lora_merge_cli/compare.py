"""Comparisons of values, bit for bit and in figures. Streams: a comparison takes block after block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lora_merge_cli.dtypes import BFLOAT16, is_float, mantissa_bits
from lora_merge_cli.records import Array


def equals_rounded(values: Array, reference: Array) -> bool:
    """Whether `values` are `reference`, rounded to their dtype, bit for bit: NaN equals the same NaN, 0 is not -0."""
    if reference.dtype != values.dtype:
        with np.errstate(over="ignore", invalid="ignore"):
            reference = reference.astype(values.dtype)
    return bool(np.array_equal(_bits(reference), _bits(values)))


def same_bytes(one: bytes | memoryview, other: bytes | memoryview) -> bool:
    """Whether two buffers hold the same bytes; a comparison of memoryviews goes item by item."""
    a, b = (np.frombuffer(buffer, np.uint8) for buffer in (one, other))
    if a.size != b.size:
        return False
    whole = a.size // 8 * 8
    return np.array_equal(a[:whole].view(np.uint64), b[:whole].view(np.uint64)) and np.array_equal(a[whole:], b[whole:])


def count_non_finite(values: Array) -> int:
    """How many entries are NaN or Inf; 0 for what is not floating-point."""
    if not is_float(values.dtype):
        return 0
    if values.dtype == BFLOAT16:
        exponent = np.uint16(0x7F80)
        return int(np.count_nonzero((values.view(np.uint16) & exponent) == exponent))
    return int(values.size - np.count_nonzero(np.isfinite(values)))


@dataclass(frozen=True)
class Tolerance:
    """``|b - a| <= atol + rtol * |a|``."""

    atol: float = 0.0
    rtol: float = 0.0


@dataclass
class Comparison:
    """Figures of the blocks of a leaf B beside those of a leaf A. Sums are float64."""

    entries: int = 0
    changed: int = 0
    """Entries of other bits, or, where the dtypes differ, of other values."""
    beyond: int = 0
    """Entries outside the tolerance, NaN that face something else included."""
    rounded: bool = True
    """Whether B is A, rounded to B's dtype, bit for bit."""
    max_abs: float = 0.0
    """The largest ``|b - a|`` of finite entries."""
    max_ulp: int | None = None
    """The largest distance in representable values of the coarser dtype; None unless both are floating-point."""
    non_finite: int = 0
    """Entries that are NaN or Inf on one side and not the same on the other."""
    non_finite_b: int = 0
    """Entries of B that are NaN or Inf."""
    difference_sq: float = 0.0
    a_sq: float = 0.0
    b_sq: float = 0.0
    dot: float = 0.0

    def merge(self, other: Comparison) -> None:
        """Add the figures of other blocks."""
        for name in (
            "entries",
            "changed",
            "beyond",
            "non_finite",
            "non_finite_b",
            "difference_sq",
            "a_sq",
            "b_sq",
            "dot",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.rounded = self.rounded and other.rounded
        self.max_abs = max(self.max_abs, other.max_abs)
        if other.max_ulp is not None:
            self.max_ulp = max(self.max_ulp or 0, other.max_ulp)

    @property
    def relative_l2(self) -> float | None:
        """``|b - a| / |a|``; None where that has no value."""
        ratio = math.sqrt(self.difference_sq / self.a_sq) if self.a_sq > 0 else math.nan
        return ratio if math.isfinite(ratio) else None

    @property
    def cosine(self) -> float | None:
        """``<a, b> / (|a| |b|)``; None where that has no value."""
        norm = math.sqrt(self.a_sq) * math.sqrt(self.b_sq)
        cosine = self.dot / norm if norm > 0 else math.nan
        return min(1.0, max(-1.0, cosine)) if math.isfinite(cosine) else None


def compare_blocks(a: Array, b: Array, tolerance: Tolerance | None = None) -> Comparison:
    """Compare one block, small enough for several float64 copies of it.

    Args:
        a: The reference, any dtype.
        b: The same shape, any dtype.
        tolerance: What `Comparison.beyond` counts against; equality if None.
    """
    a, b = a.reshape(-1), b.reshape(-1)
    both_float = is_float(a.dtype) and is_float(b.dtype)
    found = Comparison(entries=a.size, max_ulp=0 if both_float else None)
    wide_a = a.astype(np.float64)
    if a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b)):
        found.a_sq = _sum_of_products(wide_a, wide_a)
        if not math.isfinite(found.a_sq):
            finite = np.isfinite(wide_a)
            found.non_finite_b = int(wide_a.size - np.count_nonzero(finite))
            found.a_sq = _sum_of_products(wide_a[finite], wide_a[finite])
        found.b_sq = found.dot = found.a_sq
        return found
    wide_b = b.astype(np.float64)
    same = (wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b))
    found.changed = int(np.count_nonzero(_entry_bits(a) != _entry_bits(b) if a.dtype == b.dtype else ~same))
    found.rounded = equals_rounded(b, a)
    usable = np.isfinite(wide_a) & np.isfinite(wide_b)
    found.non_finite = int(np.count_nonzero(~usable & ~same))
    found.non_finite_b = int(np.count_nonzero(~np.isfinite(wide_b)))
    finite_a, finite_b = (wide_a, wide_b) if usable.all() else (wide_a[usable], wide_b[usable])
    with np.errstate(over="ignore"):
        difference = np.abs(finite_b - finite_a)
        found.max_abs = float(difference.max(initial=0.0))
        found.difference_sq = _sum_of_products(difference, difference)
    found.a_sq = _sum_of_products(finite_a, finite_a)
    found.b_sq = _sum_of_products(finite_b, finite_b)
    found.dot = _sum_of_products(finite_a, finite_b)
    allowed = tolerance or Tolerance()
    close = difference <= allowed.atol + allowed.rtol * np.abs(finite_a)
    found.beyond = int(np.count_nonzero(~close)) + found.non_finite
    if both_float:
        found.max_ulp = _max_ulp(a[usable], b[usable])
    return found


def _max_ulp(a: Array, b: Array) -> int:
    """The largest number of representable values of the coarser dtype from one to the other."""
    coarser = min(a.dtype, b.dtype, key=mantissa_bits)
    with np.errstate(over="ignore"):
        (sign_a, size_a), (sign_b, size_b) = (_sign_and_steps(values.astype(coarser)) for values in (a, b))
    apart = np.maximum(size_a, size_b) - np.minimum(size_a, size_b)
    return int(np.where(sign_a == sign_b, apart, size_a + size_b).max(initial=0))


def _sign_and_steps(values: Array) -> tuple[Array, Array]:
    """Each value's sign bit, and how many representable values it is from 0."""
    bits = values.view(f"u{values.dtype.itemsize}").astype(np.uint64)
    sign = np.uint64(1) << np.uint64(8 * values.dtype.itemsize - 1)
    return bits & sign, bits & ~sign


def _sum_of_products(a: Array, b: Array) -> float:
    return float(np.einsum("i,i->", a, b))


def _entry_bits(values: Array) -> Array:
    unit = f"u{values.dtype.itemsize}" if values.dtype.itemsize in (1, 2, 4, 8) else f"V{values.dtype.itemsize}"
    return np.ascontiguousarray(values).reshape(-1).view(unit)


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
