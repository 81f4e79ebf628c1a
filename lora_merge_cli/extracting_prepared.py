"""What an extraction is asked for, what its inputs turned out to be, and the report of the two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_merge_cli import __version__
from lora_merge_cli.dense_deltas import Sides
from lora_merge_cli.dialects import ScaleOptions
from lora_merge_cli.dialects.detached_document import TRAINED
from lora_merge_cli.dialects.kernels import Kernel
from lora_merge_cli.dialects.peft.written import factor_key
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.extract_report import ExtractedSite, ExtractReport
from lora_merge_cli.inputs import Inputs, tree_of
from lora_merge_cli.plan import MergePlan
from lora_merge_cli.recording import source_records
from lora_merge_cli.records import AdapterSite, Factor, KeyPath, LowRank, Scale, TensorSpec, display
from lora_merge_cli.report import LeafRecord

_ONE = Scale(1.0, "the factors' product is the delta itself")


@dataclass(frozen=True)
class ExtractRequest:
    """What to extract, and where to."""

    tuned: Path
    """The fine-tune: a run, step or item directory with adapters inside, or a dense checkpoint."""
    base: Path | None = None
    """What it started from; dense checkpoints need it."""
    output: Path | None = None
    """The directory to create. Only a dry run does without."""
    rank: int | None = None
    """The rank of the factors of two dense checkpoints."""
    energy: float | None = None
    """The share of ``|delta|^2`` that they keep of each matrix instead."""
    without_trained: bool = False
    """Whether to leave out what was trained in full, and with it a part of the fine-tune."""
    include: tuple[str, ...] = ()
    """Globs of sites to take; of two dense checkpoints, of leaves. All if empty."""
    exclude: tuple[str, ...] = ()
    """Globs of those not to take."""
    scales: ScaleOptions = dataclasses.field(default_factory=ScaleOptions)
    """What is known about alphas."""
    step: int | None = None
    """Which step of a run; the newest if None."""
    device: str | None = None
    """The JAX device that decomposes; JAX's default if None."""
    jobs: int | None = None
    """How many threads read; see `jobs.jobs_or_default`. Changes no bit."""
    overwrite: bool = False
    """Whether an existing output may be replaced."""


@dataclass(frozen=True)
class Dense:
    """Two dense checkpoints."""

    pairs: Mapping[KeyPath, Sides]
    """Every leaf that is wanted, by the fine-tune's path."""
    kernels: Mapping[KeyPath, Kernel]
    """Those that factors may be made for."""
    total: int
    """How many leaves there are, wanted or not."""


