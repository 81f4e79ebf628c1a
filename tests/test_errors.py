"""Every way to fail: its exit code, its one line, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lora_merge_cli import producing
from lora_merge_cli.errors import LoraMergeError
from tests.checkpoints import restore_flat, save_item, save_step
from tests.command import Outcome, run
from tests.test_openpi_merge import ALPHAS
from tests.trees import ACTION, PALIGEMMA, Flat, build, nest

ALPHA = ["--lora-alpha", ALPHAS]
ATTENTION = ("PaliGemma", "llm", "layers", "attn")
MLP = ("PaliGemma", "llm", "layers", "mlp")


def leaves() -> Flat:
    return dict(build(PALIGEMMA, ACTION).leaves)


def refuse(code: int, checkpoint: Path, output: Path, *flags: object, alpha: bool = True) -> str:
    """Run a merge that must fail, and return its one line."""
    before = sorted(p.name for p in output.parent.iterdir()) if output.parent.exists() else None
    outcome = run("merge", checkpoint, "-o", output, *(ALPHA if alpha else []), *flags)
    assert outcome.code == code, (outcome.code, outcome.stderr)
    after = sorted(p.name for p in output.parent.iterdir()) if output.parent.exists() else None
    assert after == before, "something was left behind"
    return outcome.error


def saved(tmp_path: Path, tree: Flat, **layout: object) -> Path:
    return save_step(tmp_path / "in" / "5", nest(tree), **layout)  # type: ignore[arg-type]


def test_a_missing_path(tmp_path: Path) -> None:
    assert "no such file or directory" in refuse(3, tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("kind", ["empty directory", "other directory", "file"])
def test_not_a_checkpoint(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("hello")
    else:
        path.mkdir()
        if kind == "other directory":
            (path / "readme.txt").write_text("hello")
    line = refuse(3, path, tmp_path / "out")
    assert "not a checkpoint" in line and "expected an Orbax" in line and "found" in line


def test_the_old_msgpack_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "checkpoint").write_bytes(b"\x80")
    assert "msgpack" in refuse(3, tmp_path / "old", tmp_path / "out")


def truncate(item: Path) -> None:
    file = max(item.rglob("d/*"), key=lambda p: p.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a truncated data file": truncate,
    "a missing data file": lambda item: max(item.rglob("d/*"), key=lambda p: p.stat().st_size).unlink(),
    "a missing manifest": lambda item: (item / "manifest.ocdbt").unlink(),
    "missing tree metadata": lambda item: (item / "_METADATA").unlink(),
    "tree metadata that is no JSON": lambda item: (item / "_METADATA").write_text("{"),
    "tree metadata of another shape": lambda item: (item / "_METADATA").write_text('{"tree_metadata": {"a": 3}}'),
}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_databases(damage: str, compressed: bool, tmp_path: Path) -> None:
    step = saved(tmp_path, leaves(), compressed=compressed)
    DAMAGE[damage](step / "params")
    line = refuse(3, step, tmp_path / "out")
    assert str(step / "params") in line


FILE_DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "truncated": lambda chunk: os.truncate(chunk, chunk.stat().st_size // 2),
    "empty": lambda chunk: os.truncate(chunk, 0),
}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("leaf", ["attn.q_einsum.w", "attn.q_einsum.lora_a", "embedder.input_embedding"])
@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_damaged_chunk_files(damage: str, leaf: str, compressed: bool, tmp_path: Path) -> None:
    step = saved(tmp_path, leaves(), ocdbt=False, compressed=compressed)
    (chunk,) = (step / "params").glob(f"*.{leaf}.value/0*")
    FILE_DAMAGE[damage](chunk)
    line = refuse(3, step, tmp_path / "out")
    assert leaf.replace(".", "/").replace("attn/", "attn/") in line


@pytest.mark.parametrize("missing", ["lora_a", "lora_b"])
def test_a_lone_factor(missing: str, tmp_path: Path) -> None:
    tree = leaves()
    del tree[(*ATTENTION, "kv_einsum", missing)]
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out")
    assert f"a factor without its {missing}" in line and "attn/kv_einsum/lora_" in line


def test_factors_without_a_kernel(tmp_path: Path) -> None:
    tree = leaves()
    del tree[(*MLP, "linear")]
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out")
    assert "without a kernel" in line and "mlp/linear_lora_a" in line


@pytest.mark.parametrize(
    "key",
    [
        (*ATTENTION, "o_einsum", "lora_a"),
        (*MLP, "up_lora_a"),
        ("PaliGemma", "llm", "layers", "mlp_2", "linear_lora_b"),
        ("head", "kernel_lora"),
        ("head", "loraA", "kernel"),
        ("head", "dora_scale"),
    ],
)
def test_adapter_keys_that_no_rule_claims(key: tuple[str, ...], tmp_path: Path) -> None:
    tree = leaves()
    tree[key] = np.ones((3, 2), np.float32)
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out")
    assert "fit no rule" in line and "/".join(key) in line


def test_names_that_only_contain_the_word_are_no_adapters(tmp_path: Path) -> None:
    tree = leaves()
    tree[("explorator", "kernel")] = np.ones((3, 2), np.float32)
    tree[("fedora", "bias")] = np.ones(3, np.float32)
    assert run("merge", saved(tmp_path, tree), "-o", tmp_path / "out", *ALPHA).code == 0


def test_shapes_that_do_not_fit_name_equation_and_shapes(tmp_path: Path) -> None:
    tree = leaves()
    tree[(*ATTENTION, "q_einsum", "lora_a")] = np.ones((3, 4, 24, 5), np.float32)
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out")
    assert "lndr,lnrh->lndh" in line
    assert "(3, 4, 24, 5)" in line and "(3, 4, 4, 6)" in line and "(3, 4, 24, 6)" in line


def test_heads_of_the_up_projection_must_be_the_kernels(tmp_path: Path) -> None:
    tree = leaves()
    tree[(*ATTENTION, "attn_vec_einsum", "lora_b")] = np.ones((3, 2, 4, 24), np.float32)
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out")
    assert "with m = n" in line


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["lora_a", "lora_b", "w"])
def test_non_finite_values_under_an_adapter(leaf: str, value: float, tmp_path: Path) -> None:
    tree = leaves()
    key = (*ATTENTION, "attn_vec_einsum_1", leaf)
    tree[key] = tree[key].copy()
    tree[key][1, 2, 1, 1] = value
    step = saved(tmp_path, tree)
    line = refuse(3, step, tmp_path / "out")
    assert "not finite" in line and f"{step}/params :: params/PaliGemma" in line
    assert f"attn_vec_einsum_1/{leaf}" in line


def test_non_finite_values_elsewhere_are_a_warning_where_decoded(tmp_path: Path) -> None:
    tree = leaves()
    tree[("PaliGemma", "img", "pos_embedding")] = np.full((1, 9, 8), np.nan, np.float32)
    step = saved(tmp_path, tree, ocdbt=False)
    outcome = run("merge", step, "-o", tmp_path / "out", *ALPHA, "--json")
    assert outcome.code == 0
    assert any("pos_embedding" in w and "72 non-finite" in w for w in outcome.json["warnings"])


def test_nothing_to_merge(tmp_path: Path) -> None:
    none = {"attention_rank": None, "feed_forward_rank": None}
    tree = build(dataclasses.replace(PALIGEMMA, **none)).leaves  # type: ignore[arg-type]
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out", alpha=False)
    assert "nothing to merge" in line


def test_already_merged(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    assert run("merge", step, "-o", tmp_path / "once", *ALPHA).code == 0
    line = refuse(4, tmp_path / "once", tmp_path / "twice")
    assert "already merged" in line and "lora_merge.json" in line
    inspected = run("inspect", tmp_path / "once")
    assert inspected.code == 0 and "no adapters: it was merged before" in inspected.stdout


def test_every_delta_zero(tmp_path: Path) -> None:
    tree = leaves()
    for path in tree:
        if "lora_b" in str(path[-1]):
            tree[path] = np.zeros_like(tree[path])
    assert "every delta is zero" in refuse(4, saved(tmp_path, tree), tmp_path / "out")


def test_every_delta_zero_though_no_factor_is(tmp_path: Path) -> None:
    """Heads that cancel: only the sum over heads is zero."""
    tree = build(dataclasses.replace(PALIGEMMA, feed_forward_rank=None)).leaves
    for path in [p for p in tree if p[-1] == "lora_b"]:
        half = np.ones_like(tree[path])
        half[:, ::2] *= -1
        tree[path] = half if path[-2] == "attn_vec_einsum" else np.zeros_like(half)
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out", "--lora-alpha", 3, alpha=False)
    assert "every delta is zero" in line


def test_one_delta_zero_is_a_warning(tmp_path: Path) -> None:
    tree = leaves()
    key = (*MLP, "linear_lora_b")
    tree[key] = np.zeros_like(tree[key])
    outcome = run("merge", saved(tmp_path, tree), "-o", tmp_path / "out", *ALPHA, "--json")
    assert outcome.code == 0
    assert any("1 of 10 deltas are exactly zero" in w and "mlp/linear/value" in w for w in outcome.json["warnings"])
    assert restore_flat(tmp_path / "out/params")[(*MLP, "linear")].dtype == np.float32


def test_scale_zero(tmp_path: Path) -> None:
    assert "--scale is 0" in refuse(4, saved(tmp_path, leaves()), tmp_path / "out", "--scale", 0)


def test_unknown_scale_names_the_flag(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    line = refuse(4, step, tmp_path / "out", alpha=False)
    assert "--lora-alpha paligemma=ALPHA,action_expert=ALPHA" in line and "--rslora" in line
    line = refuse(4, step, tmp_path / "out", "--lora-alpha", "paligemma=12", alpha=False)
    assert "--lora-alpha action_expert=ALPHA" in line


def test_scale_is_not_asked_for_where_nothing_needs_it(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    assert run("merge", step, "-o", tmp_path / "out", "--include", "**/mlp*/**").code == 0


def test_float16_overflow(tmp_path: Path) -> None:
    tree = leaves()
    key = (*MLP, "gating_einsum")
    tree[key] = tree[key].copy()
    tree[key][0, 1, 2, 3] = 1e6
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out", "--dtype", "float16")
    assert "overflows float16" in line and "mlp/gating_einsum" in line


def test_float16_overflow_of_an_untouched_leaf(tmp_path: Path) -> None:
    tree = leaves()
    tree[("action_in_proj", "kernel")] = np.full((7, 16), 1e6, np.float32)
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out", "--dtype-untouched", "float16")
    assert "overflows float16" in line and "action_in_proj/kernel" in line


def test_output_exists(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    for kind in ("directory", "file", "dangling link"):
        out = tmp_path / kind
        if kind == "directory":
            out.mkdir()
        elif kind == "file":
            out.write_text("mine")
        else:
            out.symlink_to(tmp_path / "nowhere")
        assert "--overwrite" in refuse(5, step, out)


@pytest.mark.parametrize("output", ["in/5", "in/5/params", "in/5/merged", "in/5/params/deep/er", "in", "link"])
def test_output_must_stay_out_of_the_input(output: str, tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    (tmp_path / "link").symlink_to(step)
    before = sorted(step.rglob("*"))
    line = refuse(4, step, tmp_path / output, "--overwrite")
    assert "input" in line
    assert sorted(step.rglob("*")) == before


def test_overwrite_never_removes_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = saved(tmp_path, leaves())
    (tmp_path / "work" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "inner")
    assert "more than an output" in refuse(4, step, tmp_path / "work", "--overwrite")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 17 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=17m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_no_space_found_before_the_start(small_disk: Path, tmp_path: Path) -> None:
    tree = leaves()
    tree[("other", "kernel")] = np.ones((1024, 512), np.float32)
    line = refuse(6, saved(tmp_path, tree), small_disk / "deep" / "out")
    assert "not enough free disk" in line and "bytes" in line
    assert list(small_disk.iterdir()) == []


def test_no_space_found_while_writing(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = leaves()
    noise = np.random.default_rng(0).integers(0, 2**32, 2**23, dtype=np.uint32)
    tree[("other", "kernel")] = noise.view(np.int32)
    monkeypatch.setattr(producing, "check_space", lambda *_: None)
    assert "the disk is full" in refuse(6, saved(tmp_path, tree), small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_a_read_only_target(small_disk: Path, tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "access is denied" in refuse(6, step, small_disk / "out")


def test_a_failing_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    tree = leaves()
    tree[(*MLP, "linear")] = tree[(*MLP, "linear")].copy()
    tree[(*MLP, "linear")][2, 3, 4] = np.nan
    step = saved(tmp_path, tree)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("weeks of work")
    refuse(3, step, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "precious").read_text() == "weeks of work"


USAGE: dict[str, list[object]] = {
    "--lora-alpha is no number": ["--lora-alpha", "twelve"],
    "--lora-alpha names no expert": ["--lora-alpha", "vision=3"],
    "--lora-alpha names an expert twice": ["--lora-alpha", "paligemma=3,paligemma=4"],
    "--lora-alpha must be above zero": ["--lora-alpha", "-1"],
    "--scale must be a finite number": ["--scale", "nan"],
    "--include": ["--include", "**/nothing/**"],
    "--exclude": ["--exclude", "typo"],
    "--device": ["--device", "abacus"],
    "--report does not know": ["--report", "report.pdf"],
    "--rslora names no expert": ["--rslora=vision"],
}


@pytest.mark.parametrize("message", USAGE)
def test_usage(message: str, tmp_path: Path) -> None:
    line = refuse(2, saved(tmp_path, leaves()), tmp_path / "out", *USAGE[message])
    assert message in line


def test_an_output_is_needed(tmp_path: Path) -> None:
    outcome = run("merge", saved(tmp_path, leaves()), *ALPHA)
    assert outcome.code == 2 and "-o OUT" in outcome.error


def test_unknown_flags_and_values_are_usage_errors(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    for flags in (["--bogus"], ["--dtype", "int8"], ["--step", "x"]):
        assert run("merge", step, "-o", tmp_path / "out", *flags).code == 2


def test_json_does_not_change_codes_and_keeps_stdout_clean(tmp_path: Path) -> None:
    outcome = run("merge", tmp_path / "nowhere", "-o", tmp_path / "out", "--json")
    assert (outcome.code, outcome.stdout) == (3, "")


def test_verbose_shows_the_traceback_and_the_same_code(tmp_path: Path) -> None:
    outcome: Outcome = run("merge", tmp_path / "nowhere", "-o", tmp_path / "out", "-v")
    assert outcome.code == 3 and "Traceback" in outcome.stderr and "error: no such" in outcome.stderr


def test_leaf_types_that_cannot_be_carried_are_refused(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    metadata = json.loads((step / "params/_METADATA").read_text())
    next(iter(metadata["tree_metadata"].values()))["value_metadata"]["value_type"] = "jax.random.key"
    (step / "params/_METADATA").write_text(json.dumps(metadata))
    line = refuse(4, step, tmp_path / "out")
    assert "jax.random.key" in line


def test_messages_are_one_line() -> None:
    error = LoraMergeError("it broke", where="a :: b", expected="x\ny", found=3, hint="mend it")
    assert str(error) == "it broke: a :: b (expected x y, found 3); mend it"


def test_a_base_that_is_truncated_is_an_input_error(tmp_path: Path) -> None:
    from tests.trees import as_base

    tree = build(PALIGEMMA, ACTION)
    step = saved(tmp_path, tree.leaves)
    base = save_item(tmp_path / "base" / "params", nest(as_base(tree), suffix=()))
    truncate(base)
    line = refuse(3, step, tmp_path / "out", "--base", base)
    assert str(base) in line


def test_integer_kernels_are_refused(tmp_path: Path) -> None:
    tree = leaves()
    key = (*ATTENTION, "q_einsum", "w")
    tree[key] = np.ones(tree[key].shape, np.int8)
    line = refuse(4, saved(tmp_path, tree), tmp_path / "out", "--dtype", "keep")
    assert "quantised" in line and "int8" in line


def test_float8_leaves_are_never_cast(tmp_path: Path) -> None:
    import ml_dtypes

    tree = leaves()
    key = (*ATTENTION, "q_einsum", "w")
    tree[("eight", "kernel")] = np.ones((2, 2), ml_dtypes.float8_e4m3fn)
    step = saved(tmp_path, tree)
    line = refuse(4, step, tmp_path / "out", "--dtype-untouched", "float32")
    assert "float8" in line and "--dtype-untouched keep" in line
    assert run("merge", step, "-o", tmp_path / "fine", *ALPHA).code == 0
    tree[key] = tree[key].astype(ml_dtypes.float8_e4m3fn)
    other = save_step(tmp_path / "other" / "5", nest(tree))
    assert "--dtype keep" in refuse(4, other, tmp_path / "out")
    assert run("merge", other, "-o", tmp_path / "kept", *ALPHA, "--dtype", "keep").code == 0
    assert restore_flat(tmp_path / "kept/params")[key].dtype == ml_dtypes.float8_e4m3fn


def test_damaged_params_are_not_replaced_by_the_train_state(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    save_item(step / "train_state", nest(leaves()))
    for name in ("_METADATA", "manifest.ocdbt"):
        (step / "params" / name).unlink()
    assert "params without metadata" in refuse(3, step, tmp_path / "out")
    shutil.rmtree(step / "params")
    assert "without arrays" in refuse(3, step, tmp_path / "out")


def test_random_keys_are_not_turned_into_numbers(tmp_path: Path) -> None:
    import jax

    tree = nest(leaves())
    tree["params"]["rng"] = {"value": jax.random.key(0)}
    step = save_step(tmp_path / "in" / "5", tree)
    assert "cannot be carried over" in refuse(4, step, tmp_path / "out")


def test_a_single_array_is_no_tree(tmp_path: Path) -> None:
    path = save_item(tmp_path / "one", {"x": np.ones(3)})
    metadata = json.loads((path / "_METADATA").read_text())
    next(iter(metadata["tree_metadata"].values()))["key_metadata"] = []
    (path / "_METADATA").write_text(json.dumps(metadata))
    assert "no tree" in refuse(4, path, tmp_path / "out")


def test_output_behind_a_link_into_the_input(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    (tmp_path / "real").mkdir()
    (step / "params").rename(tmp_path / "real" / "p")
    (step / "params").symlink_to(tmp_path / "real" / "p")
    assert "inside an input" in refuse(4, step, tmp_path / "real" / "p" / "merged")
    outcome = run("merge", step / "params", "-o", tmp_path / "out", *ALPHA)
    assert outcome.code == 0 and (tmp_path / "out" / "assets").is_dir()


def test_assets_that_cannot_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = saved(tmp_path, leaves())
    (step / "assets" / "latest").symlink_to("/nonexistent")
    outcome = run("merge", step, "-o", tmp_path / "fine", *ALPHA, "--json")
    assert outcome.code == 0
    assert any("leads nowhere" in warning for warning in outcome.json["warnings"])

    def fail(*_: object, **__: object) -> None:
        raise shutil.Error([("a", "b", "[Errno 13] Permission denied: 'a'")])

    monkeypatch.setattr(shutil, "copytree", fail)
    assert "access is denied" in refuse(6, step, tmp_path / "out")


def test_names_and_links_that_lead_nowhere(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    assert run("merge", "a" * 300, "-o", tmp_path / "out", *ALPHA).error
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run("merge", tmp_path / "loop", "-o", tmp_path / "out", *ALPHA).code == 3
    assert run("merge", step, "-o", tmp_path / "loop" / "out", *ALPHA).code == 6
    assert run("merge", step, "-o", tmp_path / ("a" * 300), *ALPHA).code == 6


def test_provenance_of_another_kind_does_not_matter(tmp_path: Path) -> None:
    step = saved(tmp_path, leaves())
    for number, text in enumerate(
        (
            '{"parents": null}',
            "[]",
            "{",
            '{"sites": [3], "parents": 5}',
            '{"sites": [3], "parents": [4]}',
            '{"sites": null, "x": NaN}',
        )
    ):
        (step / "lora_merge.json").write_text(text)
        outcome = run("merge", step, "-o", tmp_path / f"out{number}", *ALPHA)
        assert outcome.code == 0, outcome.stderr
