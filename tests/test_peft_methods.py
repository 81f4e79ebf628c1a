"""PEFT's other methods: what the dialect finds in their files, what it refuses, and merges beside peft's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import peft  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

from lora_merge_cli.dialects.interface import ScaleOptions, Subject  # noqa: E402
from lora_merge_cli.dialects.peft import Peft  # noqa: E402
from lora_merge_cli.dialects.peft.config import LORA, TOKENS  # noqa: E402
from lora_merge_cli.dialects.peft.methods import METHODS, method_of  # noqa: E402
from lora_merge_cli.dialects.peft.methods.config import known_fields  # noqa: E402
from lora_merge_cli.errors import CorruptCheckpoint, ShapeMismatch, UnmatchedAdapter, UnsupportedCheckpoint, UsageError  # noqa: E402  # noqa: E402
from tests import peft_cases as cases  # noqa: E402
from tests import peft_methods as methods  # noqa: E402
from tests.command import run  # noqa: E402
from tests.peft_methods import CASES, FLAT, LINEAR, Case, survey  # noqa: E402


@pytest.fixture(scope="module")
def module() -> Any:
    return methods.net()


@pytest.fixture(scope="module")
def base(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_plain(module, tmp_path_factory.mktemp("methods") / "net")


@pytest.fixture(scope="module")
def saved(module: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An adapter of each case, trained once."""
    folder, done = tmp_path_factory.mktemp("adapters"), dict[str, Path]()

    def save(name: str) -> Path:
        if name not in done:
            done[name] = methods.save(CASES[name], folder / str(len(done)), module)
        return done[name]

    return save


@pytest.mark.parametrize("name", CASES)
def test_every_key_has_its_site_and_its_reason(name: str, saved: Any, base: Path) -> None:
    case, adapter = CASES[name], saved(name)
    found, leaves = survey(base, adapter), cases.tensors(adapter)
    assert not found.problems, found.problems
    assert {site.operation for site in found.sites} == {case.operation}
    assert set(methods.used(found)) == set(leaves)
    assert len({site.targets for site in found.sites}) == len(found.sites)
    for site in found.sites:
        if case.scale is not None:
            assert site.parameters.scale.value == pytest.approx(case.scale, rel=1e-12)
        assert case.settings.items() <= site.settings.items()
        for role, value in methods.taken(site, leaves).items():
            assert value.size and value.any(), role


