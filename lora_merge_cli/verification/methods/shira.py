"""SHiRA: a few entries of the kernel are trained (arXiv:2406.13175).

Source of the steps: huggingface/peft, ``src/peft/tuners/shira/layer.py``, ``Linear.forward``. An entry that is named twice is added
to twice.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`."""
    found = kernel.copy()
    rows, columns = given.factors["indices"].astype(np.int64)
    np.add.at(found, (rows, columns), given.scale * given.factors["weight"])
    return found


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`: each trained entry takes one input to one output."""
    rows, columns = given.factors["indices"].astype(np.int64)
    y = x @ kernel.T
    np.add.at(y.T, rows, given.scale * (x[:, columns] * given.factors["weight"]).T)
    return y
