"""``lora-merge resize``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from lora_merge_cli._cli import options
from lora_merge_cli._cli.boundary import boundary

EPILOG = """[bold]Examples[/bold]

  lora-merge resize runs/adapter -o adapter-r8 --rank 8

  lora-merge resize runs/adapter -o adapter-99 --energy 0.99 --report resized.md

  lora-merge resize runs/adapter -o adapter-r4 --rank 4 --dtype float32 --overwrite

  lora-merge resize runs/adapter --energy 0.9 --dry-run --json | jq .modules

Exit codes: 0 done; 2 usage; 3 input missing or corrupt; 4 refused; 5 output exists;
6 disk, memory or permission; 130, 143 interrupted."""

_REPORTS = (".json", ".md")


class FactorDtype(enum.StrEnum):
    """Values of ``--dtype`` of a resizing."""

    keep = "keep"
    float32 = "float32"


def resize(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="An adapter's directory: PEFT's LoRA, rsLoRA or DoRA, or what extract wrote.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="The directory to create.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut every module to rank N, unless its rank is smaller.", show_default=False),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Give every module the least rank that keeps this share of its delta's squared norm.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[FactorDtype, typer.Option(help="Of the factors.")] = FactorDtype.keep,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    report: options.TextReportPaths = None,
    github: options.Github = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Give an adapter smaller ranks: each module's delta is truncated by its singular values, from its factors alone."""
    with boundary(verbose=verbose):
        from lora_merge_cli._cli.output import Output
        from lora_merge_cli.errors import UsageError
        from lora_merge_cli.resizing import ResizeRequest, prepare_resize
        from lora_merge_cli.resizing import resize as run

        options.check_output(output, dry_run)
        for path in report or ():
            if path.suffix not in _REPORTS:
                raise UsageError("--report does not know the suffix", where=path, expected=" or ".join(_REPORTS))
        prepared = prepare_resize(ResizeRequest(adapter, output, rank, energy, dtype.value, overwrite))
        out = Output(report, prepared.request.output, prepared.input_paths, github, as_json, quiet, dry_run=dry_run)
        with out.reports:
            if dry_run:
                done = prepared.report
                out.reports.write(done)
            else:
                done = run(prepared, out.reports.write)
            out.finish(done)
