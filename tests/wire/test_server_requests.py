"""Each kind of request to the real server, and its reply."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire import ioctl, log, ops, uapi
from fusewire.session import Session
from fusewire.wire import Request
from tests.wire.kernel_peer import FILES, OFFERED, Peer, Reply, make_image, served

FOREVER = (1 << 32) - 1


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("server"))


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events go to the standard error of the test that is running."""
    monkeypatch.setitem(log._state, "logger", None)


@pytest.fixture
def peer(image: Path) -> Iterator[Peer]:
    with served(image) as peer:
        peer.init()
        yield peer


Listed = tuple[dict[str, int], dict[str, int], bytes]


def entries(body: bytes, plus: bool) -> list[Listed]:
    """(entry, dirent, name) of each name in a READDIR or READDIRPLUS reply."""
    found, at = [], 0
    head = uapi.entry_out.size if plus else 0
    while at < len(body):
        entry = uapi.entry_out.decode(body, at) if plus else {}
        dirent = uapi.dirent.decode(body, at + head)
        start = at + head + uapi.dirent.size
        found.append((entry, dirent, body[start : start + dirent["namelen"]]))
        at += -(-(head + uapi.dirent.size + dirent["namelen"]) // 8) * 8
    assert at == len(body)
    return found


def list_all(peer: Peer, opcode: int, node: int, size: int = 4096) -> list[Listed]:
    found: list[Listed] = []
    while True:
        offset = found[-1][1]["off"] if found else 0
        reply = peer.call(opcode, node, uapi.read_in.encode(offset=offset, size=size))
        assert reply.error == 0 and len(reply.body) <= size
        if not reply.body:
            return found
        found += entries(reply.body, opcode == uapi.FUSE_READDIRPLUS)


def test_init_grants_only_what_was_offered(image: Path) -> None:
    with served(image) as peer:
        agreed = uapi.init_out.decode(peer.init().body)
        flags = agreed["flags"] | agreed["flags2"] << 32
        assert flags & ~OFFERED == 0
        assert flags & uapi.FUSE_DO_READDIRPLUS and flags & uapi.FUSE_MAX_PAGES and flags & uapi.FUSE_POSIX_ACL
        assert not flags & (uapi.FUSE_ATOMIC_O_TRUNC | uapi.FUSE_WRITEBACK_CACHE)
        assert agreed["max_pages"] == 256 and agreed["minor"] == 45


def test_an_old_kernel_is_told_so_once(image: Path) -> None:
    with served(image) as peer:
        assert peer.init(minor=20).errno == errno.EPROTO
        assert peer.init().error == 0


def test_lookup_counts_and_lasts_for_ever(peer: Peer) -> None:
    reply = peer.call(uapi.FUSE_LOOKUP, 1, b"a\0")
    entry = uapi.entry_out.decode(reply.body)
    assert entry["entry_valid"] == entry["attr_valid"] == FOREVER
    assert entry["attr.ino"] == entry["nodeid"] and entry["attr.size"] == len(FILES[b"a"])
    peer.lookup(b"a")
    assert peer.session.lookups.count(entry["nodeid"]) == 2
    peer.send(uapi.FUSE_FORGET, entry["nodeid"], uapi.forget_in.encode(nlookup=1))
    assert peer.is_alive()
    assert peer.session.lookups.count(entry["nodeid"]) == 1


def test_an_absent_name_is_remembered(peer: Peer) -> None:
    entry = uapi.entry_out.decode(peer.call(uapi.FUSE_LOOKUP, 1, b"absent\0").body)
    assert entry["nodeid"] == 0 and entry["entry_valid"] == FOREVER
    assert len(peer.session.lookups) == 0


@pytest.mark.parametrize(
    ("parent", "name", "number"),
    [("1", b"x" * 256, errno.ENAMETOOLONG), ("a", b"x", errno.ENOTDIR), ("2", b"a", errno.ESTALE)],
    ids=["too long", "in a file", "node 2"],
)
def test_lookup_refuses(peer: Peer, parent: str, name: bytes, number: int) -> None:
    node = int(parent) if parent.isdigit() else peer.lookup(parent.encode())
    assert peer.call(uapi.FUSE_LOOKUP, node, name + b"\0").errno == number


def test_nodes_from_file_handles(peer: Peer) -> None:
    """LOOKUP of "." and "..", by which open_by_handle_at(2) and NFS come back to a node."""
    node, below = peer.lookup(b"d"), peer.lookup(b"name000", peer.lookup(b"d"))
    assert peer.lookup(b".", node) == node
    assert peer.lookup(b".", below) == below
    assert peer.lookup(b"..", node) == 1
    assert peer.call(uapi.FUSE_LOOKUP, 999_999_999, b".\0").errno == errno.ESTALE
    assert peer.call(uapi.FUSE_LOOKUP, 8, b".\0").errno == errno.ESTALE  # the journal


def test_getattr_and_statx_agree(peer: Peer, image: Path) -> None:
    node = peer.lookup(b"big")
    attr = uapi.attr_out.decode(peer.call(uapi.FUSE_GETATTR, node, uapi.getattr_in.encode()).body)
    stats = uapi.statx_out.decode(peer.call(uapi.FUSE_STATX, node, uapi.statx_in.encode(sx_mask=0xFFF)).body)
    original = (image.parent / "tree" / "big").stat()
    for name in ("size", "blocks", "mode", "nlink", "uid", "gid", "ino", "blksize"):
        assert attr[f"attr.{name}"] == stats[f"stat.{name}"], name
    assert attr["attr.size"] == original.st_size and attr["attr.mode"] == original.st_mode
    assert attr["attr.mtime"] == stats["stat.mtime.tv_sec"]
    assert attr["attr.mtimensec"] == stats["stat.mtime.tv_nsec"]
    assert stats["stat.mask"] == 0xFFF and stats["stat.btime.tv_sec"] > 0
    assert attr["attr_valid"] == FOREVER


def test_the_root_shows_its_inode_number(peer: Peer) -> None:
    attr = uapi.attr_out.decode(peer.call(uapi.FUSE_GETATTR, 1, uapi.getattr_in.encode()).body)
    assert attr["attr.ino"] == 2 and stat.S_ISDIR(attr["attr.mode"])


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 5000, 65536])
@pytest.mark.parametrize("offset", [0, 1, 4096, 262_000, 262_143, 262_144, 1 << 40])
def test_read(peer: Peer, offset: int, size: int) -> None:
    reply = peer.read(peer.lookup(b"big"), offset, size)
    assert reply.error == 0 and reply.body == FILES[b"big"][offset : offset + size]


