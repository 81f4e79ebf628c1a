"""Adapters taken out of a checkpoint, for any tree: tensors under exact key paths, and a JSON file that says what each of them is.

Key paths are compared with the base's by what the model's own dialect calls them, so that a base may be spelled otherwise than the
fine-tune was. What the configuration holds, `detached_document` says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_merge_cli.dialects.detached_document import MODELS, Document, is_detached, read_detached
from lora_merge_cli.dialects.interface import Dialect, Group, ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import (
    LoraMergeError,
    ShapeMismatch,
    UnknownScale,
    UnmatchedAdapter,
    UnsupportedCheckpoint,
    UsageError,
)
from lora_merge_cli.records import (
    AdapterRow,
    AdapterSite,
    AdapterSummary,
    Depth,
    Index,
    KeyPath,
    ModelSummary,
    Replacement,
    Survey,
    TensorSpec,
    display,
    first_names,
)


class Detached:
    """Adapters as `lora-merge extract` writes them for trees that PEFT does not know.

    Args:
        model: The conventions of the model that one adapter is of; see `of`.
    """

    name = "lora-merge"

    def __init__(self, model: Dialect = MODELS[OpenPI.name]) -> None:
        self._model = model

    @property
    def groups(self) -> tuple[str, ...]:
        """See `Dialect.groups`: every scale is stated."""
        return ()

    @property
    def tells_frozen(self) -> bool:
        """See `Dialect.tells_frozen`."""
        return self._model.tells_frozen

    @property
    def serving_dtype(self) -> np.dtype[Any]:
        """See `Dialect.serving_dtype`."""
        return self._model.serving_dtype

    def of(self, adapter: Tree) -> Detached:
        """See `AdapterDialect.of`: the model's conventions are those of the checkpoint that it was taken out of."""
        return Detached(MODELS.get(str((adapter.config or {}).get("dialect")), self._model))

    def matches(self, tree: Tree) -> bool:
        """See `Dialect.matches`."""
        return is_detached(tree.config)

    def survey(self, subject: Subject, options: ScaleOptions) -> Survey:
        """See `Dialect.survey`."""
        if subject.adapter is None:
            return Survey((), problems=(UsageError("no adapter is given", hint="name it with --adapter"),))
        adapter, base = subject.adapter, subject.checkpoint
        try:
            document = read_detached(adapter)
        except LoraMergeError as error:
            return Survey((), problems=(*_misused(options), error))
        placed = {document.model.canonical(path): path for path in base.index.tensors}
        sites: list[AdapterSite] = []
        problems: list[Exception] = [*_misused(options)]
        missing: list[AdapterSite] = []
        for site in document.sites:
            target = placed.get(document.model.canonical(site.targets[0]))
            if target is None:
                missing.append(site)
                continue
            problem = _unfit(site, adapter, base.index.tensors[target], base.where)
            if problem is None:
                sites.append(dataclasses.replace(site, targets=(target,)))
            else:
                problems.append(problem)
        if missing:
            problems.append(
                UnmatchedAdapter(
                    "factors without a kernel in the base",
                    where=f"{adapter.where} :: {first_names((site.name for site in missing), 3)}",
                    expected=f"{display(document.model.canonical(missing[0].targets[0]))} in {base.where}",
                    hint="give the base that the adapter's fine-tune started from",
                )
            )

        def place(path: KeyPath) -> KeyPath:
            name = document.model.canonical(path)
            return placed.get(name) or _respelled(name, base.index, document.model)

        kept = {place(path): dtype for path, dtype in document.dtypes.items()}
        return Survey(
            sites=tuple(sites),
            problems=tuple(problems),
            warnings=tuple(_left_out(document)),
            replacements=tuple(
                Replacement(place(found.target), found.path, found.reason) for found in document.replacements
            ),
            dtypes={path: dtype for path, dtype in kept.items() if path in base.index.tensors},
        )

    def describe(self, adapter: Tree, options: ScaleOptions) -> AdapterSummary:
        """See `AdapterDialect.describe`."""
        try:
            document = read_detached(adapter)
        except LoraMergeError as error:
            return AdapterSummary("LoRA", None, (), (), (*_misused(options), error))
        return AdapterSummary(
            "LoRA" if document.sites else "tensors brought whole",
            (document.base or {}).get("path"),
            tuple(
                AdapterRow(site.label, site.parameters.rank, site.parameters.scale, _matrix_shape(site, adapter.index))
                for site in document.sites
            ),
            tuple(f"{display(found.target)}: {found.reason}" for found in document.replacements),
            tuple(_misused(options)),
        )

    def unknown_scale(self, sites: Sequence[AdapterSite], where: str) -> UnknownScale:
        """See `Dialect.unknown_scale`: every scale is stated, so that no site should get here."""
        return UnknownScale("a site without a scale", where=f"{where} :: {sites[0].name}")

    def summary(self, tree: Tree) -> ModelSummary:
        """See `Dialect.summary`."""
        return self._model.summary(tree)

    def grouping(self, index: Index, sites: tuple[AdapterSite, ...]) -> Mapping[KeyPath, Group]:
        """See `Dialect.grouping`: the base is one that nothing was trained in."""
        under = {target for site in sites for target in site.targets}
        return {path: "lora" if path in under else "frozen" for path in index.tensors}

    def part(self, path: KeyPath) -> str:
        """See `Dialect.part`."""
        return self._model.part(path)

    def depths(self, index: Index) -> Mapping[KeyPath, Depth]:
        """See `Dialect.depths`."""
        return self._model.depths(index)

    def canonical(self, path: KeyPath) -> KeyPath:
        """See `Dialect.canonical`."""
        return self._model.canonical(path)

    def unservable(self, index: Index) -> str | None:
        """See `Dialect.unservable`."""
        return self._model.unservable(index)

    def fused_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """See `Dialect.fused_dtype`."""
        return self._model.fused_dtype(stored)


