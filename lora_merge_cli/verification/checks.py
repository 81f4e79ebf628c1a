"""From what was found to checks: pass, warn or fail, with a message and its numbers. docs/verify.md says what each means."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from lora_merge_cli.compare import Comparison
from lora_merge_cli.errors import UsageError
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.report import CheckRecord
from lora_merge_cli.survival import GAIN_WORTH_A_WARNING
from lora_merge_cli.verification.examination import Findings, SiteFinding
from lora_merge_cli.verification.expectation import ExpectedLeaf
from lora_merge_cli.verification.site_judge import LayerVerdict

CHECK_IDS = (
    "readable",
    "structure",
    "adapters-stripped",
    "finite",
    "untouched-bits",
    "replaced",
    "interpolated",
    "fused-exact",
    "forward",
    "delta-survival",
    "base",
    "assets",
    "provenance",
)
"""Every check, in the order of a report."""

_MANY = 8
_NOTHING = 0.01
_FAIR_SHARE = 1e-3
"""Of a kernel's entries: fewer that are wrong were changed one by one, and not by a flag."""
_SAME_DIRECTION = 0.995
_ALMOST_ALL = 0.03
_NO_DELTA = "at alpha 0 no adapter adds anything"


@dataclass(frozen=True)
class Judging:
    """How strictly to judge."""

    sample: int | None = None
    """How many layers of each site to look at; None for all."""
    min_gain: float = GAIN_WORTH_A_WARNING
    """The least gain along an adapter's inputs that needs no warning."""
    strict: bool = False
    """Whether a lesser gain fails."""
    any_rounding: bool = False
    """Whether entries may be either neighbour of what they should be, whatever was asked for."""
    jobs: int | None = None
    """How many threads compute; see `jobs.jobs_or_default`."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: The sample or the number of jobs is below 1, or the least gain no finite number.
        """
        jobs_or_default(self.jobs)
        if self.sample is not None and self.sample < 1:
            raise UsageError("--sample must be at least 1", found=self.sample)
        if not math.isfinite(self.min_gain):
            raise UsageError("--min-gain must be a finite number", found=self.min_gain)


def readable(findings: Findings) -> CheckRecord:
    """Every leaf of the result decodes."""
    if findings.unreadable:
        names = list(findings.unreadable)
        message = f"{len(names)} leaves cannot be read: {findings.unreadable[names[0]]}"
        return CheckRecord("readable", "fail", message, {"leaves": len(names)}, tuple(names[:_MANY]))
    return CheckRecord("readable", "pass", "every leaf that was looked at can be read")


def structure(findings: Findings) -> CheckRecord:
    """Exactly the leaves that should be there, in their shapes and dtypes."""
    wrong = [*_listed("missing", findings.missing), *_listed("not in the checkpoint", findings.unexpected)]
    wrong += [f"{name} is of shape {words}" for name, words in findings.reshaped.items()]
    wrong += [f"{name} is {words}" for name, words in findings.recast.items()]
    doubts: list[str] = []
    if findings.unservable:
        (doubts if findings.unservable_before else wrong).append(findings.unservable)
    figures = {
        "missing": len(findings.missing),
        "unexpected": len(findings.unexpected),
        "reshaped": len(findings.reshaped),
        "recast": len(findings.recast),
        "widened": len(findings.widened),
    }
    names = [*findings.missing, *findings.unexpected, *findings.reshaped, *findings.recast]
    if wrong:
        return CheckRecord("structure", "fail", "; ".join(wrong[:3]), figures, tuple(names[:_MANY]))
    if findings.widened:
        words = next(iter(findings.widened.values()))
        doubts.append(
            f"{len(findings.widened)} untouched leaves are stored wider than they need be, the first as {words}"
        )
    if findings.constants:
        doubts.append(f"{len(findings.constants)} parts that are no arrays are not the checkpoint's")
    if doubts:
        names = [*findings.widened, *findings.constants]
        return CheckRecord("structure", "warn", "; ".join(doubts), figures, tuple(names[:_MANY]))
    return CheckRecord(
        "structure", "pass", "exactly the leaves that should be there, in their shapes and dtypes", figures
    )


def adapters_stripped(findings: Findings) -> CheckRecord:
    """No adapter key is left."""
    names = findings.adapters
    if names:
        message = f"{len(names)} adapter keys are left: a server would ignore them or apply them again"
        return CheckRecord("adapters-stripped", "fail", message, {"keys": len(names)}, tuple(names[:_MANY]))
    return CheckRecord("adapters-stripped", "pass", "no adapter key is left")


