"""LoKr: a Kronecker product, either side of which may be of low rank (LyCORIS, arXiv:2309.14859).

``W + scale * kron(w1, w2)``, reshaped to W's shape. Source: huggingface/peft, ``src/peft/tuners/lokr/layer.py``,
``get_delta_weight`` and ``make_kron``. A ``w2`` with one kernel axis is not aligned with ``w1`` there: their axes are matched from
the last one, and the product, whose entries are in another order than W's, is reshaped all the same. The model computes with that,
so it is right here.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Given


def changed(given: Given, kernel: Array) -> Array:
    """See `RowMethod.changed`."""
    return np.asarray(kernel + _delta(given).reshape(kernel.shape))


def forward(given: Given, kernel: Array, x: Array) -> Array:
    """See `RowMethod.forward`."""
    return np.asarray(x @ kernel.T + x @ _delta(given).reshape(kernel.shape).T)


def _delta(given: Given) -> Array:
    values = given.factors
    left = values["w1"] if "w1" in values else values["w1_a"] @ values["w1_b"]
    if "w2" in values:
        right = values["w2"]
    elif "t2" in values:
        right = np.einsum("ijkl,ip,jr->prkl", values["t2"], values["w2_a"], values["w2_b"], optimize=True)
    else:
        right = values["w2_a"] @ values["w2_b"]
    if right.ndim == 4:
        left = left[:, :, None, None]
    return np.kron(given.scale * left, right)
