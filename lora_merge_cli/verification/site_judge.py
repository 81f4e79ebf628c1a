"""A merged kernel against its ideal, entry by entry: NumPy and float64 where the merge uses float32 on a device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dtypes import holds_all_values_of, ulp
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.lowrank import input_basis
from lora_merge_cli.records import Array, Region, region_shape, relative
from lora_merge_cli.side_by_side import pieces
from lora_merge_cli.survival import Moments, Realised
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.model_layer import LayerAdapter, LayerError, LayerPart, ModelLayer
from lora_merge_cli.verification.projection import ProjectedPart, Projection

_EPSILON = 2.0**-24
_TINY = 2.0**-126


@dataclass
class LayerVerdict:
    """What was found of one layer of a site."""

    moments: Moments = field(default_factory=Moments)
    """Survival of the delta, in the stored and in the serving dtype."""
    worst_share: float = 0.0
    """The largest error of an entry as a share of its bound; Inf where an entry is not finite."""
    beyond: int = 0
    """How many entries exceed their bound."""
    off_the_rounding: int = 0
    """How many are further off than the rounding of the kernel in the checkpoint explains."""
    non_finite: int = 0
    """How many entries of the merged kernel are NaN or Inf."""
    forward: LayerError = field(default_factory=lambda: LayerError(None, 0.0, None))
    """What the layer computes."""


@dataclass(frozen=True)
class Terms:
    """How a merged kernel may differ from its ideal."""

    serving_dtype: np.dtype[Any]
    """What servers cast to."""
    ulps: float
    """The rounding to the stored dtype: 0.5 to nearest, 1 otherwise."""
    multiplier: float
    """What the delta is multiplied by besides the site's scale."""


