"""Several adapters of which some are DoRA: one after the other, each with the norm of the unmerged kernel and its own delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import peft  # noqa: E402
from peft import LoraConfig  # noqa: E402

from tests import peft_cases as cases  # noqa: E402
from tests.command import run  # noqa: E402

KINDS = {
    "dora": LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], use_dora=True),
    "lora": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
    "other": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=True),
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return cases.small_model("llama")


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(llama, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapters(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: cases.save_adapter(llama, config, folder / name, seed=seed)
        for seed, (name, config) in enumerate(KINDS.items())
    }


def _by_peft(base: Path, paths: list[Path]) -> cases.Tensors:
    with cases.quiet():
        model = peft.PeftModel.from_pretrained(cases.reloaded(base), paths[0], adapter_name="0")
        for number, path in enumerate(paths[1:], 1):
            model.load_adapter(path, adapter_name=str(number))
        model.base_model.merge_adapter([str(number) for number in range(len(paths))])
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }


def _by_formula(
    weight: torch.Tensor, paths: list[Path], weights: list[float], configs: list[LoraConfig], module: str
) -> torch.Tensor:
    """``X <- X + w * (g * (X + D) - X)`` in float64, g from the unmerged weight."""
    start = result = weight.double()
    for path, share, config in zip(paths, weights, configs, strict=True):
        found = cases.tensors(path)
        a, b = (found.get(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
        if a is None or b is None:
            continue
        scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        delta = scale * (b.double() @ a.double())
        gain = torch.ones(len(start), 1, dtype=torch.float64)
        if config.use_dora:
            magnitude = found[f"base_model.model.{module}.lora_magnitude_vector"].double()
            gain = (magnitude / (start + delta).norm(dim=1))[:, None]
        result = result + share * (gain * (result + delta) - result)
    return result


@pytest.mark.parametrize(
    "order", [("dora", "other"), ("other", "dora"), ("dora", "lora", "other"), ("lora", "dora"), ("dora", "lora")]
)
def test_they_follow_one_another_as_in_peft(
    order: tuple[str, ...], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    paths = [adapters[name] for name in order]
    merged = cases.merge(base, *paths, out=tmp_path / "out", flags=("--verify",))
    expected = _by_peft(base, paths)
    cases.assert_same(merged, {name: expected[name] for name in merged}, cases.tensors(base))


def test_their_order_matters(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    one = cases.merge(base, adapters["dora"], adapters["other"], out=tmp_path / "one")
    other = cases.merge(base, adapters["other"], adapters["dora"], out=tmp_path / "other")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (one[name] - other[name]).abs().max() > 1e-3


@pytest.mark.parametrize("weights", [(0.5, 1.0, -0.25), (1.0, 0.75, 2.0)])
def test_weights_are_of_each_step(
    weights: tuple[float, ...], base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    order = ("dora", "lora", "other")
    given = [f"{adapters[name]}@{weight}" for name, weight in zip(order, weights, strict=True)]
    merged = cases.merge(base, *given, out=tmp_path / "out", flags=("--verify",))
    for module in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        before = cases.tensors(base)[f"{module}.weight"]
        wanted = _by_formula(
            before, [adapters[name] for name in order], list(weights), [KINDS[name] for name in order], module
        )
        cases.assert_near(merged[f"{module}.weight"], wanted, module)


def test_a_part_of_the_way_is_a_straight_one(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    pair = ("--adapter", adapters["dora"], "--adapter", adapters["other"])
    whole = cases.merge(base, adapters["dora"], adapters["other"], out=tmp_path / "whole")
    outcome = run("interpolate", base, *pair, "--alpha", 0.3, "-o", tmp_path / "part", "--verify")
    assert outcome.code == 0, outcome.stderr
    part = cases.tensors(tmp_path / "part")
    for name, before in cases.tensors(base).items():
        cases.assert_near(part[name], before.double() + 0.3 * (whole[name].double() - before.double()), name)


def test_what_multiplies_is_of_the_unmerged_kernel_and_not_rescaled(
    llama: Any, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    config = peft.HRAConfig(r=2, target_modules=["q_proj"])
    turned = cases.save_adapter(llama, config, tmp_path / "turned", seed=7)
    one, other = (
        cases.merge(base, *order, out=tmp_path / f"out{number}", flags=("--verify",))
        for number, order in enumerate([(turned, adapters["dora"]), (adapters["dora"], turned)])
    )
    alone = [cases.merge(base, path, out=tmp_path / f"alone {path.name}") for path in (turned, adapters["dora"])]
    for name, before in cases.tensors(base).items():
        wanted = before.double() + sum(each[name].double() - before.double() for each in alone)
        cases.assert_near(one[name], wanted, name)
        cases.assert_near(other[name], wanted, name)


def test_the_report_says_where_the_order_counts(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def notes(*names: str) -> list[str]:
        given = [part for name in names for part in ("--adapter", adapters[name])]
        outcome = run("merge", base, *given, "--dry-run", "--json")
        assert outcome.code == 0, outcome.stderr
        return [note for note in outcome.json["notes"] if "order of the adapters" in note]

    assert "on 4 kernels DoRA" in notes("lora", "dora")[0]
    assert not notes("dora", "lora")
    assert not notes("dora")


def test_a_scale_beyond_float32_is_one_line(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = cases.edit_config(cases.copied(adapters["lora"], tmp_path / "adapter"), lora_alpha=1e29)
    cases.edit_factors(adapter, lambda found: {key: value * 1e20 for key, value in found.items()})
    outcome = cases.attempt(base, adapter, out=tmp_path / "out")
    assert outcome.code == 3
    assert "beyond float32" in outcome.error
