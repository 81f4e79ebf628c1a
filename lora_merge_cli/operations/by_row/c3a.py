"""C3A: a matrix of circulant blocks is added, each b by b and made of b values (arXiv:2407.19342).

Row i and column j of block (m, n) of the change hold ``scale * K[m, n, (j - i) mod b]``.
Source: huggingface/peft, ``src/peft/tuners/c3a/utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.operations.by_row.arithmetic import rounded, scale_of
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting


class C3a:
    """C3A.

    Roles: ``kernel`` (outputs / b, inputs / b, b). The division by the inputs is part of the site's scale.
    """

    name = "c3a"

    def operands(
        self,
        site: AdapterSite,
        factors: Mapping[str, Array],
        shape: tuple[int, int],  # noqa: ARG002  (others need it)
    ) -> RowOperands:
        """See `RowOperation.operands`."""
        values = factors["kernel"].astype(np.float64) * scale_of(site)
        return RowOperands(shared={"values": rounded(site, values, "C3A's kernel")})

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,
        per_row: Mapping[str, Any],  # noqa: ARG002
        shared: Mapping[str, Any],
        first: Any,
    ) -> Any:
        """See `RowOperation.change`: no arithmetic, each value is taken to its places."""
        import jax.numpy as jnp

        size = shared["values"].shape[-1]
        rows = first + jnp.arange(len(kernel))
        shifted = (jnp.arange(size)[None, :] - rows[:, None]) % size
        taken = jnp.take_along_axis(shared["values"][rows // size], shifted[:, None, :], axis=2)
        return taken.reshape(kernel.shape)
