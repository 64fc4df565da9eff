"""What a writable file system remembers outside of its blocks, against sets and dictionaries."""

from __future__ import annotations

import pytest

from fusewire.ext4 import commit, directory, namestore
from fusewire.ext4.batch import MOST_SHARED_ATTRIBUTES, Batch, Groups, Held, Writing
from fusewire.ext4.blocks import CachedBlock
from fusewire.ext4.newinode import Caller
from tests.ext4.driver import image, seeded
from tests.ext4.writer import Writer


def test_held_clusters_against_a_set() -> None:
    choose = seeded()
    per_group = 37
    held, model = Held(per_group), set[int]()
    pieces: list[tuple[int, int]] = []
    for _ in range(500):
        first, count = choose.randrange(1000), choose.randrange(1, 120)
        span = set(range(first, first + count))
        if choose.random() < 0.6 and not span & model:
            held.add(first, count)
            pieces.append((first, count))
            model |= span
        elif pieces:
            first, count = pieces.pop(choose.randrange(len(pieces)))
            held.remove(first, count)
            model -= set(range(first, first + count))
        assert held.count == len(model)
        number = choose.randrange(40)
        expected = sum(1 << cluster - number * per_group for cluster in model if cluster // per_group == number)
        assert held.mask(number) == expected
    for first, count in pieces:
        held.remove(first, count)
    assert held.count == 0 and not held._masks, "nothing is kept for groups that hold nothing"


def test_groups_against_a_set() -> None:
    choose = seeded()
    groups, model = Groups(50), set(range(50))
    for _ in range(500):
        number = choose.randrange(50)
        if choose.random() < 0.7:
            groups.remove(number)
            model.discard(number)
        else:
            groups.add(number)
            model.add(number)
        low, high = choose.randrange(51), choose.randrange(51)
        assert groups.next(low, high) == min((member for member in model if low <= member < high), default=None)
    groups.fill()
    assert [groups.next(number, 50) for number in range(50)] == list(range(50))


def test_a_batch_is_empty_as_long_as_nothing_must_become_durable() -> None:
    def filled(**fields: object) -> Batch:
        batch = Batch(1)
        for name, value in fields.items():
            setattr(batch, name, value)
        return batch

    assert filled().is_empty
    assert not filled(blocks={1: CachedBlock(b"")}).is_empty
    assert not filled(revoked={1}).is_empty
    assert not filled(freed=[(1, 1)]).is_empty
    assert not filled(wrote_data=True).is_empty


def test_shared_attributes_are_bounded_and_the_oldest_go_first() -> None:
    writing = Writing(100, 4, 1000, (50, 60))
    for number in range(MOST_SHARED_ATTRIBUTES + 10):
        writing.remember_attributes(b"%d" % number, number)
    assert len(writing.shared_attributes) == MOST_SHARED_ATTRIBUTES
    assert b"9" not in writing.shared_attributes and writing.shared_attributes[b"10"] == 10


def test_what_was_decoded_of_a_large_batch_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its blocks are home the cache cannot let go of them: only their bytes may stay."""
    with Writer(image("-t ext4 -b 1024", 8 << 10)) as writer:
        for large in (False, True):
            monkeypatch.setattr(commit, "VIEWS_KEPT_BLOCKS", 0 if large else 1000)
            for index in range(40):
                writer.change(lambda tx, n=b"%d-%d" % (large, index): namestore.create(tx, tx.inode(2), n, 0o644,
                                                                                     Caller(0, 0)))
            closed = commit.close(writer.fs, 0)
            assert any(entry.views for entry in closed.entries.values()) != large
            commit.durable(writer.fs, closed)
        assert len(list(writer.run(lambda fs: list(directory.read(fs, fs.inode(2), 0))))) >= 80
