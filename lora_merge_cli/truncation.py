"""Truncated singular value decompositions: of a delta that streams past in rows, and of one that is a product of two factors.

The best approximation of rank r keeps the r largest singular values (Eckart and Young 1936), and of ``|delta|_F^2`` the share
that their squares have. A streamed delta is read a few times and never held. Its large products run on the device in float32, at
the highest precision, in tiles that depend on its shape alone; their sums, and all small factorisations, are float64 on the host.

Source: Halko, Martinsson, Tropp, Finding structure with randomness (arXiv:0909.4061), algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.errors import NonFiniteInput, UsageError
from lora_merge_cli.records import Array

Pass = Callable[[], Iterable[tuple[int, Array]]]
"""Starts reading a delta at its first row: runs of whole rows without gaps, each with the number of its first row."""

FLOAT32_SHARE = 1e-6
"""The least share of ``|delta|_F^2`` that sums of float32 products tell from nothing: a relative error of 1e-3."""

_FLOAT32_NOISE = 5e-7
"""A singular value below this part of ``|delta|_F`` is a float32 delta's own rounding."""
_MEASURED_SHARE = 1e-4
"""A loss below it is measured."""
_LEAST_OVERSAMPLING = 16
_POWER_PASSES = 2
_FIRST_SKETCH = 128
_GRAM_AT_ONCE = 1024
_GRAM_AT_ALL = 4096
_GRAM_MARGIN = 8
_TILE_ENTRIES = 2**22
_PANEL_ENTRIES = 2**26