def finite(findings: Findings, judging: Judging) -> CheckRecord:
    """No NaN and no Inf, but for those that an untouched leaf had before."""
    for status, found, words in (
        ("fail", findings.not_finite, "are NaN or Inf"),
        ("warn", findings.not_finite_before, "are NaN or Inf in leaves that no adapter touches, as they were before"),
    ):
        if found:
            count = sum(found.values())
            return CheckRecord(
                "finite",
                "fail" if status == "fail" else "warn",
                f"{count} entries of {len(found)} leaves {words}",
                {"entries": count},
                tuple(found)[:_MANY],
            )
    return CheckRecord("finite", "pass", f"no NaN and no Inf{_sampled(judging)}")


def untouched_bits(findings: Findings) -> CheckRecord:
    """Every leaf that no adapter touches is the checkpoint's, bit for bit."""
    altered = findings.altered
    figures = {"leaves": findings.untouched, "altered": len(altered)}
    if altered:
        ordered = sorted(altered, key=lambda name: -_change(altered[name]))
        worst = ordered[0]
        change = altered[worst]
        how = "rounded" if all(found.rounded for found in altered.values()) else "altered"
        relative = "" if change.relative_l2 is None else f", |change|/|leaf| {change.relative_l2:.2g}"
        message = (
            f"{len(altered)} of {findings.untouched} leaves that no adapter touches are {how}; the most: {worst} "
            f"({change.changed} of {change.entries} entries{relative})"
        )
        return CheckRecord("untouched-bits", "fail", message, figures, tuple(ordered[:_MANY]))
    message = f"{findings.untouched} leaves that no adapter touches are the checkpoint's, bit for bit"
    return CheckRecord("untouched-bits", "pass", message, figures)


def replaced(findings: Findings) -> CheckRecord:
    """What an adapter brings whole, or row by row, is in the result, rounded once."""
    found = findings.replaced
    if not found:
        return CheckRecord("replaced", "skip", "no adapter brings a tensor of its own")
    wrong = sorted((name for name, entries in found.items() if entries), key=lambda name: -found[name])
    figures = {"leaves": len(found), "wrong": len(wrong), "entries": sum(found.values())}
    if wrong:
        message = (
            f"{len(wrong)} of {len(found)} leaves are not what the adapter brings; the most: {wrong[0]} "
            f"({found[wrong[0]]} entries)"
        )
        return CheckRecord("replaced", "fail", message, figures, tuple(wrong[:_MANY]))
    leaves = "1 leaf is" if len(found) == 1 else f"{len(found)} leaves are"
    return CheckRecord("replaced", "pass", f"{leaves} what the adapter brings, rounded once", figures)


def interpolated(findings: Findings, *, asked: bool) -> CheckRecord:
    """Every interpolated leaf without an adapter is what the base and the fine-tune make of it at its alpha."""
    found = findings.mixed
    if not asked:
        return CheckRecord("interpolated", "skip", "no interpolation")
    if not found:
        return CheckRecord("interpolated", "skip", "no leaf without an adapter is interpolated")
    wrong = sorted((name for name, leaf in found.items() if leaf.wrong), key=lambda name: -found[name].wrong)
    share = max(leaf.worst_share for leaf in found.values())
    figures = {
        "leaves": len(found),
        "moved": sum(leaf.moved for leaf in found.values()),
        "wrong": len(wrong),
        "entries": sum(leaf.wrong for leaf in found.values()),
        "worst_share": share if math.isfinite(share) else None,
    }
    if wrong:
        worst = found[wrong[0]]
        message = (
            f"{len(wrong)} of {len(found)} leaves are not what the two sides make of them at their alpha; the most: {wrong[0]} "
            f"({worst.wrong} entries; {worst.in_words})"
        )
        return CheckRecord("interpolated", "fail", message, figures, tuple(wrong[:_MANY]))
    leaves = "1 leaf is" if len(found) == 1 else f"{len(found)} leaves are"
    message = (
        f"{leaves} what the two sides make of them at their alpha, {figures['moved']} of which the fine-tune moved; "
        f"the worst entry takes {share:.0%} of its bound"
    )
    return CheckRecord("interpolated", "pass", message, figures)


def _change(found: Comparison) -> float:
    """How much a leaf changed; the most where it was zero, or is no longer finite."""
    return math.inf if found.relative_l2 is None or found.non_finite else found.relative_l2


