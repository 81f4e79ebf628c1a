"""What a merge, an interpolation, a verification and a comparison found: the records that every report is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION: Literal[1] = 1

_SCHEMA_CONFIG = {
    "extra": "forbid",
    "json_schema_serialization_defaults_required": True,
}
"""How `reports.schema` reads the records."""

CheckStatus = Literal["pass", "warn", "fail", "skip"]
RoundingMethod = Literal["nearest", "stochastic", "preserve"]
DifferenceStatus = Literal["equal", "rounded", "within", "changed", "only-a", "only-b", "reshaped"]


class _Record:
    """What every record tells the schema."""

    __pydantic_config__ = _SCHEMA_CONFIG


@dataclass(frozen=True)
class SourceRecord(_Record):
    """One input."""

    role: str
    """``checkpoint`` (what is merged into), ``adapter`` (beside it, in their order), ``base``, ``merged``, ``a`` or ``b``."""
    path: str
    """Where it was read from."""
    format: str
    """The format's name."""
    step: int | None
    """The training step, where known."""
    fingerprint: str
    """A digest of its metadata and of the names and sizes of its files."""
    weight: float | None = None
    """What an adapter's change is multiplied by; null for what is no adapter."""


@dataclass(frozen=True)
class SurvivalRecord(_Record):
    """How much of a delta one dtype keeps; see `survival.Survival`. A figure is null where the delta is zero."""

    dtype: str
    """The dtype that the result is cast to."""
    gain: float | None
    """``<q, d> / <d, d>`` of the realised delta q against the ideal one d: 1 is kept."""
    cosine: float | None
    """``<q, d> / (|q| |d|)``."""
    relative_error: float | None
    """``|q - d| / |d|``."""
    unchanged: float | None
    """The share of entries with ``q == 0``."""
    gain_along_inputs: float | None
    """The gain of ``U^T q`` against ``U^T d``, U an orthonormal basis of lora_a's columns."""
    error_along_inputs: float | None
    """The relative error of ``U^T q`` against ``U^T d``."""


@dataclass(frozen=True)
class ProofRecord(_Record):
    """How a merged kernel compares with what the model computes without a merge. Of `verify` alone."""

    worst_share: float | None
    """The largest error of an entry as a share of its bound: right up to 1. Null where an entry is not finite."""
    beyond: int
    """How many entries exceed their bound."""
    forward_error: float | None
    """``|y' - y| / |y - x w|`` for random inputs x: y as kernel and adapter compute it, y' as the merged kernel does."""
    forward_share: float | None
    """The largest error of an output as a share of what the bounds of its kernel's entries allow: right up to 1."""
    served_error: float | None
    """``|y' - y| / |y - x w|`` with both kernels cast to the serving dtype."""


@dataclass(frozen=True)
class LayerRecord(_Record):
    """One stacked layer of a site."""

    layer: int
    """Its number, from 0."""
    relative_norm: float | None
    """``|delta| / |kernel|``, Frobenius."""
    max_abs: float | None
    """The largest entry of the delta, absolute."""
    survival: tuple[SurvivalRecord, ...]
    """For the stored dtype, then for the serving one where it is another."""
    nearest: SurvivalRecord | None = None
    """See `SiteRecord.nearest`."""
    proof: ProofRecord | None = None
    """How the merged kernel compares with the model's own layer."""


