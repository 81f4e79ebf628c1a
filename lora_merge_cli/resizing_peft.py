"""A PEFT adapter with smaller ranks: LoRA, rsLoRA, DoRA, on linear layers, embeddings and convolutions.

The new scale is 1, by ``lora_alpha`` equal to ``r``; modules whose ranks differ from most get patterns of their whole paths.

Source: the method is that of huggingface/peft 0.21, ``tuners/lora/conversion.py``, which truncates deltas to LoRA factors too; here
the SVD is exact, and of the factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.dialects import ScaleOptions, Tree
from lora_merge_cli.dialects.interface import AdapterDialect
from lora_merge_cli.dialects.peft.config import LORA, AdapterConfig, read_config
from lora_merge_cli.dialects.peft.keys import Layer, read_keys
from lora_merge_cli.dialects.peft.patterns import patterns_of, rank_of, scale_of
from lora_merge_cli.dialects.peft.sites import pattern_name
from lora_merge_cli.errors import ShapeMismatch, UnknownScale, UnsupportedCheckpoint
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.records import AdapterSummary, Array, KeyPath, TensorSpec
from lora_merge_cli.resize_report import ResizedRecord
from lora_merge_cli.resizing_factors import ResizedAdapter, Wanted, distance, padded, read_factor, stored
from lora_merge_cli.truncation import Truncated, truncate_product


@dataclass(frozen=True)
class _Module:
    """An adapted module with its factors' places."""

    layer: Layer
    name: str
    """What patterns for rank and alpha are compared with."""
    a: TensorSpec
    b: TensorSpec
    bias: TensorSpec | None
    """What ``lora_B`` adds, times the scale."""
    rank: int
    scale: float
    """By the configuration; the delta that peft adds to an output projection inside an attention block is twice that."""

    def delta(self, a: Array, b: Array) -> tuple[Array, Array]:
        """The scaled delta as two float64 matrices, ``(outputs, rank)`` and ``(rank, inputs)``."""
        return self.scale * b.reshape(-1, self.rank).astype(np.float64), a.reshape(self.rank, -1).astype(np.float64)


@dataclass(frozen=True)
class _Resized:
    """What became of a module."""

    rank: int
    """Its new rank; the old one if its factors stay."""
    factors: Mapping[KeyPath, Array]
    """Its tensors that are not copied as they are."""
    record: ResizedRecord


def resize_peft(tree: Tree, dialect: AdapterDialect, checkpoint: Checkpoint, wanted: Wanted) -> ResizedAdapter:
    """A PEFT adapter's modules truncated, each at its own rank.

    Args:
        tree: The adapter.
        dialect: What knows it.
        checkpoint: The same, to read from.
        wanted: The rank or the share of the energy, and the dtype.

    Raises:
        InputError: A factor cannot be read, or is not finite.
        Refused: It is no LoRA adapter, is on stacked experts, or contradicts itself.
    """
    summary, config = _understood(tree, dialect)
    modules = list(_modules(tree, config))
    resized = [found for group in _groups(modules) for found in _resize(group, checkpoint, wanted)]
    ranks = {module.name: found.rank for module, found in zip(_in_groups(modules), resized, strict=True)}
    changed = any(found.record.rank_after != found.record.rank_before for found in resized)
    order = {module.layer.module: number for number, module in enumerate(modules)}
    return ResizedAdapter(
        summary,
        _new_config(tree, modules, ranks) if changed else dict(tree.config or {}),
        {path: values for found in resized for path, values in found.factors.items()},
        # PEFT's keys are dotted names, whatever a torch file nests them in.
        {path: (".".join(map(str, path)),) for path in checkpoint.source.index().tensors},
        tuple(spec for module in modules for spec in (module.a, module.b)),
        tuple(sorted((found.record for found in resized), key=lambda record: order[record.module])),
        tuple(_notes(summary, [found.record for found in resized])),
    )


