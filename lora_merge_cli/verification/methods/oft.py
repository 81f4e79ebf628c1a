"""OFT: the inputs rotated block by block by Cayley transforms of learned skew-symmetric matrices (arXiv:2306.07280).

Source of the steps: huggingface/peft, ``src/peft/tuners/oft/layer.py``, ``OFTRotationModule.forward``. Its series of the Cayley
transform (arXiv:2506.19847) is that of ``(I + Q) (I - Q)^-1``, the inverse of what it computes without the series.
"""

from __future__ import annotations

import math

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given
from lora_merge_cli.verification.methods.rotation import cayley, kernel_of_rotated, rotated


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`."""
    return kernel_of_rotated(kernel, _rotations(given))


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`."""
    return rotated(x, _rotations(given)) @ kernel.T


def _rotations(given: Given) -> Array:
    """R of each stored block; with ``block_share`` there is one."""
    entries = given.factors["r"]
    size = (1 + math.isqrt(1 + 8 * entries.shape[1])) // 2
    skew = np.zeros((len(entries), size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = entries
    skew[:, columns, rows] = -entries
    if given.settings["coft"]:
        skew = _constrained(skew, float(given.settings["eps"]))
    if given.settings["use_cayley_neumann"]:
        return _series(skew, int(given.settings["num_cayley_neumann_terms"]))
    return cayley(skew)


def _constrained(skew: Array, eps: float) -> Array:
    """COFT: matrices of a Frobenius norm of at most ``eps / sqrt(blocks)``."""
    norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
    bound = eps / math.sqrt(len(skew))
    return np.asarray(skew * np.divide(bound, norms, out=np.ones_like(norms), where=norms > bound))


def _series(skew: Array, terms: int) -> Array:
    """``I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)``, the last power once; 3 terms are 4, and with 2 the last power counts twice."""
    identity = np.eye(skew.shape[-1])
    if terms < 2:
        return np.broadcast_to(identity, skew.shape)
    if terms == 2:
        return identity + 2.0 * skew
    # Horner's scheme, from the last power down.
    total = 2.0 * identity + skew
    for _ in range(max(3, terms - 1) - 2):
        total = 2.0 * identity + skew @ total
    return np.asarray(identity + skew @ total)
