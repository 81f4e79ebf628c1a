"""What rounding to nearest would leave of a delta, from a sample of its kernel: known before anything is merged.

At some entries w of the kernel the delta d is formed in float64. With ``q = cast(w + d) - cast(w)``

    gain = sum(q d) / sum(d^2)        error^2 = (1 - n / N) sum((q d - gain d^2)^2) / sum(d^2)^2

over n of N entries: the ratio estimate and its standard error (Cochran, Sampling Techniques, 3rd ed., section 6.4). It is the gain
along the adapter's inputs as well: the columns of a low-rank d lie in the span of U, so ``<U^T q, U^T d> = <q, d>``.

On a bfloat16 kernel w lies on the grid, and q is d rounded to whole steps of w: nothing below half a step is left. Between the
grid's values, as a float32 kernel is, the gain is 1 on average over w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dtypes import FLOAT32, dtype_named
from lora_merge_cli.equation import Equation
from lora_merge_cli.lowrank import factor_matrices
from lora_merge_cli.records import Array, Region
from lora_merge_cli.rounding import GRIDS

ENTRIES = 2**18
"""About how many entries of a kernel are looked at; all of a smaller one."""
_SEED = 0


@dataclass(frozen=True)
class NearestGain:
    """What rounding to nearest would keep of all that is added to a kernel, in one dtype."""

    dtype: str
    """The dtype that is rounded to."""
    gain: float
    """``<q, d> / <d, d>``: 1 is kept; see `survival`."""
    standard_error: float
    """How far the gain of all entries may be off, one sigma; 0 where all were looked at."""
    entries: int
    """How many were looked at."""


@dataclass(frozen=True)
class Product:
    """A delta: ``scale * einsum(equation, lora_a, lora_b)``."""

    equation: Equation
    """Which dims of the factors make which dims of the kernel."""
    lora_a: Array
    """As the equation takes it, finite."""
    lora_b: Array
    """As the equation takes it, finite."""
    scale: float
    """With the adapter's weight in it."""


def rounded_to(*dtypes: np.dtype[Any]) -> tuple[str, ...]:
    """Those of the dtypes that rounding to could lose a delta, by name, once each."""
    return tuple(dict.fromkeys(dtype.name for dtype in dtypes if dtype.name in GRIDS))


