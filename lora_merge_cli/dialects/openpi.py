"""OpenPI: pi0, pi0.5 and pi0-FAST, fine-tuned with LoRA in JAX.

Two things decide whether a merge is right, and no shape shows either:

- ``attn_vec_einsum`` runs two einsums, ``BTNH,NHL->BTL`` and ``BTL,NLD->BTD``, and each sums over the heads by itself. Its
  delta is ``lora_a @ (sum over heads of lora_b)``, not the product per head.
- Attention multiplies its delta by ``alpha / rank`` (``alpha / sqrt(rank)`` with rsLoRA); the feed-forward multiplies by nothing.
  Neither alpha nor the rsLoRA flag is stored.

Source: Physical-Intelligence/openpi, ``src/openpi/models/lora.py`` and ``gemma.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dialects.depths import numbered, parts_of
from lora_merge_cli.dialects.interface import Group, ScaleOptions, Subject, Tree, looks_like_adapter
from lora_merge_cli.dialects.openpi_stacks import scanned
from lora_merge_cli.dtypes import BFLOAT16, FLOAT32
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import ShapeMismatch, UnknownScale, UnmatchedAdapter
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
    display,
    first_names,
)

PALIGEMMA, ACTION_EXPERT = "paligemma", "action_expert"

STOCK_ALPHA: Mapping[str, Mapping[int, float]] = {
    PALIGEMMA: {16: 16.0},
    ACTION_EXPERT: {32: 32.0},
}
"""Alpha by rank of the variants that OpenPI ships, ``gemma_2b_lora`` and ``gemma_300m_lora``."""

STOCK_VARIANT: Mapping[str, str] = {PALIGEMMA: "gemma_2b", ACTION_EXPERT: "gemma_300m"}
"""The variants to serve a merged checkpoint with."""

_OPTIMISER_PARTS = frozenset(
    {"opt_state", "optimizer", "optimizer_state", "optimiser", "optim", "opt", "mu", "nu", "trace"}
)


@dataclass(frozen=True)
class Rule:
    """How one kind of module spells and runs its adapter. Equations are those of one layer."""

    equation: str
    """From the factors' dims to the kernel's."""
    forward: Forward
    """What the layer computes."""
    scaled: bool
    """Whether it multiplies by the LoRA scale."""


_ATTENTION: Mapping[str, Rule] = {
    "q_einsum": Rule(
        "ndr,nrh->ndh",
        Forward("btd,ndh->btnh", "btd,ndr->btnr", "btnr,nrh->btnh"),
        scaled=True,
    ),
    "kv_einsum": Rule(
        "ckdr,ckrh->ckdh",
        Forward("bsd,ckdh->cbskh", "bsd,ckdr->cbskr", "cbskr,ckrh->cbskh"),
        scaled=True,
    ),
    "qkv_einsum": Rule(
        "ckdr,ckrh->ckdh",
        Forward("bsd,ckdh->cbskh", "bsd,ckdr->cbskr", "cbskr,ckrh->cbskh"),
        scaled=True,
    ),
    "attn_vec_einsum": Rule(
        "nhr,mrd->nhd",
        Forward("btnh,nhd->btd", "btnh,nhr->btr", "btr,nrd->btd"),
        scaled=True,
    ),
}
_FEED_FORWARD: Mapping[str, Rule] = {
    "gating_einsum": Rule(
        "gdr,grf->gdf",
        Forward("btd,gdf->gbtf", "btd,gdr->gbtr", "gbtr,grf->gbtf"),
        scaled=False,
    ),
    "linear": Rule(
        "fr,rd->fd",
        Forward("btf,fd->btd", "btf,fr->btr", "btr,rd->btd"),
        scaled=False,
    ),
}
_HEADS = ("n", "m")

_ATTENTION_MODULE = re.compile(rf"({'|'.join(_ATTENTION)})(_1)?")
_EXPERT_MODULE = re.compile(rf"({'|'.join(_ATTENTION)}|mlp|pre_attention_norm|pre_ffw_norm|final_norm)_1")
_FEED_FORWARD_MODULE = re.compile(r"mlp(_1)?")
_FEED_FORWARD_FACTOR = re.compile(rf"({'|'.join(_FEED_FORWARD)})_(lora_[ab])")


@dataclass(frozen=True)
class _Factor:
    """What a factor's key says."""

    role: str
    target: KeyPath
    module: str
    group: str
    rule: Rule


