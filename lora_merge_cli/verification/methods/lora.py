"""LoRA and DoRA: ``W + scale * B A``, and with a magnitude m ``m / |W + scale * B A|`` times that (arXiv:2106.09685, 2402.09353).

Source of the steps: huggingface/peft, ``src/peft/tuners/lora/layer.py``, ``Linear.forward``, and ``lora/dora.py``.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.lowrank import factor_matrices
from lora_merge_cli.records import AdapterSite, Array
from lora_merge_cli.verification.methods.given import Given


def forward(site: AdapterSite, given: Given, kernel: Array, x: Array) -> Array:
    """What the model computes at a site without batch dims; see `RowMethod.forward`."""
    values = given.factors
    (a,), (b,) = factor_matrices(site.parameters.equation, values["lora_a"], values["lora_b"])
    y = x @ kernel.T + given.scale * ((x @ a) @ b)
    if "magnitude" not in values:
        return np.asarray(y)
    norms = np.linalg.norm(kernel.T + given.scale * (a @ b), axis=0)
    return np.asarray(y * (values["magnitude"].reshape(-1) / norms))
