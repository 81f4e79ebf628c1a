"""Merging PEFT adapters of Conv1D, embedding, convolution and attention layers; each with DoRA where peft has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft import LoraConfig  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from tests import peft_cases as cases  # noqa: E402

DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return cases.small_model("gpt2", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def gpt2_base(gpt2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(gpt2, tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="module")
def llama() -> Any:
    return cases.small_model("llama")


@pytest.fixture(scope="module")
def llama_base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.save_base(llama, tmp_path_factory.mktemp("base") / "llama")


CONV1D = {
    "attention": ["c_attn"],
    "square": [r"attn.c_proj"],
    "all": ["c_attn", "c_proj", "c_fc"],
    "all and the head": ["c_attn", "c_proj", "c_fc", "lm_head"],
}


@DORA
@pytest.mark.parametrize("names", CONV1D.values(), ids=CONV1D)
def test_conv1d(names: list[str], dora: bool, gpt2: Any, gpt2_base: Path, tmp_path: Path) -> None:
    # With the head, peft saves the flag of the layer that it came to last, so that it is wrong for all others.
    config = LoraConfig(r=4, lora_alpha=10, target_modules=names, fan_in_fan_out="lm_head" not in names, use_dora=dora)
    adapter = cases.save_adapter(gpt2, config, tmp_path / "adapter")
    merged = cases.merge(gpt2_base, adapter, out=tmp_path / "out")
    cases.assert_same(merged, cases.merged_by_peft(gpt2_base, adapter), cases.tensors(gpt2_base))


def test_conv1d_with_patterns_and_a_bias(gpt2: Any, gpt2_base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        lora_bias=True,
        use_rslora=True,
        rank_pattern={"h.0.attn.c_attn": 2},
        alpha_pattern={"c_fc": 3},
    )
    adapter = cases.save_adapter(gpt2, config, tmp_path / "adapter")
    merged = cases.merge(gpt2_base, adapter, out=tmp_path / "out", flags=("--verify",))
    cases.assert_same(merged, cases.merged_by_peft(gpt2_base, adapter), cases.tensors(gpt2_base))


def test_conv1d_under_a_checkpoint_without_the_prefix(gpt2: Any, gpt2_base: Path, tmp_path: Path) -> None:
    headless = cases.save_base(gpt2.transformer, tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in cases.tensors(headless)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapter = cases.save_adapter(gpt2, config, tmp_path / "adapter")
    merged = cases.merge(headless, adapter, out=tmp_path / "out")
    expected = cases.merged_by_peft(gpt2_base, adapter)
    expected.pop("lm_head.weight")
    expected = {key.removeprefix("transformer."): value for key, value in expected.items()}
    cases.assert_same(merged, expected, cases.tensors(headless))


@DORA
@pytest.mark.parametrize("saved", [True, False])
def test_an_embedding(saved: bool, dora: bool, llama: Any, llama_base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["embed_tokens", "q_proj"], use_dora=dora)
    adapter = cases.save_adapter(llama, config, tmp_path / "adapter", save_embedding_layers=saved)
    assert any("base_layer" in key for key in cases.tensors(adapter)) == saved
    merged = cases.merge(llama_base, adapter, out=tmp_path / "out", flags=("--verify",))
    cases.assert_same(merged, cases.merged_by_peft(llama_base, adapter), cases.tensors(llama_base))


class Net(nn.Module):
    """One layer of each kind, with extents that are all different, and with equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 10, 3, padding=1)
        self.two = nn.Conv2d(6, 10, (3, 5), stride=2)
        self.point = nn.Conv2d(6, 10, 1)
        self.even = nn.Conv2d(8, 8, 3, bias=False)
        self.three = nn.Conv3d(6, 10, (2, 3, 4), dilation=2)
        self.emb = nn.Embedding(30, 12)
        self.square_emb = nn.Embedding(16, 16)
        self.fc = nn.Linear(12, 20)
        self.square = nn.Linear(16, 16)


LAYERS = ["one", "two", "point", "even", "three", "emb", "square_emb", "fc", "square"]


@DORA
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_of_a_plain_module(layer: str, dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    base = cases.save_plain(net, tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=7, target_modules=[layer], use_dora=dora)
    adapter = cases.save_adapter(net, config, tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out", flags=("--verify",))
    cases.assert_same(merged, cases.merged_plain(net, adapter), cases.tensors(base))


def test_all_layers_of_a_plain_module_as_one_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    base = cases.save_plain(net, tmp_path / "base")
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=LAYERS, use_rslora=True, rank_pattern={"emb": 2}, alpha_pattern={"t.*": 2}
    )
    adapter = cases.save_adapter(net, config, tmp_path / "adapter")
    merged = cases.merge(base / "model.safetensors", adapter, out=tmp_path / "out.safetensors")
    cases.assert_same(merged, cases.merged_plain(net, adapter), cases.tensors(base))


class Both(nn.Module):
    """Square layers of both orientations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.turned = Conv1D(16, 16)


def test_a_square_weight_of_an_unknown_model_is_turned_on_no_flag_alone(tmp_path: Path) -> None:
    # The flag that peft saves is that of the last layer it came to: here it is true, and wrong for one of the two.
    torch.manual_seed(0)
    net = Both()
    base = cases.save_plain(net, tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["linear", "turned"])
    adapter = cases.save_adapter(net, config, tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    outcome = cases.attempt(base, adapter, out=tmp_path / "out")
    assert outcome.code == 4
    assert "fan_in_fan_out" in outcome.error
    assert not (tmp_path / "out").exists()


class Attends(nn.Module):
    """Torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Any) -> Any:
        return self.attn(x, x, x)[0]


def test_torch_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Attends()
    base = cases.save_plain(net, tmp_path / "base")
    adapter = cases.save_adapter(net, LoraConfig(r=3, lora_alpha=7, target_modules=["attn"]), tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out")
    # peft computes the output projection's delta twice, in the adapter's own forward pass too.
    cases.assert_same(merged, cases.merged_plain(net, adapter), cases.tensors(base))


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3)})
    adapter = cases.save_adapter(net, LoraConfig(r=2, lora_alpha=3, target_modules=["conv"]), tmp_path / "adapter")
    base = cases.save_plain(nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, groups=2)}), tmp_path / "base")
    outcome = cases.attempt(base, adapter, out=tmp_path / "out")
    assert outcome.code == 4
    assert "conv" in outcome.error
    assert not (tmp_path / "out").exists()


def test_a_parameter_of_two_axes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    base = tmp_path / "base.safetensors"
    save_file(net.state_dict(), base)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=[], target_parameters=["fc.weight"])
    adapter = cases.save_adapter(net, config, tmp_path / "adapter")
    merged = cases.merge(base, adapter, out=tmp_path / "out.safetensors")
    cases.assert_same(merged, cases.merged_plain(net, adapter), cases.tensors(base))
