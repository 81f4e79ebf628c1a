"""SHiRA: some entries of the kernel have values added (arXiv:2406.13175).

Source: huggingface/peft, ``src/peft/tuners/shira/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.errors import ShapeMismatch
from lora_merge_cli.operations.by_row.arithmetic import rounded, scale_of
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting

_AT_ONCE = 1024
"""How many values are put in their places at a time."""


class Shira:
    """SHiRA.

    Roles: ``weight`` (n,) and ``indices`` (2, n): rows and columns within the kernel. Values with one place are added up.
    """

    name = "shira"

    def operands(self, site: AdapterSite, factors: Mapping[str, Array], shape: tuple[int, int]) -> RowOperands:
        """See `RowOperation.operands`: the places from the first row to the last, behind them some of no row.

        Raises:
            NonFiniteInput: A sum of values is not finite.
            ShapeMismatch: A place lies outside the kernel.
        """
        rows, columns = factors["indices"].astype(np.int64)
        outside = (rows < 0) | (rows >= shape[0]) | (columns < 0) | (columns >= shape[1])
        if outside.any():
            raise ShapeMismatch(
                "SHiRA's indices point outside the kernel",
                where=site.name,
                expected=f"rows below {shape[0]} and columns below {shape[1]}",
                found=f"{int(np.sum(outside))} of {rows.size} outside",
                hint="see that the base is the one that the adapter was trained on",
            )
        places, entry = np.unique(rows * shape[1] + columns, return_inverse=True)
        values = np.bincount(entry.reshape(-1), factors["weight"].astype(np.float64), len(places)) * scale_of(site)
        behind = (0, _AT_ONCE - len(places) % _AT_ONCE)
        return RowOperands(
            shared={
                "rows": np.pad((places // shape[1]).astype(np.int32), behind, constant_values=np.iinfo(np.int32).max),
                "columns": np.pad((places % shape[1]).astype(np.int32), behind),
                "values": np.pad(rounded(site, values, "a value of SHiRA"), behind),
            }
        )

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,
        per_row: Mapping[str, Any],  # noqa: ARG002
        shared: Mapping[str, Any],
        first: Any,
    ) -> Any:
        """See `RowOperation.change`: places are sorted, so that few are looked at that are no places of these rows."""
        import jax
        import jax.numpy as jnp

        height = len(kernel)
        start, stop = jnp.searchsorted(shared["rows"], jnp.stack([first, first + height]))

        def put(number: Any, changed: Any) -> Any:
            rows, columns, values = (
                jax.lax.dynamic_slice_in_dim(shared[name], number * _AT_ONCE, _AT_ONCE)
                for name in ("rows", "columns", "values")
            )
            rows = rows - first
            # A negative index would count from the end.
            rows = jnp.where(rows < 0, height, rows)
            return changed.at[rows, columns].add(values, mode="drop")

        return jax.lax.fori_loop(start // _AT_ONCE, -(-stop // _AT_ONCE), put, jnp.zeros_like(kernel))
