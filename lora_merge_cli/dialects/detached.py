"""Adapters taken out of a checkpoint, for any tree: tensors under exact key paths, and a JSON file that says what each of them is.

``adapter_config.json`` holds what a merge would otherwise have to find out from the fine-tune: for each site its kernel, its
factors, its equation and its scale; the leaves that were trained in full; and the dtypes of those that are the base's, where the
fine-tune keeps them in others. Key paths are lists of texts and numbers, compared with the base's by what the model's own dialect
calls them, so that a base may be spelled otherwise than the fine-tune was.

`detached_config` writes the document and `read_detached` reads it back.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dialects.interface import Dialect, Group, ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.nnx import Nnx
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.dtypes import dtype_named, is_float
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import (
    CorruptCheckpoint,
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
    Factor,
    Forward,
    Index,
    KeyPath,
    LowRank,
    ModelSummary,
    Replacement,
    Scale,
    Survey,
    TensorSpec,
    display,
    first_names,
)

FORMAT = "lora-merge adapter"
VERSION = 1
TRAINED = "trained in full"
"""Why a whole leaf is in such an adapter."""

_MODELS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (OpenPI(), Nnx(), Plain())}
_OPERATIONS = frozenset({"add_delta"})
_FACTORS = frozenset({"lora_a", "lora_b"})
_STEP = re.compile(r"([a-z]+),([a-z]+)->([a-z]+)")


@dataclass(frozen=True)
class Document:
    """What such an adapter says of itself. Paths of leaves are the fine-tune's."""

    model: Dialect
    """The conventions of the model that it is of."""
    sites: tuple[AdapterSite, ...]
    """Its sites; `Factor.path` is a key of its own tensors."""
    replacements: tuple[Replacement, ...]
    """What it brings whole; `Replacement.path` is a key of its own tensors."""
    dtypes: Mapping[KeyPath, np.dtype[Any]]
    """What the fine-tune keeps leaves in, for those that its base keeps in another dtype."""
    base: Mapping[str, str] | None = None
    """The base's path and fingerprint, if one was given."""
    left_out: int = 0
    """How many leaves the fine-tune trained in full that the adapter does not hold."""


def detached_config(document: Document, **said: Any) -> dict[str, Any]:
    """The contents of ``adapter_config.json``.

    Args:
        document: What the adapter is.
        said: What else to tell a reader.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "dialect": document.model.name,
        "base": None if document.base is None else dict(document.base),
        "left_out": document.left_out,
        **said,
        "sites": [_site_item(site) for site in document.sites],
        "replacements": [
            {"target": list(found.target), "key": list(found.path), "reason": found.reason}
            for found in document.replacements
        ],
        "dtypes": [{"leaf": list(path), "dtype": dtype.name} for path, dtype in document.dtypes.items()],
    }


def is_detached(config: Mapping[str, Any] | None) -> bool:
    """Whether an adapter's configuration is one of these."""
    return config is not None and config.get("format") == FORMAT


def read_detached(adapter: Tree) -> Document:
    """What an adapter's configuration says, compared with the tensors beside it.

    Raises:
        CorruptCheckpoint: It is not what `detached_config` makes, or names a tensor that is not there.
        UnsupportedCheckpoint: It is of a later version, or of a model or an operation that is not known.
        ShapeMismatch: The factors of a site do not fit its equation.
        UnmatchedAdapter: A tensor is named by nothing.
    """
    config = adapter.config or {}
    if config.get("version") != VERSION:
        raise UnsupportedCheckpoint(
            "an adapter of another version of its format",
            where=adapter.where,
            expected=VERSION,
            found=config.get("version"),
            hint="use the version of lora-merge that wrote it, or a later one",
        )
    try:
        model = _MODELS.get(str(config["dialect"]))
        sites = tuple(_site(item) for item in config["sites"])
        replacements = tuple(_replacement(item) for item in config["replacements"])
        dtypes = {_path(item["leaf"]): dtype_named(item["dtype"]) for item in config["dtypes"]}
        base = None if config.get("base") is None else {key: _text(value) for key, value in config["base"].items()}
        left_out = _count(config.get("left_out", 0))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise CorruptCheckpoint(
            "an adapter's configuration that lora-merge did not write", where=adapter.where, found=repr(error)
        ) from error
    unknown = sorted({site.operation for site in sites} - _OPERATIONS)
    if model is None or unknown:
        raise UnsupportedCheckpoint(
            "an adapter of a model or an operation that this version does not know",
            where=adapter.where,
            found=unknown[0] if model is not None else config["dialect"],
        )
    document = Document(model, sites, replacements, dtypes, base, left_out)
    _refuse_unclaimed(document, adapter)
    return document


class Detached:
    """Adapters as `lora-merge extract` writes them for trees that PEFT does not know.

    Args:
        model: The conventions of the model that one adapter is of; see `of`.
    """

    name = "lora-merge"

    def __init__(self, model: Dialect = _MODELS[OpenPI.name]) -> None:
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
        return Detached(_MODELS.get(str((adapter.config or {}).get("dialect")), self._model))

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


