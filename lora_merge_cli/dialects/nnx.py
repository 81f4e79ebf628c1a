"""Flax NNX: adapters made of `nnx.LoRALinear`, or of `nnx.LoRA` around a linear layer, saved with the model in one tree.

Both compute ``x @ lora_a @ lora_b`` beside the layer's own output: there is no alpha, and the scale is 1. A `LoRALinear` at X has
``X/kernel`` (in, out), ``X/lora/lora_a`` (in, rank) and ``X/lora/lora_b`` (rank, out); a `LoRA` at X has ``X/base_module/kernel``,
``X/lora_a`` and ``X/lora_b``. Layers made by `nnx.vmap` have one more axis in front of all three. A state that is saved as it is,
and not as a pure dict, has ``value`` at the end of every path.

A `LoRALinear` may have an inner ``lora`` that wraps a layer of its own: it computes ``x @ kernel + x @ base_module.kernel +
x @ lora_a @ lora_b``. No layer without factors has both kernels, so that it is refused.

Source: google/flax, ``flax/nnx/nn/lora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dialects.depths import STACKS, along_first_axis, numbered, parts_of
from lora_merge_cli.dialects.interface import Group, ScaleOptions, Subject, Tree, looks_like_adapter
from lora_merge_cli.dtypes import BFLOAT16
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import LoraMergeError, ShapeMismatch, UnknownScale, UnmatchedAdapter, UsageError
from lora_merge_cli.records import (
    AdapterSite,
    Depth,
    Dropped,
    Factor,
    Forward,
    Index,
    KeyPath,
    LowRank,
    ModelSummary,
    Scale,
    Survey,
    TensorSpec,
    display,
    first_names,
)

SCALE = Scale(1.0, "NNX's LoRA has no alpha")

GROUP = "model"
"""The group of every site."""

_FACTORS = ("lora_a", "lora_b")
_EQUATIONS = (Equation("ir,ro->io"), Equation("lir,lro->lio"))
_FORWARD = Forward("bti,io->bto", "bti,ir->btr", "btr,ro->bto")

_OPTIMISER_PARTS = frozenset({"opt_state", "optimizer", "optimizer_state", "mu", "nu", "trace"})


@dataclass(frozen=True)
class _Module:
    """A module that holds factors."""

    path: KeyPath
    """Its path, without what ends a leaf's."""
    suffix: KeyPath
    """``("value",)`` where the leaves' paths end so, else nothing."""


class Nnx:
    """Flax NNX's spellings and rules."""

    name = "nnx"
    groups: tuple[str, ...] = ()
    serving_dtype = BFLOAT16
    tells_frozen = False

    def matches(self, tree: Tree) -> bool:
        """See `Dialect.matches`: some module holds `lora_a` or `lora_b` as NNX's classes do, and nothing is OpenPI's."""
        paths = tree.index.tensors
        if any("PaliGemma" in path for path in paths):
            return False
        modules = {_module(path) for path in paths if _is_factor(path) and not _is_optimiser_leaf(path)}
        return any("_einsum" not in display(module.path[-1:]) or _inner_kernel(module) in paths for module in modules)

    def survey(self, subject: Subject, options: ScaleOptions) -> Survey:
        """See `Dialect.survey`."""
        index, where = subject.checkpoint.index, subject.checkpoint.where
        claimed: dict[_Module, dict[str, TensorSpec]] = {}
        dropped: list[Dropped] = []
        strangers: list[KeyPath] = []
        wrapped: list[KeyPath] = []
        for path, spec in index.tensors.items():
            if not looks_like_adapter(path):
                continue
            if _is_wrapped(path):
                wrapped.append(path)
            elif _is_optimiser_leaf(path):
                dropped.append(Dropped(path, "optimiser state of an adapter that is merged"))
            elif _is_factor(path):
                claimed.setdefault(_module(path), {})[_leaf(path)] = spec
            else:
                strangers.append(path)
        problems = [*_misused(options), *_unclaimed(strangers, where), *_inseparable(index, wrapped, where)]
        sites: dict[KeyPath, AdapterSite] = {}
        for module, factors in claimed.items():
            found = _site(index, module, factors, where)
            if not isinstance(found, AdapterSite):
                problems.append(found)
            elif sites.setdefault(found.targets[0], found) is not found:
                problems.append(UnmatchedAdapter("a kernel with two adapters", where=f"{where} :: {found.name}"))
        return Survey(tuple(sites.values()), tuple(dropped), tuple(problems), _notes(list(sites.values())))

    def unknown_scale(self, sites: Sequence[AdapterSite], where: str) -> UnknownScale:
        """See `Dialect.unknown_scale`: every scale is 1, so that no site should get here."""
        return UnknownScale("a site without a scale", where=f"{where} :: {sites[0].name}", expected=SCALE.source)

    def summary(self, tree: Tree) -> ModelSummary:  # noqa: ARG002  (a tree does not name its model)
        """See `Dialect.summary`."""
        return ModelSummary("unknown", ("load the merged checkpoint into the model without its LoRA layers",))

    def grouping(self, index: Index, sites: tuple[AdapterSite, ...]) -> Mapping[KeyPath, Group]:
        """See `Dialect.grouping`: what no adapter is on was left as it was."""
        under = {target for site in sites for target in site.targets}
        return {
            path: "lora" if path in under else "adapter" if looks_like_adapter(path) else "frozen"
            for path in index.tensors
        }

    def part(self, path: KeyPath) -> str:
        """See `Dialect.part`: the first part of the path."""
        if _is_optimiser_leaf(path):
            return "optimiser state"
        names = self.canonical(path)
        return str(names[0]) if len(names) > 1 else "other"

    def depths(self, index: Index) -> Mapping[KeyPath, Depth]:
        """See `Dialect.depths`: by the numbers in the names, and along the first axis beside stacked kernels under adapters.

        The stack of such a kernel is the outermost module above it that is called as one; where none is, it is the kernel's layer
        alone, with its bias.
        """
        return _stacked(index, self.survey(Subject(Tree(index, "")), ScaleOptions()).sites) | numbered(
            {path: _layer_parts(self.canonical(path)) for path in index.tensors if not looks_like_adapter(path)}
        )

    def canonical(self, path: KeyPath) -> KeyPath:
        """See `Dialect.canonical`: without the root key ``params`` and the suffix ``value`` of a state."""
        if path[:1] == ("params",) and len(path) > 1:
            path = path[1:]
        return path[:-1] if len(path) > 1 and path[-1] == "value" else path

    def unservable(self, index: Index) -> str | None:
        """See `Dialect.unservable`: a state has ``value`` at the end of all paths, a pure dict at that of none."""
        suffixed = sum(path[-1:] == ("value",) for path in index.tensors)
        if suffixed not in (0, len(index.tensors)):
            return f"paths of an NNX state end in value all or none: {suffixed} of {len(index.tensors)} do"
        return None

    def fused_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """See `Dialect.fused_dtype`: the model's own, which its code expects."""
        return stored


