"""LoHa: the entrywise product of two low-rank matrices (FedPara, arXiv:2108.06098).

``W + scale * (w1_a @ w1_b) * (w2_a @ w2_b)``; with t1 and t2, for convolutions, each factor is a Tucker product instead.
Source: huggingface/peft, ``src/peft/tuners/loha/layer.py``, ``HadaWeight`` and ``HadaWeightCP``.
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
    delta = _factor(given, "1")
    delta *= _factor(given, "2")
    delta *= given.scale
    return np.asarray(delta)


def _factor(given: Given, number: str) -> Array:
    """One of the two matrices, outputs by inputs; from a Tucker product it has the kernel's axes."""
    values = given.factors
    a, b = values[f"w{number}_a"], values[f"w{number}_b"]
    core = values.get(f"t{number}")
    return np.asarray(a @ b if core is None else np.einsum("ijkl,jr,ip->prkl", core, b, a, optimize=True))
