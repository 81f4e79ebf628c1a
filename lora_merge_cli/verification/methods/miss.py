"""MiSS, formerly Bone: one row of r numbers per output, repeated along the inputs (arXiv:2409.15371).

Source of the steps: huggingface/peft, ``src/peft/tuners/miss/layer.py``, ``MissLinear.forward``.
"""

from __future__ import annotations

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Factors, Given


def reduced(given: Given) -> Factors:
    """See `LowRankMethod.reduced`: input i belongs to rank ``i mod r``, of as many as setting ``in_features`` says."""
    block = _block(given)
    r, inputs = len(block), int(given.settings["in_features"])
    return {"lora_a": np.tile(np.eye(r), (1, -(-inputs // r)))[:, :inputs], "lora_b": block.T}


def branch(given: Given, x: Array) -> Array:
    """See `LowRankMethod.branch`: the inputs, padded with zeros, are cut into runs of r and added up."""
    block = _block(given)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % len(block))))
    return np.asarray(padded.reshape(len(x), -1, len(block)).sum(axis=1) @ block)


def _block(given: Given) -> Array:
    """The block for all outputs, r by outputs: in mode mini its columns are repeated along setting ``out_features``."""
    block = given.factors["block"]
    if given.settings["mode"] != "mini":
        return block
    return np.tile(block, (1, int(given.settings["out_features"]) // block.shape[1]))
