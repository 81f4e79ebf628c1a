"""IA3: a factor for each output, or for each input of a feed-forward layer (arXiv:2205.05638).

Source: huggingface/peft 0.21, ``src/peft/tuners/ia3``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lora_merge_cli.dialects.peft.config import Fields, compiles
from lora_merge_cli.dialects.peft.methods.fitting import misfit
from lora_merge_cli.dialects.peft.methods.interface import (
    Adapted,
    Fit,
    Method,
    Outline,
    Weight,
    extent,
    no_scale,
)
from lora_merge_cli.errors import LoraMergeError, ShapeMismatch
from lora_merge_cli.records import Factor


class Ia3(Method):
    """IA3. A linear layer's factors are (outputs, 1), those of a feed-forward one (1, inputs); a convolution's are alike.

    What is feed-forward the configuration says: a regular expression for whole names, or ends of names without regard to dots.
    """

    peft_types = ("IA3",)
    title = "IA3"
    suffixes: ClassVar[Mapping[str, str]] = {"ia3_l": "l"}
    complete = (frozenset({"l"}),)
    axes = frozenset({2, 4, 5})
    turnable = True
    fields = frozenset({"feedforward_modules"})
    harmless = frozenset({"init_ia3_weights"})

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: ``feedforward_modules``."""
        value = fields.raw.get("feedforward_modules")
        if isinstance(value, str) and compiles(value):
            return {"feedforward_modules": value}
        if isinstance(value, str):
            fields.malformed("feedforward_modules", "a simple regular expression")
            return {"feedforward_modules": ()}
        return {"feedforward_modules": fields.names("feedforward_modules")}

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        shape = layer.shape("l")
        entries = layer.tensors["l"].size
        by_name = _is_feedforward(layer)
        # (n, 1) and (1, n) say themselves which they are; a convolution's do not.
        inputs = by_name if len(shape) != 2 or shape == (1, 1) else shape[0] == 1
        return Outline(1, no_scale(self.title), (None, entries) if inputs else (entries, None))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        feedforward = self.outline(layer).sizes[0] is None
        if feedforward != _is_feedforward(layer):
            return ShapeMismatch(
                "factors of a feed-forward layer, or the configuration, are wrong about what the layer is",
                where=where,
                expected="factors (1, inputs) for feedforward_modules alone, (outputs, 1) for the others",
                found=layer.shape("l"),
            )
        if weight.kind == "convolution":
            entries = extent(weight.shape, 1 if feedforward else 0)
            expected: tuple[int, ...] = (1, entries, *(1 for _ in weight.kernel))
        else:
            entries = weight.inputs if feedforward else weight.outputs
            expected = (1, entries) if feedforward else (entries, 1)
        problem = misfit(layer, weight, {"l": expected}, where)
        if problem is not None:
            return problem
        factors = {"l": Factor(layer.tensors["l"].path, (entries,))}
        return Fit("ia3", factors, {"feedforward": feedforward}, scales_bias=not feedforward)


def _is_feedforward(layer: Adapted) -> bool:
    named = layer.config.own["feedforward_modules"]
    if isinstance(named, str):
        return re.fullmatch(named, layer.module) is not None
    return layer.module.endswith(tuple(named))