@dataclass(frozen=True)
class Truncated:
    """A delta of low rank, as two factors: ``left @ right``."""

    left: Array
    """(rows, r), float32. Column i is the left singular vector times the root of the singular value."""
    right: Array
    """(r, columns), float32. Row i is the right singular vector times the same root: neither factor is large or small alone."""
    singular_values: Array
    """(r,), float64, descending."""
    energy_kept: float
    """The share of ``|delta|_F^2`` that the factors have; 1 where that is zero."""
    relative_error: float
    """``|delta - left @ right|_F / |delta|_F``; 0 where that is zero."""
    total: float
    """``|delta|_F``, the Frobenius norm of the whole delta."""

    @property
    def rank(self) -> int:
        """The number of singular values kept."""
        return len(self.singular_values)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Refuse a cut that is not one of the two, or that makes no sense.

    Args:
        rank: The rank to cut to.
        energy: The share of ``|delta|_F^2`` to keep.

    Raises:
        UsageError: Both or neither are given, the rank is below 1, or the share is not above 0 and up to 1.
    """
    if (rank is None) == (energy is None):
        raise UsageError(
            "either --rank or --energy is needed",
            found="both" if rank is not None else "neither",
            hint="--rank 16 for one rank, or --energy 0.99 for the least rank that keeps 99 % of each |delta|^2",
        )
    if rank is not None and rank < 1:
        raise UsageError("--rank must be at least 1", found=rank)
    if energy is not None and not 0 < energy <= 1:
        raise UsageError("--energy must be above 0 and up to 1", found=energy)


def truncate(
    blocks: Pass,
    rows: int,
    columns: int,
    *,
    rank: int | None = None,
    energy: float | None = None,
    device: Any = None,
    seed: int = 0,
) -> Truncated:
    """The truncated SVD of a delta that is read in rows, several times.

    Where the shorter side is up to 1024: eigenvectors of the Gram matrix of that side (one pass, if what it takes of the delta fits
    256 MiB), and up to three passes for the factors. The result is optimal up to rounding.

    Longer sides, to a rank r: randomised subspace iteration from ``l = r + max(16, r)`` Gaussian directions, with ``A^T A`` applied
    q times, each in one pass, and two passes for the factors: four in all with ``q = 2``. After Halko et al., corollary 10.10,
    ``E |A - QQ^T A|_2 <= (1 + sqrt(r / (p - 1)) + e sqrt(r + p) sqrt(min(rows, columns) - r) / p)^(1 / (2 q + 1)) s`` with
    ``p = l - r`` and s the first singular value left out. A delta of rank up to l is found whole, in float32.

    Longer sides, to a share of the energy: first 128 directions as above, which do if half of them suffice; then the Gram matrix
    for up to 4096, and beyond it as many directions as it takes, twice as many each time. The rank is the least that keeps the
    share, or, by random directions, a little above it.

    The energy kept is ``sum s_i^2 / |A|^2`` with s_i the singular values of the projection ``Q Q^T A``, whose rest is orthogonal to
    it: right to about 1e-7. So a share above ``1 - FLOAT32_SHARE`` cannot be told from all of it: then every direction is kept that
    is more than rounding, ``s_i > 5e-7 |A|_F``. Where little is lost, one more pass measures the error itself.

    The result is the same for the same seed on one machine, and for every cut into blocks: they are cut anew, by shape alone.

    Args:
        blocks: Starts a pass over the delta; finite, converted to float32.
        rows: How many rows it has.
        columns: How many columns.
        rank: The rank to cut to; more than the shorter side is cut to that.
        energy: The share of ``|delta|_F^2`` to keep, where no rank is given.
        device: The JAX device of the products; JAX's default if None.
        seed: What the random directions are drawn from.

    Returns:
        The factors, in float32. A delta of zeros has one of rank 1, of zeros.

    Raises:
        UsageError: See `check_cut`.
        NonFiniteInput: The delta holds NaN or Inf.
    """
    check_cut(rank, energy)
    assert rows > 0 and columns > 0, "a delta has entries"
    delta = _Streamed(blocks, rows, columns, device)
    wanted = _Wanted(rank, energy)
    found: _Decomposed | None = None
    if delta.side > _GRAM_AT_ONCE:
        width = _FIRST_SKETCH if rank is None else min(rank + max(_LEAST_OVERSAMPLING, rank), delta.side)
        found = _sketched(delta, width, seed)
        enough = wanted.of(found.singular, delta.total_sq)
        if rank is None and (enough is None or enough > _FIRST_SKETCH // 2):
            found = None
    if found is None:
        found = _by_gram(delta, wanted) if delta.side <= _GRAM_AT_ALL else _by_larger_sketches(delta, wanted, seed)
    return _finished(delta, found, wanted.of(found.singular, delta.total_sq) or delta.side)


def truncate_product(left: Array, right: Array, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The truncated SVD of ``left @ right``, without forming it.

    With QR factors ``left = Q_l R_l`` and ``right^T = Q_r R_r`` the product is ``Q_l (R_l R_r^T) Q_r^T``: the SVD of the small
    matrix in the middle is its own. In float64, exact up to rounding: singular values down to 1e-15 of the largest.

    Args:
        left: (rows, k), any floating dtype, finite; every scale in it.
        right: (k, columns).
        rank: The rank to cut to; more than k, or than a side, is cut to that.
        energy: The share of ``|left @ right|_F^2`` to keep, where no rank is given; 1 leaves out nothing but rounding.

    Returns:
        The factors, in float32. A product of zeros has one of rank 1, of zeros.

    Raises:
        UsageError: See `check_cut`.
    """
    check_cut(rank, energy)
    q_left, r_left = np.linalg.qr(left.astype(np.float64))
    q_right, r_right = np.linalg.qr(right.astype(np.float64).T)
    u, singular, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    if rank is None:
        assert energy is not None, "one of the two is given"
        rank = smallest_rank(singular, energy)
    squares = np.square(singular)
    cut = _cut(_Decomposed(q_left @ u, singular, vt @ q_right.T), float(np.sum(squares)), rank)
    lost = float(np.sum(squares[cut.rank :]))
    return dataclasses.replace(cut, relative_error=math.sqrt(lost) / cut.total if cut.total else 0.0)


