"""DeLoRA: a low-rank update whose strength is trained apart from its direction (arXiv:2503.18225).

Source: huggingface/peft 0.21, ``src/peft/tuners/delora``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lora_merge_cli.dialects.peft.methods.fitting import misfit, wrong_rank
from lora_merge_cli.dialects.peft.methods.interface import Adapted, Fit, Method, Outline, Weight, extent
from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.records import Scale


class DeLora(Method):
    """DeLoRA. Scale ``1 / r``, and lambda; the norms of the weight's columns are stored as they were when training began."""

    peft_types = ("DELORA",)
    title = "DeLoRA"
    suffixes: ClassVar[Mapping[str, str]] = {
        "delora_A": "lora_a",
        "delora_B": "lora_b",
        "delora_lambda": "lambda",
        "delora_w_norm": "w_norm",
    }
    complete = (frozenset({"lora_a", "lora_b", "lambda", "w_norm"}),)
    rank = ("r", 8)
    patterns = frozenset({"rank_pattern"})
    biases = ("delora_only",)
    # Lambda's value at the start; the trained one is in the file.
    harmless = frozenset({"delora_lambda", "lambda_pattern", "module_dropout"})

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        a, b = layer.shape("lora_a"), layer.shape("lora_b")
        rank = extent(a, 0)
        return Outline(rank, Scale(1 / max(1, rank), f"1 / rank {rank}"), (extent(b, 0), extent(a, 1)))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        rank = self.outline(layer).rank
        expected = {
            "lora_a": (rank, weight.inputs),
            "lora_b": (weight.outputs, rank),
            "lambda": (1,),
            "w_norm": (weight.inputs,),
        }
        problem = wrong_rank(layer, rank, where) or misfit(layer, weight, expected, where)
        return problem or Fit("delora", layer.factors())
