"""What PEFT's methods make of a kernel, each written from the model's own forward pass. NumPy, float64.

Kernels are outputs by inputs; a convolution's inputs are its channels and kernel axes together, a bias has one input. Nothing here
knows how the operations fuse. One file per method.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_merge_cli.records import AdapterSite, Array
from lora_merge_cli.verification.methods import (
    adalora,
    boft,
    c3a,
    delora,
    hira,
    hra,
    ia3,
    loha,
    lokr,
    lora,
    miss,
    miss_bat,
    oft,
    randlora,
    shira,
    vera,
)
from lora_merge_cli.verification.methods.given import Factors, Given, LowRankMethod, RowMethod

_PLAIN = frozenset({"add_delta", "dora"})
"""Operations whose sites have the factors of a low-rank product as they are."""
_LOW_RANK: Mapping[str, LowRankMethod] = {
    "adalora": adalora,
    "delora": delora,
    "miss": miss,
    "randlora": randlora,
    "vera": vera,
}
_BY_ROW: Mapping[str, RowMethod] = {
    "boft": boft,
    "c3a": c3a,
    "hira": hira,
    "hra": hra,
    "ia3": ia3,
    "loha": loha,
    "lokr": lokr,
    "miss_bat": miss_bat,
    "oft": oft,
    "shira": shira,
}


def is_by_row(name: str) -> bool:
    """Whether an operation is judged by `changed`; the others by the factors that `reduced` gives."""
    return name in _BY_ROW


def reduced(site: AdapterSite, factors: Mapping[str, Array]) -> Factors:
    """The factors of the low-rank product that a site adds.

    Args:
        site: A site whose operation is not by row.
        factors: What it takes of the adapter's leaves, by role, of any dtype.

    Returns:
        ``lora_a`` (rank, inputs) and ``lora_b`` (outputs, rank), float64: the change is ``scale * lora_b @ lora_a``. Of LoRA and
        DoRA the factors as they are.
    """
    if site.operation in _PLAIN:
        return dict(factors)
    return _LOW_RANK[site.operation].reduced(Given.of(site, factors))


def changed(site: AdapterSite, factors: Mapping[str, Array], kernel: Array) -> Array:
    """What the adapter alone, at weight 1, makes of the unmerged kernel.

    Args:
        site: A site whose operation is by row.
        factors: What it takes of the adapter's leaves, by role, of any dtype.
        kernel: Outputs by inputs, float64.

    Returns:
        Outputs by inputs, float64.
    """
    return _BY_ROW[site.operation].changed(Given.of(site, factors), kernel)


def forward(site: AdapterSite, factors: Mapping[str, Array], kernel: Array, x: Array) -> Array:
    """What the model computes at a layer with an adapter at weight 1, but for a bias, in PEFT's order of steps.

    Args:
        site: Any site without batch dims.
        factors: What it takes of the adapter's leaves, by role, of any dtype.
        kernel: Outputs by inputs, float64, unmerged.
        x: n by inputs, float64; for a convolution each row is one patch.

    Returns:
        n by outputs, float64.
    """
    given = Given.of(site, factors)
    if site.operation in _PLAIN:
        return lora.forward(site, given, kernel, x)
    if is_by_row(site.operation):
        return _BY_ROW[site.operation].forward(given, kernel, x)
    branch = _LOW_RANK[site.operation].branch(given, x)
    return np.asarray(x @ kernel.T + given.scale * branch)
