"""What a result's ``lora_merge.json`` says, and whether it agrees with what is there. Nothing it says is believed in silence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.recording import mixing_record
from lora_merge_cli.records import first_names
from lora_merge_cli.report import CheckRecord, MixingRecord, OverrideRecord
from lora_merge_cli.rounding import METHODS
from lora_merge_cli.verification.examination import Findings
from lora_merge_cli.verification.expectation import Expectation

ID = "provenance"


SiteKey: TypeAlias = tuple[str, int | None]
"""A kernel's name, and the number of the adapter."""


@dataclass(frozen=True)
class ClaimedRounding:
    """What a provenance file says of rounding; see `report.RoundingRecord`."""

    method: str = "nearest"
    mu: float | None = None
    seed: int | None = None
    serving_values: str | None = None
    serving_dtype: str | None = None
    """What servers cast wider files to, where those were rounded for it."""

    @property
    def flags(self) -> str:
        """The flags that ask for it."""
        said = [f"--rounding {self.method}"]
        said += [f"--mu {self.mu:g}"] if self.mu not in (None, 1) else []
        said += [f"--seed {self.seed}"] if self.seed else []
        if self.serving_values is not None:
            said.append(f"--serving-values {self.serving_values} --serving-dtype {self.serving_dtype}")
        return " ".join(said)


@dataclass(frozen=True)
class Claims:
    """A provenance file."""

    problem: str | None = None
    """Why it cannot be read."""
    multiplier: float = 1.0
    """The ``--scale`` of the merge."""
    base: str | None = None
    """The path of the base that it was made with."""
    fingerprint: str | None = None
    """That of the checkpoint that was merged; None where several were joined."""
    tuned: tuple[tuple[str, float], ...] = ()
    """Fingerprint and weight of each fine-tune that was joined."""
    adapters: tuple[tuple[str, float], ...] = ()
    """Fingerprint and weight of each adapter beside that checkpoint."""
    mixing: MixingRecord | None = None
    """Which alpha went where; None of a merge."""
    rounding: ClaimedRounding = field(default_factory=ClaimedRounding)
    """How results were rounded."""
    sites: Mapping[SiteKey, Mapping[str, Any]] = field(default_factory=dict)
    """The records of its sites by kernel name and adapter."""

    @property
    def scales(self) -> dict[SiteKey, float]:
        """The scale of each site, where it states a finite one."""
        found = {name: _number(site.get("scale")) for name, site in self.sites.items()}
        return {name: scale for name, scale in found.items() if math.isfinite(scale)}