class OpenPI:
    """OpenPI's spellings and rules."""

    name = "openpi"
    groups = (PALIGEMMA, ACTION_EXPERT)
    serving_dtype = BFLOAT16
    tells_frozen = True

    def matches(self, tree: Tree) -> bool:
        """See `Dialect.matches`."""
        paths = tree.index.tensors
        # A layer of flax's own that happens to be called q_einsum has its kernel below base_module.
        wrapped = any("base_module" in path for path in paths)
        return any("PaliGemma" in path or (not wrapped and _factor(path) is not None) for path in paths)

    def survey(self, subject: Subject, options: ScaleOptions) -> Survey:
        """See `Dialect.survey`."""
        index, where = subject.checkpoint.index, subject.checkpoint.where
        claimed: dict[KeyPath, dict[str, KeyPath]] = {}
        kinds: dict[KeyPath, _Factor] = {}
        dropped: list[Dropped] = []
        unclaimed: list[KeyPath] = []
        for path in index.tensors:
            factor = _factor(path)
            if _is_optimiser_leaf(path):
                if looks_like_adapter(path):
                    dropped.append(Dropped(path, "optimiser state of an adapter that is merged"))
            elif factor is not None:
                claimed.setdefault(factor.target, {})[factor.role] = path
                kinds[factor.target] = factor
            elif looks_like_adapter(path):
                unclaimed.append(path)
        sites: list[AdapterSite] = []
        problems: list[Exception] = []
        if unclaimed:
            problems.append(
                UnmatchedAdapter(
                    "keys that look like an adapter's and fit no rule of OpenPI's",
                    where=f"{where} :: {first_names(map(display, unclaimed))}",
                    expected="attn/<name>/lora_a or mlp/<name>_lora_a",
                )
            )
        for target, factors in claimed.items():
            found = _site(index, where, kinds[target], factors, options)
            if isinstance(found, AdapterSite):
                sites.append(found)
            else:
                problems.append(found)
        return Survey(tuple(sites), tuple(dropped), tuple(problems), tuple(_alpha_notes(sites, options)))

    def unknown_scale(self, sites: Sequence[AdapterSite], where: str) -> UnknownScale:
        """See `Dialect.unknown_scale`."""
        ranks = sorted({(site.group, site.parameters.rank) for site in sites}, reverse=True)
        stock = (f"{rank} for {group}" for group, presets in STOCK_ALPHA.items() for rank in presets)
        example = ",".join(f"{group}=ALPHA" for group in dict.fromkeys(g for g, _ in ranks))
        return UnknownScale(
            "the LoRA scale of attention is not stored, and the rank is no stock one",
            where=f"{where} :: {sites[0].name}",
            expected=f"rank {' and '.join(stock)}",
            found=" and ".join(f"{rank} for {group}" for group, rank in ranks),
            hint=f"pass --lora-alpha {example}, and --rslora if it was trained so",
        )

    def summary(self, tree: Tree) -> ModelSummary:
        """See `Dialect.summary`."""
        index = tree.index
        roots = {part for path in index.tensors for part in self.canonical(path)[:1]}
        has_expert = any(_group(path) == ACTION_EXPERT for path in index.tensors)
        if "PaliGemma" not in roots:
            return ModelSummary("unknown")
        if "time_mlp_in" in roots:
            name = "pi0.5"
        elif roots & {"action_time_mlp_in", "state_proj"}:
            name = "pi0"
        elif not has_expert and "action_in_proj" not in roots:
            name = "pi0-FAST"
        else:
            return ModelSummary("unknown")
        variants = f'paligemma_variant="{STOCK_VARIANT[PALIGEMMA]}"'
        if has_expert:
            variants += f', action_expert_variant="{STOCK_VARIANT[ACTION_EXPERT]}"'
        return ModelSummary(
            name,
            (
                f"serve the merged checkpoint with {variants}: a _lora variant would add fresh random adapters",
                "the merged params are for inference or as a new starting point, not for --resume",
            ),
            item="params",
            needs_quantiles=name != "pi0",
        )

    def grouping(self, index: Index, sites: tuple[AdapterSite, ...]) -> Mapping[KeyPath, Group]:
        """See `Dialect.grouping`: OpenPI stores what it froze in bfloat16, and the rest in float32."""
        under = {target for site in sites for target in site.targets}
        groups: dict[KeyPath, Group] = {}
        for path, spec in index.tensors.items():
            if looks_like_adapter(path):
                groups[path] = "adapter"
            elif path in under:
                groups[path] = "lora"
            elif spec.dtype == BFLOAT16 and not _is_optimiser_leaf(path):
                groups[path] = "frozen"
            else:
                groups[path] = "trained"
        return groups

    def part(self, path: KeyPath) -> str:
        """See `Dialect.part`."""
        names = self.canonical(path)
        if _is_optimiser_leaf(path):
            return "optimiser state"
        if names[:2] == ("PaliGemma", "img"):
            return "vision tower"
        if _group(path) == ACTION_EXPERT:
            return "action expert"
        if names[:1] == ("PaliGemma",):
            return "language model"
        return "projections" if len(names) == 2 and names[1] in ("kernel", "bias") else "other"

    def depths(self, index: Index) -> Mapping[KeyPath, Depth]:
        """See `Dialect.depths`: along the first axis below a scanned module, by the numbers in the names elsewhere."""
        return scanned(index) | numbered({path: parts_of(self.canonical(path)) for path in index.tensors})

    def canonical(self, path: KeyPath) -> KeyPath:
        """See `Dialect.canonical`: without the root key ``params`` and the suffix ``value`` of an nnx state."""
        if path[:1] == ("params",):
            path = path[1:]
        return path[:-1] if len(path) > 1 and path[-1] == "value" else path

    def unservable(self, index: Index) -> str | None:
        """See `Dialect.unservable`: ``restore_params`` reads below ``params``, and drops ``value`` where every path ends in it."""
        rootless = [path for path in index.tensors if path[:1] != ("params",)]
        if rootless:
            return f"OpenPI loads what is below the root key params: {display(rootless[0])}"
        suffixed = sum(path[-1] == "value" for path in index.tensors)
        if suffixed not in (0, len(index.tensors)):
            return f"OpenPI loads paths that end in value all or none: {suffixed} of {len(index.tensors)} do"
        return None

    def fused_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:  # noqa: ARG002  (others keep the stored one)
        """See `Dialect.fused_dtype`: float32, since the stored bfloat16 would eat the delta."""
        return FLOAT32


