"""Model Stock: how far to go from the base to the mean of fine-tunes, from the angles between them.

Jang et al., arXiv:2403.19522, equation 4: with n fine-tunes and theta the angle between two of their task vectors,
``t = n cos(theta) / (1 + (n - 1) cos(theta))`` and ``W = t * mean(T) + (1 - t) * B``. The angle is taken over each whole leaf, and
the cosines of all pairs are averaged, as in mergekit 0.1.5 (``merge_methods/model_stock.py``, ``filter_wise: false``).
"""

from __future__ import annotations

import itertools

import numpy as np

from lora_merge_cli.records import Array

_SINGULAR = 1e-6


def share_of_mean(gram: Array) -> float:
    """``t``: 0 is the base, 1 the fine-tunes' mean. Negative where the task vectors point away from each other.

    A task vector of zero has cosine 0 with every other one. Where the denominator vanishes (below 1e-6) the formula has no value,
    and the base it is.

    Args:
        gram: The inner products of all task vectors ``T_i - B``, float64, at least 2 by 2.
    """
    count = len(gram)
    cosines = [cosine(gram, i, k) for i, k in itertools.combinations(range(count), 2)]
    mean = sum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * mean
    return 0.0 if abs(denominator) < _SINGULAR else count * mean / denominator


def cosine(gram: Array, i: int, k: int) -> float:
    """The cosine between two vectors, from their inner products; 0 if one is zero."""
    norms = float(np.sqrt(gram[i, i]) * np.sqrt(gram[k, k]))
    return min(1.0, max(-1.0, float(gram[i, k]) / norms)) if norms > 0 else 0.0
