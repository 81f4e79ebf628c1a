"""The judge of interpolations: right ones pass, by whomever they were made, and each wrong one is caught by the check that should.

Every result here is made by plain NumPy from the two sides, in float64 or by a float32 formula of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.dialects import ScaleOptions
from lora_merge_cli.errors import UsageError
from lora_merge_cli.formats import open_checkpoint
from lora_merge_cli.inputs import AdapterChoice
from lora_merge_cli.mixing import Mixing, Override, Schedule
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.report import VerifyReport
from lora_merge_cli.verification import ANY_DTYPE, Judging, VerifyRequest, verify
from lora_merge_cli.verification.claims import read_claims
from lora_merge_cli.verification.mixture import MixtureFinding, MixtureJudge
from tests.checkpoints import save_step
from tests.command import conforming
from tests.judged import LAYERS, LINEAR, VISION, Q
from tests.test_verify_beside import Model, Tensors, save
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, Flat, Tree, as_base, build, nest

FLOAT32 = np.dtype(np.float32)
SCALES = ScaleOptions({"paligemma": 12.0, "action_expert": 3.0})
ENCODER = ("PaliGemma", "img", "Transformer", "encoderblock", "MultiHeadDotProductAttention_0", "value", "kernel")
STATE, FROZEN = ("state_proj", "kernel"), (*LAYERS, "pre_ffw_norm", "scale")
UNMOVED = ("action_out_proj", "kernel")
SITES = {"fused-exact", "forward"}


def judged(merged: Path, against: Path, mixing: Mixing | None, *adapters: AdapterChoice, **others: Any) -> VerifyReport:
    """What the judge says; `others` are fields of the request or of its options."""
    fields = {key: others.pop(key) for key in ("base", "judging") if key in others}
    options = MergeOptions(**{"dtype": ANY_DTYPE, "scales": SCALES, "mixing": mixing} | others)
    return verify(VerifyRequest(merged, against, adapters, options=options, **fields))


def checks_of(report: VerifyReport) -> dict[str, str]:
    return {check.id: check.status for check in report.checks}


def failed(report: VerifyReport) -> set[str]:
    return {check.id for check in report.failed}


def message(report: VerifyReport, check: str) -> str:
    return next(found.message for found in report.checks if found.id == check)


def wide(values: Any) -> Any:
    return values.astype(np.float64)


def per_layer(alphas: Sequence[float], axes: int) -> Any:
    """The alphas, to multiply values by: one for all of them, or one per index of the first of so many axes."""
    return np.array(alphas[0]) if len(alphas) == 1 else np.reshape(alphas, (-1, *[1] * (axes - 1)))


def between(base: Any, tuned: Any, alphas: Sequence[float], dtype: Any, formula: str = "float64") -> Any:
    """What both sides make of a leaf, by one of several right formulas."""
    if np.array_equal(base.astype(tuned.dtype), tuned):
        return tuned.astype(dtype)
    alpha = per_layer(alphas, tuned.ndim)
    a, t = (values.astype(np.float64 if formula == "float64" else np.float32) for values in (base, tuned))
    part = alpha.astype(a.dtype)
    with np.errstate(invalid="ignore"):
        found = (1 - part) * a + part * t if formula == "weighted sum" else a + part * (t - a)
    found = np.where(a == t, tuned.astype(dtype), found.astype(dtype))
    return np.where(alpha == 0, base.astype(dtype), np.where(alpha == 1, tuned.astype(dtype), found))


# An OpenPI fine-tune with adapters inside, beside its base.


@dataclasses.dataclass
class Pair:
    """Both sides on disk, and room for results."""

    folder: Path
    tree: Tree
    base: Flat
    spellings: tuple[tuple[str, ...], tuple[str, ...]] = (("value",), ())

    def __post_init__(self) -> None:
        self.tuned_step = save_step(self.folder / "tuned" / "7", nest(self.tree.leaves, suffix=self.spellings[0]))
        self.base_step = save_step(self.folder / "base" / "0", nest(self.base, suffix=self.spellings[1]))
        self.count = 0

    def right(
        self,
        alphas: Callable[[tuple[str, ...]], Sequence[float]] | float,
        dtype: Any = FLOAT32,
        formula: str = "float64",
    ) -> Flat:
        """The right result; `alphas` says how far to go for each leaf."""
        leaves: Flat = {}
        for path, tuned in self.tree.expected.items():
            here = (alphas,) if isinstance(alphas, float) else alphas(path)
            if path in self.tree.changed:
                alpha, base = per_layer(here, tuned.ndim), self.base[path]
                with np.errstate(invalid="ignore"):
                    moved = wide(base) + alpha * (tuned - wide(self.tree.leaves[path]))
                leaves[path] = np.where(alpha == 0, base.astype(dtype), moved.astype(dtype))
            elif tuned.dtype == BFLOAT16:
                leaves[path] = tuned
            else:
                leaves[path] = between(self.base[path], tuned, here, tuned.dtype, formula)
        return leaves

    def save(self, leaves: Flat) -> Path:
        self.count += 1
        return save_step(self.folder / f"out{self.count}" / "7", nest(leaves, suffix=self.spellings[0]))

    def judged(self, leaves: Flat, mixing: Mixing | None, **others: Any) -> VerifyReport:
        return judged(self.save(leaves), self.tuned_step, mixing, base=self.base_step, **others)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One for all tests, which must not alter it."""
    return pair_of(tmp_path_factory.mktemp("pair"))


