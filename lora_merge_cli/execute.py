"""The only loop: reads, computes on the device, yields blocks. What it learned on the way is in `Execution` afterwards."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from lora_merge_cli.ahead import Ahead, in_order
from lora_merge_cli.blocks import Block, BlockReader
from lora_merge_cli.compare import count_non_finite, equals_rounded
from lora_merge_cli.errors import (
    ConflictingAdapters,
    LoraMergeError,
    NonFiniteInput,
    NothingToMerge,
    Unrepresentable,
    UnsupportedCheckpoint,
    WrongBase,
)
from lora_merge_cli.factors import FactorFindings, FactorReader, check_factors
from lora_merge_cli.fan_out import Broadcast, SharedBlock
from lora_merge_cli.formats.interface import Stored
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.leaf_work import ChainedWork, FusedWork, HostWork, LeafWork, MixedWork, can_mix, cast
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.operations import is_row_operation
from lora_merge_cli.operations.dora import Dora
from lora_merge_cli.plan import MergePlan, Step
from lora_merge_cli.reading import nbytes, refuse_unequal
from lora_merge_cli.records import Array, KeyPath, Replacement, display, first_names
from lora_merge_cli.side_by_side import side_by_side
from lora_merge_cli.survival import Moments

_UNWANTED = LoraMergeError("nobody waits for this output any more")


@dataclass
class Outcome:
    """What was learned of one output."""

    moments: dict[KeyPath, tuple[Moments, ...]] = field(default_factory=dict)
    """Per leaf with sites and per layer, once it is done."""
    mixed: dict[KeyPath, Moments] = field(default_factory=dict)
    """Per interpolated leaf without sites."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Non-finite entries per untouched leaf that had to be decoded anyway."""