def _factor(path: KeyPath) -> _Factor | None:
    """What a key says if it is a factor's, in either of the two spellings."""
    suffix: KeyPath = ("value",) if path[-1] == "value" else ()
    stem = path[: len(path) - len(suffix)]
    if len(stem) < 2:
        return None
    parent, leaf = str(stem[-2]), str(stem[-1])
    if leaf in ("lora_a", "lora_b"):
        match = _ATTENTION_MODULE.fullmatch(parent)
        if match is None:
            return None
        target = (*stem[:-1], "w", *suffix)
        return _Factor(leaf, target, match[1], _group(path), _ATTENTION[match[1]])
    match = _FEED_FORWARD_FACTOR.fullmatch(leaf)
    if match is None or not _FEED_FORWARD_MODULE.fullmatch(parent):
        return None
    target = (*stem[:-1], match[1], *suffix)
    return _Factor(match[2], target, match[1], _group(path), _FEED_FORWARD[match[1]])


def _group(path: KeyPath) -> str:
    """The expert that a leaf belongs to: modules of the second one end in ``_1``."""
    second = any(_EXPERT_MODULE.fullmatch(str(part)) for part in path)
    return ACTION_EXPERT if second else PALIGEMMA


def _is_optimiser_leaf(path: KeyPath) -> bool:
    return any(part in _OPTIMISER_PARTS for part in path[:-1])


