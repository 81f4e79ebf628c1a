"""Slerp: from one fine-tune to another along an arc, leaf by leaf.

Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985), section 3.3:
``sin((1 - t) theta) / sin(theta) * T_1 + sin(t theta) / sin(theta) * T_2`` with theta the angle between the two. As in
mergekit 0.1.5 (``merge_methods/slerp.py``) the angle is that of the whole leaf, the weights themselves are turned and not what they
change of the base, and the coefficients are applied to the leaves as they are, of whatever norm. A leaf of zeros has no angle and
goes in a straight line; mergekit takes it for one at a right angle.
"""

from __future__ import annotations

import math

from lora_merge_cli.joining.model_stock import cosine
from lora_merge_cli.records import Array

_PARALLEL = 0.9995


def coefficients(gram: Array, weights: tuple[float, ...]) -> tuple[float, float]:
    """The factors of the two fine-tunes.

    ``1 - t`` and ``t``, a straight line, where the two are parallel or opposed (``|cos(theta)| > 0.9995``) or one is zero.

    Args:
        gram: The inner products of the two leaves, float64, 2 by 2.
        weights: Both 0 or more with a positive sum; ``t`` is the second one's share.
    """
    t = weights[1] / (weights[0] + weights[1])
    found = cosine(gram, 0, 1)
    if abs(found) > _PARALLEL or not (gram[0, 0] > 0 and gram[1, 1] > 0):
        return 1 - t, t
    theta = math.acos(found)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
