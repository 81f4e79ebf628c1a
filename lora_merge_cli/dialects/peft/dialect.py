"""PEFT: adapters of Hugging Face's library, saved as a directory with ``adapter_config.json`` beside the weights.

The parts of the work, in order: `config` reads the configuration, `keys` claims every key, `names` finds the base's tensors,
`saved` sees that what was trained whole is there, `tying` decides about tied embeddings, `riding` places what replaces values of
the base, `sites` what is added to them. Other methods than LoRA have their own configurations, keys and sites, in `methods`; the
rest is the same for all.

Source: huggingface/peft, ``src/peft/tuners``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

from lora_merge_cli.dialects.interface import ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.peft.bases import base_problems, wrong_base
from lora_merge_cli.dialects.peft.config import TOKENS, AdapterConfig, read_config
from lora_merge_cli.dialects.peft.keys import Keys, Layer, Whole, is_peft_name, read_keys
from lora_merge_cli.dialects.peft.methods import method_of
from lora_merge_cli.dialects.peft.methods import survey as methods
from lora_merge_cli.dialects.peft.methods.config import read_config as read_method_config
from lora_merge_cli.dialects.peft.methods.interface import Method
from lora_merge_cli.dialects.peft.methods.keys import layer_problems as method_problems
from lora_merge_cli.dialects.peft.methods.keys import read_method_keys
from lora_merge_cli.dialects.peft.names import Names
from lora_merge_cli.dialects.peft.patterns import rank_of
from lora_merge_cli.dialects.peft.riding import read_rows, read_whole, vocabulary, whole_reason
from lora_merge_cli.dialects.peft.saved import saved_problems
from lora_merge_cli.dialects.peft.sites import (
    Found,
    find_sites,
    layer_problems,
    layer_scale,
    mirrored,
    pattern_name,
    wanted_names,
)
from lora_merge_cli.dialects.peft.tying import Tying, settle
from lora_merge_cli.dialects.torch_model import TorchModel
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.errors import UnknownScale, UnmatchedAdapter, UnsupportedCheckpoint, UsageError
from lora_merge_cli.records import AdapterRow, AdapterSite, AdapterSummary, KeyPath, Replacement, Survey


class Peft(TorchModel):
    """PEFT's spellings and rules."""

    name = "peft"

    def matches(self, tree: Tree) -> bool:
        """See `Dialect.matches`: an adapter's configuration, or keys as PEFT writes them."""
        if tree.config is not None and "peft_type" in tree.config:
            return True
        return any(is_peft_name(dotted(path)) for path in tree.index.tensors)

    def of(self, adapter: Tree) -> Peft:  # noqa: ARG002  (others ask it)
        """See `AdapterDialect.of`: one for all."""
        return self

    def survey(self, subject: Subject, options: ScaleOptions) -> Survey:
        """See `Dialect.survey`."""
        if subject.adapter is None:
            return Survey((), problems=(UsageError("no adapter is given", hint="name it with --adapter"),))
        adapter, base = subject.adapter, subject.checkpoint
        method = method_of(adapter.config)
        if method is not None:
            return _survey_method(method, adapter, base, options)
        reading = read_config(adapter, options, subject.residual_base)
        config = reading.config
        if config is None:
            return Survey((), problems=reading.problems)
        keys = read_keys(adapter)
        problems = [*reading.problems, *base_problems(base), *keys.problems]
        problems += layer_problems(keys, config, adapter.where)
        problems += _misplaced(keys, config, adapter.where)
        wanted = wanted_names(keys, base)
        find = functools.partial(find_sites, keys, config, adapter, base)
        return _survey(keys, config, adapter, base, problems, reading.notes, wanted, find)

    def describe(self, adapter: Tree, options: ScaleOptions) -> AdapterSummary:
        """See `AdapterDialect.describe`."""
        method = method_of(adapter.config)
        if method is not None:
            return _describe_method(method, adapter, options)
        reading = read_config(adapter, options)
        config = reading.config
        if config is None:
            named = str((adapter.config or {}).get("peft_type"))
            return AdapterSummary(named, None, (), (), reading.problems)
        keys = read_keys(adapter)
        problems = [*reading.problems, *keys.problems, *layer_problems(keys, config, adapter.where)]
        problems += _misplaced(keys, config, adapter.where)
        return AdapterSummary(
            _method(keys, config),
            config.base,
            tuple(row for layer in keys.layers.values() for row in _rows(layer, config)),
            tuple(_riding(keys, config)),
            tuple(problems),
            reading.notes,
        )

    def unknown_scale(self, sites: Sequence[AdapterSite], where: str) -> UnknownScale:
        """See `Dialect.unknown_scale`."""
        ranks = sorted({site.parameters.rank for site in sites})
        return UnknownScale(
            "the LoRA scale is not stated: there is no adapter_config.json beside the adapter",
            where=f"{where} :: {sites[0].name}",
            found=f"rank {', '.join(map(str, ranks))} and no alpha",
            hint="pass --lora-alpha ALPHA, and --rslora if it was trained so",
        )


_Find = Callable[[Names, Mapping[KeyPath, tuple[int, ...]]], Found]
"""Finds the sites, given where the base's tensors are and which shapes are replaced."""


def _survey_method(method: Method, adapter: Tree, base: Tree, options: ScaleOptions) -> Survey:
    reading = read_method_config(method, adapter, options)
    config = reading.config
    keys = read_method_keys(method, adapter, config)
    problems = [*reading.problems, *base_problems(base), *keys.problems]
    problems += method_problems(method, keys, adapter.where)
    wanted = [*wanted_names(keys.rest, base), *methods.wanted_names(keys)]

    def find(names: Names, shapes: Mapping[KeyPath, tuple[int, ...]]) -> Found:
        return methods.find_sites(method, keys, config, base, names, shapes, adapter.where)

    survey = _survey(keys.rest, config.common, adapter, base, problems, (), wanted, find)
    values = {keys.rest.whole[name].spec.path for name in _values(keys.tuned)}
    return dataclasses.replace(
        survey,
        replacements=tuple(
            dataclasses.replace(one, reason=method.title) if one.path in values else one for one in survey.replacements
        ),
    )


def _describe_method(method: Method, adapter: Tree, options: ScaleOptions) -> AdapterSummary:
    reading = read_method_config(method, adapter, options)
    keys, common = read_method_keys(method, adapter, reading.config), reading.config.common
    values = set(_values(keys.tuned))
    return AdapterSummary(
        method.title,
        common.base,
        tuple(methods.rows(method, keys, adapter.where)),
        (
            *(f"{name}: {method.title}" for name in keys.rest.whole if name in values),
            *_riding(dataclasses.replace(keys.rest, whole=_without(keys.rest.whole, values)), common),
        ),
        (*reading.problems, *keys.problems, *method_problems(method, keys, adapter.where)),
    )


def _values(tuned: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The names of tensors whose values the method itself replaces."""
    for module, leaves in tuned.items():
        yield from (f"{module}.{leaf}" for leaf in leaves)


def _without(whole: Mapping[str, Whole], names: Container[str]) -> dict[str, Whole]:
    return {name: one for name, one in whole.items() if name not in names}


def _survey(
    keys: Keys,
    config: AdapterConfig,
    adapter: Tree,
    base: Tree,
    problems: list[Exception],
    notes: Sequence[str],
    wanted: Iterable[str],
    find: _Find,
) -> Survey:
    try:
        names = Names(wanted, base)
    except UnmatchedAdapter as error:
        return Survey((), problems=(*problems, error))
    problems = [*problems, *saved_problems(keys, config, base, names, adapter.where)]
    tying = settle(keys, config, base, names, adapter.where)
    whole = read_whole(keys, config, base, names, adapter.where)
    replaced = [*whole.replacements, *tying.replaced]
    shapes = _shapes(tying, replaced, adapter, base)
    rows = read_rows(keys, config, base, names, shapes, adapter.where)
    found = find(names, shapes)
    replaced += rows.replacements
    sites = list(found.sites)
    if tying.mirrored is not None:
        first, second = tying.mirrored
        sites += [mirrored(site, second) for site in found.sites if site.targets == (first,)]
        replaced += [dataclasses.replace(one, target=second) for one in replaced if one.target == first]
    problems = [*problems, *tying.problems, *found.problems, *whole.problems, *rows.problems]
    resized = vocabulary(replaced, adapter, base)
    changes = dict(tying.config)
    if isinstance(resized, Exception):
        problems.append(resized)
    else:
        changes.update(resized)
    warning = wrong_base(config.base, base)
    return Survey(
        sites=tuple(sites),
        dropped=(*keys.dropped, *tying.dropped),
        problems=tuple(problems),
        notes=(*notes, *tying.notes),
        warnings=tuple(filter(None, [*tying.warnings, *whole.warnings, *found.warnings, warning])),
        replacements=tuple(sorted(replaced, key=lambda one: one.rows is not None)),
        created=tuple(tying.created),
        equal=tuple(tying.equal),
        config=changes,
    )


def _shapes(tying: Tying, replaced: Sequence[Replacement], adapter: Tree, base: Tree) -> dict[KeyPath, tuple[int, ...]]:
    """The shapes of leaves that are created or replaced."""
    shapes = {one.path: base.index.tensors[one.source].shape for one in tying.created}
    return shapes | {one.target: adapter.index.tensors[one.path].shape for one in replaced}


def _misplaced(keys: Keys, config: AdapterConfig, where: str) -> Iterator[Exception]:
    if config.method == TOKENS and keys.layers:
        yield UnsupportedCheckpoint(
            "factors in an adapter whose peft_type is TRAINABLE_TOKENS",
            where=f"{where} :: {next(iter(keys.layers))}",
        )


def _method(keys: Keys, config: AdapterConfig) -> str:
    if not keys.layers:
        return "trained token rows" if keys.rows else "tensors brought whole"
    if any("magnitude" in layer.tensors for layer in keys.layers.values()):
        return "DoRA, rank-stabilised" if config.rslora else "DoRA"
    return "rsLoRA" if config.rslora else "LoRA"


def _rows(layer: Layer, config: AdapterConfig) -> Iterator[AdapterRow]:
    for depth, tensors in sorted(layer.nested.items(), reverse=True):
        embedding = "embedding_a" in tensors
        a = tensors.get("embedding_a" if embedding else "lora_a")
        b = tensors.get("embedding_b" if embedding else "lora_b")
        if a is None or b is None or len(a.shape) < 2 or not b.shape or not a.shape[0]:
            continue
        stated = rank_of(config, pattern_name(layer, config))
        # The factors of stacked experts lie beside each other: their extent is a multiple of the rank.
        stacked = layer.module.endswith("experts") and stated is not None and a.shape[0] % stated == 0
        rank = stated if stacked and stated is not None else a.shape[0]
        yield AdapterRow(
            layer.module + ".base_layer" * depth, rank, layer_scale(layer, config, rank), (b.shape[0], a.shape[1])
        )


def _riding(keys: Keys, config: AdapterConfig) -> Iterator[str]:
    for whole in keys.whole.values():
        yield f"{whole.name}: {whole_reason(whole, config)}"
    for rows in keys.rows.values():
        yield f"{rows.module}: {rows.spec.shape[0] if rows.spec.shape else 0} trained token rows"
