"""What an adapter of two dense checkpoints consists of: which leaves get factors, and which it brings whole, under what keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge_cli.dense_deltas import Sides
from lora_merge_cli.dialects.detached_document import TRAINED, Document, detached_config
from lora_merge_cli.dialects.peft.written import adapter_config, bias_key, tied_head, whole_key, whole_modules
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.dtypes import FLOAT32, holds_all_values_of, is_float
from lora_merge_cli.errors import NothingToMerge, UnsupportedCheckpoint
from lora_merge_cli.extracting_document import base_record, kept_dtypes, made_by
from lora_merge_cli.extracting_prepared import Dense, PreparedExtraction
from lora_merge_cli.records import AdapterSite, KeyPath, Replacement, TensorSpec, first_names


@dataclass(frozen=True)
class Shape:
    """What an adapter of two dense checkpoints consists of."""

    kernels: tuple[KeyPath, ...]
    """Those that get factors."""
    whole: tuple[tuple[KeyPath, TensorSpec], ...]
    """The key of each leaf that is brought whole."""
    reasons: Mapping[TensorSpec, str]
    """The leaves that are brought whole, and why."""
    config: Callable[[Mapping[KeyPath, AdapterSite], bool], dict[str, Any]]
    """``adapter_config.json``, from the sites, and from whether the others are brought."""
    warnings: tuple[str, ...] = ()
    """What should make a reader stop."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""


def tree_shape(prepared: PreparedExtraction, moved: Sequence[KeyPath]) -> Shape:
    """An adapter for any tree: factors of the kernels that are known, and all else that moved.

    Args:
        prepared: The two checkpoints.
        moved: The leaves that are not the base's.
    """
    inputs, dense = prepared.inputs, prepared.dense
    assert dense is not None, "there are two sides"
    kernels = tuple(path for path in moved if path in dense.kernels)
    others = [dense.pairs[path].tuned for path in moved if path not in dense.kernels]
    those = set(moved)
    still = [sides.tuned for path, sides in dense.pairs.items() if path not in those]

    def config(sites: Mapping[KeyPath, AdapterSite], with_whole: bool) -> dict[str, Any]:
        brought = others if with_whole else []
        document = Document(
            inputs.dialect,
            tuple(sites.values()),
            tuple(Replacement(spec.path, spec.path, TRAINED) for spec in brought),
            kept_dtypes(inputs, [*still, *brought]),
            base_record(inputs),
            len(others) - len(brought),
        )
        return detached_config(document, made_by=made_by(inputs))

    return Shape(
        kernels,
        tuple((spec.path, spec) for spec in others),
        dict.fromkeys(others, "no kernel that is known to take factors"),
        config,
    )


def peft_shape(prepared: PreparedExtraction, moved: Sequence[KeyPath]) -> Shape:
    """An adapter that PEFT loads: factors of linear layers with their biases, and whole modules of all else that moved.

    Args:
        prepared: The two checkpoints.
        moved: The leaves that are not the base's.

    Raises:
        NothingToMerge: No linear layer gets factors.
        UnsupportedCheckpoint: PEFT can bring a leaf neither way.
    """
    inputs, dense = prepared.inputs, prepared.dense
    assert dense is not None and inputs.base is not None, "there are two sides"
    where = str(inputs.checkpoint.source.path)
    tensors = inputs.checkpoint.source.index().tensors
    config = inputs.base.config or {}
    riding = dict.fromkeys(_biases(dense, moved))
    modules = whole_modules(
        [path for path in moved if path not in dense.kernels and path not in riding], tensors, where
    )
    kernels = tuple(path for path in moved if path in dense.kernels and _module(path) not in modules)
    biases = [dense.pairs[path].tuned for path in riding if _module(path) not in modules]
    if not kernels:
        raise NothingToMerge(
            "no weight of a linear layer changed that factors can be made of, and PEFT's LoRA needs some",
            where=where,
            found=f"{len(modules)} modules that changed otherwise: {first_names(modules, 3)}",
        )
    whole = [spec for path, spec in tensors.items() if _module(path) in modules]
    odd = [spec for spec in whole if not is_float(spec.dtype)]
    if odd:
        raise UnsupportedCheckpoint(
            "a tensor of a module to bring whole that is not floating-point", where=f"{where} :: {odd[0].name}"
        )
    keys = [((whole_key(dotted(spec.path)),), spec) for spec in whole]
    keys += [((bias_key(_module(spec.path)),), spec) for spec in biases]
    pair = tied_head([dotted(path) for path in tensors], modules, config)
    if pair is not None:
        shared = next(spec for spec in whole if _module(spec.path) == pair[0])
        keys.append(((whole_key(f"{pair[1]}.weight"),), shared))
        modules = [*modules, pair[1]]
    adapted = {_module(path) for path in dense.kernels}
    reasons = dict.fromkeys(biases, "the bias of a module with factors")
    for spec in whole:
        reasons[spec] = (
            "of a linear layer of which something else changed: PEFT brings the whole module"
            if _module(spec.path) in adapted
            else "no weight of a linear layer"
        )
    transposed = any(kernel.equation.target == "io" for kernel in dense.kernels.values())

    def written(sites: Mapping[KeyPath, AdapterSite], with_whole: bool) -> dict[str, Any]:
        ranks = {_module(path): site.parameters.rank for path, site in sites.items()}
        base = str(inputs.base.directory) if inputs.base is not None else ""
        return adapter_config(
            ranks,
            modules if with_whole else (),
            config,
            base,
            transposed=transposed,
            biases=with_whole and bool(biases),
        )

    notes = [f"modules that are brought whole: {first_names(sorted(modules), 3)}"] if modules else []
    brought = {*kernels, *(() if prepared.request.without_trained else (spec.path for spec in reasons))}
    changed = [dense.pairs[path] for path in moved if path in brought]
    return Shape(kernels, tuple(keys), reasons, written, tuple(_rounding(changed)), tuple(notes))


def _biases(dense: Dense, moved: Sequence[KeyPath]) -> list[KeyPath]:
    """The biases that moved with the weight of their own linear layer."""
    adapted = {_module(path) for path in moved if path in dense.kernels}
    return [
        path
        for path in moved
        if _module(path) in adapted and dotted(path).endswith(".bias") and is_float(dense.pairs[path].tuned.dtype)
    ]


def _is_widened(sides: Sides) -> bool:
    """Whether the fine-tune keeps a leaf in a dtype that tells more apart than the base's, which float32 holds."""
    narrow, wide = sides.base.dtype, sides.tuned.dtype
    return is_float(narrow) and not holds_all_values_of(narrow, wide) and not holds_all_values_of(narrow, FLOAT32)


def _rounding(changed: Sequence[Sides]) -> Iterator[str]:
    """What a merge would lose: PEFT's adapters do not say what leaves are to be stored in, so that it is the base's dtypes."""
    widened = [sides for sides in changed if _is_widened(sides)]
    if widened:
        first = widened[0]
        yield (
            f"{len(widened)} leaves that the adapter changes are {first.tuned.dtype.name} in the fine-tune and "
            f"{first.base.dtype.name} in the base, which a merge would round them to: merge with --dtype float32 for "
            f"the errors that are said here ({first_names([sides.tuned.name for sides in widened], 3)})"
        )


def _module(path: KeyPath) -> str:
    return dotted(path).rpartition(".")[0]