@dataclass(frozen=True)
class SiteRecord(_Record):
    """One site: what it is, and, once merged, what became of its delta."""

    target: str
    """The kernel's path."""
    label: str
    """A short name, unique in the checkpoint or nearly so."""
    group: str
    """The part of the model that shares an alpha, for example an expert."""
    module: str
    """The kind of module."""
    operation: str
    """What changes the kernel."""
    equation: str
    """From the factors' dims to the kernel's."""
    rank: int
    """The adapter's rank."""
    scale: float | None
    """What the product of the factors is multiplied by; null if nothing states it."""
    scale_source: str
    """Who says so."""
    scale_assumed: bool
    """Whether a stock preset, and nobody's word, supplied it."""
    shape: tuple[int, ...]
    """The kernel's."""
    source_dtype: str
    """The kernel's dtype before the merge."""
    dtype: str
    """The kernel's dtype after it."""
    adapter: int | None = None
    """Which of the adapters beside the checkpoint it is of, from 0; null if they are inside."""
    weight: float = 1.0
    """What that adapter's change is multiplied by. The figures below are of all adapters on the kernel together."""
    alphas: tuple[float, ...] = (1.0,)
    """What the change is multiplied by besides, by an interpolation: one for all layers, or one per layer."""
    relative_norm: float | None = None
    """``|delta| / |kernel|``, Frobenius."""
    max_abs: float | None = None
    """The largest entry of the delta, absolute."""
    spectrum: tuple[float, ...] = ()
    """Singular values of its product of factors, scaled, at alpha 1, descending, as root mean squares over layers and heads."""
    adapter_digest: str | None = None
    """A digest of the factors' names, shapes, dtypes and values."""
    non_finite: int = 0
    """Entries of the result that are NaN or Inf: a merge with any is refused."""
    survival: tuple[SurvivalRecord, ...] = ()
    """For the stored dtype, then for the serving one where it is another."""
    rounding: RoundingMethod = "nearest"
    """How the kernel is rounded."""
    nearest: SurvivalRecord | None = None
    """What rounding to nearest would have kept, in the dtype that is rounded to; null where it is rounded to nearest."""
    worth_from: float | None = None
    """The share of an input's energy along the adapter's inputs from which the chosen rounding errs less than the nearest, on
    average; a random input has rank / inputs. Null where it never does, or nothing was chosen."""
    moved: float | None = None
    """The share of entries of a wide file that are not the exact result, so that servers cast them to the chosen value; null where
    the file is what is rounded."""
    proof: ProofRecord | None = None
    """How the merged kernel compares with the model's own layers, the worst one of each figure."""
    layers: tuple[LayerRecord, ...] = ()
    """The same figures per stacked layer that was looked at."""


@dataclass(frozen=True)
class LeafRecord(_Record):
    """An output leaf that no delta was added to."""

    path: str
    """Its name."""
    origin: str
    """``copied``, ``cast``, ``replaced`` (an adapter's own values, in whole or in rows) or ``created``."""
    dtype: str
    """As stored."""
    nbytes: int
    """Its size when decoded."""
    reason: str | None = None
    """Why an adapter brings it, or why it is new; null where neither is so."""


@dataclass(frozen=True)
class DroppedRecord(_Record):
    """An input leaf, or a folder, that the output does not have."""

    path: str
    """Its name."""
    reason: str
    """Why."""


@dataclass(frozen=True)
class GroupRecord(_Record):
    """The leaves of one part of the model that the fine-tune treated alike."""

    part: str
    """The part, for example ``vision tower``."""
    status: str
    """``frozen``, ``lora`` (frozen, with an adapter), ``adapter`` or ``trained``."""
    leaves: int
    """How many leaves."""
    parameters: int
    """How many entries they have."""
    nbytes: int
    """Their size when decoded."""


@dataclass(frozen=True)
class CheckRecord(_Record):
    """One check of a merged checkpoint."""

    id: str
    """Stable, for example ``fused-exact``; docs/verify.md lists them."""
    status: CheckStatus
    """``pass``, ``warn``, ``fail``, or ``skip`` with the reason as message."""
    message: str
    """What was found, in one sentence, and what to do about it."""
    figures: Mapping[str, float | int | str | None] = field(default_factory=dict)
    """Its numbers by name."""
    where: tuple[str, ...] = ()
    """The keys concerned, worst first; not all where there are many."""


@dataclass(frozen=True)
class DifferenceRecord(_Record):
    """One leaf of two checkpoints. Figures are null where there is nothing to compare."""

    path: str
    """Its name, in A where A has it."""
    prefix: str
    """The `PrefixRecord` that it belongs to."""
    status: DifferenceStatus
    """``equal``: same dtype and bits; ``rounded``: B is A rounded to B's dtype, bit for bit; ``within``: every entry within the
    tolerance; ``changed``; in one only; of two shapes."""
    shape_a: tuple[int, ...] | None = None
    """Its shape in A."""
    shape_b: tuple[int, ...] | None = None
    """Its shape in B."""
    dtype_a: str | None = None
    """Its dtype in A."""
    dtype_b: str | None = None
    """Its dtype in B."""
    max_abs: float | None = None
    """The largest ``|b - a|`` of finite entries."""
    relative_l2: float | None = None
    """``|b - a| / |a|``, Frobenius."""
    cosine: float | None = None
    """``<a, b> / (|a| |b|)``."""
    max_ulp: int | None = None
    """The largest distance in representable values, of the coarser of the two dtypes."""
    changed: float | None = None
    """The share of entries that are not equal in value."""
    non_finite: int = 0
    """Entries that are NaN or Inf in one and not the same in the other."""


