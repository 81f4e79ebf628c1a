"""The nested value of a torch file as key paths, and back: which leaf sits where, and what the containers around it are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats.torch_values import Size, TensorView
from lora_merge_cli.records import Constant, KeyPath, display

_DEEPEST = 64
_MOST_PARTS = 1_000_000
_SCALARS = {type(None): "None", bool: "bool", int: "int", float: "float", str: "string"}
_EMPTY: dict[type[Any], str] = {dict: "Dict", OrderedDict: "Dict", list: "List", tuple: "Tuple", Size: "Tuple"}
_MAKERS = {"Dict": dict, "List": list, "Tuple": tuple}


@dataclass(frozen=True)
class Tree:
    """A flattened value."""

    tensors: dict[KeyPath, TensorView] = field(default_factory=dict)
    """The tensors, in the file's order."""
    constants: list[Constant] = field(default_factory=list)
    """What is no tensor and holds none, likewise."""
    order: dict[KeyPath, None] = field(default_factory=dict)
    """The paths of both, in the file's order."""
    containers: dict[KeyPath, type[Any]] = field(default_factory=dict)
    """What each container is: dict, OrderedDict, list, tuple or `Size`."""


def flatten(value: Any, where: object) -> Tree:
    """Flatten what `read_pickle` returned.

    Raises:
        CorruptCheckpoint: It is nested without end, or names the same parts again and again.
        UnsupportedCheckpoint: It is no dict, list or tuple, or holds what cannot be carried over.
    """
    if type(value) not in _EMPTY:
        what = "a single tensor" if isinstance(value, TensorView) else f"a single {type(value).__name__}"
        raise UnsupportedCheckpoint(f"{what}, and no tree of tensors", where=where, expected="a state dict")
    tree = Tree()
    pending: list[tuple[KeyPath, Any]] = [((), value)]
    parts = 0
    while pending:
        path, part = pending.pop()
        kind = type(part)
        if kind in _EMPTY:
            tree.containers[path] = kind
            parts += len(part)
            if len(path) == _DEEPEST or parts > _MOST_PARTS:
                raise CorruptCheckpoint(
                    "a value that is nested without end, or of absurdly many parts",
                    where=where,
                    expected=f"at most {_DEEPEST} levels and {_MOST_PARTS} parts",
                )
            children = list(part.items() if kind in (dict, OrderedDict) else enumerate(part))
            pending.extend(((*path, key), child) for key, child in reversed(children))
            if part or not path:
                continue
        tree.order[path] = None
        if isinstance(part, TensorView):
            tree.tensors[path] = part
        else:
            tree.constants.append(_constant(path, part, where))
    return tree


def _constant(path: KeyPath, part: Any, where: object) -> Constant:
    kind = type(part)
    if kind in _EMPTY:
        return Constant(path, _EMPTY[kind])
    if kind not in _SCALARS:
        raise UnsupportedCheckpoint(
            "a value that cannot be carried over",
            where=f"{where} :: {display(path)}",
            expected="a tensor, a number, a string, None or a container of such",
            found=str(part)[:100] if hasattr(part, "module") else kind.__name__,
        )
    if part is None:
        return Constant(path, "None")
    return Constant(path, _SCALARS[kind], part if kind is str else repr(part))


def value_of(constant: Constant) -> Any:
    """The value that a constant of any format stands for."""
    if constant.kind in _MAKERS:
        return _MAKERS[constant.kind]()
    match constant.kind:
        case "string":
            return constant.value or ""
        case "int":
            return int(constant.value or 0)
        case "float":
            return float(constant.value or 0)
        case "bool":
            return constant.value == "True"
    return None


def nest(leaves: Mapping[KeyPath, Any], containers: Mapping[KeyPath, type[Any]], where: object) -> Any:
    """The nested value with these leaves.

    Integers are the indices of a list, unless `containers` says that theirs is another container, or some are missing: then they
    are the keys of a dict.

    Args:
        leaves: What sits at each path, in the order in which it is to be.
        containers: What a container was where the leaves come from, as far as that is known.
        where: What errors name.

    Raises:
        UnsupportedCheckpoint: One path lies inside another one's leaf.
    """
    root: dict[str | int, Any] = {}
    inner: dict[KeyPath, dict[str | int, Any]] = {(): root}
    for path, leaf in leaves.items():
        for depth in range(1, len(path)):
            if path[:depth] not in inner:
                made: dict[str | int, Any] = {}
                _insert(inner, path[:depth], made, where)
                inner[path[:depth]] = made
        _insert(inner, path, leaf, where)
    return _shaped(root, (), inner, containers)


def _insert(inner: Mapping[KeyPath, dict[str | int, Any]], path: KeyPath, value: Any, where: object) -> None:
    around = inner[path[:-1]] if path else {}
    if not path or path[-1] in around:
        raise UnsupportedCheckpoint("a key path that lies inside another leaf", where=f"{where} :: {display(path)}")
    around[path[-1]] = value


def _shaped(
    part: Any,
    path: KeyPath,
    inner: Mapping[KeyPath, dict[str | int, Any]],
    containers: Mapping[KeyPath, type[Any]],
) -> Any:
    if path not in inner:
        # An empty container, or a leaf.
        return containers[path]() if path in containers and type(part) in _EMPTY else part
    children = {key: _shaped(child, (*path, key), inner, containers) for key, child in part.items()}
    kind = containers.get(path, list if children else dict)
    if kind in (dict, OrderedDict) or list(children) != list(range(len(children))):
        return kind(children) if kind is OrderedDict else children
    return kind(children.values())