def _understood(tree: Tree, dialect: AdapterDialect) -> tuple[AdapterSummary, AdapterConfig]:
    """What the adapter is; refused where it is none whose delta is a product of its factors."""
    method = (tree.config or {}).get("peft_type", LORA)
    if method != LORA:
        raise UnsupportedCheckpoint(
            f"resizing an adapter of peft_type {str(method)[:80]} is not supported",
            where=tree.where,
            expected="a PEFT adapter of peft_type LORA (LoRA, rsLoRA, DoRA)",
        )
    options = ScaleOptions()
    summary, config = dialect.describe(tree, options), read_config(tree, options).config
    for problem in summary.problems:
        raise problem
    assert config is not None, "what has no configuration has a problem"
    if not config.stated:
        raise UnknownScale(
            "the LoRA scale is not stated: there is no adapter_config.json beside the adapter",
            where=tree.where,
            hint="put the adapter's configuration beside its weights",
        )
    return summary, config


def _modules(tree: Tree, config: AdapterConfig) -> Iterator[_Module]:
    keys = read_keys(tree)
    if not keys.layers:
        raise UnsupportedCheckpoint("an adapter without low-rank factors: nothing to resize", where=tree.where)
    for layer in keys.layers.values():
        name, here = pattern_name(layer, config), f"{tree.where} :: {layer.module}"
        tensors = layer.tensors
        embedding = "embedding_a" in tensors
        stacked = set(layer.nested) != {0} or layer.module.rsplit(".", maxsplit=1)[-1] == "experts"
        rank = rank_of(config, name)
        a, b = (
            tensors.get("embedding_a" if embedding else "lora_a"),
            tensors.get("embedding_b" if embedding else "lora_b"),
        )
        if stacked or a is None or b is None or (config.target_parameters and a.shape[:1] != (rank,)):
            raise UnsupportedCheckpoint(
                "an adapter on parameters of experts (target_parameters): resizing it is not supported",
                where=here,
                expected="factors of layers, one pair each",
            )
        if len(a.shape) < 2 or len(b.shape) < 2 or 0 in (*a.shape, *b.shape) or set(b.shape[2:]) > {1}:
            raise ShapeMismatch("factors of no layer's shape", where=here, found=f"A {a.shape}, B {b.shape}")
        if rank is None or (a.shape[0], b.shape[1]) != (rank, rank):
            raise ShapeMismatch(
                "factors of another rank than the configuration states",
                where=here,
                expected=f"rank {rank}",
                found=f"A {a.shape}, B {b.shape}",
                hint="see that adapter_config.json belongs to these weights",
            )
        scale = scale_of(config, name, rank).value
        assert scale is not None, "a configuration states an alpha, or peft's default holds"
        yield _Module(layer, name, a, b, tensors.get("bias"), rank, scale)


def _groups(modules: Sequence[_Module]) -> list[list[_Module]]:
    """The modules that one pattern names, and that so have one rank: all alone but for the two of an attention block."""
    groups: dict[str, list[_Module]] = {}
    for module in modules:
        groups.setdefault(module.name, []).append(module)
    return list(groups.values())


def _in_groups(modules: Sequence[_Module]) -> Iterator[_Module]:
    return (module for group in _groups(modules) for module in group)


def _resize(group: Sequence[_Module], checkpoint: Checkpoint, wanted: Wanted) -> list[_Resized]:
    """The modules of a group at one rank: the largest that one of them needs, and never more than they have."""
    old = group[0].rank
    read = [(read_factor(checkpoint, module.a), read_factor(checkpoint, module.b)) for module in group]
    cuts = [
        truncate_product(*module.delta(*factors), rank=wanted.rank, energy=wanted.energy)
        for module, factors in zip(group, read, strict=True)
    ]
    rank = max(cut.rank for cut in cuts)
    if wanted.keeps(rank, old):
        return [
            _kept(module, *factors, cut, checkpoint, wanted)
            for module, factors, cut in zip(group, read, cuts, strict=True)
        ]
    if len(group) > 1:
        cuts = [
            padded(truncate_product(*module.delta(*factors), rank=rank), rank)
            for module, factors in zip(group, read, strict=True)
        ]
    return [
        _cut(module, *factors, cut, checkpoint, wanted) for module, factors, cut in zip(group, read, cuts, strict=True)
    ]


