"""Extended attributes: where mke2fs and the kernel put them, which names are shown, every rule about their stores."""

import errno
import os
import re
import struct
from functools import cache
from pathlib import Path

import pytest

from fusewire.ext4 import checksum, xattr, xattrstore
from fusewire.ext4.errors import Check, Corrupt, Refused
from fusewire.ext4.filesystem import Options
from fusewire.ext4.inode import FLAG_EA_INODE, FLAG_EXTENTS
from tests import populate
from tests.ext4.driver import Core, Editor, copied, debugfs, image, new_path, run_tool, seeded
from tests.mounting import kernel_mount

USER = xattr.INDEX_USER


@cache
def tree() -> Path:
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    populate.xattrs(root)
    populate.acls(root)
    (root / "xattrs" / "block").unlink()
    (root / "none").write_bytes(b"")
    (root / "both").write_bytes(b"")
    for name in ("user.small", "user.to-block", "trusted.to-block"):
        os.setxattr(root / "both", name, name.encode() * (1 if "small" in name else 20))
    return root


@cache
def small(features: str = "") -> Path:
    return image(f"-t ext4 -b 1024 -I 256 -O ^has_journal,^resize_inode {features}", 4096, tree())


def values(core: Core, path: str) -> dict[bytes, bytes]:
    found = core.at(path)
    return {name: core.run(xattr.get, found, name) for name in core.run(xattr.names, found, True)}


