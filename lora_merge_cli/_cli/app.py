"""The command line: parses, calls, prints. Imports of what is slow stay inside the commands."""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lora_merge_cli import __version__
from lora_merge_cli._cli.boundary import INTERRUPTED, boundary

app = typer.Typer(
    name="lora-merge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

_MERGE_EPILOG = """[bold]Examples[/bold]

  lora-merge merge checkpoints/pi0_lora/run/29999 -o merged/29999

  lora-merge merge checkpoints/run --step 9999 -o merged/9999 --lora-alpha paligemma=12,action_expert=2

  lora-merge merge checkpoints/run/29999 --base pi0_base -o merged/29999 --report merged.md

  lora-merge merge checkpoints/run/29999 --dry-run --json

Exit codes: 0 done; 2 usage; 3 input missing or corrupt; 4 refused; 5 output exists; 6 disk, memory or permission; 130, 143 interrupted."""

_INSPECT_EPILOG = """[bold]Examples[/bold]

  lora-merge inspect checkpoints/pi0_lora/run/29999

  lora-merge inspect checkpoints/run/29999 --stats --base pi0_base

  lora-merge inspect checkpoints/run/29999 --json | jq .sites"""


class Dtype(enum.StrEnum):
    """Values of ``--dtype``."""

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


class _WithOptionalValues(TyperCommand):
    """A command whose ``--rslora`` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--rslora" in args:
            from lora_merge_cli._cli.parsing import attach_rslora

            args = attach_rslora(args)
        return super().parse_args(ctx, args)


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="A run, step or params/ directory; of a run, the newest step is taken.",
        show_default=False,
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(help="The float32 checkpoint that the fine-tune started from.", show_default=False),
]
StepOption = Annotated[int | None, typer.Option(help="Which step of a run directory.", show_default=False)]
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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of errors.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-merge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fuse LoRA adapters into OpenPI checkpoints, exactly, and say what became of them."""


@app.command(cls=_WithOptionalValues, epilog=_INSPECT_EPILOG)
def inspect(
    checkpoint: Checkpoint,
    base: Base = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the arrays: norms of the deltas, effective ranks, non-finite entries.")
    ] = False,
    step: StepOption = None,
    lora_alpha: LoraAlpha = None,
    rslora: RsLora = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint is: its adapters and their scales, and what the fine-tune froze and trained."""
    with boundary(verbose=verbose):
        from lora_merge_cli._cli.parsing import parse_scales
        from lora_merge_cli.inspection import InspectRequest
        from lora_merge_cli.inspection import inspect as run

        found = run(InspectRequest(checkpoint, step, base, stats, parse_scales(lora_alpha, rslora)))
        if as_json:
            _print_json(found.to_dict())
        else:
            from lora_merge_cli._cli.console import print_inspection

            print_inspection(found)


@app.command(cls=_WithOptionalValues, epilog=_MERGE_EPILOG)
def merge(
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="The directory to create.", show_default=False),
    ] = None,
    base: Base = None,
    lora_alpha: LoraAlpha = None,
    rslora: RsLora = None,
    scale: Annotated[float, typer.Option(help="Multiply every delta by this; 1 is as trained.")] = 1.0,
    dtype: Annotated[Dtype, typer.Option(help="Of the kernels that change; auto: float32 for OpenPI.")] = Dtype.auto,
    dtype_untouched: Annotated[DtypeUntouched, typer.Option(help="Of all other leaves.")] = DtypeUntouched.keep,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Merge only these sites. Repeatable.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Do not merge these sites. Repeatable.", show_default=False),
    ] = None,
    step: StepOption = None,
    device: Annotated[
        str | None,
        typer.Option(help="The JAX device, such as cpu or cuda:0; JAX's default if not given.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the whole plan; write nothing. Needs no -o.")
    ] = False,
    report: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Write the report as .json or .md. Repeatable.", show_default=False),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Fuse the adapters inside a checkpoint into its kernels and write a dense checkpoint."""
    with boundary(verbose=verbose):
        from lora_merge_cli._cli.allocator import keep_freed_memory
        from lora_merge_cli._cli.console import print_plan, print_report, progress
        from lora_merge_cli._cli.parsing import parse_scales
        from lora_merge_cli.errors import UsageError
        from lora_merge_cli.merging import MergeRequest, prepare
        from lora_merge_cli.merging import merge as run
        from lora_merge_cli.plan import MergeOptions
        from lora_merge_cli.reports import ReportFiles, check_report_paths

        # Before the first thread: each would take its memory from an arena of its own.
        keep_freed_memory()
        if output is None and not dry_run:
            raise UsageError("an output directory is needed", hint="pass -o OUT, or --dry-run")
        options = MergeOptions(
            parse_scales(lora_alpha, rslora),
            scale,
            dtype.value,
            dtype_untouched.value,
            tuple(include or ()),
            tuple(exclude or ()),
        )
        prepared = prepare(MergeRequest(checkpoint, output, base, step, overwrite, device, options))
        target = prepared.request.output
        check_report_paths(report or [], target, prepared.inputs, dry_run=dry_run)
        reports = ReportFiles(report or [], target)
        try:
            if dry_run:
                done = prepared.report()
                reports.write(done)
            else:
                with progress(visible=not quiet) as listener:
                    done = run(prepared, listener, reports.write)
            reports.publish()
        finally:
            reports.discard()
        if as_json:
            _print_json(done.to_dict())
        elif not quiet:
            (print_plan if dry_run else print_report)(done)


def _print_json(document: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(document, indent=1, allow_nan=False))


def main() -> None:
    """The console script."""
    try:
        app()
    except SystemExit as end:
        if end.code in INTERRUPTED:
            # Staging is removed by now. JAX may still compile in a thread of its own, which crashes an interpreter that is
            # being taken down around it and turns the exit code into a signal's.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise
