"""What one output makes of one leaf, block by block: adapters added to it, or two leaves interpolated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora_merge_cli.blocks import Block, Sides, at_most_float32
from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dtypes import FLOAT32, fits_float32, is_float
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable, UnsupportedCheckpoint
from lora_merge_cli.formats.interface import Source
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.operations import KernelUpdate, MixedLeaf, moments_of_no_change
from lora_merge_cli.plan import Step
from lora_merge_cli.records import Array
from lora_merge_cli.rounding import Rounding
from lora_merge_cli.survival import Moments

if TYPE_CHECKING:
    from lora_merge_cli.numerics import FusedBlock


class LeafWork(Protocol):
    """One leaf of one output. Blocks are computed at the same time, and taken one after the other in their order."""

    def compute(self, block: Block) -> Any:
        """Compute a block; keeps nothing, so any thread may."""
        ...

    def take(self, block: Block, computed: Any) -> Array:
        """Check what `compute` made of a block, note its figures, and return its values as they are stored.

        Raises:
            NonFiniteInput: A value that the arithmetic needs is NaN or Inf.
            Unrepresentable: A finite result is not finite in the stored dtype.
        """
        ...

    def finish(self) -> tuple[Moments, ...]:
        """The figures, one for each stacked layer if those are kernels of their own; to be called once all blocks are taken."""
        ...


class FusedWork:
    """A kernel with sites: ``W + alpha * (W' - W)``, W' being what the adapters make of W.

    Args:
        step: The leaf.
        number: The output's number.
        source: Where the kernel comes from, for errors.
        serving_dtype: What servers cast it to.
    """

    def __init__(self, step: Step, number: int, source: Source, serving_dtype: np.dtype[Any]) -> None:
        self._step, self._number, self._source = step, number, source
        self._dtypes = step.output.dtype.name, serving_dtype.name
        self._layers: dict[int, KernelUpdate | Moments] = {}

    def compute(self, block: Block) -> tuple[Array, FusedBlock] | None:
        """See `LeafWork.compute`; None where alpha is 0."""
        update = block.updates[self._number]
        if update is None:
            return None
        try:
            kernel, base = self._operands(block)
        except BaseException:
            update.give_up(block.inside)
            raise
        return kernel, update.compute(block.inside, kernel, base, block.bits)

    def take(self, block: Block, computed: tuple[Array, FusedBlock] | None) -> Array:
        """See `LeafWork.take`."""
        layer, update = self._layer_of(block), block.updates[self._number]
        if update is None or computed is None:
            values = unchanged(block.sides)
            found = self._layers.setdefault(layer, Moments())
            assert isinstance(found, Moments), "alpha is that of a whole layer"
            found.add(moments_of_no_change(values, self._dtypes))
            return cast(values, self._step, self._source)
        values = update.take(block.inside, *computed).reshape(block.sides.values.shape)
        self._layers[layer] = update.finish() if update.is_complete else update
        return values

    def finish(self) -> tuple[Moments, ...]:
        """See `LeafWork.finish`."""
        return tuple(found if isinstance(found, Moments) else found.finish() for found in self._layers.values())

    def _layer_of(self, block: Block) -> int:
        return block.region[0].start if len(block.inside) < len(block.region) else 0

    def _operands(self, block: Block) -> tuple[Array, Array | None]:
        """The kernel that the delta's survival is measured against, and what the delta is added to if that is another."""
        sides, values = block.sides, at_most_float32(block.sides.values)
        if not self._step.mixed:
            return values, None if sides.base is None else at_most_float32(sides.base)
        if sides.base is not None:
            return at_most_float32(sides.base), None
        alpha = self._step.alpha_of(self._layer_of(block))
        if sides.anchor is None or alpha == 1:
            return values, None
        anchor, start = sides.anchor.astype(FLOAT32), values.astype(FLOAT32)
        return anchor + FLOAT32.type(alpha) * (start - anchor), None


class ChainedWork:
    """A kernel with sites not all of which are low-rank: ``W + alpha * (W' - W)``, W' being what `Block.chain` makes of W.

    Args:
        step: The leaf.
        source: Where the kernel comes from, for errors.
        serving_dtype: What servers cast it to.
        device: The JAX device to compute on.
        rounding: How results are rounded.
    """

    def __init__(
        self, step: Step, source: Source, serving_dtype: np.dtype[Any], device: Any, rounding: Rounding
    ) -> None:
        self._step = step
        self._where = f"{source.path} :: {step.output.name}"
        choice = step.rounding.choice(rounding)
        self._leaf = MixedLeaf(self._where, self._where, step.output.dtype, serving_dtype, device, choice)

    def compute(self, block: Block) -> tuple[Array, Any]:
        """See `LeafWork.compute`."""
        kernel = at_most_float32(block.sides.values)
        assert block.chain is not None, "the leaf has a site that is no low-rank product"
        alpha, anchor = self._step.alpha_of(0), block.sides.anchor
        start = kernel if anchor is None else at_most_float32(anchor)
        changed = start if alpha == 0 else block.chain.apply(block.inside, kernel)
        return changed, self._leaf.compute(changed, start, alpha, block.bits)

    def take(self, block: Block, computed: tuple[Array, Any]) -> Array:
        """See `LeafWork.take`."""
        changed, mixed = computed
        if not np.isfinite(changed).all():
            if not np.isfinite(block.sides.values).all():
                raise NonFiniteInput(
                    "a kernel under an adapter is not finite",
                    where=self._where,
                    expected="finite values",
                    found="NaN or Inf",
                )
            raise Unrepresentable(
                "the merged kernel overflows float32", where=self._where, hint="the adapter is not one of this base"
            )
        return self._leaf.take(mixed)

    def finish(self) -> tuple[Moments, ...]:
        """See `LeafWork.finish`."""
        return (self._leaf.finish(),)


class MixedWork:
    """A leaf without a site that both sides have: ``W_base + alpha * (W_tuned - W_base)``.

    Args:
        step: The leaf.
        inputs: Where both sides come from.
        serving_dtype: What servers cast it to.
        device: The JAX device to compute on.
        rounding: How results are rounded.
        still: Whether the fine-tune is known not to have moved it.
    """

    def __init__(
        self,
        step: Step,
        inputs: Inputs,
        serving_dtype: np.dtype[Any],
        device: Any,
        rounding: Rounding,
        *,
        still: bool = False,
    ) -> None:
        self._step, self._source, self._still = step, inputs.checkpoint.source, still
        assert step.anchor is not None, "a mixture has two sides"
        self._leaf = MixedLeaf(
            f"{inputs.checkpoint.source.path} :: {step.source.name}",
            f"{inputs.anchor.path} :: {step.anchor.name}",
            step.output.dtype,
            serving_dtype,
            device,
            step.rounding.choice(rounding),
        )

    def compute(self, block: Block) -> Any:
        """See `LeafWork.compute`."""
        tuned, anchor = _both(block)
        return self._leaf.compute(tuned, tuned if self._still else anchor, self._alpha(block), block.bits)

    def take(self, block: Block, computed: Any) -> Array:  # noqa: ARG002  (others need it)
        """See `LeafWork.take`."""
        return self._leaf.take(computed)

    def finish(self) -> tuple[Moments, ...]:
        """See `LeafWork.finish`."""
        return (self._leaf.finish(),)

    def _alpha(self, block: Block) -> float:
        return self._step.alpha_of(block.region[0].start if block.region else 0)


class HostWork:
    """A leaf that float32 cannot hold: float64, interpolated in float64, or integers, which are equal or one side's.

    Args:
        step: The leaf.
        inputs: Where both sides come from.
    """

    def __init__(self, step: Step, inputs: Inputs) -> None:
        self._step, self._inputs = step, inputs

    def compute(self, block: Block) -> Array:
        """See `LeafWork.compute`.

        Raises:
            NonFiniteInput: A value is NaN or Inf on one side, and not the same on the other.
            Unrepresentable: A result is beyond float64.
            UnsupportedCheckpoint: The sides differ, neither is asked for, and there is nothing between their numbers.
        """
        tuned, anchor = _both(block)
        alpha = self._step.alpha_of(block.region[0].start if block.region else 0)
        if alpha == 0:
            return anchor
        if alpha == 1 or equals_rounded(tuned, anchor):
            return tuned
        if is_float(tuned.dtype):
            return self._between(tuned.astype(np.float64), anchor.astype(np.float64), alpha)
        raise UnsupportedCheckpoint(
            f"{tuned.dtype.name} values that differ: there is nothing between them",
            where=self._where,
            hint=f"give the leaf to one side with --alpha-for '{self._step.source.name}=1'",
        )

    @property
    def _where(self) -> str:
        return f"{self._inputs.checkpoint.source.path} :: {self._step.source.name}"

    def _between(self, tuned: Array, anchor: Array, alpha: float) -> Array:
        same = (tuned == anchor) | (np.isnan(tuned) & np.isnan(anchor))
        if not (same | (np.isfinite(tuned) & np.isfinite(anchor))).all():
            raise NonFiniteInput(
                "a leaf to interpolate is not finite",
                where=self._where,
                expected="finite values, or the same ones on both sides",
                found="NaN or Inf on one side",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            change = alpha * (tuned - anchor)
            mixed = np.where(np.isfinite(change), anchor + change, (1 - alpha) * anchor + alpha * tuned)
        if not (same | np.isfinite(mixed)).all():
            raise Unrepresentable(
                "the interpolated leaf overflows float64", where=self._where, hint="take an alpha nearer to [0, 1]"
            )
        return np.where(same, tuned, mixed)

    def take(self, block: Block, computed: Array) -> Array:  # noqa: ARG002  (others need it)
        """See `LeafWork.take`."""
        return cast(computed, self._step, self._inputs.checkpoint.source)

    def finish(self) -> tuple[Moments, ...]:
        """See `LeafWork.finish`: nothing is measured."""
        return ()


def unchanged(sides: Sides) -> Array:
    """The values that alpha 0 stands for."""
    if sides.anchor is not None:
        return sides.anchor
    return sides.values if sides.base is None else sides.base


def cast(values: Array, step: Step, source: Source) -> Array:
    """The values in the dtype that the leaf is stored in.

    Raises:
        Unrepresentable: A finite value is not finite in it.
    """
    if values.dtype == step.output.dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(step.output.dtype)
    if np.isfinite(values).all() and not np.isfinite(result).all():
        flag = "--dtype" if step.replacements or step.mixed else "--dtype-untouched"
        raise Unrepresentable(
            f"a leaf overflows {step.output.dtype.name}",
            where=f"{source.path} :: {step.output.name}",
            hint=f"use {flag} float32 or bfloat16",
        )
    return np.asarray(result)


def can_mix(step: Step) -> bool:
    """Whether float32 holds the leaf's numbers on both sides."""
    assert step.anchor is not None, "a mixture has two sides"
    return fits_float32(step.source.dtype) and fits_float32(step.anchor.dtype)


def _both(block: Block) -> tuple[Array, Array]:
    anchor = block.sides.anchor
    assert anchor is not None, "a mixture has two sides"
    return block.sides.values, anchor
