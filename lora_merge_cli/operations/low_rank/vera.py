"""VeRA: ``W + diag(lambda_b) B diag(lambda_d) A``, where A and B are random and all layers take theirs from one pair.

Paper: arXiv:2310.11454. Source: huggingface/peft, ``src/peft/tuners/vera/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_merge_cli.operations.add_delta import AddDelta
from lora_merge_cli.operations.low_rank.along import scaled_along
from lora_merge_cli.records import AdapterSite, Array


class Vera(AddDelta):
    """The additive operation on shared factors, each scaled by a vector of the layer's own.

    Roles: ``vera_a`` and ``vera_b``, the parts of the shared ones that the layer takes, as the site's equation takes lora_a and
    lora_b; ``lambda_d`` (rank,) and ``lambda_b`` (outputs,).
    """

    name = "vera"

    def reduce(self, site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:
        """See `LowRankOperation.reduce`: each vector goes into the factor that it scales."""
        equation = site.parameters.equation
        return {
            "lora_a": scaled_along(factors["vera_a"], equation.a, equation.rank, factors["lambda_d"]),
            "lora_b": scaled_along(factors["vera_b"], equation.b, equation.outputs, factors["lambda_b"]),
        }
