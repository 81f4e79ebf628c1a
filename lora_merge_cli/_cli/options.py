"""Options that commands share, and their values."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from lora_merge_cli.combining import Combining
    from lora_merge_cli.mixing import Mixing
    from lora_merge_cli.options import MergeOptions
    from lora_merge_cli.rounding import Rounding
    from lora_merge_cli.verification import Judging


class Dtype(enum.StrEnum):
    """Values of ``--dtype`` of a merge."""

    auto = "auto"
    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ExpectedDtype(enum.StrEnum):
    """Values of ``--dtype`` of a verification."""

    any = "any"
    auto = "auto"
    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DtypeUntouched(enum.StrEnum):
    """Values of ``--dtype-untouched``."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OutputFormat(enum.StrEnum):
    """Values of ``--to``."""

    auto = "auto"
    orbax = "orbax"
    safetensors = "safetensors"
    pth = "pth"


class DialectName(enum.StrEnum):
    """Values of ``--dialect``."""

    openpi = "openpi"
    nnx = "nnx"
    peft = "peft"
    minimind = "minimind"
    detached = "lora-merge"


class Compression(enum.StrEnum):
    """Values of ``--compression``."""

    none = "none"
    zstd = "zstd"


class RoundingMethod(enum.StrEnum):
    """Values of ``--rounding`` of what writes a checkpoint."""

    nearest = "nearest"
    stochastic = "stochastic"
    preserve = "preserve"


class ExpectedRounding(enum.StrEnum):
    """Values of ``--rounding`` of a verification."""

    nearest = "nearest"
    stochastic = "stochastic"
    preserve = "preserve"
    any = "any"


class ServingDtype(enum.StrEnum):
    """Values of ``--serving-dtype``."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ServingValues(enum.StrEnum):
    """Values of ``--serving-values``."""

    cell = "cell"
    widened = "widened"


class Combine(enum.StrEnum):
    """Values of ``--combine``."""

    sum = "sum"
    linear = "linear"
    cat = "cat"
    svd = "svd"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"
    magnitude_prune = "magnitude_prune"
    ties_svd = "ties_svd"
    dare_linear_svd = "dare_linear_svd"
    dare_ties_svd = "dare_ties_svd"
    magnitude_prune_svd = "magnitude_prune_svd"


class MajoritySign(enum.StrEnum):
    """Values of ``--majority-sign``."""

    total = "total"
    frequency = "frequency"


class JoinMethod(enum.StrEnum):
    """Values of ``--method``."""

    linear = "linear"
    slerp = "slerp"
    task_arithmetic = "task-arithmetic"
    ties = "ties"
    dare_ties = "dare-ties"
    model_stock = "model-stock"
    karcher = "karcher"


class CommonSide(enum.StrEnum):
    """Values of ``--only-common``."""

    base = "base"
    tuned = "tuned"


class WithOptionalValues(TyperCommand):
    """A command whose ``--rslora`` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--rslora" in args:
            from lora_merge_cli._cli.parsing import attach_rslora

            args = attach_rslora(args)
        return super().parse_args(ctx, args)


CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="An Orbax run, step or params/ directory, a model's directory of safetensors, or a .safetensors or .pth file.",
        show_default=False,
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER[@WEIGHT]",
        help="An adapter beside its base: a directory or a file; the weight multiplies its whole change. Repeatable.",
        show_default=False,
    ),
]
CombineOption = Annotated[
    Combine,
    typer.Option(
        "--combine",
        help="What several adapters make of one kernel: the sum of their changes, or what PEFT makes of their factors.",
    ),
]
Density = Annotated[
    float | None,
    typer.Option(help="The share of entries to keep, where --combine prunes: above 0, up to 1.", show_default=False),
]
Seed = Annotated[int, typer.Option(help="What --combine dare_... and --rounding stochastic draw from.")]
SvdRank = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="The rank of what --combine svd and ..._svd make; the largest of the adapters' if not given.",
        show_default=False,
    ),
]
MajoritySignOption = Annotated[
    MajoritySign,
    typer.Option("--majority-sign", help="The sign that --combine ties elects: of the sum, or of the most values."),
]
DialectOption = Annotated[
    DialectName | None,
    typer.Option(help="How the adapters are spelled, where that is not plain to see.", show_default=False),
]
ResidualBase = Annotated[
    bool,
    typer.Option(
        "--residual-base",
        help="The base is the residual that the adapter's initialisation (PiSSA, OLoRA, ...) left, not the original model.",
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(help="The float32 checkpoint that a fine-tune with adapters inside started from.", show_default=False),
]
Step = Annotated[int | None, typer.Option(help="Which step of a run directory.", show_default=False)]
LoraAlpha = Annotated[
    str | None,
    typer.Option(
        metavar="ALPHA",
        help="LoRA alpha of attention, where the rank is no stock one: 12, or paligemma=12,action_expert=2.",
        show_default=False,
    ),
]
RsLora = Annotated[
    str | None,
    typer.Option(
        metavar="[EXPERT,...]",
        help="Trained with rsLoRA: alpha / sqrt(rank). For all experts, or for those named.",
        show_default=False,
    ),
]
Scale = Annotated[float, typer.Option(help="Multiply every delta by this; 1 is as trained.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Of the leaves that change; auto: float32 for OpenPI, else the base's.")
]
DtypeUntouchedOption = Annotated[DtypeUntouched, typer.Option(help="Of all other leaves.")]
RoundingOption = Annotated[
    RoundingMethod,
    typer.Option(
        help="How the leaves that change are rounded: each entry to nearest, at random so that the mean is kept, or so that what "
        "the adapter does to its inputs is preserved."
    ),
]
Mu = Annotated[
    float | None,
    typer.Option(
        help="Of --rounding preserve: from 0, what the noise of single entries counts; 1 if not given.",
        show_default=False,
    ),
]
ServingDtypeOption = Annotated[
    ServingDtype | None,
    typer.Option(
        help="What servers cast the result to; what the model's are known to if not given.", show_default=False
    ),
]
ServingValuesOption = Annotated[
    ServingValues | None,
    typer.Option(
        help="What a float32 file holds under --rounding: cell (if not given), exact values, moved only where the server would cast "
        "them to another one; or widened, the server's values.",
        show_default=False,
    ),
]
IncludeSites = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Only these sites. Repeatable.", show_default=False),
]
ExcludeSites = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="GLOB", help="Not these sites. Repeatable.", show_default=False),
]
AlphaFor = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB=VALUE",
        help="The alpha of the leaves that match; of several globs the first that matches counts. Repeatable.",
        show_default=False,
    ),
]
AlphaSchedule = Annotated[
    str | None,
    typer.Option(
        metavar="layer=FIRST:LAST",
        help="An alpha per layer instead, in even steps from the first layer to the last.",
        show_default=False,
    ),
]
Extrapolate = Annotated[bool, typer.Option("--extrapolate", help="Allow alphas below 0 and above 1.")]
OnlyCommon = Annotated[
    CommonSide | None,
    typer.Option(
        help="Whose leaf to take where one side has it alone, or both have one of two shapes; refused if not given.",
        show_default=False,
    ),
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="The largest file of safetensors, as in 5GB or 500MB.")]
Device = Annotated[
    str | None,
    typer.Option(help="The JAX device, such as cpu or cuda:0; JAX's default if not given.", show_default=False),
]
CompressionOption = Annotated[
    Compression,
    typer.Option(help="How Orbax keeps the leaves that change: zstd saves a fifth of bfloat16, and takes its time."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the whole plan; write nothing. Needs no -o.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Verify the result before it appears; if a check fails, it does not.")
]
MinGain = Annotated[
    float, typer.Option(help="Warn where a dtype keeps less than this of a delta along the adapter's inputs.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail where --min-gain would warn.")]
Sample = Annotated[
    int | None,
    typer.Option(metavar="N", help="Look at N layers of each site only, for speed.", show_default=False),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        metavar="N",
        help="Threads that read, and that compute; one per processor, up to 8, if not given.",
        show_default=False,
    ),
]
ReportPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        metavar="PATH",
        help="Write the report as .html, .md, .json, or .xml for JUnit. Repeatable.",
        show_default=False,
    ),
]
TextReportPaths = Annotated[
    list[Path] | None,
    typer.Option("--report", metavar="PATH", help="Write the report as .md or .json. Repeatable.", show_default=False),
]
Github = Annotated[
    bool, typer.Option("--github", help="Append the report to the job summary that $GITHUB_STEP_SUMMARY names.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of errors.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def merge_options(
    lora_alpha: str | None,
    rslora: str | None,
    scale: float,
    dtype: str,
    dtype_untouched: str,
    include: list[str] | None,
    exclude: list[str] | None,
    residual_base: bool,
    mixing: Mixing | None = None,
    combining: Combining | None = None,
    rounding: Rounding | None = None,
    serving_dtype: str | None = None,
) -> MergeOptions:
    """What a merge, and its judge, are asked for."""
    from lora_merge_cli._cli.parsing import parse_scales
    from lora_merge_cli.combining import Combining
    from lora_merge_cli.options import MergeOptions
    from lora_merge_cli.rounding import Rounding

    return MergeOptions(
        parse_scales(lora_alpha, rslora),
        scale,
        dtype,
        dtype_untouched,
        tuple(include or ()),
        tuple(exclude or ()),
        residual_base,
        mixing,
        combining or Combining(),
        rounding or Rounding(),
        None if serving_dtype is None else str(serving_dtype),
    )


def rounding(
    method: str, mu: float | None, seed: int, serving_values: ServingValues | None, *, judged: bool = False
) -> Rounding:
    """How results are rounded.

    Args:
        method: The value of ``--rounding``.
        mu: Of ``preserve``; 1 if None.
        seed: Of ``stochastic``.
        serving_values: What wide files hold; ``cell`` if None.
        judged: Whether ``any`` is a method too: it stands for whatever the kernels were rounded to.

    Raises:
        UsageError: A value makes no sense with the method.
    """
    from lora_merge_cli.errors import UsageError
    from lora_merge_cli.rounding import Rounding

    if mu is not None and method != "preserve":
        raise UsageError("--mu is of --rounding preserve", hint="pass that too, or leave it out")
    if serving_values is not None and method not in ("stochastic", "preserve"):
        raise UsageError(
            "--serving-values is of --rounding stochastic and preserve", hint="pass one of them, or leave it out"
        )
    values: Any = "cell" if serving_values is None else serving_values.value
    chosen: Any = "nearest" if judged and method == "any" else str(method)
    return Rounding(chosen, 1.0 if mu is None else mu, seed, values)


def combining(
    combine: Combine,
    density: float | None,
    seed: int,
    svd_rank: int | None,
    majority_sign: MajoritySign,
    adapters: list[str] | None,
) -> Combining:
    """How several adapters on one kernel become one change.

    Raises:
        UsageError: A value makes no sense with the method, or there are no adapters to combine.
    """
    from lora_merge_cli.combining import Combining
    from lora_merge_cli.errors import UsageError

    chosen = Combining(combine.value, density, seed, svd_rank, majority_sign.value)
    if not chosen.is_sum and not adapters:
        raise UsageError(
            f"--combine {chosen.method} is for adapters beside the checkpoint",
            hint="name them with --adapter, or leave it out",
        )
    return chosen


def mixing(
    alpha: float,
    alpha_for: list[str] | None,
    alpha_schedule: str | None,
    extrapolate: bool,
    only_common: CommonSide | None,
    deltas_only: bool,
) -> Mixing:
    """Which alpha goes where, in an interpolation and for its judge."""
    from lora_merge_cli._cli.parsing_alphas import parse_override, parse_schedule
    from lora_merge_cli.mixing import Mixing

    return Mixing(
        alpha,
        tuple(map(parse_override, alpha_for or ())),
        None if alpha_schedule is None else parse_schedule(alpha_schedule),
        extrapolate,
        None if only_common is None else only_common.value,
        deltas_only,
    )


def judged_mixing(
    alpha: list[str] | None,
    alpha_for: list[str] | None,
    alpha_schedule: str | None,
    extrapolate: bool,
    only_common: CommonSide | None,
    deltas_only: bool,
) -> Mixing | None:
    """Which alpha the judge expects where; None where it expects a merge.

    Raises:
        UsageError: ``--alpha`` is no single number, or is wanting beside a flag that goes with it.
    """
    from lora_merge_cli._cli.parsing_alphas import parse_one_alpha
    from lora_merge_cli.errors import UsageError

    if alpha:
        return mixing(parse_one_alpha(alpha), alpha_for, alpha_schedule, extrapolate, only_common, deltas_only)
    beside: dict[str, object] = {
        "--alpha-for": alpha_for,
        "--alpha-schedule": alpha_schedule,
        "--extrapolate": extrapolate,
        "--only-common": only_common,
        "--deltas-only": deltas_only,
    }
    for flag, value in beside.items():
        if value not in (None, False, []):
            raise UsageError(f"{flag} is of an interpolation", hint="pass the --alpha that it was made with")
    return None


def check_output(output: Path | None, dry_run: bool) -> None:
    """Refuse to write nowhere.

    Raises:
        UsageError: There is no output, and this is no dry run.
    """
    from lora_merge_cli.errors import UsageError

    if output is None and not dry_run:
        raise UsageError("an output is needed", hint="pass -o OUT, or --dry-run")


def judging(verify: bool, sample: int | None, min_gain: float, strict: bool, jobs: int | None) -> Judging | None:
    """How strictly to judge a result before it appears; None not to.

    Raises:
        UsageError: How is said, and that it is wanted is not.
    """
    from lora_merge_cli.errors import UsageError
    from lora_merge_cli.verification import Judging

    if not verify and (strict or sample is not None):
        raise UsageError("--strict and --sample are for --verify")
    return Judging(sample, min_gain, strict, jobs=jobs) if verify else None
