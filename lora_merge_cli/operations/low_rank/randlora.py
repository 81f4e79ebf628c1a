"""RandLoRA: a sum of products of random factors, each scaled by trained vectors; together of full rank (arXiv:2502.00987).

With A (r, 1, min) and B (max, n, r) of which all layers take their parts, lambda (r, n) and gamma (n, min), n being the number of
bases, min the smaller and max the larger of inputs and outputs:

    left[(i, k), m] = lambda[i, k] * A[i, 0, m] * gamma[k, m]        right[x, (k, i)] = B[x, k, i]
    delta = right @ left where the inputs are the smaller side, or as many as the outputs; else its transpose

Left's joint index runs over the ranks first and right's over the bases first: what PEFT's forward computes pairs position with
position, although the paper pairs equal indices.
Source: huggingface/peft, ``src/peft/tuners/randlora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_merge_cli.operations.add_delta import AddDelta
from lora_merge_cli.records import AdapterSite, Array


class RandLora(AddDelta):
    """The additive operation on two matrices of rank ``r * n``.

    Roles: ``randlora_a``, ``randlora_b``, ``lambda`` and ``gamma``, the first two being the parts that the layer takes. Settings:
    ``in_features``, as their shapes do not say which side the inputs are.
    """

    name = "randlora"

    def reduce(self, site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:
        """See `LowRankOperation.reduce`: lora_a (r * n, inputs) and lora_b (outputs, r * n)."""
        smaller, larger = (factors[role].astype(np.float64) for role in ("randlora_a", "randlora_b"))
        ranks, bases = factors["lambda"].astype(np.float64), factors["gamma"].astype(np.float64)
        left = (ranks[:, :, None] * smaller * bases[None]).reshape(-1, smaller.shape[-1])
        right = larger.reshape(len(larger), -1)
        if left.shape[-1] == site.settings["in_features"]:
            return {"lora_a": left, "lora_b": right}
        return {"lora_a": right.T, "lora_b": left.T}
