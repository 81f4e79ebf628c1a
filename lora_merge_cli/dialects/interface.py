"""What a dialect must know: how one trainer spells adapters, and what its checkpoints mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from lora_merge_cli.errors import UnknownScale
from lora_merge_cli.records import AdapterSite, AdapterSummary, Depth, Index, KeyPath, ModelSummary, Survey

Group = Literal["adapter", "lora", "frozen", "trained"]
"""What a fine-tune did to a leaf: an adapter's factor, a kernel under one, left as it was, or trained in full."""


@dataclass(frozen=True)
class ScaleOptions:
    """What the user says about scales."""

    alpha: Mapping[str, float] = field(default_factory=dict)
    """LoRA alpha by site group; the key ``""`` holds the one for all others."""
    rslora: frozenset[str] = frozenset()
    """The site groups that use rank-stabilised scaling (arXiv:2312.03732); ``""`` means all."""

    def alpha_for(self, group: str) -> float | None:
        """The alpha stated for a group, or None."""
        return self.alpha.get(group, self.alpha.get(""))

    def rslora_for(self, group: str) -> bool:
        """Whether a group uses rank-stabilised scaling."""
        return group in self.rslora or "" in self.rslora


@dataclass(frozen=True)
class Tree:
    """What a dialect sees of a checkpoint or of an adapter."""

    index: Index
    """Its leaves."""
    where: str
    """Its path, for errors."""
    config: Mapping[str, Any] | None = None
    """The configuration beside it, ``config.json`` or ``adapter_config.json``; None if there is none."""


@dataclass(frozen=True)
class Subject:
    """What a merge is about."""

    checkpoint: Tree
    """What is merged into."""
    adapter: Tree | None = None
    """The adapter beside it; None where the adapters are inside the checkpoint."""
    residual_base: bool = False
    """Whether the user says that the checkpoint is the residual that the adapter's initialisation left."""


class Dialect(Protocol):
    """One trainer's conventions. Registered in `dialects.DIALECTS`."""

    @property
    def name(self) -> str:
        """The name that reports and errors use."""
        ...

    @property
    def groups(self) -> tuple[str, ...]:
        """The site groups that can have an alpha of their own."""
        ...

    @property
    def tells_frozen(self) -> bool:
        """Whether a checkpoint itself shows what its fine-tune froze, besides the kernels under adapters."""
        ...

    @property
    def serving_dtype(self) -> np.dtype[Any]:
        """What its servers cast a checkpoint to."""
        ...

    def matches(self, tree: Tree) -> bool:
        """Whether a checkpoint, or an adapter beside one, has keys or a configuration that only this trainer writes."""
        ...

    def survey(self, subject: Subject, options: ScaleOptions) -> Survey:
        """Find the sites and claim every adapter key exactly once.

        Args:
            subject: The checkpoint, and the adapter if that is beside it.
            options: What the user says about scales.
        """
        ...

    def unknown_scale(self, sites: Sequence[AdapterSite], where: str) -> UnknownScale:
        """The refusal for sites whose scale nothing states: it names the flag that does."""
        ...

    def summary(self, tree: Tree) -> ModelSummary:
        """Which model the checkpoint is of."""
        ...

    def grouping(self, index: Index, sites: tuple[AdapterSite, ...]) -> Mapping[KeyPath, Group]:
        """What the fine-tune did to each leaf."""
        ...

    def part(self, path: KeyPath) -> str:
        """The part of the model that a leaf belongs to, for tables."""
        ...

    def depths(self, index: Index) -> Mapping[KeyPath, Depth]:
        """Where each leaf sits in a stack of layers; leaves that belong to none are not in it.

        A model may have several stacks, each with its own count. Whether adapters' factors are in it is not said.
        """
        ...

    def canonical(self, path: KeyPath) -> KeyPath:
        """The path without what differs between a trained checkpoint and its base."""
        ...

    def unservable(self, index: Index) -> str | None:
        """Why this trainer's own loader would not find the arrays under their paths; None if it would."""
        ...

    def fused_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """What ``--dtype auto`` stores a fused kernel in."""
        ...


class AdapterDialect(Dialect, Protocol):
    """A trainer whose adapters are files of their own, beside their base. Registered in `dialects.adapter_dialects`."""

    def of(self, adapter: Tree) -> AdapterDialect:
        """The dialect as it is for one adapter: some say in their own words what model they are of."""
        ...

    def describe(self, adapter: Tree, options: ScaleOptions) -> AdapterSummary:
        """What an adapter is by itself, without its base."""
        ...


_ADAPTER_WORD = re.compile(r"(?<![A-Za-z])(?:rs)?(?i:lora|dora)(?![a-z])")


def looks_like_adapter(path: KeyPath) -> bool:
    """Whether some part of the path is spelled like an adapter's: ``lora_a``, ``kernel_lora_b``, ``loraA``, ``dora_scale``."""
    return any(isinstance(part, str) and _ADAPTER_WORD.search(part) for part in path)
