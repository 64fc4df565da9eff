"""The block cache: what it promises to operations that are run again (I1, I4), its bounds (I2), failures, views."""

import errno
from collections.abc import Callable
from itertools import pairwise

import pytest

from fusewire.ext4 import blocks
from fusewire.ext4.blocks import BlockCache, BlockMiss, runs_of
from fusewire.ext4.errors import Check, Corrupt
from tests.ext4.driver import seeded

BLOCK_BYTES = 1024
BLOCKS = 1 << 20


def cache_of(generation: int = blocks.MINIMUM_BLOCKS) -> BlockCache:
    made = BlockCache(BLOCK_BYTES, BLOCKS, generation * 2 * blocks.VIEW_FACTOR * BLOCK_BYTES)
    assert made.generation_blocks == generation
    return made


def data_of(block: int) -> bytes:
    return block.to_bytes(4, "little")


def admit(cache: BlockCache, *numbers: int) -> None:
    cache.admit({number: data_of(number) for number in numbers})


def held(cache: BlockCache, most: int) -> int:
    return sum(cache.holds(number) for number in range(most))


# ---- I1, I2, I4 ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("before", [0, 1, 100, 255, 256, 257, 400, 511, 512, 700])
def test_i1_a_block_outlives_half_a_cache_of_others(before: int) -> None:
    cache = cache_of()
    admit(cache, *range(1000, 1000 + before))
    admit(cache, 7)
    admit(cache, *range(5000, 5000 + cache.generation_blocks - 1))
    assert cache.read(7) == data_of(7)


def test_i1_blocks_in_use_stay_for_ever() -> None:
    cache = cache_of()
    admit(cache, 7)
    for number in range(100, 5000):
        admit(cache, number)
        if number % (cache.generation_blocks - 1) == 0:
            assert cache.read(7) == data_of(7)
    assert not cache.holds(100)


@pytest.mark.parametrize("before", [0, 3, 250, 300, 510])
def test_i1_counts_blocks_that_are_used_again(before: int) -> None:
    """Blocks that move from the old generation to the young one push others out like new ones."""
    cache = cache_of()
    admit(cache, *range(before))
    admit(cache, *range(10_000, 10_000 + cache.generation_blocks))
    admit(cache, 7_777)
    for number in range(10_000, 10_000 + cache.generation_blocks - 1):
        assert cache.read(number) == data_of(number)
    assert cache.read(7_777) == data_of(7_777)


def test_i2_the_cache_is_bounded() -> None:
    cache, most = cache_of(), 8_000
    for first in range(0, most, 397):
        admit(cache, *range(first, first + 397))
        assert held(cache, most) <= 2 * cache.generation_blocks


def test_i2_the_limit_is_in_bytes_of_blocks_and_views() -> None:
    cache = BlockCache(4096, BLOCKS, 64 << 20)
    assert 2 * cache.generation_blocks * 4096 * blocks.VIEW_FACTOR == 64 << 20
    assert BlockCache(65536, BLOCKS, 0).generation_blocks == blocks.MINIMUM_BLOCKS


def test_i4_an_operation_as_large_as_a_generation_ends() -> None:
    """Whatever the order of the blocks, and whatever is in the cache: every miss brings the operation further."""
    chosen, cache = seeded(), cache_of()
    for _ in range(20):
        wanted = chosen.sample(range(4000), cache.generation_blocks)
        misses = run_again(cache, lambda wanted=wanted: [cache.read(number) for number in wanted])
        assert misses <= len(wanted)


def run_again(cache: BlockCache, operation: Callable[[], object]) -> int:
    misses = 0
    while misses < 10_000:
        try:
            operation()
            return misses
        except BlockMiss as miss:
            misses += 1
            admit(cache, *(first + index for first, count in miss.runs for index in range(count)))
    raise AssertionError("the operation never ends")


def test_random_use_never_gives_wrong_bytes() -> None:
    chosen, cache = seeded(), cache_of()
    for _ in range(20_000):
        number = chosen.randrange(1500)
        try:
            assert cache.read(number) == data_of(number)
        except BlockMiss as miss:
            assert miss.runs == ((number, 1),)
            admit(cache, *range(number, number + chosen.choice((1, 1, 8, 32))))


# ---- wanting many ----------------------------------------------------------------------------------------------

def test_want_misses_everything_at_once() -> None:
    cache = cache_of()
    admit(cache, 12, 30)
    with pytest.raises(BlockMiss) as caught:
        cache.want([40, 10, 11, 12, 13, 30, 10])
    assert caught.value.runs == ((10, 2), (13, 1), (40, 1))


def test_want_of_what_is_here_is_nothing() -> None:
    cache = cache_of()
    admit(cache, 12, 30)
    cache.want([12, 30])
    cache.want([])


