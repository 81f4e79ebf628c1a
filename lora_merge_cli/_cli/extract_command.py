"""``lora-merge extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_merge_cli._cli import options
from lora_merge_cli._cli.boundary import boundary

EPILOG = """[bold]Examples[/bold]

  lora-merge extract checkpoints/pi0_lora/run/29999 --base pi0_base -o adapter/

  lora-merge extract checkpoints/run --base pi0_base -o adapter/ --lora-alpha paligemma=12,action_expert=2

  lora-merge extract Llama-tuned/ --base Llama-base/ --rank 16 -o adapter/

  lora-merge extract tuned/ --base base/ --energy 0.99 --exclude lm_head -o adapter/ --report adapter.md

  lora-merge merge pi0_base --adapter adapter/ -o merged/      [dim]the way back[/dim]

Exit codes: 0 done; 2 usage; 3 input missing or corrupt; 4 refused; 5 output exists;
6 disk, memory or permission; 130, 143 interrupted."""

_SUFFIXES = (".json", ".md")


def extract(
    tuned: Annotated[
        Path,
        typer.Argument(
            metavar="TUNED", help="The fine-tune: with adapters inside, or a dense checkpoint.", show_default=False
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(help="What the fine-tune started from. Dense checkpoints need it.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="OUT", help="The directory to create.", show_default=False)
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", help="The rank of the factors, of two dense checkpoints.", show_default=False),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Instead: the least rank that keeps this share of each matrix's squared change, such as 0.99.",
            show_default=False,
        ),
    ] = None,
    without_trained: Annotated[
        bool,
        typer.Option(
            "--without-trained",
            help="Leave out what was trained in full: smaller, and no longer the whole fine-tune.",
        ),
    ] = False,
    include: options.IncludeSites = None,
    exclude: options.ExcludeSites = None,
    lora_alpha: options.LoraAlpha = None,
    rslora: options.RsLora = None,
    step: options.Step = None,
    device: options.Device = None,
    jobs: options.Jobs = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    report: options.TextReportPaths = None,
    github: options.Github = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Take the adapter out of a fine-tune: its own factors, bit for bit, or low-rank ones of how two dense checkpoints differ."""
    with boundary(verbose=verbose):
        from lora_merge_cli._cli.allocator import keep_freed_memory
        from lora_merge_cli._cli.output import Output
        from lora_merge_cli._cli.parsing import parse_scales
        from lora_merge_cli.errors import UsageError
        from lora_merge_cli.extracting import ExtractRequest, prepare_extraction
        from lora_merge_cli.extracting import extract as run

        keep_freed_memory()
        options.check_output(output, dry_run)
        for path in report or ():
            if path.suffix not in _SUFFIXES:
                raise UsageError("--report of an extraction", where=path, expected=" or ".join(_SUFFIXES))
        prepared = prepare_extraction(
            ExtractRequest(
                tuned,
                base,
                output,
                rank,
                energy,
                without_trained,
                tuple(include or ()),
                tuple(exclude or ()),
                parse_scales(lora_alpha, rslora),
                step,
                device,
                jobs,
                overwrite,
            )
        )
        out = Output(report, prepared.request.output, prepared.input_paths, github, as_json, quiet, dry_run=dry_run)
        with out.reports:
            if dry_run:
                done = prepared.report()
                out.reports.write(done)
            else:
                with out.progress("extracting") as listener:
                    done = run(prepared, listener, out.reports.write)
            out.finish(done)
