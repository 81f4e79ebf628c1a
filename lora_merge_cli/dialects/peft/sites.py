"""Adapted layers of an adapter, matched with the base's tensors: the sites of a merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.config import AdapterConfig
from lora_merge_cli.dialects.peft.experts import Wrapped, expert_sites
from lora_merge_cli.dialects.peft.keys import Keys, Layer, Role
from lora_merge_cli.dialects.peft.layers import Fit, Orientations, fit_bias, fit_layer, missing_factor, sizes_of
from lora_merge_cli.dialects.peft.names import Names
from lora_merge_cli.dialects.peft.patterns import rank_of, scale_of
from lora_merge_cli.dialects.torch_model import GROUP, short_name
from lora_merge_cli.dialects.torch_names import dotted, nearest_names
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import LoraMergeError, Refused, ShapeMismatch, UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import AdapterSite, KeyPath, LowRank, Scale, first_names

_ADD, _DORA = "add_delta", "dora"
_PACKED = "in_proj_weight"
"""The weight of ``nn.MultiheadAttention`` itself; its output projection is a linear layer inside it."""


@dataclass
class Found:
    """The sites, and why there cannot be more."""

    sites: list[AdapterSite] = field(default_factory=list)
    """Every site whose factors and weight fit."""
    problems: list[Exception] = field(default_factory=list)
    """Why no merge can be right."""
    missing: list[Layer] = field(default_factory=list)
    """Layers that the base does not have."""
    warnings: list[str] = field(default_factory=list)
    """What should make a reader stop."""


@dataclass(frozen=True)
class _Context:
    """What the layers of an adapter have in common."""

    config: AdapterConfig
    raw: Mapping[str, Any]
    base: Tree
    names: Names
    shapes: Mapping[KeyPath, tuple[int, ...]]
    orientations: Orientations
    where: str


def wanted_names(keys: Keys, base: Tree) -> Iterator[str]:
    """The names of every tensor that the adapter's keys may be about."""
    packed = any(dotted(path).endswith(_PACKED) for path in base.index.tensors)
    for layer in keys.layers.values():
        yield f"{layer.module}.weight"
        if "bias" in layer.tensors:
            yield f"{layer.module}.bias"
        if packed:
            yield f"{layer.module}.{_PACKED}"
    yield from keys.whole
    for module in keys.rows:
        yield f"{module}.weight"


def find_sites(
    keys: Keys,
    config: AdapterConfig,
    adapter: Tree,
    base: Tree,
    names: Names,
    shapes: Mapping[KeyPath, tuple[int, ...]],
) -> Found:
    """The sites of every layer with factors.

    Args:
        keys: The adapter's keys.
        config: Its configuration.
        adapter: The adapter.
        base: The checkpoint.
        names: Where its tensors are, new ones included.
        shapes: The shapes of leaves that are replaced or created before factors are added.
    """
    context = _Context(
        config,
        adapter.config or {},
        base,
        names,
        shapes,
        Orientations(config, base.config, _linear_shapes(keys, names, shapes)),
        adapter.where,
    )
    found = Found()
    for layer in keys.layers.values():
        for site in _sites(context, layer):
            if isinstance(site, AdapterSite):
                found.sites.append(site)
            elif isinstance(site, Exception):
                found.problems.append(site)
            else:
                found.missing.append(site)
    if found.missing:
        found.problems.insert(0, without_weight([layer.module for layer in found.missing], base, adapter.where))
    found.problems.extend(claimed_twice(found.sites, adapter.where))
    return found


def layer_problems(keys: Keys, config: AdapterConfig, where: str) -> Iterator[Exception]:
    """What is wrong with the layers whatever the base: factors alone, ranks that contradict the configuration, DoRA by halves."""
    for layer in keys.layers.values():
        tensors = [spec for found in layer.nested.values() for spec in found.values()]
        integers = [spec.name for spec in tensors if not is_float(spec.dtype)]
        if integers:
            yield UnsupportedCheckpoint("factors that are not floating-point", where=f"{where} :: {integers[0]}")
        for found in layer.nested.values():
            problem = missing_factor(layer, found, where)
            if problem is not None:
                yield problem
    yield from _dora_problems(keys, config, where)
    yield from _bias_problems(keys, config, where)


def pattern_name(layer: Layer, config: AdapterConfig) -> str:
    """The name that patterns for rank and alpha are compared with."""
    name = f"{layer.module}.weight"
    targeted = any(name == target or name.endswith(f".{target}") for target in config.target_parameters)
    return name if targeted else layer.owner


