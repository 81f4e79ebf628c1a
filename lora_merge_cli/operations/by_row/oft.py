"""OFT: the inputs rotated block by block, ``W R^T`` with R block-diagonal (arXiv:2306.07280).

R is made of skew-symmetric matrices Q: by Cayley's transform ``(I - Q) (I + Q)^-1``, or by the first terms of a Neumann series of
its inverse, ``I + 2 Q + 2 Q^2 + ... + Q^(n - 1)``, in which Q turns the other way. COFT first shortens Q to a given norm.
Source: huggingface/peft, ``src/peft/tuners/oft/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.operations.by_row.arithmetic import rounded, scale_of
from lora_merge_cli.operations.by_row.rotations import cayley, change_of_rotation, skew_from_upper
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting


class Oft:
    """OFT and COFT.

    Roles: ``r`` (blocks, b (b - 1) / 2), what is above the diagonals of Q; one block where all share it. Settings:
    ``use_cayley_neumann``, ``num_cayley_neumann_terms``, ``coft``, ``eps``.
    """

    name = "oft"

    def operands(
        self,
        site: AdapterSite,
        factors: Mapping[str, Array],
        shape: tuple[int, int],  # noqa: ARG002  (others need it)
    ) -> RowOperands:
        """See `RowOperation.operands`."""
        upper = factors["r"].astype(np.float64)
        skew = skew_from_upper(upper, (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2)
        if site.settings["coft"]:
            skew = _shortened(skew, float(site.settings["eps"]))
        if site.settings["use_cayley_neumann"]:
            with np.errstate(over="ignore", invalid="ignore"):
                less_one = _neumann(skew, int(site.settings["num_cayley_neumann_terms"]))
        else:
            less_one = cayley(site, skew)
        return RowOperands(shared={"less_one": rounded(site, scale_of(site) * less_one, "OFT's rotation")})

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,
        per_row: Mapping[str, Any],  # noqa: ARG002
        shared: Mapping[str, Any],
        first: Any,  # noqa: ARG002
    ) -> Any:
        """See `RowOperation.change`: ``W (R - I)^T``."""
        return change_of_rotation(kernel, shared["less_one"])


def _shortened(skew: Array, eps: float) -> Array:
    """Each matrix, at most ``eps / sqrt(blocks)`` long in the Frobenius norm."""
    limit = eps / math.sqrt(len(skew))
    norms = np.sqrt(np.square(skew).sum(axis=(1, 2), keepdims=True))
    return np.asarray(skew * (limit / np.maximum(norms, limit) if limit > 0 else 0.0))


def _neumann(skew: Array, terms: int) -> Array:
    """``2 Q + 2 Q^2 + ... + 2 Q^(n - 2) + Q^(n - 1)``; PEFT's loop makes four terms of three, and gives the last of two the 2."""
    if terms <= 1:
        return np.zeros_like(skew)
    if terms == 2:
        return np.asarray(2 * skew)
    power = skew @ skew
    result = 2 * skew + 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        result += 2 * power
    return np.asarray(result + power @ skew)
