"""VeRA: random matrices that all layers share, with trained vectors between and after them (arXiv:2310.11454).

Source: huggingface/peft 0.21, ``src/peft/tuners/vera``.
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
from lora_merge_cli.dialects.peft.methods.stored import projections
from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.records import Factor


class Vera(Method):
    """VeRA. A layer takes the first inputs of the one shared matrix, and the first outputs of the other."""

    peft_types = ("VERA",)
    title = "VeRA"
    suffixes: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"}
    shared: ClassVar[Mapping[str, str]] = {"vera_A": "vera_a", "vera_B": "vera_b"}
    complete = (frozenset({"lambda_b", "lambda_d", "vera_a", "vera_b"}),)
    turnable = True
    rank = ("r", 256)
    biases = ("vera_only",)
    fields = frozenset({"save_projection"})
    harmless = frozenset({"projection_prng_key", "vera_dropout", "d_initial"})

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: nothing, but the projections must be stored."""
        return projections(fields, self.title)

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        sizes = (extent(layer.shape("lambda_b"), 0), None)
        return Outline(extent(layer.shape("lambda_d"), 0), no_scale(self.title), sizes)

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        rank = self.outline(layer).rank
        inputs = max(weight.inputs, extent(layer.shape("vera_a"), 1))
        outputs = max(weight.outputs, extent(layer.shape("vera_b"), 0))
        expected = {
            "lambda_b": (weight.outputs,),
            "lambda_d": (rank,),
            "vera_a": (rank, inputs),
            "vera_b": (outputs, rank),
        }
        problem = wrong_rank(layer, rank, where) or misfit(layer, weight, expected, where)
        if problem is not None:
            return problem
        factors = layer.factors()
        factors["vera_a"] = Factor(layer.tensors["vera_a"].path, at=(slice(0, rank), slice(0, weight.inputs)))
        factors["vera_b"] = Factor(layer.tensors["vera_b"].path, at=(slice(0, weight.outputs), slice(0, rank)))
        return Fit("vera", factors)