def test_read_refuses_what_is_no_file(peer: Peer) -> None:
    assert peer.read(1, 0, 4096).errno == errno.EISDIR
    assert peer.read(peer.lookup(b"link"), 0, 4096).errno == errno.EINVAL


@pytest.mark.parametrize("size", [300, 4096, 65536])
def test_readdir_lists_every_name_once(peer: Peer, size: int) -> None:
    node = peer.lookup(b"d")
    found = list_all(peer, uapi.FUSE_READDIR, node, size)
    assert sorted(name for _, _, name in found) == sorted([b".", b"..", *(b"name%03d" % n for n in range(300))])


@pytest.mark.parametrize("size", [300, 4096, 65536])
def test_readdirplus_is_a_lookup_of_every_name(peer: Peer, size: int) -> None:
    node = peer.lookup(b"d")
    found = list_all(peer, uapi.FUSE_READDIRPLUS, node, size)
    assert len(found) == 302
    for entry, dirent, name in found:
        if name in (b".", b".."):
            assert entry["nodeid"] == 0
            continue
        assert entry["nodeid"] == dirent["ino"] == entry["attr.ino"] and dirent["type"] == 8
        assert peer.session.lookups.count(entry["nodeid"]) == 1
        assert entry["entry_valid"] == FOREVER
    assert len(peer.session.lookups) == 301


