"""Seeded damage to small images that are changed by the core: every error is an `Ext4Error`, and leaves no trace.

The images have no checksums, so that the damage is met by what checks values.  ``FUSEWIRE_FUZZ`` sets how many damaged
images of each base are tried, ``FUSEWIRE_SEED`` where the seeds begin; a failure names its seed.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fusewire.ext4 import inodefree, iomapwrite, namestore, orphan, rename, setattr, truncate
from fusewire.ext4.batch import BatchLimits
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.errors import Ext4Error, Refused
from fusewire.ext4.inode import Inode
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from tests.ext4.driver import image
from tests.ext4.writer import Writer
from tests.hostile.corewalk import bounds
from tests.hostile.mutate import Mutator

ROUNDS = int(os.environ.get("FUSEWIRE_FUZZ", "150")) // 3
FIRST_SEED = int(os.environ.get("FUSEWIRE_SEED", "1"))
OPERATIONS = 40
MOST_STEPS = 200
LIMITS = BatchLimits(250, 1000)     # as the smallest journal has them
ROOT = Caller(0, 0)
FORMS = ["-t ext4 -b 1024 -O ^metadata_csum,orphan_file", "-t ext3 -b 1024 -O ^has_journal -I 128",
         "-t ext4 -b 1024 -O ^has_journal,^metadata_csum,^orphan_file,^flex_bg -g 256"]
NAMES = [b"name%d" % number + b"n" * (number * 7 % 90) for number in range(25)]


class Vandal:
    """Random operations on whatever the image holds."""

    def __init__(self, writer: Writer, chance: random.Random) -> None:
        self.writer, self.chance = writer, chance
        self.folders = [2, 2]
        self.numbers = [2, *range(11, 40)]

    def step(self) -> None:
        kinds: tuple[Callable[[], Any], ...] = (
            self.create, self.create, self.mkdir, self.link, self.remove, self.remove, self.rename, self.write,
            self.write, self.cut, self.punch, self.attribute, self.chmod)
        with suppress(Ext4Error):
            self.chance.choice(kinds)()

    def change(self, operation: Callable[[Transaction, random.Random], Any]) -> Any:
        """One transaction; its choices are the same each time it is run again."""
        seed = self.chance.randrange(1 << 30)
        return self.writer.change(lambda tx: operation(tx, random.Random(seed)))

    def pick(self, tx: Transaction, chance: random.Random) -> Inode:
        return tx.inode(chance.choice(self.numbers))

    def folder(self, tx: Transaction, chance: random.Random) -> Inode:
        """Most often a directory."""
        return tx.inode(chance.choice(self.folders)) if chance.random() < 0.9 else self.pick(tx, chance)

    def file(self, tx: Transaction, chance: random.Random) -> Inode:
        """One that has data: the handlers let no other come that far."""
        of = self.pick(tx, chance)
        if not of.is_regular:
            raise Refused(errno.EINVAL)
        return of

    def create(self) -> None:
        made = self.change(lambda tx, chance: namestore.create(
            tx, self.folder(tx, chance), chance.choice(NAMES), 0o644, ROOT))
        self.numbers.append(int(made.number))

    def mkdir(self) -> None:
        made = self.change(lambda tx, chance: namestore.mkdir(
            tx, self.folder(tx, chance), chance.choice(NAMES), 0o755, ROOT))
        self.numbers.append(int(made.number))
        self.folders.append(int(made.number))

    def link(self) -> None:
        self.change(lambda tx, chance: namestore.link(
            tx, self.pick(tx, chance), self.folder(tx, chance), chance.choice(NAMES)))

    def remove(self) -> None:
        def unlink(tx: Transaction, chance: random.Random) -> Inode:
            parent, name = self.folder(tx, chance), chance.choice([b"d0", b"f0", b"f1", b"f2", *NAMES])
            return chance.choice((namestore.unlink, namestore.rmdir))(tx, parent, name)

        victim = self.change(unlink)
        for _ in range(MOST_STEPS):
            if self.writer.inode(victim.number).links or self.change(
                    lambda tx, _: inodefree.release(tx, tx.inode(victim.number))):
                return

    def rename(self) -> None:
        self.change(lambda tx, chance: rename.rename(
            tx, self.folder(tx, chance), chance.choice([b"f3", *NAMES]), self.folder(tx, chance), chance.choice(NAMES),
            chance.choice((0, 1, 2)), ROOT))

    def write(self) -> None:
        def begin(tx: Transaction, chance: random.Random) -> None:
            of, at = self.file(tx, chance), chance.randrange(1 << chance.choice((10, 16, 24, 40)))
            of, found = iomapwrite.begin(tx, of, at, chance.choice((1, 1000, 100_000)))
            iomapwrite.ioend(tx, of, found.offset, found.length)

        self.change(begin)

    def cut(self) -> None:
        number = self.change(lambda tx, chance: truncate.set_size(
            tx, self.file(tx, chance), chance.choice((0, 1000, 1 << 20)))).number
        for _ in range(MOST_STEPS):
            if self.change(lambda tx, _: truncate.shrink(tx, tx.inode(number)))[1]:
                return

    def punch(self) -> None:
        self.change(lambda tx, chance: chance.choice((truncate.punch, truncate.make_unwritten, truncate.reserve))(
            tx, self.file(tx, chance), chance.randrange(1 << 20), chance.randrange(1, 1 << 20)))

    def attribute(self) -> None:
        self.change(lambda tx, chance: setattr.set_xattr(
            tx, self.pick(tx, chance), b"user.n%d" % chance.randrange(3),
            chance.choice((None, b"", b"v" * 30, b"v" * 700))))

    def chmod(self) -> None:
        self.change(lambda tx, chance: setattr.chmod(tx, self.pick(tx, chance), 0o4711))


def populated(form: str) -> Path:
    """An image with files of several extents, directories with an index, attributes and orphans."""
    with Writer(image(form, 6144)) as writer:
        vandal = Vandal(writer, random.Random(form))
        for number in range(4):
            made = writer.change(lambda tx, n=number: namestore.create(tx, tx.inode(2), b"f%d" % n, 0o644, ROOT))
            vandal.numbers.append(int(made.number))
        vandal.numbers = vandal.numbers[-4:]
        for _ in range(150):
            vandal.step()
        kept = writer.change(lambda tx: namestore.create(tx, tx.inode(2), b"orphan", 0o644, ROOT))
        writer.change(lambda tx: namestore.unlink(tx, tx.inode(2), b"orphan"))
        assert kept.number
        writer.commit()
        return writer.path


def try_out(path: Path, chance: random.Random) -> None:
    with Writer(path, batch_blocks=LIMITS.collected, copy=False) as writer:
        assert writer.fs.writing is not None
        writer.fs.writing.limits = LIMITS
        with suppress(Ext4Error):
            writer.run(orphan.recall)
        vandal = Vandal(writer, chance)
        for _ in range(OPERATIONS):
            vandal.step()
            assert len(writer.fs.writing.batch.blocks) <= LIMITS.single + 1  # type: ignore[operator]
        writer.commit()


@pytest.mark.parametrize("form", FORMS)
def test_damaged_images_are_changed_or_refused(form: str, tmp_path: Path) -> None:
    mutator = Mutator(populated(form).read_bytes())
    print(f"FUSEWIRE_SEED={FIRST_SEED} FUSEWIRE_FUZZ={ROUNDS * 3}")
    path = tmp_path / "image"
    for seed in range(FIRST_SEED, FIRST_SEED + ROUNDS):
        damaged, text = mutator.damaged(seed)
        path.write_bytes(damaged)
        try:
            with bounds(text), suppress(Ext4Error, BlockMiss):
                try_out(path, random.Random(seed))
        except Exception as error:
            raise AssertionError(f"{form}, {text}") from error