def taken(name: str, target: str, saved: Any, base: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The site of a target, and the shape of what it takes by role."""
    adapter = saved(name)
    site = next(site for site in survey(base, adapter).sites if site.targets == ((target,),))
    return site, {role: value.shape for role, value in methods.taken(site, cases.tensors(adapter)).items()}


@pytest.mark.parametrize(
    ("name", "target", "layout", "rank", "shapes"),
    [
        ("AdaLoRA", "tall.weight", "ri,or->oi", 6, {"lora_a": (6, 16), "lora_b": (24, 6), "lora_e": (6, 1)}),
        ("AdaLoRA", "conv.weight", "rixy,or->oixy", 6, {"lora_a": (6, 4, 3, 3), "lora_b": (8, 6), "lora_e": (6, 1)}),
        ("AdaLoRA pruned", "wide.weight", "ri,or->oi", 3, {"lora_a": (3, 24), "lora_b": (16, 3), "lora_e": (3, 1)}),
        (
            "LoHa of kernels",
            "line.weight",
            "rix,or->oix",
            3,
            {"w1_a": (3, 8), "w1_b": (3, 6), "t1": (3, 3, 3, 1)} | {"w2_a": (3, 8), "w2_b": (3, 6), "t2": (3, 3, 3, 1)},
        ),
        ("LoHa patterns", "tall.weight", "ri,or->oi", 2, dict.fromkeys(("w1_a", "w2_a"), (24, 2)) | dict.fromkeys(("w1_b", "w2_b"), (2, 16))),
        ("LoKr", "conv.weight", "rixy,or->oixy", 2, {"w1": (2, 2), "w2": (4, 2, 3, 3)}),
        ("IA3", "tall.weight", "ri,or->oi", 1, {"l": (24,)}),
        ("IA3", "tall.bias", "r,or->o", 1, {"l": (24,)}),
        ("IA3", "wide.weight", "ri,or->oi", 1, {"l": (24,)}),
        ("IA3", "conv.bias", "r,or->o", 1, {"l": (8,)}),
        ("VeRA", "wide.weight", "ri,or->oi", 5, {"lambda_b": (16,), "lambda_d": (5,), "vera_a": (5, 24), "vera_b": (16, 5)}),
        ("VeRA", "tall.weight", "ri,or->oi", 5, {"lambda_b": (24,), "lambda_d": (5,), "vera_a": (5, 16), "vera_b": (24, 5)}),
        ("OFT", "conv.weight", "rixy,or->oixy", 4, {"r": (9, 6)}),
        ("OFT of uneven blocks", "wide.weight", "ri,or->oi", 4, {"r": (6, 6)}),
        ("OFT shared", "tall.weight", "ri,or->oi", 4, {"r": (1, 6)}),
        ("BOFT", "conv.weight", "rixy,or->oixy", 4, {"r": (1, 9, 4, 4), "s": (8,)}),
        ("BOFT", "tall.weight", "ri,or->oi", 4, {"r": (1, 4, 4, 4), "s": (24,)}),
        ("HRA", "conv.weight", "rixy,or->oixy", 3, {"u": (36, 3)}),
        ("MiSS", "tall.weight", "ri,or->oi", 4, {"block": (4, 24)}),
        ("MiSS mini", "tall.weight", "ri,or->oi", 3, {"block": (3, 8)}),
        ("MiSS bat", "tall.weight", "ri,or->oi", 4, {"block": (6, 4, 4)}),
        ("HiRA", "conv.weight", "rixy,or->oixy", 4, {"lora_a": (4, 4, 3, 3), "lora_b": (8, 4)}),
        ("HiRA", "table.weight", "rv,dr->vd", 4, {"lora_a": (4, 12), "lora_b": (16, 4)}),
        ("SHiRA", "tall.weight", "ri,or->oi", 2, {"weight": (80,), "indices": (2, 80)}),
        ("C3A patterns", "wide.weight", "ri,or->oi", 8, {"kernel": (2, 3, 8)}),
        ("DeLoRA patterns", "tall.weight", "ri,or->oi", 2, {"lora_a": (2, 16), "lora_b": (24, 2), "lambda": (1,), "w_norm": (16,)}),
        (
            "RandLora",
            "tall.weight",
            "ri,or->oi",
            20,
            {"lambda": (5, 4), "gamma": (4, 16), "randlora_a": (5, 1, 16), "randlora_b": (24, 4, 5)},
        ),
    ],
)  # fmt: skip
def test_what_a_site_takes(
    name: str, target: str, layout: str, rank: int, shapes: dict[str, Any], saved: Any, base: Path
) -> None:
    site, found = taken(name, target, saved, base)
    assert found == shapes
    assert (site.parameters.equation.text, site.parameters.rank) == (layout, rank)


def test_scales_that_differ_from_layer_to_layer(saved: Any, base: Path) -> None:
    def scales(name: str) -> dict[str, float]:
        return {site.label: site.parameters.scale.value for site in survey(base, saved(name)).sites}

    assert scales("LoHa patterns") == {"tall": 5 / 2, "wide": 7 / 3, "square": 7 / 3}
    assert scales("C3A") == {"tall": 1 / 16, "wide": 1 / 24, "square": 1 / 16}
    assert scales("DeLoRA patterns") == {"tall": 1 / 2, "wide": 1 / 4, "square": 1 / 4}


def test_ia3_says_which_side_it_scales(saved: Any, base: Path) -> None:
    found = {site.label: site.settings["feedforward"] for site in survey(base, saved("IA3")).sites}
    assert [found[name] for name in ("tall", "wide", "conv", "pointwise", "cube")] == [False, True, False, True, False]
    assert {name for name in found if name.endswith("bias")} == {"tall.bias", "square.bias", "conv.bias", "cube.bias"}


def test_a_layer_that_was_pruned_away_is_left_out_with_a_reason(saved: Any, base: Path) -> None:
    dropped = survey(base, saved("AdaLoRA pruned")).dropped
    assert len(dropped) == 3
    assert all("pruned" in one.reason and "square" in str(one.path) for one in dropped)


def test_the_copies_of_shared_bases_are_left_out_with_a_reason(saved: Any, base: Path) -> None:
    dropped = survey(base, saved("RandLora")).dropped
    assert {str(one.path[0]).rpartition(".")[2] for one in dropped} == {"randlora_A", "randlora_B"}
    assert all("copy of base_model.randlora_" in one.reason for one in dropped)


def test_names_of_adapters_in_the_keys(saved: Any, base: Path, tmp_path: Path) -> None:
    for name in ("OFT", "VeRA"):
        adapter = cases.copied(saved(name), tmp_path / name)
        plain = len(survey(base, adapter).sites)
        cases.renamed(
            adapter, lambda key: key.replace(".weight", ".mine.weight") if "oft_R" in key else f"{key}.default"
        )
        found = survey(base, adapter)
        assert not found.problems
        assert len(found.sites) == plain


def test_a_summary_needs_no_base(saved: Any) -> None:
    summary = Peft().describe(methods.tree(saved("DeLoRA")), ScaleOptions())
    assert (summary.method, summary.problems) == ("DeLoRA", ())
    assert {(row.module, row.rank, row.shape) for row in summary.rows} == {
        ("tall", 4, (24, 16)),
        ("wide", 4, (16, 24)),
        ("square", 4, (16, 16)),
    }
    assert "table.weight: modules_to_save" in summary.riding
    assert "tall.bias: bias delora_only" in summary.riding


# Refusals.


def _remove(word: str) -> Callable[[cases.Tensors], cases.Tensors]:
    return lambda found: {key: value for key, value in found.items() if word not in key}


def _cut(word: str, axis: int) -> Callable[[cases.Tensors], cases.Tensors]:
    """Take the last entry of an axis away."""
    return lambda found: {
        key: value.narrow(axis, 0, value.shape[axis] - 1) if word in key else value for key, value in found.items()
    }


def _integers(found: cases.Tensors) -> cases.Tensors:
    return {key: value.int() for key, value in found.items()}


FACTORS: dict[str, tuple[str, Any, type[Exception], str]] = {
    "AdaLoRA without E": ("AdaLoRA", _remove("tall.lora_E"), UnmatchedAdapter, "tall"),
    "LoHa without w2_b": ("LoHa", _remove("wide.hada_w2_b"), UnmatchedAdapter, "w2_b"),
    "LoHa with half of the cores": ("LoHa of kernels", _remove("conv.hada_t2"), UnmatchedAdapter, "found t1"),
    "LoKr without w1": ("LoKr", _remove("tall.lokr_w1"), UnmatchedAdapter, "w1"),
    "VeRA without projections": ("VeRA", _remove("base_model.vera_A"), UnsupportedCheckpoint, "torch"),
    "RandLora without bases": ("RandLora", _remove("base_model.randlora_B"), UnsupportedCheckpoint, "torch"),
    "BOFT without s": ("BOFT", _remove("tall.boft_s"), UnmatchedAdapter, "tall"),
    "SHiRA without indices": ("SHiRA", _remove("tall.shira_indices"), UnmatchedAdapter, "indices"),
    "DeLoRA without norms": ("DeLoRA", _remove("tall.delora_w_norm"), UnmatchedAdapter, "w_norm"),
    "integers": ("MiSS", _integers, UnsupportedCheckpoint, "floating-point"),
    "AdaLoRA of another rank": ("AdaLoRA", _cut("tall.lora_E", 0), ShapeMismatch, "another rank"),
    "LoHa of another rank": ("LoHa", _cut("tall.hada_w1_b", 0), ShapeMismatch, "another rank"),
    "LoHa of another width": ("LoHa", _cut("tall.hada_w2_b", 1), ShapeMismatch, "do not fit"),
    "LoKr of another rank": ("LoKr of products", lambda found: {k: torch.cat([v, v]) if "w2_b" in k else v for k, v in found.items()}, ShapeMismatch, "another rank"),
    "LoKr of another width": ("LoKr", _cut("tall.lokr_w1", 1), ShapeMismatch, "do not fit"),
    "IA3 of another width": ("IA3", _cut("tall.ia3_l", 0), ShapeMismatch, "do not fit"),
    "IA3 of a conv": ("IA3", _cut("conv.ia3_l", 1), ShapeMismatch, "do not fit"),
    "VeRA too narrow": ("VeRA", _cut("vera_A", 1), ShapeMismatch, "vera_a"),
    "VeRA of another rank": ("VeRA", _cut("lambda_d", 0), ShapeMismatch, "another rank"),
    "OFT of fewer blocks": ("OFT", _cut("tall.oft_R", 0), ShapeMismatch, "do not fit"),
    "BOFT of fewer outputs": ("BOFT", _cut("tall.boft_s", 0), ShapeMismatch, "do not fit"),
    "HRA of another width": ("HRA", _cut("tall.hra_u", 0), ShapeMismatch, "do not fit"),
    "HRA of another rank": ("HRA", _cut("tall.hra_u", 1), ShapeMismatch, "another rank"),
    "MiSS of another width": ("MiSS", _cut("tall.miss_block", 1), ShapeMismatch, "do not fit"),
    "MiSS bat of fewer blocks": ("MiSS bat", _cut("tall.miss_block", 0), ShapeMismatch, "do not fit"),
    "MiSS mini of another width": ("MiSS mini", _cut("tall.miss_block", 1), ShapeMismatch, "mini_r"),
    "HiRA of another rank": ("HiRA", _cut("wide.hira_A", 0), ShapeMismatch, "another rank"),
    "HiRA of an embedding": ("HiRA", _cut("table.hira_embedding_A", 1), ShapeMismatch, "do not fit"),
    "SHiRA of fewer entries": ("SHiRA", _cut("tall.shira_weight", 0), ShapeMismatch, "number of entries"),
    "SHiRA of fewer indices": ("SHiRA", _cut("tall.shira_indices", 1), ShapeMismatch, "indices"),
    "C3A of fewer blocks": ("C3A", _cut("tall.c3a_kernel", 0), ShapeMismatch, "do not fit"),
    "C3A of another block": ("C3A", _cut("tall.c3a_kernel", 2), ShapeMismatch, "do not fit"),
    "DeLoRA of another width": ("DeLoRA", _cut("tall.delora_w_norm", 0), ShapeMismatch, "do not fit"),
    "RandLora of fewer bases": ("RandLora", _cut("tall.randlora_gamma", 0), ShapeMismatch, "do not fit"),
    "another method": ("LoHa", lambda found: found | {"base_model.model.tall.oft_R.weight": torch.ones(4, 6)}, UnsupportedCheckpoint, "OFT"),
    "LoRA too": ("LoHa", lambda found: found | {"base_model.model.tall.lora_A.weight": torch.ones(4, 16)}, UnsupportedCheckpoint, "LoRA"),
    "a stranger": ("LoHa", lambda found: found | {"base_model.model.tall.surprise": torch.ones(4)}, UnmatchedAdapter, "surprise"),
    "no such layer": ("LoHa", lambda found: {k.replace("tall", "small"): v for k, v in found.items()}, UnmatchedAdapter, "small"),
    "two adapters": ("LoHa", lambda found: {f"{k}.{name}": v.clone() for k, v in found.items() for name in "ab"}, UnsupportedCheckpoint, "several adapters"),
    "a key twice": ("LoHa", lambda found: found | {k.removeprefix("base_model.model."): v.clone() for k, v in found.items()}, UnmatchedAdapter, "two keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTORS)
def test_factors_that_are_refused(name: str, saved: Any, base: Path, tmp_path: Path) -> None:
    case, change, error, words = FACTORS[name]
    adapter = cases.edit_factors(cases.copied(saved(case), tmp_path / "adapter"), change)
    _refused(survey(base, adapter).problems, error, words)


def _refused(problems: tuple[Exception, ...], error: type[Exception], words: str) -> None:
    """Some problem is of that class and says those words in one line; the first is no accident of another kind."""
    assert problems, "merged"
    assert any(type(problem) is error and words in str(problem) for problem in problems), problems
    assert not any("\n" in str(problem) for problem in problems)


CONFIGS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "BOFT of two stages": ("BOFT", {"boft_n_butterfly_factor": 2}, UnsupportedCheckpoint, "stages"),
    "BOFT of another block": ("BOFT", {"boft_block_size": 8}, ShapeMismatch, "block size"),
    "BOFT of another number": ("BOFT by number", {"boft_block_num": 2}, ShapeMismatch, "number of blocks"),
    "VeRA without projections": ("VeRA", {"save_projection": False}, UnsupportedCheckpoint, "torch"),
    "RandLora without bases": ("RandLora", {"save_projection": False}, UnsupportedCheckpoint, "torch"),
    "RandLora of another rank": ("RandLora", {"r": 4}, ShapeMismatch, "another rank"),
    "old OFT": ("OFT", {"oft_block_size": None, "r": 4}, UnsupportedCheckpoint, "before 0.14"),
    "OFT before 0.18": ("OFT", {"peft_version": "0.17.1"}, UnsupportedCheckpoint, "before 0.18"),
    "OFT before 0.18, of development": ("OFT", {"peft_version": "0.18.0.dev0@abc"}, UnsupportedCheckpoint, "before 0.18"),
    "OFT without a version": ("OFT", {"peft_version": None}, UnsupportedCheckpoint, "no peft_version"),
    "OFT of another block": ("OFT", {"oft_block_size": 8}, ShapeMismatch, "block size"),
    "OFT that is not shared": ("OFT shared", {"block_share": False}, ShapeMismatch, "do not fit"),
    "OFT of no terms": ("OFT", {"num_cayley_neumann_terms": 0}, CorruptCheckpoint, "num_cayley_neumann_terms"),
    "OFT transposed": ("OFT", {"fan_in_fan_out": True}, UnsupportedCheckpoint, "fan_in_fan_out"),
    "SHiRA transposed": ("SHiRA", {"fan_in_fan_out": True}, UnsupportedCheckpoint, "fan_in_fan_out"),
    "VeRA transposed": ("VeRA", {"fan_in_fan_out": True}, ShapeMismatch, "either way round"),
    "HiRA transposed": ("HiRA", {"fan_in_fan_out": True}, ShapeMismatch, "either way round"),
    "IA3 of another side": ("IA3", {"feedforward_modules": ["tall"]}, ShapeMismatch, "feed-forward"),
    "IA3 of a wild expression": ("IA3", {"feedforward_modules": "(a+)+"}, CorruptCheckpoint, "feedforward_modules"),
    "AdaLoRA with a broken mask": ("AdaLoRA", {"rank_pattern": {"tall.lora_E": 3}}, CorruptCheckpoint, "rank_pattern"),
    "AdaLoRA with another mask": ("AdaLoRA", {"rank_pattern": {"tall.lora_E": [True]}}, ShapeMismatch, "another rank"),
    "AdaLoRA as DoRA": ("AdaLoRA", {"use_dora": True}, UnsupportedCheckpoint, "use_dora"),
    "MiSS of another mode": ("MiSS", {"init_weights": "bat"}, ShapeMismatch, "do not fit"),
    "MiSS of an unknown mode": ("MiSS", {"init_weights": "new"}, CorruptCheckpoint, "init_weights"),
    "C3A of another block": ("C3A", {"block_size": 8}, ShapeMismatch, "block size"),
    "SHiRA of another rank": ("SHiRA", {"r": 3}, ShapeMismatch, "number of entries"),
    "LoKr of another rank": ("LoKr of products", {"r": 2}, ShapeMismatch, "another rank"),
    "a bias of no kind": ("HRA", {"bias": "some"}, CorruptCheckpoint, "bias"),
    "a field of tomorrow": ("HiRA", {"use_tomorrow": True}, UnsupportedCheckpoint, "use_tomorrow"),
    "a number of tomorrow": ("C3A", {"tomorrow": 0}, UnsupportedCheckpoint, "tomorrow"),
    "a module that was not saved": ("LoHa", {"modules_to_save": ["norm"]}, UnmatchedAdapter, "norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_refused(name: str, saved: Any, base: Path, tmp_path: Path) -> None:
    case, changes, error, words = CONFIGS[name]
    adapter = cases.edit_config(cases.copied(saved(case), tmp_path / "adapter"), **changes)
    _refused(survey(base, adapter).problems, error, words)


@pytest.mark.parametrize("name", CASES)
def test_fields_that_say_nothing_do_not_matter(name: str, saved: Any, base: Path, tmp_path: Path) -> None:
    adapter = cases.edit_config(cases.copied(saved(name), tmp_path / "adapter"), use_a=False, b_config=None, c={})
    assert not survey(base, adapter).problems


def test_several_stages_of_boft(base: Path, module: Any, tmp_path: Path) -> None:
    config = peft.BOFTConfig(target_modules=["tall"], boft_block_size=4, boft_n_butterfly_factor=2)
    _refused(survey(base, cases.save_adapter(module, config, tmp_path)).problems, UnsupportedCheckpoint, "stages")


def test_oft_on_an_embedding(base: Path, module: Any, tmp_path: Path) -> None:
    config = peft.OFTConfig(target_modules=["table", "tall"], oft_block_size=4)
    _refused(survey(base, cases.save_adapter(module, config, tmp_path)).problems, UnsupportedCheckpoint, "embedding")


def test_a_convolution_in_groups(tmp_path: Path) -> None:
    grouped = cases.shaken(methods.Grouped())
    plain = cases.save_plain(grouped, tmp_path / "base")
    configs = {
        "ia3": peft.IA3Config(target_modules=["conv"], feedforward_modules=["conv"]),
        "oft": peft.OFTConfig(target_modules=["conv"], oft_block_size=4),
    }
    for name, config in configs.items():
        adapter = cases.save_adapter(grouped, config, tmp_path / name)
        _refused(survey(plain, adapter).problems, ShapeMismatch, "groups")


def test_flags_for_lora_are_not_for_others(saved: Any, base: Path) -> None:
    options = ScaleOptions(alpha={"": 3.0}, rslora=frozenset({""}))
    subject = Subject(methods.tree(base), methods.tree(saved("LoHa")))
    problems = Peft().survey(subject, options).problems
    assert [type(problem) for problem in problems] == [UsageError, UsageError]


def test_a_square_conv1d_under_a_method_that_has_none(base: Path, saved: Any, tmp_path: Path) -> None:
    tree = methods.tree(base)
    square = {("h.0.c_proj.weight",): tree.index.tensors[("square.weight",)]}
    gpt2 = type(tree)(type(tree.index)(square), "gpt2", {"model_type": "gpt2"})
    for name in ("HRA", "DeLoRA"):
        adapter = cases.edit_config(cases.copied(saved(name), tmp_path / name), modules_to_save=None, bias="none")
        cases.edit_factors(
            adapter,
            lambda found: {
                key.replace("square", "h.0.c_proj"): value
                for key, value in found.items()
                if "square." in key and "bias" not in key
            },
        )
        found = Peft().survey(Subject(gpt2, methods.tree(adapter)), ScaleOptions())
        _refused(found.problems, UnsupportedCheckpoint, "(inputs, outputs)")


def test_every_other_peft_type_is_refused_by_name(base: Path, saved: Any, tmp_path: Path) -> None:
    supported = {name for method in METHODS for name in method.peft_types} | {LORA, TOKENS}
    others = {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - supported
    assert {"PROMPT_TUNING", "FOURIERFT", "VBLORA", "GRALORA", "ROAD", "WAVEFT", "PSOFT", "OSF", "XLORA"} <= others
    adapter = cases.copied(saved("LoHa"), tmp_path / "adapter")
    for name in sorted(others):
        cases.edit_config(adapter, peft_type=name)
        problem, *_ = survey(base, adapter).problems
        assert isinstance(problem, UnsupportedCheckpoint)
        assert f"peft_type {name} " in str(problem)
        assert "not supported" in str(problem)


def test_every_field_that_peft_writes_is_known_or_off_by_default() -> None:
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        method = method_of({"peft_type": kind.value})
        if method is not None:
            defaults = (config(total_step=9) if kind.value == "ADALORA" else config()).to_dict()
            off = {name for name, value in defaults.items() if value is None or value is False or value in ([], {}, "")}
            unknown = set(defaults) - known_fields(method) - off
            assert not unknown, (kind, unknown)


# End to end.


def _kron(w1: Any, w2: Any, scale: float = 1.0) -> Any:
    """peft's make_kron for layouts that torch.kron cannot view: the same, from a copy in row-major order."""
    w1 = w1[:, :, None, None] if len(w2.shape) == 4 else w1
    return torch.kron(w1.contiguous(), w2.clone(memory_format=torch.contiguous_format)) * scale


def merge_as_peft(module: Any, base: Path, adapter: Path, out: Path) -> None:
    """The tool's merge is what peft's own is."""
    merged = cases.merge(base, adapter, out=out, flags=("--verify",))
    with mock.patch("peft.tuners.lokr.layer.make_kron", _kron):
        expected = cases.merged_plain(module, adapter)
    cases.assert_same(merged, expected, cases.tensors(base))


@pytest.mark.parametrize("name", CASES)
def test_a_merge_is_what_peft_makes_of_it(name: str, module: Any, saved: Any, base: Path, tmp_path: Path) -> None:
    merge_as_peft(module, base, saved(name), tmp_path / "out")


def test_bone_is_miss_under_its_old_name(saved: Any, base: Path, module: Any, tmp_path: Path) -> None:
    for name in ("MiSS", "MiSS bat"):
        bone = cases.copied(saved(name), tmp_path / name / "bone")
        cases.renamed(bone, lambda key: key.replace("miss_", "bone_"))
        config = json.loads((bone / "adapter_config.json").read_text())
        kept = {key: value for key, value in config.items() if not key.startswith(("miss_", "mini_"))}
        (bone / "adapter_config.json").write_text(json.dumps(kept | {"peft_type": "BONE"}))
        merged = cases.merge(base, bone, out=tmp_path / name / "out")
        cases.assert_same(merged, cases.merged_plain(module, saved(name)), cases.tensors(base))


def test_layer_norms_that_were_trained_whole(module: Any, base: Path, tmp_path: Path) -> None:
    config = peft.LNTuningConfig(target_modules=["norm"], modules_to_save=["table"])
    adapter = cases.save_adapter(module, config, tmp_path / "adapter")
    found = survey(base, adapter)
    assert not found.problems
    assert {one.target[0]: one.reason for one in found.replacements} == {
        "norm.weight": "LN tuning",
        "norm.bias": "LN tuning",
        "table.weight": "modules_to_save",
    }
    summary = Peft().describe(methods.tree(adapter), ScaleOptions())
    assert summary.method == "LN tuning"
    assert set(summary.riding) == {"norm.weight: LN tuning", "norm.bias: LN tuning", "table.weight: modules_to_save"}
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    # peft leaves the wrapper of a module that was saved where it was.
    left = {k: v for k, v in cases.merged_plain(module, adapter).items() if ".original_module." not in k}
    expected = {key.replace(".modules_to_save.default", ""): value for key, value in left.items()}
    cases.assert_same(merged, expected, cases.tensors(base))
    half = cases.edit_factors(cases.copied(adapter, tmp_path / "half"), _remove("ln_tuning_layers.bias"))
    _refused(survey(base, half).problems, UnmatchedAdapter, "norm.bias")


GPT2 = ["c_attn", "c_proj", "c_fc"]
TURNED: dict[str, Callable[[], Any]] = {
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        target_modules=GPT2, init_r=4, target_r=2, lora_alpha=3, total_step=10, tinit=1, tfinal=1
    ),
    "IA3": lambda: peft.IA3Config(target_modules=GPT2, feedforward_modules=r".*mlp\.c_proj", fan_in_fan_out=True),
    "VeRA": lambda: peft.VeraConfig(target_modules=GPT2, r=5, fan_in_fan_out=True),
    "HiRA": lambda: peft.HiraConfig(target_modules=GPT2, r=4, fan_in_fan_out=True),
    "HiRA with the flag as peft leaves it": lambda: peft.HiraConfig(target_modules=GPT2, r=4),
    "RandLora": lambda: peft.RandLoraConfig(target_modules=GPT2, r=5, randlora_alpha=10, fan_in_fan_out=True),
}


