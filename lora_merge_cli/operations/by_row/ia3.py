"""IA3: activations scaled, which scales the kernel's rows or, of a feed-forward layer, its columns (arXiv:2205.05638).

Source: huggingface/peft, ``src/peft/tuners/ia3/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_merge_cli.operations.by_row.arithmetic import rounded, scale_of
from lora_merge_cli.operations.interface import RowOperands
from lora_merge_cli.records import AdapterSite, Array, Setting


class Ia3:
    """IA3: ``(l - 1) * W`` is added.

    Roles: ``l``, with an entry per output; per input channel where the setting ``feedforward`` is true.
    """

    name = "ia3"

    def operands(self, site: AdapterSite, factors: Mapping[str, Array], shape: tuple[int, int]) -> RowOperands:
        """See `RowOperation.operands`."""
        gain = rounded(site, scale_of(site) * (factors["l"].astype(np.float64).reshape(-1) - 1.0), "IA3's scale")
        if not site.settings["feedforward"]:
            return RowOperands(per_row={"gain": gain})
        # A convolution's inputs are its channels, each with all of the kernel's places.
        return RowOperands(shared={"gain": np.repeat(gain, shape[1] // gain.size)})

    def change(
        self,
        settings: Mapping[str, Setting],
        kernel: Any,
        per_row: Mapping[str, Any],
        shared: Mapping[str, Any],
        first: Any,  # noqa: ARG002  (others need it)
    ) -> Any:
        """See `RowOperation.change`."""
        return kernel * (shared["gain"][None, :] if settings["feedforward"] else per_row["gain"][:, None])
