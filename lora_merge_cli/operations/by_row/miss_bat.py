"""MiSS in its mode ``bat``: in r by r blocks, ``W_ou + W_ou B_o + B_o``, one B per row of blocks (arXiv:2409.15371).

Source: huggingface/peft, ``src/peft/tuners/miss/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.operations.by_row.arithmetic import product, rounded, scale_of
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting

_ENTRIES_AT_ONCE = 2**22


class MissBat:
    """MiSS, mode ``bat``.

    Roles: ``block`` (outputs / r, r, r).
    """

    name = "miss_bat"

    def operands(
        self,
        site: AdapterSite,
        factors: Mapping[str, Array],
        shape: tuple[int, int],  # noqa: ARG002  (others need it)
    ) -> RowOperands:
        """See `RowOperation.operands`."""
        blocks = factors["block"].astype(np.float64) * scale_of(site)
        return RowOperands(shared={"blocks": rounded(site, blocks, "MiSS's block")})

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,
        per_row: Mapping[str, Any],  # noqa: ARG002
        shared: Mapping[str, Any],
        first: Any,
    ) -> Any:
        """See `RowOperation.change`: row p of a row of blocks becomes ``W_p B + B_p``, run by run of r inputs."""
        import jax
        import jax.numpy as jnp

        blocks, size = shared["blocks"], shared["blocks"].shape[-1]

        def of_row(operands: Any) -> Any:
            row, number = operands
            block = blocks[number // size]
            return (product("uk,kq->uq", row.reshape(-1, size), block) + block[number % size]).reshape(-1)

        # Rows that are computed together each hold a copy of their block.
        at_once = max(1, min(len(kernel), _ENTRIES_AT_ONCE // size**2))
        return jax.lax.map(of_row, (kernel, first + jnp.arange(len(kernel))), batch_size=at_once)
