"""VeRA: shared random projections A and B, scaled per rank and per output (arXiv:2310.11454).

Source of the steps: huggingface/peft, ``src/peft/tuners/vera/layer.py``, ``Linear.forward``.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Factors, Given


def reduced(given: Given) -> Factors:
    """See `LowRankMethod.reduced`: ``diag(lambda_d) A`` and ``diag(lambda_b) B``."""
    values = given.factors
    return {
        "lora_a": values["lambda_d"][:, None] * values["vera_a"],
        "lora_b": values["lambda_b"][:, None] * values["vera_b"],
    }


def branch(given: Given, x: Array) -> Array:
    """See `LowRankMethod.branch`."""
    values = given.factors
    down = values["lambda_d"] * (x @ values["vera_a"].T)
    return np.asarray(values["lambda_b"] * (down @ values["vera_b"].T))