def smallest_rank(singular: Array, energy: float) -> int:
    """The least number of singular values, from the largest on, whose squares have that share of all squares; at least 1.

    Args:
        singular: All singular values, descending, float64.
        energy: The share, up to 1; what float64 takes for rounding is not asked for.
    """
    tails = np.cumsum(np.square(singular)[::-1])[::-1]
    spare = max(1.0 - energy, (len(singular) * np.finfo(np.float64).eps) ** 2)
    return max(1, int(np.count_nonzero(tails > spare * tails[0])))


@dataclass(frozen=True)
class _Decomposed:
    """Singular values and vectors of a delta, or of its projection; float64."""

    left: Array
    singular: Array
    right: Array


@dataclass(frozen=True)
class _Wanted:
    """How much of a streamed delta is wanted."""

    rank: int | None
    energy: float | None

    def of(self, singular: Array, total_sq: float) -> int | None:
        """How many of its first singular values that is; None if it is more than these.

        Args:
            singular: The first ones, or all.
            total_sq: ``|delta|_F^2``.
        """
        if self.energy is None:
            return self.rank if self.rank is not None and self.rank <= len(singular) else None
        if 1 - self.energy < FLOAT32_SHARE:
            loud = int(np.count_nonzero(singular > _FLOAT32_NOISE * math.sqrt(total_sq)))
            return max(1, loud) if loud < len(singular) else None
        kept = np.cumsum(np.square(singular))
        reached = np.flatnonzero(total_sq - kept <= (1 - self.energy) * total_sq)
        return int(reached[0]) + 1 if len(reached) else None


@dataclass(frozen=True)
class _Tile:
    """Some rows on the device: a power of two times `values`, whose rows beyond the delta's are zeros."""

    rows: slice
    unit: float
    values: Any


@dataclass(frozen=True)
class _Products:
    """What the device computes. All arguments are float32."""

    forward: Callable[[Any, Any], Any]
    """``tile @ x``."""
    transposed: Callable[[Any, Any], Any]
    """``tile.T @ y``."""
    squared: Callable[[Any, Any], Any]
    """``tile.T @ (tile @ x)``."""
    outer: Callable[[Any, Any], Any]
    """``tile @ other.T``."""
    distance: Callable[[Any, Any, Any], Any]
    """``|tile - left @ right|^2``, row by row."""