def fused_exact(findings: Findings, judging: Judging, *, has_base: bool) -> CheckRecord:
    """Every entry of every kernel is the sum that the adapter makes, up to the rounding of a right float32 merge."""
    layers = _layers(findings)
    shares = {where: verdict.worst_share for where, (_, _, verdict) in layers.items()}
    wrong = {where: found for where, found in layers.items() if found[2].beyond or not found[2].worst_share <= 1}
    if not layers:
        return CheckRecord("fused-exact", "skip", "no kernel could be compared")
    worst = max(shares, key=lambda where: shares[where])
    figures = {
        "kernels": len(findings.sites),
        "layers": len(layers),
        "layers_beyond": len(wrong),
        "entries_beyond": sum(verdict.beyond for _, _, verdict in wrong.values()),
        "worst_share": shares[worst] if math.isfinite(shares[worst]) else None,
    }
    sampled = _sampled(judging)
    if not wrong:
        message = f"every entry is the float64 sum within its bound; the worst takes {shares[worst]:.0%} of it{sampled}"
        return CheckRecord("fused-exact", "pass", message, figures, (worst,))
    kernels = len({site for site, _, _ in wrong.values()})
    reasons = list(dict.fromkeys(_reason(findings.sites[site], layer) for site, layer, _ in wrong.values()))
    message = f"{kernels} of {len(findings.sites)} kernels are not what their adapters make: {'; '.join(reasons[:3])}"
    if not has_base and all(_looks_unrounded(findings.sites[site], verdict) for site, _, verdict in wrong.values()):
        message += "; as if the delta were added to unrounded kernels: if it was made with --base, pass that here too"
    else:
        message += _other_rounding(findings, judging, wrong.values())
    ordered = sorted(wrong, key=lambda where: -shares[where])
    return CheckRecord("fused-exact", "fail", message + sampled, figures, tuple(ordered[:_MANY]))


def _looks_unrounded(found: SiteFinding, verdict: LayerVerdict) -> bool:
    """Whether most entries are off, and none by more than the rounding of the kernel in the checkpoint."""
    has_choice = found.rounding.grid is not None
    return not has_choice and not verdict.off_the_rounding and 2 * verdict.beyond > verdict.moments.entries


def _other_rounding(findings: Findings, judging: Judging, wrong: Collection[tuple[str, int, LayerVerdict]]) -> str:
    """Which other rounding would make it right."""
    if judging.any_rounding or any(verdict.no_neighbours for _, _, verdict in wrong):
        return ""
    beyond = sum(verdict.beyond for _, _, verdict in wrong)
    if beyond < _FAIR_SHARE * sum(verdict.moments.entries for _, _, verdict in wrong):
        return f"; {beyond} entries alone, within one step: they were changed since"
    asked = {findings.sites[site].rounding.method for site, _, _ in wrong}
    narrow = _all_narrow(findings, wrong)
    if asked == {"nearest"}:
        made = "if it was not rounded to nearest, pass the --rounding that it was made with"
        return f"; within one ulp: {made}, or --rounding any" if narrow else ""
    if not any(verdict.not_nearest for found in findings.sites.values() for verdict in found.layers.values()):
        return "; as if rounded to nearest: leave out --rounding if it was"
    others = "--seed, or --rounding preserve" if "stochastic" in asked else "--mu, or --rounding stochastic"
    values = "" if narrow else ", or other --serving-values"
    any_one = "; --rounding any takes either neighbour" if narrow else ""
    return f"; within one step: another {others}{values}?{any_one}"


def _all_narrow(findings: Findings, wrong: Iterable[tuple[str, int, LayerVerdict]]) -> bool:
    """Whether rounding, and not arithmetic, is what the bounds are made of."""
    return all(findings.sites[site].dtype.itemsize < 4 for site, _, _ in wrong)