def _kept(module: _Module, a: Array, b: Array, cut: Truncated, checkpoint: Checkpoint, wanted: Wanted) -> _Resized:
    """A module whose factors stay as they are, or are widened."""
    widened = {}
    if wanted.dtype != "keep":
        found = [(module.a, a), (module.b, b)]
        if module.bias is not None:
            found.append((module.bias, read_factor(checkpoint, module.bias)))
        widened = {spec.path: stored(values, spec, checkpoint, wanted) for spec, values in found}
    record = _record(module, module.rank, cut, wanted)
    error = 0.0 if cut.total else None
    return _Resized(module.rank, widened, dataclasses.replace(record, energy_kept=1.0, relative_error=error))


def _cut(module: _Module, a: Array, b: Array, cut: Truncated, checkpoint: Checkpoint, wanted: Wanted) -> _Resized:
    rank = cut.rank
    shapes = (rank, *module.a.shape[1:]), (module.b.shape[0], rank, *module.b.shape[2:])
    factors = {
        spec.path: stored(values.reshape(shape), spec, checkpoint, wanted)
        for spec, values, shape in zip((module.a, module.b), (cut.right, cut.left), shapes, strict=True)
    }
    left, right = module.delta(a, b)
    new_left = factors[module.b.path].reshape(-1, rank).astype(np.float64)
    new_right = factors[module.a.path].reshape(rank, -1).astype(np.float64)
    error = distance((left, right), (new_left, new_right))
    if module.bias is not None:
        # It is multiplied by the scale too.
        bias = module.scale * read_factor(checkpoint, module.bias).astype(np.float64)
        factors[module.bias.path] = stored(bias, module.bias, checkpoint, wanted)
    record = _record(module, rank, cut, wanted)
    relative = error / cut.total if cut.total else None
    return _Resized(rank, factors, dataclasses.replace(record, relative_error=relative))


def _record(module: _Module, rank: int, cut: Truncated, wanted: Wanted) -> ResizedRecord:
    before = module.b.dtype.name
    return ResizedRecord(
        module=module.layer.module,
        shape=(module.b.shape[0], module.a.size // module.rank),
        scale=module.scale,
        rank_before=module.rank,
        rank_after=rank,
        dtype_before=before,
        dtype_after=wanted.dtype_of(module.b).name,
        norm=cut.total,
        energy_kept=cut.energy_kept,
        relative_error=None,
    )


def _new_config(tree: Tree, modules: Sequence[_Module], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with the new ranks, and alphas by which the scale is 1, or what it was where factors stay."""
    alphas = {
        module.name: _number(module.scale * module.rank if ranks[module.name] == module.rank else ranks[module.name])
        for module in modules
    }
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda found: (counts[found], found))
    raw = dict(tree.config or {})
    document = raw | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": patterns_of(ranks, rank),
        "alpha_pattern": patterns_of(alphas, rank),
    }
    if isinstance(raw.get("init_lora_weights"), str):
        # Factors of another rank are no result of it, and some refuse odd ranks when the adapter is loaded.
        document["init_lora_weights"] = True
    config = read_config(Tree(tree.index, tree.where, document), ScaleOptions()).config
    for module in modules:
        new = ranks[module.name]
        scale = module.scale if new == module.rank else 1.0
        said = None if config is None else scale_of(config, module.name, new).value
        assert config is not None and rank_of(config, module.name) == new, "each module has its own rank"
        assert said is not None and math.isclose(said, scale, rel_tol=1e-12), "each module has its own scale"
    return document


def _number(value: float) -> float:
    """The value, without the rounding of a division where it was a whole number."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _notes(summary: AdapterSummary, records: Sequence[ResizedRecord]) -> Iterator[str]:
    if summary.method.startswith("DoRA") and any(record.rank_after < record.rank_before for record in records):
        yield (
            "DoRA: the magnitudes are copied; the norm that divides them is that of the base and the new delta, so that it changes with "
            "it, and the figures are of the delta alone"
        )