@dataclass(frozen=True)
class PrefixRecord(_Record):
    """The leaves of two checkpoints below one prefix."""

    prefix: str
    """What their paths begin with, without what spellings of one model differ in."""
    leaves: int
    """How many there are."""
    changed: int
    """How many of them are ``changed``."""
    differing: int
    """How many of them are neither equal nor within the tolerance."""
    relative_l2: float | None
    """``|b - a| / |a|`` over all leaves that could be compared."""
    max_abs: float | None
    """The largest ``|b - a|``."""


@dataclass(frozen=True)
class OverrideRecord(_Record):
    """An alpha for the leaves that a glob matches."""

    glob: str
    """What names must match."""
    alpha: float
    """Their alpha."""


@dataclass(frozen=True)
class MixingRecord(_Record):
    """Which alpha goes where, in ``(1 - alpha) * W_base + alpha * W_tuned`` (arXiv:2109.01903)."""

    alpha: float
    """Of what nothing else is said of; 0 is the base, 1 the fine-tune."""
    overrides: tuple[OverrideRecord, ...] = ()
    """By glob; the first that matches counts."""
    schedule: tuple[float, float] | None = None
    """From the first layer of each stack to its last one; null where all layers are alike."""
    only_common: Literal["base", "tuned"] | None = None
    """Whose leaves were taken where one side had a leaf alone, or the two had it in two shapes; null: that is refused."""
    deltas_only: bool = False
    """Whether there was no base, and only the adapters' deltas were scaled."""


@dataclass(frozen=True)
class CombiningRecord(_Record):
    """How several adapters on one kernel became one change, other than by the sum of their deltas."""

    method: str
    """What PEFT calls ``combination_type``."""
    density: float | None = None
    """The share of entries that was kept; null where the method does not prune."""
    seed: int | None = None
    """What random pruning drew from; null where nothing is drawn."""
    svd_rank: int | None = None
    """The rank that changes were truncated to; null where they were not."""
    majority_sign: Literal["total", "frequency"] | None = None
    """How signs were elected; null where they were not."""
    departure: float | None = None
    """The largest ``|combined - sum| / |sum|`` of all kernels, Frobenius: what cross terms, pruning and truncation amount to beside
    the weighted sum of the deltas; kernels whose deltas cancel do not count. Null before it is measured."""
    departure_of: str | None = None
    """The kernel that has it, with its layer behind a ``#`` where layers are stacked."""


@dataclass(frozen=True)
class JoiningRecord(_Record):
    """How several fine-tunes became the one that alpha 1 stands for."""

    method: str
    """The value of ``--method``."""
    weights: tuple[float, ...]
    """Of each fine-tune, in the order of the sources."""
    density: float | None
    """The share of entries that was kept; null where the method keeps all."""
    seed: int | None
    """What random draws came from; null where nothing is drawn."""
    sequential: bool
    """Whether each fine-tune's change is its difference from the one before."""


@dataclass(frozen=True)
class RoundedRecord(_Record):
    """Leaves that are rounded alike."""

    rounding: RoundingMethod
    """How."""
    leaves: int
    """How many of those that change."""
    reason: str | None = None
    """Why they are not rounded as was asked for; null if they are."""


@dataclass(frozen=True)
class RoundingRecord(_Record):
    """Which of the two neighbours of a result is stored, other than the nearer one."""

    method: RoundingMethod
    """What was asked for."""
    mu: float | None = None
    """Of ``preserve``: what the noise of single entries counts beside the error along the adapter's inputs."""
    seed: int | None = None
    """Of ``stochastic``: what random bits are drawn from."""
    serving_values: Literal["cell", "widened"] | None = None
    """What wide files hold: exact values, moved only where servers would not cast them to the chosen one; or the chosen ones. Null
    where no leaf is stored wider than it is rounded."""
    leaves: tuple[RoundedRecord, ...] = ()
    """What the leaves that change got."""


