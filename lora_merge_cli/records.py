"""The core types: what a checkpoint holds, and what an adapter does to it. Frozen, and free of any format or trainer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from lora_merge_cli.equation import Equation

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a leaf sits in the tree. An `int` is a list index; a part may itself contain ``.`` or ``/``."""

Region: TypeAlias = tuple[slice, ...]
"""One slice with explicit start and stop per axis of a leaf."""

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""A host array of any shape and dtype."""

Setting: TypeAlias = bool | int | float | str
"""A value of an adapter's configuration that an operation takes."""


def display(path: KeyPath) -> str:
    """The path's name for people and globs: its parts joined with ``/``."""
    return "/".join(map(str, path))


def glob_matches(path: KeyPath, pattern: str) -> bool:
    """Whether `pattern` matches the path's name; ``.`` and ``/`` count as the same separator, ``**`` crosses it."""
    from wcmatch import glob

    flags = glob.GLOBSTAR | glob.DOTGLOB | glob.CASE | glob.BRACE
    return bool(glob.globmatch(display(path).replace(".", "/"), pattern.replace(".", "/"), flags=flags))


@dataclass(frozen=True)
class TensorSpec:
    """One array of a checkpoint, without its data."""

    path: KeyPath
    """Where it sits in the tree."""
    shape: tuple[int, ...]
    """Its extents."""
    dtype: np.dtype[Any]
    """Its stored dtype; bfloat16 and float8 are those of ml_dtypes."""
    kind: Literal["array", "scalar"] = "array"
    """``scalar``: a Python number that the format stores as an array without axes."""

    @property
    def name(self) -> str:
        """The display name of `path`."""
        return display(self.path)

    @property
    def size(self) -> int:
        """The number of entries."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """The size in bytes when decoded."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Constant:
    """A part of the tree that is no array: an empty container, None or a string."""

    path: KeyPath
    """Where it sits in the tree."""
    kind: str
    """``Dict``, ``List`` or ``Tuple`` (empty ones), ``None``, ``string``, ``int``, ``float`` or ``bool``."""
    value: str | None = None
    """The text of a string, or the Python literal of a number."""


@dataclass(frozen=True)
class Index:
    """Everything that a checkpoint holds, without its data."""

    tensors: Mapping[KeyPath, TensorSpec]
    """Every array, in the checkpoint's order."""
    constants: tuple[Constant, ...] = ()
    """Every part that is no array."""
    shared: Mapping[KeyPath, KeyPath] = field(default_factory=dict)
    """Arrays that are stored once under several paths: each later path, with the first one."""

    @functools.cached_property
    def nbytes(self) -> int:
        """The size of all arrays in bytes when decoded."""
        return sum(spec.nbytes for spec in self.tensors.values())


@dataclass(frozen=True)
class Scale:
    """What a site's delta is multiplied by, and how that is known."""

    value: float | None
    """The factor; None when nothing states it."""
    source: str
    """Where it comes from, in words."""
    assumed: bool = False
    """Whether a stock preset, and nobody's word, supplied it."""


@dataclass(frozen=True)
class Forward:
    """What the model computes at a site, as einsums over one layer: ``y = base(x, w) + scale * up(down(x, a), b)``.

    The oracle for a merge. It is how the trainer runs the adapter, not how the merge fuses it.
    """

    base: str
    """``x, kernel -> y``."""
    down: str
    """``x, lora_a -> t``."""
    up: str
    """``t, lora_b -> y``."""


@dataclass(frozen=True)
class LowRank:
    """Parameters of the additive low-rank operation, ``delta = scale * einsum(equation, lora_a, lora_b)``."""

    rank: int
    """The extent that `lora_a` and `lora_b` share."""
    scale: Scale
    """What the product is multiplied by."""
    equation: Equation
    """From the factors' dims to the kernel's."""


