"""MiSS, once Bone: one small matrix, repeated along the inputs (arXiv:2409.15371).

Source: huggingface/peft 0.21, ``src/peft/tuners/miss``; Bone, ``scripts/convert-bone-to-miss.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_merge_cli.dialects.peft.config import Fields
from lora_merge_cli.dialects.peft.methods.fitting import contradiction, misfit, wrong_rank
from lora_merge_cli.dialects.peft.methods.interface import (
    Adapted,
    Fit,
    Method,
    Outline,
    Sizes,
    Weight,
    extent,
    no_scale,
)
from lora_merge_cli.errors import LoraMergeError, UnsupportedCheckpoint


class Miss(Method):
    """MiSS and Bone. ``init_weights`` says which of three: the plain one, ``mini``, or ``bat``, which multiplies the weight too."""

    peft_types = ("MISS", "BONE")
    title = "MiSS"
    suffixes: ClassVar[Mapping[str, str]] = {"miss_block": "block", "bone_block": "block"}
    complete = (frozenset({"block"}),)
    rank = ("r", 64)
    biases = ("miss_only", "MiSS_only", "bone_only")
    fields = frozenset({"init_weights", "mini_r"})
    harmless = frozenset({"miss_dropout"})

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: the mode, and the extent that ``mini`` repeats along the outputs."""
        mode = fields.raw.get("init_weights")
        if isinstance(mode, str) and mode not in ("bat", "mini"):
            fields.malformed("init_weights", "true, false, 'bat' or 'mini'")
        return {"mode": mode if mode in ("bat", "mini") else "default", "mini_r": fields.whole("mini_r", 1)}

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        shape, mode = layer.shape("block"), layer.config.own["mode"]
        sizes: Sizes = (None, None)
        rank = extent(shape, -1 if mode == "bat" else 0)
        if mode == "bat":
            sizes = (extent(shape, 0) * rank, None)
        elif mode == "default":
            sizes = (extent(shape, 1), None)
        return Outline(rank, no_scale(self.title), sizes)

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        rank, mode, mini = self.outline(layer).rank, layer.config.own["mode"], layer.config.own["mini_r"]
        outputs, inputs = weight.outputs, weight.inputs
        if mode == "mini" and extent(layer.shape("block"), 1) != mini:
            return contradiction("mini_r", mini, extent(layer.shape("block"), 1), where)
        expected = {
            "default": (rank, outputs),
            "mini": (rank, mini),
            "bat": (outputs // max(1, rank), rank, rank),
        }[mode]
        problem = wrong_rank(layer, rank, where) or misfit(layer, weight, {"block": expected}, where)
        if problem is not None:
            return problem
        uneven = {
            "default": rank > inputs,
            "mini": rank > inputs or outputs % mini,
            "bat": outputs % rank or inputs % rank,
        }
        if uneven[mode]:
            return UnsupportedCheckpoint(
                "MiSS whose block does not go into the weight",
                where=where,
                expected="a block of at most the inputs, and one that divides what it is repeated along",
                found=f"{mode}, {layer.shape('block')} and a weight {weight.shape}",
            )
        if mode == "bat":
            return Fit("miss_bat", layer.factors())
        return Fit("miss", layer.factors(), {"mode": mode, "in_features": inputs, "out_features": outputs})
