"""BOFT with one butterfly factor: the inputs rotated block by block, and the outputs scaled (arXiv:2311.06243).

Source of the steps: huggingface/peft, ``src/peft/tuners/boft/layer.py``, ``Linear.forward``. A bias is not scaled.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given
from lora_merge_cli.verification.methods.rotation import cayley, kernel_of_rotated, rotated


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`."""
    return np.asarray(kernel_of_rotated(kernel, _rotations(given)) * given.factors["s"].reshape(-1, 1))


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`."""
    return np.asarray((rotated(x, _rotations(given)) @ kernel.T) * given.factors["s"].reshape(-1))


def _rotations(given: Given) -> Array:
    # More factors than one need the permutations of PEFT's CUDA kernel between them: no site has them.
    (entries,) = given.factors["r"]
    return cayley((entries - np.swapaxes(entries, -1, -2)) / 2)
