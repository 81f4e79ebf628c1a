"""RandLora: a sum of random low-rank products, which all layers share, each weighted by trained vectors (arXiv:2502.00987).

Source: huggingface/peft 0.21, ``src/peft/tuners/randlora``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_merge_cli.dialects.peft.config import Fields
from lora_merge_cli.dialects.peft.methods.fitting import misfit, wrong_rank
from lora_merge_cli.dialects.peft.methods.interface import Adapted, Fit, Method, Outline, Weight, extent
from lora_merge_cli.dialects.peft.methods.stored import projections
from lora_merge_cli.dialects.peft.patterns import scale_of
from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.records import Factor


class RandLora(Method):
    """RandLora. As many bases as make a full rank of the smaller side; shared ones are cut to the layer. Scale ``alpha / r``."""

    peft_types = ("RANDLORA",)
    title = "RandLora"
    suffixes: ClassVar[Mapping[str, str]] = {"randlora_lambda": "lambda", "randlora_gamma": "gamma"}
    shared: ClassVar[Mapping[str, str]] = {"randlora_A": "randlora_a", "randlora_B": "randlora_b"}
    complete = (frozenset({"lambda", "gamma", "randlora_a", "randlora_b"}),)
    turnable = True
    rank = ("r", 32)
    alpha = ("randlora_alpha", 640.0)
    biases = ("randlora_only",)
    fields = frozenset({"save_projection"})
    harmless = frozenset({"projection_prng_key", "randlora_dropout", "sparse", "very_sparse"})

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: nothing, but the bases must be stored."""
        return projections(fields, self.title)

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        rank = extent(layer.shape("lambda"), 0)
        return Outline(rank, scale_of(layer.config.common, layer.module, max(1, rank)), (None, None))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        rank = self.outline(layer).rank
        smaller, larger = sorted((weight.outputs, weight.inputs))
        bases = -(-smaller // max(1, rank))
        a, b = layer.shape("randlora_a"), layer.shape("randlora_b")
        expected = {
            "lambda": (rank, bases),
            "gamma": (bases, smaller),
            "randlora_a": (rank, 1, max(smaller, extent(a, 2))),
            "randlora_b": (max(larger, extent(b, 0)), max(bases, extent(b, 1)), rank),
        }
        problem = wrong_rank(layer, rank, where) or misfit(layer, weight, expected, where)
        if problem is not None:
            return problem
        factors = layer.factors()
        every = slice(0, rank)
        factors["randlora_a"] = Factor(layer.tensors["randlora_a"].path, at=(every, slice(0, 1), slice(0, smaller)))
        factors["randlora_b"] = Factor(layer.tensors["randlora_b"].path, at=(slice(0, larger), slice(0, bases), every))
        settings = {"in_features": weight.inputs, "out_features": weight.outputs}
        return Fit("randlora", factors, settings, rank=rank * bases)