@dataclass(frozen=True)
class Factor:
    """An adapter's leaf, or the part of it that one site's equation takes."""

    path: KeyPath
    """The leaf."""
    shape: tuple[int, ...] | None = None
    """What it is reshaped to first, row-major; as stored if None."""
    at: tuple[int | slice, ...] = ()
    """Which part is then taken, axis by axis from the first one: an index drops its axis. All of it if empty."""

    def of(self, leaf: Array) -> Array:
        """The part that the site takes of the whole leaf."""
        return (leaf if self.shape is None else leaf.reshape(self.shape))[self.at]

    def extents(self, leaf: Sequence[int]) -> tuple[int, ...]:
        """The shape of that part, for a leaf of the given shape."""
        # A view of one byte has the shape and none of the memory.
        blank = np.broadcast_to(np.zeros((), np.int8), self.shape or tuple(leaf))
        return tuple(int(extent) for extent in blank[self.at].shape)


@dataclass(frozen=True)
class AdapterSite:
    """A kernel with an adapter."""

    targets: tuple[KeyPath, ...]
    """The leaves that the adapter changes."""
    operation: str
    """The name of the operation that changes them."""
    factors: Mapping[str, Factor]
    """The adapter's leaves by role: ``lora_a`` and ``lora_b``, with DoRA ``magnitude``. Without a ``lora_a``, as for a bias that
    has no inputs, that is a one: its dims are the rank alone, of extent 1."""
    parameters: LowRank
    """What the operation needs to know."""
    forward: Forward
    """What the model computes here."""
    group: str
    """The part of the model that shares an alpha, for example an expert."""
    module: str
    """The kind of module, for example ``q_einsum``."""
    label: str
    """A short name for tables and globs, unique in the checkpoint or nearly so."""
    adapter: int | None = None
    """Which of the adapters beside the checkpoint holds the factors, from 0; None where the checkpoint does."""
    weight: float = 1.0
    """What the adapter's change is multiplied by; 1 is as trained."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """What else the operation needs to know, by the trainer's own names, for example ``coft``."""

    @property
    def name(self) -> str:
        """The display name of the first target."""
        return display(self.targets[0])


@dataclass(frozen=True)
class Dropped:
    """An input leaf that the output does not have, and why. Skipping is a value, never a lost log line."""

    path: KeyPath
    """The leaf."""
    reason: str
    """Why, in words."""
    adapter: int | None = None
    """Which of the adapters beside the checkpoint it is in, from 0; None for the checkpoint itself."""


@dataclass(frozen=True)
class Replacement:
    """Values that an adapter brings instead of a leaf's own: the whole leaf, or some of its rows."""

    target: KeyPath
    """The leaf; one that the checkpoint does not have is created."""
    path: KeyPath
    """The adapter's leaf."""
    reason: str
    """Why it is there, for example ``modules_to_save``."""
    rows: tuple[int, ...] | None = None
    """Which row of the target each of the adapter's rows stands for; None for the whole leaf."""
    adapter: int | None = None
    """Which of the adapters beside the checkpoint holds it, from 0."""
    weight: float = 1.0
    """What the change from the leaf's own values is multiplied by."""
    is_copy: bool = False
    """Whether it should be the leaf's own values: the copy that lies under factors in the adapter's file."""


@dataclass(frozen=True)
class Created:
    """An output leaf that the checkpoint does not have, and that starts as a copy of one that it has."""

    path: KeyPath
    """The new leaf."""
    source: KeyPath
    """What it starts as."""
    reason: str
    """Why, in words."""


@dataclass(frozen=True)
class Depth:
    """Where a leaf sits in a stack of layers."""

    layer: int | None
    """The number of its layer, from 0; None where its first axis is the layers."""
    count: int
    """How many layers the stack has."""


@dataclass(frozen=True)
class ModelSummary:
    """What a dialect makes of a checkpoint as a whole."""

    name: str
    """The model, or ``unknown``."""
    advice: tuple[str, ...] = ()
    """What to know before serving the merged result."""
    item: str | None = None
    """The name of the folder that its servers read the arrays from."""
    needs_quantiles: bool = False
    """Whether its servers normalise by quantiles, q01 and q99, and not by mean and std."""


