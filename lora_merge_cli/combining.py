"""How several adapters on one kernel become one change: the sum of their deltas, or one of PEFT's combinations.

Source of the methods and of their names: huggingface/peft, ``src/peft/tuners/lora/model.py`` (``add_weighted_adapter``) and
``src/peft/utils/merge_utils.py``. TIES: arXiv:2306.01708; DARE: arXiv:2311.03099. `operations.combine` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from lora_merge_cli.errors import ConflictingAdapters, LoraMergeError, UnsupportedCheckpoint, UsageError
from lora_merge_cli.records import AdapterSite, KeyPath, display

MajoritySign: TypeAlias = Literal["total", "frequency"]
"""Whose sign an entry takes: that of the sum of all adapters' values, or that of most of them."""

_SVD = "_svd"
_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = ("sum", "linear", "cat", "svd", *_PRUNING, *(f"{name}{_SVD}" for name in _PRUNING))
"""The methods: ``sum``, which is exact, and what PEFT calls ``combination_type``."""

_ADDITIVE = "add_delta"


@dataclass(frozen=True)
class Combining:
    """How several adapters on one kernel become one change."""

    method: str = "sum"
    """One of `METHODS`."""
    density: float | None = None
    """The share of entries that pruning keeps, of each tensor; None where nothing is pruned."""
    seed: int = 0
    """What random pruning draws from, see `draws`."""
    svd_rank: int | None = None
    """The rank that a combination is truncated to; None for the largest rank of all adapters."""
    majority_sign: MajoritySign = "total"
    """How the sign of an entry is elected."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: An unknown method, a value out of range, one that the method has no use for, or no density where it prunes.
        """
        if self.method not in METHODS:
            raise UsageError("--combine has no such value", expected=", ".join(METHODS), found=self.method)
        if self.majority_sign not in get_args(MajoritySign):
            expected = ", ".join(get_args(MajoritySign))
            raise UsageError("--majority-sign has no such value", expected=expected, found=self.majority_sign)
        if self.prunes and self.density is None:
            raise UsageError(
                f"--combine {self.method} prunes, and nothing says how much",
                hint="pass --density, the share of entries to keep, as in --density 0.5",
            )
        if self.density is not None and not self.prunes:
            raise UsageError(f"--density is for what prunes, and --combine {self.method} does not", hint="leave it out")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError("--density lies outside (0, 1]", found=f"{self.density:g}")
        if self.svd_rank is not None and not self.is_svd:
            raise UsageError(
                f"--svd-rank is for svd and the _svd methods, and not for --combine {self.method}", hint="leave it out"
            )
        if self.svd_rank is not None and self.svd_rank < 1:
            raise UsageError("--svd-rank must be at least 1", found=self.svd_rank)
        if self.majority_sign != "total" and not self.elects:
            raise UsageError(
                f"--majority-sign is for what elects signs, and --combine {self.method} does not", hint="leave it out"
            )

    @property
    def is_sum(self) -> bool:
        """Whether it is the exact sum of the deltas, each with its weight."""
        return self.method == "sum"

    @property
    def is_svd(self) -> bool:
        """Whether a change is truncated to some rank."""
        return self.method.endswith("svd")

    @property
    def operator(self) -> str:
        """The method without its ``_svd``: what is done to tensors, whether they are factors or deltas."""
        return self.method.removesuffix(_SVD)

    @property
    def prunes(self) -> bool:
        """Whether it keeps a share of the entries alone."""
        return self.operator in _PRUNING

    @property
    def draws(self) -> bool:
        """Whether that share is drawn at random, each kept entry divided by the density."""
        return self.operator.startswith("dare")

    @property
    def elects(self) -> bool:
        """Whether an entry is made of the adapters with the elected sign alone."""
        return self.operator.endswith("ties")

    @property
    def crosses(self) -> bool:
        """Whether lora_a and lora_b are combined each by itself, so that one adapter's B meets another's A."""
        return self.method == "linear" or (self.prunes and not self.is_svd)

    def of(self, adapters: int, sites: Iterable[AdapterSite]) -> Combining:
        """What it comes to in one merge: what `operations.combine` and the judge take.

        PEFT does nothing to an adapter alone, which is its sum. Its rank after an SVD is one for all kernels.

        Args:
            adapters: How many adapters are merged, not how many of them are on some kernel: where one of several is on a kernel
                alone, pruning prunes it all the same.
            sites: Those of all adapters.
        """
        if adapters < 2:
            return Combining()
        if self.is_svd and self.svd_rank is None:
            return replace(self, svd_rank=max((site.parameters.rank for site in sites), default=None))
        return self


