"""Karcher mean: the point of a sphere with the least weighted sum of squared arcs to the fine-tunes' directions.

Karcher, "Riemannian center of mass and mollifier smoothing" (1977); for weights of models as in mergekit 0.1.5
(``merge_methods/karcher.py``, which names arXiv:2603.04972): with ``u_i = T_i / |T_i|`` over a whole leaf and weights that
sum to 1, find m with ``sum of w_i log_m(u_i) = 0``, ``log_m(u) = theta / sin(theta) * (u - cos(theta) m)``, and take
``(sum of w_i |T_i|) * m``.

All points stay in the span of the ``u_i``, so m is kept as its coefficients and every inner product follows from the Gram matrix:
no leaf is read for a step. mergekit stops after ten steps, or at a step of 1e-5, and takes a norm below 1e-5 for zero; here the
mean is found to what float64 can tell, and only zero is zero.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array

_STEPS = 200
_CONVERGED = 1e-8
_NO_DIRECTION = 1e-6


def coefficients(gram: Array, weights: tuple[float, ...]) -> tuple[float, ...]:
    """The factor of each fine-tune.

    A leaf of zeros has no direction: it counts in the mean norm alone. Where the directions cancel, so that none is the mean's, the
    weighted arithmetic mean is taken instead. A direction opposite to the mean pulls it nowhere.

    Args:
        gram: The inner products of all leaves, float64.
        weights: All 0 or more with a positive sum.
    """
    norms = np.sqrt(np.diag(gram))
    alphas = np.asarray(weights) / sum(weights)
    directed = np.flatnonzero((norms > 0) & (alphas > 0))
    if not len(directed):
        return tuple(map(float, alphas))
    units = gram[np.ix_(directed, directed)] / np.outer(norms[directed], norms[directed])
    shares = alphas[directed] / alphas[directed].sum()
    length = _length(units, shares)
    if length < _NO_DIRECTION:
        return tuple(map(float, alphas))
    mean = _mean(units, shares, shares / length)
    result = np.zeros(len(weights))
    result[directed] = float(alphas @ norms) * mean / norms[directed]
    return tuple(map(float, result))


def _mean(units: Array, shares: Array, mean: Array) -> Array:
    """The mean's coefficients, from those of a point to start at."""
    for _ in range(_STEPS):
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        sines = np.sin(angles)
        pulls = np.where(sines > _CONVERGED, angles / np.maximum(sines, _CONVERGED), 1.0)
        pulls[angles > np.pi - _NO_DIRECTION] = 0
        step = shares * pulls
        step = step - float(step @ cosines) * mean
        size = _length(units, step)
        if size < _CONVERGED:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / _length(units, mean)
    return mean


def _length(units: Array, vector: Array) -> float:
    return float(np.sqrt(max(0.0, float(vector @ units @ vector))))
