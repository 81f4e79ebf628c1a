"""LoHa: the product, entry by entry, of two low-rank matrices (FedPara, arXiv:2108.06098).

Source: huggingface/peft 0.21, ``src/peft/tuners/loha``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lora_merge_cli.dialects.peft.methods.fitting import Shape, misfit, wrong_rank
from lora_merge_cli.dialects.peft.methods.interface import Adapted, Fit, Method, Outline, Weight, extent
from lora_merge_cli.dialects.peft.patterns import scale_of
from lora_merge_cli.errors import LoraMergeError

_PLAIN = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})


class LoHa(Method):
    """LoHa. Scale ``alpha / r``; with ``use_effective_conv2d`` a kernel's axes are in the cores t1 and t2."""

    peft_types = ("LOHA",)
    title = "LoHa"
    suffixes: ClassVar[Mapping[str, str]] = {
        f"hada_{role}": role for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    }
    complete = (_PLAIN, _PLAIN | {"t1", "t2"})
    axes = frozenset({2, 3, 4})
    rank = ("r", 8)
    alpha = ("alpha", 8.0)
    patterns = frozenset({"rank_pattern", "alpha_pattern"})
    # What the convolutions' factors are like shows in the shapes.
    harmless = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d"})

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        a, b = layer.shape("w1_a"), layer.shape("w1_b")
        rank = extent(b, 0)
        if "t1" in layer.tensors:
            kernel = extent(layer.shape("t1"), 2) * extent(layer.shape("t1"), 3)
            sizes = extent(a, 1), extent(b, 1) * kernel
        else:
            sizes = extent(a, 0), extent(b, 1)
        return Outline(rank, scale_of(layer.config.common, layer.module, max(1, rank)), sizes)

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        rank = self.outline(layer).rank
        expected: dict[str, Shape] = {}
        for name in ("w1", "w2"):
            if "t1" in layer.tensors:
                # The core has two axes for the kernel, also where that has one.
                expected[f"t{name[1]}"] = (rank, rank, *(*weight.kernel, 1)[:2])
                expected[f"{name}_a"], expected[f"{name}_b"] = (rank, weight.outputs), (rank, extent(weight.shape, 1))
            else:
                expected[f"{name}_a"], expected[f"{name}_b"] = (weight.outputs, rank), (rank, weight.inputs)
        problem = wrong_rank(layer, rank, where) or misfit(layer, weight, expected, where)
        return problem or Fit("loha", layer.factors())
