"""Embeddings that share their weight with the head, and adapters that are on one of the two, or on both.

PEFT adapts each layer by itself, and merges into the one tensor that both share: the layer that the adapter was not on changes too.
What the trained model computes is what must come out, so the two are kept as separate tensors unless the adapter was tied as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.config import AdapterConfig
from lora_merge_cli.dialects.peft.heads import has_no_head, saved_bare
from lora_merge_cli.dialects.peft.keys import Keys, Layer, Rows, Whole
from lora_merge_cli.dialects.peft.names import Names, is_embedding, is_head, module_of, spelled
from lora_merge_cli.dialects.peft.patterns import scale_of
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.errors import CorruptCheckpoint, ShapeMismatch, UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import Created, Dropped, KeyPath, Replacement, TensorSpec

_BACKBONES = frozenset({"model", "transformer", "decoder", "gpt_neox", "backbone"})

_MIRRORED = "the same as {other}: the two are tied, and trained as one (from the shapes; the values were not compared)"


@dataclass
class Tying:
    """What becomes of tied embeddings."""

    created: list[Created] = field(default_factory=list)
    """The head, where it is no longer tied: whatever the adapter does to it, it starts as the embedding."""
    replaced: list[Replacement] = field(default_factory=list)
    """Tensors that both of the two need, and that the adapter holds for one of them."""
    mirrored: tuple[KeyPath, KeyPath] | None = None
    """Two leaves that stay tied and are both stored: what changes the first changes the second."""
    equal: list[tuple[KeyPath, KeyPath]] = field(default_factory=list)
    """Leaves of the base that must be the same."""
    dropped: list[Dropped] = field(default_factory=list)
    """Keys that say a second time what others say."""
    config: dict[str, Any] = field(default_factory=dict)
    """What changes in the model's configuration."""
    problems: list[Exception] = field(default_factory=list)
    """Why no merge can be right."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the report should know."""
    warnings: list[str] = field(default_factory=list)
    """What should make a reader stop."""


@dataclass
class _Side:
    """What an adapter has for one of the two layers."""

    module: str
    factors: Layer | None
    whole: Whole | None
    rows: Rows | None

    @property
    def own(self) -> Whole | None:
        """What it brings whole, trained by itself."""
        return self.whole if self.whole is not None and not self.whole.wrapped else None

    @property
    def copy(self) -> Whole | None:
        """What it brings whole as the base of its factors or rows."""
        return self.whole if self.whole is not None and self.whole.wrapped else None


@dataclass(frozen=True)
class _Pair:
    """The two leaves."""

    embedding: KeyPath
    head: KeyPath
    stored: bool
    """Whether the base holds the head as well."""
    shape: tuple[int, ...]


def settle(keys: Keys, config: AdapterConfig, base: Tree, names: Names, where: str) -> Tying:
    """Decide what becomes of tied embeddings, and place the head among the names where it gets a leaf of its own.

    What the decision makes superfluous is taken out of `keys`, with a reason.

    Args:
        keys: The adapter's keys.
        config: Its configuration.
        base: The checkpoint.
        names: Where its tensors are.
        where: The adapter, for errors.
    """
    tying = Tying()
    modules = [*keys.layers, *(name.removesuffix(".weight") for name in keys.whole), *keys.rows]
    embeddings = [m for m in dict.fromkeys(modules) if is_embedding(m) and names.path(f"{m}.weight") is not None]
    heads = [m for m in dict.fromkeys(modules) if is_head(m)]
    if not embeddings and not heads:
        return tying
    if has_no_head(keys, config, base, names):
        return tying
    pair = _pair(embeddings, heads, base, names)
    if pair is None:
        return tying
    if isinstance(pair, Exception):
        tying.problems.append(pair)
        return tying
    embedding = _side(keys, next((m for m in embeddings if names.path(f"{m}.weight") == pair.embedding), ""))
    head = _side(keys, heads[0] if heads else "")
    if pair.stored:
        tying.equal.append((pair.embedding, pair.head))
    if embedding.rows is not None or head.rows is not None:
        _share_rows(tying, keys, embedding, head, where)
        kept = True
    elif config.tied:
        _share(tying, keys, config, embedding, head, where)
        if embedding.factors is None and embedding.whole is None and head.module:
            names.place(f"{head.module}.weight", pair.embedding)
        kept = True
    else:
        kept = _untie(tying, pair, embedding, head, base, names, where)
    if kept and pair.stored:
        tying.mirrored = (pair.embedding, pair.head)
    return tying


def _side(keys: Keys, module: str) -> _Side:
    return _Side(module, keys.layers.get(module), keys.whole.get(f"{module}.weight"), keys.rows.get(module))


