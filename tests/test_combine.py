"""``merge BASE --adapter A --adapter B --combine X``: what may be asked, what is refused, and the result beside PEFT's own."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lora_merge_cli._cli import options as cli_options
from lora_merge_cli.combining import METHODS, Combining, MajoritySign, refuse_uncombinable
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import ConflictingAdapters, UnsupportedCheckpoint, UsageError
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.recording import combining_notes, combining_record
from lora_merge_cli.records import AdapterSite, Factor, Forward, LowRank, Scale
from lora_merge_cli.report import CombiningRecord
from lora_merge_cli.reports.words import combining_in_words
from tests.command import run

PRUNING = [method for method in METHODS if method not in ("sum", "linear", "cat", "svd")]


def _density(method: str, density: float = 0.6) -> float | None:
    return density if method in PRUNING else None


# What may be asked


def test_the_command_line_has_every_method() -> None:
    assert tuple(cli_options.Combine) == METHODS
    assert tuple(cli_options.MajoritySign) == MajoritySign.__args__


def test_the_sum_is_what_nobody_asks_for() -> None:
    assert Combining().is_sum and MergeOptions().combining == Combining()


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_is(method: str) -> None:
    combining = Combining(method, _density(method))
    assert combining.is_sum == (method == "sum")
    assert combining.is_svd == (method == "svd" or method.endswith("_svd"))
    assert combining.prunes == (method in PRUNING)
    assert combining.draws == ("dare" in method)
    assert combining.elects == ("ties" in method)
    assert combining.crosses == (method in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "mean"}, "--combine has no such value"),
        ({"method": "ties"}, "pass --density"),
        ({"method": "dare_linear_svd"}, "pass --density"),
        ({"method": "linear", "density": 0.5}, "--density is for what prunes"),
        ({"method": "svd", "density": 0.5}, "--density is for what prunes"),
        ({"density": 0.5}, "--density is for what prunes"),
        ({"method": "ties", "density": 0.0}, r"--density lies outside \(0, 1\]"),
        ({"method": "ties", "density": -0.5}, r"--density lies outside \(0, 1\]"),
        ({"method": "ties", "density": 1.5}, r"--density lies outside \(0, 1\]"),
        ({"method": "ties", "density": math.nan}, r"--density lies outside \(0, 1\]"),
        ({"method": "cat", "svd_rank": 4}, "--svd-rank is for svd"),
        ({"method": "ties", "density": 0.5, "svd_rank": 4}, "--svd-rank is for svd"),
        ({"method": "svd", "svd_rank": 0}, "--svd-rank must be at least 1"),
        ({"method": "svd", "majority_sign": "frequency"}, "--majority-sign is for what elects"),
        ({"method": "dare_linear", "density": 0.5, "majority_sign": "frequency"}, "--majority-sign is for what elects"),
        ({"method": "ties", "density": 0.5, "majority_sign": "most"}, "--majority-sign has no such value"),
    ],
    ids=str,
)
def test_what_makes_no_sense(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Combining(**asked)


@pytest.mark.parametrize(
    "flags",
    [
        ("--combine", "mean"),
        ("--combine", "ties"),
        ("--combine", "magnitude_prune_svd"),
        ("--combine", "linear", "--density", "0.5"),
        ("--density", "0.5"),
        ("--combine", "ties", "--density", "0"),
        ("--combine", "ties", "--density", "much"),
        ("--combine", "cat", "--svd-rank", "3"),
        ("--combine", "svd", "--svd-rank", "0"),
        ("--combine", "svd", "--majority-sign", "frequency"),
        ("--combine", "ties", "--density", "0.5", "--majority-sign", "most"),
    ],
    ids=" ".join,
)
def test_usage_is_exit_2_before_anything_is_read(flags: tuple[str, ...], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    outcome = run("merge", nowhere, "--adapter", nowhere, "--adapter", nowhere, "-o", tmp_path / "out", *flags)
    assert outcome.code == 2
    assert not (tmp_path / "out").exists()


def test_there_must_be_adapters_to_combine(tmp_path: Path) -> None:
    outcome = run("merge", tmp_path / "nowhere", "-o", tmp_path / "out", "--combine", "linear")
    assert outcome.code == 2 and "--adapter" in outcome.error


def test_help_has_the_flags_and_examples() -> None:
    said = run("merge", "--help").stdout
    for word in ("--combine", "--density", "--seed", "--svd-rank", "--majority-sign"):
        assert word in said


# What it comes to


def _site(adapter: int | None = 0, rank: int = 4, target: str = "q_proj.weight", **changes: Any) -> AdapterSite:
    site = AdapterSite(
        targets=((target,),),
        operation="add_delta",
        factors={"lora_a": Factor(("a",)), "lora_b": Factor(("b",))},
        parameters=LowRank(rank, Scale(2.0, "test"), Equation("ri,or->oi")),
        forward=Forward("", "", ""),
        group="",
        module="",
        label=target,
        adapter=adapter,
    )
    return dataclasses.replace(site, **changes)


def test_one_adapter_is_its_sum() -> None:
    assert Combining("ties", 0.5).of(1, [_site()]) == Combining()
    assert Combining("ties", 0.5).of(2, [_site()]) == Combining("ties", 0.5)


def test_the_rank_is_the_largest_of_all_adapters() -> None:
    sites = [_site(0, 2), _site(1, 3), _site(1, 5, "v_proj.weight")]
    assert Combining("svd").of(2, sites).svd_rank == 5
    assert Combining("ties_svd", 0.5, svd_rank=1).of(2, sites).svd_rank == 1
    assert Combining("cat").of(2, sites).svd_rank is None


# What is refused

PATHS = ("first/", "second/")


def _refuse(combining: Combining, *sites: AdapterSite) -> None:
    refuse_uncombinable(combining, PATHS, sites)


@pytest.mark.parametrize("method", METHODS)
def test_plain_adapters_are_combined(method: str) -> None:
    stacked = LowRank(4, Scale(2.0, "test"), Equation("lri,lor->loi"))
    combining = Combining(method, _density(method))
    _refuse(combining, *(_site(adapter) for adapter in (0, 1)), _site(1, target="blocks", parameters=stacked))
    if not (combining.prunes and combining.is_svd):
        experts = LowRank(4, Scale(2.0, "test"), Equation("eri,ore->eoi"))
        _refuse(combining, *(_site(adapter, target="experts", parameters=experts) for adapter in (0, 1)))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "sum"])
@pytest.mark.parametrize("operation", ["dora", "loha", "ia3", "adalora"])
def test_what_is_no_product_is_refused(method: str, operation: str) -> None:
    with pytest.raises(
        UnsupportedCheckpoint, match=f"--combine {method} .*second/ :: q_proj.weight.*found {operation}"
    ):
        _refuse(Combining(method, _density(method)), _site(0), _site(1, operation=operation))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "sum"])
def test_a_trained_bias_is_refused(method: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"first/ :: q_proj\.bias"):
        _refuse(
            Combining(method, _density(method)), _site(target="q_proj.bias", factors={"lora_b": Factor(("b",))}, rank=1)
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_part_of_a_tensor_is_not_pruned(method: str) -> None:
    part = _site(
        factors={
            "lora_a": Factor(("a",), (2, 4, 8), (0,)),
            "lora_b": Factor(("b",), (6, 4, 2), (slice(None), slice(None), 0)),
        }
    )
    if method not in PRUNING:
        _refuse(Combining(method), part)
        return
    with pytest.raises(UnsupportedCheckpoint, match="part of one"):
        _refuse(Combining(method, 0.5), part)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("same_kernel", [True, False])
def test_ranks_must_be_equal_where_factors_are_added(method: str, same_kernel: bool) -> None:
    combining = Combining(method, _density(method))
    sites = [_site(0, 4), _site(1, 8, "q_proj.weight" if same_kernel else "v_proj.weight")]
    if not combining.crosses:
        _refuse(combining, *sites)
        return
    with pytest.raises(ConflictingAdapters, match="rank 4 in first/, rank 8 in second/"):
        _refuse(combining, *sites)


def test_ranks_by_pattern_must_fit_on_each_kernel() -> None:
    sites = [_site(0, 4), _site(0, 8, "v_proj.weight"), _site(1, 8), _site(1, 4, "v_proj.weight")]
    with pytest.raises(ConflictingAdapters, match=r"q_proj\.weight .*rank 4 in first/, rank 8 in second/"):
        _refuse(Combining("linear"), *sites)


def test_adapters_inside_are_not_combined() -> None:
    with pytest.raises(UsageError, match="inside"):
        _refuse(Combining("linear"), _site(None))


def test_the_sum_takes_everything() -> None:
    _refuse(Combining(), _site(0, operation="dora"), _site(1, 8), _site(None))


# What the report says


def test_the_record_has_what_the_method_has() -> None:
    assert combining_record(Combining()) is None
    assert combining_record(Combining("linear", seed=7)) == CombiningRecord("linear")
    assert combining_record(Combining("dare_ties_svd", 0.5, 7, 3, "frequency")) == CombiningRecord(
        "dare_ties_svd", 0.5, 7, 3, "frequency"
    )


def test_in_words() -> None:
    assert combining_in_words(CombiningRecord("cat")) == "cat"
    assert combining_in_words(CombiningRecord("dare_ties_svd", 0.5, 0, 16, "total")) == (
        "dare_ties_svd: density 0.5, seed 0, sign by total, rank 16"
    )


@pytest.mark.parametrize("method", METHODS)
def test_cross_terms_and_truncation_are_named(method: str) -> None:
    combining = Combining(method, _density(method))
    said = " ".join(combining_notes(combining))
    assert ("cross terms" in said) == combining.crosses
    assert ("truncates" in said) == combining.is_svd


# The result, beside PEFT's own

QVD = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
WHOLE = [
    ("linear",),
    ("cat",),
    ("svd",),
    ("svd", "--svd-rank", "3"),
    ("ties", "--density", "0.5"),
    ("ties", "--density", "0.4", "--majority-sign", "frequency"),
    ("magnitude_prune", "--density", "0.3"),
    ("dare_linear", "--density", "1"),
    ("dare_ties", "--density", "1"),
    ("ties_svd", "--density", "0.5", "--svd-rank", "5"),
    ("magnitude_prune_svd", "--density", "0.5"),
    ("dare_linear_svd", "--density", "1", "--svd-rank", "4"),
    ("dare_ties_svd", "--density", "1"),
]


@pytest.fixture(scope="module")
def cases() -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from tests import peft_cases

    return peft_cases


@pytest.fixture(scope="module")
def model(cases: Any) -> Any:
    return cases.small_model("llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def base(cases: Any, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(cases.save_base(model, tmp_path_factory.mktemp("base") / "llama"))


def _adapter(cases: Any, model: Any, path: Path, seed: int, **changes: Any) -> Path:
    import peft

    settings = {"r": 4, "lora_alpha": 10, "target_modules": QVD} | changes
    return Path(cases.save_adapter(model, peft.LoraConfig(**settings), path, seed=seed, save_embedding_layers=False))


@pytest.fixture(scope="module")
def adapters(cases: Any, model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The first is rank-stabilised, which PEFT's combination mistakes for its own; each is on a module that the other misses."""
    folder = tmp_path_factory.mktemp("adapters")
    first = _adapter(cases, model, folder / "first", 1, use_rslora=True)
    second = _adapter(cases, model, folder / "second", 2, lora_alpha=3, target_modules=[*QVD[1:], "up_proj"])
    return first, second


