"""AdaLoRA: ``W + scale * B (A * E)``, E a singular value for each rank (arXiv:2303.10512).

Source of the steps: huggingface/peft, ``src/peft/tuners/adalora/layer.py``, ``SVDLinear.forward``.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Factors, Given


def reduced(given: Given) -> Factors:
    """See `LowRankMethod.reduced`; a convolution's ``lora_a`` keeps the kernel's axes."""
    values = given.factors
    a = values["lora_a"]
    return {"lora_a": a * values["lora_e"].reshape(-1, *[1] * (a.ndim - 1)), "lora_b": values["lora_b"]}


def branch(given: Given, x: Array) -> Array:
    """See `LowRankMethod.branch`."""
    values = given.factors
    down = (x @ values["lora_a"].reshape(len(values["lora_a"]), -1).T) * values["lora_e"].reshape(-1)
    return np.asarray(down @ values["lora_b"].T)