def _suffix(path: KeyPath) -> KeyPath:
    return ("value",) if len(path) > 1 and path[-1] == "value" else ()


def _leaf(path: KeyPath) -> str:
    return str(path[len(path) - len(_suffix(path)) - 1])


def _is_factor(path: KeyPath) -> bool:
    return _leaf(path) in _FACTORS


def _is_wrapped(path: KeyPath) -> bool:
    """Whether the leaf is a wrapped layer's own: what follows the last part that is spelled like an adapter's is `base_module`."""
    return path[len(_wrapper(path)) :][:1] == ("base_module",)


def _wrapper(path: KeyPath) -> KeyPath:
    """The path up to the last part that is spelled like an adapter's."""
    return path[: max((place + 1 for place, part in enumerate(path) if looks_like_adapter((part,))), default=0)]


def _module(path: KeyPath) -> _Module:
    suffix = _suffix(path)
    return _Module(path[: len(path) - len(suffix) - 1], suffix)


def _is_optimiser_leaf(path: KeyPath) -> bool:
    return any(part in _OPTIMISER_PARTS for part in path[:-1])


def _inner_kernel(module: _Module) -> KeyPath:
    return (*module.path, "base_module", "kernel", *module.suffix)


def _kernel(index: Index, module: _Module) -> KeyPath | None:
    """The kernel that the module's factors are added to; None if there is none."""
    inner = _inner_kernel(module)
    outer = (*module.path[:-1], "kernel", *module.suffix)
    if inner in index.tensors:
        return inner
    return outer if module.path[-1:] == ("lora",) and outer in index.tensors else None


