"""Random bits by seed, name and position: against a generator written from its paper, and their statistics."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.draws import keep_mask, keep_run, tensor_name

_MASK = 2**64 - 1


def _philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 as Salmon et al. (2011) define it."""
    words = [counter >> 64 * number & _MASK for number in range(4)]
    first, second = key
    for _ in range(10):
        one, other = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [other >> 64 ^ words[1] ^ first, other & _MASK, one >> 64 ^ words[3] ^ second, one & _MASK]
        first, second = first + 0x9E3779B97F4A7C15 & _MASK, second + 0xBB67AE8584CAA73B & _MASK
    return words


def _expected(seed: int, name: str, count: int, density: float) -> list[bool]:
    digest = hashlib.sha256(str(seed).encode() + b"\0" + name.encode()).digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    words = [word for block in range(math.ceil(count / 4)) for word in _philox(key, block + 1)]
    return [word < math.floor(density * 2.0**64) for word in words[:count]]


def test_the_reference_gives_the_known_answer() -> None:
    found = _philox((0, 0), 0)
    assert found == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@pytest.mark.parametrize(("seed", "name"), [(0, "a#0"), (-3, "größe/kernel#1"), (2**70, "")])
@pytest.mark.parametrize("density", [0.5, 0.03, 0.999])
def test_the_bits_are_those_of_the_definition(seed: int, name: str, density: float) -> None:
    assert keep_run(seed, name, 0, 203, density).tolist() == _expected(seed, name, 203, density)


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0, 1))
def test_a_run_is_a_part_of_the_whole(start: int, length: int, density: float) -> None:
    whole = keep_run(1, "w", 0, 700, density)
    np.testing.assert_array_equal(keep_run(1, "w", start, start + length, density), whole[start : start + length])


def test_far_entries_need_no_near_ones() -> None:
    start = 2**40 + 3
    one = keep_run(0, "w", start, start + 50, 0.5)
    np.testing.assert_array_equal(keep_run(0, "w", start + 7, start + 50, 0.5), one[7:])
    assert 0 < one.sum() < 50


def test_a_mask_is_the_runs_in_row_major_order() -> None:
    mask = keep_mask(5, "w", (3, 7, 11), 0.4)
    assert mask.shape == (3, 7, 11) and mask.dtype == np.bool_
    np.testing.assert_array_equal(mask.reshape(-1), keep_run(5, "w", 0, 231, 0.4))


def test_a_mask_of_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keep_mask(5, "w", (50,), 0.4)
    monkeypatch.setattr("lora_merge_cli.draws._RUN", 7)
    np.testing.assert_array_equal(keep_mask(5, "w", (50,), 0.4), whole)


@pytest.mark.parametrize("shape", [(), (0,), (4, 0)])
def test_shapes_with_one_entry_or_none(shape: tuple[int, ...]) -> None:
    assert keep_mask(0, "w", shape, 0.5).shape == shape


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_about_the_density_is_kept(density: float) -> None:
    count = 200_000
    kept = int(keep_mask(0, "w", (count,), density).sum())
    assert abs(kept - density * count) < 5 * math.sqrt(count * density * (1 - density))


def test_one_keeps_all_and_zero_nothing() -> None:
    assert keep_run(0, "w", 3, 99, 1.0).all()
    assert not keep_run(0, "w", 3, 99, 0.0).any()


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_a_density_that_is_no_probability(density: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        keep_run(0, "w", 0, 1, density)


def test_a_lower_density_keeps_a_part_of_what_a_higher_one_keeps() -> None:
    low, high = (keep_run(0, "w", 0, 5000, density) for density in (0.2, 0.6))
    assert not (low & ~high).any()


@pytest.mark.parametrize(("seed", "name"), [(1, "w"), (0, "v"), (10, "w")])
def test_other_seeds_and_names_draw_independently(seed: int, name: str) -> None:
    count = 100_000
    one, other = keep_run(0, "w", 0, count, 0.5), keep_run(seed, name, 0, count, 0.5)
    assert abs(int((one == other).sum()) - count / 2) < 5 * math.sqrt(count) / 2


def test_seed_and_name_do_not_run_together() -> None:
    assert (keep_run(1, "2w", 0, 200, 0.5) != keep_run(12, "w", 0, 200, 0.5)).any()


def test_the_tensors_of_a_target_have_names_of_their_own() -> None:
    assert len({tensor_name(target, number) for target in ("a", "b") for number in range(4)}) == 8
