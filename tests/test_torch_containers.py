"""The containers of torch's files, tampered with, cut off or damaged: refused by the right error."""

from __future__ import annotations

import functools
import io
import pickle
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_merge_cli.errors import CorruptCheckpoint, LoraMergeError, UnsupportedCheckpoint
from tests.torch_files import FORMAT, archive, legacy, legacy_tensor, number, read_all, state, tensor, text

GOOD = {archive: state(tensor()), legacy: state(legacy_tensor())}
BOTH = pytest.mark.parametrize("write", [archive, legacy])


def test_zip_tricks(tmp_path: Path) -> None:
    good = GOOD[archive]
    path = tmp_path / "x.pt"

    def made(change: Any, error: type[LoraMergeError], match: str) -> None:
        archive(path, good)
        change()
        with pytest.raises(error, match=match):
            read_all(path)

    def deflated() -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", good)
            file.writestr("archive/data/0", bytes(10**7))

    def appended(name: str, mode: int = 0o644, contents: bytes = b"x") -> None:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(info, contents)

    def patched(old: bytes, new: bytes, count: int = -1) -> None:
        path.write_bytes(path.read_bytes().replace(old, new, count))

    def in_directory(field: int, value: bytes, name: bytes = b"archive/data/0") -> None:
        raw = bytearray(path.read_bytes())
        entry = raw.rindex(name) - 46
        raw[entry + field : entry + field + len(value)] = value
        path.write_bytes(raw)

    def without_archive() -> None:
        path.write_bytes(path.read_bytes()[:-30])

    corrupt, refused = CorruptCheckpoint, UnsupportedCheckpoint
    made(deflated, refused, "compressed")
    made(functools.partial(appended, "archive/link", stat.S_IFLNK | 0o777), corrupt, "symbolic link")
    with pytest.warns(UserWarning, match="Duplicate"):
        made(functools.partial(appended, "archive/data/0"), corrupt, "two members")
    made(functools.partial(appended, "other/data.pkl"), corrupt, "several pickles")
    made(functools.partial(appended, "archive/constants.pkl"), refused, "TorchScript")
    made(functools.partial(appended, "archive/code/x.py"), refused, "TorchScript")
    made(functools.partial(appended, "archive/byteorder", contents=b"big"), refused, "big-endian")
    made(functools.partial(patched, b"archive/data/0", b"archive/data/1", 1), corrupt, "contradict")
    made(functools.partial(in_directory, 8, b"\x01\0"), refused, "encrypted")
    made(functools.partial(in_directory, 42, struct.pack("<I", 0)), corrupt, r"contradict|overlaps")
    made(functools.partial(in_directory, 20, struct.pack("<II", 10**6, 10**6)), corrupt, "overlaps")
    made(functools.partial(in_directory, 20, struct.pack("<II", 16, 10**9)), corrupt, "overlaps")
    made(functools.partial(in_directory, 16, b"\1\2\3\4", b"archive/data.pkl"), corrupt, "checksum")
    made(functools.partial(in_directory, 20, struct.pack("<II", 8, 8)), corrupt, "smaller than the pickle states")
    made(without_archive, corrupt, "directory cannot be read")


@BOTH
def test_any_truncation_is_found(tmp_path: Path, write: Any) -> None:
    whole = write(tmp_path / "x.pt", GOOD[write]).read_bytes()
    file = tmp_path / "cut.pt"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        checkpoint = None
        with pytest.raises((CorruptCheckpoint, UnsupportedCheckpoint)):
            checkpoint = FORMAT.open(file, None)
            if checkpoint is None:
                assert size < 40, "cut off behind its magic number, and not recognised"
                raise CorruptCheckpoint("too little to be anything's")
            read_all(file)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), write=st.sampled_from([archive, legacy]))
def test_damage_is_read_or_refused_but_never_crashes(tmp_path: Path, data: Any, write: Any) -> None:
    raw = bytearray(write(tmp_path / "x.pt", GOOD[write]).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "y.pt"
    file.write_bytes(raw)
    checkpoint = None
    try:
        checkpoint = FORMAT.open(file, None)
        if checkpoint is not None:
            read_all(file)
    except LoraMergeError as error:
        assert "\n" not in str(error)


def test_legacy_files_that_contradict_themselves(tmp_path: Path) -> None:
    good = GOOD[legacy]
    path = tmp_path / "x.pt"
    for error, case in (
        (CorruptCheckpoint, {"keys": ()}),
        (CorruptCheckpoint, {"keys": ("0", "0")}),
        (CorruptCheckpoint, {"keys": ("0", "1")}),
        (CorruptCheckpoint, {"keys": (0,)}),
        (CorruptCheckpoint, {"tail": struct.pack("<q", 5) + bytes(20)}),
        (CorruptCheckpoint, {"tail": struct.pack("<q", -1) + bytes(20)}),
        (UnsupportedCheckpoint, {"version": 1002}),
        (UnsupportedCheckpoint, {"little_endian": False}),
    ):
        with pytest.raises(error):
            read_all(legacy(path, good, **case))


def test_a_part_of_a_legacy_storage(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    tail = struct.pack("<q4f", 4, 0, 1, 2, 3)
    inside, outside = (b"(" + text("1") + number(start) + number(2) + b"t" for start in (1, 3))
    checkpoint = FORMAT.open(legacy(path, state(legacy_tensor((2,), inside)), tail=tail), None)
    assert checkpoint is not None
    assert checkpoint.source.read(("a",), (slice(0, 2),)).tolist() == [1, 2]
    with pytest.raises(CorruptCheckpoint, match="lies outside it"):
        read_all(legacy(path, state(legacy_tensor((2,), outside))))


def test_what_only_looks_like_torchs(tmp_path: Path) -> None:
    for name, contents, error in (
        ("a.pth", b"", CorruptCheckpoint),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\noid", CorruptCheckpoint),
        ("a.pt", pickle.dumps({"a": 1}), UnsupportedCheckpoint),
        ("a.pt", b"PK\x03\x04 and no more", CorruptCheckpoint),
    ):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(error):
            FORMAT.open(tmp_path / name, None)
    with tarfile.open(tmp_path / "old", "w") as tar:
        tar.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    with pytest.raises(UnsupportedCheckpoint, match=r"torch 0\.1"):
        FORMAT.open(tmp_path / "old", None)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("data.pkl", "x")
    (tmp_path / "a.ggml").write_bytes(b"GGUF" + bytes(100))
    for other in ("a.npz", "a.ggml"):
        assert FORMAT.open(tmp_path / other, None) is None
