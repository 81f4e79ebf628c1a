"""LoKr: a Kronecker product of two matrices, each of which may be low-rank (KronA, arXiv:2212.10650; LyCORIS, arXiv:2309.14859).

Source: huggingface/peft 0.21, ``src/peft/tuners/lokr``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from lora_merge_cli.dialects.peft.methods.fitting import contradiction, misfit
from lora_merge_cli.dialects.peft.methods.interface import Adapted, Fit, Method, Outline, Weight, extent
from lora_merge_cli.dialects.peft.patterns import rank_of, scale_of
from lora_merge_cli.errors import LoraMergeError, ShapeMismatch

_FIRST = (frozenset({"w1"}), frozenset({"w1_a", "w1_b"}))
_SECOND = (frozenset({"w2"}), frozenset({"w2_a", "w2_b"}), frozenset({"t2", "w2_a", "w2_b"}))

_Pair = tuple[int, int]


class LoKr(Method):
    """LoKr. Scale ``alpha / r``, also where nothing is low-rank; how each matrix is made shows in the keys."""

    peft_types = ("LOKR",)
    title = "LoKr"
    suffixes: ClassVar[Mapping[str, str]] = {
        f"lokr_{role}": role for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    }
    complete = tuple(first | second for first in _FIRST for second in _SECOND)
    axes = frozenset({2, 3, 4})
    rank = ("r", 8)
    alpha = ("alpha", 8.0)
    patterns = frozenset({"rank_pattern", "alpha_pattern"})
    harmless = frozenset(
        {
            *("rank_dropout", "module_dropout", "rank_dropout_scale"),
            *("use_effective_conv2d", "decompose_both", "decompose_factor"),
        }
    )

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        rank = rank_of(layer.config.common, layer.module) or 1
        first, second = _first(layer), _second(layer)
        sizes = first[0] * second[0], first[1] * second[1]
        return Outline(rank, scale_of(layer.config.common, layer.module, rank), sizes)

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        outline = self.outline(layer)
        found = {extent(layer.shape(role), 0) for role in ("w1_b", "t2") if role in layer.tensors}
        found |= {extent(layer.shape("w2_b"), 0)} if "w2_b" in layer.tensors else set()
        if found - {outline.rank}:
            return contradiction("rank", outline.rank, min(found - {outline.rank}), where)
        expected = _expected(layer, weight, outline.rank)
        problem = misfit(layer, weight, expected, where)
        if problem is not None:
            return problem
        if outline.sizes != (weight.outputs, weight.inputs):
            return ShapeMismatch(
                "the factors do not fit the weight",
                where=where,
                expected=f"{weight.outputs} outputs and {weight.inputs} inputs",
                found=f"{outline.sizes[0]} and {outline.sizes[1]}",
                hint="see that the base is the one that the adapter was trained on",
            )
        return Fit("lokr", layer.factors())


def _first(layer: Adapted) -> _Pair:
    """The shape of the first matrix."""
    if "w1" in layer.tensors:
        return extent(layer.shape("w1"), 0), extent(layer.shape("w1"), 1)
    return extent(layer.shape("w1_a"), 0), extent(layer.shape("w1_b"), 1)


def _second(layer: Adapted) -> _Pair:
    """The shape of the second one, a convolution's kernel among its inputs."""
    if "w2" in layer.tensors:
        return extent(layer.shape("w2"), 0), math.prod(layer.shape("w2")[1:])
    if "t2" in layer.tensors:
        kernel = extent(layer.shape("t2"), 2) * extent(layer.shape("t2"), 3)
        return extent(layer.shape("w2_a"), 1), extent(layer.shape("w2_b"), 1) * kernel
    return extent(layer.shape("w2_a"), 0), extent(layer.shape("w2_b"), 1)


def _expected(layer: Adapted, weight: Weight, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors of these extents have; which extents they must be multiplied to is another matter."""
    first, second = _first(layer), _second(layer)
    inputs = second[1] // max(1, math.prod(weight.kernel))
    shapes: dict[str, tuple[int, ...]] = {
        "w1": first,
        "w1_a": (first[0], rank),
        "w1_b": (rank, first[1]),
        "w2": (second[0], inputs, *weight.kernel),
        "w2_a": (second[0], rank),
        "w2_b": (rank, second[1]),
    }
    if "t2" in layer.tensors:
        # The core has two axes for the kernel, also where that has one.
        shapes |= {
            "t2": (rank, rank, *(*weight.kernel, 1)[:2]),
            "w2_a": (rank, second[0]),
            "w2_b": (rank, inputs),
        }
    return {role: shape for role, shape in shapes.items() if role in layer.tensors}
