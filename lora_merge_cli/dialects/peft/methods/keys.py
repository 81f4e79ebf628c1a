"""Keys of an adapter of another method than LoRA.

They are ``base_model.model.<module>.<suffix>``, and ``base_model.<name>`` for what all modules share. PEFT takes the adapter's own
name out of them; raw state dicts leave it in, ``hada_w1_a.default`` or ``oft_R.default.weight``.

Source: huggingface/peft 0.21, ``src/peft/utils/save_and_load.py`` and ``src/peft/tuners/tuners_utils.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.keys import PREFIX, Keys, Layer, Whole, read_keys
from lora_merge_cli.dialects.peft.methods.fitting import incomplete
from lora_merge_cli.dialects.peft.methods.interface import Adapted, Method, MethodConfig
from lora_merge_cli.dialects.torch_names import clean_name, dotted
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import Dropped, TensorSpec, first_names

_ROOT = "base_model."
_NAMED = r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?"


@dataclass
class MethodKeys:
    """Every key of an adapter, claimed once."""

    rest: Keys
    """What is not of the method: brought whole, or no key that anything explains. Its layers name the adapted modules."""
    layers: dict[str, Adapted] = field(default_factory=dict)
    """The adapted modules by path."""
    tuned: dict[str, set[str]] = field(default_factory=dict)
    """Modules whose own values the method replaces, with the tensors that the file has."""
    missing: list[Exception] = field(default_factory=list)
    """Tensors that all modules share, and that the file lacks."""

    @property
    def problems(self) -> Iterator[Exception]:
        """Keys that cannot be claimed, and what is missing."""
        yield from self.rest.problems
        yield from self.missing


@dataclass
class _Found:
    """What a pass over the keys finds."""

    modules: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    shared: dict[str, TensorSpec] = field(default_factory=dict)
    copies: list[tuple[str, TensorSpec]] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)
    twice: list[str] = field(default_factory=list)
    unsupported: dict[str, list[str]] = field(default_factory=dict)


def read_method_keys(method: Method, adapter: Tree, config: MethodConfig) -> MethodKeys:
    """Claim every key of an adapter by what its name says.

    Args:
        method: The method that its configuration names.
        adapter: The adapter.
        config: What that configuration says.
    """
    found, others = _Found(), dict(adapter.index.tensors)
    for path, spec in adapter.index.tensors.items():
        if _claim(method, dotted(path), spec, found):
            del others[path]
    index = dataclasses.replace(adapter.index, tensors=others)
    keys = MethodKeys(read_keys(dataclasses.replace(adapter, index=index)))
    rest = keys.rest
    rest.problems[:0] = _problems(found, adapter.where)
    rest.problems += _strangers(method, rest, adapter.where)
    rest.layers.clear()
    rest.rows.clear()
    for module, tensors in found.modules.items():
        if method.replaces:
            _add_values(keys, module, tensors)
        elif tensors and all(0 in spec.shape for spec in tensors.values()):
            reason = f"{method.title} pruned all of this layer's ranks: nothing is left to add"
            rest.dropped += [Dropped(spec.path, reason) for spec in tensors.values()]
        else:
            keys.layers[module] = Adapted(module, tensors | found.shared, config)
            rest.layers[module] = Layer(module, module)
    lacking = set(method.shared.values()) - set(found.shared)
    if lacking and keys.layers:
        keys.missing.append(_without_shared(method, lacking, adapter.where))
    rest.dropped += _copies(found)
    return keys


def layer_problems(method: Method, keys: MethodKeys, where: str) -> Iterator[Exception]:
    """What is wrong with the modules whatever the base: factors that are missing, and factors that are integers."""
    for layer in keys.layers.values():
        problem = None if keys.missing else incomplete(layer, method.complete, method.title, where)
        if problem is not None:
            yield problem
        for role, spec in layer.tensors.items():
            if role not in method.integers and not is_float(spec.dtype):
                yield UnsupportedCheckpoint("factors that are not floating-point", where=f"{where} :: {spec.name}")


def _claim(method: Method, name: str, spec: TensorSpec, found: _Found) -> bool:
    """Whether a key is the method's."""
    live = clean_name(name.removeprefix(PREFIX))
    if not name.startswith(PREFIX):
        shared = _match(clean_name(name.removeprefix(_ROOT)), method.shared, module=False)
        if shared is not None:
            _note(found, shared)
            if found.shared.setdefault(method.shared[shared[1]], spec) is not spec:
                found.twice.append(spec.name)
            return True
    for suffixes in (method.suffixes, method.shared, method.unsupported):
        match = _match(live, suffixes, module=True)
        if match is None:
            continue
        _note(found, match)
        module, suffix, _ = match
        if suffixes is method.unsupported:
            found.unsupported.setdefault(method.unsupported[suffix], []).append(spec.name)
        elif suffixes is method.shared:
            found.copies.append((method.shared[suffix], spec))
        elif found.modules.setdefault(module, {}).setdefault(method.suffixes[suffix], spec) is not spec:
            found.twice.append(spec.name)
        return True
    return False


