"""MiSS in its mode bat: every r by r block of W is multiplied, and what multiplies it is added (arXiv:2409.15371).

``W_oi + W_oi B_o + B_o`` for blocks o of outputs and i of inputs. Source: huggingface/peft,
``src/peft/tuners/miss/layer.py``, ``MissLinear.get_delta_weight``, which its forward uses too.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`."""
    block = given.factors["block"]
    groups, r, _ = block.shape
    # All rows of a group of outputs, cut into runs of r inputs, meet the same block.
    change = (kernel.reshape(groups, -1, r) @ block).reshape(groups, r, -1, r)
    change += block[:, :, None, :]
    return np.asarray(kernel + given.scale * change.reshape(kernel.shape))


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`."""
    return x @ changed(given, kernel).T
