"""LN tuning: normalisation layers, or others, trained whole (arXiv:2312.11420).

Source: huggingface/peft 0.21, ``src/peft/tuners/ln_tuning``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lora_merge_cli.dialects.peft.methods.interface import Adapted, Fit, Method, Outline, Weight, no_scale
from lora_merge_cli.errors import LoraMergeError, UnsupportedCheckpoint


class LnTuning(Method):
    """LN tuning. The file holds the new values themselves; the modules have no factors, so nothing asks for their fit."""

    peft_types = ("LN_TUNING",)
    title = "LN tuning"
    suffixes: ClassVar[Mapping[str, str]] = {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"}
    complete = ()
    replaces = True

    def outline(self, layer: Adapted) -> Outline:  # noqa: ARG002 - there are no factors
        """See `Method.outline`."""
        return Outline(1, no_scale(self.title), (None, None))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:  # noqa: ARG002
        """See `Method.fit`."""
        return UnsupportedCheckpoint("LN tuning has no factors", where=where)