class NearestSample:
    """Looks at the same few inputs and outputs of each matrix of a kernel, drawn once for all of its size.

    Args:
        shape: The kernel's.
        products: All that is added to it. Their dims are inputs and outputs along the same axes.
        dtypes: The names of the dtypes to round to.
    """

    def __init__(self, shape: tuple[int, ...], products: Sequence[Product], dtypes: Sequence[str]) -> None:
        first = products[0].equation
        self._batch, self._inputs, self._outputs = axes(first)
        inputs, outputs = (_extent(shape, group) for group in (self._inputs, self._outputs))
        matrices = _extent(shape, self._batch)
        each = max(1, ENTRIES // matrices)
        rows = min(inputs, max(math.isqrt(each), each // outputs, 1))
        columns = min(outputs, max(each // rows, 1))
        draws = np.random.default_rng(_SEED)
        chosen = [np.sort(draws.choice(n, size, replace=False)) for n, size in ((inputs, rows), (outputs, columns))]
        self._batch_shape = tuple(shape[axis] for axis in self._batch)
        self._rows = _unravelled(chosen[0], shape, self._inputs)
        self._columns = _unravelled(chosen[1], shape, self._outputs)
        self._factors = []
        for product in products:
            left, right = factor_matrices(product.equation, product.lora_a, product.lora_b)
            self._factors.append((product.scale * left[:, chosen[0]], right[:, :, chosen[1]]))
        self._shares = rows / inputs, columns / outputs
        self._kept = {name: (np.zeros(rows), np.zeros(columns)) for name in dtypes}
        self._delta_sq = np.zeros(rows), np.zeros(columns)
        self._entries = 0

    def add(self, region: Region, kernel: Array) -> None:
        """Look at a block of the kernel, finite; every entry comes in one block."""
        rows, columns = _inside(region, self._inputs, self._rows), _inside(region, self._outputs, self._columns)
        if not (rows.any() and columns.any()):
            return
        for place in _indices(region, self._batch):
            index: list[Any] = [None] * kernel.ndim
            for axis, at in zip(self._batch, place, strict=True):
                index[axis] = at - region[axis].start
            for axis, along in zip(self._inputs, self._rows, strict=True):
                index[axis] = (along[rows] - region[axis].start)[:, None]
            for axis, along in zip(self._outputs, self._columns, strict=True):
                index[axis] = (along[columns] - region[axis].start)[None, :]
            number = int(np.ravel_multi_index(place, self._batch_shape)) if place else 0
            delta = sum(left[number][rows] @ right[number][:, columns] for left, right in self._factors)
            values = np.asarray(kernel[tuple(index)]).astype(np.float64).reshape(delta.shape)
            self._look(values, delta, (rows, columns))

    def finish(self) -> tuple[NearestGain, ...]:
        """The gain in each dtype; none of a delta of zeros, or of values that the dtype does not hold."""
        found = []
        total = float(self._delta_sq[0].sum())
        for name, kept in self._kept.items():
            with np.errstate(invalid="ignore"):
                gain = float(kept[0].sum()) / total if total > 0 else math.nan
            if not math.isfinite(gain):
                continue
            # Whole rows and columns are drawn: entries of one vary together.
            parts = zip(kept, self._delta_sq, self._shares, strict=True)
            variance = sum((1 - share) * np.square(sums - gain * delta).sum() for sums, delta, share in parts)
            found.append(NearestGain(name, gain, math.sqrt(variance) / total, self._entries))
        return tuple(found)

    def _look(self, kernel: Array, delta: Array, where: tuple[Array, Array]) -> None:
        delta_sq = np.square(delta)
        self._entries += delta.size
        self._add(self._delta_sq, delta_sq, where)
        for name, sums in self._kept.items():
            with np.errstate(over="ignore", invalid="ignore"):
                self._add(sums, (_cast(kernel + delta, name) - _cast(kernel, name)) * delta, where)

    def _add(self, sums: tuple[Array, Array], terms: Array, where: tuple[Array, Array]) -> None:
        for along, among, axis in zip(sums, where, (1, 0), strict=True):
            along[among] += terms.sum(axis=axis)


def axes(equation: Equation) -> tuple[tuple[int, ...], ...]:
    """Which axes of the kernel are batch, inputs and outputs."""
    groups = (equation.batch, equation.inputs, equation.outputs)
    return tuple(tuple(equation.target.index(dim) for dim in group) for group in groups)


def _cast(values: Array, dtype: str) -> Array:
    # As a merge does it: one sum in float32, which is rounded.
    return np.asarray(values.astype(FLOAT32).astype(dtype_named(dtype)).astype(np.float64))


def _extent(shape: Sequence[int], group: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in group)


def _unravelled(chosen: Array, shape: Sequence[int], group: Sequence[int]) -> list[Array]:
    """Where along each axis of a group its chosen places lie; without an axis there is one place."""
    return list(np.unravel_index(chosen, tuple(shape[axis] for axis in group))) if group else []


def _inside(region: Region, group: Sequence[int], places: Sequence[Array]) -> Array:
    inside = np.ones(len(places[0]) if places else 1, bool)
    for axis, at in zip(group, places, strict=True):
        inside &= (region[axis].start <= at) & (at < region[axis].stop)
    return inside


def _indices(region: Region, group: Sequence[int]) -> Iterator[tuple[int, ...]]:
    parts = [region[axis] for axis in group]
    for corner in np.ndindex(*(part.stop - part.start for part in parts)):
        yield tuple(part.start + at for part, at in zip(parts, corner, strict=True))
