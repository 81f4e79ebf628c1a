"""The document of an adapter that was taken out of a checkpoint: ``adapter_config.json``, written and read.

``adapter_config.json`` holds what a merge would otherwise have to find out from the fine-tune: for each site its kernel, its
factors, its equation and its scale; the leaves that were trained in full; and the dtypes of those that are the base's, where the
fine-tune keeps them in others. Key paths are lists of texts and numbers, compared with the base's by what the model's own dialect
calls them, so that a base may be spelled otherwise than the fine-tune was.

`detached_config` writes the document and `read_detached` reads it back.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dialects.interface import Dialect, Tree
from lora_merge_cli.dialects.nnx import Nnx
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import (
    CorruptCheckpoint,
    UnmatchedAdapter,
    UnsupportedCheckpoint,
)
from lora_merge_cli.records import (
    AdapterSite,
    Factor,
    Forward,
    KeyPath,
    LowRank,
    Replacement,
    Scale,
    display,
    first_names,
)

FORMAT = "lora-merge adapter"
VERSION = 1
TRAINED = "trained in full"
"""Why a whole leaf is in such an adapter."""

MODELS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (OpenPI(), Nnx(), Plain())}
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
        model = MODELS.get(str(config["dialect"]))
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