@pytest.mark.parametrize("name", TURNED)
def test_conv1d_of_transformers(name: str, tmp_path: Path) -> None:
    """``attn.c_proj`` is square, the others are not."""
    model = cases.small_model("gpt2")
    base = cases.save_base(model, tmp_path / "base")
    adapter = cases.save_adapter(model, TURNED[name](), tmp_path / "adapter")
    found = survey(base, adapter)
    assert not found.problems, found.problems
    layouts = {site.parameters.equation.text for site in found.sites if not site.label.endswith("bias")}
    # Where factors do not show which side is which, and nothing depends on it, a weight counts as (outputs, inputs).
    assert layouts == ({"ri,or->io", "ri,or->oi"} if name == "RandLora" else {"ri,or->io"})
    merged = cases.merge(base, adapter, out=tmp_path / "out", flags=("--verify",))
    cases.assert_same(merged, cases.merged_by_peft(base, adapter), cases.tensors(base))


LLAMA: dict[str, Callable[[], Any]] = {
    "LoHa": lambda: peft.LoHaConfig(
        target_modules=["q_proj", "down_proj"],
        r=3,
        alpha=5,
        rank_pattern={r"layers.0.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 7},
    ),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj", "up_proj"], oft_block_size=8, bias="all"),
    "MiSS": lambda: peft.MissConfig(target_modules=["q_proj", "down_proj"], r=6),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "a head": lambda: peft.HiraConfig(target_modules=["q_proj", "lm_head"], r=3),
}


@pytest.mark.parametrize("name", LLAMA)
def test_a_language_model(name: str, tmp_path: Path) -> None:
    model = cases.small_model("llama", tie_word_embeddings=False)
    base = cases.save_base(model, tmp_path / "base")
    adapter = cases.save_adapter(model, LLAMA[name](), tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(base, adapter), cases.tensors(base))


def test_a_refusal_writes_nothing(saved: Any, base: Path, tmp_path: Path) -> None:
    adapter = cases.edit_config(cases.copied(saved("VeRA"), tmp_path / "adapter"), save_projection=False)
    outcome = run("merge", base, "--adapter", adapter, "-o", tmp_path / "out")
    assert outcome.code == 4
    assert "VeRA" in outcome.error
    assert not (tmp_path / "out").exists()


def test_the_cases_cover_every_method() -> None:
    covered = {case.config().peft_type.value for case in CASES.values()} | {"LN_TUNING"}
    assert covered == {method.peft_types[0] for method in METHODS}
    assert set(LINEAR) <= set(FLAT)
    assert all(isinstance(case, Case) for case in CASES.values())


def test_a_merge_that_is_not_peft_s_forward_is_said(saved: Any, base: Path) -> None:
    found = survey(base, saved("OFT"))
    assert [warning for warning in found.warnings if "overlapping patches" in warning]
    assert not [warning for warning in survey(base, saved("BOFT")).warnings if "overlapping" in warning]


def test_an_inspection_measures_what_factors_can_say(saved: Any, base: Path) -> None:
    product = run("inspect", base, "--adapter", saved("VeRA"), "--stats", "--json").json
    assert all(site["stats"]["relative_norm"] > 0 for site in product["sites"])
    for name in ("OFT", "HiRA", "IA3"):
        outcome = run("inspect", base, "--adapter", saved(name), "--stats", "--json")
        assert outcome.code == 0, outcome.stderr
        assert {(site["equation"], site["stats"]) for site in outcome.json["sites"]} == {(CASES[name].operation, None)}
        assert run("inspect", base, "--adapter", saved(name), "--stats").code == 0