def test_a_reply_names_no_more_than_the_cache_can_hold_inodes_of(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be fetched, pushed out and fetched again for ever."""
    node = peer.lookup(b"d")
    monkeypatch.setattr(peer.session.fs.cache, "generation_blocks", 64)
    tail = uapi.read_in.encode(size=65536)
    first = entries(peer.call(uapi.FUSE_READDIRPLUS, node, tail).body, plus=True)
    blocks = {(dirent["ino"] - 1) // (peer.session.fs.geometry.block_bytes // 256) for _, dirent, _ in first}
    assert 0 < len(first) < 302 and len(blocks) <= 32
    assert len(list_all(peer, uapi.FUSE_READDIRPLUS, node, 65536)) == 302


def test_readdir_of_a_file_is_refused(peer: Peer) -> None:
    tail = uapi.read_in.encode(size=4096)
    assert peer.call(uapi.FUSE_READDIR, peer.lookup(b"a"), tail).errno == errno.ENOTDIR


def test_readlink(peer: Peer) -> None:
    assert peer.call(uapi.FUSE_READLINK, peer.lookup(b"link")).body == b"a"
    assert peer.call(uapi.FUSE_READLINK, peer.lookup(b"a")).errno == errno.EINVAL


def test_open_and_opendir_are_not_needed(peer: Peer) -> None:
    for opcode in (uapi.FUSE_OPEN, uapi.FUSE_OPENDIR):
        assert peer.call(opcode, 1, uapi.open_in.encode()).errno == errno.ENOSYS


def test_open_is_answered_where_the_kernel_insists(image: Path) -> None:
    with served(image) as peer:
        peer.init(OFFERED & ~(uapi.FUSE_NO_OPEN_SUPPORT | uapi.FUSE_NO_OPENDIR_SUPPORT))
        opened = uapi.open_out.decode(peer.call(uapi.FUSE_OPEN, peer.lookup(b"a"), uapi.open_in.encode()).body)
        assert opened["open_flags"] == uapi.FOPEN_KEEP_CACHE
        opened = uapi.open_out.decode(peer.call(uapi.FUSE_OPENDIR, 1, uapi.open_in.encode()).body)
        assert opened["open_flags"] == uapi.FOPEN_KEEP_CACHE | uapi.FOPEN_CACHE_DIR
        assert peer.call(uapi.FUSE_RELEASE, 1, uapi.release_in.encode()).error == 0


@pytest.mark.parametrize("row", [row for row in ops.ROWS if row.changes], ids=lambda row: ops.name_of(row.opcode))
def test_changes_are_refused(peer: Peer, row: ops.Op) -> None:
    assert peer.call(row.opcode, 1, bytes(128) + b"a\0b\0").errno == errno.EROFS


@pytest.mark.parametrize(
    ("opcode", "number"),
    [(uapi.FUSE_FLUSH, errno.ENOSYS), (uapi.FUSE_ACCESS, errno.ENOSYS), (uapi.FUSE_POLL, errno.ENOSYS),
     (uapi.FUSE_INTERRUPT, errno.ENOSYS), (uapi.FUSE_GETLK, errno.ENOSYS), (4711, errno.ENOSYS),
     (uapi.FUSE_FSYNC, 0), (uapi.FUSE_FSYNCDIR, 0), (uapi.FUSE_SYNCFS, 0), (uapi.FUSE_DESTROY, 0)],
)  # fmt: skip
def test_the_other_opcodes(peer: Peer, opcode: int, number: int) -> None:
    assert peer.call(opcode, 1, bytes(64)).errno == number


def test_lseek(peer: Peer) -> None:
    node = peer.lookup(b"big")
    seek = uapi.lseek_in.encode
    assert peer.call(uapi.FUSE_LSEEK, node, seek(offset=5, whence=os.SEEK_DATA)).body == struct.pack("=Q", 5)
    end = len(FILES[b"big"])
    assert peer.call(uapi.FUSE_LSEEK, node, seek(offset=5, whence=os.SEEK_HOLE)).body == struct.pack("=Q", end)
    assert peer.call(uapi.FUSE_LSEEK, node, seek(offset=end, whence=os.SEEK_DATA)).errno == errno.ENXIO
    assert peer.call(uapi.FUSE_LSEEK, node, seek(offset=0, whence=os.SEEK_CUR)).errno == errno.EINVAL


def test_bmap_names_the_block_that_holds_the_data(peer: Peer, image: Path) -> None:
    node = peer.lookup(b"big")
    body = peer.call(uapi.FUSE_BMAP, node, uapi.bmap_in.encode(block=3, blocksize=512)).body
    (sector,) = struct.unpack("=Q", body)
    with image.open("rb") as file:
        file.seek(sector * 512)
        assert file.read(512) == FILES[b"big"][3 * 512 : 4 * 512]
    assert peer.call(uapi.FUSE_BMAP, node, uapi.bmap_in.encode(block=1 << 50, blocksize=512)).body == bytes(8)
    assert peer.call(uapi.FUSE_BMAP, node, uapi.bmap_in.encode(block=1, blocksize=7)).errno == errno.EINVAL


def test_statfs(peer: Peer) -> None:
    figures = uapi.statfs_out.decode(peer.call(uapi.FUSE_STATFS, 1).body)
    assert figures["st.bsize"] == figures["st.frsize"] > 0
    assert 0 < figures["st.bavail"] <= figures["st.bfree"] < figures["st.blocks"]
    assert figures["st.namelen"] == 255


def test_xattr_sizes(peer: Peer) -> None:
    def get(name: bytes, size: int) -> Reply:
        return peer.call(uapi.FUSE_GETXATTR, 1, uapi.getxattr_in.encode(size=size) + name + b"\0")

    assert get(b"user.absent", 0).errno == errno.ENODATA
    assert get(b"strange.name", 100).errno == errno.EOPNOTSUPP
    listed = peer.call(uapi.FUSE_LISTXATTR, 1, uapi.getxattr_in.encode(size=0))
    assert struct.unpack("=II", listed.body) == (0, 0)


def ioctl_call(peer: Peer, command: int, room: int) -> Reply:
    return peer.call(uapi.FUSE_IOCTL, 1, uapi.ioctl_in.encode(cmd=command & 0xFFFFFFFF, out_size=room))


def test_ioctl(peer: Peer) -> None:
    reply = ioctl_call(peer, ioctl.FS_IOC_GETFLAGS, 4)
    assert uapi.ioctl_out.decode(reply.body)["result"] == 0 and len(reply.body) == uapi.ioctl_out.size + 4
    reply = ioctl_call(peer, ioctl.FS_IOC_FSGETXATTR, ioctl.FSXATTR.size)
    assert len(reply.body) == uapi.ioctl_out.size + ioctl.FSXATTR.size
    reply = ioctl_call(peer, ioctl.FS_IOC_GETFSUUID, ioctl.FSUUID2.size)
    assert reply.body[uapi.ioctl_out.size + 1 :] == peer.session.fs.superblock.uuid
    assert ioctl_call(peer, ioctl.FS_IOC_SETFLAGS, 0).errno == errno.EROFS
    assert ioctl_call(peer, 0x12345678, 0).errno == errno.ENOTTY
    assert ioctl_call(peer, ioctl.FS_IOC_GETFLAGS, 1 << 30).errno == errno.EINVAL


def test_batch_forget(peer: Peer) -> None:
    nodes = [peer.lookup(name) for name in (b"a", b"big", b"a")]
    tail = uapi.batch_forget_in.encode(count=2) + struct.pack("=QQQQ", nodes[0], 2, nodes[1], 5)
    peer.send(uapi.FUSE_BATCH_FORGET, 0, tail)
    assert peer.is_alive() and peer.nothing_came()
    assert len(peer.session.lookups) == 0


def test_forgets_are_never_answered_however_wrong(peer: Peer) -> None:
    peer.send(uapi.FUSE_FORGET, 1)
    peer.send(uapi.FUSE_BATCH_FORGET, 1, uapi.batch_forget_in.encode(count=1 << 30) + bytes(16))
    peer.send(uapi.FUSE_NOTIFY_REPLY, 1, bytes(4))
    peer.send(uapi.FUSE_FORGET, 77, uapi.forget_in.encode(nlookup=1 << 63))
    assert peer.is_alive() and peer.nothing_came()


def test_our_bug_costs_one_request(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_session: Session, _request: Request) -> bytes:
        raise ZeroDivisionError("on purpose")

    rows = peer.server._rows
    monkeypatch.setitem(rows, uapi.FUSE_STATFS, rows[uapi.FUSE_STATFS]._replace(handler=broken))
    assert peer.call(uapi.FUSE_STATFS, 1).errno == errno.EIO
    assert peer.is_alive()
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [record["event"] for record in logged] == ["bug"] and "on purpose" in logged[0]["exception"]


def test_an_opcode_without_handler_is_logged_once(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        assert peer.call(uapi.FUSE_SETLK, 1, bytes(64)).errno == errno.ENOSYS
    assert capsys.readouterr().err.count("opcode_not_served") == 1


def test_errors_of_a_hostile_image_do_not_fill_the_log(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    for node in range(200):
        peer.call(uapi.FUSE_GETATTR, 1_000_000 + node, uapi.getattr_in.encode())
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert 0 < len(logged) <= 20
    assert logged[0]["event"] == "corrupt" and logged[0]["check"] == "INODE_NUMBER" and logged[0]["op"] == "GETATTR"


def test_the_wire_log_has_every_message(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "wire.json"
    with served(image, wirelog=path) as peer:
        peer.init()
        peer.read(peer.lookup(b"big"), 0, 8192)
        peer.send(uapi.FUSE_FORGET, 12, uapi.forget_in.encode(nlookup=1))
        assert peer.is_alive()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    seen = [(record["direction"], record["opcode"]) for record in records]
    assert seen == [
        ("request", "INIT"), ("reply", "INIT"), ("request", "LOOKUP"), ("reply", "LOOKUP"), ("request", "READ"),
        ("reply", "READ"), ("request", "FORGET"), ("request", "GETATTR"), ("reply", "GETATTR"),
    ]  # fmt: skip


def test_a_table_with_two_rows_for_one_opcode_is_refused() -> None:
    with pytest.raises(ValueError, match="two rows for READ"):
        ops.table((ops.Op(uapi.FUSE_READ), ops.Op(uapi.FUSE_READ)), read_only=True)
