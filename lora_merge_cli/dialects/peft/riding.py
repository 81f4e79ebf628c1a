"""What rides along in an adapter's file and replaces values of the base: whole tensors, and rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.config import TOKENS, AdapterConfig
from lora_merge_cli.dialects.peft.keys import Keys, Rows, Whole
from lora_merge_cli.dialects.peft.names import Names, is_embedding, is_head, is_task_head, spelled
from lora_merge_cli.dialects.peft.saved import saved_module
from lora_merge_cli.dialects.torch_names import dotted, nearest_names
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import CorruptCheckpoint, ShapeMismatch, UnmatchedAdapter
from lora_merge_cli.records import KeyPath, Replacement, TensorSpec, first_names

_TASKS = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})


@dataclass
class Riding:
    """The replacements, and what they entail."""

    replacements: list[Replacement] = field(default_factory=list)
    """Whole tensors first, then rows."""
    config: dict[str, Any] = field(default_factory=dict)
    """What changes in the model's configuration."""
    problems: list[Exception] = field(default_factory=list)
    """Why no merge can be right."""
    warnings: list[str] = field(default_factory=list)
    """What should make a reader stop."""


def whole_reason(whole: Whole, config: AdapterConfig) -> str:
    """Why an adapter brings a tensor whole, in words."""
    module, _, leaf = whole.name.rpartition(".")
    if whole.wrapped:
        return "the base's own copy under an adapted layer"
    if saved_module(module, config.modules_to_save) is not None:
        return "modules_to_save"
    if leaf == "bias" and config.bias != "none":
        return f"bias {config.bias}"
    if is_embedding(module) or is_head(module):
        return "saved embedding layer"
    return "saved whole"


def read_whole(keys: Keys, config: AdapterConfig, base: Tree, names: Names, where: str) -> Riding:
    """Place every tensor that the adapter brings whole.

    Args:
        keys: The adapter's keys.
        config: Its configuration.
        base: The checkpoint.
        names: Where its tensors are; new heads are placed there.
        where: The adapter, for errors.
    """
    riding = Riding()
    strangers: list[Whole] = []
    new_heads: list[str] = []
    for whole in keys.whole.values():
        path = names.path(whole.name)
        module = whole.name.rpartition(".")[0]
        if path is None and _may_be_new(module, config):
            path = spelled(whole.name, base)
            names.place(whole.name, path)
            new_heads.append(whole.name)
        if path is None:
            strangers.append(whole)
            continue
        stored = base.index.tensors.get(path)
        problem = None if stored is None else _misfit(whole, stored, config, where)
        if problem is not None:
            riding.problems.append(problem)
        elif stored is not None and stored.shape != whole.spec.shape and is_task_head(module):
            new_heads.append(whole.name)
        is_copy = whole.wrapped and stored is not None and stored.shape == whole.spec.shape
        riding.replacements.append(Replacement(path, whole.spec.path, whole_reason(whole, config), is_copy=is_copy))
    if strangers:
        riding.problems.append(_unplaced(strangers, base, where))
    if new_heads:
        riding.warnings.append(
            f"a head of the adapter's own: {first_names(new_heads)}; see that architectures and num_labels in config.json fit it"
        )
    if config.bias == "lora_only" and not any(name.endswith(".bias") for name in keys.whole):
        riding.warnings.append(
            "bias is lora_only and the adapter holds no bias: peft before 0.21 did not save them, so what it trained is lost"
        )
    return riding


def vocabulary(replacements: list[Replacement], adapter: Tree, base: Tree) -> Mapping[str, Any] | Exception:
    """What changes in the configuration when the vocabulary was resized.

    Args:
        replacements: Everything that is replaced.
        adapter: The adapter.
        base: The checkpoint.

    Returns:
        The keys and values; or the refusal of embedding and head that differ in rows.
    """
    rows: dict[KeyPath, int] = {}
    for replacement in replacements:
        spec, stored = adapter.index.tensors[replacement.path], base.index.tensors.get(replacement.target)
        module = dotted(replacement.target).rpartition(".")[0]
        if replacement.rows is not None or stored is None or not (is_embedding(module) or is_head(module)):
            continue
        if len(spec.shape) == 2 and spec.shape != stored.shape:
            rows[replacement.target] = spec.shape[0]
    if not rows:
        return {}
    new = next(iter(rows.values()))
    config = base.config or {}
    whole = {one.target: adapter.index.tensors[one.path].shape for one in replacements if one.rows is None}
    for path, spec in base.index.tensors.items():
        module, _, leaf = dotted(path).rpartition(".")
        shape = whole.get(path, spec.shape)
        is_one = is_embedding(module) or is_head(module)
        if is_one and leaf == "weight" and len(shape) == 2 and shape[0] != new and _alike(path, rows, base):
            return ShapeMismatch(
                "embedding and head would have different numbers of rows",
                where=f"{adapter.where} :: {dotted(next(iter(rows)))}",
                expected=f"{new} rows in {dotted(path)} too",
                found=shape[0],
            )
    old = base.index.tensors[next(iter(rows))].shape[0]
    sections = {"": config, **{f"{name}.": part for name, part in config.items() if isinstance(part, Mapping)}}
    named = [
        prefix
        for prefix, section in sections.items()
        if "vocab_size" in section and (prefix in ("", "text_config.") or section["vocab_size"] == old)
    ]
    return {f"{prefix}vocab_size": new for prefix in named or [""]}