def entry(name: bytes, offset: int, size: int, *, index: int = USER, inode: int = 0,
          length: int | None = None) -> bytes:
    head = struct.pack("<BBHIII", len(name) if length is None else length, index, offset, inode, size, 0)
    return (head + name).ljust((16 + len(name) + 3) // 4 * 4, b"\0")


def block_with(entries: bytes, values_at_end: bytes = b"", magic: int = xattrstore.MAGIC, blocks: int = 1) -> bytes:
    raw = struct.pack("<IIIII12x", magic, 1, blocks, 0, 0) + entries
    return raw.ljust(1024 - len(values_at_end), b"\0") + values_at_end


# ---- where others put them -------------------------------------------------------------------------------------

@pytest.mark.parametrize("features", ["", "-O ^metadata_csum", "-O ea_inode", "-O inline_data", "-I 128", "-I 1024"])
def test_copied_attributes_come_back(features: str) -> None:
    with Core(small(features)) as core:
        for folder, folders, files in os.walk(tree()):
            for name in folders + files:
                path = os.path.join(folder, name)
                expected = {os.fsencode(key): os.getxattr(path, key, follow_symlinks=False)
                            for key in os.listxattr(path, follow_symlinks=False)}
                assert values(core, os.path.relpath(path, tree())) == expected, path


def test_names_and_values_are_those_of_debugfs() -> None:
    """``ea_list`` shows a name, the size of the value, and the value where it can be printed."""
    path = small()
    with Core(path) as core:
        for name in ("/xattrs/small", "/xattrs/many", "/both", "/xattrs", "/xattrs/fifo"):
            shown = debugfs(path, f"ea_list {name}")
            listed = {key: int(size) for key, size in re.findall(r"^  ([^ ]+) \((\d+)\)", shown, re.MULTILINE)}
            found = values(core, name)
            assert {escape(key): len(value) for key, value in found.items()} == listed


def escape(name: bytes) -> str:
    return "".join(chr(byte) if 32 < byte < 127 else f"\\{byte:03o}" for byte in name)


@pytest.mark.parametrize("arguments", ["-t ext4 -b 1024 -O ea_inode", "-t ext4 -O ea_inode,^metadata_csum",
                                       "-t ext4 -O ea_inode,metadata_csum_seed -I 512"])
def test_values_in_inodes_of_their_own(mounts: None, arguments: str) -> None:
    path = copied(image(arguments, 65536))
    with kernel_mount(path, "rw") as mounted:
        populate.ea_inodes(mounted.root)
        expected = {name: os.getxattr(mounted.root / "ea-inode" / name, "user." + key) for name, key in (
            ("v3000", "value"), ("v4097", "value"), ("v20000", "value"), ("v65536", "value"), ("same-1", "same"),
            ("same-2", "same"), ("same-1", "second"))}
        assert len(expected["v65536"]) == 65536
    run_tool("e2fsck", "-fn", path)
    with Core(path) as core:
        for name, value in expected.items():
            assert value in values(core, f"/ea-inode/{name}").values(), name
        entries = core.run(xattrstore.in_inode, core.at("/ea-inode/v65536"))
        entries += core.run(xattrstore.in_block, core.at("/ea-inode/v65536"))
        assert any(entry.value_inode for entry in entries)


# ---- which names are shown -------------------------------------------------------------------------------------

def test_trusted_names_are_shown_to_who_asks_for_them() -> None:
    with Core(small()) as core:
        found = core.at("/xattrs/small")
        everything, ordinary = (set(core.run(xattr.names, found, trusted)) for trusted in (True, False))
        assert everything - ordinary == {b"trusted.t"}
        assert {b"user.a", b"security.s"} <= ordinary


@pytest.mark.parametrize(("name", "number"), [
    (b"user.missing", errno.ENODATA), (b"user.", errno.EINVAL), (b"trusted.", errno.EINVAL),
    (b"user", errno.EOPNOTSUPP), (b"", errno.EOPNOTSUPP), (b"foo.bar", errno.EOPNOTSUPP),
    (b"system.data", errno.EOPNOTSUPP), (b"system.posix_acl_access", errno.ENODATA),
    (b"system.posix_acl_", errno.EOPNOTSUPP),
    (b"User.a", errno.EOPNOTSUPP), (b"user.a\0", errno.ENODATA), (b"user.A", errno.ENODATA)])
def test_names_that_are_not_there(name: bytes, number: int) -> None:
    with Core(small()) as core, pytest.raises(Refused) as caught:
        core.run(xattr.get, core.at("/xattrs/small"), name)
    assert caught.value.errno == number


def test_options_hide_namespaces() -> None:
    with Core(small(), Options(user_xattr=False, acl=False)) as core:
        assert {name.split(b".")[0] for name in core.run(xattr.names, core.at("/xattrs/small"), True)} == {
            b"trusted", b"security"}
        assert core.run(xattr.names, core.at("/acls/file"), True) == []
        for path, name in (("/xattrs/small", b"user.a"), ("/acls/file", b"system.posix_acl_access")):
            with pytest.raises(Refused) as caught:
                core.run(xattr.get, core.at(path), name)
            assert caught.value.errno == errno.EOPNOTSUPP


def test_attributes_of_the_file_system_itself_are_not_shown() -> None:
    """Encryption contexts (9), inline data (7), namespaces that nobody knows, ACLs with a name."""
    editor = Editor(small())
    rows = b"".join(entry(b"c", 0, 0, index=index) for index in (0, 5, 7, 8, 9, 10, 255))
    with editor.xattr_block(editor.number("/both")) as raw:
        raw[:] = block_with(rows + entry(b"named", 0, 0, index=2) + entry(b"shown", 0, 0))
    with Core(editor.data) as core:
        found = core.at("/both")
        assert core.run(xattr.names, found, True) == [b"user.small", b"user.shown"]
        assert core.run(xattr.encryption_context, found) == b""
        assert core.run(xattr.encryption_context, core.at("/none")) is None


def test_an_inode_without_attributes_says_so_alone() -> None:
    with Core(small()) as core:
        assert xattr.has_none(core.at("/none"))
        for path in ("/xattrs/small", "/both", "/xattrs/symlink"):
            assert not xattr.has_none(core.at(path))


# ---- broken attribute blocks -----------------------------------------------------------------------------------

def corrupt_block(raw: bytes, features: str = "", path: str = "/both") -> Corrupt:
    editor = Editor(small(features))
    number = editor.number(path)
    with editor.xattr_block(number) as block:
        block[:] = raw
    core = Core(editor.data)
    found = core.inode(number)
    with pytest.raises(Corrupt) as caught:
        core.run(xattr.names, found, True)
    with pytest.raises(Corrupt):
        core.run(xattr.get, found, b"user.a")
    assert caught.value.where["inode"] == number and caught.value.where["block"] == found.file_acl
    return caught.value


@pytest.mark.parametrize(("magic", "blocks"), [(0xEA010000, 1), (0, 1), (xattrstore.MAGIC, 0), (xattrstore.MAGIC, 2)])
def test_a_block_of_another_kind(magic: int, blocks: int) -> None:
    error = corrupt_block(block_with(b"", magic=magic, blocks=blocks))
    assert error.check is Check.XATTR_MAGIC and error.where["magic"] == f"{magic:#010x}"


def test_a_block_whose_checksum_is_wrong() -> None:
    editor = Editor(small())
    number = editor.number("/both")
    block = editor.core.inode(number).file_acl
    editor.data[block * 1024 + 500] ^= 1
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(xattr.names, core.inode(number), True)
    assert caught.value.check is Check.XATTR_CHECKSUM
    assert caught.value.where == {"inode": number, "block": block}


def test_a_block_moved_elsewhere() -> None:
    """A checksum binds a block to its place."""
    editor = Editor(small())
    number, other = editor.number("/both"), 3000
    raw = bytes(editor.xattr_block(number).raw)
    editor.data[other * 1024:(other + 1) * 1024] = raw
    editor.put_inode(number, file_acl_lo=other)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(xattr.names, core.inode(number), True)
    assert caught.value.check is Check.XATTR_CHECKSUM


@pytest.mark.parametrize("block", [4096, 1 << 40])
def test_a_block_outside_the_file_system(block: int) -> None:
    editor = Editor(small())
    number = editor.number("/none")
    editor.put_inode(number, file_acl_lo=block & 0xFFFFFFFF, file_acl_hi=block >> 32)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(xattr.names, core.inode(number), True)
    assert caught.value.check is Check.BLOCK_RANGE and caught.value.where == {"block": block}


@pytest.mark.parametrize(("entries", "where"), [
    (entry(b"a", 1020, 5), {"value_offset": 1020, "size": 5}),
    (entry(b"a", 0xFFFF, 4), {"value_offset": 0xFFFF, "size": 4}),
    (entry(b"a", 32, 4), {"value_offset": 32, "size": 4}),
    (entry(b"a", 0, 4), {"value_offset": 0, "size": 4}),
    (entry(b"a", 1000, (1 << 24) + 1, inode=12), {"size": (1 << 24) + 1}),
    (entry(b"a\0b", 0, 0), {"offset": 32}),
    (entry(b"", 0, 0) + entry(b"\0", 0, 0), {"offset": 48}),
    (b"".join(entry(b"%d" % index, 800, 200) for index in range(6)), {"values": "overlap"}),
], ids=["past the end", "offset past the end", "in the entry", "in the header", "huge", "nul", "nul alone", "overlap"])
def test_an_entry_out_of_bounds(entries: bytes, where: dict[str, object]) -> None:
    error = corrupt_block(block_with(entries))
    assert error.check is Check.XATTR_ENTRY
    assert where.items() <= error.where.items()


def test_entries_that_run_into_the_end() -> None:
    full = b"".join(entry(b"%04d" % index, 0, 0) for index in range(49))
    assert len(full) == 980
    for rest in (entry(b"x" * 200, 0, 0)[:12], b"\1" * 12, entry(b"", 0, 0)[:12]):
        error = corrupt_block(block_with(full + rest))
        assert error.check is Check.XATTR_ENTRY and error.where["offset"] == 1012
    error = corrupt_block(block_with(full[:960] + entry(b"a" * 16, 0, 0)))
    assert error.check is Check.XATTR_ENTRY and error.where["offset"] == 1024


def test_an_empty_block_is_fine() -> None:
    editor = Editor(small())
    number = editor.number("/both")
    with editor.xattr_block(number) as raw:
        raw[:] = block_with(b"")
    core = Core(editor.data)
    assert core.run(xattr.names, core.inode(number), True) == [b"user.small"]


# ---- broken areas in the inode ---------------------------------------------------------------------------------

def put_area(editor: Editor, number: int, raw: bytes) -> None:
    """Attributes in an inode of 256 bytes with an extra size of 32: 96 bytes, four of them the magic number."""
    with editor.inode(number) as record:
        record[160:] = (struct.pack("<I", xattrstore.MAGIC) + raw).ljust(96, b"\0")


@pytest.mark.parametrize("raw", [
    entry(b"a", 90, 4), entry(b"a", 10, 4), entry(b"a" * 70, 0, 0, length=80), b"\1" * 92,
    entry(b"a" * 60, 0, 0) + entry(b"b", 0, 0)[:16]], ids=["past the end", "in the entry", "name", "all ones", "end"])
def test_an_entry_out_of_bounds_in_the_inode(raw: bytes) -> None:
    editor = Editor(small())
    number = editor.number("/none")
    put_area(editor, number, raw)
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(xattr.names, core.inode(number), True)
    assert caught.value.check is Check.XATTR_ENTRY and caught.value.where["inode"] == number


def test_other_bytes_behind_the_fields_are_no_attributes() -> None:
    editor = Editor(small())
    number = editor.number("/none")
    with editor.inode(number) as record:
        record[160:] = os.urandom(4).replace(b"\xea", b"\0") + b"\xff" * 92
    core = Core(editor.data)
    assert xattr.has_none(core.inode(number)) and core.run(xattr.names, core.inode(number), True) == []


def test_an_extra_size_without_room_for_attributes() -> None:
    for reach in (0, 128, 124):
        editor = Editor(small("-O ^metadata_csum"))
        number = editor.number("/none")
        editor.put_inode(number, extra_isize=reach)
        core = Core(editor.data)
        assert xattr.has_none(core.inode(number)) and core.run(xattr.names, core.inode(number), True) == []


# ---- broken value inodes ---------------------------------------------------------------------------------------

def with_value_inode(size: int = 3000, **fields: int) -> tuple[Core, int, int]:
    """A core over an image in which /xattrs/shared-1 has user.v in an inode of its own, as made from /value."""
    root = new_path(".tree")
    root.unlink()
    root.mkdir()
    (root / "owner").write_bytes(b"")
    os.setxattr(root / "owner", "user.v", b"small" * 40)
    value = b"0123456789" * 300
    (root / "value").write_bytes(value)
    editor = Editor(image("-t ext4 -b 1024 -I 256 -O ^has_journal,^resize_inode,ea_inode", 4096, root))
    owner, holder = editor.number("/owner"), editor.number("/value")
    with editor.xattr_block(owner) as raw:
        raw[:] = block_with(entry(b"v", 0, size, inode=holder))
    stored = {"flags": FLAG_EXTENTS | FLAG_EA_INODE, "atime": checksum.crc32c(editor.seed, value), "atime_extra": 0}
    editor.put_inode(holder, **(stored | fields))
    return Core(editor.data), owner, holder


def test_a_value_inode_is_checked_against_its_hash() -> None:
    core, owner, _ = with_value_inode()
    assert core.run(xattr.get, core.inode(owner), b"user.v") == b"0123456789" * 300
    core, owner, holder = with_value_inode(atime=5)
    with pytest.raises(Corrupt) as caught:
        core.run(xattr.get, core.inode(owner), b"user.v")
    assert caught.value.check is Check.XATTR_HASH
    assert caught.value.where == {"inode": owner, "value_inode": holder}


def test_an_old_value_inode_names_its_owner_instead() -> None:
    core, owner, _ = with_value_inode(atime=5, mtime=13)
    assert owner != 13 or core.run(xattr.get, core.inode(owner), b"user.v")
    core, owner, _ = with_value_inode(atime=5, mtime=owner, mtime_extra=0)
    assert core.run(xattr.get, core.inode(owner), b"user.v") == b"0123456789" * 300


@pytest.mark.parametrize("fields", [
    {"flags": FLAG_EXTENTS}, {"mode": 0o40755}, {"size_lo": 2999}, {"size_lo": 3001},
    {"size": 70_000, "size_lo": 70_000}, {"size": 3 << 10, "size_lo": 3 << 10, "block": b"\x0a\xf3\0\0\4\0\0\0"}],
    ids=["no flag", "a directory", "shorter", "longer", "more than a call can carry", "a hole"])
def test_a_malformed_value_inode(fields: dict[str, int]) -> None:
    core, owner, holder = with_value_inode(**fields)
    with pytest.raises(Corrupt) as caught:
        core.run(xattr.get, core.inode(owner), b"user.v")
    assert caught.value.check is Check.XATTR_INODE
    assert caught.value.where["value_inode"] == holder


def test_a_value_inode_out_of_range() -> None:
    editor = Editor(small())
    number = editor.number("/both")
    with editor.xattr_block(number) as raw:
        raw[:] = block_with(entry(b"v", 0, 100, inode=0xFFFFFFFF))
    core = Core(editor.data)
    with pytest.raises(Corrupt) as caught:
        core.run(xattr.get, core.inode(number), b"user.v")
    assert caught.value.check is Check.INODE_NUMBER and caught.value.where == {"inode": 0xFFFFFFFF}


def test_random_blocks_give_attributes_or_one_clear_error() -> None:
    chosen, editor = seeded(), Editor(small("-O ^metadata_csum"))
    number = editor.number("/xattrs/many")
    original = bytes(editor.xattr_block(number).raw)
    for _ in range(300):
        with editor.xattr_block(number) as raw:
            raw[:] = original
            for _ in range(chosen.choice((1, 3, 20))):
                raw[32 + chosen.randrange(200)] = chosen.choice((0, 1, 255, chosen.randrange(256)))
        core = Core(editor.data)
        found = core.inode(number)
        try:
            for name in core.run(xattr.names, found, True):
                core.run(xattr.get, found, name)
        except Corrupt as error:
            assert error.check in (Check.XATTR_ENTRY, Check.XATTR_INODE, Check.INODE_NUMBER, Check.XATTR_HASH,
                                   Check.ACL_FORMAT)
        except Refused as error:
            assert error.errno in (errno.EINVAL, errno.EOPNOTSUPP)
