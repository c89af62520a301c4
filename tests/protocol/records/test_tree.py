"""The index and its digests, against a dictionary."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.records.tree import ZERO, Shelf, bucket_of, part_hashes, unpack_pairs

# Few buckets and few low bits, so that entries meet in buckets and overwrite one another.
HASHES = st.builds(lambda bucket, low: bucket << 52 | low, st.sampled_from([0, 1, 64, 4095]), st.integers(0, 5))
CHANGES = st.lists(st.tuples(HASHES, st.none() | st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1))))


def filled(entries: dict[int, tuple[int, int]]) -> Shelf:
    shelf = Shelf()
    keys = sorted(entries)
    shelf.load(keys, [entries[key][0] for key in keys], [entries[key][1] for key in keys])
    return shelf


@given(CHANGES)
def test_changes_one_by_one_give_what_loading_gives(changes: list[tuple[int, tuple[int, int] | None]]) -> None:
    shelf, model = Shelf(), dict[int, tuple[int, int]]()
    for key_hash, entry in changes:
        if entry is None:
            shelf.remove(key_hash)
            model.pop(key_hash, None)
        else:
            shelf.put(key_hash, *entry)
            model[key_hash] = entry
        shelf.root()  # digests are kept between changes, which is what could go wrong
    fresh = filled(model)
    assert (shelf.root(), shelf.tops(), shelf.level(0)) == (fresh.root(), fresh.tops(), fresh.level(0))
    assert {key: shelf.get(key) for key, _ in changes} == {key: model.get(key) for key, _ in changes}
    assert dict(shelf.entries()) == {key: entry[1] for key, entry in model.items()}
    assert len(shelf) == len(model)


@given(st.dictionaries(HASHES, st.tuples(st.integers(0, 3), st.just(0)), min_size=1), HASHES)
def test_a_difference_shows_all_the_way_up(entries: dict[int, tuple[int, int]], key_hash: int) -> None:
    shelf, other = filled(entries), filled(entries)
    version = entries.get(key_hash, (0, 0))[0]
    other.put(key_hash, version + 1, 0)
    number = bucket_of(key_hash)
    assert shelf.root() != other.root()
    assert _differing(shelf.tops(), other.tops()) == [number // 64]
    assert _differing(shelf.level(number // 64), other.level(number // 64)) == [number % 64]


def test_nothing_has_the_digest_of_nothing() -> None:
    shelf = Shelf()
    shelf.put(5, 1, 1)
    assert shelf.root() != ZERO
    shelf.remove(5)
    shelf.remove(5)
    assert (shelf.root(), shelf.tops(), len(shelf)) == (ZERO, ZERO * 64, 0)


def test_what_is_ahead_of_its_time_is_here_but_in_no_digest() -> None:
    shelf = filled({1: (1, 1), 2: (2, 2)})
    shelf.put(3, 3, 3)
    shelf.set_ahead({3})
    assert shelf.root() == filled({1: (1, 1), 2: (2, 2)}).root()
    assert shelf.get(3) == (3, 3)
    assert unpack_pairs(shelf.pairs(0)) == {1: 1, 2: 2}
    shelf.set_ahead(set())
    assert shelf.root() == filled({1: (1, 1), 2: (2, 2), 3: (3, 3)}).root()


@pytest.mark.parametrize("count", [64, 4096])
@pytest.mark.parametrize("salt", [0, 1, 2**63 - 1])
def test_parts_hold_every_pair_once(salt: int, count: int) -> None:
    shelf = filled({n * 977: (n, 0) for n in range(2000)})
    parts = shelf.parts(0, salt, count)
    assert len(parts) == count
    assert sorted(b"".join(parts)[at : at + 16] for at in range(0, 16 * 2000, 16)) == sorted(
        struct.pack(">QQ", n * 977, n) for n in range(2000)
    )
    assert len(part_hashes(parts)) == 8 * count


def test_keys_crafted_for_one_bucket_spread_over_its_parts() -> None:
    shelf = filled({n: (n, 0) for n in range(20_000)})
    parts = shelf.parts(0, 0x123456789ABCDEF, 1024)
    assert max(len(part) // 16 for part in parts) < 200


def _differing(a: bytes, b: bytes) -> list[int]:
    return [at // 8 for at in range(0, len(a), 8) if a[at : at + 8] != b[at : at + 8]]
