"""DeLoRA: ranks of unit norm, their strength bounded by lambda, scaled by the norms of W's columns (arXiv:2503.18225).

Source of the steps: huggingface/peft, ``src/peft/tuners/delora/layer.py``, ``DeloraLinear.forward``. The norms of W are those of
the base that the adapter was trained on: the file brings them.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Factors, Given

_SMALLEST_NORM = 1e-4
"""What PEFT divides by at least."""


def reduced(given: Given) -> Factors:
    """See `LowRankMethod.reduced`."""
    values = given.factors
    return {"lora_a": values["lora_a"] * values["w_norm"].reshape(-1), "lora_b": values["lora_b"] * _strengths(given)}


def branch(given: Given, x: Array) -> Array:
    """See `LowRankMethod.branch`."""
    values = given.factors
    down = (x * values["w_norm"].reshape(-1)) @ values["lora_a"].T
    return (down * _strengths(given)) @ values["lora_b"].T


def _strengths(given: Given) -> Array:
    """``lambda / (|A_i| |B_i|)`` for each rank i; the scale is the 1 / r."""
    a_norms, b_norms = (
        np.maximum(np.linalg.norm(given.factors[role], axis=axis), _SMALLEST_NORM)
        for role, axis in (("lora_a", 1), ("lora_b", 0))
    )
    return np.asarray(given.factors["lambda"].reshape(-1) / (a_norms * b_norms))