def pair_of(folder: Path, **others: Any) -> Pair:
    """A leaf did not move, and the base has a negative zero in a trained leaf and in a kernel under an adapter."""
    tree = build(PALIGEMMA, ACTION)
    tree.expected[Q].flat[3] -= wide(tree.leaves[Q]).flat[3]
    tree.leaves[Q].flat[3] = -0.0
    base = as_base(tree)
    base[UNMOVED] = tree.leaves[UNMOVED]
    base[STATE].flat[3] = -0.0
    return Pair(folder, tree, base, **others)


@pytest.mark.parametrize("spellings", [(("value",), ()), ((), ("value",))], ids=["value first", "value last"])
@pytest.mark.parametrize(
    ("alpha", "dtype", "formula"),
    [
        (0.0, FLOAT32, "float64"),
        (0.0, BFLOAT16, "float64"),
        (0.3, FLOAT32, "float64"),
        (0.3, FLOAT32, "step"),
        (0.3, FLOAT32, "weighted sum"),
        (0.3, BFLOAT16, "weighted sum"),
        (1.0, FLOAT32, "float64"),
        (1.4, FLOAT32, "weighted sum"),
        (-0.5, FLOAT32, "step"),
    ],
)
def test_a_right_result_passes(alpha: float, dtype: Any, formula: str, spellings: Any, tmp_path: Path) -> None:
    pair = pair_of(tmp_path, spellings=spellings)
    mixing = Mixing(alpha, extrapolate=True)
    report = pair.judged(pair.right(alpha, dtype, formula), mixing)
    assert failed(report) == set()
    conforming(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    found = {check.id: check for check in report.checks}
    trained = [path for path, values in pair.tree.expected.items() if values.dtype == FLOAT32]
    assert found["interpolated"].figures["leaves"] == len(trained)
    assert found["interpolated"].figures["moved"] == len(trained) - 1
    assert (found["base"].status, found["untouched-bits"].status) == ("pass", "pass")
    assert report.mixing is not None and report.mixing.alpha == alpha
    for site in report.sites:
        assert site.alphas == (alpha,)
        assert bool(site.survival) == bool(site.layers) == (alpha != 0)
    assert found["delta-survival"].status == ("skip" if alpha == 0 else "pass")


def test_the_figures_are_of_the_scaled_delta_beside_the_base(pair: Pair) -> None:
    report = pair.judged(pair.right(0.3), Mixing(0.3))
    site = next(found for found in report.sites if found.target.endswith("/".join((*Q, "value"))))
    delta = 0.3 * (pair.tree.expected[Q] - wide(pair.tree.leaves[Q]))
    assert site.max_abs == pytest.approx(np.abs(delta).max())
    assert site.relative_norm == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(wide(pair.base[Q])))
    singular = np.linalg.svd(delta / 0.3, compute_uv=False)
    expected = np.sqrt(np.mean(np.square(singular), axis=(0, 1)))[: PALIGEMMA.attention_rank]
    np.testing.assert_allclose(site.spectrum, expected, rtol=1e-6)


def scheduled(path: tuple[str, ...]) -> Sequence[float]:
    """``--alpha 0.6 --alpha-for 'PaliGemma/img/pos*=0' --alpha-for 'action_*/**=1' --alpha-schedule layer=0:0.8``"""
    if path == VISION:
        return (0.0,)
    if path[0].startswith("action_"):
        return (1.0,)
    if path[:3] == LAYERS:
        return (0.0, 0.4, 0.8)
    return (0.0, 0.8) if "encoderblock" in path else (0.6,)


SCHEDULED = Mixing(0.6, (Override("PaliGemma/img/pos*", 0.0), Override("action_*/**", 1.0)), Schedule(0.0, 0.8))