class SiteJudge:
    """Judges one site, block by block in any order.

    The ideal is ``ref = w + s * a @ b`` in float64, summed over all adapters, and an entry may be off by

        ulps * ulp(ref) + c * (2^-24 * (|w| + |s| * |a_i| * |b_j|) + 2^-126),   c = rank + heads + 4

    with ulp that of the stored dtype, ``|b|`` summed over the heads where the model sums them. Any sum of rank float32 products
    in any order stays below it (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); 2^-126 is for devices
    that flush subnormal numbers to zero. With DoRA's gain g the ideal is ``g * (w + s * a @ b)``, and the relative error of a
    float32 norm over n inputs comes on top: ``(16 + sqrt(n)) * 2^-24``.

    Args:
        where: The kernel in the checkpoint, as errors name it.
        adapted: The adapters on the kernel.
        shape: The kernel's shape.
        dtype: The merged kernel's dtype.
        terms: What else it may differ by.
        layers: The stacked layers to look at; ``(0,)`` where none are stacked.
    """

    def __init__(
        self,
        where: str,
        adapted: Sequence[Adapted],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        terms: Terms,
        layers: Sequence[int],
    ) -> None:
        self._equation = equation = adapted[0].site.parameters.equation
        self._where, self._dtype, self._terms = where, dtype, terms
        batch = equation.batch
        self._allowed_steps = sum(part.steps for part in adapted) + 4
        self._a = np.concatenate([part.left() for part in adapted], axis=-1)
        self._b = np.concatenate([part.right() for part in adapted], axis=len(batch))
        self._b_size = np.concatenate([part.right(magnitudes=True) for part in adapted], axis=len(batch))
        gains = [gain for part in adapted if (gain := part.extra_gain) is not None]
        self._gain = sum(gains[1:], gains[0]) if gains else None
        self._gain_size = None if not gains else 1.0 + np.sum(np.abs(gains), axis=0)
        self._gain_error = max(part.gain_error for part in adapted)
        self._basis = input_basis(self._a, len(batch)).astype(np.float64)
        self._first = 1 if equation.stacked else 0
        self.layers = {layer: LayerVerdict() for layer in layers}
        rng = np.random.default_rng(0)
        self._models = {
            layer: ModelLayer(
                [LayerAdapter.of(part, layer if equation.stacked else None) for part in adapted],
                shape[self._first :],
                rng,
            )
            for layer in layers
        }
        self._projections: dict[tuple[int, ...], Projection] = {}
        self._inputs = math.prod(self._a.shape[len(batch) : -1])
        self._outputs = self._b.shape[len(batch) + 1 :]
        self.base_differs = False
        """Whether some block of the kernel is not the base's, rounded to the kernel's dtype."""

    def take(self, region: Region, kernel: Array, merged: Array, base: Array | None, pool: ThreadPoolExecutor) -> None:
        """Judge one block.

        Args:
            region: Where it lies in the leaf.
            kernel: The checkpoint's kernel there.
            merged: The merged kernel there.
            base: The base's kernel there, which the delta was added to instead; None without a base.
            pool: Where to compute.
        """

        def judge(piece: Region) -> _Piece:
            inside = relative(piece, region)
            # Values beyond any range are found, and judged, by what they are not.
            with np.errstate(all="ignore"):
                return self._judge(piece, kernel[inside], merged[inside], None if base is None else base[inside])

        with np.errstate(all="ignore"):
            for piece in pool.map(judge, self._pieces(region)):
                self._add(piece)

    def finish(self) -> dict[int, LayerVerdict]:
        """What was found.

        Raises:
            RuntimeError: Some block was never judged.
        """
        if self._projections:
            raise RuntimeError("not every part of the kernel was judged")
        for layer, model in self._models.items():
            self.layers[layer].forward = model.finish()
        return self.layers

    def _pieces(self, region: Region) -> Iterator[Region]:
        """Pieces of one index of every batch dim, and of a layer that is looked at."""
        extents = dict(zip(self._equation.target, region, strict=True))
        for index in np.ndindex(*(extents[dim].stop - extents[dim].start for dim in self._equation.batch)):
            at = dict(zip(self._equation.batch, index, strict=True))
            block = tuple(
                slice(part.start + at[dim], part.start + at[dim] + 1) if dim in at else part
                for dim, part in extents.items()
            )
            if self._layer_of(block) in self.layers:
                yield from pieces(block)

    def _layer_of(self, region: Region) -> int:
        return int(region[0].start) if self._first else 0

    def _judge(self, region: Region, kernel: Array, merged: Array, base: Array | None) -> _Piece:
        equation, terms = self._equation, self._terms
        parts = dict(zip(equation.target, region, strict=True))
        batch = tuple(parts[dim].start for dim in equation.batch)
        inputs = tuple(parts[dim] for dim in equation.inputs)
        outputs = tuple(parts[dim] for dim in equation.outputs)
        shape = region_shape(region)
        a, basis = (_rows(values[(*batch, *inputs)]) for values in (self._a, self._basis))
        b, b_size = (_columns(values[(*batch, slice(None), *outputs)]) for values in (self._b, self._b_size))

        w = kernel.astype(np.float64)
        added_to = w if base is None else base.astype(np.float64)
        m = merged.astype(np.float64)
        delta = self._as_kernel(a @ b, shape)
        size = self._as_kernel(np.abs(a) @ b_size, shape)
        ideal_projection = (basis.T @ a) @ b
        if self._gain is not None and self._gain_size is not None:
            gain, gain_size = (
                self._as_kernel(np.broadcast_to(_columns(g[(*batch, *outputs)][None]), (len(a), b.shape[1])), shape)
                for g in (self._gain, self._gain_size)
            )
            delta = delta + gain * added_to
            size = (size + gain_size * np.abs(added_to)) * (1 + self._gain_error / (self._allowed_steps * _EPSILON))
            ideal_projection = basis.T @ self._as_matrix(delta)
        found, limit = self._exactness(m, added_to, delta, size, kernel.dtype)
        if found.non_finite:
            m = np.where(np.isfinite(m), m, added_to)
        realised = {
            dtype: _cast(m, self._dtype, dtype) - _cast(w, kernel.dtype, dtype)
            for dtype in dict.fromkeys((self._dtype, terms.serving_dtype))
        }
        found.moments = self._survival(w, delta, realised)
        layer, inner = self._layer_of(region), slice(self._first, None)
        return _Piece(
            layer=layer,
            batch=batch,
            base_differs=base is not None and not equals_rounded(kernel, base),
            found=found,
            projected=ProjectedPart(
                outputs,
                len(a),
                ideal_projection,
                {dtype.name: basis.T @ self._as_matrix(q) for dtype, q in realised.items()},
            ),
            forward=self._models[layer].take(
                region[inner],
                *(v.reshape(v.shape[inner]) for v in (added_to, m, realised[terms.serving_dtype], limit)),
            ),
        )

    def _exactness(
        self, m: Array, added_to: Array, delta: Array, size: Array, source: np.dtype[Any]
    ) -> tuple[LayerVerdict, Array]:
        """How far the entries are from the ideal, and how far they may be."""
        ideal = added_to + delta
        limit = np.abs(added_to)
        limit += size
        limit *= self._allowed_steps * _EPSILON
        limit += self._terms.ulps * ulp(ideal, self._dtype)
        limit += self._allowed_steps * _TINY
        error = np.abs(np.subtract(m, ideal, out=ideal), out=ideal)
        share = error / limit
        # Whatever is not below a finite bound is beyond it, NaN included.
        bad = ~((share <= 1.0) & np.isfinite(limit))
        found = LayerVerdict(beyond=int(np.count_nonzero(bad)))
        if found.beyond:
            found.non_finite = int(np.count_nonzero(~np.isfinite(m)))
            found.off_the_rounding = int(np.count_nonzero(bad & ~(error <= limit + 0.5 * ulp(added_to, source))))
        worst = float(share.max(initial=0.0))
        found.worst_share = worst if np.isfinite(limit).all() and math.isfinite(worst) else math.inf
        return found, limit

    def _survival(self, w: Array, delta: Array, realised: Mapping[np.dtype[Any], Array]) -> Moments:
        """The sums of a piece; those along the adapter's inputs are not over before all inputs are in."""
        moments = Moments(
            delta_sq=_sum_of_products(delta, delta),
            kernel_sq=_sum_of_products(w, w),
            max_abs=float(np.abs(delta).max(initial=0.0)),
            entries=delta.size,
        )
        if not math.isfinite(moments.kernel_sq):
            raise NonFiniteInput(
                "a kernel under an adapter is not finite",
                where=self._where,
                expected="finite values",
                found="NaN or Inf",
            )
        for dtype, q in realised.items():
            off = q - delta
            moments.realised[dtype.name] = Realised(
                q_dot_d=_sum_of_products(q, delta),
                error_sq=_sum_of_products(off, off),
                unchanged=int(q.size - np.count_nonzero(q)),
            )
        return moments

    def _add(self, piece: _Piece) -> None:
        self.base_differs = self.base_differs or piece.base_differs
        verdict = self.layers[piece.layer]
        verdict.moments.add(piece.found.moments)
        verdict.worst_share = max(verdict.worst_share, piece.found.worst_share)
        verdict.beyond += piece.found.beyond
        verdict.off_the_rounding += piece.found.off_the_rounding
        verdict.non_finite += piece.found.non_finite
        self._models[piece.layer].add(piece.forward)
        key = (piece.layer, *piece.batch)
        if key not in self._projections:
            self._projections[key] = Projection(self._a.shape[-1], self._inputs, self._outputs)
        if self._projections[key].add(piece.projected):
            for name, sums in self._projections.pop(key).sums():
                verdict.moments.realised[name].add(sums)

    def _as_kernel(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """A matrix of inputs by outputs in the kernel's own order of dims."""
        extents = dict(zip(self._equation.target, shape, strict=True))
        order = self._equation.batch + self._equation.inputs + self._equation.outputs
        return np.transpose(
            matrix.reshape([extents[dim] for dim in order]), [order.index(dim) for dim in self._equation.target]
        )

    def _as_matrix(self, kernel: Array) -> Array:
        order = self._equation.batch + self._equation.inputs + self._equation.outputs
        moved = np.transpose(kernel, [self._equation.target.index(dim) for dim in order])
        rows = math.prod(moved.shape[: len(self._equation.batch + self._equation.inputs)])
        return moved.reshape(rows, -1)


@dataclass(frozen=True)
class _Piece:
    """What was found of one piece."""

    layer: int
    batch: tuple[int, ...]
    """Its index in the batch dims."""
    base_differs: bool
    found: LayerVerdict
    projected: ProjectedPart
    forward: LayerPart


def _cast(values: Array, stored: np.dtype[Any], dtype: np.dtype[Any]) -> Array:
    """float64 values of a stored dtype, rounded to another one."""
    if holds_all_values_of(dtype, stored):
        return values
    with np.errstate(over="ignore"):
        return values.astype(stored).astype(dtype).astype(np.float64)


def _rows(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def _columns(values: Array) -> Array:
    return values.reshape(values.shape[0], -1)


def _sum_of_products(a: Array, b: Array) -> float:
    return float(np.einsum("i,i->", a.reshape(-1), b.reshape(-1)))