def _match(name: str, suffixes: Iterable[str], *, module: bool) -> tuple[str, str, str | None] | None:
    """Module, suffix and the adapter's name of a key that ends with one of some suffixes."""
    for suffix in suffixes:
        word, dot, leaf = suffix.partition(".")
        start = r"(?P<module>.+)\." if module else r"(?P<module>)"
        match = re.fullmatch(f"{start}{re.escape(word)}{_NAMED}{re.escape(dot + leaf)}", name)
        if match is not None:
            return match["module"], suffix, match["adapter"]
    return None


def _note(found: _Found, match: tuple[str, str, str | None]) -> None:
    if match[2] is not None:
        found.adapters.add(match[2])


def _add_values(keys: MethodKeys, module: str, tensors: dict[str, TensorSpec]) -> None:
    keys.tuned[module] = set(tensors)
    for leaf, spec in tensors.items():
        name = f"{module}.{leaf}"
        if name in keys.rest.whole:
            keys.rest.problems.append(
                UnmatchedAdapter("two keys for the same tensor of the model", where=f"{spec.name}, {name}")
            )
        keys.rest.whole[name] = Whole(name, spec, wrapped=False)


def _problems(found: _Found, where: str) -> Iterator[Exception]:
    for what, names in found.unsupported.items():
        yield UnsupportedCheckpoint(f"{what}: not supported", where=f"{where} :: {first_names(names, 2)}")
    if len(found.adapters) > 1:
        yield UnsupportedCheckpoint(
            "several adapters in one file",
            where=where,
            found=first_names(sorted(found.adapters)),
            hint="save each of them by itself with save_pretrained",
        )
    elif found.twice:
        yield UnmatchedAdapter(
            "two keys for the same tensor of the model", where=f"{where} :: {first_names(found.twice, 2)}"
        )


def _strangers(method: Method, rest: Keys, where: str) -> Iterator[Exception]:
    """Keys of LoRA, and trained rows, which PEFT writes for no other method."""
    for what, names in (("LoRA's factors", list(rest.layers)), ("trained token rows", list(rest.rows))):
        if names:
            yield UnsupportedCheckpoint(
                f"{what} in an adapter whose peft_type is {method.peft_types[0]}",
                where=f"{where} :: {first_names(names, 2)}",
            )


def _without_shared(method: Method, lacking: set[str], where: str) -> UnsupportedCheckpoint:
    names = [name for name, role in method.shared.items() if role in lacking]
    return UnsupportedCheckpoint(
        f"{method.title} without its random matrices: they would have to be drawn again as torch draws them",
        where=where,
        expected=", ".join(f"{_ROOT}{name}" for name in names),
        hint="load it with peft and save it with save_projection=True",
    )


def _copies(found: _Found) -> Sequence[Dropped]:
    """Tensors that all modules share, once more for each of them: PEFT loads all into one."""
    return [
        Dropped(spec.path, f"a layer's copy of {found.shared[role].name} (from the name; the values were not compared)")
        for role, spec in found.copies
        if role in found.shared
    ]