def _respelled(name: KeyPath, index: Index, model: Dialect) -> KeyPath:
    """A path that the base does not have, as it spells its own: with what it puts before and behind them."""
    for example in index.tensors:
        short = model.canonical(example)
        for start in range(len(example) - len(short) + 1):
            if example[start : start + len(short)] == short:
                return (*example[:start], *name, *example[start + len(short) :])
    return name


def _left_out(document: Document) -> Iterator[str]:
    if document.left_out:
        yield (
            f"the adapter was extracted without {document.left_out} leaves that the fine-tune trained in full: "
            "the result does not act as the fine-tune did"
        )


def _misused(options: ScaleOptions) -> Iterator[UsageError]:
    for flag, given in (("--lora-alpha", options.alpha), ("--rslora", options.rslora)):
        if given:
            yield UsageError(f"{flag} is not for an adapter that states its scales", hint=f"leave {flag} out")


def _unfit(site: AdapterSite, adapter: Tree, kernel: TensorSpec, base: str) -> LoraMergeError | None:
    tensors, equation = adapter.index.tensors, site.parameters.equation
    a, b = (site.factors[role].extents(tensors[site.factors[role].path].shape) for role in ("lora_a", "lora_b"))
    sizes = equation.sizes(a, b, kernel.shape)
    if sizes is None or 0 in sizes.values() or sizes.get(equation.rank) != site.parameters.rank:
        return ShapeMismatch(
            "the factors do not fit the kernel",
            where=f"{adapter.where} :: {site.name}",
            expected=f"shapes as in {equation}, rank {site.parameters.rank}",
            found=f"lora_a {a}, lora_b {b} and kernel {kernel.shape}",
        )
    if not is_float(kernel.dtype):
        return UnsupportedCheckpoint(
            "an adapter on a kernel that is not floating-point",
            where=f"{base} :: {kernel.name}",
            found=kernel.dtype.name,
            hint="merge into the checkpoint that it was quantised from",
        )
    return None


def _matrix_shape(site: AdapterSite, index: Index) -> tuple[int, int]:
    """Outputs and inputs of one matrix."""
    equation = site.parameters.equation
    extents: dict[str, int] = {}
    for role, dims in (("lora_a", equation.a), ("lora_b", equation.b)):
        factor = site.factors[role]
        extents |= dict(zip(dims, factor.extents(index.tensors[factor.path].shape), strict=False))
    outputs, inputs = (math.prod(extents.get(dim, 1) for dim in dims) for dims in (equation.outputs, equation.inputs))
    return outputs, inputs
