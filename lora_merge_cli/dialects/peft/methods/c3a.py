"""C3A: blocks that are circulant matrices, each from one vector (arXiv:2407.19342).

Source: huggingface/peft 0.21, ``src/peft/tuners/c3a``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lora_merge_cli.dialects.peft.config import Fields
from lora_merge_cli.dialects.peft.methods.fitting import contradiction, misfit
from lora_merge_cli.dialects.peft.methods.interface import Adapted, Fit, Method, Outline, Weight, extent
from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.records import Scale

_DEFAULT_BLOCK = 256


class C3a(Method):
    """C3A. The scale is one over the inputs. ``block_size_pattern`` is compared as PEFT does: a dot must stand before what fits."""

    peft_types = ("C3A",)
    title = "C3A"
    suffixes: ClassVar[Mapping[str, str]] = {"c3a_kernel": "kernel"}
    complete = (frozenset({"kernel"}),)
    biases = ("c3a_only",)
    fields = frozenset({"block_size", "block_size_pattern"})

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: the size of a block, and what overrides it."""
        pattern = fields.pattern("block_size_pattern", whole=True)
        return {"block_size": fields.whole("block_size", _DEFAULT_BLOCK), "block_size_pattern": pattern}

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        shape = layer.shape("kernel")
        block = extent(shape, 2)
        inputs = extent(shape, 1) * block
        return Outline(block, Scale(1 / max(1, inputs), f"1 / inputs {inputs}"), (extent(shape, 0) * block, inputs))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        block = self.outline(layer).rank
        stated = _stated(layer)
        if block != stated:
            return contradiction("block size", stated, block, where)
        expected = (weight.outputs // block, weight.inputs // block, block)
        problem = misfit(layer, weight, {"kernel": expected}, where)
        if problem is None and (weight.outputs % block or weight.inputs % block):
            problem = contradiction(
                "block size", "that divides outputs and inputs", f"{block} of {weight.shape}", where
            )
        return problem or Fit("c3a", layer.factors())


def _stated(layer: Adapted) -> int:
    patterns: Mapping[str, float] = layer.config.own["block_size_pattern"]
    if layer.module in patterns:
        return int(patterns[layer.module])
    key = next((key for key in patterns if re.match(rf".*\.{key}$", layer.module)), None)
    return int(layer.config.own["block_size"] if key is None else patterns[key])