def _by_peft(
    cases: Any, base: Path, adapters: tuple[Path, ...], weights: tuple[float, ...], asked: tuple[str, ...]
) -> Any:
    """What PEFT merges, with the scale of 1 that it means its combination to have."""
    import peft

    flags = dict(zip(asked[1::2], asked[2::2], strict=True))
    names = [str(number) for number in range(len(adapters))]
    with cases.quiet():
        adapted = peft.PeftModel.from_pretrained(cases.reloaded(base), adapters[0], adapter_name=names[0])
        for name, path in zip(names[1:], adapters[1:], strict=True):
            adapted.load_adapter(path, adapter_name=name)
        adapted.base_model.add_weighted_adapter(
            names,
            list(weights),
            "joint",
            asked[0],
            density=float(flags["--density"]) if "--density" in flags else None,
            svd_rank=int(flags["--svd-rank"]) if "--svd-rank" in flags else None,
            majority_sign_method=flags.get("--majority-sign", "total"),
        )
        for module in adapted.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer) and "joint" in module.scaling:
                module.scaling["joint"] = 1.0
        adapted.base_model.merge_adapter(["joint"])
        return {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in adapted.state_dict().items()
            if "lora_" not in name
        }


@pytest.mark.parametrize("asked", WHOLE, ids=" ".join)
def test_a_merge_is_what_peft_makes_of_it(
    asked: tuple[str, ...], cases: Any, base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = (0.7, -0.4)
    named = [f"{path}@{weight}" for path, weight in zip(adapters, weights, strict=True)]
    merged = cases.merge(base, *named, out=tmp_path / "out", flags=("--combine", *asked))
    expected = _by_peft(cases, base, adapters, weights, asked)
    stored = cases.tensors(base)
    changed = 0
    for name, value in merged.items():
        cases.assert_near(value, expected[name], name, 1e-5)
        changed += not bool((value == stored[name]).all())
    assert changed >= 9


def test_the_report_says_how(cases: Any, base: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = ("--combine", "ties", "--density", "0.5", "--report", report)
    cases.merge(base, *adapters, out=tmp_path / "out", flags=flags)
    said = json.loads(report.read_text())
    measured = {key: said["combining"].pop(key) for key in ("departure", "departure_of")}
    assert measured["departure"] > 0.01 and measured["departure_of"].endswith(".weight")
    assert any(measured["departure_of"] in note for note in said["notes"])
    assert said["combining"] == {
        "method": "ties",
        "density": 0.5,
        "seed": None,
        "svd_rank": None,
        "majority_sign": "total",
    }
    assert any("cross terms" in note for note in said["notes"])


def test_the_default_rank_is_said(base: Path, adapters: tuple[Path, Path]) -> None:
    outcome = run(
        "merge", base, "--adapter", adapters[0], "--adapter", adapters[1], "--combine", "svd", "--dry-run", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["combining"]["svd_rank"] == 4


def test_one_adapter_combined_is_itself(cases: Any, base: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    plain = cases.merge(base, f"{adapters[0]}@0.7", out=tmp_path / "plain")
    flags = ("--combine", "ties", "--density", "0.2")
    combined = cases.merge(base, f"{adapters[0]}@0.7", out=tmp_path / "combined", flags=flags)
    assert all(bool((combined[name] == value).all()) for name, value in plain.items())


def test_cat_has_the_bits_of_the_sum(cases: Any, base: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    plain = cases.merge(base, *adapters, out=tmp_path / "plain")
    combined = cases.merge(base, *adapters, out=tmp_path / "combined", flags=("--combine", "cat"))
    assert all(bool((combined[name] == value).all()) for name, value in plain.items())


def test_a_seed_is_a_result(cases: Any, base: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    def drawn(folder: str, seed: int, jobs: int) -> Any:
        flags = ("--combine", "dare_ties", "--density", "0.5", "--seed", seed, "--jobs", jobs)
        return cases.merge(base, *adapters, out=tmp_path / folder, flags=flags)

    one, same, other = drawn("one", 1, 1), drawn("same", 1, 3), drawn("other", 2, 1)
    assert all(bool((same[name] == value).all()) for name, value in one.items())
    assert any(bool((other[name] != value).any()) for name, value in one.items())


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties_svd"])
def test_dora_is_refused_by_name(
    method: str, cases: Any, model: Any, base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    dora = _adapter(cases, model, tmp_path / "dora", 3, use_dora=True, target_modules=["q_proj"])
    flags = ("--combine", method, *(("--density", 0.5) if method in PRUNING else ()))
    outcome = cases.attempt(base, adapters[0], dora, out=tmp_path / "out", flags=flags)
    assert outcome.code == 4 and "dora" in outcome.error
    assert not (tmp_path / "out").exists()


def test_unequal_ranks_are_refused_with_both(
    cases: Any, model: Any, base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    other = _adapter(cases, model, tmp_path / "other", 3, r=2)
    outcome = cases.attempt(base, adapters[0], other, out=tmp_path / "out", flags=("--combine", "linear"))
    assert outcome.code == 4
    assert "rank 4 in " in outcome.error and "rank 2 in " in outcome.error
    cases.merge(base, adapters[0], other, out=tmp_path / "out", flags=("--combine", "svd"))


def test_a_lora_bias_is_refused(
    cases: Any, model: Any, base: Path, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    biased = _adapter(cases, model, tmp_path / "biased", 3, target_modules=["q_proj"], lora_bias=True)
    outcome = cases.attempt(base, adapters[0], biased, out=tmp_path / "out", flags=("--combine", "linear"))
    assert outcome.code == 4 and "bias" in outcome.error


def test_whole_deltas_per_head_are_refused() -> None:
    heads = dataclasses.replace(_site(), parameters=LowRank(4, Scale(1.0, "x"), Equation("nir,nro->nio")))
    with pytest.raises(UnsupportedCheckpoint, match="per head"):
        refuse_uncombinable(Combining("ties_svd", 0.5), ["a", "b"], [heads])
    refuse_uncombinable(Combining("ties", 0.5), ["a", "b"], [heads])
    refuse_uncombinable(Combining("svd"), ["a", "b"], [heads])