def test_overrides_and_a_schedule_are_judged(pair: Pair) -> None:
    right = pair.right(scheduled)
    report = pair.judged(right, SCHEDULED)
    assert failed(report) == set()
    conforming(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert {site.alphas for site in report.sites} == {(0.0, 0.4, 0.8)}
    # Layer 0 has no delta, and so no figures.
    assert {tuple(layer.layer for layer in site.layers) for site in report.sites} == {(1, 2)}
    assert failed(pair.judged(right, SCHEDULED, judging=Judging(sample=1))) == set()
    for mixing in (
        dataclasses.replace(SCHEDULED, schedule=None),
        dataclasses.replace(SCHEDULED, schedule=Schedule(0.8, 0.0)),
    ):
        assert failed(pair.judged(right, mixing)) == {"interpolated", *SITES}
    assert failed(pair.judged(right, dataclasses.replace(SCHEDULED, overrides=()))) == {"interpolated"}


def test_adapters_at_alpha_0_are_not_missed(pair: Pair) -> None:
    mlp = (*LAYERS, "mlp")
    right = pair.right(lambda path: (0.0,) if path[: len(mlp)] == mlp else (0.3,))
    report = pair.judged(right, Mixing(0.3, (Override("PaliGemma/llm/layers/mlp/**", 0.0),)))
    assert failed(report) == set()
    assert checks_of(report)["delta-survival"] == checks_of(report)["forward"] == "pass"
    assert {site.alphas for site in report.sites if not site.survival} == {(0.0,)}
    assert sum(not site.survival for site in report.sites) == 2


def test_a_layer_at_another_alpha_is_named(pair: Pair) -> None:
    right = pair.right(scheduled)
    kernel = right[Q].copy()
    kernel[1] = pair.right(0.7)[Q][1]
    report = pair.judged(right | {Q: kernel}, SCHEDULED)
    assert failed(report) == SITES
    assert "as if alpha were 0.70, not 0.4" in message(report, "fused-exact")
    encoder = right[ENCODER].copy()
    encoder[1] = pair.right(0.5)[ENCODER][1]
    report = pair.judged(right | {ENCODER: encoder}, SCHEDULED)
    assert failed(report) == {"interpolated"}
    assert "layer 1: as if alpha were 0.50, not 0.8" in message(report, "interpolated")
    # The first layer is the base's at alpha 0: any delta is too much.
    kernel = right[Q].copy()
    kernel[0] = pair.right(0.3)[Q][0]
    report = pair.judged(right | {Q: kernel}, SCHEDULED)
    assert failed(report) == {"fused-exact"}
    assert "at alpha 0" in message(report, "fused-exact")


Corruption = Callable[[Flat, Pair], None]


def entirely_at(alpha: float) -> Corruption:
    return lambda leaves, pair: leaves.update(pair.right(alpha))


def replaced_by(path: tuple[str, ...], make: Callable[[Flat, Pair], Any]) -> Corruption:
    return lambda leaves, pair: leaves.update({path: make(leaves, pair)})


def altered(path: tuple[str, ...], value: float) -> Corruption:
    def corrupt(leaves: Flat, pair: Pair) -> None:
        leaves[path] = leaves[path].copy()
        leaves[path].flat[5] = value

    return corrupt


def one_ulp_off(leaves: Flat, pair: Pair) -> None:
    leaves[UNMOVED] = leaves[UNMOVED].copy()
    leaves[UNMOVED].view(np.uint32)[2, 3] += 1


def missing_leaf(leaves: Flat, pair: Pair) -> None:
    del leaves[STATE]


def recomputed(leaves: Flat, pair: Pair) -> Any:
    alpha, values = np.float32(0.3), leaves[UNMOVED]
    found = (1 - alpha) * values + alpha * values
    assert not np.array_equal(found, values), "the formula happens to round back"
    return found


def layer_swapped(leaves: Flat, pair: Pair) -> Any:
    return leaves[Q][[0, 2, 1]]


def one_layer_at_another_alpha(leaves: Flat, pair: Pair) -> Any:
    return np.stack([pair.right(0.8)[ENCODER][0], leaves[ENCODER][1]])


def added_to_the_rounded_kernel(leaves: Flat, pair: Pair) -> Any:
    kernel = wide(pair.tree.leaves[LINEAR])
    return (kernel + 0.3 * (pair.tree.expected[LINEAR] - kernel)).astype(np.float32)


CORRUPTIONS: dict[str, tuple[Corruption, set[str], str]] = {
    "another alpha": (entirely_at(0.4), {"interpolated", *SITES}, "as if alpha were 0.40, not 0.3"),
    "alpha swapped": (entirely_at(0.7), {"interpolated", *SITES}, "as if alpha were 0.70, not 0.3"),
    "the merge": (entirely_at(1.0), {"interpolated", *SITES}, "as if alpha were 1.00, not 0.3"),
    "the base": (entirely_at(0.0), {"interpolated", *SITES}, "as if alpha were 0.00, not 0.3"),
    "a kernel of the base": (replaced_by(Q, lambda _, pair: pair.base[Q]), SITES, "the adapter is missing"),
    "a delta on the rounded kernel": (replaced_by(LINEAR, added_to_the_rounded_kernel), SITES, "the rest is off"),
    "two layers swapped": (replaced_by(Q, layer_swapped), SITES, "another delta"),
    "a leaf of the base": (replaced_by(STATE, lambda _, pair: pair.base[STATE]), {"interpolated"}, "0.00, not 0.3"),
    "a leaf of the fine-tune": (
        replaced_by(STATE, lambda _, pair: pair.tree.leaves[STATE]),
        {"interpolated"},
        "1.00, not 0.3",
    ),
    "one layer at another alpha": (
        replaced_by(ENCODER, one_layer_at_another_alpha),
        {"interpolated"},
        "no alpha makes",
    ),
    "an unmoved leaf, recomputed": (replaced_by(UNMOVED, recomputed), {"interpolated"}, "did not move"),
    "one ulp of an unmoved leaf": (one_ulp_off, {"interpolated"}, "1 entries; the fine-tune did not move it"),
    "one entry": (altered(STATE, 0.5), {"interpolated"}, "1 entries"),
    "NaN in an entry": (altered(STATE, np.nan), {"interpolated", "finite"}, "NaN"),
    "NaN in a kernel": (altered(Q, np.nan), {*SITES, "finite"}, "not finite"),
    "a frozen leaf": (altered(FROZEN, 0.5), {"untouched-bits"}, "1 of"),
    "a missing leaf": (missing_leaf, {"structure"}, "1 missing"),
    "a leaf too many": (lambda leaves, _: leaves.update({("x",): np.ones(2, np.float32)}), {"structure"}, "1 not in"),
    "a leaf narrowed": (
        replaced_by(STATE, lambda leaves, _: leaves[STATE].astype(BFLOAT16)),
        {"structure"},
        "bfloat16, not float32",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_wrong_result_is_caught(name: str, pair: Pair) -> None:
    corrupt, expected, words = CORRUPTIONS[name]
    leaves = pair.right(0.3)
    corrupt(leaves, pair)
    report = pair.judged(leaves, Mixing(0.3))
    assert failed(report) == expected
    assert any(words in message(report, check) for check in expected)


def test_an_endpoint_is_selected_and_not_computed(pair: Pair) -> None:
    """0 * (T - A) is no harm but to the sign of a zero, and A + 1 * (T - A) is not T."""
    right = pair.right(0.0)
    assert failed(pair.judged(right, Mixing(0.0))) == set()
    for path, check in ((STATE, "interpolated"), (Q, "fused-exact")):
        report = pair.judged(right | {path: right[path] + np.float32(0)}, Mixing(0.0))
        assert failed(report) == {check}
        assert "bit for bit" in message(report, check)
    right, base = pair.right(1.0), pair.base[ENCODER]
    computed = base + np.float32(1) * (right[ENCODER] - base)
    assert not np.array_equal(computed, right[ENCODER])
    report = pair.judged(right | {ENCODER: computed}, Mixing(1.0))
    assert failed(report) == {"interpolated"}
    assert "at alpha 1 it must be that side's, bit for bit" in message(report, "interpolated")


def test_entries_that_both_sides_share_are_kept(tmp_path: Path) -> None:
    """One entry of a leaf that moved elsewhere."""
    pair = pair_of(tmp_path / "before")
    pair.base[STATE].flat[7] = pair.tree.leaves[STATE].flat[7] = np.float32(0.1)
    pair = Pair(tmp_path, pair.tree, pair.base)
    leaves = pair.right(0.3)
    assert failed(pair.judged(leaves, Mixing(0.3))) == set()
    leaves[STATE] = leaves[STATE].copy()
    leaves[STATE].reshape(-1).view(np.uint32)[7] += 1
    report = pair.judged(leaves, Mixing(0.3))
    assert failed(report) == {"interpolated"} and "1 entries" in message(report, "interpolated")


def test_another_base_is_found(pair: Pair) -> None:
    leaves = pair.right(0.3)
    other = Pair(pair.folder / "other", pair.tree, pair.base | {Q: pair.base[Q] * np.float32(1.02)})
    report = other.judged(leaves, Mixing(0.3))
    assert failed(report) == {"base", *SITES}


def test_infinity_survives_where_it_is_selected(tmp_path: Path) -> None:
    pair = pair_of(tmp_path / "finite")
    pair.base[STATE].flat[0] = np.inf
    pair.base[Q].flat[0] = np.inf
    pair.tree.leaves[Q].flat[0] = np.inf
    pair = Pair(tmp_path, pair.tree, pair.base)
    report = pair.judged(pair.right(0.0), Mixing(0.0))
    assert failed(report) == set() and checks_of(report)["finite"] == "warn"
    leaves = pair.right(0.0) | {STATE: pair.right(1.0)[STATE]}
    assert "interpolated" in failed(pair.judged(leaves, Mixing(0.0)))


def test_a_merge_is_judged_as_ever_and_an_interpolation_is_none(pair: Pair) -> None:
    leaves = pair.right(1.0)
    report = pair.judged(leaves, None)
    assert failed(report) == set() and checks_of(report)["interpolated"] == "skip"
    assert report.mixing is None
    report = pair.judged(pair.right(0.3), None)
    assert failed(report) == {"untouched-bits", *SITES}


def test_deltas_alone_are_scaled_without_a_base(pair: Pair) -> None:
    mixing = Mixing(0.3, deltas_only=True)
    leaves = {
        path: (wide(pair.tree.leaves[path]) + 0.3 * (values - wide(pair.tree.leaves[path]))).astype(np.float32)
        if path in pair.tree.changed
        else values
        for path, values in pair.tree.expected.items()
    }
    report = judged(pair.save(leaves), pair.tuned_step, mixing)
    assert failed(report) == set()
    assert checks_of(report)["interpolated"] == "skip"
    assert any("the fine-tune's own at every alpha" in note for note in report.notes)
    report = judged(pair.save(leaves | {Q: pair.right(1.0)[Q]}), pair.tuned_step, mixing)
    assert failed(report) == SITES
    report = judged(pair.save(leaves | {STATE: pair.base[STATE]}), pair.tuned_step, mixing)
    assert failed(report) == {"untouched-bits"}


def test_an_override_that_matches_nothing_is_an_error(pair: Pair) -> None:
    with pytest.raises(UsageError, match="matches no leaf"):
        pair.judged(pair.right(0.3), Mixing(0.3, (Override("nowhere/**", 0.0),)))


# Provenance.


def mixing_document(alpha: float = 0.3, **others: Any) -> dict[str, Any]:
    empty = {"overrides": [], "schedule": None, "only_common": None, "deltas_only": False}
    return {"alpha": alpha} | empty | others


@pytest.fixture
def result(pair: Pair) -> Path:
    """A right result at 0.3, with its provenance."""
    result = pair.save(pair.right(0.3))
    known = judged(result, pair.tuned_step, Mixing(0.3), base=pair.base_step).to_dict()
    document = {key: known[key] for key in ("multiplier", "sources", "sites")}
    document |= {"command": "interpolate", "mixing": mixing_document()}
    (result / "lora_merge.json").write_text(json.dumps(document))
    return result


def rewritten(result: Path, **changes: Any) -> None:
    file = result / "lora_merge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_alphas(result: Path, alphas: Any) -> list[Any]:
    """The sites of a provenance, which are said to have other alphas."""
    return [site | {"alphas": alphas} for site in json.loads((result / "lora_merge.json").read_text())["sites"]]


def test_right_provenance_passes(result: Path, pair: Pair) -> None:
    report = judged(result, pair.tuned_step, Mixing(0.3), base=pair.base_step)
    assert failed(report) == set() and checks_of(report)["provenance"] == "pass"
    report = judged(result, pair.tuned_step, None, base=pair.base_step)
    assert "is an interpolation: pass --alpha 0.3" in message(report, "provenance")


WRONG_CLAIMS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "alpha": (lambda _: {"mixing": mixing_document(0.5)}, "says --alpha 0.5, and this judges 0.3"),
    "alpha-for": (
        lambda _: {"mixing": mixing_document(overrides=[{"glob": "x/**", "alpha": 0}])},
        "says --alpha-for x/**=0.0, and this judges none",
    ),
    "alpha-schedule": (lambda _: {"mixing": mixing_document(schedule=[0, 1])}, "--alpha-schedule layer=0.0:1.0"),
    "only-common": (lambda _: {"mixing": mixing_document(only_common="base")}, "says --only-common base"),
    "alphas of sites": (lambda result: {"sites": with_alphas(result, [0.4])}, "says other alphas"),
    "a merge": (lambda _: {"command": "merge"}, "is of a merge, and --alpha is given"),
}


@pytest.mark.parametrize("name", WRONG_CLAIMS)
def test_provenance_that_disagrees_fails(name: str, result: Path, pair: Pair) -> None:
    change, words = WRONG_CLAIMS[name]
    rewritten(result, **change(result))
    report = judged(result, pair.tuned_step, Mixing(0.3), base=pair.base_step)
    assert failed(report) == {"provenance"}
    assert words in message(report, "provenance")


HOSTILE: list[Any] = [
    None,
    [],
    "0.3",
    {},
    mixing_document(schedule=[1]),
    mixing_document(schedule=3),
    mixing_document(overrides=[{}]),
    mixing_document(overrides=None),
    mixing_document() | {"alpha": "0.3"},
    mixing_document() | {"alpha": float("nan")},
]


def test_hostile_provenance_fails_and_is_no_error(result: Path, pair: Pair) -> None:
    for mixing in HOSTILE:
        rewritten(result, mixing=mixing)
        claims = read_claims(open_checkpoint(result))
        assert claims is not None and claims.problem is not None, mixing
    assert failed(judged(result, pair.tuned_step, Mixing(0.3), base=pair.base_step)) == {"provenance"}
    for alphas in (3, None, {}, ["x"]):
        rewritten(result, mixing=mixing_document(), sites=with_alphas(result, alphas))
        report = judged(result, pair.tuned_step, Mixing(0.3), base=pair.base_step)
        assert failed(report) == {"provenance"}, alphas


# A dense pair.


@dataclasses.dataclass
class Dense:
    """Two dense checkpoints of one model as safetensors, a leaf of which did not move."""

    folder: Path
    dtypes: tuple[Any, Any] = (BFLOAT16, BFLOAT16)
    """The base's, and the fine-tune's."""

    def __post_init__(self) -> None:
        rng = np.random.default_rng(11)
        shapes = {
            "model.embed_tokens.weight": (8, 5),
            "model.layers.0.up_proj.weight": (6, 5),
            "model.layers.1.up_proj.weight": (6, 5),
            "model.norm.weight": (5,),
        }
        wide_base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        self.a: Tensors = {name: values.astype(self.dtypes[0]) for name, values in wide_base.items()}
        self.t: Tensors = {
            name: (wide(values) + 0.2 * rng.normal(size=values.shape)).astype(self.dtypes[1])
            for name, values in self.a.items()
        }
        self.t["model.norm.weight"] = self.a["model.norm.weight"].astype(self.dtypes[1])

    def judged(self, tensors: Tensors, mixing: Mixing, config_dtype: str = "float32", **others: Any) -> VerifyReport:
        config = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": config_dtype}
        for name, values in (("base", self.a), ("tuned", self.t), ("out", tensors)):
            save(self.folder / name, values)
            (self.folder / name / "config.json").write_text(json.dumps(config))
        return judged(self.folder / "out", self.folder / "tuned", mixing, base=self.folder / "base", **others)

    def right(self, alpha: float, dtype: Any, formula: str = "float64") -> Tensors:
        return {name: between(self.a[name], self.t[name], (alpha,), dtype, formula) for name in self.a}


DENSE = [(BFLOAT16, BFLOAT16), (FLOAT32, BFLOAT16), (np.dtype(np.float16), FLOAT32)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtypes", DENSE, ids=str)
def test_right_dense_results_pass_and_wrong_ones_do_not(dtypes: tuple[Any, Any], alpha: float, tmp_path: Path) -> None:
    dense = Dense(tmp_path, dtypes)
    for dtype in {dtypes[1], FLOAT32}:
        for formula in ("float64", "step", "weighted sum"):
            report = dense.judged(dense.right(alpha, dtype, formula), Mixing(alpha))
            assert failed(report) == set()
            found = next(check for check in report.checks if check.id == "interpolated")
            assert (found.figures["leaves"], found.figures["moved"]) == (4, 3)
            assert checks_of(report)["base"] == "skip"
    for other in {0.0, 0.3, 0.7, 1.0} - {alpha}:
        report = dense.judged(dense.right(other, dtypes[1]), Mixing(alpha))
        assert failed(report) == {"interpolated"}
        assert f"as if alpha were {other:.2f}, not {alpha:g}" in message(report, "interpolated")


def test_a_leaf_that_is_the_base_rounded_did_not_move(tmp_path: Path) -> None:
    dense = Dense(tmp_path, (FLOAT32, BFLOAT16))
    norm = "model.norm.weight"
    right = dense.right(0.3, FLOAT32)
    assert failed(dense.judged(right, Mixing(0.3))) == set()
    a, t = wide(dense.a[norm]), wide(dense.t[norm])
    report = dense.judged(right | {norm: (a + 0.3 * (t - a)).astype(np.float32)}, Mixing(0.3))
    assert failed(report) == {"interpolated"} and "did not move" in message(report, "interpolated")
    # At alpha 0 either side's bits will do, and nothing else.
    right = dense.right(0.0, FLOAT32)
    assert failed(dense.judged(right | {norm: dense.a[norm]}, Mixing(0.0))) == set()
    assert failed(dense.judged(right | {norm: np.nextafter(dense.a[norm], 9)}, Mixing(0.0))) == {"interpolated"}


def test_what_the_dtype_flag_and_the_configuration_ask_for(tmp_path: Path) -> None:
    dense = Dense(tmp_path)
    stored = dense.right(0.3, FLOAT32)
    assert failed(dense.judged(stored, Mixing(0.3), dtype="float32")) == set()
    assert failed(dense.judged(stored, Mixing(0.3), dtype="auto")) == {"structure"}
    assert failed(dense.judged(stored, Mixing(0.3), config_dtype="bfloat16")) == {"assets"}


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_leaves_of_one_side_alone(side: Any, tmp_path: Path) -> None:
    dense = Dense(tmp_path)
    rng = np.random.default_rng(5)
    head, extra, embedding = (rng.normal(size=shape).astype(BFLOAT16) for shape in ((3, 5), (2, 5), (9, 5)))
    right = dense.right(0.3, BFLOAT16)
    embed = "model.embed_tokens.weight"
    dense.t |= {"score.weight": head, embed: embedding}
    dense.a |= {"extra.weight": extra}
    mixing = Mixing(0.3, only_common=side)
    right |= (
        {"score.weight": head, embed: embedding} if side == "tuned" else {"extra.weight": extra, embed: dense.a[embed]}
    )
    assert failed(dense.judged(right, mixing)) == set()
    if side == "tuned":
        assert failed(dense.judged(right | {"score.weight": extra[[0, 0, 0]]}, mixing)) == {"untouched-bits"}
        assert failed(dense.judged(right | {"extra.weight": extra}, mixing)) == {"structure"}
    else:
        report = dense.judged(right | {"extra.weight": -extra}, mixing)
        assert failed(report) == {"interpolated"} and "only the base has it" in message(report, "interpolated")
        assert failed(dense.judged(right | {embed: embedding}, mixing)) == {"structure"}


def test_integers_cannot_be_mixed(tmp_path: Path) -> None:
    dense = Dense(tmp_path)
    for tensors in (dense.a, dense.t):
        tensors["ids"] = np.arange(4)
    same = dense.a["ids"]
    right = dense.right(0.3, BFLOAT16) | {"ids": same}
    assert failed(dense.judged(right, Mixing(0.3))) == set()
    assert failed(dense.judged(right | {"ids": same + 1}, Mixing(0.3))) == {"interpolated"}
    other = dense.t["ids"] = np.array([0, 1, 2, 9])
    for alpha, values, expected in (
        (0.3, same, {"interpolated"}),
        (0.3, other, {"interpolated"}),
        (0.0, same, set()),
        (0.0, other, {"interpolated"}),
        (1.0, other, set()),
        (1.0, same, {"interpolated"}),
    ):
        assert failed(dense.judged(dense.right(alpha, BFLOAT16) | {"ids": values}, Mixing(alpha))) == expected


def test_entries_that_are_not_finite(tmp_path: Path) -> None:
    dense = Dense(tmp_path)
    name = "model.layers.0.up_proj.weight"
    for entry, (before, after) in enumerate([(np.inf, np.inf), (np.nan, np.nan), (-0.0, 0.0), (0.0, -0.0)]):
        dense.a[name].flat[entry], dense.t[name].flat[entry] = before, after
    right = dense.right(0.3, BFLOAT16)
    right[name].reshape(-1)[:4] = dense.t[name].reshape(-1)[:4]
    report = dense.judged(right, Mixing(0.3))
    assert failed(report) == set() and checks_of(report)["finite"] == "warn"
    for entry, value in ((0, -np.inf), (0, 1.0), (1, 1.0), (2, -0.0), (3, 0.0), (5, np.nan), (5, np.inf)):
        wrong = right[name].copy()
        wrong.flat[entry] = value
        assert "interpolated" in failed(dense.judged(right | {name: wrong}, Mixing(0.3))), (entry, value)
    # Of one side alone, no result is right between the two.
    dense.t[name].flat[7] = np.inf
    for value in (np.inf, np.nan, 1.0):
        wrong = right[name].copy()
        wrong.flat[7] = value
        assert "interpolated" in failed(dense.judged(right | {name: wrong}, Mixing(0.3)))
    assert failed(dense.judged(dense.right(1.0, BFLOAT16), Mixing(1.0))) == set()


# Adapters beside a base.


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return Model(tmp_path, request.param)


def beside(model: Model, tensors: Tensors, mixing: Mixing | None, *adapters: AdapterChoice) -> VerifyReport:
    merged = model.folder / "merged"
    save(merged, tensors)
    (merged / "config.json").write_bytes((model.base / "config.json").read_bytes())
    return judged(merged, model.base, mixing, *(adapters or (AdapterChoice(model.adapter),)), scales=ScaleOptions())


KERNEL, HEAD, EMBEDDING = "model.layers.0.up_proj.weight", "score.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_an_adapter_part_of_the_way(alpha: float, model: Model) -> None:
    """DoRA, trained token rows and a saved head, each in weight space."""
    right = model.right(alpha)
    report = beside(model, right, Mixing(alpha))
    assert failed(report) == set()
    found = next(check for check in report.checks if check.id == "interpolated")
    assert found.figures["leaves"] == 2
    for other in {0.0, 0.3, 0.7, 1.0} - {alpha}:
        report = beside(model, model.right(other), Mixing(alpha))
        assert failed(report) == ({"interpolated", "fused-exact"} if alpha == 0 else {"interpolated", *SITES})
        assert f"as if alpha were {other:.2f}, not {alpha:g}" in message(report, "interpolated")
    for mistake, name in (("no_head", HEAD), ("sorted_rows", EMBEDDING)):
        wrong = model.right(alpha, **{mistake: True})
        expected = set() if alpha == 0 else {"interpolated"}
        assert failed(beside(model, right | {name: wrong[name]}, Mixing(alpha))) == expected


def test_an_untrained_row_must_be_the_bases_own(model: Model) -> None:
    right = model.right(0.3)
    wrong = right[EMBEDDING].copy()
    bits = wrong.view(f"u{wrong.dtype.itemsize}")
    bits[3, 1] += 1
    report = beside(model, right | {EMBEDDING: wrong}, Mixing(0.3))
    assert failed(report) == {"interpolated"} and "1 entries" in message(report, "interpolated")


def test_alpha_multiplies_weights(model: Model) -> None:
    adapters = (AdapterChoice(model.adapter, 0.7), AdapterChoice(model.plain, -0.4))
    assert failed(beside(model, model.right(0.7, -0.4), Mixing(1.0), *adapters)) == set()
    right = model.right(0.35, -0.2)
    assert failed(beside(model, right, Mixing(0.5), *adapters)) == set()
    assert failed(beside(model, right, Mixing(0.6), *adapters)) == {"interpolated", *SITES}
    mixing = Mixing(0.5, (Override("score", 0.0),))
    assert failed(beside(model, right, mixing, *adapters)) == {"interpolated"}
    assert failed(beside(model, right | {HEAD: model.before[HEAD]}, mixing, *adapters)) == set()


def test_a_schedule_goes_by_the_number_of_the_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    names = [f"model.layers.{layer}.up_proj" for layer in range(3)]
    base = {f"{name}.weight": rng.normal(size=(6, 5)).astype(np.float32) for name in names}
    factors: Tensors = {}
    right: Tensors = {}
    for name, alpha in zip(names, (0.2, 0.5, 0.8), strict=True):
        a, b = rng.normal(size=(2, 5)), rng.normal(size=(6, 2))
        factors |= {
            f"base_model.model.{name}.lora_{role}.weight": x.astype(np.float32)
            for role, x in zip("AB", (a, b), strict=True)
        }
        a, b = (wide(values.astype(np.float32)) for values in (a, b))
        right[f"{name}.weight"] = (wide(base[f"{name}.weight"]) + alpha * 2 * b @ a).astype(np.float32)
    save(tmp_path / "base", base)
    save(tmp_path / "adapter", factors, "adapter_model", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    for tensors, schedule, expected in (
        (right, Schedule(0.2, 0.8), set()),
        (right, Schedule(0.8, 0.2), SITES),
        (right | {f"{names[1]}.weight": base[f"{names[1]}.weight"]}, Schedule(0.2, 0.8), SITES),
    ):
        save(tmp_path / "out", tensors)
        adapter = AdapterChoice(tmp_path / "adapter")
        report = judged(
            tmp_path / "out", tmp_path / "base", Mixing(0.4, schedule=schedule), adapter, scales=ScaleOptions()
        )
        assert failed(report) == expected
        assert [site.alphas for site in report.sites] == [(schedule.at(layer, 3),) for layer in range(3)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_kernel_that_one_adapter_replaces_and_another_changes(alpha: float, model: Model) -> None:
    rng = np.random.default_rng(8)
    brought = rng.normal(size=(6, 5)).astype(np.float32)
    folder = model.folder / "bringing"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5.0, "modules_to_save": ["up_proj"]}
    save(folder, {"base_model.model.model.layers.0.up_proj.weight": brought}, "adapter_model", config)
    adapters = (AdapterChoice(folder), AdapterChoice(model.plain))
    a, b = (wide(values) for values in model.more.values())
    before = wide(model.before[KERNEL])

    def made(part: float) -> Any:
        if part == 0:
            return model.before[KERNEL]
        return model.stored(before + part * (wide(brought) - before) + part * 2.5 * b @ a)

    right = model.before | {KERNEL: made(alpha)}
    assert failed(beside(model, right, Mixing(alpha), *adapters)) == set()
    expected = {"fused-exact"} if alpha == 0 else SITES
    for other in {0.0, 0.3, 0.7, 1.0} - {alpha}:
        assert failed(beside(model, right | {KERNEL: made(other)}, Mixing(alpha), *adapters)) == expected
    only_replaced = model.stored(before + alpha * (wide(brought) - before))
    if alpha:
        assert failed(beside(model, right | {KERNEL: only_replaced}, Mixing(alpha), *adapters)) == SITES


def test_a_mixture_under_an_adapter_may_be_off_by_what_it_is_summed_of(tmp_path: Path) -> None:
    """Where both sides cancel, the float32 sum is off by far more than a rounding of what is left."""
    model = Model(tmp_path)
    model.more = {name: values * np.float32(1e-4) for name, values in model.more.items()}
    save(model.plain, model.more, "adapter_model", {"peft_type": "LORA", "r": 2, "lora_alpha": 5.0})
    before, alpha = model.before[KERNEL], np.float32(0.3)
    brought = (wide(before) * (1 - 1 / 0.3)).astype(np.float32)
    key = "base_model.model.model.layers.0.up_proj.weight"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5.0, "modules_to_save": ["up_proj"]}
    save(tmp_path / "bringing", {key: brought}, "adapter_model", config)
    adapters = (AdapterChoice(tmp_path / "bringing"), AdapterChoice(model.plain))
    a, b = model.more.values()
    delta = alpha * np.float32(2.5) * b @ a
    for kernel in (before + alpha * (brought - before), (1 - alpha) * before + alpha * brought):
        assert failed(beside(model, model.before | {KERNEL: kernel + delta}, Mixing(0.3), *adapters)) == set()
    wrong = model.before | {KERNEL: kernel + delta + np.float32(1e-4) * before}
    assert failed(beside(model, wrong, Mixing(0.3), *adapters)) == SITES


# The bound of an entry.


def mixture(tuned: Any, base: Any, merged: Any, alphas: tuple[float, ...], weight: float = 0.0) -> MixtureFinding:
    judge = MixtureJudge(alphas, merged.dtype, 0.5, weight)
    with ThreadPoolExecutor(1) as pool:
        for layer in range(len(alphas)):
            parts = (tuned, base, merged) if len(alphas) == 1 else (tuned[layer], base[layer], merged[layer])
            judge.take(layer, *parts, pool)
    return judge.finish()


DTYPES = (FLOAT32, BFLOAT16, np.dtype(np.float16))
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
alphas_between = st.floats(1e-6, 1 - 1e-6)


@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20),
    st.one_of(alphas_between, st.floats(1.001, 20), st.floats(-20, -1e-6)),
    st.sampled_from(DTYPES),
    st.sampled_from(["step", "weighted sum"]),
    st.booleans(),
)
def test_a_float32_formula_stays_within_its_bound(
    sides: list[tuple[float, float]], alpha: float, dtype: np.dtype, formula: str, separate: bool
) -> None:
    a, t = np.array(sides, np.float32).T
    part = np.float32(alpha)
    rest = np.float32(1 - alpha) if separate else np.float32(1) - part
    with np.errstate(all="ignore"):
        found = rest * a + part * t if formula == "weighted sum" else a + part * (t - a)
        # What overflows is no formula's to get right.
        usable = np.isfinite(found) & np.isfinite(part * (t - a)) & np.isfinite(found.astype(dtype).astype(np.float32))
        stored = np.where(a == t, t, found).astype(dtype)[usable]
        if np.array_equal(a[usable], t[usable]):
            stored = t[usable].astype(dtype)
    judged = mixture(t[usable], a[usable], stored, (alpha,))
    assert judged.wrong == 0 and judged.worst_share <= 1


@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.98), st.sampled_from(DTYPES), st.sampled_from([FLOAT32, BFLOAT16]))
def test_an_entry_beyond_rounding_is_found(seed: int, alpha: float, dtype: np.dtype, stored: np.dtype) -> None:
    rng = np.random.default_rng(seed)
    a, t = rng.normal(size=(2, 7)).astype(dtype)
    a[0], t[0] = 1.0, 1.5
    ideal = wide(a) + alpha * (wide(t) - wide(a))
    right = ideal.astype(stored)
    assert mixture(t, a, right, (alpha,)).wrong == 0
    wrong, where = right.copy(), int(rng.integers(7))
    off = (2.0**-18 if stored == FLOAT32 else 2.0**-6) * (abs(wide(a[where])) + abs(wide(t[where])))
    wrong[where] = ideal[where] + off
    assert mixture(t, a, wrong, (alpha,)).wrong >= 1


