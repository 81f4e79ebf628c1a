"""LoHa: an entrywise product of two low-rank matrices is added, ``W + scale * (A_1 B_1) * (A_2 B_2)`` (arXiv:2108.06098).

A convolution's matrices may be Tucker decompositions, ``einsum("ijkl,ip,jr->prkl", t, a, b)``: low-rank ones once t and b are
multiplied.
Source: huggingface/peft, ``src/peft/tuners/loha/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.operations.by_row.arithmetic import product, rounded, scale_of
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting


class Loha:
    """LoHa.

    Roles: ``w1_a`` and ``w2_a`` (outputs, r), ``w1_b`` and ``w2_b`` (r, inputs); of a Tucker decomposition, which has ``t1`` and
    ``t2`` (r, r, k1, k2) too, (r, outputs) and (r, input channels).
    """

    name = "loha"

    def operands(
        self,
        site: AdapterSite,
        factors: Mapping[str, Array],
        shape: tuple[int, int],  # noqa: ARG002  (others need it)
    ) -> RowOperands:
        """See `RowOperation.operands`."""
        left_1, right_1 = thin_factors(factors["w1_a"], factors["w1_b"], factors.get("t1"))
        left_2, right_2 = thin_factors(factors["w2_a"], factors["w2_b"], factors.get("t2"))
        what = "a factor of LoHa"
        return RowOperands(
            per_row={"left_1": rounded(site, left_1 * scale_of(site), what), "left_2": rounded(site, left_2, what)},
            shared={"right_1": rounded(site, right_1, what), "right_2": rounded(site, right_2, what)},
        )

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,  # noqa: ARG002
        per_row: Mapping[str, Any],
        shared: Mapping[str, Any],
        first: Any,  # noqa: ARG002
    ) -> Any:
        """See `RowOperation.change`."""
        one, two = (product("nr,ri->ni", per_row[f"left_{k}"], shared[f"right_{k}"]) for k in (1, 2))
        return one * two


def thin_factors(a: Array, b: Array, t: Array | None) -> tuple[Array, Array]:
    """Two factors (rows, r) and (r, columns) of a low-rank matrix; float64.

    Args:
        a: (rows, r); of a Tucker decomposition (r, rows).
        b: (r, columns); of a Tucker decomposition (r, channels), a column being a channel at one place of the kernel.
        t: (r, r, k1, k2) of a Tucker decomposition; else None.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    if t is None:
        return a, b
    core = np.tensordot(t.astype(np.float64), b, axes=(1, 0))
    return a.T, np.moveaxis(core, -1, 1).reshape(len(core), -1)
