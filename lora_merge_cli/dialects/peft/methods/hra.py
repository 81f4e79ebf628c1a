"""HRA: the inputs reflected by a chain of Householder matrices (arXiv:2405.17484).

Source: huggingface/peft 0.21, ``src/peft/tuners/hra``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_merge_cli.dialects.peft.config import Fields
from lora_merge_cli.dialects.peft.methods.fitting import misfit, wrong_rank
from lora_merge_cli.dialects.peft.methods.interface import (
    Adapted,
    Fit,
    Method,
    Outline,
    Weight,
    extent,
    no_scale,
)
from lora_merge_cli.errors import LoraMergeError, UnsupportedCheckpoint


class Hra(Method):
    """HRA. ``apply_GS``: the vectors are made orthogonal first."""

    peft_types = ("HRA",)
    title = "HRA"
    suffixes: ClassVar[Mapping[str, str]] = {"hra_u": "u"}
    complete = (frozenset({"u"}),)
    axes = frozenset({2, 4})
    rank = ("r", 8)
    biases = ("hra_only",)
    fields = frozenset({"apply_GS"})

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: ``apply_GS``."""
        return {"apply_GS": fields.flag("apply_GS")}

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        shape = layer.shape("u")
        return Outline(extent(shape, 1), no_scale(self.title), (None, extent(shape, 0)))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        rank = self.outline(layer).rank
        problem = wrong_rank(layer, rank, where) or misfit(layer, weight, {"u": (weight.inputs, rank)}, where)
        if problem is None and len(set(weight.kernel)) > 1:
            return UnsupportedCheckpoint("HRA on a convolution whose kernel is not square", where=where)
        return problem or Fit("hra", layer.factors(), {"apply_GS": layer.config.own["apply_GS"]})
