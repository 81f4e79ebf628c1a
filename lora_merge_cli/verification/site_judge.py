"""A merged kernel against its ideal, entry by entry: NumPy and float64 where the merge uses float32 on a device."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_merge_cli.combining import Combining
from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dtypes import holds_all_values_of, ulp
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.lowrank import acting, input_basis
from lora_merge_cli.records import Array, Region, relative
from lora_merge_cli.rounding import Rounding
from lora_merge_cli.side_by_side import pieces
from lora_merge_cli.survival import Moments, Realised
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.choices import Chosen, Results, Walk, compare
from lora_merge_cli.verification.mixture import count_other_bits
from lora_merge_cli.verification.model_layer import LayerAdapter, LayerError, LayerPart, ModelLayer
from lora_merge_cli.verification.projection import ProjectedPart, Projection
from lora_merge_cli.verification.series import Series

_EPSILON = 2.0**-24
_TINY = 2.0**-126
_ENTRIES = 2**19
"""Of a piece: long beside the cost of calling NumPy, which threads queue for at the interpreter's lock."""
_COLUMNS = 2048
_WALKED = 512
"""Columns where pieces of the same outputs come one after the other: there must be others to judge at the same time."""
_NEAREST = "to nearest"
_WIDE = np.dtype(np.float64)


@dataclass
class LayerVerdict:
    """What was found of one layer of a site."""

    moments: Moments = field(default_factory=Moments)
    """Survival of the delta, in the stored and in the serving dtype; of no entry at alpha 0."""
    worst_share: float = 0.0
    """The largest error of an entry as a share of its bound; Inf where an entry is not finite, or where bits must be the same and
    are not."""
    beyond: int = 0
    """How many entries exceed their bound."""
    off_the_rounding: int = 0
    """How many are further off than the rounding of the kernel in the checkpoint explains."""
    no_neighbours: int = 0
    """How many of those beyond are neither of the two values that their ideal lies between."""
    not_nearest: bool = False
    """Whether some entry, right or wrong, is not the nearer one of the two; always True where that was not looked at."""
    non_finite: int = 0
    """How many entries of the merged kernel are NaN or Inf, and should not be."""
    non_finite_before: int = 0
    """How many are NaN or Inf since the kernel, to which nothing is added, is so."""
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
    combining: Combining = field(default_factory=Combining)
    """How several adapters on one kernel become one change."""
    rounding: Rounding = field(default_factory=Rounding)
    """How results were asked to be rounded; which leaf gets it is said by the leaf."""