def _site(
    index: Index,
    where: str,
    factor: _Factor,
    factors: Mapping[str, KeyPath],
    options: ScaleOptions,
) -> AdapterSite | Exception:
    target = factor.target
    if len(factors) < 2:
        present = next(iter(factors.values()))
        other = "lora_b" if "lora_a" in factors else "lora_a"
        return UnmatchedAdapter(f"a factor without its {other}", where=f"{where} :: {display(present)}")
    if target not in index.tensors:
        return UnmatchedAdapter(
            "factors without a kernel",
            where=f"{where} :: {display(factors['lora_a'])}",
            expected=f"a kernel at {display(target)}",
        )
    shapes = [index.tensors[factors[role]].shape for role in ("lora_a", "lora_b")]
    shapes.append(index.tensors[target].shape)
    stacked = len(shapes[2]) == len(Equation(factor.rule.equation).target) + 1
    equation = Equation(_stack(factor.rule.equation) if stacked else factor.rule.equation)
    sizes = equation.sizes(*shapes)
    if sizes is None or any(sizes.get(dim, n) != n for dim in _HEADS[1:] for n in [sizes.get("n", 0)]):
        return ShapeMismatch(
            "the factors do not fit the kernel",
            where=f"{where} :: {display(target)}",
            expected=f"shapes as in {equation}" + (" with m = n" if "m" in equation.b else ""),
            found=" and ".join(
                f"{name} {shape}" for name, shape in zip(("lora_a", "lora_b", "kernel"), shapes, strict=True)
            ),
        )
    if 0 in sizes.values():
        return ShapeMismatch("an adapter without entries", where=f"{where} :: {display(target)}", found=shapes[2])
    rank = sizes[equation.rank]
    return AdapterSite(
        targets=(target,),
        operation="add_delta",
        factors={role: Factor(path) for role, path in factors.items()},
        parameters=LowRank(rank, _scale(factor, rank, options), equation),
        forward=factor.rule.forward,
        group=factor.group,
        module=factor.module,
        label=_label(target),
    )


def _label(target: KeyPath) -> str:
    """A kernel's path without what all kernels share, for example ``attn/q_einsum``."""
    names = tuple(part for part in target if part not in ("params", "w", "value"))
    shared = ("PaliGemma", "llm", "layers")
    return display(names[len(shared) :] if names[: len(shared)] == shared else names)


def _stack(equation: str) -> str:
    factors, target = equation.split("->")
    a, b = factors.split(",")
    return f"l{a},l{b}->l{target}"


def _scale(factor: _Factor, rank: int, options: ScaleOptions) -> Scale:
    if not factor.rule.scaled:
        return Scale(1.0, "the feed-forward is not scaled")
    rslora = options.rslora_for(factor.group)
    divisor, formula = (math.sqrt(rank), "sqrt(rank)") if rslora else (float(rank), "rank")
    alpha, source = options.alpha_for(factor.group), "--lora-alpha"
    assumed = alpha is None
    if alpha is None:
        alpha = STOCK_ALPHA[factor.group].get(rank)
        source = f"assumed: stock {STOCK_VARIANT[factor.group]}_lora"
    if alpha is None:
        return Scale(None, "unknown: alpha is not stored, pass --lora-alpha")
    if rslora:
        source += ", --rslora"
    return Scale(alpha / divisor, f"alpha {alpha:g} / {formula} ({source})", assumed)


def _alpha_notes(sites: list[AdapterSite], options: ScaleOptions) -> Iterator[str]:
    scaled = {site.group for site in sites if site.parameters.scale.source.startswith("alpha")}
    unused = [group for group in options.alpha if group and group not in scaled]
    for group in unused:
        yield f"--lora-alpha for {group} is not used: it has no attention adapters"
    if "" in options.alpha and not scaled:
        yield "--lora-alpha is not used: only attention is scaled, and it has no adapters here"
    assumed = sorted({s.parameters.scale.source for s in sites if s.parameters.scale.assumed})
    if assumed:
        yield f"scale assumed from the stock rank, not stated by anyone: {'; '.join(assumed)}"
