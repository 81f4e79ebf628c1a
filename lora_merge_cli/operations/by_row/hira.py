"""HiRA: the kernel times a low-rank matrix, entry by entry, is added: ``W + scale * W * (B A)`` (ICLR 2025).

W is the kernel before any adapter.
Source: huggingface/peft, ``src/peft/tuners/hira/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.operations.by_row.arithmetic import product, rounded, scale_of
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting


class Hira:
    """HiRA.

    Roles: ``lora_a`` (r, inputs) and ``lora_b`` (outputs, r); those of a convolution may have its axes behind.
    """

    name = "hira"

    def operands(self, site: AdapterSite, factors: Mapping[str, Array], shape: tuple[int, int]) -> RowOperands:
        """See `RowOperation.operands`."""
        outputs, inputs = shape
        a, b = factors["lora_a"].astype(np.float64), factors["lora_b"].astype(np.float64)
        what = "a factor of HiRA"
        return RowOperands(
            per_row={"lora_b": rounded(site, b.reshape(outputs, -1) * scale_of(site), what)},
            shared={"lora_a": rounded(site, a.reshape(-1, inputs), what)},
        )

    def change(
        self,
        settings: Mapping[str, Setting],  # noqa: ARG002  (others need them)
        kernel: Any,
        per_row: Mapping[str, Any],
        shared: Mapping[str, Any],
        first: Any,  # noqa: ARG002
    ) -> Any:
        """See `RowOperation.change`."""
        return kernel * product("nr,ri->ni", per_row["lora_b"], shared["lora_a"])