def layer_scale(layer: Layer, config: AdapterConfig, rank: int) -> Scale:
    """What a layer's low-rank product is multiplied by."""
    scale = scale_of(config, pattern_name(layer, config), rank)
    if not layer.inner or scale.value is None:
        return scale
    source = f"twice {scale.source}: peft's MultiheadAttention applies its output projection's delta two times"
    return Scale(2 * scale.value, source)


def _linear_shapes(
    keys: Keys, names: Names, shapes: Mapping[KeyPath, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    for layer in keys.layers.values():
        path, sizes = names.path(f"{layer.module}.weight"), sizes_of(layer.tensors)
        shape = None if path is None else shapes.get(path) or names.shape(path)
        if shape is not None and sizes is not None and len(shape) == 2 and not layer.inner:
            yield layer.module, (shape[0], shape[1]), sizes


def _sites(context: _Context, layer: Layer) -> Iterator[AdapterSite | Exception | Layer]:
    """The layer's sites, or its problems; the layer itself if the base does not have it."""
    if any(missing_factor(layer, tensors, context.where) for tensors in layer.nested.values()):
        return
    packed = context.names.path(f"{layer.module}.{_PACKED}")
    target = context.names.path(f"{layer.module}.weight") or packed
    if _stacks_experts(context, layer, target):
        yield from _expert_sites(context, layer)
    elif target is None or set(layer.nested) != {0}:
        yield layer
    elif (packed is not None or layer.inner) and {"magnitude", "bias"} & set(layer.tensors):
        yield UnsupportedCheckpoint(
            "DoRA, or a bias of lora_B, on nn.MultiheadAttention", where=f"{context.where} :: {layer.module}"
        )
    else:
        yield from _layer_sites(context, layer, target, packed=target == packed)


def _layer_sites(
    context: _Context, layer: Layer, target: KeyPath, *, packed: bool
) -> Iterator[AdapterSite | Exception]:
    """The site of a layer's weight, and the one of its bias if that is adapted; or the problem."""
    name = pattern_name(layer, context.config)
    shape = context.shapes.get(target) or context.names.shape(target) or ()
    stored = context.base.index.tensors.get(target)
    # A linear layer may be a Conv1D; a parameter, or a part of an attention block, may not.
    either = not packed and name == layer.module
    fit = fit_layer(layer, dotted(target), shape, context.orientations if either else None, context.where)
    if isinstance(fit, LoraMergeError):
        yield fit
        return
    problem = _wrong_rank(context.config, name, fit.rank, layer.module, context.where)
    if problem is not None:
        yield problem
    elif stored is not None and not is_float(stored.dtype):
        yield UnsupportedCheckpoint(
            "an adapter on a weight that is not floating-point",
            where=f"{context.base.where} :: {stored.name}",
            found=stored.dtype.name,
            hint="merge into the checkpoint that it was quantised from",
        )
    else:
        scale = layer_scale(layer, context.config, fit.rank)
        yield _site(layer, target, fit, scale)
        if "bias" in layer.tensors:
            yield _bias_site(context, layer, scale)


def _site(layer: Layer, target: KeyPath, fit: Fit, scale: Scale) -> AdapterSite:
    return AdapterSite(
        targets=(target,),
        operation=_DORA if "magnitude" in fit.factors else _ADD,
        factors=fit.factors,
        parameters=LowRank(fit.rank, scale, Equation(fit.equation)),
        forward=fit.forward,
        group=GROUP,
        module=layer.module.rsplit(".", maxsplit=1)[-1],
        label=short_name(dotted(target)),
    )


def _bias_site(context: _Context, layer: Layer, scale: Scale) -> AdapterSite | Exception:
    target = context.names.path(f"{layer.module}.bias")
    if target is None:
        return UnmatchedAdapter(
            "a bias of lora_B for a layer without one",
            where=f"{context.where} :: {layer.tensors['bias'].name}",
            expected=f"{layer.module}.bias in {context.base.where}",
        )
    fit = fit_bias(layer, context.base.index.tensors[target], context.where)
    return fit if isinstance(fit, LoraMergeError) else _site(layer, target, fit, scale)


def _stacks_experts(context: _Context, layer: Layer, target: KeyPath | None) -> bool:
    """Whether the factors may be those of parameters that hold several experts."""
    if "lora_a" not in layer.tensors:
        return False
    if target is not None and set(layer.nested) == {0}:
        return len(context.names.shape(target) or ()) == 3 and len(layer.tensors["lora_a"].shape) == 2
    parents = {name.rpartition(".")[0] for name in context.config.target_parameters} - {""}
    named = any(layer.module == parent or layer.module.endswith(f".{parent}") for parent in parents)
    return named or layer.module.rsplit(".", maxsplit=1)[-1] == "experts" or len(layer.nested) > 1


def _expert_sites(context: _Context, layer: Layer) -> Iterator[AdapterSite | Exception]:
    here = f"{context.where} :: {layer.module}"
    extra: set[Role] = {role for tensors in layer.nested.values() for role in tensors} - {"lora_a", "lora_b"}
    if extra or context.config.dora:
        yield UnsupportedCheckpoint("DoRA, or a bias of lora_B, on parameters of experts", where=here)
        return
    wrapped = [Wrapped(depth, tensors["lora_a"], tensors["lora_b"]) for depth, tensors in layer.nested.items()]
    targets = expert_sites(layer.module, wrapped, context.base, context.raw)
    if isinstance(targets, Refused):
        yield targets
        return
    for found in targets:
        parameter = f"{layer.module}.{found.parameter}"
        problem = _wrong_rank(context.config, parameter, found.rank, parameter, context.where)
        if problem is not None:
            yield problem
            continue
        yield AdapterSite(
            targets=(found.target,),
            operation=_ADD,
            factors={"lora_a": found.lora_a, "lora_b": found.lora_b},
            parameters=LowRank(found.rank, scale_of(context.config, parameter, found.rank), Equation(found.equation)),
            forward=found.forward,
            group=GROUP,
            module=found.parameter.rsplit(".", maxsplit=1)[-1],
            label=short_name(dotted(found.target)),
        )


def _wrong_rank(config: AdapterConfig, name: str, rank: int, shown: str, where: str) -> Exception | None:
    stated = rank_of(config, name)
    if stated is None or stated == rank:
        return None
    return ShapeMismatch(
        "factors of another rank than the configuration states",
        where=f"{where} :: {shown}",
        expected=f"rank {stated}",
        found=f"rank {rank}",
        hint="see that adapter_config.json belongs to these weights",
    )


def _dora_problems(keys: Keys, config: AdapterConfig, where: str) -> Iterator[Exception]:
    with_it = [layer.module for layer in keys.layers.values() if "magnitude" in layer.tensors]
    without = [layer.module for layer in keys.layers.values() if "magnitude" not in layer.tensors]
    if config.dora is False and with_it:
        yield UnmatchedAdapter(
            "DoRA's magnitudes in an adapter whose configuration says use_dora false",
            where=f"{where} :: {first_names(with_it, 3)}",
        )
    elif without and (config.dora or with_it):
        yield UnmatchedAdapter(
            "a DoRA adapter with layers that have no magnitudes",
            where=f"{where} :: {first_names(without, 3)}",
            expected="lora_magnitude_vector for each",
        )


def _bias_problems(keys: Keys, config: AdapterConfig, where: str) -> Iterator[Exception]:
    with_it = [layer.module for layer in keys.layers.values() if "bias" in layer.tensors]
    without = [
        layer.module
        for layer in keys.layers.values()
        if any("lora_b" in tensors and "bias" not in tensors for tensors in layer.nested.values())
    ]
    if config.lora_bias is False and with_it:
        yield UnmatchedAdapter(
            "biases of lora_B in an adapter whose configuration says lora_bias false",
            where=f"{where} :: {first_names(with_it, 3)}",
        )
    elif config.lora_bias and without:
        yield UnmatchedAdapter(
            "a layer whose lora_B lacks the bias that lora_bias announces",
            where=f"{where} :: {first_names(without, 3)}",
        )
    if with_it and any("magnitude" in layer.tensors for layer in keys.layers.values()):
        yield UnsupportedCheckpoint("DoRA with a bias of lora_B", where=f"{where} :: {with_it[0]}")


def without_weight(missing: Sequence[str], base: Tree, where: str) -> UnmatchedAdapter:
    """The refusal of modules that the base does not have."""
    nearest = nearest_names(f"{missing[0]}.weight", base)
    return UnmatchedAdapter(
        "factors without a weight in the base",
        where=f"{where} :: {first_names(missing, 3)}",
        expected=f"{missing[0]}.weight in {base.where}",
        found=f"nearest {', '.join(nearest)}" if nearest else None,
        hint="see that the base is the one that the adapter was trained on",
    )


def claimed_twice(sites: Sequence[AdapterSite], where: str) -> Iterator[Exception]:
    """The refusals of leaves that two sites of one adapter are on."""
    seen: set[KeyPath] = set()
    for site in sites:
        for target in site.targets:
            if target in seen:
                yield UnmatchedAdapter("two layers of the adapter for one weight", where=f"{where} :: {dotted(target)}")
            seen.add(target)


def mirrored(site: AdapterSite, target: KeyPath) -> AdapterSite:
    """The same change of another leaf."""
    return dataclasses.replace(site, targets=(target,), label=short_name(dotted(target)))
