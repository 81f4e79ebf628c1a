"""AdaLoRA: ``W + scale * B (A * E)``, singular values E between two factors (arXiv:2303.10512).

Source: huggingface/peft, ``src/peft/tuners/adalora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_merge_cli.operations.add_delta import AddDelta
from lora_merge_cli.operations.low_rank.along import scaled_along
from lora_merge_cli.records import AdapterSite, Array


class AdaLora(AddDelta):
    """The additive operation on factors with singular values of their own.

    Roles: ``lora_a`` and ``lora_b`` as the site's equation takes them, ``lora_e`` (rank, 1).
    """

    name = "adalora"

    def reduce(self, site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:
        """See `LowRankOperation.reduce`: the singular values go into ``lora_a``."""
        equation = site.parameters.equation
        a = scaled_along(factors["lora_a"], equation.a, equation.rank, factors["lora_e"])
        return {"lora_a": a, "lora_b": factors["lora_b"]}