@dataclass(frozen=True)
class PreparedExtraction:
    """A request whose inputs are open."""

    request: ExtractRequest
    inputs: Inputs
    plan: MergePlan | None
    """Of a fine-tune with adapters inside: how they would be merged."""
    dense: Dense | None
    """Of two dense checkpoints: how they pair up."""

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """What must not be written to."""
        return self.inputs.paths

    @property
    def for_peft(self) -> bool:
        """Whether the adapter is one that PEFT loads."""
        return self.plan is None and isinstance(self.inputs.dialect, Plain)

    def report(self) -> ExtractReport:
        """What would be done, as far as it is known before an array is read."""
        if self.plan is not None:
            return self._exact_report()
        assert self.dense is not None, "it is one of the two"
        kernels = {path: self.dense.pairs[path].tuned for path in self.dense.kernels}
        sites = tuple(
            site_record(dense_site(self.inputs, path, kernel, 0, for_peft=self.for_peft), kernels[path], None, None)
            for path, kernel in self.dense.kernels.items()
        )
        note = f"which of the {len(self.dense.pairs)} leaves moved is known once both sides are read: sites are what may have"
        return self.said(sites, (), 0, frozen_checked=False, notes=(note,))

    def said(
        self,
        sites: tuple[ExtractedSite, ...],
        trained: tuple[LeafRecord, ...],
        frozen: int,
        *,
        frozen_checked: bool,
        warnings: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> ExtractReport:
        """A report of what was found."""
        request, checkpoint = self.request, self.inputs.checkpoint
        model = self.inputs.dialect.summary(tree_of(checkpoint))
        opened = [note for _, each in self.inputs.opened for note in each.notes]
        loud = list(warnings)
        if request.without_trained and trained:
            loud.append(
                f"{len(trained)} leaves that were trained in full are left out: "
                "base and adapter together do not act as the fine-tune does"
            )
        if request.include or request.exclude:
            loud.append(
                "--include or --exclude leave out a part: base and adapter together do not act as the fine-tune does"
            )
        assets = ["the fine-tune's normalisation statistics are in assets/ beside the adapter: serve with them"]
        return ExtractReport(
            status="planned",
            tool_version=__version__,
            sources=source_records(self.inputs),
            warnings=tuple(loud),
            notes=(*opened, *notes, *(assets if checkpoint.assets is not None else [])),
            kind="exact" if self.plan is not None else "truncated",
            model=model.name,
            dialect=self.inputs.dialect.name,
            output=None if request.output is None else str(request.output),
            adapter_format="peft" if self.for_peft else "lora-merge",
            rank=request.rank,
            energy=request.energy,
            sites=sites,
            trained=trained,
            without_trained=request.without_trained,
            frozen=frozen,
            frozen_checked=frozen_checked,
            factors_bytes=sum(site.nbytes or 0 for site in sites),
            trained_bytes=sum(leaf.nbytes for leaf in trained),
            tuned_bytes=checkpoint.source.index().nbytes,
        )

    def _exact_report(self) -> ExtractReport:
        plan = self.plan
        assert plan is not None, "there are adapters inside"
        frozen, trained = self.known_groups()
        notes = list(plan.notes)
        if self.inputs.base is None:
            notes.append("without --base nobody compares the frozen leaves: merge the adapter into the right base")
        elif not self.inputs.dialect.tells_frozen:
            notes.append("which leaves were trained in full is known once they are compared with the base's")
        return self.said(
            self.exact_sites(), tuple(map(trained_record, trained)), len(frozen), frozen_checked=False, notes=notes
        )

    def exact_sites(self) -> tuple[ExtractedSite, ...]:
        """The sites of the adapters inside."""
        assert self.plan is not None, "there are some"
        tensors = self.inputs.checkpoint.source.index().tensors
        return tuple(
            site_record(
                site,
                tensors[site.targets[0]],
                site.parameters.rank,
                sum(tensors[factor.path].nbytes for factor in site.factors.values()),
            )
            for site in self.plan.sites
        )

    def known_groups(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """The leaves that the fine-tune froze, those under adapters among them, and those that it trained in full."""
        assert self.plan is not None, "there are adapters inside"
        index = self.inputs.checkpoint.source.index()
        grouping = self.inputs.dialect.grouping(index, self.plan.sites)
        frozen: list[TensorSpec] = []
        trained: list[TensorSpec] = []
        for step in self.plan.steps:
            assert step.before is not None, "adapters inside create nothing"
            (trained if grouping[step.before.path] == "trained" else frozen).append(step.before)
        return frozen, trained


def dense_site(inputs: Inputs, path: KeyPath, kernel: Kernel, rank: int, *, for_peft: bool) -> AdapterSite:
    """The site of a kernel of two dense checkpoints, with keys as they are in the adapter."""
    name = dotted(path)

    def key(role: str) -> KeyPath:
        return (factor_key(name, role),) if for_peft else (*path, role)

    label = inputs.dialect.canonical(path)
    return AdapterSite(
        targets=(path,),
        operation="add_delta",
        factors={role: Factor(key(role)) for role in ("lora_a", "lora_b")},
        parameters=LowRank(rank, _ONE, kernel.equation),
        forward=kernel.forward,
        group=inputs.dialect.part(path),
        module=next((str(part) for part in reversed(label) if part not in ("w", "kernel")), ""),
        label=display(label).removesuffix(".weight"),
    )


def site_record(site: AdapterSite, spec: TensorSpec, rank: int | None, nbytes: int | None) -> ExtractedSite:
    """What the report says of a site.

    Args:
        site: The site, whose scale is known.
        spec: Its kernel.
        rank: The rank of its factors; None before it is chosen.
        nbytes: Their size; None before that.
    """
    scale = site.parameters.scale
    assert scale.value is not None, "a site without a scale was refused"
    return ExtractedSite(
        target=site.name,
        label=site.label,
        group=site.group,
        equation=str(site.parameters.equation),
        rank=rank,
        scale=scale.value,
        scale_source=scale.source,
        scale_assumed=scale.assumed,
        shape=spec.shape,
        nbytes=nbytes,
    )


def trained_record(spec: TensorSpec, reason: str = TRAINED) -> LeafRecord:
    """What the report says of a leaf that the adapter holds whole."""
    return LeafRecord(spec.name, "copied", spec.dtype.name, spec.nbytes, reason)