def _site(index: Index, module: _Module, factors: Mapping[str, TensorSpec], where: str) -> AdapterSite | LoraMergeError:
    shown = f"{where} :: {display(module.path)}"
    if len(factors) < len(_FACTORS):
        present = next(iter(factors))
        other = "lora_b" if present == "lora_a" else "lora_a"
        return UnmatchedAdapter(f"a factor without its {other}", where=f"{shown}/{present}")
    target = _kernel(index, module)
    if target is None:
        return UnmatchedAdapter(
            "factors without a kernel: a LoRA layer by itself cannot be merged into anything",
            where=shown,
            expected=f"{display((*module.path, 'base_module', 'kernel'))}, or {display((*module.path[:-1], 'kernel'))} of a LoRALinear",
        )
    a, b, kernel = factors["lora_a"], factors["lora_b"], index.tensors[target]
    fitting = [
        (equation, sizes)
        for equation in _EQUATIONS
        if (sizes := equation.sizes(a.shape, b.shape, kernel.shape)) is not None and 0 not in sizes.values()
    ]
    if not fitting:
        return ShapeMismatch(
            "the factors do not fit the kernel",
            where=shown,
            expected="lora_a (in, rank), lora_b (rank, out) and kernel (in, out), with or without one axis of layers in front",
            found=f"lora_a {a.shape}, lora_b {b.shape} and kernel {kernel.shape}",
        )
    equation, sizes = fitting[0]
    layer = target[: len(target) - len(module.suffix) - 1]
    layer = layer[:-1] if layer[-1:] == ("base_module",) else layer
    label = layer[1:] if layer[:1] == ("params",) else layer
    return AdapterSite(
        targets=(target,),
        operation="add_delta",
        factors={role: Factor(spec.path) for role, spec in sorted(factors.items())},
        parameters=LowRank(sizes[equation.rank], SCALE, equation),
        forward=_FORWARD,
        group=GROUP,
        module=next((str(part) for part in reversed(label) if not str(part).isdigit()), GROUP),
        label=display(label) or GROUP,
    )


def _stacked(index: Index, sites: Sequence[AdapterSite]) -> dict[KeyPath, Depth]:
    kernels: dict[KeyPath, list[TensorSpec]] = {}
    for site in sites:
        if site.parameters.equation.stacked:
            kernels.setdefault(_stack(site.targets[0]), []).append(index.tensors[site.targets[0]])
    leaves: dict[KeyPath, list[TensorSpec]] = {stack: [] for stack in kernels}
    for path, spec in index.tensors.items():
        stack = next((path[:end] for end in range(len(path)) if path[:end] in leaves), None)
        if stack is not None:
            leaves[stack].append(spec)
    depths: dict[KeyPath, Depth] = {}
    for stack, below in leaves.items():
        depths |= along_first_axis(below, kernels[stack])
    return depths


def _stack(kernel: KeyPath) -> KeyPath:
    """The module whose leaves stack layers as that kernel does."""
    layer = _module(kernel).path
    named = (at + 1 for at, part in enumerate(layer) if part in STACKS)
    return layer[: next(named, len(layer))]


def _layer_parts(path: KeyPath) -> tuple[str, ...]:
    """The parts of a path as the model without adapters has it."""
    return parts_of(tuple(part for part in path if part != "base_module"))


def _misused(options: ScaleOptions) -> list[Exception]:
    return [
        UsageError(
            f"{flag} is not for NNX: its LoRA layers have no alpha",
            hint=f"leave {flag} out; --scale multiplies the delta",
        )
        for flag, given in (("--lora-alpha", options.alpha), ("--rslora", options.rslora))
        if given
    ]


def _unclaimed(strangers: Sequence[KeyPath], where: str) -> list[Exception]:
    if not strangers:
        return []
    return [
        UnmatchedAdapter(
            "keys that look like an adapter's and fit no rule of NNX's",
            where=f"{where} :: {first_names(map(display, strangers))}",
            expected="<layer>/lora/lora_a beside <layer>/kernel, or <layer>/lora_a beside <layer>/base_module",
        )
    ]


def _inseparable(index: Index, wrapped: Sequence[KeyPath], where: str) -> list[Exception]:
    """Wrapped layers that a model without factors cannot hold under their names."""
    if not wrapped:
        return []
    summed = [path for path in wrapped if _is_summed(index, path)]
    if summed:
        return [
            UnmatchedAdapter(
                "a LoRALinear whose lora wraps a layer of its own: no layer without factors adds up two kernels",
                where=f"{where} :: {first_names(map(display, summed))}",
                expected="factors alone under lora, or a LoRA around the only kernel",
                hint="add the wrapped layer's kernel and bias to those beside lora, and save without lora_base_module",
            )
        ]
    return [
        UnmatchedAdapter(
            "a wrapped layer below a module that is spelled like an adapter: after the merge it would be taken for one",
            where=f"{where} :: {first_names(map(display, wrapped))}",
            expected="lora in the names of adapters alone",
            hint="rename the module",
        )
    ]


def _is_summed(index: Index, path: KeyPath) -> bool:
    wrapper = _wrapper(path)
    return wrapper[-1:] == ("lora",) and (*wrapper[:-1], "kernel", *_suffix(path)) in index.tensors


def _notes(sites: Sequence[AdapterSite]) -> tuple[str, ...]:
    wrapped = sum("base_module" in site.targets[0] for site in sites)
    if not wrapped:
        return ()
    return (
        f"{wrapped} kernels keep base_module in their paths, as nnx.LoRA stores them: a model without it needs them renamed",
    )