@dataclass(frozen=True)
class MixedRecord(_Record):
    """A leaf without a site that both sides have: it was interpolated between them."""

    path: str
    """Its name."""
    part: str
    """The part of the model that it belongs to."""
    alphas: tuple[float, ...]
    """One for all of it, or one per stacked layer."""
    dtype: str
    """As stored."""
    parameters: int
    """How many entries it has."""
    relative_norm: float | None = None
    """``|alpha (W_tuned - W_base)| / |W_base|``, Frobenius; 0 where the fine-tune did not move it."""
    survival: tuple[SurvivalRecord, ...] = ()
    """How much of that change the stored dtype keeps, then the serving one; without figures along an adapter's inputs."""
    rounding: RoundingMethod = "nearest"
    """How it is rounded."""
    nearest: SurvivalRecord | None = None
    """See `SiteRecord.nearest`."""
    moved: float | None = None
    """See `SiteRecord.moved`."""


@dataclass(frozen=True)
class PartRecord(_Record):
    """What an interpolation did to one part of the model: all its leaves that could move."""

    part: str
    """The part, for example ``vision tower``."""
    leaves: int
    """How many leaves."""
    parameters: int
    """How many entries they have."""
    alphas: tuple[float, float]
    """The least and the largest alpha of a leaf or layer."""
    base_norm: float
    """``|W_base|``, Frobenius over all of them."""
    wanted: float
    """``|alpha (W_tuned - W_base)|`` before anything is rounded."""
    distance: float
    """``|W_alpha - W_base|`` as stored, both rounded to the stored dtype."""
    gain_stored: float | None
    """``<q, d> / <d, d>`` of the stored change q against the wanted one d; null where d is zero."""
    gain_served: float | None
    """The same of both cast to the serving dtype."""


@dataclass(frozen=True)
class PointRecord(_Record):
    """One alpha of a sweep."""

    alpha: float
    """The alpha."""
    output: str
    """The directory."""
    status: Literal["planned", "written", "kept", "failed"]
    """``kept``: an earlier run had finished it."""
    error: str | None = None
    """Why it failed."""
    parts: tuple[PartRecord, ...] = ()
    """What it did to each part of the model."""
    least_gain_stored: float | None = None
    """The least gain along an adapter's inputs of a site, in the stored dtype; null without sites."""
    least_gain_served: float | None = None
    """The same in the serving dtype."""
    bytes_on_disk: int | None = None
    """The size of its files."""


@dataclass(frozen=True, kw_only=True)
class Report(_Record):
    """What every report says."""

    tool_version: str
    """The version of lora-merge."""
    sources: tuple[SourceRecord, ...]
    """What was read."""
    warnings: tuple[str, ...] = ()
    """What should make a reader stop."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
    seconds: float | None = None
    """Wall time."""
    peak_rss_bytes: int | None = None
    """The process's largest resident size."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the tool and of what it computes with."""
    schema_version: Literal[1] = SCHEMA_VERSION
    """Raised when a field changes its meaning or goes."""

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-able values."""
        document = dataclasses.asdict(self)
        first = ("schema_version", "command", "status")
        return {name: document.pop(name) for name in first} | document


@dataclass(frozen=True, kw_only=True)
class ModelReport(Report):
    """What a merge and its judge both say."""

    model: str
    """The model, or ``unknown``."""
    dialect: str
    """The trainer's conventions."""
    multiplier: float
    """What every delta is multiplied by besides its scale."""
    serving_dtype: str
    """What servers cast the result to."""
    groups: tuple[GroupRecord, ...] = ()
    """What the fine-tune froze and trained."""
    sites: tuple[SiteRecord, ...]
    """Every adapter."""
    checks: tuple[CheckRecord, ...] = ()
    """The checks of the result; none of a merge without ``--verify``."""
    rounding: RoundingRecord | None = None
    """How results are rounded; null for all to nearest."""

    @property
    def failed(self) -> tuple[CheckRecord, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "fail")