@dataclass(frozen=True)
class Survey:
    """What a dialect finds in an index."""

    sites: tuple[AdapterSite, ...]
    """Every site whose factors and kernel fit."""
    dropped: tuple[Dropped, ...] = ()
    """Adapter-like leaves that must not reach the output and are no site's."""
    problems: tuple[Exception, ...] = ()
    """Why a merge must be refused, worst first; empty when nothing stands in its way."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know."""
    warnings: tuple[str, ...] = ()
    """What should make a reader stop."""
    replacements: tuple[Replacement, ...] = ()
    """What the adapter brings whole."""
    created: tuple[Created, ...] = ()
    """Leaves that the output has besides the checkpoint's, for example a head that is no longer tied."""
    copies: tuple[Replacement, ...] = ()
    """What several adapters bring of one leaf and nobody needs, if it is what it should be: that leaf's own values."""
    equal: tuple[tuple[KeyPath, KeyPath], ...] = ()
    """Pairs of leaves whose values must be the same, bit for bit, for the merge to be right."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the merge changes in the model's configuration, by key; a dotted key is a nested one."""
    dtypes: Mapping[KeyPath, np.dtype[Any]] = field(default_factory=dict)
    """What the fine-tune keeps leaves in, for those that the checkpoint keeps in another dtype."""


@dataclass(frozen=True)
class AdapterRow:
    """One adapted module, as an adapter alone describes it."""

    module: str
    """The module's name in the adapter."""
    rank: int
    """Its rank."""
    scale: Scale
    """What its product is multiplied by."""
    shape: tuple[int, int]
    """Outputs and inputs; 0 where the factors do not say."""


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter is, from its keys and its configuration alone."""

    method: str
    """For example ``LoRA``, ``rsLoRA`` or ``DoRA``."""
    base: str | None
    """The base that it names."""
    rows: tuple[AdapterRow, ...]
    """Every adapted module."""
    riding: tuple[str, ...]
    """What else it brings: whole tensors, token rows, biases, each with the reason."""
    problems: tuple[Exception, ...] = ()
    """Why it would be refused whatever the base."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""


def full_region(shape: Sequence[int]) -> Region:
    """The region that covers a whole leaf."""
    return tuple(slice(0, extent) for extent in shape)


def region_shape(region: Region) -> tuple[int, ...]:
    """The extents of a region."""
    return tuple(part.stop - part.start for part in region)


def offset(shape: Sequence[int], region: Region) -> int:
    """The number of a region's first entry in row-major order."""
    number = 0
    for part, extent in zip(region, shape, strict=True):
        number = number * extent + part.start
    return number


def relative(region: Region, origin: Region) -> Region:
    """`region` as seen from the start of `origin`."""
    return tuple(
        slice(part.start - base.start, part.stop - base.start) for part, base in zip(region, origin, strict=True)
    )


def grid(region: Region, block: Sequence[int]) -> Iterator[Region]:
    """Cut `region` into blocks of at most `block`, in row-major order; the last one of an axis may be smaller."""
    if not region:
        yield ()
        return
    first, rest = region[0], region[1:]
    for start in range(first.start, first.stop, block[0]):
        part = slice(start, min(start + block[0], first.stop))
        for tail in grid(rest, block[1:]):
            yield (part, *tail)


def run_around(region: Region, shape: Sequence[int]) -> Region:
    """The smallest run of entries in row-major order that holds a region: single indices, a part of one axis, whole axes."""
    axis = next((axis for axis, part in enumerate(region) if part.stop - part.start != 1), len(shape))
    return (*region[: axis + 1], *full_region(shape[axis + 1 :]))


def slab(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """The extents of about the longest run of entries in row-major order that fills a shape evenly.

    Args:
        shape: What to fill.
        limit: The largest number of entries, at least 1.

    Returns:
        Ones, then a part of one axis, then whole axes.
    """
    extents = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        extents[axis] = even_part(shape[axis], max(1, limit))
        if extents[axis] < shape[axis]:
            break
        limit //= max(1, shape[axis])
    return tuple(extents)


def even_part(extent: int, limit: int) -> int:
    """The size of the fewest equal parts of at most `limit`; where only tiny parts are equal, of nearly equal ones."""
    if extent <= limit:
        return max(1, extent)
    parts = -(-extent // limit)
    for number in range(parts, 2 * parts + 1):
        if extent % number == 0:
            return extent // number
    return -(-extent // parts)


def first_names(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"