def read_claims(merged: Checkpoint) -> Claims | None:
    """The provenance beside a result; None if there is none."""
    if merged.provenance is None:
        return None
    try:
        document = json.loads(merged.provenance.read_text())
        targets = [(site["target"], site.get("adapter")) for site in document["sites"]]
        if len(set(targets)) < len(targets) or not all(isinstance(target, str) for target, _ in targets):
            return Claims(problem="its sites are not named once each")
        if not math.isfinite(_number(document["multiplier"])):
            return Claims(problem="its multiplier is no number")
        sources = {source["role"]: source for source in document["sources"]}
        return Claims(
            multiplier=float(document["multiplier"]),
            base=sources["base"]["path"] if "base" in sources else None,
            fingerprint=None if "tuned" in sources else sources["checkpoint"]["fingerprint"],
            tuned=_weighted(document["sources"], "tuned"),
            adapters=_weighted(document["sources"], "adapter"),
            mixing=_mixing(document["mixing"]) if document.get("command") == "interpolate" else None,
            rounding=claimed_rounding(document.get("rounding"), document.get("serving_dtype")),
            sites={(site["target"], site.get("adapter")): dict(site) for site in document["sites"]},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        return Claims(problem=f"{type(error).__name__}: {error}")


def _weighted(sources: Sequence[Mapping[str, Any]], role: str) -> tuple[tuple[str, float], ...]:
    """Fingerprint and weight of each source of a role."""
    return tuple((source["fingerprint"], _number(source["weight"])) for source in sources if source["role"] == role)


def _mixing(document: Mapping[str, Any]) -> MixingRecord:
    """The mixing that a report states.

    Raises:
        KeyError, TypeError, ValueError: It states none.
    """
    schedule = document["schedule"]
    if schedule is not None:
        first, last = schedule
        schedule = _number(first), _number(last)
    found = MixingRecord(
        alpha=_number(document["alpha"]),
        overrides=tuple(OverrideRecord(str(each["glob"]), _number(each["alpha"])) for each in document["overrides"]),
        schedule=schedule,
        only_common=document["only_common"],
        deltas_only=bool(document["deltas_only"]),
    )
    alphas = (found.alpha, *(each.alpha for each in found.overrides), *(found.schedule or ()))
    if not all(map(math.isfinite, alphas)):
        raise ValueError("an alpha is no number")
    return found


def claimed_rounding(document: Mapping[str, Any] | None, serving_dtype: Any) -> ClaimedRounding:
    """The rounding that a report states; without one it was to nearest.

    Args:
        document: Its record of it.
        serving_dtype: What it says that servers cast to.

    Raises:
        KeyError, TypeError, ValueError: It is none.
    """
    if document is None:
        return ClaimedRounding()
    mu, values = document["mu"], document["serving_values"]
    if document["method"] not in METHODS or values not in (None, "cell", "widened"):
        raise ValueError("its rounding is none")
    seed = document["seed"]
    found = ClaimedRounding(
        method=document["method"],
        mu=None if mu is None else _number(mu),
        seed=None if seed is None else int(seed),
        serving_values=values,
        serving_dtype=None if values is None else str(serving_dtype),
    )
    if found.mu is not None and not math.isfinite(found.mu):
        raise ValueError("its mu is no number")
    return found


def check_provenance(
    claims: Claims | None,
    inputs: Inputs,
    expectation: Expectation,
    findings: Findings,
    options: MergeOptions,
    rounding: ClaimedRounding | None,
) -> CheckRecord:
    """Whether the provenance agrees with the flags, the checkpoint and the result.

    Args:
        claims: What it says.
        inputs: What was merged.
        expectation: What a right result holds.
        findings: What this one does.
        options: The flags.
        rounding: How results should be rounded; None where any will do.
    """
    if claims is None:
        return CheckRecord(ID, "skip", "no lora_merge.json: nothing is claimed")
    if claims.problem is not None:
        return CheckRecord(ID, "fail", f"lora_merge.json is no record of a merge ({claims.problem})")
    wrong = list(_disagreements(claims, inputs, expectation, findings, options))
    if rounding is not None and claims.rounding != rounding:
        wrong.append(f"says {claims.rounding.flags}, and this judges {rounding.flags}: pass {claims.rounding.flags}")
    doubts = [f"lora_merge.json {first_names(wrong, 3)}"] if wrong else []
    if expectation.claimed:
        doubts.append(
            f"the scale of {len(expectation.claimed)} sites is taken from lora_merge.json, and nobody else states it: "
            "pass --lora-alpha to check it"
        )
    tuned = [part.checkpoint.source.fingerprint() for part in inputs.joined]
    if claims.tuned or tuned:
        if [fingerprint for fingerprint, _ in claims.tuned] != tuned:
            doubts.append("lora_merge.json was written for fine-tunes with other files than those given")
    elif claims.fingerprint != inputs.checkpoint.source.fingerprint():
        doubts.append("lora_merge.json was written for a checkpoint with other files than the one given")
    given = [adapter.checkpoint.source.fingerprint() for adapter in inputs.adapters]
    if [fingerprint for fingerprint, _ in claims.adapters] != given:
        doubts.append("lora_merge.json was written for adapters with other files than those given")
    if doubts:
        figures = {"disagreements": len(wrong), "scales_claimed": len(expectation.claimed)}
        return CheckRecord(ID, "fail" if wrong else "warn", "; ".join(doubts), figures, expectation.claimed[:5])
    return CheckRecord(ID, "pass", "lora_merge.json agrees with the checkpoint and the result")


def _disagreements(
    claims: Claims, inputs: Inputs, expectation: Expectation, findings: Findings, options: MergeOptions
) -> Iterator[str]:
    has_base, multiplier = inputs.base is not None, options.multiplier
    mixing = None if options.mixing is None else mixing_record(options.mixing)
    yield from _mixing_disagreements(claims.mixing, mixing)
    if not math.isclose(claims.multiplier, multiplier, rel_tol=1e-9):
        yield f"says --scale {claims.multiplier:g}, and this judges {multiplier:g}: pass --scale {claims.multiplier:g}"
    if claims.base is not None and not has_base:
        yield f"says that it was made with --base {claims.base}: pass it here too"
    if claims.base is None and has_base:
        yield "says that it was made without a base, and --base is given"
    for claimed, given in ((claims.tuned, inputs.joined), (claims.adapters, inputs.adapters)):
        weights = [weight for _, weight in claimed]
        if len(weights) == len(given) and weights != [part.weight for part in given]:
            yield f"says other weights: {', '.join(f'{weight:g}' for weight in weights)}"
    expected = {(site.name, site.adapter) for site in expectation.sites}
    for words, keys in (
        ("says that these were merged, and they should not be", claims.sites.keys() - expected),
        ("does not say that these were merged", expected - claims.sites.keys()),
    ):
        yield from _differences(words, {name for name, _ in keys})
    if claims.mixing == mixing:
        yield from _differences("says other alphas", set(_other_alphas(claims, expectation)))
    for site in expectation.sites:
        record = claims.sites.get((site.name, site.adapter))
        if record is None:
            continue
        scale = _number(record.get("scale"))
        value = site.parameters.scale.value or 0.0
        if not math.isclose(scale, value, rel_tol=1e-6):
            yield f"says scale {record.get('scale')} at {site.name}, and this judges {value:g}"
        found = findings.sites.get(site.name)
        if found is not None and record.get("dtype") != found.dtype.name:
            yield f"says {record.get('dtype')} at {site.name}, and it is {found.dtype.name}"
        if found is not None and record.get("adapter_digest") not in (None, found.of(site)[1]):
            yield f"was written for another adapter at {site.name}"


def _other_alphas(claims: Claims, expectation: Expectation) -> Iterator[str]:
    alphas = {leaf.change.path: list(leaf.change.alphas) for leaf in expectation.leaves.values()}
    for site in expectation.sites:
        record = claims.sites.get((site.name, site.adapter), {})
        if record.get("alphas", alphas[site.targets[0]]) != alphas[site.targets[0]]:
            yield site.name


def _mixing_disagreements(claimed: MixingRecord | None, judged: MixingRecord | None) -> Iterator[str]:
    if claimed == judged:
        return
    if claimed is None:
        yield "says that it is of a merge, and --alpha is given"
    elif judged is None:
        yield f"says that it is an interpolation: pass --alpha {claimed.alpha}, and what else it was made with"
    else:
        for flag, one, other in (
            ("--alpha", claimed.alpha, judged.alpha),
            ("--alpha-for", _in_words(claimed.overrides), _in_words(judged.overrides)),
            ("--alpha-schedule", _ends(claimed.schedule), _ends(judged.schedule)),
            ("--only-common", claimed.only_common or "none", judged.only_common or "none"),
            ("--deltas-only", claimed.deltas_only, judged.deltas_only),
        ):
            if one != other:
                yield f"says {flag} {one}, and this judges {other}"


def _in_words(overrides: Sequence[OverrideRecord]) -> str:
    return " ".join(f"{found.glob}={found.alpha}" for found in overrides) or "none"


def _ends(schedule: tuple[float, float] | None) -> str:
    return "none" if schedule is None else f"layer={schedule[0]}:{schedule[1]}"


def _differences(words: str, names: Sequence[str] | set[str]) -> Iterator[str]:
    if names:
        yield f"{words}: {first_names(sorted(names), 3)}"


def _number(value: Any) -> float:
    """The value as a float; NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan
