"""Where the tensors that an adapter names are in the base, and which of them are embeddings and heads."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.torch_names import dotted, match_names
from lora_merge_cli.records import KeyPath

_TOP = r"(?:(?:model|transformer|backbone)\.)?"
_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed|token_embedding)"
    rf"|{_TOP}(?:embeddings?|shared)"
)
_HEAD = re.compile(
    rf"(?:.*\.)?(?:lm_head|embed_out|predictions\.decoder)|{_TOP}(?:output|output_layer|output_projection|proj_out)"
)
_TASK_HEAD = re.compile(
    r"(?:.*\.)?(?:score|classifier|classification_head|qa_outputs|v_head|summary|pre_classifier)(?:\..*)?"
)


def is_embedding(module: str) -> bool:
    """Whether a module is called as token embeddings are."""
    return _EMBEDDING.fullmatch(module) is not None


def is_head(module: str) -> bool:
    """Whether a module is called as heads are that predict tokens."""
    return _HEAD.fullmatch(module) is not None


def is_task_head(module: str) -> bool:
    """Whether a module is called as heads are that a task adds."""
    return _TASK_HEAD.fullmatch(module) is not None


class Names:
    """The base's key path for each name that an adapter uses."""

    def __init__(self, wanted: Iterable[str], base: Tree) -> None:
        """Find the names.

        Raises:
            UnmatchedAdapter: They fit the base in more than one way.
        """
        self._base = base
        self._placed = dict(match_names(list(dict.fromkeys(wanted)), base))

    def path(self, name: str) -> KeyPath | None:
        """Where a tensor is; None if the base does not have it and nothing was placed there."""
        return self._placed.get(name)

    def place(self, name: str, path: KeyPath) -> None:
        """Say where a tensor that the base does not have under that name is or will be."""
        self._placed[name] = path

    def shape(self, path: KeyPath) -> tuple[int, ...] | None:
        """The shape of a leaf of the base; None if it has none there."""
        spec = self._base.index.tensors.get(path)
        return None if spec is None else spec.shape


def spelled(name: str, base: Tree) -> KeyPath:
    """A key path for a new leaf, as the base spells its own: one dotted name, or one part per module."""
    if all(len(path) == 1 for path in base.index.tensors):
        return (name,)
    return tuple(name.split("."))


def module_of(path: KeyPath) -> str:
    """The module that a leaf of the base belongs to."""
    return dotted(path).rpartition(".")[0]