def _pair(embeddings: list[str], heads: list[str], base: Tree, names: Names) -> _Pair | Exception | None:
    """The two leaves if they are tied; None if they are not."""
    stored = {path: spec for path, spec in base.index.tensors.items() if len(spec.shape) == 2}
    ends = [path for path in stored if is_head(module_of(path)) and dotted(path).endswith(".weight")]
    placed = [path for module in heads if (path := names.path(f"{module}.weight")) is not None]
    malformed = _malformed(base)
    if malformed is not None:
        return malformed
    if not _says_tied(base.config, bool(ends or placed)):
        return None
    touched = dict.fromkeys(path for module in embeddings if (path := names.path(f"{module}.weight")) is not None)
    starts = list(touched) or [
        path for path in stored if is_embedding(module_of(path)) and dotted(path).endswith(".weight")
    ]
    if not starts:
        return None
    if len(starts) != 1 or len(heads) > 1:
        return UnsupportedCheckpoint(
            "tied embeddings of which it is not clear what is tied to what",
            where=base.where,
            expected="one embedding of tokens, and one head",
            found=", ".join([*map(dotted, starts), *heads][:4]) or "none",
        )
    start = starts[0]
    shape = stored[start].shape if start in stored else ()
    ends = placed or [path for path in ends if stored[path].shape == shape]
    if ends:
        return _Pair(start, ends[0], True, shape)
    return _Pair(start, spelled(_head_name(dotted(start), heads), base), False, shape)


def _malformed(base: Tree) -> CorruptCheckpoint | None:
    """What is wrong with the configuration's word on whether the two are tied."""
    config = base.config or {}
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        value = section.get("tie_word_embeddings")
        if value is not None and not isinstance(value, bool):
            return CorruptCheckpoint(
                "tie_word_embeddings makes no sense",
                where=f"{base.where} :: config.json",
                expected="true or false",
                found=repr(value)[:80],
            )
    return None


def _says_tied(config: Mapping[str, Any] | None, has_head: bool) -> bool:
    whole = (config or {}).get("tie_word_embeddings")
    text = ((config or {}).get("text_config") or {}) if config else {}
    part = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    if whole is None and part is None:
        return not has_head
    return whole is True or (part is True and (whole is None or not has_head))


def _head_name(embedding: str, heads: list[str]) -> str:
    """What the head of a model is called on disk, from the embedding's name there."""
    *parents, module, _ = embedding.split(".")
    last = heads[0].rsplit(".", maxsplit=1)[-1] if heads else "embed_out" if module == "embed_in" else "lm_head"
    if parents[:1] == ["model"]:
        parents = []
    while parents and parents[-1] in _BACKBONES:
        parents.pop()
    return ".".join([*parents, last, "weight"])


def _share_rows(tying: Tying, keys: Keys, embedding: _Side, head: _Side, where: str) -> None:
    """Trained rows: the head follows its embedding."""
    others = [side.module for side in (embedding, head) if side.factors is not None or side.own is not None]
    if others or embedding.rows is None:
        tying.problems.append(
            UnsupportedCheckpoint(
                "trained rows of tied embeddings, and another change of one of the two",
                where=f"{where} :: {', '.join(others) or head.module}",
                expected="trained rows of the embedding alone",
            )
        )
        return
    if head.rows is not None:
        _drop_twin(tying, head.rows.spec, embedding.rows.spec, where)
        del keys.rows[head.module]
    _drop_whole(tying, keys, embedding, head, where)


def _share(tying: Tying, keys: Keys, config: AdapterConfig, embedding: _Side, head: _Side, where: str) -> None:
    """``ensure_weight_tying``: one adapter for both, which the file holds twice."""
    if embedding.factors is not None and head.factors is not None:
        if not _mirrors(embedding.factors, head.factors, config):
            tying.problems.append(
                ShapeMismatch(
                    "tied layers with adapters that are not the same",
                    where=f"{where} :: {head.module}",
                    expected=f"the factors of {embedding.module}, transposed",
                    found=", ".join(f"{role} {spec.shape}" for role, spec in head.factors.tensors.items()),
                )
            )
        for spec in head.factors.tensors.values():
            tying.dropped.append(Dropped(spec.path, _MIRRORED.format(other=f"the factors of {embedding.module}")))
        del keys.layers[head.module]
    _drop_whole(tying, keys, embedding, head, where)


def _mirrors(embedding: Layer, head: Layer, config: AdapterConfig) -> bool:
    one, other = embedding.tensors, head.tensors
    if set(one) != {"embedding_a", "embedding_b"} or set(other) != {"lora_a", "lora_b"}:
        return False
    rank = one["embedding_a"].shape[0] if one["embedding_a"].shape else 0
    scales = {scale_of(config, layer.owner, rank).value for layer in (embedding, head)} if rank else {0, 1}
    return (
        other["lora_a"].shape == one["embedding_b"].shape[::-1]
        and other["lora_b"].shape == one["embedding_a"].shape[::-1]
        and len(scales) == 1
    )


