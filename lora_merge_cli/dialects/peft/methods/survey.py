"""Adapted modules of another method than LoRA, matched with the base's tensors: the sites of a merge."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.layers import (
    BIAS,
    BIAS_FORWARD,
    CONV1D,
    CONV1D_FORWARD,
    EMBEDDING,
    EMBEDDING_FORWARD,
    Orientations,
)
from lora_merge_cli.dialects.peft.methods.fitting import incomplete
from lora_merge_cli.dialects.peft.methods.interface import Adapted, Fit, Method, MethodConfig, Sizes, Weight
from lora_merge_cli.dialects.peft.methods.keys import MethodKeys
from lora_merge_cli.dialects.peft.names import Names
from lora_merge_cli.dialects.peft.sites import Found, claimed_twice, without_weight
from lora_merge_cli.dialects.torch_model import GROUP, LINEAR, LINEAR_FORWARD, short_name
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import LoraMergeError, ShapeMismatch, UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import AdapterRow, AdapterSite, Forward, KeyPath, LowRank, first_names

_KERNEL_DIMS = "xyz"


@dataclass(frozen=True)
class _Context:
    """What the modules of an adapter have in common."""

    method: Method
    config: MethodConfig
    base: Tree
    names: Names
    shapes: Mapping[KeyPath, tuple[int, ...]]
    where: str
    layers: Mapping[str, Adapted]
    cautions: list[str] = field(default_factory=list)

    @functools.cached_property
    def orientations(self) -> Orientations:
        """Which square weights are stored (inputs, outputs)."""
        common = self.config.common
        if not (self.method.states_layout or common.transposed):
            common = replace(common, transposed=None)
        return Orientations(common, self.base.config, _linear_shapes(self))

    def shape(self, path: KeyPath) -> tuple[int, ...]:
        """The shape of a leaf, after what is replaced whole."""
        return self.shapes.get(path) or self.names.shape(path) or ()


def wanted_names(keys: MethodKeys) -> Iterator[str]:
    """The names of tensors that the adapter's keys may be about, besides those that `sites.wanted_names` gives."""
    for module in (*keys.layers, *keys.tuned):
        yield from (f"{module}.weight", f"{module}.bias")


def find_sites(
    method: Method,
    keys: MethodKeys,
    config: MethodConfig,
    base: Tree,
    names: Names,
    shapes: Mapping[KeyPath, tuple[int, ...]],
    where: str,
) -> Found:
    """The sites of every module with factors, and what is lacking of modules that are replaced.

    Args:
        method: The method.
        keys: The adapter's keys.
        config: Its configuration.
        base: The checkpoint.
        names: Where its tensors are, new ones included.
        shapes: The shapes of leaves that are replaced or created before factors change them.
        where: The adapter, for errors.
    """
    context = _Context(method, config, base, names, shapes, where, keys.layers)
    found, missing = Found(), list[str]()
    for layer in keys.layers.values():
        target = names.path(f"{layer.module}.weight")
        if incomplete(layer, method.complete, method.title, where) is not None:
            continue
        if target is None:
            missing.append(layer.module)
            continue
        for site in _sites(context, layer, target):
            (found.sites if isinstance(site, AdapterSite) else found.problems).append(site)  # type: ignore[arg-type]
    if missing:
        found.problems.insert(0, without_weight(missing, base, where))
    found.warnings += dict.fromkeys(context.cautions)
    found.problems += [*_halves(keys, names, where), *claimed_twice(found.sites, where)]
    return found


def rows(method: Method, keys: MethodKeys, where: str) -> Iterator[AdapterRow]:
    """Every adapted module as the adapter alone describes it: outputs and inputs are 0 where the factors do not show them."""
    for layer in keys.layers.values():
        if incomplete(layer, method.complete, method.title, where) is None:
            outline = method.outline(layer)
            outputs, inputs = outline.sizes
            yield AdapterRow(layer.module, outline.rank, outline.scale, (outputs or 0, inputs or 0))


def _sites(context: _Context, layer: Adapted, target: KeyPath) -> Iterator[AdapterSite | LoraMergeError]:
    """The site of a module's weight, and the one of its bias if that changes too; or the problem."""
    here = f"{context.where} :: {layer.module}"
    stored = context.base.index.tensors.get(target)
    weight = _weight(context, layer, context.shape(target), here)
    fit = weight if isinstance(weight, LoraMergeError) else context.method.fit(layer, weight, here)
    if isinstance(weight, LoraMergeError) or isinstance(fit, LoraMergeError):
        yield fit if isinstance(fit, LoraMergeError) else weight  # type: ignore[misc]
    elif stored is not None and not is_float(stored.dtype):
        yield UnsupportedCheckpoint(
            "an adapter on a weight that is not floating-point",
            where=f"{context.base.where} :: {stored.name}",
            found=stored.dtype.name,
            hint="merge into the checkpoint that it was quantised from",
        )
    else:
        context.cautions.extend(filter(None, [fit.caution]))
        yield _site(context, layer, target, fit, weight.layout, weight.forward)
        bias = context.names.path(f"{layer.module}.bias") if fit.scales_bias else None
        if bias is not None:
            yield _bias_site(context, layer, bias, weight, fit)


