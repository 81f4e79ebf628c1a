"""(IA)^3: activations, of the inputs or of the outputs, multiplied by a learned vector (arXiv:2205.05638).

Source of the steps: huggingface/peft, ``src/peft/tuners/ia3/layer.py``, ``Linear.forward``. What scales the outputs scales the bias
too: that is a kernel of one input here.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`."""
    if given.settings["feedforward"]:
        return np.asarray(kernel * _of_inputs(given, kernel))
    return np.asarray(kernel * given.factors["l"].reshape(-1, 1))


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`."""
    if given.settings["feedforward"]:
        return np.asarray((x * _of_inputs(given, kernel)) @ kernel.T)
    return np.asarray((x @ kernel.T) * given.factors["l"].reshape(-1))


def _of_inputs(given: Given, kernel: Array) -> Array:
    """One factor per input: a channel of a convolution is several, one for each place of its kernel."""
    vector = given.factors["l"].reshape(-1)
    return np.repeat(vector, kernel.shape[1] // vector.size)
