"""What a method of PEFT's must say about itself: how its keys and its configuration are spelled, how its tensors fit a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from lora_merge_cli.dialects.peft.config import AdapterConfig, Fields
from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.records import Factor, Forward, Scale, Setting, TensorSpec

Kind = Literal["linear", "Conv1D", "convolution", "embedding"]
"""How a weight is stored: (outputs, inputs), (inputs, outputs) as Transformers' ``Conv1D``, (outputs, inputs, kernel...), or
(vocabulary, width)."""

Sizes = tuple[int | None, int | None]
"""Outputs and inputs; None for what the factors do not show."""


@dataclass(frozen=True)
class MethodConfig:
    """What an adapter's configuration says."""

    common: AdapterConfig
    """What all methods have: rank, alpha, patterns, what rides along."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """What this one has, by PEFT's names."""


@dataclass(frozen=True)
class Adapted:
    """A module with factors."""

    module: str
    """Its path in the live model."""
    tensors: Mapping[str, TensorSpec]
    """Its tensors by role; those that all modules share are among them."""
    config: MethodConfig
    """What the adapter's configuration says."""

    def shape(self, role: str) -> tuple[int, ...]:
        """The shape of a tensor; empty if there is none."""
        return self.tensors[role].shape if role in self.tensors else ()

    def factors(self, roles: Iterable[str] | None = None) -> dict[str, Factor]:
        """Tensors as they are stored; all of them if none are named."""
        return {role: Factor(self.tensors[role].path) for role in (self.tensors if roles is None else roles)}


@dataclass(frozen=True)
class Weight:
    """The weight that a module's factors change."""

    kind: Kind
    """How it is stored."""
    shape: tuple[int, ...]
    """Its shape, or that of what the adapter brings instead of it."""
    layout: str
    """Which of its dims are inputs and which are outputs, as the equation of a low-rank update."""
    forward: Forward
    """What the layer and such an update compute."""

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return self.shape[0] if self.kind in ("linear", "convolution") else self.shape[1]

    @property
    def inputs(self) -> int:
        """The number of inputs; a convolution's, of each group, together with its kernel's axes."""
        return math.prod(self.shape[1:]) if self.kind in ("linear", "convolution") else self.shape[0]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's axes of a convolution; empty for other layers."""
        return self.shape[2:]


@dataclass(frozen=True)
class Outline:
    """What the factors of a module show by themselves."""

    rank: int
    """The rank, or the extent of a block."""
    scale: Scale
    """Every constant factor of the change."""
    sizes: Sizes
    """Outputs and inputs; of a convolution under some methods, together with its kernel's axes."""


@dataclass(frozen=True)
class Fit:
    """How a module's factors change its weight."""

    operation: str
    """The name of the operation."""
    factors: Mapping[str, Factor]
    """What it takes, by role."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """What else it needs to know."""
    rank: int | None = None
    """The rank of the change where it is not the outline's."""
    scales_bias: bool = False
    """Whether the same factors change the layer's bias too."""
    caution: str | None = None
    """What should make a reader stop."""


class Method(Protocol):
    """One of PEFT's methods. Registered in `methods.METHODS`."""

    peft_types: tuple[str, ...]
    """``peft_type`` in the configuration."""
    title: str
    """Its name for people."""
    suffixes: ClassVar[Mapping[str, str]]
    """The role of each tensor of a module, by the end of its key: ``oft_R.weight`` is an ``r``."""
    complete: tuple[frozenset[str], ...]
    """The sets of roles, shared ones included, that make a whole; a module has one of them."""
    shared: ClassVar[Mapping[str, str]] = {}
    """The role of each tensor that all modules share, by its name."""
    unsupported: ClassVar[Mapping[str, str]] = {}
    """What tensors of a kind of layer that cannot be merged are, by the end of their keys."""
    replaces: bool = False
    """Whether what its suffixes name are values instead of the module's own, and not factors."""
    axes: frozenset[int] = frozenset({2})
    """How many axes a weight may have."""
    turnable: bool = False
    """Whether PEFT has it for Transformers' ``Conv1D``, whose weight is (inputs, outputs)."""
    integers: frozenset[str] = frozenset()
    """Roles that may be integers."""
    states_layout: bool = True
    """Whether PEFT corrects ``fan_in_fan_out`` to what the layer is: a false one of a method that does not says nothing."""
    rank: tuple[str, int] | None = None
    """The configuration's field that holds the rank, and PEFT's default."""
    alpha: tuple[str, float] | None = None
    """The field that holds alpha, and PEFT's default."""
    patterns: frozenset[str] = frozenset()
    """Which of ``rank_pattern`` and ``alpha_pattern`` it has, with the meaning that they have for LoRA."""
    biases: tuple[str, ...] = ()
    """What ``bias`` may hold besides ``none`` and ``all``; empty where there is no such field."""
    fields: frozenset[str] = frozenset()
    """Fields that `settings` reads."""
    harmless: frozenset[str] = frozenset()
    """Fields that change nothing about a merge, besides those that all methods have."""

    def settings(self, fields: Fields) -> Mapping[str, Any]:  # noqa: ARG002 - for those that have some
        """What the configuration says besides what all methods have, nothing by default; problems are collected in `fields`."""
        return {}

    def outline(self, layer: Adapted) -> Outline:
        """What a complete module's factors show by themselves; their shapes may be any."""
        ...

    def fit(self, layer: Adapted, weight: Weight, where: str) -> Fit | LoraMergeError:
        """How a complete module's factors change its weight, or why they do not fit.

        Args:
            layer: The module.
            weight: Its weight.
            where: The module in the adapter, for errors.
        """
        ...


def extent(shape: tuple[int, ...], axis: int) -> int:
    """The extent of an axis; 0 if there is no such axis."""
    return shape[axis] if -len(shape) <= axis < len(shape) else 0


def no_scale(title: str) -> Scale:
    """The scale of a method that has none."""
    return Scale(1.0, f"{title} has no scale")