@dataclass(frozen=True, kw_only=True)
class OutputReport(ModelReport):
    """What whatever writes a checkpoint has to say."""

    output: str | None
    """The directory or file that was created."""
    output_format: str
    """The format that it is written in."""
    copied: tuple[LeafRecord, ...]
    """The output's leaves that no delta was added to."""
    dropped: tuple[DroppedRecord, ...]
    """What the output does not have, and why."""
    output_bytes: int
    """The size of all output arrays before compression."""
    peak_bytes_planned: int
    """The plan's estimate of the largest resident size."""
    bytes_on_disk: int | None = None
    """The size of the output's files."""
    device: str | None = None
    """Where the arithmetic ran."""
    parents: tuple[dict[str, Any], ...] = ()
    """The provenance of the checkpoint that it was made from, oldest last."""


@dataclass(frozen=True, kw_only=True)
class MergeReport(OutputReport):
    """All that a merge, or its dry run, has to say."""

    command: Literal["merge"] = "merge"
    """Which command made the report."""
    status: Literal["planned", "merged", "rejected"]
    """``rejected``: a check failed, and nothing appeared at the output."""
    combining: CombiningRecord | None = None
    """How several adapters became one change; null for the sum of their deltas, and of one adapter."""


@dataclass(frozen=True, kw_only=True)
class InterpolateReport(OutputReport):
    """All that an interpolation at one alpha, or its dry run, has to say."""

    command: Literal["interpolate"] = "interpolate"
    """Which command made the report."""
    status: Literal["planned", "interpolated", "rejected"]
    """``rejected``: a check failed, and nothing appeared at the output."""
    mixing: MixingRecord
    """Which alpha went where."""
    mixed: tuple[MixedRecord, ...]
    """The leaves without a site that were interpolated."""
    parts: tuple[PartRecord, ...] = ()
    """What it did to each part of the model."""
    not_interpolated: tuple[str, ...] = ()
    """Leaves that the fine-tune trained and that are its own at every alpha: they have no base."""
    plan_digest: str = ""
    """A digest of all that decides the output's values; ``--resume`` keeps an output that has the same."""
    joining: JoiningRecord | None = None
    """How several fine-tunes became one; null where there is one."""


@dataclass(frozen=True, kw_only=True)
class SweepReport(Report):
    """All that an interpolation at several alphas has to say; each output has a report of its own besides."""

    command: Literal["sweep"] = "sweep"
    """Which kind of report this is."""
    status: Literal["planned", "complete", "incomplete"]
    """``incomplete``: an output failed; the others are there."""
    model: str
    """The model, or ``unknown``."""
    dialect: str
    """The trainer's conventions."""
    serving_dtype: str
    """What servers cast the results to."""
    output: str | None
    """The directory of all outputs."""
    mixing: MixingRecord
    """Which alpha went where; `alpha` is the first output's."""
    points: tuple[PointRecord, ...]
    """Every alpha, ascending."""
    rounding: RoundingRecord | None = None
    """How results are rounded, at the first alpha; null for all to nearest."""
    joining: JoiningRecord | None = None
    """How several fine-tunes became one; null where there is one."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport(ModelReport):
    """All that a verification has to say."""

    command: Literal["verify"] = "verify"
    """Which command made the report."""
    status: Literal["passed", "failed"]
    """``failed``: at least one check did."""
    sample: int | None
    """How many layers of each site were looked at; null for all."""
    min_gain: float
    """The least gain along an adapter's inputs that needs no warning."""
    strict: bool
    """Whether a lesser gain fails."""
    mixing: MixingRecord | None = None
    """Which alpha goes where, where the result is an interpolation; null for a merge."""
    joining: JoiningRecord | None = None
    """How several fine-tunes became one; null where there is one."""


@dataclass(frozen=True, kw_only=True)
class DiffReport(Report):
    """All that a comparison of two checkpoints has to say."""

    command: Literal["diff"] = "diff"
    """Which command made the report."""
    status: Literal["equal", "different"]
    """``equal``: no leaf differs, or none by more than the tolerance."""
    atol: float | None
    """The absolute tolerance; null if only equal bits count."""
    rtol: float | None
    """The tolerance relative to A; null if only equal bits count."""
    top: int
    """How many leaves people are shown."""
    counts: Mapping[str, int]
    """How many leaves have each status."""
    prefixes: tuple[PrefixRecord, ...]
    """The leaves, grouped."""
    leaves: tuple[DifferenceRecord, ...]
    """Every leaf, those that differ most first."""
