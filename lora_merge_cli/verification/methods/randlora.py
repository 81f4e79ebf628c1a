"""RandLora: a sum of shared random products, each scaled by lambda and gamma (arXiv:2502.00987).

Source of the steps: huggingface/peft, ``src/peft/tuners/randlora/layer.py``, ``get_scaled_bases`` and ``Linear.forward``.
"""

from __future__ import annotations

from lora_merge_cli.records import Array
from lora_merge_cli.verification.methods.given import Factors, Given


def reduced(given: Given) -> Factors:
    """See `LowRankMethod.reduced`; the rank is that of the bases times their number.

    What is scaled is the basis of the shorter side: the inputs, if setting ``in_features`` is its extent. Its index runs over
    ranks, then bases, that of the other one over bases, then ranks: they are paired as PEFT pairs them, by position.
    """
    values = given.factors
    scaled = values["lambda"][:, :, None] * values["randlora_a"] * values["gamma"][None]
    short = scaled.reshape(-1, scaled.shape[-1])
    long = values["randlora_b"].reshape(len(values["randlora_b"]), -1)
    if short.shape[1] == given.settings["in_features"]:
        return {"lora_a": short, "lora_b": long}
    return {"lora_a": long.T, "lora_b": short.T}


def branch(given: Given, x: Array) -> Array:
    """See `LowRankMethod.branch`."""
    found = reduced(given)
    return (x @ found["lora_a"].T) @ found["lora_b"].T
