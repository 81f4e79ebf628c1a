"""HRA: the inputs reflected r times, ``W H`` with ``H = (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T)`` (arXiv:2405.17484).

With the u normalised and in the columns of U, ``I - H = U T U^T``, T upper triangular (compact WY; Schreiber and Van Loan,
SIAM J. Sci. Stat. Comput. 10, 1989). U = Q S makes it ``Q (S T S^T) Q^T``, whose middle is no larger than 2 however nearly parallel
the u are. With ``apply_GS`` the u are made orthonormal one after the other, and ``I - H = 2 Q Q^T``. The matrix of inputs by inputs
is never formed.
Source: huggingface/peft, ``src/peft/tuners/hra/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.operations.by_row.arithmetic import product, rounded, scale_of
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting

_NEGLIGIBLE = float(np.finfo(np.float32).eps)
"""What is left of a vector beside its own length that counts as nothing: PEFT computes in float32, and would use its rounding."""


class Hra:
    """HRA.

    Roles: ``u`` (inputs, r). Settings: ``apply_GS``.
    """

    name = "hra"

    def operands(
        self,
        site: AdapterSite,
        factors: Mapping[str, Array],
        shape: tuple[int, int],  # noqa: ARG002  (others need it)
    ) -> RowOperands:
        """See `RowOperation.operands`."""
        u = factors["u"].astype(np.float64)
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(u, axis=0)
        _refuse_nothing(site, "a vector to reflect at is zero or too long", (lengths > 0) & np.isfinite(lengths))
        basis, coordinates = np.linalg.qr(u / lengths)
        if site.settings["apply_GS"]:
            left = np.abs(np.diagonal(coordinates))
            # More vectors than inputs are never independent.
            independent = np.resize(left > _NEGLIGIBLE, u.shape[1]) & (u.shape[1] <= len(u))
            _refuse_nothing(site, "a vector to reflect at depends on those before it", independent)
            middle = 2 * np.eye(basis.shape[1])
        else:
            middle = coordinates @ _triangle(coordinates) @ coordinates.T
        down = rounded(site, basis, "HRA's basis")
        return RowOperands(
            shared={"down": down, "up": rounded(site, -scale_of(site) * middle @ basis.T, "HRA's basis")}
        )

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,
        per_row: Mapping[str, Any],  # noqa: ARG002
        shared: Mapping[str, Any],
        first: Any,  # noqa: ARG002
    ) -> Any:
        """See `RowOperation.change`: ``W (H - I)``, by way of the rank."""
        return product("nk,ki->ni", product("ni,ik->nk", kernel, shared["down"]), shared["up"])


def _triangle(vectors: Array) -> Array:
    """T of the product of reflections at some unit vectors, column by column."""
    count = vectors.shape[1]
    result = np.zeros((count, count))
    overlaps = vectors.T @ vectors
    for column in range(count):
        result[column, column] = 2.0
        result[:column, column] = -2.0 * result[:column, :column] @ overlaps[:column, column]
    return result


def _refuse_nothing(site: AdapterSite, what: str, fine: Array) -> None:
    if not fine.all():
        raise NonFiniteInput(
            f"{what}, and HRA divides by its length",
            where=site.name,
            found=f"{int(np.sum(~fine))} of {fine.size} vectors",
        )