def test_want_leaves_out_blocks_that_do_not_exist() -> None:
    cache = cache_of()
    cache.want([BLOCKS, -1, BLOCKS + 5])
    with pytest.raises(BlockMiss) as caught:
        cache.want([BLOCKS - 1, BLOCKS])
    assert caught.value.runs == ((BLOCKS - 1, 1),)


def test_runs_are_sorted_joined_and_distinct() -> None:
    assert runs_of([]) == []
    assert runs_of([5, 4, 9, 4, 3]) == [(3, 3), (9, 1)]
    chosen = seeded()
    for _ in range(50):
        wanted = [chosen.randrange(100) for _ in range(60)]
        runs = runs_of(wanted)
        assert [first + index for first, count in runs for index in range(count)] == sorted(set(wanted))
        assert all(later[0] > sum(earlier) for earlier, later in pairwise(runs))


@pytest.mark.parametrize("block", [-1, BLOCKS, 1 << 60])
def test_a_block_that_does_not_exist(block: int) -> None:
    with pytest.raises(Corrupt) as caught:
        cache_of().read(block)
    assert caught.value.check is Check.BLOCK_RANGE
    assert caught.value.where == {"block": block}


# ---- failures --------------------------------------------------------------------------------------------------

def test_a_failed_block_raises_once() -> None:
    cache, error = cache_of(), OSError(errno.EIO, "medium error")
    cache.admit({5: error, 6: data_of(6)})
    cache.want([5, 6])  # does not wait for what is known to fail
    with pytest.raises(OSError, match="medium error"):
        cache.read(5)
    with pytest.raises(BlockMiss):
        cache.read(5)
    assert cache.read(6) == data_of(6)


def test_a_block_that_can_be_read_again_is_read() -> None:
    cache = cache_of()
    cache.admit({5: OSError(errno.EIO, "medium error")})
    admit(cache, 5)
    assert cache.read(5) == data_of(5)
    cache.drop(5)
    with pytest.raises(BlockMiss):
        cache.read(5)


def test_failures_that_nobody_asks_about_are_bounded() -> None:
    cache = cache_of()
    for first in range(0, 10 * blocks.MOST_FAILURES, 100):
        cache.admit({number: OSError(errno.EIO, "gone") for number in range(first, first + 100)})
    assert held(cache, 10 * blocks.MOST_FAILURES) <= blocks.MOST_FAILURES


# ---- views -----------------------------------------------------------------------------------------------------

def test_a_view_is_decoded_once_and_goes_with_its_block() -> None:
    cache, decoded = cache_of(), []
    admit(cache, 5)

    def decode(data: bytes) -> list[bytes]:
        decoded.append(data)
        return [data]

    assert cache.view(5, "key", decode) is cache.view(5, "key", decode)
    assert decoded == [data_of(5)]
    admit(cache, *range(100, 100 + 3 * cache.generation_blocks))
    admit(cache, 5)
    cache.view(5, "key", decode)
    assert len(decoded) == 2


def test_a_view_that_is_refused_is_not_kept() -> None:
    cache = cache_of()
    admit(cache, 5)

    def refuse(data: bytes) -> None:
        raise Corrupt(Check.EXTENT_CHECKSUM, block=5)

    for _ in range(2):
        with pytest.raises(Corrupt):
            cache.view(5, "key", len, refuse)
    assert cache.view(5, "key", len) == 4


def test_views_of_one_block_are_bounded() -> None:
    """Where nothing binds a block to its owner, a hostile disk lets any number of owners decode it."""
    cache = cache_of()
    admit(cache, 5)
    for owner in range(3 * blocks.MOST_VIEWS):
        assert cache.view(5, owner, lambda data, owner=owner: owner + 1) == owner + 1
    assert len(cache.entry(5).views) <= blocks.MOST_VIEWS


# ---- I3 --------------------------------------------------------------------------------------------------------

def test_i3_a_block_that_was_changed_while_it_was_read_is_not_admitted() -> None:
    """Changed, brought home and pushed out again before the read came to its end."""
    for change in ("pin", "drop"):
        cache = cache_of()
        for block in (7, 8, 9):
            cache.expect(block)
        if change == "pin":
            entry = blocks.CachedBlock(b"new")
            cache.pin(7, entry)
            cache.unpin(7, entry)
            admit(cache, *range(1000, 1000 + 3 * cache.generation_blocks))
        else:
            cache.drop(7)
        assert not cache.holds(7)
        cache.admit_expected({7: b"old", 8: b"eight", 9: OSError(errno.EIO, "")})
        assert cache.read(8) == b"eight"
        with pytest.raises(BlockMiss):
            cache.read(7)
        with pytest.raises(OSError, match="Errno 5"):
            cache.read(9)
        cache.admit({7: b"new"})
        assert cache.read(7) == b"new"
