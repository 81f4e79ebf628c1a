"""AdaLoRA: ``B diag(E) A``, pruned while it trains (arXiv:2303.10512).

Source: huggingface/peft 0.21, ``src/peft/tuners/adalora``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_merge_cli.dialects.peft.config import Fields
from lora_merge_cli.dialects.peft.methods.fitting import contradiction, misfit
from lora_merge_cli.dialects.peft.methods.interface import Adapted, Fit, Method, Outline, Weight, extent
from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.records import Factor, Scale

_EPSILON = 1e-5


class AdaLora(Method):
    """AdaLoRA. The scale is ``alpha / (init_r + 1e-5)``, whatever is left of the rank; alpha 0 or less stands for ``init_r``.

    ``rank_pattern`` is no pattern here but a mask for each module: which ranks were kept. The file holds those alone. ``r``,
    ``use_rslora`` and ``alpha_pattern`` are LoRA's, and PEFT does not read them here.
    """

    peft_types = ("ADALORA",)
    title = "AdaLoRA"
    suffixes: ClassVar[Mapping[str, str]] = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_E": "lora_e"}
    complete = (frozenset({"lora_a", "lora_b", "lora_e"}),)
    axes = frozenset({2, 4})
    turnable = True
    rank = ("init_r", 12)
    alpha = ("lora_alpha", 8.0)
    biases = ("lora_only",)
    fields = frozenset({"rank_pattern"})
    harmless = frozenset(
        {
            *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
            *("r", "use_rslora", "alpha_pattern", "init_lora_weights", "lora_dropout"),
            *("megatron_core", "qalora_group_size", "runtime_config"),
        }
    )

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: how many ranks were kept, by module."""
        masks = fields.raw.get("rank_pattern") or {}
        if not isinstance(masks, Mapping) or not all(map(_is_mask, masks.values())):
            fields.malformed("rank_pattern", "lists of true and false by module")
            return {"kept": {}}
        return {"kept": {_module(name): sum(mask) for name, mask in masks.items()}}

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        sizes = (extent(layer.shape("lora_b"), 0), extent(layer.shape("lora_a"), 1))
        start, alpha = layer.config.common.rank or 1, layer.config.common.alpha or 0.0
        numerator = alpha if alpha > 0 else start
        source = f"alpha {numerator:g} / (init_r {start} + 1e-5) ({layer.config.common.alpha_source})"
        return Outline(extent(layer.shape("lora_e"), 0), Scale(numerator / (start + _EPSILON), source), sizes)

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        rank = self.outline(layer).rank
        stated = layer.config.own["kept"].get(layer.module, layer.config.common.rank)
        if rank != stated:
            return contradiction("rank", stated, rank, where)
        expected = {"lora_a": (rank, weight.inputs), "lora_b": (weight.outputs, rank), "lora_e": (rank, 1)}
        problem = misfit(layer, weight, expected, where)
        if problem is not None:
            return problem
        factors = layer.factors()
        if weight.kind == "convolution":
            factors["lora_a"] = Factor(layer.tensors["lora_a"].path, (rank, *weight.shape[1:]))
        return Fit("adalora", factors)


def _is_mask(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(kept, bool) for kept in value)


def _module(name: str) -> str:
    """The module of a mask: its name there ends with that of ``lora_E``, and may have the adapter's after it."""
    return str(name).partition(".lora_E")[0].removeprefix("base_model.model.")
