"""A merged kernel against its ideal where some adapter is no low-rank product: held whole, NumPy and float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dtypes import ulp
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.records import AdapterSite, Array, full_region
from lora_merge_cli.survival import Moments
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.choices import Chosen, compare, is_kept
from lora_merge_cli.verification.methods import changed, forward
from lora_merge_cli.verification.mixture import count_other_bits
from lora_merge_cli.verification.model_layer import INPUTS, LayerError
from lora_merge_cli.verification.site_judge import LayerVerdict, Terms, sums_of

_EPSILON = 2.0**-24
_WIDE = np.dtype(np.float64)


@dataclass(frozen=True)
class ByRow:
    """One site whose change of an output depends on that output's row of the kernel."""

    site: AdapterSite
    """The site."""
    factors: Mapping[str, Array]
    """Its factors by role, float64 but for positions."""
    weight: float
    """What its change is multiplied by: the adapter's weight, times the whole merge's multiplier."""


class RowJudge:
    """Judges one kernel.

    The ideal is ``X + sum of weight * (changed_k(W) - W)``, X being what the low-rank adapters make of W in their order, see
    `series.Series`. An entry may be off by

        ulps * ulp(ref) + c * 2^-24 * m,   c = 64 + sqrt(inputs) + ranks

    with m the largest magnitude in the entry's row of W, of the ideal and of what low-rank products are sums of: the roundings of
    float32 sums over inputs, which are as large as their terms. Of entries that were rounded at random, see `choices`.

    Args:
        where: The kernel in the checkpoint, as errors name it.
        parts: The adapters on the kernel, in their order, at alpha 1; low-rank ones are taken first.
        dtype: The merged kernel's dtype.
        terms: What else it may differ by.
        alpha: How much of the change to take.
        chosen: How its entries should have been chosen; None for to nearest.
    """

    def __init__(
        self,
        where: str,
        parts: Sequence[ByRow | Adapted],
        dtype: np.dtype[Any],
        terms: Terms,
        alpha: float,
        chosen: Chosen | None = None,
    ) -> None:
        self._chosen = chosen
        self._where, self._dtype, self._terms, self._alpha = where, dtype, terms, alpha
        self._parts = sorted(parts, key=lambda part: isinstance(part, ByRow))
        self._equation = parts[0].site.parameters.equation

    def judge(self, kernel: Array, merged: Array, anchor: Array | None) -> LayerVerdict:
        """Judge the whole kernel.

        Args:
            kernel: What the adapters change, as stored.
            merged: The result.
            anchor: What an interpolation starts from instead, as stored; None for `kernel`.
        """
        start = kernel if anchor is None else anchor
        if self._alpha == 0:
            wrong = count_other_bits(merged, start.astype(self._dtype))
            return LayerVerdict(
                worst_share=math.inf if wrong else 0.0,
                beyond=wrong,
                off_the_rounding=wrong,
                no_neighbours=wrong,
                not_nearest=bool(wrong),
            )
        w, m, s = (as_matrix(self._equation, values) for values in (kernel, merged, start))
        if not np.isfinite(w).all():
            raise NonFiniteInput("a kernel under an adapter is not finite", where=self._where, expected="finite values")
        with np.errstate(all="ignore"):
            return self._verdict(w, m, s, start.dtype)

    def _verdict(self, w: Array, m: Array, start: Array, source: np.dtype[Any]) -> LayerVerdict:
        ideal, size = w, np.abs(w).max(axis=1, keepdims=True, initial=0.0)
        ranks = 0
        for part in self._parts:
            ideal = self._after(part, ideal, w)
            size = np.maximum(size, np.abs(ideal).max(axis=1, keepdims=True, initial=0.0))
            if isinstance(part, Adapted):
                ranks += part.steps
                largest = np.abs(part.left().reshape(-1, part.rank)).max(axis=0)
                size = size + part.right(magnitudes=True).reshape(part.rank, -1).T @ largest[:, None]
        delta = self._alpha * (ideal - start)
        ideal = start + delta
        allowed = (64 + math.sqrt(w.shape[1]) + ranks) * _EPSILON
        limit = allowed * size + self._terms.ulps * ulp(ideal, self._dtype)
        error, step, moved = m - ideal, ulp(ideal, self._dtype), 0
        share = np.where(error == 0, 0.0, np.abs(error) / limit)
        if self._chosen is not None:
            slack = np.broadcast_to(allowed * size, ideal.shape)
            bits = as_matrix(self._equation, self._chosen.bits(full_region(self._chosen.shape)))
            found = compare(self._chosen, self._dtype, m, ideal, ideal, slack, bits)
            still = (np.abs(delta) <= slack) & is_kept(self._chosen, self._dtype, m, start, source)
            share, error, step = np.where(still, 0.0, found.shares), found.error, found.step
            limit, moved = found.limit, found.moved
        bad = ~((share <= 1.0) & np.isfinite(limit))
        off = np.abs(error)
        moments = self._moments(m, start, delta, source)
        moments.moved = moved
        return LayerVerdict(
            moments=moments,
            worst_share=float(share.max(initial=0.0)) if np.isfinite(share).all() else math.inf,
            beyond=int(np.count_nonzero(bad)),
            off_the_rounding=int(np.count_nonzero(bad & ~(off <= limit + 0.5 * ulp(start, source)))),
            no_neighbours=int(np.count_nonzero(bad & ~(off <= step + allowed * size))),
            not_nearest=not (off <= 0.5 * step + allowed * size).all(),
            non_finite=int(np.count_nonzero(~np.isfinite(m))),
            forward=self._forward(w, m, start, limit, source),
        )

    def _after(self, part: ByRow | Adapted, kernel: Array, unmerged: Array) -> Array:
        if isinstance(part, ByRow):
            return np.asarray(kernel + part.weight * (changed(part.site, part.factors, unmerged) - unmerged))
        product = (part.left().reshape(-1, part.rank) @ part.right().reshape(part.rank, -1)).T
        extra = part.rescaling
        return np.asarray(kernel + product + (0.0 if extra is None else extra.reshape(-1, 1) * kernel))

    def _moments(self, m: Array, start: Array, delta: Array, source: np.dtype[Any]) -> Moments:
        moments = Moments(
            delta_sq=float(np.sum(np.square(delta))),
            kernel_sq=float(np.sum(np.square(start))),
            max_abs=float(np.abs(delta).max(initial=0.0)),
            entries=delta.size,
        )
        for dtype in dict.fromkeys((self._dtype, self._terms.serving_dtype)):
            q = self._cast(m, self._dtype, dtype) - self._cast(start, source, dtype)
            moments.realised[dtype.name] = sums_of(q, delta, q - delta)
        if self._chosen is not None:
            to_nearest = self._chosen.served(start + delta, _WIDE) - self._cast(start, source, self._chosen.grid)
            moments.nearest = sums_of(to_nearest, delta, to_nearest - delta)
        return moments

    def _cast(self, values: Array, stored: np.dtype[Any], dtype: np.dtype[Any]) -> Array:
        return np.asarray(values.astype(stored).astype(dtype).astype(np.float64))

    def _forward(self, w: Array, m: Array, start: Array, limit: Array, source: np.dtype[Any]) -> LayerError:
        """What the layer computes, for a few random inputs of norm 1."""
        x = np.random.default_rng(0).standard_normal((INPUTS, w.shape[1]))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        plain = x @ w.T
        output = plain
        for part in self._parts:
            if isinstance(part, ByRow):
                output = output + part.weight * (forward(part.site, part.factors, w, x) - plain)
                continue
            low_rank = (x @ part.left().reshape(-1, part.rank)) @ part.right().reshape(part.rank, -1)
            extra = part.rescaling
            output = output + low_rank + (0.0 if extra is None else extra.reshape(1, -1) * output)
        before = x @ start.T
        change = self._alpha * (output - before)
        error = x @ m.T - (before + change)
        share = np.where(error == 0, 0.0, np.abs(error) / (np.abs(x) @ limit.T))
        dtype = self._terms.serving_dtype
        served = x @ (self._cast(m, self._dtype, dtype) - self._cast(start, source, dtype)).T
        return LayerError(
            _relative(error, change),
            float(share.max(initial=0.0)) if np.isfinite(share).all() else math.inf,
            _relative(served - change, change),
        )


def as_matrix(equation: Equation, values: Array) -> Array:
    """A kernel as outputs by inputs, float64."""
    outputs = [equation.target.index(dim) for dim in equation.outputs]
    inputs = [equation.target.index(dim) for dim in equation.inputs]
    moved = np.transpose(values, [*outputs, *inputs])
    return moved.reshape(math.prod(moved.shape[: len(outputs)]), -1).astype(np.float64)


def _relative(error: Array, change: Array) -> float | None:
    """The root mean square over inputs of the error's norm, relative to that of what the adapters change."""
    wanted = np.square(change).sum(axis=1)
    if not np.all(wanted > 0):
        return None
    ratio = float(np.sqrt(np.mean(np.square(error).sum(axis=1) / wanted)))
    return ratio if math.isfinite(ratio) else math.inf