class SiteJudge:
    """Judges one site, block by block: in any order, but where it was rounded with ``preserve``.

    The ideal is ``ref = w + s * a @ b`` in float64, over all adapters (see `series.Series`), and an entry may be off by

        ulps * ulp(ref) + c * (2^-24 * (|w| + |s| * |a_i| * |b_j|) + 2^-126),   c = rank + heads + 4

    with ulp that of the stored dtype and ``|a_i|``, ``|b_j|`` the Euclidean norms over the ranks, ``|b|`` summed over the heads
    where the model sums them. Any sum of rank float32 products in any order is off by at most its steps times 2^-24 of the sum
    of the products' absolute values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), which the product of
    the norms bounds (Cauchy-Schwarz); 2^-126 is for devices that flush subnormal numbers to zero. With DoRA's gain g the ideal
    is ``g * (w + s * a @ b)``, and the relative error of a float32 norm over n inputs comes on top: ``(16 + sqrt(n)) * 2^-24``.

    Where it was not rounded to nearest, what counts is the value of the grid that a server makes of an entry. It is one of the two
    that ref lies between, and the right one, see `choices`; the file holds it, or what becomes of it. Then c multiplies what the
    delta is summed from alone, and 1 the rest, whose sum is rounded once. ``preserve`` has its ref from w also with a base.

    Alpha multiplies s, layer by layer. At alpha 0 nothing is computed: the layer must be w, cast, bit for bit, and has no figures.

    Args:
        where: The kernel in the checkpoint, as errors name it.
        adapted: The adapters on the kernel.
        shape: The kernel's shape.
        dtype: The merged kernel's dtype.
        terms: What else it may differ by.
        layers: The stacked layers to look at; ``(0,)`` where none are stacked.
        chosen: How its entries should have been chosen; None for to nearest.
    """

    def __init__(
        self,
        where: str,
        adapted: Sequence[Adapted],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        terms: Terms,
        layers: Sequence[int],
        chosen: Chosen | None = None,
    ) -> None:
        self._equation = equation = adapted[0].site.parameters.equation
        self._where, self._dtype, self._terms, self._chosen = where, dtype, terms, chosen
        batch = equation.batch
        series = Series.of(adapted)
        self._allowed_steps = series.steps + 4
        self._a, self._b = series.a, series.b
        if series.gain is None:
            self._a = acting(self._a, self._b, len(batch))
        self._a_norm = _norms(self._a, -1)
        self._b_norm = _norms(series.b_size, len(batch))
        self._gain, self._gain_size, self._gain_error = series.gain, series.gain_size, series.gain_error
        self._basis = input_basis(self._a, len(batch)).astype(np.float64)
        self._first = 1 if equation.stacked else 0
        self.layers = {layer: LayerVerdict() for layer in layers}
        self._acting = {layer for layer in layers if any(part.alpha_of(layer) for part in adapted)}
        rng = np.random.default_rng(0)
        self._models = {
            layer: ModelLayer(
                [LayerAdapter.of(part, layer if equation.stacked else None) for part in adapted],
                shape[self._first :],
                rng,
                adapted[0].alpha_of(layer),
            )
            for layer in layers
            if layer in self._acting
        }
        self._projections: dict[tuple[int, ...], Projection] = {}
        self._walks: dict[tuple[int, ...], Walk] = {}
        self._inputs = math.prod(self._a.shape[len(batch) : -1])
        self._outputs = self._b.shape[len(batch) + 1 :]
        directions = self._basis.reshape(-1, self._inputs, self._a.shape[-1]).any(axis=1)
        self._rank = int(np.count_nonzero(directions, axis=1).max(initial=0))
        dims = (equation.inputs, equation.outputs)
        self._inputs_first = equation.target[-1] not in equation.inputs
        self._order = batch + "".join(dims if self._inputs_first else reversed(dims))
        self._buffers = _Buffers()
        self.base_differs = False
        """Whether some block of the kernel is not the base's, rounded to the kernel's dtype."""

    def take(
        self,
        region: Region,
        kernel: Array,
        merged: Array,
        base: Array | None,
        pool: ThreadPoolExecutor,
        size: Array | None = None,
    ) -> None:
        """Judge one block.

        Args:
            region: Where it lies in the leaf.
            kernel: The checkpoint's kernel there.
            merged: The merged kernel there.
            base: The base's kernel there, which the delta was added to instead; None without a base.
            pool: Where to compute.
            size: The magnitudes of what the kernel is itself a float32 sum of, float64; None where it is exact.
        """
        chosen = self._chosen
        bits = None if chosen is None or chosen.preserves else chosen.bits(region)

        def judge(piece: Region) -> _Piece:
            inside = relative(piece, region)
            # Values beyond any range are found, and judged, by what they are not.
            with np.errstate(all="ignore"):
                if self._layer_of(piece) not in self._acting:
                    return self._compare(piece, kernel[inside], merged[inside])
                beside = (None if values is None else values[inside] for values in (base, size, bits))
                return self._judge(piece, kernel[inside], merged[inside], *beside)

        def judge_in_turn(chain: Sequence[Region]) -> list[_Piece]:
            return [judge(piece) for piece in chain]

        with np.errstate(all="ignore"):
            for found in pool.map(judge_in_turn, self._chains(region)):
                for piece in found:
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

    def _chains(self, region: Region) -> Iterator[Sequence[Region]]:
        """Pieces that must be judged one after the other."""
        if self._chosen is None or not self._chosen.preserves:
            yield from ([piece] for piece in self._pieces(region))
            return
        chains: dict[tuple[Any, ...], list[Region]] = {}
        for piece in self._pieces(region):
            batch, _, outputs = self._parts(piece)
            key = (self._layer_of(piece), *batch)
            if key[0] in self._acting and key not in self._walks:
                self._walks[key] = Walk(self._chosen, _rows(self._basis[batch]), _rows(self._a[batch]), self._outputs)
            chains.setdefault((batch, *((part.start, part.stop) for part in outputs)), []).append(piece)
        yield from chains.values()

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
                walks = self._chosen is not None and self._chosen.preserves
                yield from pieces(block, _ENTRIES, _WALKED if walks else _COLUMNS)

    def _parts(self, region: Region) -> tuple[tuple[Any, ...], Region, Region]:
        """A piece's index in the batch dims, its inputs and its outputs."""
        parts = dict(zip(self._equation.target, region, strict=True))
        return (
            tuple(parts[dim].start for dim in self._equation.batch),
            tuple(parts[dim] for dim in self._equation.inputs),
            tuple(parts[dim] for dim in self._equation.outputs),
        )

    def _first_of(self, inputs: Region) -> int:
        """Which of all inputs the first of a piece is; they lie one behind the other."""
        extents = self._a.shape[len(self._equation.batch) : -1]
        first, last = (
            int(np.ravel_multi_index(at, extents))
            for at in ([part.start for part in inputs], [part.stop - 1 for part in inputs])
        )
        if last - first != math.prod(part.stop - part.start for part in inputs) - 1:
            raise RuntimeError("a walk along the inputs is judged in its order")
        return first

    def _layer_of(self, region: Region) -> int:
        return int(region[0].start) if self._first else 0

    def _compare(self, region: Region, kernel: Array, merged: Array) -> _Piece:
        """A piece that nothing is added to."""
        wrong = count_other_bits(merged, kernel.astype(self._dtype))
        bad, before = ~np.isfinite(merged), ~np.isfinite(kernel)
        found = LayerVerdict(
            worst_share=math.inf if wrong else 0.0,
            beyond=wrong,
            off_the_rounding=wrong,
            no_neighbours=wrong,
            not_nearest=bool(wrong),
            non_finite=int(np.count_nonzero(bad & ~before)),
            non_finite_before=int(np.count_nonzero(bad & before)),
        )
        return _Piece(self._layer_of(region), (), found)

    def _judge(
        self,
        region: Region,
        kernel: Array,
        merged: Array,
        base: Array | None,
        sizes: Array | None,
        bits: Array | None,
    ) -> _Piece:
        serving = self._terms.serving_dtype
        batch, inputs, outputs = self._parts(region)
        a, basis = (_rows(values[(*batch, *inputs)]) for values in (self._a, self._basis))
        b = _columns(self._b[(*batch, slice(None), *outputs)])

        chosen = self._chosen
        w = self._wide("kernel", kernel)
        added_to = w if base is None else self._wide("base", base)
        # What the fine-tune ran on is what is to be preserved, also where another base is what it is added to.
        aim = w if chosen is not None and chosen.preserves else added_to
        m = self._wide("merged", merged)
        delta, size = (self._buffers.of(name, kernel.size) for name in ("delta", "size"))
        matrix = functools.partial(self._as_matrix, inputs=len(a))
        np.matmul(a, b, out=matrix(delta))
        a_norm, b_norm = self._a_norm[(*batch, *inputs)].reshape(-1), self._b_norm[(*batch, *outputs)].reshape(-1)
        # A rank-two product adds the last term of the bound too, in one pass.
        tiny = np.full_like(b_norm, _TINY / _EPSILON)
        np.matmul(np.stack([a_norm, np.ones_like(a_norm)], 1), np.stack([b_norm, tiny]), out=matrix(size))
        gain, loose = None, np.zeros_like(b_norm)
        if self._gain is None or self._gain_size is None:
            ideal_projection = (basis.T @ a) @ b
        else:
            gain, gain_size = (values[(*batch, *outputs)].reshape(-1) for values in (self._gain, self._gain_size))
            matrix(delta)[...] += gain * matrix(added_to)
            matrix(size)[...] += gain_size * np.abs(matrix(added_to))
            if chosen is None:
                size *= 1 + self._gain_error / (self._allowed_steps * _EPSILON)
            loose = 2 * self._gain_error * gain_size
            ideal_projection = basis.T @ matrix(delta)
        if sizes is not None:
            size += self._wide("sizes", sizes)
        error: Array | None = None
        if chosen is None:
            found, error, limit = self._exactness(m, added_to, delta, size, kernel.dtype)
        else:
            drawn = None if bits is None else self._wide("bits", bits)
            place = _Place((self._layer_of(region), *batch), inputs, outputs, len(a))
            change = _Change(delta, size, gain, loose)
            found, limit = self._right_choice(chosen, place, m, added_to, aim, change, drawn, kernel.dtype)
        # Where nothing is cast and there is no base, the error of the merged kernel is that of its realised delta.
        exactly = error is not None and not found.non_finite
        plain = exactly and base is None and holds_all_values_of(self._dtype, kernel.dtype)
        if found.non_finite:
            np.copyto(m, added_to, where=~np.isfinite(m))
        realised = {dtype: self._realised(m, w, kernel.dtype, dtype) for dtype in dict.fromkeys((self._dtype, serving))}
        measured = self._survival(w, delta, realised, error if plain else None)
        measured.moved, found.moments = found.moments.moved, measured
        projected = {dtype.name: basis.T @ matrix(q) for dtype, q in realised.items()}
        if chosen is not None:
            to_nearest = chosen.served(added_to + delta, _WIDE) - _cast(
                w, kernel.dtype, chosen.grid, out=np.empty_like(w)
            )
            measured.nearest = sums_of(to_nearest, delta, to_nearest - delta)
            projected[_NEAREST] = basis.T @ matrix(to_nearest)
        layer, inner = self._layer_of(region), slice(self._first, None)
        return _Piece(
            layer=layer,
            batch=batch,
            found=found,
            base_differs=base is not None and not equals_rounded(kernel, base),
            projected=ProjectedPart(outputs, len(a), ideal_projection, projected),
            forward=self._models[layer].take(
                region[inner],
                *(self._as_kernel(values, kernel.shape)[(0,) * self._first] for values in (aim, m, limit)),
                served=None
                if plain and serving == self._dtype
                else self._as_kernel(realised[serving], kernel.shape)[(0,) * self._first],
            ),
        )

    def _exactness(
        self, m: Array, added_to: Array, delta: Array, size: Array, source: np.dtype[Any]
    ) -> tuple[LayerVerdict, Array, Array]:
        """How far the entries are from the ideal, with the errors, and, in the place of `size`, how far they may be."""
        ideal, spare = (self._buffers.of(name, m.size) for name in ("error", "spare"))
        np.add(added_to, delta, out=ideal)
        limit = size
        limit += np.abs(added_to, out=spare)
        limit *= self._allowed_steps * _EPSILON
        limit += np.multiply(ulp(ideal, self._dtype, out=spare), self._terms.ulps, out=spare)
        error = np.subtract(m, ideal, out=ideal)
        share = np.divide(error, limit, out=spare)
        worst = float(np.maximum(share.max(initial=0.0), -share.min(initial=0.0)))
        if worst <= 1.0 and math.isfinite(limit.max(initial=0.0)):
            return LayerVerdict(worst_share=worst), error, limit
        # Whatever is not below a finite bound is beyond it, NaN included.
        bad = ~((np.abs(share) <= 1.0) & np.isfinite(limit))
        found = LayerVerdict(
            worst_share=worst if np.isfinite(limit).all() and math.isfinite(worst) else math.inf,
            beyond=int(np.count_nonzero(bad)),
            off_the_rounding=int(np.count_nonzero(bad & ~(np.abs(error) <= limit + 0.5 * ulp(added_to, source)))),
            no_neighbours=int(np.count_nonzero(bad & ~(np.abs(error) <= limit + 0.5 * ulp(m - error, self._dtype)))),
            not_nearest=True,
            non_finite=int(np.count_nonzero(~np.isfinite(m))),
        )
        return found, error, limit

    def _right_choice(
        self,
        chosen: Chosen,
        place: _Place,
        m: Array,
        added_to: Array,
        aim: Array,
        change: _Change,
        bits: Array | None,
        source: np.dtype[Any],
    ) -> tuple[LayerVerdict, Array]:
        """Whether the entries are the neighbours that they should be, and how far they may be from what was aimed at."""
        matrix = functools.partial(self._as_matrix, inputs=place.height)
        exact = ideal = added_to + change.delta
        if aim is not added_to:
            ideal = exact.copy()
            matrix(ideal)[...] += (1.0 if change.gain is None else 1.0 + change.gain) * matrix(aim - added_to)
        slack = change.size
        slack *= self._allowed_steps
        slack += np.abs(ideal) if ideal is exact else np.maximum(np.abs(ideal), np.abs(exact))
        slack *= _EPSILON
        spread = slack
        if change.gain is not None:
            spread = slack.copy()
            matrix(spread)[...] += change.loose * np.abs(matrix(ideal))
        compared = compare(chosen, self._dtype, m, exact, ideal, spread, bits)
        shares, off, step = compared.shares, np.abs(compared.error), compared.step
        if chosen.preserves:
            along = Results(matrix(ideal), matrix(compared.error), matrix(step), matrix(slack), change.loose)
            self._walks[place.key].judge(self._first_of(place.inputs), place.outputs, along, matrix(shares))
        bad = ~((shares <= 1.0) & np.isfinite(compared.limit))
        worst = float(shares.max(initial=0.0))
        found = LayerVerdict(
            moments=Moments(moved=compared.moved),
            worst_share=worst if np.isfinite(compared.limit).all() and math.isfinite(worst) else math.inf,
            # Any piece that says so will do.
            not_nearest=self.layers[place.key[0]].not_nearest or not (off <= 0.5 * step + spread).all(),
        )
        if bad.any():
            found.beyond = int(np.count_nonzero(bad))
            found.off_the_rounding = int(np.count_nonzero(bad & ~(off <= step + 0.5 * ulp(aim, source) + spread)))
            found.no_neighbours = int(np.count_nonzero(bad & ~(off <= step + spread)))
            found.non_finite = int(np.count_nonzero(~np.isfinite(off)))
        return found, compared.limit

    def _realised(self, m: Array, w: Array, source: np.dtype[Any], dtype: np.dtype[Any]) -> Array:
        """The difference of merged kernel and kernel once both are cast to a dtype."""
        q = self._buffers.of(f"realised {dtype.name}", m.size)
        spare = self._buffers.of("spare", m.size)
        return np.subtract(_cast(m, self._dtype, dtype, out=q), _cast(w, source, dtype, out=spare), out=q)

    def _survival(
        self, w: Array, delta: Array, realised: Mapping[np.dtype[Any], Array], error: Array | None
    ) -> Moments:
        """The sums of a piece; those along the adapter's inputs are not over before all inputs are in.

        Args:
            w: The kernel in the checkpoint.
            delta: The ideal delta.
            realised: The realised one, by dtype.
            error: The difference of the two in the stored dtype, where it is known.
        """
        moments = Moments(
            delta_sq=float(np.dot(delta, delta)),
            kernel_sq=float(np.dot(w, w)),
            max_abs=max(float(delta.max(initial=0.0)), -float(delta.min(initial=0.0))),
            entries=delta.size,
        )
        if not math.isfinite(moments.kernel_sq):
            raise NonFiniteInput(
                "a kernel under an adapter is not finite",
                where=self._where,
                expected="finite values",
                found="NaN or Inf",
            )
        spare = self._buffers.of("spare", w.size)
        for dtype, q in realised.items():
            off = error if error is not None and dtype == self._dtype else np.subtract(q, delta, out=spare)
            moments.realised[dtype.name] = sums_of(q, delta, off)
        return moments

    def _add(self, piece: _Piece) -> None:
        self.base_differs = self.base_differs or piece.base_differs
        verdict = self.layers[piece.layer]
        verdict.moments.add(piece.found.moments)
        verdict.worst_share = max(verdict.worst_share, piece.found.worst_share)
        verdict.beyond += piece.found.beyond
        verdict.off_the_rounding += piece.found.off_the_rounding
        verdict.no_neighbours += piece.found.no_neighbours
        verdict.not_nearest = verdict.not_nearest or piece.found.not_nearest
        verdict.non_finite += piece.found.non_finite
        verdict.non_finite_before += piece.found.non_finite_before
        if piece.forward is None or piece.projected is None:
            return
        self._models[piece.layer].add(piece.forward)
        key = (piece.layer, *piece.batch)
        if key not in self._projections:
            self._projections[key] = Projection(self._a.shape[-1], self._inputs, self._outputs)
        if self._projections[key].add(piece.projected):
            self._walks.pop(key, None)
            verdict.moments.add(Moments(rank=self._rank, inputs=self._inputs))
            for name, sums in self._projections.pop(key).sums():
                nearest = verdict.moments.nearest
                (verdict.moments.realised[name] if name != _NEAREST or nearest is None else nearest).add(sums)

    def _wide(self, name: str, kernel: Array) -> Array:
        """A piece of a kernel in float64, one entry after the other in the order of `_order`."""
        ordered = np.transpose(kernel, [self._equation.target.index(dim) for dim in self._order])
        values = self._buffers.of(name, kernel.size)
        np.copyto(values.reshape(ordered.shape), ordered, casting="unsafe")
        return values

    def _as_kernel(self, values: Array, shape: tuple[int, ...]) -> Array:
        """A view of a piece's entries in the kernel's own order of dims."""
        target = self._equation.target
        ordered = values.reshape([shape[target.index(dim)] for dim in self._order])
        return np.transpose(ordered, [self._order.index(dim) for dim in target])

    def _as_matrix(self, values: Array, inputs: int) -> Array:
        """A view of a piece's entries as inputs by outputs."""
        return values.reshape(inputs, -1) if self._inputs_first else values.reshape(-1, inputs).T