def _refuse_unclaimed(document: Document, adapter: Tree) -> None:
    tensors = adapter.index.tensors
    claimed = [factor.path for site in document.sites for factor in site.factors.values()]
    claimed += [found.path for found in document.replacements]
    lost = [display(path) for path in claimed if path not in tensors]
    if lost:
        raise CorruptCheckpoint(
            "tensors that the adapter's configuration names and that are not there",
            where=f"{adapter.where} :: {first_names(lost, 3)}",
        )
    strangers = [display(path) for path in tensors if path not in set(claimed)]
    if strangers:
        raise UnmatchedAdapter(
            "tensors that the adapter's configuration does not name",
            where=f"{adapter.where} :: {first_names(strangers, 3)}",
            hint="see that adapter_config.json belongs to these tensors",
        )
    targets = [site.targets[0] for site in document.sites] + [found.target for found in document.replacements]
    names = [document.model.canonical(path) for path in targets]
    twice = [display(name) for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UnmatchedAdapter("a leaf that two parts of the adapter change", where=f"{adapter.where} :: {twice[0]}")


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


def _site_item(site: AdapterSite) -> dict[str, Any]:
    scale, forward = site.parameters.scale, site.forward
    return {
        "target": list(site.targets[0]),
        "factors": {role: _factor_item(factor) for role, factor in sorted(site.factors.items())},
        "operation": site.operation,
        "equation": str(site.parameters.equation),
        "rank": site.parameters.rank,
        "scale": {"value": scale.value, "source": scale.source, "assumed": scale.assumed},
        "forward": {"base": forward.base, "down": forward.down, "up": forward.up},
        "group": site.group,
        "module": site.module,
        "label": site.label,
    }


def _factor_item(factor: Factor) -> dict[str, Any]:
    at = [[part.start, part.stop] if isinstance(part, slice) else part for part in factor.at]
    item: dict[str, Any] = {"key": list(factor.path)}
    if factor.shape is not None:
        item["shape"] = list(factor.shape)
    return {**item, "at": at} if at else item


def _site(item: Mapping[str, Any]) -> AdapterSite:
    factors = {str(role): _factor(found) for role, found in item["factors"].items()}
    if factors.keys() != _FACTORS:
        raise ValueError(f"a site with {', '.join(sorted(factors))}")
    value = float(item["scale"]["value"])
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is no scale")
    scale = Scale(value, _text(item["scale"]["source"]), bool(item["scale"]["assumed"]))
    equation = _equation(item["equation"])
    return AdapterSite(
        targets=(_path(item["target"]),),
        operation=_text(item["operation"]),
        factors=factors,
        parameters=LowRank(_count(item["rank"]), scale, equation),
        forward=_forward(item["forward"], equation),
        group=_text(item["group"]),
        module=_text(item["module"]),
        label=_text(item["label"]),
    )


def _equation(text: Any) -> Equation:
    equation = Equation(_text(text))
    dims = (equation.a, equation.b, equation.target)
    batch, inputs, outputs = equation.batch, equation.inputs, equation.outputs
    known = (
        equation.target in (batch + inputs + outputs, batch + outputs + inputs)
        and set(equation.a) == set(batch + inputs + equation.rank)
        and set(equation.b) == set(batch + outputs + equation.rank + equation.summed)
    )
    if any(len(set(each)) < len(each) for each in dims) or len(equation.rank) != 1 or not known:
        raise ValueError(f"{text!r} is no equation of two factors")
    return equation


def _forward(item: Mapping[str, Any], equation: Equation) -> Forward:
    """The steps of one layer, which a judge runs: each takes what the one before gives, and a kernel or factor of the equation."""
    forward = Forward(*(_text(item[name]) for name in ("base", "down", "up")))
    layer = equation.of_one_layer
    steps = [_STEP.fullmatch(text) for text in (forward.base, forward.down, forward.up)]
    if None in steps:
        raise ValueError(f"{forward} are no einsums of two operands")
    (x, kernel, y), (also_x, a, t), (also_t, b, also_y) = (step.groups() for step in steps if step is not None)
    fits = (x, t, y) == (also_x, also_t, also_y) and set(kernel) == set(layer.target) and set(a) == set(layer.a)
    if not fits or len(b) != len(layer.b) or any(len(set(part)) < len(part) for part in (x, kernel, y, t, b)):
        raise ValueError(f"{forward} is not what a layer of {equation} computes")
    return forward


def _factor(item: Mapping[str, Any]) -> Factor:
    shape = item.get("shape")
    at = tuple(slice(*map(_count, part)) if isinstance(part, list) else _count(part) for part in item.get("at", ()))
    return Factor(_path(item["key"]), None if shape is None else tuple(map(_count, shape)), at)


def _replacement(item: Mapping[str, Any]) -> Replacement:
    return Replacement(_path(item["target"]), _path(item["key"]), _text(item["reason"]))


def _path(parts: Any) -> KeyPath:
    if not (isinstance(parts, list) and parts and all(type(part) in (str, int) for part in parts)):
        raise TypeError(f"{parts!r} is no key path")
    return tuple(parts)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value
