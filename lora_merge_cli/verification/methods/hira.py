"""HiRA: the kernel multiplied, entry by entry, by a low-rank matrix: ``W + scale * W * (B A)`` (ICLR 2025, openreview TwJrTz9cRS).

Source of the steps: huggingface/peft, ``src/peft/tuners/hira/layer.py``, ``Linear.forward``. W is the unmerged kernel.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`."""
    found = _product(given, kernel)
    found *= given.scale
    found += 1.0
    found *= kernel
    return found


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`."""
    return np.asarray(x @ kernel.T + given.scale * (x @ (kernel * _product(given, kernel)).T))


def _product(given: Given, kernel: Array) -> Array:
    """``B A``, with a convolution's kernel axes counted among the inputs."""
    a = given.factors["lora_a"].reshape(-1, kernel.shape[1])
    return np.asarray(given.factors["lora_b"].reshape(len(kernel), -1) @ a)
