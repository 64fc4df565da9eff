"""POSIX ACLs: from the form on disk to the attribute's, as the kernel gives it, and every malformed one."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire.ext4 import acl, xattr, xattrstore
from fusewire.ext4.errors import Check, Corrupt
from tests import populate
from tests.ext4.driver import Core, copied, image, seeded
from tests.mounting import kernel_mount

DISK = struct.pack("<I", acl.DISK_VERSION)


@pytest.fixture(scope="module")
def written(mounts: None) -> Iterator[tuple[Core, dict[str, bytes]]]:
    """An image with ACLs, and the value of each ACL as the kernel gives it, by "path name"."""
    path, shown = copied(image("-t ext4 -b 1024", 8192)), {}
    with kernel_mount(path, "rw") as mounted:
        populate.acls(mounted.root)
        for folder, folders, files in os.walk(mounted.root / "acls"):
            for name in folders + files:
                full = Path(folder) / name
                for key in os.listxattr(full):
                    shown[f"/{full.relative_to(mounted.root)} {key}"] = os.getxattr(full, key)
    with Core(path) as core:
        yield core, shown
    path.unlink()


def test_acls_are_the_kernels(written: tuple[Core, dict[str, bytes]]) -> None:
    core, shown = written
    assert len(shown) >= 5
    for place, value in shown.items():
        path, name = place.split(" ")
        assert core.run(xattr.get, core.at(path), name.encode()) == value
        assert name.encode() in core.run(xattr.names, core.at(path), False)


def test_acls_go_to_disk_as_the_kernel_puts_them(written: tuple[Core, dict[str, bytes]]) -> None:
    core, shown = written
    for place, value in shown.items():
        path, name = place.split(" ")
        entry = core.run(xattrstore.find, core.at(path), xattr.ACLS[name.encode()], b"")
        assert entry is not None and acl.to_disk(acl.from_xattr(value)) == entry.value


def test_ids_are_stored_only_where_they_mean_something() -> None:
    rows = [(acl.USER_OBJ, 7, None), (acl.USER, 5, 1000), (acl.GROUP_OBJ, 4, None), (acl.GROUP, 6, 4_000_000_000),
            (acl.MASK, 7, None), (acl.OTHER, 0, None)]
    disk = DISK + b"".join(struct.pack("<HH", tag, bits) if owner is None else struct.pack("<HHI", tag, bits, owner)
                           for tag, bits, owner in rows)
    expected = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, bits, 0xFFFFFFFF if owner is None else owner) for tag, bits, owner in rows)
    assert acl.to_xattr(disk) == expected


def test_an_acl_without_entries() -> None:
    assert acl.to_xattr(DISK) == struct.pack("<I", acl.XATTR_VERSION)


@pytest.mark.parametrize(("disk", "where"), [
    (b"", {"bytes": 0}), (DISK[:3], {"bytes": 3}), (struct.pack("<I", 2), {"bytes": 4}), (bytes(8), {"bytes": 8}),
    (DISK + b"\1\0\7", {"offset": 4}), (DISK + b"\2\0\7\0", {"offset": 4, "tag": 2}),
    (DISK + b"\2\0\7\0\1\0\0", {"offset": 4, "tag": 2}), (DISK + b"\3\0\7\0", {"offset": 4, "tag": 3}),
    (DISK + b"\1\0\7\0\0\0\7\0", {"offset": 8, "tag": 0}), (DISK + b"\x40\0\7\0", {"offset": 4, "tag": 64})])
def test_a_malformed_acl(disk: bytes, where: dict[str, int]) -> None:
    with pytest.raises(Corrupt) as caught:
        acl.to_xattr(disk)
    assert caught.value.check is Check.ACL_FORMAT and caught.value.where == where


def test_random_bytes_give_an_acl_or_the_one_error() -> None:
    chosen = seeded()
    for _ in range(3000):
        disk = DISK + bytes(chosen.choice((0, 1, 2, 4, 8, 16, 32, 7)) for _ in range(chosen.randrange(40)))
        try:
            value = acl.to_xattr(disk)
        except Corrupt as error:
            assert error.check is Check.ACL_FORMAT
        else:
            assert (len(value) - 4) % 8 == 0 and acl.to_disk(list(acl.entries(disk))) == disk
