"""Merging PEFT adapters of experts: parameters that transformers fuses in memory and checkpoints keep apart, or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tests import peft_cases as cases  # noqa: E402
from tests.peft_reference import assert_rounded  # noqa: E402

KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: cases.small_model(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def bases(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: cases.save_base(model, folder / kind) for kind, model in models.items()}


TARGETS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": [UP, DOWN]},
    "both, in the other order": {"target_parameters": [DOWN, UP]},
    "up alone": {"target_parameters": [UP]},
    "down alone": {"target_parameters": [DOWN]},
    "with attention": {"target_modules": ["q_proj", "o_proj"], "target_parameters": [UP, DOWN]},
    "rsLoRA and patterns": {
        "target_parameters": [UP, DOWN],
        "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {r"layers.0.mlp.experts.gate_up_proj": 5},
    },
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_experts(
    kind: str, targets: dict[str, Any], models: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(**({"r": 4, "lora_alpha": 5, "target_modules": []} | targets))
    adapter = cases.save_adapter(models[kind], config, tmp_path / "adapter")
    merged = cases.merge(bases[kind], adapter, out=tmp_path / "out", flags=("--verify",))
    cases.assert_same(merged, cases.merged_by_peft(bases[kind], adapter), cases.tensors(bases[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_experts_answer_as_the_adapter_does(
    kind: str, models: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=5, target_modules=["q_proj"], target_parameters=[UP, DOWN])
    adapter = cases.save_adapter(models[kind], config, tmp_path / "adapter")
    cases.merge(bases[kind], adapter, out=tmp_path / "out")
    adapted = cases.with_adapter(bases[kind], adapter)
    cases.assert_forward(cases.reloaded(tmp_path / "out"), adapted, cases.reloaded(bases[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_and_attention_alone(
    kind: str, models: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    router = "mlp.router" if kind == "gpt_oss" else "mlp.gate"
    config = LoraConfig(r=4, lora_alpha=5, target_modules=["v_proj"], target_parameters=[f"{router}.weight"])
    adapter = cases.save_adapter(models[kind], config, tmp_path / "adapter")
    merged = cases.merge(bases[kind], adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(bases[kind], adapter), cases.tensors(bases[kind]))


def _modules_of_transformers_4(kind: str) -> tuple[str, tuple[str, str, str]]:
    if kind == "mixtral":
        return "block_sparse_moe.experts", ("w1", "w3", "w2")
    return "mlp.experts", ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_by_name_as_transformers_4_has_them(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = cases.tensors(bases[kind])
    folder, names = _modules_of_transformers_4(kind)
    generator = torch.Generator().manual_seed(2)
    factors, expected = {}, dict(base)
    for layer in range(2):
        for expert in range(4):
            for name in names:
                module = f"model.layers.{layer}.{folder}.{expert}.{name}"
                rows, columns = base[f"{module}.weight"].shape
                a = torch.randn(4, columns, generator=generator)
                b = torch.randn(rows, 4, generator=generator)
                factors[f"base_model.model.{module}.lora_A.weight"] = a
                factors[f"base_model.model.{module}.lora_B.weight"] = b
                expected[f"{module}.weight"] = (
                    base[f"{module}.weight"].double() + 5 / 4 * b.double() @ a.double()
                ).float()
    adapter = tmp_path / "adapter"
    LoraConfig(r=4, lora_alpha=5, target_modules=list(names), task_type="CAUSAL_LM").save_pretrained(adapter)
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    merged = cases.merge(bases[kind], adapter, out=tmp_path / "out")
    cases.assert_same(merged, expected, base)
    cases.assert_same(merged, cases.merged_by_peft(bases[kind], adapter), base)


def test_an_expert_that_was_never_chosen_is_no_reason_to_refuse(
    models: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=5, target_modules=[], target_parameters=[UP, DOWN])

    def forget(adapted: Any) -> None:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.view(parameter.shape[0], 4, 4)[:, :, 1] = 0

    adapter = cases.save_adapter(models["mixtral"], config, tmp_path / "adapter", edit=forget)
    merged = cases.merge(bases["mixtral"], adapter, out=tmp_path / "out")
    stored = cases.tensors(bases["mixtral"])
    cases.assert_same(merged, cases.merged_by_peft(bases["mixtral"], adapter), stored)
    untouched = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert torch.equal(merged[untouched], stored[untouched])
    assert not torch.equal(
        merged[untouched.replace("experts.1", "experts.0")], stored[untouched.replace("experts.1", "experts.0")]
    )


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_square_experts(kind: str, tmp_path: Path) -> None:
    # Neither the shapes nor the order of the names tell the two axes apart.
    sizes = {"hidden_size": 32, "intermediate_size": 32}
    model = cases.small_model(kind, **sizes)
    base = cases.save_base(model, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=5, target_modules=[], target_parameters=[UP, DOWN])
    adapter = cases.save_adapter(model, config, tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, adapter), cases.tensors(base))


def test_a_bfloat16_gpt_oss(models: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=5, target_modules=[], target_parameters=[UP, DOWN])
    adapter = cases.save_adapter(models["gpt_oss"], config, tmp_path / "adapter")
    base = cases.save_base(cases.small_model("gpt_oss"), tmp_path / "base", torch.bfloat16)
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    # Here peft rounds the delta before it adds it, and the sum again: the ideal is its merge into a wider base.
    for name, value in cases.merged_by_peft(base, adapter, dtype=torch.float32).items():
        assert merged[name].dtype == torch.bfloat16
        assert_rounded(merged[name], value.double().numpy(), name)


def test_a_missing_expert_on_disk_is_refused(models: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    base = cases.copied(bases["mixtral"], tmp_path / "base")
    missing = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    stored = cases.tensors(base)
    stored.pop(missing)
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=4, lora_alpha=5, target_modules=[], target_parameters=[UP, DOWN])
    adapter = cases.save_adapter(models["mixtral"], config, tmp_path / "adapter")
    outcome = cases.attempt(base, adapter, out=tmp_path / "out")
    assert outcome.code == 4
    assert "experts" in outcome.error
    assert not (tmp_path / "out").exists()


def test_experts_of_which_the_adapter_knows_another_number(
    models: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=5, target_modules=[], target_parameters=[UP, DOWN])
    adapter = cases.save_adapter(cases.small_model("mixtral", num_local_experts=3), config, tmp_path / "adapter")
    assert json.loads((bases["mixtral"] / "config.json").read_text())["num_local_experts"] == 4
    outcome = cases.attempt(bases["mixtral"], adapter, out=tmp_path / "out")
    assert outcome.code == 4
    assert "experts" in outcome.error
    assert not (tmp_path / "out").exists()