class _Streamed:
    """A delta of which some rows at a time are on the device.

    Products of tiles are float32, of values scaled to about 1; they are added up in float64.
    """

    def __init__(self, blocks: Pass, rows: int, columns: int, device: Any) -> None:
        self.rows, self.columns, self.side = rows, columns, min(rows, columns)
        self.total_sq = 0.0
        """``|delta|_F^2``, once there was a pass."""
        self._blocks, self._device = blocks, device
        self._measured = False
        # A power of two, so that deltas of one width share their compiled products.
        fitting = 2 ** int(math.log2(max(8, _TILE_ENTRIES // columns)))
        self._height = min(fitting, 2 ** math.ceil(math.log2(max(8, rows))))

    def forward(self, x: Array) -> Array:
        """``delta @ x``, (rows, l) float64."""
        product = np.zeros((self.rows, x.shape[1]))
        held = self._put(x)
        for tile in self._tiles():
            found = np.asarray(_products().forward(tile.values, held), np.float64)
            product[tile.rows] = tile.unit * found[: tile.rows.stop - tile.rows.start]
        return product

    def transposed(self, y: Array) -> Array:
        """``delta.T @ y``, (columns, l) float64."""
        product = np.zeros((self.columns, y.shape[1]))
        for tile in self._tiles():
            part = self._put(self._padded(y[tile.rows]))
            product += tile.unit * np.asarray(_products().transposed(tile.values, part), np.float64)
        return product

    def squared(self, x: Array) -> Array:
        """``delta.T @ delta @ x`` in one pass, (columns, l) float64."""
        product = np.zeros((self.columns, x.shape[1]))
        held = self._put(x)
        for tile in self._tiles():
            product += tile.unit**2 * np.asarray(_products().squared(tile.values, held), np.float64)
        return product

    def gram_of_columns(self) -> Array:
        """``delta.T @ delta`` in one pass, float64."""
        gram = np.zeros((self.columns, self.columns))
        for tile in self._tiles():
            gram += tile.unit**2 * np.asarray(_products().transposed(tile.values, tile.values), np.float64)
        return gram

    def gram_of_rows(self) -> Array:
        """``delta @ delta.T``, float64: one pass for each 256 MiB of the delta, which are held in it."""
        gram = np.zeros((self.rows, self.rows))
        panel_rows = max(1, _PANEL_ENTRIES // (self._height * self.columns)) * self._height
        for start in range(0, self.rows, panel_rows):
            panel: list[_Tile] = []
            for tile in self._tiles():
                if tile.rows.start < start:
                    continue
                if tile.rows.start < start + panel_rows:
                    panel.append(tile)
                for other in panel:
                    self._add_outer(gram, tile, other)
        return gram

    def distance_sq(self, left: Array, right: Array) -> float:
        """``|delta - left @ right|_F^2``; one pass."""
        held, found = self._put(right), 0.0
        for tile in self._tiles():
            part = self._put(self._padded(left[tile.rows]) / np.float32(tile.unit))
            squares = np.asarray(_products().distance(tile.values, part, held), np.float64)
            found += tile.unit**2 * float(squares.sum())
        return found

    def _padded(self, rows: Array) -> Array:
        padded = np.zeros((self._height, rows.shape[1]), np.float32)
        padded[: len(rows)] = rows
        return padded

    def _add_outer(self, gram: Array, tile: _Tile, other: _Tile) -> None:
        found = np.asarray(_products().outer(tile.values, other.values), np.float64) * (tile.unit * other.unit)
        found = found[: tile.rows.stop - tile.rows.start, : other.rows.stop - other.rows.start]
        gram[tile.rows, other.rows] = found
        gram[other.rows, tile.rows] = found.T

    def _tiles(self) -> Iterator[_Tile]:
        """One pass, cut by shape alone: the same tiles whatever the blocks."""
        buffer = np.zeros((self._height, self.columns), np.float32)
        filled = start = 0
        total_sq = 0.0
        for first, block in self._blocks():
            assert first == start + filled and block.shape[1:] == (self.columns,), "rows follow one another"
            done = 0
            while done < len(block):
                taken = min(self._height - filled, len(block) - done)
                buffer[filled : filled + taken] = block[done : done + taken]
                filled, done = filled + taken, done + taken
                if filled == self._height or start + filled == self.rows:
                    total_sq += self._square_of(buffer[:filled])
                    yield self._tile(start, buffer, filled)
                    start, filled = start + filled, 0
        assert start == self.rows, "a pass covers all rows"
        self.total_sq, self._measured = total_sq if not self._measured else self.total_sq, True

    def _square_of(self, rows: Array) -> float:
        if self._measured:
            return 0.0
        wide = rows.astype(np.float64).reshape(-1)
        return float(wide @ wide)

    def _tile(self, start: int, buffer: Array, filled: int) -> _Tile:
        largest = float(np.max(np.abs(buffer[:filled])))
        if not math.isfinite(largest):
            raise NonFiniteInput("NaN or Inf in a delta", where=f"rows {start} to {start + filled - 1}")
        unit = 2.0 ** max(-120, min(126, math.frexp(largest)[1]))
        # A copy, since the device may take it while the buffer fills again.
        scaled = buffer * np.float32(1 / unit)
        scaled[filled:] = 0
        return _Tile(slice(start, start + filled), unit, self._put(scaled))

    def _put(self, values: Array) -> Any:
        import jax

        return jax.device_put(values.astype(np.float32, copy=False), self._device)


@functools.cache
def _products() -> _Products:
    """The products, compiled once for each shape. JAX is imported here: factors alone need none."""
    import jax
    import jax.numpy as jnp

    dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    return _Products(
        forward=jax.jit(dot),
        transposed=jax.jit(lambda tile, y: dot(tile.T, y)),
        squared=jax.jit(lambda tile, x: dot(tile.T, dot(tile, x))),
        outer=jax.jit(lambda tile, other: dot(tile, other.T)),
        distance=jax.jit(lambda tile, left, right: jnp.square(tile - dot(left, right)).sum(axis=1)),
    )


def _sketched(delta: _Streamed, width: int, seed: int) -> _Decomposed:
    """The SVD of the delta's projection on the images of random directions, after two power steps."""
    directions = np.random.default_rng(seed).standard_normal((delta.columns, width), np.float32)
    if width < delta.side:
        for _ in range(_POWER_PASSES):
            directions = _orthonormal(delta.squared(directions))
    return _projected(delta, directions)


def _projected(delta: _Streamed, directions: Array) -> _Decomposed:
    """The SVD of ``Q Q^T delta``, Q an orthonormal basis of the images of `directions`; two passes."""
    # As the device sees it, so that what is multiplied is what the factors are made from.
    basis = _orthonormal(delta.forward(directions)).astype(np.float32)
    across = delta.transposed(basis)
    q, r = np.linalg.qr(across)
    u, singular, vt = np.linalg.svd(r.T, full_matrices=False)
    return _Decomposed(basis.astype(np.float64) @ u, singular, vt @ q.T)


def _orthonormal(columns: Array) -> Array:
    """An orthonormal basis of the columns; of as many arbitrary directions more as they lack."""
    return np.asarray(np.linalg.qr(columns)[0])


def _by_gram(delta: _Streamed, wanted: _Wanted) -> _Decomposed:
    """The SVD of a projection that holds all that is wanted, from the eigenvectors of the shorter side's Gram matrix."""
    tall = delta.columns <= delta.rows
    values, vectors = np.linalg.eigh(delta.gram_of_columns() if tall else delta.gram_of_rows())
    vectors = vectors[:, ::-1]
    enough = wanted.of(np.sqrt(np.maximum(values[::-1], 0)), delta.total_sq)
    for width in (min((enough or delta.side) + _GRAM_MARGIN, delta.side), delta.side):
        directions = vectors[:, :width] if tall else _orthonormal(delta.transposed(vectors[:, :width]))
        found = _projected(delta, directions)
        # Small eigenvalues are float32's rounding: directions like any other, and there may be too few of them.
        if width == delta.side or wanted.of(found.singular, delta.total_sq) is not None:
            break
    return found


def _by_larger_sketches(delta: _Streamed, wanted: _Wanted, seed: int) -> _Decomposed:
    """The SVD of a projection that holds all that is wanted, by random directions alone."""
    width = 2 * _FIRST_SKETCH
    while True:
        width = min(width, delta.side)
        found = _sketched(delta, width, seed)
        enough = wanted.of(found.singular, delta.total_sq)
        if width == delta.side or (enough is not None and enough <= width // 2):
            return found
        width *= 2


def _finished(delta: _Streamed, found: _Decomposed, rank: int) -> Truncated:
    """The factors, and what they lose: from their energy, or measured where that is too small to be seen in it."""
    cut = _cut(found, delta.total_sq, rank)
    if not cut.total or 1 - cut.energy_kept > _MEASURED_SHARE:
        return cut
    error_sq = delta.distance_sq(cut.left, cut.right) / delta.total_sq
    return dataclasses.replace(cut, energy_kept=max(0.0, 1 - error_sq), relative_error=math.sqrt(error_sq))


def _cut(found: _Decomposed, total_sq: float, rank: int) -> Truncated:
    """The first singular values, shared between both factors."""
    rank = min(rank, len(found.singular)) if total_sq else 1
    singular = found.singular[:rank] if total_sq else np.zeros(1)
    root = np.sqrt(singular)
    kept = min(1.0, float(np.sum(np.square(singular))) / total_sq) if total_sq else 1.0
    return Truncated(
        left=np.asarray(found.left[:, :rank] * root, np.float32),
        right=np.asarray(root[:, None] * found.right[:rank], np.float32),
        singular_values=singular,
        energy_kept=kept,
        relative_error=math.sqrt(1 - kept),
        total=math.sqrt(total_sq),
    )
