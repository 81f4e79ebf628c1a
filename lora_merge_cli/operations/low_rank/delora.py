"""DeLoRA: ``W + (B diag(lambda / (r |A_i| |B_i|)) A) diag(w_norm)``: rank by rank a bounded change (arXiv:2503.18225).

The norms of the unmerged kernel's columns, ``w_norm``, are those at the start of training, and stored.
Source: huggingface/peft, ``src/peft/tuners/delora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_merge_cli.equation import Equation
from lora_merge_cli.operations.add_delta import AddDelta
from lora_merge_cli.operations.low_rank.along import scaled_along
from lora_merge_cli.records import AdapterSite, Array

_SMALLEST_NORM = 1e-4
"""PEFT divides by no norm below this one."""


class DeLora(AddDelta):
    """The additive operation on normalised factors.

    Roles: ``lora_a`` and ``lora_b`` as the site's equation takes them, ``lambda`` (1,), ``w_norm`` (inputs,). The division by the
    rank is part of the site's scale.
    """

    name = "delora"

    def reduce(self, site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:
        """See `LowRankOperation.reduce`: ``lora_a`` takes the kernel's norms, ``lora_b`` lambda and the division by its own."""
        equation = site.parameters.equation
        a, b = factors["lora_a"], factors["lora_b"]
        norms = _norms(equation, equation.a, a) * _norms(equation, equation.b, b)
        strength = factors["lambda"].astype(np.float64).reshape(1) / norms
        return {
            "lora_a": scaled_along(a, equation.a, equation.inputs, factors["w_norm"]),
            "lora_b": scaled_along(b, equation.b, equation.rank, strength),
        }


def _norms(equation: Equation, dims: str, factor: Array) -> Array:
    """Per rank, over all other dims."""
    others = tuple(axis for axis, dim in enumerate(dims) if dim not in equation.rank)
    norms = np.sqrt(np.square(factor.astype(np.float64)).sum(axis=others))
    return np.asarray(np.maximum(norms, _SMALLEST_NORM))