class Execution:
    """One run of a plan, or of several plans of one checkpoint that differ in nothing but their alphas.

    Args:
        plans: What to do, for each output.
        inputs: What the plans were made for.
        device: The JAX device to compute on.
        encodings: What the sinks take as it is stored.
        jobs: How many leaves are read, and how many blocks are computed, at a time. Changes no bit of the result.
        listener: Who to tell of progress.
        wanted: Whether anybody still waits for an output, by its number.
    """

    def __init__(
        self,
        plans: Sequence[MergePlan],
        inputs: Inputs,
        device: Any,
        encodings: frozenset[str] = frozenset(),
        jobs: int | None = None,
        listener: Listener | None = None,
        wanted: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._plans = plans
        self._plan = plans[0]
        self._inputs = inputs
        self._source = inputs.checkpoint.source
        self._factor_reader = FactorReader(inputs)
        self._shared = {
            later: first
            for later, first in plans[0].shared.items()
            if all(plan.shared.get(later) == first for plan in plans)
        }
        self._blocks = BlockReader(plans, inputs, self._factor_reader, device)
        self._device = device
        self._encodings = encodings
        self._jobs = jobs_or_default(jobs)
        # Outputs share a block: the more there are, the fewer blocks keep the device busy.
        self._blocks_in_flight = -(-self._jobs // len(plans))
        self._listener = listener or Silent()
        self._wanted = wanted
        self._failed: dict[int, LoraMergeError] = {}
        self._wrong_frozen: list[str] = []
        self._frozen = 0
        self.outcomes = tuple(Outcome() for _ in plans)
        """What was learned of each output."""
        self.factors = FactorFindings()
        """What was found of the factors."""

    @property
    def departures(self) -> Mapping[str, float]:
        """See `BlockReader.departures`."""
        return self._blocks.departures

    def check(self) -> None:
        """Read every factor once, and whatever must be equal, before anything is written.

        Raises:
            NonFiniteInput: A factor holds NaN or Inf.
            NothingToMerge: Nothing would change: a factor of each site is zero, and no tensor is replaced.
            UnsupportedCheckpoint: Two leaves that the model ties differ.
            ConflictingAdapters: A copy of the base's own values is none.
        """
        self.factors = check_factors(self._plan, self._inputs, self._factor_reader)
        self._refuse_silence()
        for one, other in self._plan.equal:
            refuse_unequal(self._source, one, other)
        for copy in self._plan.copies:
            self._refuse_other_copy(copy)

    def _refuse_silence(self) -> None:
        plan = self._plan
        # A zero product leaves DoRA its magnitudes.
        silent = {id(site) for site in self.factors.silent if site.operation != Dora.name}
        speaking = any(site.weight and id(site) not in silent for site in plan.sites)
        between = any(step.is_mixture for step in plan.steps)
        if between or any(found.weight for found in plan.replacements) or (speaking and plan.multiplier):
            return
        if plan.mixing is not None and not plan.sites:
            raise NothingToMerge(
                "nothing to interpolate: the two sides have no leaf in common",
                where=self._inputs.checkpoint.source.path,
            )
        if plan.multiplier == 0:
            why = "--scale is 0"
        elif any(site.weight for site in plan.sites):
            why = "a factor of each site is zero"
        else:
            why = "its weight is 0"
        raise NothingToMerge(
            f"every delta is zero: {why}",
            where=self._inputs.source(plan.sites[0].adapter if plan.sites else None).path,
            hint="the adapter was never trained, or this is the wrong step",
        )

    def _refuse_other_copy(self, copy: Replacement) -> None:
        theirs = self._inputs.source(copy.adapter)
        before, brought = self._source.index().tensors[copy.target], theirs.index().tensors[copy.path]
        pairs = side_by_side([(self._source, before), (theirs, brought)])
        if not all(equals_rounded(one, other) and equals_rounded(other, one) for _, (one, other) in pairs):
            raise ConflictingAdapters(
                "several adapters bring the same tensor, and not as the base has it",
                where=f"{theirs.path} :: {brought.name}",
                expected=f"the values of {self._source.path} :: {before.name}",
                hint="merge them one after the other",
            )

    def leaves(self) -> Generator[Broadcast]:
        """Every output leaf, with its data produced as it is pulled.

        Raises:
            CorruptCheckpoint: An input cannot be read.
            NonFiniteInput: What an adapter replaces a tensor by holds NaN or Inf.
            WrongBase: Frozen leaves do not equal the base's, known once all were seen.
            NothingToMerge: Every delta turned out to be zero.
        """
        self._listener.start(self._plan.output_bytes)
        rows = list(zip(*(plan.steps for plan in self._plans), strict=True))
        decoded = [steps for steps in rows if self._stored(steps[0]) is None or steps[0].base is not None]
        with ThreadPoolExecutor(self._jobs, "read") as readers, ThreadPoolExecutor(self._jobs, "compute") as workers:
            makers = [functools.partial(self._blocks.read, steps, readers) for steps in decoded]
            arriving = in_order(makers, self._jobs)
            try:
                for steps in rows:
                    if steps[0].base is not None:
                        self._frozen += 1
                    yield self._leaf(steps, arriving, workers)
            finally:
                arriving.close()
        self._check_base()
        self._refuse_zero()

    def _refuse_zero(self) -> None:
        moments = self.outcomes[0].moments
        if (
            self._plan.mixing is None
            and moments
            and not any(found.weight for found in self._plan.replacements)
            and len(delta_is_zero(moments)) == len(moments)
        ):
            raise NothingToMerge(
                "every delta is zero",
                where=self._inputs.source(self._plan.sites[0].adapter).path,
                hint=f"--combine {self._plan.combining.method} keeps nothing of them: raise --density"
                if self._plan.combining.prunes
                else "the adapter was never trained, or this is the wrong step",
            )

    def _stored(self, step: Step) -> Stored | None:
        """What of the checkpoint the sinks take as it is."""
        if step.before is None or step.sites or step.replacements or step.is_mixture:
            return None
        if step.output.dtype != step.before.dtype:
            return None
        stored = self._source.stored(step.before.path)
        return stored if stored is not None and stored.encoding in self._encodings else None

    def _leaf(
        self, steps: tuple[Step, ...], arriving: Iterator[Ahead[Block]], workers: ThreadPoolExecutor
    ) -> Broadcast:
        step = steps[0]
        data: Stored | Iterator[SharedBlock]
        stored = self._stored(step)
        if step.is_computed:
            data = self._computed(step, self._works(steps), next(arriving), workers)
        elif stored is None:
            data = self._carried(step, next(arriving))
        else:
            if step.base is not None:
                self._compare_whole(step, next(arriving))
            self._listener.advance(step.output.name, step.output.nbytes)
            data = stored
        return Broadcast((step.output,) * len(self._plans), step.chunk, data, self._shared.get(step.output.path))

    def _carried(self, step: Step, blocks: Iterator[Block]) -> Iterator[SharedBlock]:
        """A leaf that no alpha and no site changes: decoded, with an adapter's values in it, and cast if need be."""
        differs = False
        for block in blocks:
            values, base = block.sides.values, block.sides.base
            differs = differs or not (base is None or equals_rounded(values, base))
            self._count_not_finite(step, values)
            yield block.region, (cast(values, step, self._source),) * len(self._plans)
            self._listener.advance(step.output.name, nbytes(block.region, step.output))
        self._note_frozen(step, differs)

    def _computed(
        self, step: Step, works: Sequence[LeafWork], blocks: Iterator[Block], pool: ThreadPoolExecutor
    ) -> Iterator[SharedBlock]:
        """A leaf of which each output makes something, some blocks being computed while earlier ones are stored."""
        pending: deque[tuple[Block, list[Future[Any] | None]]] = deque()
        differs = False

        def share(number: int, block: Block, future: Future[Any] | None) -> Array | LoraMergeError:
            if future is None or not self._lives(number):
                return self._failed.get(number, _UNWANTED)
            try:
                return works[number].take(block, future.result())
            except (NonFiniteInput, Unrepresentable, UnsupportedCheckpoint) as error:
                self._failed[number] = error
                return error

        def taken() -> SharedBlock:
            block, futures = pending.popleft()
            shares = tuple(share(number, block, future) for number, future in enumerate(futures))
            self._listener.advance(step.output.name, nbytes(block.region, step.output))
            return block.region, shares

        for block in blocks:
            values, base = block.sides.values, block.sides.base
            differs = differs or not (base is None or equals_rounded(values, base))
            futures = [
                pool.submit(work.compute, block) if self._lives(number) else None for number, work in enumerate(works)
            ]
            pending.append((block, futures))
            if len(pending) > self._blocks_in_flight:
                yield taken()
        while pending:
            yield taken()
        self._note_frozen(step, differs)
        for number, (work, outcome) in enumerate(zip(works, self.outcomes, strict=True)):
            if self._lives(number) and (found := work.finish()):
                if step.sites:
                    outcome.moments[step.output.path] = found
                else:
                    outcome.mixed[step.output.path] = Moments.total(found)

    def _works(self, steps: Sequence[Step]) -> list[LeafWork]:
        """What each output makes of a leaf."""
        step = steps[0]
        serving, rounding = self._plan.serving_dtype, self._plan.rounding
        if any(is_row_operation(site.operation) for site in step.sites):
            return [ChainedWork(each, self._source, serving, self._device, rounding) for each in steps]
        if step.sites:
            return [FusedWork(each, number, self._source, serving) for number, each in enumerate(steps)]
        if not can_mix(step):
            return [HostWork(each, self._inputs) for each in steps]
        still = self._is_still(steps)
        return [MixedWork(each, self._inputs, serving, self._device, rounding, still=still) for each in steps]

    def _is_still(self, steps: Sequence[Step]) -> bool:
        """Whether the fine-tune did not move a leaf, where only a look at all of it can tell: it is the base's, rounded.

        Where the output is rounded to nearest to the fine-tune's dtype there is no need to know: whatever lies between the base and
        what it was rounded to rounds to the same.
        """
        step = steps[0]
        between = all(0 <= alpha <= 1 for each in steps for alpha in each.alphas)
        if step.before is None or step.anchor is None or step.replacements:
            return False
        rounds_back = between and step.output.dtype == step.before.dtype and step.rounding.grid is None
        if step.anchor.dtype == step.before.dtype or rounds_back:
            return False
        sides = [(self._source, step.before), (self._inputs.anchor, step.anchor)]
        return all(equals_rounded(tuned, anchor) for _, (tuned, anchor) in side_by_side(sides))

    def _lives(self, number: int) -> bool:
        """Whether an output is still to be made."""
        return number not in self._failed and self._wanted(number)

    def _compare_whole(self, step: Step, blocks: Iterator[Block]) -> None:
        equal = True
        for block in blocks:
            values, base = block.sides.values, block.sides.base
            equal = equal and (base is None or equals_rounded(values, base))
        self._note_frozen(step, not equal)

    def _note_frozen(self, step: Step, differs: bool) -> None:
        if differs:
            self._wrong_frozen.append(step.source.name)

    def _check_base(self) -> None:
        if self._wrong_frozen and self._inputs.base is not None:
            raise WrongBase(
                "the base is not what the fine-tune started from",
                where=self._inputs.base.source.path,
                expected="every frozen leaf to equal the base's, rounded to its dtype, bit for bit",
                found=f"{len(self._wrong_frozen)} of {self._frozen} that differ: {first_names(self._wrong_frozen, 3)}",
            )

    def _count_not_finite(self, step: Step, values: Array) -> None:
        bad = count_non_finite(values)
        if bad:
            name = step.output.name
            for outcome in self.outcomes:
                outcome.not_finite[name] = outcome.not_finite.get(name, 0) + bad


def delta_is_zero(moments: Mapping[KeyPath, tuple[Moments, ...]]) -> list[str]:
    """The leaves whose delta is exactly zero."""
    return [display(path) for path, layers in moments.items() if Moments.total(layers).max_abs == 0]
