"""Several adapters on an embedding or a head: peft puts the base's own copy into each file, and that is no conflict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig  # noqa: E402

from tests import peft_cases as cases  # noqa: E402
from tests.command import run  # noqa: E402
from tests.peft_reference import exact  # noqa: E402

COPY = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.fixture(scope="module")
def llama() -> Any:
    return cases.small_model("llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(llama, tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def adapters(llama: Any, tmp_path: Path) -> tuple[Path, Path]:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["embed_tokens", "q_proj", "lm_head"])
    one, other = (cases.save_adapter(llama, config, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    assert COPY in cases.tensors(one)
    return one, other


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -0.25)])
def test_copies_of_the_base_are_not_two_wishes(
    weights: tuple[float, float], adapters: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    given = [f"{path}@{weight}" for path, weight in zip(adapters, weights, strict=True)]
    merged = cases.merge(base, *given, out=tmp_path / "out", flags=("--verify",))
    plain = [
        cases.edit_factors(cases.copied(path, tmp_path / f"plain{n}"), lambda found: {k: v for k, v in found.items() if "base_layer" not in k})
        for n, path in enumerate(adapters)
    ]  # fmt: skip
    ideal = exact(cases.tensors(base), *zip(plain, weights, strict=True))
    assert "model.embed_tokens.weight" in ideal
    for name, value in ideal.items():
        cases.assert_near(merged[name], torch.from_numpy(value), name)


def test_they_can_be_combined(adapters: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    cases.merge(base, *adapters, out=tmp_path / "out", flags=("--combine", "svd", "--verify"))


def test_a_copy_that_is_another_is_refused(adapters: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    cases.edit_factors(adapters[1], lambda found: found | {COPY: found[COPY] + 0.01})
    outcome = cases.attempt(base, *adapters, out=tmp_path / "out")
    assert outcome.code == 4
    assert "embed_tokens" in outcome.error and "not as the base has it" in outcome.error
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_unties_is_no_fine_tune_among_others(tmp_path: Path) -> None:
    tied = cases.small_model("llama", tie_word_embeddings=True)
    base = cases.save_base(tied, tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["lm_head"])
    adapter = cases.save_adapter(cases.reloaded(base), config, tmp_path / "adapter")
    outcome = run("interpolate", base, adapter, "-o", tmp_path / "out", "--method", "linear")
    assert outcome.code == 4
    assert "changes the model's configuration" in outcome.error and "tie_word_embeddings" in outcome.error
