"""OpenPI's stacks of layers: what `nn.scan` makes of the language model and of the vision tower, one leaf for all layers.

Source: Physical-Intelligence/openpi, ``src/openpi/models/gemma.py`` and ``siglip.py``.
"""

from __future__ import annotations

import itertools
import re

from lora_merge_cli.dialects.depths import along_first_axis
from lora_merge_cli.records import Depth, Index, KeyPath, TensorSpec, display

_SCANNED = frozenset({("llm", "layers"), ("Transformer", "encoderblock")})
"""The last two parts of a scanned module's path."""

_AXES: tuple[tuple[str, int], ...] = (
    (r"(?:q|attn_vec)_einsum(?:_1)?/w", 3),
    (r"q?kv_einsum(?:_1)?/w", 4),
    (r"mlp(?:_1)?/gating_einsum", 3),
    (r"mlp(?:_1)?/linear", 2),
    (r"(?:LayerNorm_\d+|pre_(?:attention|ffw)_norm(?:_1)?)/(?:scale|bias)", 1),
    (r"Dense_\d+/kernel", 2),
    (r"Dense_\d+/bias", 1),
    (r"(?:query|key|value|out)/kernel", 3),
    (r"(?:query|key|value)/bias", 2),
    (r"out/bias", 1),
)
"""How many axes the leaves of one layer have, by the ends of their names. One more, and layers are stacked."""

_AXIS_PATTERNS = tuple((re.compile(rf"(?:.+/)?{pattern}(?:/value)?"), axes) for pattern, axes in _AXES)


def scanned(index: Index) -> dict[KeyPath, Depth]:
    """The depths of the leaves below scanned modules, by `along_first_axis`.

    A leaf that is known to have no axis of layers, as all in a model of one layer that is not scanned, has no depth.
    """
    stacks: dict[KeyPath, list[TensorSpec]] = {}
    for path, spec in index.tensors.items():
        ends = (at + 2 for at, pair in enumerate(itertools.pairwise(path)) if pair in _SCANNED)
        end = next(ends, None)
        if end is not None:
            stacks.setdefault(path[:end], []).append(spec)
    depths: dict[KeyPath, Depth] = {}
    for specs in stacks.values():
        known = [spec for spec in specs if _axes(spec) == len(spec.shape) - 1]
        unknown = [spec for spec in specs if _axes(spec) is None]
        depths |= along_first_axis([*known, *unknown], known)
    return depths


def _axes(spec: TensorSpec) -> int | None:
    """How many axes the leaf has in one layer; None for one that is not known."""
    name = display(spec.path)
    return next((axes for pattern, axes in _AXIS_PATTERNS if pattern.fullmatch(name)), None)
