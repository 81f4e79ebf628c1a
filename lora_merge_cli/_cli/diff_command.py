"""``lora-merge diff`` and ``lora-merge schema``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_merge_cli._cli import options
from lora_merge_cli._cli.boundary import boundary

EPILOG = """[bold]Examples[/bold]

  lora-merge diff merged/29999 other_tool/29999 --rtol 1e-5

  lora-merge diff pi0_base checkpoints/run/29999 --exclude '**/*lora*/**' --report moved.html

  lora-merge diff A B --include '**/img/**' --json | jq .counts

Exit codes: 0 equal; 1 different; 2 usage; 3 input missing or corrupt; 130, 143 interrupted."""


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The reference.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.", show_default=False)],
    atol: Annotated[
        float | None, typer.Option(help="Absolute tolerance; without one only equal bits count.", show_default=False)
    ] = None,
    rtol: Annotated[float | None, typer.Option(help="Tolerance relative to A's entry.", show_default=False)] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Compare only these leaves. Repeatable.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Do not compare these leaves. Repeatable.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(metavar="N", help="Show the N leaves that differ most.")] = 20,
    depth: Annotated[int, typer.Option(metavar="N", help="Group leaves by the first N parts of their paths.")] = 3,
    step: options.Step = None,
    jobs: options.Jobs = None,
    report: options.ReportPaths = None,
    github: options.Github = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare two checkpoints leaf by leaf. With a base as A: which leaves a fine-tune moved, and how far."""
    with boundary(verbose=verbose):
        from lora_merge_cli._cli.allocator import keep_freed_memory
        from lora_merge_cli._cli.output import Output
        from lora_merge_cli.diffing import DiffRequest
        from lora_merge_cli.diffing import diff as run

        keep_freed_memory()
        request = DiffRequest(a, b, step, atol, rtol, tuple(include or ()), tuple(exclude or ()), top, depth, jobs)
        out = Output(report, None, (a, b), github, as_json, quiet)
        with out.reports:
            with out.progress("comparing") as listener:
                done = run(request, listener)
            out.deliver(done)
        raise typer.Exit(0 if done.status == "equal" else 1)


def schema() -> None:
    """Print the JSON Schema of every report."""
    from lora_merge_cli._cli.output import print_json
    from lora_merge_cli.reports.schema import report_schema

    with boundary(verbose=False):
        print_json(report_schema())
