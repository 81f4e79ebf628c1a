"""OFT: the inputs rotated by orthogonal blocks (arXiv:2306.07280; the truncated Neumann series, arXiv:2506.19847).

Source: huggingface/peft 0.21, ``src/peft/tuners/oft``.
"""

from __future__ import annotations

import math
import re
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

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)")
_OVERLAPPING = (
    "OFT on convolutions whose kernel is larger than 1: merged as peft merges them, which is not what peft's own forward computes "
    "(it adds up overlapping patches)"
)
_EPSILON = 6e-5


class Oft(Method):
    """OFT. A block is the strict upper triangle of a skew-symmetric matrix; ``block_share`` repeats one for all inputs.

    What is stored changed twice: PEFT 0.14 came with ``oft_block_size``, 0.18 with another meaning under
    ``use_cayley_neumann``. Neither older kind can be read as if it were of today.
    """

    peft_types = ("OFT",)
    title = "OFT"
    suffixes: ClassVar[Mapping[str, str]] = {"oft_R.weight": "r"}
    complete = (frozenset({"r"}),)
    unsupported: ClassVar[Mapping[str, str]] = {
        "oft_embedding_R.weight": "OFT on an embedding, which turns the other way round"
    }
    axes = frozenset({2, 4})
    biases = ("oft_only",)
    fields = frozenset(
        {
            *("r", "oft_block_size", "coft", "eps", "block_share"),
            *("use_cayley_neumann", "num_cayley_neumann_terms"),
        }
    )
    harmless = frozenset({"module_dropout"})

    def settings(self, fields: Fields) -> Mapping[str, Any]:
        """See `Method.settings`: how a block is stored, and how it becomes a rotation."""
        neumann = fields.flag("use_cayley_neumann", True)
        if fields.raw.get("oft_block_size") is None:
            fields.problems.append(_too_old("0.14, which stored OFT otherwise", "no oft_block_size", fields))
        elif neumann and _is_older(fields.text("peft_version")):
            found = fields.text("peft_version") or "no peft_version"
            fields.problems.append(_too_old("0.18, which meant another use_cayley_neumann", found, fields))
        eps = fields.number("eps")
        return {
            "r": fields.whole("r", 0, least=0),
            "oft_block_size": fields.whole("oft_block_size", 0, least=0),
            "use_cayley_neumann": neumann,
            "num_cayley_neumann_terms": fields.whole("num_cayley_neumann_terms", 5),
            "block_share": fields.flag("block_share"),
            "coft": fields.flag("coft"),
            "eps": _EPSILON if eps is None else eps,
        }

    def outline(self, layer: Adapted) -> Outline:
        """See `Method.outline`."""
        blocks, entries = extent(layer.shape("r"), 0), extent(layer.shape("r"), 1)
        # b * (b - 1) / 2 entries are a block of b.
        block = (1 + math.isqrt(1 + 8 * entries)) // 2
        return Outline(block, no_scale(self.title), (None, None if layer.config.own["block_share"] else blocks * block))

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """See `Method.fit`."""
        block, own = self.outline(layer).rank, layer.config.own
        stated = _block(weight.inputs, own["r"], own["oft_block_size"])
        if stated != block:
            return contradiction("block size", stated, block, where)
        blocks = 1 if own["block_share"] else weight.inputs // block
        problem = misfit(layer, weight, {"r": (blocks, block * (block - 1) // 2)}, where)
        if problem is not None:
            return problem
        settings = {name: own[name] for name in own if name not in ("r", "oft_block_size")}
        overlaps = max(weight.kernel, default=1) > 1
        return Fit("oft", layer.factors(), settings, caution=_OVERLAPPING if overlaps else None)


def _block(inputs: int, count: int, size: int) -> int:
    """The extent of a block: as stated, or the nearest divisor of the inputs, the smaller of two."""
    if size:
        return _nearest_divisor(inputs, size)
    return inputs // _nearest_divisor(inputs, count) if count else 0


def _nearest_divisor(number: int, wished: int) -> int:
    if wished >= number:
        return number
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wished), d))


def _is_older(version: str | None) -> bool:
    """Whether a version, of which none is stated before 0.18, is older than 0.18."""
    match = _VERSION.match(version or "0.0")
    if match is None:
        return True
    numbers = int(match[1]), int(match[2]), int(match[3] or 0)
    early = re.match(r"\.?(?:dev|a|b|rc)", match[4]) is not None
    return numbers < (0, 18, 0) or (numbers == (0, 18, 0) and early)


def _too_old(than: str, found: str, fields: Fields) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"an OFT adapter of a PEFT before {than}",
        where=fields.where,
        found=found,
        hint="merge it with the PEFT that wrote it",
    )
