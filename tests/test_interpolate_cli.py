"""The command line of an interpolation: what its flags mean, what it refuses, and what it shows."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli import errors, interpolating, verification
from lora_merge_cli._cli.parsing_alphas import (
    MOST_ALPHAS,
    parse_alphas,
    parse_one_alpha,
    parse_override,
    parse_schedule,
)
from lora_merge_cli._cli.show_interpolation import print_interpolation, print_sweep
from lora_merge_cli.errors import LoraMergeError, SomeFailed, UsageError, VerificationFailed
from lora_merge_cli.inputs import AdapterChoice
from lora_merge_cli.mixing import Mixing, Override, Schedule
from lora_merge_cli.report import (
    CheckRecord,
    InterpolateReport,
    LeafRecord,
    MixedRecord,
    MixingRecord,
    OverrideRecord,
    PartRecord,
    PointRecord,
    SiteRecord,
    SourceRecord,
    SurvivalRecord,
    SweepReport,
)
from tests.command import run

HOSTILE = "[bold]x[/bold]\x1b[31m[/nope]"


def part(name: str, alpha: float, moved: float, base_norm: float = 2.0) -> PartRecord:
    gain = None if moved == 0 else 0.75
    return PartRecord(name, 4, 1000, (alpha, alpha), base_norm, moved * 1.5, moved, gain, gain)


def point(alpha: float, output: Path, **changes: Any) -> PointRecord:
    found = PointRecord(
        alpha,
        str(output / f"alpha-{alpha:g}"),
        "written",
        parts=(
            part("vision tower", alpha, 0.0),
            part("language model", alpha, alpha),
            part("projections", alpha, 2 * alpha),
        ),
        least_gain_stored=0.625,
        least_gain_served=0.375,
        bytes_on_disk=2048,
    )
    return replace(found, **changes)


MODEL: dict[str, Any] = {
    "tool_version": "1.0",
    "sources": (SourceRecord("base", "/in/base", "orbax", None, "sha256:01"),),
    "model": "pi0",
    "dialect": "openpi",
    "serving_dtype": "bfloat16",
    "seconds": 1.5,
    "peak_rss_bytes": 2**20,
}
SURVIVAL = tuple(
    SurvivalRecord(dtype, gain, 1.0, 0.0, 0.25, gain, None) for dtype, gain in [("float32", 0.75), ("bfloat16", 0.5)]
)
SITE = SiteRecord(
    target="params/q/kernel",
    label="q",
    group="expert",
    module="attn",
    operation="add_delta",
    equation="ir,ro->io",
    rank=4,
    scale=0.5,
    scale_source="preset",
    scale_assumed=True,
    shape=(8, 8),
    source_dtype="bfloat16",
    dtype="float32",
    alphas=(0.5,),
    relative_norm=0.03125,
    max_abs=0.5,
    survival=SURVIVAL,
)


def interpolated(output: Path | None) -> InterpolateReport:
    return InterpolateReport(
        **MODEL,
        status="interpolated",
        multiplier=1.0,
        sites=(SITE, replace(SITE, label="k", alphas=(0.25, 0.75))),
        mixing=MixingRecord(0.5, (OverrideRecord("img/**", 0.0),)),
        mixed=(MixedRecord("head/kernel", "projections", (0.5,), "float32", 64, 0.125, SURVIVAL),),
        parts=(part("language model", 0.5, 1.0),),
        output=None if output is None else str(output),
        output_format="orbax",
        copied=(LeafRecord("norm", "copied", "float32", 32),),
        dropped=(),
        output_bytes=64,
        peak_bytes_planned=128,
        bytes_on_disk=4096,
    )


def sweep(output: Path, alphas: tuple[float, ...] = (0.0, 0.5, 1.0)) -> SweepReport:
    return SweepReport(
        **MODEL,
        status="complete",
        output=str(output),
        mixing=MixingRecord(alphas[0]),
        points=tuple(point(alpha, output) for alpha in alphas),
    )


# Alphas


def test_ranges_are_counted_in_decimal() -> None:
    assert parse_alphas(["0:1:0.1"]) == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert parse_alphas(["0:1:0.3"]) == (0.0, 0.3, 0.6, 0.9)
    assert parse_alphas(["-0.5:1.5:0.5"]) == (-0.5, 0.0, 0.5, 1.0, 1.5)
    assert parse_alphas(["1:0:-0.25"]) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert parse_alphas(["0.5:0.5:1"]) == parse_alphas([".5"]) == parse_alphas(["5e-1"]) == (0.5,)


def test_alphas_ascend_and_come_once() -> None:
    assert parse_alphas(["1", "0.5", "0:1:0.5", "0.50"]) == (0.0, 0.5, 1.0)
    assert [math.copysign(1, alpha) for alpha in parse_alphas(["-0", "0"])] == [1.0]


@given(
    start=st.integers(-2000, 2000),
    step=st.integers(1, 500),
    steps=st.integers(0, 60),
    digits=st.integers(0, 6),
    data=st.data(),
)
def test_a_range_holds_what_its_numbers_say_in_decimal(
    start: int, step: int, steps: int, digits: int, data: st.DataObject
) -> None:
    beyond = data.draw(st.integers(0, step - 1))
    stop = start + steps * step + beyond
    forth = ":".join(f"{number}e-{digits}" for number in (start, stop, step))
    expected = tuple(dict.fromkeys(float(f"{start + number * step}e-{digits}") for number in range(steps + 1)))
    assert parse_alphas([forth]) == tuple(alpha + 0.0 for alpha in expected)
    back = ":".join(f"{number}e-{digits}" for number in (-start, -stop, -step))
    assert parse_alphas([back]) == tuple(0.0 - alpha for alpha in reversed(expected))


@given(st.lists(st.floats(-1e9, 1e9).filter(lambda alpha: alpha == 0 or abs(alpha) > 1e-90), min_size=1, max_size=20))
def test_any_float_can_be_said(alphas: list[float]) -> None:
    assert parse_alphas([repr(alpha) for alpha in alphas]) == tuple(sorted({alpha + 0.0 for alpha in alphas}))


NUMBERS = st.text("0123456789.:eE+-_ naif/", max_size=24) | st.text(max_size=12)


@given(NUMBERS)
def test_any_text_is_finite_alphas_or_refused(text: str) -> None:
    try:
        alphas = parse_alphas([text])
    except UsageError as error:
        assert "expected" in str(error)
    else:
        assert 1 <= len(alphas) <= MOST_ALPHAS
        assert all(map(math.isfinite, alphas))
        assert list(alphas) == sorted(set(alphas))


@given(st.text("gl*/=.0123456789", max_size=20))
def test_any_text_is_an_override_or_refused(text: str) -> None:
    try:
        found = parse_override(text)
    except UsageError as error:
        assert "GLOB=VALUE" in str(error)
    else:
        value = text[len(found.glob) + 1 :]
        assert text == f"{found.glob}={value}" and "=" not in value
        assert found.alpha == float(Fraction(value))


def test_overrides_and_schedules() -> None:
    assert parse_override("PaliGemma/img/**=0") == Override("PaliGemma/img/**", 0.0)
    assert parse_override("a=b=-0.25") == Override("a=b", -0.25)
    assert parse_schedule("layer=0.2:0.9") == Schedule(0.2, 0.9)
    assert parse_schedule("layer=-1:2") == Schedule(-1.0, 2.0)
    assert parse_one_alpha(["0.25"]) == 0.25


BAD_ALPHAS = [
    ("", "a number such as 0.5"),
    ("half", "needs a finite number"),
    ("nan", "needs a finite number"),
    ("-inf", "needs a finite number"),
    ("1e999", "needs a finite number"),
    ("1_0", "needs a finite number"),
    ("\u0663", "needs a finite number"),
    ("0x1", "needs a finite number"),
    ("1/2", "needs a finite number"),
    ("0,1", "needs a finite number"),
    ("9" * 5000, "needs a finite number"),
    ("0:1", "neither a number nor a range"),
    ("0:1:0.5:2", "neither a number nor a range"),
    ("::", "needs a finite number"),
    ("0:nan:0.1", "needs a finite number"),
    ("0:1:0", "a step of zero"),
    ("0:1:-0.1", "a step above zero"),
    ("1:0:0.1", "a step below zero"),
    ("0:1:0.001", "at most 1000"),
    ("0:1:1e-99", "at most 1000"),
]


@pytest.mark.parametrize(("text", "words"), BAD_ALPHAS)
def test_what_is_no_alpha(text: str, words: str, tmp_path: Path) -> None:
    outcome = run("interpolate", "base", "tuned", "-o", tmp_path / "out", f"--alpha={text}")
    assert outcome.code == 2
    assert words in outcome.error and "--alpha" in outcome.error and "expected" in outcome.error


def test_how_many_outputs_at_most(tmp_path: Path) -> None:
    assert len(parse_alphas(["0:0.999:0.001"])) == 1000
    with pytest.raises(UsageError, match="at most 1000, found 1001"):
        parse_alphas(["0:0.999:0.001", "1"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "0.5"], "an output is needed; pass -o OUT, or --dry-run"),
        (["--alpha", "0.5", "-o", "out", "--adapter", "a"], "TUNED and --adapter are two fine-tunes"),
        (["--alpha", "0.5", "-o", "out", "--deltas-only"], "--deltas-only is for a fine-tune that has no base"),
        (["--alpha", "0.5", "-o", "out", "--strict"], "--strict and --sample are for --verify"),
        (["--alpha", "0.5", "-o", "out", "--max-shard-size", "x"], "--max-shard-size is no size"),
        (["--alpha", "1.5", "-o", "out"], "pass --extrapolate if that is meant"),
        (["--alpha=-0.5:0.5:0.5", "-o", "out"], "--alpha lies outside [0, 1]"),
        (["--alpha", "0.5", "-o", "out", "--alpha-for", "img/**"], "expected GLOB=VALUE"),
        (["--alpha", "0.5", "-o", "out", "--alpha-for", "=0.5"], "--alpha-for names no leaves"),
        (["--alpha", "0.5", "-o", "out", "--alpha-for", "img/**=nan"], "--alpha-for needs a finite number"),
        (["--alpha", "0.5", "-o", "out", "--alpha-for", "img/**=2"], "--alpha-for lies outside [0, 1]"),
        (["--alpha", "0.5", "-o", "out", "--alpha-schedule", "0.2:0.9"], "expected layer=FIRST:LAST"),
        (["--alpha", "0.5", "-o", "out", "--alpha-schedule", "layer=0.2"], "expected layer=FIRST:LAST"),
        (["--alpha", "0.5", "-o", "out", "--alpha-schedule", "layer=0:1:2"], "expected layer=FIRST:LAST"),
        (["--alpha", "0.5", "-o", "out", "--alpha-schedule", "layer=0:x"], "--alpha-schedule needs a finite number"),
        (["--alpha", "0.5", "-o", "out", "--alpha-schedule", "layer=0:2"], "--alpha-schedule lies outside [0, 1]"),
    ],
)
def test_usage(flags: list[str], words: str) -> None:
    outcome = run("interpolate", "base", "tuned", *flags)
    assert outcome.code == 2
    assert words in outcome.error


def test_deltas_only_has_no_adapter_beside_it() -> None:
    outcome = run("interpolate", "base", "--adapter", "a", "--alpha", "0.5", "-o", "out", "--deltas-only")
    assert outcome.code == 2
    assert "found BASE and --adapter" in outcome.error


@pytest.mark.parametrize(
    "flags",
    [["base", "tuned", "-o", "out"], ["base", "--alpha"], ["--alpha", "0.5"], ["base", "--only-common", "both"]],
)
def test_flags_that_are_wanting(flags: list[str]) -> None:
    outcome = run("interpolate", *flags)
    assert outcome.code == 2
    assert "Traceback" not in outcome.stderr


# What reaches the library


@dataclass(frozen=True)
class Prepared:
    """A prepared interpolation that reads and writes nothing."""

    request: interpolating.InterpolateRequest
    output: Path
    kept: InterpolateReport | None = None
    input_paths: tuple[Path, ...] = ()

    @property
    def is_single(self) -> bool:
        return len(self.request.alphas) == 1

    @property
    def points(self) -> list[SimpleNamespace]:
        outputs = [self.output] if self.is_single else [self.output / f"alpha-{alpha}" for alpha in self.request.alphas]
        requests = [SimpleNamespace(request=SimpleNamespace(output=output)) for output in outputs]
        return [SimpleNamespace(kept=self.kept, prepared=request) for request in requests]

    def report(self) -> InterpolateReport | SweepReport:
        if self.is_single:
            return replace(interpolated(self.output), status="planned")
        return replace(sweep(self.output, self.request.alphas), status="planned")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[interpolating.InterpolateRequest]:
    """Every request that reaches the library, which plans and does not work."""
    requests: list[interpolating.InterpolateRequest] = []

    def prepare(request: interpolating.InterpolateRequest) -> Prepared:
        requests.append(request)
        kept = interpolated(tmp_path / "out") if request.resume and len(request.alphas) == 1 else None
        return Prepared(request, tmp_path / "out", kept)

    monkeypatch.setattr(interpolating, "prepare_interpolation", prepare)
    return requests


def test_every_flag_reaches_the_library(asked: list[interpolating.InterpolateRequest], tmp_path: Path) -> None:
    outcome = run(
        *("interpolate", "base", "tuned", "-o", tmp_path / "x", "--dry-run", "--alpha", "0:1:0.5", "--extrapolate"),
        *("--alpha-for", "img/**=0", "--alpha-for", "*=-1", "--alpha-schedule", "layer=0.2:0.9"),
        *(
            "--only-common",
            "tuned",
            "--step",
            7,
            "--dialect",
            "openpi",
            "--to",
            "safetensors",
            "--max-shard-size",
            "1MB",
        ),
        *("--overwrite", "--device", "cpu", "--compression", "zstd", "--jobs", 3, "--verify", "--sample", 2),
        *(
            "--dtype",
            "bfloat16",
            "--scale",
            "0.5",
            "--include",
            "q",
            "--exclude",
            "k",
            "--rslora",
            "--lora-alpha",
            "12",
        ),
    )
    assert outcome.code == 0, outcome.stderr
    (request,) = asked
    assert (request.base, request.tuned, request.output) == (Path("base"), Path("tuned"), tmp_path / "x")
    assert request.alphas == (0.0, 0.5, 1.0)
    assert dataclasses.replace(request.mixing, alpha=0.0) == Mixing(
        0.0, (Override("img/**", 0.0), Override("*", -1.0)), Schedule(0.2, 0.9), extrapolate=True, only_common="tuned"
    )
    assert request.adapters == ()
    assert (request.step, request.dialect, request.to, request.max_shard_bytes) == (7, "openpi", "safetensors", 10**6)
    assert (request.overwrite, request.device, request.compression, request.jobs) == (True, "cpu", "zstd", 3)
    assert request.verify == verification.Judging(2, 0.98, False, jobs=3)
    options = request.options
    assert (options.dtype, options.multiplier, options.include, options.exclude) == ("bfloat16", 0.5, ("q",), ("k",))
    assert (options.scales.alpha, options.scales.rslora) == ({"": 12.0}, {""})


def test_what_is_not_asked_for(asked: list[interpolating.InterpolateRequest]) -> None:
    assert run("interpolate", "base", "--adapter", "a@0.5", "--alpha", "0.3", "--dry-run").code == 0
    assert run("interpolate", "run/5", "--alpha", "0.3", "--deltas-only", "--resume", "--dry-run").code == 0
    beside, alone = asked
    assert (beside.tuned, beside.output, beside.adapters) == (None, None, (AdapterChoice(Path("a"), 0.5),))
    assert (beside.alphas, beside.mixing) == ((0.3,), Mixing(0.3))
    assert (beside.verify, beside.resume, beside.overwrite, beside.to) == (None, False, False, "auto")
    assert (alone.mixing, alone.resume) == (Mixing(0.3, deltas_only=True), True)


@pytest.mark.parametrize(
    "flags", [["--alpha", "-0.5:0.5:0.5"], ["--alpha=-0.5:0.5:0.5"], ["--alpha", "-.5", "--alpha=0", "--alpha", "0.5"]]
)
def test_negative_alphas(flags: list[str], asked: list[interpolating.InterpolateRequest]) -> None:
    assert run("interpolate", *flags, "base", "tuned", "--extrapolate", "--dry-run").code == 0
    (request,) = asked
    assert (request.alphas, request.base, request.tuned) == ((-0.5, 0.0, 0.5), Path("base"), Path("tuned"))


# What becomes of the result

Work = Callable[..., "InterpolateReport | SweepReport"]


def works(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    monkeypatch.setattr(interpolating, "interpolate", work)


def test_one_alpha_stages_its_report_with_the_output(
    asked: list[interpolating.InterpolateRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()

    def work(prepared: Prepared, listener: Any, beside: Callable[[InterpolateReport, Path], None]) -> InterpolateReport:
        done = interpolated(prepared.output)
        beside(done, stage)
        assert (stage / "report.md").exists()
        return done

    works(monkeypatch, work)
    outside = tmp_path / "report.json"
    out = tmp_path / "out"
    outcome = run(
        "interpolate", "b", "t", "-o", out, "--alpha", "0.5", "--report", out / "report.md", "--report", outside
    )
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outside.read_text())["command"] == "interpolate"
    assert "interpolated pi0: alpha 0.5; img/**: 0" in outcome.stdout


def test_several_alphas_share_a_report(
    asked: list[interpolating.InterpolateRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(prepared: Prepared, listener: Any, beside: None) -> SweepReport:
        assert beside is None
        return sweep(tmp_path / "out")

    works(monkeypatch, work)
    inside, outside = tmp_path / "out" / "sweep.json", tmp_path / "sweep.json"
    outcome = run(
        *("interpolate", "b", "t", "-o", tmp_path / "out", "--alpha", "0:1:0.5", "--json"),
        *("--report", inside, "--report", outside),
    )
    assert outcome.code == 0, outcome.stderr
    found = outcome.json
    assert found["command"] == "sweep" and [point["alpha"] for point in found["points"]] == [0.0, 0.5, 1.0]
    assert json.loads(inside.read_text()) == json.loads(outside.read_text()) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sweep.json"]


def test_the_report_of_a_sweep_stays_out_of_its_outputs(
    asked: list[interpolating.InterpolateRequest], tmp_path: Path
) -> None:
    report = tmp_path / "out" / "alpha-0.5" / "lora_merge.json"
    outcome = run("interpolate", "b", "t", "-o", tmp_path / "out", "--alpha", "0:1:0.5", "--report", report)
    assert outcome.code == 2
    assert "complete without it" in outcome.error
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_kept_is_told_of_and_gets_no_report(
    asked: list[interpolating.InterpolateRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    works(monkeypatch, lambda prepared, listener, beside: prepared.kept)
    inside, outside = tmp_path / "out" / "x.json", tmp_path / "x.json"
    flags = ("interpolate", "b", "t", "-o", tmp_path / "out", "--alpha", "0.5", "--resume", "--report")
    refused = run(*flags, inside)
    assert refused.code == 2
    assert "complete without it" in refused.error
    assert run(*flags, outside).code == 0
    assert json.loads(outside.read_text())["mixing"]["alpha"] == 0.5


def test_some_that_failed_are_told_of(
    asked: list[interpolating.InterpolateRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(*_: Any) -> SweepReport:
        failed = SomeFailed("1 of 3 outputs failed", where=tmp_path / "out")
        done = sweep(tmp_path / "out")
        points = (
            *done.points[:2],
            replace(done.points[2], status="failed", error=f"the disk is full {HOSTILE}", parts=()),
        )
        failed.report = replace(done, status="incomplete", points=points)
        raise failed

    works(monkeypatch, work)
    report = tmp_path / "sweep.json"
    outcome = run("interpolate", "b", "t", "-o", tmp_path / "out", "--alpha", "0:1:0.5", "--report", report)
    assert outcome.code == 7
    assert "1 of 3 outputs failed" in outcome.error
    assert json.loads(report.read_text())["status"] == "incomplete"
    assert "2 of 3 outputs interpolated" in outcome.stdout
    assert "failed: alpha 1: the disk is full [bold]x[/bold]\\x1b[31m[/nope]" in outcome.stdout


def test_what_fails_its_checks_is_told_of(
    asked: list[interpolating.InterpolateRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(*_: Any) -> InterpolateReport:
        failure = VerificationFailed("the result failed 1 check")
        check = CheckRecord("fused-exact", "fail", "1 kernel is wrong", where=("q",))
        failure.report = replace(interpolated(tmp_path / "out"), status="rejected", checks=(check,))
        raise failure

    works(monkeypatch, work)
    inside, outside = tmp_path / "out" / "x.json", tmp_path / "x.json"
    outcome = run(
        *("interpolate", "b", "t", "-o", tmp_path / "out", "--alpha", "0.5", "--verify"),
        *("--report", inside, "--report", outside),
    )
    assert outcome.code == 1
    assert "rejected" in outcome.stdout and "1 kernel is wrong" in outcome.stdout
    assert outside.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (errors.Terminated, 143)])
def test_an_interrupt_does_not_deny_what_is_finished(
    raised: type[BaseException],
    code: int,
    asked: list[interpolating.InterpolateRequest],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def work(*_: Any) -> SweepReport:
        raise raised

    works(monkeypatch, work)
    outcome = run("interpolate", "b", "t", "-o", tmp_path / "out", "--alpha", "0:1:0.5")
    assert outcome.code == code
    assert "--resume keeps what was finished" in outcome.error and "nothing was written" not in outcome.error


# Verify


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha-for", "img/**=0"], "--alpha-for is of an interpolation"),
        (["--alpha-schedule", "layer=0:1"], "--alpha-schedule is of an interpolation"),
        (["--alpha-schedule", ""], "--alpha-schedule is of an interpolation"),
        (["--extrapolate"], "--extrapolate is of an interpolation"),
        (["--only-common", "base"], "--only-common is of an interpolation"),
        (["--deltas-only"], "pass the --alpha that it was made with"),
        (["--alpha", "0:1:0.5"], "expected one number"),
        (["--alpha", "0.5:0.5:1"], "expected one number"),
        (["--alpha", "0.5", "--alpha", "0.6"], "--alpha is of one result (expected one number, found 0.5, 0.6)"),
        (["--alpha", ""], "expected one number"),
        (["--alpha", "1.5"], "pass --extrapolate if that is meant"),
    ],
)
def test_usage_of_verify(flags: list[str], words: str) -> None:
    outcome = run("verify", "merged", "--against", "tuned", "--base", "base", *flags)
    assert outcome.code == 2
    assert words in outcome.error


@pytest.mark.parametrize(
    ("flags", "mixing"),
    [
        ([], None),
        (["--alpha", "-0.5", "--extrapolate"], Mixing(-0.5, extrapolate=True)),
        (
            ["--alpha", "0", "--alpha-for", "a=1", "--alpha-schedule", "layer=0:1", "--only-common", "base"],
            Mixing(0.0, (Override("a", 1.0),), Schedule(0.0, 1.0), only_common="base"),
        ),
        (["--alpha", "0.5", "--deltas-only"], Mixing(0.5, deltas_only=True)),
    ],
)
def test_verify_expects_what_it_is_told(
    flags: list[str], mixing: Mixing | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[verification.VerifyRequest] = []

    def opened(request: verification.VerifyRequest) -> None:
        asked.append(request)
        raise LoraMergeError("enough")

    monkeypatch.setattr(verification, "open_request", opened)
    assert "enough" in run("verify", "merged", "--against", "tuned", "--base", "base", *flags).error
    assert asked[0].options.mixing == mixing
    assert (asked[0].against, asked[0].base) == (Path("tuned"), Path("base"))


# Help


def test_help_says_what_is_what() -> None:
    text = re.sub(r"[\s│╭╮╰╯─]+", " ", run("interpolate", "--help").stdout)
    assert "(1 - alpha) * BASE + alpha * TUNED, as in Wise-FT" in text
    assert re.search(r"BASE\}? \[?TUNED", text)
    assert "--alpha-for 'PaliGemma/img/**=0' --alpha-for 'action_*/**=1'" in text
    assert "lora-merge interpolate base/ --adapter adapter/ -o out/ --alpha 0.3" in text
    assert "7 some of several outputs failed" in text
    for flag in (
        "--alpha",
        "--alpha-for",
        "--alpha-schedule",
        "--extrapolate",
        "--only-common",
        "--deltas-only",
        "--resume",
    ):
        assert f" {flag} " in text
    assert " --base " not in text


def test_merge_and_interpolate_share_their_flags() -> None:
    def flags(command: str) -> set[str]:
        return set(re.findall(r"(?<=\s)--[a-z][a-z-]+", run(command, "--help").stdout.replace("│", " ")))

    own = {"--alpha", "--alpha-for", "--alpha-schedule", "--extrapolate", "--only-common", "--deltas-only", "--resume"}
    assert flags("merge") - flags("interpolate") == {"--base", "--combine", "--svd-rank", "--majority-sign"}
    assert flags("interpolate") - flags("merge") == own | {"--method", "--sequential"}
    assert own - flags("verify") == {"--resume"}


# For people


def rows(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_an_interpolation_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(
        interpolated(Path("/out")), not_interpolated=("new/a", "new/b"), warnings=("careful",), notes=("so",)
    )
    print_interpolation(report)
    text = capsys.readouterr().out
    assert text.startswith("interpolated pi0: alpha 0.5; img/**: 0\n")
    found = rows(text)
    assert ["site", "rank", "scale", "alpha", "|d|/|w|", "max|d|", "stored", "served"] in found
    assert ["k", "4", "0.5*", "0.25 to 0.75", "0.031", "0.500", "0.750", "0.500"] in found
    assert ["language model", "4", "1.0 k", "0.5", "0.750", "0.500", "0.750", "0.750"] in found
    assert ["head/kernel", "0.5", "0.125", "0.750", "0.500"] in found
    assert "1 leaf without factors interpolated" in text
    assert "not interpolated: 2 leaves that the fine-tune trained, its own at every alpha: new/a, new/b" in text
    assert "warning: careful" in text and "note: so" in text
    assert text.rstrip().endswith("/out  4.0 KiB in 1.5 s, peak 1.0 MiB")


def test_the_alpha_of_sites_is_shown_where_it_tells(capsys: pytest.CaptureFixture[str]) -> None:
    report = interpolated(Path("/out"))
    print_interpolation(replace(report, sites=(SITE, replace(SITE, label="k"))))
    assert not any("site" in row and "alpha" in row for row in rows(capsys.readouterr().out))
    many = tuple(replace(SITE, label=f"layers.{n}.q", alphas=(n / 39,)) for n in range(40))
    print_interpolation(replace(report, sites=many))
    assert ["q x40", "0-39", "4", "0.5*", "0-1", "0.031", "0.031", "0.750", "0.500"] in rows(capsys.readouterr().out)


def test_a_dry_run_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    planned = replace(
        interpolated(None), status="planned", parts=(), mixed=(MixedRecord("h", "other", (0.5,), "float32", 64),)
    )
    print_interpolation(planned)
    text = capsys.readouterr().out
    assert text.startswith("to interpolate pi0 (dry run, nothing written): alpha 0.5; img/**: 0\n")
    assert "bfloat16 > float32" in text and "1 leaf without factors interpolated" in text
    assert "to write: up to 64 B" in text and "peak memory: about 128 B" in text and "4.0 KiB" not in text


def test_what_an_earlier_run_wrote_has_no_peak(capsys: pytest.CaptureFixture[str]) -> None:
    print_interpolation(replace(interpolated(Path("/out")), peak_rss_bytes=None))
    assert capsys.readouterr().out.rstrip().endswith("/out  4.0 KiB in 1.5 s")


def test_without_sites_there_is_no_table_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    print_interpolation(replace(interpolated(Path("/out")), sites=(), model="unknown"))
    text = capsys.readouterr().out
    assert text.startswith("interpolated: alpha 0.5") and "rank" not in text


def test_a_sweep_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    done = sweep(Path("/out"))
    kept = replace(done.points[1], status="kept", parts=(), least_gain_stored=None, bytes_on_disk=None)
    print_sweep(replace(done, points=(done.points[0], kept, done.points[2])))
    text = capsys.readouterr().out
    assert text.startswith("3 of 3 outputs interpolated pi0: alpha 0, 0.5, 1\n")
    found = rows(text)
    # The vision tower does not move, and is no column.
    assert ["language", "least", "least"] in found
    assert ["alpha", "model", "projections", "stored", "served", "size", "status"] in found
    assert ["0", "0", "0", "0.625", "0.375", "2.0 KiB", "written"] in found
    assert ["0.5", "-", "-", "-", "0.375", "-", "kept"] in found
    assert ["1", "0.500", "1.000", "0.625", "0.375", "2.0 KiB", "written"] in found
    assert "1 more part: --json" in text
    assert text.rstrip().endswith("/out  4.0 KiB in 1.5 s, peak 1.0 MiB")


def test_a_sweep_of_many_parts_shows_those_that_move_most(capsys: pytest.CaptureFixture[str]) -> None:
    parts = tuple(part(f"p{n}", 0.5, moved) for n, moved in enumerate([0.1, 0.4, 0.0, 0.2, 0.3]))
    print_sweep(replace(sweep(Path("/out")), points=(point(0.5, Path("/out"), parts=parts),)))
    text = capsys.readouterr().out
    assert re.findall(r"\bp\d", text) == ["p1", "p3", "p4"]
    assert "2 more parts" in text


def test_a_planned_sweep_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    planned = tuple(PointRecord(alpha, f"alpha-{alpha:g}", "planned") for alpha in (0.0, 0.5))
    print_sweep(replace(sweep(Path("/out")), status="planned", points=planned, seconds=None))
    text = capsys.readouterr().out
    assert text.startswith("to interpolate pi0 (dry run, nothing written): alpha 0, 0.5\n")
    assert ["0.5", "planned"] in rows(text)
    assert "W_base" not in text and "peak" not in text


@pytest.mark.parametrize("base_norm", [0.0, 2.0])
def test_a_checkpoint_s_strings_break_nothing(base_norm: float, capsys: pytest.CaptureFixture[str]) -> None:
    record = part(HOSTILE, 0.5, 1.0, base_norm)
    report = replace(
        interpolated(Path("/out")),
        parts=(record,),
        model=HOSTILE,
        mixing=MixingRecord(0.5, (OverrideRecord(HOSTILE, 0.0),)),
        mixed=(MixedRecord(HOSTILE, HOSTILE, (0.5,), "float32", 1, 0.5),),
        not_interpolated=(HOSTILE,),
    )
    print_interpolation(report)
    points = (point(0.5, Path("/out"), parts=(record,)),)
    print_sweep(replace(sweep(Path("/out")), points=points, mixing=report.mixing, model=HOSTILE))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert text.count("[bold]x[/bold]") >= 6