def forward(findings: Findings, judging: Judging, serving_dtype: str) -> CheckRecord:
    """Random inputs through kernel and adapter, as the model runs them, and through the merged kernel."""
    layers = _layers(findings)
    if not layers:
        return CheckRecord("forward", "skip", "no kernel could be run")
    if not any(found.has_delta for found in findings.sites.values()):
        return CheckRecord("forward", "skip", _NO_DELTA)
    errors = {where: verdict.forward for where, (_, _, verdict) in layers.items()}
    measured = {where: found.error for where, found in errors.items() if found.error is not None}
    served = {where: found.served for where, found in errors.items() if found.served is not None}
    worst = max(measured, key=lambda where: measured[where], default=next(iter(layers)))
    wrong = sorted((where for where, found in errors.items() if not found.share <= 1), key=lambda w: -errors[w].share)
    share = max(found.share for found in errors.values())
    figures = {
        "error": None if worst not in measured or math.isinf(measured[worst]) else measured[worst],
        "worst_share": share if math.isfinite(share) else None,
        f"error_in_{serving_dtype}": max(filter(math.isfinite, served.values()), default=None),
    }
    sampled = _sampled(judging)
    words = f"off by up to {measured.get(worst, 0.0):.2g} of what the adapter adds"
    if wrong:
        message = f"{len(wrong)} of {len(layers)} layers do not act as kernel and adapter do: {words}{sampled}"
        return CheckRecord("forward", "fail", message, figures, tuple(wrong[:_MANY]))
    lost = [where for where, error in served.items() if error > 1]
    if lost:
        message = (
            f"acts as kernel and adapter do ({words}), but served in {serving_dtype} {len(lost)} of {len(layers)} layers are "
            f"further from it than without the adapter: store and serve float32{sampled}"
        )
        return CheckRecord("forward", "warn", message, figures, tuple(lost[:_MANY]))
    return CheckRecord("forward", "pass", f"acts as kernel and adapter do, {words}{sampled}", figures, (worst,))


def delta_survival(findings: Findings, judging: Judging, serving_dtype: str) -> CheckRecord:
    """How much of each delta the stored and the serving dtype keep."""
    if not findings.sites:
        return CheckRecord("delta-survival", "skip", "no kernel could be compared")
    if not any(found.has_delta for found in findings.sites.values()):
        return CheckRecord("delta-survival", "skip", _NO_DELTA)
    figures: dict[str, float | int | str | None] = {}
    low: list[str] = []
    names: list[str] = []
    chosen = {found.rounding.method for found in findings.sites.values() if found.total.nearest is not None}
    least_to_nearest: list[float] = []
    for role, advice in (
        ("stored", "store it with --dtype float32, or merge with --base"),
        ("served", "serve it in float32, or merge with --base"),
    ):
        gains = {}
        for name, found in findings.sites.items():
            dtype = found.dtype.name if role == "stored" else serving_dtype
            gain = found.total.survival(dtype).gain_along_inputs
            if gain is not None and (role == "stored" or dtype != found.dtype.name):
                gains[name] = gain
        if not gains:
            continue
        figures[f"least_gain_{role}"] = min(gains.values())
        figures[f"least_gain_of_a_layer_{role}"] = min(_layer_gains(findings, gains, role, serving_dtype))
        to_nearest = _gains_to_nearest(findings, gains, role, serving_dtype)
        if to_nearest:
            least_to_nearest.append(min(to_nearest.values()))
            figures[f"nearest_gain_{role}"] = least_to_nearest[-1]
        lost = sorted((name for name, gain in gains.items() if gain < judging.min_gain), key=lambda name: gains[name])
        if lost:
            dtypes = sorted({findings.sites[name].dtype.name for name in lost}) if role == "stored" else [serving_dtype]
            stored_wide = role == "stored" and "float32" in dtypes
            low.append(
                f"{role} as {' and '.join(dtypes)}, {len(lost)} of {len(gains)} deltas keep less than {judging.min_gain:g} "
                f"along the adapter's inputs (least {gains[lost[0]]:.3f}): "
                + (
                    "the result is not what the adapter makes of the kernel"
                    if stored_wide
                    else _remedy(findings, lost, advice)
                )
            )
            names += [name for name in lost if name not in names]
    zero = [name for name, found in findings.sites.items() if found.has_delta and found.total.max_abs == 0]
    if zero:
        low.append(f"{len(zero)} deltas are exactly zero")
        names += zero
    sampled = _sampled(judging)
    if low:
        fails = judging.strict and len(names) > len(zero)
        message = "; ".join(low) + sampled
        return CheckRecord("delta-survival", "fail" if fails else "warn", message, figures, tuple(names[:_MANY]))
    message = f"every delta keeps at least {judging.min_gain:g} of itself along the adapter's inputs"
    if least_to_nearest:
        how = " and ".join(sorted(chosen))
        message += f", rounded with --rounding {how}: the least would keep {min(least_to_nearest):.3f} to nearest"
    return CheckRecord("delta-survival", "pass", message + sampled, figures)


def _remedy(findings: Findings, lost: Iterable[str], advice: str) -> str:
    """The advice for some deltas that were lost, with another rounding where they were rounded to nearest."""
    mends = not any(findings.sites[name].rounding.method == "preserve" for name in lost)
    return f"{advice}, or round with --rounding preserve or stochastic" if mends else advice


