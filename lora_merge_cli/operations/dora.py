"""Weight-decomposed low-rank adaptation: ``m / |W + delta| * (W + delta)``, the norm over the inputs (arXiv:2402.09353).

Source of the norm's axes per layer type: huggingface/peft, ``src/peft/tuners/lora/dora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.operations.add_delta import in_float32, scaled_factors
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import AdapterSite, Array


class Dora:
    """DoRA. Each adapter's norm is that of the unmerged kernel plus its own delta, at weight 1."""

    name = "dora"
    needs_norms = True

    def reduce(self, site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:  # noqa: ARG002  (others need it)
        """See `LowRankOperation.reduce`: the factors as they are."""
        return factors

    def contribute(
        self, site: AdapterSite, factors: Mapping[str, Array], weight: float, norms: Array | None
    ) -> Contribution:
        """See `LowRankOperation.contribute`: with ``g = m / norms``, ``weight * (g * (W + delta) - W)``."""
        assert norms is not None, "the executor gives norms to whom needs them"
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = factors["magnitude"].astype(np.float64).reshape(norms.shape) / norms
        if not np.isfinite(gain).all():
            raise NonFiniteInput(
                "a row of kernel and delta is zero or not finite, and DoRA divides by its norm",
                where=site.name,
                found=f"{int(np.sum(~np.isfinite(gain)))} of {gain.size} rows",
            )
        a, b = scaled_factors(site, factors, weight)
        batch = len(site.parameters.equation.batch)
        factors_with_gain = in_float32(site, a), in_float32(site, b * np.expand_dims(gain, batch))
        return Contribution(*factors_with_gain, weight * (gain - 1.0))
