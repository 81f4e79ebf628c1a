"""The judge of adapters beside a base: wrong merges, as other tools make them, are found; right ones of any tool pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.command import Outcome, run

RANK, ALPHA = 3, 12.0
SCALE = ALPHA / RANK
ROWS = [4, 1]
Tensors = dict[str, Any]


class Model:
    """A base with a DoRA layer, trained token rows, a saved head and an untouched leaf; a second, plain adapter."""

    def __init__(self, folder: Path, dtype: Any = np.float32) -> None:
        rng = np.random.default_rng(7)
        self.folder, self.base, self.adapter, self.plain = folder, folder / "base", folder / "dora", folder / "plain"
        self.dtype = np.dtype(dtype)
        self.before: Tensors = {
            "model.embed_tokens.weight": rng.normal(size=(8, 5)).astype(dtype),
            "model.layers.0.up_proj.weight": rng.normal(size=(6, 5)).astype(dtype),
            "model.norm.weight": np.ones(5, dtype),
            "score.weight": rng.normal(size=(2, 5)).astype(dtype),
        }
        stem = "base_model.model.model"
        self.factors: Tensors = {
            f"{stem}.layers.0.up_proj.lora_A.weight": rng.normal(size=(RANK, 5)).astype(np.float32),
            f"{stem}.layers.0.up_proj.lora_B.weight": rng.normal(size=(6, RANK)).astype(np.float32),
            f"{stem}.layers.0.up_proj.lora_magnitude_vector": rng.uniform(1, 3, size=6).astype(np.float32),
            f"{stem}.embed_tokens.token_adapter.trainable_tokens_delta": rng.normal(size=(2, 5)).astype(np.float32),
            "base_model.model.score.weight": rng.normal(size=(2, 5)).astype(np.float32),
        }
        self.more: Tensors = {
            f"{stem}.layers.0.up_proj.lora_A.weight": rng.normal(size=(2, 5)).astype(np.float32),
            f"{stem}.layers.0.up_proj.lora_B.weight": rng.normal(size=(6, 2)).astype(np.float32),
        }
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": ALPHA,
            "use_dora": True,
            "trainable_token_indices": ROWS,
        }
        save(self.base, self.before)
        (self.base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
        save(self.adapter, self.factors, "adapter_model", config)
        save(self.plain, self.more, "adapter_model", {"peft_type": "LORA", "r": 2, "lora_alpha": 5.0})

    def right(self, weight: float = 1.0, more: float = 0.0, **changes: Any) -> Tensors:
        """What a merge makes, in float64, each adapter from the unmerged base; `changes` are common mistakes."""
        w = self.before["model.layers.0.up_proj.weight"].astype(np.float64)
        a, b, m, rows, head = (values.astype(np.float64) for values in self.factors.values())
        delta = SCALE * b @ a
        norm = np.linalg.norm(w if changes.get("norm_of_the_base") else w + delta, axis=1)
        dora = w + delta if changes.get("no_magnitude") else (m / norm)[:, None] * (w + delta)
        a2, b2 = (values.astype(np.float64) for values in self.more.values())
        kernel = w + weight * (dora - w) + more * 2.5 * b2 @ a2
        if changes.get("weight_on_the_factors"):
            inner = w + weight * delta
            kernel = (m / np.linalg.norm(inner, axis=1))[:, None] * inner
        embedding = self.before["model.embed_tokens.weight"].astype(np.float64)
        order = sorted(ROWS) if changes.get("sorted_rows") else ROWS
        for number, row in enumerate(order):
            embedding[row] += weight * (rows[number] - embedding[row])
        old = self.before["score.weight"].astype(np.float64)
        score = old if changes.get("no_head") else old + weight * (head - old)
        wide = {**self.before, "model.layers.0.up_proj.weight": kernel, "model.embed_tokens.weight": embedding}
        return {name: self.stored(values) for name, values in {**wide, "score.weight": score}.items()}

    def stored(self, values: Any) -> Any:
        return values.astype(np.float32).astype(self.dtype)

    def verify(self, tensors: Tensors, *adapters: str, config: bool = True) -> Outcome:
        merged = self.folder / "merged"
        save(merged, tensors)
        if config:
            (merged / "config.json").write_bytes((self.base / "config.json").read_bytes())
        flags = [part for adapter in adapters or (str(self.adapter),) for part in ("--adapter", adapter)]
        return run("verify", merged, "--against", self.base, *flags, "--json")


def save(folder: Path, tensors: Tensors, name: str = "model", config: Any = None) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))


def failed(outcome: Outcome) -> set[str]:
    return {check["id"] for check in outcome.json["checks"] if check["status"] == "fail"}


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16, np.float16], ids=["float32", "bfloat16", "float16"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return Model(tmp_path, request.param)


def test_a_right_merge_by_others_passes(model: Model) -> None:
    outcome = model.verify(model.right())
    assert (outcome.code, failed(outcome)) == (0, set())
    found = {check["id"]: check for check in outcome.json["checks"]}
    assert found["replaced"]["figures"] == {"leaves": 2, "wrong": 0, "entries": 0}
    assert found["untouched-bits"]["figures"]["leaves"] == 1


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.7, 0.0), (-1.5, 0.0), (0.7, -0.4)])
def test_ours_passes_and_is_the_same(weights: tuple[float, float], model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapters = ["--adapter", f"{model.adapter}@{weights[0]}"]
    if weights[1]:
        adapters += ["--adapter", f"{model.plain}@{weights[1]}"]
    assert run("merge", model.base, *adapters, "-o", out, "--verify").code == 0
    merged = load_file(out / "model.safetensors")
    for name, values in model.right(*weights).items():
        assert merged[name].dtype == values.dtype
        one_step = 2.0 ** -{"float32": 20, "bfloat16": 7, "float16": 10}[values.dtype.name]
        np.testing.assert_allclose(merged[name].astype(np.float64), values.astype(np.float64), rtol=one_step, atol=1e-6)


@pytest.mark.parametrize(
    ("mistake", "checks"),
    [
        ("no_magnitude", {"fused-exact", "forward"}),
        ("norm_of_the_base", {"fused-exact", "forward"}),
        ("sorted_rows", {"replaced"}),
        ("no_head", {"replaced"}),
    ],
)
def test_a_mistake_is_found(mistake: str, checks: set[str], model: Model) -> None:
    outcome = model.verify(model.right(**{mistake: True}))
    assert (outcome.code, failed(outcome)) == (1, checks)


def test_weights_scale_the_whole_change(model: Model) -> None:
    adapters = (f"{model.adapter}@0.7", f"{model.plain}@-0.4")
    assert failed(model.verify(model.right(0.7, -0.4), *adapters)) == set()
    assert failed(model.verify(model.right(0.7, 0.4), *adapters)) == {"fused-exact", "forward"}
    assert failed(model.verify(model.right(1.0, -0.4), *adapters)) == {"fused-exact", "forward", "replaced"}
    wrong = model.right(0.7, weight_on_the_factors=True)
    assert failed(model.verify(wrong, f"{model.adapter}@0.7")) == {"fused-exact", "forward"}


ALTERATIONS: dict[str, tuple[Callable[[Tensors], Any], set[str]]] = {
    "one entry of the kernel": (
        lambda t: t["model.layers.0.up_proj.weight"].__setitem__((2, 3), 9),
        {"fused-exact", "forward"},
    ),
    "one trained row": (lambda t: t["model.embed_tokens.weight"].__setitem__((4, 0), 9), {"replaced"}),
    "one row that is not trained": (lambda t: t["model.embed_tokens.weight"].__setitem__((3, 0), 9), {"replaced"}),
    "an untouched leaf": (lambda t: t["model.norm.weight"].__setitem__(0, 9), {"untouched-bits"}),
    "a missing head": (lambda t: t.pop("score.weight"), {"structure"}),
    "a NaN in the head": (lambda t: t["score.weight"].__setitem__((0, 0), np.nan), {"finite", "replaced"}),
    "a factor left in": (lambda t: t.update({"x.lora_A.weight": np.ones(2, np.float32)}), {"adapters-stripped"}),
}


@pytest.mark.parametrize("alteration", ALTERATIONS.values(), ids=ALTERATIONS)
def test_an_alteration_is_found(alteration: tuple[Callable[[Tensors], Any], set[str]], tmp_path: Path) -> None:
    model = Model(tmp_path)
    tensors = {name: values.copy() for name, values in model.right().items()}
    alteration[0](tensors)
    outcome = model.verify(tensors)
    assert (outcome.code, failed(outcome)) == (1, alteration[1])


def test_a_configuration_that_ties_what_was_untied(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    embedding = rng.normal(size=(8, 4)).astype(np.float32)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4), (8, 2)))
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    save(base, {"model.embed_tokens.weight": embedding})
    (base / "config.json").write_text(json.dumps({"model_type": "gemma", "tie_word_embeddings": True}))
    stem = "base_model.model.lm_head"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    save(adapter, {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, "adapter_model", config)
    assert run("merge", base, "--adapter", adapter, "-o", out, "--verify").code == 0
    merged = load_file(out / "model.safetensors")
    np.testing.assert_allclose(merged["lm_head.weight"], embedding + 2 * b @ a, rtol=1e-5, atol=1e-6)
    assert merged["model.embed_tokens.weight"].tobytes() == embedding.tobytes()
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    outcome = run("verify", out, "--against", base, "--adapter", adapter, "--json")
    assert (outcome.code, failed(outcome)) == (1, {"assets"})


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"tie_word_embeddings": True}, "fail"),
        ({"vocab_size": 9}, "fail"),
        ({"torch_dtype": "bfloat16"}, "fail"),
        ({"rope_theta": 5.0}, "warn"),
        ({"transformers_version": "9"}, "pass"),
        ({"text_config": {"vocab_size": 7}}, "fail"),
    ],
)
def test_a_configuration_that_is_another(changes: dict[str, Any], status: str, tmp_path: Path) -> None:
    model = Model(tmp_path, ml_dtypes.bfloat16)
    config = {"tie_word_embeddings": False, "vocab_size": 8, "rope_theta": 1.0, "torch_dtype": "bfloat16"}
    config |= {"transformers_version": "5", "text_config": {"vocab_size": 8}}
    (model.base / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert run("merge", model.base, "--adapter", model.adapter, "-o", out, "--dtype", "float32", "--verify").code == 0
    merged = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(merged | changes))
    outcome = run("verify", out, "--against", model.base, "--adapter", model.adapter, "--json")
    found = {check["id"]: check["status"] for check in outcome.json["checks"]}
    assert found["assets"] == status
    (out / "config.json").unlink()
    outcome = run("verify", out, "--against", model.base, "--adapter", model.adapter, "--json")
    found = {check["id"]: check["status"] for check in outcome.json["checks"]}
    assert found["assets"] == "warn"
