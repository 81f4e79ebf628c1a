"""LoKr: a Kronecker product is added, ``W + scale * kron(W_1, W_2)``, either factor perhaps low-rank (arXiv:2309.14859).

W_1 is (a, b) and W_2 (c, d), with a convolution's kernel axes behind: row ``i * c + k`` of the product holds, for each j, row k of
W_2 times ``W_1[i, j]``.

Of a one-dimensional convolution whose W_2 is stored whole, (c, d, x), PEFT lines up the axes of the two from the last one, W_1's
with d and x, and reshapes what comes of that to the kernel. Forward pass and merge do the same, so this does too.
Source: huggingface/peft, ``src/peft/tuners/lokr/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.operations.by_row.arithmetic import product, rounded, scale_of
from lora_merge_cli.operations.by_row.loha import thin_factors
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting


class Lokr:
    """LoKr.

    Roles: ``w1``, or ``w1_a`` (a, r) and ``w1_b`` (r, b); ``w2``, or ``w2_a`` (c, r) and ``w2_b`` (r, d), with ``t2`` as of `Loha`.
    """

    name = "lokr"

    def operands(
        self,
        site: AdapterSite,
        factors: Mapping[str, Array],
        shape: tuple[int, int],  # noqa: ARG002  (others need it)
    ) -> RowOperands:
        """See `RowOperation.operands`."""
        if "w1" in factors:
            w1 = factors["w1"].astype(np.float64)
        else:
            w1 = factors["w1_a"].astype(np.float64) @ factors["w1_b"].astype(np.float64)
        what = "a factor of LoKr"
        shared = {"w1": rounded(site, w1 * scale_of(site), what)}
        if "w2" in factors:
            w2 = factors["w2"].astype(np.float64)
            # The one of a 1-d convolution keeps its axes, which `change` tells it by.
            shared["w2"] = rounded(site, w2 if w2.ndim == 3 else w2.reshape(len(w2), -1), what)
        else:
            left, right = thin_factors(factors["w2_a"], factors["w2_b"], factors.get("t2"))
            shared |= {"w2_left": rounded(site, left, what), "w2_right": rounded(site, right, what)}
        return RowOperands(shared=shared)

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,
        per_row: Mapping[str, Any],  # noqa: ARG002
        shared: Mapping[str, Any],
        first: Any,
    ) -> Any:
        """See `RowOperation.change`."""
        import jax.numpy as jnp

        w1, w2, rows = shared["w1"], shared.get("w2"), first + jnp.arange(len(kernel))
        if w2 is not None and w2.ndim == 3:
            of_w1, of_w2 = w1[rows % len(w1)], w2[rows // len(w1)]
            return (of_w1[:, None, :, None] * of_w2[:, :, None, :]).reshape(kernel.shape)
        height = len(shared["w2_left"] if w2 is None else w2)
        of_w1 = w1[rows // height]
        if w2 is None:
            of_w2 = product("nr,rd->nd", shared["w2_left"][rows % height], shared["w2_right"])
        else:
            of_w2 = w2[rows % height]
        return (of_w1[:, :, None] * of_w2[:, None, :]).reshape(kernel.shape)
