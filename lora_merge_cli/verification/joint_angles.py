"""What the methods that go by angles multiply fine-tunes by, from the inner products of whole leaves: Python and NumPy, float64."""

from __future__ import annotations

import itertools
import math

import numpy as np

from lora_merge_cli.joining.method import Joining
from lora_merge_cli.records import Array

_ROUNDS = 10_000
_STILL = 1e-15


def share_of_mean(inner: Array) -> float:
    """Model Stock's ``t`` (arXiv:2403.19522, equation 4), ``n cos / (1 + (n - 1) cos)`` with the mean cosine of all pairs.

    Args:
        inner: The inner products of all ``T_i - B``.

    Returns:
        0, the base, where the denominator is below 1e-6.
    """
    n = len(inner)
    pairs = list(itertools.combinations(range(n), 2))
    mean = math.fsum(_cosine(inner, i, k) for i, k in pairs) / len(pairs)
    below = 1 + (n - 1) * mean
    return n * mean / below if abs(below) >= 1e-6 else 0.0


def factors(inner: Array, joining: Joining) -> tuple[float, ...]:
    """What slerp, or the Karcher mean, multiplies each fine-tune by.

    Args:
        inner: The inner products of all fine-tunes.
        joining: The method and its weights.
    """
    return _slerp(inner, joining.effective) if joining.method == "slerp" else _karcher(inner, joining.effective)


def _slerp(inner: Array, weights: tuple[float, ...]) -> tuple[float, ...]:
    """Shoemake's arc at t, the second weight's share; a straight line for |cos| > 0.9995 and for a leaf of zeros."""
    t = weights[1] / math.fsum(weights)
    straight = 1 - t, t
    if inner[0, 0] == 0 or inner[1, 1] == 0:
        return straight
    cosine = _cosine(inner, 0, 1)
    if abs(cosine) > 0.9995:
        return straight
    angle = math.acos(cosine)
    return math.sin(straight[0] * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _karcher(inner: Array, weights: tuple[float, ...]) -> tuple[float, ...]:
    """The m that is its own weighted mean: ``m ~ sum of w_i * theta_i / sin(theta_i) * u_i`` of norm 1, times the mean norm.

    At such a point the logarithms ``theta / sin(theta) * (u - cos(theta) m)`` add up to a multiple of m, and being tangents, to 0.
    """
    shares = np.array(weights) / math.fsum(weights)
    norms = np.sqrt(np.diagonal(inner))
    known = [i for i in range(len(weights)) if norms[i] > 0 and shares[i] > 0]
    if not known:
        return tuple(shares.tolist())
    cosines = np.array([[_cosine(inner, i, k) if i != k else 1.0 for k in known] for i in known])
    part = shares[known] / math.fsum(shares[known])
    length = _norm(cosines, part)
    if length < 1e-6:
        return tuple(shares.tolist())
    mean = part / length
    for _ in range(_ROUNDS):
        angles = np.arccos(np.clip(cosines @ mean, -1, 1))
        # The sine is 0 at angle 0, where the ratio is 1, and at pi, where there is no direction to go.
        stretch = [_stretch(float(angle)) for angle in angles]
        following = part * np.array(stretch)
        following = following / _norm(cosines, following)
        moved = _norm(cosines, following - mean)
        mean = following
        if moved < _STILL:
            break
    result = np.zeros(len(weights))
    result[known] = math.fsum(shares * norms) * mean / norms[known]
    return tuple(result.tolist())


def _stretch(angle: float) -> float:
    if angle > math.pi - 1e-6:
        return 0.0
    return angle / math.sin(angle) if angle > 1e-8 else 1.0


def _norm(cosines: Array, combination: Array) -> float:
    """The length of a combination of directions."""
    return math.sqrt(max(0.0, float(combination @ cosines @ combination)))


def _cosine(inner: Array, i: int, k: int) -> float:
    """0 where one has no direction."""
    lengths = math.sqrt(inner[i, i]) * math.sqrt(inner[k, k])
    return max(-1.0, min(1.0, float(inner[i, k]) / lengths)) if lengths > 0 else 0.0