def _weight(context: _Context, layer: Adapted, shape: tuple[int, ...], where: str) -> Weight | LoraMergeError:
    """How the weight of a module is stored."""
    method = context.method
    if len(shape) not in method.axes or 0 in shape:
        return UnsupportedCheckpoint(
            f"{method.title} on a weight of {len(shape)} dimensions: not supported",
            where=where,
            expected=" or ".join(map(str, sorted(method.axes))),
            found=shape,
        )
    if len(shape) > 2:
        k = _KERNEL_DIMS[: len(shape) - 2]
        forward = Forward(f"bti{k},oi{k}->bto", f"bti{k},ri{k}->btr", "btr,or->bto")
        return Weight("convolution", shape, f"ri{k},or->oi{k}", forward)
    if _is_embedding(layer):
        return Weight("embedding", shape, EMBEDDING, EMBEDDING_FORWARD)
    return _matrix(context, layer, shape, where)


def _matrix(context: _Context, layer: Adapted, shape: tuple[int, ...], where: str) -> Weight | LoraMergeError:
    """How a linear layer's weight is stored."""
    method = context.method
    sizes = method.outline(layer).sizes
    straight, turned = _agrees(shape, sizes), _agrees(shape[::-1], sizes)
    if straight and turned and (shape[0] == shape[1] or not method.turnable):
        verdict = context.orientations.transposed(layer.module, where)
        if method.turnable and isinstance(verdict, LoraMergeError):
            return verdict
        straight = verdict is False
    if straight:
        return Weight("linear", shape, LINEAR, LINEAR_FORWARD)
    if turned and method.turnable:
        return Weight("Conv1D", shape, CONV1D, CONV1D_FORWARD)
    if turned:
        return UnsupportedCheckpoint(
            f"{method.title} on a weight that is stored (inputs, outputs), or may be: peft does not have it for those",
            where=where,
            found=shape,
        )
    return ShapeMismatch(
        "the factors do not fit the weight",
        where=where,
        expected=f"{sizes[0] or 'any'} outputs and {sizes[1] or 'any'} inputs",
        found=f"a weight {shape}",
        hint="see that the base is the one that the adapter was trained on",
    )


def _is_embedding(layer: Adapted) -> bool:
    return any(role.startswith("embedding") for role in layer.tensors)


def _agrees(shape: tuple[int, ...], sizes: Sizes) -> bool:
    return all(size in (None, extent) for size, extent in zip(sizes, shape, strict=True))


def _linear_shapes(context: _Context) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """For each module of two dimensions its weight's shape, and outputs and inputs; these are equal where nothing shows which."""
    for layer in context.layers.values():
        path = context.names.path(f"{layer.module}.weight")
        shape = () if path is None else context.shape(path)
        if len(shape) != 2 or _is_embedding(layer) or incomplete(layer, context.method.complete, "", "") is not None:
            continue
        sizes = context.method.outline(layer).sizes
        straight, turned = _agrees(shape, sizes), _agrees(shape[::-1], sizes)
        shown = (0, 0) if straight == turned else (shape[0], shape[1]) if straight else (shape[1], shape[0])
        yield layer.module, (shape[0], shape[1]), shown


def _bias_site(
    context: _Context, layer: Adapted, bias: KeyPath, weight: Weight, fit: Fit
) -> AdapterSite | LoraMergeError:
    shape = context.shape(bias)
    stored = context.base.index.tensors.get(bias)
    if shape != (weight.outputs,) or (stored is not None and not is_float(stored.dtype)):
        return ShapeMismatch(
            "the factors do not fit the layer's bias",
            where=f"{context.where} :: {layer.module}",
            expected=(weight.outputs,),
            found=shape,
        )
    return _site(context, layer, bias, fit, BIAS, BIAS_FORWARD)


def _site(context: _Context, layer: Adapted, target: KeyPath, fit: Fit, layout: str, forward: Forward) -> AdapterSite:
    outline = context.method.outline(layer)
    return AdapterSite(
        targets=(target,),
        operation=fit.operation,
        factors=fit.factors,
        parameters=LowRank(fit.rank or outline.rank, outline.scale, Equation(layout)),
        forward=forward,
        group=GROUP,
        module=layer.module.rsplit(".", maxsplit=1)[-1],
        label=short_name(dotted(target)),
        settings=fit.settings,
    )


def _halves(keys: MethodKeys, names: Names, where: str) -> Iterator[Exception]:
    """Modules whose values the adapter replaces in part."""
    lost = [
        f"{module}.{leaf}"
        for module, leaves in keys.tuned.items()
        for leaf in ("weight", "bias")
        if leaf not in leaves and names.path(f"{module}.{leaf}") is not None
    ]
    if lost:
        yield UnmatchedAdapter(
            "modules that were trained whole and are not whole in the adapter",
            where=f"{where} :: {first_names(lost, 3)}",
        )