def refuse_uncombinable(combining: Combining, paths: Sequence[object], sites: Sequence[AdapterSite]) -> None:
    """Refuse sites that have no meaning under a method; ``sum`` takes all.

    Args:
        combining: The method as the user asks for it.
        paths: Where each adapter was read from, by its number.
        sites: All sites of the merge.

    Raises:
        UsageError: The adapters are inside the checkpoint: there is one, and nothing to combine.
        UnsupportedCheckpoint: A site is no plain low-rank product, is on a bias, or takes a part of a tensor that is to be pruned.
        ConflictingAdapters: Adapters of several ranks, where a method combines their factors entry by entry.
    """
    if combining.is_sum:
        return
    for site in sites:
        if site.adapter is None:
            raise UsageError(
                f"--combine {combining.method} is for adapters beside the checkpoint, and these are inside",
                hint="leave it out",
            )
        _refuse_site(combining, site, f"{paths[site.adapter]} :: {site.name}")
    if combining.crosses:
        _refuse_ranks(combining, paths, sites)


def _refuse_site(combining: Combining, site: AdapterSite, where: str) -> None:
    hint = "merge without --combine, or leave it out with --exclude"
    if site.operation != _ADDITIVE:
        raise UnsupportedCheckpoint(
            f"--combine {combining.method} of an adapter that is no plain low-rank product",
            where=where,
            expected="LoRA",
            found=site.operation,
            hint=hint,
        )
    if "lora_a" not in site.factors:
        raise UnsupportedCheckpoint(
            f"--combine {combining.method} of a trained bias, which PEFT does not combine", where=where, hint=hint
        )
    if combining.prunes and combining.is_svd and set(site.parameters.equation.batch) - {"l"}:
        raise UnsupportedCheckpoint(
            f"--combine {combining.method} of kernels with a matrix per head or expert",
            where=where,
            found=str(site.parameters.equation),
            hint=f"use {combining.operator} or svd, or merge without --combine",
        )
    if combining.prunes and any(factor.at for factor in site.factors.values()):
        raise UnsupportedCheckpoint(
            f"--combine {combining.method} prunes whole tensors, and this kernel has a part of one",
            where=where,
            hint=hint,
        )


def _refuse_ranks(combining: Combining, paths: Sequence[object], sites: Sequence[AdapterSite]) -> None:
    """PEFT compares the largest rank of each adapter; where patterns set others, the factors of one kernel must still fit."""
    largest: dict[int, int] = {}
    kernels: dict[KeyPath, AdapterSite] = {}
    for site in sites:
        assert site.adapter is not None, "adapters inside a checkpoint were refused"
        largest[site.adapter] = max(largest.get(site.adapter, 0), site.parameters.rank)
        other = kernels.setdefault(site.targets[0], site)
        if other.parameters.rank != site.parameters.rank:
            assert other.adapter is not None, "adapters inside a checkpoint were refused"
            ranks = {other.adapter: other.parameters.rank, site.adapter: site.parameters.rank}
            raise _several_ranks(combining, display(site.targets[0]), paths, ranks)
    if len(set(largest.values())) > 1:
        raise _several_ranks(combining, None, paths, largest)


def _several_ranks(
    combining: Combining, where: str | None, paths: Sequence[object], ranks: Mapping[int, int]
) -> LoraMergeError:
    return ConflictingAdapters(
        f"--combine {combining.method} needs one rank for all adapters",
        where=where,
        found=", ".join(f"rank {rank} in {paths[adapter]}" for adapter, rank in sorted(ranks.items())),
        hint="use cat or svd, or merge without --combine",
    )
