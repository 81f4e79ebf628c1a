"""SHiRA: some entries of the weight, trained by themselves (arXiv:2406.13175).

Source: huggingface/peft 0.21, ``src/peft/tuners/shira``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lora_merge_cli.dialects.peft.methods.fitting import contradiction, misfit
from lora_merge_cli.dialects.peft.methods.interface import (
    Adapted,
    Fit,
    Method,
    Outline,
    Weight,
    extent,
    no_scale,
)
from lora_merge_cli.dialects.peft.patterns import rank_of
from lora_merge_cli.errors import LoraMergeError


class Shira(Method):
    """SHiRA. The entries are stored, whatever mask chose them: as many as LoRA of that rank would train."""

    peft_types = ("SHIRA",)
    title = "SHiRA"
    suffixes: ClassVar[Mapping[str, str]] = {"shira_weight": "weight", "shira_indices": "indices"}
    complete = (frozenset({"weight", "indices"}),)
    integers = frozenset({"indices"})
    rank = ("r", 32)
    harmless = frozenset({"mask_type", "random_seed"})

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        return Outline(rank_of(layer.config.common, layer.module) or 1, no_scale(self.title), (None, None))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        entries, rank = extent(layer.shape("weight"), 0), self.outline(layer).rank
        expected = rank * (weight.outputs + weight.inputs)
        if entries != expected:
            return contradiction("number of entries", expected, entries, where)
        problem = misfit(layer, weight, {"weight": (entries,), "indices": (2, entries)}, where)
        return problem or Fit("shira", layer.factors())
