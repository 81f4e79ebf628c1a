"""Names of tensors in torch models: from those of a live model, which adapters use, to those of a checkpoint on disk.

An adapter is named after the modules of the model that it was trained in. Four things set those names apart from the names in the
base checkpoint:

- wrappers (DDP, ``torch.compile``, FSDP, activation checkpointing) add parts of their own;
- Transformers renames what it loads: from version 5 on nearly all vision-language models, some mixtures of experts and vision
  encoders have other names in memory than on disk, and save under those of the disk;
- a checkpoint of the bare model (``AutoModel``) lacks the prefix that the model with a head gives it, or the reverse;
- a training file keeps the model under a key of its own, beside the optimiser's state and perhaps an average of the model.

The renamings that exist are listed in `torch_renames`. Nothing is guessed from similar spelling.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.torch_renames import (
    CONTAINERS,
    FAMILIES,
    HEAD_PREFIXES,
    VISION_TOWERS,
    Step,
    identity,
    prefixing,
)
from lora_merge_cli.errors import UnmatchedAdapter
from lora_merge_cli.records import KeyPath, display, first_names

_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DATA_PARALLEL = re.compile(r"(?:module\.)+")

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_BLANK = "\0"

_Placing = dict[str, KeyPath]


def clean_name(name: str) -> str:
    """The name without the parts that wrappers add.

    ``module.`` goes at the start only: within a name it may be the model's own.
    """
    if "_orig_mod." in name or "_wrapped_module." in name:
        name = _WRAPPER.sub("", name)
    return _DATA_PARALLEL.sub("", name, count=1) if name.startswith("module.") else name


def dotted(path: KeyPath) -> str:
    """The cleaned name that a key path spells, nested or not: ``("model", "layers.0.weight")`` is ``model.layers.0.weight``.

    Wrappers go at the start of every part: each may be the name of a tensor in a state dict that a larger one holds. The key of
    that state dict stays, so that leaves of two of them keep two names.
    """
    if len(path) == 1:
        return clean_name(str(path[0]))
    return clean_name(".".join(clean_name(str(part)) for part in path))


def match_names(wanted: Sequence[str], base: Tree) -> Mapping[str, KeyPath]:
    """Find tensors of a live model in a base checkpoint.

    A name that the base has is taken as it is. The others go through one renaming, the same for all of them: the one that places
    the most. Which ones are tried depends on ``model_type`` in the base's configuration; without a configuration all are.

    The state dicts in a training file are also searched one by one, by the names inside; what places the most counts here too.

    Args:
        wanted: Names as in the live model, for example ``model.layers.0.self_attn.q_proj.weight``.
        base: The checkpoint.

    Returns:
        The base's key path for each name that could be placed; no path twice.

    Raises:
        UnmatchedAdapter: Two renamings or two state dicts place equally many names and differ in where, or a name stands for
            several keys.
    """
    inside = _state_dicts(base)
    placings = [_match(wanted, named, base) for key, named in inside.items() if key in CONTAINERS]
    most = max(map(len, placings), default=0)
    best = [placing for placing in placings if placing and len(placing) == most]
    _refuse_several(best, inside, base)
    found = _match(wanted, {path: dotted(path) for path in base.index.tensors}, base)
    if len(found) == most:
        _refuse_several([found, *best], inside, base)
    return best[0] if best and most > len(found) else found


def _state_dicts(base: Tree) -> dict[str, dict[KeyPath, str]]:
    """The names of nested leaves without the first part of their paths, by that part."""
    inside: dict[str, dict[KeyPath, str]] = {}
    for path in base.index.tensors:
        if len(path) > 1 and isinstance(path[0], str):
            inside.setdefault(path[0], {})[path] = dotted(path[1:])
    return inside if inside.keys() & CONTAINERS else {}


def _refuse_several(best: Sequence[_Placing], inside: Mapping[str, Mapping[KeyPath, str]], base: Tree) -> None:
    """Refuse equally good placings that differ, and one in a state dict whose names another state dict has too."""
    if not best:
        return
    first = best[0]
    name, path = next(iter(first.items()), ("", ()))
    other = next((placing for placing in best[1:] if placing != first), None)
    if other is not None:
        name = next(name for name in first if first[name] != other.get(name))
        keys = [display(first[name]), display(other[name]) if name in other else "nowhere"]
    else:
        keys = [display(path), *_copies(first, inside)]
    if len(keys) > 1:
        raise UnmatchedAdapter(
            "the adapter's names fit several models in the checkpoint",
            where=f"{base.where} :: {name}",
            expected="one model that has them",
            found=first_names(keys),
            hint="save the one to merge into in a file of its own",
        )


def _copies(placing: _Placing, inside: Mapping[str, Mapping[KeyPath, str]]) -> Iterator[str]:
    """Where else the first of the names is: in state dicts, whatever their key, that have all the names of the one in use."""
    keys = {path[0] for path in placing.values()}
    # Deeper trees are of modules, whose parts may well have layers of the same names.
    if len(keys) != 1 or not keys <= CONTAINERS or any(len(path) != 2 for path in placing.values()):
        return
    (used,) = keys
    names = [inside[str(used)][path] for path in placing.values()]
    for key, named in inside.items():
        paths = {name: path for path, name in named.items() if len(path) == 2}
        if key != used and all(name in paths for name in names):
            yield display(paths[names[0]])


def _match(wanted: Sequence[str], named: Mapping[KeyPath, str], base: Tree) -> _Placing:
    """Find tensors of a live model among those paths, by the names that they go by here."""
    known, double = _by_name(named.items())
    cleaned = dict.fromkeys(map(clean_name, wanted))
    exact = {name: known[name] for name in cleaned if name in known}
    rest = [name for name in cleaned if name not in exact]
    placing = {**exact, **_best_renaming(rest, set(exact.values()), known, base)}
    found = {name: placing[clean_name(name)] for name in wanted if clean_name(name) in placing}
    unclear = [path for path in found.values() if path in double]
    if unclear:
        raise UnmatchedAdapter(
            "a module's name stands for several keys of the checkpoint",
            where=f"{base.where} :: {first_names(double[unclear[0]])}",
            hint="keep one of them",
        )
    return found


def nearest_names(name: str, base: Tree, count: int = 3) -> tuple[str, ...]:
    """The names in a checkpoint that are spelled most like the given one, for an error's text.

    Names that end in the same two parts are preferred: comparing letters alone confuses one layer with another.
    """
    name = clean_name(name)
    names = list(dict.fromkeys(map(dotted, base.index.tensors)))
    tail = ".".join(name.split(".")[-2:])
    alike = [other for other in names if other.endswith(tail)]
    return tuple(_closest(name, alike or names, count))


def _closest(name: str, names: Sequence[str], count: int) -> list[str]:
    # Full comparisons are slow: only the names with the most parts in common get one.
    parts = set(name.split("."))
    shortlist = sorted(names, key=lambda other: -len(parts & set(other.split("."))))[: 20 * count]
    return difflib.get_close_matches(name, shortlist, count, cutoff=0.4)


def _by_name(
    named: Iterable[tuple[KeyPath, str]],
) -> tuple[dict[str, KeyPath], dict[KeyPath, tuple[str, ...]]]:
    """The paths by name, and for the paths that share their name all of those that do."""
    by_name: dict[str, list[KeyPath]] = {}
    for path, name in named:
        by_name.setdefault(name, []).append(path)
    double = {
        paths[0]: tuple(".".join(map(str, path)) for path in paths) for paths in by_name.values() if len(paths) > 1
    }
    return {name: paths[0] for name, paths in by_name.items()}, double


def _best_renaming(
    rest: Sequence[str], taken: set[KeyPath], known: Mapping[str, KeyPath], base: Tree
) -> Mapping[str, KeyPath]:
    """Where the one renaming that places the most of the names puts them; nowhere if none does better than none at all."""
    best: list[tuple[str, _Placing]] = []
    # Names that differ in numbers alone are renamed alike, so that thousands of them cost as much as a few.
    patterns = {name: _without_numbers(name) for name in rest}
    distinct = list(dict.fromkeys(pattern for pattern, _ in patterns.values()))
    present = {_without_numbers(name)[0] for name in known}
    for title, renamed in _renamings(distinct, base) if rest else ():
        fitting = {old: new for old, new in zip(distinct, renamed, strict=True) if new in present}
        if not fitting:
            continue
        placing: _Placing = {}
        for name, (pattern, numbers) in patterns.items():
            path = known.get(_with_numbers(fitting[pattern], numbers)) if pattern in fitting else None
            if path is not None:
                placing[name] = path
        paths = set(placing.values())
        if not placing or len(paths) < len(placing) or paths & taken:
            continue
        most = len(best[0][1]) if best else 0
        if len(placing) > most:
            best = [(title, placing)]
        elif len(placing) == most and all(placing != other for _, other in best):
            best.append((title, placing))
    if len(best) > 1:
        (one, first), (other, second) = best[:2]
        example = next(name for name in rest if first.get(name) != second.get(name))
        places = [dotted(placing[example]) if example in placing else "nowhere" for placing in (first, second)]
        raise UnmatchedAdapter(
            "the adapter's names fit the checkpoint in more than one way",
            where=f"{base.where} :: {example}",
            expected="one renaming that places the most names",
            found=f"{places[0]} ({one}) and {places[1]} ({other})",
            hint="rename the adapter's keys to those of the checkpoint",
        )
    return best[0][1] if best else {}


def _without_numbers(name: str) -> tuple[str, list[str]]:
    """The name with a blank for each part that is a number, and those numbers."""
    return _NUMBER.sub(_BLANK, name), _NUMBER.findall(name)


def _with_numbers(pattern: str, numbers: Sequence[str]) -> str:
    """The name that a pattern stands for: no renaming adds, drops or swaps numbers."""
    texts = pattern.split(_BLANK)
    return "".join(itertools.chain(*itertools.zip_longest(texts, numbers, fillvalue="")))


def _renamings(names: Sequence[str], base: Tree) -> Iterator[tuple[str, list[str]]]:
    """Every renaming: of a model family, of a vision tower and of the prefix of the whole, each optional and in this order."""
    heads = [identity, *(step for prefix in HEAD_PREFIXES for step in prefixing(prefix))]
    towers = [identity, *VISION_TOWERS]
    for (family, named), tower in itertools.product(_as_families(names, base), towers):
        renamed = [tower(name) for name in named]
        if tower is not identity and renamed == named:
            continue
        for head in heads:
            title = ", ".join(filter(None, [family, tower.title, head.title]))
            if title:
                yield title, [head(name) for name in renamed]


def _as_families(names: Sequence[str], base: Tree) -> list[tuple[str, list[str]]]:
    """The names as they are, and what each family's renaming makes of them where that is nothing that another one makes."""
    made: list[tuple[str, list[str]]] = [("", list(names))]
    for step in _families(base):
        # The tables are of models with a head, whose names begin with model; those of the bare model do not.
        for prefix in ("", "model."):
            renamed = [step(prefix + name) for name in names]
            if all(renamed != other for _, other in made):
                made.append((step.title, renamed))
    return made


def _families(base: Tree) -> Iterator[Step]:
    """The renamings of the base's model type, both ways; those of all types if it has no configuration."""
    types = model_types(base)
    for family in FAMILIES:
        if not types or types & family.model_types:
            yield family.to_disk
            yield family.to_memory


def model_types(base: Tree) -> frozenset[str]:
    """The model types that the base's configuration names, for the whole and for its parts; none without a configuration."""
    config = base.config or {}
    nested = (value for value in config.values() if isinstance(value, Mapping))
    found = (part.get("model_type") for part in (config, *nested))
    return frozenset(name for name in found if isinstance(name, str))
