"""Several adapters on one kernel as the one that a combination of their factors makes of them, layer by layer. NumPy, float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lora_merge_cli.combining import Combining
from lora_merge_cli.draws import keep_mask, tensor_name
from lora_merge_cli.records import Array
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.combination import Part, combined


def as_one(adapted: Sequence[Adapted], combining: Combining, name: str) -> Adapted:
    """One adapter that does what the combination does; its scale and weight are 1.

    Args:
        adapted: The adapters on the kernel, in their order.
        combining: How they are combined.
        name: The kernel's name, which random draws depend on; the number of a stacked layer is added here.
    """
    first = adapted[0]
    equation = first.site.parameters.equation
    batch = len(equation.batch)
    layers = first.lora_a.shape[equation.a.index("l")] if equation.stacked else None
    pairs = [
        _layer(
            [
                (part.left()[layer], _unscaled(part)[layer], part.scale * part.weight)
                if layers is not None
                else (part.left(), _unscaled(part), part.scale * part.weight)
                for part in adapted
            ],
            [part.scale for part in adapted],
            combining,
            name if layers is None else f"{name}#{layer}",
            batch - (layers is not None),
        )
        for layer in range(layers or 1)
    ]
    a, b = (np.stack(values) if layers is not None else values[0] for values in zip(*pairs, strict=True))
    scale = dataclasses.replace(first.site.parameters.scale, value=1.0)
    parameters = dataclasses.replace(first.site.parameters, rank=a.shape[-1], scale=scale)
    site = dataclasses.replace(first.site, parameters=parameters, weight=1.0)
    lora_a = _arranged(a, equation.batch + equation.inputs + equation.rank, equation.a)
    kept = "".join(dim for dim in equation.b if dim not in equation.summed)
    lora_b = _arranged(b, equation.batch + equation.rank + equation.outputs, kept)
    for dim in equation.summed:
        # The model adds these up: the first has it all.
        at = equation.b.index(dim)
        lora_b = np.expand_dims(lora_b, at)
        lora_b = np.concatenate([lora_b, np.zeros_like(lora_b).repeat(_extent(first, dim) - 1, axis=at)], axis=at)
    return Adapted(site, lora_a, lora_b, 1.0, None, first.alphas)


def _layer(
    parts: Sequence[Part], scales: Sequence[float], combining: Combining, name: str, batch: int
) -> tuple[Array, Array]:
    """One layer's combination: a, dims batch, inputs, rank, and b, dims batch, rank, outputs."""
    a_shape, b_shape = parts[0][0].shape, parts[0][1].shape
    heads = math.prod(a_shape[:batch])
    stacks = [(a.reshape(heads, -1, a.shape[-1]), b.reshape(heads, b.shape[batch], -1), c) for a, b, c in parts]

    def one(pieces: Sequence[Part]) -> tuple[Array, Array]:
        return combined(
            pieces,
            combining.method,
            density=combining.density,
            sign=combining.majority_sign,
            svd_rank=combining.svd_rank,
            masks=lambda shape, number: keep_mask(
                combining.seed, tensor_name(name, number), shape, combining.density or 1.0
            ),
            scales=scales,
        )

    if combining.crosses:
        # Each factor is one tensor, whatever the heads: batch before rank in A, batch before outputs in B, as they are stored.
        inputs, rank = stacks[0][0].shape[1:]
        beside = [
            (a.transpose(1, 0, 2).reshape(inputs, -1), b.transpose(1, 0, 2).reshape(rank, -1), c) for a, b, c in stacks
        ]
        a, b = one(beside)
        return (
            a.reshape(inputs, heads, rank).transpose(1, 0, 2).reshape(a_shape),
            b.reshape(rank, heads, -1).transpose(1, 0, 2).reshape(b_shape),
        )
    found = [one([(a[head], b[head], c) for a, b, c in stacks]) for head in range(heads)]
    a, b = (np.stack(values) for values in zip(*found, strict=True))
    return (
        a.reshape(*a_shape[:-1], a.shape[-1]),
        b.reshape(*b_shape[:batch], b.shape[1], *b_shape[batch + 1 :]),
    )


def _unscaled(part: Adapted) -> Array:
    """lora_b, its heads summed, dims batch, rank, outputs."""
    return dataclasses.replace(
        part,
        weight=1.0,
        alphas=(1.0,),
        site=dataclasses.replace(
            part.site,
            parameters=dataclasses.replace(
                part.site.parameters, scale=dataclasses.replace(part.site.parameters.scale, value=1.0)
            ),
        ),
    ).right()


def _extent(part: Adapted, dim: str) -> int:
    return int(part.lora_b.shape[part.site.parameters.equation.b.index(dim)])


def _arranged(values: Array, dims: str, order: str) -> Array:
    return np.ascontiguousarray(np.transpose(values, [dims.index(dim) for dim in order]))