def read_rows(
    keys: Keys, config: AdapterConfig, base: Tree, names: Names, shapes: Mapping[KeyPath, tuple[int, ...]], where: str
) -> Riding:
    """Place every set of trained rows.

    Args:
        keys: The adapter's keys.
        config: Its configuration, which has the rows' numbers.
        base: The checkpoint.
        names: Where its tensors are.
        shapes: The shapes of leaves that are replaced whole first.
        where: The adapter, for errors.
    """
    riding = Riding()
    for rows in keys.rows.values():
        target = names.path(f"{rows.module}.weight")
        if target is None:
            riding.problems.append(_unplaced([Whole(f"{rows.module}.weight", rows.spec, False)], base, where))
            continue
        shape = shapes.get(target) or names.shape(target) or ()
        indices = _indices(rows, keys, config, where)
        problem = indices if isinstance(indices, Exception) else _bad_rows(rows, indices, shape, where)
        if isinstance(indices, Exception) or problem is not None:
            riding.problems.extend(filter(None, [problem]))
            continue
        riding.replacements.append(Replacement(target, rows.spec.path, "trained token rows", rows=indices))
    absent = _absent_rows(keys, config)
    if absent:
        riding.problems.append(
            UnmatchedAdapter(
                "trained rows that the adapter does not hold", where=f"{where} :: {first_names(absent, 3)}"
            )
        )
    return riding


def _absent_rows(keys: Keys, config: AdapterConfig) -> list[str]:
    """The modules of which the configuration says that rows were trained, and that have none."""
    if not keys.rows:
        return ["trainable_token_indices"] if config.token_indices else []
    named = config.token_indices if isinstance(config.token_indices, Mapping) else ()
    # A tied head may be named beside its embedding, and has no rows of its own in the file.
    return [name for name in named if not is_head(name) and not any(_is_named(module, name) for module in keys.rows)]


def _may_be_new(module: str, config: AdapterConfig) -> bool:
    if saved_module(module, config.modules_to_save) is not None:
        return True
    return is_task_head(module) and (config.task in _TASKS or not config.stated)


def _misfit(whole: Whole, stored: TensorSpec, config: AdapterConfig, where: str) -> Exception | None:
    module = whole.name.rpartition(".")[0]
    resizable = is_embedding(module) or is_head(module) or (is_task_head(module) and _may_be_new(module, config))
    shape = whole.spec.shape
    fits = shape == stored.shape or (resizable and len(shape) == len(stored.shape) and shape[1:] == stored.shape[1:])
    if fits and is_float(whole.spec.dtype) == is_float(stored.dtype) and 0 not in shape:
        return None
    return ShapeMismatch(
        "a tensor that the adapter brings does not fit the base's",
        where=f"{where} :: {whole.spec.name}",
        expected=f"{stored.dtype.name} {stored.shape}",
        found=f"{whole.spec.dtype.name} {shape}",
    )


def _unplaced(strangers: list[Whole], base: Tree, where: str) -> UnmatchedAdapter:
    nearest = nearest_names(strangers[0].name, base)
    return UnmatchedAdapter(
        "tensors that the adapter brings and the base does not have",
        where=f"{where} :: {first_names((whole.spec.name for whole in strangers), 3)}",
        expected=f"{strangers[0].name} in {base.where}",
        found=f"nearest {', '.join(nearest)}" if nearest else None,
        hint="see that the base is the one that the adapter was trained on",
    )


def _alike(path: KeyPath, rows: Mapping[KeyPath, int], base: Tree) -> bool:
    """Whether a leaf had the shape of one that is resized."""
    return any(base.index.tensors[other].shape == base.index.tensors[path].shape for other in rows)


def _indices(rows: Rows, keys: Keys, config: AdapterConfig, where: str) -> tuple[int, ...] | Exception:
    named = config.token_indices
    if isinstance(named, Mapping):
        fitting = [indices for module, indices in named.items() if _is_named(rows.module, module)]
        if len(fitting) == 1:
            return fitting[0]
    elif named is not None and (config.method == TOKENS or len(keys.rows) == 1):
        return named
    return UnmatchedAdapter(
        "trained rows, and no list of which they are",
        where=f"{where} :: {rows.spec.name}",
        expected="their indices in adapter_config.json: trainable_token_indices, or token_indices",
        found="none"
        if named is None
        else f"those of {first_names(named, 3)}"
        if isinstance(named, Mapping)
        else "one list",
    )


def _bad_rows(rows: Rows, indices: tuple[int, ...], shape: tuple[int, ...], where: str) -> Exception | None:
    here = f"{where} :: {rows.spec.name}"
    if len(shape) != 2 or rows.spec.shape != (len(indices), shape[1]) or not is_float(rows.spec.dtype):
        return ShapeMismatch(
            "trained rows that do not fit the embedding",
            where=here,
            expected=f"{len(indices)} rows as those of {shape}",
            found=rows.spec.shape,
        )
    outside = [index for index in indices if not 0 <= index < shape[0]]
    if outside:
        return ShapeMismatch(
            "trained rows beyond the embedding's",
            where=here,
            expected=f"indices below {shape[0]}",
            found=first_names(map(str, outside), 3),
            hint="give the base with the resized embedding, or an adapter that was saved with save_embedding_layers=True",
        )
    if len(set(indices)) < len(indices):
        return CorruptCheckpoint("a row that is trained twice", where=here, expected="each index once")
    return None


def _is_named(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
