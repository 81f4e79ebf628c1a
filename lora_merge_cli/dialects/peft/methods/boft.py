"""BOFT: the inputs rotated by orthogonal blocks, in butterfly stages, and the outputs scaled (arXiv:2311.06243).

Source: huggingface/peft 0.21, ``src/peft/tuners/boft``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_merge_cli.dialects.peft.config import Fields
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
from lora_merge_cli.errors import LoraMergeError, UnsupportedCheckpoint
from lora_merge_cli.records import Factor


class Boft(Method):
    """BOFT with one stage. More of them PEFT computes with a CUDA kernel of its own, and otherwise not at all."""

    peft_types = ("BOFT",)
    title = "BOFT"
    suffixes: ClassVar[Mapping[str, str]] = {"boft_R": "r", "boft_s": "s"}
    complete = (frozenset({"r", "s"}),)
    axes = frozenset({2, 4})
    biases = ("boft_only",)
    fields = frozenset({"boft_block_size", "boft_block_num", "boft_n_butterfly_factor"})
    harmless = frozenset({"boft_dropout"})

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: the size of a block, or their number."""
        factor = fields.whole("boft_n_butterfly_factor", 1)
        if factor != 1:
            fields.problems.append(_several_stages(factor, fields.where))
        number = fields.whole("boft_block_num", 0, least=0)
        # 4 is the default, unless the number of blocks is given.
        return {
            "boft_block_size": fields.whole("boft_block_size", 0 if number else 4, least=0),
            "boft_block_num": number,
        }

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        blocks, block = extent(layer.shape("r"), 1), extent(layer.shape("r"), 2)
        return Outline(block, no_scale(self.title), (layer.tensors["s"].size, blocks * block))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        stages, blocks, block = (
            extent(layer.shape("r"), 0),
            extent(layer.shape("r"), 1),
            self.outline(layer).rank,
        )
        if stages > 1:
            return _several_stages(stages, where)
        size, number = layer.config.own["boft_block_size"], layer.config.own["boft_block_num"]
        if size not in (0, block):
            return contradiction("block size", size, block, where)
        if number not in (0, blocks):
            return contradiction("number of blocks", number, blocks, where)
        expected = {
            "r": (1, weight.inputs // max(1, block), block, block),
            "s": (1, weight.outputs) if weight.kind == "convolution" else (weight.outputs, 1),
        }
        problem = misfit(layer, weight, expected, where)
        if problem is None and weight.inputs % block:
            problem = contradiction("number of inputs", weight.inputs, blocks * block, where)
        if problem is None and len(set(weight.kernel)) > 1:
            return UnsupportedCheckpoint("BOFT on a convolution whose kernel is not square", where=where)
        return problem or Fit("boft", layer.factors(("r",)) | {"s": Factor(layer.tensors["s"].path, (weight.outputs,))})


def _several_stages(stages: int, where: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        "BOFT with several butterfly stages: not supported",
        where=where,
        expected="boft_n_butterfly_factor 1",
        found=stages,
        hint="merge it with peft's merge_and_unload",
    )
