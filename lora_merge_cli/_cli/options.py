"""Options that commands share, and their values."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from lora_merge_cli.options import MergeOptions


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


class Compression(enum.StrEnum):
    """Values of ``--compression``."""

    none = "none"
    zstd = "zstd"


class Rounding(enum.StrEnum):
    """Values of ``--rounding`` of a verification."""

    nearest = "nearest"
    any = "any"


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
        help="An adapter beside CKPT, its base: a directory or a file; the weight multiplies its whole change. Repeatable.",
        show_default=False,
    ),
]
DialectOption = Annotated[
    DialectName | None,
    typer.Option(help="How the adapters are spelled, where that is not plain to see.", show_default=False),
]
ResidualBase = Annotated[
    bool,
    typer.Option(
        "--residual-base",
        help="CKPT is the residual that the adapter's initialisation (PiSSA, OLoRA, ...) left, not the original model.",
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
DtypeUntouchedOption = Annotated[DtypeUntouched, typer.Option(help="Of all other leaves.")]
IncludeSites = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Only these sites. Repeatable.", show_default=False),
]
ExcludeSites = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="GLOB", help="Not these sites. Repeatable.", show_default=False),
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
) -> MergeOptions:
    """What a merge, and its judge, are asked for."""
    from lora_merge_cli._cli.parsing import parse_scales
    from lora_merge_cli.options import MergeOptions

    return MergeOptions(
        parse_scales(lora_alpha, rslora),
        scale,
        dtype,
        dtype_untouched,
        tuple(include or ()),
        tuple(exclude or ()),
        residual_base,
    )
