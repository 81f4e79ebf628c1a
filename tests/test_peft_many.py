"""Several adapters at once, and weights: W + sum of weight * (W' - W)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import peft  # noqa: E402
from peft import LoraConfig  # noqa: E402

from tests import peft_cases as cases  # noqa: E402
from tests.peft_reference import assert_rounded, exact  # noqa: E402

R = {"r": 4, "lora_alpha": 10}
QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def llama() -> Any:
    return cases.small_model("llama")


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(llama, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def first(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(**R, target_modules=["q_proj", "v_proj", "down_proj"])
    return cases.save_adapter(llama, config, tmp_path_factory.mktemp("adapter") / "first")


@pytest.fixture(scope="module")
def second(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
    return cases.save_adapter(llama, config, tmp_path_factory.mktemp("adapter") / "second", seed=5)


def _assert_sum(merged: cases.Tensors, base: Path, *adapters: tuple[Path, float]) -> None:
    stored = cases.tensors(base)
    ideal = exact(stored, *adapters)
    assert set(merged) == set(stored)
    for name, value in merged.items():
        if name in ideal:
            assert not torch.equal(value, stored[name]), name
            cases.assert_near(value, torch.from_numpy(ideal[name]), name)
        else:
            assert torch.equal(value, stored[name]), name


@pytest.mark.parametrize("weight", [0.25, -1.0, 1.5])
def test_a_weight_multiplies_the_change(weight: float, base: Path, first: Path, tmp_path: Path) -> None:
    merged = cases.merge(base, f"{first}@{weight}", out=tmp_path / "out", flags=("--verify",))
    _assert_sum(merged, base, (first, weight))


def test_a_weight_of_one_is_no_weight(base: Path, first: Path, tmp_path: Path) -> None:
    one = cases.merge(base, f"{first}@1", out=tmp_path / "one")
    none = cases.merge(base, first, out=tmp_path / "none")
    assert all(torch.equal(one[name], none[name]) for name in none)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (2.0, -0.5)])
def test_two_adapters_add_up(
    weights: tuple[float, float], base: Path, first: Path, second: Path, tmp_path: Path
) -> None:
    adapters = [f"{path}@{weight}" for path, weight in zip((first, second), weights, strict=True)]
    merged = cases.merge(base, *adapters, out=tmp_path / "out", flags=("--verify",))
    _assert_sum(merged, base, (first, weights[0]), (second, weights[1]))


def test_two_adapters_of_one_layer_are_rounded_once(llama: Any, first: Path, second: Path, tmp_path: Path) -> None:
    base = cases.save_base(cases.small_model("llama"), tmp_path / "base", torch.bfloat16)
    merged = cases.merge(base, f"{first}@0.5", second, f"{first}@0.25", out=tmp_path / "out")
    ideal = exact(cases.tensors(base), (first, 0.75), (second, 1.0))
    for name, value in ideal.items():
        assert_rounded(merged[name], value, name)


def test_the_order_of_two_does_not_matter(base: Path, first: Path, second: Path, tmp_path: Path) -> None:
    one = cases.merge(base, first, second, out=tmp_path / "one")
    other = cases.merge(base, second, first, out=tmp_path / "other")
    for name, value in one.items():
        cases.assert_near(other[name], value, name)


def test_two_are_what_peft_makes_of_both(llama: Any, base: Path, first: Path, second: Path, tmp_path: Path) -> None:
    with cases.quiet():
        model = peft.PeftModel.from_pretrained(cases.reloaded(base), first, adapter_name="a")
        model.load_adapter(second, adapter_name="b")
        model.base_model.merge_adapter(["a", "b"])
        expected = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in model.state_dict().items()
            if "lora_" not in name
        }
    merged = cases.merge(base, first, second, out=tmp_path / "out")
    cases.assert_same(merged, {name: expected[name] for name in merged}, cases.tensors(base))


@pytest.mark.parametrize("weight", [0.5, -0.5, 1.25])
def test_a_weight_of_dora_is_of_the_whole_change(weight: float, llama: Any, base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**R, target_modules=QV, use_dora=True)
    adapter = cases.save_adapter(llama, config, tmp_path / "adapter")
    merged = cases.merge(base, f"{adapter}@{weight}", out=tmp_path / "out", flags=("--verify",))
    _assert_sum(merged, base, (adapter, weight))


def test_dora_beside_a_lora_of_other_layers(llama: Any, base: Path, tmp_path: Path) -> None:
    dora = cases.save_adapter(llama, LoraConfig(**R, target_modules=["q_proj"], use_dora=True), tmp_path / "dora")
    lora = cases.save_adapter(llama, LoraConfig(**R, target_modules=["v_proj"]), tmp_path / "lora")
    merged = cases.merge(base, f"{dora}@0.5", f"{lora}@0.25", out=tmp_path / "out")
    _assert_sum(merged, base, (dora, 0.5), (lora, 0.25))


RIDING = {
    "modules_to_save": LoraConfig(**R, target_modules=QV, modules_to_save=["lm_head", "norm"]),
    "biases": LoraConfig(**R, target_modules=QV, bias="all"),
    "a bias on B": LoraConfig(**R, target_modules=QV, lora_bias=True),
    "token rows": LoraConfig(**R, target_modules=QV, trainable_token_indices=[40, 3, 17]),
    "an embedding": LoraConfig(**R, target_modules=["q_proj", "embed_tokens"]),
}


@pytest.mark.parametrize("config", RIDING.values(), ids=RIDING)
def test_a_weight_is_for_what_rides_along_too(config: Any, llama: Any, base: Path, tmp_path: Path) -> None:
    adapter = cases.save_adapter(llama, config, tmp_path / "adapter")
    merged = cases.merge(base, f"{adapter}@0.3", out=tmp_path / "out", flags=("--verify",))
    stored, full = cases.tensors(base), cases.merged_by_peft(base, adapter)
    changed = 0
    for name, before in stored.items():
        if torch.equal(full[name], before):
            assert torch.equal(merged[name], before), name
        else:
            changed += 1
            ideal = before.double() + 0.3 * (full[name].double() - before.double())
            cases.assert_near(merged[name], ideal, name, 4e-6)
            same = (full[name] == before).reshape(len(before), -1).all(1)
            assert torch.equal(merged[name][same], before[same]), f"{name}: rows that the adapter leaves alone"
    assert changed


@pytest.mark.parametrize("name", ["modules_to_save", "biases", "token rows"])
def test_two_replacements_of_one_tensor_are_refused(name: str, llama: Any, base: Path, tmp_path: Path) -> None:
    one = cases.save_adapter(llama, RIDING[name], tmp_path / "one")
    two = cases.save_adapter(llama, RIDING[name], tmp_path / "two", seed=9)
    outcome = cases.attempt(base, one, two, out=tmp_path / "out")
    assert outcome.code == 4
    culprit = {"modules_to_save": ("lm_head", "norm"), "biases": ("bias",), "token rows": ("embed_tokens",)}[name]
    assert any(word in outcome.error for word in culprit)
    assert not (tmp_path / "out").exists()


def test_a_replacement_in_one_and_a_delta_in_the_other(llama: Any, base: Path, first: Path, tmp_path: Path) -> None:
    saved = cases.save_adapter(llama, LoraConfig(**R, target_modules=QV, modules_to_save=["norm"]), tmp_path / "saved")
    others = cases.save_adapter(llama, LoraConfig(**R, target_modules=["up_proj"]), tmp_path / "others")
    merged = cases.merge(base, saved, others, out=tmp_path / "out")
    expected = cases.merged_by_peft(base, saved)
    deltas = cases.merged_by_peft(base, others)
    expected |= {name: value for name, value in deltas.items() if "up_proj" in name}
    cases.assert_same(merged, expected, cases.tensors(base))


def test_named_adapters_in_folders_of_their_own(llama: Any, base: Path, tmp_path: Path) -> None:
    with cases.quiet():
        model = peft.get_peft_model(cases.reloaded(base), LoraConfig(**R, target_modules=QV), adapter_name="one")
        model.add_adapter("two", LoraConfig(r=2, lora_alpha=2, target_modules=["up_proj"]))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        cases.train(model)
        model.save_pretrained(tmp_path / "saved")
    folders = sorted(path.name for path in (tmp_path / "saved").iterdir() if path.is_dir())
    assert folders == ["one", "two"]
    one, two = (tmp_path / "saved" / name for name in folders)
    _assert_sum(cases.merge(base, one, out=tmp_path / "a"), base, (one, 1.0))
    _assert_sum(cases.merge(base, f"{two}@0.5", one, out=tmp_path / "b"), base, (one, 1.0), (two, 0.5))
    outcome = cases.attempt(base, tmp_path / "saved", out=tmp_path / "c")
    assert outcome.code == 2, "which of the two is meant is not said"
    assert "one" in outcome.error and "two" in outcome.error
    assert not (tmp_path / "c").exists()


def test_a_folder_with_one_named_adapter(llama: Any, base: Path, tmp_path: Path) -> None:
    with cases.quiet():
        model = peft.get_peft_model(cases.reloaded(base), LoraConfig(**R, target_modules=QV), adapter_name="mine")
        cases.train(model).save_pretrained(tmp_path / "saved")
    merged = cases.merge(base, tmp_path / "saved", out=tmp_path / "out")
    _assert_sum(merged, base, (tmp_path / "saved" / "mine", 1.0))


def test_a_folder_with_an_at_sign_in_its_name(base: Path, first: Path, tmp_path: Path) -> None:
    odd = cases.copied(first, tmp_path / "run@home")
    outcome = cases.run("merge", base, "--adapter", odd, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    _assert_sum(cases.tensors(tmp_path / "out"), base, (first, 1.0))


def test_merging_in_two_steps_is_merging_at_once(base: Path, first: Path, second: Path, tmp_path: Path) -> None:
    cases.merge(base, first, out=tmp_path / "half")
    steps = cases.merge(tmp_path / "half", second, out=tmp_path / "steps")
    once = cases.merge(base, first, second, out=tmp_path / "once")
    for name, value in once.items():
        cases.assert_near(steps[name], value, name)


def test_a_weight_of_a_head_that_was_tied(tmp_path: Path) -> None:
    # The checkpoint holds no tensor for the head, but the model has one: the embedding is what the rest is taken from.
    tied = cases.small_model("llama", tie_word_embeddings=True)
    base = cases.save_base(tied, tmp_path / "base")
    config = LoraConfig(**R, target_modules=QV, modules_to_save=["lm_head"])
    adapter = cases.save_adapter(tied, config, tmp_path / "adapter")
    merged = cases.merge(base, f"{adapter}@0.5", out=tmp_path / "out")
    before = cases.tensors(base)["model.embed_tokens.weight"].double()
    head = cases.tensors(adapter)["base_model.model.lm_head.weight"].double()
    cases.assert_near(merged["lm_head.weight"], before + 0.5 * (head - before))
    assert torch.equal(merged["model.embed_tokens.weight"].double(), before)


TYING = {
    "rows of both": LoraConfig(**R, target_modules=QV, trainable_token_indices=[4, 9]),
    "both": LoraConfig(**R, target_modules=["embed_tokens"], ensure_weight_tying=True),
}
PARTING = {
    "the embedding": LoraConfig(**R, target_modules=["embed_tokens"]),
    "the head": LoraConfig(**R, target_modules=["lm_head"]),
    "a head of its own": LoraConfig(**R, target_modules=QV, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("parting", PARTING.values(), ids=PARTING)
@pytest.mark.parametrize("tying", TYING.values(), ids=TYING)
def test_what_one_adapter_keeps_tied_another_one_may_not_part(tying: Any, parting: Any, tmp_path: Path) -> None:
    # The first one changes the head through the embedding; once the two are apart, that change must not get lost.
    model = cases.small_model("llama", tie_word_embeddings=True)
    base = cases.save_base(model, tmp_path / "base")
    one = cases.save_adapter(model, tying, tmp_path / "one")
    two = cases.save_adapter(model, parting, tmp_path / "two", seed=4)
    outcome = cases.attempt(base, one, two, out=tmp_path / "out")
    assert outcome.code == 4
    assert "embed_tokens" in outcome.error or "lm_head" in outcome.error
    assert not (tmp_path / "out").exists()