def _gains_to_nearest(findings: Findings, names: Iterable[str], role: str, serving_dtype: str) -> dict[str, float]:
    """What the kernels that were rounded otherwise would keep along the adapter's inputs if they were rounded to nearest."""
    found = {}
    for name in names:
        site = findings.sites[name]
        dtype = site.dtype.name if role == "stored" else serving_dtype
        if site.rounding.grid is not None and site.rounding.grid.name == dtype:
            survival = site.total.survival_to_nearest(dtype)
            if survival is not None and survival.gain_along_inputs is not None:
                found[name] = survival.gain_along_inputs
    return found


def _layer_gains(findings: Findings, names: Iterable[str], role: str, serving_dtype: str) -> Iterator[float]:
    for name in names:
        found = findings.sites[name]
        for verdict in found.layers.values():
            survival = verdict.moments.survival(found.dtype.name if role == "stored" else serving_dtype)
            if survival.gain_along_inputs is not None:
                yield survival.gain_along_inputs


def base(findings: Findings, judging: Judging, *, given: bool) -> CheckRecord:
    """The leaves that the fine-tune froze are the base's, rounded, bit for bit."""
    if not given:
        return CheckRecord("base", "skip", "no --base")
    if not findings.frozen:
        return CheckRecord("base", "skip", "no leaf was frozen: the fine-tune may have moved each")
    figures = {"leaves": findings.frozen, "differing": len(findings.not_frozen)}
    if findings.not_frozen:
        message = (
            f"{len(findings.not_frozen)} of {findings.frozen} frozen leaves are not the base's, rounded to their dtype: "
            "it is not what the fine-tune started from"
        )
        return CheckRecord("base", "fail", message, figures, tuple(findings.not_frozen[:_MANY]))
    message = f"{findings.frozen} frozen leaves are the base's, rounded to their dtype, bit for bit{_sampled(judging)}"
    return CheckRecord("base", "pass", message, figures)


def _layers(findings: Findings) -> dict[str, tuple[str, int, LayerVerdict]]:
    """Every layer that was looked at, by how it is called: its site, number and verdict."""
    return {
        f"{name}, layer {layer}" if found.stacked else name: (name, layer, verdict)
        for name, found in findings.sites.items()
        for layer, verdict in found.layers.items()
    }


def _sampled(judging: Judging) -> str:
    return "" if judging.sample is None else f" (at most {judging.sample} layers of each looked at)"


def _listed(words: str, names: list[str]) -> Iterator[str]:
    if names:
        yield f"{len(names)} {words}"


def _reason(found: SiteFinding, layer: int) -> str:
    """What the realised delta looks like beside the ideal one: which mistake would make it."""
    verdict = found.layers[layer]
    if verdict.non_finite:
        return "not finite"
    survival = verdict.moments.survival(found.dtype.name)
    if survival.gain is None:
        if found.leaf.alpha_of(layer) == 0:
            return "a change at alpha 0: it must be the kernel without the adapter, bit for bit"
        return "a change where the adapter makes none"
    if survival.unchanged == 1 or (abs(survival.gain) < _NOTHING and (survival.relative_error or 0) < 1 + _NOTHING):
        return "the adapter is missing"
    return _misplaced(found, layer, survival.gain, survival.cosine)


def _misplaced(found: SiteFinding, layer: int, gain: float, cosine: float | None) -> str:
    """Which mistake would make a delta of this gain and cosine."""
    narrow = found.dtype.itemsize < 4 or found.rounding.grid is not None
    if narrow and not found.layers[layer].no_neighbours and abs(gain - 1) < _ALMOST_ALL:
        return "the adapter is there, rounded otherwise"
    if cosine is not None and cosine > _SAME_DIRECTION:
        return _scaled(found.leaf, layer, gain)
    return "another delta (a wrong equation, layer, adapter or orientation?)"


def _scaled(leaf: ExpectedLeaf, layer: int, gain: float) -> str:
    """Which mistake would make a delta that is there so many times."""
    if round(gain, 2) == 1:
        return "the adapter is there, and the rest is off"
    if leaf.mixed:
        alpha = leaf.alpha_of(layer)
        return f"as if alpha were {alpha * gain:.2f}, not {alpha:g}"
    twice = " (merged twice?)" if round(gain, 2) == 2 else " (another scale?)"
    return f"the adapter is there {gain:.2f} times{twice}"