def _drop_whole(tying: Tying, keys: Keys, embedding: _Side, head: _Side, where: str) -> None:
    if head.whole is not None and embedding.whole is not None:
        _drop_twin(tying, head.whole.spec, embedding.whole.spec, where)
        del keys.whole[head.whole.name]


def _drop_twin(tying: Tying, twin: TensorSpec, kept: TensorSpec, where: str) -> None:
    if twin.shape != kept.shape:
        tying.problems.append(
            ShapeMismatch(
                "tied tensors of two shapes", where=f"{where} :: {twin.name}", expected=kept.shape, found=twin.shape
            )
        )
    tying.dropped.append(Dropped(twin.path, _MIRRORED.format(other=kept.name)))


def _untie(tying: Tying, pair: _Pair, embedding: _Side, head: _Side, base: Tree, names: Names, where: str) -> bool:
    """Give the head a leaf of its own. Whether the two stay tied after all."""
    resized = [
        side for side in (embedding, head) if side.whole is not None and side.whole.spec.shape[:1] != pair.shape[:1]
    ]
    if resized == [embedding] and embedding.own is not None and head.factors is None and head.whole is None:
        tying.warnings.append(
            f"{embedding.own.spec.name} has {embedding.own.spec.shape[0]} rows and the adapter holds no head: "
            "taken for an embedding that is still tied to its head"
        )
        return True
    if resized == [head] and head.own is not None and embedding.whole is None:
        tying.problems.append(
            ShapeMismatch(
                "a head for another vocabulary than the embedding's",
                where=f"{where} :: {head.own.spec.name}",
                expected=pair.shape,
                found=head.own.spec.shape,
            )
        )
        return False
    tying.problems.extend(_cannot_untie(pair, base))
    names.place(f"{head.module or 'lm_head'}.weight", pair.head)
    if resized == [embedding] and embedding.copy is not None and head.whole is None:
        tying.replaced.append(_resized_copy(pair.head, embedding.copy))
    elif resized == [head] and head.copy is not None and embedding.whole is None:
        tying.replaced.append(_resized_copy(pair.embedding, head.copy))
    if not pair.stored:
        tying.created.append(Created(pair.head, pair.embedding, "the head is no longer tied to the embedding"))
    if not pair.stored and (saved_bare(base) or dotted(pair.embedding).count(".") == 1):
        tying.warnings.append(
            "the base is saved without its head's class, and the result has a head beside it: Transformers 4 refuses such a "
            "checkpoint, 5 loads it"
        )
    tying.config.update(_untied_config(base.config))
    tying.notes.append(
        f"{dotted(pair.embedding)} and {dotted(pair.head)} were tied and are not any more: the adapter changes "
        + ("each by itself" if _changed(embedding) and _changed(head) else f"{_only(pair, head)} alone")
    )
    return False


def _changed(side: _Side) -> bool:
    return side.factors is not None or side.own is not None


def _only(pair: _Pair, head: _Side) -> str:
    return dotted(pair.head if _changed(head) else pair.embedding)


def _resized_copy(target: KeyPath, copy: Whole) -> Replacement:
    return Replacement(target, copy.spec.path, "the resized base under an adapted layer that it was tied to")


def _cannot_untie(pair: _Pair, base: Tree) -> Iterator[Exception]:
    config = base.config or {}
    if config.get("is_encoder_decoder") is True:
        yield UnsupportedCheckpoint(
            "an adapter on tied embeddings of an encoder and decoder: they cannot be untied without changing what the model computes",
            where=f"{base.where} :: {dotted(pair.embedding)}",
        )
    inside = "embeddings" in dotted(pair.embedding).split(".")[:-2]
    # A model of several parts has its head in one of them, or beside them: a checkpoint without a head does not show which.
    beside = saved_bare(base) and dotted(pair.head).count(".") > 1
    if not pair.stored and (inside or beside):
        yield UnmatchedAdapter(
            "an adapter on tied embeddings, and a base whose head would have no certain name",
            where=f"{base.where} :: {dotted(pair.embedding)}",
            expected="the head's weight in the base",
            hint="save the base with its head as a tensor of its own, and tie_word_embeddings false",
        )


def _untied_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    changes = {"tie_word_embeddings": False}
    for name, part in (config or {}).items():
        if isinstance(part, Mapping) and (name == "text_config" or "tie_word_embeddings" in part):
            changes[f"{name}.tie_word_embeddings"] = False
    return changes
