"""Run the command line in this process, as its users would."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from lora_merge_cli._cli.app import app


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The document on stdout; a report conforms to its schema."""
        return conforming(json.loads(self.stdout))

    @property
    def error(self) -> str:
        """The one line of an expected failure."""
        lines = self.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.stderr
        assert "Traceback" not in self.stdout + self.stderr
        return lines[0]


@functools.cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(CliRunner().invoke(app, ["schema"]).stdout))


def conforming(document: Any) -> Any:
    """The document, which is valid if it is a report."""
    if document.get("command") in ("merge", "interpolate", "sweep", "verify", "diff", "extract", "resize"):
        _validator().validate(document)
    return document


def run(*arguments: object) -> Outcome:
    """Run ``lora-merge`` with these arguments; a report that it writes conforms to its schema."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    for written in (Path(str(argument)) for argument in arguments):
        if written.suffix == ".json" and written.is_file():
            conforming(json.loads(written.read_text()))
    return Outcome(result.exit_code, result.stdout, result.stderr)
