"""What each command imports: what it has no use for costs every run its start-up, and ties it to what need not be there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, sys
from lora_merge_cli._cli.app import main
try:
    main()
except SystemExit as end:
    json.dump(sorted(sys.modules), sys.stderr)
    raise
json.dump(sorted(sys.modules), sys.stderr)
"""

SAMPLES = Path(__file__).parent.parent / "sample_checkpoints"
OPENPI = SAMPLES / "pi0_tiny" / "2999"
BASE, ADAPTER = SAMPLES / "llama_tiny" / "base", SAMPLES / "llama_tiny" / "adapter"

ALPHA = ("--lora-alpha", "paligemma=12,action_expert=2")

CHECK_FAILED = 1

STORES = {"orbax", "tensorstore"}
COMPUTES = {"jax", "jaxlib"}
REPORTS = {"jinja2", "junitparser", "plotly"}
LAZY = {f"lora_merge_cli.{name}" for name in ("dialects.minimind", "dialects.peft", "plan")}
TORCH = {f"lora_merge_cli.formats.torch_{name}" for name in ("archive", "pickle", "sink", "source")}


def imported(*arguments: object, code: int = 0) -> set[str]:
    """The modules that a process has imported when the command ends, which it must with that exit code."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    *errors, names = done.stderr.splitlines()
    assert done.returncode == code, errors
    return set(json.loads(names))


@pytest.mark.parametrize(
    "flags",
    [["--version"], ["--help"], ["inspect", "--help"], ["interpolate", "--help"], ["schema", "--help"]],
)
def test_questions_about_the_tool_import_no_library(flags: list[str]) -> None:
    assert not imported(*flags) & ({"numpy", "ml_dtypes", "wcmatch"} | STORES | COMPUTES | REPORTS)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_inspect_imports_what_reads_this_checkpoint(flags: list[str]) -> None:
    found = imported("inspect", OPENPI, *ALPHA, *flags)
    assert "lora_merge_cli.formats.orbax_source" in found
    assert not found & (STORES | COMPUTES | REPORTS | LAZY | TORCH | {"lora_merge_cli.formats.orbax_sink"})


def test_inspect_of_an_adapter_imports_its_dialect() -> None:
    found = imported("inspect", ADAPTER)
    assert "lora_merge_cli.dialects.peft" in found
    assert not found & (STORES | COMPUTES | REPORTS | TORCH)


def test_a_dry_run_imports_no_jax() -> None:
    assert not imported("merge", OPENPI, *ALPHA, "--dry-run") & (STORES | COMPUTES | REPORTS | TORCH)


def test_a_dry_run_of_an_interpolation_imports_no_jax() -> None:
    flags = ("interpolate", BASE, "--adapter", ADAPTER, "--alpha", "0:1:0.5", "--dry-run")
    assert not imported(*flags) & (STORES | COMPUTES | REPORTS | TORCH)


def test_diff_imports_no_jax_and_no_store() -> None:
    assert not imported("diff", OPENPI, OPENPI) & (STORES | COMPUTES | REPORTS | TORCH)


def test_verify_imports_no_jax_and_no_store() -> None:
    found = imported("verify", OPENPI, "--against", OPENPI, *ALPHA, code=CHECK_FAILED)
    assert "lora_merge_cli.verification" in found
    assert not found & (STORES | COMPUTES | REPORTS | TORCH)


def test_a_safetensors_merge_imports_no_store(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert not imported("merge", BASE, "--adapter", ADAPTER, "-o", merged) & (STORES | REPORTS | TORCH)
    found = imported("verify", merged, "--against", BASE, "--adapter", ADAPTER)
    assert not found & (STORES | COMPUTES | REPORTS | TORCH)
