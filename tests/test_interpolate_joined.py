"""``interpolate BASE T1@w T2@w --method ...`` from the command line: fine-tunes of every kind, in float64 beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import restore_flat, save_step
from tests.command import Outcome, run
from tests.interpolation import ALPHAS, Pair, llama_tensors, openpi_pair, read_model, write_model
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, build, nest

Tensors = Mapping[str, np.ndarray]
TIES = ("--method", "ties", "--density", "0.4")


def moved(base: Tensors, seed: int, size: float = 0.05) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: value + size * rng.standard_normal(value.shape).astype(np.float32) for name, value in base.items()}


@pytest.fixture(scope="module")
def start() -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float32) for name, value in llama_tensors(np.random.default_rng(0)).items()}


@pytest.fixture(scope="module")
def paths(start: Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {"base": write_model(folder / "base", start)}
    for seed in (1, 2, 3):
        found[f"t{seed}"] = write_model(folder / f"t{seed}", moved(start, seed))
    return found


def joined(paths: Mapping[str, Path], out: Path, tuned: list[object], *flags: object) -> dict[str, np.ndarray]:
    outcome = run("interpolate", paths["base"], *tuned, "-o", out, *flags)
    assert outcome.code == 0, outcome.stderr
    return read_model(out)


def assert_near(found: Tensors, expected: Tensors, tolerance: float = 2e-6) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.abs(found[name].astype(np.float64) - value).max() <= tolerance * np.abs(value).max(), name


def differences(paths: Mapping[str, Path], *names: str) -> list[dict[str, np.ndarray]]:
    base = read_model(paths["base"])
    return [
        {key: value.astype(np.float64) - base[key] for key, value in read_model(paths[name]).items()} for name in names
    ]


@pytest.mark.parametrize("alpha", [None, 0.25, 1.0])
def test_weights_and_alpha_multiply_the_changes(alpha: float | None, paths: dict[str, Path], tmp_path: Path) -> None:
    flags = () if alpha is None else ("--alpha", alpha)
    tuned = [f"{paths['t1']}@0.7", f"{paths['t2']}@-0.4"]
    found = joined(paths, tmp_path / "out", tuned, "--method", "task-arithmetic", *flags)
    one, two = differences(paths, "t1", "t2")
    share = 1.0 if alpha is None else alpha
    base = read_model(paths["base"])
    assert_near(found, {name: base[name] + share * (0.7 * one[name] - 0.4 * two[name]) for name in base})


def test_linear_without_weights_is_the_mean(paths: dict[str, Path], tmp_path: Path) -> None:
    found = joined(paths, tmp_path / "out", [paths["t1"], paths["t2"], paths["t3"]], "--method", "linear")
    models = [read_model(paths[name]) for name in ("t1", "t2", "t3")]
    assert_near(found, {name: np.mean([model[name].astype(np.float64) for model in models], 0) for name in found})


def test_a_sequence_that_is_taken_whole_is_its_end(paths: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--method", "task-arithmetic", "--sequential")
    found = joined(paths, tmp_path / "out", [paths["t1"], paths["t2"]], *flags)
    assert_near(found, read_model(paths["t2"]))
    part = joined(paths, tmp_path / "part", [paths["t1"], f"{paths['t2']}@0.5"], *flags)
    ends = [read_model(paths[name]) for name in ("t1", "t2")]
    assert_near(part, {name: ends[0][name] + 0.5 * (ends[1][name].astype(np.float64) - ends[0][name]) for name in part})


def test_one_under_ties_at_density_1_is_task_arithmetic(paths: dict[str, Path], tmp_path: Path) -> None:
    ties = joined(paths, tmp_path / "ties", [paths["t1"]], "--method", "ties", "--density", "1")
    plain = joined(paths, tmp_path / "plain", [paths["t1"]], "--method", "task-arithmetic")
    for name, value in plain.items():
        assert np.array_equal(ties[name], value), name


def test_one_with_a_weight_needs_no_method(paths: dict[str, Path], tmp_path: Path) -> None:
    found = joined(paths, tmp_path / "out", [f"{paths['t1']}@0.3"])
    (one,) = differences(paths, "t1")
    base = read_model(paths["base"])
    assert_near(found, {name: base[name] + 0.3 * one[name] for name in base})


def test_a_sweep_over_a_joint_fine_tune(paths: dict[str, Path], tmp_path: Path) -> None:
    outcome = run(
        "interpolate", paths["base"], paths["t1"], paths["t2"], "-o", tmp_path / "out", *TIES, "--alpha", "0:1:0.5"
    )
    assert outcome.code == 0, outcome.stderr
    base, half, whole = (read_model(tmp_path / "out" / f"alpha-{alpha}") for alpha in ("0", "0.5", "1"))
    for name, value in read_model(paths["base"]).items():
        assert np.array_equal(base[name], value)
        assert np.abs(half[name] - 0.5 * (base[name].astype(np.float64) + whole[name])).max() < 1e-6
    again = joined(paths, tmp_path / "one", [paths["t1"], paths["t2"]], *TIES, "--alpha", "0.5")
    assert all(np.array_equal(again[name], half[name]) for name in half)


def test_the_report_has_every_fine_tune(paths: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run(
        "interpolate", paths["base"], f"{paths['t1']}@0.5", paths["t2"], "-o", out, "--method", "linear", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    said = [(source["role"], source["weight"]) for source in outcome.json["sources"]]
    assert said == [("tuned", 0.5), ("tuned", 1.0), ("base", None)]
    assert [Path(source["path"]).name for source in outcome.json["sources"]] == ["t1", "t2", "base"]
    assert outcome.json["joining"] == {
        "method": "linear",
        "weights": [0.5, 1.0],
        "density": None,
        "seed": None,
        "sequential": False,
    }


def test_a_run_with_another_method_is_not_resumed(paths: dict[str, Path], tmp_path: Path) -> None:
    command = ("interpolate", paths["base"], paths["t1"], paths["t2"], "-o", tmp_path / "out", "--resume", "--json")
    for flags in (("--method", "slerp"), ("--method", "linear"), TIES, (*TIES[:-1], "0.5")):
        outcome = run(*command, *flags, "--alpha", "0.5", "--alpha", "1")
        assert outcome.code == (0 if flags == ("--method", "slerp") else 5), outcome.stderr


# Fine-tunes with adapters


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return openpi_pair(tmp_path_factory.mktemp("openpi"))


def test_deltas_of_robots_are_on_the_base_s_own_values(pair: Pair, tmp_path: Path) -> None:
    """What the frozen bfloat16 kernel lost by rounding is no change of the fine-tune."""
    outcome = run(
        "interpolate", pair.base, f"{pair.tuned}@0.5", pair.tuned, "-o", tmp_path / "out", "--method", "task-arithmetic",
        "--lora-alpha", ALPHAS,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    found = restore_flat(tmp_path / "out" / "params")
    for path, wanted in pair.between(1.5).items():
        got = found[path].astype(np.float64)
        assert np.abs(got - wanted).max() <= 3e-6 * np.abs(wanted).max(), path


def test_another_base_is_refused(pair: Pair, tmp_path: Path) -> None:
    other = {path: value + np.float32(0.01) for path, value in pair.start.items()}
    base = save_step(tmp_path / "other" / "0", nest(other, suffix=()))
    outcome = run(
        "interpolate",
        base,
        pair.tuned,
        pair.tuned,
        "-o",
        tmp_path / "out",
        "--method",
        "linear",
        "--lora-alpha",
        ALPHAS,
    )
    assert outcome.code == 4, outcome.stderr
    assert "not what the fine-tune started from" in outcome.error
    assert not (tmp_path / "out").exists()


def test_stages_of_a_robot_s_training_are_stacked(pair: Pair, tmp_path: Path) -> None:
    """Factors that were trained on: the second stage's change is A2 - A1."""
    tree = build(PALIGEMMA, ACTION, seed=0)
    later = {
        path: leaf * np.float32(1.5) if any("lora_b" in str(part) for part in path) else leaf
        for path, leaf in tree.leaves.items()
    }
    second = save_step(tmp_path / "run" / "9", nest(later, suffix=("value",)))
    outcome = run(
        "interpolate", pair.base, pair.tuned, f"{second}@0.5", "-o", tmp_path / "out", "--method", "task-arithmetic",
        "--sequential", "--lora-alpha", ALPHAS,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    found = restore_flat(tmp_path / "out" / "params")
    for path in pair.kernels:
        start, delta = pair.start[path].astype(np.float64), pair.end[path] - pair.start[path]
        wanted = start + delta + 0.5 * 0.5 * delta
        assert np.abs(found[path] - wanted).max() <= 3e-6 * np.abs(wanted).max(), path


def test_scales_are_for_the_fine_tunes_that_need_them(pair: Pair, tmp_path: Path) -> None:
    """One has its adapters inside and needs an alpha, the other is an adapter that states its own."""
    taken = run("extract", pair.tuned, "--base", pair.base, "-o", tmp_path / "adapter", "--lora-alpha", ALPHAS)
    assert taken.code == 0, taken.stderr
    outcome = run(
        "interpolate", pair.base, pair.tuned, tmp_path / "adapter", "-o", tmp_path / "out", "--method", "linear",
        "--lora-alpha", ALPHAS, "--verify",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    found = restore_flat(tmp_path / "out" / "params")
    for path, wanted in pair.between(1.0).items():
        assert np.abs(found[path] - wanted).max() <= 3e-6 * np.abs(wanted).max(), path


def test_options_of_adapters_are_those_of_the_fine_tunes(pair: Pair, tmp_path: Path) -> None:
    outcome = run(
        "interpolate", pair.base, pair.tuned, pair.tuned, "-o", tmp_path / "out", "--method", "linear",
        "--lora-alpha", ALPHAS, "--scale", "0.5", "--verify",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    found = restore_flat(tmp_path / "out" / "params")
    for path in pair.kernels:
        start = pair.start[path].astype(np.float64)
        wanted = start + 0.5 * (pair.end[path] - start)
        assert np.abs(found[path] - wanted).max() <= 3e-6 * np.abs(wanted).max(), path


def test_options_of_adapters_need_adapters(paths: dict[str, Path], tmp_path: Path) -> None:
    outcome = run(
        "interpolate", paths["base"], paths["t1"], paths["t2"], "-o", tmp_path / "out", *TIES, "--scale", "0.5"
    )
    assert outcome.code == 2
    assert "--scale is for adapters" in outcome.error


def test_another_alpha_of_adapters_is_not_resumed(pair: Pair, tmp_path: Path) -> None:
    command = (
        "interpolate",
        pair.base,
        pair.tuned,
        pair.tuned,
        "-o",
        tmp_path / "out",
        "--method",
        "linear",
        "--resume",
    )
    assert run(*command, "--lora-alpha", ALPHAS).code == 0
    assert run(*command, "--lora-alpha", ALPHAS).code == 0
    assert run(*command, "--lora-alpha", "paligemma=13,action_expert=3").code == 5


def test_a_weight_of_0_takes_nothing(start: Tensors, paths: dict[str, Path], tmp_path: Path) -> None:
    name = "lm_head.weight"
    other = write_model(tmp_path / "other", moved(start, 2) | {name: start[name]})
    flags = ("--method", "ties", "--density", "1", "--verify")
    found = joined(paths, tmp_path / "out", [f"{paths['t1']}@0", other], *flags)
    assert np.array_equal(found[name], start[name])


def test_a_configuration_says_what_is_stored(start: Tensors, tmp_path: Path) -> None:
    """Leaves are computed in float32, and stored as the fine-tunes have them: nothing is recast."""

    def mixed(tensors: Tensors) -> dict[str, np.ndarray]:
        return {name: value if "norm" in name else value.astype(BFLOAT16) for name, value in tensors.items()}

    models = [
        write_model(tmp_path / str(seed), mixed(moved(start, seed) if seed else start), torch_dtype="bfloat16")
        for seed in range(3)
    ]
    outcome = run("interpolate", *models, "-o", tmp_path / "out", "--method", "linear")
    assert outcome.code == 0, outcome.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    before, after = read_model(models[1]), read_model(tmp_path / "out")
    assert {name: value.dtype for name, value in after.items()} == {name: value.dtype for name, value in before.items()}


# What makes no sense


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("t1", "t2"), "nothing says how to join"),
        (("t1", "t2", "--method", "ties"), "needs --density"),
        (("t1", "t2", "--method", "linear", "--density", "0.5"), "--density is for"),
        (("t1", "t2", "--method", "ties", "--density", "0"), "outside (0, 1]"),
        (("t1", "--method", "slerp"), "exactly two"),
        (("t1", "t2", "t3", "--method", "slerp"), "exactly two"),
        (("t1", "--method", "model-stock"), "at least 2"),
        (("t1@0.5", "t2", "--method", "model-stock"), "takes no weights"),
        (("t1@-1", "t2", "--method", "karcher"), "weights of 0 or more"),
        (("t1", "t2", "--method", "slerp", "--sequential"), "--sequential is for"),
        (("t1", "--method", "linear", "--sequential"), "at least 2"),
        (("t1", "--density", "0.5", "--alpha", "1"), "--density is for --method"),
        (("--method", "linear"), "no TUNED"),
        (("t1", "t2", "--method", "linear", "--adapter", "t3"), "two fine-tunes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage(arguments: tuple[str, ...], words: str, paths: dict[str, Path], tmp_path: Path) -> None:
    def spelled(text: str) -> str:
        name, at, weight = text.partition("@")
        return f"{paths[name]}{at}{weight}" if name in paths else text

    outcome: Outcome = run("interpolate", paths["base"], *map(spelled, arguments), "-o", tmp_path / "out")
    assert outcome.code == 2, outcome.stderr
    assert words in outcome.error
    assert not (tmp_path / "out").exists()


def test_fine_tunes_of_other_trees_are_refused(start: Tensors, paths: dict[str, Path], tmp_path: Path) -> None:
    lacking = write_model(tmp_path / "lacking", dict(list(moved(start, 4).items())[1:]))
    outcome = run("interpolate", paths["base"], paths["t1"], lacking, "-o", tmp_path / "out", "--method", "linear")
    assert outcome.code == 4, outcome.stderr
    assert str(lacking) in outcome.error


def test_an_adapter_s_file_is_a_fine_tune(tmp_path: Path) -> None:
    """MiniMind's adapters are files of their own, with keys of adapters and nothing else."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    model = {f"model.layers.{n}.self_attn.q_proj.weight": torch.randn(6, 6, generator=generator) for n in range(2)}
    factors = {}
    for name in model:
        module = name.removesuffix(".weight")
        factors[f"{module}.lora.A.weight"] = torch.randn(2, 6, generator=generator)
        factors[f"{module}.lora.B.weight"] = torch.randn(6, 2, generator=generator)
    torch.save(model, tmp_path / "base.pth")
    torch.save({name: value + 0.1 for name, value in model.items()}, tmp_path / "full.pth")
    torch.save(factors, tmp_path / "lora.pth")
    out = tmp_path / "out.pth"
    flags = ("--method", "task-arithmetic", "--verify")
    outcome = run("interpolate", tmp_path / "base.pth", tmp_path / "lora.pth", tmp_path / "full.pth", "-o", out, *flags)
    assert outcome.code == 0, outcome.stderr
    for name, value in torch.load(out).items():
        module = name.removesuffix(".weight")
        wanted = model[name] + factors[f"{module}.lora.B.weight"] @ factors[f"{module}.lora.A.weight"] + 0.1
        assert (value - wanted).abs().max() < 1e-5
