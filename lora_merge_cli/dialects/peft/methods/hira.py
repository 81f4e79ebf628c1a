"""HiRA: the weight times a low-rank matrix, entry by entry (ICLR 2025, openreview TwJrTz9cRS).

Source: huggingface/peft 0.21, ``src/peft/tuners/hira``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

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
from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.records import Factor


class Hira(Method):
    """HiRA, of linear layers, convolutions and embeddings: an embedding's factors are (rank, vocabulary) and (width, rank)."""

    peft_types = ("HIRA",)
    title = "HiRA"
    suffixes: ClassVar[Mapping[str, str]] = {
        "hira_A": "lora_a",
        "hira_B": "lora_b",
        "hira_embedding_A": "embedding_a",
        "hira_embedding_B": "embedding_b",
    }
    complete = (frozenset({"lora_a", "lora_b"}), frozenset({"embedding_a", "embedding_b"}))
    axes = frozenset({2, 3, 4, 5})
    turnable = True
    states_layout = False
    rank = ("r", 32)
    patterns = frozenset({"rank_pattern"})
    harmless = frozenset({"hira_dropout"})

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        a, b = _pair(layer)
        return Outline(extent(a, 0), no_scale(self.title), (extent(b, 0), extent(a, 1)))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        rank = self.outline(layer).rank
        names = ("embedding_a", "embedding_b") if weight.kind == "embedding" else ("lora_a", "lora_b")
        shapes: list[tuple[int, ...]] = [(rank, weight.inputs), (weight.outputs, rank)]
        if weight.kind == "convolution":
            shapes = [(rank, *weight.shape[1:]), (weight.outputs, rank, *(1 for _ in weight.kernel))]
        expected = dict(zip(names, shapes, strict=True))
        # PEFT 0.21 writes rank_pattern and does not heed it; nothing but the shapes depends on the rank.
        stated = layer.config.common.rank
        problem = wrong_rank(layer, rank, where) if rank != stated else None
        problem = problem or misfit(layer, weight, expected, where)
        if problem is not None:
            return problem
        path_a, path_b = (layer.tensors[name].path for name in names)
        # The dims of the layout: the kernel's axes of a convolution are A's alone.
        flat = (weight.outputs, rank) if weight.kind == "convolution" else None
        factors = {"lora_a": Factor(path_a), "lora_b": Factor(path_b, flat)}
        return Fit("hira", factors)


def _pair(layer: Adapted) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if "embedding_a" in layer.tensors:
        return layer.shape("embedding_a"), layer.shape("embedding_b")
    return layer.shape("lora_a"), layer.shape("lora_b")
