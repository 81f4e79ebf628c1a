"""The documentation against the code that it describes."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import pytest

from lora_merge_cli import errors
from lora_merge_cli.dialects.openpi import STOCK_ALPHA
from tests.command import run
from tests.test_inspect import layout_index

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


COMMANDS = ("inspect", "merge", "interpolate", "verify", "extract", "resize", "diff")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_documented_and_has_help(command: str) -> None:
    help_text = run(command, "--help").stdout
    flags = set(re.findall(r"--[a-z][a-z-]+", help_text)) - {"--help"}
    assert len(flags) > 5
    everything = "\n".join((*DOCS.values(), (ROOT / "CHANGELOG.md").read_text()))
    assert not {flag for flag in flags if flag not in everything} - {"--verbose", "--quiet", "--output"}
    assert "Examples" in help_text


def test_no_document_names_a_flag_that_is_not_there() -> None:
    known = {flag for command in COMMANDS for flag in re.findall(r"--[a-z][a-z-]+", run(command, "--help").stdout)}
    used = {flag for text in DOCS.values() for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)}
    assert used - known <= {"--reflink", "--version"}  # of cp, and of the program itself


def test_links_lead_somewhere() -> None:
    for name, text in DOCS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (folder / target).exists(), (name, target)


def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "sample_checkpoints", tmp_path / "sample_checkpoints")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS["README.md"], re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "merged" / "2999" / "params").is_dir()


def test_every_exit_code_is_documented() -> None:
    codes = {
        str(kind.exit_code)
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if hasattr(kind, "exit_code") and kind is not errors.LoraMergeError
    }
    assert codes == {"1", "2", "3", "4", "5", "6", "7", "143"}
    assert all(re.search(rf"^\|.*\b{code}\b.*\|", DOCS["errors.md"], re.MULTILINE) for code in codes)


def test_the_equations_in_the_docs_are_the_dialects() -> None:
    from lora_merge_cli.dialects import ScaleOptions, Subject, Tree
    from lora_merge_cli.dialects.openpi import OpenPI

    sites = OpenPI().survey(Subject(Tree(layout_index("pi0_lora"), "x")), ScaleOptions()).sites
    for site in sites:
        row = next(line for line in DOCS["openpi.md"].splitlines() if f"/{site.module}" in line and "|" in line)
        assert f"`{site.parameters.equation}`" in row
    for group, presets in STOCK_ALPHA.items():
        for rank, alpha in presets.items():
            assert f"{rank} for `{group}` ({alpha:g})" in DOCS["openpi.md"]
