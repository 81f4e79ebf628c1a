"""A recipe applied to runs of entries: jitted on the device in float32, on the host in float64 for leaves of that.

One formula for both: ``W = scale * A + sum of w_i (P_i - M_i)``, an entry of which is ``scale * A`` where that sum is zero. With an
election only entries that are kept and have the elected sign add up, and TIES divides them by their weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_merge_cli.joining.recipe import Draw, Recipe, Term, Trim
from lora_merge_cli.joining.ties import size_bits
from lora_merge_cli.records import Array
from lora_merge_cli.tiles import as_bits, widened

_CAPACITY = 2**18
"""How many entries a call computes, however few are asked for: a program of another size may round otherwise."""
_HOST_ENTRIES = 2**15
_ALL = 2**31 - 1


@dataclass(frozen=True)
class _Shape:
    """What a program is compiled for: everything about a recipe but its numbers."""

    dtypes: tuple[str, ...]
    """Of the tensors, in their order."""
    anchor: int
    """The anchor's place among them."""
    terms: tuple[tuple[int, int], ...]
    """The places of each term's two."""
    kept: tuple[str, ...]
    """``all``, ``trim`` or ``draw`` per term."""
    election: str | None


def joined(
    recipe: Recipe,
    tensors: Mapping[int, Array],
    before: Callable[[int], int],
    drawn: Sequence[Array | None],
    *,
    wide: bool = False,
    device: Any = None,
) -> Array:
    """What a recipe makes of a run of entries.

    Law: an entry's result depends on its values in all tensors, its place in the leaf and the recipe alone, to the bit.

    Args:
        recipe: What to make.
        tensors: The values by the tensors' numbers, one axis of one length each, any floating dtype; float64 if `wide` alone.
        before: How many of the entries lie before or at a place of the leaf.
        drawn: Per term, which entries its draw keeps; None for a term without one.
        wide: Whether to compute in float64, on the host.
        device: The JAX device to compute on; JAX's first if None.

    Returns:
        float32, or float64 if `wide`. Not finite where the result is beyond the dtype.
    """
    counts = [
        before(t.kept.last) if isinstance(t.kept, Trim) and t.kept.last is not None else _ALL for t in recipe.terms
    ]
    order = recipe.tensors
    places = {number: place for place, number in enumerate(order)}
    values = [tensors[number] for number in order]
    shape = _Shape(
        dtypes=tuple(value.dtype.name for value in values),
        anchor=places[recipe.anchor],
        terms=tuple((places[term.plus], places[term.minus]) for term in recipe.terms),
        kept=tuple(_kind(term) for term in recipe.terms),
        election=recipe.election,
    )
    bits = np.array([t.kept.bits if isinstance(t.kept, Trim) else 0 for t in recipe.terms], np.uint32)
    size = values[0].size
    result = np.empty(size, np.float64 if wide else np.float32)
    step = _HOST_ENTRIES if wide else _CAPACITY
    for start in range(0, size, step):
        part = slice(start, min(start + step, size))
        runs = [value[part] for value in values]
        keeps = [mask[part] for mask in drawn if mask is not None]
        left = np.array([min(_ALL, max(0, count - start)) for count in counts], np.int32)
        result[part] = (
            _on_host(shape, recipe, runs, keeps, bits, left)
            if wide
            else _on_device(shape, recipe, runs, keeps, bits, left, device)
        )
    return result


def _kind(term: Term) -> str:
    return {Trim: "trim", Draw: "draw"}[type(term.kept)] if term.kept is not None else "all"


def _on_host(shape: _Shape, recipe: Recipe, runs: list[Array], keeps: list[Array], bits: Array, left: Array) -> Array:
    weights = np.array([term.weight for term in recipe.terms])
    with np.errstate(over="ignore", invalid="ignore"):
        values = [run.astype(np.float64) for run in runs]
        return np.asarray(_formula(np, size_bits, shape, values, keeps, recipe.scale, weights, bits, left))


def _on_device(
    shape: _Shape,
    recipe: Recipe,
    runs: list[Array],
    keeps: list[Array],
    bits: Array,
    left: Array,
    device: Any,
) -> Array:
    size = runs[0].size
    with np.errstate(over="ignore"):
        scale, weights = np.float32(recipe.scale), np.array([term.weight for term in recipe.terms]).astype(np.float32)
    padded = [_padded(as_bits(run), _CAPACITY) for run in runs], [_padded(keep, _CAPACITY) for keep in keeps]
    arguments = jax.device_put((*padded, scale, weights, bits, left), device)
    return np.asarray(jax.device_get(_program(shape, *arguments)))[:size]


@functools.partial(jax.jit, static_argnums=0)
def _program(
    shape: _Shape, runs: Sequence[Any], keeps: Sequence[Any], scale: Any, weights: Any, bits: Any, left: Any
) -> Any:
    values = [widened(run, dtype) for run, dtype in zip(runs, shape.dtypes, strict=True)]
    return _formula(jnp, _device_size_bits, shape, values, keeps, scale, weights, bits, left)


def _device_size_bits(difference: Any) -> Any:
    return jax.lax.bitcast_convert_type(jnp.abs(difference), jnp.uint32)


def _formula(
    xp: Any,
    bits_of: Callable[[Any], Any],
    shape: _Shape,
    values: Sequence[Any],
    keeps: Sequence[Any],
    scale: Any,
    weights: Any,
    bits: Any,
    left: Any,
) -> Any:
    """The module's formula, in NumPy or in JAX; `left` says how many entries from the run's first may equal a trim's size."""
    place = xp.arange(values[0].shape[0], dtype=xp.int32)
    remaining = iter(keeps)
    parts = []
    for number, ((plus, minus), kind) in enumerate(zip(shape.terms, shape.kept, strict=True)):
        difference = values[plus] - values[minus]
        part = weights[number] * difference
        if kind == "trim":
            sizes = bits_of(difference)
            kept = (sizes > bits[number]) | ((sizes == bits[number]) & (place < left[number]))
            part = xp.where(kept, part, 0)
        elif kind == "draw":
            part = xp.where(next(remaining), part, 0)
        parts.append(part)
    change = sum(parts) if shape.election is None else _elected(xp, parts, weights, shape.election)
    anchor = scale * values[shape.anchor]
    return xp.where(change == 0, anchor, anchor + change)


def _elected(xp: Any, parts: Sequence[Any], weights: Any, election: str) -> Any:
    positive = sum(parts) >= 0
    agreeing = [xp.where(positive, part > 0, part < 0) for part in parts]
    total = sum(xp.where(agrees, part, 0) for agrees, part in zip(agreeing, parts, strict=True))
    if election == "sum":
        return total
    divisor = sum(xp.where(agrees, weights[number], 0) for number, agrees in enumerate(agreeing))
    return total / xp.where(divisor == 0, 1, divisor)


def _padded(values: Array, entries: int) -> Array:
    """The values with zeros behind them, if there are fewer."""
    if values.size == entries:
        return values
    result = np.zeros(entries, values.dtype)
    result[: values.size] = values
    return result
