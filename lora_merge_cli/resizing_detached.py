"""An adapter of `dialects.detached` with smaller ranks: any tree, with stacked layers, heads and gates.

A site's delta is one matrix per index of its batch dims, and one tensor holds them all: they share a rank. To a share of the
energy it is the least by which all of them together keep it, from their singular values pooled: the i-th of the pool is the root
of the sum of the squares of every matrix's i-th. Each matrix keeps its own best approximation of that rank.

Where the model sums lora_b over heads by itself, the new one has the whole in the first head and zeros in the others. So the
equation, the shapes and the einsums stay those of the trainer: the model could load the factors, and what a verification runs is
not rewritten by what it judges. The zeros are exact; they cost bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dialects import ScaleOptions, Tree
from lora_merge_cli.dialects.detached import Detached
from lora_merge_cli.dialects.detached_document import read_detached
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import ShapeMismatch, Unrepresentable, UnsupportedCheckpoint
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.lowrank import delta_singular_values, factor_matrices
from lora_merge_cli.records import AdapterSite, Array, KeyPath, TensorSpec, display, first_names
from lora_merge_cli.resize_report import ResizedRecord
from lora_merge_cli.resizing_factors import ResizedAdapter, Wanted, distance, padded, read_factor, stored
from lora_merge_cli.truncation import smallest_rank, truncate_product


@dataclass(frozen=True)
class _Site:
    """A site with its factors' places."""

    site: AdapterSite
    a: TensorSpec
    b: TensorSpec
    extents: Mapping[str, int]
    """Of each dim of its equation."""

    @property
    def equation(self) -> Equation:
        return self.site.parameters.equation

    @property
    def rank(self) -> int:
        return self.site.parameters.rank

    @property
    def scale(self) -> float:
        value = self.site.parameters.scale.value
        assert value is not None, "the format states every scale"
        return value

    def shape(self, dims: str) -> tuple[int, ...]:
        """The extents of some dims."""
        return tuple(self.extents[dim] for dim in dims)

    def matrices(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Factors of all matrices, unscaled float64: (matrices, inputs, rank) and (matrices, rank, outputs)."""
        return factor_matrices(self.equation, a, b)


@dataclass(frozen=True)
class _Resized:
    """What became of a site."""

    factors: Mapping[KeyPath, Array]
    """Its tensors that are not copied as they are."""
    record: ResizedRecord


def resize_detached(tree: Tree, dialect: Detached, checkpoint: Checkpoint, wanted: Wanted) -> ResizedAdapter:
    """An adapter of lora-merge's own truncated, each site at one rank for all of its matrices.

    Args:
        tree: The adapter.
        dialect: What knows it.
        checkpoint: The same, to read from.
        wanted: The rank or the share of the energy, and the dtype.

    Raises:
        InputError: The configuration is damaged, or a factor cannot be read, or is not finite.
        Refused: There is nothing to resize, or the adapter contradicts itself.
    """
    document = read_detached(tree)
    sites = [_placed(site, tree) for site in document.sites]
    if not sites:
        raise UnsupportedCheckpoint("an adapter without low-rank factors: nothing to resize", where=tree.where)
    _refuse_shared(sites, [found.path for found in document.replacements], tree)
    resized = [_resize(site, checkpoint, wanted) for site in sites]
    cut = [site for site, found in zip(sites, resized, strict=True) if found.record.rank_after < site.rank]
    return ResizedAdapter(
        dialect.describe(tree, ScaleOptions()),
        _new_config(tree, sites, [found.record.rank_after for found in resized]),
        {path: values for found in resized for path, values in found.factors.items()},
        {path: path for path in checkpoint.source.index().tensors},
        tuple(spec for site in sites for spec in (site.a, site.b)),
        tuple(found.record for found in resized),
        tuple(_notes(cut)),
    )


def _placed(site: AdapterSite, tree: Tree) -> _Site:
    """A site whose factors fit its equation."""
    where, equation = f"{tree.where} :: {site.name}", site.parameters.equation
    factors = [site.factors[role] for role in ("lora_a", "lora_b")]
    a, b = (tree.index.tensors[factor.path] for factor in factors)
    if any(factor.shape is not None or factor.at for factor in factors):
        raise UnsupportedCheckpoint(
            "factors that are parts of tensors: resizing them is not supported", where=where, expected="whole tensors"
        )
    extents: dict[str, int] = {equation.rank: site.parameters.rank}
    pairs = list(zip(equation.a + equation.b, a.shape + b.shape, strict=False))
    fits = (len(a.shape), len(b.shape)) == (len(equation.a), len(equation.b))
    fits = fits and all(extents.setdefault(dim, extent) == extent > 0 for dim, extent in pairs)
    if not fits or set(equation.a) != set(equation.batch + equation.inputs + equation.rank):
        raise ShapeMismatch(
            "the factors do not fit their equation",
            where=where,
            expected=f"shapes as in {equation}, rank {site.parameters.rank}",
            found=f"lora_a {a.shape} and lora_b {b.shape}",
        )
    odd = [spec for spec in (a, b) if not is_float(spec.dtype)]
    if odd:
        raise UnsupportedCheckpoint(
            "a factor that is not floating-point", where=f"{tree.where} :: {odd[0].name}", found=odd[0].dtype.name
        )
    return _Site(site, a, b, extents)


def _refuse_shared(sites: Sequence[_Site], replacements: Sequence[KeyPath], tree: Tree) -> None:
    uses = Counter([spec.path for site in sites for spec in (site.a, site.b)] + list(replacements))
    shared = [display(path) for path, count in uses.items() if count > 1]
    if shared:
        raise UnsupportedCheckpoint(
            "a tensor that two parts of the adapter share: resizing it is not supported",
            where=f"{tree.where} :: {first_names(shared, 3)}",
        )


def _resize(site: _Site, checkpoint: Checkpoint, wanted: Wanted) -> _Resized:
    a, b = read_factor(checkpoint, site.a), read_factor(checkpoint, site.b)
    with np.errstate(over="ignore"):
        singular = abs(site.scale) * delta_singular_values(site.equation, a, b)
        pooled = np.sqrt(np.sum(np.square(singular), axis=0))
        norm = float(np.sqrt(np.sum(np.square(pooled))))
    if not math.isfinite(norm):
        raise Unrepresentable(
            "a delta beyond float64's range",
            where=f"{checkpoint.source.path} :: {site.site.name}",
            found=f"scale {site.scale}",
        )
    if wanted.rank is None:
        assert wanted.energy is not None, "one of the two is given"
        rank = smallest_rank(pooled, wanted.energy)
    else:
        rank = min(wanted.rank, len(pooled)) if norm else 1
    if wanted.keeps(rank, site.rank):
        return _kept(site, a, b, norm, checkpoint, wanted)
    kept = 1 - float(np.sum(np.square(pooled[rank:] / norm))) if norm else 1.0
    return _cut(site, a, b, rank, _record(site, rank, norm, kept, wanted), checkpoint, wanted)


def _kept(site: _Site, a: Array, b: Array, norm: float, checkpoint: Checkpoint, wanted: Wanted) -> _Resized:
    """A site whose factors stay as they are, or are widened."""
    pairs = ((site.a, a), (site.b, b)) if wanted.dtype != "keep" else ()
    widened = {spec.path: stored(values, spec, checkpoint, wanted) for spec, values in pairs}
    record = _record(site, site.rank, norm, 1.0, wanted)
    return _Resized(widened, dataclasses.replace(record, relative_error=0.0 if norm else None))


def _cut(
    site: _Site, a: Array, b: Array, rank: int, record: ResizedRecord, checkpoint: Checkpoint, wanted: Wanted
) -> _Resized:
    """A site whose matrices are truncated to one rank."""
    left, right = site.matrices(a, b)
    left *= site.scale
    # What is beyond float32 is refused where it is stored.
    with np.errstate(over="ignore"):
        cuts = [padded(truncate_product(*pair, rank=rank), rank) for pair in zip(left, right, strict=True)]
    new_a = _arranged(site, np.stack([cut.left for cut in cuts]), site.equation.inputs, rank, site.equation.a)
    new_b = _arranged(site, np.stack([cut.right for cut in cuts]), site.equation.outputs, rank, site.equation.b)
    factors = {
        site.a.path: stored(new_a, site.a, checkpoint, wanted),
        site.b.path: stored(new_b, site.b, checkpoint, wanted),
    }
    new_left, new_right = site.matrices(factors[site.a.path], factors[site.b.path])
    pairs = zip(zip(left, right, strict=True), zip(new_left, new_right, strict=True), strict=True)
    error = math.hypot(*(distance(old, new) for old, new in pairs))
    return _Resized(factors, dataclasses.replace(record, relative_error=error / record.norm if record.norm else None))


def _arranged(site: _Site, values: Array, own: str, rank: int, dims: str) -> Array:
    """A factor as its equation has it.

    Args:
        site: Whose it is.
        values: (matrices, own, rank), or (matrices, rank, own).
        own: Its inputs or outputs.
        rank: The new rank.
        dims: Its dims, among them those that the model sums over: their first index has it all, and the others are zero.
    """
    equation = site.equation
    sides = own + equation.rank if own == equation.inputs else equation.rank + own
    made = equation.batch + sides
    extents = {**site.extents, equation.rank: rank}
    whole = values.reshape([extents[dim] for dim in made])
    kept = [dim for dim in dims if dim in made]
    placed = np.zeros([extents[dim] for dim in dims], values.dtype)
    placed[tuple(slice(None) if dim in made else 0 for dim in dims)] = whole.transpose(
        [made.index(dim) for dim in kept]
    )
    return placed


def _record(site: _Site, rank: int, norm: float, energy_kept: float, wanted: Wanted) -> ResizedRecord:
    return ResizedRecord(
        module=site.site.name,
        shape=(math.prod(site.shape(site.equation.outputs)), math.prod(site.shape(site.equation.inputs))),
        scale=site.scale,
        rank_before=site.rank,
        rank_after=rank,
        dtype_before=site.b.dtype.name,
        dtype_after=wanted.dtype_of(site.b).name,
        norm=norm,
        energy_kept=energy_kept,
        relative_error=None,
        matrices=math.prod(site.shape(site.equation.batch)),
    )


def _new_config(tree: Tree, sites: Sequence[_Site], ranks: Sequence[int]) -> dict[str, Any]:
    """The adapter's own configuration, but for the ranks and scales of the sites that were cut."""
    document: dict[str, Any] = copy.deepcopy(dict(tree.config or {}))
    for item, site, rank in zip(document["sites"], sites, ranks, strict=True):
        if rank < site.rank:
            old = site.site.parameters.scale
            source = f"resized: the scale {site.scale:g} ({old.source}) is in the factors"
            item["rank"] = rank
            # What rests on an assumption still does.
            item["scale"] = {**item["scale"], "value": 1.0, "source": source}
    return document


def _notes(cut: Sequence[_Site]) -> Iterator[str]:
    """What a reader should know of the sites that were cut."""
    assumed = [site.site for site in cut if site.site.parameters.scale.assumed]
    if assumed:
        yield (
            f"{len(assumed)} scales that were assumed, not stated, are in the new factors for good "
            f"({first_names((site.label for site in assumed), 3)}: {assumed[0].parameters.scale.source})"
        )
    summed = [site.site.label for site in cut if site.equation.summed]
    if summed:
        yield (
            f"the model sums lora_b over heads by itself in {len(summed)} modules ({first_names(summed, 3)}): "
            "the new one is all in the first head, and zero in the others"
        )
