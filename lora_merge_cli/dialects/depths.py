"""Where leaves sit in a model's stacks of layers: by the numbers in their names, or along their first axis."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_merge_cli.records import Depth, KeyPath, TensorSpec

STACKS = frozenset(
    {
        *("layers", "layer", "h", "blocks", "block", "stages"),
        # One of several stacks of a model, side by side or one after the other.
        *("encoder_layers", "decoder_layers", "transformer_layers", "gated_cross_attn_layers", "r_layers", "x_layers"),
        *("transformer_blocks", "single_transformer_blocks", "double_blocks", "single_blocks"),
        *("down_blocks", "up_blocks"),
        # Vision towers: CLIP's own code, and big_vision's.
        *("resblocks", "encoderblock"),
    }
)
"""What models call the modules that hold their layers by number.

Source: huggingface/transformers 5.23, the lists of modules in ``models/*/modeling_*.py``; huggingface/diffusers; openai/CLIP;
google-research/big_vision. Stages of convolutions are layers here: depth grows from one to the next.
"""

# No model has a million layers, and Python does not read numbers of thousands of digits.
_NUMBER = re.compile(r"[0-9]{1,6}")
_NUMBERED = re.compile(rf"({'|'.join(sorted(STACKS))})_([0-9]{{1,6}})")


@dataclass(frozen=True)
class _Place:
    """What a name says about its layer."""

    stack: tuple[str, ...]
    """The name up to the number: two names are of one stack if they agree so far."""
    layer: int
    """The number."""
    nested: bool
    """Whether the layer has modules of its own: the name goes on by more than the parameter's."""


def numbered(names: Mapping[KeyPath, Sequence[str]]) -> dict[KeyPath, Depth]:
    """The layers of leaves whose names number them.

    The layer is the first number right after one of `STACKS`, so that experts and stages within a layer are not counted, nor are
    sequential modules as ``mlp.0`` and ``classifier.3``. What comes before the number names the stack: vision tower, encoder and
    decoder have stacks of their own. A stack has as many layers as its largest number says, plus one. Where no layer of it holds
    more than parameters, as in ``bbox_embed.layers.0.weight``, it is a sequential module under the name of a stack, and none.

    Args:
        names: Each leaf's name, part by part, the parameter's own last.

    Returns:
        The depths of the leaves that have one.
    """
    places = {path: place for path, parts in names.items() if (place := _place(parts)) is not None}
    stacks = {place.stack for place in places.values() if place.nested}
    counts: Counter[tuple[str, ...]] = Counter()
    for place in places.values():
        counts[place.stack] = max(counts[place.stack], place.layer + 1)
    return {path: Depth(place.layer, counts[place.stack]) for path, place in places.items() if place.stack in stacks}


def along_first_axis(leaves: Iterable[TensorSpec], known: Iterable[TensorSpec]) -> dict[KeyPath, Depth]:
    """The layers of leaves whose first axis is the layers of one stack.

    Args:
        leaves: What lies below the stack.
        known: Those of which it is known that their first axis is the layers. The extent that most of them have counts.

    Returns:
        The depths of the leaves with that first extent. Nothing where it is 0.
    """
    extents = Counter(spec.shape[0] for spec in known)
    count = extents.most_common(1)[0][0] if extents else 0
    return {spec.path: Depth(None, count) for spec in leaves if count and spec.shape[:1] == (count,)}


def parts_of(path: KeyPath) -> tuple[str, ...]:
    """The parts of a JAX path with layers' numbers by themselves: ``encoderblock_3`` is ``encoderblock`` and ``3``."""
    parts: list[str] = []
    for part in map(str, path):
        match = _NUMBERED.fullmatch(part)
        parts += [part] if match is None else match.groups()
    return tuple(parts)


def _place(parts: Sequence[str]) -> _Place | None:
    for at in range(1, len(parts)):
        if parts[at - 1] in STACKS and _NUMBER.fullmatch(parts[at]):
            return _Place(tuple(parts[:at]), int(parts[at]), nested=len(parts) > at + 2)
    return None