class _Buffers(threading.local):
    """Arrays that a thread uses for one piece after another: the pages of fresh ones cost more than the sums in them."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def of(self, name: str, entries: int) -> Array:
        """So many float64 entries, of whatever values."""
        if name not in self._arrays or self._arrays[name].size < entries:
            self._arrays[name] = np.empty(entries)
        return self._arrays[name][:entries]


@dataclass(frozen=True)
class _Place:
    """Where a piece lies."""

    key: tuple[int, ...]
    """Its layer, and its index in the batch dims."""
    inputs: Region
    outputs: Region
    height: int
    """How many inputs it has."""


@dataclass(frozen=True)
class _Change:
    """What adapters make of a piece."""

    delta: Array
    """What is added, in the order of its entries."""
    size: Array
    """The size of what that is summed from."""
    gain: Array | None
    """What the kernel is multiplied by besides 1, per output; in `delta` already."""
    loose: Array
    """How far a gain may be off, per output."""


@dataclass(frozen=True)
class _Piece:
    """What was found of one piece."""

    layer: int
    batch: tuple[int, ...]
    """Its index in the batch dims."""
    found: LayerVerdict
    base_differs: bool = False
    projected: ProjectedPart | None = None
    """None where nothing is added."""
    forward: LayerPart | None = None
    """None where nothing is added."""


def sums_of(q: Array, delta: Array, off: Array) -> Realised:
    """Those of a realised delta against the ideal one, but along the adapter's inputs."""
    return Realised(
        q_dot_d=float(np.vdot(q, delta)),
        error_sq=float(np.vdot(off, off)),
        unchanged=int(np.count_nonzero(q == 0.0)),
    )


def _cast(values: Array, stored: np.dtype[Any], dtype: np.dtype[Any], *, out: Array) -> Array:
    """float64 values of a stored dtype, rounded to another one: in `out`, or themselves where nothing is rounded."""
    if holds_all_values_of(dtype, stored):
        return values
    np.copyto(out, values.astype(dtype), casting="unsafe")
    return out


def _norms(values: Array, axis: int) -> Array:
    """Euclidean norms along an axis, of values whose squares may be beyond the range of float64."""
    largest = np.abs(values).max(axis=axis, keepdims=True, initial=0.0)
    unit = np.where(largest > 0, largest, 1.0)
    with np.errstate(all="ignore"):
        return np.asarray((unit * np.sqrt(np.square(values / unit).sum(axis=axis, keepdims=True))).squeeze(axis))


def _rows(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1])


def _columns(values: Array) -> Array:
    return values.reshape(values.shape[0], -1)
