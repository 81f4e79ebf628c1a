"""HRA: the inputs reflected at r learned hyperplanes, one after another (arXiv:2405.17484).

``W H`` with ``H = prod_j (I - 2 u_j u_j^T)``, j ascending and u_j of unit norm; with ``apply_GS`` the u_j are made orthonormal.
Source: huggingface/peft, ``src/peft/tuners/hra/layer.py``, ``HRALinear.get_delta_weight``, which its forward uses too.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`."""
    found = kernel.copy()
    for direction in _directions(given):
        _reflect(found, direction)
    return found


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`: ``x (W H)^T = (x H^T) W^T``, so that the inputs meet the last reflection first."""
    found = x.copy()
    for direction in reversed(_directions(given)):
        _reflect(found, direction)
    return found @ kernel.T


def _directions(given: Given) -> list[Array]:
    vectors = given.factors["u"]
    if given.settings["apply_GS"]:
        # Up to signs, which no reflection sees, QR is the Gram-Schmidt process.
        return list(np.linalg.qr(vectors)[0].T)
    return list((vectors / np.linalg.norm(vectors, axis=0)).T)


def _reflect(rows: Array, direction: Array) -> None:
    """Reflect each row at the hyperplane that is orthogonal to a direction."""
    rows -= np.outer(rows @ direction, 2.0 * direction)
