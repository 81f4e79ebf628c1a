"""What stands around a judgement: the base, provenance, the other inputs and flags, and `merge --verify`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import save_step
from tests.command import run
from tests.judged import ALPHAS, Case, Q, checks_of, failed, merged_leaves, message
from tests.test_golden import GOLDEN
from tests.trees import ACTION, PALIGEMMA, Tree, as_base, build, nest


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, build(PALIGEMMA, ACTION))


# The base.


@pytest.fixture
def base(case: Case) -> Path:
    return save_step(case.folder / "base" / "0", nest(as_base(case.tree)))


def test_a_merge_with_base_passes_with_it_and_says_so_without(case: Case, base: Path) -> None:
    merged = case.merge("--base", base)
    outcome = case.verify(merged, "--base", base)
    assert failed(outcome) == set()
    assert checks_of(outcome)["base"] == "pass"
    without = case.verify(merged)
    assert {"fused-exact", "provenance"} <= failed(without)
    assert "--base" in message(without, "provenance")
    assert "made with --base" in message(without, "fused-exact")
    assert {"fused-exact", "provenance"} <= failed(case.verify(case.merge(), "--base", base))


def test_another_base_fails_bit_for_bit(case: Case, base: Path) -> None:
    leaves = as_base(case.tree)
    leaves[Q] = leaves[Q] * np.float32(1.02)
    other = save_step(case.folder / "other" / "0", nest(leaves))
    outcome = case.verify(case.merge("--base", base), "--base", other)
    assert "base" in failed(outcome)
    assert next(c for c in outcome.json["checks"] if c["id"] == "base")["where"] == ["/".join(("params", *Q, "value"))]


# Provenance.


def rewrite(merged: Path, change: Callable[[Any], None]) -> None:
    file = merged / "lora_merge.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


WRONG_CLAIMS: dict[str, tuple[Callable[[Any], None], str]] = {
    "multiplier": (lambda document: document.update(multiplier=0.5), "--scale 0.5"),
    "scale": (lambda document: document["sites"][0].update(scale=7.0), "says scale 7.0"),
    "dtype": (lambda document: document["sites"][0].update(dtype="bfloat16"), "says bfloat16"),
    "adapter": (lambda document: document["sites"][0].update(adapter_digest="sha256:0"), "another adapter"),
    "too few": (lambda document: document["sites"].pop(), "does not say"),
    "no record": (lambda document: document.pop("sites"), "no record"),
}


@pytest.mark.parametrize("name", WRONG_CLAIMS)
def test_provenance_that_disagrees_fails(name: str, case: Case) -> None:
    change, words = WRONG_CLAIMS[name]
    merged = case.merge()
    rewrite(merged, change)
    outcome = case.verify(merged)
    assert failed(outcome) == {"provenance"}
    assert words in message(outcome, "provenance")


def test_provenance_of_another_checkpoint_warns(case: Case) -> None:
    merged = case.merge()
    rewrite(merged, lambda document: document["sources"][0].update(fingerprint="sha256:0"))
    outcome = case.verify(merged)
    assert (outcome.code, checks_of(outcome)["provenance"]) == (0, "warn")


def test_a_scale_that_only_provenance_states_is_used_and_said(case: Case) -> None:
    merged = case.merge()
    outcome = run("verify", merged, "--against", case.step, "--json")
    assert outcome.code == 0
    assert checks_of(outcome)["provenance"] == "warn"
    assert "--lora-alpha" in message(outcome, "provenance")
    (merged / "lora_merge.json").unlink()
    unknown = run("verify", merged, "--against", case.step, "--json")
    assert unknown.code == 4
    assert "--lora-alpha" in unknown.error


def test_without_metadata_and_provenance_nothing_is_held_against_a_result(case: Case) -> None:
    merged = case.merge()
    (merged / "_CHECKPOINT_METADATA").unlink()
    (merged / "lora_merge.json").unlink()
    outcome = case.verify(merged)
    assert failed(outcome) == set()
    assert checks_of(outcome)["provenance"] == "skip"


# The other inputs, and flags.


def test_the_other_inputs_have_their_own_exit_codes(case: Case, tmp_path: Path) -> None:
    merged = case.merge()
    assert run("verify", tmp_path / "nowhere", "--against", case.step).code == 3
    assert run("verify", merged, "--against", tmp_path / "nowhere").code == 3
    assert run("verify", merged, "--against", merged).code == 4
    assert case.verify(merged, "--include", "nothing/*").code == 2
    assert case.verify(merged, "--sample", "0").code == 2
    assert case.verify(merged, "--base", GOLDEN / "pi0_fast/base").code == 4
    largest = max((case.step / "params").rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert case.verify(merged).code == 3


def test_nan_in_the_checkpoint_is_its_own_fault(tmp_path: Path) -> None:
    tree = build(PALIGEMMA, ACTION)
    merged = merged_leaves(tree)
    for path in (Q, (*Q[:-1], "lora_a")):
        values = tree.leaves[path].copy()
        values.reshape(-1)[3] = np.nan
        case = Case(tmp_path / path[-1], Tree({**tree.leaves, path: values}, tree.expected, tree.changed))
        outcome = case.verify(case.save(merged))
        assert outcome.code == 3
        assert "not finite" in outcome.error


# merge --verify.


def test_merge_verify_publishes_with_its_checks(case: Case) -> None:
    output = case.folder / "out"
    outcome = run("merge", case.step, "-o", output, *ALPHAS, "--verify", "--json")
    assert outcome.code == 0
    assert set(checks_of(outcome).values()) <= {"pass", "skip"}
    assert json.loads((output / "lora_merge.json").read_text())["checks"] == outcome.json["checks"]
    assert all(site["proof"]["worst_share"] <= 1 for site in outcome.json["sites"])


def test_a_merge_that_fails_its_verification_never_appears(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_merge_cli.operations import KernelUpdate

    right = KernelUpdate.take

    def off_by_one_percent(self: Any, region: Any, kernel: Any, tile: Any) -> Any:
        return right(self, region, kernel, tile) * np.float32(1.01)

    monkeypatch.setattr(KernelUpdate, "take", off_by_one_percent)
    output, report = tmp_path / "out", tmp_path / "report.json"
    flags = ["--verify", "--report", report, "--report", output / "inside.json"]
    outcome = run("merge", case.step, "-o", output, *ALPHAS, *flags)
    assert outcome.code == 1
    assert "fused-exact" in outcome.error
    assert not output.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "report.json"]
    assert json.loads(report.read_text())["status"] == "rejected"


@pytest.mark.parametrize("flags", [("--sample", "0"), ("--sample", "-1"), ("--min-gain", "nan")])
def test_judging_that_makes_no_sense_is_refused_before_the_merge(flags: tuple[str, ...], case: Case) -> None:
    assert run("merge", case.step, "-o", case.folder / "out", *ALPHAS, "--verify", *flags).code == 2
    assert not (case.folder / "out").exists()


def test_a_report_may_not_replace_a_part_of_the_output(case: Case) -> None:
    output = case.folder / "out"
    for part in ("lora_merge.json", "assets/trossen/norm_stats.json"):
        assert run("merge", case.step, "-o", output, *ALPHAS, "--verify", "--report", output / part).code == 2
        assert not output.exists()


def test_a_reader_that_goes_away_changes_no_verdict(case: Case) -> None:
    leaves = merged_leaves(case.tree)
    leaves[Q] = leaves[Q] + np.float32(1)
    wrong, right = case.save(leaves), case.save(merged_leaves(case.tree))
    program = f"{sys.executable} -m lora_merge_cli"
    for merged, code in ((wrong, "1"), (right, "0")):
        for style in ("--json", ""):
            command = f"{program} verify {merged} --against {case.step} {' '.join(ALPHAS)} {style} | true; echo ${{PIPESTATUS[0]}}"
            found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
            assert (found.stdout.strip(), found.stderr) == (code, "")


def test_a_report_that_cannot_be_written_hides_no_verdict(case: Case) -> None:
    leaves = merged_leaves(case.tree)
    leaves[Q] = leaves[Q] + np.float32(1)
    outcome = case.verify(case.save(leaves), "--report", "/proc/nowhere/x.html")
    assert outcome.code == 6
    assert outcome.json["status"] == "failed"


def test_strict_needs_verify(case: Case) -> None:
    assert run("merge", case.step, "-o", case.folder / "out", "--strict").code == 2
