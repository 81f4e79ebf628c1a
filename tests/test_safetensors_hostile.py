"""Damaged and malicious files, judged by the safetensors library itself: what it refuses is refused here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_merge_cli.errors import CorruptCheckpoint, LoraMergeError, UnsupportedCheckpoint
from lora_merge_cli.formats.safetensors_dir import SafetensorsFormat
from lora_merge_cli.records import full_region
from tests.safetensors_files import assemble, library_writes, with_header, write

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [0, 7], "data_offsets": [32, 32]},
}
DATA = bytes(range(32))


def read_all(path: Path) -> None:
    checkpoint = SafetensorsFormat().open(path, None)
    assert checkpoint is not None
    for leaf, spec in checkpoint.source.index().tensors.items():
        assert checkpoint.source.read(leaf, full_region(spec.shape)).shape == spec.shape


def refusal(raw: bytes, directory: Path) -> LoraMergeError | None:
    (directory / "x.safetensors").write_bytes(raw)
    try:
        read_all(directory / "x.safetensors")
    except LoraMergeError as error:
        return error
    return None


def library_refuses(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return True
    return False


def changed(**changes: Any) -> bytes:
    """The good file with some entries replaced; None takes one away."""
    document = {name: item for name, item in {**GOOD, **changes}.items() if item is not None}
    return with_header(json.dumps(document).encode(), DATA)


def entry(name: str, **changes: Any) -> bytes:
    return changed(**{name: {**GOOD[name], **changes}})


HOSTILE = {
    "empty": b"",
    "seven bytes": b"\x01" * 7,
    "no header": bytes(8),
    "a huge length": b"\xff" * 8 + b"{}",
    "a length just beyond the file": (3).to_bytes(8, "little") + b"{}",
    "a length over the limit": (100_000_001).to_bytes(8, "little") + b"{}",
    "not JSON": with_header(b"{nonsense", DATA),
    "not UTF-8": with_header(b'{"\xff": 1}', DATA),
    "half a surrogate pair": with_header(json.dumps({"\ud800": GOOD["a"]}).encode(), DATA[:24]),
    "a list": with_header(b"[]"),
    "two documents": with_header(b"{}{}"),
    "nested deeply": with_header(b'{"a":' * 50_000),
    "NaN": with_header(b'{"a":NaN}'),
    "NaN beside what counts": entry("b", note=float("nan")),
    "digits without end": with_header(b'{"a":' + b"9" * 9999 + b"}"),
    "an entry that is a number": changed(b=3),
    "an entry that is null": changed(b=None) + b"x",
    "no dtype": changed(b={"shape": [4], "data_offsets": [24, 32]}),
    "no shape": changed(b={"dtype": "BF16", "data_offsets": [24, 32]}),
    "no offsets": changed(b={"dtype": "BF16", "shape": [4]}),
    "three offsets": entry("b", data_offsets=[24, 32, 32]),
    "a dtype that is a list": entry("b", dtype=["BF16"]),
    "a shape that is a number": entry("b", shape=4),
    "a negative extent": entry("b", shape=[-4]),
    "two negative extents": entry("b", shape=[-2, -2]),
    "an extent that is a float": entry("b", shape=[4.0]),
    "an extent that is true": entry("b", shape=[4, True]),
    "a shape beyond bounds": entry("b", shape=[2**40, 2**40]),
    "a shape that wraps around to nothing": entry("c", shape=[2**32, 2**32]),
    "negative offsets": entry("b", data_offsets=[-8, 0]),
    "offsets the wrong way round": entry("b", data_offsets=[32, 24]),
    "offsets behind the end": entry("b", data_offsets=[32, 40]),
    "a size that does not fit": entry("b", shape=[5]),
    "an overlap": changed(d={"dtype": "U8", "shape": [8], "data_offsets": [20, 28]}),
    "the same bytes twice": changed(d={**GOOD["b"]}),
    "a hole": changed(b={"dtype": "U8", "shape": [4], "data_offsets": [28, 32]}),
    "a hole at the start": changed(a={"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}),
    "truncated data": changed()[:-1],
    "no data": changed()[: -len(DATA)],
    "bytes behind the end": changed() + b"x",
    "a long name": changed(**{"n" * 10**6: {"dtype": "U8", "shape": [1], "data_offsets": [0, 2]}}),
    "a long dtype": entry("b", dtype=["F" * 10**6]),
    "a shape of a million axes": entry("b", shape=[-1] * 10**6),
    "an offset of many digits": entry("b", data_offsets=[10**4000, 10**4000 + 8]),
    "metadata that are no texts": changed(__metadata__={"a": 1}),
    "metadata that are a list": changed(__metadata__=["a"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_library_refuses_is_refused(tmp_path: Path, name: str):
    assert library_refuses(HOSTILE[name]), "a bad example: the library takes it"
    error = refusal(HOSTILE[name], tmp_path)
    assert isinstance(error, CorruptCheckpoint), error
    assert "x.safetensors" in str(error.where)
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


def test_the_good_file_is_good(tmp_path: Path):
    assert not library_refuses(changed())
    assert refusal(changed(), tmp_path) is None
    assert refusal(changed(__metadata__=None), tmp_path) is None


def test_errors_name_the_tensor(tmp_path: Path):
    assert "x.safetensors :: b" in str(refusal(HOSTILE["a size that does not fit"], tmp_path))
    assert "expected 10 bytes" in str(refusal(HOSTILE["a size that does not fit"], tmp_path))
    assert "overlap: " in str(refusal(HOSTILE["an overlap"], tmp_path))


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', '{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}']
)
def test_a_name_that_occurs_twice(tmp_path: Path, text: str):
    twice = json.dumps(GOOD)[:-1].encode() + b',"a":' + json.dumps(GOOD["a"]).encode() + b"}"
    for raw in (with_header(text.encode()), with_header(twice, DATA)):
        error = refusal(raw, tmp_path)
        assert isinstance(error, CorruptCheckpoint)
        assert "occurs twice" in str(error)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "I128"])
def test_dtypes_that_are_not_supported_are_named(tmp_path: Path, dtype: str):
    error = refusal(entry("b", dtype=dtype), tmp_path)
    assert isinstance(error, UnsupportedCheckpoint)
    assert f":: b (found {dtype})" in str(error)


def test_shapes_that_numpy_cannot_make(tmp_path: Path):
    assert isinstance(refusal(entry("c", shape=[0, 2**62, 2**62]), tmp_path), CorruptCheckpoint)
    assert isinstance(refusal(entry("c", shape=[0] + [1] * 70), tmp_path), UnsupportedCheckpoint)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path):
    error = refusal(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", tmp_path)
    assert "git lfs pull" in str(error)


@settings(max_examples=400)
@given(st.integers(0, len(changed()) - 1), st.integers(0, 255), st.integers(-3, 3))
@example(0, 1, 0)
def test_one_wrong_byte(tmp_path_factory, where: int, byte: int, resize: int):
    raw = bytearray(changed(__metadata__={"format": "pt"}))
    raw[where] = byte
    raw = bytes(raw[:resize]) if resize < 0 else bytes(raw) + b"\0" * resize
    error = refusal(raw, tmp_path_factory.mktemp("x"))
    if library_refuses(raw):
        # A dtype that nobody knows is named as such.
        assert isinstance(error, CorruptCheckpoint | UnsupportedCheckpoint)
    else:
        assert error is None or isinstance(error, UnsupportedCheckpoint) or "occurs twice" in str(error), error


ITEMS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "X"]),
        "shape": st.lists(st.integers(-1, 4), max_size=3),
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 24, 32]), min_size=2, max_size=2),
    }
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from("abcd"), ITEMS, max_size=3), st.booleans())
def test_any_layout(tmp_path_factory, document: dict[str, Any], fitting: bool):
    if fitting:
        position = 0
        for item in document.values():
            size = int(np.prod(item["shape"])) * {"F32": 4, "BF16": 2}.get(item["dtype"], 1)
            item["data_offsets"] = [position, position + size]
            position += max(size, 0)
    raw = with_header(json.dumps(document).encode(), bytes(position if fitting else 32))
    error = refusal(raw, tmp_path_factory.mktemp("x"))
    if library_refuses(raw):
        assert isinstance(error, CorruptCheckpoint | UnsupportedCheckpoint)
    else:
        assert error is None or isinstance(error, UnsupportedCheckpoint)


def sharded(directory: Path) -> dict[str, Any]:
    """Two shards and their index, which the caller may spoil."""
    write(directory, {("a",): np.zeros(4), ("b",): np.ones(4)}, max_shard_bytes=32)
    return json.loads((directory / "model.safetensors.index.json").read_text())


def spoilt(directory: Path, index: Any) -> str:
    text = index if isinstance(index, str) else json.dumps(index)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptCheckpoint) as caught:
        read_all(directory)
    return str(caught.value)


@pytest.mark.parametrize("index", [
    "", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}',
    "[" * 99_999, '{"weight_map": {"a": "x", "a": "y"}}',
])  # fmt: skip
def test_an_index_that_is_none(tmp_path: Path, index: str):
    sharded(tmp_path)
    assert "model.safetensors.index.json" in spoilt(tmp_path, index)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "sub/../../out.safetensors", "", "a\0b", "."])
def test_an_index_that_points_elsewhere(tmp_path: Path, name: str):
    library_writes(tmp_path / "out.safetensors", {"a": np.zeros(4)})
    directory = tmp_path / "in"
    index = sharded(directory)
    (directory / "sub").mkdir()
    index["weight_map"]["a"] = name
    assert "outside its directory" in spoilt(directory, index)


def test_an_absolute_name_is_refused_even_inside(tmp_path: Path):
    index = sharded(tmp_path)
    index["weight_map"]["a"] = str(tmp_path / index["weight_map"]["a"])
    assert "outside its directory" in spoilt(tmp_path, index)


def test_a_missing_shard(tmp_path: Path):
    index = sharded(tmp_path)
    (tmp_path / index["weight_map"]["a"]).unlink()
    message = spoilt(tmp_path, index)
    assert "shards are missing" in message
    assert index["weight_map"]["a"] in message
    (tmp_path / index["weight_map"]["a"]).symlink_to("nowhere")
    assert "a link that leads nowhere" in spoilt(tmp_path, index)


@pytest.mark.parametrize("change, found", [
    ({"c": 1}, "no such tensors"),
    ({"c": 1, "a": None}, "a, not listed for it"),
    ({"c": 1, "a": 2}, "a, not listed for it"),
    ({"a": 2}, "no such tensors"),
    ({"a": 2, "b": 1}, "a, not listed for it"),
])  # fmt: skip
def test_shards_that_do_not_hold_what_the_index_says(tmp_path: Path, change: dict[str, int | None], found: str):
    index = sharded(tmp_path)
    for key, number in change.items():
        index["weight_map"][key] = f"model-0000{number}-of-00002.safetensors"
        if number is None:
            del index["weight_map"][key]
    message = spoilt(tmp_path, index)
    assert "does not hold what the index says" in message
    assert "-of-00002.safetensors" in message
    assert found in message


def test_a_tensor_that_the_index_does_not_know(tmp_path: Path):
    write(tmp_path, {("a",): np.zeros(4), ("b",): np.ones(4), ("c",): np.ones(8)}, max_shard_bytes=64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["b"]
    message = spoilt(tmp_path, index)
    assert "model-00001-of-00002.safetensors (expected only what is listed, found b, not listed for it)" in message


def test_a_shard_that_is_cut_off(tmp_path: Path):
    index = sharded(tmp_path)
    shard = tmp_path / index["weight_map"]["b"]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"ends too soon: {shard}" in spoilt(tmp_path, index)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path):
    write(tmp_path, {("a",): np.zeros(4), ("b",): np.ones(4)})
    source = SafetensorsFormat().open(tmp_path, None).source
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 8)
    stored = source.stored(("b",))
    for read in (lambda: source.read(("b",), (slice(0, 4),)), lambda: list(stored.values)):
        with pytest.raises(CorruptCheckpoint, match=r"ends too soon: .*model.safetensors :: b"):
            read()


@pytest.mark.parametrize("metadata", [
    {"lora_merge.key_paths": "[]"},
    {"lora_merge.key_paths": "{"},
    {"lora_merge.key_paths": "{}"},
    {"lora_merge.key_paths": '{"w": {"path": "w"}}'},
    {"lora_merge.key_paths": '{"w": {"path": [1.5]}}'},
    {"lora_merge.key_paths": '{"w": {"path": [true]}}'},
    {"lora_merge.key_paths": '{"w": {"path": ["w"]}, "v": {"path": ["v"]}}'},
    {"lora_merge.key_paths": '{"v": {"path": ["v"]}, "w": {"path": ["v"]}}'},
    {"lora_merge.key_paths": "[" * 99_999},
    {"lora_merge.constants": "{}"[:1]},
    {"lora_merge.constants": '[["a", "Dict", null]]'},
    {"lora_merge.constants": '[[["a"], "Dict"]]'},
    {"lora_merge.constants": '[[["a"], "Dict", 1]]'},
])  # fmt: skip
def test_tables_of_key_paths_that_are_not_ours(tmp_path: Path, metadata: dict[str, str]):
    names = ["v", "w"] if metadata.get("lora_merge.key_paths", "").startswith('{"v"') else ["w"]
    tensors = {name: {"dtype": "U8", "shape": [1], "data": b"x"} for name in names}
    error = refusal(assemble(tensors, metadata), tmp_path)
    assert isinstance(error, CorruptCheckpoint)