@given(st.integers(0, 2**32 - 1), st.floats(-1, 2), st.floats(-1, 2))
def test_the_alpha_that_made_a_result_is_found(seed: int, alpha: float, other: float) -> None:
    rng = np.random.default_rng(seed)
    a, t = rng.normal(size=(2, 50)).astype(np.float32)
    merged = (wide(a) + other * (wide(t) - wide(a))).astype(np.float32)
    judged = mixture(t, a, merged, (alpha,))
    if abs(alpha - other) > 0.01:
        assert judged.wrong > 0
        assert judged.layers[0].fitted == pytest.approx(other, abs=1e-5)


@given(st.integers(0, 2**32 - 1), st.one_of(st.floats(-300, -0.01), st.floats(0.01, 300)), st.floats(-2, 2))
def test_what_is_mixed_twice_stays_within_its_bound(seed: int, weight: float, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    a, r = rng.normal(size=(2, 20)).astype(np.float32)
    # Here the two cancel: what is left is less than the rounding of either.
    r[:10] = a[:10] * np.float32(1 - 1 / weight)
    for tuned in (
        a + np.float32(weight) * (r - a),
        np.float32(1 - weight) * a + np.float32(weight) * r,
    ):
        merged = a if alpha == 0 else np.float32(1 - alpha) * a + np.float32(alpha) * tuned
        exact = wide(a) + weight * (wide(r) - wide(a))
        assert mixture(exact, a, merged, (alpha,), abs(weight)).wrong == 0


def test_layers_are_judged_by_themselves() -> None:
    rng = np.random.default_rng(1)
    a, t = rng.normal(size=(2, 3, 40)).astype(np.float32)
    alphas = (0.0, 0.5, 1.0)
    merged = np.stack([between(a[k], t[k], (alphas[k],), np.float32) for k in range(3)])
    found = mixture(t, a, merged, alphas)
    assert found.wrong == 0 and found.by_layer and found.moved
    merged[2] = a[2]
    found = mixture(t, a, merged, alphas)
    assert [layer.wrong for layer in found.layers.values()] == [0, 0, 40]
    assert found.in_words == "layer 2: as if alpha were 0.00, not 1"


def test_a_bound_beyond_any_range_is_no_excuse() -> None:
    a, t = np.array([1.7e308, 1.0]), np.array([1.6e308, 2.0])
    found = mixture(t, a, np.array([0.0, 1.5]), (0.5,))
    assert found.wrong == 1 and found.worst_share == np.inf
