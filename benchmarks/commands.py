"""The command lines that are measured."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from cases import Row

TOOL = (sys.executable, "-m", "lora_merge_cli")

_PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""

_FOREIGN_MODULES = """
import json, os, sys
from lora_merge_cli._cli.app import app
shown, sys.stdout = sys.stdout, open(os.devnull, "w")
try:
    app(["inspect", sys.argv[1]])
except SystemExit as end:
    assert not end.code, end.code
names = [
    name for name, module in sys.modules.items()
    if getattr(getattr(module, "__spec__", None), "name", None) == name
    and name.partition(".")[0] not in sys.stdlib_module_names
    and all(part.isidentifier() for part in name.split("."))
    and name.partition(".")[0] not in ("__main__", "lora_merge_cli")
]
json.dump(names, shown)
"""


def merge(checkpoint: Path, output: Path, *flags: str, adapter: Path | None = None) -> Row:
    """A merge with the default report, delta survival included."""
    beside = () if adapter is None else ("--adapter", str(adapter))
    command = (*TOOL, "merge", str(checkpoint), *beside, "-o", str(output), *flags, "-q")
    return Row("merge", command, _present(checkpoint, adapter), output)


def interpolate(base: Path, tuned: Path, output: Path, name: str, *flags: str) -> Row:
    """An interpolation between a base and its fine-tune, at the alphas that the flags say."""
    command = (*TOOL, "interpolate", str(base), str(tuned), "-o", str(output), *flags, "-q")
    return Row(name, command, (base, tuned), output)


def extract(tuned: Path, base: Path, output: Path, name: str, *flags: str) -> Row:
    """An adapter taken out of a fine-tune beside its base."""
    command = (*TOOL, "extract", str(tuned), "--base", str(base), "-o", str(output), *flags, "-q")
    return Row(name, command, (tuned, base), output)


def copy(source: Path, output: Path, name: str = "cp -r") -> Row:
    """The yardstick: a plain copy that shares no blocks of the disk with its source."""
    return Row(name, ("cp", "-r", "--reflink=never", str(source), str(output)), (source,), output)


def verify(merged: Path, checkpoint: Path, *flags: str, adapter: Path | None = None) -> Row:
    """The proof of a merge; a ``--sample N`` is part of the row's name."""
    beside = () if adapter is None else ("--adapter", str(adapter))
    command = (*TOOL, "verify", str(merged), "--against", str(checkpoint), *beside, *flags, "-q")
    return Row(" ".join(("verify", *flags)), command, (merged, *_present(checkpoint, adapter)))


def diff(one: Path, other: Path) -> Row:
    """Two equal checkpoints compared."""
    return Row("diff", (*TOOL, "diff", str(one), str(other), "-q"), (one, other))


def peft(base: Path, adapter: Path, output: Path) -> tuple[Row, ...]:
    """PEFT's own merge, where PEFT is installed."""
    if importlib.util.find_spec("peft") is None:
        return ()
    command = (sys.executable, "-c", _PEFT, str(base), str(adapter), str(output))
    return (Row("peft", command, (base, adapter), output),)


def startup(checkpoint: Path) -> tuple[Row, ...]:
    """What a command takes before it does anything, beside a Python that imports the same packages, or none."""
    return (
        Row("python", (sys.executable, "-c", "pass")),
        Row("--version", (*TOOL, "--version")),
        Row("--help", (*TOOL, "--help")),
        Row("inspect's imports", (sys.executable, "-c", _imports_of_inspect(checkpoint))),
        Row("inspect", (*TOOL, "inspect", str(checkpoint))),
    )


def _imports_of_inspect(checkpoint: Path) -> str:
    """A program that imports the modules of others that an inspection imports, in the same order."""
    command = (sys.executable, "-c", _FOREIGN_MODULES, str(checkpoint))
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return "\n".join(f"import {name}" for name in json.loads(found))


def _present(*paths: Path | None) -> tuple[Path, ...]:
    return tuple(path for path in paths if path is not None)
