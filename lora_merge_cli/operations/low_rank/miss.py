"""MiSS: one small matrix D, added to every run of r columns of the kernel: ``W[o, i] + D[i mod r, o]`` (arXiv:2409.15371).

The sum over the runs is a product with an A of ones, ``A[k, i] = [i mod r = k]``. In the mode ``mini`` D has fewer columns than the
kernel has outputs, and is repeated. The mode ``bat``, which multiplies by the kernel, is `by_row.MissBat`.
Source: huggingface/peft, ``src/peft/tuners/miss/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.operations.add_delta import AddDelta
from lora_merge_cli.records import AdapterSite, Array


class Miss(AddDelta):
    """The additive operation with an A that is not stored.

    Roles: ``block`` (rank, outputs), in the mode ``mini`` (rank, mini_r). Settings: ``mode``, ``in_features`` and ``out_features``.
    """

    name = "miss"

    def reduce(self, site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:
        """See `LowRankOperation.reduce`: lora_a (rank, inputs), of zeros and ones, and lora_b (outputs, rank)."""
        block = factors["block"]
        if site.settings["mode"] == "mini":
            block = np.tile(block, (1, int(site.settings["out_features"]) // block.shape[1]))
        columns = np.arange(int(site.settings["in_features"])) % len(block)
        return {"lora_a": (columns == np.arange(len(block))[:, None]).astype(FLOAT32), "lora_b": block.T}
