"""Setting attributes: random changes against dictionaries and against the kernel's answers to the same sequence, shared
blocks and their counts, hashes and checksums as e2fsck wants them, and the kernel reading everything afterwards."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from fusewire.ext4 import alloc, inodefree, inodestore, layout, namestore, setattr, superstore, xattr, xattrwrite
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.features import Feature
from fusewire.ext4.newinode import Caller
from fusewire.ext4.transaction import Transaction
from tests import mounting
from tests.ext4.driver import Editor, image, new_path, seeded
from tests.ext4.writer import Writer

ROOT = Caller(0, 0)
FORMS = ["-t ext4 -b 1024", "-t ext4 -b 4096 -I 512", "-t ext4 -b 1024 -I 128 -O ^metadata_csum",
         "-t ext3 -b 2048 -I 128", "-t ext2 -b 1024 -I 256"]


def new_file(writer: Writer, name: bytes = b"file") -> int:
    return int(writer.change(lambda tx: namestore.create(tx, tx.inode(2), name, 0o644, ROOT)).number)


def put(writer: Writer, number: int, name: bytes, value: bytes | None, flags: int = 0) -> int:
    """0, or the errno, of setting (or removing) an attribute by its full name."""
    try:
        writer.change(lambda tx: setattr.set_xattr(tx, tx.inode(number), name, value, flags))
    except Refused as error:
        return error.errno
    return 0


def all_of(writer: Writer, number: int) -> dict[bytes, bytes]:
    of = writer.inode(number)
    return {name: writer.run(xattr.get, of, name) for name in writer.run(xattr.names, of, True)}


def by_kernel(path: Path, name: bytes, value: bytes | None, flags: int) -> int:
    try:
        if value is None:
            os.removexattr(path, name)
        else:
            os.setxattr(path, name, value, flags)
    except OSError as error:
        return error.errno or -1
    return 0


def operations(choose: random.Random, block: int, count: int) -> list[tuple[int, bytes, bytes | None, int]]:
    """(which file, name, value or None, flags)."""
    names = [b"user.a", b"user.bb", b"trusted.c", b"security.d", b"user.\xff\x80", b"user." + b"n" * 200, b"user.z",
             b"trusted.a", b"user." + b"m" * 250]
    sizes = [0, 1, 3, 4, 20, 60, 100, block // 4, block // 2, block - 60, block - 52, block - 48, block]
    made = []
    for _ in range(count):
        value = None if choose.random() < 0.25 else choose.choice(
            [b"same", b"shared" * 20, choose.randbytes(choose.choice(sizes))])
        flags = choose.choice([0, 0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]) if value is not None else 0
        made.append((choose.randrange(4), choose.choice(names), value, flags))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_every_answer_is_the_kernels(mounts: None, form: str) -> None:
    """The same random sequence on both: same errnos (ENOSPC too), same attributes; then each as the other sees it."""
    choose = seeded()
    path = image(form, 4096)
    copy = new_path()
    copy.write_bytes(path.read_bytes())
    with Writer(path, batch_blocks=40) as writer:
        numbers = [new_file(writer, b"%d" % n) for n in range(4)]
        with mounting.kernel_mount(copy, "rw,noatime") as mount:
            for n in range(4):
                (mount.root / str(n)).touch()
            refused = set()
            for step, (n, name, value, flags) in enumerate(operations(choose, writer.block_bytes, 400)):
                ours = put(writer, numbers[n], name, value, flags)
                assert ours == by_kernel(mount.root / str(n), name, value, flags), (step, n, name, flags)
                refused.add(ours)
                if step % 100 == 99:
                    theirs = {name.encode("utf-8", "surrogateescape") for name in os.listxattr(mount.root / str(n))}
                    assert set(all_of(writer, numbers[n])) == theirs
                    writer.check()
            assert refused >= {0, errno.EEXIST, errno.ENODATA, errno.ENOSPC}
        wanted = {n: all_of(writer, number) for n, number in enumerate(numbers)}
        writer.check()
        for shown in (writer.path, copy):
            with mounting.kernel_mount(shown) as mount:
                for n, attributes in wanted.items():
                    file = mount.root / str(n)
                    assert {os.fsencode(name): os.getxattr(file, name) for name in os.listxattr(file)} == attributes


# ---- shared blocks ---------------------------------------------------------------------------------------------------

def references(writer: Writer, number: int) -> int:
    block = writer.inode(number).file_acl
    return int.from_bytes(writer.run(lambda fs: fs.cache.read(block))[4:8], "little")


def test_shared_blocks_count_their_inodes() -> None:
    choose = seeded()
    with Writer(image("-t ext4 -b 1024 -I 128 -O ^metadata_csum", 8 << 10), batch_blocks=60) as writer:
        numbers = [new_file(writer, b"%d" % n) for n in range(30)]
        for step in range(400):
            number = choose.choice(numbers)
            value = choose.choice([b"one" * 30, b"two" * 30, b"three" * 30, None])
            if put(writer, number, b"user.shared", value):
                continue
            if step % 50 == 49:
                sharing: dict[int, list[int]] = {}
                for each in numbers:
                    if block := writer.inode(each).file_acl:
                        sharing.setdefault(block, []).append(each)
                assert len(sharing) <= 3, "equal attributes have one block"
                for owners in sharing.values():
                    assert references(writer, owners[0]) == len(owners)
                writer.check()
        for number in numbers:
            put(writer, number, b"user.shared", None)
            assert not writer.inode(number).file_acl and not writer.inode(number).sectors
        writer.check()


def test_a_shared_block_takes_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xattrwrite, "MOST_SHARED", 3)
    with Writer(image("-t ext3 -b 1024 -I 128", 4096)) as writer:
        numbers = [new_file(writer, b"%d" % n) for n in range(7)]
        for number in numbers:
            assert put(writer, number, b"user.a", b"x" * 100) == 0
        blocks = [writer.inode(number).file_acl for number in numbers]
        assert max(blocks.count(block) for block in blocks) == 3
        writer.check()


def test_changing_one_of_those_that_share_leaves_the_others(mounts: None) -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        numbers = [new_file(writer, b"%d" % n) for n in range(3)]
        for number in numbers:
            put(writer, number, b"user.a", b"x" * 300)
        assert references(writer, numbers[0]) == 3
        put(writer, numbers[1], b"user.a", b"y" * 300)
        assert references(writer, numbers[0]) == 2 and references(writer, numbers[1]) == 1
        put(writer, numbers[1], b"user.a", b"x" * 300)
        assert references(writer, numbers[1]) == 3
        writer.check()
        with mounting.kernel_mount(writer.path) as mount:
            assert os.getxattr(mount.root / "1", "user.a") == b"x" * 300


def test_a_freed_block_is_joined_by_nobody() -> None:
    """Not in the transaction that frees it, and not afterwards, though its content may still be somewhere in memory."""
    with Writer(image("-t ext3 -b 1024 -I 128", 4096)) as writer:
        first, second = new_file(writer, b"1"), new_file(writer, b"2")
        put(writer, first, b"user.a", b"x" * 100)
        block = writer.inode(first).file_acl
        content = writer.fs.cache.read(block)

        def swap(tx: Transaction) -> None:
            xattrwrite.put(tx, tx.inode(first), 1, b"a", None)
            xattrwrite.put(tx, tx.inode(second), 1, b"a", b"x" * 100)

        writer.change(swap)
        assert writer.inode(second).file_acl not in (0, block)
        put(writer, second, b"user.a", None)
        writer.commit()
        writer.fs.cache.drop(block)
        writer.fs.cache.admit({block: content})  # a read that was on its way when the block was freed
        assert put(writer, second, b"user.a", b"x" * 100) == 0
        writer.check()


def test_freed_inodes_leave_their_block() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        numbers = [new_file(writer, b"%d" % n) for n in range(3)]
        for number in numbers:
            put(writer, number, b"user.a", b"x" * 300)
        for left, (n, number) in enumerate(enumerate(numbers)):
            assert references(writer, number) == 3 - left
            writer.change(lambda tx, n=n: namestore.unlink(tx, tx.inode(2), b"%d" % n))
            while not writer.change(lambda tx, number=number: inodefree.release(tx, tx.inode(number))):
                pass
            writer.check()


def test_an_empty_block_of_attributes_is_freed_with_its_inode() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)
        put(writer, number, b"user.a", b"x" * 300)
        block = writer.inode(number).file_acl
        writer.change(lambda tx: xattrwrite._write(tx, block, bytes(1024 - 32)))
        writer.change(lambda tx: namestore.unlink(tx, tx.inode(2), b"file"))
        while not writer.change(lambda tx: inodefree.release(tx, tx.inode(number))):
            pass
        writer.check()


# ---- particulars -----------------------------------------------------------------------------------------------------

def test_attributes_move_between_inode_and_block() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)
        put(writer, number, b"user.a", b"x" * 20)
        assert not writer.inode(number).file_acl
        put(writer, number, b"user.a", b"x" * 300)
        assert writer.inode(number).file_acl and all_of(writer, number) == {b"user.a": b"x" * 300}
        put(writer, number, b"user.a", b"x" * 20)
        assert not writer.inode(number).file_acl and not writer.inode(number).sectors
        assert all_of(writer, number) == {b"user.a": b"x" * 20}
        put(writer, number, b"user.a", None)
        assert xattr.has_none(writer.inode(number))
        writer.check()


def test_the_same_value_again_changes_nothing() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)
        for size in (20, 300):
            writer.clock = (1000, 5)
            put(writer, number, b"user.a", b"x" * size)
            before = writer.inode(number)
            writer.clock = (2000, 5)
            put(writer, number, b"user.a", b"x" * size)
            assert writer.inode(number).raw == before.raw and before.ctime == (1000, 5)
            put(writer, number, b"user.b", b"y")
            assert writer.inode(number).ctime == (2000, 5) and writer.inode(number).version == before.version + 1
            put(writer, number, b"user.b", None)


@pytest.mark.parametrize("length, error", [(255, 0), (256, errno.ERANGE), (1000, errno.ERANGE)])
def test_long_names(length: int, error: int) -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)
        assert put(writer, number, b"user." + b"n" * length, b"v") == error
        writer.check()


def test_a_full_disk_changes_nothing() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)
        put(writer, number, b"user.a", b"small")
        while True:
            try:
                writer.change(lambda tx: alloc.allocate(tx, 0, 1000))
            except Refused:
                break
        before = writer.inode(number).raw
        assert put(writer, number, b"user.b", b"x" * 300) == errno.ENOSPC
        assert put(writer, number, b"user.a", b"x" * 300) == errno.ENOSPC
        assert writer.inode(number).raw == before and all_of(writer, number) == {b"user.a": b"small"}
        assert put(writer, number, b"user.a", b"tiny") == 0


def test_the_first_attribute_is_noted_in_the_superblock() -> None:
    with Writer(image("-t ext2 -b 1024 -O ^ext_attr", 4096)) as writer:
        number, mask = new_file(writer), Feature.EXT_ATTR.mask
        assert not superstore.get(writer.fs, "feature_compat") & mask
        put(writer, number, b"user.a", b"x" * 300)
        assert superstore.get(writer.fs, "feature_compat") & mask
        writer.check()


def test_values_in_inodes_of_their_own_are_left_alone() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)
        put(writer, number, b"user.a", b"x" * 20)
        of = writer.inode(number)
        tail = bytearray(of.raw[128 + of.extra_isize:])
        at = 4 + layout.XATTR_ENTRY.offsets["value_inum"]
        tail[at:at + 4] = (13).to_bytes(4, "little")
        writer.change(lambda tx: inodestore.change(tx, tx.inode(number), tail=bytes(tail)))
        assert put(writer, number, b"user.a", b"y") == errno.EOPNOTSUPP
        assert put(writer, number, b"user.a", None) == errno.EOPNOTSUPP


@pytest.mark.parametrize("offset, check", [(0, Check.XATTR_MAGIC), (900, Check.XATTR_CHECKSUM)])
def test_a_broken_block_is_not_changed(offset: int, check: Check) -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        number = new_file(writer)
        put(writer, number, b"user.a", b"x" * 300)
        writer.commit()
        path = writer.path
        data = bytearray(path.read_bytes())
        block = writer.inode(number).file_acl
    path.write_bytes(data)
    editor = Editor(path)
    if check is Check.XATTR_MAGIC:
        with editor.xattr_block(number) as raw:
            raw[offset] ^= 1
    else:
        editor.data[block * 1024 + offset] ^= 1
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        for operation in (lambda tx: xattrwrite.put(tx, tx.inode(number), 1, b"b", b"y" * 300),
                          lambda tx: xattrwrite.drop_all(tx, tx.inode(number))):
            with pytest.raises(Corrupt) as caught:
                writer.change(operation)
            assert caught.value.check is check
