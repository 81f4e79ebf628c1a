"""Ctrl-C and SIGTERM at any moment, dead runs' leftovers, and what --overwrite keeps until when."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lora_merge_cli._cli.boundary import boundary
from lora_merge_cli.errors import OutputExists
from lora_merge_cli.staging import staged
from tests.checkpoints import save_step
from tests.command import run
from tests.test_openpi_merge import ALPHAS
from tests.trees import ACTION, PALIGEMMA, build, nest

SLOW = """
import sys, time
from lora_merge_cli import execute
from lora_merge_cli._cli.app import main
plain = execute.Execution.leaves
def leaves(self):
    for number, leaf in enumerate(plain(self)):
        if number == 20:
            print("busy", flush=True)
            time.sleep(60)
        yield leaf
execute.Execution.leaves = leaves
sys.argv[0] = "lora-merge"
main()
"""


def start(checkpoint: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """Start a merge that sleeps amid writing, and wait until it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "merge", checkpoint, "-o", output, "--lora-alpha", ALPHAS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    return process


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return save_step(tmp_path / "in" / "5", nest(build(PALIGEMMA, ACTION).leaves))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(sent: signal.Signals, code: int, step: Path, tmp_path: Path) -> None:
    process = start(step, tmp_path / "new" / "deep" / "out")
    assert list((tmp_path / "new" / "deep").iterdir())
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "nothing was written" in errors and "Traceback" not in errors
    assert not (tmp_path / "new").exists()


def test_interrupted_overwrite_keeps_the_old_output(step: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("merge", step, "-o", out, "--lora-alpha", ALPHAS).code == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    process = start(step, out, "--overwrite")
    process.terminate()
    process.wait(60)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_killed_run_does_not_block_the_next_and_its_leftovers_go(step: Path, tmp_path: Path) -> None:
    process = start(step, tmp_path / "out")
    process.kill()
    process.wait(60)
    assert len([p for p in tmp_path.iterdir() if ".lora-merge-" in p.name]) == 2
    assert run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_living_run_is_left_alone(step: Path, tmp_path: Path) -> None:
    process = start(step, tmp_path / "out")
    staging = [p for p in tmp_path.iterdir() if ".lora-merge-" in p.name]
    assert run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS).code == 0
    assert all(path.exists() for path in staging)
    process.terminate()
    process.wait(60)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_overwrite_replaces_all_of_the_old_output(step: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "params").mkdir(parents=True)
    (tmp_path / "out" / "params" / "stale").write_text("x")
    (tmp_path / "out" / "stale").write_text("x")
    assert run("merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS, "--overwrite").code == 0
    assert not list((tmp_path / "out").rglob("stale"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_something_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "out", overwrite=False):
            (tmp_path / "out").mkdir()

    with pytest.raises(OutputExists):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_output_has_the_usual_permissions(tmp_path: Path) -> None:
    with staged(tmp_path / "out", overwrite=False) as stage:
        (stage / "file").write_text("x")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_crash_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    """The old output stands in the staging directory of a run that died before it could put the new one in place."""
    stage = tmp_path / ".out.lora-merge-abc"
    (stage / "old-out").mkdir(parents=True)
    (stage / "old-out" / "precious").write_text("weeks of work")
    Path(f"{stage}.lock").touch()
    with pytest.raises(OutputExists), staged(tmp_path / "out", overwrite=False):
        pass
    assert (tmp_path / "out" / "precious").read_text() == "weeks of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_progress_is_on_a_terminal_only(step: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lora_merge_cli", "merge", step, "-o"]
    piped = subprocess.run(
        [*command, tmp_path / "piped", "--lora-alpha", ALPHAS, "--json"], capture_output=True, text=True, check=True
    )
    assert piped.stderr == ""
    main, worker = os.openpty()
    shown = subprocess.Popen(
        [*command, tmp_path / "shown", "--lora-alpha", ALPHAS], stdout=subprocess.PIPE, stderr=worker
    )
    os.close(worker)
    text = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        text += part
    assert shown.wait(60) == 0
    assert shown.stdout is not None
    assert b"merged" in shown.stdout.read()
    assert b"MiB" in text or b"KiB" in text or b"kB" in text or b"bytes" in text


def test_start_up_imports_neither_numpy_nor_jax() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from lora_merge_cli._cli.app import app\n"
        "commands = [[name, '--help'] for name in ('merge', 'interpolate', 'verify', 'diff')]\n"
        "for flags in (['--help'], *commands, ['--version']):\n"
        "    assert CliRunner().invoke(app, flags).exit_code == 0\n"
        "heavy = {'jax', 'numpy', 'tensorstore', 'orbax', 'plotly', 'jinja2'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspect_imports_no_jax(step: Path) -> None:
    code = (
        "import sys\n"
        "from lora_merge_cli import InspectRequest, inspect\n"
        f"inspect(InspectRequest({str(step)!r}))\n"
        "assert not {'jax', 'orbax'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_judge_and_a_comparison_import_no_jax(step: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from lora_merge_cli import DiffRequest, VerifyRequest, diff, verify\n"
        "from lora_merge_cli import MergeOptions, ScaleOptions\n"
        f"step = Path({str(step)!r})\n"
        "verify(VerifyRequest(step, step, options=MergeOptions(ScaleOptions({'': 3.0}), dtype='any')))\n"
        "diff(DiffRequest(step, step))\n"
        "assert not {'jax', 'orbax', 'plotly', 'pydantic'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_while_arrays_are_read_is_not_swallowed(tmp_path: Path) -> None:
    """A real signal during a real read and write, at several moments."""
    tree = build(PALIGEMMA, ACTION).leaves
    tree[("other", "kernel")] = np.random.default_rng(0).standard_normal((64, 1024, 256)).astype(np.float32)
    step = save_step(tmp_path / "in" / "5", nest(tree), ocdbt=False)
    command = [sys.executable, "-m", "lora_merge_cli", "merge", step, "-o", tmp_path / "out", "--lora-alpha", ALPHAS]
    for delay in (0.0, 0.2, 0.5, 1.0):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while process.poll() is None and len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    assert delay > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_finaliser_is_heard_a_little_later(number: int) -> None:
    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as caught, boundary(verbose=False):
        Finalised()
        time.sleep(5)
    assert caught.value.code == (130 if number == signal.SIGINT else 143)
